"""Data sets of the Hugging Face hub, or folders of files in their formats."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samlite.errors import UsageError, missing
from samlite.files import regular, regular_tree


def load(source: str | None, task: str, extra: str, names: Sequence[str]) -> Any:
    """What `datasets.load_dataset` reads from a hub id or a folder, with the splits of these names in it.

    Raises ImportError that names the extra of this package, and ValueError that says what is wrong with which file, or
    which split is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise missing(f"task {task}", "datasets", extra) from error
    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):  # what matters is in the exception
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if source and Path(source).exists():
        (regular_tree if Path(source).is_dir() else regular)(Path(source))
    try:
        splits = datasets.load_dataset(source)
    except Exception as error:  # the hub, the file system and the parsers each raise their own kinds
        reason = _broken_file(Path(str(source))) or _first_line(error)
        raise UsageError(f"cannot load {task} from {source!r}: {reason}") from error
    for name in names:
        if name not in splits:
            raise UsageError(f"{source} has no split {name!r}, only {', '.join(map(repr, splits))}")
    return splits


def open_splits(source: str | None, task: str, extra: str, names: Sequence[str], columns: Sequence[str]) -> list[Any]:
    """The splits of these names, each with these columns and some rows; ValueError names what is missing."""
    splits = load(source, task, extra, names)
    for name in names:
        for column in columns:
            if column not in (known := splits[name].column_names):
                raise UsageError(f"{source}, split {name!r}: no column {column!r}, only {', '.join(map(repr, known))}")
        if not len(splits[name]):
            raise UsageError(f"{source}, split {name!r}: no rows")
    return [splits[name] for name in names]


def _first_line(error: BaseException) -> str:
    while error.__cause__:  # `datasets` wraps what went wrong in less and less
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _broken_file(folder: Path) -> str | None:
    from pyarrow import parquet  # type: ignore[import-untyped]

    for path in sorted(folder.glob("**/*.parquet")):
        try:
            rows = parquet.read_metadata(path).num_rows
        except Exception:
            return f"{path.name} is truncated or not a parquet file"
        if not rows:
            return f"{path.name} has no rows"
    return None
