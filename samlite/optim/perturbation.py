"""The perturbation of SAM: which way is uphill, how far, and back again. No optimizer is in it."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

TensorList = list[Tensor] | tuple[Tensor, ...]
# A parameter group, with its weights and their gradients that share one device, dtype and sharding.
Bucket = tuple[dict[str, Any], list[Tensor], list[Tensor]]


class Snapshot:
    """Copies of weights, from which they are put back exactly: subtracting epsilon would round."""

    def __init__(self) -> None:
        self._copies: Sequence[list[Tensor]] = ()  # the memory is kept from step to step
        self._weights: list[list[Tensor]] | None = None  # by bucket

    @property
    def taken(self) -> bool:
        """Whether there is one to put back."""
        return self._weights is not None

    def take(self, weights: list[list[Tensor]]) -> None:
        """Copy the weights of each bucket."""
        weights = [shards_of(bucket) for bucket in weights]
        old: list[list[Tensor]] = [*self._copies, *([] for _ in weights)]
        self._copies = [_copied(bucket, copies) for bucket, copies in zip(weights, old, strict=False)]
        self._weights = weights

    def put_back(self) -> None:
        """Copy the saved weights back, in place."""
        for weights, copies in zip(self._weights or [], self._copies, strict=False):
            torch._foreach_copy_(weights, copies)
        forget_old_weights()
        self._weights = None


def gradients_of(param_groups: Sequence[dict[str, Any]]) -> list[Bucket]:
    """The weights that have a gradient, with it in float32 or wider, sharded as the weight is."""
    buckets: list[Bucket] = []
    for group in param_groups:
        kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for weight in group["params"]:
            grad = weight.grad
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise ValueError(f"gradients must be dense, got {grad.layout}; use sparse=False")
            if hasattr(weight, "_fsdp_flattened"):  # a shard that says nothing of the others
                raise ValueError("params must not be those of FullyShardedDataParallel; use fully_shard (FSDP2)")
            placed = sharding(weight)
            if placed and placed != sharding(grad):
                grad = grad.redistribute(*placed)
            weights, grads = kinds[weight.device, weight.dtype, placed]
            weights.append(weight)
            grads.append(grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad)
        buckets += [(group, weights, grads) for weights, grads in kinds.values()]
    return buckets


def climb_(buckets: list[Bucket], rho: float | None = None) -> Tensor:
    """Add epsilon to the weights, with the radius of their group if none is given; return the norm divided by."""
    shards = [(group, shards_of(weights), shards_of(grads)) for group, weights, grads in buckets]
    directions = [
        torch._foreach_mul(grads, torch._foreach_abs(weights)) if group["adaptive"] else grads
        for group, weights, grads in shards
    ]
    norm = norm_of(buckets, directions)
    # A norm so small that its squares underflow is not to be trusted; a zero gradient stays zero.
    numbers = torch.finfo(norm.dtype)
    divisor = norm.clamp_min(math.sqrt(numbers.tiny / numbers.eps))
    for (group, weights, _), direction in zip(shards, directions, strict=True):
        if group["adaptive"]:
            direction = torch._foreach_mul(direction, torch._foreach_abs(weights))
        radius = float(group["rho"] if rho is None else rho)
        radius = -radius if group.get("maximize") else radius
        if group["normalize"]:
            divisors = [divisor.to(weights[0].device)] * len(weights)
            torch._foreach_addcdiv_(weights, direction, divisors, value=radius)
        else:
            torch._foreach_add_(weights, direction, alpha=radius)
    forget_old_weights()
    return norm


def forget_old_weights() -> None:
    """Make regions around the step compute anew what they keep of the weights: casts, and parametrized ones."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def sharding(tensor: Any) -> Any:
    """The mesh and the placements of a DTensor; None of any other tensor."""
    return (tensor.device_mesh, tensor.placements) if hasattr(tensor, "device_mesh") else None


def shards_of(tensors: Sequence[Any]) -> list[Tensor]:
    """The part of each tensor that this process holds: everything but a norm is computed element by element."""
    return [tensor.to_local() if hasattr(tensor, "device_mesh") else tensor for tensor in tensors]


def _copied(weights: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    """Copies of the weights, over old ones that fit: on a CPU fresh memory costs more than the copying."""
    if not old or _kind(weights) != _kind(old):
        return [weight.clone() for weight in weights]
    torch._foreach_copy_(old, weights)
    return old


def _kind(tensors: list[Tensor]) -> Any:
    return [(tensor.device, tensor.dtype, tensor.shape) for tensor in tensors]


def norm_of(buckets: Sequence[Bucket], directions: Sequence[TensorList]) -> Tensor:
    """The Euclidean norm of all directions together, each the shards of the bucket beside it."""
    norms: list[Tensor] = []
    for (_, weights, _), direction in zip(buckets, directions, strict=True):
        parts = torch._foreach_norm(direction)
        norms += [_over_shards(parts, weights[0])] if sharding(weights[0]) else parts
    if not norms:
        return torch.zeros((), device="cpu")
    if len(directions) > 1:
        norms = [norm.to(norms[0].device) for norm in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _over_shards(norms: TensorList, like: Tensor) -> Tensor:
    """The norm over all processes of shards whose norms are given here, sharded like a DTensor."""
    from torch.distributed.tensor import DTensor, Partial  # there already, but slow to import

    mesh, placements = sharding(like)
    partial_sums = [placement if placement.is_replicate() else Partial() for placement in placements]
    square = torch.stack(norms).double().square().sum()
    whole: Tensor = DTensor.from_local(square, mesh, partial_sums, run_check=False).full_tensor()
    return whole.sqrt().to(norms[0])
