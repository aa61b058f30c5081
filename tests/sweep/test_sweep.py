import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, command, contents, process

from samlite import files, sweep
from samlite.cli import options
from samlite.files import write_json
from samlite.sweep import engines
from samlite.sweep.grid import grid
from samlite.sweep.run import CLAIMS, Event, finished
from samlite.training.config import Config
from samlite.training.loop import train
from samlite.training.measurements import is_measured, nonuniformity

pytest.importorskip("sklearn")

QUICK: dict[str, Any] = {"recipe": {"epochs": 2}, "device": "cpu"}


def names(events: list[Event], state: str) -> set[str]:
    return {event.cell.name for event in events if event.state == state}


def children() -> list[int]:
    """The cells that this process runs."""
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "samlite.sweep.cell"], capture_output=True)
    return list(map(int, found.stdout.split()))


def test_a_grid_has_a_cell_for_every_width_seed_optimizer_and_rho() -> None:
    cells = grid("digits", [8, 16], ["sgd", "sam"], seeds=2, rhos=[0.05, 0.1])
    assert [(c.width, c.seed, c.optimizer, c.rho) for c in cells] == [
        (width, seed, optimizer, rho)
        for width in (8, 16)
        for seed in (0, 1)
        for optimizer, rho in [("sgd", 0), ("sam", 0.05), ("sam", 0.1)]
    ]


def test_a_grid_holds_each_cell_once() -> None:
    assert len(grid("digits", [8, 8], ["sgd", "sgd"], seeds=1)) == 1


def test_sam_wraps_the_first_other_optimizer_of_a_grid() -> None:
    bases = {c.optimizer: (c.base, c.lr) for c in grid("digits", [8], ["adamw", "sam"], seeds=1)}
    assert bases["sam"] == bases["adamw"] == ("adamw", 1e-3)
    assert [c.base for c in grid("digits", [8], ["sam"], seeds=1)] == ["sgd"]
    assert [c.base for c in grid("digits", [8], ["sgd", "sam"], seeds=1, base="adam")] == ["sgd", "adam"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 0}, "seeds must be >= 1, got 0"),
        ({"widths": [0]}, "width must be >= 1, got 0"),
        ({"optimizers": ["sgd"], "rhos": [0.1]}, "rhos must go with sam among the optimizers, got sgd"),
        ({"rhos": [-0.1]}, "rho must be >= 0, got -0.1"),
        ({"recipe": {"widht": 3}}, "a recipe holds .* got 'widht'"),
        ({"widths": []}, "widths must name at least one"),
    ],
)
def test_a_bad_grid_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(**{"task": "digits", "widths": [8], **arguments})


def test_a_sweep_survives_killed_and_failing_cells_retries_them_and_grows(tmp_path: Path) -> None:
    cells = grid("synthetic", [8], ["sgd", "adam", "sam"], seeds=1, **QUICK)
    spoiled, victim, good = cells
    write_json(tmp_path / "sweep.json", {"cells": []})
    (tmp_path / spoiled.name).mkdir()
    (tmp_path / spoiled.name / "thesis.tex").write_text("years of work")

    events = []
    for event in sweep.run(tmp_path, cells, jobs=2):
        events.append(event)
        if event == Event(victim, "started"):
            os.kill(max(children()), signal.SIGKILL)
    reasons = {event.cell: event.reason for event in events if event.state == "failed"}
    assert reasons.keys() == {spoiled, victim} and names(events, "finished") == {good.name}
    assert "must be empty or hold a run" in reasons[spoiled]
    assert reasons[victim] == "ended by SIGKILL; repeat the command to continue"

    (tmp_path / spoiled.name / "thesis.tex").unlink()
    more = grid("synthetic", [9], ["sgd"], seeds=1, **QUICK)
    events = list(sweep.run(tmp_path, cells + more, jobs=2))
    assert names(events, "done") == {good.name}
    assert names(events, "finished") == {spoiled.name, victim.name, "sgd-w9-s0"}
    assert sweep.read(tmp_path) == cells + more

    before = contents(tmp_path)
    assert {event.state for event in sweep.run(tmp_path, cells + more)} == {"done"}
    assert contents(tmp_path) == before


def test_closing_a_sweep_or_killing_it_ends_its_cells(tmp_path: Path) -> None:
    events = sweep.run(tmp_path / "closed", grid("synthetic", [8], seeds=1, **QUICK), jobs=2)
    assert [next(events).state, next(events).state] == ["started", "started"]
    assert len(children()) == 2
    events.close()
    assert not children()

    options = (
        "sweep",
        "synthetic",
        "--widths",
        8,
        "--seeds",
        1,
        "--epochs",
        10**6,
        "--jobs",
        2,
        "--out",
        tmp_path / "killed",
    )
    with subprocess.Popen(command(*options)) as running:
        folders = [tmp_path / "killed" / name for name in ("sgd-w8-s0", "sam-rho0.1-w8-s0")]
        while not all((folder / "config.json").exists() for folder in folders):
            assert running.poll() is None
            time.sleep(0.02)
        running.kill()
    for folder in folders:  # the lock of a cell is free once its process is gone
        with files.locked(folder):
            pass


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (grid("digits", [16], seeds=1, recipe={"epochs": 3}, device="cpu"), "epochs 2 there, 3 now"),
        (grid("synthetic", [16], seeds=1, recipe={"epochs": 2}, device="cpu"), "task digits there, synthetic now"),
        (grid("digits", [16], seeds=1, recipe={"epochs": 2, "lr": 1.0}, device="cpu"), "lr 0.05 there, 1.0 now"),
    ],
)
def test_another_sweep_in_the_same_folder_is_refused(tmp_path: Path, cells: list[Config], message: str) -> None:
    write_json(tmp_path / "sweep.json", {"cells": [cell.to_json() for cell in grid("digits", [8], seeds=1, **QUICK)]})
    with pytest.raises(ValueError, match=rf"holds another sweep \(.*{message}.*\); choose another folder"):
        next(sweep.run(tmp_path, cells))


def test_a_folder_that_holds_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be the folder of a sweep, but it has no sweep.json"):
        sweep.read(tmp_path)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="must be empty or hold a sweep"):
        next(sweep.run(tmp_path, grid("digits", [8], seeds=1)))
    for text in ("{", "[]", "{}", '{"cells": 3}', '{"cells": [3]}', '{"cells": [{}]}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(ValueError, match="sweep.json"):
            sweep.read(tmp_path)


def test_a_cell_that_another_sweep_has_claimed_is_left_to_it_and_taken_when_that_ends(tmp_path: Path) -> None:
    cells = grid("digits", [8], ["sgd"], seeds=2, **QUICK)
    claim = files.claimed(tmp_path / CLAIMS / cells[0].name)
    assert claim is not None and files.claimed(tmp_path / CLAIMS / cells[0].name) is None
    write_json(tmp_path / "sweep.json", {"cells": []})
    events = sweep.run(tmp_path, cells, jobs=2)
    first = [next(events), next(events)]
    assert [(event.cell, event.state) for event in first] == [(cells[1], "started"), (cells[1], "finished")]
    claim.release()
    assert [(event.cell, event.state) for event in events] == [(cells[0], "started"), (cells[0], "finished")]


@pytest.mark.slow
def test_two_sweeps_share_a_folder_and_run_every_cell_once(tmp_path: Path) -> None:
    options = ("sweep", "--widths", "8,12", "--seeds", 3, "--epochs", 40, "--measure", "none", "--jobs", 1)
    call = command(*options, "--out", tmp_path / "shared", "--json")
    first, second = (subprocess.Popen(call, stdout=subprocess.PIPE) for _ in range(2))
    for _ in range(2):  # one of them is killed twice, and started again
        time.sleep(5)
        first.kill()
        first.communicate()
        first = subprocess.Popen(call, stdout=subprocess.PIPE)
    outs = [launcher.communicate(timeout=200)[0] for launcher in (first, second)]
    assert first.returncode == second.returncode == 0
    documents = [json.loads(out) for out in outs]
    assert documents[0] == documents[1] and documents[0]["unfinished"] == []
    for cell in sweep.read(tmp_path / "shared"):
        lines = (tmp_path / "shared" / cell.name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 41))


def test_cells_on_gpus_are_spread_over_them(tmp_path: Path) -> None:
    engine = engines.Local(gpus=["3", "5"])
    cells = grid("digits", [8], ["sgd"], seeds=3, **{**QUICK, "device": "cuda"})

    def started(cell: Config) -> Any:
        return engine.start(tmp_path, [cell], ())

    def ended(process: Any) -> None:
        process.stop()
        process.failures()

    running = [started(cell) for cell in cells]
    assert [process.worker.gpu for process in running] == ["3", "5", "3"]
    environment = Path(f"/proc/{running[1].worker.child.pid}/environ")
    if environment.exists():
        assert b"CUDA_VISIBLE_DEVICES=5" in environment.read_bytes().split(b"\0")
    ended(running.pop())
    running.append(started(cells[2]))
    assert running[-1].worker.gpu == "3"  # which that one left
    for each in running:
        ended(each)


@pytest.mark.slow
def test_jobs_of_a_cluster_run_the_cells(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    cells = grid("digits", [8], ["sgd"], seeds=2, **QUICK)
    (tmp_path / cells[1].name).mkdir()
    (tmp_path / cells[1].name / "thesis.tex").write_text("years of work")  # which no run touches
    write_json(tmp_path / "sweep.json", {"cells": []})
    events = list(sweep.run(tmp_path, cells, jobs=2, engine=engines.Cluster(tmp_path, "local")))
    assert {(event.cell, event.state) for event in events if event.state != "started"} == {
        (cells[0], "finished"),
        (cells[1], "failed"),
    }
    assert finished(tmp_path / cells[0].name, cells[0])
    assert "must be empty or hold a run" in next(event.reason for event in events if event.state == "failed")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs slurm")
def test_a_repeated_sweep_waits_for_the_jobs_of_one_that_was_killed(tmp_path: Path) -> None:
    options = ("sweep", "--widths", 8, "--seeds", 1, "--optimizers", "sgd", "--epochs", 900, "--measure", "none")
    call = (*options, "--engine", "slurm", "--out", tmp_path / "slurm", "--json")
    note = tmp_path / "slurm" / ".jobs" / "sgd-w8-s0.json"
    with subprocess.Popen(command(*call)) as launcher:
        while not note.exists():
            assert launcher.poll() is None
            time.sleep(0.02)
        launcher.kill()
    submitted = note.read_text()
    ended = process(*call)
    assert ended.status == 0 and json.loads(ended.out)["unfinished"] == []
    assert note.read_text() == submitted  # there was no second job


def test_a_cell_is_finished_by_its_own_result_and_a_converged_measurement(tmp_path: Path) -> None:
    cell, other = grid("digits", [8], ["sgd"], seeds=2, **QUICK)
    assert not finished(tmp_path, cell, ())
    write_json(tmp_path / "config.json", cell.to_json())
    write_json(tmp_path / "result.json", {})
    assert finished(tmp_path, cell, ()) and not finished(tmp_path, other, ())
    assert not finished(tmp_path, cell, ["eigenvalues"])
    measured = {"which": "LA", "values": [2.0], "converged": True, "complete": True}
    changes = [({}, True), ({"converged": False}, False), ({"complete": False}, False), ({"which": "SA"}, False)]
    for change, expected in changes:
        write_json(tmp_path / "sharpness.json", {"eigenvalues": {**measured, **change}})
        assert finished(tmp_path, cell, ["eigenvalues"]) == expected


def test_moments_count_as_measured_if_they_converged_beside_eigenvalues(tmp_path: Path) -> None:
    eigenvalues = {"which": "LA", "values": [2.0], "converged": True, "complete": True}
    moments = {"unit": "sample", "nonuniformity": {"2": 3.0, "3": 0.0}, "converged": True}
    assert not is_measured(tmp_path, ["eigenvalues"]) and is_measured(tmp_path, [])
    for change, expected in [({}, True), ({"converged": False}, False), ({"unit": "batch"}, False)]:
        write_json(tmp_path / "sharpness.json", {"eigenvalues": eigenvalues, "moments": {**moments, **change}})
        assert is_measured(tmp_path, ["moments"]) == expected and is_measured(tmp_path, ["eigenvalues"])
        assert nonuniformity(tmp_path) == ({2: 3.0, 3: 0.0} if expected else None)
    write_json(tmp_path / "sharpness.json", {"eigenvalues": eigenvalues})
    assert not is_measured(tmp_path, sweep.MEASURES) and nonuniformity(tmp_path) is None
    write_json(tmp_path / "sharpness.json", {"eigenvalues": {**eigenvalues, "converged": False}, "moments": moments})
    assert not is_measured(tmp_path, ["moments"])


def test_a_sweep_measures_only_what_it_knows_and_the_terminal_offers_that(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="measure must be of eigenvalues, moments, got 'trace'"):
        next(sweep.run(tmp_path, grid("digits", [8], seeds=1), measure=["trace"]))
    assert set(options.MEASURES.names) == {*sweep.MEASURES, "none"}


def test_a_sweep_with_moments_measures_what_lacks_them_and_trains_nothing_again(
    cli: Callable[..., Result], tmp_path: Path
) -> None:
    pytest.importorskip("samlite._C")
    recipe, run = ("--epochs", 2, "--device", "cpu"), tmp_path / "sgd-w16-s0"
    write_json(tmp_path / "sweep.json", {"cells": []})
    cli("train", "--width", 16, *recipe, "--measure", "eigenvalues", "--out", run)  # in this process, to save time
    before = contents(tmp_path)
    trained = (run / "result.json").stat().st_mtime_ns

    call = ("sweep", "--widths", 16, "--seeds", 1, *recipe, "--measure", "eigenvalues,moments", "--jobs", 2)
    document = json.loads(cli(*call, "--out", tmp_path, "--json").out)
    after = contents(tmp_path)
    assert {name for name in before if after[name] != before[name]} == {"sweep.json", "sgd-w16-s0/sharpness.json"}
    assert (run / "result.json").stat().st_mtime_ns == trained
    record = after["sgd-w16-s0/sharpness.json"]
    assert record.pop("moments")["converged"] and record == before["sgd-w16-s0/sharpness.json"]

    cells = sweep.read(tmp_path)
    assert {event.state for event in sweep.run(tmp_path, cells, measure=["moments"])} == {"done"}
    sgd, sam = (document["rows"][0]["optimizers"][name] for name in ("sgd", "sam"))
    spread: dict[str, Any] = {name: nonuniformity(tmp_path / name) for name in ("sgd-w16-s0", "sam-rho0.2-w16-s0")}
    for k in (2, 3, 4):
        s, s_sam = spread["sgd-w16-s0"][k], spread["sam-rho0.2-w16-s0"][k]
        assert sgd["nonuniformity"][str(k)]["mean"] == s > 0
        assert sam["comparisons"][f"s_{k}"]["ratio"]["mean"] == pytest.approx(s_sam / s)
        assert sam["comparisons"][f"s_{k}"]["verdict"] is None


@pytest.mark.slow
def test_a_sweep_killed_at_twenty_random_moments_is_completed_bit_for_bit(tmp_path: Path) -> None:
    options = ("sweep", "--widths", "8,16", "--seeds", 1, "--epochs", 1000, "--jobs", 2, "--out")
    for _ in range(20):
        with subprocess.Popen(command(*options, tmp_path / "killed"), stdout=subprocess.DEVNULL) as victim:
            time.sleep(random.uniform(0.5, 10))
            victim.kill()
    assert process(*options, tmp_path / "killed").status == 0
    assert process(*options, tmp_path / "whole").status == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_claim_that_is_no_file_ends_the_sweep_in_one_line(tmp_path: Path, kind: str) -> None:
    cells = grid("digits", [8], ["sgd"], seeds=1, **QUICK)
    path = tmp_path / CLAIMS / cells[0].name
    path.parent.mkdir()
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}[kind]()
    with pytest.raises((ValueError, IsADirectoryError), match=cells[0].name):
        list(sweep.run(tmp_path, cells))


def test_a_cell_that_does_not_end_when_asked_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('deaf', 'w'); time.sleep(600)"
    monkeypatch.setattr(engines, "PATIENCE", 0.1)
    monkeypatch.setattr(engines, "COMMAND", [sys.executable, "-c", stubborn])
    (cell,) = grid("digits", [8], ["sgd"], seeds=1, **QUICK)
    process = engines.Local().start(tmp_path, [cell], ())
    while not (tmp_path / "deaf").exists():
        time.sleep(0.01)
    process.stop()
    assert process.failures() == {cell.name: "ended by SIGKILL; repeat the command to continue"}


def test_a_process_runs_one_cell_after_the_other_and_a_crash_takes_one_of_them(tmp_path: Path) -> None:
    cells = grid("synthetic", [8], ["sgd", "adam", "sam"], seeds=2, **QUICK)
    write_json(tmp_path / "sweep.json", {"cells": []})
    seen, events = [], []
    for event in sweep.run(tmp_path, cells, jobs=1):
        events.append(event)
        seen += children()
        if event == Event(cells[2], "started"):
            os.kill(children()[0], signal.SIGKILL)
    assert len(set(seen)) == 2  # one before the crash, one after it
    assert [event.cell for event in events if event.state == "failed"] == [cells[2]]
    assert names(events, "finished") == {cell.name for cell in cells if cell != cells[2]}
    for cell in cells[3:5]:
        list(train(cell, tmp_path / "alone" / cell.name))
        alone = contents(tmp_path / "alone" / cell.name)
        assert alone == contents(tmp_path / cell.name)


def test_why_a_cell_failed_is_its_last_line_or_all_of_them_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    said = b"Traceback\n  somewhere\nError: lr must be > 0\n"
    assert engines._reason(2, said) == "lr must be > 0"
    monkeypatch.setenv("SAMLITE_DEBUG", "1")
    assert engines._reason(2, said) == said.decode().strip()
    assert engines._reason(0, b"UserWarning") == ""


def test_a_grid_larger_than_any_machine_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="a sweep must have at most 10,000 runs, got 2000000000000; ask for fewer"):
        grid("digits", [8], seeds=10**12)


def interrupted(folder: Path, delay: float) -> tuple[int, str, float]:
    """Press Ctrl-C in a sweep: its status, what it said, and how long it took to end."""
    call = command("sweep", "--widths", "8,16", "--seeds", 2, "--epochs", 10**6, "--jobs", 2, "--out", folder)
    with subprocess.Popen(
        call,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which background jobs inherit as ignored
    ) as running:
        if delay:
            time.sleep(delay)
        else:
            while not list(folder.glob("*/config.json")):
                time.sleep(0.02)
        pressed = time.monotonic()
        os.killpg(running.pid, signal.SIGINT)
        err = running.communicate(timeout=60)[1]
        took = time.monotonic() - pressed
    for _ in range(100):  # cells that lost their sweep end by themselves
        if not subprocess.run(["pgrep", "-s", str(running.pid)], capture_output=True).stdout:
            return running.returncode, err, took
        time.sleep(0.1)
    raise AssertionError("its cells are still there")


def test_ctrl_c_ends_a_sweep_and_its_cells_in_one_line(tmp_path: Path) -> None:
    status, err, _ = interrupted(tmp_path / "sweep", delay=0)
    assert (status, err.strip()) == (130, "Error: interrupted; repeat the command to continue")


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(32))
def test_ctrl_c_ends_a_sweep_at_any_moment(tmp_path: Path, moment: int) -> None:
    status, err, took = interrupted(tmp_path / "sweep", delay=0.3 + 0.1 * moment)  # torch is imported until about 2
    assert (status, err.strip()) == (130, "Error: interrupted; repeat the command to continue")
    assert took < 30
