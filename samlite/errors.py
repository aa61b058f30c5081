"""Errors, and what a user is told of them."""


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


def require(condition: bool, message: str) -> None:
    """Raise UsageError with this message unless the condition holds."""
    if not condition:
        raise UsageError(message)
