"""A unit of work: what a scan found becomes what the catalogue says.

A backup that a scan put there is recognised by its id, which follows from its files' names; those that were added by
hand are left alone, and their files are not added a second time. The same files again change nothing.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from sendense_restored.errors import Unavailable

from . import catalogue, embedded
from .models import BackupJob, RestoreMount
from .records import DiskFile, ScanResult
from .scanner import key_of

if TYPE_CHECKING:
    from .records import Backup, Found, FoundBackup, Problem, Repository


def record_scan(repository_id: str, found: Found) -> ScanResult:
    """Record what a scan of the repository found.

    Raises BackupNotFound, and Unavailable if nothing was found where there were backups: a file server that is not
    mounted looks like that, and must not empty the catalogue.
    """
    repository = catalogue.repository(repository_id)
    known = {backup.id: backup for backup in catalogue.of_repository(repository_id)}
    scanned = {id_ for id_, backup in known.items() if _is_scanned(backup)}
    if scanned and not found.backups and not found.problems:
        raise Unavailable(
            f"nothing was found in repository {repository.name!r}, which had {len(scanned)} backups: check that its "
            "storage is mounted; if they are really gone, remove them from the catalogue"
        )
    by_hand = {disk.qcow2_path: id_ for id_ in known.keys() - scanned for disk in known[id_].disks}
    ids = {one.key: embedded.scanned_id(repository_id, one.key) for one in found.backups}
    ids |= {key_of(path)[0]: id_ for path, id_ in by_hand.items()}

    added: list[str] = []
    updated: list[str] = []
    unchanged = 0
    present = set()
    for one in found.backups:
        id_ = ids[one.key]
        if any(disk.path in by_hand for disk in one.disks):
            unchanged += 1
            continue
        present.add(id_)
        before = known.get(id_)
        disks = _with_unreadable(one.disks, before, found.problems)
        columns = _columns(repository, one, disks, ids.get(one.parent))
        if before is not None and _same(before, columns, disks):
            unchanged += 1
            continue
        embedded.put_backup(id_, disks, **columns)
        (added if before is None else updated).append(id_)

    gone, kept = [], []
    for id_ in sorted(scanned - present):
        mounted = embedded.mounted().where(RestoreMount.backup == id_).exists()
        if mounted or _has_problem(known[id_], found.problems):
            kept.append(id_)
        else:
            BackupJob.delete().where(BackupJob.id == id_).execute()
            gone.append(id_)
    return ScanResult(tuple(added), tuple(updated), tuple(gone), tuple(kept), unchanged)


def _is_scanned(backup: Backup) -> bool:
    return any(
        backup.id == embedded.scanned_id(backup.repository_id, key_of(disk.qcow2_path)[0]) for disk in backup.disks
    )


def _with_unreadable(
    disks: tuple[DiskFile, ...], before: Backup | None, problems: tuple[Problem, ...]
) -> tuple[DiskFile, ...]:
    """The disks that were found, and those known before whose file is there but has a problem."""
    found = {disk.index for disk in disks}
    unreadable = {problem.path for problem in problems}
    missing = [disk for disk in _files(before) if disk.index not in found and disk.path in unreadable]
    return tuple(sorted([*disks, *missing], key=lambda disk: disk.index))


def _files(backup: Backup | None) -> tuple[DiskFile, ...]:
    disks = backup.disks if backup is not None else ()
    return tuple(DiskFile(disk.index, disk.qcow2_path, disk.size) for disk in disks)


def _columns(
    repository: Repository, found: FoundBackup, disks: tuple[DiskFile, ...], parent: str | None
) -> dict[str, Any]:
    return {
        "vm_name": found.vm_name,
        "repository": repository.id,
        "backup_type": found.backup_type,
        "status": "completed",
        "repository_path": str(repository.root / PurePosixPath(disks[0].path).parent),
        "parent_backup": parent,
        "total_bytes": sum(disk.size for disk in disks),
        "bytes_transferred": found.stored_bytes,
        "created_at": found.created_at,
        "started_at": None,
        "completed_at": found.created_at,
    }


def _same(backup: Backup, columns: dict[str, Any], disks: tuple[DiskFile, ...]) -> bool:
    recorded = (
        backup.backup_type,
        backup.status,
        backup.parent_backup_id,
        backup.total_bytes,
        backup.bytes_transferred,
        backup.created_at,
    )
    wanted = ("backup_type", "status", "parent_backup", "total_bytes", "bytes_transferred", "created_at")
    return recorded == tuple(columns[name] for name in wanted) and _files(backup) == disks


def _has_problem(backup: Backup, problems: tuple[Problem, ...]) -> bool:
    """Whether a file of the backup, or a directory above it, is there and could not be read."""
    above = {path for disk in backup.disks for path in _ancestry(disk.qcow2_path)}
    return any(problem.path in above for problem in problems)


def _ancestry(path: str) -> list[str]:
    file = PurePosixPath(path)
    return [path, *(str(parent) for parent in file.parents if parent.parts), "/"]
