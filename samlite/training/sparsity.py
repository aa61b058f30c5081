"""Sparse networks: masks at initialisation over the weights of linear and convolution layers, kept from then on.

A masked layer holds only the weights that are kept, as one vector, and puts zeros around them when it is used. So
whatever works on a model's parameters works in the masked subspace: optimizers, SAM's perturbation, the Hessian, and
the number of parameters.

SNIP: Lee, Ajanthan, Torr, "SNIP: Single-shot network pruning based on connection sensitivity", ICLR 2019.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from samlite.errors import UsageError
from samlite.seeds import generator

PRUNED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MASK = ".parametrizations.weight.0.mask"


class Masked(nn.Module):
    """The parametrization of a weight by the entries that its mask keeps."""

    mask: Tensor
    places: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.register_buffer("places", mask.flatten().nonzero().flatten(), persistent=False)

    def forward(self, kept: Tensor) -> Tensor:
        """The kept entries (k) in their places among zeros, in the shape of the mask."""
        zeros = kept.new_zeros(self.mask.numel())
        return zeros.index_copy(0, self.places, kept).view(self.mask.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The entries (k) that the mask keeps."""
        return weight.flatten()[self.places]


def choose(
    model: nn.Module, sparsity: float, pruner: str, loss: Callable[[nn.Module], Tensor], seed: int
) -> dict[str, Tensor]:
    """For each linear and convolution layer, by name, which of its weights stay (bool, in the weight's shape).

    Args:
        sparsity: the fraction of these weights that goes.
        pruner: "random" takes it from every layer by chance; "snip" takes the smallest |w df/dw| over all layers, and
            "magnitude" the smallest |w|.
        loss: of the model on one training batch, in training mode, for SNIP. The model is left with its gradients and
            buffers changed: pass a copy.
        seed: of the random choice.
    """
    weights = _weights(model)
    if pruner == "random":
        draw = generator("mask", seed)
        return {
            name: _largest([torch.rand(weight.shape, generator=draw)], sparsity)[0] for name, weight in weights.items()
        }
    if pruner == "snip":
        gradients = torch.autograd.grad(loss(model.train()), list(weights.values()), materialize_grads=True)
        scores = [(w * g).abs() for w, g in zip(weights.values(), gradients, strict=True)]
    else:
        scores = [weight.abs() for weight in weights.values()]
    return dict(zip(weights, _largest([score.detach() for score in scores], sparsity), strict=True))


def mask(model: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """Leave only these weights of the layers of these names, in place. Raises UsageError where a mask does not fit."""
    weights = _weights(model)
    for name, where in kept.items():
        if name not in weights or where.dtype != torch.bool or where.shape != weights[name].shape:
            raise UsageError(f"the mask of {name} must be booleans in the shape of a layer's weight")
        masked = Masked(where.to(weights[name].device))
        parametrize.register_parametrization(model.get_submodule(name), "weight", masked)
    return model


def masks_in(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks in the state dict of a masked model, or of its linearisation, by the name of the layer."""
    return {
        name.removesuffix(_MASK).removeprefix("expanded."): tensor
        for name, tensor in state.items()
        if name.endswith(_MASK)
    }


def _weights(model: nn.Module) -> dict[str, Any]:
    """The weights that may be masked, by the name of the layer."""
    return {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, PRUNED)}


def _largest(scores: list[Tensor], sparsity: float) -> list[Tensor]:
    """Masks of all scores but the smallest round(sparsity n) of the n there are."""
    flat = torch.cat([score.flatten() for score in scores])
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[flat.argsort(stable=True)[: round(sparsity * len(flat))]] = False
    parts = torch.split(keep, [score.numel() for score in scores])
    return [part.view(score.shape).clone() for part, score in zip(parts, scores, strict=True)]
