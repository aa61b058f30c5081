"""Malformed files, arguments and user modules, drawn by a seed: each ends soon, in one line, and destroys nothing."""

import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from samlite.cli import main
from samlite.files import write_json
from samlite.sweep import engines
from samlite.training import session as training
from samlite.training import train
from samlite.training.config import Config

pytest.importorskip("sklearn")
pytest.importorskip("samlite._C")

CASES = 5_000
PARTS = 20  # that the long test runs one by one
SECONDS = 60  # in which a call must end; the longest takes a few
RECIPE = {"epochs": 1, "batch_size": 450}

MODULE = """
import torch
from torch import nn

class Later(nn.Module):  # goes wrong in a later batch
    def __init__(self, what):
        super().__init__()
        self.line, self.what = nn.Linear(6, 3), what
    def forward(self, x):
        if len(x) == 7 and self.what == "model raises":
            raise KeyError("of the user")
        y = self.line(x)
        return {"model gives None": None, "model gives a tuple": (y, y)}.get(self.what, y) if len(x) == 7 else y

def net():
    return nn.Linear(6, 3)

def quantized():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(6, 3)), {nn.Linear}, torch.qint8)

def pair():
    torch.manual_seed(0)
    return torch.randn(40, 6), torch.randint(0, 3, (40,))

def batches(last=None):
    x, y = pair()
    return [(x[:20], y[:20]), (x[20:33], y[20:33]), (x[33:], y[33:]) if last is None else last]

def raises():
    raise RuntimeError("of the user\\nin two lines")

class Stream:
    def __init__(self, last):
        self.last = last
    def __iter__(self):
        yield from batches()[:2]
        if isinstance(self.last, Exception):
            raise self.last
        yield self.last

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""
# What a user's module may hold, as the value of `it`
MODELS = (
    *("3", "None", "nn.Linear", "nn.Linear(6, 3).weight", "quantized", "raises", "nn.Sequential()", "nn.Linear(5, 3)"),
    *("lambda: (yield)", "lambda x: x", "Later('model raises')", "Later('model gives None')", "nn.Embedding(6, 3)"),
    *("Later('model gives a tuple')", "nn.Linear(6, 3).to(torch.complex64)", "nn.Linear(6, 3).requires_grad_(False)"),
    *("nn.Linear(6, 3, device='meta')", "nn.ParameterList()", "nn.LazyLinear(3)", "nn.Identity()"),
)
DATA = (
    *("3", "None", "raises", "[]", "[None]", "[[]]", "{}", "'text'", "torch.tensor(1.)", "iter(batches())", "range(3)"),
    *("(torch.tensor(1.), torch.tensor(1))", "(torch.randn(9, 6), torch.zeros(8).long())", "(None, None)", "float"),
    *("(torch.randn(0, 6), torch.zeros(0).long())", "(torch.randn(9, 6), torch.full((9,), 7))", "pair()[0]"),
    *("(torch.randn(9, 5), torch.zeros(9).long())", "(torch.randn(9, 6).half(), torch.zeros(9))", "batches(None)"),
    *("batches(3)", "batches((torch.randn(7, 6), torch.full((7,), 9)))", "batches((torch.randn(7, 6), None))"),
    *("batches((torch.randn(7, 6),))", "batches((torch.tensor(1.), torch.tensor(1)))", "batches((None, None))"),
    *("batches((torch.randn(7, 5), torch.zeros(7).long()))", "batches((torch.randn(7, 6), torch.zeros(6).long()))"),
    *("Stream(KeyError('k'))", "Stream(None)", "Stream(StopIteration())", "Stream(OSError(5, 'disk'))", "batches('x')"),
    *("Stream((torch.full((7, 6), float('nan')), torch.zeros(7).long()))", "lambda: Stream(RecursionError())"),
)
LOSSES = (
    *("3", "None", "raises", "lambda: 1", "lambda m, b: None", "lambda m, b: 1.0", "lambda m, b: torch.tensor(1)"),
    *("lambda m, b: m(b[0])", "lambda m, b: (loss(m, b), None)", "lambda m, b: (loss(m, b), -1)", "nn.MSELoss()"),
    *("lambda m, b: (loss(m, b), float('nan'))", "lambda m, b: loss(m, b) / (len(b[0]) != 7)", "nn.CrossEntropyLoss"),
    *("lambda m, b: loss(m, b) if len(b[0]) != 7 else None", "lambda m, b: loss(m, b) if len(b[0]) != 7 else b[9]"),
    *("nn.CrossEntropyLoss(reduction='none')", "lambda m, b: torch.randn(())", "lambda m, b: loss(m, b).item()"),
    *("lambda m, b: b['x']", "nn.functional.cross_entropy", "nn.NLLLoss(weight=torch.ones(2))", "lambda m, b: m"),
)
IMPORTS = (
    "raise KeyError(1)",
    "1 / 0",
    "def",
    "import nowhere",
    "\0",
    "raise SystemExit(0)",
    "import sys; sys.exit('x')",
)

VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "é\u2028", "\ud800", "\x00", "a" * 3000, [], {}, [1], [None], ["x"], {"a": 1}),
    *(0, 1, -1, 2, 0.5, -0.5, 2**31, 2**63, 10**30, 10**400, -(10**400), 1e308, -1e308, 1e-320, 1e200),
)
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 40 + "]" * 40, "[" * 9000 + "]" * 9000, "nul", "'x'")
WORDS = (
    *(
        "",
        " ",
        "-1",
        "0",
        "1",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1e-400",
        "x",
        "é",
        "\udcff",
        "1" * 5000,
        "9" * 30,
        "2.5",
    ),
    *("1,,2", " 1 , 2 ", ",", "1,x", "0x10", "--", "-", "a" * 5000, "/dev/zero", "/dev/null", "..", "nets:net", "nets"),
    *(
        "cuda:99",
        "meta",
        "mps",
        "xla",
        "cpu:7",
        "vulkan",
        "true",
        "sgd,",
        "a=b",
        "a=1e400",
        "=",
        "*",
        "[",
        "1GB",
        "-1GB",
    ),
    *("1e999GB", "nowhere/file.png", "file.png", "pipe", "folder", "loop", "\n", "{}", "[1]", "%s", "\x1b[31m"),
)
KINDS = ("pipe", "folder", "socket", "loop", "dangling", "/dev/zero", "/dev/full", "/dev/null", "nothing", "unreadable")

RUN = ("run", "--top", "1")
FILES = {  # by name: the calls that read it, or would write it
    "run/config.json": [("sharpness", *RUN), ("report", "sweep"), ("train", "RUN")],
    "run/result.json": [("train", "RUN"), ("sharpness", *RUN)],
    "run/sharpness.json": [("train", "RUN"), ("sharpness", *RUN)],
    "run/metrics.jsonl": [("train", "RUN")],
    "run/model.safetensors": [("sharpness", *RUN)],
    "run/checkpoint.pt": [("train", "RUN")],
    "run/track.png": [("train", "RUN")],
    "run/density.png": [("sharpness", *RUN, "--density")],
    "run/.lock": [("train", "RUN"), ("sharpness", *RUN)],
    "part/checkpoint.pt": [("train", "PART")],
    "part/config.json": [("train", "PART")],
    "part/metrics.jsonl": [("train", "PART")],
    "part/labels.safetensors": [("train", "PART")],
    "part/.lock": [("train", "PART")],
    "sparse/model.safetensors": [("sharpness", "sparse", "--top", "1")],
    "noisy/labels.safetensors": [("sharpness", "noisy", "--top", "1")],
    "sweep/sweep.json": [("report", "sweep"), ("SWEEP",)],
    "sweep/.claims/sgd-w2-s1": [("SWEEP", "--seeds", "2")],
    "sweep/.lock": [("SWEEP",)],
    "sweep/sgd-w2-s0/config.json": [("report", "sweep"), ("report", "sweep", "--solutions")],
    "sweep/sgd-w2-s0/result.json": [
        ("report", "sweep"),
        ("report", "sweep", "--figure", "f.png"),
        ("report", "sweep", "--solutions"),
        ("report", "sweep", "--json"),
        ("report", "sweep", "--by", "cost"),
    ],
    "sweep/sgd-w2-s0/sharpness.json": [("report", "sweep"), ("report", "sweep", "--solutions")],
    "sweep/sgd-w2-s0/metrics.jsonl": [
        ("report", "sweep", "--convergence"),
        ("report", "sweep", "--convergence", "--figure", "f.png"),
        ("report", "sweep", "--by", "cost", "--json"),
        ("report", "sweep", "--by", "cost", "--figure", "f.png"),
    ],
    "recipe.toml": [("train", "TOML"), ("sweep", "--widths", "2", "--config", "recipe.toml", "--out", "new")],
    "net.pt": [("sharpness", "net.pt", "--model", "nets:net", "--data", "nets:pair", "--top", "1")],
    "net.safetensors": [("sharpness", "net.safetensors", "--model", "nets:net", "--data", "nets:pair", "--top", "1")],
    "f.png": [("report", "sweep", "--figure", "f.png")],
    "v.safetensors": [("sharpness", *RUN, "--save-vectors", "v.safetensors")],
    "ud/x-ud-train.conllu": [("train", "UD")],
    "ud/x-ud-test.conllu": [("train", "UD")],
    "mols.csv": [("train", "CSV")],
    "review/train.jsonl": [("train", "SST2")],
}
EASY = ("--width", "2", "--epochs", "1", "--batch-size", "450", "--device", "cpu", "--threads", "1")
SHORT = {  # for words in the calls above
    "RUN": (*EASY, "--track", "1", "--out", "run"),
    "PART": (*EASY[:2], "--epochs", "2", *EASY[4:], "--label-noise", "0.2", "--out", "part"),
    "TOML": ("--width", "2", "--config", "recipe.toml", "--epochs", "1", "--threads", "1", "--out", "new"),
    "SWEEP": (
        *("sweep", "--widths", "2", "--optimizers", "sgd,sam", "--seeds", "1", "--measure", "none", "--out", "sweep"),
        *EASY[2:],
    ),
    "UD": ("pos", *EASY[2:4], "--width", "4", "--data", "ud", "--out", "new"),
    "CSV": ("molpcba", *EASY[2:4], "--width", "4", "--data", "mols.csv", "--out", "new"),
    "SST2": ("sst2", *EASY[2:4], "--width", "4", "--data", "review", "--out", "new"),
}
TRAIN = (
    "width optimizer rho label-noise sparsity seed measure track out base lr momentum weight-decay dropout batch-size "
    "epochs schedule milestones data config set pruner patience adaptive every m sigma lmbda rho-val accumulate clip "
    "precision threads device perturb split cell"
)
SHARPNESS = (
    "top which method tol lr rho unit figure curvature params mode dtype device samples memory model data loss "
    "save-vectors"
)
SWEEP = (
    "widths optimizers seeds rhos label-noises sparsities weight-decays measure track jobs engine partition gpus "
    "minutes out base lr momentum milestones data config set threads device"
)
CALLS = {  # by command: a call that works, and the options whose values are spoiled
    "train": (("train", *EASY, "--out", "new"), TRAIN),
    "sharpness": (("sharpness", *RUN), SHARPNESS),
    "checkpoint": (FILES["net.pt"][0], SHARPNESS),
    "sweep": (SHORT["SWEEP"], SWEEP),
    "report": (("report", "sweep"), "figure by"),
    "tasks": (("tasks",), ""),
}
WRITTEN = ("sharpness.json", "metrics.jsonl", "track.png", "density.png", "sweep.json", "f.png", "v.safetensors")


@dataclass(frozen=True)
class Case:
    """A call that something is wrong with."""

    name: str
    arguments: tuple[str, ...]
    spoil: Callable[[Path], None]  # what is there


# --- Cases


def cases(seed: int, count: int) -> list[Case]:
    """So many, of every family."""
    draw = random.Random(seed)
    families = (documents, documents, documents, files, binaries, options, options, modules)
    return [families[i % len(families)](draw) for i in range(count)]


def call(draw: random.Random, name: str) -> tuple[str, ...]:
    words = draw.choice(FILES[name])
    return tuple(part for word in words for part in SHORT.get(word, (word,)))


def documents(draw: random.Random) -> Case:
    """A text document with one field, or its text, changed."""
    name = draw.choice([name for name in FILES if name.endswith((".json", ".jsonl", ".toml", ".conllu", ".csv"))])
    change = spoiled_field(draw) if name.endswith((".json", ".jsonl", ".toml")) and draw.random() < 0.7 else None
    change = change or spoiled_text(draw)
    key = draw.random()

    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes(), random.Random(key), path.suffix))

    return Case(f"{name} {change.__doc__} {key}", call(draw, name), spoil)


Change = Callable[[bytes, random.Random, str], bytes]


def spoiled_field(draw: random.Random) -> Change:
    value: Any = draw.choice([*VALUES, *RAW, "missing", "nested", "twice"])

    def change(content: bytes, draw: random.Random, suffix: str) -> bytes:
        if suffix == ".toml":
            lines = content.decode().splitlines()
            line = draw.randrange(len(lines))
            text = str(value) if value in RAW else toml(value)
            lines[line] = f"{lines[line].split('=')[0]}= {text}" if value != "missing" else ""
            return "\n".join(lines).encode("utf-8", "surrogatepass")
        lines = content.decode().splitlines() if suffix == ".jsonl" else [content.decode()]
        line = draw.randrange(len(lines))
        document = json.loads(lines[line])
        place, field = draw.choice(list(fields(document)))
        if value == "missing":
            del place[field]
        elif value == "nested":
            place[field] = {"a": place[field]}
        elif value != "twice":
            place[field] = "@raw@" if value in RAW else value
        text = json.dumps(document).replace('"@raw@"', str(value))
        if value == "twice":
            text = text.replace("{", '{"task": 1, "task": 2, "parameters": 1, "parameters": 2, ', 1)
        lines[line] = text
        return "\n".join(lines).encode()

    change.__doc__ = f"with a field {str(value)[:30]!r}" if not isinstance(value, int) else "with another number"
    return change


def toml(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False).replace("null", "1979-05-27").replace(":", "=")
    return text


def fields(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a document: a container and a key."""
    keys = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(keys):
        yield document, key
        if isinstance(value, dict | list):
            yield from fields(value)


def spoiled_text(draw: random.Random) -> Change:
    ways: dict[str, Callable[[bytes, random.Random], bytes]] = {
        "cut": lambda content, draw: content[: draw.randrange(len(content))],
        "with another byte": lambda content, draw: replaced(content, draw, bytes([draw.randrange(256)])),
        "not UTF-8": lambda content, draw: replaced(content, draw, b"\xff\xfe\x80"),
        "with a mark of its order": lambda content, draw: b"\xef\xbb\xbf" + content,
        "in UTF-16": lambda content, draw: content.decode(errors="replace").encode("utf-16"),
        "empty": lambda content, draw: b"",
        "of zeros": lambda content, draw: bytes(len(content)),
        "of something else": lambda content, draw: draw.choice([b"null", b"[]", b"3", b"{}", b"PK\x03\x04", b"\n\n"]),
        "twice": lambda content, draw: content + content,
        "with a long line": lambda content, draw: content.replace(b"\n", b" ", 40) + b"1\tword\n" * 3,
        "without a line": lambda content, draw: b"\n".join(content.split(b"\n")[1:]),
    }
    name = draw.choice(list(ways))

    def change(content: bytes, draw: random.Random, suffix: str) -> bytes:
        return ways[name](content, draw)

    change.__doc__ = name
    return change


def replaced(content: bytes, draw: random.Random, by: bytes) -> bytes:
    place = draw.randrange(max(len(content), 1))
    return content[:place] + by + content[place + 1 :]


def files(draw: random.Random) -> Case:
    """Something that is no file in the place of one."""
    name, kind = draw.choice(list(FILES)), draw.choice(KINDS)
    return Case(f"{name} as {kind}", call(draw, name), lambda folder: put(kind, folder / name))


def put(kind: str, path: Path) -> None:
    """Something of this kind in the place of a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "unreadable":
        if path.exists():
            path.chmod(0)
        return
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("years of work")
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the address of a socket is short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
        os.chdir(here)
    elif kind != "nothing":
        path.symlink_to({"loop": path.name, "dangling": "nowhere"}.get(kind, kind))


def binaries(draw: random.Random) -> Case:
    """Tensors on disk that are damaged, or others."""
    names = [name for name in FILES if name.endswith((".pt", ".safetensors")) and name != "v.safetensors"]
    name, key = draw.choice(names), draw.random()
    way = draw.choice(["bytes", "bytes", "tensors", "tensors", "tensors", "structure"])

    def spoil(folder: Path) -> None:
        path, draw = folder / name, random.Random(key)
        if way == "bytes" or (way == "structure" and path.suffix == ".safetensors"):
            path.write_bytes(spoiled_text(draw)(path.read_bytes(), draw, path.suffix))
        elif path.suffix == ".safetensors":
            tensors = load_file(path)
            chosen = draw.choice(list(tensors))
            tensors[chosen] = other_tensor(tensors[chosen], draw)
            save_file(tensors, path)
        else:
            state = torch.load(path)
            place, field = draw.choice(list(fields(state)))
            if way == "tensors" and isinstance(place[field], torch.Tensor):
                place[field] = other_tensor(place[field], draw)
            else:
                spoil_structure(place, field, draw)
            torch.save(state, path)

    return Case(f"{name} with other {way} {key}", call(draw, name), spoil)


def other_tensor(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    others: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t.double(),
        lambda t: t.to(torch.int8),
        lambda t: t.to(torch.complex64),
        lambda t: t.bool(),
        lambda t: t.half(),
        lambda t: t.flatten(),
        lambda t: t[None],
        lambda t: t.flatten()[:0],
        lambda t: torch.tensor(3),
        lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t.long() - 99,
        lambda t: torch.full_like(t, 100),
        lambda t: torch.full_like(t, float("inf")) if t.is_floating_point() else ~t,
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of complex numbers that become whole ones
        return draw.choice(others)(tensor).contiguous().clone()


def spoil_structure(place: Any, field: Any, draw: random.Random) -> None:
    """Another value, no value, or in a dictionary another key."""
    way = draw.choice(["value", "nothing", "key"])
    if way == "value":
        place[field] = draw.choice([None, 3, -1.5, "x", [], {}, {3: 3}, (1, 2), torch.ones(2, 2), 10**400, True])
    elif way == "nothing" or isinstance(place, list):
        del place[field]
    else:
        place[draw.choice([3, None, ("a",), 0.5, "x", True])] = place.pop(field)


def options(draw: random.Random) -> Case:
    """A bad word for an option, or where none belongs."""
    arguments, names = CALLS[draw.choice([*CALLS, "train", "train", "sharpness", "checkpoint", "sweep"])]
    word = draw.choice(WORDS)
    if draw.random() < 0.1 or not names:
        place = draw.randrange(len(arguments) + 1)
        spoiled = draw.choice([(*arguments[:place], word, *arguments[place:]), arguments[:place]])
    else:
        option = f"--{draw.choice(names.split())}"
        spoiled = (*arguments, option) if draw.random() < 0.1 else (*arguments, option, word)
    return Case(f"{spoiled}"[:200], spoiled, lambda folder: None)


def modules(draw: random.Random) -> Case:
    """A user's module whose model, data or loss is wrong."""
    what = draw.choice(["model", "data", "data", "loss", "import"])
    value = draw.choice({"model": MODELS, "data": DATA, "loss": LOSSES, "import": IMPORTS}[what])
    name = f"m{draw.randrange(10**12)}"
    text = value if what == "import" else f"{MODULE}\nit = {value}\n"
    choice = {"model": "nets:net", "data": draw.choice(["nets:pair", "nets:batches"]), "loss": "nets:loss"}
    choice[what if what in choice else draw.choice(list(choice))] = f"{name}:it"
    more = draw.choice([(), (), ("--samples", "5"), ("--moments",), ("--trace",), ("--dtype", "float64")])
    arguments = ("sharpness", "net.pt", *(part for key, each in choice.items() for part in (f"--{key}", each)))
    return Case(
        f"{what} {value} {more}",
        (*arguments, "--top", "1", *more),
        lambda folder: (folder / f"{name}.py").write_bytes(text.encode()) and None,
    )


# --- Their runs


class TookTooLong(BaseException):
    """A call did not end."""


def too_long(number: int, frame: FrameType | None) -> None:
    raise TookTooLong


@dataclass(frozen=True)
class NotStarted:
    """Cells of a sweep, which these tests do not start."""

    cells: Sequence[Config]

    def ended(self) -> bool:
        return True

    def failures(self) -> dict[str, str]:
        return {cell.name: "not started" for cell in self.cells}

    def stop(self) -> None: ...


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with something of everything."""
    folder = tmp_path_factory.mktemp("template")

    def trained(name: str, **choices: Any) -> None:
        for _ in train(Config.of("digits", RECIPE, width=2, device="cpu", **choices), folder / name):
            if name == "part":
                break

    trained("run", track=1)
    trained("noisy", label_noise=0.2)
    trained("sparse", sparsity=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", 0)
        trained("part", label_noise=0.2, epochs=2)
    cells = [Config.of("digits", RECIPE, width=2, device="cpu", optimizer=name) for name in ("sgd", "sam")]
    measured = {"which": "LA", "values": [2.0], "errors": [0.1], "converged": True, "complete": True}
    moments = {"unit": "sample", "converged": True, "nonuniformity": {"2": 1.0, "3": 2.0}}
    for cell in cells:
        trained(f"sweep/{cell.name}", optimizer=cell.optimizer)
        write_json(folder / "sweep" / cell.name / "sharpness.json", {"eigenvalues": measured, "moments": moments})
    write_json(folder / "sweep" / "sweep.json", {"cells": [cell.to_json() for cell in cells]})
    write_json(folder / "run" / "sharpness.json", {"dtype": "float32", "eigenvalues": measured, "moments": moments})
    (folder / "recipe.toml").write_text(
        "lr = 0.1\nmomentum = 0.5\nbatch_size = 450\nmilestones = [0.5]\nschedule = 'step'\nrho = 0.1\n"
        "weight_decay = 0.0\nlabel_noise = 0.1\naugment = false\nevery = 1\nclip = 1.0\nprecision = 'float32'\n"
    )
    (folder / "nets.py").write_text(MODULE)
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    torch.save(model.state_dict(), folder / "net.pt")
    save_file(model.state_dict(), folder / "net.safetensors")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "ud").mkdir()
    word = "{}\t{}\t_\t{}\t_\t_\t_\t_\t_\t_\n"
    lines = [word.format(i, text, tag) for i, (text, tag) in enumerate([("A", "DET"), ("cat", "NOUN")], 1)]
    for split in ("train", "test"):
        (folder / "ud" / f"x-ud-{split}.conllu").write_text("".join([*lines, "\n"]) * 12)
    smiles = [f"{'C' * k}c1cc{core}cc1" for k in range(1, 9) for core in ("c", "n", "[n+]")]
    rows = [f"{each},{i % 2}\n" for i, each in enumerate(smiles)]
    (folder / "mols.csv").write_text("smiles,label\n" + "".join(rows))
    (folder / "review").mkdir()
    for split in ("train", "validation"):
        texts = [json.dumps({"sentence": f"word{i} is good", "label": i % 2}) for i in range(30)]
        (folder / "review" / f"{split}.jsonl").write_text("\n".join(texts))
    return folder


@pytest.fixture
def attempt(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Case], list[str]]]:
    """Run a case in a copy of the template; returns what is wrong with its end."""
    monkeypatch.setattr(engines.Local, "start", lambda engine, folder, cells, measure: NotStarted(cells))
    monkeypatch.setattr(sys, "path", [*sys.path])
    place = tmp_path / "place"

    def run(case: Case) -> list[str]:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(template, place, symlinks=True, copy_function=shutil.copy2, ignore=_pipes)
        os.mkfifo(place / "pipe")
        os.chdir(place)
        sys.modules.pop("nets", None)
        sys.path[:] = [each for each in sys.path if each != str(place)]
        case.spoil(place)
        before = contents(place)
        status, out, err = ended(case.arguments)
        after = contents(place)
        return list(complaints(case, status, out, err, before, after))

    here, threads, state = os.getcwd(), torch.get_num_threads(), torch.get_rng_state()
    yield run
    os.chdir(here)
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def _pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "pipe"]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def ended(arguments: tuple[str, ...]) -> tuple[Any, str, str]:
    """How a call ends: its status, or the error that it must not end with, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main(arguments)
        status: Any = "it returned"
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        status = repr(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return status, out.getvalue(), err.getvalue()


def complaints(
    case: Case, status: Any, out: str, err: str, before: dict[str, bytes], after: dict[str, bytes]
) -> Iterator[str]:
    """What is wrong with the end of a call."""
    if status not in (0, 1, 2):
        yield f"ended with {status}"
    lines = [line for line in err.splitlines() if " failed: " not in line]  # cells of a sweep may fail, one a line
    if status != 0 and not (len(lines) == 1 and lines[0].startswith("Error: ") and 7 < len(lines[0]) < 1100):
        yield f"said {err[-500:]!r}"
    if "Traceback" in err or "internal error" in err:
        yield f"said {err[-500:]!r}"
    if status == 0 and "--json" in case.arguments:
        json.loads(out)
    for name, content in before.items():
        known = name.startswith("part/") or (name.endswith(WRITTEN) and (status != 2 or case.arguments[0] == "sweep"))
        if after.get(name) != content and not known:
            yield f"changed {name}"
    if extra := [name for name in after if name.endswith(".new")]:
        yield f"left {extra}"


def test_some_malformed_inputs_end_in_one_line_each(attempt: Callable[[Case], list[str]]) -> None:
    for case in cases(0, 24):
        assert attempt(case) == [], case


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_thousands_of_malformed_inputs_end_in_one_line_each(attempt: Callable[[Case], list[str]], part: int) -> None:
    wrong = {case.name: found for case in cases(part + 1, CASES // PARTS) if (found := attempt(case))}
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())
