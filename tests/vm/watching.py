"""Waiting for the service without asking it all the time, and looking at what is its own on the machine.

The service is started by a call to its name, so that whoever waits for it to come back by itself must not call it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sendense_restored.wire import Caller, Incoming
from tests.vm.appliance import BUS_NAME, SERVICE, main_pid, output, run, unit
from tools.lab import leftovers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from sendense_restored.client import Client, MountInfo

SECONDS = 240.0
"""Without any event; only so that a failing test ends."""
LOCKS = Path("/run/lock/sendense-restore")


class Watch:
    """The service's signals, and the bus's about its name: each is a reason to look again."""

    def __init__(self) -> None:
        self.owner = ""
        """The unique name of the service; empty while there is none."""
        self._again = asyncio.Event()
        self._caller = Caller(None, on_message=self._heard, on_end=lambda _: self._again.set(), on_owner=self._owned)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls) -> AsyncIterator[Watch]:
        """On a connection of its own."""
        watch = cls()
        await watch._caller.open()
        try:
            watch.owner = await watch._caller.watch(BUS_NAME)
            await watch._caller.ask("AddMatch", "s", f"type='signal',sender='{BUS_NAME}'")
            yield watch
        finally:
            watch._caller.connection.end("done")

    def _heard(self, message: Incoming) -> None:
        message.release()
        self._again.set()

    def _owned(self, name: str, owner: str) -> None:
        if name == BUS_NAME:
            self.owner = owner
            self._again.set()

    @property
    def lost(self) -> bool:
        """Whether the bus has gone."""
        return self._caller.connection.ended

    async def another(self, than: str) -> str:
        """Wait until a service has the name that is not the one called ``than``; its name."""
        while self.owner in {"", than}:
            assert not self.lost, "the message bus has gone"
            await self._next()
        return self.owner

    async def end_of_the_bus(self) -> None:
        """Wait until the connection has ended."""
        while not self.lost:
            await self._next()

    async def states(self, client: Client, mounts: Sequence[str], wanted: str) -> list[MountInfo]:
        """Wait until all of these mounts are what is wanted; none may fail on the way there."""
        while True:
            infos = [await client.mount_info(mount) for mount in mounts]
            if all(info.state == wanted for info in infos):
                return infos
            failed = [info for info in infos if info.state == "failed" != wanted]
            assert not failed, failed
            await self._next()

    async def _next(self) -> None:
        """Wait for a signal that came since the last wait for one had ended."""
        async with asyncio.timeout(SECONDS):
            await self._again.wait()
        self._again.clear()


@contextlib.contextmanager
def logs(text: str) -> Iterator[None]:
    """Wait until the service has said a line with this text, after what is done meanwhile."""
    journal = ("/usr/bin/journalctl", "--unit", SERVICE, "--output=cat")
    cursor = output(*journal, "--lines=0", "--show-cursor").strip().removeprefix("-- cursor: ")
    yield
    follow = ("/usr/bin/timeout", f"{SECONDS:.0f}", *journal, "--follow", f"--after-cursor={cursor}")
    with subprocess.Popen(follow, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        found = any(text in line for line in program.stdout)
        program.terminate()
    assert found, f"the service has not said: {text}"


async def ended(pidfds: Sequence[int]) -> None:
    """Wait until these processes have ended, and close their descriptors."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(SECONDS):
            for pidfd in pidfds:
                over = asyncio.Event()
                loop.add_reader(pidfd, over.set)
                try:
                    await over.wait()
                finally:
                    loop.remove_reader(pidfd)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def let_go(held: list[int]) -> None:
    """Close these descriptors, which are then no more on the list."""
    while held:
        os.close(held.pop())


@dataclass(frozen=True)
class Wished:
    """Mounts and their claims at one moment, to be compared after a restart."""

    claims: dict[str, dict[tuple[int, str], int]]
    """By the mount's id; each with the time at which it expires."""
    at: float = field(default_factory=time.time)

    @classmethod
    def of(cls, infos: Sequence[MountInfo]) -> Wished:
        """What these say."""
        return cls({info.id: {(each.uid, each.on_behalf_of): each.expires for each in info.claims} for info in infos})

    def to_json(self) -> str:
        """As text that outlives the machine's next start."""
        claims = {mount: [[*holder, time] for holder, time in each.items()] for mount, each in self.claims.items()}
        return json.dumps([self.at, claims])

    @classmethod
    def from_json(cls, text: str) -> Wished:
        """The same from that text."""
        at, claims = json.loads(text)
        return cls({mount: {(uid, name): time for uid, name, time in each} for mount, each in claims.items()}, at)

    def check(self, later: Wished) -> None:
        """The same mounts with the same claims, and each with the time that it had left.

        A claim does not run out while its mount is made again, so its end comes later by as much as that took.
        """
        assert {mount: claims.keys() for mount, claims in later.claims.items()} == {
            mount: claims.keys() for mount, claims in self.claims.items()
        }
        for mount, claims in self.claims.items():
            for holder, expires in claims.items():
                added = later.claims[mount][holder] - expires
                assert -2 <= added <= later.at - self.at + 2, f"{holder} of {mount} has {added} s more than before"


async def wished(client: Client) -> Wished:
    """All mounts there are."""
    return Wished.of([await client.mount_info(mount) for mount in await client.list_mounts()])


def nbd_disks(*infos: MountInfo) -> set[str]:
    """The NBD devices that these mounts' volumes lie on."""
    found = [re.match(r"/dev/nbd[0-9]+", device) for info in infos for device in info.devices]
    return {match[0] for match in found if match}


def processes() -> dict[int, str]:
    """The processes of the service's control group, and what they run."""
    found = {}
    procs = Path(f"/sys/fs/cgroup{unit(SERVICE, 'ControlGroup')}/cgroup.procs")
    for pid in procs.read_text(encoding="ascii").split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found[int(pid)] = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return found


def pid_of(matches: Callable[[int, str], bool]) -> int:
    """The one process of the service that ``matches`` says is meant."""
    (found,) = (pid for pid, command in processes().items() if matches(pid, command))
    return found


def descriptors() -> list[int]:
    """A pidfd of each process of the service."""
    found = []
    for pid in processes():
        with contextlib.suppress(ProcessLookupError):
            found.append(os.pidfd_open(pid))
    return found


def assert_at_rest() -> None:
    """The service runs, and has nothing of any mount: no process, no directory, no device, no lock.

    What was held abroad is freed a moment after it was let go of; that moment is waited for.
    """
    assert leftovers.left_in_time({}, _nbd_in_use) == []
    for lock in LOCKS.glob("nbd*"):
        run("/usr/bin/flock", "--timeout", "60", lock, "/bin/true")
    daemon = main_pid()
    assert sorted(command.split("\0")[0] for pid, command in processes().items() if pid != daemon) == ["cat"]
    root = Path(f"/proc/{daemon}/root")
    for directory in ("run/sendense-restore", "mnt/sendense/restore"):
        assert list((root / directory).iterdir()) == []


def _nbd_in_use() -> leftovers.Census:
    used = [file.parts[3] for file in Path("/sys/block").glob("nbd*/size") if file.read_text() != "0\n"]
    return {name: f"{name}, which has a size" for name in used}
