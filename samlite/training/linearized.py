"""The linearised (lazy) regime: a network's first-order expansion about its first weights, trained in its place."""

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from samlite.errors import UsageError


class Linearized(nn.Module):
    """f(w0) + J(w0) (w - w0) of a network f, with the same parameters w, which start at w0.

    One pass costs about two of the network. Chizat, Oyallon, Bach, "On lazy training in differentiable programming",
    NeurIPS 2019.

    Raises:
        UsageError: the network has batch norm, whose batch statistics have no fixed expansion, or recurrent layers,
            which have no forward derivative.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if any(isinstance(module, nn.modules.batchnorm._NormBase) for module in network.modules()):
            raise UsageError("linearize must go with a network without batch norm; choose another task")
        if any(isinstance(module, nn.RNNBase) for module in network.modules()):
            raise UsageError("linearize must go with a network without recurrent layers; choose another task")
        self.expanded = network
        self._names = [name for name, _ in network.named_parameters()]
        for i, parameter in enumerate(network.parameters()):
            self.register_buffer(f"origin{i}", parameter.detach().clone())

    def forward(self, inputs: Any) -> Tensor:
        """The expansion at the inputs, in the shape of the network's outputs."""
        weights = dict(self.expanded.named_parameters())
        origin = {name: getattr(self, f"origin{i}") for i, name in enumerate(self._names)}
        step = {name: weights[name] - origin[name] for name in self._names}
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative
            value, slope = jvp(  # type: ignore[misc]  # (it may give three)
                lambda at: functional_call(self.expanded, at, (inputs,)), (origin,), (step,)
            )
        result: Tensor = value + slope
        return result
