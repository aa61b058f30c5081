"""The paper's claims, as `samlite report` shows them: numbers, tables, a figure and a verdict each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samlite.report import by_width, convergence, cost, solutions, trends, verdicts
from samlite.report.groups import document
from samlite.report.outcomes import summarize
from samlite.report.table import Table


@dataclass(frozen=True)
class Claim:
    """One way to look at a finished sweep."""

    measure: Callable[[Path], Any]
    """The numbers of a sweep's folder."""
    tables: Callable[[Any], Sequence[Table]]
    draw: Callable[[Any, Path], None]
    verdict: Callable[[Any], str]
    """What the numbers say, in a sentence without its full stop."""
    document: Callable[[Any], Any] = document
    """The numbers as plain values, for JSON."""


CLAIMS = {
    "params": Claim(summarize, by_width.tables, by_width.draw, verdicts.benefit, trends.document),
    "convergence": Claim(convergence.convergence, convergence.tables, convergence.draw, convergence.verdict),
    "solutions": Claim(solutions.solutions, solutions.tables, solutions.draw, solutions.verdict),
    "cost": Claim(cost.costs, cost.tables, cost.draw, cost.verdict),
}
