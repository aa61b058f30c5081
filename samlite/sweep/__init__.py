"""Grids of runs, each cell in a process of its own."""

from samlite.sweep.run import MEASURES, Event, grid, run
from samlite.training.documents import read_cells as read

__all__ = ["MEASURES", "Event", "grid", "read", "run"]
