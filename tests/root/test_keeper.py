"""The keeper stays as long as anybody who shares the daemon's mount namespace, and no longer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from sendense_restored.daemon.host import keeper
from sendense_restored.daemon.host.keeper import Keeper
from sendense_restored.daemon.host.process import Jail, Tools


@pytest.fixture
def tools() -> Tools:
    return Tools.find({**keeper.REQUIRED_TOOLS, "sleep": "coreutils"})


async def test_it_goes_when_it_is_let_go(tools: Tools) -> None:
    kept = await Keeper.start(tools)
    assert not kept._child.ended
    # Nobody's uid: who has it could look through /proc/PID/root into the daemon's mounts.
    assert Path(f"/proc/{kept._child.pid}").stat().st_uid == 0
    await kept.close()
    assert kept._child.ended


async def test_it_outlives_every_child_in_the_namespace(tools: Tools) -> None:
    kept = await Keeper.start(tools)
    server = await replace(tools, held=kept.held).spawn(Jail(65534), "sleep", "1000")
    closing = asyncio.create_task(kept.close())
    await asyncio.sleep(0)  # one turn: the daemon's end of the pipe is closed
    assert not kept._child.ended
    await server.close()
    await closing
    assert kept._child.ended


async def test_a_server_with_mounts_of_its_own_does_not_hold_it(tools: Tools) -> None:
    kept = await Keeper.start(tools)
    server = await replace(tools, held=kept.held).spawn(Jail(0, own_mounts=True), "sleep", "1000")
    await kept.close()
    assert kept._child.ended
    assert not server.ended
    await server.close()


async def test_signals_that_stop_a_service_do_not_end_it(tools: Tools) -> None:
    kept = await Keeper.start(tools)
    # A full pipe that becomes writable again: the last program of the chain is reading, and ignores what it ignores.
    os.set_blocking(kept.held, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(kept.held, bytes(65536)):
            continue
    reads = asyncio.Event()
    asyncio.get_running_loop().add_writer(kept.held, reads.set)
    async with asyncio.timeout(60):
        await reads.wait()
    asyncio.get_running_loop().remove_writer(kept.held)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGABRT):
        os.kill(kept._child.pid, number)
    await kept.close()
    assert await kept._child.wait() == 0
