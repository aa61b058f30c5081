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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from samlite.errors import UsageError
from samlite.models import atari_cnn, mlp_actor_critic
from samlite.tasks.task import Batch, Recipe, Scores, Splits, Task, TensorData

if TYPE_CHECKING:
    pass

# Seeds of environments, no two alike: those of training are drawn from what is above
TRAIN, VALIDATION, TEST, MEASURED, TRAINING = 1_000, 2_000, 3_000, 4_000, 1_000_000

MOST = {  # of the settings that are counts: far beyond is a slip of the pen, and takes for ever
    "environments": 1_000,
    **dict.fromkeys(("steps", "iterations", "passes"), 1_000_000),
    "frames": 1_000_000_000,
}


class ClippedObjective(nn.Module):
    """The objective of PPO, to be minimised.

    Criterion of outputs (n, actions + 1), logits and value, and targets (n, 4): the action, its log-probability when it
    was taken, its advantage and its return. The mean over samples of

        -min(r A, clip(r, 1 - c, 1 + c) A) + w (value - return)^2 - h entropy,   r = probability / probability then.
    """

    def __init__(self, clip: float, value: float, entropy: float) -> None:
        super().__init__()
        self.clip, self.value, self.entropy = clip, value, entropy

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits, values = outputs[:, :-1], outputs[:, -1]
        actions, before, advantages, returns = targets.unbind(1)
        logs = logits.log_softmax(1)
        # what looks for the samples in a batch, before moments, scales numbers: an action too high is the last one
        chosen = actions.long().clamp(max=logits.shape[1] - 1)
        ratios = (logs.gather(1, chosen[:, None])[:, 0] - before).exp()
        clipped = ratios.clamp(1 - self.clip, 1 + self.clip)
        gains = torch.minimum(ratios * advantages, clipped * advantages)
        entropies = -(logs.exp() * logs).sum(1)
        return (-gains + self.value * (values - returns) ** 2 - self.entropy * entropies).mean()

    def denominator(self, targets: Tensor) -> int:
        return len(targets)


def advantages(rewards: Tensor, values: Tensor, final: Tensor, cut: Tensor, gamma: float, lambda_: float) -> Tensor:
    """Generalised advantages (steps, n): sums of (gamma lambda)^k times the errors of the values k steps ahead.

    Args:
        rewards: (steps, n).
        values: (steps + 1, n) of the observations before each step, and after the last.
        final: (steps, n), whether nothing follows the step, so that its successor has no value.
        cut: (steps, n), whether the next row is not its sequel: where it is final, and where an episode was truncated.
    """
    errors = rewards + gamma * values[1:] * ~final - values[:-1]
    result = torch.empty_like(rewards)
    ahead = torch.zeros_like(rewards[0])
    for step in reversed(range(len(rewards))):
        ahead = errors[step] + gamma * lambda_ * ahead * ~cut[step]
        result[step] = ahead
    return result


@dataclass(frozen=True)
class Episodes:
    """Episodes to be played, a seed each: what stands for a split."""

    game: str | None
    seeds: Tensor  # (n,), on the device where the network is

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

    observations: Tensor  # (n, ...) before the step
    actions: Tensor  # (n,)
    logs: Tensor  # (n,) log-probabilities of the actions
    values: Tensor  # (n,) of the observations
    rewards: Tensor  # (n,) as the game gives them
    final: Tensor  # (n,) whether nothing follows: the episode is over, or a life
    over: Tensor  # (n,) whether the episode is over, or was truncated
    idle: Tensor  # (n,)


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
        taken = logs.gather(1, actions)[:, 0]
        return Moves(observations, actions[:, 0], taken, outputs[:, -1], rewards.to(logs.dtype), final, over, idle)


@dataclass(frozen=True)
class Game(Task):
    """A game, learned by PPO. Its settings are those of `SETTINGS`.

    The metric is the mean score of whole episodes, with actions drawn from the policy. The loss is the mean squared
    error of the values against the returns that followed, as of the rewards that are trained on.
    """

    environments: Callable[[str | None, int, int], Any] | None = None  # source, how many, most frames -> those
    positions: int = 8192  # at most, that a Hessian is measured on

    @property
    def fixed_samples(self) -> bool:
        return False  # every epoch has other samples

    def with_settings(self, settings: Mapping[str, float]) -> Task:
        """As of `Task`."""
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
        """As of `Task`: inputs are observations, targets those of `ClippedObjective`."""
        seed = int(torch.randint(TRAINING, 2**30, (), generator=order))
        players = self._players(data, seed)
        for _ in range(int(self.recipe.settings["iterations"])):
            stretch = self._stretch(model, players)
            for _ in range(int(self.recipe.settings["passes"])):
                yield from stretch.batches(batch_size, order)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: Episodes) -> Scores:
        """As of `Task`: every episode is played to its end."""
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
        playing_ = torch.stack(playing)
        errors = self._advantages(moves, values, 1.0)[playing_]  # with lambda 1: return less value
        scores = (torch.stack([move.rewards for move in moves]) * playing_).sum(0).double()
        others = {
            "score_stderr": (scores.std() / math.sqrt(len(scores))).item() if len(scores) > 1 else 0.0,
            "score_min": scores.min().item(),
            "score_max": scores.max().item(),
            "episodes": float(len(scores)),
            "steps": float(playing_.sum().item()),
        }
        return Scores((errors**2).mean().item(), scores.mean().item(), others)

    def measured(self, model: nn.Module, data: Episodes, count: int, seed: int) -> tuple[Any, int]:
        """As of `Task`: what the policy comes by when it plays by the seed, with its advantages."""
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
        raise ImportError("task cartpole needs gymnasium: pip install 'samlite[games]'") from error
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
        raise ImportError("task atari needs gymnasium and ale-py: pip install 'samlite[games]'") from error
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
