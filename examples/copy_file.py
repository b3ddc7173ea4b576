#!/usr/bin/python3
"""Copies one file out of a backup as a desktop program would: with GDBus, and polkit asks for a password if it must.

    copy_file.py BACKUP /partition-1/etc/fstab fstab

Needs python3-gi and nothing of this project. The person is asked by the polkit agent of the desktop; on a terminal,
`pkttyagent --process PID` is one. Members of the group sendense-restore are not asked.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from gi.repository import Gio, GLib

SERVICE = "com.sendense.Restore1"
NO_TIME_LIMIT = GLib.MAXINT  # somebody may have to find a password first


def call(bus: Gio.DBusConnection, path: str, method: str, arguments: GLib.Variant, answer: str) -> tuple[Any, Any]:
    """Call a method, Manager.Mount for example; the values of its answer, and the descriptors that came with them."""
    interface, member = f"{SERVICE}.{method}".rsplit(".", 1)
    # Without this flag, polkit's answer to somebody who would have to authenticate is a no.
    flags = Gio.DBusCallFlags.ALLOW_INTERACTIVE_AUTHORIZATION
    kind = GLib.VariantType(answer)
    reply, descriptors = bus.call_with_unix_fd_list_sync(
        SERVICE, path, interface, member, arguments, kind, flags, NO_TIME_LIMIT, None, None
    )
    return reply.unpack(), descriptors


def copy(backup: str, guest_path: str, target: str) -> None:
    """Mount the backup, copy the file, unmount."""
    bus = Gio.bus_get_sync(Gio.BusType.SYSTEM)

    # Every method ends in a dictionary of options. This one ends the mount after a minute without use, so nothing
    # stays for long if this program is killed.
    options = {"idle_timeout": GLib.Variant("t", 60)}
    arguments = GLib.Variant("(sa{sv})", (backup, options))
    (mount,), _ = call(bus, "/com/sendense/Restore1", "Manager.Mount", arguments, "(o)")
    try:
        # The answer holds no content but an open file, which is read like any other and not over D-Bus: "h" is its
        # place among the message's descriptors. They are taken out of their list, which would keep it open as well.
        arguments = GLib.Variant("(sa{sv})", (guest_path, {}))
        (place, info), descriptors = call(bus, mount, "Mount.OpenFile", arguments, "(ha{sv})")
        with os.fdopen(descriptors.steal_fds()[place], "rb") as source, Path(target).open("xb") as file:
            shutil.copyfileobj(source, file)
        print(f"{target}: {info['size']} bytes")
    finally:
        # The file is closed by now. While it is open, Unmount answers Busy.
        call(bus, mount, "Mount.Unmount", GLib.Variant("(a{sv})", ({},)), "()")


def main() -> int:
    """The program."""
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        copy(*sys.argv[1:])
    except GLib.Error as error:
        name = Gio.DBusError.get_remote_error(error)  # for programs: com.sendense.Restore1.Error.NAME
        message = error.message.removeprefix(f"GDBus.Error:{name}: ")  # for people
        print(f"{message} ({name})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
