"""A client in another language's manners: GDBus through GObject introspection, as a desktop program would do it.

Run by the distribution's Python, as ``gdbus_client.py ADDRESS``; prints what it saw as one JSON document.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from gi.repository import Gio, GLib

NAME, ROOT = "com.sendense.Restore1", "/com/sendense/Restore1"
MOUNT = f"{NAME}.Mount"


class Client:
    """A connection, and what it heard."""

    def __init__(self, address: str) -> None:
        flags = Gio.DBusConnectionFlags.AUTHENTICATION_CLIENT | Gio.DBusConnectionFlags.MESSAGE_BUS_CONNECTION
        self.bus = Gio.DBusConnection.new_for_address_sync(address, flags, None, None)
        self.manager = Gio.DBusObjectManagerClient.new_sync(
            self.bus, Gio.DBusObjectManagerClientFlags.DO_NOT_AUTO_START, NAME, ROOT, None, None, None
        )
        self.heard: list[list[Any]] = []
        self.manager.connect("object-added", lambda _, each: self.heard.append(["added", each.get_object_path()]))
        self.manager.connect("object-removed", lambda _, each: self.heard.append(["removed", each.get_object_path()]))
        self.manager.connect("interface-proxy-properties-changed", self._changed)

    def _changed(self, _manager: object, each: Any, _proxy: object, changed: Any, _gone: object) -> None:  # noqa: ANN401
        self.heard.append(["changed", each.get_object_path(), sorted(changed.unpack())])

    def call(self, path: str, interface: str, member: str, arguments: GLib.Variant, result: str) -> tuple[Any, Any]:
        """The values of an answer, and its descriptors."""
        kind = GLib.VariantType(result)
        answer, fds = self.bus.call_with_unix_fd_list_sync(
            NAME, path, interface, member, arguments, kind, Gio.DBusCallFlags.NONE, -1, None, None
        )
        return answer.unpack(), fds

    def settle(self) -> None:
        """Hear everything that was sent before an answer that comes now."""
        self.call(ROOT, "org.freedesktop.DBus.Peer", "Ping", None, "()")
        while GLib.MainContext.default().iteration(may_block=False):
            pass


def read(descriptor: int) -> str:
    """All of it."""
    with os.fdopen(descriptor, "rb") as file:
        return file.read().decode()


def main(address: str) -> dict[str, Any]:
    """A restore from beginning to end."""
    client = Client(address)
    said: dict[str, Any] = {}
    (path,), _ = client.call(ROOT, f"{NAME}.Manager", "Mount", GLib.Variant("(sa{sv})", ("b1", {})), "(o)")
    client.settle()
    proxy = client.manager.get_interface(path, MOUNT)
    said["state"] = proxy.get_cached_property("State").unpack()
    said["backup"] = proxy.get_cached_property("BackupId")
    (entries, cursor), _ = client.call(
        path, MOUNT, "ListFiles", GLib.Variant("(sa{sv})", ("/partition-1/etc", {})), "(a(sstuxsa{sv})s)"
    )
    said["entries"], said["cursor"] = [entry[:2] for entry in entries], cursor
    arguments = GLib.Variant("(sa{sv})", ("/partition-1/etc/hostname", {}))
    (index, info), fds = client.call(path, MOUNT, "OpenFile", arguments, "(ha{sv})")
    said["content"], said["size"] = read(fds.get(index)), info["size"]
    arguments = GLib.Variant("(sa{sv})", ("/", {"recursive": GLib.Variant("b", True)}))
    (index,), fds = client.call(path, MOUNT, "OpenListing", arguments, "(h)")
    said["listing"] = [json.loads(line) for line in read(fds.get(index)).splitlines()]
    try:
        client.call(path, MOUNT, "ListFiles", GLib.Variant("(sa{sv})", ("/nothing", {})), "(a(sstuxsa{sv})s)")
    except GLib.Error as error:
        said["error"] = Gio.DBusError.get_remote_error(error)
    client.call(path, MOUNT, "Unmount", GLib.Variant("(a{sv})", ({},)), "()")
    client.settle()
    said["path"], said["heard"] = path, client.heard
    return said


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1]), default=str))
