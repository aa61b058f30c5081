"""Episodes of games, and the environments in which a network plays them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Episodes:
    """Episodes to be played, one a seed. They stand for a split of data."""

    game: str | None
    seeds: Tensor
    """Seeds (n,), on the device of the network."""

    @classmethod
    def of(cls, game: str | None, first: int, count: int) -> Episodes:
        return cls(game, torch.arange(first, first + count))

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def targets(self) -> Tensor:
        return self.seeds

    def to(self, device: torch.device | str) -> Episodes:
        return Episodes(self.game, self.seeds.to(device))


@dataclass(frozen=True)
class Moves:
    """One step of all n environments. Where `idle` the step only began the next episode, and nothing counts."""

    observations: Tensor
    """What is seen before the step, (n, ...)."""
    actions: Tensor
    """The actions taken, (n,)."""
    logs: Tensor
    """The log-probabilities of the actions, (n,)."""
    values: Tensor
    """The values of the observations, (n,)."""
    rewards: Tensor
    """The rewards as the game gives them, (n,)."""
    final: Tensor
    """Whether nothing follows, because the episode or a life is over, (n,)."""
    over: Tensor
    """Whether the episode is over or was truncated, (n,)."""
    idle: Tensor
    """Whether the step only began the next episode, (n,)."""


class Players:
    """Environments side by side, in which a network plays.

    They are gymnasium's vector environments that reset in the step after an episode's end, whose action they ignore
    (autoreset NEXT_STEP). So what is observed at an episode's end is its own last observation.
    """

    def __init__(self, environments: Any, seed: int, device: torch.device) -> None:
        self.environments, self.device = environments, device
        self.observations, info = environments.reset(seed=seed)
        self.lives = info.get("lives", np.zeros(environments.num_envs))
        self.idle = np.zeros(environments.num_envs, dtype=bool)

    def look(self) -> Tensor:
        """What is to be seen now, (n, ...)."""
        return torch.tensor(self.observations, device=self.device)

    def move(self, model: nn.Module, generator: torch.Generator | None = None) -> Moves:
        """Play one step, its actions drawn from the policy by the generator, else by torch's own."""
        observations = self.look()
        outputs = model(observations)
        logs = outputs[:, :-1].log_softmax(1)
        if generator is not None:
            actions = torch.multinomial(logs.exp().cpu(), 1, generator=generator).to(self.device)
        else:
            actions = torch.multinomial(logs.exp(), 1)
        self.observations, rewards, terminated, truncated, info = self.environments.step(actions[:, 0].cpu().numpy())
        lives = info.get("lives", self.lives)
        rows = (rewards, terminated | (lives < self.lives), terminated | truncated, self.idle)
        self.lives, self.idle = lives, terminated | truncated
        rewards, final, over, idle = (torch.tensor(row, device=self.device) for row in rows)
        return Moves(
            observations=observations,
            actions=actions[:, 0],
            logs=logs.gather(1, actions)[:, 0],
            values=outputs[:, -1],
            rewards=rewards.to(logs.dtype),
            final=final,
            over=over,
            idle=idle,
        )
