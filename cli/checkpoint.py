"""Anyone's checkpoint, for `samlite sharpness`: weights are read as tensors only, nothing in the file is executed."""

import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from samlite.batches import is_pair
from samlite.curvature.stream import checked_data
from samlite.errors import UsageError, shortened
from samlite.training.checkpoints import check_types, load_weights
from samlite.training.config import usable_device
from samlite.training.measurements import Subject, drawn

_LOSSES: dict[str, Callable[[], nn.Module]] = {"cross_entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss}


def checkpoint_subject(
    path: Path,
    model: str,
    data: str,
    loss: str = "cross_entropy",
    samples: int | None = None,
    device: str | None = None,
) -> Subject:
    """Weights in a .pt, .pth or .safetensors file, in the module that ``pkg.mod:factory`` builds.

    Args:
        model: names a module, or a function without arguments that returns one.
        data: names an (inputs, targets) pair, a re-iterable of batches, or a function that returns one.
        loss: ``cross_entropy``, ``mse``, or names a loss module or a function of (model, batch).
        samples: so many rows of the pair, drawn at random but always the same.
    """
    module = _build(model, "--model")
    if not isinstance(module, nn.Module):
        raise UsageError(f"--model must name a torch.nn.Module or a function that returns one, got {model!r}")
    _load_into(module, load_weights(path), path)
    module.to(usable_device(device or "cpu"))
    criterion = _LOSSES[loss]() if loss in _LOSSES else resolve(loss, "--loss")
    batches = checked_data(_build(data, "--data"))
    if not is_pair(batches):
        if samples is not None:
            raise UsageError("--samples needs --data to name a pair of tensors; limit the batches themselves")
        return Subject(module, criterion, batches, None, None)
    available = len(batches[0])
    pair = batches if samples is None else drawn(batches, samples, seed=0)
    return Subject(module, criterion, pair, len(pair[0]), available)


def resolve(name: str, option: str) -> Any:
    """The object that ``pkg.mod:name`` names; the current folder is on the path."""
    module, separator, attribute = name.partition(":")
    if not (separator and module and attribute):
        raise UsageError(f"{option} must name an object as pkg.mod:name, got {name!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return pkgutil.resolve_name(name)
    except ImportError as error:
        raise UsageError(f"{option} must name an importable module, got {module!r} ({error})") from error
    except AttributeError:
        raise UsageError(f"{option} must name something in {module}, got {attribute!r}") from None
    except (Exception, SystemExit) as error:  # the user's own module: whatever goes wrong in it
        raise UsageError(f"{option}: importing {module} failed with {type(error).__name__}: {error}") from error


def _build(name: str, option: str) -> Any:
    """The named object, or what the named function returns."""
    named = resolve(name, option)
    if isinstance(named, nn.Module) or not callable(named):
        return named
    try:
        return named()
    except (Exception, SystemExit) as error:  # the user's own function
        raise UsageError(f"{option}: {name} failed with {type(error).__name__}: {error}") from error


def _load_into(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    check_types(module, state, path)
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        detail = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise UsageError(f"{path} must fit the model of --model: {detail or error}") from None
    except Exception as error:  # quantized layers, and whatever else has its own way to load
        raise UsageError(f"{path} must fit the model of --model, got {type(error).__name__}: {error}") from error
    # A tied weight is stored once: what it is missing under its other names is there.
    tensors = module.state_dict(keep_vars=True)
    present = {id(tensor) for name, tensor in tensors.items() if name in state}
    missing = [name for name in missing if id(tensors[name]) not in present]
    if missing or unexpected:
        raise UsageError(
            f"{path} must fit the model of --model: "
            + "; ".join(
                f"{what} {shortened(names, 3)}"
                for what, names in (("it lacks", missing), ("the model has no", unexpected))
                if names
            )
        )
