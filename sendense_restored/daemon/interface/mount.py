"""``/com/sendense/Restore1/mounts/ID``: one mount, as those see it who hold it."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from sendense_restored import errors, names
from sendense_restored.daemon import packing
from sendense_restored.daemon.exported import Exported, Fd, method, prop
from sendense_restored.daemon.host.volumes import VolumeState
from sendense_restored.daemon.ledger import filesystem_type

from .common import BEHALF, BUS_NAME, actor, check_behalf, path_of, polkit_details

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sendense_restored.daemon.authority import Authority
    from sendense_restored.daemon.bus import Call, Rows, Variant
    from sendense_restored.daemon.mount import Mount
    from sendense_restored.daemon.mounts import Mounts

_MOST_ENTRIES = 10_000
_WITHOUT_CLAIM = {"read": "read-others", "unmount": "unmount-others"}


class MountObject(Exported, interface=f"{BUS_NAME}.Mount"):
    """``/com/sendense/Restore1/mounts/ID``."""

    def __init__(self, mount: Mount, mounts: Mounts, authority: Authority) -> None:
        super().__init__(path_of(mount))
        self._mount, self._mounts, self._authority = mount, mounts, authority
        self._session = mount.session

    async def authorize(self, call: Call, action: str, arguments: Mapping[str, Any]) -> None:
        """Ask for ``action``, or for its stronger form if the caller holds no claim or uses force."""
        details = polkit_details(self._session.wish.backup)
        await check_behalf(self._authority, call, arguments, details)
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
        return await self._authority.allows(call, "read-others", polkit_details(self._session.wish.backup))

    @method(
        "ListFiles",
        "sa{sv}",
        "a(sstuxsa{sv})s",
        action="read",
        arguments=("path", "options"),
        results=("entries", "cursor"),
        options={"limit": "u", "cursor": "s", **BEHALF},
    )
    async def list_files(self, call: Call, path: str, options: dict[str, Any]) -> tuple[Rows, str]:
        listing = await self._mount.list(
            actor(call, options),
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
        options={**packing.FILTERS, **BEHALF},
    )
    async def open_listing(self, call: Call, path: str, options: dict[str, Any]) -> Fd:
        filters = packing.filters(options)
        return Fd(await self._mount.open_listing(actor(call, options), names.parse_path(path), filters))

    @method(
        "ValidatePath",
        "sa{sv}",
        "s",
        action="read",
        arguments=("path", "options"),
        results=("canonical",),
        options=BEHALF,
    )
    async def validate_path(self, call: Call, path: str, options: dict[str, Any]) -> str:
        parsed = names.parse_path(path)
        await self._mount.stat(actor(call, options), parsed)
        return names.format_path(parsed)

    @method(
        "GetFileInfo",
        "sa{sv}",
        "a{sv}",
        action="read",
        arguments=("path", "options"),
        results=("info",),
        options=BEHALF,
    )
    async def get_file_info(self, call: Call, path: str, options: dict[str, Any]) -> dict[str, Variant]:
        return packing.info(await self._mount.stat(actor(call, options), names.parse_path(path)))

    @method(
        "OpenFile",
        "sa{sv}",
        "ha{sv}",
        action="read",
        arguments=("path", "options"),
        results=("file", "info"),
        options={"stream": "s", **BEHALF},
    )
    async def open_file(self, call: Call, path: str, options: dict[str, Any]) -> tuple[Fd, dict[str, Variant]]:
        descriptor, info = await self._mount.open(actor(call, options), path, stream=options.get("stream"))
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, descriptor)
            packed = packing.info(info)
            undo.pop_all()
        # From here on the descriptor is the bus's: sent, then closed.
        return Fd(descriptor), packed

    @method("KeepAlive", "a{sv}", "", action="read", arguments=("options",), options=BEHALF)
    async def keep_alive(self, call: Call, options: dict[str, Any]) -> None:
        self._mount.touch(actor(call, options))

    @method("Unmount", "a{sv}", "", action="unmount", arguments=("options",), options={"force": "b", **BEHALF})
    async def unmount(self, call: Call, options: dict[str, Any]) -> None:
        await self._mounts.unmount(self._mount, actor(call, options), force=options.get("force", False))

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
