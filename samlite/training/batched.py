"""Many small trainings at once: the runs of one width as one batched network.

A step of a small network is mostly overhead, which the members of a batch share. Each has its own first weights, data,
order of batches, labels, radius and momentum, and is a run of its own on disk, which any other command takes. It equals
the run that is trained alone but for rounding: products of batched matrices add in another order, which may depend on
their number.

In memory: the weights, momentum and gradients of all members, a batch of each, and each seed's data once.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from samlite.data.tensors import Splits, TensorData
from samlite.errors import UsageError
from samlite.tasks.own import OwnTask
from samlite.tasks.task import Scores
from samlite.training.config import Config, task_of
from samlite.training.loop import held, learning_rate
from samlite.training.runs import load_data
from samlite.training.session import EpochRecord, Session, TrainingError

MOST = 64  # members of a batch
FAST = 400_000  # parameters of all members: of more, a CPU's caches do not hold the weights and gradients
PAYS = 8  # members, from which on they are trained faster together than alone
CHUNK = 128  # samples that all members evaluate at once: more do not fit into the caches of a CPU
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Identity)
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


def check(cell: Config) -> None:
    """Raise UsageError where a run cannot be a member of a batch by its config."""
    if reason := why_not(cell):
        raise UsageError(f"{cell.name} cannot be trained in a batch: {reason}; leave --batched out")


def fitting(cell: Config) -> int:
    """How many runs like this one are best trained as one batch."""
    return MOST if cell.device != "cpu" else max(2, min(MOST, FAST // task_of(cell).parameters(cell.width)))


def pays(cell: Config) -> bool:
    """Whether runs like this one are trained faster as a batch than each alone."""
    task = task_of(cell)
    if why_not(cell) or isinstance(task, OwnTask):  # which is not made to look at it
        return False
    with torch.device("meta"):
        return not _obstacle(task.build(cell.width, None, {})) and fitting(cell) >= PAYS


def train_batched(cells: Sequence[Config], folder: Path) -> Iterator[tuple[Config, EpochRecord | str]]:
    """Train cells of one width in their subfolders, and yield (cell, record) an epoch, or (cell, why it failed).

    Runs that were stopped go on from their last epochs; finished ones yield nothing.

    Raises:
        UsageError: a cell cannot be a member of a batch; a folder holds another run.
        BlockingIOError: another process trains in one of the folders.
    """
    for cell in cells:
        check(cell)
    with ExitStack() as stack:
        members = []
        for cell in cells:
            (folder / cell.name).parent.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(held(folder / cell.name, cell, True)):
                members.append(cell)
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
    """Runs that have come equally far, as one network; those that perturb come first."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self.sessions = sorted(sessions, key=lambda session: not session.config.rho)
        first = self.sessions[0]
        self.task, self.model = first.task, first.model
        if obstacle := _obstacle(self.model):
            raise UsageError(f"task {first.config.task} cannot be trained in a batch: {obstacle}; leave --batched out")
        parameters = list(self.model.parameters())
        self.shapes, self.sizes = [p.shape for p in parameters], [p.numel() for p in parameters]
        self.weights = torch.stack([_flat(session.model.parameters()) for session in self.sessions])
        self.momentum = torch.stack([_momentum(session) for session in self.sessions])
        self.rho = self._column([session.config.rho for session in self.sessions if session.config.rho])
        normalize = [float(session.config.normalize) for session in self.sessions if session.config.rho]
        self.normalize = self._column(normalize).bool()
        # Members with the same data have the same order of batches: the first of them draws it.
        leaders: dict[Any, Session] = {}
        for session in self.sessions:
            leaders.setdefault(_key(session.config), session)
        self.leaders, known = list(leaders.values()), list(leaders)
        self.place = torch.tensor([known.index(_key(s.config)) for s in self.sessions], device=self.rho.device)
        self.loss = vmap(self.task.loss)

    def _gradients(self, weights: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(The gradients of each member's loss by its weights: (members, parameters), the losses)."""
        leaves = [w.requires_grad_() for w in self._parts(weights.detach())]
        with torch.enable_grad():
            losses = self.loss(self._outputs(leaves, inputs), targets)
            gradients = torch.autograd.grad(losses.sum(), leaves)
        return torch.cat([g.flatten(1) for g in gradients], dim=1), losses.detach()

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """(members, parameters) as (members, ...) for each parameter: views."""
        parts = flat.split_with_sizes(self.sizes, 1)
        return [part.view(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def _outputs(self, weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """Each member's outputs for its inputs: (members, samples, features) in and out."""
        left = iter(weights)
        for layer in self.model.children():
            if isinstance(layer, nn.Linear):
                weight, bias = next(left), next(left)
                inputs = torch.baddbmm(bias.unsqueeze(1), inputs, weight.mT)
            else:
                inputs = layer(inputs)
        return inputs

    def _column(self, values: Sequence[float]) -> Tensor:
        """(members, 1)"""
        return torch.tensor(values, dtype=self.weights.dtype, device=self.weights.device).unsqueeze(1)

    def epoch(self, epoch: int) -> list[EpochRecord | str]:
        """Train every member for an epoch: its record, or why it failed."""
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

    @torch.no_grad()
    def _step(self, inputs: Tensor, targets: Tensor, lr: float) -> Tensor:
        """One step of every member; returns the losses before it: (members,)."""
        slopes, losses = self._gradients(self.weights, inputs, targets)
        perturbing = len(self.rho)
        if perturbing:
            first = slopes[:perturbing].norm(dim=1, keepdim=True)
            numbers = torch.finfo(first.dtype)
            divisor = first.clamp_min((numbers.tiny / numbers.eps) ** 0.5).where(self.normalize, 1.0)
            moved = torch.addcmul(self.weights[:perturbing], slopes[:perturbing], self.rho / divisor)
            second, _ = self._gradients(moved, inputs[:perturbing], targets[:perturbing])
            taken = (first + second.norm(dim=1, keepdim=True)).isfinite()
            self._update(slice(perturbing), second, lr, taken)
        if perturbing < len(losses):
            rest = slice(perturbing, None)
            self._update(rest, slopes[rest], lr)  # a plain step is taken whatever it is
        return losses

    def _update(self, members: slice, slopes: Tensor, lr: float, taken: Tensor | None = None) -> None:
        """The step of SGD of some members by their gradients, which it overwrites; of those `taken` alone."""
        config, weights, momentum = self.sessions[0].config, self.weights[members], self.momentum[members]
        if config.weight_decay:
            slopes.add_(weights, alpha=config.weight_decay)
        if taken is None:
            weights.sub_(momentum.mul_(config.momentum).add_(slopes), alpha=lr)
        else:
            momentum.mul_(torch.where(taken, config.momentum, 1.0)).add_(slopes.where(taken, 0))
            weights.addcmul_(momentum, taken.to(weights.dtype), value=-lr)

    @torch.no_grad()
    def _write_back(self) -> None:
        """Give every member its weights and momentum."""
        parts = list(zip(self._parts(self.weights), self._parts(self.momentum), strict=True))
        for m, session in enumerate(self.sessions):
            for p, (weights, momentum) in zip(session.model.parameters(), parts, strict=True):
                p.copy_(weights[m])
                if session.config.momentum:
                    session.optimizer.state[p]["momentum_buffer"] = momentum[m].clone()

    def _records(self, epoch: int, losses: Tensor) -> list[EpochRecord | str]:
        train, validation = self._scores("train"), self._scores("validation")
        results: list[EpochRecord | str] = []
        for m, session in enumerate(self.sessions):
            try:
                results.append(session.evaluate(epoch, list(losses[m]), (train[m], validation[m])))
            except TrainingError as error:
                results.append(str(error))
        for session, record in zip(self.sessions, results, strict=True):
            if not isinstance(record, str):
                session.keep(record)
        return results

    @torch.no_grad()
    def _scores(self, name: str) -> list[Scores]:
        """The scores of every member on its own part of the data, as `Task.evaluate` gives them."""
        parts = [getattr(session.data, name) for session in self.sessions]
        shared = all(part.inputs is parts[0].inputs for part in parts)
        weights, outputs = self._parts(self.weights), []
        for start in range(0, len(parts[0]), CHUNK):
            rows = slice(start, start + CHUNK)
            first = parts[0].inputs[rows]
            inputs = first.expand(len(parts), *first.shape) if shared else torch.stack([p.inputs[rows] for p in parts])
            outputs.append(self._outputs(weights, inputs))
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


def _obstacle(model: nn.Module) -> str:
    """Why a network cannot be batched; empty where it can, as its layers are linear or act on each number alone."""
    if not isinstance(model, nn.Sequential):
        return f"its network must be an nn.Sequential, got {type(model).__name__}"
    for layer in model:
        if not isinstance(layer, _ACTIVATIONS) and not (type(layer) is nn.Linear and layer.bias is not None):
            return f"its layers must be linear with a bias, or activations, got {type(layer).__name__}"
    return ""


def _flat(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.detach().flatten() for part in parts])


def _momentum(session: Session) -> Tensor:
    """The momentum of a run: (parameters,); 0 before the first step."""
    states = ((p, session.optimizer.state.get(p, {})) for p in session.model.parameters())
    return _flat(state.get("momentum_buffer", torch.zeros_like(p)) for p, state in states)
