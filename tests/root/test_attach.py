"""A chain becomes a block device and goes away again, with real qemu-storage-daemon, FUSE and loop."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import config, errors
from sendense_restored.daemon.host import image
from sendense_restored.daemon.host.attach import REQUIRED_TOOLS, FuseAttachment, Workplace
from sendense_restored.daemon.host.process import Jail, Tools
from sendense_restored.daemon.host.threads import Threads
from sendense_restored.daemon.host.udev import BlockEvents

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SIZE = 8 << 20
"""Of the disk of ``small_chain``."""
TOOLS = dict(REQUIRED_TOOLS)


@pytest.fixture
def settings() -> config.Config:
    return config.parse({"attach": {"overlay_size": "64MiB", "timeout": "20s"}})


async def opened_on(
    settings: config.Config, events: BlockEvents, opened: image.Image, workplace: Workplace
) -> FuseAttachment:
    """One disk; closed if it cannot be opened, as whoever attaches the disks of a mount does."""
    attachment = FuseAttachment(Tools.find(TOOLS), settings, events, Threads())
    try:
        await attachment.open(opened, workplace, 0)
    except BaseException:
        await attachment.close()
        raise
    return attachment


@pytest.fixture
async def attachment(
    small_chain: Path, settings: config.Config, events: BlockEvents, workplace: Workplace
) -> AsyncIterator[FuseAttachment]:
    with image.open_chain(small_chain.parent, small_chain.name, depth=8) as opened:
        attached = await opened_on(settings, events, opened, workplace)
        yield attached
        await attached.close()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def test_the_device_shows_what_the_chain_holds(attachment: FuseAttachment) -> None:
    device = await attachment.slice(0, SIZE, writable=False)
    data = await asyncio.to_thread(device.path.read_bytes)
    assert data == b"\x11" * (1 << 20) + b"\x22" * (1 << 20) + b"\x11" * (SIZE - (2 << 20))
    await device.close()


async def test_a_slice_begins_and_ends_where_it_was_told(attachment: FuseAttachment) -> None:
    device = await attachment.slice((1 << 20) - 512, 1024, writable=False)
    assert await asyncio.to_thread(device.path.read_bytes) == b"\x11" * 512 + b"\x22" * 512
    assert device.read_only
    await device.close()


async def test_writes_go_to_the_overlay_and_the_images_stay_as_they_are(
    attachment: FuseAttachment, small_chain: Path
) -> None:
    images = (small_chain, small_chain.parent / "full.qcow2")
    before = [digest(path) for path in images]
    device = await attachment.slice(0, SIZE, writable=True)
    written = device.sectors_written()

    def write() -> bytes:
        with device.path.open("r+b", buffering=0) as node:
            node.write(b"\x33" * 4096)
            os.fsync(node.fileno())
            node.seek(0)
            return node.read(8192)

    assert await asyncio.to_thread(write) == b"\x33" * 4096 + b"\x11" * 4096
    assert device.sectors_written() - written == 8
    await device.close()
    assert [digest(path) for path in images] == before


async def test_a_read_only_slice_refuses_writes(attachment: FuseAttachment) -> None:
    device = await attachment.slice(0, SIZE, writable=False)
    with pytest.raises(PermissionError), device.path.open("r+b", buffering=0) as node:  # at open or write, by kernel
        node.write(b"x" * 512)
    await device.close()


async def test_a_device_in_use_is_busy_and_frees_itself_when_its_last_user_lets_go(
    attachment: FuseAttachment,
) -> None:
    device = await attachment.slice(0, SIZE, writable=False)
    abroad = os.open(device.path, os.O_RDONLY)
    with pytest.raises(errors.Busy):
        await device.close()
    os.close(abroad)
    await device.close()


async def test_a_killed_server_is_noticed_and_readers_get_eio(attachment: FuseAttachment) -> None:
    device = await attachment.slice(0, SIZE, writable=False)
    attachment.kill()
    async with asyncio.timeout(60):
        assert "ended" in await attachment.lost
    with pytest.raises(OSError, match="Input/output error"):
        await asyncio.to_thread(device.path.read_bytes)
    await device.close()


async def test_a_hung_server_is_given_up_in_time_and_nothing_is_left(
    small_chain: Path, settings: config.Config, events: BlockEvents, workplace: Workplace
) -> None:
    short = replace(settings, attach=replace(settings.attach, timeout=1.0))
    with image.open_chain(small_chain.parent, small_chain.name, depth=8) as opened:
        attached = await opened_on(settings, events, opened, workplace)
        attached._config = short
        assert attached._server is not None
        os.kill(attached._server.pid, signal.SIGSTOP)
        with pytest.raises(errors.Timeout):
            await attached.slice(0, SIZE, writable=False)
        await attached.close()


async def test_a_hung_server_does_not_stop_the_daemon_from_starting_programs(attachment: FuseAttachment) -> None:
    """A new process closes what it inherited, and its parent waits for that: nothing inherited may ask a server."""
    device = await attachment.slice(0, SIZE, writable=True)
    assert attachment._server is not None
    os.kill(attachment._server.pid, signal.SIGSTOP)
    began = asyncio.create_task(Tools.find(TOOLS).run(Jail(65534), "qemu-img", "--version", seconds=20))
    assert (await began).returncode == 0
    os.kill(attachment._server.pid, signal.SIGCONT)
    await device.close()


async def test_an_overlay_that_does_not_fit_is_no_space(
    small_chain: Path, settings: config.Config, events: BlockEvents, tmp_path: Path
) -> None:
    place = Workplace(tmp_path / "tiny", 4096)
    place.make()
    with image.open_chain(small_chain.parent, small_chain.name, depth=8) as opened, pytest.raises(errors.NoSpace):
        await opened_on(settings, events, opened, place)
    place.close()


async def test_an_image_that_qemu_refuses_is_refused_with_nothing_left(
    small_chain: Path, settings: config.Config, events: BlockEvents, workplace: Workplace
) -> None:
    with image.open_chain(small_chain.parent, small_chain.name, depth=8) as opened:
        with small_chain.open("r+b") as file:  # after the check, as a failing disk would
            file.write(b"\0" * 64)
        with pytest.raises(errors.ImageRefused):
            await opened_on(settings, events, opened, workplace)


async def test_a_backup_that_is_being_written_is_not_ready(
    small_chain: Path, settings: config.Config, events: BlockEvents, workplace: Workplace
) -> None:
    with image.open_chain(small_chain.parent, small_chain.name, depth=8) as opened:
        writer = await asyncio.create_subprocess_exec(
            "qemu-io", "-f", "qcow2", small_chain, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert writer.stdin is not None
        assert writer.stdout is not None
        await writer.stdout.readuntil(b"qemu-io> ")
        with pytest.raises(errors.BackupNotReady):
            await opened_on(settings, events, opened, workplace)
        await writer.communicate(b"quit\n")


async def test_the_server_holds_no_mount_of_the_daemon_and_its_export_is_nowhere_else(
    attachment: FuseAttachment, workplace: Workplace
) -> None:
    """Else its death could take the daemon's mounts down, and wait there for itself."""
    assert attachment._server is not None
    theirs = Path(f"/proc/{attachment._server.pid}/mountinfo").read_text(encoding="utf-8")
    ours = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    export = f" {workplace.path}-disk-0 "
    assert export in theirs
    assert export not in ours
    assert f" {workplace.path} " in ours
    assert f" {workplace.path} " not in theirs


async def test_a_daemon_that_is_killed_leaves_no_server_and_no_loop(small_chain: Path, tmp_path: Path) -> None:
    """The whole of it in another process, which is killed in the middle."""
    script = f"""
import asyncio, sys
from pathlib import Path
from sendense_restored import config, linux
from sendense_restored.daemon.host import image
from sendense_restored.daemon.host.attach import REQUIRED_TOOLS, FuseAttachment, Workplace
from sendense_restored.daemon.host.process import Tools
from sendense_restored.daemon.host.threads import Threads
from sendense_restored.daemon.host.udev import BlockEvents
async def main():
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_SLAVE)
    place = Workplace(Path({str(tmp_path / "killed")!r}), 64 << 20)
    place.make()
    opened = image.open_chain(Path({str(small_chain.parent)!r}), {small_chain.name!r}, depth=8)
    events = BlockEvents()
    attached = FuseAttachment(Tools.find({TOOLS!r}), config.Config(), events, Threads())
    await attached.open(opened, place, 0)
    device = await attached.slice(0, {SIZE}, writable=True)
    print(attached._server.pid, device.path, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    daemon = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        script,
        stdout=asyncio.subprocess.PIPE,
    )
    assert daemon.stdout is not None
    server, device = (await daemon.stdout.readline()).decode().split()
    gone = os.pidfd_open(int(server))
    assert Path("/sys/block", Path(device).name, "loop/backing_file").exists()
    events = BlockEvents()
    daemon.kill()
    await daemon.wait()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(gone, ended.set)
    async with asyncio.timeout(60):
        await ended.wait()
    asyncio.get_running_loop().remove_reader(gone)
    os.close(gone)
    sysfs = Path("/sys/block", Path(device).name, "loop/backing_file")
    assert await events.until(lambda: not sysfs.exists(), seconds=20)
    events.close()
    (tmp_path / "killed").rmdir()
