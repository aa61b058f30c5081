import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import click
import pytest
from conftest import Result, command, process

from samlite import tasks
from samlite.cli import cli as commands
from samlite.training.config import Config
from samlite.training.options import OPTIONS

pytest.importorskip("sklearn")

Cli = Callable[..., Result]
QUICK = ("train", "--width", "8", "--epochs", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the things that calls stumble over."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    (tmp_path / "broken.toml").write_text("lr = = 1")
    (tmp_path / "unknown.toml").write_text("learning_rate = 1")
    (tmp_path / "text.toml").write_text("lr = 'fast'")
    (tmp_path / "list.toml").write_text("milestones = 3")
    (tmp_path / "binary.toml").write_bytes(b"\x80\x81")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "data" / "mnist").mkdir(parents=True)
    return tmp_path


BAD_CALLS = {
    "trian": "No such command 'trian'. Did you mean 'train'?",
    "--verison": "Did you mean",
    "tasks digit": "got 'digit'; did you mean digits?",
    "tasks digits mnist": "unexpected extra argument",
    "tasks --jsno": "No such option '--jsno'",
    "train mnits": "did you mean mnist?",
    "train digits mnist": "unexpected extra argument",
    "train --widht 8": "No such option '--widht'. (Did you mean",
    "train --width": "requires an argument",
    "train --width 0": "width must be >= 1, got 0",
    "train --width -8": "width must be >= 1, got -8",
    "train --width wide": "'wide' is not a valid integer",
    "train --width 2.5": "'2.5' is not a valid integer",
    "train --width 1000000000000000000000000000000": "width must be >= 1 and below 2^63",
    "train --width 1000000000000000": "width must leave a network that fits in memory",
    "train --optimizer lion": "'lion' is not one of 'sgd', 'adam', 'adamw', 'sam'",
    "train --base sam": "'sam' is not one of",
    "train --base adam": "base must go with SAM, got adam with sgd; use optimizer sam",
    "train --rho 0.1": "rho must be 0 without SAM, got 0.1; use optimizer sam",
    "train --optimizer sam --rho -1": "rho must be >= 0, got -1.0",
    "train --optimizer sam --rho nan": "rho must be >= 0 and finite, got nan",
    "train --optimizer sam --rho inf": "rho must be >= 0 and finite, got inf",
    "train --lr 0": "lr must be > 0, got 0.0",
    "train --lr -0.1": "lr must be > 0, got -0.1",
    "train --lr nan": "lr must be > 0 and finite, got nan",
    "train --lr fast": "'fast' is not a valid float",
    "train --momentum 1": "momentum must be >= 0 and < 1, got 1.0",
    "train --optimizer adam --momentum 0.9": "momentum must be 0 for adam, got 0.9; it belongs to sgd",
    "train --weight-decay -1": "weight_decay must be >= 0, got -1.0",
    "train --batch-size 0": "batch_size must be >= 1, got 0",
    "train --epochs 0": "epochs must be >= 1, got 0",
    "train --epochs 1.5": "'1.5' is not a valid integer",
    "train --schedule linear": "'linear' is not one of 'step', 'cosine', 'constant'",
    "train --milestones 0.5,x": "'0.5,x' is not a list of numbers such as 0.05,0.1",
    "train --milestones 2": "milestones must be > 0 and < 1, got 2.0",
    "train --schedule cosine --milestones 0.5": "milestones must go with the step schedule, got cosine",
    "train --seed -1": "seed must be >= 0, got -1",
    "train --seed one": "'one' is not a valid integer",
    "train --threads 0": "threads must be >= 1, got 0",
    "train --device gpu": "device must be a name such as cpu or cuda:0, got 'gpu'",
    "train --device meta": "device must be usable here, got 'meta'",
    "train --device cuda:99": "device must be usable here, got 'cuda:99'",
    "train --data somewhere": "data of task digits must not be given",
    "train mnist --data ./nowhere": "'nowhere' does not exist",
    "train mnist --data data/mnits": "'data/mnits' does not exist; did you mean data/mnist?",
    "train mnist --data data/mnist": "cannot load mnist from",
    "train mnist --data nobody/mnist": "cannot load mnist from 'nobody/mnist'",
    "train mnist --data file": "cannot load mnist from 'file'",
    "train --config nowhere.toml": "'nowhere.toml' does not exist",
    "train --config brokn.toml": "did you mean broken.toml?",
    "train --config broken.toml": "broken.toml: ",
    "train --config unknown.toml": "unknown.toml: a recipe holds lr,",
    "train --config text.toml": "lr must be a number, got 'fast'",
    "train --config list.toml": "milestones must be a list of numbers, got 3",
    "train --config binary.toml": "binary.toml: ",
    "train --config thesis": "Is a directory: thesis",
    "train --measure momnets": "'momnets' is not one of eigenvalues, moments, none; did you mean moments?",
    "train --track 0": "0 is not in the range x>=1",
    "train --track x": "'x' is not a valid integer range",
    "train --width 8 --track 588": "track must be <= the number of parameters, 587, got 588",
    "sharpness thesis --lr 0.1": "--lr must go with --stability, got 0.1; leave it out, or add --stability",
    "sharpness thesis --measures flatness": "measures must be of sharpness, edge, preconditioned,",
    "sharpness thesis --measures worst --radius 0": "--radius must be > 0, got 0.0",
    "sharpness thesis --other run": "--other must go with --measures overlap, got run; leave it out, or add it",
    "train --track-measures batch": "track_measures must go with track, got batch; add --track 1",
    "surface nowhere": "'nowhere' does not exist",
    "surface thesis": "thesis must be the folder of a finished run; it has no result.json",
    "surface thesis --figure no/x.png": "--figure must be in a folder that exists, got no/x.png; make no",
    "sharpness thesis --stability --lr -1": "--lr must be > 0, got -1.0",
    "sharpness thesis --density --figure x.foo": "--figure must end in .png, .pdf, .svg or .jpg, got x.foo",
    "sharpness thesis --save-vectors no/v": "--save-vectors must be in a folder that exists, got no/v; make no",
    "sharpness thesis --figure x.png": "--figure must go with --density, got x.png",
    "train --out file": "Not a directory: file",
    "train --out file/run": "Not a directory: file/run",
    "train --out thesis": "thesis must be empty or hold a run, but it has no config.json",
    "train --out run": "config.json must hold the field 'task'",
    "train --out run --no-resume": "run must be empty without resuming; choose another folder",
    "sweep": "Missing option '--widths'",
    "sweep --widths": "requires an argument",
    "sweep --widths ,": "',' is not a list of integers such as 8,32,128",
    "sweep --widths 8,x": "'8,x' is not a list of integers such as 8,32,128",
    "sweep --widths 8,0": "width must be >= 1, got 0",
    "sweep mnits --widths 8": "did you mean mnist?",
    "sweep --widths 8 --seeds 0": "seeds must be >= 1, got 0",
    "sweep --widths 8 --jobs 0": "jobs must be >= 1, got 0",
    "sweep --widths 8 --optimizers sgd,sma": "adamw, sam, friendly, agnostic, sampa; did you mean sam?",
    "sweep --widths 8 --optimizers sgd --rhos 0.1": "rhos must go with sam among the optimizers, got sgd",
    "sweep --widths 8 --rhos 0.1,-1": "rho must be >= 0, got -1.0",
    "sweep --widths 8 --rho x": "'x' is not a list of numbers such as 0.05,0.1",
    "sweep --width 8": "No such option '--width'",
    "sweep --widths 8 --rho-val 0.1": "--rho-val must be for one of the optimizers, got sgd, sam",
    "sweep --widths 8 --optimizers sgd --no-normalize": "--no-normalize must be for one of the optimizers, got sgd",
    "sweep --widths 8 --perturb local": "No such option '--perturb'",
    "sweep --widths 8 --engine slurm --minutes 1": "minutes must be >= 3, got 1",
    "sweep --widths 8 --gpus 1": "--partition and --gpus must go with --engine slurm",
    "sweep --widths 8 --lr 0": "lr must be > 0, got 0.0",
    "sweep --widths 8 --measure eigenvalues,none": "none must stand alone, got 'eigenvalues,none'",
    "sweep --widths 8 --measure moments,": "'' is not one of eigenvalues, moments, none",
    "sweep --widths 8 --config unknown.toml": "unknown.toml: a recipe holds lr,",
    "sweep --widths 8 --out file": "Not a directory: file",
    "sweep --widths 8 --out thesis": "thesis must be empty or hold a sweep",
    "sweep --widths 8 --out sweep": "sweep.json must be a JSON file",
    "report": "Missing argument 'SWEEP_DIR'",
    "report swep": "'swep' does not exist; did you mean sweep?",
    "report thesis": "thesis must be the folder of a sweep, but it has no sweep.json",
    "report file": "file must be the folder of a sweep",
    "report sweep": "sweep.json must be a JSON file",
    "report sweep --figrue x.png": "No such option '--figrue'",
    "sharpness": "Missing argument",
    "sharpness nowhere": "'nowhere' does not exist",
    "sharpness thesis": "must be",
    "sharpness run": "must be the folder of a finished run; it has no result.json",
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_a_bad_call_gets_one_helpful_line_and_changes_nothing(cli: Cli, workplace: Path, call: str) -> None:
    def files() -> dict[Path, int]:
        return {
            path: path.stat().st_size for path in workplace.rglob("*") if path.parts[len(workplace.parts)] != "runs"
        }

    before = files()
    ended = cli(*call.split())
    assert ended.status in (1, 2)
    assert ended.out == ""
    assert ended.err.startswith("Error: ") and ended.err.count("\n") == 1
    assert BAD_CALLS[call] in ended.err
    assert files() == before


def test_each_command_teaches_with_examples_and_explains_every_option(cli: Cli) -> None:
    for name, each in commands.commands.items():
        shown = cli(name, "--help")
        assert shown.status == 0 and "Example" in shown.out and f"samlite {name}" in shown.out
        assert each.short_help
        for option in each.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.help or option.show_default, f"{name} {option.name}"


def test_help_alone_names_every_command_and_how_to_complete(cli: Cli) -> None:
    shown = cli()
    assert shown == cli("--help") and shown.status == 0
    assert all(name in shown.out for name in commands.commands)
    assert "_SAMLITE_COMPLETE=bash_source samlite" in shown.out


def test_the_shell_can_complete_commands_options_and_tasks(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_SAMLITE_COMPLETE", "bash_source")
    assert "complete -o nosort -F _samlite_completion samlite" in cli().out
    monkeypatch.setenv("_SAMLITE_COMPLETE", "bash_complete")
    for words, expected in [("samlite tr", "train"), ("samlite train --wid", "--width"), ("samlite train mn", "mnist")]:
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        assert expected in cli().out


def test_every_option_of_a_run_is_one_of_the_command_line() -> None:
    given = {parameter.name for parameter in commands.commands["train"].params}
    assert set(OPTIONS) <= given
    assert {field.name for field in fields(Config)} == {"task", *OPTIONS}


def test_the_table_of_options_needs_no_torch() -> None:
    code = "import samlite.training.options, samlite.cli.options, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_and_version_start_without_torch() -> None:
    script = (
        "import sys\n"
        "from samlite.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    for arguments in (["--version"], ["train", "--help"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert done.returncode == 0 and "samlite" in done.stdout and done.stderr == ""


def test_tasks_are_listed_and_shown_with_their_recipe(cli: Cli) -> None:
    assert all(name in cli("tasks").out for name in tasks.TASKS)
    shown = cli("tasks", "mnist").out
    assert "[w, w/3]" in shown and "300: 267k" in shown and "0.25, 0.5, 0.75" in shown
    assert [each["name"] for each in json.loads(cli("tasks", "--json").out)] == list(tasks.TASKS)
    assert json.loads(cli("tasks", "mnist", "--json").out)["parameters"]["3000"] == 5366010


def test_train_writes_a_run_shows_it_and_does_nothing_the_second_time(cli: Cli, workplace: Path) -> None:
    first = cli(*QUICK)
    assert first.status == 0 and first.err == ""  # no bar where nobody watches
    assert "digits: sgd-w8-s0" in first.out and "runs/digits-sgd-w8-s0" in first.out and "587" in first.out
    written = (workplace / "runs" / "digits-sgd-w8-s0" / "result.json").stat().st_mtime_ns
    assert cli(*QUICK) == first
    assert (workplace / "runs" / "digits-sgd-w8-s0" / "result.json").stat().st_mtime_ns == written


def test_train_prints_exactly_one_json_document(cli: Cli) -> None:
    document = json.loads(cli(*QUICK, "--optimizer", "sam", "--json").out)
    assert document["folder"] == "runs/digits-sam-rho0.2-w8-s0"
    assert document["config"]["rho"] == 0.2 and document["result"]["epochs"] == 2


def test_train_tracks_eigenvalues_draws_them_and_prints_one_json_document(cli: Cli, workplace: Path) -> None:
    pytest.importorskip("samlite._C")
    pytest.importorskip("matplotlib")
    ended = cli(*QUICK, "--track", "2", "--json", "--out", "tracked")
    assert ended.status == 0 and ended.err == ""
    assert json.loads(ended.out)["config"]["track"] == 2
    assert (workplace / "tracked" / "track.png").read_bytes().startswith(b"\x89PNG")
    lines = (workplace / "tracked" / "metrics.jsonl").read_text().splitlines()
    assert all(len(json.loads(line)["eigenvalues"]) == 2 for line in lines)


def test_without_matplotlib_a_tracked_run_says_how_to_get_its_figure(
    cli: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("samlite._C")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ended = cli(*QUICK, "--track", "1", "--out", "tracked")
    assert ended.status == 0 and ended.err.count("\n") == 1
    assert "No track.png: a figure needs matplotlib: pip install 'matplotlib>=" in ended.err
    assert not (workplace / "tracked" / "track.png").exists()


def test_a_recipe_comes_from_a_file_and_options_override_it(cli: Cli, workplace: Path) -> None:
    (workplace / "recipe.toml").write_text("lr = 0.2\nmomentum = 0.5\nmilestones = [0.9]\nrho = 0.3\n")
    found = json.loads(cli(*QUICK, "--config", "recipe.toml", "--lr", "0.3", "--json").out)["config"]
    assert (found["lr"], found["momentum"], found["milestones"], found["rho"]) == (0.3, 0.5, [0.9], 0.0)


def test_another_config_in_the_same_folder_is_an_error_that_shows_the_difference(cli: Cli) -> None:
    cli(*QUICK)
    ended = cli(*QUICK, "--lr", "0.1")
    assert ended.status == 2 and "holds another run (lr 0.05 there, 0.1 now)" in ended.err


def test_a_loss_that_is_not_finite_fails_with_status_1(cli: Cli) -> None:
    ended = cli(*QUICK, "--lr", "1e30")
    assert ended.status == 1 and ended.out == ""
    assert ended.err.startswith("Error: the loss is no longer finite in epoch 1 at lr 1e+30; try a smaller lr")


def test_what_is_missing_names_the_packages_that_bring_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, package, call in [
        ("sklearn.datasets", "scikit-learn", QUICK), ("datasets", "datasets", ("train", "mnist"))
    ]:  # fmt: skip
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        ended = cli(*call)
        assert ended.status == 1 and f"needs {package}: pip install '" in ended.err and f"'{package}>=" in ended.err


def test_a_sweep_measures_reports_and_is_done_the_second_time(cli: Cli, workplace: Path) -> None:
    pytest.importorskip("samlite._C")
    call = ("sweep", "synthetic", "--widths", "8", "--seeds", "1", "--epochs", "2", "--out", "s", "--device", "cpu")
    first = cli(*call)
    assert first.status == 0 and first.err == ""
    assert "sam ρ=0.1" in first.out and "One seed gives no interval" in first.out
    assert max(map(len, first.out.splitlines())) <= 80 and "…" not in first.out
    document = json.loads(cli(*call, "--json").out)
    outcomes = document["rows"][0]["optimizers"]
    assert outcomes["sgd"]["sharpness"]["mean"] > 0 and outcomes["sam"]["improvement"]["n"] == 1
    assert json.loads(cli("report", "s", "--json").out) == document
    pytest.importorskip("matplotlib")
    assert "figure: f.png" in cli("report", "s", "--figure", "f.png").out
    assert (workplace / "f.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_whose_cells_fail_says_why_and_fails(cli: Cli) -> None:
    ended = cli("sweep", "synthetic", "--widths", "8", "--seeds", "1", "--optimizers", "sgd", "--lr", "1e30")
    assert ended.status == 1 and ended.out == ""
    first, last = ended.err.splitlines()
    assert first.startswith("sgd-w8-s0 failed: the loss is no longer finite in epoch 1")
    assert last == "Error: 1 of 1 runs failed; repeat the command to retry them"


def test_ctrl_c_ends_training_cleanly_and_names_the_way_on(workplace: Path) -> None:
    running = subprocess.Popen(
        command("train", "synthetic", "--width", 8, "--epochs", 10**6, "--out", "long"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which background jobs inherit as ignored
    )
    while not (workplace / "long" / "checkpoint.pt").exists():
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert err.strip() == "Error: interrupted; repeat the command to continue"


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command("tasks"), stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_the_module_runs_as_a_program() -> None:
    assert process("--version").out.startswith("samlite, version ")


def test_sharpness_measures_everything_about_a_run_and_keeps_it(cli: Cli, workplace: Path) -> None:
    pytest.importorskip("samlite._C")
    pytest.importorskip("matplotlib")
    cli(*QUICK, "--out", "minimum")
    call = ("sharpness", "minimum", "--top", 1)
    assert cli(*call, "--moments").status == 0
    measured = json.loads((workplace / "minimum" / "sharpness.json").read_text())
    assert cli(*call, "--curvature", "ggn", "--stability").status == 0
    found = cli(*call, "--curvature", "ggn", "--trace", "--density", "--blocks", "--json")
    assert found.status == 0, found.err
    document = json.loads(found.out)
    assert list(document["blocks"]) == ["0", "2", "4"] and document["dtype"] == "float32"
    assert document["trace"]["frobenius"]["value"] > 0 and document["density"]["converged"]
    assert (workplace / "minimum" / "density.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((workplace / "minimum" / "sharpness.json").read_text())
    ggn = kept.pop("ggn")  # beside the Hessian, which sweeps and reports read
    assert kept == measured and kept["moments"]["converged"] and kept["curvature"] == "hessian"
    assert ggn["stability"]["verdict"] in ("stable", "unstable", "undecided")  # of the earlier call
    assert ggn["blocks"] == document["blocks"]


def test_a_measurement_that_did_not_converge_replaces_none_that_did(cli: Cli, workplace: Path) -> None:
    pytest.importorskip("samlite._C")
    cli(*QUICK, "--out", "minimum")
    assert cli("sharpness", "minimum", "--top", 1).status == 0
    before = json.loads((workplace / "minimum" / "sharpness.json").read_text())["eigenvalues"]
    assert cli("sharpness", "minimum", "--top", 1, "--tol", 1e-14).status == 1
    assert json.loads((workplace / "minimum" / "sharpness.json").read_text())["eigenvalues"] == before


def test_sharpness_on_screen_says_what_each_number_means(cli: Cli, workplace: Path) -> None:
    pytest.importorskip("samlite._C")
    cli(*QUICK, "--out", "minimum")
    options = ("--moments", "--stability", "--lr", 0.2, "--rho", 0.1, "--trace", "--blocks")
    out = cli("sharpness", "minimum", "--top", 1, "--curvature", "ggn", *options).out
    for word in ("Gauss-Newton", "s_4", "max lr", "SAM of rho 0.1", "trace", "Frobenius", "layer by layer"):
        assert word in out, out


def test_measures_of_a_run_on_screen_and_as_json(cli: Cli, workplace: Path) -> None:
    pytest.importorskip("samlite._C")
    cli(*QUICK, "--out", "first")
    cli(*QUICK, "--optimizer", "sam", "--out", "second")
    names = "edge,batch,sam-edge,critical,overlap,pac-bayes"
    ended = cli("sharpness", "second", "--top", 2, "--measures", names, "--other", "first")
    assert ended.status == 0, ended.err
    for word in ("sharpness as the literature measures it", "sam-edge", "std. error"):
        assert word in ended.out, ended.out
    document = json.loads(cli("sharpness", "first", "--top", 1, "--measures", "edge,worst,sam-edge", "--json").out)[
        "measures"
    ]
    assert document["sam-edge"]["value"] is None and "needs rho" in document["sam-edge"]["note"]
    assert document["edge"]["value"] == pytest.approx(2 * 1.9 / 0.005) and document["worst"]["kind"] == "at least"


def test_a_surface_is_drawn_and_told(cli: Cli, workplace: Path) -> None:
    pytest.importorskip("samlite._C")
    pytest.importorskip("matplotlib")
    cli(*QUICK, "--out", "first")
    cli(*QUICK, "--optimizer", "sam", "--out", "second")
    ended = cli("surface", "first", "--along", "second", "--points", 5)
    assert ended.status == 0 and "barrier" in ended.out and "surface.png" in ended.out
    assert (workplace / "first" / "surface.png").read_bytes().startswith(b"\x89PNG")
    options = ("--plane", "--points", 3, "--along", "eigenvectors", "--figure", "plane.pdf", "--json")
    document = json.loads(cli("surface", "first", *options).out)
    assert len(document["losses"]) == 3 and document["barrier"] is None and document["figure"] == "plane.pdf"
    assert cli("surface", "first", "--along", "sideways").err.startswith(
        "Error: --along must be random, eigenvectors or"
    )
    spectra = cli("sharpness", "first", "--top", 1, "--spectra")
    assert "median sample" in spectra.out and (workplace / "first" / "spectra.png").exists()


@pytest.mark.parametrize("error", [KeyError("k"), IndexError("i"), RecursionError("r"), TypeError("t")])
def test_an_error_that_nobody_expected_is_one_line_and_says_how_to_find_it(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(tasks, "get", fail)
    ended = cli("tasks", "digits")
    assert ended.status == 1 and ended.out == ""
    assert ended.err == f"Error: internal error: {type(error).__name__}: {error}; SAMLITE_DEBUG=1 shows where\n"


@pytest.mark.parametrize("call", ["train --width 0", "train --widht 8", "sharpness nowhere", "report thesis"])
def test_any_error_shows_its_traceback_if_asked(cli: Cli, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    line = cli(*call.split()).err
    monkeypatch.setenv("SAMLITE_DEBUG", "1")
    shown = cli(*call.split()).err
    assert line.count("\n") == 1
    assert shown.startswith("Traceback") and shown.endswith(line)


def test_an_error_is_never_longer_than_a_few_lines_of_a_screen(cli: Cli) -> None:
    ended = cli("train", "--width", "9" * 50_000)
    assert ended.status == 2 and len(ended.err) < 1100 and ended.err.endswith("(see samlite train --help)\n")


def test_a_full_disk_under_the_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("--help"), stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "Error: No space left on device\n")


def test_a_terminal_that_knows_no_greek_gets_the_numbers_all_the_same() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command("tasks", "mnist"), capture_output=True, env=environment)
    assert done.returncode == 0 and b"[w, w/3]" in done.stdout


def test_output_files_that_are_no_files_are_refused_before_the_work(cli: Cli, workplace: Path) -> None:
    cli(*QUICK, "--out", "minimum")
    os.mkfifo(workplace / "pipe.png")
    (workplace / "v").symlink_to("/dev/full")
    for call, message in (
        ("sharpness minimum --density --figure pipe.png", "pipe.png must be a regular file, got a named pipe"),
        ("sharpness minimum --save-vectors v", "v must be a regular file, got a device"),
    ):
        ended = cli(*call.split())
        assert ended.status == 2 and message in ended.err
    assert (workplace / "v").is_symlink() and not (workplace / "minimum" / "sharpness.json").exists()
