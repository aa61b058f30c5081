"""A process that runs cells of a sweep, one after the other: ``python -m samlite.sweep.cell``.

It is started in the folder of the sweep. Each line of its standard input is a cell to run, or several that are trained
as one batched network, ``{"cells": [configs], "measure": [names]}``, and each line that it writes is
``{"failures": {cell: why}}``. When its input closes, it ends at once: whoever started it has ended, or needs no more.
"""

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from samlite.errors import in_one_line
from samlite.training.batched import train_batched
from samlite.training.config import Config
from samlite.training.loop import train
from samlite.training.measurements import is_measured, measure_run


def run_cell(cell: Config, folder: Path, measure: Collection[str]) -> None:
    """Train and measure a cell in this folder, as far as that is not done."""
    for _ in train(cell, folder):
        pass
    if is_measured(folder, measure):
        return
    torch.set_num_threads(cell.threads)
    measure_run(folder, "moments" in measure)
    if not is_measured(folder, measure):
        more = " --moments" if "moments" in measure else ""
        raise RuntimeError(f"the measurement did not converge; try: samlite sharpness {folder}{more} --tol 1e-2")


def run_cells(cells: Sequence[Config], measure: Collection[str]) -> dict[str, str]:
    """Train and measure cells in the current folder, several as one batch; returns why some failed, by their names."""
    failures = {}
    if len(cells) > 1:
        torch.set_num_threads(cells[0].threads)
        for cell, result in train_batched(cells, Path()):
            if isinstance(result, str):
                failures[cell.name] = result
    for cell in cells:
        if cell.name not in failures:
            try:
                run_cell(cell, Path(cell.name), measure)
            except Exception as error:
                failures[cell.name] = _reason(error)
    return failures


def _reason(error: Exception) -> str:
    return traceback.format_exc() if os.environ.get("SAMLITE_DEBUG") == "1" else in_one_line(error)


def main() -> None:
    """Run the cells that come in, until no more can."""
    requests: queue.Queue[str] = queue.Queue()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever libraries print is no answer
    threading.Thread(target=_listen, args=[requests], daemon=True).start()
    while True:
        request = json.loads(requests.get())
        cells = [Config.from_json(cell, "a cell") for cell in request["cells"]]
        try:
            failures = run_cells(cells, request["measure"])
        except Exception as error:  # of a batch
            failures = {cell.name: _reason(error) for cell in cells}
        answers.write(json.dumps({"failures": failures}) + "\n")
        answers.flush()


def _listen(requests: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(1)


if __name__ == "__main__":
    main()
