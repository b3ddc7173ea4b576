"""An appliance's database: tables of its own making, and a hand that writes them past the service.

The tables are those of the contract with the types that such appliances use, which are not ours: ENUM, JSON, BIT,
DECIMAL, naive times, NULL where we have NOT NULL, columns that we know nothing of, and a collation to which "web" and
"WEB" are the same.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sendense_restored.daemon.store.models import to_stored
from tests.records import GIB, NOON, open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

    from sendense_restored.daemon.store import Store
    from tools.lab.mariadb import Server

TABLES = (
    """CREATE TABLE backup_repositories (
        id VARCHAR(64) NOT NULL PRIMARY KEY,
        name VARCHAR(255),
        repository_type ENUM('local', 'nfs', 'cifs') NOT NULL DEFAULT 'local',
        enabled BOOLEAN DEFAULT TRUE,
        config JSON,
        is_immutable BIT(1),
        total_size_bytes BIGINT,
        created_at TIMESTAMP NULL DEFAULT CURRENT_TIMESTAMP
    )""",
    """CREATE TABLE backup_jobs (
        id VARCHAR(64) NOT NULL PRIMARY KEY,
        vm_context_id VARCHAR(64),
        vm_name VARCHAR(255),
        repository_id VARCHAR(64),
        backup_type ENUM('full', 'incremental', 'differential'),
        status ENUM('pending', 'running', 'completed', 'failed', 'cancelled') DEFAULT 'pending',
        repository_path VARCHAR(512),
        parent_backup_id VARCHAR(64),
        error_message TEXT,
        total_bytes BIGINT DEFAULT 0,
        bytes_transferred DECIMAL(20, 0),
        created_at DATETIME(6),
        started_at TIMESTAMP NULL,
        completed_at DATETIME(3),
        INDEX (vm_name),
        INDEX (created_at)
    )""",
    """CREATE TABLE backup_disks (
        id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
        backup_job_id VARCHAR(64) NOT NULL,
        disk_index INT,
        vmware_disk_key INT,
        size_gb DECIMAL(20, 9),
        qcow2_path VARCHAR(512),
        status ENUM('pending', 'running', 'completed', 'failed') DEFAULT 'pending',
        INDEX (backup_job_id)
    )""",
)
CONTEXTS = """CREATE TABLE vm_backup_contexts (
    context_id VARCHAR(64) NOT NULL PRIMARY KEY,
    vm_name VARCHAR(255) NOT NULL,
    vmware_vm_id VARCHAR(64),
    repository_id VARCHAR(64) NOT NULL
)"""
# In SQLite types are hints, and a collation belongs to a column.
_IN_SQLITE = (
    """CREATE TABLE backup_repositories (id TEXT PRIMARY KEY COLLATE NOCASE, name TEXT COLLATE NOCASE,
        repository_type TEXT, enabled INTEGER, config TEXT, is_immutable INTEGER, total_size_bytes INTEGER)""",
    """CREATE TABLE backup_jobs (id TEXT PRIMARY KEY COLLATE NOCASE, vm_name TEXT COLLATE NOCASE,
        repository_id TEXT COLLATE NOCASE, backup_type TEXT, status TEXT COLLATE NOCASE, repository_path TEXT,
        parent_backup_id TEXT, total_bytes INTEGER, bytes_transferred INTEGER, created_at TEXT, started_at TEXT,
        completed_at TEXT)""",
    """CREATE TABLE backup_disks (id INTEGER PRIMARY KEY, backup_job_id TEXT COLLATE NOCASE, disk_index INTEGER,
        qcow2_path TEXT, size_gb NUMERIC, status TEXT)""",
)
_numbers = itertools.count()


class Hand:
    """Writes the tables of a database; ``?`` stands for a parameter."""

    def __init__(self, connection: Any, placeholder: str) -> None:  # noqa: ANN401  # of either driver
        self._connection, self._placeholder = connection, placeholder

    def execute(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with contextlib.closing(self._connection.cursor()) as cursor:
            cursor.execute(statement.replace("?", self._placeholder), parameters)
            return list(cursor.fetchall())

    def insert(self, table: str, **columns: object) -> None:
        values = [to_stored(value) if isinstance(value, datetime) else value for value in columns.values()]
        marks = ", ".join("?" for _ in columns)
        self.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", *values)

    def add_repository(self, repository_id: str, path: str, **columns: object) -> None:
        known = {"name": repository_id, "repository_type": "local", "config": json.dumps({"path": path})}
        self.insert("backup_repositories", id=repository_id, **known | {"enabled": 1, "is_immutable": 0} | columns)

    def add(self, backup_id: str, *, disks: Sequence[int] = (GIB,), **columns: object) -> None:
        known = {"vm_name": "web", "repository_id": "main", "created_at": NOON, "status": "completed"}
        known |= {"backup_type": "full", "repository_path": "/srv/backups/web", "bytes_transferred": 0}
        self.insert("backup_jobs", id=backup_id, **known | {"total_bytes": sum(disks)} | columns)
        for index, size in enumerate(disks):
            self.add_disk(backup_id, disk_index=index, size_gb=size / GIB)

    def add_disk(self, backup_id: str, **columns: object) -> None:
        known = {"disk_index": 0, "size_gb": 1, "status": "completed"}
        known["qcow2_path"] = f"{backup_id}/disk{columns.get('disk_index', 0)}"
        self.insert("backup_disks", backup_job_id=backup_id, **known | columns)

    def remove(self, backup_id: str) -> None:
        self.execute("DELETE FROM backup_disks WHERE backup_job_id = ?", backup_id)
        self.execute("DELETE FROM backup_jobs WHERE id = ?", backup_id)


@dataclass
class House:
    """A store, the hand that fills its catalogue, and one that reaches for our own tables."""

    store: Store
    appliance: Hand
    ours: Hand
    url: str
    catalog_url: str | None
    tied: bool
    """Whether a mount's row refers to its backup."""


LAYOUTS = ("embedded", "beside", "two databases", "records in a file", "catalogue in a file", "two files")
"""Where our records and the catalogue are: one SQLite file; one MySQL database; two; and so on."""


@contextlib.contextmanager
def file(path: Path) -> Iterator[Hand]:
    """A hand for an SQLite file."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = 1")
        yield Hand(connection, "?")


@contextlib.contextmanager
def database(server: Server, name: str) -> Iterator[Hand]:
    """A hand for a database of a server."""
    with contextlib.closing(server.connect(name)) as connection:
        yield Hand(connection, "%s")


@contextlib.contextmanager
def fresh(server: Server, *kinds: str) -> Iterator[list[str]]:
    """Databases that are there for as long as the context; their names."""
    names = [f"{kind}_{next(_numbers)}" for kind in kinds]
    for name in names:
        server.execute(f"CREATE DATABASE {name} CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci")
    try:
        yield names
    finally:
        for name in names:
            server.execute(f"DROP DATABASE {name}")


def make_tables(appliance: Hand, tables: Sequence[str] = TABLES) -> None:
    for table in tables:
        appliance.execute(table)


@contextlib.asynccontextmanager
async def house(layout: str, directory: Path, server: Server) -> AsyncIterator[House]:
    """A store with a catalogue that has one repository, ``main``."""
    own_file, their_file = directory / "restore.db", directory / "appliance.db"
    async with contextlib.AsyncExitStack() as stack:
        records, catalogue = stack.enter_context(fresh(server, "records", "appliance"))
        if layout == "beside":
            records = catalogue
        url = (
            f"sqlite:///{own_file}"
            if layout in {"embedded", "records in a file", "two files"}
            else server.url(records)
        )
        if layout in {"embedded", "beside"}:
            catalog_url = None
        elif layout in {"catalogue in a file", "two files"}:
            catalog_url = f"sqlite:///{their_file}"
            make_tables(stack.enter_context(file(their_file)), _IN_SQLITE)
        else:
            catalog_url = server.url(catalogue)
        if layout in {"beside", "two databases", "records in a file"}:
            make_tables(stack.enter_context(database(server, catalogue)))
        store = await stack.enter_async_context(await open_store(url, catalog_url))
        ours = file(own_file) if url.startswith("sqlite") else database(server, records)
        appliance = file(own_file if layout == "embedded" else their_file)
        if layout in {"beside", "two databases", "records in a file"}:
            appliance = database(server, catalogue)
        tied = layout in {"embedded", "beside", "two databases"}
        found = House(store, stack.enter_context(appliance), stack.enter_context(ours), url, catalog_url, tied)
        found.appliance.add_repository("main", "/srv/backups")
        yield found
