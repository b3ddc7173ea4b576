"""Nothing that the daemon does holds its event loop for long, whatever its clients ask for at once.

The clients have a thread and an event loop of their own, so that what they spend is not counted.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from typing import TYPE_CHECKING, Self

import pytest

from sendense_restored.client import BUS_NAME, MOUNT, ROOT
from sendense_restored.daemon.host import answers
from sendense_restored.reader import pages, protocol
from sendense_restored.wire import Caller, Incoming
from tests import simulator as sim
from tests.bus.served import served, variants
from tools.lab.loop_watch import watched

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.bus.served import Served

LONGEST = 0.05
"""Seconds of CPU time that one turn of the event loop may take."""
ENTRIES = 10_000
BACKUPS = 150
ROUNDS = 6


async def list_as_a_reader(
    self: sim.Reader, volume: str, path: tuple[bytes, ...], *, limit: int, cursor: str
) -> protocol.Listing:
    """A page as it comes from a reader: read elsewhere, then frame after frame, each a turn of the event loop."""
    page = await asyncio.to_thread(
        pages.list_directory, self.roots[volume], path, limit=limit, cursor=cursor, check=lambda: None
    )
    frames = await asyncio.to_thread(lambda: list(protocol.listing_frames(1, page)))
    parts = answers.ListingParts(limit=limit, cursor=cursor)
    for frame in frames[:-1]:
        parts.add(answers.parse_reply(protocol._decode(frame)).answer, last=False)
        await asyncio.sleep(0)
    return parts.listing(answers.parse_reply(protocol._decode(frames[-1])).answer)


@pytest.fixture
async def house(bus_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """A service with many backups, one of which holds a long directory with what makes entries long."""
    monkeypatch.setattr(sim.Reader, "list", list_as_a_reader)
    async with served(bus_address, tmp_path) as house:
        for number in range(BACKUPS):
            await sim.add_backup(house.store, f"b{number + 3}", ((),))
        root = (await house.store.repository("main")).root / "b1/disk0/1-mountable-ext4/long"
        root.mkdir()
        (root / "file").write_bytes(b"x")
        for number in range(ENTRIES - 1):
            name = f"{number:05}-{'n' * (number % 150)}"
            if number % 3 == 0:
                (root / name).symlink_to("/somewhere/else/" + "t" * (number % 200))
            elif number % 3 == 1:
                os.link(root / "file", root / name)  # extras: how many names it has
            else:
                (root / name).touch()
        yield house


class Client:
    """One that leaves long answers undecoded: what it made of them would lie in the same heap as the daemon here."""

    def __init__(self, address: str) -> None:
        self._caller = Caller(address, on_message=Incoming.release, on_end=lambda _: None)

    async def __aenter__(self) -> Self:
        await self._caller.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._caller.connection.end("done")

    async def ask(
        self, member: str, signature: str, *body: object, path: str = ROOT, interface: str = f"{BUS_NAME}.Manager"
    ) -> Incoming:
        answer = await self._caller.call(BUS_NAME, path, interface, member, signature, body, seconds=60)
        answer.release()
        return answer


async def clients(address: str) -> None:
    """Several of them, each with something else to do."""
    async with Client(address) as lister, Client(address) as mounter, Client(address) as watcher:
        (mounted,) = (await lister.ask("Mount", "sa{sv}", "b1", variants(all_disks=("b", True)))).body()

        async def on_mount(user: Client, member: str, path: str, **options: tuple[str, object]) -> Incoming:
            return await user.ask(member, "sa{sv}", path, variants(**options), path=mounted, interface=MOUNT)

        async def lists() -> None:
            answer = await on_mount(lister, "ListFiles", "/disk-0-partition-1/long", limit=("u", ENTRIES))
            assert len(answer._payload) > 100 * ENTRIES

        async def opens() -> None:
            await on_mount(lister, "OpenFile", "/disk-0-partition-1/etc/motd")
            await on_mount(lister, "GetFileInfo", "/disk-0-partition-1/etc/motd")

        async def mounts() -> None:
            (path,) = (await mounter.ask("Mount", "sa{sv}", "b2", {})).body()
            await mounter.ask("Unmount", "a{sv}", {}, path=path, interface=MOUNT)

        async def looks() -> None:
            (objects,) = (
                await watcher.ask("GetManagedObjects", "", interface="org.freedesktop.DBus.ObjectManager")
            ).body()
            assert mounted in objects
            (properties,) = (
                await watcher.ask("GetAll", "s", MOUNT, path=mounted, interface="org.freedesktop.DBus.Properties")
            ).body()
            assert properties["State"].value == "mounted"

        async def browses() -> None:
            answer = await watcher.ask("ListBackups", "a{sv}", variants(limit=("u", 1000)))
            assert len(answer._payload) > 300 * BACKUPS

        await asyncio.gather(*(again(each) for each in (lists, opens, mounts, looks, browses)))
        await mounter.ask("Unmount", "a{sv}", {}, path=mounted, interface=MOUNT)


async def again(work: Callable[[], Awaitable[None]]) -> None:
    for _ in range(ROUNDS):
        await work()


async def test_no_turn_of_the_loop_is_long_under_a_mixed_load(house: Served) -> None:
    gc.collect()
    gc.freeze()  # as the daemon does when it is ready; here there are all the tests besides
    try:
        with watched() as turns:
            await asyncio.to_thread(asyncio.run, clients(house.address))
    finally:
        gc.unfreeze()
    assert turns.count > 500, "the load was none"
    assert turns.over(LONGEST) == []


async def test_the_watch_sees_work_and_nothing_else() -> None:
    def work() -> None:
        until = time.thread_time() + 0.06
        while time.thread_time() < until:
            pass

    loop = asyncio.get_running_loop()
    with watched() as turns:
        loop.call_soon(time.sleep, 0.06)  # as if the machine were busy
        await asyncio.to_thread(work)  # another thread's work
        assert turns.over(LONGEST) == []
        loop.call_soon(work)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    (found,) = turns.over(LONGEST)
    assert "work" in found
