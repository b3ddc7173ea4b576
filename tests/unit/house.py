"""A simulated host with four backups, the daemon's core on it, what is heard of its mounts, and its clock."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from sendense_restored import config, errors
from sendense_restored.daemon.events import Actor, Events
from sendense_restored.daemon.mounts import Mounts
from sendense_restored.daemon.resume import Resume
from sendense_restored.daemon.session import State
from sendense_restored.daemon.store import MountStatus
from sendense_restored.daemon.sweep import Sweep
from tests import simulator as sim
from tests.clock import FakeClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    import pytest

    from sendense_restored.daemon.mount import Mount
    from sendense_restored.daemon.store import Store
    from sendense_restored.daemon.volume import Journal
    from tests.simulator import Simulator

ANNA, BERT, CARL = 1001, 1002, 1003
DISKS = (("mountable-ext4", "mountable-xfs", "swap-swap"), ("mountable-ntfs",))
CORE_TASKS = {"build", "end", "fail", "forget", "write", "look", "follow", "drain", "start", "sweep"}
"""First words of the names of the core's tasks."""
GONE = errors.CatalogUnavailable("the catalogue cannot be used")


class House:
    """The mounts of a host with three backups, and what is heard of them."""

    def __init__(self, simulator: Simulator, store: Store, most: int = 3) -> None:
        self.simulator, self.store = simulator, store
        self.settings = config.Config(mounts=config.Mounts(directory=simulator.mounts, max=most))
        self.heard: list[tuple[str, str]] = []
        self._news = asyncio.Event()
        self.clock = FakeClock()
        self.events = Events(store, unix=self.clock.unix, monotonic=self.clock.now)
        self.begin()

    async def crash(self) -> None:
        """The daemon is killed: the kernel takes away what stands, and nothing is written."""
        mine = asyncio.current_task()
        for mount in self.mounts:
            if mount.timer is not None:
                mount.timer.cancel()
        for task in asyncio.all_tasks() - {mine}:
            if task.get_name().split()[0] in CORE_TASKS:
                task.cancel()
        self.simulator.power_off()
        await self.events.flush()

    def begin(self) -> None:
        """A daemon begins, with nothing but what the database has."""
        parts = self.store, self.simulator.machine
        self.mounts = Mounts(self.settings, *parts, self, self.events, self.clock)
        self.resume = Resume(self.mounts, *parts, self.events, self.clock)
        self.sweep = Sweep(self.mounts, self.resume, *parts, self.events, self.clock)

    def added(self, mount: Mount) -> None:
        self.heard.append(("added", mount.id))
        self._news.set()

    def changed(self, mount: Mount) -> None:
        self.heard.append((str(mount.session.state), mount.id))
        self._news.set()

    def removed(self, mount: Mount) -> None:
        self.heard.append(("removed", mount.id))
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so; it is looked at whenever something is heard of the mounts."""
        async with asyncio.timeout(60):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def becomes(self, condition: Callable[[], bool]) -> None:
        """The same for what nothing is heard of: it is looked at after each turn of the event loop."""
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0)

    async def mount(
        self,
        uid: int = ANNA,
        backup: str = "b1",
        *,
        disk: int = 0,
        all_disks: bool = False,
        journal: Journal = "replay",
        behalf: str = "",
        idle_timeout: float | None = None,
        wait: bool = False,
    ) -> Mount:
        wish = await self.mounts.wish(backup, disk_index=disk, all_disks=all_disks, journal=journal)
        return await self.mounts.mount(wish, Actor(uid, behalf), idle_timeout=idle_timeout, wait=wait)

    async def unmount(self, mount: Mount, uid: int = ANNA, *, behalf: str = "", force: bool = False) -> None:
        await self.mounts.unmount(mount, Actor(uid, behalf), force=force)

    async def rows(self) -> dict[str, MountStatus]:
        return {row.id: row.status for row in await self.store.mount_rows()}

    async def claimed(self, mount: Mount) -> list[int]:
        """The uids whose claims are written down; they are those that count."""
        written = sorted(claim.uid for claim in await self.store.claims(mount.id))
        assert written == sorted(holder.uid for holder in mount.lease.claims)
        return written

    def fail(self, monkeypatch: pytest.MonkeyPatch, method: str, error: Exception = GONE) -> None:
        """Have a method of the store raise."""

        async def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(self.store, method, fail)

    async def nothing_is_left(self) -> None:
        assert not self.simulator.standing
        assert list(self.mounts) == []
        assert await self.rows() == {}

    async def settled(self) -> None:
        """Wait until what goes on by itself has ended."""
        await self.events.flush()
        while tasks := [task for task in asyncio.all_tasks() if task.get_name().startswith(("forget", "write down"))]:
            await asyncio.wait(tasks)

    async def it_has_failed(self) -> Mount:
        """There is one mount, which has failed, and nothing else is left of it than that; it is given back then."""
        (mount,) = self.mounts
        assert mount.session.state is State.FAILED
        assert mount.session.error
        assert not self.simulator.standing
        assert len(self.mounts) == 0
        assert await self.rows() in ({}, {mount.id: MountStatus.FAILED})
        return mount


def start(work: Any) -> asyncio.Task[Any]:  # noqa: ANN401 - any coroutine
    return asyncio.create_task(work)


async def serves(mount: Mount, volume: bytes = b"partition-1") -> bool:
    assert mount.session.state is State.MOUNTED
    listing = await mount.session.list((volume, b"etc"), limit=10, cursor="")
    return [entry.name for entry in listing.entries] == ["hostname", "motd"]


async def lose(house: House, mount: Mount, part: str = "server") -> None:
    """Let a part of a mount end by itself, and wait until that has been dealt with."""
    mounts = [each for each in house.mounts if each.session.state is not State.FAILED]
    number = mounts.index(mount)
    if part == "server":
        [each for each in house.simulator.attachments if each.stands][number].die("the image server ended")
    elif part == "reader":
        [each for each in house.simulator.readers if each.stands][number].die("the reader ended")
    else:
        mounted = mount.session.volumes["partition-1"].mounted
        assert mounted is not None
        mounted.lost.set_result("the driver ended")
    await house.until(lambda: mount.session.state is State.FAILED)
    assert mount.ending is not None
    await asyncio.wait([mount.ending])


@contextlib.asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[House]:
    """A house, of which nothing may be left."""
    async with sim.house(directory) as (simulator, store):
        for backup in ("b1", "b2", "b3", "b4"):
            await sim.add_backup(store, backup, DISKS)
        house = House(simulator, store)
        yield house
        simulator.refuse.clear()
        await house.sweep.close()
        await house.mounts.stop()
        await house.events.close()
        assert not simulator.standing
        assert list(house.mounts) == []
