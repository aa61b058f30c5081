"""The largest eigenvalues of single samples' Hessians: how unlike samples are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from samlite.batches import is_pair, rows, samples
from samlite.curvature.compiled import compiled
from samlite.curvature.matrix import Progress
from samlite.curvature.products import HessianProducts
from samlite.curvature.results import SampleSpectra
from samlite.errors import require

_BASIS, _MOST = 40, 300  # vectors, and products of one sample


def spectra(hessian: HessianProducts, count: int, tol: float, seed: int, progress: Progress | None) -> SampleSpectra:
    """See `Hessian.sample_eigenvalues`."""
    hessian.check_exact("eigenvalues of single samples")
    began, found = time.perf_counter(), []
    like = hessian.params[0].detach()
    options = compiled().Options(k=1, tol=tol, separated=False, basis=_BASIS, max_matvecs=_MOST, seed=seed)
    matvecs = 0
    with hessian.separately() as curves:
        for i, sample in enumerate(_drawn(hessian, count, seed)):
            curves.losses.forget()
            operator = compiled().Callable(curves.multiplier(sample), like, hessian.shape[0])
            pairs = compiled().eigenpairs(operator, options, "LA", "lanczos")
            matvecs += pairs.matvecs
            found.append([float(pairs.values[0]), float(pairs.errors[0])])
            if progress:
                progress(i + 1, 0.0)
    require(bool(found), "data must hold at least one sample, got none")
    values, errors = torch.tensor(found, dtype=torch.float64, device="cpu").T
    converged = bool((errors <= tol * values.abs().max()).all())
    return SampleSpectra(values, errors, converged, matvecs, **hessian.work(time.perf_counter() - began))


def _drawn(hessian: HessianProducts, count: int, seed: int) -> Iterator[Any]:
    """So many samples as batches of one: of a pair drawn by the seed, else the first of each batch in turn."""
    data: Any = hessian.data
    if is_pair(data):
        generator = torch.Generator(device="cpu").manual_seed(seed)
        order: Tensor = torch.randperm(len(data[0]), generator=generator)[:count]
        for i in order.tolist():
            yield rows(data, slice(i, i + 1))
        return
    for batch in data:
        for i in range(samples(batch)):
            if count == 0:
                return
            count -= 1
            yield rows(batch, slice(i, i + 1))
