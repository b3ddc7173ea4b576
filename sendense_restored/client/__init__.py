"""Typed asynchronous client of the service's D-Bus interface; the command line, the gateway and the tests use it.

``connection`` calls and gets replies, ``answers`` turns what comes back into Python values, ``service`` has the
methods.
"""

from .answers import Backup, Claim, Disk, Entry, FileInfo, MountInfo, Scanned, Skipped, Volume
from .service import BUS_NAME, CATALOG, MANAGER, MOUNT, ROOT, Client, Timeouts, mount_id, mount_object

__all__ = [
    "BUS_NAME",
    "CATALOG",
    "MANAGER",
    "MOUNT",
    "ROOT",
    "Backup",
    "Claim",
    "Client",
    "Disk",
    "Entry",
    "FileInfo",
    "MountInfo",
    "Scanned",
    "Skipped",
    "Timeouts",
    "Volume",
    "mount_id",
    "mount_object",
]
