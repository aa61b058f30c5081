"""Anyone's weights: files and folders as people keep them, read without executing anything."""

import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from samlite.errors import UsageError, shortened
from samlite.files import described, read_json, regular
from samlite.training.checkpoints import check_types, load_weights

_WHOLE = tuple(f"{stem}.{ending}" for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")))
_INDICES = tuple(f"{name}.index.json" for name in _WHOLE)
FOLDER_FILES = (*_INDICES, *_WHOLE)
"""The names of weights in a folder of Hugging Face's layout."""
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of wrappers, and of attributes that hold the network
_DEPTH = 3  # dictionaries in dictionaries that are opened, and prefixes that are stripped

Weights = dict[str, Tensor]


def load_weight_sets(path: Path) -> dict[str, Weights]:
    """All sets of named tensors in a file, or in a folder of Hugging Face's layout, by the names that they nest under.

    A set at the top has the name "". Nothing in a file is executed: what is neither a tensor nor a plain value becomes
    an object without meaning.

    Raises:
        UsageError: it cannot be read, or holds no named tensors.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.suffix.lower() == ".safetensors":
        return {"": load_weights(path)}
    content = _unpickled(path)
    content = content.tensors or content if isinstance(content, _Opaque) else content  # of a whole module
    if isinstance(content, Tensor) or not isinstance(content, Mapping):
        raise UsageError(f"{path} must hold named tensors, as model.state_dict() gives them, got {described(content)}")
    sets = _sets_in(content)
    if not sets:
        others = [(name, value) for name, value in content.items() if not isinstance(value, Tensor | Mapping)]
        others = others or list(content.items())
        held = f"{described(others[0][0])}: {described(others[0][1])}" if others else "none"
        raise UsageError(f"{path} must hold named tensors, as model.state_dict() gives them, got {held}")
    return sets


def load_weights_into(module: nn.Module, path: Path, name: str | None = None) -> list[str]:
    """Load the weights in a file or a folder into a module, all of them or none. Returns what is worth saying of it.

    Args:
        name: of the set, where there are several that fit.

    Raises:
        UsageError: they do not fit, or several sets do.
    """
    sets = load_weight_sets(path)
    if name is not None:
        if name not in sets:
            raise UsageError(f"--weights must name weights in {path}, got {name!r}; it holds {_names(sets)}")
        sets = {name: sets[name]}
    fitting = {key: fitted for key, state in sets.items() if (fitted := _fitted(module, state))}
    if len(fitting) > 1:
        raise UsageError(f"{path} holds several weights that fit, {_names(fitting)}; choose one with --weights NAME")
    if not fitting:
        state = max(sets.values(), key=lambda state: len(state.keys() & module.state_dict().keys()))
        raise UsageError(f"{path} must fit the model of --model: {_misfit(module, state)}")
    ((chosen, (state, prefix)),) = fitting.items()
    check_types(module, state, path)
    _load(module, state, path)
    said = [f"weights: {chosen}, of {_names(sets)}"] if name is None and len(sets) > 1 else []
    return said + ([f"names: without their prefix {prefix}"] if prefix else [])


# --- Which weights fit


def _fitted(module: nn.Module, state: Weights) -> tuple[Weights, str] | None:
    """The weights under the module's names, and the prefix that was stripped for that; None where they do not fit."""
    candidates = [(state, "")]
    for _ in range(_DEPTH + 1):
        for weights, prefix in candidates:
            if not any(_unmatched(module, weights)):
                return weights, prefix
        candidates = [
            ({name.removeprefix(further): tensor for name, tensor in weights.items()}, prefix + further)
            for weights, prefix in candidates
            for further in _PREFIXES
            if all(name.startswith(further) for name in weights)
        ]
    inside = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    if len(inside) == len(state) and inside.keys() != state.keys():  # modules inside were compiled
        fitted = _fitted(module, inside)
        return fitted and (fitted[0], "_orig_mod.")
    return None


def _unmatched(module: nn.Module, state: Weights) -> tuple[list[str], list[str]]:
    """(Names that the weights lack, names that the module lacks); a tied weight may be stored once."""
    tensors = module.state_dict(keep_vars=True)
    present = {id(tensor) for name, tensor in tensors.items() if name in state}
    missing = [name for name, tensor in tensors.items() if name not in state and id(tensor) not in present]
    return missing, [name for name in state if name not in tensors]


def _misfit(module: nn.Module, state: Weights) -> str:
    missing, unexpected = _unmatched(module, state)
    return "; ".join(
        f"{what} {shortened(names, 3)}"
        for what, names in (("it lacks", missing), ("the model has no", unexpected))
        if names
    )


def _load(module: nn.Module, state: Weights, path: Path) -> None:
    try:
        _, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        detail = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise UsageError(f"{path} must fit the model of --model: {detail or error}") from None
    except Exception as error:  # quantized layers, and whatever else has its own way to load
        raise UsageError(f"{path} must fit the model of --model, got {type(error).__name__}: {error}") from error
    if unexpected:
        raise UsageError(f"{path} must fit the model of --model: it took no {shortened(unexpected, 3)}")


def _names(sets: Mapping[str, Any]) -> str:
    return ", ".join(name or "those at the top" for name in sets)


# --- Reading


def _sets_in(content: Mapping[Any, Any], name: str = "", depth: int = 0) -> dict[str, Weights]:
    """The dictionaries of named tensors in a dictionary, whatever else it holds."""
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    rest = {
        key: value for key, value in content.items() if key not in tensors and not str(key).endswith("_extra_state")
    }
    if tensors and not rest and all(isinstance(key, str) for key in content):
        return {name: tensors}
    sets: dict[str, Weights] = {}
    for key, value in rest.items() if depth < _DEPTH else ():
        if isinstance(value, _Opaque):
            value = value.tensors
        if not isinstance(value, Mapping) or not isinstance(key, str):
            continue
        sets |= _sets_in(value, f"{name}.{key}" if name else key, depth + 1)
    return sets


def _of_folder(folder: Path) -> dict[str, Weights]:
    for index in _INDICES:
        if (folder / index).exists():
            return {"": _of_shards(folder, index)}
    for name in _WHOLE:
        if (folder / name).exists():
            return load_weight_sets(folder / name)
    raise UsageError(f"{folder} must hold weights, as {' or '.join(_WHOLE)}, got neither")


def _of_shards(folder: Path, index: str) -> Weights:
    places = read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UsageError(f"{folder / index} must hold a weight_map of file names, got {described(places)}")
    state: Weights = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise UsageError(f"{folder / index} must name files beside it, got {described(name)}")
        for part in load_weight_sets(folder / name).values():
            state |= part
    if lost := places.keys() - state.keys():
        raise UsageError(f"{folder} must hold what its index lists, got no {shortened(sorted(lost), 3)}")
    return {name: state[name] for name in places}


class _Opaque:
    """What stands for an object of somebody's class: it takes whatever a pickle gives it, and does nothing."""

    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __repr__(self) -> str:
        return "an object of a class"

    @property
    def tensors(self) -> Weights:
        """Those of a module, by name, as its state_dict() has them."""
        state = self.state if isinstance(self.state, dict) else {}
        own = {**(state.get("_parameters") or {}), **(state.get("_buffers") or {})}
        transient = state.get("_non_persistent_buffers_set") or ()
        named = {name: value for name, value in own.items() if isinstance(value, Tensor) and name not in transient}
        for prefix, module in (state.get("_modules") or {}).items():
            if isinstance(module, _Opaque):
                named |= {f"{prefix}.{name}": tensor for name, tensor in module.tensors.items()}
        return named

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> "_Opaque":
        return _Opaque()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Do nothing."""

    def extend(self, values: Any) -> None:
        """Do nothing."""


def _plain_dict(*args: Any) -> dict[Any, Any]:
    """A defaultdict without its default."""
    return {}


_MADE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): _plain_dict,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch._utils", "_rebuild_sparse_tensor"): torch._utils._rebuild_sparse_tensor,
    ("torch._utils", "_rebuild_qtensor"): torch._utils._rebuild_qtensor,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    **{("torch", name): getattr(torch, name) for name in ("per_tensor_affine", "per_channel_affine")},
    **{("torch", f"{kind}Storage"): getattr(torch, f"{kind}Storage")
       for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool",
                    "ComplexFloat", "ComplexDouble", "QInt8", "QUInt8", "QInt32")},
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    ("torch.storage", "TypedStorage"): torch.storage.TypedStorage,
    ("torch", "device"): torch.device,
}  # fmt: skip
"""What a pickle may make: tensors and plain containers."""


class _Unpickler(pickle.Unpickler):
    """Makes tensors and plain values; any other class or function that a pickle names stands for nothing."""

    def find_class(self, module: str, name: str) -> Any:
        return _MADE.get((module, name), _Opaque)


def _unpickled(path: Path) -> Any:
    """What is in a file that torch.save wrote."""
    with open(regular(path), "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old pickles; what matters is an error
        if _is_script(file):
            raise UsageError(f"{path} must hold weights, got a TorchScript archive; save model.state_dict()")
        file.seek(0)
        reader = SimpleNamespace(__name__="reader", Unpickler=_Unpickler, load=lambda f, **_: _Unpickler(f).load())
        try:
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=reader)
        except Exception as error:  # damage shows as many kinds of error
            raise UsageError(
                f"{path} must be a checkpoint of tensors and plain values, but it cannot be read: "
                "it is truncated, damaged, or holds code"
            ) from error


def _is_script(file: BinaryIO) -> bool:
    """Whether a file is an archive of TorchScript, which torch would load as a module."""
    try:
        return any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(file).namelist())
    except Exception:  # no archive, or a damaged one, which shows as many kinds of error
        return False
