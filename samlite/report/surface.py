"""The figure of a loss surface: a curve along a line, contours over a plane."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from samlite.report.canvas import REFERENCE, new_figure

if TYPE_CHECKING:
    from samlite.curvature.results import Surface


def draw_surface(surface: "Surface", path: Path, title: str, labels: tuple[str, str]) -> None:
    """Draw a surface whose directions have these labels; the file's suffix decides the format."""
    with new_figure(path, (5.2, 3.6) if surface.losses.dim() == 1 else (5.2, 4.4)) as figure:
        axes = figure.add_subplot()
        if surface.losses.dim() == 1:
            _draw_line(axes, surface)
            axes.set_xlabel(labels[0])
        else:
            _draw_plane(figure, axes, surface)
            axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.set_title(title)


def _draw_line(axes: Any, surface: "Surface") -> None:
    t, loss = surface.axis.numpy(), surface.losses.numpy()
    axes.plot(t, loss, color="C0", label="loss")
    axes.axvline(0, **REFERENCE)
    axes.set_ylabel("loss")
    if surface.barrier is not None:
        axes.axvline(1, **REFERENCE)
        ends = [float(surface.losses[surface.axis.eq(end)]) for end in (0, 1)]
        inside = t[(t >= 0) & (t <= 1)]
        axes.plot(inside, (1 - inside) * ends[0] + inside * ends[1], color="0.5", linewidth=1)
    if loss.min() > 0 and loss.max() > 50 * loss.min():
        axes.set_yscale("log")
    if surface.accuracy is not None:
        beside = axes.twinx()
        beside.plot(t, 100 * surface.accuracy.numpy(), color="C1", linewidth=1)
        beside.set_ylabel("accuracy, %", color="C1")
        beside.spines["right"].set_visible(True)


def _draw_plane(figure: Any, axes: Any, surface: "Surface") -> None:
    t, losses = surface.axis.numpy(), surface.losses.clamp_min(torch.finfo(torch.float64).tiny)
    low, high = losses.min().log10(), losses.max().log10()
    levels = sorted(set(torch.logspace(float(low), float(high), 25, dtype=torch.float64).tolist()))
    shown = axes.contour(t, t, losses.T.numpy(), levels=levels, cmap="viridis", norm="log")
    figure.colorbar(shown, ax=axes, label="loss", format="%.3g")
    axes.plot(0, 0, "k+", markersize=8)
