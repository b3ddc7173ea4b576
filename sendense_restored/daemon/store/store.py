"""The store as the rest of the daemon sees it: one async method per unit of work.

``Store`` owns the connections and threads of its databases from ``open`` to ``close``: one of our own records and one
of the catalogue, or one that is both. Every method raises CatalogUnavailable when its database cannot be used; that
one cannot says nothing about the other. Reading and writing of one call are one transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ParamSpec, Self, TypeVar

from sendense_restored.errors import NOT_OURS, InvalidOption

from . import catalogue, embedded, history, vms, wishes
from .opening import open_databases
from .recording import record_scan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime
    from typing import Unpack

    from sendense_restored.database_url import DatabaseUrl

    from .opening import Databases
    from .records import (
        Backup,
        ClaimRow,
        DiskFile,
        Event,
        Found,
        MountChanges,
        MountRow,
        Repository,
        ScanResult,
        Vm,
    )


P = ParamSpec("P")
T = TypeVar("T")

BUSY_TIMEOUT = 5.0


class Store:
    """The catalogue of backups, and our own records of mounts and of what happened."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases
        self._records, self._catalogue = databases.records, databases.catalogue

    @classmethod
    async def open(
        cls, at: DatabaseUrl, catalog_at: DatabaseUrl | None = None, *, busy_timeout: float = BUSY_TIMEOUT
    ) -> Self:
        """Open the database of our records, migrated, and the catalogue, which by default is in the same one.

        A file of our own is made if it is not there. ``busy_timeout``: seconds to wait for a lock of another program,
        or for a connection to a server; twice that for its answer.
        Raises StoreError.
        """
        return cls(await open_databases(at, catalog_at, busy_timeout=busy_timeout))

    @property
    def embedded(self) -> bool:
        """Whether the catalogue is ours to write; else the methods that do so raise InvalidOption."""
        return self._databases.embedded

    async def close(self) -> None:
        """Finish what was asked for, then end connections and threads. May be called again."""
        await self._databases.close()

    async def _fill(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if not self.embedded:
            raise InvalidOption(NOT_OURS)
        return await self._catalogue.write(work, *args, **kwargs)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # The catalogue, reading

    async def backups(
        self,
        vm_name: str | None = None,
        status: str | None = None,
        repository_id: str | None = None,
        limit: int = 100,
        cursor: str = "",
    ) -> tuple[list[Backup], str]:
        """A page of backups, newest first, and the cursor of the next page (``""`` at the end).

        ``limit`` is 1 to 1000. Raises InvalidOption, also for a cursor that did not come from here.
        """
        return await self._catalogue.read(catalogue.backups, vm_name, status, repository_id, limit, cursor)

    async def backup(self, backup_id: str) -> Backup:
        """One backup. Raises BackupNotFound."""
        return await self._catalogue.read(catalogue.backup, backup_id)

    async def backup_ids(self, ids: Iterable[str]) -> set[str]:
        """Those of the ids that are in the catalogue."""
        return await self._catalogue.read(catalogue.backup_ids, list(ids))

    async def vms(self, limit: int = 100, cursor: str = "") -> tuple[list[Vm], str]:
        """A page of the virtual machines that have backups, by name, and the cursor of the next page.

        ``limit`` is 1 to 1000. Raises InvalidOption, also for a cursor that did not come from here.
        """
        return await self._catalogue.read(vms.vms, limit, cursor)

    async def repository(self, repository_id: str) -> Repository:
        """One repository. Raises BackupNotFound, and CatalogUnavailable if its configuration is broken."""
        return await self._catalogue.read(catalogue.repository, repository_id)

    async def repositories(self) -> list[Repository]:
        """All repositories by name, without those whose configuration is broken (they are logged)."""
        return await self._catalogue.read(catalogue.repositories)

    # The embedded catalogue, writing

    async def add_repository(
        self,
        name: str,
        path: str,
        *,
        type: str = "local",  # noqa: A002  # the column has this name
        immutable: bool = False,
    ) -> Repository:
        """Add a directory of backups; its id is made of its name. Raises InvalidOption."""
        return await self._fill(embedded.add_repository, name, path, type, immutable=immutable)

    async def remove_repository(self, repository_id: str) -> None:
        """Forget a repository and its backups; files stay. Raises BackupNotFound, and Busy if one is mounted."""
        await self._fill(embedded.remove_repository, repository_id)

    async def add_backup(
        self,
        repository_id: str,
        vm_name: str,
        disks: Sequence[DiskFile],
        *,
        backup_id: str = "",
        parent_backup_id: str | None = None,
        created_at: datetime | None = None,
    ) -> Backup:
        """Add a finished backup, incremental if it has a parent; an id is made if none is given.

        A disk's path is absolute or relative to the repository, and inside it. Whether the file is there is the
        caller's to check, outside the store. Raises InvalidOption, and BackupNotFound for repository and parent.
        """
        return await self._fill(
            embedded.add_backup,
            repository_id,
            vm_name,
            disks,
            backup_id=backup_id,
            parent_backup_id=parent_backup_id,
            created_at=created_at,
        )

    async def remove_backup(self, backup_id: str) -> None:
        """Forget a backup; files stay.

        Raises BackupNotFound, Busy if it is mounted, InvalidOption if another one builds on it.
        """
        await self._fill(embedded.remove_backup, backup_id)

    async def record_scan(self, repository_id: str, found: Found) -> ScanResult:
        """Make the catalogue say what ``scan`` found, which the caller ran in a thread of its own.

        The same again changes nothing.

        Raises BackupNotFound, and Unavailable if nothing at all was found where there were backups.
        """
        return await self._fill(record_scan, repository_id, found)

    # Mounts and claims

    async def mount_rows(self) -> list[MountRow]:
        """All rows of mounts, the oldest first."""
        return await self._records.read(wishes.mount_rows)

    async def wished(self) -> list[tuple[MountRow, tuple[ClaimRow, ...]]]:
        """All rows of mounts with the claims on each, the oldest first: what a start has to bring back."""
        return await self._records.read(wishes.wished)

    async def insert_mount(self, row: MountRow, claims: Sequence[ClaimRow] = ()) -> None:
        """Write a mount and the claims on it down.

        Raises BackupNotFound if its backup is not in the catalogue, where the database can tell.
        """
        await self._records.write(wishes.insert_mount, row, claims)

    async def update_mount(self, mount_id: str, **changes: Unpack[MountChanges]) -> None:
        """Change columns of a mount's row. Raises MountNotFound; TypeError for a column that does not change."""
        await self._records.write(wishes.update_mount, mount_id, changes)

    async def renew(self, mount_id: str, claims: Sequence[ClaimRow], **changes: Unpack[MountChanges]) -> None:
        """Change columns of a mount's row, and write down its claims: those that are not given go.

        Raises what ``update_mount`` does.
        """
        await self._records.write(wishes.renew, mount_id, claims, changes)

    async def delete_mount(self, mount_id: str) -> bool:
        """Delete a mount's row and its claims; whether there was one."""
        return await self._records.write(wishes.delete_mount, mount_id)

    async def delete_all_mounts(self) -> int:
        """Delete the rows of all mounts, and all claims; how many mounts there were."""
        return await self._records.write(wishes.delete_all_mounts)

    async def claims(self, mount_id: str) -> list[ClaimRow]:
        """The claims on a mount, the oldest first."""
        return await self._records.read(wishes.claims, mount_id)

    async def put_claim(self, claim: ClaimRow) -> None:
        """Write a claim down, in place of one with the same mount, uid and behalf. Raises MountNotFound."""
        await self._records.write(wishes.put_claim, claim)

    async def delete_claim(self, mount_id: str, uid: int, on_behalf_of: str = "") -> bool:
        """Delete a claim; whether there was one."""
        return await self._records.write(wishes.delete_claim, mount_id, uid, on_behalf_of)

    # What happened

    async def add_events(self, events: Sequence[Event]) -> None:
        """Write events down in their order, all or none; the database gives them their ids."""
        await self._records.write(history.add_events, events)

    async def events(
        self, limit: int = 100, cursor: str = "", mount_id: str | None = None
    ) -> tuple[list[Event], str]:
        """A page of events, the newest first, and the cursor of the next page (``""`` at the end).

        ``limit`` is 1 to 1000. Raises InvalidOption, also for a cursor that did not come from here.
        """
        return await self._records.read(history.events, limit, cursor, mount_id)

    async def trim_events(self, keep: int, before: datetime) -> int:
        """Delete events from before that time, and all but the newest ``keep``; how many that were."""
        return await self._records.write(history.trim_events, keep, before)

    async def ended_mounts(self, since: datetime) -> dict[str, tuple[datetime, str]]:
        """The mounts that ended since then, as the history has it: by id, when and why."""
        return await self._records.read(history.ended_mounts, since)
