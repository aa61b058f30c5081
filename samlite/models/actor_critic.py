"""Networks that play: from observations (n, ...) to the logits of the actions and the value, (n, actions + 1)."""

import math

import torch
from torch import Tensor, nn


class ActorCritic(nn.Module):
    """An actor and a critic, their outputs side by side, on the features of a common trunk."""

    def __init__(self, trunk: nn.Module, actor: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.trunk, self.actor, self.critic = trunk, actor, critic
        _initialise(trunk, math.sqrt(2))
        _initialise(actor, 0.01)  # the first policy is all but uniform
        _initialise(critic, 1.0)

    def forward(self, observations: Tensor) -> Tensor:
        """Bytes, as of images, count as numbers in [0, 1]."""
        if not observations.is_floating_point():
            observations = observations.to(next(self.parameters()).dtype) / 255
        features = self.trunk(observations)
        return torch.cat([self.actor(features), self.critic(features)], dim=-1)


def mlp_actor_critic(width: int, observations: int, actions: int) -> nn.Module:
    """Two tanh networks [width, width] with nothing in common, as the critic's gradient is far the larger."""

    def network(outputs: int) -> nn.Module:
        hidden = [nn.Linear(observations, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
        return nn.Sequential(*hidden, nn.Linear(width, outputs))

    return ActorCritic(nn.Identity(), network(actions), network(1))


def atari_cnn(width: int, actions: int) -> nn.Module:
    """Convolutions [w, 2w, 2w] and a dense layer [16w] on 4 images of 84 by 84 pixels.

    With w = 32 it is the network of Mnih et al. (Nature 2015).
    """
    trunk = nn.Sequential(
        nn.Conv2d(4, width, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(7 * 7 * 2 * width, 16 * width),
        nn.ReLU(),
    )
    return ActorCritic(trunk, nn.Linear(16 * width, actions), nn.Linear(16 * width, 1))


def _initialise(network: nn.Module, last: float) -> None:
    """Orthogonal weights, those of the last layer of this gain. Biases are zero."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, last if layer is layers[-1] else math.sqrt(2))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
