"""The values of the D-Bus interface: records into ``a{sv}`` and structs, and what comes in out of them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sendense_restored import config, errors
from sendense_restored.reader.protocol import Filters, check_filters

from .bus import Rows, Variant, variant
from .exported import unpack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sendense_restored.reader.protocol import Entry, FileInfo

    from .catalog import Scanned
    from .host.resources import Resources
    from .mount import Mount
    from .mounts import Mounts
    from .store import Backup, Event, Repository, Vm
    from .sweep import Sweep
    from .volume import SessionVolume


def limit(options: Mapping[str, Any], default: int, most: int) -> int:
    """The option ``limit``. Raises InvalidOption."""
    limit = int(options.get("limit", default))
    if not 1 <= limit <= most:
        raise errors.InvalidOption(f"limit must be from 1 to {most}")
    return limit


def idle_timeout(options: Mapping[str, Any], most: float) -> float | None:
    """The option ``idle_timeout`` in seconds, if it was given. Raises InvalidOption."""
    seconds: int | None = options.get("idle_timeout")
    if seconds is not None and not config.SHORTEST_IDLE_TIMEOUT <= seconds <= most:
        raise errors.InvalidOption(f"idle_timeout must be from {config.SHORTEST_IDLE_TIMEOUT:g} to {most:g} seconds")
    return seconds


FILTERS = {
    "recursive": "b",
    "max_depth": "u",
    "name": "s",
    "kind": "s",
    "min_size": "t",
    "max_size": "t",
    "newer": "x",
    "older": "x",
    "limit": "t",
}


def filters(options: Mapping[str, Any]) -> Filters:
    """The options of OpenListing. Raises InvalidOption."""
    filters = Filters(**{name: options[name] for name in FILTERS if name in options})
    check_filters(filters)
    return filters


def _pack(signatures: Mapping[str, str], values: Sequence[Any]) -> dict[str, Variant]:
    """An ``a{sv}`` of ``values`` under the keys and signatures given in the same order; None is left out."""
    return {
        key: variant(signature, value)
        for (key, signature), value in zip(signatures.items(), values, strict=True)
        if value is not None
    }


_BACKUP = {
    "backup_id": "s",
    "vm_name": "s",
    "repository_id": "s",
    "backup_type": "s",
    "status": "s",
    "parent_backup_id": "s",
    "total_bytes": "t",
    "bytes_transferred": "t",
    "created_at": "x",
    "started_at": "x",
    "completed_at": "x",
    "disks_count": "u",
    "disks": "aa{sv}",
}
_DISK = {"index": "u", "size": "t", "backup_disk_id": "x"}
_NEW_BACKUP = {
    "repository_id": "s",
    "vm_name": "s",
    "disks": "as",
    "parent_backup_id": "s",
    "created_at": "x",
}
_SCANNED = {"added": "as", "updated": "as", "gone": "as", "kept": "as", "unchanged": "u", "skipped": "aa{sv}"}
_VOLUME = {
    "name": "s",
    "device": "s",
    "filesystem": "s",
    "driver": "s",
    "label": "s",
    "uuid": "s",
    "size": "t",
    "used": "t",
    "state": "s",
    "reason": "s",
    "view": "s",
    "display_name": "s",
}
_INFO = {
    "kind": "s",
    "size": "t",
    "allocated": "t",
    "mode": "u",
    "uid": "u",
    "gid": "u",
    "atime_ns": "x",
    "mtime_ns": "x",
    "ctime_ns": "x",
    "nlink": "u",
    "target": "s",
    "xattrs": "as",
    "streams": "as",
    "unreadable": "s",
    "time_clamped": "b",
}
_VM = {"context_id": "s", "vm_name": "s", "repository_id": "s", "backups": "u", "newest": "x"}
_REPOSITORY = {
    "repository_id": "s",
    "name": "s",
    "type": "s",
    "path": "s",
    "enabled": "b",
    "immutable": "b",
}
_EVENT = {
    "id": "x",
    "at": "x",
    "what": "s",
    "outcome": "s",
    "uid": "u",
    "unit": "s",
    "on_behalf_of": "s",
    "mount_id": "s",
    "backup_id": "s",
    "path": "s",
    "detail": "s",
    "bytes": "t",
    "size": "t",
}
_RESOURCES = {
    "active_mounts": "u",
    "max_mounts": "u",
    "available_slots": "u",
    "devices": "aa{sv}",
    "overlay_used": "t",
    "overlay_limit": "t",
    "memory": "t",
    "open_fds": "u",
    "sweep_interval": "t",
    "next_sweep": "x",
    "idle_timeout": "t",
    "expired_mounts": "u",
    "queued": "u",
    "backend": "s",
}
_DEVICE = {"path": "s", "state": "s", "mount": "s"}
_CLAIM = {"uid": "u", "on_behalf_of": "s", "since": "x", "expires": "x"}
_ROWS_AT_ONCE = 500
_EXTRAS = {"unreadable": "s", "display_name": "s", "nlink": "u", "time_clamped": "b"}


def backup(backup: Backup) -> dict[str, Variant]:
    """As ListBackups has it."""
    times = (
        int(time.timestamp()) if time else None
        for time in (backup.created_at, backup.started_at, backup.completed_at)
    )
    disks = [_pack(_DISK, (disk.index, disk.size, disk.id)) for disk in backup.disks]
    return _pack(
        _BACKUP,
        (
            *(backup.id, backup.vm_name, backup.repository_id, backup.backup_type, backup.status),
            *(backup.parent_backup_id, backup.total_bytes, backup.bytes_transferred, *times, len(disks), disks),
        ),
    )


def time(seconds: int) -> datetime:
    """Unix seconds as a time. Raises InvalidOption."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        raise errors.InvalidOption("created_at is no time between the years 1 and 9999") from None


def vm(vm: Vm) -> dict[str, Variant]:
    """As ListVms has it."""
    newest = None if vm.newest is None else int(vm.newest.timestamp())
    return _pack(_VM, (vm.context_id, vm.vm_name, vm.repository_id, vm.backups, newest))


def repository(repository: Repository) -> dict[str, Variant]:
    """As ListRepositories has it."""
    return _pack(
        _REPOSITORY,
        (
            *(repository.id, repository.name, repository.type, str(repository.root)),
            *(repository.enabled, repository.immutable),
        ),
    )


def event(event: Event) -> dict[str, Variant]:
    """As ListEvents has it."""
    return _pack(
        _EVENT,
        (
            *(event.id, int(event.at.timestamp() * 1_000_000), event.what, event.outcome, event.uid, event.unit),
            *(event.on_behalf_of, event.mount_id, event.backup_id, event.path, event.detail),
            *(event.bytes, event.size),
        ),
    )


def claims(mount: Mount) -> list[dict[str, Variant]]:
    """As the property Claims has it."""
    return [
        _pack(_CLAIM, (*holder, claim.since, mount.unix(mount.lease.expiry(claim))))
        for holder, claim in mount.lease.claims.items()
    ]


def in_use(mounts: Mounts) -> list[dict[str, Variant]]:
    """As InUse has it."""
    signatures = {"repository": "s", "file": "s", "mount": "s"}
    return [
        _pack(signatures, (mount.session.wish.repository.id, file, mount.id))
        for mount in mounts
        for file in mount.session.in_use()
    ]


def resources(mounts: Mounts, sweep: Sweep, found: Resources) -> dict[str, Variant]:
    """As GetResources has it."""
    settings = mounts.config.mounts
    # Partitions of a device of the pool are told with that device.
    loops = [(device, "ours", mount.id) for mount in mounts for device in mount.devices]
    loops += [
        (str(device.path), "draining", each.mount_id) for each in mounts.places.draining for device in each.devices
    ]
    devices = [*found.devices, *(loop for loop in loops if not loop[0].startswith("/dev/nbd"))]
    taken = mounts.places.taken
    return _pack(
        _RESOURCES,
        (
            *(
                len(mounts),
                settings.max,
                max(settings.max - taken, 0),
                [_pack(_DEVICE, device) for device in devices],
            ),
            *(found.overlay_used, found.overlay_limit, found.memory, found.open_fds),
            *(int(settings.sweep_interval), sweep.next, int(settings.idle_timeout)),
            *(sum(mount.lease.overdue for mount in mounts), mounts.places.queued, mounts.backend),
        ),
    )


def scanned(scanned: Scanned) -> dict[str, Variant]:
    """As Scan answers it."""
    result = scanned.result
    skipped = [_pack({"path": "s", "reason": "s"}, (problem.path, problem.reason)) for problem in scanned.problems]
    changed = (list(result.added), list(result.updated), list(result.gone), list(result.kept))
    return _pack(_SCANNED, (*changed, result.unchanged, skipped))


def volume(volume: SessionVolume) -> dict[str, Variant]:
    """As the property Volumes has it."""
    found, mounted = volume.found, volume.mounted
    return _pack(
        _VOLUME,
        (
            *(found.name, str(volume.device.path) if volume.device else "", found.filesystem),
            *(mounted.driver if mounted else "", found.label, found.uuid, found.size),
            *(volume.usage.used if volume.usage else 0, str(volume.state), volume.reason),
            *(mounted.view if mounted else "", volume.display_name),
        ),
    )


async def rows(entries: Sequence[Entry]) -> Rows:
    """As ListFiles has them. The event loop goes round in between: a long page must not hold it."""
    packed = Rows()
    for start in range(0, len(entries), _ROWS_AT_ONCE):
        packed.add([_row(entry) for entry in entries[start : start + _ROWS_AT_ONCE]])
        await asyncio.sleep(0)
    return packed


def _row(entry: Entry) -> list[Any]:
    extras = {key: variant(_EXTRAS[key], value) for key, value in entry.extras.items()}
    return [entry.name, entry.kind, entry.size, entry.mode, entry.mtime_ns, entry.target, extras]


def info(info: FileInfo) -> dict[str, Variant]:
    """As GetFileInfo has it."""
    return _pack(_INFO, info)


def new_backup(given: Mapping[str, Variant]) -> dict[str, Any]:
    """The plain values of what AddBackup takes, all keys present. Raises InvalidOption."""
    values = unpack(given, _NEW_BACKUP, "part of a backup")
    if missing := [key for key in ("repository_id", "vm_name", "disks") if key not in values]:
        raise errors.InvalidOption(f"the backup needs {', '.join(missing)}")
    return dict.fromkeys(_NEW_BACKUP) | values
