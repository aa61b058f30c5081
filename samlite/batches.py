"""What a batch is: tensors in containers of any kind, each with one row a sample.

Containers are those that torch's own pytree knows (tuples, named tuples, lists, dictionaries, what libraries
register), dataclasses, and objects that are used like dictionaries, such as transformers' BatchEncoding and
torch_geometric's Data.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from samlite.errors import UsageError

Form = tuple[tuple[int, ...], ...]  # of a batch: the shapes of its tensors without the samples
_Opened = tuple[list[Any], Callable[[list[Any]], Any]]  # what a container holds, and what makes one of it again


def is_pair(data: Any) -> bool:
    """Whether data are an (inputs, targets) pair of tensors, not batches."""
    return isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)


def mapped(function: Callable[[Any], Any], batch: Any) -> Any:
    """A copy of the batch with the function's value in place of each tensor, or of whatever else it holds."""
    opened = _opened(batch)
    if opened is None:
        return function(batch)
    parts, closed = opened
    return closed([mapped(function, part) for part in parts])


def leaves(batch: Any) -> list[Any]:
    """The tensors of a batch, and whatever else it holds."""
    opened = _opened(batch)
    return [batch] if opened is None else [leaf for part in opened[0] for leaf in leaves(part)]


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch."""
    return [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]


def rows(batch: Any, index: slice | list[int]) -> Any:
    """Some samples of a batch."""

    def cut(part: Any) -> Any:
        if isinstance(part, Tensor | np.ndarray):
            return part[index] if part.ndim else part
        if part is None or isinstance(part, str | bytes | bool | int | float | complex | np.generic):
            return part
        raise UsageError(f"a batch must hold tensors with one row a sample to be cut, got {described(part)}")

    if (graphs := _graphs(batch)) is not None:
        chosen = index if isinstance(index, list) else range(graphs)[index]
        return type(batch).from_data_list([batch.get_example(i) for i in chosen])
    opened = _opened(batch)
    if opened is None:
        return cut(batch)
    parts, closed = opened
    return closed([rows(part, index) for part in parts])


def samples(batch: Any) -> int:
    """How many samples a batch holds, where that is beyond doubt. Graphs count, not their nodes."""
    sizes = _sizes(batch)
    if len(sizes) != 1:
        got = "tensors of " + " and ".join(map(str, sorted(sizes))) + " rows" if sizes else described(batch)
        raise UsageError(
            f"loss_fn must return (mean loss, weight) where the batch does not show its number of samples, got {got}"
        )
    return sizes.pop()


def placed(batch: Any, like: Tensor) -> Any:
    """The batch on the device of `like`, its floating-point tensors in that type, so that autograd can use it."""

    def there(part: Any) -> Any:
        if isinstance(part, Tensor):
            if part.is_inference():
                part = part.clone()
            dtype = like.dtype if part.is_floating_point() else part.dtype
            return part.to(like.device, like.dtype.to_complex() if part.is_complex() else dtype)
        if isinstance(part, PackedSequence):
            moved: Any = part.to(device=like.device)  # type: ignore[call-arg]
            return moved.to(dtype=like.dtype) if part.data.is_floating_point() else moved
        return part

    return mapped(there, batch)


def form(batch: Any) -> Form:
    """What batches that are alike but for their number of samples, or of nodes and edges, have in common."""
    if owners(batch):
        return tuple((tensor.dim(),) for tensor in tensors(batch))
    return tuple(tuple(tensor.shape[1:]) for tensor in tensors(batch))


def owners(batch: Any) -> dict[str, Tensor]:
    """Of a batch with graphs the graph of each node and of each edge, as layers have them: with and without loops."""
    found = _batch_of_graphs(batch)
    if found is None or getattr(found, "batch", None) is None or getattr(found, "edge_index", None) is None:
        return {}
    nodes, (source, target) = found.batch, found.edge_index
    edges, proper = nodes[source], nodes[source[source != target]]
    return {
        "nodes": nodes,
        "edges": edges,
        "edges but loops": proper,
        "edges and loops": torch.cat([edges, nodes]),
        "edges with loops anew": torch.cat([proper, nodes]),
    }


def _batch_of_graphs(batch: Any) -> Any:
    if _graphs(batch) is not None:
        return batch
    opened = _opened(batch)
    found = (_batch_of_graphs(part) for part in opened[0]) if opened else ()
    return next((part for part in found if part is not None), None)


def described(value: Any) -> str:
    """A value in a few words for a message of one line."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, str | bytes | bool | int | float | complex):
        return f"{type(value).__name__} {value!r}"[:80]
    held = ", ".join(described(tensor) for tensor in tensors(value)[:2])
    return type(value).__name__ + (f" of {held}" if held else "")


def _opened(batch: Any) -> _Opened | None:
    """The parts of a container; None for what is none."""
    kind = type(batch)
    if kind is tuple or kind is list:  # the usual ones first, as this is called for every operation of a pass
        return list(batch), kind
    if kind is dict:
        return list(batch.values()), lambda new: dict(zip(batch, new, strict=True))
    if isinstance(batch, Tensor | PackedSequence | str | bytes | type) or batch is None:
        return None
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # named
        return list(batch), lambda new: kind(*new)
    parts, structure = tree_flatten(batch, is_leaf=lambda part: part is not batch)
    if not (len(parts) == 1 and parts[0] is batch):
        return parts, lambda new: tree_unflatten(new, structure)
    if hasattr(batch, "stores"):  # of torch_geometric: several dictionaries in one object
        return _opened_stores(batch)
    if all(hasattr(type(batch), name) for name in ("keys", "__getitem__", "__setitem__")):
        keys = list(batch.keys() if callable(batch.keys) else batch.keys)
        return [batch[key] for key in keys], lambda new: _with_items(batch, keys, new)
    if is_dataclass(batch):
        names = [field.name for field in fields(batch) if hasattr(batch, field.name)]
        return [getattr(batch, name) for name in names], lambda new: _with_attributes(batch, names, new)
    if isinstance(batch, list | tuple):  # a class of somebody's own
        return list(batch), type(batch)
    return None


def _opened_stores(batch: Any) -> _Opened:
    places = [(i, key) for i, store in enumerate(batch.stores) for key in store.keys()]  # noqa: SIM118

    def closed(new: list[Any]) -> Any:
        result = copy(batch)
        for (i, key), value in zip(places, new, strict=True):
            result.stores[i][key] = value
        return result

    return [batch.stores[i][key] for i, key in places], closed


def _with_items(batch: Any, keys: list[Any], values: list[Any]) -> Any:
    result = copy(batch)
    for key, value in zip(keys, values, strict=True):
        result[key] = value
    return result


def _with_attributes(batch: Any, names: list[str], values: list[Any]) -> Any:
    result = copy(batch)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(result, name, value)  # also of a frozen one
    return result


def _graphs(part: Any) -> int | None:
    """The number of graphs in a batch of torch_geometric; None for anything else."""
    return int(part.num_graphs) if hasattr(part, "stores") and hasattr(part, "num_graphs") else None


def _sizes(batch: Any) -> set[int]:
    """The numbers of rows of all tensors in a batch."""
    if isinstance(batch, Tensor):
        return {len(batch)} if batch.dim() else set()
    if isinstance(batch, PackedSequence):
        return {int(batch.batch_sizes[0])}
    if (graphs := _graphs(batch)) is not None:
        return {graphs}
    opened = _opened(batch)
    return set() if opened is None else set().union(*map(_sizes, opened[0]))
