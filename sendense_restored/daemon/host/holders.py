"""Who outside has files of a mount open: what the kernel tells in /proc, and nobody else could.

A descriptor of a file in one of our mounts bears that mount's id (``mnt_id`` in /proc/PID/fdinfo,
proc_pid_fdinfo(5)), and as the mounts are in no other namespace, nobody else's file does. Working directories are
known by their paths, of processes in our mount namespace: nobody else can have one there. Processes come and go while
one looks; what has gone is left out.

Nothing here asks a file system or takes the lock of a process's memory: both can be held for ever by storage that
does not answer, and so would be whoever looks. That is why a file that is only mapped into memory, its descriptor
closed, is not found: /proc/PID/maps waits for that lock. Nor is a descriptor that lies in a socket, sent and not
received yet. This reads all of /proc, so it is for a thread, and not for every request. To look at other users'
processes takes CAP_SYS_PTRACE.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import mountinfo

if TYPE_CHECKING:
    from collections.abc import Collection

log = logging.getLogger(__name__)

_PROC = Path("/proc")
_MOST_INFO = 4096
_GONE = (FileNotFoundError, ProcessLookupError)


@dataclass(frozen=True)
class Holding:
    """A process that has files of a mount open; ``comm`` is what it calls itself, and not to be trusted."""

    pid: int
    uid: int
    comm: str
    count: int
    """How many descriptors, and one more for a working directory or a root."""


def holders(
    mount_ids: Collection[int], *, exclude: Collection[int], proc: Path = _PROC, seconds: float = 1.0
) -> list[Holding]:
    """The processes other than ``exclude`` that have files of these mounts open, those with the most first.

    Not all of them if it takes more than so many ``seconds``: what a descriptor's text costs is up to who opened it.
    """
    until = time.monotonic() + seconds
    wanted = frozenset(b"%d" % number for number in mount_ids)
    if not wanted:
        return []
    points = tuple(mount.path for mount in mountinfo.current() if mount.id in mount_ids)
    namespace = os.readlink(f"{proc}/self/ns/mnt")  # noqa: PTH115 - it is text, and no path
    found = []
    denied = 0
    for name in os.listdir(proc):  # noqa: PTH208 - thousands of names; a path for each would cost as much as the rest
        if time.monotonic() >= until:
            log.warning("there was no time to ask all processes what they have open")
            break
        if not name.isdigit() or int(name) in exclude:
            continue
        try:
            count = _descriptors(f"{proc}/{name}", wanted, until)
            if os.readlink(f"{proc}/{name}/ns/mnt") == namespace:  # noqa: PTH115
                count += _directories(f"{proc}/{name}", points)
            if count:
                found.append(_describe(proc / name, count))
        except _GONE:
            continue
        except PermissionError:
            denied += 1
    if denied:
        # Some belong to nobody that we know, in a container; without CAP_SYS_PTRACE it is all other users'.
        log.info("not asked what they have open, as the kernel does not let us: %d processes", denied)
    return sorted(found, key=lambda holding: (-holding.count, holding.pid))


def _descriptors(process: str, wanted: frozenset[bytes], until: float) -> int:
    """How many descriptors of these mounts a process has, as far as time allows."""
    infos = os.open(f"{process}/fdinfo", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        numbers = itertools.takewhile(lambda _: time.monotonic() < until, os.listdir(infos))  # noqa: PTH208
        return sum(_mount_of(infos, number) in wanted for number in numbers)
    finally:
        os.close(infos)


def _directories(process: str, points: tuple[str, ...]) -> int:
    """How many of its working directory and its root are at or below these mount points."""
    links = [os.readlink(f"{process}/{kind}") for kind in ("cwd", "root")]  # noqa: PTH115
    return sum(link == point or link.startswith(f"{point}/") for link in links for point in points)


def _mount_of(infos: int, number: str) -> bytes:
    """The id of the mount that a descriptor's file is in; empty if it has been closed meanwhile."""
    try:
        descriptor = os.open(number, os.O_RDONLY | os.O_CLOEXEC, dir_fd=infos)
    except _GONE:
        return b""
    try:
        text = os.read(descriptor, _MOST_INFO)
    except _GONE:
        return b""
    finally:
        os.close(descriptor)
    _, _, rest = text.partition(b"\nmnt_id:\t")
    return rest.partition(b"\n")[0]


def _describe(process: Path, count: int) -> Holding:
    # Not the owner of its directory: that is root for whoever is not dumpable.
    status = (process / "status").read_bytes().decode("utf-8", "backslashreplace")
    fields = dict(line.partition(":\t")[::2] for line in status.split("\n"))
    uid = int(fields["Uid"].split("\t")[0])
    comm = (process / "comm").read_bytes().removesuffix(b"\n").decode("utf-8", "backslashreplace")
    return Holding(int(process.name), uid, comm, count)
