"""What the store hands out: frozen records without a trace of the database, and its error at start.

Times are aware UTC; sizes are bytes; texts are text (a guest or host name that is no UTF-8 never gets here).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from pathlib import Path

Journal = Literal["replay", "as-crashed"]


class StoreError(Exception):
    """The database cannot be used and the service must not start; the message is for the administrator."""


class StoreUnreachableError(StoreError):
    """The database cannot be used now; another start may find it well."""


class MountStatus(StrEnum):
    """The states of a mount, as the table has them."""

    MOUNTING = "mounting"
    MOUNTED = "mounted"
    UNMOUNTING = "unmounting"
    FAILED = "failed"


@dataclass(frozen=True)
class Repository:
    """A directory that holds backups."""

    id: str
    name: str
    type: str
    enabled: bool
    root: Path
    immutable: bool


@dataclass(frozen=True)
class BackupDisk:
    """One disk of a backup; ``qcow2_path`` is absolute or relative to the repository."""

    id: int
    index: int
    qcow2_path: str
    size: int
    status: str


@dataclass(frozen=True)
class Backup:
    """A backup of one virtual machine at one time, with its disks by index.

    A catalogue that is not ours may not know when it was made.
    """

    id: str
    vm_name: str
    repository_id: str
    backup_type: str
    status: str
    parent_backup_id: str | None
    total_bytes: int
    bytes_transferred: int
    created_at: datetime | None
    started_at: datetime | None
    completed_at: datetime | None
    disks: tuple[BackupDisk, ...]


@dataclass(frozen=True)
class Vm:
    """A virtual machine that has backups: how many, and where and when the newest was made.

    ``context_id`` is what the appliance calls it; the embedded database knows it by its name alone.
    """

    context_id: str
    vm_name: str
    repository_id: str
    backups: int
    newest: datetime | None


@dataclass(frozen=True)
class DiskFile:
    """A disk image on its way into the catalogue; ``size`` is the disk's, not the file's."""

    index: int
    path: str
    size: int


@dataclass(frozen=True)
class FoundBackup:
    """A backup that a scan found.

    ``key`` tells it from all others of the repository and stays the same as long as its files keep their names;
    ``parent`` is the key of the backup that it builds on, or ``""``.
    """

    key: str
    vm_name: str
    backup_type: str
    parent: str
    created_at: datetime
    stored_bytes: int
    disks: tuple[DiskFile, ...]


@dataclass(frozen=True)
class Problem:
    """A file or directory (relative to the repository) that a scan could not use, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Found:
    """All that a scan of a repository found."""

    backups: tuple[FoundBackup, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class ScanResult:
    """What a scan changed in the catalogue: ids of backups, and how many stayed as they were.

    ``kept`` were not found and stay nevertheless: they are mounted, or their files are there but have a problem.
    """

    added: tuple[str, ...]
    updated: tuple[str, ...]
    gone: tuple[str, ...]
    kept: tuple[str, ...]
    unchanged: int


@dataclass(frozen=True)
class MountRow:
    """A row of ``restore_mounts``: the wish that a mount exists.

    ``disk_index`` and ``backup_disk_id`` are None for all disks of a backup.
    """

    id: str
    backup_id: str
    backup_disk_id: int | None
    disk_index: int | None
    mount_path: str
    journal: Journal
    created_at: datetime
    last_accessed_at: datetime
    expires_at: datetime | None
    status: MountStatus = MountStatus.MOUNTING
    nbd_device: str = ""
    filesystem_type: str = ""
    mount_mode: Literal["read-only"] = "read-only"
    error_message: str = ""
    resume_attempts: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


class MountChanges(TypedDict, total=False):
    """The columns of ``restore_mounts`` that change during a mount's life."""

    mount_path: str
    nbd_device: str
    filesystem_type: str
    status: MountStatus
    error_message: str
    last_accessed_at: datetime
    expires_at: datetime | None
    resume_attempts: int
    options: Mapping[str, Any]


@dataclass(frozen=True)
class ClaimRow:
    """A row of ``restore_claims``: who wants a mount until when.

    ``on_behalf_of`` is ``""`` for the uid itself; without ``expires_at`` the claim lasts as long as the mount.
    ``timeout`` is for how many seconds the claim lasts without use.
    """

    mount_id: str
    uid: int
    on_behalf_of: str
    since: datetime
    expires_at: datetime | None
    timeout: float = 3600.0


ENDED = "ended"
"""``what`` of the event that a mount ended, with the reason as its ``detail``."""


@dataclass(frozen=True)
class Event:
    """A row of ``restore_events``: what happened, and by whom.

    ``uid`` is None for the service itself; texts are ``""`` where there is nothing to say. ``path`` is a guest path
    in its text form. ``bytes`` left the house through a pipe; ``size`` is that of a file whose descriptor was handed
    out. ``id`` is given by the database; 0 until then.
    """

    at: datetime
    what: str
    outcome: str = "ok"
    uid: int | None = None
    unit: str = ""
    on_behalf_of: str = ""
    mount_id: str = ""
    backup_id: str = ""
    path: str = ""
    detail: str = ""
    bytes: int | None = None
    size: int | None = None
    id: int = 0
