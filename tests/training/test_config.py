from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from samlite import tasks
from samlite.cli.options import read_recipe
from samlite.tasks import Task
from samlite.training.config import Config
from samlite.training.optimizer import optimizer_of


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Task:
    """A task with everything that a task may have."""
    digits = tasks.get("digits")
    recipe = replace(digits.recipe, settings={"clip": 0.2, "steps": 8}, dropout=0.1, weight_decay=0.01)
    everything = replace(digits, name="everything", recipe=recipe, augment=lambda inputs, draw: inputs)
    monkeypatch.setitem(tasks.TASKS, "everything", everything)
    return everything


def test_a_file_overrides_the_recipe_and_a_choice_the_file(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("lr = 0.3\nepochs = 7\ndropout = 0.2\nlabel_noise = 0.1\n[settings]\nclip = 0.5\n")
    config = Config.of("everything", read_recipe(path), epochs=3, settings={"steps": 4})
    assert (config.lr, config.epochs, config.dropout, config.label_noise) == (0.3, 3, 0.2, 0.1)
    assert dict(config.settings) == {"clip": 0.5, "steps": 4} and config.augment
    assert config.batch_size == task.recipe.batch_size


def test_what_a_variant_has_of_its_own_is_resolved_named_and_handed_to_it() -> None:
    def optimizer(config: Config) -> Any:
        return optimizer_of(torch.nn.Linear(2, 2), config, None)

    friendly = Config.of("digits", optimizer="friendly", sigma=1, lmbda=0.5, width=8)
    assert (friendly.sigma, friendly.lmbda, friendly.rho_val) == (1.0, 0.5, None)
    assert friendly.name == "friendly-lmbda0.5-rho0.2-w8-s0"
    assert (optimizer(friendly).sigma, optimizer(friendly).lmbda) == (1.0, 0.5)
    agnostic = Config.of("digits", {"sigma": 2.0, "rho_val": 0.0}, optimizer="agnostic")
    assert (agnostic.sigma, agnostic.rho_val, optimizer(agnostic).rho_val) == (None, 0.0, 0.0)
    assert optimizer(Config.of("digits", optimizer="sampa")).lmbda == 0.2
    assert Config.from_json(friendly.to_json(), "here") == friendly
    old = {name: value for name, value in friendly.to_json().items() if name not in ("sigma", "lmbda", "rho_val")}
    assert Config.from_json(old, "here").lmbda == 0.9  # which it was


def test_asam_scales_all_parameters_or_only_the_weights() -> None:
    def groups(adaptive: str) -> list[tuple[list[int], bool]]:
        config = Config.of("digits", optimizer="sam", adaptive=adaptive)
        optimizer = optimizer_of(torch.nn.Linear(2, 3), config, None)
        return [([p.ndim for p in group["params"]], group["adaptive"]) for group in optimizer.param_groups]

    assert groups("none") == [([2, 1], False)] and groups("all") == [([2, 1], True)]
    assert groups("weights") == [([2], True), ([1], False)]


def test_a_config_survives_json(task: Task) -> None:
    config = Config.of("everything", settings={"clip": 0.1}, sparsity=0.5, patience=3, linearize=True, augment=False)
    assert config.pruner == "random"
    assert Config.from_json(config.to_json(), "here") == config


@pytest.mark.parametrize(
    ("name", "choices", "message"),
    [
        (
            "everything",
            {"settings": {"clop": 1}},
            "which has no 'clop', only clip, steps",
        ),
        ("everything", {"settings": {"clip": "x"}}, "settings must be numbers, got clip = 'x'"),
        ("digits", {"settings": {"clip": 1}}, "settings must be of task digits, which has no 'clip'"),
        ("digits", {"dropout": 0.1}, "dropout must not be given: the network of task digits has none"),
        ("everything", {"dropout": 1.0}, "dropout must be >= 0 and < 1, got 1.0"),
        ("digits", {"augment": True}, "augment must not be given: task digits has no augmentation"),
        ("synthetic", {"label_noise": 0.1}, "label_noise must be 0 for task synthetic, which has no classes, got 0.1"),
        ("digits", {"label_noise": 1.0}, "label_noise must be >= 0 and < 1, got 1.0"),
        ("digits", {"pruner": "snip"}, "pruner must go with a sparsity above 0, got snip"),
        ("digits", {"sparsity": 0.5, "pruner": "best"}, "pruner must be one of random, snip, magnitude, got 'best'"),
        ("digits", {"patience": -1}, "patience must be >= 0, got -1"),
        ("digits", {"train_samples": -1}, "train_samples must be >= 0, got -1"),
        ("cartpole", {"train_samples": 9}, "train_samples must be 0 for task cartpole, which plays for its samples"),
        (
            "digits",
            {"optimizer": "sam", "sigma": 0.5},
            "sigma must not be given for sam, got 0.5; use optimizer friendly",
        ),
        (
            "digits",
            {"adaptive": "all"},
            "adaptive must be none for sgd, got all; use optimizer sam or friendly or",
        ),
        ("digits", {"optimizer": "agnostic", "adaptive": "all"}, "adaptive must be none for agnostic"),
        ("digits", {"optimizer": "sam", "adaptive": True}, "adaptive must be one of none, all, weights, got True"),
        ("digits", {"normalize": False}, "normalize must not be given for sgd; use optimizer sam"),
        ("digits", {"lmbda": 0.5}, "lmbda must not be given for sgd, got 0.5; use optimizer friendly or sampa"),
        ("digits", {"split": "gradients"}, "split must be batches for sgd, got gradients; use optimizer sampa"),
        ("digits", {"optimizer": "sampa", "lmbda": 1.1}, "lmbda must be <= 1, got 1.1"),
        ("digits", {"optimizer": "friendly", "lmbda": 1.0}, "lmbda must be < 1, got 1.0"),
        ("digits", {"linearize": 1}, "linearize must be true or false, got 1"),
    ],
)
def test_what_does_not_apply_is_refused_with_a_reason(
    task: Task, name: str, choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Config.of(name, **choices)


def test_a_run_is_named_by_what_sets_it_apart(task: Task) -> None:
    def name(task: str = "everything", **choices: Any) -> str:
        return Config.of(task, width=8, device="cpu", **choices).name

    assert name() == "sgd-w8-s0"
    assert name(optimizer="sam", rho=0.1, label_noise=0.25, seed=2) == "sam-rho0.1-w8-noise0.25-s2"
    assert name(optimizer="sam", adaptive="all", rho=1) == "sam-adaptive-rho1.0-w8-s0"
    assert name(optimizer="sampa", normalize=False, m=None) == "sampa-unnormalized-rho0.2-w8-s0"
    assert Config.of("everything", {"adaptive": "all", "normalize": False}).label == "sgd"  # where they do not apply
    assert name(sparsity=0.9, weight_decay=0.0) == "sgd-w8-sparse0.9-decay0.0-s0"
    assert name(weight_decay=0.01) == "sgd-w8-s0"  # the recipe's
    assert name(train_samples=500) == "sgd-w8-samples500-s0"


def test_sam_wraps_the_baseline_of_the_task(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.TASKS, "everything", replace(task, base="adamw"))
    config = Config.of("everything", optimizer="sam", width=8)
    assert (config.base, config.lr, config.momentum) == ("adamw", 1e-3, 0.0)
    assert config.name == "sam-rho0.2-w8-s0" and Config.of("everything").optimizer == "adamw"
    assert Config.of("everything", optimizer="sam", base="sgd", width=8).name == "sam-sgd-rho0.2-w8-s0"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lr", 10**400, "lr must be > 0 and finite"),
        ("lr", -(10**400), "lr must be > 0 and finite"),
        ("weight_decay", 10**400, "weight_decay must be >= 0 and finite"),
        ("width", 10**400, "width must be >= 1 and below 2\\^63"),
        ("threads", 2000, "threads must be >= 1 and <= 1024, got 2000"),
        ("milestones", 3, "milestones must be a list of numbers, got 3"),
        ("milestones", "0.5", "milestones must be a list of numbers, got '0.5'"),
        ("milestones", [10**400], "milestones must be > 0 and < 1"),
        ("settings", [1], r"settings must be numbers by name, got \[1\]"),
        ("settings", {"clip": 10**400}, "settings must be of task digits"),
        ("optimizer", ["sgd"], r"optimizer must be one of .* got \['sgd'\]"),
        ("device", 0, "device must be a name such as cpu or cuda:0, got 0"),
        ("task", {"a": 1}, "task must be one of .* got {'a': 1}"),
        ("augment", "no", "augment must be true or false, got 'no'"),
    ],
)
def test_a_config_in_a_file_is_refused_by_file_and_field(field: str, value: Any, message: str) -> None:
    document = {**Config.of("digits", device="cpu").to_json(), field: value}
    with pytest.raises(ValueError, match=f"config.json does not describe a run: {message}"):
        Config.from_json(document, "config.json")


@pytest.mark.parametrize("text", ["9" * 401, "0x" + "f" * 5000, "inf", "nan", "1e999"])
def test_a_recipe_of_numbers_that_no_float_holds_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.toml").write_text(f"lr = {text}")
    with pytest.raises(ValueError, match="lr must be > 0 and finite, got"):
        Config.of("digits", read_recipe(tmp_path / "recipe.toml"))


def test_a_recipe_that_is_nested_too_deeply_is_refused_and_a_mark_of_byte_order_is_not(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f"lr = {'[' * 9000}{']' * 9000}")
    with pytest.raises(ValueError, match="recipe.toml: it is nested too deeply"):
        read_recipe(path)
    path.write_bytes(b"\xef\xbb\xbflr = 0.5")
    assert read_recipe(path) == {"lr": 0.5}


def test_a_switch_in_a_recipe_that_is_no_switch_is_refused() -> None:
    with pytest.raises(ValueError, match="augment must be true or false, got 'no'"):
        Config.of("cifar10", {"augment": "no"}, device="cpu")
