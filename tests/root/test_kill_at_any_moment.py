"""The daemon is killed in the middle of whatever it is doing, again and again: nothing is ever left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.client import Client
from tools.lab import leftovers
from tools.lab.service import service

if TYPE_CHECKING:
    from pathlib import Path

    from tools.lab.guest import Chain

    from .conftest import Machine

ROUNDS = 60
LONGEST = 0.6
"""Seconds from the first request to the kill; mounting two backups and giving one back takes about as long."""


async def requests(address: str, backups: list[str]) -> None:
    """Keep the daemon at mounting, reading and unmounting until it is gone."""
    with contextlib.suppress(errors.RestoreError):
        async with await Client.connect(address) as client:
            while True:
                for backup, journal in ((backups[0], "replay"), (backups[1], "as-crashed"), (backups[2], "replay")):
                    mount = await client.mount(backup, journal=journal)
                    descriptor, _ = await client.open_file(mount, "/partition-2/etc/hostname")
                    os.close(descriptor)
                await client.unmount(mount)


@pytest.mark.long
async def test_a_daemon_killed_at_any_moment_leaves_nothing(machine: Machine, chain: Chain, tmp_path: Path) -> None:
    moments = random.Random(1)
    with service(machine.bus, tmp_path):
        async with await Client.connect(machine.bus.address) as client:
            await client.scan(await client.add_repository("lab", str(chain.backups[0].image.parent.parent)))
            backups = [backup.backup_id async for backup in client.backups()]
    before = leftovers.of_the_machine()
    for number in range(ROUNDS):
        with service(machine.bus, tmp_path) as daemon:
            asking = [asyncio.create_task(requests(machine.bus.address, backups)) for _ in range(2)]
            # The moment is what is tried out here; nothing is waited for.
            await asyncio.sleep(moments.uniform(0, LONGEST))
            children = [int(key.split()[-1]) for key in leftovers.children_of(daemon.pid)]
            os.kill(daemon.pid, signal.SIGKILL)
            await asyncio.gather(*asking)
        left = [f"process {pid}" for pid in children if os.path.exists(f"/proc/{pid}/exe")]  # noqa: PTH110
        left = leftovers.left_on_the_machine(before, seconds=20) or [pid for pid in left if still_runs(pid)]
        assert left == [], f"round {number}"
    assert chain.unchanged()


def still_runs(process: str) -> bool:
    """Whether a process has not ended after 20 s; a moment after its parent's death it may still be about to."""
    import select  # noqa: PLC0415 - for this one call

    try:
        pidfd = os.pidfd_open(int(process.rsplit(maxsplit=1)[-1]))
    except ProcessLookupError:
        return False
    try:
        return not select.select([pidfd], [], [], 20)[0]
    finally:
        os.close(pidfd)
