import errno

import pytest

from samlite.errors import UsageError, in_one_line, install_command, missing, require


def test_a_mistake_of_the_user_is_told_as_it_is_and_a_bug_as_one() -> None:
    assert in_one_line(UsageError("k must be >= 1,\n got 0")) == "k must be >= 1, got 0"
    assert in_one_line(ValueError("odd")) == "internal error: ValueError: odd; SAMLITE_DEBUG=1 shows where"
    assert in_one_line(RecursionError("deep")).startswith("internal error: RecursionError")
    assert in_one_line(MemoryError()) == "MemoryError"


def test_an_error_of_the_system_names_its_file() -> None:
    assert in_one_line(FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json")) == (
        "No such file or directory: a.json"
    )
    assert in_one_line(OSError("broken")) == "broken"


def test_require_raises_only_where_the_condition_fails() -> None:
    require(True, "never")
    with pytest.raises(UsageError, match="tol must be > 0, got 0"):
        require(False, "tol must be > 0, got 0")


def test_a_missing_package_comes_with_the_command_that_installs_it() -> None:
    command = install_command("plot")
    assert command.startswith("pip install 'matplotlib>=") and "submitit" not in command
    assert "'rdkit" in install_command("graphs") and "'scikit-learn" in install_command("graphs")
    assert str(missing("a figure", "matplotlib", "plot")) == f"a figure needs matplotlib: {command}"
