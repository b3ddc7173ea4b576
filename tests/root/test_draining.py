"""A loop device that somebody abroad still holds is remembered, and the kernel's own event tells that it is free."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from sendense_restored import errors
from sendense_restored.daemon.host.loop import LoopDevice
from sendense_restored.daemon.host.volumes import Volume, VolumeState
from sendense_restored.daemon.volume import SessionVolume

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sendense_restored.daemon.host.attach import Attachment
    from sendense_restored.daemon.host.udev import BlockEvents
    from sendense_restored.daemon.volume import Machine

SIZE = 1 << 20


@pytest.fixture
async def device(tmp_path: Path, events: BlockEvents) -> AsyncIterator[LoopDevice]:
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(SIZE))
    file = os.open(backing, os.O_RDWR | os.O_CLOEXEC)
    bound = LoopDevice.bind(file, 0, SIZE, events, writable=False)
    os.close(file)
    yield bound
    bound.drop()


async def test_one_that_is_bound_is_not_free_and_one_that_is_closed_is(device: LoopDevice) -> None:
    assert not device.is_freed()
    await device.close()
    assert device.is_freed()
    await device.freed()


async def test_what_a_killed_daemon_left_of_a_mount_does_not_stay(tmp_path: Path, events: BlockEvents) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(SIZE))
    with backing.open("r+b") as file:
        killed = LoopDevice.bind(file.fileno(), 0, SIZE, events, writable=True)
        killed.set_read_only(refuse=True)
        killed.drop()
        await killed.freed()
        flag = Path("/sys/block", killed.path.name, "ro")
        assert flag.read_text(encoding="ascii") == "1\n", "the kernel takes it back by itself: bind need not"
        again = LoopDevice.bind(file.fileno(), 0, SIZE, events, writable=True)
        assert (again.path, flag.read_text(encoding="ascii")) == (killed.path, "0\n")
        await again.close()


async def test_whoever_waits_hears_of_the_last_user_and_of_no_one_before(device: LoopDevice) -> None:
    first, last = (os.open(device.path, os.O_RDONLY | os.O_CLOEXEC) for _ in range(2))
    with pytest.raises(errors.Busy):
        await device.close()
    waiting = asyncio.create_task(device.freed())
    os.close(first)
    await asyncio.wait({waiting}, timeout=0.2)  # the time that a wrong answer has to come
    assert not waiting.done()
    assert not device.is_freed()
    os.close(last)
    async with asyncio.timeout(60):
        await waiting
    assert device.is_freed()


async def test_one_that_was_bound_anew_by_others_is_free_of_us(device: LoopDevice, tmp_path: Path) -> None:
    await device.close()
    other = tmp_path / "other"
    other.write_bytes(bytes(SIZE))
    subprocess.run(["losetup", device.path, other], check=True)  # noqa: ASYNC221
    try:
        assert Path("/sys/block", device.path.name, "loop").exists()
        assert device.is_freed()
        await device.freed()
    finally:
        subprocess.run(["losetup", "--detach", device.path], check=True)  # noqa: ASYNC221


async def test_a_wait_that_is_cancelled_leaves_nothing(device: LoopDevice, events: BlockEvents) -> None:
    abroad = os.open(device.path, os.O_RDONLY | os.O_CLOEXEC)
    device.drop()
    waiting = asyncio.create_task(device.freed())
    await asyncio.sleep(0)  # one turn, in which it begins
    assert events._waiting
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not events._waiting
    os.close(abroad)
    await device.close()


async def test_a_volume_that_is_abandoned_remembers_the_device_that_it_had_to_let_go(device: LoopDevice) -> None:
    found = Volume("disk", 0, 0, SIZE, "ext4", "", "", VolumeState.MOUNTABLE, "")
    volume = SessionVolume(cast("Machine", None), found, cast("Attachment", None), Path("/nowhere"))
    volume.device = device
    abroad = os.open(device.path, os.O_RDONLY | os.O_CLOEXEC)
    await volume.abandon()
    assert volume.device is None
    assert volume.draining == [device]
    await volume.abandon()
    assert volume.draining == [device], "once is enough"
    os.close(abroad)
    async with asyncio.timeout(60):
        await device.freed()
