"""The service's methods, as seen through one bus connection.

A ``Client`` owns its connection and is not reconnected: when the bus hangs up, its owner makes another. Mounts are
named by their ids throughout, object paths stay in here. A descriptor belongs to the caller from the moment the
method returns it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from sendense_restored import errors

from .answers import Backup, Entry, FileInfo, MountInfo, Scanned
from .connection import Argument, Connection, Reply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

BUS_NAME = "com.sendense.Restore1"
ROOT = "/com/sendense/Restore1"
MANAGER = f"{BUS_NAME}.Manager"
CATALOG = f"{BUS_NAME}.Catalog"
MOUNT = f"{BUS_NAME}.Mount"
_NO_OPTIONS: Argument = ("a{sv}", {})


@dataclass(frozen=True)
class Timeouts:
    """Seconds that the service has for an answer."""

    call: float = 60.0
    long: float = 300.0
    """For Mount and Scan, and for every call that a person may first have to type a password for."""


def mount_object(mount: str) -> str:
    """The object path of the mount with this id. Raises MountNotFound for what cannot be an id."""
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", mount):
        raise errors.MountNotFound("this is not the id of a mount; list the mounts to see theirs")
    return f"{ROOT}/mounts/{mount.replace('-', '_')}"


def mount_id(path: str) -> str:
    """The id of the mount with this object path."""
    return path.rpartition("/")[2].replace("_", "-")


class Client:
    """The service. Every method may raise any error of the closed list."""

    def __init__(self, connection: Connection, *, interactive: bool = False, timeouts: Timeouts) -> None:
        self._connection = connection
        self._interactive = interactive
        self._timeouts = Timeouts(timeouts.long, timeouts.long) if interactive else timeouts

    @classmethod
    async def connect(
        cls, address: str | None = None, *, interactive: bool = False, timeouts: Timeouts | None = None
    ) -> Client:
        """A client on the bus at ``address``, by default the system bus. Raises Unavailable.

        ``interactive`` lets polkit ask the person in front of the screen for a password.
        """
        timeouts = timeouts or Timeouts()
        connection = await Connection.open(address, seconds=timeouts.call)
        return cls(connection, interactive=interactive, timeouts=timeouts)

    @property
    def connected(self) -> bool:
        """Whether calls can still be made."""
        return not self._connection.ended

    def close(self) -> None:
        """End the connection; pending calls raise Unavailable. May be called again."""
        self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    # Manager

    async def list_backups(
        self, *, vm_name: str = "", status: str = "", repository_id: str = "", limit: int = 0, cursor: str = ""
    ) -> tuple[list[Backup], str]:
        """One page of the catalogue, newest first, and the cursor of the next (empty: there is none)."""
        wanted = {"vm_name": vm_name, "status": status, "repository_id": repository_id, "cursor": cursor}
        options = _given(limit=("u", limit), **{name: ("s", text) for name, text in wanted.items()})
        found, following = await self._call(ROOT, MANAGER, "ListBackups", ("a{sv}", options), answer="aa{sv}s")
        return [Backup.decode(backup) for backup in found], _advanced(cursor, following)

    async def backups(
        self, *, vm_name: str = "", status: str = "", repository_id: str = "", page: int = 0
    ) -> AsyncIterator[Backup]:
        """All matching backups, ``page`` at a time (0: as many as the service likes)."""
        cursor = ""
        while True:
            found, cursor = await self.list_backups(
                vm_name=vm_name, status=status, repository_id=repository_id, limit=page, cursor=cursor
            )
            for backup in found:
                yield backup
            if not cursor:
                return

    async def mount(
        self,
        backup_id: str,
        *,
        disk_index: int = 0,
        all_disks: bool = False,
        journal: str = "",
    ) -> str:
        """Mount a backup, or join those who have it mounted already; the mount's id.

        A timeout or cancellation here does not stop the service from finishing the mount.
        """
        options = _given(
            disk_index=("u", disk_index),
            all_disks=("b", all_disks),
            journal=("s", journal),
        )
        arguments = ("s", backup_id), ("a{sv}", options)
        (path,) = await self._call(ROOT, MANAGER, "Mount", *arguments, answer="o", seconds=self._timeouts.long)
        return mount_id(path)

    async def list_mounts(self) -> list[str]:
        """The ids of the mounts that the caller may see."""
        (paths,) = await self._call(ROOT, MANAGER, "ListMounts", _NO_OPTIONS, answer="ao")
        return [mount_id(path) for path in paths]

    # Mount

    async def mount_info(self, mount: str) -> MountInfo:
        """All properties of a mount."""
        interface = "org.freedesktop.DBus.Properties"
        (properties,) = await self._call(mount_object(mount), interface, "GetAll", ("s", MOUNT), answer="a{sv}")
        return MountInfo.decode(properties)

    async def list_files(self, mount: str, path: str, *, limit: int = 0, cursor: str = "") -> tuple[list[Entry], str]:
        """One page of a directory and the cursor of the next (empty: there is none)."""
        arguments = ("s", path), ("a{sv}", _given(limit=("u", limit), cursor=("s", cursor)))
        entries, following = await self._call(
            mount_object(mount), MOUNT, "ListFiles", *arguments, answer="a(sstuxsa{sv})s"
        )
        return [Entry.decode(entry) for entry in entries], _advanced(cursor, following)

    async def files(self, mount: str, path: str, *, page: int = 0) -> AsyncIterator[Entry]:
        """A whole directory, ``page`` entries at a time (0: as many as the service likes)."""
        cursor = ""
        while True:
            entries, cursor = await self.list_files(mount, path, limit=page, cursor=cursor)
            for entry in entries:
                yield entry
            if not cursor:
                return

    async def file_info(self, mount: str, path: str) -> FileInfo:
        """What the guest's file system knows about one file."""
        arguments = ("s", path), _NO_OPTIONS
        (answer,) = await self._call(mount_object(mount), MOUNT, "GetFileInfo", *arguments, answer="a{sv}")
        return FileInfo.decode(answer)

    async def open_file(self, mount: str, path: str) -> tuple[int, FileInfo]:
        """A read-only descriptor of a regular file, which the caller owns and closes, and what it leads to."""
        arguments = ("s", path), _NO_OPTIONS
        reply = await self._exchange(mount_object(mount), MOUNT, "OpenFile", *arguments, answer="ha{sv}")
        try:
            index, answer = reply.values
            info = FileInfo.decode(answer)
            if index >= len(reply.fds):
                raise errors.Failed("the restore service's answer came without its file; try again")
            return reply.fds.pop(index), info
        finally:
            reply.close()

    async def unmount(self, mount: str, *, force: bool = False) -> None:
        """Drop the caller's claim; the last one closes the mount. ``force`` closes it for everybody."""
        options = ("a{sv}", _given(force=("b", force)))
        await self._call(mount_object(mount), MOUNT, "Unmount", options, answer="")

    # Catalog: the embedded database only

    async def add_repository(self, name: str, path: str) -> str:
        """Add a directory of images to the catalogue; the repository's id."""
        arguments = ("s", name), ("s", path), _NO_OPTIONS
        (repository_id,) = await self._call(ROOT, CATALOG, "AddRepository", *arguments, answer="s")
        return str(repository_id)

    async def remove_repository(self, repository_id: str) -> None:
        """Take a repository and its backups out of the catalogue; no image is touched."""
        await self._call(ROOT, CATALOG, "RemoveRepository", ("s", repository_id), _NO_OPTIONS, answer="")

    async def scan(self, repository_id: str) -> Scanned:
        """Look for new and vanished backups in a repository."""
        arguments = ("s", repository_id), _NO_OPTIONS
        (result,) = await self._call(ROOT, CATALOG, "Scan", *arguments, answer="a{sv}", seconds=self._timeouts.long)
        return Scanned.decode(result)

    async def add_backup(self, backup: Mapping[str, Argument]) -> str:
        """Add a backup by hand; its id."""
        (backup_id,) = await self._call(ROOT, CATALOG, "AddBackup", ("a{sv}", backup), _NO_OPTIONS, answer="s")
        return str(backup_id)

    async def remove_backup(self, backup_id: str) -> None:
        """Take a backup out of the catalogue; no image is touched."""
        await self._call(ROOT, CATALOG, "RemoveBackup", ("s", backup_id), _NO_OPTIONS, answer="")

    # Messages

    async def _call(
        self, path: str, interface: str, member: str, *arguments: Argument, answer: str, seconds: float = 0
    ) -> list[Any]:
        """The values that a method without descriptors in its answer returns."""
        reply = await self._exchange(path, interface, member, *arguments, answer=answer, seconds=seconds)
        reply.close()
        return reply.values

    async def _exchange(
        self, path: str, interface: str, member: str, *arguments: Argument, answer: str, seconds: float = 0
    ) -> Reply:
        """Call a method whose answer has the signature ``answer``; the caller owns the reply."""
        seconds = seconds or self._timeouts.call
        try:
            reply = await self._connection.call(
                BUS_NAME, path, interface, member, arguments, interactive=self._interactive, seconds=seconds
            )
        except TimeoutError:
            raise errors.Timeout(
                f"the restore service gave no answer to {member} within {seconds:g} s; look at its journal"
            ) from None
        if reply.signature != answer:
            reply.close()
            raise errors.Failed(f"the restore service answered {member} in another form; are both of one version?")
        return reply


def _given(**options: Argument) -> dict[str, Argument]:
    """The options that say something: nothing, zero and false are what the service assumes anyway."""
    return {name: (kind, value) for name, (kind, value) in options.items() if value}


def _advanced(cursor: str, following: str) -> str:
    """The cursor of the next page; a service that gives the same page for ever is stopped here."""
    if following and following == cursor:
        raise errors.Failed("the restore service's listing does not advance; report this as a fault")
    return following
