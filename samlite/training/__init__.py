"""One run: its options and config, the loop that trains it, and the folder that it leaves."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samlite.training.config import Config
    from samlite.training.loop import train
    from samlite.training.runs import Run, load_run
    from samlite.training.session import EpochRecord, TrackedRecord, TrainingError

__all__ = ["Config", "EpochRecord", "Run", "TrackedRecord", "TrainingError", "load_run", "train"]


def __getattr__(name: str) -> Any:
    """Import on first use: the table of options needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = {"Config": "config", "Run": "runs", "load_run": "runs", "train": "loop"}.get(name, "session")
    return getattr(import_module(f"samlite.training.{home}"), name)
