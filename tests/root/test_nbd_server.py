"""``qemu-nbd`` as the daemon starts it, without a device: what it may see, and when it ends."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import config
from sendense_restored.daemon.host import image
from sendense_restored.daemon.host.attach import REQUIRED_TOOLS
from sendense_restored.daemon.host.nbd import TOOLS, NbdAttachment, NotWithNbdError
from sendense_restored.daemon.host.nbd_pool import NbdDevice, Pool
from sendense_restored.daemon.host.nbd_socket import connect
from sendense_restored.daemon.host.process import Tools
from sendense_restored.daemon.host.threads import Threads
from sendense_restored.daemon.host.uids import Uids
from tests.nbd import Sysfs
from tools.lab.children import first_child, guarded

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator

    from sendense_restored.daemon.host.attach import Workplace
    from sendense_restored.daemon.host.udev import BlockEvents


class WithoutDevice(NbdAttachment):
    """With a connection of the test's in the place of the kernel's."""

    connection: socket.socket

    async def _connect(self, workplace: Workplace, directory: int, door: int) -> bool:
        del workplace, directory
        connection = await connect(door, "disk")
        assert connection is not None
        self.connection = connection
        return True

    @property
    def server(self) -> int:
        """The process id of qemu-nbd."""
        assert self._server is not None
        return guarded(self._server.pid)


@pytest.fixture
async def unopened(
    tmp_path: Path, small_chain: Path, events: BlockEvents, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[WithoutDevice]:
    del workplace  # stays until this is closed
    for path in small_chain.parent.glob("*.qcow2"):
        path.chmod(0o600)  # others' files
    monkeypatch.setattr(NbdDevice, "settle", lambda _: None)
    pool = Pool(range(1), events, Threads(), **Sysfs(tmp_path, devices=1, max_part=0).places)
    taken = pool.take(1, "m")
    assert taken is not None
    tools = Tools.find(REQUIRED_TOOLS | {"qemu-nbd": TOOLS["qemu-nbd"]})
    disk = WithoutDevice(tools, config.parse({}), events, Threads(), pool, Uids(range(61900, 61902)), taken[0])
    try:
        yield disk
    finally:
        await disk.close()
        await pool.close()


@pytest.fixture
async def disk(unopened: WithoutDevice, small_chain: Path, workplace: Workplace) -> AsyncIterator[WithoutDevice]:
    with image.open_chain(small_chain.parent, small_chain.name, depth=8) as opened:
        await unopened.open(opened, workplace, 0)
    yield unopened
    unopened.connection.close()


async def test_it_ends_with_the_last_connection_and_that_is_noticed(disk: WithoutDevice) -> None:
    assert not disk.lost.done()
    disk.connection.close()
    async with asyncio.timeout(60):
        assert "image server ended" in await disk.lost


async def test_it_sees_no_file_of_the_host_but_programs_and_has_processes_of_its_own(disk: WithoutDevice) -> None:
    root = Path(f"/proc/{disk.server}/root")
    assert {each.name for each in root.iterdir()} - {"lib32", "lib64", "libx32"} == {
        "bin",
        "lib",
        "proc",
        "sbin",
        "usr",
    }
    status = Path(f"/proc/{disk.server}/status").read_text(encoding="utf-8")
    assert re.search(rf"\nNSpid:\t{disk.server}\t[0-9]+\n", status)
    assert "\nUid:\t61900\t61900\t61900\t61900\n" in status


async def test_it_holds_no_mount_of_the_daemon(disk: WithoutDevice, workplace: Workplace) -> None:
    """Else its death could take the daemon's mounts down, and wait there for itself."""
    theirs = Path(f"/proc/{disk.server}/mountinfo").read_text(encoding="utf-8")
    assert f" {workplace.path} " in Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    assert f" {workplace.path} " not in theirs


async def test_what_it_has_started_ends_with_it(disk: WithoutDevice) -> None:
    """As a program would that has taken it over."""
    entered = ("nsenter", f"--target={disk.server}", "--pid", "--", "setsid", "sh", "-c", "echo; exec sleep 1000")
    process = await asyncio.create_subprocess_exec(*entered, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    started = os.pidfd_open(first_child(process.pid))
    try:
        assert await disk.close() is None
        assert select.select([started], [], [], 0)[0], "it has ended, and is not about to"
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(started, signal.SIGKILL)
        os.close(started)
        await process.communicate()


async def test_an_image_that_its_storage_opens_to_root_alone_is_not_for_this_way(
    unopened: WithoutDevice, small_chain: Path, workplace: Workplace
) -> None:
    """As NFS does with the images of others, whatever capabilities one has. Here it is FUSE that does."""
    place, file = small_chain.with_name("remote.qcow2"), small_chain.with_name("full.qcow2")
    place.touch()
    # In this order: the monitor greets when the export stands.
    storage = await asyncio.create_subprocess_exec(
        *(
            "qemu-storage-daemon",
            "--blockdev",
            f"file,node-name=image,filename={file}",
        ),
        *("--export", f"fuse,id=image,node-name=image,mountpoint={place},allow-other=off"),
        *("--chardev", "stdio,id=monitor", "--monitor", "chardev=monitor"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert storage.stdout is not None
        await storage.stdout.readline()
        with (
            image.open_chain(place.parent, place.name, depth=8) as opened,
            pytest.raises(NotWithNbdError, match="root alone"),
        ):
            await unopened.open(opened, workplace, 0)
    finally:
        storage.terminate()
        await storage.wait()
