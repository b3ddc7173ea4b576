"""System calls that Python lacks: calls and their constants, no policy.

Every function raises OSError with the kernel's errno. Numbers are from the kernel's uapi headers and are the same
on all architectures unless said otherwise. A reader imports this at its start, which has to be quick: no pathlib.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct

_libc = ctypes.CDLL(None, use_errno=True)

# openat2(2)
_SYS_OPENAT2 = 437
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

# unshare(2)
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWNET = 0x40000000

# mount(2), umount2(2)
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MNT_DETACH = 0x2

# prctl(2)
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

# capabilities(7)
CAP_DAC_READ_SEARCH = 2
CAP_SYS_CHROOT = 18
CAP_SYS_ADMIN = 21
_LINUX_CAPABILITY_VERSION_3 = 0x20080522

# timerfd_create(2); TFD_NONBLOCK and TFD_CLOEXEC are the O_ flags
_TFD_TIMER_ABSTIME = 1

# statx(2)
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_TYPE = 0x1
_STATX_SIZE = 256
_STATX_MODE = 28
"""Offset of ``stx_mode``."""

# pivot_root(2) has no wrapper in the C library and its number differs between architectures.
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}


def _check(result: int, path: str | bytes | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def openat2(directory: int, path: bytes, flags: int, *, resolve: int, mode: int = 0) -> int:
    """Open ``path`` relative to the descriptor ``directory`` under the ``RESOLVE_*`` rules; returns a descriptor.

    The descriptor is close-on-exec. EAGAIN (a rename raced with ``..``, openat2(2)) is retried a few times.
    """
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    for _ in range(4):
        try:
            return _check(_libc.syscall(_SYS_OPENAT2, directory, ctypes.c_char_p(path), how, len(how)))
        except OSError as error:
            if error.errno not in {errno.EAGAIN, errno.EINTR}:
                raise
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)


def unshare(flags: int) -> None:
    """Leave the namespaces named by ``CLONE_NEW*`` flags; for the calling thread, so call it before any starts."""
    _check(_libc.unshare(flags))


def mount(
    source: str, target: os.PathLike[str] | str, fstype: str | None, flags: int = 0, data: str | None = None
) -> None:
    """Attach a file system; the arguments are those of the system call."""
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            fstype.encode() if fstype else None,
            ctypes.c_ulong(flags),
            data.encode() if data else None,
        ),
        os.fspath(target),
    )


def umount(target: os.PathLike[str] | str, flags: int = 0) -> None:
    """Detach a file system, as umount2(2) has it."""
    _check(_libc.umount2(os.fsencode(target), flags), os.fspath(target))


def pivot_root(new_root: str, put_old: str) -> None:
    """Make ``new_root`` the root and move the old one to ``put_old``."""
    number = _SYS_PIVOT_ROOT[os.uname().machine]
    _check(_libc.syscall(number, os.fsencode(new_root), os.fsencode(put_old)), new_root)


def mount_id(descriptor: int) -> int:
    """The id of the mount that an open descriptor belongs to (proc_pid_fdinfo(5))."""
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as lines:  # noqa: PTH123
        for line in lines:
            if line.startswith("mnt_id:"):
                return int(line.split()[1])
    raise OSError(errno.EBADF, "no mnt_id in fdinfo")


def _prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    _check(_libc.prctl(option, *padded))


def set_parent_death_signal(signal: int) -> None:
    """The signal this process gets when the thread that started it ends; cleared by a change of uid."""
    _prctl(_PR_SET_PDEATHSIG, signal)


def set_undumpable() -> None:
    """No core dump, no ptrace, and ``/proc/self`` belongs to root (PR_SET_DUMPABLE)."""
    _prctl(_PR_SET_DUMPABLE, 0)


def set_no_new_privileges() -> None:
    """An execve can grant nothing from here on (PR_SET_NO_NEW_PRIVS)."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def set_capabilities(mask: int) -> None:
    """Make ``mask`` the permitted and effective capabilities of the calling thread, and nothing inheritable."""
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    _check(_libc.capset(header, struct.pack("=6I", low, low, 0, high, high, 0)))


def become(uid: int, gid: int, *, capabilities: int) -> None:
    """Drop from root to ``uid``/``gid`` for good, keeping the capability mask ``capabilities`` only.

    No supplementary groups; bounding and ambient sets are emptied. Single-threaded callers only: capset(2) is for
    the calling thread.
    """
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break  # the kernel has no capability of this number, nor of a higher one
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    set_capabilities(capabilities)
    _prctl(_PR_SET_KEEPCAPS, 0)


def file_type(descriptor: int) -> int:
    """The ``S_IFMT`` bits of an open file, as the kernel remembers them.

    Unlike fstat(2) this never asks a file system's server, which may be hung (AT_STATX_DONT_SYNC).
    """
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    _check(_libc.statx(descriptor, b"", flags, _STATX_TYPE, buffer))
    mode: int = struct.unpack_from("=H", buffer.raw, _STATX_MODE)[0]
    return stat.S_IFMT(mode)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def timerfd_create(clock: int) -> int:
    """A descriptor that becomes readable when a deadline on ``clock`` has passed; it does not block."""
    return _check(_libc.timerfd_create(clock, os.O_NONBLOCK | os.O_CLOEXEC))


def timerfd_set(descriptor: int, when: float) -> None:
    """Let a timerfd expire once, at ``when`` seconds of its clock (at once if that has passed); 0 disarms it."""
    seconds, fraction = divmod(when, 1.0)
    setting = (_Timespec * 2)(_Timespec(0, 0), _Timespec(int(seconds), int(fraction * 1e9)))
    _check(_libc.timerfd_settime(descriptor, _TFD_TIMER_ABSTIME, setting, None))
