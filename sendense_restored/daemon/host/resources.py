"""What the daemon and its helpers use of this machine, and whether there is enough for one more mount.

A mount is refused before the machine runs out: the kernel would choose a process to kill, and it need not be ours.
Everything is read from those files of /proc and of the control groups that wait for nobody: sizes are resident pages
(VmRSS), because the share that is a process's own (PSS) is found out under the lock of its memory, which a server
whose storage does not answer may hold for ever.
"""

from __future__ import annotations

import os
import re
import resource
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sendense_restored import errors

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")

_MEMORY_OF_A_MOUNT = 64 << 20
"""A reader (16 MB), the daemon's own part, and what a reader may need for large directories."""
_MEMORY_OF_A_DISK = 96 << 20
"""An image server with its caches for a chain of ordinary depth, and what journal replay writes."""
_MEMORY_RESERVE = 128 << 20
"""For everybody else."""
_OVERLAY_OF_A_DISK = 64 << 20
"""What replay of an ordinary journal writes, on a disk."""
_OVERLAY_RESERVE = 128 << 20
"""For others whose files are on that disk."""
_FDS_OF_A_MOUNT = 32
"""The reader's socket and pipe, and those of tools that run for a moment."""
_FDS_OF_A_DISK = 32
"""Devices and roots of its volumes, pipes of their servers; the layers of its chain come on top."""
_FDS_RESERVE = 128
"""For the bus and its callers, and the database."""
_GONE = (FileNotFoundError, ProcessLookupError)


class Device(NamedTuple):
    """A block device of the pool."""

    path: str
    state: str
    """``free``; ``ours``; ``draining``: let go of, and held by somebody abroad; ``foreign``: others use it."""
    mount: str
    """The id of the mount that it is or was for; empty for none that is known."""


@dataclass(frozen=True)
class Resources:
    """What is used and what there is; sizes in bytes."""

    memory: int
    """Resident memory of the daemon and of all its children."""
    available_memory: int
    open_fds: int
    fds_limit: int
    overlay_used: int
    overlay_limit: int
    uids_free: int
    """For readers."""
    devices: tuple[Device, ...] = ()
    """NBD devices that the service may use; loop devices are in no pool."""


def check_room(mounts: int, disks: int, *, depth: int, uids_free: int, overlay_dir: Path | None = None) -> None:
    """Raises NoSpace or LimitReached if so many mounts, with so many disks in all, would use up what there is.

    They are those that have begun, whatever they have taken by now, and the one that is asked for. ``depth`` is the
    most layers that each disk may have. ``overlay_dir`` is on a disk of this machine, which is asked at once; one
    that is not there is left to whoever makes an overlay.
    """
    if not uids_free:
        raise errors.LimitReached("no uid is free for another reader; unmount something or widen readers.uids")
    needed = mounts * _MEMORY_OF_A_MOUNT + disks * _MEMORY_OF_A_DISK + _MEMORY_RESERVE
    if (available := available_memory()) < needed:
        raise errors.NoSpace(
            f"{available >> 20} MiB of memory are left to the service, and this and what has begun may need"
            f" {needed >> 20}; unmount something, or give it more"
        )
    free = _free_space(overlay_dir) if overlay_dir is not None else None
    if free is not None and free < (needed := disks * _OVERLAY_OF_A_DISK + _OVERLAY_RESERVE):
        raise errors.NoSpace(
            f"the disk for overlays has {free >> 20} MiB left, and this and what has begun may need {needed >> 20};"
            " unmount something, or make room there"
        )
    left = fds_limit() - open_fds() - _FDS_RESERVE
    if left < mounts * _FDS_OF_A_MOUNT + disks * (_FDS_OF_A_DISK + depth):
        raise errors.LimitReached("the service is short of file descriptors; unmount something, or raise its limit")


def _free_space(directory: Path) -> int | None:
    """Bytes that are left there to others than root, None if it is not there."""
    try:
        counts = os.statvfs(directory)
    except OSError:
        return None
    return counts.f_bavail * counts.f_frsize


def available_memory() -> int:
    """Bytes that can be had without swapping: of the machine, or of the daemon's control group if that has less."""
    machine = _field((_PROC / "meminfo").read_text(encoding="ascii"), "MemAvailable") << 10
    try:
        group = _left_in_group((_PROC / "self/cgroup").read_text(encoding="utf-8"), _CGROUPS)
    except FileNotFoundError:  # a kernel without control groups
        group = None
    return machine if group is None else min(machine, group)


def _field(text: str, name: str) -> int:
    """A number of a file in /proc, 0 if it is not there: a kernel thread has no memory."""
    found = re.search(rf"^{name}:[ \t]+([0-9]+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


def _left_in_group(cgroup: str, mounted: Path) -> int | None:
    """What a control group and those above it may still use (cgroup v2, memory.max); None without a limit."""
    found = re.search(r"^0::/(.*)$", cgroup, re.MULTILINE)
    # A group outside of our namespace of groups is called ``/..``: what is above it cannot be seen.
    if found is None or ".." in found[1].split("/"):
        return None
    group = mounted / found[1]
    left = None
    for directory in (group, *group.parents[: len(group.parts) - len(mounted.parts)]):
        try:
            most = (directory / "memory.max").read_text(encoding="ascii").strip()
            used = int((directory / "memory.current").read_text(encoding="ascii"))
            statistics = (directory / "memory.stat").read_text(encoding="ascii")
        except (OSError, ValueError):  # no such controller there, as in the uppermost group
            continue
        if most.isdigit():
            # What was read of the images counts as used, and goes when memory is needed; what is in a tmpfs does not.
            cache = re.findall(r"^(?:in)?active_file (\d+)$", statistics, re.MULTILINE)
            free = max(int(most) - used + sum(map(int, cache)), 0)
            left = free if left is None else min(left, free)
    return left


def open_fds() -> int:
    """Descriptors that this process has open."""
    return len(os.listdir(_PROC / "self/fd"))  # noqa: PTH208 - the names alone, and no path for each


def fds_limit() -> int:
    """How many it may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def memory(pid: int, proc: Path = _PROC) -> int:
    """Resident bytes of a process and of everything below it."""
    children: dict[int, list[int]] = defaultdict(list)
    resident: dict[int, int] = {}
    for directory in proc.iterdir():
        if not directory.name.isdigit():
            continue
        try:
            text = (directory / "status").read_text(encoding="utf-8", errors="replace")
        except _GONE:
            continue
        number = int(directory.name)
        children[_field(text, "PPid")].append(number)
        resident[number] = _field(text, "VmRSS") << 10
    total, waiting = 0, [pid]
    while waiting:
        number = waiting.pop()
        total += resident.pop(number, 0)
        waiting += children.pop(number, [])
    return total
