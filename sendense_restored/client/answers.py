"""What the service answers, as frozen Python values.

Dictionaries arrive from the bus with their variants already taken off. A key that is not known here is ignored and a
missing one leaves its default, so that a client and a service of neighbouring versions understand each other; a value
of another type is a fault of the service and raises ``Failed``. Times are whole seconds since the epoch, 0 for none,
unless the name ends in ``_ns``. Names and paths are in the text form of ``names.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from sendense_restored import errors

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Disk:
    """One disk of a backup; ``size`` in bytes."""

    index: int = 0
    size: int = 0
    backup_disk_id: int = 0

    @classmethod
    def decode(cls, answer: Answer) -> Disk:
        """From an element of ``disks``."""
        return cls(**_scalars(cls, answer))


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
        return cls(**_scalars(cls, answer), disks=tuple(map(Disk.decode, _dicts(answer, "disks"))))


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
        return cls(**_scalars(cls, answer))


@dataclass(frozen=True)
class Claim:
    """Who asked for a mount, and since when."""

    uid: int = 0
    since: int = 0

    @classmethod
    def decode(cls, answer: Answer) -> Claim:
        """From an element of the property Claims."""
        return cls(**_scalars(cls, answer))


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
    busy: bool = False
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
            **_scalars(cls, answer),
            backup_disk_ids=_items(answer, "backup_disk_ids", int),
            disk_indexes=_items(answer, "disk_indexes", int),
            devices=_items(answer, "devices", str),
            volumes=tuple(map(Volume.decode, _dicts(answer, "volumes"))),
            claims=tuple(map(Claim.decode, _dicts(answer, "claims"))),
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
            **_scalars(cls, answer),
            xattrs=_items(answer, "xattrs", str),
            streams=_items(answer, "streams", str),
        )


@dataclass(frozen=True)
class Skipped:
    """An image that a scan left out; ``path`` is relative to the repository."""

    path: str = ""
    reason: str = ""

    @classmethod
    def decode(cls, answer: Answer) -> Skipped:
        """From an element of ``skipped``."""
        return cls(**_scalars(cls, answer))


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
        lists: dict[str, Any] = {key: _items(answer, key, str) for key in ("added", "updated", "gone", "kept")}
        return cls(**_scalars(cls, answer), **lists, skipped=tuple(map(Skipped.decode, _dicts(answer, "skipped"))))


def _typed(key: str, value: object, kind: type[Any]) -> Any:  # noqa: ANN401 - it is a ``kind``
    # bool is an int to Python, and two different types on the bus.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise errors.Failed(
            f"the restore service's answer has a wrong {key}; are its version and this one's the same?"
        )
    return value


def _scalars(cls: type[Any], answer: Answer) -> dict[str, Any]:
    """The text, number and truth fields of ``cls`` that ``answer`` has; the default tells the type."""
    kinds = {entry.name: type(entry.default) for entry in fields(cls) if entry.default is not MISSING}
    return {
        key: _typed(key, answer[key], kind)
        for key, kind in kinds.items()
        if kind in {str, int, bool} and key in answer
    }


def _items(answer: Answer, key: str, kind: type[Any]) -> tuple[Any, ...]:
    return tuple(_typed(key, item, kind) for item in _typed(key, answer.get(key, []), list))


def _dicts(answer: Answer, key: str) -> tuple[Answer, ...]:
    return _items(answer, key, dict)
