"""The methods of one mount's object.

Every method takes ``on_behalf_of``: the end user whose claim it is about. It needs a right of its own; without it the
call speaks for all claims of its user.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypedDict, Unpack

from sendense_restored import errors

from .answers import Entry, FileInfo, MountInfo
from .listing import Listing
from .messages import BUS_NAME, ROOT, Messages, advanced, given, taken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .connection import Argument

MOUNT = f"{BUS_NAME}.Mount"


def mount_object(mount: str) -> str:
    """The object path of the mount with this id. Raises MountNotFound for what cannot be an id."""
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", mount):
        raise errors.MountNotFound("this is not the id of a mount; list the mounts to see theirs")
    return f"{ROOT}/mounts/{mount.replace('-', '_')}"


def mount_id(path: str) -> str:
    """The id of the mount with this object path."""
    return path.rpartition("/")[2].replace("_", "-")


class Filters(TypedDict, total=False):
    """Options of a listing stream; what is not given, or None, does not restrict it."""

    recursive: bool
    max_depth: int
    """How deep a recursive one goes; what is in the directory itself has 1."""
    name: str
    """A glob for the last component."""
    kind: str
    min_size: int | None
    """In bytes, included, as is ``max_size``."""
    max_size: int | None
    newer: int | None
    """Time of modification in ns since the epoch, included, as is ``older``."""
    older: int | None
    limit: int
    """The stream ends after so many entries."""
    on_behalf_of: str


_FILTER_TYPES = {
    "recursive": "b",
    "max_depth": "u",
    "name": "s",
    "kind": "s",
    "min_size": "t",
    "max_size": "t",
    "newer": "x",
    "older": "x",
    "limit": "t",
    "on_behalf_of": "s",
}
_BOUNDS = {"min_size", "max_size", "newer", "older"}


class MountMethods(Messages):
    """What can be done with a mount, which its id names."""

    async def mount_info(self, mount: str) -> MountInfo:
        """All properties of a mount."""
        interface = "org.freedesktop.DBus.Properties"
        (properties,) = await self._call(mount_object(mount), interface, "GetAll", ("s", MOUNT), answer="a{sv}")
        return MountInfo.decode(properties)

    async def list_files(
        self, mount: str, path: str, *, limit: int = 0, cursor: str = "", on_behalf_of: str = ""
    ) -> tuple[list[Entry], str]:
        """One page of a directory and the cursor of the next (empty: there is none)."""
        options = given(limit=("u", limit), cursor=("s", cursor), on_behalf_of=("s", on_behalf_of))
        entries, following = await self._call(
            mount_object(mount), MOUNT, "ListFiles", ("s", path), ("a{sv}", options), answer="a(sstuxsa{sv})s"
        )
        return [Entry.decode(entry) for entry in entries], advanced(cursor, following)

    async def files(self, mount: str, path: str, *, page: int = 0, on_behalf_of: str = "") -> AsyncIterator[Entry]:
        """A whole directory, ``page`` entries at a time (0: as many as the service likes)."""
        cursor = ""
        while True:
            entries, cursor = await self.list_files(mount, path, limit=page, cursor=cursor, on_behalf_of=on_behalf_of)
            for entry in entries:
                yield entry
            if not cursor:
                return

    async def open_listing(self, mount: str, path: str, **filters: Unpack[Filters]) -> int:
        """A directory as a stream: the reading end of a pipe, which the caller owns; ``listing`` reads from it."""
        options = {
            name: (_FILTER_TYPES[name], value)
            for name, value in filters.items()
            # For a bound 0 says something: empty files, the epoch.
            if value or (name in _BOUNDS and value is not None)
        }
        arguments = ("s", path), ("a{sv}", options)
        reply = await self._exchange(mount_object(mount), MOUNT, "OpenListing", *arguments, answer="h")
        try:
            return taken(reply, reply.values[0])
        finally:
            reply.close()

    async def listing(self, mount: str, path: str, **filters: Unpack[Filters]) -> Listing:
        """The records of a directory as they arrive.

        The caller closes what it gets: ``async with await client.listing(...) as found: async for record in found``.
        """
        return Listing(await self.open_listing(mount, path, **filters))

    async def validate_path(self, mount: str, path: str, *, on_behalf_of: str = "") -> str:
        """The canonical form of a path that leads to something."""
        arguments = ("s", path), _options(on_behalf_of)
        (canonical,) = await self._call(mount_object(mount), MOUNT, "ValidatePath", *arguments, answer="s")
        return str(canonical)

    async def file_info(self, mount: str, path: str, *, on_behalf_of: str = "") -> FileInfo:
        """What the guest's file system knows about one file."""
        arguments = ("s", path), _options(on_behalf_of)
        (answer,) = await self._call(mount_object(mount), MOUNT, "GetFileInfo", *arguments, answer="a{sv}")
        return FileInfo.decode(answer)

    async def open_file(
        self, mount: str, path: str, *, stream: str | None = None, on_behalf_of: str = ""
    ) -> tuple[int, FileInfo]:
        """A read-only descriptor of a regular file, which the caller owns and closes, and what it leads to.

        ``stream``: of that alternate stream of a file or directory on NTFS; ``file_info`` has their names.
        """
        options = given(on_behalf_of=("s", on_behalf_of))
        if stream is not None:  # an empty one is for the service to refuse
            options["stream"] = ("s", stream)
        arguments = ("s", path), ("a{sv}", options)
        reply = await self._exchange(mount_object(mount), MOUNT, "OpenFile", *arguments, answer="ha{sv}")
        try:
            index, answer = reply.values
            info = FileInfo.decode(answer)
            return taken(reply, index), info
        finally:
            reply.close()

    async def keep_alive(self, mount: str, *, on_behalf_of: str = "") -> None:
        """Count as use of the mount: the caller's claims last their whole time again."""
        await self._call(mount_object(mount), MOUNT, "KeepAlive", _options(on_behalf_of), answer="")

    async def unmount(self, mount: str, *, force: bool = False, on_behalf_of: str = "") -> None:
        """Drop the caller's claims, or the one on that behalf; the last one closes the mount.

        ``force`` closes it for everybody.
        """
        options = given(force=("b", force), on_behalf_of=("s", on_behalf_of))
        await self._call(mount_object(mount), MOUNT, "Unmount", ("a{sv}", options), answer="")


def _options(on_behalf_of: str) -> Argument:
    return "a{sv}", given(on_behalf_of=("s", on_behalf_of))
