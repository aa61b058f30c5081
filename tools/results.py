"""Makes docs/results.md: every sweep of experiments.toml is run (or continued), reported and judged.

    python tools/results.py DATA [NAME ...]

DATA is a folder with mnist, cifar10, sst2, pos and molecules/tox21.csv.gz inside; FASHION in a sweep's options is where
Debian's package dataset-fashion-mnist puts its files. NAMEs choose some of the experiments; `none` runs no sweep.
What is found of a finished one is kept in docs/results/NAME.json, so that the page can be made in several sittings, and
made again without the runs. Those are in runs/results; delete a folder there to repeat a sweep. After a change of an
experiment, what is kept of it is that of the sweeps before, and the page says so by their commands.
"""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tomllib
import torch

from samlite.files import read_json, write_json
from samlite.report import findings, verdicts
from samlite.report.canvas import REFERENCE, draw_curve, draw_intervals, label_parameters, new_figure
from samlite.report.claims import CLAIMS
from samlite.report.outcomes import Report
from samlite.report.table import Table, interval
from samlite.sweep.grid import read_cells
from samlite.training.runs import RESULT, read_result

TOOLS = Path(__file__).resolve().parent
DOCS, RUNS = TOOLS.parent / "docs", TOOLS.parent / "runs" / "results"
ASKED = "asked.json"  # in the folder of an experiment: the sweeps that were run there to their end
FASHION = "/usr/share/datasets/fashion-mnist"


@dataclass(frozen=True)
class Experiment:
    """A sweep on the page, or several in one folder."""

    name: str
    title: str
    sweeps: list[str]  # options of `samlite sweep`
    says: str  # what the paper says of it
    verdict: str  # the function that judges it
    findings: dict[str, str] = field(default_factory=dict)  # of `samlite.report.findings`, by the claims they judge
    claims: tuple[str, ...] = ("params",)  # whose tables are shown
    figure: str = "params"  # the claim whose figure is shown
    note: str = ""  # where this differs from the paper's setting
    data: str = ""  # what the data are called, where that is not the name of the task
    paper: dict[str, list[float]] = field(default_factory=dict)  # its points: parameters and improvements

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    @property
    def found(self) -> Path:
        """What is kept of it."""
        return DOCS / "results" / f"{self.name}.json"

    def finished(self) -> bool:
        """Whether its folder holds these very sweeps, and every run has ended."""
        asked = self.folder / ASKED
        if not asked.exists() or read_json(asked).get("sweeps") != self.sweeps:
            return False
        return all((self.folder / cell.name / RESULT).exists() for cell in read_cells(self.folder))

    def commands(self) -> list[str]:
        """What a user types."""
        several = f" --out runs/{self.name}" if len(self.sweeps) > 1 else ""
        return [f"samlite sweep {options}{several}" for options in self.sweeps]


def main() -> None:
    data, *names = sys.argv[1:]
    listed = tomllib.loads((TOOLS / "experiments.toml").read_text(encoding="utf-8"))["experiment"]
    experiments = [Experiment(**each) for each in listed]
    (DOCS / "results").mkdir(exist_ok=True)
    for experiment in experiments:
        if not names or experiment.name in names:
            _run(experiment, Path(data).resolve())
        if experiment.finished():
            experiment.found.write_text(json.dumps(_found(experiment), indent=1) + "\n", encoding="utf-8")
    kept = [(each, json.loads(each.found.read_text(encoding="utf-8"))) for each in experiments if each.found.exists()]
    sections = [_section(experiment, found) for experiment, found in kept]
    page = [_head([found for _, found in kept]), _claims(kept), *sections]
    (DOCS / "results.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")


def _run(experiment: Experiment, data: Path) -> None:
    began, ends = time.monotonic(), []
    experiment.folder.mkdir(parents=True, exist_ok=True)
    for options in experiment.sweeps:
        arguments = options.replace("DATA", str(data)).replace("FASHION", FASHION).split()
        command = [sys.executable, "-m", "samlite.cli", "sweep", *arguments, "--out", str(experiment.folder)]
        # Not from the root, whose samlite/ would hide an installed one.
        ends.append(subprocess.run(command, stdout=subprocess.DEVNULL, cwd=experiment.folder).returncode)
    if all(end in (0, 1) for end in ends):  # 1: some run failed, or could not be measured
        write_json(experiment.folder / ASKED, {"sweeps": experiment.sweeps})
    print(f"{experiment.name}: {time.monotonic() - began:.0f} s", file=sys.stderr)


def _found(experiment: Experiment) -> dict[str, Any]:
    """What the runs of an experiment say; its figures are drawn."""
    judged = experiment.verdict if experiment.verdict in CLAIMS else "params"
    views = {*experiment.claims, experiment.figure, judged}
    numbers = {view: CLAIMS[view].measure(experiment.folder) for view in views}
    if experiment.data:
        numbers["params"] = replace(numbers["params"], task=experiment.data)
    tables = [table for view in experiment.claims for table in CLAIMS[view].tables(numbers[view])]
    CLAIMS[experiment.figure].draw(numbers[experiment.figure], experiment.found.with_suffix(".png"))
    if experiment.paper:
        tables.append(_beside(numbers["params"], experiment))
    judge = CLAIMS[judged].verdict if judged == experiment.verdict else getattr(verdicts, experiment.verdict)
    folders = [experiment.folder / cell.name for cell in read_cells(experiment.folder)]
    seconds = [read_result(folder, "seconds")["seconds"] for folder in folders]
    judged_by = {"linear": numbers.get("convergence"), "bounds": experiment.folder}
    return {
        "commands": experiment.commands(),
        "note": experiment.note,
        "verdict": judge(numbers[judged]),
        "findings": {
            claim: asdict(getattr(findings, name)(judged_by.get(name, numbers["params"])))
            for claim, name in experiment.findings.items()
        },
        "tables": [table.markdown() for table in tables],
        "runs": len(seconds),
        "minutes": round(sum(seconds) / 60, 1),
        "longest": round(max(seconds)),
        "made": f"{os.cpu_count()} cores of {_processor()} with torch {torch.__version__}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _beside(report: Report, experiment: Experiment) -> Table:
    """The improvement by width beside the paper's points, also as a figure."""
    ours = [(row.parameters, row.sam.improvement) for row in report.rows if row.sam]
    known = [(count, gain) for count, gain in ours if gain]
    theirs = list(zip(experiment.paper["parameters"], experiment.paper["improvement"], strict=True))
    with new_figure(experiment.found.with_name(f"{experiment.name}-paper.png"), (5.2, 3.6)) as figure:
        panel = figure.subplots()
        panel.axhline(0, **REFERENCE)
        draw_intervals(panel, "here", "C0", known)
        draw_curve(panel, "the paper's figure, read by eye", "C1", [(int(count), gain) for count, gain in theirs], [])
        panel.legend()
        panel.set_title(f"improvement of the test {report.metric} by SAM")
        label_parameters(panel, [count for count, _ in known])
    by_count = {round(count, -4): gain for count, gain in theirs}
    rows = [[f"{count:,}", interval(gain, sign="+"), f"{by_count[round(count, -4)]:+g}"] for count, gain in known]
    return Table("improvement by SAM beside the paper's", [">parameters", ">here", ">paper"], rows)


def _head(kept: list[dict[str, Any]]) -> str:
    minutes, runs = (sum(each[name] for each in kept) for name in ("minutes", "runs"))
    made = "; ".join(dict.fromkeys(each["made"] for each in kept))
    return f"""# Results

What `samlite sweep` finds of the claims of *Critical Influence of Overparameterization on Sharpness-aware Minimization*
(arXiv 2311.17539) on a laptop. `python tools/results.py DATA` makes this page, tables and sentences included; nothing
in it but the notes on settings is written by hand. Every ± and every band is a 95 % Student-t interval over seeds,
every comparison is paired by seed, and nothing corrects for their number. SAM's radius is chosen on validation at each
width and condition where several were tried; test data choose nothing. In the commands DATA is a folder with the data
sets, and FASHION that of Debian's package dataset-fashion-mnist.

{runs:,} runs trained for {minutes:.0f} minutes of a core, the longest for {max(each["longest"] for each in kept)} s, on
{made}."""


def _claims(kept: list[tuple[Experiment, dict[str, Any]]]) -> str:
    """The table of claims, a row a claim and experiment."""
    rows = []
    for claim in dict.fromkeys(claim for each, _ in kept for claim in each.findings):
        for experiment, found in kept:
            if finding := found["findings"].get(claim):
                where = f"[{experiment.title}](#{_anchor(experiment.title)})"
                figure = f"[figure](results/{experiment.name}.png)"
                rows.append([claim, where, finding["status"], finding["numbers"], figure])
    for i in reversed(range(1, len(rows))):
        if rows[i][0] == rows[i - 1][0]:
            rows[i][0] = ""
    note = (
        "Supported: every interval that the claim rests on is above zero. In trend: some are, none is below. Not seen: "
        "none is either way, and ± says what could have been seen. Refuted: some are below, none is above."
    )
    table = Table("", ["claim", "where", "", "change per tenfold parameters, or at a width", ""], rows, notes=[note])
    return f"## The claims\n\n{table.markdown()}"


def _anchor(title: str) -> str:
    """As GitHub and mkdocs link to a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c == "-")


def _section(experiment: Experiment, found: dict[str, Any]) -> str:
    note = f" Setting: {found['note']}." if found["note"] else ""
    pictures = [f"![{experiment.title}](results/{experiment.name}.png)"]
    if experiment.paper:
        pictures.append(f"![{experiment.title}, beside the paper](results/{experiment.name}-paper.png)")
    return "\n\n".join(
        [
            f"## {experiment.title}",
            "\n".join(["```bash", *found["commands"], "```"]),
            f"**{experiment.says}.** Here: {found['verdict']}.{note}",
            *pictures,
            *found["tables"],
        ]
    )


if __name__ == "__main__":
    main()
