"""Our measures beside their authors' own code, on one network: the table of docs/measures.md.

    python tools/measures.py FOLDER [--write docs/measures.md]

FOLDER holds clones of the repositories in `THEIRS`, at these commits, each under its own name. Their modules are
loaded as they are; packages that they import and do not need here are stood in for, and what is sent to a GPU stays on
the CPU. The network is an MLP on scikit-learn's digits in float64, trained for a while by RMSprop.
"""

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from samlite import Hessian, tasks

THEIRS = {
    "sharpness-vs-generalization": ("tml-epfl/sharpness-vs-generalization", "6d73be9"),
    "edge-of-stochastic-stability": ("arseniqum/edge-of-stochastic-stability", "f12be5c"),
    "RelativeFlatnessAndGeneralization": ("kampmichael/RelativeFlatnessAndGeneralization", "50998e9"),
    "centralflows": ("mahyarjn80/centralflows (a copy of locuslab/central_flows)", "e7fc256"),
    "loss-landscape": ("tomgoldstein/loss-landscape", "64ef4d5"),
}
STAND_INS = ("wandb", "einops", "h5py", "h5_util", "model_loader", "sklearn.linear_model")
CRITERION = nn.CrossEntropyLoss()
BEGIN, END = "<!-- theirs -->", "<!-- end of theirs -->"


class Shared:
    """The network, its data, and its optimizer."""

    def __init__(self) -> None:
        data = tasks.get("digits").splits(None, 0).train
        self.x, self.y = data.inputs.double(), data.targets
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).double()
        self.optimizer = torch.optim.RMSprop(self.model.parameters(), lr=1e-3, alpha=0.99, eps=1e-6)
        for _ in range(300):
            self.optimizer.zero_grad()
            CRITERION(self.model(self.x), self.y).backward()
            self.optimizer.step()
        self.hessian = Hessian(self.model, CRITERION, (self.x, self.y))

    def ours(self, name: str, **options: Any) -> Any:
        return self.hessian.measures(name, self.optimizer, **options)[name]

    @property
    def batches(self) -> list[tuple[Tensor, ...]]:
        """All samples as one batch, in the form of the loaders of tml-epfl."""
        return [(self.x, self.x, self.y, self.y, self.y)]


@contextmanager
def loaded(folder: Path, module: str) -> Iterator[Any]:
    """A module of theirs, on the CPU."""
    own = {name: sys.modules.pop(name) for name in ("utils", "models") if name in sys.modules}
    known = set(sys.modules)
    like = {name: getattr(torch, name) for name in ("rand_like", "randn_like")}
    patches = [mock.patch.object(Tensor, "cuda", lambda self, *_: self.clone()), mock.patch("builtins.print")]
    patches += [
        mock.patch.object(torch, name, lambda t, device=None, make=make: make(t)) for name, make in like.items()
    ]
    patches.append(mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in STAND_INS}))
    patches.append(mock.patch.object(sys, "path", [str(folder), *sys.path]))
    for patch in patches:
        patch.start()
    try:
        yield importlib.import_module(module)
    finally:
        for patch in reversed(patches):
            patch.stop()
        for name in set(sys.modules) - known:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
        sys.modules.update(own)


def apgd(shared: Shared, folder: Path, norm: str, adaptive: bool) -> float:
    with loaded(folder, "sharpness") as code:
        found = code.eval_APGD_sharpness(
            shared.model, shared.batches, CRITERION, None, None, rho=0.05, n_iters=20, rand_init=False,
            norm=norm, adaptive=adaptive,
        )  # fmt: skip
    return float(found[0])


def average(shared: Shared, folder: Path, adaptive: bool) -> float:
    torch.manual_seed(0)
    with loaded(folder, "sharpness") as code:
        found = code.eval_average_sharpness(
            shared.model, shared.batches, CRITERION, n_iters=20000, rho=0.05, adaptive=adaptive
        )
    return float(found[0])


def batch(shared: Shared, folder: Path) -> float:
    with loaded(folder, "utils.measure") as code:
        return float(
            code.calculate_averaged_grad_H_grad_step(
                shared.model, shared.x, shared.y, CRITERION, 128, n_estimates=5000, eps=0.0
            )
        )


def preconditioned(shared: Shared, folder: Path) -> float:
    rule = {"lr": 1.0, "beta2": 0.99, "eps": 1e-6, "bias_correction": False}
    with loaded(folder, "src.update_rules") as code:
        optimizer = code.RMSProp(**rule)
        params = list(shared.model.parameters())
        nu = torch.cat([shared.optimizer.state[p]["square_avg"].reshape(-1) for p in params])
        optimizer.initialize_state(nu)
        state = code.flatten_pytree({"t": torch.tensor(300.0).double(), "nu": nu})[0]
        root = optimizer.P(state).pow(-0.5)
        dense = torch.stack([shared.hessian @ e for e in torch.eye(len(nu), dtype=torch.float64)])
        rows = torch.stack([root(row) for row in dense])
        return float(torch.linalg.eigvalsh(torch.stack([root(column) for column in rows.T]))[-1])


def relative_flatness(shared: Shared, folder: Path) -> float:
    with loaded(folder / "CorrelationFlatnessGeneralization", "utils") as code:
        layer = shared.model[2].weight
        loss = CRITERION(shared.model(shared.x), shared.y)
        return float(code.calculateNeuronwiseHessians_fc_layer(layer, loss, None)[0])


def pac_bayes(shared: Shared, folder: Path) -> float:
    with loaded(folder / "CorrelationFlatnessGeneralization", "utils") as code:
        right = float((shared.model(shared.x).argmax(1) == shared.y).double().mean())
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(shared.x, shared.y), len(shared.x))
        # Its noise has the standard deviation sigma^2, which is what ours is compared with.
        return float(code.pacbayes_sigma(shared.model, loader, right, 42, montecarlo_samples=50)) ** 2


ROWS: list[tuple[str, str, dict[str, Any], Callable[[Shared, Path], float]]] = [
    ("preconditioned", "centralflows", {}, preconditioned),
    ("batch", "edge-of-stochastic-stability", {"batch_size": 128}, batch),
    ("worst", "sharpness-vs-generalization", {"batch_size": 900}, lambda s, f: apgd(s, f, "l2", False)),
    ("worst-adaptive", "sharpness-vs-generalization", {"batch_size": 900}, lambda s, f: apgd(s, f, "l2", True)),
    ("worst-inf", "sharpness-vs-generalization", {"batch_size": 900}, lambda s, f: apgd(s, f, "linf", False)),
    ("worst-inf-adaptive", "sharpness-vs-generalization", {"batch_size": 900}, lambda s, f: apgd(s, f, "linf", True)),
    ("average", "sharpness-vs-generalization", {}, lambda s, f: average(s, f, False)),
    ("average-adaptive", "sharpness-vs-generalization", {}, lambda s, f: average(s, f, True)),
    ("relative-flatness", "RelativeFlatnessAndGeneralization", {}, relative_flatness),
    ("pac-bayes", "RelativeFlatnessAndGeneralization", {}, pac_bayes),
]


def table(folder: Path) -> str:
    lines = ["| measure | ours | ± | theirs | code |", "|---|---|---|---|---|"]
    shared = Shared()
    for name, place, options, run in ROWS:
        own = shared.ours(name, tol=1e-6, **options)
        other = run(shared, folder / place)
        repository, commit = THEIRS[place]
        error = "" if math.isnan(own.error) or not own.error else f"{own.error:.1g}"
        row = f"| `{name}` | {own.value:.5g} | {error} | {other:.5g} | {repository} @ {commit} |"
        print(row, flush=True)
        lines.append(row)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", type=Path, help="put the table into this page")
    options = parser.parse_args()
    text = table(options.folder.resolve())
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
