"""The tables as peewee models: what the code reads and writes. How tables come to be stands in ``migrations.py``.

Only types that SQLite and MySQL share are used: closed sets of words are a CharField (the migration adds the CHECK),
documents are JSON in a TEXT, times are UTC text of a fixed width in SQLite, so that their order is the order of time,
and DATETIME(6) in MySQL, which takes that text. A catalogue that is not ours may use other types, and is read without
the models' conversions (see ``rows.py``).

peewee binds a model to one database for the whole process. Here the *thread* decides: each store has exactly one
thread, which says once what its database is, so two stores can be open, and a query on any other thread (the event
loop's, say) has no database and fails at once instead of blocking.
"""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from typing import Any

import peewee

from sendense_restored.errors import CatalogUnavailable

TIME_FORMAT = "%Y-%m-%d %H:%M:%S.%f"

_thread = threading.local()


def bind_to_thread(database: peewee.Database) -> None:
    """The models that are used on this thread talk to ``database`` from now on."""
    _thread.database = database


def database_of_thread() -> peewee.Database | None:
    """The database that the models talk to on this thread; None on one that is no store's."""
    return getattr(_thread, "database", None)


class _ThreadsDatabase(peewee.Metadata):  # type: ignore[misc]  # peewee 3 has no type information
    @property
    def database(self) -> peewee.Database | None:
        """This thread's database."""
        return database_of_thread()

    @database.setter
    def database(self, database: None) -> None:
        """Nothing: this is where a model class that is being made gets its database, and ours have none."""


def to_stored(moment: datetime) -> str:
    """The text by which the database holds ``moment``. It must be aware: a naive one has no place in time."""
    if moment.tzinfo is None:
        raise ValueError(f"{moment!r} has no time zone")
    # Not strftime: its %Y does not pad years before 1000 (glibc), and the width must not vary.
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(sep=" ", timespec="microseconds")


class MomentField(peewee.DateTimeField):  # type: ignore[misc]  # peewee 3 has no type information
    """An aware UTC time."""

    def db_value(self, value: datetime | None) -> str | None:
        """The text that is stored."""
        return None if value is None else to_stored(value)

    def python_value(self, value: str | datetime | None) -> datetime | None:
        """The time that a stored text (SQLite) or a naive time (MySQL) means. Raises CatalogUnavailable."""
        if value is None:
            return None
        try:
            moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        except (TypeError, ValueError):
            raise CatalogUnavailable(
                f"column {self.column_name} of the database holds {value!r}, which is no time; correct it there"
            ) from None
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


class DocumentField(peewee.TextField):  # type: ignore[misc]  # peewee 3 has no type information
    """A JSON object."""

    def db_value(self, value: dict[str, Any]) -> str:
        """The text that is stored."""
        return json.dumps(value, allow_nan=False, sort_keys=True)

    def python_value(self, value: str) -> dict[str, Any]:
        """The object that a stored text means. Raises CatalogUnavailable."""
        try:
            document = json.loads(value)
        except (TypeError, ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise CatalogUnavailable(
                f"column {self.column_name} of the database holds something else than a JSON object; correct it there"
            )
        return document


class _Row(peewee.Model):  # type: ignore[misc]  # peewee 3 has no type information
    class Meta:
        model_metadata_class = _ThreadsDatabase
        legacy_table_names = False


class BackupRepository(_Row):
    """A directory of backups; ``config`` is a JSON object with ``path`` or ``mount_point``."""

    id = peewee.CharField(64, primary_key=True)
    name = peewee.CharField(255, unique=True)
    repository_type = peewee.CharField(32)
    enabled = peewee.BooleanField(default=True)
    config = peewee.TextField()
    is_immutable = peewee.BooleanField(default=False)

    class Meta:
        """Its name."""

        table_name = "backup_repositories"


class BackupJob(_Row):
    """A backup."""

    id = peewee.CharField(64, primary_key=True)
    vm_name = peewee.CharField(255, index=True)
    repository = peewee.ForeignKeyField(BackupRepository, column_name="repository_id", on_delete="CASCADE")
    backup_type = peewee.CharField(32)
    status = peewee.CharField(32)
    repository_path = peewee.TextField()
    parent_backup = peewee.ForeignKeyField(
        "self", column_name="parent_backup_id", null=True, on_delete="SET NULL", deferrable="INITIALLY DEFERRED"
    )
    total_bytes = peewee.BigIntegerField(default=0)
    bytes_transferred = peewee.BigIntegerField(default=0)
    created_at = MomentField()
    started_at = MomentField(null=True)
    completed_at = MomentField(null=True)

    class Meta:
        """Its name and index."""

        table_name = "backup_jobs"
        indexes = ((("created_at", "id"), False),)


class BackupDiskRow(_Row):
    """A disk of a backup. ``size_gb`` counts GiB and has a fraction, so that it gives the bytes exactly."""

    id = peewee.BigAutoField()
    backup_job = peewee.ForeignKeyField(BackupJob, column_name="backup_job_id", on_delete="CASCADE", index=False)
    disk_index = peewee.IntegerField()
    qcow2_path = peewee.TextField()
    size_gb = peewee.DoubleField()
    status = peewee.CharField(32)

    class Meta:
        """Its name and index."""

        table_name = "backup_disks"
        indexes = ((("backup_job_id", "disk_index"), True),)


class RestoreMount(_Row):
    """A mount that is wished for."""

    id = peewee.CharField(36, primary_key=True)
    backup = peewee.ForeignKeyField(BackupJob, column_name="backup_id", on_delete="CASCADE")
    backup_disk_id = peewee.BigIntegerField(null=True)
    disk_index = peewee.IntegerField(null=True)
    mount_path = peewee.CharField(512)
    nbd_device = peewee.CharField(32)
    filesystem_type = peewee.CharField(32)
    mount_mode = peewee.CharField(16)
    status = peewee.CharField(16, index=True)
    error_message = peewee.TextField()
    created_at = MomentField()
    last_accessed_at = MomentField()
    expires_at = MomentField(null=True, index=True)
    journal = peewee.CharField(16)
    resume_attempts = peewee.IntegerField()
    options = DocumentField()

    class Meta:
        """Its name."""

        table_name = "restore_mounts"


class RestoreClaim(_Row):
    """Somebody's claim on a mount."""

    mount = peewee.ForeignKeyField(RestoreMount, column_name="mount_id", on_delete="CASCADE", index=False)
    uid = peewee.BigIntegerField()
    on_behalf_of = peewee.CharField(255)
    since = MomentField()
    expires_at = MomentField(null=True)
    idle_timeout = peewee.DoubleField()

    class Meta:
        """Its name and key."""

        table_name = "restore_claims"
        primary_key = peewee.CompositeKey("mount", "uid", "on_behalf_of")


class RestoreEvent(_Row):
    """What happened. Ids grow in the order of writing, and none is given twice."""

    id = peewee.BigAutoField()
    at = MomentField(index=True)
    what = peewee.CharField(32)
    outcome = peewee.CharField(64)
    uid = peewee.BigIntegerField(null=True)
    unit = peewee.CharField(255)
    on_behalf_of = peewee.CharField(255)
    mount_id = peewee.CharField(36, index=True)
    backup_id = peewee.CharField(64)
    path = peewee.TextField()
    detail = peewee.TextField()
    bytes = peewee.BigIntegerField(null=True)
    size = peewee.BigIntegerField(null=True)

    class Meta:
        """Its name."""

        table_name = "restore_events"


class VmContext(_Row):
    """What the appliance calls a virtual machine, in a table that not every catalogue has; see ``catalogue.py``."""

    context_id = peewee.CharField(64, primary_key=True)
    vm_name = peewee.CharField(255)
    repository_id = peewee.CharField(64)

    class Meta:
        """Its name."""

        table_name = "vm_backup_contexts"


def table_of(model: type[peewee.Model]) -> str:
    """The name of its table."""
    return str(model._meta.table_name)  # noqa: SLF001  # peewee's public face


CATALOGUE = (BackupRepository, BackupJob, BackupDiskRow)
"""The tables of backups. Only in the embedded database they are ours to make and to write."""
RECORDS = (RestoreMount, RestoreClaim, RestoreEvent)
"""Our own."""
MODELS = CATALOGUE + RECORDS
