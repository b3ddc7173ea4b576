"""Units of work that fill the embedded catalogue, and know how ids are made.

Each function runs on the store's thread inside a transaction (see ``database.py``) and returns records only. A
catalogue of others is never written: ``Store`` calls none of these then.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from sendense_restored.errors import Busy, InvalidOption

from .catalogue import GIB, backup, is_plain, no_repository, repositories, repository
from .models import BackupDiskRow, BackupJob, BackupRepository, RestoreMount
from .records import DiskFile, MountStatus
from .rows import LARGEST

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import peewee

    from .records import Backup, Repository

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")


def add_repository(name: str, path: str, type_: str, *, immutable: bool) -> Repository:
    """Put a directory of backups into the catalogue. Raises InvalidOption."""
    if not 1 <= len(name) <= 255:
        raise InvalidOption("a repository's name has 1 to 255 characters")
    if not re.fullmatch(r"[a-z0-9_-]{1,32}", type_):
        raise InvalidOption(
            "a repository's type is a word of at most 32 lower-case letters, such as 'local' or 'nfs'"
        )
    if not is_plain(path):
        raise InvalidOption("a repository's path is absolute and has no '..' in it")
    if BackupRepository.get_or_none(BackupRepository.name == name):
        raise InvalidOption(f"there is a repository {name!r} already; choose another name")
    root = PurePosixPath(path)
    for other in repositories():
        if PurePosixPath(other.root) == root:
            raise InvalidOption(f"repository {other.name!r} has this path already; use that one")
    repository_id = free_id = slug(name, 60) or "repository"
    number = 1
    while BackupRepository.get_or_none(BackupRepository.id == free_id):
        number += 1
        free_id = f"{repository_id}-{number}"
    BackupRepository.create(
        id=free_id, name=name, repository_type=type_, config=json.dumps({"path": str(root)}), is_immutable=immutable
    )
    return repository(free_id)


def remove_repository(repository_id: str) -> None:
    """Take a repository and its backups out of the catalogue; no file is touched. Raises BackupNotFound and Busy."""
    if mounted().join(BackupJob).where(BackupJob.repository == repository_id).exists():
        raise Busy("backups of this repository are mounted; unmount them first")
    if not BackupRepository.delete().where(BackupRepository.id == repository_id).execute():
        raise no_repository(repository_id)


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
    if any(disk.size <= 0 for disk in disks) or sum(disk.size for disk in disks) > LARGEST:
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
        row.qcow2_path, row.size_gb, row.status = file.path, file.size / GIB, "completed"
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


def _inside(root: Path, path: str) -> str:
    """``path`` relative to the repository. Raises InvalidOption if it leads out, as far as its text tells."""
    target = PurePosixPath(path)
    if target.is_absolute() and target.is_relative_to(root):
        target = target.relative_to(root)
    if target.is_absolute() or ".." in target.parts or "\0" in path or not target.parts:
        raise InvalidOption("an image's path is that of a file inside the repository, without '..'")
    return str(target)
