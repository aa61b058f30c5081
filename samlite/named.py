"""Objects of the user's own modules, by their names."""

import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

from samlite.errors import UsageError

MODULES = "SAMLITE_MODULES"
"""The variable that tells processes of a sweep, which run elsewhere, where the user's modules are."""


def resolve(name: str, option: str) -> Any:
    """The object that ``pkg.mod:name`` names; the current folder is on the path, or the one of the sweep's command."""
    module, separator, attribute = name.partition(":")
    if not (separator and module and attribute):
        raise UsageError(f"{option} must name an object as pkg.mod:name, got {name!r}")
    here = os.environ.get(MODULES, str(Path.cwd()))
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return pkgutil.resolve_name(name)
    except ImportError as error:
        raise UsageError(f"{option} must name an importable module, got {module!r} ({error})") from error
    except AttributeError:
        raise UsageError(f"{option} must name something in {module}, got {attribute!r}") from None
    except (Exception, SystemExit) as error:  # the user's own module: whatever goes wrong in it
        raise UsageError(f"{option}: importing {module} failed with {type(error).__name__}: {error}") from error


def called(name: str, option: str, *args: Any) -> Any:
    """What the named function returns."""
    function = resolve(name, option)
    if not callable(function):
        raise UsageError(f"{option} must name a function, got {name!r}, a {type(function).__name__}")
    try:
        return function(*args)
    except (Exception, SystemExit) as error:  # the user's own function
        raise UsageError(f"{option}: {name} failed with {type(error).__name__}: {error}") from error
