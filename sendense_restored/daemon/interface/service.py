"""The tree of objects: the root from the start on, and one for each mount."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sendense_restored import errors
from sendense_restored.daemon.events import Actor
from sendense_restored.daemon.exports import Exports

from .common import MOUNTS_PATH, ROOT_PATH
from .mount import MountObject
from .root import ApplianceRoot, Root

if TYPE_CHECKING:
    from sendense_restored.daemon.bus import Bus, Call, Reply
    from sendense_restored.daemon.mount import Mount

    from .common import Parts


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
        if call.path.startswith(MOUNTS_PATH):
            return self._mounts.ended.error(call.path.removeprefix(MOUNTS_PATH).replace("_", "-"))
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
