from typing import Any

import pytest

from samlite.documents import BY_ORDER, COUNT, GAPPED, NUMBER, NUMBERS, POSITIVE, SWITCH, TEXT, Shape, check

SHAPE: Shape = {"name": TEXT, "n": COUNT, "end": {"loss": NUMBER}, "spread": {"*": POSITIVE}}


def test_a_document_of_the_shape_is_returned_as_it_is() -> None:
    document = {"name": "a", "n": 1, "end": {"loss": -0.5}, "spread": {"2": 0.0}, "more": object()}
    assert check(document, SHAPE, ["name", "end.loss"]) is document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], r"it must be an object, got \[\]"),
        ({"name": 3}, "name must be text, got 3"),
        ({"n": True}, "n must be an integer >= 1, got True"),
        ({"end": {"loss": 1e200}}, r"end.loss must be a number, got 1e\+200"),
        ({"end": 3}, "end must be an object, got 3"),
        ({"spread": {"2": -1}}, "spread.2 must be a number >= 0, got -1"),
        ({"name": "a"}, "it must hold the field end.loss"),
    ],
)
def test_the_first_field_that_is_wrong_is_named(document: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(document, SHAPE, ["name", "end.loss"])


def test_kinds_hold_what_they_say() -> None:
    assert NUMBERS.holds([1, 2.5]) and not NUMBERS.holds([]) and not NUMBERS.holds([None])
    assert GAPPED.holds([1, None]) and not GAPPED.holds(["1"])
    assert BY_ORDER.holds({"2": 1.0, "3": None}) and not BY_ORDER.holds({"two": 1})
    assert SWITCH.holds(False) and not SWITCH.holds(0)
