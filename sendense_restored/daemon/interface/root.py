"""``/com/sendense/Restore1``: what the service has and does, and the catalogue where that is its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from sendense_restored import __version__, errors
from sendense_restored.daemon import packing
from sendense_restored.daemon.exported import Exported, method, prop
from sendense_restored.daemon.store import MOST_PER_PAGE

from .common import BEHALF, BUS_NAME, ROOT_PATH, actor, check_behalf, path_of, polkit_details

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sendense_restored.daemon.bus import Call, Variant
    from sendense_restored.daemon.volume import Journal

    from .common import Parts


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
        limit = packing.limit(options, 100, MOST_PER_PAGE)
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
        limit = packing.limit(options, 100, MOST_PER_PAGE)
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
        options={"disk_index": "u", "all_disks": "b", "journal": "s", "idle_timeout": "t", "wait": "b", **BEHALF},
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
            wish, actor(call, options), idle_timeout=timeout, wait=options.get("wait", False)
        )
        return path_of(mount)

    @method("ListMounts", "a{sv}", "ao", action="read", arguments=("options",), results=("mounts",))
    async def list_mounts(self, call: Call, options: dict[str, Any]) -> list[str]:
        others = await self._parts.authority.allows(call, "read-others", {})
        return [path_of(mount) for mount in self._parts.mounts if others or call.uid in mount.lease.uids]

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
        limit = packing.limit(options, 100, MOST_PER_PAGE)
        await self._parts.events.flush()  # so that a caller finds what it did itself
        events, cursor = await self._parts.store.events(limit, options.get("cursor", ""), options.get("mount_id"))
        return [packing.event(event) for event in events], cursor

    @method("InUse", "a{sv}", "aa{sv}", action="list-backups", arguments=("options",), results=("files",))
    async def in_use(self, call: Call, options: dict[str, Any]) -> list[dict[str, Variant]]:
        return packing.in_use(self._parts.mounts)

    @method("CleanupNow", "a{sv}", "u", action="manage", arguments=("options",), results=("ended",))
    async def cleanup_now(self, call: Call, options: dict[str, Any]) -> int:
        ended = await self._parts.sweep.run()
        self._parts.events.record("managed", actor=actor(call, {}), detail=f"cleaned up, which ended {ended} mounts")
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
        self._parts.events.record("shell", actor=actor(call, {}), detail="began")
        status = await self._parts.machine.shell(terminal, term=options.get("term", ""))
        self._parts.events.record("shell", actor=actor(call, {}), detail=f"ended with {status}")
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
        self._parts.events.record("managed", actor=actor(call, {}), detail=what)


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
                details = polkit_details(await self._parts.store.backup(arguments["backup_id"]))
            except errors.BackupNotFound:
                # Who may not mount does not learn either which backups there are.
                details = {"backup_id": arguments["backup_id"]}
            except errors.CatalogUnavailable:
                # Nor what is wrong with the catalogue. Who may mount is told, and no more: rules that decide by the
                # machine's name have not been asked about it.
                await self._parts.authority.check(call, action, {"backup_id": arguments["backup_id"]})
                raise
            await check_behalf(self._parts.authority, call, arguments, details)
        await self._parts.authority.check(call, action, details)

    async def visible_to(self, call: Call) -> bool:
        """Everybody sees what the service is."""
        return True


class Root(ApplianceRoot, CatalogInterface):
    """``/com/sendense/Restore1`` where the catalogue is the embedded one."""
