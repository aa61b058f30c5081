"""Files of torchvision's folders: what is in them, and what is wrong with them."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from samlite import tasks
from samlite.data import raw
from samlite.errors import UsageError


def idx(path: Path, array: np.ndarray, zipped: bool) -> None:
    content = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def mnist(folder: Path, zipped: bool = False, size: int = 28) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    for part, n in (("train", 30), ("t10k", 6)):
        images = random.integers(0, 256, (n, size, size), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        idx(folder / f"{part}-images-idx3-ubyte", images, zipped)
        idx(folder / f"{part}-labels-idx1-ubyte", labels, zipped)
    return images, labels


@pytest.mark.parametrize("place", [".", "raw", "FashionMNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_found_where_torchvision_leaves_them(tmp_path: Path, place: str, zipped: bool) -> None:
    images, labels = mnist(tmp_path / place, zipped)
    data = tasks.get("mnist").splits(str(tmp_path), 0)
    assert len(data.train) == 27 and len(data.validation) == 3 and not data.sizes
    pixels = (torch.from_numpy(images).flatten(1).float() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(data.test.inputs, pixels)
    assert data.test.targets.tolist() == labels.tolist()


def cifar(folder: Path, hundred: bool) -> np.ndarray:
    random, name = np.random.default_rng(0), "cifar-100-python" if hundred else "cifar-10-batches-py"
    (folder / name).mkdir(parents=True)
    files = ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for file in files:
        data = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        key, classes = (b"fine_labels", 100) if hundred else (b"labels", 10)
        labels = [int(x) for x in (7 * np.arange(20)) % classes]
        (folder / name / file).write_bytes(pickle.dumps({b"data": data, key: labels}, protocol=2))
    return data


@pytest.mark.parametrize("hundred", [False, True])
def test_batches_of_cifar_are_read_and_decide_how_many_classes_there_are(tmp_path: Path, hundred: bool) -> None:
    last = cifar(tmp_path, hundred)
    task = tasks.get("cifar10")
    data = task.splits(str(tmp_path), 0)
    assert data.test.inputs.shape == (20, 3, 32, 32)
    assert torch.equal(data.test.inputs.flatten(1), torch.from_numpy(last))
    assert task.classes_in(data) == (100 if hundred else 10)
    assert task.build(4, None, data.sizes)(data.test.inputs[:2]).shape == (2, 100 if hundred else 10)
    inside = tmp_path / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    assert torch.equal(task.splits(str(inside), 0).test.inputs, data.test.inputs)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_a_batch_that_holds_code_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar(tmp_path, hundred=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil()}, protocol=2))
    with pytest.raises(UsageError, match="data_batch_3 must be a batch of CIFAR's images.* only arrays are read"):
        raw.read(str(tmp_path), 32, 3)
    assert not (tmp_path / "evil").exists()


def test_damage_is_told_with_its_file(tmp_path: Path) -> None:
    mnist(tmp_path / "short")
    path = tmp_path / "short" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UsageError, match="train-images-idx3-ubyte must be an IDX file of bytes in 3 dimensions"):
        raw.read(str(tmp_path / "short"), 28, 1)
    mnist(tmp_path / "zipped", zipped=True)
    path = tmp_path / "zipped" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UsageError, match="labels-idx1-ubyte.gz must be a gzip file, but it is damaged"):
        raw.read(str(tmp_path / "zipped"), 28, 1)
    mnist(tmp_path / "one")
    (tmp_path / "one" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UsageError, match="must hold t10k-labels-idx1-ubyte, gzipped or not, got none"):
        raw.read(str(tmp_path / "one"), 28, 1)
    mnist(tmp_path / "small", size=8)
    with pytest.raises(UsageError, match="images must be 1 by 28 by 28, got 1 by 8 by 8"):
        raw.read(str(tmp_path / "small"), 28, 1)
    mnist(tmp_path / "two" / "MNIST" / "raw")
    mnist(tmp_path / "two" / "KMNIST" / "raw")
    with pytest.raises(UsageError, match="must hold one data set, got KMNIST/raw, MNIST/raw; name one of them"):
        raw.read(str(tmp_path / "two"), 28, 1)
    cifar(tmp_path / "torn", hundred=True)
    path = tmp_path / "torn" / "cifar-100-python" / "test"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match="test must be a batch of CIFAR's images, but it cannot be read"):
        raw.read(str(tmp_path / "torn"), 32, 3)


def test_other_folders_are_left_to_other_readers(tmp_path: Path) -> None:
    assert raw.read(str(tmp_path), 28, 1) is None
    assert raw.read("ylecun/mnist", 28, 1) is None and raw.read(None, 28, 1) is None
