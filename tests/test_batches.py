"""Batches in containers of every kind."""

import collections
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from samlite import Hessian
from samlite.batches import described, is_pair, leaves, mapped, placed, rows, samples, tensors

Named = collections.namedtuple("Named", "x y")


class Typed(NamedTuple):
    x: Tensor
    y: Tensor


class Derived(Named):
    """A class of somebody's own over a named tuple."""


@dataclass
class Record:
    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    y: Tensor


class OwnList(list):  # type: ignore[type-arg]
    """A class of somebody's own over a list."""


def attributes(batch: Any) -> tuple[Tensor, Tensor]:
    return batch.x, batch.y


def items(batch: Any) -> tuple[Tensor, Tensor]:
    return batch["x"], batch["y"]


def places(batch: Any) -> tuple[Tensor, Tensor]:
    return batch[0], batch[1]


CONTAINERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "named tuple": (Named, attributes),
    "typed named tuple": (Typed, attributes),
    "subclass of a named tuple": (Derived, attributes),
    "dataclass": (Record, attributes),
    "frozen dataclass with slots": (Frozen, attributes),
    "ordered dictionary": (lambda x, y: collections.OrderedDict(x=x, y=y), items),
    "default dictionary": (lambda x, y: collections.defaultdict(list, x=x, y=y), items),
    "user dictionary": (lambda x, y: collections.UserDict(x=x, y=y), items),
    "deque": (lambda x, y: collections.deque([x, y]), places),
    "class of lists": (lambda x, y: OwnList([x, y]), places),
    "within each other": (lambda x, y: {"x": [Record(x, y)]}, lambda b: attributes(b["x"][0])),
    "with what is no tensor": (lambda x, y: (x, y, None, "name", 3, np.float32(2)), places),
}


@pytest.fixture(params=CONTAINERS)
def container(request: pytest.FixtureRequest) -> Any:
    return CONTAINERS[request.param]


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(4, 2).double(), torch.randn(30, 4), torch.randint(0, 2, (30,))


def test_measurements_are_those_of_plain_tuples(container: Any) -> None:
    make, opened = container
    model, x, y = problem()

    def measured(make: Any, opened: Any) -> Hessian:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            inputs, targets = opened(batch)
            assert inputs.dtype == torch.float64  # cast to the type of the weights
            return nn.functional.cross_entropy(model(inputs), targets)

        return Hessian(model, loss, [make(x[:10], y[:10]), make(x[10:], y[10:])])

    found, plain = measured(make, opened), measured(lambda *pair: pair, places)
    v = torch.linspace(-1, 1, 10, dtype=torch.float64)
    assert torch.equal(found @ v, plain @ v) and torch.equal(found.gradient(), plain.gradient())
    moments, same = found.moments(3), plain.moments(3)
    assert moments.fallback is None and moments.nonuniformity == same.nonuniformity


def test_a_container_is_rebuilt_as_it_was(container: Any) -> None:
    make, opened = container
    x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
    batch = make(x, y)
    new = mapped(lambda part: part + 1 if isinstance(part, Tensor) else part, batch)
    assert type(new) is type(batch)
    assert torch.equal(opened(new)[0], x + 1) and opened(batch)[0] is x
    assert samples(batch) == 3 and len(tensors(batch)) == 2
    assert torch.equal(opened(rows(batch, slice(1, 2)))[1], y[1:2])


def test_floating_point_tensors_follow_the_weights_and_others_do_not() -> None:
    batch = {"h": torch.ones(2).half(), "i": torch.ones(2).int(), "c": torch.ones(2, dtype=torch.complex64)}
    there = placed(batch, torch.ones(1, dtype=torch.float64))
    assert [t.dtype for t in there.values()] == [torch.float64, torch.int32, torch.complex128]
    with torch.inference_mode():
        made = torch.ones(2)
    assert not placed(made, made).is_inference()


def test_what_cannot_be_cut_is_not_taken_for_one_sample() -> None:
    namespace = types.SimpleNamespace(x=torch.ones(3))
    for part in (namespace, {"x": torch.ones(3), "other": namespace}):
        with pytest.raises(ValueError, match="one row a sample to be cut, got SimpleNamespace"):
            rows(part, slice(0, 1))


def test_messages_describe_a_batch_in_one_short_line() -> None:
    assert described(collections.UserDict(x=torch.ones(1000, 3))) == "UserDict of a float32 tensor of shape (1000, 3)"
    assert described(None) == "NoneType None" and described(3) == "int 3"
    assert len(described("x" * 1000)) <= 80


def test_a_pair_is_a_tuple_of_two_tensors() -> None:
    x = torch.ones(3)
    assert is_pair((x, x)) and is_pair(Named(x, x))
    assert not is_pair([x, x]) and not is_pair((x, x, x)) and not is_pair((x, "y"))
    assert leaves(((), {}, [])) == []


def test_batches_of_transformers_are_measured_by_their_rows() -> None:
    transformers = pytest.importorskip("transformers")
    model, x, y = problem()
    output = transformers.modeling_outputs.SequenceClassifierOutput

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, inputs: Tensor) -> Any:
            return output(logits=self.inner(inputs))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch["inputs"]).logits, batch["labels"])

    batch = transformers.BatchEncoding({"inputs": x, "labels": y})
    for curvature in ("hessian", "ggn"):
        found = Hessian(Wrapped(), loss, [batch], curvature=curvature)
        plain = Hessian(model, nn.CrossEntropyLoss(), [(x, y)], curvature=curvature)
        assert found.moments(3).nonuniformity == pytest.approx(plain.moments(3).nonuniformity, rel=1e-9)
    assert type(mapped(lambda t: t, batch)) is transformers.BatchEncoding


def test_batches_of_graphs_count_graphs() -> None:
    data = pytest.importorskip("torch_geometric.data")
    model, x, _ = problem()
    graphs = [
        data.Data(x=x[3 * i : 3 * i + 3], edge_index=torch.tensor([[0, 1], [1, 2]]), y=torch.tensor([i % 2]))
        for i in range(7)
    ]
    one, two = data.Batch.from_data_list(graphs[:3]), data.Batch.from_data_list(graphs[3:])

    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert batch.x.dtype == torch.float64
        pooled = torch.zeros(batch.num_graphs, 2, dtype=torch.float64).index_add(0, batch.batch, model(batch.x))
        return nn.functional.cross_entropy(pooled, batch.y)

    v = torch.linspace(-1, 1, 10, dtype=torch.float64)
    h = Hessian(model, loss, [one, two])
    assert torch.allclose(h @ v, Hessian(model, loss, [data.Batch.from_data_list(graphs)]) @ v, rtol=1e-12)
    assert samples(one) == 3 and one.x.dtype == torch.float32
    with pytest.raises(ValueError, match="give one sample a batch and use unit='batch'"):
        h.moments(2)
    hetero = data.HeteroData()
    hetero["a"].x, hetero["b"].x = x, x[:2]
    assert mapped(lambda part: part + 1, hetero)["b"].x.equal(x[:2] + 1) and hetero["b"].x.equal(x[:2])
