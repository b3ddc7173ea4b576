"""The D-Bus objects: unpack, ask for authorization, call, pack. No logic lives here, so it may be long.

``dbus/com.sendense.Restore1.xml`` is the manual of every member declared here; a test compares the two.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sendense_restored import __version__, errors, names

from . import packing
from .events import Actor
from .exported import Exported, Fd, method, prop
from .exports import Exports
from .host.volumes import VolumeState
from .ledger import filesystem_type

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .authority import Authority
    from .bus import Bus, Call, Reply, Rows, Variant
    from .catalog import Catalog
    from .events import Events
    from .mount import Mount
    from .mounts import Mounts
    from .store import Backup, Store
    from .sweep import Sweep
    from .volume import Journal, Machine

BUS_NAME = "com.sendense.Restore1"
ROOT_PATH = "/com/sendense/Restore1"
_MOUNTS_PATH = f"{ROOT_PATH}/mounts/"

_MOST_LISTED = 1000
_MOST_ENTRIES = 10_000

_MOST_BEHALF = 255
_BEHALF = {"on_behalf_of": "s"}
_WITHOUT_CLAIM = {"read": "read-others", "unmount": "unmount-others"}


class Parts(NamedTuple):
    """What the objects call."""

    authority: Authority
    store: Store
    catalog: Catalog
    mounts: Mounts
    sweep: Sweep
    events: Events
    machine: Machine


class Service:
    """The object tree; hears of mounts as ``mounts.Listener`` and publishes them."""

    def __init__(self) -> None:
        self._exports: Exports | None = None
        self._objects: dict[str, MountObject] = {}

    def open(self, bus: Bus, parts: Parts) -> None:
        """Publish the root object. Calls that came earlier were answered with Unavailable."""
        self._authority, self._mounts, self._events = parts.authority, parts.mounts, parts.events
        self._exports = Exports(bus, ROOT_PATH, unknown_object=self._unknown, refused=self._refused)
        self._root = Root(parts) if parts.store.embedded else ApplianceRoot(parts)
        self._exports.add(self._root)

    def reloaded(self) -> None:
        """The configuration may be another one."""
        assert self._exports is not None
        self._exports.changed(self._root, ["MaxMounts"])

    async def handle(self, call: Call) -> Reply:
        """Answer one method call."""
        if self._exports is None:
            raise errors.Unavailable("the service is starting; try again in a moment")
        return await self._exports.handle(call)

    async def _unknown(self, call: Call) -> errors.RestoreError | None:
        """What a call to an object that is not there is told."""
        if call.path.startswith(_MOUNTS_PATH):
            return self._mounts.ended.error(call.path.removeprefix(_MOUNTS_PATH).replace("_", "-"))
        return None

    def _refused(self, call: Call, action: str, message: str) -> None:
        self._events.refused(Actor(call.uid, unit=call.unit), action, call.path, message)

    def added(self, mount: Mount) -> None:
        """See ``mounts.Listener``."""
        assert self._exports is not None
        published = self._objects[mount.id] = MountObject(mount, self._mounts, self._authority)
        self._exports.add(published)

    def changed(self, mount: Mount) -> None:
        """See ``mounts.Listener``."""
        assert self._exports is not None
        if mount.id in self._objects:
            self._exports.changed(self._objects[mount.id], ["State", "ExpiresAt", "Busy"])

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
        limit = packing.limit(options, 100, _MOST_LISTED)
        filters = {key: options.get(key) for key in ("vm_name", "status", "repository_id")}
        backups, cursor = await self._parts.store.backups(**filters, limit=limit, cursor=options.get("cursor", ""))
        return [packing.backup(backup) for backup in backups], cursor

    @method(
        "ListVms",
        "a{sv}",
        "aa{sv}s",
        action="list-backups",
        arguments=("options",),
        results=("vms", "cursor"),
        options={"limit": "u", "cursor": "s"},
    )
    async def list_vms(self, call: Call, options: dict[str, Any]) -> tuple[list[dict[str, Variant]], str]:
        limit = packing.limit(options, 100, _MOST_LISTED)
        vms, cursor = await self._parts.store.vms(limit=limit, cursor=options.get("cursor", ""))
        return [packing.vm(vm) for vm in vms], cursor

    @method(
        "ListRepositories",
        "a{sv}",
        "aa{sv}",
        action="list-backups",
        arguments=("options",),
        results=("repositories",),
    )
    async def list_repositories(self, call: Call, options: dict[str, Any]) -> list[dict[str, Variant]]:
        return [packing.repository(each) for each in await self._parts.store.repositories()]

    @method(
        "Mount",
        "sa{sv}",
        "o",
        action="mount",
        arguments=("backup_id", "options"),
        results=("mount",),
        options={"disk_index": "u", "all_disks": "b", "journal": "s", "idle_timeout": "t", "wait": "b", **_BEHALF},
    )
    async def mount(self, call: Call, backup_id: str, options: dict[str, Any]) -> str:
        all_disks = options.get("all_disks", False)
        if all_disks and "disk_index" in options:
            raise errors.InvalidOption("give disk_index or all_disks, not both")
        journal = options.get("journal", "replay")
        if journal not in {"replay", "as-crashed"}:
            raise errors.InvalidOption("journal must be 'replay' or 'as-crashed'")
        timeout = packing.idle_timeout(options, self._parts.mounts.config.mounts.max_idle_timeout)
        wish = await self._parts.mounts.wish(
            backup_id,
            disk_index=options.get("disk_index", 0),
            all_disks=all_disks,
            journal=cast("Journal", journal),
        )
        mount = await self._parts.mounts.mount(
            wish, _actor(call, options), idle_timeout=timeout, wait=options.get("wait", False)
        )
        return _path_of(mount)

    @method("ListMounts", "a{sv}", "ao", action="read", arguments=("options",), results=("mounts",))
    async def list_mounts(self, call: Call, options: dict[str, Any]) -> list[str]:
        others = await self._parts.authority.allows(call, "read-others", {})
        return [_path_of(mount) for mount in self._parts.mounts if others or call.uid in mount.lease.uids]

    @method("GetResources", "a{sv}", "a{sv}", action="status", arguments=("options",), results=("resources",))
    async def get_resources(self, call: Call, options: dict[str, Any]) -> dict[str, Variant]:
        found = await self._parts.machine.resources()
        return packing.resources(self._parts.mounts, self._parts.sweep, found)

    @method(
        "ListEvents",
        "a{sv}",
        "aa{sv}s",
        action="manage",
        arguments=("options",),
        results=("events", "cursor"),
        options={"mount_id": "s", "limit": "u", "cursor": "s"},
    )
    async def list_events(self, call: Call, options: dict[str, Any]) -> tuple[list[dict[str, Variant]], str]:
        limit = packing.limit(options, 100, _MOST_LISTED)
        await self._parts.events.flush()  # so that a caller finds what it did itself
        events, cursor = await self._parts.store.events(limit, options.get("cursor", ""), options.get("mount_id"))
        return [packing.event(event) for event in events], cursor

    @method("InUse", "a{sv}", "aa{sv}", action="list-backups", arguments=("options",), results=("files",))
    async def in_use(self, call: Call, options: dict[str, Any]) -> list[dict[str, Variant]]:
        return packing.in_use(self._parts.mounts)

    @method("CleanupNow", "a{sv}", "u", action="manage", arguments=("options",), results=("ended",))
    async def cleanup_now(self, call: Call, options: dict[str, Any]) -> int:
        ended = await self._parts.sweep.run()
        self._parts.events.record("managed", actor=_actor(call, {}), detail=f"cleaned up, which ended {ended} mounts")
        return ended

    @method(
        "OpenShell",
        "ha{sv}",
        "u",
        action="shell",
        arguments=("terminal", "options"),
        results=("status",),
        options={"term": "s"},
    )
    async def open_shell(self, call: Call, terminal: int, options: dict[str, Any]) -> int:
        self._parts.events.record("shell", actor=_actor(call, {}), detail="began")
        status = await self._parts.machine.shell(terminal, term=options.get("term", ""))
        self._parts.events.record("shell", actor=_actor(call, {}), detail=f"ended with {status}")
        return status

    @prop("Version", "s", broadcast=True)
    def version(self) -> str:
        return __version__

    @prop("Backend", "s", broadcast=True)
    def backend(self) -> str:
        return self._parts.mounts.backend

    @prop("MaxMounts", "u", broadcast=True)
    def max_mounts(self) -> int:
        return self._parts.mounts.config.mounts.max

    @prop("ActiveMounts", "u")
    def active_mounts(self) -> int:
        return len(self._parts.mounts)


class CatalogInterface(Exported, interface=f"{BUS_NAME}.Catalog"):
    """The embedded catalogue; that of an appliance is not changed from here."""

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
        repository = await self._parts.catalog.add_repository(name, path)
        self._managed(call, f"added repository {repository.id} at {path}")
        return repository.id

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
        self._managed(call, f"removed repository {repository_id}")

    @method(
        "Scan",
        "sa{sv}",
        "a{sv}",
        action="manage",
        arguments=("repository_id", "options"),
        results=("result",),
    )
    async def scan(self, call: Call, repository_id: str, options: dict[str, Any]) -> dict[str, Variant]:
        found = await self._parts.catalog.scan(repository_id)
        self._managed(call, f"scanned repository {repository_id}")
        return packing.scanned(found)

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
        self._managed(call, f"added backup {recorded.id}")
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
        self._managed(call, f"removed backup {backup_id}")

    def _managed(self, call: Call, what: str) -> None:
        self._parts.events.record("managed", actor=_actor(call, {}), detail=what)


class ApplianceRoot(Manager):
    """``/com/sendense/Restore1`` where the catalogue is the appliance's."""

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
            await _check_behalf(self._parts.authority, call, arguments, details)
        await self._parts.authority.check(call, action, details)

    async def visible_to(self, call: Call) -> bool:
        """Everybody sees what the service is."""
        return True


class Root(ApplianceRoot, CatalogInterface):
    """``/com/sendense/Restore1`` where the catalogue is the embedded one."""


class MountObject(Exported, interface=f"{BUS_NAME}.Mount"):
    """``/com/sendense/Restore1/mounts/ID``."""

    def __init__(self, mount: Mount, mounts: Mounts, authority: Authority) -> None:
        super().__init__(_path_of(mount))
        self._mount, self._mounts, self._authority = mount, mounts, authority
        self._session = mount.session

    async def authorize(self, call: Call, action: str, arguments: Mapping[str, Any]) -> None:
        """Ask for ``action``, or for its stronger form if the caller holds no claim or uses force."""
        details = _details(self._session.wish.backup)
        await _check_behalf(self._authority, call, arguments, details)
        behalf = arguments["options"].get("on_behalf_of", "")
        if not (held := self._mount.lease.of(call.uid, behalf)) and behalf:
            # A name that was mistyped must not speak for everybody, as a caller without a claim may.
            raise errors.InvalidOption(
                "you hold no claim on behalf of that name; the property Claims has those there are"
            )
        if not held:
            action = _WITHOUT_CLAIM[action]
        if "path" in arguments:
            # One spelling for rules. What is no path is for the method to refuse, in its own way.
            with contextlib.suppress(errors.InvalidPath):
                details["path"] = names.format_path(names.parse_path(arguments["path"]))
        if arguments.get("options", {}).get("force"):
            action = "force-unmount"
        await self._authority.check(call, action, details)

    async def visible_to(self, call: Call) -> bool:
        """Those who hold a claim, and those who may read others' mounts, see its properties."""
        if call.uid in self._mount.lease.uids:
            return True
        return await self._authority.allows(call, "read-others", _details(self._session.wish.backup))

    @method(
        "ListFiles",
        "sa{sv}",
        "a(sstuxsa{sv})s",
        action="read",
        arguments=("path", "options"),
        results=("entries", "cursor"),
        options={"limit": "u", "cursor": "s", **_BEHALF},
    )
    async def list_files(self, call: Call, path: str, options: dict[str, Any]) -> tuple[Rows, str]:
        listing = await self._mount.list(
            _actor(call, options),
            names.parse_path(path),
            limit=packing.limit(options, 1000, _MOST_ENTRIES),
            cursor=options.get("cursor", ""),
        )
        return await packing.rows(listing.entries), listing.cursor

    @method(
        "OpenListing",
        "sa{sv}",
        "h",
        action="read",
        arguments=("path", "options"),
        results=("listing",),
        options={**packing.FILTERS, **_BEHALF},
    )
    async def open_listing(self, call: Call, path: str, options: dict[str, Any]) -> Fd:
        filters = packing.filters(options)
        return Fd(await self._mount.open_listing(_actor(call, options), names.parse_path(path), filters))

    @method(
        "ValidatePath",
        "sa{sv}",
        "s",
        action="read",
        arguments=("path", "options"),
        results=("canonical",),
        options=_BEHALF,
    )
    async def validate_path(self, call: Call, path: str, options: dict[str, Any]) -> str:
        parsed = names.parse_path(path)
        await self._mount.stat(_actor(call, options), parsed)
        return names.format_path(parsed)

    @method(
        "GetFileInfo",
        "sa{sv}",
        "a{sv}",
        action="read",
        arguments=("path", "options"),
        results=("info",),
        options=_BEHALF,
    )
    async def get_file_info(self, call: Call, path: str, options: dict[str, Any]) -> dict[str, Variant]:
        return packing.info(await self._mount.stat(_actor(call, options), names.parse_path(path)))

    @method(
        "OpenFile",
        "sa{sv}",
        "ha{sv}",
        action="read",
        arguments=("path", "options"),
        results=("file", "info"),
        options={"stream": "s", **_BEHALF},
    )
    async def open_file(self, call: Call, path: str, options: dict[str, Any]) -> tuple[Fd, dict[str, Variant]]:
        descriptor, info = await self._mount.open(_actor(call, options), path, stream=options.get("stream"))
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, descriptor)
            packed = packing.info(info)
            undo.pop_all()
        # From here on the descriptor is the bus's: sent, then closed.
        return Fd(descriptor), packed

    @method("KeepAlive", "a{sv}", "", action="read", arguments=("options",), options=_BEHALF)
    async def keep_alive(self, call: Call, options: dict[str, Any]) -> None:
        self._mount.touch(_actor(call, options))

    @method("Unmount", "a{sv}", "", action="unmount", arguments=("options",), options={"force": "b", **_BEHALF})
    async def unmount(self, call: Call, options: dict[str, Any]) -> None:
        await self._mounts.unmount(self._mount, _actor(call, options), force=options.get("force", False))

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
        return self._mount.devices

    @prop("FilesystemType", "s")
    def filesystem_type(self) -> str:
        return filesystem_type(self._session)

    @prop("Volumes", "aa{sv}")
    def volumes(self) -> list[dict[str, Variant]]:
        known = (volume for volume in self._session.volumes.values() if volume.state is not VolumeState.MOUNTABLE)
        return [packing.volume(volume) for volume in known]

    @prop("Claims", "aa{sv}")
    def claims(self) -> list[dict[str, Variant]]:
        return packing.claims(self._mount)

    @prop("OsInfo", "a{sv}")
    def os_info(self) -> dict[str, Variant]:
        return {}

    @prop("Journal", "s")
    def journal(self) -> str:
        return self._session.wish.journal

    @prop("CreatedAt", "x")
    def created_at(self) -> int:
        return self._session.created_at

    @prop("LastAccessedAt", "x")
    def last_accessed_at(self) -> int:
        return self._mount.last_accessed_at

    @prop("ExpiresAt", "x", broadcast=True)
    def expires_at(self) -> int:
        return self._mount.expires_at

    @prop("Busy", "b", broadcast=True)
    def busy(self) -> bool:
        return self._mount.busy

    @prop("BytesOut", "t")
    def bytes_out(self) -> int:
        return self._mount.bytes_out


def _actor(call: Call, options: Mapping[str, Any]) -> Actor:
    return Actor(call.uid, options.get("on_behalf_of", ""), call.unit)


async def _check_behalf(
    authority: Authority, call: Call, arguments: Mapping[str, Any], details: Mapping[str, str]
) -> None:
    """Ask whether the caller may name somebody else, if it does."""
    if not (behalf := arguments["options"].get("on_behalf_of", "")):
        return
    if len(behalf) > _MOST_BEHALF:
        raise errors.InvalidOption(f"on_behalf_of is longer than {_MOST_BEHALF} characters")
    await authority.check(call, "act-on-behalf", {**details, "on_behalf_of": behalf})


def _path_of(mount: Mount) -> str:
    return _MOUNTS_PATH + mount.id.replace("-", "_")


def _details(backup: Backup) -> dict[str, str]:
    """What polkit rules may decide by."""
    return {"backup_id": backup.id, "vm_name": backup.vm_name, "repository_id": backup.repository_id}
