"""What the intervals of a sweep say of the paper's claims, in a sentence each.

Every comparison is paired by seed: the mean of the differences, and its interval by Student's t at 95 %. One seed shows
nothing.
"""

from collections.abc import Mapping, Sequence

from samlite.intervals import Interval, paired
from samlite.report.groups import described
from samlite.report.outcomes import Outcome, Report, Row
from samlite.report.table import digits
from samlite.report.trends import IMPROVEMENT, Trend, amount, growth_of_sam, of_sam, trends
from samlite.tasks.metrics import percent

QUANTITIES = ("a", "s_2", "s_3", "s_4")


def benefit(report: Report) -> str:
    """Whether SAM's benefit grows with width, in every condition, and where its minima are flatter and more uniform."""
    found = trends(report)
    sentences = [_benefit(report, condition, found) for condition in report.conditions]
    first, *later = sentences
    later = [f"{sentence[0].upper()}{sentence[1:]}" for sentence in later]
    return ". ".join([first, *later, *_beyond(report, found), *_minima(report), *_trends_of_minima(found)])


def _benefit(report: Report, condition: dict[str, float], found: Sequence[Trend]) -> str:
    outcomes = _compared([row for row in report.rows if row.condition == condition])
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
    effect = f"SAM is {' and '.join(said)}" if said else _no_difference(gains, report.metric)
    if len(outcomes) < 2:
        return prefix + effect
    return f"{prefix}{effect}; {_growth(growth_of_sam(found, condition), gains[max(gains)], report.metric)}"


def _no_difference(gains: Mapping[int, Interval], metric: str) -> str:
    """With what could have been seen: an effect of the half width of the narrowest and of the widest interval."""
    halves = sorted(gain.half_width * percent(metric) for gain in gains.values() if gain.half_width is not None)
    text = "SAM makes no significant difference at any width"
    if not halves:
        return text
    span = " to ".join(dict.fromkeys(map(digits, (halves[0], halves[-1]))))
    return f"{text}, where {span}{_unit(metric)} could have been seen"


def _growth(slope: Interval | None, last: Interval, metric: str) -> str:
    """On the claim that the gain grows with width, by the slope over all widths; `last` is the gain at the largest."""
    if slope is None or slope.half_width is None:
        return "too few seeds to judge its growth"
    text = f"its benefit changes by {amount(slope, metric)}"
    if slope.positive:
        if last.positive:
            return f"{text}: it grows, and this agrees"
        below = "below zero" if last.negative else "not significantly above zero"
        return f"{text}: it grows, but is {below} at the largest width, so this agrees in trend alone"
    if slope.negative:
        return f"{text}: it falls, so this disagrees"
    seen = f"a growth of {digits(slope.half_width * percent(metric))}{_unit(metric)} could have been seen"
    end = "this agrees in part" if last.positive else "this neither shows nor excludes it"
    return f"{text}, so no growth is seen, where {seen}: {end}"


def _unit(metric: str) -> str:
    return " points" if percent(metric) == 100 else ""


def _minima(report: Report) -> list[str]:
    """At how many places each quantity of SAM's minima is smaller or larger than its base's."""
    outcomes = [row.sam for row in report.rows if row.sam]
    said = []
    for name in QUANTITIES:
        compared = [each.comparisons[name].verdict for each in outcomes if name in each.comparisons]
        verdicts = [verdict for verdict in compared if verdict]
        if verdicts:
            text = f"{name} in {verdicts.count('smaller')} of {len(verdicts)} places"
            said.append(f"{text} (larger in {verdicts.count('larger')})" if "larger" in verdicts else text)
    return [f"Significantly smaller at SAM's minima: {', '.join(said)}"] if said else []


def _beyond(report: Report, found: Sequence[Trend]) -> list[str]:
    """Whether the benefit grows faster with width under later conditions than under the first one."""
    said = []
    for trend in of_sam(found, IMPROVEMENT):
        if trend.beyond is None or trend.beyond.half_width is None:
            continue
        change = "faster" if trend.beyond.positive else "slower" if trend.beyond.negative else "no faster"
        text = f"Under {described(trend.condition.items())} it grows {change} than under the first condition"
        said.append(f"{text} ({amount(trend.beyond, report.metric)})")
    return said


def _trends_of_minima(found: Sequence[Trend]) -> list[str]:
    """Whether a and s_k of SAM's minima over its base's fall with width."""
    said = []
    for trend in found:
        if trend.quantity == IMPROVEMENT or trend.slope.half_width is None:
            continue
        change = "rises" if trend.slope.positive else "falls" if trend.slope.negative else "does not change"
        where = described(trend.condition.items())
        text = f"ln {trend.quantity} of {trend.optimizer} over its base {change} with width"
        said.append(f"{where + ': ' if where else ''}{text} ({amount(trend.slope, None)})")
    return said


def no_benefit(report: Report) -> str:
    """On the claim that SAM has no benefit, as in the linearized regime."""
    gains = [outcome.improvement for outcome in _compared(report.rows).values()]
    some = any(gain and gain.positive for gain in gains)
    return "SAM is better at some width: this disagrees" if some else "SAM is better at no width: this agrees"


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


def _compared(rows: Sequence[Row]) -> dict[int, Outcome]:
    """SAM's outcomes by width, where they have a baseline."""
    return {row.width: row.sam for row in rows if row.sam and row.sam.improvement}
