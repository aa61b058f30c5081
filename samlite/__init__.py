"""Sharpness-aware minimization, and certified Hessian eigenvalues and moments of the minima it finds.

`samlite.SAM` and its variants are plain Python; `samlite.Hessian` loads the compiled module `samlite._C` on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samlite.hessian import Hessian
    from samlite.moments import Moments
    from samlite.operator import Density, Eigenvalues, Estimate
    from samlite.sam import SAM
    from samlite.sharpness import Block, Sharpness
    from samlite.stability import Stability
    from samlite.variants import AgnosticSAM, FriendlySAM, SAMPa

__version__ = "0.1.0"
__all__ = [
    "SAM",
    "AgnosticSAM",
    "Block",
    "Density",
    "Eigenvalues",
    "Estimate",
    "FriendlySAM",
    "Hessian",
    "Moments",
    "SAMPa",
    "Sharpness",
    "Stability",
    "__version__",
]

_HOME = {
    "SAM": "samlite.sam",
    "AgnosticSAM": "samlite.variants",
    "FriendlySAM": "samlite.variants",
    "SAMPa": "samlite.variants",
    "Hessian": "samlite.hessian",
    "Moments": "samlite.moments",
    "Density": "samlite.operator",
    "Eigenvalues": "samlite.operator",
    "Estimate": "samlite.operator",
    "Block": "samlite.sharpness",
    "Sharpness": "samlite.sharpness",
    "Stability": "samlite.stability",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `samlite --help` starts without torch and SAM works without `_C`."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'samlite' has no attribute {name!r}")
