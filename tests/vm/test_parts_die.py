"""What serves one mount dies or hangs: that mount fails or recovers, no other hears of it, and all of it is freed.

The parts are the image server, the device client and the reader.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.client import Client
from tests.vm.watching import Watch, ended, let_go, nbd_disks, pid_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.vm.appliance import Appliance

PARTS = ("server", *(pytest.param(part, marks=pytest.mark.long) for part in ("client", "reader")))
HOSTNAME, LARGE = "/partition-1/etc/hostname", "/partition-1/srv/large.bin"


@pytest.fixture(autouse=True)
def all_at_rest(at_rest: None) -> None:
    """Each test of this module."""


class Two:
    """Two mounts, one of which something happens to."""

    def __init__(self, client: Client, watch: Watch, victim: str, other: str, device: str, image: Path) -> None:
        self.client, self.watch, self.victim, self.other = client, watch, victim, other
        self._device, self._image = Path(device).name, image

    def pid(self, part: str) -> int:
        """The process that is this part of the victim."""
        if part == "client":
            return int((Path("/sys/block") / self._device / "pid").read_text(encoding="ascii"))
        if part == "reader":
            return pid_of(lambda _, command: self.victim in command)
        # Its guard, and the first process of its namespace, have it on their command lines as well.
        return pid_of(
            lambda pid, command: "qemu-nbd" in command and program(pid) == "qemu-nbd" and self._image in links(pid)
        )

    async def read(self, mount: str, path: str = HOSTNAME) -> bytes:
        descriptor, _ = await self.client.open_file(mount, path)
        with open(descriptor, "rb") as file:  # noqa: ASYNC230, PTH123 - a descriptor
            return await asyncio.to_thread(file.read)

    async def other_is_untouched(self) -> None:
        """The daemon answers, and the other mount's files are read, those that were never read before as well."""
        assert set(await self.client.list_mounts()) == {self.victim, self.other}
        assert await self.read(self.other) == b"web01\n"
        assert (await self.client.mount_info(self.other)).state == "mounted"

    async def unmounted(self) -> None:
        """Take both down; the victim's device is free once nobody holds it."""
        for mount in await self.client.list_mounts():
            await self.client.unmount(mount)


def program(pid: int) -> str:
    """The file that a process runs."""
    return Path(f"/proc/{pid}/exe").readlink().name


def links(pid: int) -> set[Path]:
    """The files that a process has open."""
    return {each.readlink() for each in Path(f"/proc/{pid}/fd").iterdir()}


@pytest.fixture
async def two(appliance: Appliance) -> AsyncIterator[Two]:
    async with await Client.connect() as client, Watch.open() as watch:
        victim, other = await client.mount(appliance.backups[-1]), await client.mount(appliance.backups[0])
        (device,) = nbd_disks(await client.mount_info(victim))
        yield Two(client, watch, victim, other, device, appliance.chain.backups[-1].image)
    assert appliance.chain.unchanged()


@pytest.mark.parametrize("part", PARTS)
async def test_one_that_is_killed_fails_its_mount_and_no_other(two: Two, held: list[int], part: str) -> None:
    held.append((await two.client.open_file(two.victim, LARGE))[0])
    pid = two.pid(part)
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    await ended([pidfd])
    (info,) = await two.watch.states(two.client, [two.victim], "failed")
    assert "ended" in info.error
    with pytest.raises(OSError, match="Input/output error"):
        await asyncio.to_thread(os.pread, held[0], 4096, 1 << 20)
    with pytest.raises(errors.Unavailable, match="mount the backup again"):
        await two.read(two.victim)
    await two.other_is_untouched()
    let_go(held)
    await two.unmounted()


@pytest.mark.long
@pytest.mark.parametrize("part", ["server", "reader"])
async def test_one_that_was_stopped_for_a_while_goes_on(two: Two, part: str) -> None:
    pid = two.pid(part)
    os.kill(pid, signal.SIGSTOP)
    try:
        reading = asyncio.create_task(two.read(two.victim, LARGE))
        await two.other_is_untouched()
        assert not reading.done()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert len(await reading) > 1 << 20
    await two.other_is_untouched()
    await two.unmounted()


@pytest.mark.long
async def test_a_client_that_is_stopped_fails_its_mount(two: Two, held: list[int]) -> None:
    """The kernel shuts the device down then, whose ioctl it is in, and the server ends with its last connection."""
    held.append((await two.client.open_file(two.victim, LARGE))[0])
    os.kill(two.pid("client"), signal.SIGSTOP)
    (info,) = await two.watch.states(two.client, [two.victim], "failed")
    assert "image server ended" in info.error
    await two.other_is_untouched()
    let_go(held)
    await two.unmounted()


@pytest.mark.long
@pytest.mark.parametrize("part", ["server", "client", "reader"])
async def test_one_that_hangs_does_not_keep_its_mount_from_being_forced(two: Two, held: list[int], part: str) -> None:
    held.append((await two.client.open_file(two.victim, LARGE))[0])
    os.kill(two.pid(part), signal.SIGSTOP)
    reading = asyncio.create_task(asyncio.to_thread(os.pread, held[0], 4096, 1 << 20))
    await two.other_is_untouched()
    if part == "reader":
        assert len(await reading) == 4096, "it is in the way of a file that is open"
    await two.client.unmount(two.victim, force=True)
    if part != "reader":
        with pytest.raises(OSError, match="Input/output error"):
            await reading
    assert await two.client.list_mounts() == [two.other]
    let_go(held)
    await two.client.unmount(two.other)


@pytest.mark.long
async def test_a_server_that_hangs_is_given_up_and_its_mount_fails(two: Two, held: list[int]) -> None:
    """After attach.timeout; what waited for it gets an error, and can be killed again."""
    held.append((await two.client.open_file(two.victim, LARGE))[0])
    os.kill(two.pid("server"), signal.SIGSTOP)
    reading = asyncio.create_task(asyncio.to_thread(os.pread, held[0], 4096, 1 << 20))
    await two.other_is_untouched()
    with pytest.raises(OSError, match="Input/output error"):
        await reading
    await two.watch.states(two.client, [two.victim], "failed")
    let_go(held)
    await two.unmounted()
