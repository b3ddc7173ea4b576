"""A daemon that has worked for long holds no more than a young one: descriptors, threads, memory, mounts."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.client import Client
from tools.lab import leftovers
from tools.lab.service import service

if TYPE_CHECKING:
    from tools.lab.guest import Chain
    from tools.lab.service import Service

    from .conftest import Machine

WARM_UP, ROUNDS = 40, 200
"""After so many rounds all pools, caches and code are there; the rest must not add to them."""
A_ROUND = 8 << 10
"""Bytes that a round may add for good: the daemon remembers for a day how its mounts ended."""
GRAIN = 2 << 20
"""Bytes by which an allocator may be more or less tidy at the end."""


def field(daemon: Service, name: str) -> int:
    """A number of /proc/PID/status (proc_pid_status(5)); sizes are in KiB there."""
    text = Path("/proc", str(daemon.pid), "status").read_text(encoding="ascii", errors="replace")
    return int(next(line for line in text.splitlines() if line.startswith(f"{name}:")).split()[1])


def held(daemon: Service) -> leftovers.Census:
    return leftovers.of_the_machine() | leftovers.mounts_of(daemon.pid) | leftovers.children_of(daemon.pid)


def descriptors(daemon: Service) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))  # noqa: PTH208 - the names alone


async def browse(client: Client, mount: str) -> None:
    entries, _ = await client.list_files(mount, "/partition-1")
    assert entries
    async with await client.listing(mount, "/", recursive=True) as found:
        seen = [record async for record in found]
        assert len(seen) == found.summary.entries + found.summary.errors
    descriptor, info = await client.open_file(mount, "/partition-1/etc/hostname")
    with open(descriptor, "rb") as file:  # noqa: PTH123, ASYNC230 - a descriptor
        assert len(file.read()) == info.size
    with pytest.raises(errors.PathNotFound):
        await client.open_file(mount, "/partition-1/no/such/file")
    (await client.listing(mount, "/", recursive=True)).close()  # which cancels it


async def one_round(client: Client, backups: list[str], number: int) -> None:
    """Everybody's way, and each time one of the ways in which a mount does not end well."""
    first, second = await asyncio.gather(client.mount(backups[0]), client.mount(backups[1], journal="as-crashed"))
    await asyncio.gather(browse(client, first), browse(client, second))
    match number % 4:
        case 0:
            descriptor, _ = await client.open_file(first, "/partition-1/etc/hostname")
            with pytest.raises(errors.Busy):
                await client.unmount(first)
            await client.unmount(first, force=True)
            os.close(descriptor)
        case 1:
            (await client.mount_info(first)).volumes  # noqa: B018 - all properties are packed
            asking = asyncio.create_task(client.mount(backups[2]))
            await asyncio.sleep(0)
            asking.cancel()  # a caller gives up; the mount does not
            await asyncio.wait({asking})
            await client.unmount(await client.mount(backups[2]))
            await client.unmount(first)
        case 2:
            (server,) = servers(first)
            os.kill(server, signal.SIGKILL)
            await no_longer_served(client, first)
            await client.unmount(first)
        case _:
            await client.unmount(first)
    await client.unmount(second)
    await client.cleanup_now()


async def no_longer_served(client: Client, mount: str) -> None:
    """What the reader has not asked for yet fails soon, and the daemon hears of the server's end."""
    while True:
        try:
            await client.list_files(mount, "/partition-1")
        except (errors.Unavailable, errors.Unreadable):
            return


def servers(mount: str) -> list[int]:
    """The image servers of a mount."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if b"qemu-storage-daemon" in command.split(b"\0")[0] and mount.encode() in command:
            found.append(int(directory.name))
    return found


@pytest.mark.long
async def test_nothing_piles_up(machine: Machine, chain: Chain, tmp_path: Path) -> None:
    with service(machine.bus, tmp_path) as daemon:
        async with await Client.connect(machine.bus.address) as client:
            await client.scan(await client.add_repository("lab", str(chain.backups[0].image.parent.parent)))
            backups = [backup.backup_id async for backup in client.backups()]
            before = held(daemon)
            for number in range(WARM_UP):
                await one_round(client, backups, number)
            open_then, memory_then = descriptors(daemon), field(daemon, "VmRSS") << 10
            for number in range(ROUNDS):
                await one_round(client, backups, number)
            assert leftovers.left_in_time(before, lambda: held(daemon), daemon.pid) == []
            assert descriptors(daemon) <= open_then
            assert field(daemon, "Threads") < 16
            assert (field(daemon, "VmRSS") << 10) - memory_then < ROUNDS * A_ROUND + GRAIN
    assert chain.unchanged()
