"""A mount as the host sees it, with the real one: who holds it, what it takes, what is left of it, and where."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import uuid
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import config, errors, linux
from sendense_restored.daemon.host.leftovers import SOURCE
from sendense_restored.daemon.host.loop import LoopDevice
from sendense_restored.daemon.host.machine import Machine
from sendense_restored.daemon.host.udev import BlockEvents
from sendense_restored.daemon.session import Session, State, Wish
from sendense_restored.daemon.store import Backup, BackupDisk, Repository

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tools.lab.guest import Chain

MIB = 1 << 20
FILE = (b"partition-2", b"etc", b"hostname")
SECONDS = 60
"""Only so that a failing test ends."""
PLACE = Path("/run/host")
"""Where every user may pass, as the jailed tools have to."""
MADE: list[Session] = []
"""The sessions of a test: one that fails leaves them standing."""


@pytest.fixture
def settings() -> Iterator[config.Config]:
    """Directories as the daemon makes them."""
    runtime, mounts = PLACE / "runtime", PLACE / "mounts"
    for directory in (runtime, mounts):
        directory.mkdir(parents=True)
        linux.mount(SOURCE, directory, "tmpfs", 0, "size=4m,mode=0711")
    given = {
        "paths": {"runtime": str(runtime)},
        "mounts": {"directory": str(mounts)},
        "attach": {"overlay_size": "64MiB"},
    }
    yield config.parse(given)
    for directory in (runtime, mounts):
        assert list(directory.iterdir()) == []
        linux.umount(directory)
    shutil.rmtree(PLACE)


@asynccontextmanager
async def started(settings: config.Config) -> AsyncIterator[Machine]:
    events = BlockEvents()
    machine = await Machine.start(settings, events)
    try:
        yield machine
    finally:
        while MADE:
            if (session := MADE.pop()).standing:
                await session.force()
        await machine.close()
        events.close()


@pytest.fixture
async def host(settings: config.Config) -> AsyncIterator[Machine]:
    async with started(settings) as machine:
        yield machine


def session_of(chain: Chain, host: Machine) -> Session:
    image = chain.backups[-1].image
    disk = BackupDisk(1, 0, str(image), 1, "completed")
    backup = Backup("b", "vm", "r", "full", "completed", None, 1, 1, datetime.now(UTC), None, None, (disk,))
    repository = Repository("r", "r", "local", enabled=True, root=image.parent.parent, immutable=False)
    wish = Wish(backup, repository, (disk,), all_disks=False, journal="replay")
    MADE.append(Session(str(uuid.uuid4()), wish, host, created_at=0))
    return MADE[-1]


async def built(chain: Chain, host: Machine) -> Session:
    session = session_of(chain, host)
    await session.build()
    return session


@asynccontextmanager
async def somebody_with(session: Session) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that has a file of the mount open, and no other trace of it."""
    descriptor, _ = await session.open(FILE)
    process = await asyncio.create_subprocess_exec(
        "cat", "-", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, pass_fds=[descriptor], cwd="/"
    )
    os.close(descriptor)
    try:
        yield process
    finally:
        await process.communicate(b"")  # Python 3.11 closes the pipe only if there is something to write


async def test_who_holds_a_mount_is_named_and_its_reader_is_not(chain: Chain, host: Machine) -> None:
    session = await built(chain, host)
    assert await host.holders(session.mount_ids) == []
    async with somebody_with(session) as process:
        (found,) = await host.holders(session.mount_ids)
        assert (found.pid, found.uid, found.comm, found.count) == (process.pid, 0, "cat", 1)
        with pytest.raises(errors.Busy):
            await session.close()
    assert await host.holders(session.mount_ids) == []
    await session.close()


async def test_a_device_that_is_held_abroad_drains_until_its_last_user_lets_go(chain: Chain, host: Machine) -> None:
    session = await built(chain, host)
    async with somebody_with(session):
        await session.force()
        (device,) = session.draining
        assert isinstance(device, LoopDevice)
        assert not device.is_freed()
        freed = asyncio.create_task(device.freed())
        await asyncio.sleep(0)  # one turn, in which it looks for the first time
        assert not freed.done()
        with pytest.raises(errors.Busy):
            await device.close()
    async with asyncio.timeout(SECONDS):
        await freed
    assert device.is_freed()
    await device.close()


async def test_the_file_is_known_by_its_path_in_the_repository(chain: Chain, host: Machine) -> None:
    session = await built(chain, host)
    repository = chain.backups[0].image.parent.parent
    assert session.in_use() == [str(each.image.relative_to(repository)) for each in reversed(chain.backups)]
    await session.close()
    assert session.in_use() == []


async def test_what_a_mount_takes_is_seen(chain: Chain, host: Machine, settings: config.Config) -> None:
    before = await host.resources()
    assert (before.overlay_used, before.overlay_limit) == (0, 0)
    session = await built(chain, host)
    mounted = await host.resources()
    assert mounted.memory > before.memory + 10 * MIB  # a reader and an image server at least
    assert mounted.overlay_limit == 64 * MIB
    assert 0 < mounted.overlay_used < 64 * MIB  # journals were replayed
    assert mounted.uids_free == before.uids_free - 1 == len(settings.readers.uids) - 1
    assert before.open_fds < mounted.open_fds < mounted.fds_limit
    await session.close()
    after = await host.resources()
    assert (after.overlay_used, after.overlay_limit, after.uids_free) == (0, 0, before.uids_free)
    assert after.open_fds == before.open_fds
    host.check_room(1, 1)


# --- where overlays lie


def on_a_disk(settings: config.Config, tmp_path: Path, size: int) -> config.Config:
    directory = tmp_path / "overlays"
    directory.mkdir()
    return replace(settings, attach=replace(settings.attach, overlay_dir=directory, overlay_size=size))


def views(session: Session) -> dict[str, str]:
    return {volume.name: volume.mounted.view for volume in session.volumes.values() if volume.mounted}


async def test_an_overlay_on_a_disk_takes_what_replay_writes_and_has_no_name(
    chain: Chain, settings: config.Config, tmp_path: Path
) -> None:
    settings = on_a_disk(settings, tmp_path, 64 * MIB)
    async with started(settings) as host:
        session = await built(chain, host)
        assert "replayed" in views(session).values()
        assert list((tmp_path / "overlays").iterdir()) == []
        taken = await host.resources()
        assert 0 < taken.overlay_used < taken.overlay_limit == 64 * MIB
        descriptor, _ = await session.open(FILE)
        assert os.read(descriptor, 100) == b"web01\n"
        os.close(descriptor)
        await session.close()
        assert (await host.resources()).overlay_used == 0
    assert chain.unchanged()


@pytest.mark.parametrize("where", ["memory", "disk"])
async def test_a_full_overlay_leaves_volumes_as_they_crashed(
    chain: Chain, settings: config.Config, tmp_path: Path, where: str
) -> None:
    """Whether it is the tmpfs that is full, or the limit of the server that is reached."""
    small = 704 << 10  # the empty overlay and little more
    if where == "disk":
        settings = on_a_disk(settings, tmp_path, small)
    else:
        settings = replace(settings, attach=replace(settings.attach, overlay_size=small))
    async with started(settings) as host:
        session = await built(chain, host)
        assert "as-crashed" in views(session).values()
        assert session.state is State.MOUNTED
        descriptor, _ = await session.open(FILE)
        assert os.read(descriptor, 100) == b"web01\n"
        os.close(descriptor)
        assert not session.lost.done()  # the server lives, though it met its limit
        assert 0 < (await host.resources()).overlay_used <= small
        await session.close()
    assert chain.unchanged()


async def test_without_its_directory_there_is_no_mount_and_nothing_is_left(
    chain: Chain, settings: config.Config, tmp_path: Path
) -> None:
    settings = on_a_disk(settings, tmp_path, 64 * MIB)
    (tmp_path / "overlays").rmdir()
    async with started(settings) as host:
        session = session_of(chain, host)
        with pytest.raises(errors.Unavailable, match=r"attach\.overlay_dir"):
            await session.build()
        await session.close()
        (said,) = host.sweep([])
        assert "attach.overlay_dir" in said


# --- what is left


async def test_the_sweep_leaves_a_living_mount_alone_even_if_it_is_not_told_of_it(
    chain: Chain, host: Machine
) -> None:
    session = await built(chain, host)
    assert host.sweep([session.id]) == []
    told = host.sweep([])
    assert len(told) == 2
    assert all("stays" in sentence for sentence in told)
    descriptor, _ = await session.open(FILE)
    os.close(descriptor)
    await session.close()


async def test_the_sweep_takes_away_what_no_mount_owns(
    host: Machine, settings: config.Config, tmp_path: Path
) -> None:
    runtime, mounts = settings.paths.runtime, settings.mounts.directory
    gone, live, foreign, nested = (str(uuid.uuid4()) for _ in range(4))
    for name in (gone, live, nested):
        host.workplace(name).make()
        (runtime / name / "probe-0").touch()
        (mounts / name / "partition-1").mkdir(parents=True)
    linux.mount("theirs", mounts / nested / "partition-1", "tmpfs")
    (runtime / foreign).mkdir()
    linux.mount("theirs", runtime / foreign, "tmpfs")
    (mounts / foreign).mkdir()
    (mounts / foreign / "file").touch()
    (runtime / "not-an-id").mkdir()
    (runtime / str(uuid.uuid4())).touch()  # a file
    (mounts / str(uuid.uuid4())).symlink_to(tmp_path)
    others = {*runtime.iterdir(), *mounts.iterdir()} - {runtime / gone, mounts / gone, runtime / nested}
    said = host.sweep([live])
    assert f"removed {runtime / gone}, which belonged to no mount" in said
    assert f"removed {mounts / gone}, which belonged to no mount" in said
    assert f"{mounts / nested} stays: partition-1 is still mounted" in said
    assert f"{runtime / foreign} stays: what is mounted there is not the service's own" in said
    assert {*runtime.iterdir(), *mounts.iterdir()} == others
    assert list((runtime / live).iterdir()) == [runtime / live / "probe-0"]

    linux.umount(mounts / nested / "partition-1")
    linux.umount(runtime / foreign)
    (mounts / foreign / "file").unlink()
    host.sweep([])
    left = {*runtime.iterdir(), *mounts.iterdir()}
    assert len(left) == 3  # what has another name, is a file, or a link
    for path in left:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


async def test_the_sweep_does_not_touch_a_directory_that_is_not_ours(host: Machine, settings: config.Config) -> None:
    runtime = settings.paths.runtime
    linux.mount("theirs", runtime, "tmpfs")
    theirs = runtime / str(uuid.uuid4())
    theirs.mkdir()
    (said,) = host.sweep([])
    assert "not the service's own" in said
    assert theirs.is_dir()
    linux.umount(runtime)


async def test_a_workplace_that_is_in_use_stays_until_it_is_not(host: Machine, settings: config.Config) -> None:
    name = str(uuid.uuid4())
    host.workplace(name).make()
    place = settings.paths.runtime / name
    with (place / "file").open("w"):
        assert host.sweep([]) == [f"{place} stays: Device or resource busy"]
    assert host.sweep([]) == [f"removed {place}, which belonged to no mount"]


async def test_the_end_of_the_keeper_is_the_end_of_the_machine(host: Machine) -> None:
    assert not host.lost.done()
    os.kill(host._keeper._child.pid, signal.SIGKILL)
    async with asyncio.timeout(SECONDS):
        assert "keeps the mount namespace" in await host.lost
