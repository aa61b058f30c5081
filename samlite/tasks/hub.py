"""Data sets of the Hugging Face hub, or folders of files in their formats."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def open_splits(source: str | None, task: str, extra: str, names: Sequence[str], columns: Sequence[str]) -> list[Any]:
    """The named splits of what `datasets.load_dataset` reads from a hub id or a folder, each with these columns.

    Raises ImportError that names the extra of this package, and ValueError that names the broken file, or the split or
    column that is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"task {task} needs datasets: pip install 'samlite[{extra}]'") from error
    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):  # what matters is in the exception
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        splits = datasets.load_dataset(source)
    except Exception as error:  # the hub, the file system and the parsers each raise their own kinds
        reason = _broken_file(Path(str(source))) or (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load {task} from {source!r}: {reason}") from error
    for name in names:
        if name not in splits:
            raise ValueError(f"{source} has no split {name!r}, only {', '.join(map(repr, splits))}")
        for column in columns:
            if column not in (found := splits[name].column_names):
                raise ValueError(f"{source}, split {name!r}: no column {column!r}, only {', '.join(map(repr, found))}")
        if not len(splits[name]):
            raise ValueError(f"{source}, split {name!r}: no rows")
    return [splits[name] for name in names]


def _broken_file(folder: Path) -> str | None:
    from pyarrow import parquet  # type: ignore[import-untyped]

    for path in sorted(folder.glob("**/*.parquet")):
        try:
            parquet.read_metadata(path)
        except Exception:
            return f"{path.name} is truncated or not a parquet file"
    return None
