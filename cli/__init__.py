"""The terminal: one command a file, each importing what is heavy only when it runs."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = "Error: interrupted; repeat the command to continue\n"
PATIENCE = 4.0  # seconds after Ctrl-C in which the program must have ended

try:
    from samlite.cli.commands import cli, run
except KeyboardInterrupt:
    sys.stderr.write(INTERRUPTED)
    sys.exit(130)

__all__ = ["cli", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; whatever goes wrong becomes one line."""
    try:
        with _ended_by_ctrl_c():
            run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write(INTERRUPTED)
        sys.exit(130)


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C, once more where a library swallows it, and end the process if nothing helps.

    Imports are finished first: the C++ part of torch swallows what is raised meanwhile, or aborts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as in background jobs
        yield
        return

    pressed: list[float] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        pressed.append(time.monotonic())
        if pressed[-1] - pressed[0] >= PATIENCE:
            sys.stderr.write(INTERRUPTED)
            sys.stderr.flush()
            os._exit(130)
        importing = _is_importing(frame)
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.05 if importing else PATIENCE / 2)
        if not importing:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if pressed:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None
