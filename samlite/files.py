"""Files: regular ones only, locked, written beside and renamed into place; and JSON in them.

A process that dies at any moment, or a machine that loses power, leaves each file whole: the old one or the new one.
Opening a named pipe waits for its other end, a device may never end, and renaming over either destroys it.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from samlite.errors import UsageError

PATIENCE = 5.0  # seconds to wait for a folder: a killed sweep's last cells need a moment to end
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular(path: Path) -> Path:
    """Return the path if there is a file that can be read to its end.

    Raises FileNotFoundError, IsADirectoryError, and ValueError for a pipe, a socket or a device.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} must be a regular file, got {_KINDS.get(stat.S_IFMT(mode), 'something else')}")
    return path


def replaceable(path: Path) -> Path:
    """Return the path if a file may be written there: nothing is there, or a regular file. Raises as `regular`."""
    try:
        return regular(path)
    except FileNotFoundError:
        return path


def regular_tree(folder: Path) -> None:
    """Raise UsageError where a folder holds something else than folders and regular files, but for hidden ones."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.exists(path := Path(parent, name)):
                regular(path)


def described(value: Any) -> str:
    """A value in so few characters that a line has room for it."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deeply, or an integer of thousands of digits
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process alone, creating it. The lock ends with its process, however it ends.

    Raises BlockingIOError where another process holds the folder.
    """
    claim = claimed(folder / ".lock", PATIENCE)
    if claim is None:
        raise BlockingIOError(f"{folder} is in use by another process; wait for it or choose another folder")
    with claim:
        yield


def claimed(path: Path, patience: float = 0) -> BaseFileLock | None:
    """A lock of this path that is held until it is released, or its process ends; None where another one holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(replaceable(path), timeout=patience)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what was written there takes the place of `path` in one step.

    Where that fails, `path` stays as it was and nothing is left beside it. Of several processes one writes after the
    other. Raises UsageError unless `path` is a regular file or not there.
    """
    replaceable(path)
    beside = path.with_name(f".{path.name}.new")
    try:
        with _alone_at(beside):
            try:
                yield beside
                _sync(beside)
                os.replace(beside, path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
    except OSError as error:
        if error.errno:
            error.filename = str(path)  # a full disk does not say which file
        raise
    _sync(path.parent)


@contextmanager
def _alone_at(path: Path) -> Iterator[None]:
    """Hold a file for this process alone, creating it; what is there of a process that was killed does not matter.

    filelock does not notice that the file which it has locked was renamed meanwhile.
    """
    import fcntl  # which Windows has not

    while True:
        with suppress(FileNotFoundError):  # renamed by another one meanwhile
            if not stat.S_ISREG(os.lstat(path).st_mode):
                path.unlink()
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            there = False
            with suppress(FileNotFoundError):
                there = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            if there:  # not renamed meanwhile
                yield
                return


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file in one step."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_lines(path: Path, documents: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON objects, one a line, in one step."""
    write_text(path, "".join(json.dumps(document, allow_nan=False) + "\n" for document in documents))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UsageError where the file holds anything else."""
    regular(path)
    try:
        document = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UsageError(f"{path} must be a JSON file, but it cannot be read ({error})") from None
    if not isinstance(document, dict):
        raise UsageError(f"{path} must hold a JSON object, got {type(document).__name__}")
    return document


def parse_json(text: str) -> Any:
    """Parse a JSON document as the standard has it: no NaN, no infinity, no field twice. Raises UsageError."""
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_fields)
    except RecursionError:
        raise UsageError("it is nested too deeply") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise UsageError(f"a number must be finite, got {text[:40]}")
    return number


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise UsageError(f"the field {twice!r} is there twice")
    return fields
