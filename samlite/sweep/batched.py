"""Which cells of a sweep are trained together as one batched network."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from samlite.training.batched import check, fitting, pays, why_not
from samlite.training.config import Config


def together(cells: Sequence[Config], jobs: int, batched: bool | None) -> list[tuple[Config, ...]]:
    """The cells in the groups that are trained together, each by one process; most are groups of one.

    Those of a group differ by seed, labels, optimizer and radius. Groups are evened out over the jobs.

    Args:
        batched: whether cells are put together; None where that is faster than each alone.

    Raises:
        UsageError: `batched`, and a cell cannot be trained so.
    """
    if batched is False:
        return [(cell,) for cell in cells]
    alike: dict[Config, list[Config]] = {}
    for cell in cells:
        if batched:
            check(cell)
        kind = cell  # of its own, where it cannot be a member: its options need not go with another optimizer
        if not why_not(cell):
            kind = replace(cell, seed=0, label_noise=0.0, rho=0.0, normalize=True, optimizer=cell.base)
        alike.setdefault(kind, []).append(cell)
    groups = []
    for same in alike.values():
        most = fitting(same[0]) if batched or pays(same[0]) else 1
        count = len(same) if most == 1 else max(min(jobs, len(same) // 2), -(-len(same) // most))
        ends = [len(same) * i // count for i in range(count + 1)]
        groups += [tuple(same[start:end]) for start, end in pairwise(ends)]
    place = {cell: i for i, cell in enumerate(cells)}
    return sorted(groups, key=lambda group: place[group[0]])
