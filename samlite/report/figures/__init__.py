"""Figures of runs, of spectra and of sweeps, one a file. They need matplotlib."""

from samlite.report.figures.by_width import by_width
from samlite.report.figures.convergence import convergence
from samlite.report.figures.cost import cost
from samlite.report.figures.density import density
from samlite.report.figures.solutions import solutions
from samlite.report.figures.track import track

__all__ = ["by_width", "convergence", "cost", "density", "solutions", "track"]
