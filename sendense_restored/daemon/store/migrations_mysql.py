"""The schema's history in MySQL and MariaDB: numbered frozen steps, as in ``migrations.py``, of our own tables only.

DDL cannot be undone there, so a step that is taken leaves a trace of its beginning: its row in the marker table is
written before its first statement, and gets its time after the last. If a process ends in between, the next start
takes the step again, and what is there already is then known to be ours. Nobody else takes a step meanwhile
(``mysql.py``).

Names and ids are compared byte by byte. The collation that does so and does not take "a" and "a " for the same has
another name with each maker; ``COLLATION`` in a statement stands for it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import peewee

from .migrations import MARKER, Migration, applied, names_of, refuse_foreign, refuse_incomplete, refuse_newer
from .models import RECORDS, to_stored
from .mysql_errors import DONE_ALREADY, code_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .engine import Dialect

_COLLATIONS = ("utf8mb4_nopad_bin", "utf8mb4_0900_bin", "utf8mb4_bin")
"""Of MariaDB, of MySQL from 8.0.17 on, and of all; the first that there is."""

MIGRATIONS = (
    Migration(
        1,
        "mounts and claims",
        (
            # Its reference to the appliance's backups comes and goes with where those are: mysql_reference.py.
            """CREATE TABLE restore_mounts (
                id VARCHAR(36) NOT NULL PRIMARY KEY,
                backup_id VARCHAR(64) NOT NULL,
                backup_disk_id BIGINT,
                disk_index INTEGER,
                mount_path VARCHAR(512) NOT NULL,
                nbd_device VARCHAR(32) NOT NULL,
                filesystem_type VARCHAR(32) NOT NULL,
                mount_mode VARCHAR(16) NOT NULL,
                status VARCHAR(16) NOT NULL,
                error_message TEXT NOT NULL,
                created_at DATETIME(6) NOT NULL,
                last_accessed_at DATETIME(6) NOT NULL,
                expires_at DATETIME(6),
                journal VARCHAR(16) NOT NULL,
                resume_attempts INTEGER NOT NULL,
                options TEXT NOT NULL,
                INDEX restore_mounts_backup (backup_id),
                INDEX restore_mounts_expires (expires_at),
                INDEX restore_mounts_status (status),
                CHECK (mount_mode IN ('read-only')),
                CHECK (status IN ('mounting', 'mounted', 'unmounting', 'failed')),
                CHECK (journal IN ('replay', 'as-crashed'))
            ) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE COLLATION""",
            """CREATE TABLE restore_claims (
                mount_id VARCHAR(36) NOT NULL,
                uid BIGINT NOT NULL,
                on_behalf_of VARCHAR(255) NOT NULL,
                since DATETIME(6) NOT NULL,
                expires_at DATETIME(6),
                idle_timeout DOUBLE NOT NULL,
                PRIMARY KEY (mount_id, uid, on_behalf_of),
                FOREIGN KEY (mount_id) REFERENCES restore_mounts (id) ON DELETE CASCADE
            ) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE COLLATION""",
        ),
    ),
    Migration(
        2,
        "history",
        (
            # No foreign keys: an event outlives what it tells of.
            """CREATE TABLE restore_events (
                id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
                at DATETIME(6) NOT NULL,
                what VARCHAR(32) NOT NULL,
                outcome VARCHAR(64) NOT NULL,
                uid BIGINT,
                unit VARCHAR(255) NOT NULL,
                on_behalf_of VARCHAR(255) NOT NULL,
                mount_id VARCHAR(36) NOT NULL,
                backup_id VARCHAR(64) NOT NULL,
                path TEXT NOT NULL,
                detail TEXT NOT NULL,
                bytes BIGINT,
                size BIGINT,
                INDEX restore_events_at (at),
                INDEX restore_events_mount (mount_id)
            ) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE COLLATION""",
        ),
    ),
)

_REMEDY = (
    "restore the database from before that, or, while the service is stopped, drop restore_claims, restore_mounts,"
    f" restore_events and {MARKER} together"
)

_MARKER_TABLE = f"""CREATE TABLE IF NOT EXISTS {MARKER} (
    version INTEGER NOT NULL PRIMARY KEY,
    what VARCHAR(255) NOT NULL,
    applied_at DATETIME(6)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4"""


def migrate(database: peewee.MySQLDatabase, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Bring an open database to the last version; nothing happens to one that is there already.

    Raises StoreError for tables that are not ours or not all there, and for a schema newer than ``migrations``.
    """
    if not database.has_table(MARKER):
        refuse_foreign(name for name in names_of(RECORDS) if database.has_table(name))
        database.execute_sql(_MARKER_TABLE)
    marks = dict(database.execute_sql(f"SELECT version, applied_at FROM {MARKER}").fetchall())  # noqa: S608  # a constant
    refuse_newer(max(marks, default=0), migrations)
    begun = {version for version, applied_at in marks.items() if applied_at is None}
    there = {name for name in names_of(RECORDS) if database.has_table(name)}
    refuse_incomplete([each for each in migrations if each.version not in begun], marks, there, _REMEDY)
    collation = collation_of(database)
    for migration in migrations:
        if marks.get(migration.version) is None:
            _take(database, migration, collation, again=migration.version in marks)


def collation_of(database: Dialect) -> str:
    """The collation of our own tables on this server."""
    query = "SELECT collation_name FROM information_schema.collations WHERE collation_name IN (%s, %s, %s)"
    known = {name for (name,) in database.execute_sql(query, _COLLATIONS).fetchall()}
    return next(name for name in _COLLATIONS if name in known)


def _take(database: peewee.MySQLDatabase, migration: Migration, collation: str, *, again: bool) -> None:
    if not again:
        database.execute_sql(
            f"INSERT INTO {MARKER} (version, what) VALUES (%s, %s)",  # noqa: S608  # a constant
            (migration.version, migration.what),
        )
    for number, statement in enumerate(migration.statements):
        try:
            database.execute_sql(statement.replace("COLLATION", collation))
        except peewee.DatabaseError as error:
            if again and code_of(error) in DONE_ALREADY:
                continue
            if not again and number == 0:  # it was refused, so nothing of this step is there
                database.execute_sql(f"DELETE FROM {MARKER} WHERE version = %s", (migration.version,))  # noqa: S608
            raise
    database.execute_sql(
        f"UPDATE {MARKER} SET applied_at = %s WHERE version = %s",  # noqa: S608  # a constant
        (to_stored(datetime.now(UTC)), migration.version),
    )
    applied(migration)
