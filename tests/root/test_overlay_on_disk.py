"""``attach.overlay_dir``: overlays on a disk have no name, are bounded, and a full one is no worse than in memory."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import pytest

from sendense_restored import config, errors, linux
from sendense_restored.daemon.host import image, resources
from sendense_restored.daemon.host.attach import REQUIRED_TOOLS, FuseAttachment
from sendense_restored.daemon.host.process import Tools
from sendense_restored.daemon.host.threads import Threads
from sendense_restored.daemon.host.udev import BlockEvents
from sendense_restored.daemon.host.workplace import Workplace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from sendense_restored.daemon.host.loop import LoopDevice

MOUNT = "0b7c2a52-9d1e-4f7e-8a51-3f6c1f1f7a10"
SIZE = 256 << 20
BLOCK = 4096


@pytest.fixture
def overlays(tmp_path: Path) -> Path:
    """The directory, on this machine's disk."""
    directory = tmp_path / "overlays"
    directory.mkdir()
    return directory


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "runtime"  # a mount of its own, as the daemon makes one
    directory.mkdir()
    linux.mount("runtime", directory, "tmpfs")
    yield directory
    linux.umount(directory)


class Attach(Protocol):
    async def __call__(self, base: Path, limit: int) -> tuple[FuseAttachment, Workplace]:
        """Serve a raw image with an overlay of so many bytes."""


@pytest.fixture
async def attach(overlays: Path, runtime: Path) -> AsyncIterator[Attach]:
    tools = Tools.find(REQUIRED_TOOLS)
    made: list[tuple[FuseAttachment, Workplace]] = []
    events = BlockEvents()

    async def make(base: Path, limit: int) -> tuple[FuseAttachment, Workplace]:
        top = base.with_suffix(".qcow2")
        subprocess.run(  # noqa: ASYNC221
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", top], check=True
        )
        default = config.Config()
        settings = replace(default, attach=replace(default.attach, overlay_size=limit, overlay_dir=overlays))
        workplace = Workplace(runtime / MOUNT, limit, overlays)
        workplace.make()
        attachment = FuseAttachment(tools, settings, events, Threads())
        try:
            with image.open_chain(top.parent, top.name, depth=2) as opened:
                await attachment.open(opened, workplace, 0)
        except BaseException:
            await attachment.close()
            workplace.close()
            raise
        made.append((attachment, workplace))
        return made[-1]

    yield make
    for attachment, workplace in made:
        await attachment.close()
        workplace.close()
        assert workplace.used() == (0, 0)
    events.close()
    assert list(overlays.iterdir()) == []


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def write(device: LoopDevice, offsets: list[int]) -> None:
    """A block at each of these places, all of which have to be on the other side. Raises OSError."""
    with device.path.open("r+b", buffering=0) as node:
        for offset in offsets:
            os.pwrite(node.fileno(), b"\x55" * BLOCK, offset)
        os.fsync(node.fileno())


async def test_an_overlay_is_on_the_disk_without_a_name_and_is_counted(
    attach: Attach, disk: Path, overlays: Path, runtime: Path
) -> None:
    attachment, workplace = await attach(disk, 64 << 20)
    used, limit = workplace.used()
    assert limit == 64 << 20
    device = await attachment.slice(0, SIZE, writable=True)
    await asyncio.to_thread(write, device, [number * BLOCK for number in range(1024)])
    assert list(overlays.iterdir()) == []
    assert workplace.used()[0] - used >= 1024 * BLOCK
    in_memory = os.statvfs(runtime / MOUNT)
    assert in_memory.f_blocks - in_memory.f_bfree <= 1
    assert disk.stat().st_blocks == 0
    await device.close()


async def test_writes_that_are_far_apart_take_little_more_than_what_they_write(attach: Attach, disk: Path) -> None:
    """It is the length of the file that is bounded: with large clusters these would need 16 times as much."""
    attachment, workplace = await attach(disk, 32 << 20)
    device = await attachment.slice(0, SIZE, writable=True)
    places = random.Random(1).sample(range(0, SIZE, BLOCK), 1500)
    await asyncio.to_thread(write, device, places)
    assert workplace.used()[0] < 12 << 20
    await device.close()


async def test_a_full_one_is_an_error_to_the_writer_and_the_server_goes_on(attach: Attach, disk: Path) -> None:
    attachment, workplace = await attach(disk, 4 << 20)
    device = await attachment.slice(0, SIZE, writable=True)
    with pytest.raises(OSError, match="Input/output error"):
        await asyncio.to_thread(write, device, list(range(0, 16 << 20, BLOCK)))
    used, limit = workplace.used()
    assert (4 << 20) - (1 << 20) < used <= limit == 4 << 20
    assert not attachment.lost.done()
    other = await attachment.slice(128 << 20, 1 << 20, writable=False)
    assert await asyncio.to_thread(other.path.read_bytes) == bytes(1 << 20)
    await other.close()
    await device.close()


async def test_one_that_does_not_even_hold_its_own_tables_is_no_space(attach: Attach, disk: Path) -> None:
    with pytest.raises(errors.NoSpace, match=r"attach\.overlay_size"):
        await attach(disk, 16 << 10)


def test_on_a_file_system_without_nameless_files_it_loses_its_name_at_once(tmp_path: Path) -> None:
    stick, where = tmp_path / "stick.img", tmp_path / "stick"
    with stick.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkntfs", "-q", "-F", stick], check=True, capture_output=True)
    where.mkdir()
    subprocess.run(["ntfs-3g", stick, where], check=True)
    try:
        with pytest.raises(OSError, match="not supported"):
            os.open(where, os.O_TMPFILE | os.O_RDWR)
        workplace = Workplace(tmp_path / MOUNT, 1 << 20, where)
        overlay = workplace.open_overlay(0)
        assert list(where.glob("sendense-*")) == []
        assert os.write(overlay, b"x") == 1
        os.close(overlay)
        workplace.close()
        assert list(where.iterdir()) == []
    finally:
        subprocess.run(["umount", where], check=True)


def test_a_disk_that_is_nearly_full_takes_no_more_overlays(tmp_path: Path, runtime: Path) -> None:
    small, plenty = runtime / "small", tmp_path
    small.mkdir()
    linux.mount("small", small, "tmpfs", 0, "size=200m")
    try:
        resources.check_room(1, 1, depth=1, uids_free=1, overlay_dir=small)
        with pytest.raises(errors.NoSpace, match="200 MiB") as refusal:
            resources.check_room(1, 2, depth=1, uids_free=1, overlay_dir=small)
        assert str(small) not in refusal.value.message
        resources.check_room(1, 2, depth=1, uids_free=1, overlay_dir=plenty)
        resources.check_room(1, 2, depth=1, uids_free=1, overlay_dir=small / "missing")
    finally:
        linux.umount(small)
