"""What the objects share: names and paths, who asks, what polkit is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sendense_restored import errors
from sendense_restored.daemon.events import Actor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sendense_restored.daemon.authority import Authority
    from sendense_restored.daemon.bus import Call
    from sendense_restored.daemon.catalog import Catalog
    from sendense_restored.daemon.events import Events
    from sendense_restored.daemon.mount import Mount
    from sendense_restored.daemon.mounts import Mounts
    from sendense_restored.daemon.store import Backup, Store
    from sendense_restored.daemon.sweep import Sweep
    from sendense_restored.daemon.volume import Machine

BUS_NAME = "com.sendense.Restore1"
ROOT_PATH = "/com/sendense/Restore1"
MOUNTS_PATH = f"{ROOT_PATH}/mounts/"

BEHALF = {"on_behalf_of": "s"}
"""The option of every method that a claim is asked for or spoken for in."""
_MOST_BEHALF = 255


class Parts(NamedTuple):
    """What the objects call."""

    authority: Authority
    store: Store
    catalog: Catalog
    mounts: Mounts
    sweep: Sweep
    events: Events
    machine: Machine


def actor(call: Call, options: Mapping[str, Any]) -> Actor:
    """Who asks, and for whom."""
    return Actor(call.uid, options.get("on_behalf_of", ""), call.unit)


async def check_behalf(
    authority: Authority, call: Call, arguments: Mapping[str, Any], details: Mapping[str, str]
) -> None:
    """Ask whether the caller may name somebody else, if it does."""
    if not (behalf := arguments["options"].get("on_behalf_of", "")):
        return
    if len(behalf) > _MOST_BEHALF:
        raise errors.InvalidOption(f"on_behalf_of is longer than {_MOST_BEHALF} characters")
    await authority.check(call, "act-on-behalf", {**details, "on_behalf_of": behalf})


def path_of(mount: Mount) -> str:
    """The path of a mount's object."""
    return MOUNTS_PATH + mount.id.replace("-", "_")


def polkit_details(backup: Backup) -> dict[str, str]:
    """What polkit rules may decide by."""
    return {"backup_id": backup.id, "vm_name": backup.vm_name, "repository_id": backup.repository_id}
