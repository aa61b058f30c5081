"""A data set as a stream of batches: the same ones in every pass, a pair of tensors cut as memory asks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

from torch import Tensor

from samlite.batches import described, is_pair, rows, samples
from samlite.curvature.untouched import Draws
from samlite.errors import UsageError

PROBE = 64  # rows that are evaluated to check the function and to size its graph
_CHUNK = 1024  # rows of a pair of tensors that are differentiated together, where their graph fits
_GRAPH = 2**28  # bytes of the graph of such a chunk: larger graphs are returned to the system on every free

Data = tuple[Tensor, Tensor] | Iterable[Any]


class End:
    """Stands behind the last batch: a data set may hold None."""


class Stream:
    """The batches of a data set.

    Args:
        data: an (inputs, targets) pair of tensors, cut into chunks of ``chunk`` rows, or a re-iterable of batches.
    """

    def __init__(self, data: Data) -> None:
        self.data = checked_data(data)
        self.index = 0  # of the batch that comes next; -1 where batches are not those of the stream
        self.whole()
        self._stream: Iterator[Any] = iter(())
        self._passes = 0
        self._draws: Draws | None = None

    def whole(self) -> None:
        """Leave a pair of tensors in one chunk."""
        self.cut(len(self.data[0]) if is_pair(self.data) else 0)

    def cut(self, rows: int, single: bool = False) -> None:
        """Cut a pair of tensors into chunks of so many rows; `single` gives every sample as a batch of its own."""
        self.chunk = rows
        self.single = single
        self.weights: list[float] = []  # of the batches that were evaluated so far

    def fit(self, measure: Callable[[Any], int], memory: int) -> None:
        """Cut a pair of tensors into as many rows a chunk as fit into the memory; `measure` gives a batch's bytes."""
        size = len(self.data[0])
        self.cut(min(size, PROBE))
        self.rewind(0)
        bytes_a_row = measure(self.next_batch()) / self.chunk
        self.cut(max(1, min(size, _CHUNK, int(min(memory, _GRAPH) / max(bytes_a_row, 1)))))

    def forget(self) -> None:
        """Let `total` take a batch that is not of the stream."""
        self.weights, self.index = [], -1

    def rewind(self, batch: int) -> None:
        """Go to a batch: `next_batch` gives it."""
        self._passes += 1
        # What draws at random draws otherwise in every pass, so that it shows, and leaves no trace.
        self._draws = None if isinstance(self.data, list | tuple) else Draws(self._passes)
        with self._drawing():
            self._stream = islice(self._batches(), batch, None)
        self.index = batch

    def next_batch(self) -> Any:
        """The batch, or `End` behind the last; `total` must follow."""
        try:
            with self._drawing():
                return next(self._stream, End)
        except Exception as error:  # of whatever the data are
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"data must give all batches, got {reason(error)} at batch {self.index}") from error

    def _drawing(self) -> AbstractContextManager[None]:
        return self._draws.used() if self._draws else nullcontext()

    def _batches(self) -> Iterator[Any]:
        batches: Iterator[Any] = iter(self.data)
        if is_pair(self.data):
            inputs, targets = self.data
            batches = zip(inputs.split(self.chunk), targets.split(self.chunk), strict=True)
        if self.single:
            return (rows(batch, slice(i, i + 1)) for batch in batches for i in range(samples(batch)))
        return batches


def reason(error: BaseException) -> str:
    """An error in one line: its type and its text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def checked_data(data: Any) -> Any:
    """The data, unless they are no (inputs, targets) pair of equal length and no re-iterable: ValueError says so."""
    if isinstance(data, list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        raise UsageError(
            "data must be a tuple (inputs, targets) or a re-iterable of batches, got a list of two tensors; "
            "write (inputs, targets)"
        )
    if is_pair(data):
        inputs, targets = data
        if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets):
            raise UsageError(
                "inputs and targets must have the same number of rows, got shapes "
                f"{tuple(inputs.shape)} and {tuple(targets.shape)}"
            )
        if len(inputs) == 0:
            raise UsageError("data must hold at least one sample, got none")
    elif isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise UsageError(f"data must be a tuple (inputs, targets) or a re-iterable of batches, got {described(data)}")
    elif isinstance(data, Iterator):
        raise UsageError(
            "data must be re-iterable, as every product may pass over it, got an iterator; "
            "pass a list of batches or a DataLoader"
        )
    return data
