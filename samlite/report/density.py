"""The figure of a spectral density."""

from pathlib import Path
from typing import TYPE_CHECKING

from samlite.report.canvas import REFERENCE, new_figure

if TYPE_CHECKING:
    from samlite.curvature.results import Density


def draw_density(density: "Density", path: Path, title: str = "") -> None:
    """Draw the spectral density on a logarithmic axis, with its 95 % interval; the file's suffix decides the format."""
    grid, middle, half = density.grid.numpy(), density.density.numpy(), 1.96 * density.stderr.numpy()
    # A quadrature rule with so few nodes says nothing about densities below those of a thousandth of an eigenvalue.
    floor = 1e-6 * middle.max()
    with new_figure(path, (5.2, 3.6)) as figure:
        axes = figure.add_subplot()
        low, high = (middle - half).clip(floor), (middle + half).clip(floor)
        axes.fill_between(grid, low, high, color="C0", alpha=0.25, linewidth=0)
        axes.plot(grid, middle.clip(floor), color="C0")
        axes.axvline(0, **REFERENCE)
        axes.set(yscale="log", ylim=(floor, 3 * middle.max()), xlabel="eigenvalue", ylabel="spectral density")
        axes.set_title(f"{title + ': ' if title else ''}{density.probes} probes, smoothed by {density.width:.2g}")
