"""What the service answers, as frozen Python values.

``decoding`` says what becomes of keys that are missing or unknown and of values of another type. Times are whole
seconds since the epoch, 0 for none, unless the name ends in ``_ns``. Names and paths are in the text form of
``names.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .decoding import Answer, dicts, items, scalars, typed, wrong

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Disk:
    """One disk of a backup; ``size`` in bytes."""

    index: int = 0
    size: int = 0
    backup_disk_id: int = 0

    @classmethod
    def decode(cls, answer: Answer) -> Disk:
        """From an element of ``disks``."""
        return cls(**scalars(cls, answer))


@dataclass(frozen=True)
class Backup:
    """One backup of the catalogue."""

    backup_id: str = ""
    vm_name: str = ""
    backup_type: str = ""
    status: str = ""
    repository_id: str = ""
    parent_backup_id: str = ""
    total_bytes: int = 0
    bytes_transferred: int = 0
    created_at: int = 0
    started_at: int = 0
    completed_at: int = 0
    disks: tuple[Disk, ...] = ()

    @classmethod
    def decode(cls, answer: Answer) -> Backup:
        """From an element of ListBackups."""
        return cls(**scalars(cls, answer), disks=tuple(map(Disk.decode, dicts(answer, "disks"))))


@dataclass(frozen=True)
class Vm:
    """A virtual machine that the catalogue has backups of; ``repository_id`` is that of the newest."""

    context_id: str = ""
    vm_name: str = ""
    repository_id: str = ""
    backups: int = 0
    newest: int = 0

    @classmethod
    def decode(cls, answer: Answer) -> Vm:
        """From an element of ListVms."""
        return cls(**scalars(cls, answer))


@dataclass(frozen=True)
class Repository:
    """A repository of the catalogue."""

    repository_id: str = ""
    name: str = ""
    type: str = ""
    path: str = ""
    enabled: bool = False
    immutable: bool = False

    @classmethod
    def decode(cls, answer: Answer) -> Repository:
        """From an element of ListRepositories."""
        return cls(**scalars(cls, answer))


@dataclass(frozen=True)
class Volume:
    """One volume of a mount; sizes in bytes.

    ``state`` other than ``mounted`` comes with a ``reason``, a sentence that an operator can act on.
    """

    name: str = ""
    device: str = ""
    filesystem: str = ""
    driver: str = ""
    label: str = ""
    uuid: str = ""
    size: int = 0
    used: int = 0
    state: str = ""
    reason: str = ""
    view: str = ""
    display_name: str = ""

    @classmethod
    def decode(cls, answer: Answer) -> Volume:
        """From an element of the property Volumes."""
        return cls(**scalars(cls, answer))


@dataclass(frozen=True)
class Claim:
    """Who asked for a mount, since when, and when they lose it if they do not use it."""

    uid: int = 0
    on_behalf_of: str = ""
    since: int = 0
    expires: int = 0

    @classmethod
    def decode(cls, answer: Answer) -> Claim:
        """From an element of the property Claims."""
        return cls(**scalars(cls, answer))


@dataclass(frozen=True)
class MountInfo:
    """The properties of a mount. ``state`` is mounting, mounted, unmounting or failed."""

    id: str = ""
    backup_id: str = ""
    vm_name: str = ""
    state: str = ""
    error: str = ""
    mount_path: str = ""
    filesystem_type: str = ""
    journal: str = ""
    created_at: int = 0
    last_accessed_at: int = 0
    expires_at: int = 0
    busy: bool = False
    bytes_out: int = 0
    backup_disk_ids: tuple[int, ...] = ()
    disk_indexes: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()
    volumes: tuple[Volume, ...] = ()
    claims: tuple[Claim, ...] = ()

    @classmethod
    def decode(cls, properties: Answer) -> MountInfo:
        """From GetAll of the interface Mount, whose names are in camel case."""
        answer = {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower(): value for key, value in properties.items()}
        return cls(
            **scalars(cls, answer),
            backup_disk_ids=items(answer, "backup_disk_ids", int),
            disk_indexes=items(answer, "disk_indexes", int),
            devices=items(answer, "devices", str),
            volumes=tuple(map(Volume.decode, dicts(answer, "volumes"))),
            claims=tuple(map(Claim.decode, dicts(answer, "claims"))),
        )


@dataclass(frozen=True)
class Entry:
    """One line of a listing. ``mode`` has the permission bits, ``target`` is a symlink's."""

    name: str
    kind: str
    size: int
    mode: int
    mtime_ns: int
    target: str
    extras: Mapping[str, Any]

    @classmethod
    def decode(cls, answer: Sequence[Any]) -> Entry:
        """From one struct of ListFiles, whose types the reply's signature has already fixed."""
        return cls(*answer)


@dataclass(frozen=True)
class FileInfo:
    """One guest file; sizes in bytes.

    ``unreadable`` says why its content cannot be given faithfully, if so; ``time_clamped`` that one of its times does
    not fit into 64 bits of nanoseconds.
    """

    kind: str = ""
    size: int = 0
    allocated: int = 0
    mode: int = 0
    uid: int = 0
    gid: int = 0
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    nlink: int = 0
    target: str = ""
    unreadable: str = ""
    time_clamped: bool = False
    xattrs: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()

    @classmethod
    def decode(cls, answer: Answer) -> FileInfo:
        """From GetFileInfo, or what OpenFile says about the file that it opened."""
        return cls(
            **scalars(cls, answer),
            xattrs=items(answer, "xattrs", str),
            streams=items(answer, "streams", str),
        )


@dataclass(frozen=True)
class Found:
    """One entry of a listing stream. ``path`` is the whole one; the rest is as ``Entry`` and ``FileInfo`` have it.

    ``nlink`` is 0 where it does not matter, ``display_name`` that of a volume.
    """

    path: str = ""
    kind: str = ""
    size: int = 0
    mode: int = 0
    mtime_ns: int = 0
    target: str = ""
    unreadable: str = ""
    nlink: int = 0
    time_clamped: bool = False
    display_name: str = ""

    @classmethod
    def decode(cls, answer: Answer) -> Found:
        """From a line of a listing, which must say at least what it is about."""
        found = cls(**scalars(cls, answer))
        if not found.path or not found.kind:
            raise wrong("path" if not found.path else "kind")
        return found


@dataclass(frozen=True)
class Problem:
    """Something that a listing stream had to leave out, and why."""

    path: str = ""
    error: str = ""

    @classmethod
    def decode(cls, answer: Answer) -> Problem:
        """From a line of a listing with ``error``."""
        return cls(**scalars(cls, answer))


@dataclass(frozen=True)
class Summary:
    """The end of a listing stream: how many ``Found`` and ``Problem`` there were; whether its limit cut it short."""

    entries: int = 0
    errors: int = 0
    truncated: bool = False

    @classmethod
    def decode(cls, answer: object) -> Summary:
        """From the ``summary`` of a listing's last line."""
        return cls(**scalars(cls, typed("summary", answer, dict)))


@dataclass(frozen=True)
class Device:
    """A block device of the service: ``ours``, or ``draining`` because somebody still holds a file of its mount."""

    path: str = ""
    state: str = ""
    mount: str = ""

    @classmethod
    def decode(cls, answer: Answer) -> Device:
        """From an element of ``devices``."""
        return cls(**scalars(cls, answer))


@dataclass(frozen=True)
class Resources:
    """What the service uses and has left; sizes in bytes, ``sweep_interval`` and ``idle_timeout`` in seconds."""

    active_mounts: int = 0
    max_mounts: int = 0
    available_slots: int = 0
    expired_mounts: int = 0
    queued: int = 0
    overlay_used: int = 0
    overlay_limit: int = 0
    memory: int = 0
    open_fds: int = 0
    sweep_interval: int = 0
    next_sweep: int = 0
    idle_timeout: int = 0
    backend: str = ""
    devices: tuple[Device, ...] = ()

    @classmethod
    def decode(cls, answer: Answer) -> Resources:
        """From the answer of GetResources."""
        return cls(**scalars(cls, answer), devices=tuple(map(Device.decode, dicts(answer, "devices"))))


@dataclass(frozen=True)
class Event:
    """Something that has happened, ``at`` so many microseconds after the epoch.

    ``outcome`` is ``ok`` or the name of an error. None where nobody did it (``uid``), where nothing was streamed
    (``bytes``), where no file was handed out (``size``).
    """

    id: int = 0
    at: int = 0
    what: str = ""
    outcome: str = ""
    unit: str = ""
    on_behalf_of: str = ""
    mount_id: str = ""
    backup_id: str = ""
    path: str = ""
    detail: str = ""
    uid: int | None = None
    bytes: int | None = None
    size: int | None = None

    @classmethod
    def decode(cls, answer: Answer) -> Event:
        """From an element of ListEvents."""
        numbers = {key: typed(key, answer[key], int) for key in ("uid", "bytes", "size") if key in answer}
        return cls(**scalars(cls, answer), **numbers)


@dataclass(frozen=True)
class HeldFile:
    """An image that a mount holds open; ``file`` is relative to the repository."""

    repository: str = ""
    file: str = ""
    mount: str = ""

    @classmethod
    def decode(cls, answer: Answer) -> HeldFile:
        """From an element of InUse."""
        return cls(**scalars(cls, answer))


@dataclass(frozen=True)
class Skipped:
    """An image that a scan left out; ``path`` is relative to the repository."""

    path: str = ""
    reason: str = ""

    @classmethod
    def decode(cls, answer: Answer) -> Skipped:
        """From an element of ``skipped``."""
        return cls(**scalars(cls, answer))


@dataclass(frozen=True)
class Scanned:
    """What a scan found: ids of backups.

    The files of those in ``gone`` and ``kept`` are not there any more; the latter are still recorded, because they
    are mounted or something is wrong with their files.
    """

    unchanged: int = 0
    added: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    @classmethod
    def decode(cls, answer: Answer) -> Scanned:
        """From the result of Scan."""
        lists: dict[str, Any] = {key: items(answer, key, str) for key in ("added", "updated", "gone", "kept")}
        return cls(**scalars(cls, answer), **lists, skipped=tuple(map(Skipped.decode, dicts(answer, "skipped"))))
