"""``sendense-restore``: the commands in one list, and the one place where an error becomes a line and an exit code.

Exit codes are those of the error table (``errors.py``); besides, 130 for Ctrl-C, 128 + n for another signal, and 141
when the reader of the output has gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

import click
import typer
from typer.core import TyperGroup

from sendense_restored import __version__, errors, names

from . import catalog, files, mounts, output, search, shell, status
from .frame import flag
from .output import PROGRAM

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

_INTERRUPTED = 128 + signal.SIGINT
_NOBODY_READS = 128 + signal.SIGPIPE


class _NobodyReadsError(Exception):
    """The reader of stdout has gone."""


class _InterruptedError(Exception):
    """Ctrl-C."""


class _Commands(TyperGroup):
    """Takes the two exceptions that click has an ending of its own for, before click sees them."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _NobodyReadsError from None
        except KeyboardInterrupt:
            raise _InterruptedError from None


app = typer.Typer(cls=_Commands, add_completion=False, no_args_is_help=True)
for command in (
    mounts.backups,
    mounts.mount,
    mounts.mounts,
    mounts.volumes,
    files.ls,
    search.tree,
    search.find,
    files.stat,
    files.cat,
    files.get,
    mounts.unmount,
    status.status,
    status.events,
    shell.shell,
):
    app.command()(command)
app.add_typer(catalog.app, name="catalog")


@app.callback(invoke_without_command=True)
def about(*, version: bool = flag("--version", text="Print the version.")) -> None:
    """Restore single files from the backups of virtual machines."""
    if version:
        output.line(f"{PROGRAM} {__version__}")
        raise typer.Exit


def run(arguments: Sequence[str]) -> int:
    """Run one command line; its exit code."""
    output.prepare()
    as_json = "--json" in arguments
    try:
        result = app(list(arguments), prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
    except errors.RestoreError as error:
        return _fail(error, as_json=as_json)
    except click.ClickException as error:
        return _fail(errors.InvalidOption(error.format_message()), as_json=as_json)
    except (_NobodyReadsError, BrokenPipeError):
        # What is still buffered has nowhere to go; the interpreter would complain when it tries at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NOBODY_READS
    except (_InterruptedError, KeyboardInterrupt, click.Abort):
        return _INTERRUPTED
    return result if isinstance(result, int) else 0


def _fail(error: errors.RestoreError, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": error.message, "code": type(error).__name__}), file=sys.stderr)
    else:
        print(f"{PROGRAM}: {names.displayable(error.message)}", file=sys.stderr)
    return error.exit_code


def _stop(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> NoReturn:
    """The program."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)  # so that what is half done is undone on the way out
    sys.exit(run(sys.argv[1:]))
