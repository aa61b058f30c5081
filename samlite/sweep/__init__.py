"""Grids of runs, each cell in a process of its own, or many small ones as one batched network."""

from samlite.sweep.grid import grid
from samlite.sweep.grid import read_cells as read
from samlite.sweep.run import Event, run
from samlite.training.measurements import MEASURES

__all__ = ["MEASURES", "Event", "grid", "read", "run"]
