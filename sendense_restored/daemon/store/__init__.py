"""The catalogue of backups and our own records, in one database or two, of SQLite or MySQL.

    records.py           what goes in and out: frozen dataclasses
    store.py             the async face, one method per unit of work
    opening.py           which databases those are, and what ties them together
    catalogue.py         units of work that read repositories, backups and disks
    vms.py               those that read which virtual machines have any
    rows.py              what the values in a catalogue mean that is not ours
    embedded.py          units of work that fill the catalogue where it is ours
    recording.py         the one that makes it say what a scan found
    wishes.py            units of work on mounts and claims
    history.py           units of work on what happened
    cursors.py           pages of lists, and what clients go on with after one
    scanner.py           which backups lie in a repository; no database
    database.py          one connection on one thread; errors translated once
    engine.py            what is asked of an engine
    sqlite.py            one of them
    mysql.py             the other one, with mysql_errors.py
    mysql_reference.py   the foreign key to the appliance's backups
    migrations.py        how tables come to be; each engine's steps in migrations_sqlite.py and migrations_mysql.py
    models.py            what they are now

Nothing outside this package imports peewee or PyMySQL.
"""

from .cursors import MOST_PER_PAGE
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
    StoreUnreachableError,
    Vm,
)
from .scanner import scan
from .store import Store

__all__ = [
    "ENDED",
    "MOST_PER_PAGE",
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
    "StoreUnreachableError",
    "Vm",
    "scan",
]
