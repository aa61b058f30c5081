"""The JSON documents of runs and sweeps: what each is called, what its fields hold, and the only way to read them.

A reader checks every field that it knows, and that those its caller needs are there. Its errors name file and field.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samlite.errors import UsageError
from samlite.files import described, regular
from samlite.training.checkpoints import parse_json, read_json
from samlite.training.config import Config

CONFIG, RESULT, RECORDS, SHARPNESS = "config.json", "result.json", "metrics.jsonl", "sharpness.json"  # of a run
SWEEP = "sweep.json"
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
BY_ORDER = Kind("numbers >= 0 or null by their order", _are_by_order)

_RESULT: Shape = {
    "metric": TEXT,
    "final": {"*": NUMBER},
    "best": {"epoch": COUNT, "*": NUMBER},
    "interpolates": SWITCH,
    "parameters": COUNT,
    "epochs": COUNT,
    "gradient_evaluations": AMOUNT,
    "seconds": POSITIVE,
}
_RECORD: Shape = {
    "epoch": COUNT,
    "train_loss": NUMBER,
    "train_metric": NUMBER,
    "validation_loss": NUMBER,
    "validation_metric": NUMBER,
    "lr": POSITIVE,
    "steps": AMOUNT,
    "gradient_evaluations": AMOUNT,
    "seconds": POSITIVE,
    "eigenvalues": GAPPED,
    "products": AMOUNT,
}
_MEASUREMENT: dict[str, Shape] = {
    "eigenvalues": {"which": TEXT, "values": NUMBERS, "errors": GAPPED, "converged": SWITCH, "complete": ANSWER},
    "moments": {"unit": TEXT, "converged": SWITCH, "nonuniformity": BY_ORDER},
}
_SHARPNESS: Shape = {**_MEASUREMENT, "ggn": _MEASUREMENT}
_NEEDED = {"eigenvalues": ("which", "values", "converged", "complete"), "moments": ("unit", "converged")}


def read_config(folder: Path) -> Config:
    """Read what a run was told. Raises UsageError."""
    return Config.from_json(read_json(folder / CONFIG), folder / CONFIG)


def read_cells(folder: Path) -> list[Config]:
    """Read the cells of a sweep. Raises UsageError where the folder holds none."""
    path = folder / SWEEP
    if not path.exists():
        raise UsageError(f"{folder} must be the folder of a sweep, but it has no {SWEEP}")
    cells = read_json(path).get("cells")
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise UsageError(f"{path} must hold a list of cells")
    return [Config.from_json(cell, path) for cell in cells]


def read_result(folder: Path, *needed: str) -> dict[str, Any]:
    """Read the result of a run, with these fields in it; "final.test_metric" is within "final". Raises UsageError."""
    found = read_json(folder / RESULT)
    try:
        return check(found, _RESULT, needed)
    except UsageError as error:
        raise UsageError(
            f"{folder} has a {RESULT} that no run wrote ({error}); delete it and repeat the command of the run"
        ) from None


def read_records(folder: Path, *needed: str) -> list[dict[str, Any]]:
    """Read the records of a run, one an epoch, with these fields in each. Raises UsageError where there are none."""
    path = folder / RECORDS
    try:
        lines = regular(path).read_text(encoding="utf-8-sig").splitlines()
        return check_records([parse_json(line) for line in lines], *needed)
    except (FileNotFoundError, UsageError, UnicodeError) as error:
        raise UsageError(f"{path} must hold the records of a run, a line an epoch ({error})") from None


def check_records(records: Any, *needed: str) -> list[dict[str, Any]]:
    """The records of a run's epochs, unless something is wrong with them, which ValueError says."""
    if not isinstance(records, list) or not records:
        raise UsageError("there must be one at least")
    for epoch, record in enumerate(records, 1):
        try:
            check(record, _RECORD, needed)
        except UsageError as error:
            raise UsageError(f"of epoch {epoch}: {error}") from None
        if record.get("epoch", epoch) != epoch:
            raise UsageError(f"of epoch {epoch}: epoch must count up from 1, got {record['epoch']}")
    for name in ("steps", "gradient_evaluations"):
        counts = [record[name] for record in records if name in record]
        if any(after <= before for before, after in zip(counts, counts[1:], strict=False)):
            raise UsageError(f"{name} must grow from epoch to epoch")
    if len({len(record.get("eigenvalues", ())) for record in records}) > 1:
        raise UsageError("eigenvalues must be as many in every epoch")
    return records


def read_sharpness(folder: Path) -> dict[str, Any]:
    """Read what was measured of a run; empty where nothing was. Raises UsageError."""
    path = folder / SHARPNESS
    if not path.exists():
        return {}
    found = read_json(path)
    try:
        check(found, _SHARPNESS)
        for measured in (found, found.get("ggn", {})):
            for name, fields in _NEEDED.items():
                check(measured, {}, [f"{name}.{field}" for field in fields if name in measured])
            if measured.get("moments", {}).get("converged"):
                check(measured["moments"], {"nonuniformity": {"*": POSITIVE}}, ["nonuniformity"])
        return found
    except UsageError as error:
        raise UsageError(f"{path} is not a measurement ({error}); delete it and measure again") from None


def check(document: Any, shape: Shape, needed: Iterable[str] = ()) -> dict[str, Any]:
    """A JSON object of this shape that has the fields needed; ValueError names the first that is wrong."""
    _check(document, shape)
    for name in needed:
        found = document
        for part in name.split("."):
            if part not in found:
                raise UsageError(f"it must hold the field {name}")
            found = found[part]
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
