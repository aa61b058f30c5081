"""Memory in bytes: how it is asked for, how much is free, and what a graph of autograd holds."""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samlite.errors import UsageError

_UNITS = {"": 1, "B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}
_NO_LIMIT = 2**62
_GROUP_FILES = (  # the limit, what is used, and what of that is cache: of versions 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_SAVED: dict[type, list[str]] = {}  # of a kind of node: the names under which it shows the tensors that it saved


def parse_bytes(memory: int | str) -> int:
    """A number of bytes, or a size such as "2GB"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", str(memory).upper())
    if match is None:
        raise UsageError(f"memory must be bytes or a size such as '2GB', got {memory!r}")
    unit = match[2] if match[2] in _UNITS else match[2] + "B"
    return int(min(float(match[1]) * _UNITS[unit], 2.0**62))  # beyond which there is no difference


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = 4 * 2**30  # no portable way to ask; a modest guess, which `memory` overrides
    return max(0, min([free, *map(free_in_group, _groups())]))


def free_in_group(folder: Path) -> int:
    """What a control group of Linux leaves to its processes: its limit less what they hold beside file caches.

    Containers and batch systems limit memory so.
    """
    for limit, used, cache in _GROUP_FILES:
        try:
            most = (folder / limit).read_text().strip()
            held = int((folder / used).read_text())
            lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(dict(lines).get(cache, 0))  # the kernel gives it up where memory is short
            return _NO_LIMIT if most == "max" else int(most) - max(0, held - cached)
        except (OSError, ValueError):
            continue
    return _NO_LIMIT


def _groups() -> list[Path]:
    """The folders of this process's memory groups, the innermost first."""
    root = Path("/sys/fs/cgroup")
    folders = []
    try:
        entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        entries = []
    for _, controllers, path in entries:
        if controllers in ("", "memory"):
            base = root / controllers
            inner = base / path.strip("/")
            folders += [inner, *(parent for parent in inner.parents if parent.is_relative_to(base))]
    return [*folders, root, root / "memory"]


def graph_bytes(held: Iterable[Tensor], constants: Iterable[Tensor]) -> int:
    """What tensors and the graphs behind them keep in memory, beside tensors that are there in any case.

    Counts the tensors that each node saved, by the attributes in which autograd shows them. A node of a C++ extension
    shows none; the size of its outputs stands in for them.
    """
    there = {tensor.untyped_storage()._cdata for tensor in constants}
    parts: dict[int, dict[tuple[int, int], int]] = {}  # of a storage: bytes of each part of it that is saved
    whole: dict[int, int] = {}

    def add(tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            tensor = tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
        storage = tensor.untyped_storage()
        if storage._cdata not in there:
            part = (int(tensor.storage_offset()), tensor.numel())
            parts.setdefault(storage._cdata, {})[part] = tensor.numel() * tensor.element_size()
            whole[storage._cdata] = storage.nbytes()

    held, hidden = list(held), 0
    for tensor in held:
        add(tensor)
    for node in _nodes(held):
        if "CppNode" in node.name():
            hidden += sum(math.prod(output.shape) * output.dtype.itemsize for output in node._input_metadata)
        for tensor in _saved(node):
            add(tensor)
    return hidden + sum(min(sum(sizes.values()), whole[storage]) for storage, sizes in parts.items())


def operations_behind(value: Tensor) -> set[str]:
    """The names of the operations in the graph behind a tensor."""
    return {node.name() for node in _nodes([value])}


def _nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes of the graphs behind some tensors, each once."""
    unseen: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen = {None}
    while unseen:
        node = unseen.pop()
        if node not in seen:
            seen.add(node)
            unseen += [following for following, _ in node.next_functions]
            yield node


def _saved(node: Any) -> list[Tensor]:
    kind = type(node)
    if kind not in _SAVED:
        _SAVED[kind] = [name for name in dir(kind) if name.startswith("_saved_") or name == "saved_tensors"]
    parts: list[Tensor] = []
    for name in _SAVED[kind]:
        value = getattr(node, name)
        parts += [part for part in (value if isinstance(value, tuple | list) else [value]) if isinstance(part, Tensor)]
    return parts
