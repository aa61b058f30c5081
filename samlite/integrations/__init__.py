"""SAM in the trainers that people use: of Hugging Face, Lightning and accelerate, each imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samlite.integrations.accelerate import prepare
    from samlite.integrations.lightning import SAMCallback
    from samlite.integrations.transformers import SAMTrainer

__all__ = ["SAMCallback", "SAMTrainer", "prepare"]

_HOME = {"SAMTrainer": "transformers", "SAMCallback": "lightning", "prepare": "accelerate"}


def __getattr__(name: str) -> Any:
    """Import the library that a name needs, or say how to install it."""
    if name not in _HOME:
        raise AttributeError(f"module 'samlite.integrations' has no attribute {name!r}")
    try:
        return getattr(import_module(f"samlite.integrations.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"samlite.integrations.{name} needs {error.name}; pip install {_HOME[name]}") from error
