"""What importing, building and typing the package promises."""

import ast
import subprocess
import sys
from importlib.metadata import requires
from importlib.metadata import version as version_of
from pathlib import Path

import pytest
import torch

import samlite
from samlite.native.naming import module_name

ROOT = Path(__file__).parent.parent


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_sam_works_without_the_compiled_module_and_a_hessian_says_how_to_build_it() -> None:
    done = run("""
import sys
sys.modules["samlite._C"] = None  # as where it was never built
import torch, samlite
w = torch.nn.Parameter(torch.ones(3))
optimizer = samlite.SAM([w], torch.optim.SGD, lr=0.1)
def closure():
    loss = (w ** 2).sum()
    loss.backward()
    return loss
print(float(optimizer.step(closure)))
model = torch.nn.Linear(2, 1)
try:
    samlite.Hessian(model, torch.nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 1))).eigenvalues()
except ImportError as error:
    print(error)
""")
    assert done.returncode == 0, done.stderr
    first, message = done.stdout.strip().splitlines()
    assert first == "3.0"
    assert message.startswith("samlite._C could not be loaded") and "pip install" in message


def test_importing_the_package_does_not_import_torch() -> None:
    assert run("import samlite, sys; sys.exit('torch' in sys.modules)").returncode == 0


def test_every_public_name_is_there_and_an_unknown_one_is_not() -> None:
    for name in samlite.__all__:
        assert getattr(samlite, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'SAMM'"):
        _ = samlite.SAMM  # type: ignore[attr-defined]


def test_the_optimizer_imports_nothing_of_the_package() -> None:
    for path in (ROOT / "samlite" / "optim").glob("*.py"):
        imported = [
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        ]
        assert not [name for name in imported if name.startswith("samlite") and not name.startswith("samlite.optim")]


def test_the_library_does_not_import_the_command_line() -> None:
    for path in (ROOT / "samlite").rglob("*.py"):
        assert "import samlite.cli" not in path.read_text() and "from samlite.cli" not in path.read_text()


def sources() -> dict[str, ast.Module]:
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in (ROOT / "samlite").rglob("*.py")}


def test_the_name_of_a_file_of_a_run_stands_in_one_module() -> None:
    from samlite.training import runs

    names = {"CONFIG", "RECORDS", "CHECKPOINT", "WEIGHTS", "RESULT", "LABELS", "SHARPNESS", "TRACK"}
    files = {getattr(runs, name) for name in names}
    commands = {str(path): ast.parse(path.read_text()) for path in (ROOT / "cli").glob("*.py")}
    for path, tree in {**sources(), **commands}.items():
        literals = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert path.endswith("training/runs.py") or not literals & files, path


def test_no_name_with_an_underscore_crosses_a_file() -> None:
    private: dict[str, set[str]] = {}
    used: dict[str, set[str]] = {}
    for path, tree in sources().items():
        nodes = list(ast.walk(tree))
        functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
        assigned = {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
        fields = {
            node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        private[path] = {name for name in functions | assigned | fields if name.startswith("_") and name[1] != "_"}
        inherited = {
            node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        }
        used[path] = ({node.attr for node in attributes} - inherited) | imported
    for path, names in used.items():
        others = set().union(*(private[other] for other in private if other != path)) - private[path]
        if not path.startswith("samlite/optim"):  # variants of SAM extend it
            assert not names & others - TORCH, (path, names & others - TORCH)


TORCH = {"_buffers", "_cache"}  # names that torch has, too


def test_an_installed_package_requires_the_minor_version_of_torch_that_it_is_built_for() -> None:
    (pin,) = [requirement for requirement in requires("samlite") or () if requirement.startswith("torch")]
    major, minor = torch.__version__.split(".")[:2]
    assert set(pin.removeprefix("torch").split(",")) == {f">={major}.{minor}", f"<{major}.{int(minor) + 1}"}


def test_the_torch_to_build_for_is_found_without_importing_it() -> None:
    command = [sys.executable, str(ROOT / "tools" / "find_torch.py")]
    folder, version, module, abi = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(";")
    assert Path(folder) == Path(torch.__file__).parent and version == version_of("torch")
    assert module == module_name(torch.__version__) and abi == str(int(torch.compiled_with_cxx11_abi()))


def test_the_stub_names_what_the_compiled_module_has() -> None:
    from samlite.curvature.compiled import compiled

    stub = ast.parse((ROOT / "samlite" / "_C.pyi").read_text())
    for node in stub.body:
        if isinstance(node, ast.ClassDef):
            members = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            members |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}  # type: ignore[union-attr]
            members |= {item.targets[0].id for item in node.body if isinstance(item, ast.Assign)}  # type: ignore[attr-defined]
            actual = {name for name in vars(getattr(compiled(), node.name)) if not name.startswith("_")}
            if any(ast.unparse(base) == "Enum" for base in node.bases):
                actual -= {"name", "value"}
            assert {name for name in members if not name.startswith("_")} == actual, node.name
        elif isinstance(node, ast.FunctionDef):
            assert callable(getattr(compiled(), node.name))
