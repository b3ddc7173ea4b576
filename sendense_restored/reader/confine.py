"""How a reader gives up everything but the one right that it needs.

``STEPS`` is the whole of it, in order. A reader starts as root with the few capabilities that the steps use. After
the last one it is a uid of its own, without network, whose root is the directory below which the daemon mounts the
volumes of this one mount; it can read any file there (CAP_DAC_READ_SEARCH) and reach nothing else. Everything that
the process will ever need must be imported before: afterwards there is no file to import from.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import TYPE_CHECKING, NamedTuple

from sendense_restored import linux

from . import protocol, syscalls

if TYPE_CHECKING:
    from collections.abc import Callable

_MOST_THREADS = protocol.MAX_STREAMS + 32  # those that serve requests, and those that are just ending
_CLIMB = "../" * 1024


class Cell(NamedTuple):
    """What the confinement of one reader is made of."""

    uid: int
    parent: int
    """Process id of the daemon."""
    directory: str
    """Any directory but ``/``: an empty file system is mounted over it, where only this process can see it."""
    root: int
    """An O_PATH descriptor of the directory that becomes the root, of the daemon's own mount namespace."""
    socket: int
    """The descriptor that stays open, beside stderr."""


def leave_namespaces(_cell: Cell) -> None:
    """Mounts, network, System V objects and the host's name of its own."""
    linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)


def leave_root_user(cell: Cell) -> None:
    """Another uid and no way back; what the next steps need stays until ``drop_capabilities``."""
    needed = (linux.CAP_SYS_ADMIN, linux.CAP_SYS_CHROOT, linux.CAP_DAC_READ_SEARCH)
    linux.become(cell.uid, cell.uid, capabilities=sum(1 << capability for capability in needed))


def leave_host_mounts(cell: Cell) -> None:
    """Make an empty, read-only file system the root of this namespace, and detach all others from it.

    mount(2) and pivot_root(2) answer EINVAL where ``/`` is no mount point, as in a plain chroot. So the process first
    climbs to the namespace's own root: with its root moved to a directory below, nothing stops ``..`` on the way up.
    From there one detach takes every mount along, and none is kept busy by a copy in here.
    """
    above, name = os.path.split(cell.directory)
    place = os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.chdir("/")
    os.chroot(cell.directory)
    os.chdir(_CLIMB)
    os.chroot(".")
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    os.fchdir(place)
    flags = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    linux.mount("empty", name, "tmpfs", flags, "size=4k,nr_inodes=2,mode=0555,uid=0,gid=0")
    os.chdir(name)
    linux.pivot_root(".", ".")  # the old root now lies over the new one (pivot_root(2))
    linux.umount(".", linux.MNT_DETACH)
    os.chdir("/")


def enter_mount_directory(cell: Cell) -> None:
    """Make the mount's own directory the root of this process.

    An empty root alone would not hold: a volume's root is a directory, and ``..`` leads from it to where it is
    mounted and on up, through the daemon's namespace, to /etc/shadow. It ends at the root of the process, wherever
    that is. In this one there is nothing but the volumes.
    """
    os.fchdir(cell.root)
    os.chroot(".")
    os.chdir("/")


def drop_capabilities(_cell: Cell) -> None:
    """Keep the right to read; a capability that is not permitted here cannot come back."""
    linux.set_capabilities(1 << linux.CAP_DAC_READ_SEARCH)


def die_with_parent(cell: Cell) -> None:
    """Set the death signal again, which the change of uid has cleared, unless the daemon is dead already."""
    linux.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != cell.parent:
        sys.exit("the daemon has ended")


def limit_resources(_cell: Cell) -> None:
    """No files written, no core, few threads; memory, descriptors and the rest came with the process's jail."""
    for limit, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NPROC, _MOST_THREADS),
    ):
        resource.setrlimit(limit, (most, most))


def hide_from_peers(_cell: Cell) -> None:
    """No gain by exec, no ptrace and no look into /proc by others of this uid, should there ever be one."""
    linux.set_no_new_privileges()
    linux.set_undumpable()


def close_descriptors(cell: Cell) -> None:
    """Keep the socket and stderr, which the daemon reads into its journal."""
    sys.stdin = sys.stdout = None
    kept = sorted({sys.stderr.fileno(), cell.socket})
    low = 0
    for descriptor in kept:
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def filter_system_calls(_cell: Cell) -> None:
    """From here on only the calls of ``syscalls``, for this thread and all that it starts."""
    syscalls.make_filter().load()


STEPS: tuple[Callable[[Cell], None], ...] = (
    leave_namespaces,
    leave_root_user,
    leave_host_mounts,
    enter_mount_directory,
    drop_capabilities,
    die_with_parent,
    limit_resources,
    hide_from_peers,
    close_descriptors,
    filter_system_calls,
)


def confine(cell: Cell) -> None:
    """Take all steps. Call it before any thread starts: namespaces, capabilities and filter are a thread's own."""
    for step in STEPS:
        step(cell)
