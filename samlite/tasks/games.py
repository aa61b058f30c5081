"""Games, learned by proximal policy optimisation: CartPole, and Atari games in their emulator.

PPO: Schulman et al. 2017, arXiv 1707.06347; generalised advantages: Schulman et al. 2016, arXiv 1506.02438. An epoch is
some iterations of: play a stretch with the present policy, then take several passes of batches over it. The loss is
the clipped objective, so SAM perturbs it by two passes over the same batch.

Environments start anew in every epoch and are seeded by its generator, so a stopped run needs no emulator's state.
Differences from the usual implementation: advantages are normalised over a stretch, not over each batch, for the loss
to be a mean over samples; values are not clipped, nor is the norm of gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from samlite.data.episodes import Episodes, Moves, Players
from samlite.data.tensors import Batch, Splits, TensorData
from samlite.errors import UsageError, missing
from samlite.models import atari_cnn, mlp_actor_critic
from samlite.tasks.ppo import ClippedObjective, advantages
from samlite.tasks.task import Recipe, Scores, Task

# Seeds of environments, no two alike: those of training are drawn from what is above
TRAIN, VALIDATION, TEST, MEASURED, TRAINING = 1_000, 2_000, 3_000, 4_000, 1_000_000

MOST = {  # of the settings that are counts: far beyond is a slip of the pen, and takes for ever
    "environments": 1_000,
    **dict.fromkeys(("steps", "iterations", "passes"), 1_000_000),
    "frames": 1_000_000_000,
}


@dataclass(frozen=True)
class Game(Task):
    """A game, learned by PPO. Its settings are those of `SETTINGS`.

    The metric is the mean score of whole episodes, with actions drawn from the policy. The loss is the mean squared
    error of the values against the returns that followed, as of the rewards that are trained on.
    """

    environments: Callable[[str | None, int, int], Any] | None = None
    """Source, how many, most frames -> those."""
    positions: int = 8192
    """At most, that a Hessian is measured on."""

    @property
    def fixed_samples(self) -> bool:
        return False  # every epoch has other samples

    def with_settings(self, settings: Mapping[str, float]) -> Task:
        """Check the settings, and make the objective that they describe."""
        for name, most in MOST.items():
            if settings[name] < 1 or settings[name] % 1:
                raise UsageError(f"setting {name} must be an integer >= 1, got {settings[name]:g}")
            if settings[name] > most:
                raise UsageError(f"setting {name} must be <= {most:,}, got {settings[name]:g}")
        for name in ("gamma", "lambda"):
            if not 0 <= settings[name] <= 1:
                raise UsageError(f"setting {name} must be between 0 and 1, got {settings[name]:g}")
        for name in ("clip", "value", "entropy", "scale"):
            if settings[name] < 0:
                raise UsageError(f"setting {name} must be >= 0, got {settings[name]:g}")
        return replace(self, loss=_objective(settings), recipe=replace(self.recipe, settings=settings))

    def batches(
        self, model: nn.Module, data: Episodes, batch_size: int, order: torch.Generator, augment: bool
    ) -> Iterator[Batch]:
        """Play and learn: inputs are observations, targets are those of `ClippedObjective`."""
        seed = int(torch.randint(TRAINING, 2**30, (), generator=order))
        players = self._players(data, seed)
        for _ in range(int(self.recipe.settings["iterations"])):
            stretch = self._stretch(model, players)
            for _ in range(int(self.recipe.settings["passes"])):
                yield from stretch.batches(batch_size, order)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: Episodes) -> Scores:
        """Play every episode to its end."""
        model.eval()
        players = Players(self._make(data.game, len(data)), int(data.seeds[0]), data.seeds.device)
        generator = torch.Generator().manual_seed(int(data.seeds[0]))
        moves, playing, running = [], [], torch.ones(len(data), dtype=torch.bool, device=players.device)
        while running.any():
            move = players.move(model, generator)
            moves.append(replace(move, observations=move.idle))  # the images of whole games would fill the memory
            playing.append(running)
            running = running & ~move.over
        values = torch.stack([*(move.values for move in moves), model(players.look())[:, -1]])
        counted = torch.stack(playing)
        errors = self._advantages(moves, values, 1.0)[counted]  # with lambda 1: return less value
        scores = (torch.stack([move.rewards for move in moves]) * counted).sum(0).double()
        others = {
            "score_stderr": (scores.std() / math.sqrt(len(scores))).item() if len(scores) > 1 else 0.0,
            "score_min": scores.min().item(),
            "score_max": scores.max().item(),
            "episodes": float(len(scores)),
            "steps": float(counted.sum().item()),
        }
        return Scores((errors**2).mean().item(), scores.mean().item(), others)

    def subsample(self, model: nn.Module, data: Episodes, count: int, seed: int) -> tuple[Any, int]:
        """Play by the seed: the observations that the policy comes by, with their advantages."""
        count = min(count, self.positions)
        players = self._players(data, MEASURED + seed)
        generator = torch.Generator().manual_seed(seed)
        stretches: list[TensorData] = []
        while sum(map(len, stretches)) < count:
            stretches.append(self._stretch(model, players, generator))
        inputs = torch.cat([stretch.inputs for stretch in stretches])[:count]
        targets = torch.cat([stretch.targets for stretch in stretches])[:count]
        return (inputs, targets), count

    def _make(self, game: str | None, count: int) -> Any:
        assert self.environments is not None
        return self.environments(game, count, int(self.recipe.settings["frames"]))

    def _players(self, data: Episodes, seed: int) -> Players:
        environments = self._make(data.game, int(self.recipe.settings["environments"]))
        return Players(environments, seed, data.seeds.device)

    @torch.no_grad()
    def _stretch(self, model: nn.Module, players: Players, generator: torch.Generator | None = None) -> TensorData:
        """Play some steps, and what is to be learned from them."""
        model.eval()
        moves = [players.move(model, generator) for _ in range(int(self.recipe.settings["steps"]))]
        values = torch.stack([*(move.values for move in moves), model(players.look())[:, -1]])
        gains = self._advantages(moves, values, self.recipe.settings["lambda"])
        used = torch.stack([~move.idle for move in moves])
        returns = (gains + values[:-1])[used]
        gains = gains[used]
        gains = (gains - gains.mean()) / (gains.std(correction=0) + 1e-8)
        actions = torch.stack([move.actions for move in moves])[used].to(gains.dtype)
        logs = torch.stack([move.logs for move in moves])[used]
        observations = torch.stack([move.observations for move in moves])[used]
        return TensorData(observations, torch.stack([actions, logs, gains, returns], dim=1))

    def _advantages(self, moves: list[Moves], values: Tensor, lambda_: float) -> Tensor:
        """With rewards between -1 and 1, times the scale."""
        rewards = torch.stack([move.rewards for move in moves]).clamp(-1, 1) * self.recipe.settings["scale"]
        final = torch.stack([move.final for move in moves])
        cut = final | torch.stack([move.over for move in moves])
        return advantages(rewards, values, final, cut, self.recipe.settings["gamma"], lambda_)


def _objective(settings: Mapping[str, float]) -> ClippedObjective:
    return ClippedObjective(settings["clip"], settings["value"], settings["entropy"])


def _cartpole(source: str | None, count: int, frames: int) -> Any:
    from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

    return CartPoleVectorEnv(count, max_episode_steps=frames)


def load_cartpole(source: str | None, seed: int) -> Splits:
    """The same episodes for every seed."""
    try:
        import gymnasium  # noqa: F401
    except ImportError as error:
        raise missing("task cartpole", "gymnasium", "games") from error
    return _splits(None, 10, actions=2)


def _atari(game: str | None, count: int, frames: int) -> Any:
    """The usual preprocessing: 84 by 84 grey pixels, the maximum of two frames of four, four such images a time."""
    import ale_py
    from ale_py.vector_env import AtariVectorEnv

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    return AtariVectorEnv(
        str(game),
        count,
        num_threads=min(count, torch.get_num_threads()),
        reward_clipping=False,  # the score is not clipped; what is trained on is, later
        episodic_life=False,  # it would start a new game; a life lost shows in `lives`
        max_num_frames_per_episode=frames,
    )


def load_atari(source: str | None, seed: int) -> Splits:
    """The same episodes for every seed. Raises UsageError where the emulator has no such game."""
    try:
        import gymnasium  # noqa: F401
        from ale_py import roms
    except ImportError as error:
        raise missing("task atari", "gymnasium and ale-py", "games") from error
    games = roms.get_all_rom_ids()
    if source not in games:
        near = get_close_matches(str(source).lower(), games, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f", such as {', '.join(games[:3])}"
        raise UsageError(f"data must name one of the {len(games)} Atari games, got {source!r}{hint}")
    return _splits(source, 5, actions=_atari(source, 1, 1).single_action_space.n)


def _splits(game: str | None, count: int, actions: int) -> Splits:
    """Twenty episodes for the test, and so many for training and for validation, which are played every epoch."""
    train, validation = (Episodes.of(game, first, count) for first in (TRAIN, VALIDATION))
    return Splits(train, validation, Episodes.of(game, TEST, 20), {"actions": actions})


CARTPOLE_SETTINGS = {
    "environments": 16,
    "steps": 128,
    "iterations": 2,  # stretches an epoch
    "passes": 5,  # over each stretch
    "gamma": 0.98,
    "lambda": 0.9,
    "clip": 0.2,
    "value": 0.5,  # weight of the values' errors
    "entropy": 0.0,  # weight of the policy's entropy
    "scale": 0.02,  # of rewards: for values near 1
    "frames": 500,  # of an episode at most
}

CARTPOLE = Game(
    name="cartpole",
    summary="balancing a pole, by PPO",
    network="tanh MLPs [w, w] for the policy and for the values",
    data="CartPole-v1 of gymnasium; 20 episodes of at most 500 steps for the test",
    model=partial(mlp_actor_critic, observations=4, actions=2),
    load=load_cartpole,
    loss=_objective(CARTPOLE_SETTINGS),
    metric="score",
    recipe=Recipe(
        lr={"sgd": 0.1, "adam": 2e-3, "adamw": 2e-3},
        batch_size=256,
        epochs=25,
        schedule="cosine",
        milestones=(),
        settings=CARTPOLE_SETTINGS,
    ),
    width=64,
    widths=(16, 64, 256),
    extra="games",
    base="adam",
    environments=_cartpole,
)

ATARI_SETTINGS = {
    "environments": 8,
    "steps": 128,
    "iterations": 20,
    "passes": 3,
    "gamma": 0.99,
    "lambda": 0.95,
    "clip": 0.1,
    "value": 0.5,
    "entropy": 0.01,
    "scale": 1.0,
    "frames": 27_000,  # 7.5 minutes
}

ATARI = Game(
    name="atari",
    summary="Atari games, by PPO",
    network="CNN, convolutions [w, 2w, 2w] and dense [16w]",
    data="a game of the emulator ale-py, by its name; 20 games for the test",
    model=partial(atari_cnn, actions=4),
    load=load_atari,
    loss=_objective(ATARI_SETTINGS),
    metric="score",
    recipe=Recipe(
        lr={"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3},
        batch_size=256,
        epochs=16,
        schedule="cosine",
        milestones=(),
        settings=ATARI_SETTINGS,
    ),
    width=32,
    widths=(16, 32, 64),
    extra="games",
    source="breakout",
    base="adam",
    environments=_atari,
    positions=1024,
)
