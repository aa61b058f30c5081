"""Weights as people keep them: nested, prefixed, sharded, beside objects of any kind; nothing is executed."""

import argparse
import collections
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from samlite import UsageError
from samlite.training.weights import load_weight_sets, load_weights_into


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def loaded(path: Path, name: str | None = None) -> tuple[nn.Module, list[str]]:
    module = network(1)
    return module, load_weights_into(module, path, name)


def equal(module: nn.Module, state: dict[str, Tensor]) -> bool:
    own = module.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


class Touches:
    """Executed, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "name",
    ["state_dict", "model", "model_state_dict", "net", "network", "weights", "params", "ema", "params_ema",
     "state_dict_ema", "model_ema"],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "net.", "module._orig_mod."])
def test_weights_are_found_under_any_name_and_prefix(tmp_path: Path, name: str, prefix: str) -> None:
    state = network().state_dict()
    path = tmp_path / "Net.PTH.tar"
    torch.save({"epoch": 3, name: {prefix + key: value for key, value in state.items()}}, path)
    module, said = loaded(path)
    assert equal(module, state)
    assert said == ([f"names: without their prefix {prefix}"] if prefix else [])


def test_what_lies_beside_the_weights_is_ignored_and_nothing_is_executed(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    beside = {
        "args": argparse.Namespace(lr=0.1, path=tmp_path),
        "metric": np.float64(3),
        "history": collections.defaultdict(list, {"loss": [np.float32(1.0)]}),
        "rng": torch.get_rng_state(),
        "code": Touches(tmp_path / "executed"),
        "optimizer": optimizer.state_dict(),
    }
    for legacy in (False, True):
        torch.save({"arch": "net", "state_dict": model.state_dict(), **beside}, tmp_path / "net.ckpt",
                   _use_new_zipfile_serialization=not legacy)  # fmt: skip
        module, said = loaded(tmp_path / "net.ckpt")
        assert equal(module, model.state_dict()) and not said
    assert not (tmp_path / "executed").exists()


def test_a_whole_module_gives_its_weights(tmp_path: Path) -> None:
    model = network()
    torch.save(model, tmp_path / "net.pt")
    assert equal(loaded(tmp_path / "net.pt")[0], model.state_dict())
    torch.save({"model": model, "ema": None}, tmp_path / "nested.pt")
    assert equal(loaded(tmp_path / "nested.pt")[0], model.state_dict())


def test_of_several_weights_that_fit_one_must_be_named(tmp_path: Path) -> None:
    first, second = network(0).state_dict(), network(5).state_dict()
    torch.save({"model": first, "ema": {"module": second}, "other": {"w": torch.ones(2)}}, tmp_path / "net.pt")
    assert list(load_weight_sets(tmp_path / "net.pt")) == ["model", "ema.module", "other"]
    with pytest.raises(
        UsageError, match=r"several weights that fit, model, ema.module; choose one with --weights NAME"
    ):
        loaded(tmp_path / "net.pt")
    assert equal(loaded(tmp_path / "net.pt", "ema.module")[0], second)
    with pytest.raises(UsageError, match=r"--weights must name weights in .*, got 'emma'; it holds model, ema.module"):
        loaded(tmp_path / "net.pt", "emma")
    torch.save({"model": first, "teacher": {"w": torch.ones(2)}}, tmp_path / "net.pt")
    module, said = loaded(tmp_path / "net.pt")
    assert equal(module, first) and said == ["weights: model, of model, teacher"]


@pytest.mark.parametrize("change", ["missing", "unexpected", "mixed prefixes", "shape", "complex"])
def test_no_weight_is_loaded_unless_all_are(tmp_path: Path, change: str) -> None:
    state = dict(network().state_dict())
    if change == "missing":
        del state["2.bias"]
    elif change == "unexpected":
        state["3.bias"] = torch.ones(2)
    elif change == "mixed prefixes":
        state = {("module." if i else "") + key: value for i, (key, value) in enumerate(state.items())}
    elif change == "shape":
        state["0.weight"] = torch.ones(3, 4)
    else:
        state["0.weight"] = state["0.weight"].to(torch.complex64)
    save_file(state, tmp_path / "net.SafeTensors")
    with pytest.raises(UsageError, match=r"net.SafeTensors must (fit the model of --model|hold 0.weight as)"):
        loaded(tmp_path / "net.SafeTensors")


def test_modules_that_were_compiled_inside_keep_their_names(tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save({key.replace(".", "._orig_mod.", 1): value for key, value in state.items()}, tmp_path / "net.pt")
    module, said = loaded(tmp_path / "net.pt")
    assert equal(module, state) and said == ["names: without their prefix _orig_mod."]


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_are_read_by_their_index(tmp_path: Path, ending: str) -> None:
    state = network().state_dict()
    stem = "model" if ending == "safetensors" else "pytorch_model"
    places = {key: f"{stem}-{i % 2 + 1:05}-of-00002.{ending}" for i, key in enumerate(state)}
    for file in set(places.values()):
        part = {key: value for key, value in state.items() if places[key] == file}
        save_file(part, tmp_path / file) if ending == "safetensors" else torch.save(part, tmp_path / file)
    index = tmp_path / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert equal(loaded(tmp_path)[0], state)
    index.write_text(json.dumps({"weight_map": {**places, "3.weight": next(iter(places.values()))}}))
    with pytest.raises(UsageError, match="must hold what its index lists, got no 3.weight"):
        loaded(tmp_path)
    index.write_text(json.dumps({"weight_map": {"0.weight": "../elsewhere.bin"}}))
    with pytest.raises(UsageError, match="must name files beside it, got '../elsewhere.bin'"):
        loaded(tmp_path)
    index.write_text("{}")
    with pytest.raises(UsageError, match="must hold a weight_map"):
        loaded(tmp_path)


def test_what_holds_no_weights_gets_one_line(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    for content, found in (
        ([1, 2], r"\[1, 2\]"),
        ({"epoch": 1}, "'epoch': 1"),
        ({}, "none"),
        ({0: torch.ones(2)}, "0: tensor"),
        ({"a": torch.ones(2), "b": 3}, "'b': 3"),
        (Touches(tmp_path / "executed"), "an object of a class"),
    ):
        torch.save(content, path)
        with pytest.raises(UsageError, match=f"must hold named tensors, .* got {found}"):
            load_weight_sets(path)
    torch.jit.script(network()).save(path)
    with pytest.raises(UsageError, match="got a TorchScript archive; save model.state_dict"):
        load_weight_sets(path)
    path.write_bytes(pickle.dumps(Touches(tmp_path / "executed")))
    with pytest.raises(UsageError, match="cannot be read"):
        load_weight_sets(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="must hold weights, as model.safetensors or pytorch_model.bin, got neither"):
        load_weight_sets(tmp_path / "empty")
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_cut_or_changed_anywhere_is_refused_in_one_line_or_read_whole(tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save(state, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for place in range(0, len(whole), 97):
        for damaged in (whole[:place], whole[:place] + b"\xff\x00PK" + whole[place + 4 :]):
            (tmp_path / "net.pt").write_bytes(damaged)
            try:
                (sets,) = load_weight_sets(tmp_path / "net.pt").values()
            except UsageError as error:
                assert len(str(error).splitlines()) == 1
            else:
                assert sets.keys() == state.keys()
