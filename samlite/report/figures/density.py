"""The spectral density."""

from pathlib import Path
from typing import TYPE_CHECKING

from samlite.report.figures.canvas import new_figure, save

if TYPE_CHECKING:
    from samlite.curvature.results import Density


def density(found: "Density", path: Path, title: str = "") -> None:
    """Draw the spectral density on a logarithmic axis, with its 95 % interval; the file's suffix decides the format."""
    grid, middle, half = found.grid.numpy(), found.density.numpy(), 1.96 * found.stderr.numpy()
    # A quadrature rule with so few nodes says nothing about densities below those of a thousandth of an eigenvalue.
    floor = 1e-6 * middle.max()
    figure = new_figure((5.2, 3.6))
    axes = figure.add_subplot()
    axes.fill_between(
        grid, (middle - half).clip(floor), (middle + half).clip(floor), color="C0", alpha=0.25, linewidth=0
    )
    axes.plot(grid, middle.clip(floor), color="C0", linewidth=1.5)
    axes.axvline(0, color="0.6", linewidth=1, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylim(floor, 3 * middle.max())
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("spectral density")
    axes.set_title(f"{title + ': ' if title else ''}{found.probes} probes, smoothed by {found.width:.2g}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
