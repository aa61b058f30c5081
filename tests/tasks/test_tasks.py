import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from samlite.data.tensors import hold_out
from samlite.tasks import TASKS, Splits, Task, TensorData, get
from samlite.tasks.synthetic import NOISE, teacher
from samlite.training.config import Config
from samlite.training.loop import train

OFFLINE = [task for task in TASKS.values() if task.source is None]


def load(task: Task, seed: int = 0) -> Splits:
    pytest.importorskip({"digits": "sklearn", "cartpole": "gymnasium"}.get(task.name, "torch"))
    return task.load(task.source, seed)


@pytest.mark.parametrize("task", OFFLINE, ids=lambda task: task.name)
def test_a_task_trains_its_network_on_its_data_with_its_loss(task: Task) -> None:
    config, model = Config.of(task.name), task.model(task.width)
    inputs, targets = next(
        task.batches(model, load(task).train, config.batch_size, torch.Generator().manual_seed(0), config.augment)
    )
    loss = task.loss(model(inputs), targets)
    assert loss.ndim == 0 and loss.isfinite()


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_the_parameters_of_a_task_are_those_of_its_network(task: Task) -> None:
    width = task.widths[0]
    assert task.parameters(width) == sum(p.numel() for p in task.model(width).parameters())
    assert set(task.recipe.lr) == {"sgd", "adam", "adamw"}


@pytest.mark.parametrize(("width", "millions"), [(150, "0.13"), (300, "0.27"), (1200, "1.43"), (3000, "5.37")])
def test_mnist_networks_have_the_parameters_of_the_paper(width: int, millions: str) -> None:
    assert f"{get('mnist').parameters(width) / 1e6:.2f}" == millions


def test_synthetic_networks_span_ten_to_a_hundred_thousand_parameters() -> None:
    task = get("synthetic")
    counts = [task.parameters(width) for width in task.widths]
    assert counts[0] == pytest.approx(1e4, rel=0.01) and counts[-1] == pytest.approx(1e5, rel=0.01)


def test_the_splits_of_digits_are_disjoint_cover_it_and_never_change() -> None:
    first, second = load(get("digits"), 0), load(get("digits"), 1)
    parts = [(split.inputs, split.targets) for split in (first.train, first.validation, first.test)]
    assert [len(inputs) for inputs, _ in parts] == [900, 100, 797]
    assert len(torch.cat([inputs for inputs, _ in parts]).unique(dim=0)) == 1797  # no two digits are alike
    assert torch.equal(first.validation.inputs, second.validation.inputs)
    assert first.train.inputs.min() == 0 and first.train.inputs.max() == 1


def test_synthetic_targets_are_the_teacher_plus_noise_drawn_by_the_seed() -> None:
    first, same, other = (load(get("synthetic"), seed) for seed in (0, 0, 1))
    assert torch.equal(first.train.targets, same.train.targets)
    assert not torch.equal(first.train.inputs, other.train.inputs)
    assert [len(first.train), len(first.validation), len(first.test)] == [1000, 1000, 10000]
    for splits in (first, other):
        noise = (splits.test.targets - teacher(splits.test.inputs)).std().item()
        assert abs(noise - NOISE) < 4 * NOISE / (2 * 10000) ** 0.5  # four standard errors


def test_synthetic_has_as_many_training_samples_as_are_asked_for() -> None:
    task, data = get("synthetic"), load(get("synthetic"), 0).train
    some, more = (task.draw(data, count, 0) for count in (100, 3_000))
    assert len(some) == 100 and len(more) == 3_000
    assert torch.equal(more.inputs[:1_000], data.inputs) and torch.equal(more.targets[:1_000], data.targets)
    added = (more.targets - teacher(more.inputs))[1_000:]
    assert added.std().item() == pytest.approx(NOISE, rel=0.1)  # 5 standard errors of 2,000 samples
    assert torch.equal(task.draw(data, 3_000, 0).inputs, more.inputs)
    assert not torch.equal(task.draw(data, 3_000, 1).inputs[1_000:], more.inputs[1_000:])


def test_an_unknown_task_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"task must be one of .*, got 'mnits'; did you mean mnist\?"):
        get("mnits")


def numbered(n: int) -> TensorData:
    return TensorData(torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n))


def test_batches_hold_every_sample_once_and_the_last_may_be_smaller() -> None:
    batches = list(numbered(10).batches(4, torch.Generator().manual_seed(0)))
    assert [len(inputs) for inputs, _ in batches] == [4, 4, 2]
    order = torch.cat([targets for _, targets in batches])
    assert sorted(order.tolist()) == list(range(10)) and order.tolist() != list(range(10))
    assert all(torch.equal(inputs[:, 0].long(), targets) for inputs, targets in batches)


def test_the_order_of_batches_is_that_of_the_generator_and_without_one_of_the_data() -> None:
    def order(generator: torch.Generator | None) -> list[int]:
        return torch.cat([targets for _, targets in numbered(10).batches(3, generator)]).tolist()

    assert order(None) == list(range(10))
    generator = torch.Generator().manual_seed(0)
    first, second = order(generator), order(generator)
    assert first != second
    assert first == order(torch.Generator().manual_seed(0))


def test_the_split_for_validation_is_a_tenth_at_random_and_always_the_same() -> None:
    (train, held), (_, again) = hold_out(numbered(200)), hold_out(numbered(200))
    assert sorted(torch.cat([train.targets, held.targets]).tolist()) == list(range(200))
    assert len(held) == 20 and held.targets.tolist() != list(range(180, 200))
    assert torch.equal(held.targets, again.targets)


def test_an_empty_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="the validation split must not be empty"):
        Splits(numbered(3), numbered(0), numbered(3))


# MNIST, from files


def png(size: tuple[int, int] = (28, 28), value: int = 255) -> dict[str, Any]:
    image = pytest.importorskip("PIL.Image").new("L", size, value)
    stream = io.BytesIO()
    image.save(stream, format="png")
    return {"bytes": stream.getvalue(), "path": None}


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., Path]:
    """Write the splits of a data set as parquet files, each a list of images and one of labels."""
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    def write(columns: tuple[str, str] = ("image", "label"), **splits: tuple[Sequence[Any], Sequence[Any]]) -> Path:
        for name, values in splits.items():
            table = pyarrow.table(dict(zip(columns, values, strict=True)))
            pyarrow.parquet.write_table(table, tmp_path / f"{name}-00000-of-00001.parquet")
        return tmp_path

    return write


GOOD = ([png()] * 10, [3] * 10)


def test_mnist_reads_parquet_as_normalised_vectors(parquet: Callable[..., Path]) -> None:
    data = get("mnist").load(str(parquet(train=GOOD, test=([png(value=0)], [9]))), 0)
    assert [len(data.train), len(data.validation), len(data.test)] == [9, 1, 1]
    assert data.train.inputs.shape == (9, 784) and data.train.targets.tolist() == [3] * 9
    torch.testing.assert_close(data.train.inputs, torch.full((9, 784), (1 - 0.1307) / 0.3081))
    torch.testing.assert_close(data.test.inputs, torch.full((1, 784), -0.1307 / 0.3081))


@pytest.mark.parametrize(
    ("splits", "columns", "message"),
    [
        ({"train": GOOD}, ("image", "label"), "has no split 'test', only 'train'"),
        ({"train": GOOD, "test": GOOD}, ("img", "label"), "split 'train': no column 'image', only 'img', 'label'"),
        ({"train": GOOD, "test": GOOD}, ("image", "digit"), "split 'train': no column 'label'"),
        ({"train": GOOD, "test": ([png()], [10])}, ("image", "label"), "split 'test', column 'label', row 0: .* 10"),
        ({"train": GOOD, "test": ([png()], [None])}, ("image", "label"), "column 'label', row 0: .* got None"),
        ({"train": GOOD, "test": ([png()] * 2, [1, -1])}, ("image", "label"), "column 'label', row 1: .* got -1"),
        (
            {"train": ([*GOOD[0][1:], png((28, 20))], GOOD[1]), "test": GOOD},
            ("image", "label"),
            "split 'train', column 'image', row 9: an image must be 28 by 28 pixels, got 20 by 28",
        ),
        (
            {"train": GOOD, "test": ([{"bytes": b"no image", "path": None}], [1])},
            ("image", "label"),
            "split 'test', column 'image', row 0: not a readable image",
        ),
    ],
)
def test_malformed_mnist_is_refused_with_its_place(
    parquet: Callable[..., Path], splits: dict[str, Any], columns: tuple[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        get("mnist").load(str(parquet(columns, **splits)), 0)


def test_a_truncated_parquet_file_is_named(parquet: Callable[..., Path]) -> None:
    folder = parquet(train=GOOD, test=GOOD)
    whole = next(folder.glob("train*")).read_bytes()
    next(folder.glob("train*")).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot load mnist .* train-00000-of-00001.parquet is truncated"):
        get("mnist").load(str(folder), 0)


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="cannot load mnist from"):
        get("mnist").load(str(tmp_path), 0)


def test_real_mnist_is_whole_and_normalised(real_data: Path) -> None:
    pytest.importorskip("datasets")
    data = get("mnist").load(str(real_data / "mnist"), 0)
    assert sorted(data.train.targets.unique().tolist()) == list(range(10))
    # The constants are those of all 60,000 training images; a subset of thousands is within 2 %.
    assert abs(data.train.inputs.mean().item()) < 0.02 and abs(data.train.inputs.std().item() - 1) < 0.02


SOURCES = {  # of the tasks that need data, in the folder of real data sets
    **{name: name for name in ("mnist", "cifar10", "sst2", "pos")},
    **{"vit": "cifar10", "molpcba": "molecules/tox21.csv.gz"},
}


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param(
            "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")]
        ),
    ],
)
@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_on_every_device(name: str, device: str, tmp_path: Path, real_data: Path) -> None:
    settings = {"imagenet": {"size": 28, "workers": 0}, "atari": {"iterations": 1, "steps": 16}}.get(name)
    source = str(real_data / SOURCES[name]) if name in SOURCES else None
    if name == "imagenet":
        source = str(tmp_path)
        for split in ("train", "validation"):
            path = real_data / "mnist" / "test-00000-of-00001.parquet"
            (tmp_path / f"{split}-00000-of-00001.parquet").symlink_to(path.resolve())
    choices = {"width": TASKS[name].widths[0], "epochs": 1, "device": device, "data": source, "settings": settings}
    records = list(train(Config.of(name, optimizer="sam", **choices), tmp_path / "run"))
    assert len(records) == 1 and math.isfinite(records[0].train_loss)
