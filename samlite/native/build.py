"""Builds the compiled module for the torch of this process, once, into the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from samlite.files import claimed

PATIENCE = 600.0  # seconds to wait for another process that builds
_HERE = Path(__file__).parent


def cached() -> Path | None:
    """The module in the cache that was built from these sources for this torch and this Python."""
    path = _target()
    return path if path.is_file() else None


def build() -> Path:
    """Compile the module into the cache; of several processes one does, and the others wait.

    Raises ImportError, in one line, where there is no compiler, no place for the result, or an error in compiling.
    """
    target, compiler = _target(), find_compiler()
    if compiler is None:
        raise ImportError(
            f"samlite has no compiled module for torch {torch.__version__}, and no C++ compiler to build one; install "
            "one (such as the package g++), or a torch that python -m samlite.versions lists"
        )
    try:
        lock = claimed(target.parent / ".lock", PATIENCE)
        if lock is None:
            raise ImportError(f"another process has been building {target} for {PATIENCE:.0f} s; end it and try again")
        with lock:
            return cached() or _build(target, compiler)
    except OSError as error:
        raise ImportError(
            f"samlite cannot build its compiled module in {target.parent} ({error}); set SAMLITE_CACHE to a folder "
            "that can be written"
        ) from error


def find_compiler() -> str | None:
    """The C++ compiler that CXX names, else that of the system."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def cache() -> Path:
    """The folder for modules that are built: SAMLITE_CACHE, else samlite in the user's cache."""
    own = os.environ.get("SAMLITE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samlite"


def _target() -> Path:
    """Named after all that decides what is built."""
    digest = hashlib.sha256(f"{torch.__version__} {torch.compiled_with_cxx11_abi()} {_suffix()}".encode())
    for file in _sources():
        digest.update(file.name.encode() + file.read_bytes())
    return cache() / digest.hexdigest()[:16] / f"torch_{torch.__version__}{_suffix()}"


def _suffix() -> str:
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def _sources() -> list[Path]:
    """The C++ files, which are packaged; in a source folder they are at its top."""
    folders = (_HERE / "cpp", _HERE.parents[1] / "cpp")
    return sorted(file for folder in folders for file in folder.glob("*.*"))


def _build(target: Path, compiler: str) -> Path:
    for left in target.parent.glob("build-*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    sources = [file for file in _sources() if file.suffix == ".cpp"]
    began = time.monotonic()
    _say(f"samlite: compiling its module for torch {torch.__version__}, once; this takes about a minute")
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        objects = [Path(folder, f"{source.stem}.o") for source in sources]
        commands = [
            [compiler, *_compile_flags(), "-c", str(source), "-o", str(made)]
            for source, made in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for done, _ in enumerate(pool.map(_run, commands), 1):
                _show(f"samlite: {done} of {len(commands)} files, {time.monotonic() - began:.0f} s")
        made = Path(folder, target.name)
        _run([compiler, *map(str, objects), *_link_flags(), "-o", str(made)])
        os.replace(made, target)
    _show(f"samlite: compiled in {time.monotonic() - began:.0f} s\n")
    return target


def _compile_flags() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    folders = (include, include / "torch" / "csrc" / "api" / "include", sysconfig.get_path("include"))
    abi = int(torch.compiled_with_cxx11_abi())
    flags = ["-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    return [*flags, *(part for folder in folders for part in ("-isystem", str(folder)))]


def _link_flags() -> list[str]:
    libraries = Path(torch.__file__).parent / "lib"
    if sys.platform == "darwin":
        kind = ["-bundle", "-undefined", "dynamic_lookup"]
    else:  # two C++ libraries in one process corrupt each other: not the static one that some compilers link
        kind = ["-shared", "-l:libstdc++.so.6"]
    return [*kind, f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit status {done.returncode}"]
        raise ImportError(f"samlite cannot compile its module for torch {torch.__version__}: {errors[0].strip()}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(line: str) -> None:
    """In place of the last line, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
