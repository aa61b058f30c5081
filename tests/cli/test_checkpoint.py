"""Checkpoints of libraries, built from their names, where the libraries are there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from samlite import Hessian, UsageError
from samlite.cli.checkpoint import build_model, checkpoint_subject


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delitem(__import__("sys").modules, "its_data", raising=False)
    (tmp_path / "its_data.py").write_text(
        "import torch\n"
        "g = torch.Generator().manual_seed(0)\n"
        "tokens = torch.randint(0, 20, (4, 6), generator=g)\n"
        "tokens[1, 4:] = -100\n"
        "texts = [{'input_ids': t.clamp_min(0), 'labels': t} for t in tokens.split(3)]\n"
        "images = torch.randn(3, 3, 32, 32, generator=g), torch.tensor([0, 2, 1])\n"
    )
    return tmp_path


def test_a_folder_of_hugging_face_is_measured_by_its_own_loss(place: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(place / "gpt", max_shard_size="2KB")
    assert len(list((place / "gpt").glob("*.safetensors"))) > 1
    subject = checkpoint_subject(place / "gpt", "hf:", "its_data:texts", "model")
    found = subject.hessian("float64").eigenvalues(1, tol=1e-8)

    def loss(model: nn.Module, batch: Any) -> Any:  # over the tokens that are predicted
        logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
        return nn.functional.cross_entropy(logits.transpose(1, 2), labels), (labels >= 0).sum()

    right = Hessian(model.double(), loss, subject.data).eigenvalues(1, tol=1e-8)
    assert torch.allclose(found.values, right.values, rtol=1e-6)
    with pytest.raises(UsageError, match="--model hf: needs a config.json, got none in"):
        build_model("hf:", place)
    (place / "gpt" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UsageError, match="must hold the weights of --model hf:"):
        checkpoint_subject(place / "gpt", "hf:", "its_data:texts", "model")


def test_a_model_of_timm_is_built_by_its_name_and_arguments(place: Path) -> None:
    timm: Any = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=3)
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, "net.pth.tar")
    subject = checkpoint_subject(Path("net.pth.tar"), "timm:resnet10t,num_classes=3", "its_data:images")
    assert all(torch.equal(p, q) for p, q in zip(subject.model.parameters(), model.parameters(), strict=True))
    for name, message in (
        ("timm:nothing", "--model timm:nothing failed with RuntimeError"),
        ("timm:resnet10t,classes", "must be followed by key=value, got 'classes'"),
    ):
        with pytest.raises(UsageError, match=message):
            build_model(name, place)


def test_a_library_that_is_not_there_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UsageError, match="--model timm: needs timm, got .*; pip install timm"):
        build_model("timm:resnet18", place)
