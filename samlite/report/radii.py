"""The radii of a sweep: which ones to try, and where the best one lies at an end of those that were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from samlite.report.groups import described
from samlite.report.outcomes import Outcome, Report, Row
from samlite.training.config import Config
from samlite.training.options import FAMILY

START = (0.01, 0.02, 0.05, 0.1, 0.2)
"""The radii that a search starts from."""
_SERIES = tuple(sorted(digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5)))


def at_an_end(report: Report) -> Iterator[tuple[Row, str, Outcome]]:
    """Where several radii were tried and the best one on validation is the smallest or the largest of them."""
    for row in report.rows:
        for name, outcome in row.optimizers.items():
            if len(outcome.validation) > 1 and outcome.rho in (min(outcome.validation), max(outcome.validation)):
                yield row, name, outcome


def beyond(report: Report, cells: Sequence[Config]) -> list[Config]:
    """The cells with the next radius wherever the best one is at an end; none where every best one is inside."""
    more: list[Config] = []
    for row, name, outcome in at_an_end(report):
        rho = _next(outcome)
        if rho is None:
            continue
        here = [
            cell
            for cell in cells
            if cell.optimizer in FAMILY
            and (cell.label, cell.width, cell.rho) == (name, row.width, outcome.rho)
            and all(getattr(cell, condition) == value for condition, value in row.condition.items())
        ]
        more += [replace(cell, rho=rho) for cell in here]
    return [cell for cell in dict.fromkeys(more) if cell not in cells]


def _next(outcome: Outcome) -> float | None:
    """The next of 1, 2, 5, 10 ... beyond the end that is best; None beyond 0.0001 and 50."""
    tried, best = sorted(outcome.validation), outcome.rho
    if best == tried[-1]:
        return next((rho for rho in _SERIES if rho > best * 1.01), None)
    return next((rho for rho in reversed(_SERIES) if best is not None and rho < best * 0.99), None)


def note(report: Report) -> list[str]:
    """What a table says of radii at an end."""
    places = [
        ", ".join(part for part in (f"{outcome.rho:g} at width {row.width}", described(row.condition.items())) if part)
        for row, _, outcome in at_an_end(report)
    ]
    text = f"The best rho is at an end of those tried: {'; '.join(places)}. Try further (--rhos auto)."
    return [text] if places else []
