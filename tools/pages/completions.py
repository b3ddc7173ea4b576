"""Completions for bash, zsh and fish.

Each is an engine, the file in ``templates/``, with what the commands take put in where a line has ``@TABLE@``. What a
word can be has a name: ``mount``, ``backup``, ``repository`` and ``guest`` (a path below the mount that stands before
it) are asked of the service when somebody presses Tab, quietly and without ever asking for a password; ``file`` and
``directory`` are this host's; ``choice`` is one of those listed. ``@VALUES@`` are the options that take a value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .commands import Argument, Command, Option, tree

if TYPE_CHECKING:
    from pathlib import Path

_TEMPLATES = "tools/pages/templates"
_KINDS = {"MOUNT": "mount", "BACKUP": "backup", "REPOSITORY": "repository", "DEST": "file", "IMAGE": "none"}


def pages(root: Path) -> dict[str, str]:
    """All of ``completions/``, under the names that the shells look for."""
    program = tree()
    files = {
        "completions/sendense-restore.bash": ("bash", _bash(program)),
        "completions/_sendense-restore": ("zsh", _zsh(program)),
        "completions/sendense-restore.fish": ("fish", _fish(program)),
    }
    values = " ".join(value_options(program))
    return {path: _filled(root, shell, table).replace("@VALUES@", values) for path, (shell, table) in files.items()}


def _filled(root: Path, shell: str, table: list[str]) -> str:
    template = (root / _TEMPLATES / shell).read_text(encoding="utf-8")
    (line,) = (line for line in template.splitlines() if line.strip() == "@TABLE@")
    indent = line[: line.index("@")]
    return template.replace(line, "\n".join((indent + each).rstrip() for each in table))


def argument_kinds(command: Command) -> list[str]:
    """What each argument of a command can be."""
    metavars = [argument.metavar for argument in command.arguments]
    kinds = []
    for metavar in metavars:
        kind = _KINDS.get(metavar, "none")
        if metavar == "PATH":
            kind = "guest" if "MOUNT" in metavars else "directory"
        kinds.append(kind)
    return kinds


def option_kind(option: Option) -> str:
    """What an option's value can be; nothing for a switch."""
    if option.choices:
        return "choice"
    return _KINDS.get(option.metavar, "none") if option.metavar else ""


def _quoted(text: str) -> str:
    """One word for bash and zsh."""
    return "'" + text.replace("'", "'\\''") + "'"


# bash


def _bash(program: Command) -> list[str]:
    lines = ["case $1 in"]
    for command in program.walk():
        name = _quoted(" ".join(command.path))
        lines += [f"    {name})"]
        if command.commands:
            lines.append(f"        commands={_quoted(' '.join(each.path[-1] for each in command.commands))}")
        options = [name for option in command.options for name in option.names]
        lines.append(f"        options={_quoted(' '.join(options))}")
        if command.arguments:
            lines.append(f"        arguments=({' '.join(argument_kinds(command))})")
        lines += [
            f"        values[{name}]={_quoted(' '.join([option_kind(option), *option.choices]))}"
            for option in command.options
            if option.metavar
            for name in option.names
        ]
        lines.append("        ;;")
    return [*lines, "esac"]


# zsh


def _zsh(program: Command) -> list[str]:
    lines: list[str] = []
    for command in program.walk():
        function = "_".join(["_sendense-restore_at", *command.path])
        lines += [f"{function}() {{"]
        specs = [spec for option in command.options for spec in _zsh_option(option)]
        if command.commands:
            lines += ["    local curcontext=$curcontext state line", "    typeset -A opt_args"]
            specs += ["'1:command:->command'", "'*::argument:->argument'"]
        else:
            specs += [_zsh_argument(each, kind) for each, kind in zip(*_of(command), strict=True)]
        lines += ["    _arguments -C -s \\", *(f"        {spec} \\" for spec in specs[:-1]), f"        {specs[-1]}"]
        if command.commands:
            described = " ".join(_quoted(f"{each.path[-1]}:{_summary(each)}") for each in command.commands)
            lines += [
                "    case $state in",
                "        command)",
                f"            local -a commands=({described})",
                "            _describe command commands",
                "            ;;",
                "        argument)",
                f"            (( $+functions[{function}_$words[1]] )) && {function}_$words[1]",
                "            ;;",
                "    esac",
            ]
        lines += ["}", ""]
    return lines[:-1]


def _of(command: Command) -> tuple[tuple[Argument, ...], list[str]]:
    return command.arguments, argument_kinds(command)


def _zsh_option(option: Option) -> list[str]:
    """A specification for each name; one of them given, the others are not offered."""
    text = option.help.replace("[", "(").replace("]", ")").replace(":", "\\:")
    value = f":{option.metavar}:{_zsh_action(option)}" if option.metavar else ""
    excluded = f"({' '.join(option.names)})" if len(option.names) > 1 else ""
    # "=" after a long name: its value may follow after one as well.
    names = [f"{name}=" if value and name.startswith("--") else name for name in option.names]
    return [_quoted(f"{excluded}{name}[{text}]{value}") for name in names]


def _zsh_action(option: Option) -> str:
    kind = option_kind(option)
    return f"({' '.join(option.choices)})" if kind == "choice" else _zsh_kind(kind)


def _zsh_kind(kind: str) -> str:
    return {"none": " ", "file": "_files", "directory": "_files -/"}.get(kind, f"_sendense-restore-{kind}")


def _zsh_argument(argument: Argument, kind: str) -> str:
    place = "*" if argument.many else "" if argument.required else ":"
    return _quoted(f"{place}:{argument.metavar}:{_zsh_kind(kind)}")


# fish


def _fish(program: Command) -> list[str]:
    lines: list[str] = []
    for command in program.walk():
        lines.append(f"# {' '.join(command.path) or 'the program itself'}")
        path = " ".join(command.path)
        at = f"__sendense_restore_at {_fish_quoted(path)}"
        complete = f"complete -c sendense-restore -n {_fish_quoted(at)}"
        first = _fish_quoted(f"{at} 1")
        lines += [
            f"complete -c sendense-restore -n {first} -a {each.path[-1]} -d {_fish_quoted(_summary(each))}"
            for each in command.commands
        ]
        for option in command.options:
            names = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in reversed(option.names)
            )
            value = _fish_value(option_kind(option), option.choices) if option.metavar else ""
            takes = f" -x{value}" if option.metavar else ""
            lines.append(f"{complete} {names}{takes} -d {_fish_quoted(option.help)}")
        for number, kind in enumerate(argument_kinds(command), 1):
            value = _fish_value(kind, ())
            if value or kind == "file":
                at_place = f"__sendense_restore_at {_fish_quoted(path)} {number}"
                force = " -F" if kind == "file" else ""
                lines.append(f"complete -c sendense-restore -n {_fish_quoted(at_place)}{force}{value}")
    return lines


def _fish_value(kind: str, choices: tuple[str, ...]) -> str:
    dynamic = {"none": "", "file": "", "directory": "(__fish_complete_directories)"}
    words = " ".join(choices) if choices else dynamic.get(kind, f"(__sendense_restore_{kind})")
    return f" -a {_fish_quoted(words)}" if words else ""


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _summary(command: Command) -> str:
    """The first sentence of a command's help, without its full stop."""
    return command.help.splitlines()[0].partition("; ")[0].rstrip(".")


def value_options(program: Command) -> list[str]:
    """The names of all options that take a value; no name is a switch in one command and takes one in another."""
    taking = {
        name for command in program.walk() for option in command.options if option.metavar for name in option.names
    }
    switches = {
        name
        for command in program.walk()
        for option in command.options
        if not option.metavar
        for name in option.names
    }
    if both := taking & switches:
        raise ValueError(f"{', '.join(both)} is a switch here and takes a value there")
    return sorted(taking)
