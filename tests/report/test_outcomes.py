import json
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sweeps import Sweep

from samlite.intervals import Interval
from samlite.report.outcomes import summarize

SGD = [0.90, 0.92, 0.91]
SAM = [0.93, 0.92, 0.94]


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


def test_rows_are_ordered_by_width_and_json_holds_the_report(sweep: Sweep) -> None:
    for width in (32, 8):
        sweep.add(0.9, optimizer="sgd", width=width, sharpness=1.0 if width == 8 else None)
    found = summarize(sweep.folder)
    assert [row.width for row in found.rows] == [8, 32]
    assert found.unmeasured == ("sgd-w32-s0",)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["rows"][0]["optimizers"]["sgd"]["sharpness"] == {"mean": 1.0, "half_width": None, "n": 1}


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
