"""Makes docs/results.md: every sweep of experiments.toml is run (or continued), reported and judged.

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

import tomllib
import torch

from samlite.report import verdicts
from samlite.report.claims import CLAIMS
from samlite.sweep.grid import read_cells

TOOLS = Path(__file__).resolve().parent
DOCS, RUNS = TOOLS.parent / "docs", TOOLS.parent / "runs" / "results"


@dataclass(frozen=True)
class Experiment:
    """A sweep on the page, or several in one folder."""

    name: str
    title: str
    sweeps: list[str]  # options of `samlite sweep`; DATA is the folder of data
    says: str  # what the paper says of it
    verdict: str  # the function that judges it
    claims: tuple[str, ...] = ("params",)  # whose tables are shown
    figure: str = "params"  # the claim whose figure is shown
    note: str = ""  # where this differs from the paper's setting

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    @property
    def wall(self) -> Path:
        return self.folder / "wall.json"

    def seconds(self) -> float:
        return float(json.loads(self.wall.read_text())["seconds"]) if self.wall.exists() else 0.0


def main() -> None:
    data, *names = sys.argv[1:]
    listed = tomllib.loads((TOOLS / "experiments.toml").read_text(encoding="utf-8"))["experiment"]
    experiments = [Experiment(**each) for each in listed]
    for experiment in experiments:
        if not names or experiment.name in names:
            _run(experiment, Path(data).resolve())
    finished = [each for each in experiments if each.wall.exists()]
    sections = [_section(experiment) for experiment in finished]
    (DOCS / "results.md").write_text("\n\n".join([_head(finished), *sections]) + "\n", encoding="utf-8")


def _run(experiment: Experiment, data: Path) -> None:
    began = time.monotonic()
    for options in experiment.sweeps:
        arguments = options.replace("DATA", str(data)).split()
        command = [sys.executable, "-m", "samlite.cli", "sweep", *arguments, "--out", str(experiment.folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    experiment.wall.write_text(json.dumps({"seconds": experiment.seconds() + time.monotonic() - began}))
    print(f"{experiment.name}: {time.monotonic() - began:.0f} s", file=sys.stderr)


def _head(finished: list[Experiment]) -> str:
    minutes = sum(each.seconds() for each in finished) / 60
    return f"""# Results

What `samlite sweep` finds of the claims of *Critical Influence of Overparameterization on Sharpness-aware Minimization*
(arXiv 2311.17539), small enough for a laptop: short schedules, small subsets and few seeds, so a claim that does not
show here is not refuted. `python tools/results.py DATA` makes this page, tables and sentences included; nothing in it
is written by hand after a run. Every ± and every band is a 95 % Student-t interval over seeds, every comparison is
paired by seed, and nothing corrects for their number.

Made on {os.cpu_count()} cores of {_processor()}, torch {torch.__version__}, Python {platform.python_version()},
in {minutes:.0f} minutes; the longest run trained for {_longest(finished):.0f} s."""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _longest(finished: list[Experiment]) -> float:
    folders = [each.folder / cell.name for each in finished for cell in read_cells(each.folder)]
    return max(json.loads((folder / "result.json").read_text())["seconds"] for folder in folders)


def _section(experiment: Experiment) -> str:
    several = f" --out runs/{experiment.name}" if len(experiment.sweeps) > 1 else ""
    commands = [f"samlite sweep {options}{several}" for options in experiment.sweeps]
    judged = experiment.verdict if experiment.verdict in CLAIMS else "params"
    numbers = {
        claim: CLAIMS[claim].measure(experiment.folder) for claim in {*experiment.claims, experiment.figure, judged}
    }
    tables = [table.markdown() for claim in experiment.claims for table in CLAIMS[claim].tables(numbers[claim])]
    picture = DOCS / "results" / f"{experiment.name}.png"
    picture.parent.mkdir(exist_ok=True)
    CLAIMS[experiment.figure].draw(numbers[experiment.figure], picture)
    judge = CLAIMS[judged].verdict if judged == experiment.verdict else getattr(verdicts, experiment.verdict)
    verdict = judge(numbers[judged])
    note = f" Setting: {experiment.note}." if experiment.note else ""
    return "\n\n".join(
        [
            f"## {experiment.title}",
            "\n".join(["```bash", *commands, "```"]),
            f"**{experiment.says}.** Here: {verdict}.{note}",
            f"![{experiment.title}](results/{experiment.name}.png)",
            *tables,
        ]
    )


if __name__ == "__main__":
    main()
