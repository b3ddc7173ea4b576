"""The NBD devices that are ours to use, and what becomes of each.

sysfs is the truth: a device is free when it has no ``pid`` and its size is 0. What is neither free nor one of ours
belongs to somebody else; it is skipped and reported, and nothing here ever disconnects it. An ``NbdDevice`` stands
for one that was taken, with a lock file held (flock(2)) so that a second daemon, and tools that look at the lock,
leave it alone. Its owner hands it back once its client has ended; one that somebody abroad still holds *drains* then:
it is kept, locked, until the kernel says that it is free.

How the kernel tells (drivers/block/nbd.c, 6.1 to 6.12): connecting makes the file ``pid``, sets the size, and sends
one "change" event after both. Disconnecting sets the size to 0, sends the event, and only then takes ``pid`` away: an
event may be looked into too early, and none follows. All of that happens under a lock that open(2) of the device
waits for, so an open that came back has seen the end of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sendense_restored import errors

from .nbd_node import SECTOR, numbers_of, open_node
from .resources import Device

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from .threads import Threads
    from .udev import BlockEvents

log = logging.getLogger(__name__)

_DETACH = 2.0
"""Seconds that the kernel, and whoever looks at a device for a moment (udev), have to let it go."""
_PATIENCE = 60.0
LOCKS: Final = Path("/run/lock/sendense-restore")
"""The directory with a lock file, ``nbdN``, for each device."""


def _number(file: Path) -> int | None:
    """What a file of sysfs says, None if it has gone."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


class NbdDevice:
    """One device that was taken from the pool, for the disk of one mount."""

    def __init__(self, pool: Pool, number: int, mount: str, lock: int) -> None:
        self._pool, self._lock = pool, lock
        self.number = number
        self.mount = mount
        """The id of the mount that it was taken for."""
        self.path = pool.dev / f"nbd{number}"
        self.sysfs = pool.sys / "block" / f"nbd{number}"
        self._client: int | None = None
        """What ``pid`` said when it was ours."""

    def recognise(self, pid: int, size: int) -> bool:
        """Whether the client ``pid`` has connected it and it has ``size`` bytes; that client is ours from then on.

        NBD counts in blocks: what is left over beyond the last whole sector may be there, filled up, or not.
        """
        client, sectors = self._pid(), self._sectors()
        if client is None or not size // SECTOR <= sectors <= -(-size // SECTOR) or not sectors:
            return False
        if _group_of(client, self._pool.proc) != pid:  # the kernel names the thread that asked, which need not lead
            return False
        self._client = client
        return True

    def _pid(self) -> int | None:
        return _number(self.sysfs / "pid")

    def _sectors(self) -> int:
        return _number(self.sysfs / "size") or 0

    def is_freed(self) -> bool:
        """Whether nothing of ours is on it any more: it is free, or somebody else has it by now."""
        if self._client is None:
            return True
        pid = self._pid()
        return pid != self._client and (pid is not None or not self._sectors())

    async def freed(self) -> None:
        """Wait, however long that takes, until it is."""
        while not self.is_freed():
            await self._pool.events.until(lambda: not self._sectors() or self.is_freed(), seconds=None)
            if self.is_freed():
                return
            # Its size has gone and its ``pid`` has not: the kernel is about to take that away.
            with contextlib.suppress(OSError, errors.Unavailable):
                await self._pool.threads.run(self.path.name, self.settle, seconds=None)
            await self._pool.events.until(self.is_freed, seconds=_PATIENCE)

    def settle(self) -> None:
        """Open it and close it again: the kernel has finished what it was doing, and has looked for partitions.

        For a thread. Raises OSError.
        """
        os.close(open_node(self.path, numbers_of(self.sysfs), os.O_RDONLY))

    def node_of(self, start: int, size: int) -> tuple[Path, Path] | None:
        """The node, and its directory in sysfs, that the kernel has for these bytes exactly; None if it has none."""
        for directory in sorted(self.sysfs.glob(f"{self.path.name}p*")):
            first, count = _number(directory / "start"), _number(directory / "size")
            if first is not None and count is not None and (first * SECTOR, count * SECTOR) == (start, size):
                return self.path.parent / directory.name, directory
        return None

    def unlock(self) -> None:
        """For the pool. May be called again."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _group_of(thread: int, proc: Path) -> int | None:
    """The process that a thread belongs to, None if it has ended."""
    try:
        status = (proc / str(thread) / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in status.split("\n"):
        if line.startswith("Tgid:"):
            return int(line.removeprefix("Tgid:"))
    return None


class Pool:
    """The devices that the configuration gives us, as far as the kernel has them."""

    def __init__(
        self,
        numbers: Iterable[int],
        events: BlockEvents,
        threads: Threads,
        *,
        sys: Path = Path("/sys"),
        dev: Path = Path("/dev"),
        proc: Path = Path("/proc"),
        locks: Path = LOCKS,
    ) -> None:
        self.sys, self.dev, self.proc, self.events, self.threads = sys, dev, proc, events, threads
        self._locks = locks
        parameters = sys / "module" / "nbd" / "parameters"
        self.max_part = _number(parameters / "max_part") or 0
        """How many partitions of each the kernel makes nodes for; 0: none, and loops carry all volumes."""
        self._numbers = tuple(numbers)
        self._taken: dict[int, NbdDevice] = {}
        self._draining: dict[int, asyncio.Task[None]] = {}
        self._told: dict[int, str] = {}

    @property
    def numbers(self) -> list[int]:
        """Those that there are."""
        return [number for number in self._numbers if (self.sys / "block" / f"nbd{number}").exists()]

    def take(self, count: int, mount: str, *, without: Collection[int] = ()) -> list[NbdDevice] | None:
        """So many free devices, for the mount of that id, or None if there are not as many; without an await."""
        found: list[NbdDevice] = []
        for number in self.numbers:
            if len(found) == count:
                break
            if number in self._taken or number in without or not self._is_free(number):
                continue
            lock = self._try_lock(number)
            if lock is None:
                continue
            device = NbdDevice(self, number, mount, lock)
            # Whoever had the lock may have connected it before letting go of it.
            if not self._is_free(number):
                device.unlock()
                continue
            found.append(device)
            self._told.pop(number, None)
        if len(found) < count:
            for device in found:
                device.unlock()
            return None
        self._taken.update((device.number, device) for device in found)
        return found

    def _is_free(self, number: int) -> bool:
        directory = self.sys / "block" / f"nbd{number}"
        pid = _number(directory / "pid")
        if pid is None and _number(directory / "size") == 0:
            return True
        self._tell(number, f"somebody else uses it (process {pid})" if pid else "it has a size and no process")
        return False

    def _tell(self, number: int, why: str) -> None:
        """Log it once, not at every look, until the device could be taken again."""
        if self._told.get(number) != why:
            self._told[number] = why
            log.warning("not using nbd%d: %s", number, why)

    def _try_lock(self, number: int) -> int | None:
        path = self._locks / f"nbd{number}"
        try:
            lock = _open_lock(path)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BaseException:
                os.close(lock)
                raise
        except BlockingIOError:
            self._tell(number, f"another program holds {path}")
            return None
        except OSError as error:
            self._tell(number, f"{error.filename or path}: {error.strerror}")
            return None
        return lock

    async def give_back(self, device: NbdDevice) -> NbdDevice | None:
        """Hand a device back whose client has ended, and see that it is free.

        Returns it if somebody abroad still holds it: it stays ours until the kernel has freed it.
        """
        task = self._draining.get(device.number)
        if self._taken.get(device.number) is not device:
            return None
        if task is None:
            task = asyncio.create_task(self._drain(device), name=f"free {device.path.name}")
            self._draining[device.number] = task
        await asyncio.wait({task}, timeout=_DETACH)
        if task.done():
            return None
        log.warning("%s is still in use abroad; it is not used again before it is freed", device.path)
        return device

    async def _drain(self, device: NbdDevice) -> None:
        try:
            await device.freed()
        finally:
            del self._draining[device.number], self._taken[device.number]
            device.unlock()

    def states(self) -> list[Device]:
        """Each device: ``free``, ``ours``, ``draining`` or ``foreign``; without telling the journal."""
        return [self._state(number) for number in self.numbers]

    def _state(self, number: int) -> Device:
        directory, path = self.sys / "block" / f"nbd{number}", str(self.dev / f"nbd{number}")
        if (device := self._taken.get(number)) is not None:
            return Device(path, "draining" if number in self._draining else "ours", device.mount)
        pid = _number(directory / "pid")
        if pid is None and not _number(directory / "size"):
            return Device(path, "free", "")
        # Its client has ended, whoever that was, and it frees itself when the last who holds it lets go.
        drains = pid is not None and _group_of(pid, self.proc) is None
        return Device(path, "draining" if drains else "foreign", "")

    async def close(self) -> None:
        """Let go of everything; what drains is freed by the kernel without us."""
        tasks = list(self._draining.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for device in self._taken.values():
            device.unlock()
        self._taken.clear()


def _open_lock(path: Path) -> int:
    """The lock file, made if it is missing. Raises OSError.

    Everybody may make things in /run/lock, so the locks lie in a directory there that nobody but root enters: who can
    open a lock can hold it. tmpfiles.d makes it at boot, before there are users. Where that came late (the package
    was installed, or somebody has cleared /run/lock), what a user has put in its place is moved aside. And as
    systemd-tmpfiles takes such a directory over with all that is in it, the locks are looked at as well.
    """
    directory = path.parent
    if not _is_there(directory, stat.S_ISDIR):
        directory.mkdir(mode=0o700, parents=True)  # fails if somebody was faster; the next mount tries again
    elif stat.S_IMODE(directory.stat().st_mode) & 0o077:
        directory.chmod(0o700)
    _is_there(path, stat.S_ISREG)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)


def _is_there(path: Path, is_right: Callable[[int], bool]) -> bool:
    """Whether it is, and is ours and of the right kind; anything else is moved aside. Raises OSError.

    Never removed: somebody may heed it. The owner of a sticky directory may rename in it without CAP_FOWNER.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if is_right(status.st_mode) and status.st_uid == os.geteuid():
        return True
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    path.rename(aside)
    log.warning("%s was not ours: it is %s now", path, aside.name)
    return False
