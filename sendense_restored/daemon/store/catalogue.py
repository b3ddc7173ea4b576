"""Units of work on the catalogue: repositories, backups and their disks.

Each function runs on the store's thread inside a transaction (see ``database.py``) and returns records only. No
function touches a repository's files: storage that hangs must not stop the store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import uuid
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import peewee

from sendense_restored.errors import BackupNotFound, Busy, CatalogUnavailable, InvalidOption

from . import cursors
from .models import TIME_FORMAT, BackupDiskRow, BackupJob, BackupRepository, RestoreMount, to_stored
from .records import Backup, BackupDisk, DiskFile, MountStatus, Repository, Vm

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

log = logging.getLogger(__name__)

MOST_PER_PAGE = 1000
_GIB = 1 << 30
_LARGEST = 2**63 - 1
_VM = "vm:"
_IDS_AT_ONCE = 500
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")


# Reading


def repository(repository_id: str) -> Repository:
    """One repository. Raises BackupNotFound, and CatalogUnavailable if its configuration gives no directory."""
    row = BackupRepository.get_or_none(BackupRepository.id == repository_id)
    if row is None:
        raise BackupNotFound(
            f"there is no repository {repository_id[:64]!r}; the list of backups names those that have any"
        )
    return _repository(row)


def repositories() -> list[Repository]:
    """All repositories by name. One whose configuration is broken is left out and logged: the others still serve."""
    found = []
    for row in BackupRepository.select().order_by(BackupRepository.name):
        try:
            found.append(_repository(row))
        except CatalogUnavailable as error:
            log.warning("not listing repository %s: %s", row.id, error)
    return found


def _repository(row: BackupRepository) -> Repository:
    try:
        config = json.loads(row.config)
    except (TypeError, ValueError, RecursionError):
        config = None
    root = (config.get("path") or config.get("mount_point")) if isinstance(config, dict) else None
    if not isinstance(root, str) or not _is_plain(root):
        raise CatalogUnavailable(
            f"the configuration of repository {row.name!r} names no absolute directory as path or mount_point; "
            "correct it in the catalogue"
        )
    return Repository(row.id, row.name, row.repository_type, bool(row.enabled), Path(root), bool(row.is_immutable))


def backup(backup_id: str) -> Backup:
    """One backup. Raises BackupNotFound."""
    row = BackupJob.get_or_none(BackupJob.id == backup_id)
    if row is None:
        raise BackupNotFound(f"there is no backup {backup_id[:64]!r}; list the backups to see their ids")
    return with_disks([row])[0]


def backups(
    vm_name: str | None, status: str | None, repository_id: str | None, limit: int, cursor: str
) -> tuple[list[Backup], str]:
    """A page of backups, newest first, and the cursor of the next (``""`` at the end). Raises InvalidOption."""
    check_limit(limit)
    query = BackupJob.select()
    for column, wanted in (
        (BackupJob.vm_name, vm_name),
        (BackupJob.status, status),
        (BackupJob.repository, repository_id),
    ):
        if wanted is not None:
            query = query.where(column == wanted)
    if cursor:
        created_at, last_id = decode_cursor(cursor)
        query = query.where(
            (BackupJob.created_at < created_at) | ((BackupJob.created_at == created_at) & (BackupJob.id < last_id))
        )
    rows = list(query.order_by(BackupJob.created_at.desc(), BackupJob.id.desc()).limit(limit + 1))
    page = with_disks(rows[:limit])
    return page, encode_cursor(page[-1].created_at, page[-1].id) if len(rows) > limit else ""


def check_limit(limit: int) -> None:
    """Raises InvalidOption if a page cannot be that long."""
    if not 1 <= limit <= MOST_PER_PAGE:
        raise InvalidOption(f"limit must be from 1 to {MOST_PER_PAGE}")


def encode_cursor(created_at: datetime, backup_id: str) -> str:
    """The text that stands for a place in the list of backups."""
    return cursors.encode(f"{to_stored(created_at)}|{backup_id}")


def decode_cursor(cursor: str) -> tuple[datetime, str]:
    """The inverse of ``encode_cursor``. Raises InvalidOption for any text that did not come from it."""
    moment, separator, backup_id = cursors.decode(cursor, "backups").partition("|")
    try:
        created_at = datetime.strptime(moment, TIME_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        raise cursors.foreign("backups") from None
    if not separator or encode_cursor(created_at, backup_id) != cursor:
        raise cursors.foreign("backups")
    return created_at, backup_id


def vms(limit: int, cursor: str) -> tuple[list[Vm], str]:
    """A page of the virtual machines that have backups, by name, and the cursor of the next. Raises InvalidOption."""
    check_limit(limit)
    counted = BackupJob.select(BackupJob.vm_name, peewee.fn.COUNT(BackupJob.id), peewee.fn.MAX(BackupJob.created_at))
    if cursor:
        place = cursors.decode(cursor, "virtual machines")
        if not place.startswith(_VM):
            raise cursors.foreign("virtual machines")
        counted = counted.where(BackupJob.vm_name > place.removeprefix(_VM))
    rows = list(counted.group_by(BackupJob.vm_name).order_by(BackupJob.vm_name).limit(limit + 1).tuples())
    page = rows[:limit]
    names = [name for name, _, _ in page]
    # Of backups of the same moment the one with the last id is the newest, as in the list of backups.
    candidates = (
        BackupJob.select(BackupJob.vm_name, BackupJob.repository, BackupJob.created_at)
        .where(BackupJob.vm_name.in_(names) & BackupJob.created_at.in_({moment for _, _, moment in page}))
        .order_by(BackupJob.created_at, BackupJob.id)
    )
    newest = {row.vm_name: row for row in candidates}
    found = [Vm(name, name, newest[name].repository_id, count, newest[name].created_at) for name, count, _ in page]
    return found, cursors.encode(_VM + names[-1]) if len(rows) > limit else ""


def backup_ids(wanted: Iterable[str]) -> set[str]:
    """Those of the ids that are in the catalogue."""
    ids = sorted(set(wanted))
    return {
        row[0]
        for start in range(0, len(ids), _IDS_AT_ONCE)
        for row in BackupJob.select(BackupJob.id).where(BackupJob.id.in_(ids[start : start + _IDS_AT_ONCE])).tuples()
    }


def with_disks(rows: Sequence[BackupJob]) -> list[Backup]:
    """Records of ``rows``, in their order, with their disks by one query."""
    disks: dict[str, list[BackupDisk]] = {row.id: [] for row in rows}
    selected = BackupDiskRow.select().where(BackupDiskRow.backup_job.in_(list(disks)))
    for disk in selected.order_by(BackupDiskRow.disk_index):
        disks[disk.backup_job_id].append(
            BackupDisk(disk.id, disk.disk_index, disk.qcow2_path, round(disk.size_gb * _GIB), disk.status)
        )
    return [
        Backup(
            id=row.id,
            vm_name=row.vm_name,
            repository_id=row.repository_id,
            backup_type=row.backup_type,
            status=row.status,
            parent_backup_id=row.parent_backup_id,
            total_bytes=row.total_bytes,
            bytes_transferred=row.bytes_transferred,
            created_at=row.created_at,
            started_at=row.started_at,
            completed_at=row.completed_at,
            disks=tuple(disks[row.id]),
        )
        for row in rows
    ]


# Writing


def add_repository(name: str, path: str, type_: str, *, immutable: bool) -> Repository:
    """Put a directory of backups into the catalogue. Raises InvalidOption."""
    if not 1 <= len(name) <= 255:
        raise InvalidOption("a repository's name has 1 to 255 characters")
    if not re.fullmatch(r"[a-z0-9_-]{1,32}", type_):
        raise InvalidOption(
            "a repository's type is a word of at most 32 lower-case letters, such as 'local' or 'nfs'"
        )
    if not _is_plain(path):
        raise InvalidOption("a repository's path is absolute and has no '..' in it")
    root = PurePosixPath(path)
    for row in BackupRepository.select():
        if row.name == name:
            raise InvalidOption(f"there is a repository {name!r} already; choose another name")
        try:
            other = _repository(row).root
        except CatalogUnavailable:
            continue
        if PurePosixPath(other) == root:
            raise InvalidOption(f"repository {row.name!r} has this path already; use that one")
    repository_id = free_id = slug(name, 60) or "repository"
    number = 1
    while BackupRepository.get_or_none(BackupRepository.id == free_id):
        number += 1
        free_id = f"{repository_id}-{number}"
    row = BackupRepository.create(
        id=free_id, name=name, repository_type=type_, config=json.dumps({"path": str(root)}), is_immutable=immutable
    )
    return _repository(row)


def remove_repository(repository_id: str) -> None:
    """Take a repository and its backups out of the catalogue; no file is touched. Raises BackupNotFound and Busy."""
    if mounted().join(BackupJob).where(BackupJob.repository == repository_id).exists():
        raise Busy("backups of this repository are mounted; unmount them first")
    if not BackupRepository.delete().where(BackupRepository.id == repository_id).execute():
        raise BackupNotFound(
            f"there is no repository {repository_id[:64]!r}; the list of backups names those that have any"
        )


def add_backup(
    repository_id: str,
    vm_name: str,
    disks: Sequence[DiskFile],
    *,
    backup_id: str,
    parent_backup_id: str | None,
    created_at: datetime | None,
) -> Backup:
    """Put a finished backup into the catalogue. Raises InvalidOption and BackupNotFound (repository, parent)."""
    root = repository(repository_id).root
    if not 1 <= len(vm_name) <= 255:
        raise InvalidOption("a virtual machine's name has 1 to 255 characters")
    if not disks or len({disk.index for disk in disks}) < len(disks) or any(disk.index < 0 for disk in disks):
        raise InvalidOption("a backup has at least one disk, and each disk an index of its own, from 0")
    if any(disk.size <= 0 for disk in disks) or sum(disk.size for disk in disks) > _LARGEST:
        raise InvalidOption("a disk's size is its number of bytes, more than 0")
    if backup_id and not _ID.fullmatch(backup_id):
        raise InvalidOption(
            "a backup's id has at most 64 letters, digits and '._:-', and begins with a letter or digit"
        )
    if backup_id and BackupJob.get_or_none(BackupJob.id == backup_id):
        raise InvalidOption(f"there is a backup {backup_id!r} already; choose another id")
    if parent_backup_id is not None and backup(parent_backup_id).repository_id != repository_id:
        raise InvalidOption("the parent backup lies in another repository; a chain must not leave its repository")
    files = [DiskFile(disk.index, _inside(root, disk.path), disk.size) for disk in disks]
    taken = BackupDiskRow.select().join(BackupJob).where(BackupJob.repository == repository_id)
    if clash := taken.where(BackupDiskRow.qcow2_path.in_([file.path for file in files])).first():
        raise InvalidOption(f"the image belongs to backup {clash.backup_job_id!r} already; use that one")
    moment = created_at or datetime.now(UTC)
    new_id = backup_id or f"{slug(vm_name, 51) or 'backup'}-{uuid.uuid4().hex[:12]}"
    put_backup(
        new_id,
        files,
        vm_name=vm_name,
        repository=repository_id,
        backup_type="full" if parent_backup_id is None else "incremental",
        status="completed",
        repository_path=str(root / PurePosixPath(files[0].path).parent),
        parent_backup=parent_backup_id,
        total_bytes=sum(file.size for file in files),
        bytes_transferred=0,
        created_at=moment,
        started_at=None,
        completed_at=moment,
    )
    return backup(new_id)


def put_backup(backup_id: str, files: Iterable[DiskFile], **columns: object) -> None:
    """Write a backup and its disks, new or changed. A disk that stays keeps its id."""
    if not BackupJob.update(**columns).where(BackupJob.id == backup_id).execute():
        BackupJob.create(id=backup_id, **columns)
    known = {row.disk_index: row for row in BackupDiskRow.select().where(BackupDiskRow.backup_job == backup_id)}
    for file in files:
        row = known.pop(file.index, None) or BackupDiskRow(backup_job=backup_id, disk_index=file.index)
        row.qcow2_path, row.size_gb, row.status = file.path, file.size / _GIB, "completed"
        row.save()
    for row in known.values():
        row.delete_instance()


def remove_backup(backup_id: str) -> None:
    """Take a backup out of the catalogue; no file is touched. Raises BackupNotFound, Busy and InvalidOption."""
    backup(backup_id)
    if mounted().where(RestoreMount.backup == backup_id).exists():
        raise Busy("the backup is mounted; unmount it first")
    child = BackupJob.get_or_none(BackupJob.parent_backup == backup_id)
    if child is not None:
        raise InvalidOption(f"backup {child.id!r} builds on this one; remove that one first")
    BackupJob.delete().where(BackupJob.id == backup_id).execute()


def mounted() -> peewee.ModelSelect:
    """The rows of mounts that are there, or soon will be. Those that failed or end hold no backup back."""
    return RestoreMount.select().where(RestoreMount.status.in_([MountStatus.MOUNTING, MountStatus.MOUNTED]))


def slug(text: str, longest: int) -> str:
    """``text`` as lower-case ASCII letters, digits and single dashes, at most ``longest`` of them."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:longest].rstrip("-")


def scanned_id(repository_id: str, key: str) -> str:
    """The id of the backup that a scan finds under ``key``: readable, at most 64 characters, the same each time.

    The hash keeps two apart that read alike, so an id depends on nothing else that is in the repository.
    """
    digest = hashlib.sha256(f"{repository_id}\0{key}".encode()).hexdigest()[:12]
    readable = slug(key.removesuffix(".qcow2").removesuffix("-diskN"), 51)
    return f"{readable or 'backup'}-{digest}"


def _is_plain(path: str) -> bool:
    return path.startswith("/") and ".." not in path.split("/") and "\0" not in path


def _inside(root: Path, path: str) -> str:
    """``path`` relative to the repository. Raises InvalidOption if it leads out, as far as its text tells."""
    target = PurePosixPath(path)
    if target.is_absolute() and target.is_relative_to(root):
        target = target.relative_to(root)
    if target.is_absolute() or ".." in target.parts or "\0" in path or not target.parts:
        raise InvalidOption("an image's path is that of a file inside the repository, without '..'")
    return str(target)
