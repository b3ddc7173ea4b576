"""Which NBD devices are ours, on a sysfs made of files: every state, and who is faster."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import stat
from typing import TYPE_CHECKING, cast

import pytest

from sendense_restored import errors
from sendense_restored.daemon.host import nbd_pool
from sendense_restored.daemon.host.nbd_node import numbers_of, open_node
from sendense_restored.daemon.host.nbd_pool import NbdDevice, Pool
from sendense_restored.daemon.host.threads import Threads
from tests.nbd import FakeEvents, Sysfs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sendense_restored.daemon.host.udev import BlockEvents

CLIENT = 700
SIZE = 1 << 20


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path, devices=4, max_part=31)


@pytest.fixture
def events() -> FakeEvents:
    return FakeEvents()


def made(sysfs: Sysfs, events: FakeEvents, numbers: range = range(3)) -> Pool:
    return Pool(numbers, cast("BlockEvents", events), Threads(), **sysfs.places)


@pytest.fixture
async def pool(sysfs: Sysfs, events: FakeEvents) -> AsyncIterator[Pool]:
    pool = made(sysfs, events)
    yield pool
    await pool.close()


def one(pool: Pool, mount: str = "m") -> NbdDevice:
    found = pool.take(1, mount)
    assert found is not None
    return found[0]


def states(pool: Pool) -> list[tuple[str, str]]:
    return [(each.state, each.mount) for each in pool.states()]


# --- taking ---------------------------------------------------------------------------------------------------------


async def test_devices_are_taken_in_order_and_only_those_of_the_range(pool: Pool) -> None:
    taken = pool.take(2, "m1")
    assert taken is not None
    assert [device.path.name for device in taken] == ["nbd0", "nbd1"]
    assert one(pool, "m2").path.name == "nbd2"
    assert pool.take(1, "m3") is None
    assert states(pool) == [("ours", "m1"), ("ours", "m1"), ("ours", "m2")]


async def test_all_or_none(pool: Pool) -> None:
    one(pool)
    assert pool.take(3, "m2") is None
    assert states(pool) == [("ours", "m"), ("free", ""), ("free", "")]
    assert pool.take(2, "m2") is not None, "the locks of those that were not enough are let go"


async def test_what_the_module_says_is_read_once(sysfs: Sysfs, events: FakeEvents) -> None:
    pool = made(sysfs, events)
    assert pool.max_part == 31
    sysfs.parameter("max_part", 0)
    assert pool.max_part == 31


async def test_without_the_module_there_is_nothing(tmp_path: Path, events: FakeEvents) -> None:
    pool = made(Sysfs(tmp_path, devices=0, max_part=None), events)
    assert (pool.max_part, pool.numbers, pool.states()) == (0, [], [])
    assert pool.take(1, "m") is None


async def test_devices_that_the_kernel_has_not_are_not_in_the_pool(sysfs: Sysfs, events: FakeEvents) -> None:
    assert made(sysfs, events, range(2, 9)).numbers == [2, 3]


@pytest.mark.parametrize("how", ["a client and a size", "a client alone", "a size alone"])
async def test_a_device_of_others_is_skipped_and_told_once(
    pool: Pool, sysfs: Sysfs, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    sysfs.process(4000)
    sysfs.connect(0, 4000 if "client" in how else None, SIZE if "size" in how else 0)
    with caplog.at_level(logging.WARNING):
        assert one(pool).path.name == "nbd1"
        assert one(pool).path.name == "nbd2"
        assert pool.take(1, "m") is None
    assert len(caplog.records) == 1
    assert "not using nbd0" in caplog.text
    assert states(pool)[0] == ("foreign", "")


async def test_one_whose_client_has_ended_drains_whoever_had_it(pool: Pool, sysfs: Sysfs) -> None:
    """As after the death of another daemon, while somebody abroad still holds a file."""
    sysfs.connect(0, 4000, SIZE)
    assert states(pool)[0] == ("draining", "")
    assert one(pool).path.name == "nbd1"
    sysfs.disconnect(0)
    assert states(pool)[0] == ("free", "")
    assert one(pool).path.name == "nbd0"


# --- locks ----------------------------------------------------------------------------------------------------------


async def test_a_second_daemon_takes_others(pool: Pool, sysfs: Sysfs, events: FakeEvents) -> None:
    second = made(sysfs, events)
    assert one(pool).path.name == "nbd0"
    assert one(second).path.name == "nbd1"
    assert one(pool).path.name == "nbd2"
    assert second.take(1, "m") is None
    await second.close()


async def test_a_tool_that_holds_the_lock_is_left_alone(
    pool: Pool, sysfs: Sysfs, caplog: pytest.LogCaptureFixture
) -> None:
    sysfs.locks.mkdir()
    with (sysfs.locks / "nbd0").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with caplog.at_level(logging.WARNING):
            assert one(pool).path.name == "nbd1"
    assert "another program holds" in caplog.text
    assert one(pool).path.name == "nbd0"


async def test_who_connects_between_the_look_and_the_lock_keeps_the_device(
    pool: Pool, sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = pool._try_lock

    def late(number: int) -> int | None:
        if number == 0:
            sysfs.process(4000)
            sysfs.connect(0, 4000, SIZE)
        return lock(number)

    monkeypatch.setattr(pool, "_try_lock", late)
    assert one(pool).path.name == "nbd1"
    assert states(pool)[0] == ("foreign", "")


def plant(path: Path, kind: str) -> None:
    """What is not a lock, or a directory of locks."""
    victim = path.parent.parent / "victim"
    victim.write_text("untouched")
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        (path / "within").mkdir(parents=True)


@pytest.mark.parametrize("kind", ["link", "fifo", "directory of another user"])
async def test_what_others_put_in_the_place_of_the_locks_is_moved_aside(
    pool: Pool, sysfs: Sysfs, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant(sysfs.locks, kind)
    planted = sysfs.locks.lstat().st_ino
    if "user" in kind:
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with caplog.at_level(logging.WARNING):
        assert one(pool).path.name == "nbd0"
    monkeypatch.undo()
    (aside,) = sysfs.locks.parent.glob(f"{sysfs.locks.name}.*")
    assert aside.lstat().st_ino == planted
    assert [record.getMessage() for record in caplog.records] == [
        f"{sysfs.locks} was not ours: it is {aside.name} now"
    ]
    assert one(pool).path.name == "nbd1"


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
async def test_so_is_what_was_in_their_directory_before_it_was_root_s(pool: Pool, sysfs: Sysfs, kind: str) -> None:
    """systemd-tmpfiles makes a directory that it finds root's own, whatever is in it."""
    sysfs.locks.mkdir(mode=0o755)
    path = sysfs.locks / "nbd0"
    plant(path, kind)
    planted = path.lstat().st_ino
    assert one(pool).path.name == "nbd0"
    (aside,) = sysfs.locks.glob("nbd0.*")
    assert aside.lstat().st_ino == planted
    assert (sysfs.locks.parent / "victim").read_text() == "untouched"


async def test_a_lock_of_ours_is_never_replaced(pool: Pool, sysfs: Sysfs) -> None:
    """Another program of root's may be about to lock it."""
    sysfs.locks.mkdir()
    path = sysfs.locks / "nbd0"
    path.touch()
    before = path.stat().st_ino
    assert one(pool).path.name == "nbd0"
    assert path.stat().st_ino == before


async def test_what_cannot_be_moved_aside_leaves_the_devices_alone(
    pool: Pool, sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(path: Path, _target: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    plant(sysfs.locks, "fifo")
    monkeypatch.setattr(type(sysfs.locks), "rename", busy)
    with caplog.at_level(logging.WARNING):
        assert pool.take(1, "m") is None
        assert pool.take(1, "m") is None
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"not using nbd{number}: {sysfs.locks}: Device or resource busy" for number in range(3)]


async def test_locks_are_root_s_alone_and_not_inherited(pool: Pool, sysfs: Sysfs) -> None:
    before = os.umask(0)
    device = one(pool)
    os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (sysfs.locks, sysfs.locks / "nbd0")] == [0o700, 0o600]
    assert not os.get_inheritable(device._lock)


@pytest.mark.parametrize("bits", [0o755, 0o777])
async def test_nobody_else_reaches_them_in_a_directory_that_was_open_to_all(
    pool: Pool, sysfs: Sysfs, bits: int
) -> None:
    sysfs.locks.mkdir()
    sysfs.locks.chmod(bits)
    one(pool)
    assert stat.S_IMODE(sysfs.locks.stat().st_mode) == 0o700


# --- being served ---------------------------------------------------------------------------------------------------


async def test_a_device_is_served_when_client_and_size_are_right(pool: Pool, sysfs: Sysfs) -> None:
    device = one(pool)
    sysfs.process(CLIENT)
    assert not device.recognise(CLIENT, SIZE)
    sysfs.connect(0, CLIENT, 0)
    assert not device.recognise(CLIENT, SIZE), "the size is not there yet"
    sysfs.connect(0, CLIENT, SIZE // 2)
    assert not device.recognise(CLIENT, SIZE)
    sysfs.connect(0, CLIENT, SIZE)
    assert device.recognise(CLIENT, SIZE)
    assert not device.recognise(CLIENT + 1, SIZE)


async def test_the_kernel_may_name_a_thread_of_the_client(pool: Pool, sysfs: Sysfs) -> None:
    device = one(pool)
    sysfs.process(CLIENT + 5, leader=CLIENT)
    sysfs.connect(0, CLIENT + 5, SIZE)
    assert device.recognise(CLIENT, SIZE)
    assert not device.is_freed()


async def test_a_client_that_has_ended_already_serves_nothing(pool: Pool, sysfs: Sysfs) -> None:
    device = one(pool)
    sysfs.connect(0, CLIENT, SIZE)
    assert not device.recognise(CLIENT, SIZE)


@pytest.mark.parametrize("sectors", [2048, 2049])
async def test_what_is_left_over_beyond_the_last_sector_may_be_there_or_not(
    pool: Pool, sysfs: Sysfs, sectors: int
) -> None:
    device = one(pool)
    sysfs.process(CLIENT)
    sysfs.connect(0, CLIENT, sectors * 512)
    assert device.recognise(CLIENT, SIZE + 100)
    assert device.recognise(CLIENT, SIZE) == (sectors == 2048)


async def test_a_disk_of_less_than_a_sector_is_not_taken_for_one_without_a_size(pool: Pool, sysfs: Sysfs) -> None:
    device = one(pool)
    sysfs.process(CLIENT)
    sysfs.connect(0, CLIENT, 0)
    assert not device.recognise(CLIENT, 100)


async def test_a_partition_is_found_by_its_place_alone(pool: Pool, sysfs: Sysfs) -> None:
    device = one(pool)
    sysfs.partition(0, 1, start=2048, sectors=100)
    sysfs.partition(0, 2, start=4096, sectors=100)
    assert device.node_of(4096 * 512, 100 * 512) == (sysfs.dev / "nbd0p2", device.sysfs / "nbd0p2")
    assert device.node_of(4096 * 512, 101 * 512) is None
    assert device.node_of(4097 * 512, 100 * 512) is None
    assert device.node_of(4096 * 512 + 1, 100 * 512) is None
    sysfs.vanish(0, 2)
    assert device.node_of(4096 * 512, 100 * 512) is None


async def test_a_node_that_is_no_block_device_or_another_one_is_refused(sysfs: Sysfs, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such device"):
        open_node(sysfs.dev / "nbd0", numbers_of(sysfs.block(0)), os.O_RDONLY)
    link = tmp_path / "link"
    link.symlink_to(sysfs.dev / "nbd0")
    with pytest.raises(OSError, match="symbolic links"):
        open_node(link, (43, 0), os.O_RDONLY)


# --- giving back ----------------------------------------------------------------------------------------------------


async def served(pool: Pool, sysfs: Sysfs) -> NbdDevice:
    device = one(pool)
    sysfs.process(CLIENT)
    sysfs.connect(device.number, CLIENT, SIZE)
    assert device.recognise(CLIENT, SIZE)
    sysfs.process_ends(CLIENT)
    return device


async def test_one_that_never_was_connected_is_free_at_once(pool: Pool) -> None:
    assert await pool.give_back(one(pool)) is None
    assert states(pool)[0] == ("free", "")


async def test_one_that_the_kernel_has_freed_is_free(pool: Pool, sysfs: Sysfs) -> None:
    device = await served(pool, sysfs)
    assert not device.is_freed()
    sysfs.disconnect(0)
    assert await pool.give_back(device) is None
    assert await pool.give_back(device) is None, "again is nothing"
    assert states(pool)[0] == ("free", "")
    assert one(pool) is not device


async def test_one_that_is_held_abroad_drains_until_the_kernel_s_event_and_no_look_comes_without_one(
    pool: Pool, sysfs: Sysfs, events: FakeEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_pool, "_DETACH", 0.05)
    device = await served(pool, sysfs)
    assert await pool.give_back(device) is device
    assert states(pool)[0] == ("draining", "m")
    assert pool.take(3, "m2") is None
    waiting = asyncio.create_task(device.freed())
    await asyncio.sleep(0)  # one turn, in which it begins
    looks = events.looks
    await asyncio.wait({waiting}, timeout=0.1)  # the time that a look by the clock would have
    assert events.looks == looks
    events.happen()
    await events.seen()
    assert events.looks == looks + 2, "one each for the two who wait"
    assert not waiting.done()
    sysfs.disconnect(0)
    events.happen()
    await waiting
    await events.idle()
    assert states(pool)[0] == ("free", "")
    assert one(pool).path.name == "nbd0"


async def test_it_stays_locked_while_it_drains(
    pool: Pool, sysfs: Sysfs, events: FakeEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_pool, "_DETACH", 0.05)
    device = await served(pool, sysfs)
    await pool.give_back(device)
    second = made(sysfs, events)
    assert second.take(1, "other") is not None
    assert [each.state for each in second.states()] == ["draining", "ours", "free"]
    await second.close()


async def test_an_event_that_comes_before_the_end_of_the_change_is_followed_by_a_look_behind_the_lock(
    pool: Pool, sysfs: Sysfs, events: FakeEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells that the size has gone, and takes ``pid`` away a moment later without telling."""
    monkeypatch.setattr(nbd_pool, "_DETACH", 0.05)
    device = await served(pool, sysfs)
    await pool.give_back(device)

    def opened() -> None:  # which returns when the kernel has finished
        sysfs.disconnect(0)

    monkeypatch.setattr(device, "settle", opened)
    sysfs.size(0, 0)
    events.happen()
    async with asyncio.timeout(20):
        await device.freed()
    assert device.is_freed()


async def test_one_that_somebody_else_has_connected_meanwhile_is_free_of_us(pool: Pool, sysfs: Sysfs) -> None:
    device = await served(pool, sysfs)
    sysfs.process(4000)
    sysfs.connect(0, 4000, SIZE)
    assert device.is_freed()
    assert await pool.give_back(device) is None
    assert states(pool)[0] == ("foreign", "")


async def test_a_pool_that_closes_follows_nothing_any_more_and_lets_go_of_the_locks(
    sysfs: Sysfs, events: FakeEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_pool, "_DETACH", 0.05)
    pool = made(sysfs, events)
    device = await served(pool, sysfs)
    assert await pool.give_back(device) is device
    one(pool)
    await pool.close()
    second = made(sysfs, events, range(1, 2))
    assert second.take(1, "other") is not None
    await second.close()


async def test_too_many_threads_that_do_not_come_back_are_no_end_of_the_waiting(
    pool: Pool, sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_pool, "_DETACH", 0.05)
    monkeypatch.setattr(nbd_pool, "_PATIENCE", 0.05)
    device = await served(pool, sysfs)
    asked = 0

    def refuse() -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            sysfs.disconnect(0)
        raise errors.Unavailable("no")

    monkeypatch.setattr(device, "settle", refuse)
    sysfs.size(0, 0)
    async with asyncio.timeout(20):
        await pool.give_back(device)
        await device.freed()
        await pool.give_back(device)  # waits for the pool, which looks for itself
    assert states(pool)[0] == ("free", "")
