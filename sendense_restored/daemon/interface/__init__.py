"""The D-Bus objects: unpack, ask for authorization, call, pack. No logic lives here.

    service.py   the tree of objects; it hears of mounts and publishes them
    root.py      the interfaces of the root object: Manager, and Catalog where the catalogue is ours
    mount.py     the interface of a mount's object
    common.py    what they share: paths, who asks, what polkit is told

``dbus/com.sendense.Restore1.xml`` is the manual of every member declared here; a test compares the two.
"""

from .common import BUS_NAME, ROOT_PATH, Parts
from .mount import MountObject
from .root import ApplianceRoot, Root
from .service import Service

__all__ = ["BUS_NAME", "ROOT_PATH", "ApplianceRoot", "MountObject", "Parts", "Root", "Service"]
