"""What every command shares: the connection, the arguments that name a mount or a guest file, the common options."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from sendense_restored import errors, names
from sendense_restored.client import Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

Result = TypeVar("Result")
Item = TypeVar("Item")

_FULL_ID = 36
_SHORTEST_PREFIX = 4


def flag(*names_of_it: str, text: str) -> Any:  # noqa: ANN401 - typer puts its own marker where a default stands
    """A switch that is off by default."""
    return typer.Option(False, *names_of_it, help=text)  # noqa: FBT003 - typer wants the default first


def required(*, metavar: str, help: str) -> Any:  # noqa: A002, ANN401 - as above; the name is typer's
    """An argument that must be given."""
    return typer.Argument(..., metavar=metavar, help=help, show_default=False)


LONG = flag("-l", "--long", text="With kind, permissions, size and time.")
NUL = flag("-0", "--null", text="End each with a NUL character instead of a newline, as 'xargs -0' takes them.")
ON_BEHALF_OF = typer.Option(
    "",
    "--on-behalf-of",
    metavar="NAME",
    show_default=False,
    help="The person on whose behalf you act, if you are allowed to; the claim on the mount is theirs.",
)
JSON = flag("--json", text="Print one JSON document; an error is one as well, on stderr.")
MOUNT_HELP = "The mount's id, or enough of its beginning (4 characters or more)."
MOUNT = required(metavar="MOUNT", help=MOUNT_HELP)
GUEST_PATH = required(metavar="PATH", help="A guest path, such as /partition-1/etc/fstab.")


def call(work: Callable[[Client], Awaitable[Result]]) -> Result:
    """Run ``work`` with a connection to the service; polkit may ask for a password if somebody can type one."""

    async def connected() -> Result:
        async with await Client.connect(interactive=sys.stdin.isatty()) as client:
            return await work(client)

    return asyncio.run(connected())


async def find_mount(client: Client, text: str) -> str:
    """The id of the mount that ``text`` is the id or the beginning of the id of."""
    wanted = text.lower()
    if len(wanted) == _FULL_ID:  # not looked up: the service knows what became of one that has ended
        return wanted
    if len(wanted) < _SHORTEST_PREFIX or not re.fullmatch(r"[0-9a-f-]+", wanted):
        raise errors.InvalidOption(f"{text!r} is no mount's id, nor {_SHORTEST_PREFIX} or more characters of one")
    found = [mount for mount in await client.list_mounts() if mount.startswith(wanted)]
    if not found:
        raise errors.MountNotFound(f"no mount's id begins with {text}; 'sendense-restore mounts' lists yours")
    if len(found) > 1:
        raise errors.InvalidOption(f"{text} is the beginning of {len(found)} mounts' ids; give more of it")
    return found[0]


async def at_most(limit: int, found: AsyncIterator[Item]) -> AsyncIterator[Item]:
    """The first ``limit`` of what is found, or all for 0."""
    count = 0
    async for item in found:
        yield item
        count += 1
        if count == limit:
            return


def guest_path(argument: str) -> str:
    """The canonical text of a guest path as it was typed or pasted. Raises InvalidPath."""
    return names.format_path(names.parse_path(as_text(argument)))


def as_text(argument: str) -> str:
    """The text form of guest names in an argument; one that is not valid UTF-8 is taken for their raw bytes."""
    return names.to_text(os.fsencode(argument)) if re.search("[\udc80-\udcff]", argument) else argument


def host_path(argument: str) -> str:
    """An absolute path on this host, as the service can be told it. Raises InvalidOption."""
    path = os.path.abspath(argument)  # noqa: PTH100 - Path.resolve() would follow links the service must judge
    if re.search("[\udc80-\udcff]", path):
        raise errors.InvalidOption("a repository's path must be valid UTF-8; rename the directory")
    return path
