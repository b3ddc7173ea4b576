"""The catalogue of backups and our own records, in one database.

    records.py      what goes in and out: frozen dataclasses
    store.py        the async face, one method per unit of work
    catalogue.py    units of work on repositories, backups and disks
    recording.py    the unit of work that makes the catalogue say what a scan found
    wishes.py       units of work on mounts and claims
    history.py      units of work on what happened
    cursors.py      what clients go on with after a page of a list
    scanner.py      which backups lie in a repository; no database
    database.py     one connection on one thread; errors translated once
    migrations.py   how the tables came to be
    models.py       what they are now

Nothing outside this package imports peewee.
"""

from .records import (
    ENDED,
    Backup,
    BackupDisk,
    ClaimRow,
    DiskFile,
    Event,
    Found,
    FoundBackup,
    MountChanges,
    MountRow,
    MountStatus,
    Problem,
    Repository,
    ScanResult,
    StoreError,
    Vm,
)
from .scanner import scan
from .store import Store

__all__ = [
    "ENDED",
    "Backup",
    "BackupDisk",
    "ClaimRow",
    "DiskFile",
    "Event",
    "Found",
    "FoundBackup",
    "MountChanges",
    "MountRow",
    "MountStatus",
    "Problem",
    "Repository",
    "ScanResult",
    "Store",
    "StoreError",
    "Vm",
    "scan",
]
