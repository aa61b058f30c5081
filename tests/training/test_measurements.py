"""Measuring anyone's checkpoint, from Python and from the terminal."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result
from conftest import command as command_line
from safetensors.torch import load_file, save_file
from torch import nn

from samlite import Hessian
from samlite.cli.checkpoint import checkpoint_subject, resolve
from samlite.files import read_json, write_json
from samlite.training.config import Config
from samlite.training.loop import train
from samlite.training.measurements import as_record, keep, measure_run, run_subject

NETS = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

def tied():
    return Tied()

def data():
    torch.manual_seed(1)
    return torch.randn(40, 6), torch.randint(0, 3, (40,))

def batches():
    x, y = data()
    return [(x[:30], y[:30]), (x[30:], y[30:])]

def one_shot():
    return iter(batches())

def nan_data():
    x, y = data()
    return x * float("nan"), y

def empty():
    return []

def fails():
    raise KeyError("inside")

def my_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])

number = 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module `nets`, checkpoints that fit it, and some that do not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    (tmp_path / "nets.py").write_text(NETS)
    nets: Any = resolve("nets:net", "--model")
    torch.manual_seed(0)
    model = nets()
    torch.save(model.state_dict(), tmp_path / "net.pt")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "nested.pth")
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    whole = (tmp_path / "net.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "net.safetensors").read_bytes()[:-40])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weight": "words"}, tmp_path / "words.pt")
    torch.save({**model.state_dict(), "0.weight": torch.zeros(5, 5)}, tmp_path / "shape.pt")
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save({n: w * float("nan") for n, w in model.state_dict().items()}, tmp_path / "nan.pt")

    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(Hostile()))
    torch.save({"weight": Hostile()}, tmp_path / "hostile.pth")
    return tmp_path


@pytest.mark.parametrize("name", ["net.pt", "nested.pth", "net.safetensors"])
@pytest.mark.parametrize("data", ["nets:data", "nets:batches"])
def test_a_checkpoint_of_any_format_is_measured(place: Path, name: str, data: str) -> None:
    subject = checkpoint_subject(place / name, "nets:net", data)
    found = subject.hessian("float64").eigenvalues(2, tol=1e-8)
    nets: Any = resolve("nets:net", "--model")
    model = nets()
    model.load_state_dict(torch.load(place / "net.pt"))
    x, y = resolve("nets:data", "--data")()
    expected = Hessian(model.double(), nn.CrossEntropyLoss(), (x, y)).eigenvalues(2, tol=1e-8)
    assert torch.allclose(found.values, expected.values, rtol=1e-7)


def test_tied_weights_stored_once_fill_both_places(place: Path) -> None:
    tied: Any = resolve("nets:tied", "--model")
    state = tied().state_dict()
    state.pop("second.weight")
    save_file(state, place / "tied.safetensors")
    subject = checkpoint_subject(place / "tied.safetensors", "nets:tied", "nets:data")
    assert subject.model.second.weight is subject.model.first.weight
    assert torch.equal(subject.model.first.weight, state["first.weight"])


def samlite(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "samlite.cli", *arguments]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120)


def test_the_command_prints_a_table_or_one_json_document_and_saves_vectors(place: Path) -> None:
    options = ["--model", "nets:net", "--data", "nets:data", "--top", "3"]
    table = samlite(place, "sharpness", "net.pt", *options)
    assert table.returncode == 0, table.stderr
    assert "none was missed" in table.stdout and "40 samples" in table.stdout
    done = samlite(place, "sharpness", "net.pt", *options, "--json", "--save-vectors", "v.safetensors",
                   "--dtype", "float64", "--samples", "20", "--loss", "nets:my_loss")  # fmt: skip
    record = json.loads(done.stdout)
    assert record["eigenvalues"]["converged"] and record["eigenvalues"]["complete"]
    assert record["samples"] == 20 and record["available"] == 40 and record["dtype"] == "float64"
    saved = load_file(place / "v.safetensors")
    assert saved["values"].tolist() == record["eigenvalues"]["values"]
    assert torch.allclose(saved["vectors"].T @ saved["vectors"], torch.eye(3).double(), atol=1e-10)


def test_what_did_not_converge_says_so_on_screen_and_in_the_status(place: Path) -> None:
    done = samlite(place, "sharpness", "net.pt", "--model", "nets:net", "--data", "nets:data", "--tol", "1e-9")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: not all of the 5 values are as exact as --tol 1e-09 asks")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A finished run of digits, hardly trained; to be measured by one thread, as tiny products wait for each other."""
    pytest.importorskip("sklearn")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in train(Config.of("digits", {"epochs": 2}, width=8, device="cpu"), tmp_path / "run"):
        pass
    yield tmp_path / "run"
    torch.set_num_threads(threads)


def test_a_run_is_measured_for_what_it_lacks_and_keeps_what_it_has(run: Path) -> None:
    measure_run(run)
    alone = read_json(run / "sharpness.json")
    assert len(alone["eigenvalues"]["values"]) == 1 and "moments" not in alone
    subject = run_subject(run)
    write_json(run / "sharpness.json", as_record(subject, subject.hessian().eigenvalues(3)))
    before = read_json(run / "sharpness.json")

    measure_run(run, moments=True)
    record = read_json(run / "sharpness.json")
    moments = record.pop("moments")
    assert record == before  # all three of them
    expected = run_subject(run).hessian("float64").moments(tol=1e-6)
    assert moments["converged"] and moments["dtype"] == "float64" and moments["fallback"] is None
    for k, s in expected.nonuniformity.items():
        assert moments["nonuniformity"][str(k)] == pytest.approx(s, rel=1e-3)
        assert abs(moments["powers"][str(k)] - expected.powers[k]) <= moments["errors"][str(k)] * 1.001

    write_json(run / "sharpness.json", {**before, "moments": {**moments, "converged": False, "powers": {}}})
    measure_run(run, moments=True)
    again = read_json(run / "sharpness.json")
    assert again == {**before, "moments": moments}


def test_train_measures_moments_shows_them_and_says_what_did_not_converge(
    cli: Callable[..., Result], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("train", "--width", "8", "--epochs", "2", "--device", "cpu", "--out", run)
    assert "sharpness" not in json.loads(cli(*call, "--json").out)
    found = json.loads(cli(*call, "--measure", "moments", "--json").out)["sharpness"]
    assert found["eigenvalues"]["converged"] and list(found["moments"]["nonuniformity"]) == ["2", "3", "4"]
    assert f"s_2 {found['moments']['nonuniformity']['2']:.4g}, s_3" in cli(*call).out

    write_json(run / "sharpness.json", {**found, "moments": {**found["moments"], "converged": False}})
    monkeypatch.setattr("samlite.training.measurements.measure_run", lambda *_: None)
    ended = cli(*call, "--measure", "eigenvalues,moments")
    assert ended.status == 1 and "not converged" in ended.out
    assert f"the measurement did not converge; try: samlite sharpness {run} --moments --tol 1e-2" in ended.err
    assert cli(*call, "--measure", "eigenvalues").status == 0


MALFORMED = [
    ("sharpness", "absent.pt", "'absent.pt' does not exist"),
    ("sharpness", "net.p", "did you mean net.pt?"),
    ("sharpness", "net.pt", "a checkpoint needs --model (pkg.mod:factory, timm:NAME or hf:) and --data"),
    ("sharpness", ".", "must be the folder of a finished run"),
    ("sharpness", ". --model nets:net", "must go with a checkpoint, got the run"),
    ("sharpness", "net.pt --model nets:net --data nets:absent", "--data must name something in nets, got 'absent'"),
    ("sharpness", "net.pt --model absent:net --data nets:data", "--model must name an importable module"),
    ("sharpness", "net.pt --model nets --data nets:data", "--model must name an object as pkg.mod:name, got 'nets'"),
    ("sharpness", "net.pt --model nets:number --data nets:data", "--model must name a torch.nn.Module"),
    ("sharpness", "net.pt --model nets:fails --data nets:data", "nets:fails failed with KeyError"),
    ("sharpness", "net.pt --model nets:net --data nets:number", "data must be a tuple"),
    ("sharpness", "net.pt --model nets:net --data nets:one_shot", "data must be re-iterable"),
    ("sharpness", "net.pt --model nets:net --data nets:empty", "data must hold at least one batch"),
    ("sharpness", "net.pt --model nets:net --data nets:nan_data", "the loss must be finite, got nan"),
    ("sharpness", "net.pt --model nets:net --data nets:batches --samples 3", "--samples needs --data to name a pair"),
    ("sharpness", "net.pt --model nets:net --data nets:data --samples 0", "--samples must be >= 1, got 0"),
    (
        "sharpness",
        "net.pt --model nets:net --data nets:data --loss mse",
        "the loss must be computable on the first batch",
    ),
    ("sharpness", "net.pt --model nets:net --data nets:data --loss nets:net", "loss_fn must take (model, batch)"),
    ("sharpness", "net.pt --model nets:net --data nets:data --top 0", "k must be between 1 and the dimension 83"),
    ("sharpness", "net.pt --model nets:net --data nets:data --top 84", "k must be between 1 and the dimension 83"),
    ("sharpness", "net.pt --model nets:net --data nets:data --top x", "'x' is not a valid integer"),
    ("sharpness", "net.pt --model nets:net --data nets:data --tol 2", "tol must be between 0 and 1, got 2"),
    ("sharpness", "net.pt --model nets:net --data nets:data --which XL", "'XL' is not one of"),
    ("sharpness", "net.pt --model nets:net --data nets:data --params conv", "params must match parameter names"),
    ("sharpness", "net.pt --model nets:net --data nets:data --memory much", "memory must be bytes or a size"),
    (
        "sharpness",
        f"net.pt --model nets:net --data nets:data --memory {'9' * 400}GB --top 84",
        "k must be between 1 and the dimension 83",
    ),
    ("sharpness", "net.pt --model nets:net --data nets:data --device cuda:77", "device must be usable here"),
    ("sharpness", "net.pt --model nets:net --data nets:data --dtype int8", "'int8' is not one of"),
    ("sharpness", "net.pt --model nets:tied --data nets:data", "must fit the model of --model"),
    ("sharpness", "cut.pt --model nets:net --data nets:data", "cut.pt"),
    ("sharpness", "cut.safetensors --model nets:net --data nets:data", "cut.safetensors"),
    ("sharpness", "empty.pt --model nets:net --data nets:data", "empty.pt"),
    ("sharpness", "text.pt --model nets:net --data nets:data", "text.pt"),
    (
        "sharpness",
        "list.pt --model nets:net --data nets:data",
        "must hold named tensors, as model.state_dict() gives them",
    ),
    ("sharpness", "words.pt --model nets:net --data nets:data", "must hold named tensors"),
    ("sharpness", "shape.pt --model nets:net --data nets:data", "size mismatch for 0.weight"),
    ("sharpness", "other.pt --model nets:net --data nets:data", "it lacks 0.weight"),
    ("sharpness", "nan.pt --model nets:net --data nets:data", "got nan or inf in 0.weight"),
    ("sharpness", "hostile.pt --model nets:net --data nets:data", "holds code"),
    ("sharpness", "hostile.pth --model nets:net --data nets:data", "must hold named tensors"),
]


def test_malformed_calls_get_one_line_a_status_and_execute_nothing(place: Path) -> None:
    # in one process, as starting torch forty times would take a minute
    script = """
import contextlib, io, json, sys
from samlite.cli import main
results = []
for arguments in json.load(sys.stdin):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as end:
            status = end.code
    results.append([status, errors.getvalue()])
json.dump(results, sys.stdout)
"""
    calls = [[command, *rest.split()] for command, rest, _ in MALFORMED]
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(calls), cwd=place, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for (command, rest, message), (status, error) in zip(MALFORMED, json.loads(done.stdout), strict=True):
        assert status in (1, 2), f"{command} {rest}: {status} {error}"
        assert message in error, f"{command} {rest}: {error}"
        assert error.count("\n") == 1 and "Traceback" not in error, f"{command} {rest}: {error}"
    assert not (place / "executed").exists()


def measurement(value: float, converged: bool = True, **settings: Any) -> dict[str, Any]:
    found = {"which": "LA", "values": [value], "errors": [0.1], "converged": converged, "complete": True}
    return {"dtype": "float32", "curvature": "hessian", **settings, "eigenvalues": found}


def test_measurements_made_at_once_are_all_kept(tmp_path: Path) -> None:
    names = [f"measured {i}" for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: keep(tmp_path, {name: {"converged": True}}), names))
    assert sorted(read_json(tmp_path / "sharpness.json")) == sorted(names)


def test_what_did_not_converge_replaces_nothing_that_did_nor_what_is_said_of_it(tmp_path: Path) -> None:
    keep(tmp_path, {**measurement(2.0), "moments": {"unit": "sample", "converged": False}})
    keep(tmp_path, {**measurement(3.0, converged=False, dtype="float64"), "trace": {"value": 1.0}})
    found = read_json(tmp_path / "sharpness.json")
    assert found["eigenvalues"]["values"] == [2.0] and found["dtype"] == "float32" and found["trace"] == {"value": 1.0}
    keep(tmp_path, measurement(4.0, dtype="float64"))
    keep(tmp_path, measurement(5.0, curvature="ggn"))
    found = read_json(tmp_path / "sharpness.json")
    assert found["eigenvalues"]["values"] == [4.0] and found["dtype"] == "float64"
    assert found["ggn"]["eigenvalues"]["values"] == [5.0] and found["moments"] == {"unit": "sample", "converged": False}


@pytest.mark.slow
def test_four_processes_measure_one_run_at_once_and_nothing_is_lost(run: Path) -> None:
    calls = [[], ["--moments"], ["--trace"], ["--curvature", "ggn"]]
    for _ in range(5):
        (run / "sharpness.json").unlink(missing_ok=True)
        every = [command_line("sharpness", run, "--top", 1, *call) for call in calls]
        running = [subprocess.Popen(each, stdout=subprocess.DEVNULL) for each in every]
        assert [process.wait(120) for process in running] == [0] * 4
        assert {"eigenvalues", "moments", "trace", "ggn"} <= set(read_json(run / "sharpness.json"))


@pytest.mark.parametrize("damage", ['{"eigenvalues": 3}', "[]", "{"])
def test_a_damaged_measurement_shows_before_the_work_and_stays(
    cli: Callable[..., Result], run: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    (run / "sharpness.json").write_text(damage)
    monkeypatch.setattr(Hessian, "eigenvalues", lambda *_, **__: pytest.fail("it was measured"))
    ended = cli("sharpness", run)
    assert ended.status == 2 and "sharpness.json" in ended.err
    assert (run / "sharpness.json").read_text() == damage


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("(torch.randn(9, 6), torch.zeros(8).long())", "the same number of rows, got shapes (9, 6) and (8,)"),
        ("(torch.randn(8, 6), torch.zeros(9).long())", "the same number of rows, got shapes (8, 6) and (9,)"),
        ("(torch.tensor(1.0), torch.tensor(1))", "the same number of rows, got shapes () and ()"),
        ("(torch.randn(9, 6), torch.tensor(1))", "the same number of rows, got shapes (9, 6) and ()"),
        ("(torch.randn(0, 6), torch.zeros(0).long())", "data must hold at least one sample, got none"),
        ("raises()", "--data: {name}:it failed with SystemExit: 7"),
        ("fails()", "--data: {name}:it failed with ZeroDivisionError: of the user in two lines"),
    ],
)
def test_data_of_which_some_samples_are_drawn_are_checked_first(
    cli: Callable[..., Result], place: Path, data: str, message: str
) -> None:
    name = f"data{abs(hash(data))}"
    (place / f"{name}.py").write_text(
        "import sys, torch\ndef raises(): sys.exit(7)\n"
        "def fails(): raise ZeroDivisionError('of the user\\nin two lines')\n"
        f"def it(): return {data}\n"
    )
    call = ("sharpness", "net.pt", "--model", "nets:net", "--data", f"{name}:it", "--samples", "3")
    ended = cli(*call)
    assert ended.status == 2 and ended.err.count("\n") == 1
    assert message.format(name=name) in ended.err


def test_layers_that_load_their_weights_in_their_own_way_are_told_as_they_tell_it(
    cli: Callable[..., Result], place: Path
) -> None:
    (place / "own.py").write_text(
        "from torch import nn\nclass Own(nn.Linear):\n"
        "    def _load_from_state_dict(self, state, prefix, *rest): state[prefix + 'scale']\n"
        "def net(): return Own(6, 3)\n"
    )
    torch.save(nn.Linear(6, 3).state_dict(), place / "line.pt")
    ended = cli("sharpness", "line.pt", "--model", "own:net", "--data", "nets:data")
    assert (ended.status, ended.err) == (
        2, "Error: line.pt must fit the model of --model, got KeyError: 'scale'\n",
    )  # fmt: skip
