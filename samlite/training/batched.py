"""Many small trainings at once: the runs of one width as one batched network.

A step of a small network is mostly overhead, which the members of a batch share. Each has its own first weights, data,
order of batches, labels, radius and momentum, and is a run of its own on disk, which any other command takes. It equals
the run that is trained alone but for rounding: products of batched matrices add in another order.

In memory: the weights, momentum and gradients of all members, a batch of each, and each seed's data once.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from samlite.data.tensors import Splits, TensorData
from samlite.errors import UsageError
from samlite.tasks.task import Scores
from samlite.training.config import Config, task_of
from samlite.training.loop import cores, held, learning_rate, threads
from samlite.training.runs import load_data
from samlite.training.session import EpochRecord, Session, TrainingError

MOST = 64  # members of a batch
CHUNK = 512  # samples that all members evaluate at once: more do not fit into the caches of a CPU
_NEEDED = {
    "base": ("sgd",),
    "optimizer": ("sgd", "sam"),
    "adaptive": ("none",),
    "precision": ("float32",),
    **dict.fromkeys(("every", "accumulate"), (1,)),
    **dict.fromkeys(("m", "clip", "track", "patience", "sparsity"), (0,)),
    **dict.fromkeys(("linearize", "augment"), (False,)),
}


def why_not(cell: Config) -> str:
    """Why a run cannot be a member of a batch; empty where it can."""
    for name, allowed in _NEEDED.items():
        if getattr(cell, name) not in allowed:
            return f"{name} must be {' or '.join(map(str, allowed))}, got {getattr(cell, name)}"
    if cell.dropout:
        return f"dropout must be 0, got {cell.dropout:g}"
    if not task_of(cell).fixed_samples:
        return f"task {cell.task} must have fixed samples"
    return ""


def train_batched(cells: Sequence[Config], folder: Path) -> Iterator[tuple[Config, EpochRecord | str]]:
    """Train cells of one width in their subfolders, and yield (cell, record) an epoch, or (cell, why it failed).

    Runs that were stopped go on from their last epochs; finished ones yield nothing.

    Raises:
        UsageError: a cell cannot be a member of a batch; a folder holds another run.
        BlockingIOError: another process trains in one of the folders.
    """
    for cell in cells:
        if reason := why_not(cell):
            raise UsageError(f"{cell.name} cannot be trained in a batch: {reason}; leave --batched out")
    for start in range(0, len(cells), MOST):
        with ExitStack() as stack:
            members = []
            for cell in cells[start : start + MOST]:
                (folder / cell.name).parent.mkdir(parents=True, exist_ok=True)
                if not stack.enter_context(held(folder / cell.name, cell, True)):
                    members.append(cell)
            stack.enter_context(threads(cores()))  # all of them compute one batch
            yield from _train(members, folder)


def _train(cells: Sequence[Config], folder: Path) -> Iterator[tuple[Config, EpochRecord | str]]:
    data = _Shared(folder)
    active = [Session(cell, folder / cell.name, data=data.of(cell), members=len(cells)) for cell in cells]
    while active:
        done = min(len(session.records) for session in active)
        behind = [session for session in active if len(session.records) == done]
        batch = _Batch(behind)
        while behind and len(behind) == len(batch.sessions):  # until one joins, ends or fails
            results = batch.epoch(done + 1)
            for session, result in zip(batch.sessions, results, strict=True):
                yield session.config, result
                if isinstance(result, str):
                    active.remove(session)
                    behind.remove(session)
                elif result.epoch == session.config.epochs:
                    session.finish()
                    active.remove(session)
                    behind.remove(session)
            done += 1
            if any(len(session.records) == done for session in active if session not in behind):
                break


def _key(cell: Config) -> tuple[int, float]:
    """What decides a run's data and the order of its batches."""
    return cell.seed, cell.label_noise


class _Shared:
    """The data of each seed and noise once, and inputs that are the same for all of them once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.known = folder, dict[Any, Splits]()

    def of(self, cell: Config) -> Splits:
        """The data of a cell. Raises UsageError unless samples are tensors."""
        key = _key(cell)
        if key not in self.known:
            data = load_data(task_of(cell), cell, self.folder / cell.name).to(cell.device)
            self.known[key] = Splits(
                self._shared("train", data), self._shared("validation", data), self._shared("test", data), data.sizes
            )
        return self.known[key]

    def _shared(self, name: str, data: Splits) -> TensorData:
        part = getattr(data, name)
        if not (isinstance(part, TensorData) and isinstance(part.inputs, Tensor)):
            raise UsageError("runs can be trained in a batch where samples are two tensors; leave --batched out")
        twins = (getattr(other, name).inputs for other in self.known.values())
        same = next((inputs for inputs in twins if torch.equal(inputs, part.inputs)), part.inputs)
        return TensorData(same, part.targets)


class _Batch:
    """Runs that have come equally far, as one network."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self.sessions = list(sessions)
        first = self.sessions[0]
        self.task, self.model = first.task, first.model
        _check(self.model, first.config)
        self.names = [name for name, _ in self.model.named_parameters()]
        each = [list(session.model.parameters()) for session in sessions]
        self.weights = [torch.stack([p.detach() for p in same]) for same in zip(*each, strict=True)]
        self.momentum = [self._momentum(same) for same in zip(*each, strict=True)]
        self.rho = self._column([session.config.rho for session in sessions])
        self.perturbs = any(session.config.rho for session in sessions)
        self.normalize = self._column([float(session.config.normalize) for session in sessions]).bool()
        # Members with the same data have the same order of batches: the first of them draws it.
        leaders: dict[Any, Session] = {}
        for session in sessions:
            leaders.setdefault(_key(session.config), session)
        self.leaders, known = list(leaders.values()), list(leaders)
        self.place = torch.tensor([known.index(_key(s.config)) for s in sessions], device=self.rho.device)
        self.forward = {shared: vmap(self._outputs, in_dims=(0, None if shared else 0)) for shared in (True, False)}
        self.loss = vmap(self.task.loss)

    def _gradients(self, weights: list[Tensor], inputs: Tensor, targets: Tensor) -> tuple[list[Tensor], Tensor]:
        """(The gradients of each member's loss by its weights, the losses)."""
        leaves = [w.detach().requires_grad_() for w in weights]
        losses = self.loss(self.forward[False](tuple(leaves), inputs), targets)
        return list(torch.autograd.grad(losses.sum(), leaves)), losses.detach()

    def _outputs(self, weights: tuple[Tensor, ...], inputs: Tensor) -> Tensor:
        outputs: Tensor = functional_call(self.model, dict(zip(self.names, weights, strict=True)), (inputs,))
        return outputs

    def _column(self, values: Sequence[float]) -> Tensor:
        like = self.weights[0]
        return torch.tensor(values, dtype=like.dtype, device=like.device)

    def _momentum(self, same: Sequence[nn.Parameter]) -> Tensor | None:
        """The momentum of a parameter; None before the first step."""
        kept = [s.optimizer.state.get(p, {}).get("momentum_buffer") for s, p in zip(self.sessions, same, strict=True)]
        return None if kept[0] is None else torch.stack(kept)

    def epoch(self, epoch: int) -> list[EpochRecord | str]:
        """Train every member for an epoch: its record, or why it failed."""
        self.model.train()
        lr = learning_rate(self.sessions[0].config, epoch)
        for session in self.sessions:
            for group in session.optimizer.param_groups:
                group["lr"] = lr
        losses = []
        for batches in zip(*(session.batches() for session in self.leaders), strict=True):
            inputs, targets = (torch.stack(parts)[self.place] for parts in zip(*batches, strict=True))
            losses.append(self._step(inputs, targets, lr))
        for session, place in zip(self.sessions, self.place.tolist(), strict=True):
            session.order.set_state(self.leaders[place].order.get_state())
            passes = 2 if session.config.rho else 1
            session.closures.count(passes * len(losses))
        self._write_back()
        return self._records(epoch, torch.stack(losses, dim=1))

    def _step(self, inputs: Tensor, targets: Tensor, lr: float) -> Tensor:
        """One step of every member; returns the losses before it: (members,)."""
        slopes, losses = self._gradients(self.weights, inputs, targets)
        if self.perturbs:
            first = _norms(slopes)
            numbers = torch.finfo(first.dtype)
            divisor = first.clamp_min((numbers.tiny / numbers.eps) ** 0.5).where(self.normalize, 1.0)
            scale = torch.where(self.rho > 0, self.rho / divisor, torch.zeros_like(divisor))
            moved = [w + _each(scale, g) * g for w, g in zip(self.weights, slopes, strict=True)]
            slopes, _ = self._gradients(moved, inputs, targets)
            steps = (first + _norms(slopes)).isfinite() | (self.rho == 0)  # a plain step is taken whatever it is
        else:
            steps = torch.ones_like(self.rho, dtype=torch.bool)
        config = self.sessions[0].config
        for i, (w, g) in enumerate(zip(self.weights, slopes, strict=True)):
            g = g + config.weight_decay * w if config.weight_decay else g
            if config.momentum:
                kept = self.momentum[i]
                buffer = g.clone() if kept is None else config.momentum * kept + g
                self.momentum[i] = buffer if kept is None else torch.where(_each(steps, g), buffer, kept)
                g = buffer
            self.weights[i] = torch.where(_each(steps, w), w - lr * g, w)
        return losses

    def _write_back(self) -> None:
        """Give every member its weights and momentum."""
        with torch.no_grad():
            for m, session in enumerate(self.sessions):
                for i, p in enumerate(session.model.parameters()):
                    p.copy_(self.weights[i][m])
                    kept = self.momentum[i]
                    if kept is not None:
                        session.optimizer.state[p]["momentum_buffer"] = kept[m].clone()

    def _records(self, epoch: int, losses: Tensor) -> list[EpochRecord | str]:
        every = list(range(len(self.sessions)))
        train, validation = (self._scores(name, every) for name in ("train", "validation"))
        results: list[EpochRecord | str] = []
        for m, session in enumerate(self.sessions):
            try:
                results.append(session.evaluate(epoch, list(losses[m]), (train[m], validation[m])))
            except TrainingError as error:
                results.append(str(error))
        best = [
            m for m, record in enumerate(results) if not isinstance(record, str) and self.sessions[m].best_yet(record)
        ]
        test = dict(zip(best, self._scores("test", best), strict=True))
        for m, (session, record) in enumerate(zip(self.sessions, results, strict=True)):
            if not isinstance(record, str):
                session.keep(record, test.get(m))
        return results

    @torch.no_grad()
    def _scores(self, name: str, members: Sequence[int]) -> list[Scores]:
        """The scores of some members, each on its own part of the data, as `Task.evaluate` gives them."""
        if not members:
            return []
        parts = [getattr(self.sessions[m].data, name) for m in members]
        weights = tuple(w[list(members)] for w in self.weights)
        shared = all(part.inputs is parts[0].inputs for part in parts)
        self.model.eval()
        outputs = []
        for start in range(0, len(parts[0]), CHUNK):
            rows = slice(start, start + CHUNK)
            inputs = parts[0].inputs[rows] if shared else torch.stack([part.inputs[rows] for part in parts])
            outputs.append(self.forward[shared](weights, inputs))
        together = torch.cat(outputs, dim=1)
        return [self.task.evaluate(_Replay(together[i]), part) for i, part in enumerate(parts)]


class _Replay(nn.Module):
    """A network whose outputs on a data set are known, in order."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self._outputs, self._at = outputs, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self._at += len(inputs)
        return self._outputs[self._at - len(inputs) : self._at]


def _check(model: nn.Module, config: Config) -> None:
    """Raise UsageError for a network whose members would share more than its form."""
    if any(True for _ in model.buffers()):
        raise UsageError(f"task {config.task} cannot be trained in a batch: its network has buffers, as of batch norm")
    for module in model.modules():
        if getattr(module, "p", 0) and "Dropout" in type(module).__name__:
            raise UsageError(f"task {config.task} cannot be trained in a batch: its network has dropout")


def _norms(parts: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm over all parameters of each member: (members,)."""
    norms: Tensor = torch.stack([part.flatten(1).norm(dim=1) for part in parts]).norm(dim=0)
    return norms


def _each(column: Tensor, like: Tensor) -> Tensor:
    """(members,) so that it broadcasts against (members, ...)."""
    return column.view(-1, *[1] * (like.dim() - 1))
