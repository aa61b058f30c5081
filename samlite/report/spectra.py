"""The figure of the largest eigenvalues of single samples' Hessians."""

from pathlib import Path
from typing import TYPE_CHECKING

from samlite.report.canvas import REFERENCE, new_figure

if TYPE_CHECKING:
    from samlite.curvature.results import SampleSpectra


def draw_spectra(spectra: "SampleSpectra", path: Path, title: str = "") -> None:
    """Draw the share of samples up to each eigenvalue; the file's suffix decides the format."""
    values = spectra.values.sort().values.numpy()
    shares = [(i + 1) / len(values) for i in range(len(values))]
    with new_figure(path, (5.2, 3.6)) as figure:
        axes = figure.add_subplot()
        axes.step(values, shares, where="post", color="C0")
        axes.axvline(values.mean(), **REFERENCE)
        axes.text(values.mean(), 0.02, " mean", color="0.4", fontsize=8)
        # Most samples are fitted and a few are not: powers of ten show both.
        positive = values[values > 0]
        if len(positive):
            linear = max(float(positive.max()) * 1e-4, 1e-12)
            axes.set_xscale("symlog", linthresh=linear)
            axes.set_xlim(left=min(-0.1 * linear, 1.1 * float(values.min())))
        axes.set(ylim=(0, 1.02), xlabel="largest eigenvalue of a sample's own Hessian", ylabel="share of samples")
        axes.set_title(f"{title + ': ' if title else ''}{len(values)} samples")
