"""Where the cells of a sweep run: in processes of this machine, or as jobs of a cluster through submitit.

An engine starts a cell in a subfolder of the sweep, or several that are trained as one batched network, and gives a
handle to what is running.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from samlite.documents import TEXT, check
from samlite.errors import UsageError, missing
from samlite.files import read_json, write_json
from samlite.named import MODULES
from samlite.training.config import Config

COMMAND = [sys.executable, "-m", "samlite.sweep.cell"]  # runs cells
REQUEUES = 1000  # of a job whose time is up; each goes on where the last one stopped
FORGOTTEN = 600.0  # seconds after which a job that slurm does not know has ended; a new one is not listed at once
PATIENCE = 2.0  # seconds that a process has to end before it is killed
NOTICE = 30  # seconds before that at which a job is told, or up to 60 more: a run's files are never far behind


class Running(Protocol):
    """Cells that were started."""

    def ended(self) -> bool: ...

    def failures(self) -> dict[str, str]:
        """Wait for the end, and say in a line why cells failed, by their names; those that did not are not in it."""
        ...

    def stop(self) -> None: ...


class Engine(Protocol):
    def start(self, folder: Path, cells: Sequence[Config], measure: Collection[str]) -> Running: ...

    def close(self) -> None:
        """No more cells will come."""
        ...


class Local:
    """Processes of this machine, which end when the sweep does.

    A process runs one cell after the other, as it takes longer to start than many a cell. One that crashes takes the
    cells with it that it runs, and the next cell gets a new one.

    Args:
        gpus: as CUDA_VISIBLE_DEVICES names them; a cell on device cuda runs on the one with the fewest others.
    """

    def __init__(self, gpus: Sequence[str] = ()) -> None:
        self.gpus = gpus
        self._workers: list[_Worker] = []

    def start(self, folder: Path, cells: Sequence[Config], measure: Collection[str]) -> Running:
        self._workers = [worker for worker in self._workers if worker.alive()]
        gpu = self._free() if self.gpus and cells[0].device == "cuda" else None
        idle = [worker for worker in self._workers if worker.idle and (worker.gpu, worker.folder) == (gpu, folder)]
        worker = idle[0] if idle else _Worker(folder, gpu)
        if not idle:
            self._workers.append(worker)
        return worker.run(cells, measure)

    def _free(self) -> str:
        return min(self.gpus, key=[worker.gpu for worker in self._workers if not worker.idle].count)

    def close(self) -> None:
        for worker in self._workers:
            if worker.idle:
                worker.close()
        self._workers = []


class Cluster:
    """A job for each cell. One that is preempted, or whose time is up, is requeued, and resumes.

    Jobs outlive the process that submitted them: a repeated sweep waits for those that are still there.

    Args:
        kind: "slurm", or "local" for submitit's own processes on this machine.
        partition, gpus: asked of slurm for each cell.
        minutes: the time limit of a job.
    """

    def __init__(
        self, folder: Path, kind: str = "slurm", partition: str | None = None, gpus: int = 0, minutes: int = 60
    ) -> None:
        try:
            import submitit
        except ImportError as error:
            raise missing("engine slurm", "submitit", "cluster") from error
        if minutes < 3:
            raise UsageError(f"minutes must be >= 3, got {minutes}: a job is told up to 90 seconds before its end")
        logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns on standard output, which is for results
        self._jobs, self._job = folder / ".jobs", {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[kind]
        self._executor = submitit.AutoExecutor(self._jobs, cluster=kind, slurm_max_num_timeout=REQUEUES)
        options: dict[str, Any] = {"timeout_min": minutes, "gpus_per_node": gpus, "slurm_signal_delay_s": NOTICE}
        if partition:
            options["slurm_partition"] = partition
        self._executor.update_parameters(name="samlite", **options)

    def start(self, folder: Path, cells: Sequence[Config], measure: Collection[str]) -> Running:
        [cell] = cells
        note = self._jobs / f"{cell.name}.json"
        if earlier := self._earlier(note, measure):
            return _Job(earlier, note)
        self._executor.update_parameters(cpus_per_task=cell.threads)
        job = self._executor.submit(_Cell(folder.resolve(), cell, tuple(measure)))
        write_json(note, {"job": job.job_id, "measure": list(measure)})
        return _Job(job, note)

    def close(self) -> None:
        """Jobs go on."""

    def _earlier(self, note: Path, measure: Collection[str]) -> Any:
        """The job that an earlier sweep submitted for the same, unless it has ended or slurm has long forgotten it."""
        if not note.exists():
            return None
        known = check(read_json(note), {"job": TEXT}, ["job", "measure"])
        if known["measure"] != list(measure):
            return None
        job = self._job(self._jobs, known["job"])
        lost = job.state == "UNKNOWN" and time.time() - note.stat().st_mtime > FORGOTTEN
        return None if lost or job.done(force_check=True) else job


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Start processes with SIGINT blocked from their first moment: it is for the sweep, which ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """A process that runs cells of a sweep in its folder, one after the other."""

    def __init__(self, folder: Path, gpu: str | None = None) -> None:
        self.folder, self.gpu, self.idle = folder, gpu, True
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed at the end of the process)
        own = {"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}
        with _deaf_to_ctrl_c():
            self.child = subprocess.Popen(
                COMMAND,
                env={**os.environ, **own, MODULES: os.environ.get(MODULES, str(Path.cwd()))},
                cwd=folder,  # also keeps a source tree in the current folder off the path
                stdin=subprocess.PIPE,  # closes with this process, however it ends, and takes the cell with it
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )

    def alive(self) -> bool:
        return self.child.poll() is None

    def run(self, cells: Sequence[Config], measure: Collection[str]) -> Running:
        """Start cells; there must be none running."""
        self.idle = False
        answer = Future[dict[str, str]]()
        request = json.dumps({"cells": [cell.to_json() for cell in cells], "measure": list(measure)})
        names = [cell.name for cell in cells]
        threading.Thread(target=self._exchange, args=[request, names, answer], daemon=True).start()
        return _Run(self, answer)

    def _exchange(self, request: str, names: Sequence[str], answer: "Future[dict[str, str]]") -> None:
        assert self.child.stdin is not None and self.child.stdout is not None
        try:
            self.child.stdin.write(request.encode() + b"\n")
            self.child.stdin.flush()
            line = self.child.stdout.readline()
        except (OSError, ValueError):  # it has ended, or this process closes it
            line = b""
        if line:
            self.idle = True
            answer.set_result(json.loads(line)["failures"])
        else:
            answer.set_result(dict.fromkeys(names, self._end()))

    def _end(self) -> str:
        """Wait for the end of the process, and say why it came."""
        code = self.child.wait()
        self._errors.seek(0)
        reason = _reason(code, self._errors.read())
        self.close()
        return reason or "ended by itself; repeat the command to continue"

    def stop(self) -> None:
        """Ask the process to end, and end it if it has not done so in time."""
        self.child.terminate()
        killer = threading.Timer(PATIENCE, self.child.kill)
        killer.daemon = True
        killer.start()

    def close(self) -> None:
        """End an idle process; one that has ended is forgotten."""
        with suppress(OSError), self.child:  # closes its input
            pass
        self._errors.close()


@dataclass(frozen=True)
class _Run:
    """Cells that a worker runs."""

    worker: _Worker
    answer: "Future[dict[str, str]]"

    def ended(self) -> bool:
        return self.answer.done()

    def failures(self) -> dict[str, str]:
        return self.answer.result()

    def stop(self) -> None:
        self.worker.stop()


@dataclass(frozen=True)
class _Job:
    job: Any  # of submitit
    note: Path  # that it was submitted

    def ended(self) -> bool:
        return bool(self.job.done())

    def failures(self) -> dict[str, str]:
        try:
            found: dict[str, str] = self.job.result()
        except Exception as error:  # whatever the cluster did to it
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            return {self.note.stem: f"job {self.job.job_id}: {reason}"}
        return found

    def stop(self) -> None:
        self.job.cancel(check=False)
        self.note.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Cell:
    """What a job of the cluster does."""

    folder: Path
    cell: Config
    measure: tuple[str, ...]

    def __call__(self) -> dict[str, str]:
        worker = _Worker(self.folder)
        failures = worker.run([self.cell], self.measure).failures()
        worker.close()
        return failures

    def checkpoint(self) -> Any:
        """Called by submitit before the job is requeued; the run resumes from its own files."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def _reason(code: int, errors: bytes) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}; repeat the command to continue"
    if code == 0:
        return ""
    lines = errors.decode(errors="replace").strip().splitlines() or [f"ended with status {code}"]
    return "\n".join(lines) if os.environ.get("SAMLITE_DEBUG") == "1" else lines[-1].removeprefix("Error: ")
