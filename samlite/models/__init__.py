"""The width-scaled networks: width in, module out. One file an architecture."""

from torch import nn

from samlite.models.mlp import mlp, tapered_mlp
from samlite.models.resnet import resnet18, resnet50
from samlite.models.vit import vit

__all__ = ["mlp", "parameter_count", "resnet18", "resnet50", "tapered_mlp", "vit"]


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters; a tied parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
