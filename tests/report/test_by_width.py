from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result
from sweeps import Sweep

from samlite.report import canvas
from samlite.report.by_width import draw
from samlite.report.outcomes import Report, summarize

SGD = [0.90, 0.92, 0.91]
SAM = [0.93, 0.92, 0.94]


@pytest.fixture
def measured(sweep: Sweep) -> Sweep:
    """Five seeds at two widths; at the second s_4 of one minimum is 0."""
    generator = np.random.default_rng(2)
    for width, ratio in ((8, 1.0), (32, 0.3)):
        for seed in range(5):
            for name in ("sgd", "sam"):
                a, *spread = (ratio if name == "sam" else 1.0) * np.exp(generator.normal(-1, 0.2, size=4))
                if (width, seed, name) == (32, 0, "sam"):
                    spread[2] = 0.0
                choices = {"width": width, "optimizer": name, "seed": seed, "sharpness": float(a)}
                sweep.add(0.9 + seed / 100, spread=dict(zip("234", map(float, spread), strict=True)), **choices)
    return sweep


Cli = Callable[..., Result]


def test_the_tables_of_quantities_and_ratios_fit_in_100_columns(
    cli: Cli, measured: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = cli("report", measured.folder).out
    assert max(map(len, shown.splitlines())) <= 100 and "…" not in shown
    assert "a = λ_max" in shown and "s_4" in shown
    assert "sharpness of SAM's minima over its base's" in shown
    comparison = summarize(measured.folder).rows[1].optimizers["sam"].comparisons["a"].ratio
    assert f"{comparison.mean:.2f} ({comparison.low:.2f} to {comparison.high:.2f})" in shown
    assert "no significant" in shown and "smaller" in shown
    assert "no ratio:" in shown and "0 in 1 of 5 pairs" in shown
    assert "Each of the 7 verdicts uses its own 95 % interval; nothing corrects for their number." in shown

    monkeypatch.setenv("COLUMNS", "80")
    narrow = cli("report", measured.folder).out
    assert f" {comparison.mean:.2f} " in narrow and f"({comparison.low:.2f} to {comparison.high:.2f})" in narrow
    assert max(map(len, narrow.splitlines())) <= 80 and "…" not in narrow


def test_columns_and_tables_are_only_there_for_what_was_measured(cli: Cli, sweep: Sweep) -> None:
    for name in ("sgd", "sam"):
        sweep.add(0.9, optimizer=name)
    assert "λ_max" not in cli("report", sweep.folder).out
    for name in ("sgd", "sam"):
        sweep.add(0.9, optimizer=name, width=9, sharpness=2.0)
    shown = cli("report", sweep.folder).out
    assert "λ_max" in shown and "over its base's" in shown and "s_2" not in shown and "s_k" not in shown


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures, in place of their files."""
    figures: list[Any] = []
    monkeypatch.setattr(canvas, "_save", lambda figure, path: figures.append(figure))
    return figures


def test_the_figure_shows_the_best_rho_where_several_were_tried_and_a_curve_a_condition(
    tmp_path: Path, sweep: Sweep, drawn: list[Any]
) -> None:
    pytest.importorskip("matplotlib")
    for noise in (0.0, 0.5):
        sweep.add(0.9, optimizer="sgd", label_noise=noise)
        for rho in (0.05, 0.1):
            sweep.add(0.9, optimizer="sam", rho=rho, validation=0.9 + rho, label_noise=noise)
    draw(summarize(sweep.folder), tmp_path / "figure.png")
    improvement, best = drawn[0].axes
    first, second = (line.get_ydata().item() for line in best.lines)
    assert 0.097 < first < 0.1 < second < 0.103  # side by side
    assert [line.get_label() for line in improvement.lines[1:]] == ["SAM, label noise 0", "SAM, label noise 0.5"]


@pytest.fixture
def found(sweep: Sweep) -> Report:
    for width in (8, 32):
        for seed in range(3):
            sweep.add(SGD[seed], optimizer="sgd", seed=seed, width=width)
            sweep.add(SAM[seed], optimizer="sam", seed=seed, width=width)
    return summarize(sweep.folder)


@pytest.mark.parametrize(("suffix", "head"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_the_figure_is_written_in_the_format_of_its_suffix(
    tmp_path: Path, found: Report, suffix: str, head: bytes
) -> None:
    pytest.importorskip("matplotlib")
    draw(found, tmp_path / f"figure{suffix}")
    assert (tmp_path / f"figure{suffix}").read_bytes().startswith(head)


def test_a_figure_of_nothing_or_of_no_known_format_is_refused(tmp_path: Path, found: Report, sweep: Sweep) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="figure must end in a format such as .png or .pdf"):
        draw(found, tmp_path / "figure.docx")
    with pytest.raises(ValueError, match="a figure needs SAM and its base optimizer"):
        draw(Report("digits", "accuracy", True, (), (), (), ()), tmp_path / "figure.png")


def test_the_figure_has_a_panel_for_each_quantity_with_geometric_means(
    tmp_path: Path, measured: Sweep, drawn: list[Any]
) -> None:
    pytest.importorskip("matplotlib")
    found = summarize(measured.folder)
    draw(found, tmp_path / "figure.png")
    improvement, *panels = drawn[0].axes
    assert improvement.get_title() == "improvement by SAM"
    for panel, name in zip(panels, ["a", "s_2", "s_3", "s_4"], strict=True):
        assert panel.get_xscale() == panel.get_yscale() == "log"
        assert name in panel.get_title()
        for line, optimizer in zip(panel.lines, ["sgd", "sam"], strict=True):
            means = [row.optimizers[optimizer].geometric[name].mean for row in found.rows]
            assert line.get_ydata() == pytest.approx([mean for mean in means if mean is not None])


def test_the_figure_has_one_panel_more_with_eigenvalues_alone(tmp_path: Path, sweep: Sweep) -> None:
    pytest.importorskip("matplotlib")
    for optimizer in ("sgd", "sam"):  # one seed, at one width
        sweep.add(0.9, optimizer=optimizer, sharpness=2.0)
    draw(summarize(sweep.folder), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_quantity_that_is_zero_everywhere_leaves_its_panel_empty(tmp_path: Path, sweep: Sweep) -> None:
    pytest.importorskip("matplotlib")
    for optimizer in ("sgd", "sam"):
        sweep.add(0.9, optimizer=optimizer, sharpness=0.0, spread={"2": 0.0, "3": 1.0, "4": 1e-9})
    draw(summarize(sweep.folder), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
