"""What `samlite sharpness` was asked to measure: its options, checked before the work and completed from the run."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samlite.errors import UsageError
from samlite.files import replaceable

if TYPE_CHECKING:
    from samlite.training.measurements import Subject

FIGURES = {"density": "density.png", "spectra": "spectra.png"}  # in a run's folder


@dataclass
class Asked:
    """The options, and the names of the measures."""

    source: Path
    top: int
    which: Any
    method: Any
    tol: float
    verify: bool
    lr: float | None
    rho: float | None
    unit: Any
    figure: Path | None
    curvature: Any
    products: Any
    params: str | None
    mode: Any
    dtype: Any
    device: str | None
    samples: int | None
    memory: str | None
    model: str | None
    data: str | None
    loss: str | None
    weights: str | None
    save_vectors: Path | None
    literature: str | None
    radius: float
    other: Path | None
    measures: list[str]

    @property
    def of_run(self) -> bool:
        """Whether a run is measured, not anyone's checkpoint."""
        from samlite.training.runs import is_run

        return is_run(self.source)

    @property
    def kept(self) -> bool:
        """Whether the measurement is that of the run, and exact enough to keep."""
        whole = self.which == "LA" and self.params is None and self.samples is None and self.mode == "eval"
        return self.of_run and whole and self.products == "autograd" and self.tol <= 1e-3

    @property
    def named(self) -> list[str]:
        """The names of --measures."""
        if self.literature is None:
            return []
        from samlite.curvature.measures.table import names_of

        return names_of(self.literature)

    def check(self) -> None:
        """Raise UsageError for options and files that cannot be, before the work."""
        _check_numbers(self)
        _check_checkpoint(self)
        _check_files(self)

    def subject(self) -> "Subject":
        """The network and its data; completes what the run says."""
        from samlite.training.measurements import run_subject

        if self.of_run:
            subject = run_subject(self.source, self.samples, self.device)
        else:
            from samlite.cli.checkpoint import checkpoint_subject

            assert self.model and self.data
            loss = self.loss or "cross_entropy"
            subject = checkpoint_subject(
                self.source, self.model, self.data, loss, self.samples, self.device, self.weights
            )
        self.lr = subject.lr if self.lr is None else self.lr
        self.rho = subject.rho if self.rho is None else self.rho
        if "stability" in self.measures and self.lr is None:
            raise UsageError("--stability of a checkpoint needs --lr, got none; give the learning rate of its training")
        if self.dtype is None:
            precise = {"moments", "stability"} & set(self.measures) and self.device != "mps"
            self.dtype = "float64" if precise else "float32"
        return subject


def _check_numbers(asked: Asked) -> None:
    named = asked.named
    if asked.samples is not None and asked.samples < 1:
        raise UsageError(f"--samples must be >= 1, got {asked.samples}")
    if asked.figure is not None and "density" not in asked.measures:
        raise UsageError(f"--figure must go with --density, got {asked.figure}; leave it out, or add --density")
    for name, value in (("--lr", asked.lr), ("--rho", asked.rho)):
        if value is not None and "stability" not in asked.measures and asked.literature is None:
            raise UsageError(f"{name} must go with --stability, got {value}; leave it out, or add --stability")
    if asked.other is not None and "overlap" not in named:
        raise UsageError(f"--other must go with --measures overlap, got {asked.other}; leave it out, or add it")
    if not 0 < asked.radius < math.inf:
        raise UsageError(f"--radius must be > 0, got {asked.radius}")
    if asked.lr is not None and not 0 < asked.lr < math.inf:
        raise UsageError(f"--lr must be > 0, got {asked.lr}")
    if asked.rho is not None and not 0 <= asked.rho < math.inf:
        raise UsageError(f"--rho must be >= 0, got {asked.rho}")


def _check_checkpoint(asked: Asked) -> None:
    given = [f"--{name}" for name in ("model", "data", "loss", "weights") if getattr(asked, name)]
    if asked.of_run and given:
        raise UsageError(f"{given[0]} must go with a checkpoint, got the run {asked.source}; leave it out")
    if not asked.of_run and not {"--model", "--data"} <= set(given):
        raise UsageError(
            "a checkpoint needs --model (pkg.mod:factory, timm:NAME or hf:) and --data pkg.mod:batches, "
            f"got {asked.source} with {', '.join(given) or 'neither'}"
        )


def _check_files(asked: Asked) -> None:
    from samlite.training.measurements import read_sharpness

    if asked.of_run:
        read_sharpness(asked.source)
        for name in FIGURES.values():
            replaceable(asked.source / name)
    for name, path in (("--figure", asked.figure), ("--save-vectors", asked.save_vectors)):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{name} must be in a folder that exists, got {path}; make {path.parent}")
        if path is not None:
            replaceable(path)
    if asked.figure is not None and asked.figure.suffix not in (".png", ".pdf", ".svg", ".jpg"):
        raise UsageError(f"--figure must end in .png, .pdf, .svg or .jpg, got {asked.figure}")
