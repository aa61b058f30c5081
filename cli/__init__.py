"""The terminal: one command a file, each importing what is heavy only when it runs."""

import sys
from collections.abc import Sequence

import click

from samlite import __version__
from samlite.cli.report import report
from samlite.cli.sharpness import sharpness
from samlite.cli.sweep import sweep
from samlite.cli.tasks import tasks
from samlite.cli.train import train


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
    progress to standard error. Exit status: 0 done, 1 failed or not converged, 2 bad usage.

    \b
    Completion of commands and options in your shell (zsh and fish likewise):
      eval "$(_SAMLITE_COMPLETE=bash_source samlite)"
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (tasks, train, sharpness, sweep, report):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; whatever goes wrong becomes one line here."""
    try:
        status = cli.main(arguments, prog_name="samlite", standalone_mode=False)
    except click.Abort:
        _fail("interrupted; repeat the command to continue", 130)
    except click.UsageError as error:
        help_command = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _fail(error.format_message() + help_command, 2)
    except (click.ClickException, ValueError) as error:
        _fail(error, 2)
    except OSError as error:
        _fail(f"{error.strerror}: {error.filename}" if error.strerror and error.filename else error, 1)
    except (ImportError, MemoryError, RuntimeError) as error:
        _fail(error, 1)
    sys.exit(status or 0)


def _fail(problem: object, status: int) -> None:
    click.echo(f"Error: {' '.join(str(problem).split()) or type(problem).__name__}", err=True)
    sys.exit(status)
