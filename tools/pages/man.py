"""The man pages. What a program takes is read off the program itself, the rest is prose that lies beside its code.

``sendense-restore(1)``: the tree of commands and ``cli/manual.md``; ``sendense-restored(8)``: its argument parser and
``daemon/manual.md``; ``restored.toml(5)``: ``docs/configuration.md``. In a manual.md each ``#`` heading is a section;
a section that is made goes where its heading stands, after the prose that it has there.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, NoReturn
from unittest import mock

from sendense_restored import __version__, errors
from sendense_restored.cli.output import PROGRAM
from sendense_restored.daemon.main import main as daemon

from . import roff
from .commands import HELP, Command, Option, tree, usage

if TYPE_CHECKING:
    from pathlib import Path

_MANUAL = "sendense-restored manual"
_MADE = '.\\" Made by tools/docs from the sources; change them, not this.'
_SIGNALS = {130: "Ctrl-C", 141: "The reader of the output has gone.", 143: "SIGTERM; other signals likewise."}


def pages(root: Path) -> dict[str, str]:
    """All of ``man/``."""
    source = f"sendense-restored {__version__}"
    date = released((root / "CHANGELOG.md").read_text(encoding="utf-8"))
    package = root / "sendense_restored"
    client = roff.sections((package / "cli/manual.md").read_text(encoding="utf-8"))
    service = roff.sections((package / "daemon/manual.md").read_text(encoding="utf-8"))
    configuration = (root / "docs/configuration.md").read_text(encoding="utf-8")
    made = {
        f"man/{PROGRAM}.1": [
            *roff.title(PROGRAM, 1, date, source, _MANUAL),
            *_page(client, {"COMMANDS": _commands(tree()), "EXIT STATUS": _exit_status()}),
        ],
        "man/sendense-restored.8": [
            *roff.title("sendense-restored", 8, date, source, _MANUAL),
            *_page(service, {"OPTIONS": _parsed(_daemon_parser())}),
        ],
        "man/restored.toml.5": [
            *roff.title("restored.toml", 5, date, source, _MANUAL),
            *(".SH NAME", "restored.toml \\- configuration of sendense\\-restored"),
            *_page({"DESCRIPTION": roff.sections(configuration)["Configuration"]}, {}),
            *(".SH SEE ALSO", ".BR sendense\\-restored (8)"),
        ],
    }
    return {path: "\n".join([_MADE, *lines]) + "\n" for path, lines in made.items()}


def released(changelog: str) -> str:
    """The date of the newest release, nothing before the first."""
    match = re.search(r"^## \[?[0-9.]+\]? - (\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    return match[1] if match else ""


def _page(prose: dict[str, str], made: dict[str, list[str]]) -> list[str]:
    if missing := made.keys() - prose.keys():
        raise ValueError(f"manual.md has no heading for {', '.join(missing)}")
    lines: list[str] = []
    for heading, markdown in prose.items():
        content = roff.body(markdown) + made.get(heading, [])
        # A paragraph macro right after a heading does nothing, and linters say so.
        lines += [f".SH {roff.quoted(heading)}", *(content[1:] if content[:1] == [".PP"] else content)]
    return lines


def _commands(program: Command) -> list[str]:
    lines: list[str] = []
    for command in program.walk():
        if command.commands:
            continue
        lines += [f".SS {roff.quoted(usage(command))}", roff.filled(command.help)]
        for argument in command.arguments:
            lines += [".TP", f"\\fI{roff.text(argument.metavar)}\\fR", roff.filled(argument.help)]
        for option in command.options:
            if option.names not in {HELP.names, ("--json",)}:
                lines += _option(option)
    return lines


def _option(option: Option) -> list[str]:
    names = ", ".join(f"\\fB{roff.text(name)}\\fR" for name in option.names)
    value = f" \\fI{roff.text(option.metavar)}\\fR" if option.metavar else ""
    default = f" Default: {option.default}." if option.default else ""
    return [".TP", names + value, roff.filled(option.help + default)]


def _exit_status() -> list[str]:
    """A line for each code and the errors that have it; the text is the error's own docstring."""
    codes: dict[int, list[type[errors.RestoreError]]] = {}
    for error in errors.BY_NAME.values():
        codes.setdefault(error.exit_code, []).append(error)
    lines = [".TP", "0", "Success."]
    for code, classes in sorted(codes.items()):
        meanings = [
            f"**{cls.__name__}**: {' '.join((cls.__doc__ or '').replace('``', '`').split())}" for cls in classes
        ]
        lines += [".TP", str(code), roff.filled(" ".join(meanings))]
    for code, meaning in _SIGNALS.items():
        lines += [".TP", str(code), roff.filled(meaning)]
    return lines


class _FoundError(Exception):
    """Carries the parser out of a program that was about to use it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def _daemon_parser() -> argparse.ArgumentParser:
    """The daemon's own parser, at the moment at which it would look at the command line."""

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        raise _FoundError(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), mock.patch.object(sys, "argv", ["x"]):
        try:
            daemon()
        except _FoundError as found:
            return found.parser
    raise ValueError("the daemon has no argument parser any more")


def _parsed(parser: argparse.ArgumentParser) -> list[str]:
    lines: list[str] = []
    for action in parser._actions:  # noqa: SLF001 - argparse shows them nowhere else
        help_text = (action.help or "") % {"default": action.default, "prog": parser.prog}
        takes = action.nargs is None
        metavar = (action.metavar or action.dest.upper()) if takes else ""
        lines += _option(Option(tuple(action.option_strings), str(metavar), help_text))
    return lines
