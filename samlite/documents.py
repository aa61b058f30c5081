"""What the fields of a JSON document must hold: numbers that mean something, names, lists."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from samlite.errors import UsageError
from samlite.files import described

LARGEST = 1e150  # of a number: its square is finite


@dataclass(frozen=True)
class Kind:
    """What a field may hold, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


Shape = Kind | dict[str, "Shape"]  # of an object: a shape for each field, and one for "*", every other one


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _are_numbers(value: Any, *, gaps: bool) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_number(v) or (gaps and v is None) for v in value)


def _are_by_order(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name.isdecimal() and len(name) < 3 and (each is None or (_is_number(each) and each >= 0))
        for name, each in value.items()
    )


TEXT = Kind("text", lambda value: isinstance(value, str))
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
ANSWER = Kind("true, false or null", lambda value: value is None or isinstance(value, bool))
NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a number >= 0", lambda value: _is_number(value) and value >= 0)
COUNT = Kind("an integer >= 1", lambda value: _is_whole(value, 1))
AMOUNT = Kind("an integer >= 0", lambda value: _is_whole(value, 0))
NUMBERS = Kind("a list of numbers", lambda value: _are_numbers(value, gaps=False))
GAPPED = Kind("a list of numbers or nulls", lambda value: _are_numbers(value, gaps=True))
MAYBE = Kind("a number or null", lambda value: value is None or _is_number(value))
BY_ORDER = Kind("numbers >= 0 or null by their order", _are_by_order)


def check(document: Any, shape: Shape, needed: Iterable[str] = ()) -> dict[str, Any]:
    """A JSON object of this shape that has the fields needed; ValueError names the first that is wrong."""
    _check(document, shape)
    for name in needed:
        place = document
        for part in name.split("."):
            if part not in place:
                raise UsageError(f"it must hold the field {name}")
            place = place[part]
    checked: dict[str, Any] = document
    return checked


def _check(value: Any, shape: Shape, *place: str) -> None:
    name = ".".join(place) or "it"
    if isinstance(shape, Kind):
        if not shape.holds(value):
            raise UsageError(f"{name} must be {shape.words}, got {described(value)}")
        return
    if not isinstance(value, dict):
        raise UsageError(f"{name} must be an object, got {described(value)}")
    for field, each in value.items():
        if inner := shape.get(field, shape.get("*")):
            _check(each, inner, *place, field)
