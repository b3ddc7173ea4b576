"""What is there now, so that it can be compared with what was there before: nothing may be left.

``of_this_process`` is the caller's own: children and descriptors. ``of_the_machine`` is what the kernel keeps:
mounts of this namespace, loop devices of the whole machine, and files of the daemon's runtime directory. Loop
devices belong to nobody in particular, so only one laboratory counts them at a time (``alone_on_the_machine``).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import select
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

RUNTIME = Path("/run/sendense-restore")
_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
_NETLINK_KOBJECT_UEVENT = 15  # linux/netlink.h; group 1 is the kernel's own messages

Census = dict[str, str]
"""Identity of a thing -> the thing in words."""


def of_this_process() -> Census:
    """Children (zombies too) and open descriptors of this process."""
    found = children_of("self")
    for descriptor in tuple(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # the one that listed the directory
            target = descriptor.readlink()
            found[f"descriptor {descriptor.name} {target}"] = f"descriptor {descriptor.name} ({target})"
    return found


def of_the_machine() -> Census:
    """Mounts of this namespace, loop devices in use and files below ``RUNTIME``."""
    found = mounts_of("self")
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # detached meanwhile
            file = backing.read_text(encoding="utf-8").strip()
            found[f"loop {backing.parts[3]} {file}"] = f"loop device {backing.parts[3]} of {file}"
    for path in RUNTIME.rglob("*"):
        found[f"file {path}"] = f"file {path}"
    return found


def children_of(process: int | str) -> Census:
    """The children of a process (zombies too)."""
    found = {}
    for listing in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended meanwhile
            for pid in listing.read_text(encoding="ascii").split():
                found[f"process {pid}"] = f"process {pid} ({_command(pid)})"
    return found


def mounts_of(process: int | str) -> Census:
    """The mounts in the namespace of a process."""
    found = {}
    for line in Path(f"/proc/{process}/mountinfo").read_text(encoding="utf-8").split("\n")[:-1]:
        fields = line.split()
        found[f"mount {fields[0]}"] = f"mount of {fields[fields.index('-') + 1]} on {fields[4]}"
    return found


def left_by_this_process(before: Census) -> list[str]:
    """What this process has now and had not ``before``."""
    if left := added(before, of_this_process()):
        gc.collect()  # a cycle may hold a descriptor for a while; that is no leak
        left = added(before, of_this_process())
    return left


def left_on_the_machine(before: Census, seconds: float = 20.0) -> list[str]:
    """What ``of_the_machine`` finds now and did not find ``before``; see ``left_in_time``."""
    return left_in_time(before, of_the_machine, "self", seconds)


def left_in_time(
    before: Census, count: Callable[[], Census], process: int | str = "self", seconds: float = 20.0
) -> list[str]:
    """What ``count`` finds now and did not find ``before``.

    The kernel takes a loop device away a moment after its last user, and mounts a moment after the last process that
    saw them. That moment, at most ``seconds``, is waited for: each change of a block device or of the mounts of
    ``process`` is a reason to look again.
    """
    deadline = time.monotonic() + seconds
    with (
        Path(f"/proc/{process}/mountinfo").open(encoding="utf-8") as mounts,
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_KOBJECT_UEVENT) as uevents,
    ):
        uevents.bind((0, 1))
        events = select.poll()
        events.register(mounts, select.POLLPRI)
        events.register(uevents, select.POLLIN)
        while (left := added(before, count())) and (remaining := deadline - time.monotonic()) > 0:
            events.poll(remaining * 1000)
            with contextlib.suppress(BlockingIOError):
                while uevents.recv(65536):
                    pass
    return left


def adopt_orphans() -> None:
    """Have every descendant whose parent ends become a child of this process, so that it is counted as one."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


@contextlib.contextmanager
def alone_on_the_machine() -> Iterator[None]:
    """Keep every other laboratory of this machine, chroots included, waiting until this one is done.

    The lock is one on the device that hands out loop devices: there is one of it, and it leaves no file behind.
    """
    with Path("/dev/loop-control").open("rb") as control:
        try:
            fcntl.flock(control, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another run on this machine to end", file=sys.stderr, flush=True)
            fcntl.flock(control, fcntl.LOCK_EX)
        yield


def added(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is there ``now`` and was not ``before``, in words."""
    return sorted(words for identity, words in now.items() if identity not in before)


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except (FileNotFoundError, ProcessLookupError):
        return "ended"
