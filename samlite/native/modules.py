"""Chooses the compiled module for the torch of this process: a packaged one, or one that was built into the cache.

A module built for another minor version of torch may crash when it is loaded, so only the one for this version is.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from samlite.native import build
from samlite.native.naming import module_name

NAME = "samlite._C"


def load() -> ModuleType:
    """The module for the torch of this process, built first where none is there.

    Raises ImportError, in one line, where it can be neither found nor built.
    """
    path = packaged(torch.__version__)
    if path is not None:
        try:
            return _load(path)
        except ImportError:  # a torch that was compiled in another way
            pass
    return _load(build.cached() or build.build())


def packaged(version: str) -> Path | None:
    """The file for this version of torch that came with the package."""
    spec = find_spec(f"samlite.native.{module_name(version)}")
    return Path(spec.origin) if spec and spec.origin else None


def all_packaged() -> list[str]:
    """The minor versions of torch that the package has a module for."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    folders = {Path(path) for path in sys.modules["samlite.native"].__path__}
    names = [file.name.removesuffix(suffix) for folder in folders for file in folder.glob(f"torch_*{suffix}")]
    known = packaged(torch.__version__)  # an editable install keeps it in another folder
    if known is not None:
        names.append(known.name.removesuffix(suffix))
    return sorted({name.removeprefix("torch_").replace("_", ".") for name in names}, key=_number)


def _number(minor: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", minor)]


def _load(path: Path) -> ModuleType:
    spec = spec_from_file_location(NAME, path)
    assert isinstance(spec, ModuleSpec) and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
