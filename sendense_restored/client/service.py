"""The service's methods, as seen through one bus connection; those of a mount are in ``mounts``.

A ``Client`` owns its connection and is not reconnected: when the bus hangs up, its owner makes another. Mounts are
named by their ids throughout, object paths stay in here. A descriptor belongs to the caller from the moment the
method returns it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

from .answers import Backup, Event, HeldFile, Repository, Resources, Scanned, Vm
from .connection import Argument, Connection
from .messages import BUS_NAME, ROOT, Timeouts, advanced, given
from .mounts import MountMethods, mount_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

MANAGER = f"{BUS_NAME}.Manager"
CATALOG = f"{BUS_NAME}.Catalog"
_NO_OPTIONS: Argument = ("a{sv}", {})


class Client(MountMethods):
    """The service. Every method may raise any error of the closed list."""

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
        options = given(limit=("u", limit), **{name: ("s", text) for name, text in wanted.items()})
        found, following = await self._call(ROOT, MANAGER, "ListBackups", ("a{sv}", options), answer="aa{sv}s")
        return [Backup.decode(backup) for backup in found], advanced(cursor, following)

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

    async def list_vms(self, *, limit: int = 0, cursor: str = "") -> tuple[list[Vm], str]:
        """One page of the machines that have backups, by name, and the cursor of the next (empty: there is none)."""
        options = given(limit=("u", limit), cursor=("s", cursor))
        found, following = await self._call(ROOT, MANAGER, "ListVms", ("a{sv}", options), answer="aa{sv}s")
        return [Vm.decode(vm) for vm in found], advanced(cursor, following)

    async def vms(self, *, page: int = 0) -> AsyncIterator[Vm]:
        """All machines that have backups, ``page`` at a time (0: as many as the service likes)."""
        cursor = ""
        while True:
            found, cursor = await self.list_vms(limit=page, cursor=cursor)
            for vm in found:
                yield vm
            if not cursor:
                return

    async def list_repositories(self) -> list[Repository]:
        """The repositories of the catalogue, by name."""
        (found,) = await self._call(ROOT, MANAGER, "ListRepositories", _NO_OPTIONS, answer="aa{sv}")
        return [Repository.decode(repository) for repository in found]

    async def mount(
        self,
        backup_id: str,
        *,
        disk_index: int = 0,
        all_disks: bool = False,
        journal: str = "",
        idle_timeout: int = 0,
        wait: bool = False,
        on_behalf_of: str = "",
    ) -> str:
        """Mount a backup, or join those who have it mounted already; the mount's id.

        ``idle_timeout``, in seconds, is how long the claim lasts without use (0: as the service is set up). With
        ``wait`` a mount that has no room waits in a queue, and this without a time limit. A timeout or cancellation
        here does not stop the service from finishing a mount that it has begun.
        """
        options = given(
            disk_index=("u", disk_index),
            all_disks=("b", all_disks),
            journal=("s", journal),
            idle_timeout=("t", idle_timeout),
            wait=("b", wait),
            on_behalf_of=("s", on_behalf_of),
        )
        arguments = ("s", backup_id), ("a{sv}", options)
        seconds = math.inf if wait else self._timeouts.long
        (path,) = await self._call(ROOT, MANAGER, "Mount", *arguments, answer="o", seconds=seconds)
        return mount_id(path)

    async def list_mounts(self) -> list[str]:
        """The ids of the mounts that the caller may see."""
        (paths,) = await self._call(ROOT, MANAGER, "ListMounts", _NO_OPTIONS, answer="ao")
        return [mount_id(path) for path in paths]

    async def resources(self) -> Resources:
        """What the service uses and has left."""
        (answer,) = await self._call(ROOT, MANAGER, "GetResources", _NO_OPTIONS, answer="a{sv}")
        return Resources.decode(answer)

    async def list_events(self, *, mount: str = "", limit: int = 0, cursor: str = "") -> tuple[list[Event], str]:
        """One page of what has happened, newest first, and the cursor of the next (empty: there is none)."""
        options = given(mount_id=("s", mount), limit=("u", limit), cursor=("s", cursor))
        found, following = await self._call(ROOT, MANAGER, "ListEvents", ("a{sv}", options), answer="aa{sv}s")
        return [Event.decode(event) for event in found], advanced(cursor, following)

    async def events(self, *, mount: str = "", page: int = 0) -> AsyncIterator[Event]:
        """All that has happened, or to one mount, ``page`` at a time (0: as many as the service likes)."""
        cursor = ""
        while True:
            found, cursor = await self.list_events(mount=mount, limit=page, cursor=cursor)
            for event in found:
                yield event
            if not cursor:
                return

    async def in_use(self) -> list[HeldFile]:
        """The image files that mounts hold open."""
        (found,) = await self._call(ROOT, MANAGER, "InUse", _NO_OPTIONS, answer="aa{sv}")
        return [HeldFile.decode(file) for file in found]

    async def cleanup_now(self) -> int:
        """End mounts whose time is up or whose backup is gone; how many."""
        (ended,) = await self._call(ROOT, MANAGER, "CleanupNow", _NO_OPTIONS, answer="u", seconds=self._timeouts.long)
        return int(ended)

    async def open_shell(self, terminal: int, *, term: str = "") -> int:
        """Run a root shell of the service on ``terminal``, a pseudo-terminal; its exit status.

        The terminal stays the caller's; ``term`` is its kind, as in the variable TERM. There is no time limit. The
        shell ends when the terminal's other side or this client is closed, and not when this is cancelled.
        """
        arguments = ("h", 0), ("a{sv}", given(term=("s", term)))
        (status,) = await self._call(
            ROOT, MANAGER, "OpenShell", *arguments, answer="u", seconds=math.inf, fds=[terminal]
        )
        return int(status)

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
