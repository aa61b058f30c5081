"""The width-scaled networks: width in, module out. One file an architecture."""

from torch import nn

from samlite.models.actor_critic import atari_cnn, mlp_actor_critic
from samlite.models.gcn import graph_network
from samlite.models.lstm import lstm
from samlite.models.mlp import mlp, tapered_mlp
from samlite.models.resnet import resnet18, resnet50
from samlite.models.tagger import tagger
from samlite.models.vit import vit

__all__ = [
    "atari_cnn",
    "count_in_short",
    "graph_network",
    "lstm",
    "mlp",
    "mlp_actor_critic",
    "parameter_count",
    "resnet18",
    "resnet50",
    "tagger",
    "tapered_mlp",
    "vit",
]


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters; a tied parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_in_short(count: float) -> str:
    """A number of parameters in two or three digits: 587, 2.6k, 14k, 5.4M."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.{1 if count < 10 * size else 0}f}{suffix}"
    return f"{count:.0f}"
