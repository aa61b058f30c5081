"""Makes docs/results.md: every sweep that it names is run (or continued), reported and judged.

    python tools/results.py DATA [NAME ...]

DATA is a folder with mnist, cifar10, sst2, pos and molecules/tox21.csv.gz inside; NAMEs choose some of the sweeps, and
the page is made of all those that are finished. Runs are kept in runs/results; delete a folder there to repeat a sweep.
"""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from samlite.files import read_json
from samlite.intervals import Interval
from samlite.report import figures
from samlite.report.by_width import Report, percent, summarize
from samlite.report.convergence import convergence
from samlite.report.cost import costs
from samlite.report.groups import groups
from samlite.report.solutions import solutions
from samlite.sweep.run import read

ROOT = Path(__file__).resolve().parents[1] / "docs"
RUNS = ROOT.parent / "runs" / "results"


@dataclass(frozen=True)
class Experiment:
    """A sweep on the page, or several in one folder."""

    name: str
    title: str
    options: str  # of `samlite sweep`, a line each; DATA is the folder of data
    says: str  # what the paper says of it
    note: str = ""  # where this differs from the paper's setting


UNTUNED = "short schedule; rho is the recipe's, not searched; curvature not measured"

EXPERIMENTS = (
    Experiment(
        "synthetic",
        "Teacher and student",
        "synthetic --widths 192,400,800,1920 --seeds 5 --epochs 50",
        "SAM's test loss falls below that of SGD as the two-layer student grows",
    ),
    Experiment(
        "digits",
        "Digits, with the moments of the minima",
        "digits --widths 16,64,256 --seeds 5 --measure eigenvalues,moments",
        "SAM's benefit grows with width, and its minima are flatter and more uniform",
    ),
    Experiment(
        "mnist-noise",
        "MNIST with label noise",
        "mnist --data DATA/mnist --widths 37,150,600 --seeds 3 --epochs 15 --label-noises 0.25,0.5",
        "the benefit grows with width, and more so with label noise",
        "7,200 of the 54,000 training images, 15 of 100 epochs; rho of the recipe",
    ),
    Experiment(
        "mnist-sparse",
        "MNIST, dense and sparse",
        "mnist --data DATA/mnist --widths 37,150,600 --seeds 3 --epochs 15 --sparsities 0,0.9",
        "at equal parameters SAM gains more on the sparse, wider network",
        "the same short training, rho of the recipe; random masks",
    ),
    Experiment(
        "sst2",
        "Sentiment, bidirectional LSTM",
        "sst2 --data DATA/sst2 --widths 8,16,32 --seeds 3 --epochs 2 --measure none",
        "SAM's benefit grows with width",
        UNTUNED,
    ),
    Experiment(
        "pos",
        "Part-of-speech tags, Transformer",
        "pos --data DATA/pos --widths 16,32,64 --seeds 3 --epochs 6 --measure none",
        "SAM's benefit grows with width",
        "the dev file of UD English EWT as training data; " + UNTUNED,
    ),
    Experiment(
        "molpcba",
        "Molecules (Tox21), graph convolutions",
        "molpcba --data DATA/molecules/tox21.csv.gz --widths 16,32,64 --seeds 3 --epochs 6 --measure none",
        "SAM's benefit grows with width",
        "Tox21 in place of ogbg-molpcba; " + UNTUNED,
    ),
    Experiment(
        "cartpole",
        "CartPole, PPO",
        "cartpole --widths 8,16,64 --seeds 3 --epochs 15 --measure none",
        "SAM's benefit grows with width (on Atari games)",
        "CartPole in place of Atari, where many runs reach the largest score; " + UNTUNED,
    ),
    Experiment(
        "cifar10",
        "CIFAR-10, ResNet-18",
        "cifar10 --data DATA/cifar10 --widths 2,4,6 --seeds 3 --epochs 3 --threads 1 --schedule cosine --batch-size 64 "
        "--lr 0.05 --measure none",
        "SAM's benefit grows with width",
        "9,000 of the 45,000 training images, 2 to 6 filters, 3 of 200 epochs; " + UNTUNED,
    ),
    Experiment(
        "convergence",
        "Linear convergence",
        "synthetic --widths 192,800,1920 --seeds 3 --epochs 100 --schedule constant --rhos 0.05 --measure none",
        "an overparameterised network converges linearly under SAM",
        "a constant learning rate and mini-batches of 32, which leave a floor",
    ),
    Experiment(
        "rhos",
        "The best radius by width",
        "digits --widths 16,64,256 --seeds 3 --rhos 0.02,0.05,0.1,0.2,0.4 --measure none",
        "the best rho grows with width",
        "rho is selected on 100 validation images",
    ),
    Experiment(
        "forms",
        "The radius of SAM, of ASAM and without normalisation",
        "digits --widths 64 --seeds 5 --rhos 0.02,0.05,0.1,0.2,0.5 --measure none\n"
        "digits --widths 64 --optimizers sam --base sgd --adaptive all --seeds 5 --rhos 0.2,0.5,1,2,4 --measure none\n"
        "digits --widths 64 --optimizers sam --base sgd --adaptive weights --seeds 5 --rhos 0.2,0.5,1,2,4 "
        "--measure none\n"
        "digits --widths 64 --optimizers sam --base sgd --no-normalize --seeds 5 --rhos 0.02,0.1,0.5,2 --measure none",
        "(of Kwon et al. 2021, not of this paper) the best radius of ASAM is about ten times that of SAM",
        "100 validation images, on which many radii tie",
    ),
    Experiment(
        "lazy",
        "The linearised regime",
        "digits --widths 16,64,256 --seeds 3 --linearize --measure none",
        "SAM's benefit vanishes where training is lazy",
    ),
    Experiment(
        "variants-digits",
        "Variants of SAM on digits",
        "digits --widths 64 --optimizers sgd,sam,friendly,agnostic,sampa --seeds 3 --epochs 60 --schedule constant "
        "--measure none",
        "(not of this paper) each variant was proposed to be better than SAM, or faster",
        "the radius of each is that of SAM; sigma, lmbda and rho_val are the defaults",
    ),
    Experiment(
        "variants-mnist",
        "Variants of SAM on MNIST",
        "mnist --data DATA/mnist --widths 150 --optimizers sgd,sam,friendly,agnostic,sampa --seeds 3 --epochs 15 "
        "--schedule constant --lr 0.05 --measure none",
        "(not of this paper) each variant was proposed to be better than SAM, or faster",
        "as above",
    ),
)


def main() -> None:
    data, *names = sys.argv[1:]
    chosen = [each for each in EXPERIMENTS if not names or each.name in names]
    for experiment in chosen:
        _run(experiment, Path(data).resolve())
    finished = [each for each in EXPERIMENTS if (RUNS / each.name / "wall.json").exists()]
    sections = [_section(experiment) for experiment in finished]
    (ROOT / "results.md").write_text("\n\n".join([_head(finished), *sections]) + "\n", encoding="utf-8")


def _run(experiment: Experiment, data: Path) -> None:
    folder = RUNS / experiment.name
    began = time.monotonic()
    for options in experiment.options.replace("DATA", str(data)).splitlines():
        command = [sys.executable, "-m", "samlite.cli", "sweep", *options.split(), "--out", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall = folder / "wall.json"
    before = json.loads(wall.read_text())["seconds"] if wall.exists() else 0.0
    wall.write_text(json.dumps({"seconds": before + time.monotonic() - began}))
    print(f"{experiment.name}: {time.monotonic() - began:.0f} s", file=sys.stderr)


def _head(finished: list[Experiment]) -> str:
    total = sum(json.loads((RUNS / each.name / "wall.json").read_text())["seconds"] for each in finished)
    return f"""# Results

What `samlite sweep` finds of the claims of *Critical Influence of Overparameterization on Sharpness-aware Minimization*
(arXiv 2311.17539), small enough for a laptop: short schedules, small subsets and few seeds, so a claim that does not
show here is not refuted. `python tools/results.py DATA` makes this page, tables and sentences included; nothing in it
is written by hand after a run. Every ± and every band is a 95 % Student-t interval over seeds, and each holds by
itself.

Made on {os.cpu_count()} cores of {_processor()}, torch {torch.__version__}, Python {platform.python_version()},
in {total / 60:.0f} minutes. The longest run took {_longest(finished):.0f} s of training."""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _longest(finished: list[Experiment]) -> float:
    folders = [RUNS / each.name / cell.name for each in finished for cell in read(RUNS / each.name)]
    return max(json.loads((folder / "result.json").read_text())["seconds"] for folder in folders)


def _section(experiment: Experiment) -> str:
    folder = RUNS / experiment.name
    report = summarize(folder)
    several = f" --out runs/{experiment.name}" if "\n" in experiment.options else ""
    commands = [f"samlite sweep {options}{several}" for options in experiment.options.splitlines()]
    lines = [f"## {experiment.title}", "\n".join(["```bash", *commands, "```"]), _table(report)]
    lines += _details(experiment, report, folder)
    return "\n\n".join([*lines, _verdict(experiment, report, folder)])


def _details(experiment: Experiment, report: Report, folder: Path) -> list[str]:
    """What belongs under the table: another table where there is one, and the figure."""
    if experiment.name == "forms":
        return [_radii(folder)]
    picture = ROOT / "results" / f"{experiment.name}.png"
    picture.parent.mkdir(exist_ok=True)
    tables = []
    if experiment.name == "convergence":
        figures.convergence(convergence(folder), picture)
        tables = [_rates(folder)]
    elif experiment.name.startswith("variants"):
        figures.cost(costs(folder), picture)
        tables = [_costs(folder)]
    else:
        figures.by_width(report, picture)
    if experiment.name == "digits":
        tables = [_solutions(folder)]
    return [*tables, f"![{experiment.title}](results/{experiment.name}.png)"]


def _table(report: Report) -> str:
    """The rows as Markdown."""
    scale = percent(report.metric)
    names = [name.replace("_", " ") for name in report.rows[0].condition]
    minima = sorted({name for row in report.rows for outcome in row.optimizers.values() for name in outcome.geometric})
    metric = report.metric.replace("_", " ")
    columns = [*names, "width", "parameters", "optimizer", "seeds", "interpolate", f"test {metric}{' %' * (scale > 1)}"]
    columns += ["improvement by SAM", *(f"{name}, SAM over base" for name in minima)]
    lines = [columns, ["---"] * len(columns)]
    for row in report.rows:
        for name, outcome in row.optimizers.items():
            label = name if outcome.rho is None else f"{name} ρ={outcome.rho:g}"
            place = [*(f"{value:g}" for value in row.condition.values()), str(row.width), f"{row.parameters:,}"]
            ratios = [_ratio(outcome.comparisons.get(quantity)) for quantity in minima]
            values = [_pm(outcome.metric, scale), _pm(outcome.improvement, scale, "+")]
            lines.append([*place, label, str(outcome.metric.n), str(outcome.interpolating), *values, *ratios])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _pm(value: Interval | None, scale: float, sign: str = "") -> str:
    if value is None:
        return ""
    half = "" if value.half_width is None else f" ± {scale * value.half_width:.2g}"
    return f"{scale * value.mean:{sign}.4g}{half}"


def _ratio(found: Any) -> str:
    if found is None or found.ratio.low is None:
        return ""
    return f"{found.ratio.mean:.2g} ({found.ratio.low:.2g} to {found.ratio.high:.2g})"


def _rates(folder: Path) -> str:
    lines = ["| width | optimizer | rate, 1e-3 a step | R² |", "| --- | --- | --- | --- |"]
    for each in convergence(folder):
        group = each.group
        lines.append(f"| {group.width} | {group.optimizer} | {_pm(each.rate, 1e3)} | {_pm(each.r2, 1)} |")
    return "\n".join(lines)


def _solutions(folder: Path) -> str:
    lines = ["Of the runs that interpolate (`samlite report --solutions`):", ""]
    lines += [
        "| width | optimizer | runs | distance from first weights | from SAM's to SGD's solution |",
        "| --- " * 5 + "|",
    ]
    for each in solutions(folder):
        group = each.group
        row = [str(group.width), group.optimizer, str(each.interpolating), _pm(each.travelled, 1), _pm(each.apart, 1)]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _radii(folder: Path) -> str:
    """The validation metric by form and radius."""
    lines = ["On validation:", "", "| form | ρ | validation % |", "| --- | --- | --- |"]
    for group, cells in groups(folder).items():
        if group.rho is not None:
            scores = [read_json(folder / cell.name / "result.json")["final"]["validation_metric"] for cell in cells]
            lines.append(f"| {group.optimizer} | {group.rho:g} | {_pm(Interval.of(scores), 100)} |")
    return "\n".join(lines)


def _costs(folder: Path) -> str:
    found = costs(folder)
    lines = [f"At equal gradient evaluations, {found[0].budget:,} (`samlite report --by cost`):", ""]
    lines += ["| optimizer | epochs | validation % within the budget | gradients in all | validation % at the end |"]
    lines += ["| --- " * 5 + "|"]
    for each in found:
        row = [each.group.optimizer, f"{each.epochs:.3g}", _pm(each.at_budget, 100)]
        lines.append(f"| {' | '.join([*row, f'{each.gradients:,}', _pm(each.at_end, 100)])} |")
    return "\n".join(lines)


def _verdict(experiment: Experiment, report: Report, folder: Path) -> str:
    """What the intervals say beside what the paper says."""
    if experiment.name.startswith("variants"):
        here = _of_variants(report)
    elif experiment.name == "convergence":
        here = _of_rates(folder)
    elif experiment.name == "rhos":
        chosen = {row.width: row.optimizers["sam"].rho for row in report.rows}
        grows = sorted(chosen.values(), key=lambda rho: rho or 0) == list(chosen.values())
        values = ", ".join(f"{rho:g} at width {width}" for width, rho in chosen.items())
        moves = "does not fall with width" if grows else "does not grow steadily with width"
        agrees = "consistent with the claim" if grows else "not in agreement with it"
        here = f"the best of five is {values}: it {moves}, which is {agrees}, though three widths show little."
    elif experiment.name == "forms":
        best = [f"{name} {each.rho:g}" for name, each in report.rows[0].optimizers.items() if each.rho is not None]
        here = f"the radius that is best on validation: {', '.join(best)}."
    elif experiment.name == "lazy":
        gains = [row.optimizers["sam"].improvement for row in report.rows]
        some = any(gain and gain.mean > (gain.half_width or 0) for gain in gains)
        here = "SAM is better at some width: this disagrees." if some else "SAM is better at no width: this agrees."
    else:
        here = " ".join(_of_condition(report, condition) for condition in _conditions(report))
        here += _of_minima(report)
    note = f" Setting: {experiment.note}." if experiment.note else ""
    return f"The claim: {experiment.says}. Here: {here}{note}"


def _of_variants(report: Report) -> str:
    (row,) = report.rows
    gains = {name: outcome.improvement for name, outcome in row.optimizers.items() if outcome.improvement}
    better = [name for name, gain in gains.items() if gain.mean > (gain.half_width or 0)]
    sam = row.optimizers["sam"].metric
    beyond = [
        name
        for name, outcome in row.optimizers.items()
        if name not in ("sgd", "sam")
        and outcome.metric.mean - sam.mean > ((outcome.metric.half_width or 0) ** 2 + (sam.half_width or 0) ** 2) ** 0.5
    ]
    return (
        f"at equal epochs {' and '.join(better) or 'none'} beat SGD beyond the interval, and "
        f"{' and '.join(beyond) or 'no variant'} beat SAM beyond the combined intervals; the table above has them at "
        "equal cost."
    )


def _of_rates(folder: Path) -> str:
    found = [each for each in convergence(folder) if each.rate and each.r2 and each.group.rho is not None]
    straight = ", ".join(f"{each.r2.mean:.3f} at width {each.group.width}" for each in found if each.r2)
    rates = [each.rate.mean for each in found if each.rate]
    faster = "grows with width" if rates == sorted(rates) else "does not grow steadily with width"
    straightest = min(each.r2.mean for each in found if each.r2)
    verdict = "this agrees" if straightest >= 0.95 else "a straight line is no more than a rough description here"
    return f"under SAM R² of the straight line is {straight}, and its rate {faster}: {verdict}."


def _of_minima(report: Report) -> str:
    """Which of the quantities of SAM's minima are smaller, at which widths."""
    words = []
    for name in ("a", "s_2", "s_3", "s_4"):
        found = [
            (row, each)
            for row in report.rows
            if "sam" in row.optimizers
            if (each := row.optimizers["sam"].comparisons.get(name)) and each.verdict
        ]
        smaller = [row for row, each in found if each.verdict == "smaller"]
        larger = [row for row, each in found if each.verdict == "larger"]
        if found:
            text = f"{name} is smaller at SAM's minima in {len(smaller)} of {len(found)} places"
            words.append(text + (f" and larger in {len(larger)}" if larger else ""))
    return f" Beyond the intervals, {'; '.join(words)}." if words else ""


def _conditions(report: Report) -> list[dict[str, float]]:
    return [dict(items) for items in dict.fromkeys(tuple(row.condition.items()) for row in report.rows)]


def _of_condition(report: Report, condition: dict[str, float]) -> str:
    rows = [row for row in report.rows if row.condition == condition]
    gains = {row.width: row.optimizers["sam"].improvement for row in rows if "sam" in row.optimizers}
    known = {width: gain for width, gain in gains.items() if gain is not None and gain.half_width is not None}
    better = [str(width) for width, gain in known.items() if gain.mean > (gain.half_width or 0)]
    worse = [str(width) for width, gain in known.items() if -gain.mean > (gain.half_width or 0)]
    where = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in condition.items())
    said = [f"better at width {', '.join(better)}"] * bool(better) + [f"worse at width {', '.join(worse)}"] * bool(
        worse
    )
    text = f"{where + ': ' if where else ''}SAM is {' and '.join(said) or 'told apart from its baseline at no width'}"
    first, last = gains[min(gains)], gains[max(gains)]
    return f"{text}: {_judgement(first, last)}." if first and last else f"{text}."


def _judgement(first: Interval, last: Interval) -> str:
    """On the claim that the gain grows with width, from those at the smallest and at the largest width."""
    half = last.half_width or 0
    grows = last.mean - first.mean > (half**2 + (first.half_width or 0) ** 2) ** 0.5
    if last.mean > half:
        return "this agrees" if grows else "this agrees in part, as the gain does not grow beyond the intervals"
    if grows:
        below = "below" if last.mean < -half else "not told from"
        return f"this agrees in trend alone, as the gain grows with width but is {below} zero at the largest"
    if last.mean < -half:
        return "this disagrees"
    return "this neither shows nor excludes it"


if __name__ == "__main__":
    main()
