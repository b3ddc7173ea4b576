"""The commands ``find`` and ``tree``: what is below a guest directory, printed as it arrives, of any size.

``find`` reads one stream, which the service filters; ending early closes it. ``tree`` asks for one directory after
the other, because its lines need an order, and keeps no more than a page of each level. What cannot be read is
reported in its place, and the end is then exit code 8: nobody shall take a part for the whole.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Optional

import typer

from sendense_restored import errors
from sendense_restored.client import Entry, Problem

from . import output, values
from .frame import JSON, LONG, MOUNT, NUL, as_text, call, find_mount, flag, guest_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sendense_restored.client import Client, Filters, Found, Summary

_START = typer.Argument("/", metavar="[PATH]", help="The directory to start from; / has the volumes.")
_DEPTH = "How many levels to go down; 1 is what lies in PATH itself, 0 is no limit."
_OF_ONE_DIRECTORY = (
    errors.PathNotFound,
    errors.NotADirectory,
    errors.InvalidPath,
    errors.VolumeUnavailable,
    errors.Unreadable,
    errors.Timeout,
)
"""Errors that leave other directories readable."""


class Kind(StrEnum):
    """What something in a listing is."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    FIFO = "fifo"
    SOCKET = "socket"
    BLOCK = "block"
    CHAR = "char"
    VOLUME = "volume"


_KIND = typer.Option(None, "--kind", show_default=False, help="Only this kind of file.")


def _text(name: str, metavar: str, help: str) -> str:  # noqa: A002 - the name is typer's
    text: str = typer.Option("", name, metavar=metavar, show_default=False, help=help)
    return text


def find(
    *,
    mount: str = MOUNT,
    path: str = _START,
    name: str = _text("--name", "GLOB", "Only what has such a name, as in '*.conf'."),
    kind: Optional[Kind] = _KIND,  # noqa: UP045 - typer 0.7 does not know Kind | None
    min_size: str = _text("--min-size", "SIZE", "Only what has at least this size, such as 10M or 1.5GiB."),
    max_size: str = _text("--max-size", "SIZE", "Only what has at most this size."),
    newer: str = _text("--newer", "TIME", "Only what was modified since: a date or time, or 7d for a week ago."),
    older: str = _text("--older", "TIME", "Only what was not modified after that."),
    max_depth: int = typer.Option(0, "--max-depth", min=0, max=2**32 - 1, metavar="N", help=_DEPTH),
    limit: int = typer.Option(0, "--limit", min=0, max=2**63 - 1, metavar="N", help="End after N; 0 is no limit."),
    long: bool = LONG,
    null: bool = NUL,
    as_json: bool = JSON,
) -> None:
    """Find guest files below a directory by name, kind, size or time; prints their paths."""
    path = guest_path(path)
    now = time.time_ns()
    filters: Filters = {
        "recursive": True,
        "max_depth": max_depth,
        "name": as_text(name),
        "kind": kind.value if kind else "",
        "min_size": values.size("--min-size", min_size) if min_size else None,
        "max_size": values.size("--max-size", max_size) if max_size else None,
        "newer": values.moment("--newer", newer, now_ns=now) if newer else None,
        "older": values.moment("--older", older, now_ns=now) if older else None,
        "limit": limit,
    }

    async def work(client: Client) -> Summary:
        async with await client.listing(await find_mount(client, mount), path, **filters) as found:
            if as_json:
                await output.listing(found, output.found_json)
                return found.summary
            async for record in found:
                if isinstance(record, Problem):
                    output.note(f"{record.path}: {record.error}")
                else:
                    output.line(_long(record) if long else record.path, end="\0" if null else "\n")
            return found.summary

    summary = call(work)
    if summary.truncated:
        output.note(f"there is more than the first {summary.entries}; give a higher --limit", as_json=as_json)
    _complain(summary.errors)


def _long(found: Found) -> str:
    notes = (found.display_name, found.unreadable)
    return output.long_line(found.kind, found.mode, found.size, found.mtime_ns, found.path, found.target, *notes)


def _complain(problems: int) -> None:
    """Raises Unreadable if there are any."""
    if problems:
        raise errors.Unreadable(f"not everything could be read: {problems} problems, each shown in its place")


@dataclass(frozen=True)
class _Branch:
    """One line of a tree: what is there, below which directory, and what is drawn before it."""

    item: Entry | Problem
    directory: str
    lines: str


@dataclass
class _Level:
    """A directory that is being walked: ``pending`` is what is known of it and was not shown yet."""

    path: str
    lines: str = ""
    cursor: str = ""
    complete: bool = False
    pending: deque[Entry | Problem] = field(default_factory=deque)

    def below(self, name: str, lines: str) -> _Level:
        return _Level(f"{self.path.rstrip('/')}/{name}", lines)


def tree(
    *,
    mount: str = MOUNT,
    path: str = _START,
    depth: int = typer.Option(0, "--depth", min=0, metavar="N", help=_DEPTH),
    everything: bool = flag("-a", "--all", text="Also what begins with a dot."),
    as_json: bool = JSON,
) -> None:
    """Draw a guest directory and all that is below it."""
    path = guest_path(path)
    count = {"directories": 0, "files": 0, "problems": 0}

    async def work(client: Client) -> None:
        found = _counted(_walked(client, await find_mount(client, mount), path, depth, everything=everything), count)
        if as_json:
            await output.listing(found, _branch_json)
            return
        output.line(path)
        async for branch in found:
            output.line(branch.lines + _drawn(branch.item))
        output.line()
        output.line(f"{count['directories']} directories, {count['files']} files")

    call(work)
    _complain(count["problems"])


def _drawn(item: Entry | Problem) -> str:
    if isinstance(item, Problem):
        return f"[{item.error}]"
    return f"{item.name} -> {item.target}" if item.kind == Kind.SYMLINK else item.name


def _branch_json(branch: _Branch) -> output.Json:
    if isinstance(branch.item, Problem):
        return output.found_json(branch.item)
    return output.entry_json(branch.item, branch.directory)


async def _counted(found: AsyncIterator[_Branch], count: dict[str, int]) -> AsyncIterator[_Branch]:
    async for branch in found:
        if isinstance(branch.item, Problem):
            count["problems"] += 1
        else:
            count["directories" if output.is_directory(branch.item.kind) else "files"] += 1
        yield branch


async def _walked(client: Client, mount: str, path: str, depth: int, *, everything: bool) -> AsyncIterator[_Branch]:
    """All that is below ``path``, parents first. No recursion: guests nest as deep as they like."""

    async def fill(level: _Level) -> None:
        """Have two items pending, or all there are: what is drawn before one depends on whether it is the last."""
        while len(level.pending) < 2 and not level.complete:
            try:
                entries, level.cursor = await client.list_files(mount, level.path, cursor=level.cursor)
            except _OF_ONE_DIRECTORY as error:
                if len(stack) == 1:
                    raise
                entries, level.cursor = [], ""
                level.pending.append(Problem(level.path, error.message))
            level.pending.extend(entry for entry in entries if everything or not entry.name.startswith("."))
            level.complete = not level.cursor

    stack = [_Level(path)]
    while stack:
        level = stack[-1]
        await fill(level)
        if not level.pending:
            stack.pop()
            continue
        item = level.pending.popleft()
        yield _Branch(item, level.path, level.lines + ("├── " if level.pending else "└── "))
        if isinstance(item, Entry) and output.is_directory(item.kind) and (not depth or len(stack) < depth):
            stack.append(level.below(item.name, level.lines + ("│   " if level.pending else "    ")))
