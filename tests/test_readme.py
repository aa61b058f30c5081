"""The code of the README and of the recipes runs as it stands there."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import samlite

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("recipes.md", "measures.md")]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


BLOCKS = python_blocks(README)


@pytest.mark.parametrize("block", [*BLOCKS, *(block for guide in GUIDES for block in python_blocks(guide))])
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "fully_shard" in block and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("fully_shard of this torch does not work on a CPU")
    needs = re.match(r"# needs: (.*)", block)
    for package in needs[1].split() if needs else ():
        if not find_spec(package):
            pytest.skip(f"{package} is not installed")
    if needs:  # other packages have warnings and process groups of their own
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ})  # a block may set what torch.distributed needs
    with torch.random.fork_rng():
        exec(compile(block, "block", "exec"), {"__name__": "__main__"})  # in this process, to save time


def test_the_output_in_the_readme_is_that_of_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    block = next(block for block in BLOCKS if "samlite.Hessian" in block)
    shown = README[README.index(block) :].split("```text\n")[1].split("```")[0]
    with torch.random.fork_rng():
        exec(compile(block, "block", "exec"), {"__name__": "__main__"})
    numbers = [[float(x) for x in re.findall(r"\d\.\d+(?:e-\d+)?", text)] for text in (shown, capsys.readouterr().out)]
    assert numbers[1][:3] == pytest.approx(numbers[0][:3], rel=1e-3)  # to the tolerance of an eigenvalue
    assert numbers[1][3:] == pytest.approx(numbers[0][3:], rel=0.5)  # an error depends on rounding


def test_commands_and_options_in_the_documents_exist() -> None:
    from click import Context

    from samlite.cli import cli

    pages = [README, *(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))]
    used = [
        use
        for page in pages
        for use in re.findall(r"samlite (tasks|train|sharpness|surface|sweep|report)([^\n`|]*)", page)
    ]
    assert {name for name, _ in used} == set(cli.commands)
    for name, rest in used:
        command = cli.commands[name]
        known = {
            option
            for parameter in command.get_params(Context(command))
            for option in [*parameter.opts, *parameter.secondary_opts]
        }
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, (name, rest)


def test_the_reference_names_everything_public() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: samlite\.(\w+)", text, flags=re.MULTILINE)) == set(samlite.__all__) - {"__version__"}


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "samlite.Hessian.eigenvalues" in (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path) -> None:
    block = re.search(r"<!-- demo -->\n```bash\n(.*?)```", README, flags=re.DOTALL)
    assert block
    for line in block[1].splitlines():
        if line.startswith("samlite"):
            command = [sys.executable, "-m", "samlite.cli", *line.split()[1:]]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "digits.png").stat().st_size > 10_000


def test_the_house_in_contributing_has_a_place_for_every_file() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The house")[1].split("## Rules")[0]
    by_rule = {"tasks", "data", "models"}  # a file a workload
    files = [path for path in (ROOT / "samlite").rglob("*.py") if path.parent.name not in by_rule]
    names = {path.stem for path in [*files, *(ROOT / "cpp").iterdir()] if not path.stem.startswith("__")}
    assert len(names) > 80
    assert not [name for name in sorted(names) if not re.search(rf"`{name}`|/{name}\.py`", table)]
