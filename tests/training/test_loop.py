import json
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command, contents, process
from safetensors.torch import save_file
from torch import Tensor

from samlite import Hessian, files, tasks
from samlite.tasks import TensorData
from samlite.training import loop
from samlite.training import session as training
from samlite.training.checkpoints import load_weights
from samlite.training.config import Config
from samlite.training.loop import learning_rate, train
from samlite.training.measurements import run_subject
from samlite.training.runs import load_run
from samlite.training.session import TrackedRecord, TrainingError

pytest.importorskip("sklearn")


def digits(**choices: Any) -> Config:
    return Config.of(**{"task": "digits", "width": 8, "epochs": 4, "device": "cpu", **choices})


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


# The recipe of a run


def test_a_config_takes_the_recipe_then_the_overrides_then_the_choices() -> None:
    config = Config.of("digits", {"lr": 0.2, "epochs": 7}, lr=0.3, optimizer="sam")
    assert (config.lr, config.epochs, config.rho, config.base) == (0.3, 7, 0.2, "sgd")
    adam = Config.of("digits", {"rho": 0.5}, optimizer="adam")
    assert (adam.lr, adam.momentum, adam.rho) == (1e-3, 0, 0)  # fields of others do not apply


def test_a_config_survives_json() -> None:
    config = digits(optimizer="sam", base="adamw", schedule="cosine")
    assert Config.from_json(json.loads(json.dumps(config.to_json())), "here") == config


def test_the_name_of_a_run_tells_the_cells_of_a_sweep_apart() -> None:
    runs = [digits(optimizer=name, seed=seed) for name in ("sgd", "adam", "sam") for seed in (0, 1)]
    runs += [digits(optimizer="sam", base="adam"), digits(optimizer="sam", rho=0.3), digits(width=9)]
    assert len({run.name for run in runs}) == len(runs)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"width": 0}, "width must be >= 1, got 0"),
        ({"width": 2.5}, "width must be an integer, got 2.5"),
        ({"width": True}, "width must be an integer, got True"),
        ({"width": 10**30}, "width must be >= 1 and below 2.63"),
        (
            {"optimizer": "lion"},
            "optimizer must be one of sgd, adam, adamw, sam, friendly, agnostic, sampa, got 'lion'",
        ),
        ({"optimizer": "sam", "base": "sam"}, "base must be one of sgd, adam, adamw, got 'sam'"),
        ({"rho": 0.1}, "rho must be 0 without SAM, got 0.1; use optimizer sam"),
        ({"optimizer": "sam", "rho": -1.0}, "rho must be >= 0, got -1.0"),
        ({"base": "adam"}, "base must go with SAM, got adam with sgd; use optimizer sam"),
        ({"optimizer": "adam", "momentum": 0.5}, "momentum must be 0 for adam"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be > 0 and finite, got nan"),
        ({"lr": float("inf")}, "lr must be > 0 and finite, got inf"),
        ({"lr": "0.1"}, "lr must be a number, got '0.1'"),
        ({"momentum": 1.0}, "momentum must be >= 0 and < 1, got 1.0"),
        ({"weight_decay": -1e-4}, "weight_decay must be >= 0"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"epochs": 0}, "epochs must be >= 1"),
        ({"schedule": "linear"}, "schedule must be one of step, cosine, constant, got 'linear'"),
        ({"milestones": (0.5, 1.5)}, "milestones must be > 0 and < 1, got 1.5"),
        ({"milestones": (0.5,), "schedule": "cosine"}, "milestones must go with the step schedule"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"threads": 0}, "threads must be >= 1"),
        ({"device": "gpu"}, "device must be a name such as cpu or cuda:0, got 'gpu'"),
        ({"track": -1}, "track must be >= 0, got -1"),
        ({"track": 1.5}, "track must be an integer, got 1.5"),
        ({"device": 7}, "device must be a name such as cpu or cuda:0, got 7"),
        ({"task": ["digits"]}, "task must be one of"),
        ({"data": 5}, "data must be a hub id or a path, got 5"),
        ({"data": "somewhere"}, "data of task digits must not be given"),
    ],
)
def test_a_bad_choice_is_refused_with_its_rule(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits(**choices)


def test_a_field_that_no_recipe_has_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"got 'momentun'; did you mean momentum\?"):
        Config.of("digits", {"momentun": 0.5})


def test_a_width_beyond_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="width must leave a network that fits in memory"):
        list(train(digits(width=10**15), tmp_path))


def test_a_device_that_cannot_compute_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device must be usable here, got 'meta'"):
        list(train(digits(device="meta"), tmp_path))


def test_schedules_follow_their_formulas() -> None:
    step = digits(lr=1.0, epochs=8, milestones=(0.25, 0.5, 0.75))
    assert [learning_rate(step, epoch) for epoch in range(1, 9)] == [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    cosine = digits(lr=1.0, epochs=4, schedule="cosine")
    expected = [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]
    assert [learning_rate(cosine, epoch) for epoch in range(1, 5)] == pytest.approx(expected, abs=1e-15)
    constant = digits(lr=0.3, schedule="constant")
    assert {learning_rate(constant, epoch) for epoch in range(1, 5)} == {0.3}


# Training


def test_digits_are_learned_to_96_percent_by_the_recipe(tmp_path: Path) -> None:
    list(train(Config.of("digits", device="cpu"), tmp_path))
    end = result(tmp_path)
    assert end["final"]["test_metric"] >= 0.96
    assert end["parameters"] == 64 * 32 + 32 + 32 * 11 + 11 + 11 * 10 + 10


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "sam"])
def test_every_optimizer_lowers_the_loss(tmp_path: Path, optimizer: str) -> None:
    losses = [record.train_loss for record in train(digits(optimizer=optimizer, width=32), tmp_path)]
    assert losses[-1] < losses[0]


def test_runs_are_paired_sam_without_radius_repeats_its_base_optimizer(tmp_path: Path) -> None:
    list(train(digits(), tmp_path / "sgd"))
    list(train(digits(optimizer="sam", rho=0.0), tmp_path / "sam"))
    sgd, sam = contents(tmp_path / "sgd"), contents(tmp_path / "sam")
    for name in ("metrics.jsonl", "model.safetensors", "result.json"):
        assert sgd[name] == sam[name]


def test_sam_takes_two_gradients_a_step_and_ends_elsewhere(tmp_path: Path) -> None:
    list(train(digits(), tmp_path / "sgd"))
    list(train(digits(optimizer="sam"), tmp_path / "sam"))
    steps = 4 * 29  # epochs times batches of 32 out of 900
    assert result(tmp_path / "sgd")["gradient_evaluations"] == steps
    assert result(tmp_path / "sam")["gradient_evaluations"] == 2 * steps
    assert result(tmp_path / "sgd")["final"] != result(tmp_path / "sam")["final"]


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    for seed in (0, 1):
        list(train(digits(seed=seed), tmp_path / str(seed)))
    assert metrics(tmp_path / "0")[0]["train_loss"] != metrics(tmp_path / "1")[0]["train_loss"]


def test_training_leaves_the_random_state_and_the_threads_of_the_caller(tmp_path: Path) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    list(train(digits(epochs=1), tmp_path))
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def test_the_files_of_a_run_agree_with_each_other(tmp_path: Path) -> None:
    config = digits(width=32, epochs=6)
    records = list(train(config, tmp_path))
    assert Config.from_json(json.loads((tmp_path / "config.json").read_text()), "config.json") == config
    assert metrics(tmp_path) == [record.line() for record in records]
    end = result(tmp_path)
    best = max(records, key=lambda record: (record.validation_metric, -record.validation_loss))
    assert end["best"]["epoch"] == best.epoch and end["best"]["validation_metric"] == best.validation_metric
    assert end["final"]["train_loss"] == records[-1].train_loss and not end["interpolates"]

    run = load_run(tmp_path)
    assert not run.model.training and run.config == config and run.task is tasks.get("digits")
    test = run.task.evaluate(run.model, run.data.test)
    assert (test.loss, test.metric) == (end["final"]["test_loss"], end["final"]["test_metric"])
    fitted = run.task.evaluate(run.model, run.data.train)
    assert (fitted.loss, fitted.metric) == (records[-1].train_loss, records[-1].train_metric)


def test_a_run_interpolates_once_it_fits_every_label_with_next_to_no_loss(tmp_path: Path) -> None:
    list(train(digits(width=128, epochs=60, batch_size=16), tmp_path))
    final = result(tmp_path)["final"]
    assert final["train_metric"] == 1 and final["train_loss"] < 1e-3  # else this test shows nothing
    assert result(tmp_path)["interpolates"]


def test_the_mean_loss_weighs_samples_not_chunks() -> None:
    task = replace(tasks.get("digits"), chunk=7)
    model, data = task.model(8).double(), task.load(None, 0).validation
    data = replace(data, inputs=data.inputs.double())
    outputs = model(data.inputs)
    expected = task.loss(outputs, data.targets).item(), (outputs.argmax(1) == data.targets).double().mean().item()
    scores = task.evaluate(model, data)
    assert (scores.loss, scores.metric) == pytest.approx(expected, rel=1e-14)  # rounding of 15 sums


def test_a_regression_is_scored_by_its_loss_and_lower_is_better(tmp_path: Path) -> None:
    config = Config.of("synthetic", width=32, epochs=6, lr=0.05, device="cpu")
    records = list(train(config, tmp_path))
    assert all(record.validation_metric == record.validation_loss for record in records)
    best = min(records, key=lambda record: record.validation_loss)
    assert result(tmp_path)["best"]["epoch"] == best.epoch


def test_a_batch_larger_than_the_data_is_full_batch_training(tmp_path: Path) -> None:
    list(train(digits(batch_size=10**6), tmp_path))
    assert result(tmp_path)["gradient_evaluations"] == 4


# Stopping and going on


@pytest.mark.parametrize(
    "choices",
    [{"optimizer": "sgd"}, {"optimizer": "adam"}, {"optimizer": "adamw", "schedule": "cosine"}]
    + [{"optimizer": "sam", "base": base} for base in ("sgd", "adam")]
    + [{"optimizer": "sgd", "track": 2}]
    + [{"optimizer": "sam", "base": "adam", "track": 1, "track_measures": "all", "track_every": 20}],
    ids=lambda choices: "-".join(map(str, choices.values())),
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choices: dict[str, Any]
) -> None:
    if "track" in choices:
        pytest.importorskip("samlite._C")
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    config = digits(width=16, epochs=5, **choices)
    list(train(config, tmp_path / "whole"))
    for stop in (1, 2):
        stopped = train(config, tmp_path / "parts")
        for _ in range(stop):
            next(stopped)
        stopped.close()
    assert len(metrics(tmp_path / "parts")) == 3
    list(train(config, tmp_path / "parts"))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_killed_run_is_completed_bit_for_bit(tmp_path: Path) -> None:
    config = digits(width=16, optimizer="sam", epochs=60)
    options = ("--width", 16, "--optimizer", "sam", "--epochs", 60, "--device", "cpu", "--out", tmp_path / "killed")
    with subprocess.Popen(command("train", *options)) as victim:
        while not (tmp_path / "killed" / "metrics.jsonl").exists():
            assert victim.poll() is None
            time.sleep(0.01)
        victim.kill()
    list(train(config, tmp_path / "killed"))
    list(train(config, tmp_path / "whole"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_is_completed_bit_for_bit(tmp_path: Path) -> None:
    options = ("train", "--width", 32, "--optimizer", "sam", "--epochs", 2000, "--measure", "eigenvalues", "--out")
    for _ in range(20):
        with subprocess.Popen(command(*options, tmp_path / "killed")) as victim:
            time.sleep(random.uniform(0.5, 8))
            victim.kill()
    assert process(*options, tmp_path / "killed").status == 0
    assert process(*options, tmp_path / "whole").status == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    list(train(digits(), tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != ".lock"}
    assert list(train(digits(), tmp_path)) == []
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != ".lock"}


def test_a_run_that_died_after_its_last_epoch_only_writes_its_result(tmp_path: Path) -> None:
    list(train(digits(), tmp_path))
    before = contents(tmp_path)
    for name in ("result.json", "model.safetensors", "metrics.jsonl"):
        (tmp_path / name).unlink()
    assert list(train(digits(), tmp_path)) == []
    assert contents(tmp_path) == before


def test_a_folder_with_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    list(train(digits(), tmp_path))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds another run \(lr 0.05 there, 0.1 now; epochs 4 there, 5 now\)"):
        list(train(digits(lr=0.1, epochs=5), tmp_path))
    assert contents(tmp_path) == before


def test_without_resuming_a_folder_must_be_empty(tmp_path: Path) -> None:
    list(train(digits(), tmp_path / "run", resume=False))
    with pytest.raises(ValueError, match="run must be empty without resuming"):
        list(train(digits(), tmp_path / "run", resume=False))


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="must be empty or hold a run, but it has no config.json"):
        list(train(digits(), tmp_path))
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_second_process_in_the_same_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    first = train(digits(), tmp_path)
    next(first)
    with pytest.raises(BlockingIOError, match="in use by another process"):
        next(train(digits(), tmp_path))
    list(first)
    assert len(metrics(tmp_path)) == 4


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    run = train(digits(optimizer=optimizer), tmp_path)
    next(run)
    before = contents(tmp_path)
    monkeypatch.setattr(loop, "learning_rate", lambda config, epoch: 1e30)
    with pytest.raises(TrainingError, match="the loss is no longer finite in epoch 2 at lr 1e.30; try a smaller lr"):
        next(run)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", ["cut", "foreign", "other network"])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    list(train(digits(), tmp_path))
    (tmp_path / "result.json").unlink()
    path = tmp_path / "checkpoint.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        torch.save({"model": {}}, path)
    else:
        list(train(digits(width=9), tmp_path / "other"))
        path.write_bytes((tmp_path / "other" / "checkpoint.pt").read_bytes())
    with pytest.raises(ValueError, match="checkpoint.pt") as error:
        list(train(digits(), tmp_path))
    assert "\n" not in str(error.value)


# Sharpness along training


def test_tracked_eigenvalues_agree_with_a_cold_verified_measurement_at_the_final_weights(tmp_path: Path) -> None:
    pytest.importorskip("samlite._C")
    records = list(train(digits(track=3), tmp_path))
    assert metrics(tmp_path) == [record.line() for record in records]
    run = load_run(tmp_path)
    pair = run.data.train.inputs, run.data.train.targets
    cold = Hessian(run.model, run.task.loss, pair).eigenvalues(3, tol=1e-5, verify=True, seed=1)
    assert cold.complete
    assert isinstance(records[-1], TrackedRecord) and records[-1].products > 3
    assert records[-1].eigenvalues == pytest.approx(cold.values.tolist(), rel=1e-3)


def test_tracking_changes_neither_the_training_nor_the_files_without_it(tmp_path: Path) -> None:
    pytest.importorskip("samlite._C")
    for track in (0, 1):
        list(train(digits(optimizer="sam", track=track), tmp_path / str(track)))
    without, tracked = contents(tmp_path / "0"), contents(tmp_path / "1")
    assert without["model.safetensors"] == tracked["model.safetensors"]
    assert without["result.json"] == tracked["result.json"]
    assert without["config.json"]["track"] == 0 and "tracker" not in without["checkpoint.pt"]
    added = {"eigenvalues", "products"}
    assert [{k: v for k, v in line.items() if k not in added} for line in tracked["metrics.jsonl"]] == without[
        "metrics.jsonl"
    ]
    assert set(tracked["checkpoint.pt"]["tracker"]) == {"vectors", "outsider", "turning"}


@pytest.mark.parametrize("choices", [{"optimizer": "sam", "rho": 0.1}, {"optimizer": "adam"}])
def test_measures_along_training_change_nothing_of_it(tmp_path: Path, choices: dict[str, Any]) -> None:
    pytest.importorskip("samlite._C")
    list(train(digits(**choices), tmp_path / "plain"))
    tracking = {"track": 1, "track_measures": "all", "track_every": 10}
    records = list(train(digits(**choices, **tracking), tmp_path / "tracked"))
    plain, tracked = contents(tmp_path / "plain"), contents(tmp_path / "tracked")
    assert plain["model.safetensors"] == tracked["model.safetensors"]
    assert plain["result.json"] == tracked["result.json"]
    last = records[-1]
    assert isinstance(last, TrackedRecord) and last.measures and last.between
    own = {"preconditioned"} if choices["optimizer"] == "adam" else {"sam-edge"}
    assert set(last.measures) == {"edge", "batch", "directional", "critical", "alignment"} | own
    assert [part["step"] % 10 for part in last.between] == [0] * len(last.between)
    assert last.measures["edge"] == pytest.approx(38 / last.lr) or "sam-edge" in own


def test_measures_at_the_end_of_training_are_those_of_the_finished_run(tmp_path: Path) -> None:
    pytest.importorskip("samlite._C")
    asked = "edge,directional,preconditioned,critical,alignment"
    records = list(train(digits(optimizer="adam", track=1, track_measures=asked), tmp_path))
    subject = run_subject(tmp_path)
    found = subject.hessian().measures(asked, subject.optimizer, k=1)
    last = records[-1]
    assert isinstance(last, TrackedRecord) and last.measures
    for name, value in last.measures.items():
        if value is not None:
            assert found[name].value == pytest.approx(value, rel=2e-3, abs=1e-4), name


@pytest.mark.parametrize(
    ("choices", "line"),
    [
        ({"track_measures": "batch"}, "track_measures must go with track, got batch; add --track 1"),
        ({"track_every": 5}, "track_every must go with track, got 5; add --track 1"),
        ({"track": 1, "track_measures": "worst"}, "measures must be of sharpness, edge, .*, got 'worst'"),
        ({"track": 1, "track_measures": "preconditioned"}, "got preconditioned with sgd; use optimizer or base adam"),
        ({"track": 1, "track_measures": "sam-edge"}, "got sam-edge without SAM around sgd; use optimizer sam"),
    ],
)
def test_measures_that_cannot_be_tracked_are_refused_before_training(choices: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        digits(**choices)


def test_a_tracked_run_is_another_run_than_one_without(tmp_path: Path) -> None:
    list(train(digits(), tmp_path))
    with pytest.raises(ValueError, match=r"holds another run \(track 0 there, 1 now\)"):
        list(train(digits(track=1), tmp_path))


def test_more_eigenvalues_than_parameters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="track must be <= the number of parameters, 587, got 588"):
        list(train(digits(track=588), tmp_path))
    assert contents(tmp_path) == {}


def test_what_did_not_converge_is_none_and_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("samlite._C")
    whole = Hessian.eigenvalues
    monkeypatch.setattr(Hessian, "eigenvalues", lambda self, k, **how: whole(self, k, **{**how, "max_matvecs": k + 1}))
    records = list(train(digits(epochs=2, track=2), tmp_path))
    assert [vars(record)["eigenvalues"] for record in records] == [[None, None]] * 2
    assert '"eigenvalues": [null, null]' in (tmp_path / "metrics.jsonl").read_text()


# Loading a run


def test_what_is_no_finished_run_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be the folder of a finished run; it has no result.json"):
        load_run(tmp_path)
    list(train(digits(), tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
        ({"task": "digit"}, "config.json does not describe a run: task must be one of"),
        ({"width": "8"}, "width must be an integer"),
        ({"milestones": 5}, "config.json does not describe a run"),
        ({"width": 9}, "model.safetensors does not hold the weights of this run's network"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_run(tmp_path)
    del config["lr"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json must hold the field 'lr'"):
        load_run(tmp_path)


def test_mnist_is_learned_from_parquet(tmp_path: Path, real_data: Path) -> None:
    pytest.importorskip("datasets")
    config = Config.of("mnist", data=str(real_data / "mnist"), width=30, epochs=1, device="cpu")
    list(train(config, tmp_path))
    assert result(tmp_path)["final"]["test_metric"] > 0.85  # one epoch over 7,200 images


def test_noisy_labels_are_kept_with_the_run_and_trained_on(tmp_path: Path) -> None:
    config = digits(label_noise=0.2)
    list(train(config, tmp_path))
    clean = tasks.get("digits").load(None, 0)
    run = load_run(tmp_path)
    changed = int((run.data.train.targets != clean.train.targets).sum())
    assert changed == 180 and result(tmp_path)["label_noise"] == {"rate": 0.2, "seed": 0, "changed": 180}
    assert torch.equal(run.data.validation.targets, clean.validation.targets)
    assert torch.equal(run.data.test.targets, clean.test.targets)
    assert torch.equal(load_weights(tmp_path / "labels.safetensors")["labels"], run.data.train.targets)
    assert run.task.evaluate(run.model, run.data.train).loss == result(tmp_path)["final"]["train_loss"]


def test_a_run_may_use_some_of_the_training_samples(tmp_path: Path) -> None:
    def inputs(name: str, **choices: Any) -> Tensor:
        list(train(digits(train_samples=100, **choices), tmp_path / name))
        return load_run(tmp_path / name).data.train.inputs

    every = tasks.get("digits").load(None, 0)
    ours = inputs("ours", label_noise=0.2)
    assert len(ours) == 100 and result(tmp_path / "ours")["label_noise"]["changed"] == 20
    assert len({tuple(row) for row in ours.tolist()} & {tuple(row) for row in every.train.inputs.tolist()}) == 100
    assert torch.equal(inputs("sam", optimizer="sam"), ours)  # a comparison is on the same samples
    assert not torch.equal(inputs("another seed", seed=1), ours)
    with pytest.raises(ValueError, match="train_samples must be <= 900, the samples of the data, got 9,999"):
        list(train(digits(train_samples=9_999), tmp_path / "too many"))


@pytest.mark.parametrize(
    "choices",
    [
        {"label_noise": 0.3},
        {"sparsity": 0.8, "pruner": "snip", "optimizer": "sam"},
        {"patience": 2, "lr": 0.3},
        {"linearize": True, "sparsity": 0.5},
    ],
)
def test_every_condition_resumes_to_the_same_files(tmp_path: Path, choices: dict[str, Any]) -> None:
    config = digits(epochs=6, **choices)
    list(train(config, tmp_path / "whole"))
    for _ in zip(range(3), train(config, tmp_path / "parts"), strict=False):
        pass
    list(train(config, tmp_path / "parts"))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_sparse_run_counts_the_weights_that_it_trains(tmp_path: Path) -> None:
    list(train(digits(sparsity=0.75, pruner="magnitude"), tmp_path))
    weights = 64 * 8 + 8 * 3 + 3 * 10
    end = result(tmp_path)
    assert end["dense_parameters"] == weights + 21 and end["parameters"] == weights - round(0.75 * weights) + 21
    run = load_run(tmp_path)
    layers = [run.model[i].weight for i in (0, 2, 4)]
    assert sum(int((layer != 0).sum()) for layer in layers) <= weights - round(0.75 * weights)
    assert run.task.evaluate(run.model, run.data.test).loss == end["final"]["test_loss"]


def test_early_stopping_returns_to_the_best_epoch(tmp_path: Path) -> None:
    config = digits(width=64, epochs=40, patience=3, label_noise=0.4, schedule="constant")
    records = list(train(config, tmp_path))
    end = result(tmp_path)
    best = end["best"]["epoch"]
    assert len(records) == best + 3 < 40 and end["epochs"] == best + 3
    assert end["final"]["validation_metric"] == records[best - 1].validation_metric
    run = load_run(tmp_path)
    assert run.task.evaluate(run.model, run.data.validation).metric == records[best - 1].validation_metric
    assert list(train(config, tmp_path)) == []


@pytest.mark.parametrize(
    ("choices", "gradients"),
    [
        ({"optimizer": "friendly"}, 2 * 29 * 6),
        ({"optimizer": "agnostic"}, 4 * 26 * 6),  # a tenth of the samples is held out
        ({"optimizer": "sampa"}, 2 * 29 * 6),
        ({"optimizer": "sam", "every": 3}, 29 * 6 + 29 * 2),
        ({"optimizer": "sam", "m": 8, "clip": 0.5}, 2 * 29 * 6),
        ({"optimizer": "sam", "accumulate": 4, "precision": "bfloat16"}, 2 * 29 * 6),
        ({"optimizer": "adamw", "accumulate": 2}, 29 * 6),
    ],
)
def test_every_variant_resumes_to_the_same_files_and_counts_its_gradients(
    tmp_path: Path, choices: dict[str, Any], gradients: int
) -> None:
    config = digits(epochs=6, **choices)
    list(train(config, tmp_path / "whole"))
    for _ in zip(range(3), train(config, tmp_path / "parts"), strict=False):
        pass
    list(train(config, tmp_path / "parts"))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert result(tmp_path / "whole")["gradient_evaluations"] == gradients


def test_accumulation_is_the_training_of_whole_batches(tmp_path: Path) -> None:
    for parts in (1, 5):
        list(train(digits(optimizer="sam", accumulate=parts), tmp_path / str(parts)))
    one, five = (load_weights(tmp_path / str(parts) / "model.safetensors") for parts in (1, 5))
    for name, weight in one.items():  # float32; the last batch of four samples has four parts
        torch.testing.assert_close(five[name], weight, rtol=1e-3, atol=1e-5)


def test_a_binary_label_is_noised_to_the_other_one() -> None:
    molecules = tasks.get("molpcba")
    splits = tasks.Splits(*[TensorData(torch.zeros(1, 1), torch.zeros(1, 12))] * 3, {"outputs": 12})
    assert molecules.classes_in(splits) == 2
    assert tasks.get("imagenet").classes_in(replace(splits, sizes={"outputs": 7})) == 7


def test_friendly_sam_clips_where_it_does_not_perturb(tmp_path: Path) -> None:
    config = digits(optimizer="friendly", every=2, clip=1.0)
    list(train(config, tmp_path / "whole"))
    next(train(config, tmp_path / "parts"))  # an odd number of steps
    list(train(config, tmp_path / "parts"))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda labels: labels + 10,
        lambda labels: labels - 10,
        lambda labels: labels.float(),
        lambda labels: labels[:-1],
        lambda labels: labels[None],
        lambda labels: labels.to(torch.complex64),
    ],
)
def test_labels_that_are_none_of_the_classes_are_refused(tmp_path: Path, spoil: Callable[[Tensor], Tensor]) -> None:
    list(train(digits(label_noise=0.2, epochs=1), tmp_path))
    path = tmp_path / "labels.safetensors"
    labels = load_weights(path)["labels"]
    save_file({"labels": spoil(labels)}, path)
    with pytest.raises(ValueError, match=r"labels.safetensors does not hold the labels of this run's data; delete it"):
        load_run(tmp_path)
    save_file({"labels": labels}, path)
    assert torch.equal(load_run(tmp_path).data.train.targets, labels)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state["model"].update({3: torch.ones(2)}), "it holds no weights by name"),
        (lambda state: state.update(model=[1]), "it holds no weights by name"),
        (lambda state: state["records"][0].update(steps="x"), "of epoch 1: steps must be an integer >= 0, got 'x'"),
        (lambda state: state["records"][1].pop("lr"), "of epoch 2: it must hold the field lr"),
        (lambda state: state["records"].pop(0), "of epoch 1: epoch must count up from 1, got 2"),
        (lambda state: state.update(records=[]), "there must be one at least"),
        (lambda state: state["best"].update(epoch=None), "epoch must be an integer >= 1, got None"),
        (lambda state: state.pop("best"), "it must be an object, got None"),
        (lambda state: state.pop("order"), "is not a checkpoint of this run; delete it to start afresh"),
        (lambda state: state.update(order=torch.ones(3)), "is not a checkpoint of this run"),
        (lambda state: state["optimizer"].update(param_groups=3), "is not a checkpoint of this run"),
        (lambda state: state["optimizer"]["state"][0].update(momentum_buffer=torch.ones(3)), "is not a checkpoint"),
        (lambda state: state["optimizer"]["state"][0].update(momentum_buffer=torch.ones(8, 64) * 1j), "is not a check"),
        (lambda state: state["optimizer"]["state"][0].update(momentum_buffer=(1, 2)), "is not a checkpoint"),
        (lambda state: state["optimizer"]["state"][0].update(momentum_buffer=3.0), "is not a checkpoint"),
        (lambda state: state["optimizer"]["state"][0].pop("momentum_buffer"), "is not a checkpoint"),
        (lambda state: state["model"].update({"0.bias": torch.ones(8).to(torch.complex64)}), "is not a checkpoint"),
    ],
)
def test_a_checkpoint_is_refused_for_what_is_wrong_in_it(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], object], message: str
) -> None:
    list(train(digits(epochs=2), tmp_path))
    (tmp_path / "result.json").unlink()
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path)
    spoil(state)
    torch.save(state, path)
    before = contents(tmp_path)
    with pytest.raises(ValueError) as error:
        list(train(digits(epochs=2), tmp_path))
    assert str(path) in str(error.value) and message in str(error.value)
    assert contents(tmp_path) == before


def test_the_options_of_an_optimizer_are_those_of_the_config_whatever_a_checkpoint_says(tmp_path: Path) -> None:
    list(train(digits(epochs=2), tmp_path / "whole"))
    run = train(digits(epochs=2), tmp_path / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", 0.0)
        next(run)
        run.close()
    path = tmp_path / "stopped" / "checkpoint.pt"
    state = torch.load(path)
    state["optimizer"]["param_groups"][0].update(momentum="x", weight_decay=7.0)
    torch.save(state, path)
    list(train(digits(epochs=2), tmp_path / "stopped"))
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.parametrize("mask", [torch.ones(3, 3, dtype=torch.bool), torch.ones(8, 64), None])
def test_masks_that_do_not_fit_are_refused_by_file(tmp_path: Path, mask: Tensor | None) -> None:
    list(train(digits(sparsity=0.5, epochs=1), tmp_path))
    path, name = tmp_path / "model.safetensors", "0.parametrizations.weight.0.mask"
    weights = load_weights(path)
    weights.pop(name) if mask is None else weights.update({name: mask})
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"model.safetensors does not hold the weights of this run's network"):
        load_run(tmp_path)
