"""Which matrix the curvature of a batch is: the Hessian of its loss, or the Gauss-Newton part of that.

G = J^T (d2 loss / d outputs2) J, with J the Jacobian of the model's outputs by the parameters, leaves out how the
network itself bends. It is positive semidefinite for losses that are convex in the outputs, such as cross-entropy and
squared error. The outputs are what ``model(...)`` returns when `loss_fn` calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from samlite.batches import is_pair, mapped, tensors
from samlite.curvature.capture.recorder import Capture
from samlite.curvature.function import Losses
from samlite.curvature.memory import graph_bytes
from samlite.errors import UsageError

Kind = Literal["hessian", "ggn"]


class Cut:
    """The outputs of a model during a forward pass, each replaced by a leaf that the loss is computed from."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.called = False

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Cut the outputs of every call of the model inside."""
        handle = model.register_forward_hook(lambda module, inputs, output: self._call(output))
        try:
            yield
        finally:
            handle.remove()

    def _call(self, output: Any) -> Any:
        with torch._C.DisableTorchFunction():  # what happens here is not a part of the model
            return self._cut(output)

    def _cut(self, output: Any) -> Any:
        self.called, earlier = True, list(self.leaves)
        result = mapped(self._leaf, output)
        new = self.outputs[len(earlier) :]
        if earlier and new and _depends(sum(part.sum() for part in new), earlier):
            raise UsageError(
                "curvature='ggn' needs outputs that do not go into the model again, got a call on an earlier output; "
                "use curvature='hessian'"
            )
        return result

    def _leaf(self, part: Any) -> Any:
        if not isinstance(part, Tensor) or not part.requires_grad:
            return part
        self.outputs.append(part)
        self.leaves.append(part.detach().requires_grad_())
        return self.leaves[-1].clone()  # that operations in place may change


def _depends(total: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether a scalar is computed from any of the tensors."""
    if not isinstance(total, Tensor) or not total.requires_grad or not tensors:
        return False
    gradients = torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True)
    return any(gradient is not None for gradient in gradients)


class Curves:
    """Evaluates batches to the graphs that `samlite._C` differentiates."""

    def __init__(self, module: ModuleType, losses: Losses, kind: Kind) -> None:
        self._c, self.losses, self.kind = module, losses, kind
        self._sizes: dict[Any, int] = {}  # bytes of graphs, by the shapes of their batches

    def total(self, batch: Any, capture: Capture | None = None) -> tuple[Tensor, float, list[Tensor], list[Tensor]]:
        """(Sum of losses, weight, outputs, their leaves); no outputs for the Hessian."""
        if self.kind == "hessian":
            return *self.losses.total(batch, capture), [], []
        cut = Cut()
        before = self._c.sequence_number()
        with cut.of(self.losses.model):
            total, weight = self.losses.total(batch, capture)
        self._c.drop_hooks(cut.outputs, before)
        self._check(cut, total)
        return total, weight, cut.outputs, cut.leaves

    def _check(self, cut: Cut, total: Tensor) -> None:
        """Raise UsageError unless the loss depends on the parameters by way of the outputs alone."""
        rule = "curvature='ggn' needs a loss_fn that computes the loss from what model(...) returns"
        if not cut.called:
            raise UsageError(f"{rule}, got one that does not call it; use curvature='hessian'")
        if _depends(total, self.losses.parameters):
            raise UsageError(
                f"{rule}, in tensors, dictionaries, lists and tuples, got one that depends on the parameters "
                "in another way, too; use curvature='hessian'"
            )
        if _depends(total, [leaf for leaf in cut.leaves if leaf.dim() == 0]):
            raise UsageError(f"{rule}, got a loss that the model itself returned; compute it in loss_fn")

    def whole(self, batch: Any) -> tuple[Any, Tensor, float]:
        """(Graph, sum of losses, weight) of a batch as one."""
        total, weight, outputs, leaves = self.total(batch)
        params = self.losses.parameters
        if self.kind == "hessian":
            return self._c.gradient(total, params), total.detach(), weight
        return self._c.gauss_newton(total, outputs, leaves, params), total.detach(), weight

    def multiplier(self, batch: Any) -> Callable[[Tensor], Tensor]:
        """Multiplies vectors (p,) by the matrix of a batch's mean loss, through one graph."""
        graph, _, weight = self.whole(batch)
        mean = self._c.batch_hessian(graph, weight, True, self.losses.parameters)
        return lambda v: mean(v, 1)[0] / weight

    def bytes(self, batch: Any, graph: Any) -> int:
        """What the graph of a batch keeps in memory; batches of the same shapes have graphs of the same size."""
        shapes = tuple(tuple(tensor.shape) for tensor in tensors(batch))
        if not shapes or shapes not in self._sizes:
            data = self.losses.data if is_pair(self.losses.data) else ()
            self._sizes[shapes] = graph_bytes(graph.held(), [*self.losses.parameters, *data])
        return self._sizes[shapes]
