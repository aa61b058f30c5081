"""Paths and values that a user gives, whatever they are.

Only regular files are read and replaced: opening a named pipe waits for its other end, a device may never end, and
renaming over either destroys it.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Any

from samlite.errors import UsageError

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
