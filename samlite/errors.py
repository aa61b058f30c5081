"""Errors, and what a user is told of them."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires


class UsageError(ValueError):
    """An argument, a file, a model or data cannot be used; the message names it, the rule, the value and the fix."""


def in_one_line(error: BaseException) -> str:
    """What a user is told of an error; of a bug, that it is one."""
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        text = f"{error.strerror}{place}" if error.strerror else str(error)
    elif isinstance(error, UsageError | ImportError | MemoryError | RuntimeError) and type(error) is not RecursionError:
        text = str(error)
    else:
        text = f"internal error: {type(error).__name__}: {error}; SAMLITE_DEBUG=1 shows where"
    return " ".join(text.split()) or type(error).__name__


def shortened(names: Sequence[str], most: int) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def require(condition: bool, message: str) -> None:
    """Raise UsageError with this message unless the condition holds."""
    if not condition:
        raise UsageError(message)


def missing(what: str, needs: str, extra: str) -> ImportError:
    """The error for a package that an optional part needs and that is not installed: it says how to get it."""
    return ImportError(f"{what} needs {needs}: {install_command(extra)}")


def install_command(extra: str) -> str:
    """What installs the packages of an extra, wherever this package came from."""
    try:
        known = requires("samlite") or []
    except PackageNotFoundError:  # a source folder on the path
        known = []
    packages = [
        name.strip() for name, _, condition in (line.partition(";") for line in known) if extra in _words(condition)
    ]
    return f"pip install {' '.join(f'{name!r}' for name in packages)}" if packages else f"pip install '.[{extra}]'"


def _words(condition: str) -> list[str]:
    """Those in quotation marks in a condition such as: extra == "data"."""
    return condition.replace("'", '"').split('"')[1::2]
