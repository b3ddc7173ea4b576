"""The D-Bus objects: unpack, ask for authorization, call, pack. No logic lives here.

``dbus/com.sendense.Restore1.xml`` is the manual of every member declared here; a test compares the two.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sendense_restored import __version__, errors, names

from . import packing
from .bus import Variant
from .exported import Exported, Fd, method, prop
from .exports import Exports
from .host.volumes import VolumeState
from .mounts import devices, filesystem_type

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .authority import Authority
    from .bus import Bus, Call, Reply
    from .catalog import Catalog
    from .mounts import Mount, Mounts
    from .store import Backup, Store
    from .volume import Journal

BUS_NAME = "com.sendense.Restore1"
ROOT_PATH = "/com/sendense/Restore1"
_MOUNTS_PATH = f"{ROOT_PATH}/mounts/"

_MOST_BACKUPS = 1000
_MOST_ENTRIES = 10_000

_WITHOUT_CLAIM = {"read": "read-others", "unmount": "unmount-others"}


class Parts(NamedTuple):
    """What the objects call."""

    authority: Authority
    store: Store
    catalog: Catalog
    mounts: Mounts
    max_mounts: int


class Service:
    """The object tree; hears of mounts as ``mounts.Listener`` and publishes them."""

    def __init__(self) -> None:
        self._exports: Exports | None = None
        self._objects: dict[str, MountObject] = {}

    def open(self, bus: Bus, parts: Parts) -> None:
        """Publish the root object. Calls that came earlier were answered with Unavailable."""
        self._authority, self._mounts = parts.authority, parts.mounts
        self._exports = Exports(bus, ROOT_PATH, unknown_object=self._unknown)
        self._exports.add(Root(parts))

    async def handle(self, call: Call) -> Reply:
        """Answer one method call."""
        if self._exports is None:
            raise errors.Unavailable("the service is starting; try again in a moment")
        return await self._exports.handle(call)

    async def _unknown(self, call: Call) -> errors.RestoreError | None:
        """What a call to an object that is not there is told."""
        if call.path.startswith(_MOUNTS_PATH):
            return errors.MountNotFound("there is no such mount; it may have ended")
        return None

    def added(self, mount: Mount) -> None:
        """See ``mounts.Listener``."""
        assert self._exports is not None
        published = self._objects[mount.id] = MountObject(mount, self._mounts, self._authority)
        self._exports.add(published)

    def changed(self, mount: Mount) -> None:
        """See ``mounts.Listener``."""
        assert self._exports is not None
        if mount.id in self._objects:
            self._exports.changed(self._objects[mount.id], ["State", "Busy"])

    def removed(self, mount: Mount) -> None:
        """See ``mounts.Listener``."""
        assert self._exports is not None
        if published := self._objects.pop(mount.id, None):
            self._exports.remove(published)


class Manager(Exported, interface=f"{BUS_NAME}.Manager"):
    """What the service has and does."""

    _parts: Parts

    @method(
        "ListBackups",
        "a{sv}",
        "aa{sv}s",
        action="list-backups",
        arguments=("options",),
        results=("backups", "cursor"),
        options={"vm_name": "s", "status": "s", "repository_id": "s", "limit": "u", "cursor": "s"},
    )
    async def list_backups(self, call: Call, options: dict[str, Any]) -> tuple[list[dict[str, Variant]], str]:
        limit = packing.limit(options, 100, _MOST_BACKUPS)
        filters = {key: options.get(key) for key in ("vm_name", "status", "repository_id")}
        backups, cursor = await self._parts.store.backups(**filters, limit=limit, cursor=options.get("cursor", ""))
        return [packing.backup(backup) for backup in backups], cursor

    @method(
        "Mount",
        "sa{sv}",
        "o",
        action="mount",
        arguments=("backup_id", "options"),
        results=("mount",),
        options={"disk_index": "u", "all_disks": "b", "journal": "s"},
    )
    async def mount(self, call: Call, backup_id: str, options: dict[str, Any]) -> str:
        all_disks = options.get("all_disks", False)
        if all_disks and "disk_index" in options:
            raise errors.InvalidOption("give disk_index or all_disks, not both")
        journal = options.get("journal", "replay")
        if journal not in {"replay", "as-crashed"}:
            raise errors.InvalidOption("journal must be 'replay' or 'as-crashed'")
        wish = await self._parts.mounts.wish(
            backup_id,
            disk_index=options.get("disk_index", 0),
            all_disks=all_disks,
            journal=cast("Journal", journal),
        )
        return _path_of(await self._parts.mounts.mount(wish, call.uid))

    @method("ListMounts", "a{sv}", "ao", action="read", arguments=("options",), results=("mounts",))
    async def list_mounts(self, call: Call, options: dict[str, Any]) -> list[str]:
        others = await self._parts.authority.allows(call, "read-others", {})
        return [_path_of(mount) for mount in self._parts.mounts if others or call.uid in mount.claims]

    @prop("Version", "s", broadcast=True)
    def version(self) -> str:
        return __version__

    @prop("Backend", "s", broadcast=True)
    def backend(self) -> str:
        return self._parts.mounts.backend

    @prop("MaxMounts", "u", broadcast=True)
    def max_mounts(self) -> int:
        return self._parts.max_mounts

    @prop("ActiveMounts", "u")
    def active_mounts(self) -> int:
        return len(self._parts.mounts)


class CatalogInterface(Exported, interface=f"{BUS_NAME}.Catalog"):
    """The embedded catalogue."""

    _parts: Parts

    @method(
        "AddRepository",
        "ssa{sv}",
        "s",
        action="manage",
        arguments=("name", "path", "options"),
        results=("repository_id",),
    )
    async def add_repository(self, call: Call, name: str, path: str, options: dict[str, Any]) -> str:
        return (await self._parts.catalog.add_repository(name, path)).id

    @method(
        "RemoveRepository",
        "sa{sv}",
        "",
        action="manage",
        arguments=("repository_id", "options"),
        results=(),
    )
    async def remove_repository(self, call: Call, repository_id: str, options: dict[str, Any]) -> None:
        await self._parts.store.remove_repository(repository_id)

    @method(
        "Scan",
        "sa{sv}",
        "a{sv}",
        action="manage",
        arguments=("repository_id", "options"),
        results=("result",),
    )
    async def scan(self, call: Call, repository_id: str, options: dict[str, Any]) -> dict[str, Variant]:
        return packing.scanned(await self._parts.catalog.scan(repository_id))

    @method(
        "AddBackup",
        "a{sv}a{sv}",
        "s",
        action="manage",
        arguments=("backup", "options"),
        results=("backup_id",),
    )
    async def add_backup(self, call: Call, backup: dict[str, Variant], options: dict[str, Any]) -> str:
        values = packing.new_backup(backup)
        created = values["created_at"]
        recorded = await self._parts.catalog.add_backup(
            values["repository_id"],
            values["vm_name"],
            values["disks"],
            parent_backup_id=values["parent_backup_id"],
            created_at=None if created is None else packing.time(created),
        )
        return recorded.id

    @method(
        "RemoveBackup",
        "sa{sv}",
        "",
        action="manage",
        arguments=("backup_id", "options"),
        results=(),
    )
    async def remove_backup(self, call: Call, backup_id: str, options: dict[str, Any]) -> None:
        await self._parts.store.remove_backup(backup_id)


class Root(Manager, CatalogInterface):
    """``/com/sendense/Restore1``."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(ROOT_PATH)
        self._parts = parts

    async def authorize(self, call: Call, action: str, arguments: Mapping[str, Any]) -> None:
        """Ask for ``action``; what is mounted is named in the details, so that rules can decide by it."""
        details = {}
        if action == "mount":
            try:
                details = _details(await self._parts.store.backup(arguments["backup_id"]))
            except errors.BackupNotFound:
                # Who may not mount does not learn either which backups there are.
                details = {"backup_id": arguments["backup_id"]}
        await self._parts.authority.check(call, action, details)

    async def visible_to(self, call: Call) -> bool:
        """Everybody sees what the service is."""
        return True


class MountObject(Exported, interface=f"{BUS_NAME}.Mount"):
    """``/com/sendense/Restore1/mounts/ID``."""

    def __init__(self, mount: Mount, mounts: Mounts, authority: Authority) -> None:
        super().__init__(_path_of(mount))
        self._mount, self._mounts, self._authority = mount, mounts, authority
        self._session = mount.session

    async def authorize(self, call: Call, action: str, arguments: Mapping[str, Any]) -> None:
        """Ask for ``action``, or for its stronger form if the caller holds no claim or uses force."""
        if call.uid not in self._mount.claims:
            action = _WITHOUT_CLAIM[action]
        details = _details(self._session.wish.backup)
        if "path" in arguments:
            details["path"] = names.format_path(names.parse_path(arguments["path"]))  # one spelling for rules
        if arguments.get("options", {}).get("force"):
            action = "force-unmount"
        await self._authority.check(call, action, details)

    async def visible_to(self, call: Call) -> bool:
        """Those who hold a claim, and those who may read others' mounts, see its properties."""
        if call.uid in self._mount.claims:
            return True
        return await self._authority.allows(call, "read-others", _details(self._session.wish.backup))

    @method(
        "ListFiles",
        "sa{sv}",
        "a(sstuxsa{sv})s",
        action="read",
        arguments=("path", "options"),
        results=("entries", "cursor"),
        options={"limit": "u", "cursor": "s"},
    )
    async def list_files(self, call: Call, path: str, options: dict[str, Any]) -> tuple[list[list[Any]], str]:
        listing = await self._session.list(
            names.parse_path(path),
            limit=packing.limit(options, 1000, _MOST_ENTRIES),
            cursor=options.get("cursor", ""),
        )
        return [packing.entry(entry) for entry in listing.entries], listing.cursor

    @method(
        "GetFileInfo",
        "sa{sv}",
        "a{sv}",
        action="read",
        arguments=("path", "options"),
        results=("info",),
    )
    async def get_file_info(self, call: Call, path: str, options: dict[str, Any]) -> dict[str, Variant]:
        return packing.info(await self._session.stat(names.parse_path(path)))

    @method(
        "OpenFile",
        "sa{sv}",
        "ha{sv}",
        action="read",
        arguments=("path", "options"),
        results=("file", "info"),
    )
    async def open_file(self, call: Call, path: str, options: dict[str, Any]) -> tuple[Fd, dict[str, Variant]]:
        descriptor, info = await self._session.open(names.parse_path(path))
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, descriptor)
            packed = packing.info(info)
            undo.pop_all()
        # From here on the descriptor is the bus's: sent, then closed.
        return Fd(descriptor), packed

    @method("Unmount", "a{sv}", "", action="unmount", arguments=("options",), options={"force": "b"})
    async def unmount(self, call: Call, options: dict[str, Any]) -> None:
        await self._mounts.unmount(self._mount, call.uid, force=options.get("force", False))

    @prop("Id", "s", broadcast=True)
    def id(self) -> str:
        return self._session.id

    @prop("BackupId", "s")
    def backup_id(self) -> str:
        return self._session.wish.backup.id

    @prop("BackupDiskIds", "ax")
    def backup_disk_ids(self) -> list[int]:
        return [disk.id for disk in self._session.wish.disks]

    @prop("VmName", "s")
    def vm_name(self) -> str:
        return self._session.wish.backup.vm_name

    @prop("DiskIndexes", "au")
    def disk_indexes(self) -> list[int]:
        return [disk.index for disk in self._session.wish.disks]

    @prop("State", "s", broadcast=True)
    def state(self) -> str:
        return str(self._session.state)

    @prop("Error", "s")
    def error(self) -> str:
        return self._session.error

    @prop("MountPath", "s")
    def mount_path(self) -> str:
        return str(self._session.path)

    @prop("Devices", "as")
    def devices(self) -> list[str]:
        return devices(self._session)

    @prop("FilesystemType", "s")
    def filesystem_type(self) -> str:
        return filesystem_type(self._session)

    @prop("Volumes", "aa{sv}")
    def volumes(self) -> list[dict[str, Variant]]:
        known = (volume for volume in self._session.volumes.values() if volume.state is not VolumeState.MOUNTABLE)
        return [packing.volume(volume) for volume in known]

    @prop("Claims", "aa{sv}")
    def claims(self) -> list[dict[str, Variant]]:
        return [{"uid": Variant("u", uid), "since": Variant("x", since)} for uid, since in self._mount.claims.items()]

    @prop("Journal", "s")
    def journal(self) -> str:
        return self._session.wish.journal

    @prop("CreatedAt", "x")
    def created_at(self) -> int:
        return self._session.created_at

    @prop("LastAccessedAt", "x")
    def last_accessed_at(self) -> int:
        return self._session.last_accessed_at

    @prop("Busy", "b", broadcast=True)
    def busy(self) -> bool:
        return self._session.busy


def _path_of(mount: Mount) -> str:
    return _MOUNTS_PATH + mount.id.replace("-", "_")


def _details(backup: Backup) -> dict[str, str]:
    """What polkit rules may decide by."""
    return {"backup_id": backup.id, "vm_name": backup.vm_name, "repository_id": backup.repository_id}
