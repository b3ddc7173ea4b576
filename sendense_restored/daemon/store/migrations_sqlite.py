"""The schema's history in SQLite: the catalogue and our own tables.

SQLite runs DDL inside transactions, so a step comes to pass as a whole or not at all; ``migrations_mysql.py`` has the
steps of an engine that does not.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from .migrations import MARKER, Migration, applied, names_of, refuse_foreign, refuse_incomplete, refuse_newer
from .models import CATALOGUE, RECORDS, to_stored

if TYPE_CHECKING:
    from collections.abc import Sequence

    import peewee

MIGRATIONS = (
    Migration(
        1,
        "catalogue, mounts and claims",
        (
            """CREATE TABLE restore_migrations (
                version INTEGER NOT NULL PRIMARY KEY,
                what VARCHAR(255) NOT NULL,
                applied_at DATETIME NOT NULL
            )""",
            """CREATE TABLE backup_repositories (
                id VARCHAR(64) NOT NULL PRIMARY KEY,
                name VARCHAR(255) NOT NULL,
                repository_type VARCHAR(32) NOT NULL,
                enabled INTEGER NOT NULL,
                config TEXT NOT NULL,
                is_immutable INTEGER NOT NULL
            )""",
            "CREATE UNIQUE INDEX backup_repositories_name ON backup_repositories (name)",
            """CREATE TABLE backup_jobs (
                id VARCHAR(64) NOT NULL PRIMARY KEY,
                vm_name VARCHAR(255) NOT NULL,
                repository_id VARCHAR(64) NOT NULL,
                backup_type VARCHAR(32) NOT NULL,
                status VARCHAR(32) NOT NULL,
                repository_path TEXT NOT NULL,
                parent_backup_id VARCHAR(64),
                total_bytes BIGINT NOT NULL,
                bytes_transferred BIGINT NOT NULL,
                created_at DATETIME NOT NULL,
                started_at DATETIME,
                completed_at DATETIME,
                CHECK (backup_type IN ('full', 'incremental')),
                CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled')),
                FOREIGN KEY (repository_id) REFERENCES backup_repositories (id) ON DELETE CASCADE,
                FOREIGN KEY (parent_backup_id) REFERENCES backup_jobs (id) ON DELETE SET NULL
                    DEFERRABLE INITIALLY DEFERRED
            )""",
            "CREATE INDEX backup_jobs_newest ON backup_jobs (created_at, id)",
            "CREATE INDEX backup_jobs_vm_name ON backup_jobs (vm_name)",
            "CREATE INDEX backup_jobs_repository ON backup_jobs (repository_id)",
            "CREATE INDEX backup_jobs_parent ON backup_jobs (parent_backup_id)",
            """CREATE TABLE backup_disks (
                id INTEGER NOT NULL PRIMARY KEY,
                backup_job_id VARCHAR(64) NOT NULL,
                disk_index INTEGER NOT NULL,
                qcow2_path TEXT NOT NULL,
                size_gb REAL NOT NULL,
                status VARCHAR(32) NOT NULL,
                CHECK (disk_index >= 0),
                FOREIGN KEY (backup_job_id) REFERENCES backup_jobs (id) ON DELETE CASCADE
            )""",
            "CREATE UNIQUE INDEX backup_disks_index ON backup_disks (backup_job_id, disk_index)",
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
                created_at DATETIME NOT NULL,
                last_accessed_at DATETIME NOT NULL,
                expires_at DATETIME,
                journal VARCHAR(16) NOT NULL,
                resume_attempts INTEGER NOT NULL,
                options TEXT NOT NULL,
                CHECK (mount_mode IN ('read-only')),
                CHECK (status IN ('mounting', 'mounted', 'unmounting', 'failed')),
                CHECK (journal IN ('replay', 'as-crashed')),
                FOREIGN KEY (backup_id) REFERENCES backup_jobs (id) ON DELETE CASCADE
            )""",
            "CREATE INDEX restore_mounts_backup ON restore_mounts (backup_id)",
            "CREATE INDEX restore_mounts_expires ON restore_mounts (expires_at)",
            "CREATE INDEX restore_mounts_status ON restore_mounts (status)",
            """CREATE TABLE restore_claims (
                mount_id VARCHAR(36) NOT NULL,
                uid BIGINT NOT NULL,
                on_behalf_of VARCHAR(255) NOT NULL,
                since DATETIME NOT NULL,
                expires_at DATETIME,
                PRIMARY KEY (mount_id, uid, on_behalf_of),
                FOREIGN KEY (mount_id) REFERENCES restore_mounts (id) ON DELETE CASCADE
            )""",
        ),
    ),
    Migration(
        2,
        "history, and each claim's own timeout",
        (
            # No foreign keys: an event outlives what it tells of.
            """CREATE TABLE restore_events (
                id INTEGER NOT NULL PRIMARY KEY,
                at DATETIME NOT NULL,
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
                size BIGINT
            )""",
            "CREATE INDEX restore_events_at ON restore_events (at)",
            "CREATE INDEX restore_events_mount ON restore_events (mount_id)",
            "ALTER TABLE restore_claims ADD COLUMN idle_timeout REAL NOT NULL DEFAULT 3600",
        ),
    ),
    Migration(
        3,
        "ids of events that are given once",
        (
            # Without AUTOINCREMENT the ids begin again when all events were trimmed; it needs the table made anew.
            "ALTER TABLE restore_events RENAME TO restore_events_before",
            """CREATE TABLE restore_events (
                id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
                at DATETIME NOT NULL,
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
                size BIGINT
            )""",
            """INSERT INTO restore_events
                (id, at, what, outcome, uid, unit, on_behalf_of, mount_id, backup_id, path, detail, bytes, size)
                SELECT id, at, what, outcome, uid, unit, on_behalf_of, mount_id, backup_id, path, detail, bytes, size
                FROM restore_events_before""",
            "DROP TABLE restore_events_before",
            "CREATE INDEX restore_events_at ON restore_events (at)",
            "CREATE INDEX restore_events_mount ON restore_events (mount_id)",
        ),
    ),
)

_REMEDY = "restore the file from before that, or move it away while the service is stopped, and fill a new catalogue"


def migrate(database: peewee.Database, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Bring an open database to the last version; nothing happens to one that is there already.

    Raises StoreError for tables that are not ours or not all there, and for a schema newer than ``migrations``.
    """
    with database.atomic("DEFERRED"):  # both of one moment
        version, tables = _version(database), set(database.get_tables())
    refuse_newer(version, migrations)
    if MARKER in tables:
        refuse_incomplete(migrations, range(1, version + 1), tables, _REMEDY)
    for migration in migrations:
        # The version is read again under the write lock: another process may have been faster.
        with database.atomic("IMMEDIATE"):
            if _version(database) < migration.version:
                _apply(database, migration)


def _version(database: peewee.Database) -> int:
    tables = set(database.get_tables())
    if MARKER in tables:
        (version,) = database.execute_sql(f"SELECT max(version) FROM {MARKER}").fetchone()  # noqa: S608  # a constant
        return version or 0
    refuse_foreign(tables & names_of(CATALOGUE + RECORDS))
    return 0


def _apply(database: peewee.Database, migration: Migration) -> None:
    for statement in migration.statements:
        database.execute_sql(statement)
    database.execute_sql(
        f"INSERT INTO {MARKER} (version, what, applied_at) VALUES (?, ?, ?)",  # noqa: S608  # a constant
        (migration.version, migration.what, to_stored(datetime.now(UTC))),
    )
    applied(migration)
