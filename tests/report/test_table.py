import math

import pytest

from samlite.intervals import Comparison, Interval
from samlite.report.table import Table, comparison, interval, number


def test_markdown_has_the_title_above_and_the_notes_below_and_aligns_numbers_right() -> None:
    rows = [["8", "sgd", "1 (0.5 to 2)\nsmaller"], ["8", "sam", "–"]]
    table = Table("by width", [">width", "optimizer", "a"], rows, keys=1, notes=["One.", "Two."])
    assert table.markdown().splitlines() == [
        "by width:",
        "",
        "| width | optimizer | a |",
        "| ---: | --- | --- |",
        "| 8 | sgd | 1 (0.5 to 2) smaller |",
        "| 8 | sam | – |",
        "",
        "One. Two.",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (Interval(0.95123, None, 1), "95.12"),
        (Interval(0.95123, 0.00123, 3), "95.12 ± 0.12"),
        (Interval(0.9, 0.1, 3), "90 ± 10"),
        (Interval(0.9, 0.0, 3), "90.000 ± 0.000"),
        (Interval(1e-9, 1e-10, 3), "1e-07 ± 1e-08"),
    ],
)
def test_an_interval_has_two_digits_of_its_half_width(value: Interval | None, text: str) -> None:
    assert interval(value, 100) == text


def test_a_comparison_has_the_ratio_its_interval_and_the_verdict() -> None:
    pairs = [(0.3, 1.0), (0.31, 1.0), (0.29, 1.0)]
    assert comparison(Comparison.of(pairs)) == "0.30 (0.28 to 0.33)\nsmaller"
    assert comparison(Comparison.of(pairs), narrow=True) == "0.30\n(0.28 to 0.33)\nsmaller"
    assert comparison(Comparison.of([(1.0, 2.0)])) == "0.50"
    assert comparison(Comparison.of([(0.0, 2.0), (1.0, 1.0)])) == "no ratio:\n0 in 1 of 2 pairs"
    assert comparison(Comparison.of([(1.0, 2.0), (2.0, 1.0)])).endswith("no significant\ndifference")
    assert comparison(None) == number(None) == "–" and number(math.pi) == "3.1"
