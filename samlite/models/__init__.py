"""The width-scaled networks: width in, module out. One file an architecture."""

from torch import nn

from samlite.models.gcn import graph_network
from samlite.models.mlp import mlp, tapered_mlp

__all__ = ["graph_network", "mlp", "parameter_count", "tapered_mlp"]


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters; a tied parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
