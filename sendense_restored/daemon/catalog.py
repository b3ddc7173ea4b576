"""Filling the embedded catalogue: what needs both the store and the images themselves."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sendense_restored import errors

from .host.repositories import open_root
from .store import DiskFile, scan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from .store import Backup, Problem, Repository, ScanResult, Store
    from .volume import Machine


_SECONDS = 30.0
"""For one look at a directory."""


@dataclass(frozen=True)
class Scanned:
    """What a scan changed, and what it could not use."""

    result: ScanResult
    problems: Sequence[Problem]


class Catalog:
    """Adds to the catalogue after a look at the files."""

    def __init__(self, store: Store, machine: Machine, allowed: Sequence[Path] | None = None) -> None:
        self._store, self._machine, self._allowed = store, machine, allowed
        self._scanning: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def add_repository(self, name: str, path: str) -> Repository:
        """Record a directory of backups. Raises InvalidOption, CatalogUnavailable."""
        try:
            there = await self._machine.look(Path(path), lambda: self._is_there(path), seconds=_SECONDS)
        except errors.ImageRefused as error:
            raise errors.InvalidOption(error.message) from None
        if not there:
            raise errors.InvalidOption("the path is no directory here; mount the storage and give its absolute path")
        return await self._store.add_repository(name, path)

    def _is_there(self, path: str) -> bool:
        try:
            fd, _ = open_root(Path(path), self._allowed)
        except (OSError, ValueError):  # any text may come
            return False
        os.close(fd)
        return True

    async def scan(self, repository_id: str) -> Scanned:
        """Record the backups that lie in a repository. Raises BackupNotFound, Unavailable, ImageRefused."""
        repository = await self._store.repository(repository_id)
        async with self._scanning[repository.id]:  # two at once would only read the same files twice
            found = await self._machine.look(
                repository.root, lambda: scan(repository.root, self._allowed), seconds=None
            )
            return Scanned(await self._store.record_scan(repository_id, found), found.problems)

    async def add_backup(
        self,
        repository_id: str,
        vm_name: str,
        paths: Sequence[str],
        *,
        parent_backup_id: str | None,
        created_at: datetime | None,
    ) -> Backup:
        """Record a backup by hand; each disk's chain is opened once, as a mount would. Raises a RestoreError."""
        repository = await self._store.repository(repository_id)
        disks = []
        for index, path in enumerate(paths):
            image = await self._machine.open_image(repository.root, path)
            disks.append(DiskFile(index, path, image.virtual_size))
            image.close()
        return await self._store.add_backup(
            repository_id, vm_name, disks, parent_backup_id=parent_backup_id, created_at=created_at
        )
