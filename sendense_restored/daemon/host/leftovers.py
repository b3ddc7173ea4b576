"""What an attempt to close a mount has left in our own directories, taken away when it can be.

Both directories are file systems of ours in a mount namespace of ours (``machine.enter_private_namespace``), so what
lies in them was made by this very process; where the mount table does not say so, nothing is touched. Nor is anything
but directories whose name is a mount's id, and of those only what is empty, or a tmpfs of a workplace that nothing is
mounted in any more. Nothing is looked at that somebody has mounted there: whose file system that is may not answer.

Overlays in ``attach.overlay_dir`` have lost their names as soon as they have one. The moment in between is the only
one in which a killed daemon can leave a file there, see ``workplace.remove_forgotten``.
"""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING, Final

from sendense_restored import linux

from . import mountinfo

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from .mountinfo import Mount

log = logging.getLogger(__name__)

SOURCE: Final = "sendense"
"""What the mount table says of a tmpfs of ours."""


def sweep(runtime: Path, mounts: Path, live: Collection[str]) -> list[str]:
    """Take away what belongs to no mount of ``live``; a sentence about each thing that was found."""
    said = []
    mounted = {mount.path: mount for mount in mountinfo.current()}  # of several on one place, the uppermost
    for parent, remove in ((mounts, _remove_directory), (runtime, _remove_workplace)):
        if not _is_ours(mounted.get(str(parent))):
            said.append(f"{parent} is not looked through: what is mounted there is not the service's own")
            continue
        for directory in sorted(parent.iterdir()):
            if not is_mount_id(directory.name) or directory.name in live or directory.is_symlink():
                continue
            try:
                remove(directory, mounted)
            except OSError as error:
                said.append(f"{directory} stays: {error.strerror}")
            except _InUseError as error:
                said.append(f"{directory} stays: {error}")
            else:
                said.append(f"removed {directory}, which belonged to no mount")
    return said


class _InUseError(Exception):
    """What is there must not be taken away."""


def _remove_directory(directory: Path, mounted: Mapping[str, Mount]) -> None:
    """Where the volumes of a mount are mounted: a directory for each, empty if nothing is."""
    inside = sorted(directory.iterdir())
    if held := [each.name for each in (directory, *inside) if str(each) in mounted]:
        raise _InUseError(f"{', '.join(held)} is still mounted")
    for each in (*inside, directory):
        each.rmdir()


def _remove_workplace(directory: Path, mounted: Mapping[str, Mount]) -> None:
    there = mounted.get(str(directory))
    if there is not None and not _is_ours(there):
        raise _InUseError("what is mounted there is not the service's own")
    if there is not None:
        linux.umount(directory)  # refuses if anything is mounted or open in it
    directory.rmdir()


def _is_ours(mount: Mount | None) -> bool:
    return mount is not None and (mount.filesystem, mount.source) == ("tmpfs", SOURCE)


def is_mount_id(name: str) -> bool:
    """Whether it is a UUID as mounts have them."""
    try:
        return str(uuid.UUID(name)) == name
    except ValueError:
        return False
