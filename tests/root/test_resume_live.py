"""The real daemon ends, in whatever way and wherever it is just then; the next one keeps its promises.

Nothing of the first is left, and every mount that was wished for is there again: same id, same claims, same files.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.client import Client
from tests.root.dying_daemon import BUILDING, CLOSING, name_of
from tools.lab import leftovers
from tools.lab.service import service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tools.lab.guest import Chain

    from .conftest import Machine

DYING = (str(Path(__file__).with_name("dying_daemon.py")),)
HOSTNAME = "/partition-2/etc/hostname"


class Place:
    """Where daemons come and go: one bus, one database."""

    def __init__(self, machine: Machine, directory: Path) -> None:
        self.machine, self.directory = machine, directory
        self.backups: list[str] = []

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with await Client.connect(self.machine.bus.address) as client:
            yield client

    async def fill(self, chain: Chain) -> None:
        with service(self.machine.bus, self.directory):
            async with self.client() as client:
                await client.scan(await client.add_repository("lab", str(chain.backups[0].image.parent.parent)))
                self.backups = [backup.backup_id async for backup in client.backups()]

    def rows(self) -> dict[str, str]:
        with contextlib.closing(sqlite3.connect(self.directory / "restore.db")) as database:
            return dict(database.execute("SELECT id, status FROM restore_mounts"))


@pytest.fixture
async def place(machine: Machine, chain: Chain, tmp_path: Path) -> Place:
    place = Place(machine, tmp_path)
    await place.fill(chain)
    return place


async def mounted_again(client: Client, mount: str) -> None:
    """Wait until a mount has been made again."""
    async with asyncio.timeout(120):
        while (state := (await client.mount_info(mount)).state) != "mounted":
            assert state == "mounting"


async def mount_and_unmount(client: Client, backup: str) -> None:
    await client.unmount(await client.mount(backup, idle_timeout=7200))


async def read(client: Client, mount: str) -> bytes:
    descriptor, _ = await client.open_file(mount, HOSTNAME)
    with open(descriptor, "rb") as file:  # noqa: ASYNC230, PTH123 - a descriptor of a small file
        return file.read()


@contextlib.contextmanager
def nothing_survives() -> Iterator[None]:
    before = leftovers.of_the_machine()
    yield
    assert leftovers.left_on_the_machine(before, seconds=20) == []


POINTS = [
    (kind, name_of(act), moment)
    for kind, acts in (("building", BUILDING), ("closing", CLOSING))
    for act in acts
    for moment in ("before", "after")
]


@pytest.mark.parametrize(("kind", "act", "moment"), POINTS, ids=str)
async def test_killed_before_and_after_each_act(place: Place, kind: str, act: str, moment: str) -> None:
    # While a mount is built, a device is closed after the disk was looked at.
    time = 2 if (kind, act) == ("closing", "LoopDevice.close") else 1
    program = (*DYING, f"{act} {moment} {time}")
    with nothing_survives(), service(place.machine.bus, place.directory, program=program):
        async with place.client() as client:
            with pytest.raises(errors.Unavailable):
                await mount_and_unmount(client, place.backups[0])
    rows = place.rows()
    with service(place.machine.bus, place.directory):
        async with place.client() as client:
            if (kind, act, moment) == ("building", "Store.insert_mount", "before"):
                assert rows == {}  # it was never written, and nobody was told of it
                assert await client.list_mounts() == []
            elif kind == "building" or (act, moment) == ("Store.update_mount", "before"):
                (mount,) = rows
                assert await client.list_mounts() == [mount]
                await mounted_again(client, mount)
                info = await client.mount_info(mount)
                assert [(claim.uid, claim.on_behalf_of) for claim in info.claims] == [(0, "")]
                assert 7000 < info.expires_at - info.last_accessed_at <= 7200
                assert await read(client, mount)
                await client.unmount(mount)
            else:
                assert await client.list_mounts() == []  # its end was wished for
                for mount in rows:
                    with pytest.raises(errors.Expired, match="it was being unmounted when the service ended"):
                        await client.mount_info(mount)
            assert place.rows() == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_mounts_outlive_the_daemon(place: Place, number: signal.Signals) -> None:
    with nothing_survives(), service(place.machine.bus, place.directory) as daemon:
        async with place.client() as client:
            mounts = [await client.mount(place.backups[0])]
            mounts.append(await client.mount(place.backups[1], journal="as-crashed"))
            contents = [await read(client, mount) for mount in mounts]
            held, _ = await client.open_file(mounts[0], HOSTNAME)
            os.kill(daemon.pid, number)
            async with asyncio.timeout(60):
                while client.connected and await _answers(client):
                    pass
        os.close(held)
    with service(place.machine.bus, place.directory):
        async with place.client() as client:
            assert sorted(await client.list_mounts()) == sorted(mounts)
            for mount, content in zip(mounts, contents, strict=True):
                await mounted_again(client, mount)
                assert await read(client, mount) == content
            assert (await client.mount_info(mounts[1])).journal == "as-crashed"


async def _answers(client: Client) -> bool:
    try:
        await client.list_mounts()
    except errors.Unavailable:
        return False
    return True


async def test_what_crashes_the_daemon_is_not_tried_for_ever(place: Place) -> None:
    with service(place.machine.bus, place.directory):
        async with place.client() as client:
            for backup in place.backups[:2]:
                await client.mount(backup)
    for _ in range(2):
        dying = service(place.machine.bus, place.directory, program=(*DYING, "Machine.attach before 1"))
        with contextlib.suppress(RuntimeError), dying as daemon:
            pidfd = os.pidfd_open(daemon.pid)
            await asyncio.to_thread(os.waitid, os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
            os.close(pidfd)
    with contextlib.closing(sqlite3.connect(place.directory / "restore.db")) as database:
        query = "SELECT id FROM restore_mounts ORDER BY resume_attempts DESC"
        blamed, spared = (row[0] for row in database.execute(query))
    with service(place.machine.bus, place.directory):
        async with place.client() as client:
            await mounted_again(client, spared)
            info = await client.mount_info(blamed)
            assert (info.state, "ended 2 times while it made this mount" in info.error) == ("failed", True)
