"""What the intervals of a sweep say of the paper's claims, in a sentence each.

Every comparison is paired by seed: the mean of the differences, and its interval by Student's t at 95 %. One seed shows
nothing.
"""

from collections.abc import Sequence

from samlite.intervals import paired
from samlite.report.groups import described
from samlite.report.outcomes import Outcome, Report, Row

QUANTITIES = ("a", "s_2", "s_3", "s_4")


def benefit(report: Report) -> str:
    """Whether SAM's benefit grows with width, in every condition, and where its minima are flatter and more uniform."""
    conditions = dict.fromkeys(tuple(row.condition.items()) for row in report.rows)
    sentences = [_benefit(report, dict(condition)) for condition in conditions]
    return ". ".join([*sentences, *_minima(report)])


def _benefit(report: Report, condition: dict[str, float]) -> str:
    outcomes = _sam([row for row in report.rows if row.condition == condition])
    where = described(condition.items())
    prefix = f"{where}: " if where else ""
    if not outcomes:
        return f"{prefix}SAM has no baseline with the same seeds"
    gains = {width: outcome.improvement for width, outcome in outcomes.items() if outcome.improvement}
    said = []
    for word, widths in (
        ("better", [str(width) for width, gain in gains.items() if gain.positive]),
        ("worse", [str(width) for width, gain in gains.items() if gain.negative]),
    ):
        if widths:
            said.append(f"{word} at width {', '.join(widths)}")
    effect = f"SAM is {' and '.join(said)}" if said else "SAM makes no significant difference at any width"
    if len(outcomes) < 2:
        return prefix + effect
    return f"{prefix}{effect}: {growth(outcomes[min(outcomes)], outcomes[max(outcomes)])}"


def growth(first: Outcome, last: Outcome) -> str:
    """On the claim that the gain grows with width, from the gains of each seed at the smallest and largest width."""
    gain, difference = last.improvement, paired(last.gains, first.gains)
    if gain is None or difference is None or difference.half_width is None:
        return "too few seeds to judge"
    if gain.positive:
        return "this agrees" if difference.positive else "this agrees in part, as the gain does not grow significantly"
    if difference.positive:
        below = "below zero" if gain.negative else "not significantly above zero"
        return f"this agrees in trend alone, as the gain grows with width but is {below} at the largest"
    return "this disagrees" if gain.negative else "this neither shows nor excludes it"


def _minima(report: Report) -> list[str]:
    """At how many places each quantity of SAM's minima is smaller or larger than its base's."""
    outcomes = [row.optimizers["sam"] for row in report.rows if "sam" in row.optimizers]
    said = []
    for name in QUANTITIES:
        compared = [each.comparisons[name].verdict for each in outcomes if name in each.comparisons]
        verdicts = [verdict for verdict in compared if verdict]
        if verdicts:
            text = f"{name} in {verdicts.count('smaller')} of {len(verdicts)} places"
            said.append(f"{text} (larger in {verdicts.count('larger')})" if "larger" in verdicts else text)
    return [f"Significantly smaller at SAM's minima: {', '.join(said)}"] if said else []


def no_benefit(report: Report) -> str:
    """On the claim that SAM has no benefit, as in the linearized regime."""
    gains = [outcome.improvement for outcome in _sam(report.rows).values()]
    some = any(gain and gain.positive for gain in gains)
    return "SAM is better at some width: this disagrees" if some else "SAM is better at no width: this agrees"


def best_radius(report: Report) -> str:
    """On the claim that the best rho grows with width."""
    chosen = {row.width: row.optimizers["sam"].rho or 0.0 for row in report.rows if "sam" in row.optimizers}
    grows = sorted(chosen.values()) == list(chosen.values())
    values = ", ".join(f"{rho:g} at width {width}" for width, rho in chosen.items())
    moves = "does not fall with width" if grows else "does not grow steadily with width"
    agrees = "consistent with the claim" if grows else "not in agreement with it"
    return f"the best radius is {values}: it {moves}, which is {agrees}, though few widths show little"


def radii(report: Report) -> str:
    """The radius of each form of SAM that is best on validation."""
    best = [f"{name} {each.rho:g}" for row in report.rows for name, each in row.optimizers.items() if each.rho]
    return f"the radius that is best on validation: {', '.join(best)}"


def variants(report: Report) -> str:
    """Which optimizers beat their base, and which beat SAM, at equal epochs."""
    outcomes = {name: each for row in report.rows for name, each in row.optimizers.items() if each.gains}
    better = [name for name, each in outcomes.items() if each.improvement and each.improvement.positive]
    sam = outcomes.get("sam")
    beyond = [
        name
        for name, each in outcomes.items()
        if sam and each is not sam and (gain := paired(each.gains, sam.gains)) and gain.positive
    ]
    return (
        f"at equal epochs {' and '.join(better) or 'none'} beat the base significantly, and "
        f"{' and '.join(beyond) or 'no variant'} beat SAM"
    )


def _sam(rows: Sequence[Row]) -> dict[int, Outcome]:
    """SAM's outcomes by width, where they have a baseline."""
    return {
        row.width: outcome
        for row in rows
        for name, outcome in row.optimizers.items()
        if name.split("-")[0] == "sam" and outcome.improvement
    }
