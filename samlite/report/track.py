"""The figure of sharpness along training."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samlite.report.canvas import new_figure


def draw_track(records: Sequence[Mapping[str, Any]], path: Path, title: str = "Sharpness along training") -> None:
    """Draw the tracked eigenvalues against the epoch beside 2/lr; the file's suffix decides the format.

    2/lr is where plain full-batch gradient descent stops being stable; momentum, decay, noise and SAM move that point.
    Epochs without a converged value are gaps.
    """
    epochs = [record["epoch"] for record in records]
    curves = [
        [math.nan if value is None else value for value in values]
        for values in zip(*(record["eigenvalues"] for record in records), strict=True)
    ]
    with new_figure(path, (5.2, 3.6)) as figure:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        for i, curve in reversed(list(enumerate(curves))):  # the largest on top
            style: dict[str, Any] = {"markersize": 4, "linewidth": 2} if i == 0 else {"markersize": 2, "linewidth": 1}
            label = ("λ₁, the largest", "the next" if len(curves) > 2 else "λ₂")[i] if i < 2 else None
            axes.plot(epochs, curve, "o-", color="C0", alpha=1 if i == 0 else 0.4, label=label, **style)
        thresholds = [2 / record["lr"] if record["lr"] else math.nan for record in records]
        # A level per epoch, from its start to its end: the value of an epoch is that at its end.
        edges = [epochs[0] - 1, *epochs]
        axes.stairs(thresholds, edges, baseline=None, color="C3", linestyle="--", linewidth=1.5, label="2/lr")
        finite = [value for curve in curves for value in curve if not math.isnan(value)]
        if finite and min(finite) > 0:
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set(xlabel="epoch", ylabel="Hessian eigenvalue of the training loss")
        missing = sum(None in record["eigenvalues"] for record in records)
        axes.set_title(f"{title} ({missing} epochs not converged)" if missing else title)
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: (labels[i] == "2/lr", "λ₁" not in labels[i]))
        axes.legend([handles[i] for i in order], [labels[i] for i in order], fontsize=10)
