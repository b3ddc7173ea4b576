"""The command line as it is: commands, their options and arguments, read off the program's own tree.

Only what click's classes keep as plain attributes is used, so that every version of the library gives the same.
"""

from __future__ import annotations

import enum
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import typer

from sendense_restored.cli.main import app
from sendense_restored.cli.output import PROGRAM

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Option:
    """``metavar`` is what it takes, nothing for a switch; ``default`` is shown if it says something."""

    names: tuple[str, ...]
    metavar: str
    help: str
    choices: tuple[str, ...] = ()
    default: str = ""


@dataclass(frozen=True)
class Argument:
    """``metavar`` has no brackets; ``many`` if it may be repeated."""

    metavar: str
    help: str
    required: bool
    many: bool


@dataclass(frozen=True)
class Command:
    """``path`` has the words after the program's name; none for the program itself."""

    path: tuple[str, ...]
    help: str
    options: tuple[Option, ...]
    arguments: tuple[Argument, ...]
    commands: tuple[Command, ...]

    def walk(self) -> Iterator[Command]:
        """This one and all below it."""
        yield self
        for command in self.commands:
            yield from command.walk()


HELP = Option(("--help",), "", "Show this message and exit.")


def tree() -> Command:
    """The whole program."""
    return _command((), typer.main.get_command(app))


def _command(path: tuple[str, ...], command: Any) -> Command:  # noqa: ANN401 - click's, of whichever version
    below = getattr(command, "commands", {})
    return Command(
        path,
        inspect.cleandoc(command.help or ""),
        (*(_option(each) for each in command.params if each.param_type_name == "option"), HELP),
        tuple(_argument(each) for each in command.params if each.param_type_name == "argument"),
        tuple(_command((*path, name), each) for name, each in below.items()),
    )


def _option(option: Any) -> Option:  # noqa: ANN401 - the same
    choices: tuple[str, ...] = ()
    if isinstance(option.type, click.Choice):
        choices = tuple(str(getattr(each, "value", each)) for each in option.type.choices)
    default = option.default.value if isinstance(option.default, enum.Enum) else option.default
    names = tuple(sorted(option.opts, key=len))
    if option.is_flag:
        return Option(names, "", option.help)
    shown = str(default) if option.show_default and default not in (None, "") else ""
    return Option(names, "|".join(choices) or option.metavar, option.help, choices, shown)


def _argument(argument: Any) -> Argument:  # noqa: ANN401 - the same
    metavar = argument.metavar.strip("[].")
    return Argument(metavar, argument.help, argument.required, argument.nargs == -1)


def usage(command: Command) -> str:
    """``sendense-restore ls [OPTION...] MOUNT [PATH]``."""
    words = [PROGRAM, *command.path, "[OPTION...]"]
    if command.commands:
        words.append("COMMAND")
    for argument in command.arguments:
        text = argument.metavar + ("..." if argument.many else "")
        words.append(text if argument.required else f"[{text}]")
    return " ".join(words)
