"""The commands of the terminal as one, and what becomes of their errors."""

import os
import sys
import traceback
from collections.abc import Sequence
from io import TextIOWrapper

import click

from samlite import __version__
from samlite.cli.report import report
from samlite.cli.sharpness import sharpness
from samlite.cli.surface import surface
from samlite.cli.sweep import sweep
from samlite.cli.tasks import tasks
from samlite.cli.train import train
from samlite.errors import UsageError, in_one_line

LINE = 1_000  # characters of an error at most


@click.group(invoke_without_command=True)
@click.version_option(__version__, prog_name="samlite")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train networks with sharpness-aware minimization (SAM) at many widths, measure the sharpness of
    the minima they reach, and compare.

    \b
    Examples:
      samlite train --width 64 --optimizer sam     one run, on scikit-learn's digits
      samlite sharpness runs/digits-sgd-w64-s0     the largest Hessian eigenvalue at its minimum
      samlite sweep digits --widths 8,32,128       SGD and SAM at three widths, with a report

    The same command on the same folder continues unfinished work. Results go to standard output,
    progress to standard error. Exit status: 0 done, 1 failed or not converged, 2 bad usage. With
    SAMLITE_DEBUG=1 in the environment an error shows its traceback.

    \b
    Completion of commands and options in your shell (zsh and fish likewise):
      eval "$(_SAMLITE_COMPLETE=bash_source samlite)"
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (tasks, train, sharpness, surface, sweep, report):
    cli.add_command(command)


def run(arguments: Sequence[str] | None) -> None:
    """Run a command line and exit; whatever goes wrong becomes one line here, after its traceback if asked."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show stops nothing
    try:
        status = cli.main(arguments, prog_name="samlite", standalone_mode=False)
        click.echo(nl=False)  # writes what is left, while an error can still be told
    except click.Abort:
        _fail("interrupted; repeat the command to continue", 130)
    except click.UsageError as error:
        help_command = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _fail(error.format_message() + help_command, 2)
    except click.ClickException as error:
        _fail(error, 2)
    except Exception as error:
        _fail(in_one_line(error), 2 if isinstance(error, UsageError) else 1)
    sys.exit(status or 0)


def _fail(problem: object, status: int) -> None:
    if os.environ.get("SAMLITE_DEBUG") == "1":
        traceback.print_exc()
    line = " ".join(str(problem).split()) or type(problem).__name__
    click.echo(f"Error: {line if len(line) <= LINE else f'{line[: LINE // 2]} ... {line[-LINE // 2 :]}'}", err=True)
    _drop_output()
    sys.exit(status)


def _drop_output() -> None:
    """Leave nothing that the interpreter would fail to write at its end, and say so in lines of its own."""
    try:
        click.echo(nl=False)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
