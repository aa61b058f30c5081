"""The width-scaled networks: width in, module out. One file an architecture."""

from torch import nn

from samlite.models.actor_critic import atari_cnn, mlp_actor_critic
from samlite.models.mlp import mlp, tapered_mlp

__all__ = ["atari_cnn", "mlp", "mlp_actor_critic", "parameter_count", "tapered_mlp"]


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters; a tied parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
