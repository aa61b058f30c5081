"""Sharpness-aware minimization, and certified Hessian eigenvalues and moments of the minima it finds.

`samlite.SAM` and its variants are plain Python; `samlite.Hessian` loads the compiled module `samlite._C` on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samlite import integrations
    from samlite.curvature.edges import Edge, edges
    from samlite.curvature.hessian import Hessian
    from samlite.curvature.operator import Operator
    from samlite.curvature.results import (
        Block,
        Density,
        Eigenvalues,
        Estimate,
        Footprint,
        Measure,
        Moments,
        SampleSpectra,
        Sharpness,
        Stability,
        Surface,
    )
    from samlite.curvature.surfaces import surface
    from samlite.curvature.tracking import Tracker
    from samlite.errors import UsageError
    from samlite.optim.sam import SAM
    from samlite.optim.sampa import SAMPa
    from samlite.optim.schedule import RhoScheduler
    from samlite.optim.variants import AgnosticSAM, FriendlySAM

__version__ = "0.1.0"
__all__ = [
    "SAM",
    "AgnosticSAM",
    "Block",
    "Density",
    "Edge",
    "Eigenvalues",
    "Estimate",
    "Footprint",
    "FriendlySAM",
    "Hessian",
    "Measure",
    "Moments",
    "Operator",
    "RhoScheduler",
    "SAMPa",
    "SampleSpectra",
    "Sharpness",
    "Stability",
    "Surface",
    "Tracker",
    "UsageError",
    "__version__",
    "edges",
    "integrations",
    "surface",
]

_HOME = {
    "UsageError": "samlite.errors",
    "SAM": "samlite.optim.sam",
    "AgnosticSAM": "samlite.optim.variants",
    "FriendlySAM": "samlite.optim.variants",
    "SAMPa": "samlite.optim.sampa",
    "RhoScheduler": "samlite.optim.schedule",
    "Hessian": "samlite.curvature.hessian",
    "Edge": "samlite.curvature.edges",
    "edges": "samlite.curvature.edges",
    "Measure": "samlite.curvature.results",
    "SampleSpectra": "samlite.curvature.results",
    "Surface": "samlite.curvature.results",
    "surface": "samlite.curvature.surfaces",
    "Tracker": "samlite.curvature.tracking",
    "Moments": "samlite.curvature.results",
    "Operator": "samlite.curvature.operator",
    "Density": "samlite.curvature.results",
    "Eigenvalues": "samlite.curvature.results",
    "Estimate": "samlite.curvature.results",
    "Footprint": "samlite.curvature.results",
    "Block": "samlite.curvature.results",
    "Sharpness": "samlite.curvature.results",
    "Stability": "samlite.curvature.results",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `samlite --help` starts without torch and SAM works without `_C`."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name == "integrations":
        return import_module("samlite.integrations")
    raise AttributeError(f"module 'samlite' has no attribute {name!r}")
