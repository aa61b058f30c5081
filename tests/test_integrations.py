"""SAM in trainers, against the same steps by samlite.SAM itself; each where its library is there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samlite
from samlite import SAM, UsageError


def batches(count: int = 6, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * size, 5, generator=generator)
    return list(zip(x.split(size), (torch.arange(count * size) % 3).split(size), strict=True))


class Net(nn.Module):
    """With batch norm, which a second pass must not count twice; draws as dropout does, which it must repeat."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        self.drawn: list[float] = []

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.layers(x)
        if self.training:
            self.drawn.append(float(torch.rand(())))
        return logits if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def by_hand(groups: list[list[tuple[Tensor, Tensor]]], base: Any, rho: float = 0.05, **options: Any) -> Net:
    """The network after a step on each group of micro-batches."""
    model = Net()
    optimizer = SAM(model.parameters(), base, rho, model=model, **options)

    def closure_on(x: Tensor, y: Tensor) -> Any:
        def closure() -> Tensor:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        return closure

    for group in groups:
        optimizer.step([closure_on(x, y) for x, y in group])
    return model


def draws_are_repeated(model: Net, accumulate: int) -> None:
    """Both passes over the micro-batches of a step draw the same, and each step something else."""
    steps = [model.drawn[i : i + 2 * accumulate] for i in range(0, len(model.drawn), 2 * accumulate)]
    assert all(step[:accumulate] == step[accumulate:] for step in steps)
    assert len({value for step in steps for value in step}) == len(model.drawn) // 2


def equal(a: nn.Module, b: nn.Module, tol: float = 1e-6) -> None:
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.allclose(p, q, rtol=tol, atol=tol), name


# --- Hugging Face


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.rows = [{"x": x, "labels": y} for part in batches() for x, y in zip(*part, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


def huggingface(out: Path, model: nn.Module, resume: Any = None, rho: float = 0.05, **arguments: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class InOrder(samlite.integrations.SAMTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    given = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "max_grad_norm": 0, "report_to": [],
             "save_strategy": "no", "lr_scheduler_type": "constant", "learning_rate": 0.01, "use_cpu": True,
             "disable_tqdm": True, "dataloader_pin_memory": False}  # fmt: skip
    trainer = InOrder(model, transformers.TrainingArguments(str(out), **{**given, **arguments}),
                      train_dataset=Rows(), rho=rho)  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_of_hugging_face_takes_the_steps_of_sam(tmp_path: Path, accumulate: int) -> None:
    model = Net()
    trainer = huggingface(tmp_path, model, optim="sgd", gradient_accumulation_steps=accumulate)
    parts = batches()
    groups = [parts[i : i + accumulate] for i in range(0, 6, accumulate)]
    equal(model, by_hand(groups, torch.optim.SGD, lr=0.01))
    draws_are_repeated(model, accumulate)
    assert trainer.optimizer.optimizer.skipped == 0 and trainer.state.global_step == len(groups)


def test_the_arguments_of_the_trainer_reach_the_base_optimizer(tmp_path: Path) -> None:
    trainer = huggingface(tmp_path, Net(), weight_decay=0.5, adam_beta1=0.8, adam_epsilon=1e-3)
    group = trainer.optimizer.optimizer.param_groups[0]
    assert isinstance(trainer.optimizer.optimizer.base_optimizer, torch.optim.AdamW)
    assert (group["weight_decay"], group["betas"][0], group["eps"]) == (0.5, 0.8, 1e-3)
    trainer = huggingface(tmp_path, Net(), optim="adafactor")
    assert type(trainer.optimizer.optimizer.base_optimizer).__name__ == "Adafactor"


def test_the_trainer_clips_resumes_and_trains_in_bfloat16(tmp_path: Path) -> None:
    whole, model = Net(), Net()
    huggingface(tmp_path / "whole", whole, max_grad_norm=0.1, num_train_epochs=2, save_strategy="epoch")
    resumed = Net()
    huggingface(tmp_path / "whole", resumed, tmp_path / "whole" / "checkpoint-6", max_grad_norm=0.1, num_train_epochs=2)
    equal(resumed, whole, 0)
    huggingface(tmp_path / "bf16", model, bf16=True)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
    plain = Net()
    huggingface(tmp_path / "plain", plain, rho=0.0, optim="sgd")
    equal(plain, by_hand([[part] for part in batches()], torch.optim.SGD, 0.0, lr=0.01))


# --- accelerate


def test_under_accelerate_step_returns_the_loss_and_both_halves_are_there() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator, model = accelerate.Accelerator(cpu=True), Net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.05, model=model, lr=0.1)
    model, optimizer = samlite.integrations.prepare(accelerator, model, optimizer)
    for x, y in batches():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            return loss

        loss = optimizer.step(closure)
        assert loss.dim() == 0 and not optimizer.step_was_skipped
    equal(model, by_hand([[part] for part in batches()], torch.optim.SGD, lr=0.1))
    closure()
    optimizer.first_step(zero_grad=True)
    closure()
    optimizer.second_step()
    with accelerator.accumulate(model):
        accelerator.gradient_state._set_sync_gradients(False)
        with pytest.raises(UsageError, match="SAM needs whole batches at every step"):
            optimizer.step(closure)
        accelerator.gradient_state._set_sync_gradients(True)


# --- Lightning


@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_lightning_a_callback_takes_the_steps_of_sam(tmp_path: Path, accumulate: int) -> None:
    lightning = pytest.importorskip("lightning")
    logged = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            logged.append(self.log is not type(self).log)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    parts = batches()
    data = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*parts, strict=True)))
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        callbacks=[samlite.integrations.SAMCallback(rho=0.05)],
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, 8))
    groups = [parts[i : i + accumulate] for i in range(0, 6, accumulate)]
    equal(module.net, by_hand(groups, torch.optim.SGD, lr=0.1))
    draws_are_repeated(module.net, accumulate)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01) and len(logged) == 12


# --- schedule-free


def test_schedule_free_optimizers_are_switched_between_training_and_evaluation() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    model = Net()
    optimizer = SAM(model.parameters(), schedulefree.SGDScheduleFree, 0.05, model=model, lr=0.1)
    optimizer.train()
    for x, y in batches():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    before = [p.clone() for p in model.parameters()]
    optimizer.eval()
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.train()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), before, strict=True))


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name, package in (("SAMTrainer", "transformers"), ("SAMCallback", "lightning"), ("prepare", "accelerate")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.pytorch", None)
        monkeypatch.delitem(sys.modules, f"samlite.integrations.{package}", raising=False)
        with pytest.raises(ImportError, match=rf"samlite.integrations.{name} needs .*; pip install {package}"):
            getattr(samlite.integrations, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        samlite.integrations.nothing  # noqa: B018
