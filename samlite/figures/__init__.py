"""Figures of runs, of spectra and of sweeps, one a file. They need matplotlib."""

from samlite.figures.by_width import by_width
from samlite.figures.convergence import convergence
from samlite.figures.cost import cost
from samlite.figures.density import density
from samlite.figures.solutions import solutions
from samlite.figures.track import track

__all__ = ["by_width", "convergence", "cost", "density", "solutions", "track"]
