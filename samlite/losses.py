"""A data set as a stream of weighted losses, evaluated so that the model is left as it was.

The Hessian is that of one fixed function of the weights: the mean loss over the samples of the data, in eval mode
unless asked otherwise, in full float32 or float64, with no dropout, shuffling or augmentation. This file turns a
model, a loss and data into that function, batch by batch; `samlite._C` differentiates it.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence

PROBE = 64  # rows that are evaluated to check the function and to size its graph
_CHUNK = 1024  # rows of a pair of tensors that are differentiated together, where their graph fits
_GRAPH = 2**28  # bytes of the graph of such a chunk: what is freed of a larger one goes back to the system each time

Loss = Callable[[nn.Module, Any], Any] | nn.Module
Data = tuple[Tensor, Tensor] | Iterable[Any]


class Losses:
    """The losses of a data set's batches, each times its number of samples, with a graph down to the parameters.

    Args:
        loss_fn: ``loss_fn(model, batch)`` giving the mean loss or (mean loss, weight), or a loss module.
        data: an (inputs, targets) pair of tensors, cut into chunks of ``chunk`` rows, or a re-iterable of batches.
        parameters: those to differentiate by; everything else is a constant.
    """

    def __init__(self, model: nn.Module, loss_fn: Loss, data: Data, parameters: list[nn.Parameter], mode: str) -> None:
        self.model, self.data, self.parameters, self.mode = model, checked_data(data), parameters, mode
        self._loss_fn, self.loss = loss_fn, _as_function(loss_fn, like=parameters[0])
        # Batch norm in train mode couples the rows of a batch, so there a pair of tensors stays whole.
        self.cut(len(self.data[0]) if is_pair(self.data) else 0)
        self._stream: Iterator[Any] = iter(())
        self._index = 0

    def doubled(self) -> "Losses":
        """The same losses of a copy of the model in float64."""
        twins: dict[int, Any] = {}
        model = deepcopy(self.model, twins).double()
        # `double` replaces the values of parameters, not the parameters
        return Losses(model, self._loss_fn, self.data, [twins[id(p)] for p in self.parameters], self.mode)

    def cut(self, rows: int, single: bool = False) -> None:
        """Cut a pair of tensors into chunks of so many rows; `single` gives every sample as a batch of its own."""
        self.chunk = rows
        self._single = single
        self._weights: list[float] = []  # of the batches evaluated so far

    def fit(self, measure: Callable[[], int], memory: int) -> None:
        """Cut a pair of tensors into as many rows a chunk as fit into the memory; `measure` gives a chunk's bytes."""
        size = len(self.data[0])
        self.cut(min(size, PROBE))
        bytes_a_row = measure() / self.chunk
        self.cut(max(1, min(size, _CHUNK, int(min(memory, _GRAPH) / max(bytes_a_row, 1)))))

    def forget(self) -> None:
        """Let `total` take a batch that is not of the stream."""
        self._weights, self._index = [], 0

    def rewind(self, batch: int) -> None:
        """Go to a batch: `next_batch` gives it."""
        self._stream = islice(self._batches(), batch, None)
        self._index = batch

    def next_batch(self) -> Any:
        """The batch, or None behind the last; `total` must follow."""
        return next(self._stream, None)

    def total(self, batch: Any, capture: AbstractContextManager[Any] | None = None) -> tuple[Tensor, float]:
        """(Sum of the batch's losses, its number or weight of samples); with `capture` the weights are constants."""
        with torch.enable_grad():
            value, weight = self._evaluate(batch, capture=capture)
            if self._index == len(self._weights):  # reading it waits for the device: in the first pass only
                self._weights.append(_checked_weight(weight, self._index))
            known = self._weights[self._index]
            # The mean over nothing is nan; with weight 0 it has no say.
            total = value * known if known > 0 else value.nan_to_num() * 0
        self._index += 1
        return total, known

    def probe(self, rows: int) -> None:
        """Evaluate the first batch twice (of a pair of tensors: its first rows), so that bad input shows at once.

        Raises:
            ValueError: the loss is not a finite scalar, or it is not the same function in the second pass.
        """
        batch: Any
        if is_pair(self.data):
            batch = (self.data[0][:rows], self.data[1][:rows])
        else:
            batch = next(iter(self._batches()), None)
            if batch is None:
                raise ValueError("data must hold at least one batch, got none")
        try:
            with torch.no_grad(), warnings.catch_warnings():
                # torch only warns where a loss broadcasts targets against outputs of another shape
                warnings.filterwarnings("error", "Using a target size")
                (value, weight), (again, _) = (self._evaluate(batch, seed) for seed in range(2))
                first, second = float(value), float(again)
        except (ValueError, NotImplementedError):
            raise
        except Exception as error:  # of the model, the loss or the data, whatever they are
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the loss must be computable on the first batch, got {type(error).__name__}: {reason}"
            ) from error
        if _checked_weight(weight, 0) == 0:
            return
        if not math.isfinite(first):
            raise ValueError(f"the loss must be finite, got {first} on the first batch; check weights and data")
        if abs(first - second) > 1e-4 * max(abs(first), 1e-12):
            raise ValueError(
                f"loss_fn must be the same function at every call, got {first:.6g}, then {second:.6g} on the first "
                "batch; switch off dropout, sampling and augmentation (mode='eval' is the default)"
            )

    def _batches(self) -> Iterator[Any]:
        batches: Iterator[Any] = iter(self.data)
        if is_pair(self.data):
            inputs, targets = self.data
            batches = zip(inputs.split(self.chunk), targets.split(self.chunk), strict=True)
        if self._single:
            return (rows(batch, slice(i, i + 1)) for batch in batches for i in range(samples(batch)))
        return batches

    def _evaluate(
        self, batch: Any, seed: int = 0, capture: AbstractContextManager[Any] | None = None
    ) -> tuple[Tensor, Any]:
        device = self.parameters[0].device
        batch = _placed(batch, self.parameters[0])
        with untouched(self.model, [] if capture else self.parameters, self.mode, device), capture or nullcontext():
            _seed(device, seed)
            result = self.loss(self.model, batch)
        value, weight = result if isinstance(result, tuple) else (result, samples(batch))
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"loss_fn must return the mean loss over the batch as a scalar tensor, got {_described(value)} "
                f"on batch {self._index}"
            )
        return value.reshape(()), weight


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32: it makes products of the Hessian inexact and asymmetric. Restored afterwards."""
    precision = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def untouched(model: nn.Module, parameters: list[nn.Parameter], mode: str, device: torch.device) -> Iterator[None]:
    """Forward passes inside can be differentiated twice by `parameters` and leave no trace on the model.

    Modes, buffers, `requires_grad` and the random state are put back, on errors too.
    """
    wanted = {id(p) for p in parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in wanted]
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused attention has no second derivative
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # nor have cuDNN's recurrent layers
        stack.enter_context(_copied_buffers(model))
        try:
            model.train(mode == "train")
            for p in others:
                p.requires_grad_(False)
            yield
        finally:
            for p in others:
                p.requires_grad_(True)
            for module, training in modes:
                module.training = training


@contextmanager
def _copied_buffers(model: nn.Module) -> Iterator[None]:
    """Run on copies of the buffers: putting values back in place would invalidate graphs that saved them."""
    copies: dict[int, Tensor] = {}
    originals: list[tuple[nn.Module, str, Tensor]] = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                originals.append((module, name, buffer))
    try:
        for module, name, buffer in originals:
            module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
        yield
    finally:
        for module, name, buffer in originals:
            module._buffers[name] = buffer


def _seed(device: torch.device, seed: int) -> None:
    """As torch.manual_seed, which takes a millisecond where CUDA is not in use."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def is_pair(data: Any) -> bool:
    """Whether data are an (inputs, targets) pair of tensors, not batches."""
    return isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)


def checked_data(data: Any) -> Any:
    """The data, unless they are no (inputs, targets) pair of equal length and no re-iterable: ValueError says so."""
    if isinstance(data, list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        raise ValueError(
            "data must be a tuple (inputs, targets) or a re-iterable of batches, got a list of two tensors; "
            "write (inputs, targets)"
        )
    if is_pair(data):
        inputs, targets = data
        if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets):
            raise ValueError(
                "inputs and targets must have the same number of rows, got shapes "
                f"{tuple(inputs.shape)} and {tuple(targets.shape)}"
            )
        if len(inputs) == 0:
            raise ValueError("data must hold at least one sample, got none")
    elif isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise ValueError(f"data must be a tuple (inputs, targets) or a re-iterable of batches, got {_described(data)}")
    elif iter(data) is data:
        raise ValueError(
            "data must be re-iterable, as every product may pass over it, got an iterator; "
            "pass a list of batches or a DataLoader"
        )
    return data


def _checked_weight(weight: Any, batch: int) -> float:
    try:
        value = float(weight)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"the weight of a batch must be a finite number >= 0, got {weight} on batch {batch}")
    return value


def mapped(function: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with the function's value in place of each tensor, or of whatever else it holds."""
    if isinstance(batch, dict):
        return {key: mapped(function, value) for key, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(mapped(function, value) for value in batch)
    return function(batch)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in dictionaries, lists and tuples within each other."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def rows(batch: Any, index: slice) -> Any:
    """Some samples of a batch."""
    return mapped(lambda part: part[index] if isinstance(part, Tensor) and part.dim() else part, batch)


def _placed(batch: Any, like: Tensor) -> Any:
    """The batch on the parameters' device, its floating-point tensors in their type."""

    def placed(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.to(like.device, like.dtype if part.is_floating_point() else part.dtype)
        if isinstance(part, PackedSequence):
            there: Any = part.to(device=like.device)  # type: ignore[call-arg]
            return there.to(dtype=like.dtype) if part.data.is_floating_point() else there
        return part

    return mapped(placed, batch)


def _sizes(batch: Any) -> set[int]:
    """The numbers of rows of all tensors in a batch."""
    if isinstance(batch, Tensor):
        return {len(batch)} if batch.dim() else set()
    if isinstance(batch, PackedSequence):
        return {int(batch.batch_sizes[0])}
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, tuple | list):
        return set().union(*map(_sizes, batch))
    return set()


def samples(batch: Any) -> int:
    """How many samples a batch holds, where that is beyond doubt."""
    sizes = _sizes(batch)
    if len(sizes) != 1:
        found = "tensors of " + " and ".join(map(str, sorted(sizes))) + " rows" if sizes else _described(batch)
        raise ValueError(
            f"loss_fn must return (mean loss, weight) where the batch does not show its number of samples, got {found}"
        )
    return sizes.pop()


def _as_function(loss_fn: Any, like: Tensor) -> Callable[[nn.Module, Any], Any]:
    """A loss as ``loss(model, batch) -> mean loss or (mean loss, weight)``."""
    if isinstance(loss_fn, nn.Module):
        return _Criterion(deepcopy(loss_fn).to(like.device, like.dtype))  # class weights beside the model
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be a loss module or a function of (model, batch), got {_described(loss_fn)}")
    if getattr(loss_fn, "__module__", None) == "torch.nn.functional":
        raise ValueError(
            f"loss_fn must be a loss module or a function of (model, batch), got torch.nn.functional."
            f"{loss_fn.__name__}; use its module, as torch.nn.CrossEntropyLoss()"
        )
    try:
        inspect.signature(loss_fn).bind(None, None)
    except TypeError as error:
        raise ValueError(f"loss_fn must take (model, batch): {error}") from None
    except ValueError:  # a builtin without a signature
        pass
    return loss_fn  # type: ignore[no-any-return]


class _Criterion:
    """criterion(model(inputs), targets) with the denominator that the criterion divides by as the weight."""

    def __init__(self, criterion: nn.Module) -> None:
        self.criterion = criterion
        self.reduction = getattr(criterion, "reduction", "mean")
        if self.reduction == "none":
            raise ValueError("the reduction of the loss module must be 'mean' or 'sum', got 'none'")

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f"a loss module needs batches (inputs, targets), got {_described(batch)}; "
                "pass a function of (model, batch) instead"
            )
        inputs, targets = batch
        loss = self.criterion(model(inputs), targets)
        if self.reduction == "sum":
            return loss / max(len(targets), 1), len(targets)
        return loss, denominator(self.criterion, targets)


def denominator(criterion: nn.Module, targets: Tensor) -> Any:
    """What a loss module divides by: valid targets, their weights, or what its own `denominator(targets)` says."""
    own = getattr(criterion, "denominator", None)
    if own is not None:
        return own(targets)
    if getattr(criterion, "reduction", "mean") == "batchmean":
        return len(targets)
    if isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss) and not targets.is_floating_point():
        valid = targets != criterion.ignore_index
        weight = criterion.weight
        if weight is None:
            return valid.sum()
        return (weight.to(targets.device)[targets.where(valid, 0)] * valid).sum()
    return targets.numel()


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80]
