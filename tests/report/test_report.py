import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result
from scipy import stats

from samlite.files import write_json
from samlite.intervals import Comparison, Geometric, Interval, student_t
from samlite.report.by_width import Report, count_in_short, summarize
from samlite.report.figures import by_width
from samlite.training.config import Config

SGD = [0.90, 0.92, 0.91]
SAM = [0.93, 0.92, 0.94]


class Sweep:
    """A folder that looks like a sweep, with results made up."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cells = folder, []

    def add(
        self,
        test: float | None,
        *,
        validation: float = 0.9,
        best: float = 0.95,
        sharpness: Any = None,
        spread: Any = None,  # s_k by k
        converged: bool = True,  # the moments
        **choices: Any,
    ) -> None:
        config = Config.of(**{"task": "digits", "width": 8, "device": "cpu", **choices})
        self.cells.append(config.to_json())
        write_json(self.folder / "sweep.json", {"cells": self.cells})
        run = self.folder / config.name
        run.mkdir()
        write_json(run / "config.json", config.to_json())
        if test is not None:
            final = {"test_metric": test, "validation_metric": validation, "validation_loss": 1 - validation}
            end = {"final": final, "best": {"test_metric": best}, "parameters": 587, "interpolates": test > 0.925}
            write_json(run / "result.json", end)
        if sharpness is not None:
            found = {"which": "LA", "converged": True, "complete": True, "values": [sharpness]}
            moments = {"unit": "sample", "converged": converged, "nonuniformity": spread}
            write_json(run / "sharpness.json", {"eigenvalues": found, **({"moments": moments} if spread else {})})


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


def test_quantiles_of_student_t_are_those_of_scipy() -> None:
    for degrees in [*range(1, 40), 100, 1001]:
        assert student_t(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-12)
    assert student_t(5, 0.99) == pytest.approx(stats.t.ppf(0.995, 5), rel=1e-12)


def test_an_interval_is_student_t_at_95_percent() -> None:
    values = np.random.default_rng(0).normal(size=7)
    interval = Interval.of(values.tolist())
    low, high = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    assert interval is not None and interval.half_width is not None and interval.n == 7
    assert interval.mean - interval.half_width == pytest.approx(low, rel=1e-12)
    assert interval.mean + interval.half_width == pytest.approx(high, rel=1e-12)


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    assert Interval.of([3.0]) == Interval(3.0, None, 1)
    assert Interval.of([]) is None


def test_the_improvement_is_paired_by_seed(sweep: Sweep) -> None:
    for seed in range(3):
        sweep.add(SGD[seed], optimizer="sgd", seed=seed, sharpness=10.0 + seed)
        sweep.add(SAM[2 - seed], optimizer="sam", seed=2 - seed)  # in another order
    (row,) = summarize(sweep.folder).rows
    gains = np.subtract(SAM, SGD)
    improvement = row.optimizers["sam"].improvement
    assert improvement is not None
    assert improvement.mean == pytest.approx(gains.mean(), rel=1e-12)
    assert improvement.half_width == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(gains), rel=1e-12)
    assert row.parameters == 587
    assert row.optimizers["sgd"].metric.mean == pytest.approx(np.mean(SGD))
    assert row.optimizers["sgd"].improvement is None and row.optimizers["sgd"].rho is None
    assert row.optimizers["sgd"].sharpness == Interval.of([10.0, 11.0, 12.0])
    assert row.optimizers["sam"].sharpness is None and row.optimizers["sam"].interpolating == 2


def test_of_several_rhos_the_one_best_on_validation_counts_even_if_another_is_better_on_test(sweep: Sweep) -> None:
    for seed in range(2):
        sweep.add(0.90, optimizer="sgd", seed=seed)
        sweep.add(0.99, optimizer="sam", rho=0.05, seed=seed, validation=0.90)
        sweep.add(0.92, optimizer="sam", rho=0.1, seed=seed, validation=0.95)
    sweep.add(0.91, optimizer="sam", rho=0.2, seed=0, validation=1.0)  # lucky, but one seed only
    outcome = summarize(sweep.folder).rows[0].optimizers["sam"]
    assert outcome.rho == 0.1 and outcome.metric.mean == 0.92
    assert outcome.improvement is not None and outcome.improvement.mean == pytest.approx(0.02)


def test_a_lower_loss_is_an_improvement_with_its_sign_turned(sweep: Sweep) -> None:
    for optimizer, loss in [("sgd", 0.5), ("sam", 0.3)]:
        sweep.add(loss, task="synthetic", optimizer=optimizer)
    outcome = summarize(sweep.folder).rows[0].optimizers["sam"]
    assert outcome.improvement == Interval(pytest.approx(0.2), None, 1)


def test_only_seeds_that_both_have_are_compared_and_without_a_base_none(sweep: Sweep) -> None:
    sweep.add(0.90, optimizer="adam", seed=0)
    sweep.add(None, optimizer="adam", seed=1)
    sweep.add(0.91, optimizer="sam", base="adam", seed=0)
    sweep.add(0.99, optimizer="sam", base="adam", seed=1)
    sweep.add(0.95, optimizer="sam", base="adamw", seed=0)
    found = summarize(sweep.folder)
    outcomes = found.rows[0].optimizers
    assert outcomes["sam-adam"].improvement == Interval(pytest.approx(0.01), None, 1)
    assert outcomes["sam-adam"].metric.n == 2 and outcomes["sam-adamw"].improvement is None
    assert found.unfinished == ("adam-w8-s1",)


def test_each_condition_has_rows_of_its_own_and_its_own_pairs(sweep: Sweep) -> None:
    for noise, gain in ((0.0, 0.01), (0.5, 0.05)):
        for width in (8, 32):
            sweep.add(0.8, optimizer="sgd", width=width, label_noise=noise)
            sweep.add(0.8 + gain, optimizer="sam", width=width, label_noise=noise)
    found = summarize(sweep.folder)
    places = [(row.condition, row.width) for row in found.rows]
    assert places == [({"label_noise": noise}, width) for noise in (0.0, 0.5) for width in (8, 32)]
    gains = [row.optimizers["sam"].improvement for row in found.rows]
    assert [gain and gain.mean for gain in gains] == pytest.approx([0.01, 0.01, 0.05, 0.05])
    json.dumps(found.to_json(), allow_nan=False)


def test_every_rho_that_was_tried_is_reported_with_its_validation_metric(sweep: Sweep) -> None:
    sweep.add(0.9, optimizer="sgd")
    for rho, validation in ((0.1, 0.8), (0.05, 0.7)):
        sweep.add(0.9, optimizer="sam", rho=rho, validation=validation)
    outcomes = summarize(sweep.folder).rows[0].optimizers
    assert outcomes["sam"].validation == {0.05: Interval(0.7, None, 1), 0.1: Interval(0.8, None, 1)}
    assert outcomes["sgd"].validation == {}


def test_the_figure_shows_the_best_rho_where_several_were_tried_and_a_curve_a_condition(
    tmp_path: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(sys.modules[by_width.__module__], "save", lambda figure, path: drawn.append(figure))
    for noise in (0.0, 0.5):
        sweep.add(0.9, optimizer="sgd", label_noise=noise)
        for rho in (0.05, 0.1):
            sweep.add(0.9, optimizer="sam", rho=rho, validation=0.9 + rho, label_noise=noise)
    by_width(summarize(sweep.folder), tmp_path / "figure.png")
    improvement, best = drawn[0].axes
    assert [line.get_ydata().tolist() for line in best.lines] == [[0.1], [0.1]]
    assert [line.get_label() for line in improvement.lines[1:]] == ["SAM, label noise 0", "SAM, label noise 0.5"]


def test_rows_are_ordered_by_width_and_json_holds_the_report(sweep: Sweep) -> None:
    for width in (32, 8):
        sweep.add(0.9, optimizer="sgd", width=width, sharpness=1.0 if width == 8 else None)
    found = summarize(sweep.folder)
    assert [row.width for row in found.rows] == [8, 32]
    assert found.unmeasured == ("sgd-w32-s0",)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["rows"][0]["optimizers"]["sgd"]["sharpness"] == {"mean": 1.0, "half_width": None, "n": 1}


def test_a_geometric_mean_and_its_interval_are_those_of_scipy() -> None:
    values = np.exp(np.random.default_rng(0).normal(-2, 3, size=6))
    found = Geometric.of(values.tolist())
    low, high = stats.t.interval(0.95, 5, loc=np.log(values).mean(), scale=stats.sem(np.log(values)))
    assert found is not None and found.n == 6 and found.zeros == 0
    assert found.mean == pytest.approx(stats.gmean(values), rel=1e-12)
    assert (found.low, found.high) == (pytest.approx(np.exp(low), rel=1e-12), pytest.approx(np.exp(high), rel=1e-12))


def test_a_geometric_mean_has_no_interval_for_one_seed_and_none_at_all_where_a_value_is_zero() -> None:
    assert Geometric.of([]) is None
    assert Geometric.of([4.0]) == Geometric(pytest.approx(4.0), None, None, 1, 0)
    assert Geometric.of([1.0, 0.0, 2.0]) == Geometric(None, None, None, 3, 1)
    assert Comparison.of([]) is None
    for pair in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (-1.0, -2.0)):
        assert Comparison.of([pair, (1.0, 2.0)]) == Comparison(Geometric(None, None, None, 2, 1), None)


def test_intervals_beyond_the_range_of_a_float_stay_numbers() -> None:
    found = Geometric.of([1e-300, 1e300])
    assert found is not None and found.low == 0 and found.high is not None and np.isfinite(found.high)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.2, 0.3, 0.25], "smaller"),
        ([4.0, 3.0, 5.0], "larger"),
        ([0.2, 0.3, 5.0], "not told apart"),
        ([1.0, 1.0, 1.0], "not told apart"),
        ([0.01], None),
    ],
)
def test_the_verdict_is_that_of_a_t_test_on_the_log_ratios(ratios: list[float], verdict: str | None) -> None:
    found = Comparison.of([(3 * ratio, 3.0) for ratio in ratios])
    assert found is not None and found.verdict == verdict
    if len(set(ratios)) > 1:
        p = stats.ttest_1samp(np.log(ratios), 0).pvalue
        assert (p < 0.05) == (verdict != "not told apart")


def test_quantities_of_minima_are_compared_in_pairs_of_seeds_that_have_both(sweep: Sweep) -> None:
    generator = np.random.default_rng(1)
    values = {name: np.exp(generator.normal(size=(4, 4))) for name in ("sgd", "sam")}  # [seed, quantity]
    for name, seeds in (("sgd", [0, 1, 2, 3]), ("sam", [3, 2, 1, 0])):  # in another order
        for seed in seeds:
            a, *spread = values[name][seed].tolist()
            converged = (name, seed) != ("sam", 3)  # what did not converge was not measured
            choices = {"optimizer": name, "seed": seed, "converged": converged}
            sweep.add(0.9, sharpness=a, spread=dict(zip("234", spread, strict=True)), **choices)
    sweep.add(0.9, optimizer="sam", seed=4, sharpness=1e9)  # without a base of its seed
    found = summarize(sweep.folder)
    sgd, sam = (found.rows[0].optimizers[name] for name in ("sgd", "sam"))
    assert not sgd.comparisons and list(sam.comparisons) == ["a", "s_2", "s_3", "s_4"]
    for column, (name, comparison) in enumerate(sam.comparisons.items()):
        seeds = slice(0, 4 if name == "a" else 3)
        logs = np.log(values["sam"][seeds, column] / values["sgd"][seeds, column])
        low, high = stats.t.interval(0.95, len(logs) - 1, loc=logs.mean(), scale=stats.sem(logs))
        ratio = comparison.ratio
        assert ratio.n == len(logs)
        expected = [pytest.approx(np.exp(end), rel=1e-12) for end in (logs.mean(), low, high)]
        assert [ratio.mean, ratio.low, ratio.high] == expected
    assert sgd.nonuniformity["3"] == Interval.of(values["sgd"][:, 2].tolist())
    assert sgd.geometric["s_4"].mean == pytest.approx(stats.gmean(values["sgd"][:, 3]))
    assert found.without_moments == ("sam-rho0.2-w8-s3", "sam-rho0.2-w8-s4") and found.unmeasured == ()
    outcome = json.loads(json.dumps(found.to_json(), allow_nan=False))["rows"][0]["optimizers"]["sam"]
    assert outcome["comparisons"]["s_2"]["ratio"]["n"] == 3 and outcome["nonuniformity"]["4"]["n"] == 3


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
    assert "not told apart" in shown and "smaller" in shown
    assert "no ratio:" in shown and "0 in 1 of 5 pairs" in shown
    assert "Each of the 7 verdicts on ratios is at 95 % by itself." in shown

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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("result.json", "{}", "a result.json that no run wrote"),
        ("result.json", '{"final": 3}', "a result.json that no run wrote"),
        ("result.json", "{", "result.json must be a JSON file"),
        ("sharpness.json", '{"eigenvalues": {"which": "LA", "converged": true}}', "is not a measurement"),
        ("sharpness.json", '{"moments": {"unit": "sample", "converged": true}}', "is not a measurement"),
        ("sharpness.json", '{"moments": 3}', "is not a measurement"),
        ("sharpness.json", "[]", "sharpness.json must hold a JSON object"),
        ("config.json", "{}", "config.json must hold the field 'task'"),
    ],
)
def test_damaged_files_are_refused_by_name(sweep: Sweep, name: str, text: str, message: str) -> None:
    sweep.add(0.9, optimizer="sgd")
    (sweep.folder / "sgd-w8-s0" / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        summarize(sweep.folder)


def test_a_sweep_without_a_finished_run_has_no_report(sweep: Sweep) -> None:
    sweep.add(None, optimizer="sgd")
    with pytest.raises(ValueError, match="must hold a finished run; repeat its sweep"):
        summarize(sweep.folder)


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
    by_width(found, tmp_path / f"figure{suffix}")
    assert (tmp_path / f"figure{suffix}").read_bytes().startswith(head)


def test_a_figure_of_nothing_or_of_no_known_format_is_refused(tmp_path: Path, found: Report, sweep: Sweep) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="figure must end in a format such as .png or .pdf"):
        by_width(found, tmp_path / "figure.docx")
    with pytest.raises(ValueError, match="a figure needs SAM and its base optimizer"):
        by_width(Report("digits", "accuracy", True, (), (), (), ()), tmp_path / "figure.png")


def test_the_figure_has_a_panel_for_each_quantity_with_geometric_means(
    tmp_path: Path, measured: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(sys.modules[by_width.__module__], "save", lambda figure, path: drawn.append(figure))
    found = summarize(measured.folder)
    by_width(found, tmp_path / "figure.png")
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
    by_width(summarize(sweep.folder), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_quantity_that_is_zero_everywhere_leaves_its_panel_empty(tmp_path: Path, sweep: Sweep) -> None:
    pytest.importorskip("matplotlib")
    for optimizer in ("sgd", "sam"):
        sweep.add(0.9, optimizer=optimizer, sharpness=0.0, spread={"2": 0.0, "3": 1.0, "4": 1e-9})
    by_width(summarize(sweep.folder), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("count", "text"), [(587, "587"), (2563, "2.6k"), (14307, "14k"), (99841, "100k"), (5366010, "5.4M"), (3e9, "3.0B")]
)
def test_numbers_of_parameters_are_shortened(count: float, text: str) -> None:
    assert count_in_short(count) == text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("parameters", "587", "parameters must be an integer >= 1, got '587'"),
        ("parameters", 10**400, "parameters must be an integer >= 1, got 1000000"),
        ("parameters", 0, "parameters must be an integer >= 1, got 0"),
        ("interpolates", 1, "interpolates must be true or false, got 1"),
        ("final", [], "final must be an object, got []"),
        ("final.test_metric", None, "final.test_metric must be a number, got None"),
        ("final.test_metric", True, "final.test_metric must be a number, got True"),
        ("final.test_metric", 1e200, "final.test_metric must be a number, got 1e+200"),  # its square is not
        ("final.validation_loss", [1], "final.validation_loss must be a number, got [1]"),
        ("best.test_metric", {"a": 1}, "best.test_metric must be a number, got {'a': 1}"),
        ("best", {}, "it must hold the field best.test_metric"),
    ],
)
def test_a_result_is_refused_by_file_and_field(sweep: Sweep, field: str, value: Any, message: str) -> None:
    sweep.add(0.9, optimizer="sgd")
    path = sweep.folder / "sgd-w8-s0" / "result.json"
    document = json.loads(path.read_text())
    *parents, last = field.split(".")
    place = document[parents[0]] if parents else document
    place[last] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError) as error:
        summarize(sweep.folder)
    text = str(error.value)
    assert str(path.parent) in text and "result.json" in text and message in text


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"eigenvalues": {"values": []}}, "eigenvalues.values must be a list of numbers, got []"),
        ({"eigenvalues": {"values": [None]}}, "eigenvalues.values must be a list of numbers, got [None]"),
        ({"eigenvalues": {"values": 2.0}}, "eigenvalues.values must be a list of numbers, got 2.0"),
        ({"eigenvalues": {"converged": "yes"}}, "eigenvalues.converged must be true or false, got 'yes'"),
        ({"eigenvalues": {"complete": 0}}, "eigenvalues.complete must be true, false or null, got 0"),
        ({"eigenvalues": {"which": None}}, "eigenvalues.which must be text, got None"),
        (
            {"moments": {"nonuniformity": {"two": 1}}},
            "moments.nonuniformity must be numbers >= 0",
        ),
        ({"moments": {"nonuniformity": {"2": None}}}, "nonuniformity.2 must be a number >= 0, got None"),
        ({"moments": {"nonuniformity": {"2": -1}}}, "moments.nonuniformity must be numbers >= 0"),
        ({"moments": {"converged": 1}}, "moments.converged must be true or false, got 1"),
        ({"ggn": 3}, "ggn must be an object, got 3"),
        ({"ggn": {"eigenvalues": {"values": "x"}}}, "ggn.eigenvalues.values must be a list of numbers"),
    ],
)
def test_a_measurement_is_refused_by_file_and_field(sweep: Sweep, document: Any, message: str) -> None:
    sweep.add(0.9, optimizer="sgd", sharpness=2.0, spread={"2": 1.0})
    path = sweep.folder / "sgd-w8-s0" / "sharpness.json"
    whole = json.loads(path.read_text())
    for name, change in document.items():
        whole[name] = {**whole[name], **change} if name in whole else change
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError) as error:
        summarize(sweep.folder)
    assert f"{path} is not a measurement" in str(error.value) and message in str(error.value)
