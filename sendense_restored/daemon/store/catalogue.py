"""Units of work that read the catalogue: repositories, backups and their disks.

Each function runs on the store's thread inside a transaction (see ``database.py``) and returns records only. No
function touches a repository's files: storage that hangs must not stop the store.

The catalogue may be the appliance's. Then its columns are read for what they mean (``rows.py``), and a row that means
nothing is left out of lists, with a line in the log. Ids and names are compared and ordered byte by byte, whatever
the collation of its tables: the table's own comparison comes first where an index serves it, and ours decides among
what it has found.
"""

from __future__ import annotations

import contextlib
import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import peewee

from sendense_restored.errors import BackupNotFound, CatalogUnavailable

from . import cursors
from .engine import here
from .models import BackupDiskRow, BackupJob, BackupRepository
from .records import Backup, BackupDisk, Repository
from .rows import NO_DATE, Row, Shortened, fetch, in_parts, is_text, last_cursor, meant, paged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

GIB = 1 << 30
_LONGEST_ID = 64
_LARGEST_INDEX = 2**32 - 1
_LONGEST_CONFIG = 64 << 10
"""Characters."""

_JOB = {
    "id": BackupJob.id,
    "vm_name": Shortened(BackupJob.vm_name),
    "repository_id": BackupJob.repository,
    "backup_type": BackupJob.backup_type,
    "status": BackupJob.status,
    "parent_backup_id": BackupJob.parent_backup,
    "total_bytes": BackupJob.total_bytes,
    "bytes_transferred": BackupJob.bytes_transferred,
    "created_at": BackupJob.created_at,
    "started_at": BackupJob.started_at,
    "completed_at": BackupJob.completed_at,
}
_DISK = {
    "id": BackupDiskRow.id,
    "backup_job_id": BackupDiskRow.backup_job,
    "disk_index": BackupDiskRow.disk_index,
    "qcow2_path": Shortened(BackupDiskRow.qcow2_path),
    "size_gb": BackupDiskRow.size_gb,
    "status": BackupDiskRow.status,
}
_REPOSITORY = {
    "id": BackupRepository.id,
    "name": Shortened(BackupRepository.name),
    "repository_type": BackupRepository.repository_type,
    "enabled": BackupRepository.enabled,
    "config": Shortened(BackupRepository.config, _LONGEST_CONFIG),
    "is_immutable": BackupRepository.is_immutable,
}


def check() -> None:
    """Nothing, if all that is needed of the catalogue can be read."""
    for model, columns in ((BackupRepository, _REPOSITORY), (BackupJob, _JOB), (BackupDiskRow, _DISK)):
        fetch(model.select(*columns.values()).where(peewee.SQL("1 = 0")), model, columns)


# Repositories


def repository(repository_id: str) -> Repository:
    """One repository. Raises BackupNotFound, and CatalogUnavailable if its configuration gives no directory."""
    query = BackupRepository.select(*_REPOSITORY.values()).where(BackupRepository.id == repository_id)
    for row in fetch(query, BackupRepository, _REPOSITORY):
        if row.text("id") == repository_id:
            return _repository(row)
    raise no_repository(repository_id)


def no_repository(repository_id: str) -> BackupNotFound:
    """What who names a repository that is not there is told."""
    return BackupNotFound(f"there is no repository {repository_id[:64]!r}; list the repositories to see their ids")


def repositories() -> list[Repository]:
    """All repositories by name, without those whose configuration is broken."""
    exact = here().exact
    query = BackupRepository.select(*_REPOSITORY.values())
    query = query.order_by(exact(BackupRepository.name), exact(BackupRepository.id))
    return meant(fetch(query, BackupRepository, _REPOSITORY), _repository, "repository")


def _repository(row: Row) -> Repository:
    repository_id = row.text("id", longest=_LONGEST_ID)
    name = row.text("name", repository_id)
    try:
        config = json.loads(row.text("config", longest=_LONGEST_CONFIG))
    except (ValueError, RecursionError):
        config = None
    root = (config.get("path") or config.get("mount_point")) if isinstance(config, dict) else None
    if not isinstance(root, str) or not is_plain(root):
        raise CatalogUnavailable(
            f"the configuration of repository {name!r} names no absolute directory as path or mount_point; "
            "correct it in the catalogue"
        )
    return Repository(
        repository_id,
        name,
        row.text("repository_type"),
        row.flag("enabled", default=True),
        Path(root),
        row.flag("is_immutable", default=False),
    )


def is_plain(path: str) -> bool:
    """Whether a path is absolute and leads where it seems to."""
    return path.startswith("/") and ".." not in path.split("/") and is_text(path)


# Backups


class Place(NamedTuple):
    """A place in the list of backups: the time, as the database compares it (empty: none is known), and the id."""

    moment: str
    backup_id: str


def backup(backup_id: str) -> Backup:
    """One backup. Raises BackupNotFound, and CatalogUnavailable if its rows mean nothing."""
    rows = fetch(BackupJob.select(*_JOB.values()).where(BackupJob.id == backup_id), BackupJob, _JOB)
    for row in rows:
        if row.text("id") == backup_id:
            return _backup(row, _disks([backup_id]))
    raise BackupNotFound(f"there is no backup {backup_id[:64]!r}; list the backups to see their ids")


def backups(
    vm_name: str | None, status: str | None, repository_id: str | None, limit: int, cursor: str
) -> tuple[list[Backup], str]:
    """A page of backups, newest first, and the cursor of the next (``""`` at the end). Raises InvalidOption."""
    cursors.check_limit(limit)
    exact = here().exact
    query = BackupJob.select(*_JOB.values())
    for column, wanted in (
        (BackupJob.vm_name, vm_name),
        (BackupJob.status, status),
        (BackupJob.repository, repository_id),
    ):
        if wanted is not None:
            query = query.where((column == wanted) & (exact(column) == wanted))
    if cursor:
        query = query.where(_after(decode_cursor(cursor)))
    # NULL is less than all times, with both engines: what has no time comes last.
    query = query.order_by(BackupJob.created_at.desc(), exact(BackupJob.id).desc())

    def prepare(rows: Sequence[Row]) -> Callable[[Row], tuple[Place, Backup]]:
        disks = _disks(_ids(rows))
        return lambda row: (_place(row), _backup(row, disks))

    page, more, stopped = paged(query, BackupJob, _JOB, limit, prepare, "backup")
    after = encode_cursor(page[-1][0]) if more else last_cursor(stopped, _cursor)
    return [found for _, found in page], after


def _cursor(row: Row) -> str:
    """The cursor of a place that may mean nothing; raises InvalidOption then."""
    cursor = encode_cursor(_place(row))
    decode_cursor(cursor)
    return cursor


def _place(row: Row) -> Place:
    return Place(row.stored("created_at"), row.text("id"))


def _after(place: Place) -> peewee.Expression:
    """What comes after a place in the list."""
    earlier_id = here().exact(BackupJob.id) < place.backup_id
    created_at = BackupJob.created_at
    if not place.moment:
        return created_at.is_null() & earlier_id
    moment = peewee.Value(place.moment, converter=False)
    return (created_at < moment) | ((created_at == moment) & earlier_id) | created_at.is_null()


def of_repository(repository_id: str) -> list[Backup]:
    """All backups of a repository. Raises CatalogUnavailable if one of them means nothing."""
    query = BackupJob.select(*_JOB.values()).where(BackupJob.repository == repository_id)
    rows = fetch(query, BackupJob, _JOB)
    disks = _disks(_ids(rows))
    return [_backup(row, disks) for row in rows]


def backup_ids(wanted: Iterable[str]) -> set[str]:
    """Those of the ids that are in the catalogue."""
    ids = set(wanted)
    found: set[str] = set()
    for some in in_parts(sorted(ids)):
        rows = fetch(BackupJob.select(BackupJob.id).where(BackupJob.id.in_(some)), BackupJob, ["id"])
        found.update(row.text("id") for row in rows)
    return found & ids


def _ids(rows: Iterable[Row]) -> list[str]:
    """The ids of backups that are some; of others is told where they are needed."""
    found = []
    for row in rows:
        with contextlib.suppress(CatalogUnavailable):
            found.append(row.text("id"))
    return found


def _disks(backup_ids: Sequence[str]) -> dict[str, list[Row]]:
    """The rows of these backups' disks, by backup and in the order of their index."""
    found: dict[str, list[Row]] = {backup_id: [] for backup_id in backup_ids}
    for some in in_parts(backup_ids):
        query = BackupDiskRow.select(*_DISK.values()).where(BackupDiskRow.backup_job.in_(some))
        for row in fetch(query.order_by(BackupDiskRow.disk_index), BackupDiskRow, _DISK):
            if (rows := found.get(row.text("backup_job_id"))) is not None:
                rows.append(row)
    return found


def _backup(row: Row, disks: Mapping[str, Sequence[Row]]) -> Backup:
    """What a backup's row means, with those of its disks: without one of them it would be taken for whole."""
    backup_id = row.text("id", longest=_LONGEST_ID)
    held = tuple(_disk(disk) for disk in disks[backup_id])
    if len({disk.index for disk in held}) < len(held):
        raise CatalogUnavailable(
            f"two disks of backup {backup_id!r} have the same disk_index; correct that in the catalogue"
        )
    return Backup(
        id=backup_id,
        vm_name=row.text("vm_name"),
        repository_id=row.text("repository_id"),
        backup_type=row.text("backup_type"),
        status=row.text("status"),
        parent_backup_id=row.text("parent_backup_id") or None,
        total_bytes=row.number("total_bytes"),
        bytes_transferred=row.number("bytes_transferred"),
        created_at=row.moment("created_at"),
        started_at=row.moment("started_at"),
        completed_at=row.moment("completed_at"),
        disks=held,
    )


def _disk(row: Row) -> BackupDisk:
    return BackupDisk(
        row.number("id"),
        row.number("disk_index", largest=_LARGEST_INDEX),
        row.text("qcow2_path"),
        row.number("size_gb", unit=GIB),
        row.text("status"),
    )


def encode_cursor(place: Place) -> str:
    """The text that stands for a place in the list of backups."""
    return cursors.encode(f"{place.moment}|{place.backup_id}")


def decode_cursor(cursor: str) -> Place:
    """The inverse of ``encode_cursor``. Raises InvalidOption for any text that did not come from it."""
    moment, separator, backup_id = cursors.decode(cursor, "backups").partition("|")
    try:
        if moment and not moment.startswith(NO_DATE):
            datetime.fromisoformat(moment)
    except ValueError:
        raise cursors.foreign("backups") from None
    if not separator:
        raise cursors.foreign("backups")
    return Place(moment, backup_id)
