"""Typed asynchronous client of the service's D-Bus interface; the command line, the gateway and the tests use it.

``connection`` calls and gets replies, ``messages`` sets their time limits and judges their form, ``answers`` and
``decoding`` turn what comes back into Python values, ``listing`` reads streams, ``service`` and ``mounts`` have the
methods.
"""

from .answers import (
    Backup,
    Claim,
    Device,
    Disk,
    Entry,
    Event,
    FileInfo,
    Found,
    HeldFile,
    MountInfo,
    Problem,
    Repository,
    Resources,
    Scanned,
    Skipped,
    Summary,
    Vm,
    Volume,
)
from .listing import Listing
from .messages import BUS_NAME, ROOT, Timeouts
from .mounts import MOUNT, Filters, mount_id, mount_object
from .service import CATALOG, MANAGER, Client

__all__ = [
    "BUS_NAME",
    "CATALOG",
    "MANAGER",
    "MOUNT",
    "ROOT",
    "Backup",
    "Claim",
    "Client",
    "Device",
    "Disk",
    "Entry",
    "Event",
    "FileInfo",
    "Filters",
    "Found",
    "HeldFile",
    "Listing",
    "MountInfo",
    "Problem",
    "Repository",
    "Resources",
    "Scanned",
    "Skipped",
    "Summary",
    "Timeouts",
    "Vm",
    "Volume",
    "mount_id",
    "mount_object",
]
