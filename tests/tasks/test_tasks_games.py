import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import contents
from torch import Tensor, nn

from samlite.curvature.hessian import Hessian
from samlite.data.episodes import Episodes, Players
from samlite.files import read_json
from samlite.optim.sam import SAM
from samlite.tasks import games, get
from samlite.tasks.games import Game
from samlite.tasks.ppo import ClippedObjective, advantages
from samlite.training.config import Config, task_of
from samlite.training.loop import train
from samlite.training.runs import load_run

# The objective


def outputs_of(probabilities: Sequence[float], value: float) -> Tensor:
    return torch.tensor([[*(math.log(p) for p in probabilities), value]], dtype=torch.float64)


def target(action: int, probability: float, advantage: float, value: float) -> Tensor:
    return torch.tensor([[action, math.log(probability), advantage, value]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("now", "then", "advantage", "gain"),
    [
        (0.5, 0.5, 2.0, 2.0),  # the same policy
        (0.55, 0.5, 2.0, 2.2),  # within the clip
        (0.8, 0.5, 2.0, 2.4),  # more likely than 1.2 times: no more to gain
        (0.2, 0.5, 2.0, 0.8),  # a good action lost is not clipped
        (0.2, 0.5, -2.0, -1.6),  # less likely than 0.8 times: no more to gain
        (0.8, 0.5, -2.0, -3.2),  # a bad action gained is not clipped
    ],
)
def test_the_gain_is_clipped_on_the_side_where_there_is_no_more_to_gain(
    now: float, then: float, advantage: float, gain: float
) -> None:
    outputs = outputs_of([now, 1 - now], 0.0).requires_grad_()
    loss = ClippedObjective(clip=0.2, value=0.0, entropy=0.0)(outputs, target(0, then, advantage, 7.0))
    assert loss.item() == pytest.approx(-gain)
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert bool(gradient.any()) == (gain == pytest.approx(advantage * now / then))


def test_the_objective_adds_the_error_of_the_value_and_takes_off_the_entropy() -> None:
    outputs = outputs_of([0.25, 0.75], 3.0)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    objective = ClippedObjective(clip=0.2, value=0.5, entropy=0.1)
    assert objective(outputs, target(1, 0.75, 0.0, 5.0)).item() == pytest.approx(0.5 * 4 - 0.1 * entropy)


def test_the_objective_is_a_mean_over_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 4, generator=generator)
    targets = torch.stack([torch.arange(6) % 3, *torch.randn(3, 6, generator=generator)], dim=1)
    objective = ClippedObjective(clip=0.2, value=0.5, entropy=0.01)
    each = [objective(outputs[i : i + 1], targets[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(objective(outputs, targets), torch.stack(each).mean())
    assert objective.denominator(targets) == 6


# Advantages


def direct(
    rewards: Tensor, values: Tensor, final: Tensor, cut: Tensor, gamma: float, lambda_: float, step: int, n: int
) -> float:
    """The definition: every later error of the same episode, weighted."""
    total, weight = 0.0, 1.0
    for later in range(step, len(rewards)):
        following = 0.0 if final[later, n] else values[later + 1, n].item()
        total += weight * (rewards[later, n].item() + gamma * following - values[later, n].item())
        if cut[later, n]:
            break
        weight *= gamma * lambda_
    return total


def test_advantages_are_the_weighted_sums_of_later_errors_in_the_same_episode() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    values = torch.randn(41, 3, generator=generator, dtype=torch.float64)
    final = torch.rand(40, 3, generator=generator) < 0.1
    cut = final | (torch.rand(40, 3, generator=generator) < 0.1)
    assert final.any() and (cut & ~final).any()
    found = advantages(rewards, values, final, cut, 0.9, 0.8)
    for step in range(40):
        for n in range(3):
            wanted = direct(rewards, values, final, cut, 0.9, 0.8, step, n)
            assert found[step, n].item() == pytest.approx(wanted, abs=1e-12)


# A tiny environment: it counts to an end, and shows how it was treated


class Corridor:
    """Environments that count their steps; episodes end after `lengths`, by truncation where that is asked.

    As gymnasium's vector environments with autoreset NEXT_STEP. An observation is (environment, episode, step).
    """

    def __init__(self, lengths: Sequence[int], truncates: Sequence[bool], lives: Sequence[int] = ()) -> None:
        self.lengths, self.truncates = np.array(lengths), np.array(truncates)
        self.num_envs, self.lost = len(lengths), set(lives)

    def reset(self, seed: int) -> tuple[Any, dict[str, Any]]:
        self.seed = seed
        self.step_, self.episode = np.zeros(self.num_envs, dtype=int), np.zeros(self.num_envs, dtype=int)
        self.waiting, self.lives = np.zeros(self.num_envs, dtype=bool), np.full(self.num_envs, 3)
        return self.observe(), {"lives": self.lives.copy()}

    def observe(self) -> Any:
        return np.stack([np.arange(self.num_envs), self.episode, self.step_], axis=1).astype(np.float32)

    def step(self, actions: Any) -> tuple[Any, ...]:
        restarted = self.waiting
        self.step_ = np.where(restarted, 0, self.step_ + 1)
        self.episode = self.episode + restarted
        ended = ~restarted & (self.step_ == self.lengths)
        self.lives = np.where(restarted, 3, self.lives - np.isin(self.step_, list(self.lost)))
        self.waiting = ended
        rewards = np.where(restarted, 99, 5.0)  # 99: of no account
        info = {"lives": self.lives.copy()}
        return self.observe(), rewards, ended & ~self.truncates, ended & self.truncates, info


class Oracle(nn.Module):
    """A policy of two equal actions; the value of a state is its step number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, observations: Tensor) -> Tensor:
        logits = torch.zeros(len(observations), 2) + self.weight
        return torch.cat([logits, observations[:, 2:]], dim=1)


def corridor(lengths: Sequence[int], truncates: Sequence[bool], lives: Sequence[int] = (), **settings: float) -> Game:
    own = {"environments": len(lengths), "scale": 1.0, "gamma": 0.5, "lambda": 1.0, **settings}
    recipe = dataclasses.replace(games.CARTPOLE.recipe, settings={**games.CARTPOLE_SETTINGS, **own})
    return dataclasses.replace(
        games.CARTPOLE, recipe=recipe, environments=lambda source, count, frames: Corridor(lengths, truncates, lives)
    )


def stretch_of(game: Game) -> tuple[Tensor, Tensor]:
    players = game._players(Episodes.of(None, 0, 1), 0)
    stretch = game._stretch(Oracle(), players)
    return stretch.inputs, stretch.targets


def test_the_step_that_begins_the_next_episode_is_not_learned_from() -> None:
    inputs, targets = stretch_of(corridor([3, 5], [False, True], steps=12))
    steps = {n: [int(row[2]) for row in inputs if row[0] == n] for n in (0, 1)}
    assert steps == {0: [0, 1, 2, 0, 1, 2, 0, 1, 2], 1: [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]}
    assert len(targets) == 19


def test_a_truncated_episode_is_worth_what_would_have_followed_and_a_finished_one_nothing() -> None:
    # rewards are clipped to 1; the value of the last observation, behind 3 steps, is 3
    for truncates, beyond in ((False, 0.0), (True, 3.0)):
        inputs, targets = stretch_of(corridor([3], [truncates], steps=4))
        wanted = [1 + 0.5 * (1 + 0.5 * (1 + 0.5 * beyond)), 1 + 0.5 * (1 + 0.5 * beyond), 1 + 0.5 * beyond]
        assert targets[:, 3].tolist() == pytest.approx(wanted)


def test_what_follows_the_end_of_a_stretch_is_worth_its_value() -> None:
    _, targets = stretch_of(corridor([100], [False], steps=2))
    assert targets[:, 3].tolist() == pytest.approx([1 + 0.5 * (1 + 0.5 * 2), 1 + 0.5 * 2])


def test_a_life_lost_ends_what_is_foreseen_but_not_the_episode() -> None:
    game = corridor([5], [False], lives=[2], steps=5)
    inputs, targets = stretch_of(game)
    assert inputs[:, 2].tolist() == [0, 1, 2, 3, 4]
    assert targets[:, 3].tolist() == pytest.approx([1.5, 1, 1.75, 1.5, 1])
    assert game.evaluate(Oracle(), Episodes.of(None, 0, 1)).metric == 25


def test_advantages_are_normalised_over_a_stretch() -> None:
    _, targets = stretch_of(corridor([3, 5], [False, True], steps=12))
    assert targets[:, 2].mean().item() == pytest.approx(0, abs=1e-6)
    assert targets[:, 2].std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_a_score_is_the_sum_of_the_unclipped_rewards_of_one_whole_episode_each() -> None:
    scores = corridor([3, 7], [False, False]).evaluate(Oracle(), Episodes.of(None, 5, 2))
    assert scores.metric == (15 + 35) / 2
    assert scores.others["score_min"] == 15 and scores.others["score_max"] == 35
    assert scores.others["episodes"] == 2 and scores.others["steps"] == 10
    assert scores.others["score_stderr"] == pytest.approx(np.std([15, 35], ddof=1) / 2**0.5)


def test_the_loss_of_an_evaluation_is_the_error_of_the_values() -> None:
    scores = corridor([2], [False]).evaluate(Oracle(), Episodes.of(None, 0, 1))
    assert scores.loss == pytest.approx(((1.5 - 0) ** 2 + (1 - 1) ** 2) / 2)


def test_actions_are_drawn_from_the_policy() -> None:
    class Biased(Oracle):
        def forward(self, observations: Tensor) -> Tensor:
            logits = torch.tensor([math.log(0.8), math.log(0.2)]).expand(len(observations), 2) + self.weight
            return torch.cat([logits, observations[:, 2:]], dim=1)

    players = Players(Corridor([1000] * 1000, [False] * 1000), 0, torch.device("cpu"))
    move = players.move(Biased(), torch.Generator().manual_seed(0))
    assert abs(move.actions.float().mean().item() - 0.2) < 4 * (0.2 * 0.8 / 1000) ** 0.5
    torch.testing.assert_close(move.logs, torch.tensor([0.8, 0.2])[move.actions].log())


# CartPole


SMALL = {"environments": 4, "steps": 32, "passes": 2, "iterations": 2}


def small(optimizer: str = "adam", **choices: Any) -> Config:
    settings = {**SMALL, **choices.pop("settings", {})}
    options = {"width": 8, "epochs": 4, "batch_size": 64, "device": "cpu", **choices}
    return Config.of("cartpole", optimizer=optimizer, settings=settings, **options)


@pytest.fixture
def cartpole() -> None:
    pytest.importorskip("gymnasium")


@pytest.mark.usefixtures("cartpole")
@pytest.mark.parametrize("optimizer", ["adam", "sam"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, optimizer: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("samlite.training.session.SAVE_EVERY", 0.0)
    config = small(optimizer)
    list(train(config, tmp_path / "whole"))
    stopped = train(config, tmp_path / "resumed")
    for _ in range(2):
        next(stopped)
    stopped.close()
    torch.manual_seed(12345)  # what else happens in the process is of no account
    list(train(config, tmp_path / "resumed"))
    assert contents(tmp_path / "whole") == contents(tmp_path / "resumed")


@pytest.mark.usefixtures("cartpole")
def test_a_run_of_cartpole_can_be_measured_at_its_own_settings(tmp_path: Path) -> None:
    config = small("sam", epochs=1, settings={"gamma": 0.5, "entropy": 0.25})
    list(train(config, tmp_path))
    run = load_run(tmp_path)
    assert not read_json(tmp_path / "result.json")["interpolates"]
    assert isinstance(run.task.loss, ClippedObjective) and run.task.loss.entropy == 0.25
    (inputs, targets), count = run.task.subsample(run.model, run.data.train, 100, 0)
    assert count == len(inputs) == len(targets) == 100
    again, _ = run.task.subsample(run.model, run.data.train, 100, 0)
    assert torch.equal(targets, again[1])
    # the policy that is measured took the actions: ratios are 1
    logs = run.model(inputs)[:, :-1].log_softmax(1).gather(1, targets[:, :1].long())[:, 0]
    torch.testing.assert_close(logs, targets[:, 1])
    found = Hessian(run.model, run.task.loss, (inputs, targets)).eigenvalues(1)
    assert found.converged


@pytest.mark.usefixtures("cartpole")
def test_sam_climbs_the_clipped_objective(tmp_path: Path) -> None:
    game = task_of(small())
    data = game.load(None, 0)
    torch.manual_seed(0)
    model = game.build(8, None, data.sizes)
    inputs, targets = next(game.batches(model, data.train, small().batch_size, torch.Generator().manual_seed(0), False))
    before = [p.detach().clone() for p in model.parameters()]
    loss = game.loss(model(inputs), targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    optimizer = SAM(model.parameters(), torch.optim.Adam, rho=0.05, lr=1e-3)
    game.loss(model(inputs), targets).backward()
    optimizer.first_step()
    for weight, was, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(weight.detach(), was + 0.05 * gradient / norm)
    assert game.loss(model(inputs), targets) > loss


@pytest.mark.usefixtures("cartpole")
def test_the_next_batches_come_from_the_policy_of_that_time() -> None:
    game, config = task_of(small()), small()
    data = game.load(None, 0)
    torch.manual_seed(0)
    model = game.build(8, None, data.sizes)
    batches = list(_changing(game, model, data.train, config))
    assert len(batches) == 8  # 2 stretches of 2 passes of 128 samples in batches of 64
    first, second = batches[0], batches[4]
    assert first == pytest.approx(1, abs=1e-5)  # ratios before any step
    assert second == pytest.approx(1, abs=1e-5)  # and after the policy changed and played again
    assert batches[1] != pytest.approx(1, abs=1e-5)


def _changing(game: Any, model: nn.Module, data: Episodes, config: Config) -> Any:
    """The largest ratio of probabilities in each batch, the weights changing after it."""
    for inputs, targets in game.batches(model, data, config.batch_size, torch.Generator().manual_seed(0), False):
        with torch.no_grad():
            logs = model(inputs)[:, :-1].log_softmax(1).gather(1, targets[:, :1].long())[:, 0]
            yield (logs - targets[:, 1]).exp().max().item()
            for parameter in model.parameters():
                parameter.mul_(1.5)


@pytest.mark.usefixtures("cartpole")
def test_cartpole_learns(tmp_path: Path) -> None:
    records = list(train(Config.of("cartpole", epochs=5, device="cpu", width=32), tmp_path))
    assert max(record.validation_metric for record in records) > 60  # a random policy keeps the pole up for 22


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 1.5}, "setting gamma must be between 0 and 1, got 1.5"),
        ({"steps": 0.5}, "setting steps must be an integer >= 1, got 0.5"),
        ({"environments": 0}, "setting environments must be an integer >= 1, got 0"),
        ({"steps": 1e300}, "setting steps must be <= 1,000,000, got 1e.300"),
        ({"environments": 1e6}, "setting environments must be <= 1,000, got 1e.06"),
        ({"clip": -0.1}, "setting clip must be >= 0, got -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        list(train(small(settings=settings), tmp_path))
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"optimizer": "agnostic"}, "optimizer agnostic needs training data to hold out, which task cartpole has none"),
        ({"track": 1}, "track must be 0 for task cartpole, whose samples are other ones after every epoch"),
    ],
)
def test_what_needs_the_same_samples_all_along_is_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.of("cartpole", **choices)


def test_the_packages_of_games_are_asked_for_where_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    for name in ("cartpole", "atari"):
        with pytest.raises(ImportError, match=rf"task {name} needs gymnasium.*: pip install 'gymnasium>="):
            get(name).load(get(name).source, 0)


# Atari


def test_atari_networks_have_the_parameters_of_the_paper() -> None:
    millions = {width: f"{get('atari').parameters(width) / 1e6:.1f}" for width in get("atari").widths}
    assert millions == {16: "0.4", 32: "1.7", 64: "6.7"}


def test_images_of_bytes_are_scaled_in_the_network() -> None:
    model = games.atari_cnn(2, actions=3)
    images = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images), model(images.float() / 255))
    assert model.double()(images).dtype == torch.float64


@pytest.fixture
def atari() -> None:
    pytest.importorskip("ale_py")


@pytest.mark.usefixtures("atari")
@pytest.mark.parametrize(
    ("name", "hint"), [("brekout", "; did you mean breakout"), ("Pong", "; did you mean pong"), ("zzz", ", such as")]
)
def test_an_unknown_game_is_refused_with_the_nearest_ones(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"data must name one of the .* Atari games, got '{name}'{hint}"):
        get("atari").load(name, 0)


@pytest.mark.usefixtures("atari")
def test_the_network_fits_the_actions_of_the_game() -> None:
    sizes = {name: get("atari").load(name, 0).sizes["actions"] for name in ("breakout", "pong")}
    assert sizes == {"breakout": 4, "pong": 6}


@pytest.mark.usefixtures("atari")
def test_an_atari_game_goes_on_after_a_life_is_lost() -> None:
    players = Players(games._atari("breakout", 1, 27_000), 0, torch.device("cpu"))
    model = games.atari_cnn(2, actions=4)
    generator = torch.Generator().manual_seed(0)
    lost = over = 0
    with torch.no_grad():
        while not over and lost < 10:
            move = players.move(model, generator)
            assert move.observations.dtype == torch.uint8 and move.observations.shape == (1, 4, 84, 84)
            lost += int(move.final)
            over += int(move.over)
    assert (lost, over) == (5, 1)  # five lives, then the end


@pytest.mark.usefixtures("atari")
def test_atari_is_learned_and_scored_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    settings = {"environments": 2, "steps": 16, "passes": 1, "iterations": 1, "frames": 400}
    config = Config.of("atari", width=2, settings=settings, data="pong", device="cpu")
    game = task_of(config)
    data = game.load("pong", 0)
    model = game.build(2, None, data.sizes)
    ((inputs, targets),) = game.batches(model, data.train, config.batch_size, torch.Generator().manual_seed(0), False)
    assert inputs.shape == (32, 4, 84, 84) and model(inputs).shape == (32, 7)
    game.loss(model(inputs), targets).backward()
    assert Hessian(model.double(), game.loss, (inputs[:8], targets[:8])).moments(2).fallback is None
    scores = game.evaluate(model.float(), Episodes.of("pong", 0, 2))
    assert scores.others["steps"] == 2 * 100  # 4 frames each
    assert -4 <= scores.metric <= 4  # points in 7 seconds
    assert capfd.readouterr() == ("", "")
