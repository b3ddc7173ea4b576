"""A daemon ends, in good order or not; the next one makes its mounts again. And the sweep, which mends the rest."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from typing import TYPE_CHECKING

import pytest

from sendense_restored import config, errors
from sendense_restored.daemon.events import MOST_TEXT, Actor
from sendense_restored.daemon.resume import PAUSE
from sendense_restored.daemon.session import State
from sendense_restored.daemon.store import MountStatus
from sendense_restored.reader.protocol import Filters
from tests.unit.house import ANNA, BERT, House, lose, opened, serves

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sendense_restored.daemon.mount import Mount


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path) as house:
        yield house


async def end(house: House, how: str) -> None:
    if how == "stopped":
        await house.mounts.stop()
    else:
        await house.crash()
    house.begin()


async def built(house: House, mount: Mount) -> None:
    await house.until(lambda: mount.session.state is not State.MOUNTING)


both_ways = pytest.mark.parametrize("how", ["stopped", "crashed"])


@both_ways
async def test_mounts_come_back_with_their_ids_and_claims(house: House, how: str) -> None:
    first = await house.mount(ANNA, idle_timeout=600)
    await house.mount(BERT, behalf="carol", idle_timeout=1200)
    second = await house.mount(BERT, "b2", all_disks=True, journal="as-crashed")
    created = first.session.created_at
    await end(house, how)
    assert await house.resume.load() == 2
    again = house.mounts.get(first.id)
    await built(house, again)
    assert await serves(again)
    assert {str(holder): claim.timeout for holder, claim in again.lease.claims.items()} == {
        f"uid {ANNA}": 600,
        f"uid {BERT} on behalf of carol": 1200,
    }
    assert again.session.created_at == created
    other = house.mounts.get(second.id)
    await built(house, other)
    assert other.session.wish.key == second.session.wish.key
    assert {row.status for row in await house.store.mount_rows()} == {MountStatus.MOUNTED}
    assert await house.mount(ANNA) is again


async def test_a_crash_while_a_long_stream_runs_leaves_the_mount_its_time(house: House) -> None:
    mount = await house.mount(ANNA, idle_timeout=600)
    directory = house.simulator.attachments[0].volumes[0]
    for number in range(3000):
        (directory / f"a-file-with-a-name-of-some-length-{number}").touch()
    pipe = await mount.open_listing(Actor(ANNA), (b"partition-1",), Filters())
    for _ in range(100):
        house.clock.advance(300)
        await house.settled()
    await house.crash()
    os.close(pipe)
    house.begin()
    house.clock.advance(299)
    assert await house.resume.load() == 1
    await built(house, house.mounts.get(mount.id))


@both_ways
async def test_the_time_goes_on_while_nobody_is_there(house: House, how: str) -> None:
    mount = await house.mount(ANNA, idle_timeout=600)
    await house.mount(BERT, idle_timeout=60)
    await end(house, how)
    house.clock.advance(100)
    await house.resume.load()
    again = house.mounts.get(mount.id)
    await built(house, again)
    assert again.lease.uids == {ANNA}
    house.clock.advance(499)
    assert await serves(again)
    house.clock.advance(1)
    await house.until(lambda: not list(house.mounts))


@both_ways
@pytest.mark.parametrize(
    ("seconds", "reason"), [(3600, "its time ran out"), (86_400, "there is no such mount|time ran out")]
)
async def test_what_is_over_is_not_made_again(house: House, how: str, seconds: int, reason: str) -> None:
    mount = await house.mount(ANNA)
    await end(house, how)
    house.clock.advance(seconds)
    assert await house.resume.load() == 0
    assert list(house.mounts) == []
    with pytest.raises((errors.Expired, errors.MountNotFound), match=reason):
        house.mounts.get(mount.id)
    assert await house.rows() == {}


async def test_the_longest_life_counts_from_its_beginning(house: House) -> None:
    mount = await house.mount(ANNA, idle_timeout=86_400)
    house.clock.advance(80_000)
    mount.touch(Actor(ANNA))
    await house.settled()
    await end(house, "stopped")
    await house.resume.load()
    again = house.mounts.get(mount.id)
    await built(house, again)
    assert again.lease.ends - house.clock.now() == pytest.approx(
        mount.session.created_at + 86_400 - house.clock.unix(), abs=1
    )


async def test_what_was_being_unmounted_or_had_failed_stays_gone(house: House) -> None:
    ending, failed = await house.mount(), await house.mount(backup="b2")
    await lose(house, failed)
    gate = house.simulator.stop_at("take_back")
    task = asyncio.create_task(house.unmount(ending))
    await gate.reached.wait()
    await house.crash()
    await asyncio.wait([task])
    gate.open()
    house.begin()
    assert await house.resume.load() == 0
    with pytest.raises(errors.Expired, match="being unmounted when the service ended"):
        house.mounts.get(ending.id)
    with pytest.raises(errors.Expired, match="it failed: the image server ended"):
        house.mounts.get(failed.id)
    assert await house.rows() == {}


async def test_what_ended_before_is_remembered_for_a_day(house: House) -> None:
    mount = await house.mount()
    await house.unmount(mount)
    await house.events.flush()
    house.begin()
    await house.resume.load()
    with pytest.raises(errors.Expired, match=f"unmounted by uid {ANNA}"):
        house.mounts.get(mount.id)
    house.clock.advance(86_401)
    with pytest.raises(errors.MountNotFound):
        house.mounts.get(mount.id)


async def test_one_after_the_other_each_attempt_written_down_before(house: House) -> None:
    mounts = [await house.mount(backup=backup) for backup in ("b1", "b2")]
    await end(house, "crashed")
    gate = house.simulator.stop_at("attach")
    await house.resume.load()
    await gate.reached.wait()
    attempts = sorted((row.resume_attempts, row.status) for row in await house.store.mount_rows())
    assert attempts == [(0, MountStatus.MOUNTED), (1, MountStatus.MOUNTING)]
    gate.open()
    for mount in mounts:
        await built(house, house.mounts.get(mount.id))


async def test_an_error_of_any_length_is_written_down_as_every_database_takes_it(house: House) -> None:
    mount = await house.mount()
    await house.mounts.failed(mount, "é" * 70_000)
    ((row, _),) = await house.store.wished()
    assert row.error_message.startswith("ééé")
    assert row.error_message.endswith("…")
    assert len(row.error_message.encode()) <= MOST_TEXT
    await house.unmount(mount)


async def test_two_crashes_while_it_is_made_are_enough(house: House) -> None:
    for backup in ("b1", "b2"):
        await house.mount(backup=backup)
    await end(house, "crashed")
    for _ in range(2):
        gate = house.simulator.stop_at("attach")
        await house.resume.load()
        await gate.reached.wait()
        await end(house, "crashed")
        gate.open()
    (blamed, tried), (spared, untried) = sorted(
        ((row.id, row.resume_attempts) for row in await house.store.mount_rows()), key=lambda each: -each[1]
    )
    assert (tried, untried) == (2, 0)
    await house.resume.load()
    bad, good = house.mounts.get(blamed), house.mounts.get(spared)
    await built(house, bad)
    assert (bad.session.state, "ended 2 times" in bad.session.error) == (State.FAILED, True)
    await built(house, good)
    assert await serves(good)


async def test_storage_that_comes_late_gets_a_second_chance(house: House) -> None:
    mount = await house.mount()
    await end(house, "stopped")
    house.simulator.refuse["open_image"] = errors.Unavailable("the storage cannot be read")
    await house.resume.load()
    again = house.mounts.get(mount.id)
    await house.becomes(lambda: (house.clock.next or 9999) <= PAUSE)
    assert (again.session.state, "not made again yet" in again.session.error) == (State.MOUNTING, True)
    house.simulator.refuse.clear()
    house.clock.advance(PAUSE)
    await house.until(lambda: again.session.state is State.MOUNTED)
    assert await serves(again)
    assert again.session.error == ""


async def test_what_cannot_be_made_again_says_so(house: House) -> None:
    mount = await house.mount()
    await end(house, "stopped")
    house.simulator.refuse["open_image"] = errors.ImageRefused("a backing file is missing")
    await house.resume.load()
    again = house.mounts.get(mount.id)
    await house.becomes(lambda: (house.clock.next or 9999) <= PAUSE)
    house.clock.advance(PAUSE)
    await house.until(lambda: again.session.state is State.FAILED)
    assert again.session.error == "it could not be made again: a backing file is missing"
    assert not house.simulator.standing


async def test_it_may_be_unmounted_before_its_turn(house: House) -> None:
    mounts = [await house.mount(backup=backup) for backup in ("b1", "b2")]
    await end(house, "stopped")
    gate = house.simulator.stop_at("attach")
    await house.resume.load()
    await gate.reached.wait()
    await house.unmount(house.mounts.get(mounts[1].id))
    gate.open()
    await built(house, house.mounts.get(mounts[0].id))
    assert set(await house.rows()) == {mounts[0].id}


async def test_a_stop_in_the_middle_keeps_the_wish(house: House) -> None:
    mounts = [await house.mount(backup=backup) for backup in ("b1", "b2")]
    await end(house, "stopped")
    gate = house.simulator.stop_at("attach")
    await house.resume.load()
    await gate.reached.wait()
    stopping = asyncio.create_task(house.mounts.stop())
    await asyncio.sleep(0)
    gate.open()
    await stopping
    house.begin()
    assert await house.resume.load() == 2
    for mount in mounts:
        await built(house, house.mounts.get(mount.id))
        assert await serves(house.mounts.get(mount.id))


async def test_a_catalogue_that_cannot_be_read_ends_no_wish(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = await house.mount()
    await end(house, "stopped")
    with monkeypatch.context() as patch:
        house.fail(patch, "backup")
        assert await house.resume.load() == 0
        assert set(await house.rows()) == {mount.id}
        await house.sweep.run()
        assert set(await house.rows()) == {mount.id}
    await house.sweep.run()
    again = house.mounts.get(mount.id)
    await built(house, again)
    assert await serves(again)


async def test_one_that_was_mounted_anew_meanwhile_is_not_made_a_second_time(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = await house.mount()
    await end(house, "stopped")
    with monkeypatch.context() as patch:
        house.fail(patch, "backup")
        await house.resume.load()
    new = await house.mount(BERT)
    await house.sweep.run()
    assert list(house.mounts) == [new]
    with pytest.raises(errors.Expired, match="mounted anew"):
        house.mounts.get(mount.id)
    assert set(await house.rows()) == {new.id}


async def test_a_backup_that_has_left_the_catalogue_takes_its_mount_along(house: House, tmp_path: Path) -> None:
    await house.mount()
    await end(house, "stopped")
    sql(tmp_path, "DELETE FROM backup_jobs WHERE id = 'b1'")
    assert await house.resume.load() == 0


# --- the sweep ------------------------------------------------------------------------------------------------------


def sql(tmp_path: Path, statement: str) -> None:
    """What another program does to the database."""
    connection = sqlite3.connect(tmp_path / "restore.db", isolation_level=None)
    connection.execute("PRAGMA foreign_keys = 1")
    connection.execute(statement)
    connection.close()


async def test_a_row_of_the_catalogue_that_means_nothing_ends_neither_start_nor_sweep(
    house: House, tmp_path: Path
) -> None:
    mount = await house.mount()
    other = await house.mount(BERT, "b2")
    await end(house, "crashed")
    sql(tmp_path, "UPDATE backup_disks SET size_gb = 1e300 WHERE backup_job_id = 'b1'")
    assert await house.resume.load() == 1
    await built(house, house.mounts.get(other.id))
    assert await house.sweep.run() == 0
    sql(tmp_path, "UPDATE backup_disks SET size_gb = 1 WHERE backup_job_id = 'b1'")
    await house.sweep.run()
    await built(house, house.mounts.get(mount.id))


@pytest.mark.parametrize("mount_id", ["../../../etc", "", "x", "{id}/..", "urn:uuid:{id}", "{ID}", "{{{id}}}"])
async def test_a_row_with_an_id_of_others_making_is_no_mount(house: House, tmp_path: Path, mount_id: str) -> None:
    mount = await house.mount()
    await end(house, "crashed")
    text = mount_id.format(id=mount.id, ID=mount.id.upper())
    if text == mount.id:  # no letters in it
        return
    connection = sqlite3.connect(tmp_path / "restore.db", isolation_level=None)
    connection.execute("UPDATE restore_mounts SET id = ?", (text,))
    connection.execute("UPDATE restore_claims SET mount_id = ?", (text,))
    connection.close()
    assert await house.resume.load() == 0
    assert await house.rows() == {}
    assert list(house.mounts) == []


async def test_rows_of_others_making_grant_no_more_than_the_service_would(house: House, tmp_path: Path) -> None:
    mount = await house.mount(idle_timeout=600)
    await house.mount(BERT, idle_timeout=600)
    await house.mount(1009, idle_timeout=600)
    await end(house, "crashed")
    sql(tmp_path, f"UPDATE restore_claims SET idle_timeout = 1e300, expires_at = NULL WHERE uid = {ANNA}")
    sql(tmp_path, f"UPDATE restore_claims SET idle_timeout = -1, expires_at = NULL WHERE uid = {BERT}")
    sql(tmp_path, "UPDATE restore_claims SET uid = 4294967295, expires_at = NULL WHERE uid = 1009")
    sql(tmp_path, "UPDATE restore_claims SET since = '0001-01-01 00:00:00.000000+00:00'")
    sql(tmp_path, "UPDATE restore_mounts SET resume_attempts = -1000000")
    await house.resume.load()
    again = house.mounts.get(mount.id)
    await built(house, again)
    assert {holder.uid: claim.timeout for holder, claim in again.lease.claims.items()} == {ANNA: 86_400, BERT: 60}
    assert all(claim.since >= 0 for claim in again.lease.claims.values())
    assert {row.resume_attempts for row in await house.store.mount_rows()} == {1}


async def test_a_backup_that_leaves_the_catalogue_closes_its_mount(house: House, tmp_path: Path) -> None:
    mount = await house.mount()
    house.simulator.busy.add("partition-1")
    sql(tmp_path, "DELETE FROM backup_jobs WHERE id = 'b1'")
    assert await house.sweep.run() == 0  # somebody reads
    house.simulator.busy.clear()
    assert await house.sweep.run() == 1
    with pytest.raises(errors.Expired, match="no longer in the catalogue"):
        house.mounts.get(mount.id)


async def test_a_row_that_somebody_deleted_is_written_again(house: House, tmp_path: Path) -> None:
    mount = await house.mount(idle_timeout=600)
    (before,) = await house.store.mount_rows()
    sql(tmp_path, "DELETE FROM restore_mounts")
    assert await house.sweep.run() == 0
    (after,) = await house.store.mount_rows()
    assert after == before
    assert await house.claimed(mount) == [ANNA]


async def test_a_row_that_is_no_mount_is_deleted(house: House, tmp_path: Path) -> None:
    mount = await house.mount()
    sql(
        tmp_path,
        "INSERT INTO restore_mounts SELECT 'x', backup_id, backup_disk_id, disk_index, mount_path, nbd_device,"
        " filesystem_type, mount_mode, status, error_message, created_at, last_accessed_at, expires_at, journal,"
        " resume_attempts, options FROM restore_mounts",
    )
    assert await house.sweep.run() == 0
    assert set(await house.rows()) == {mount.id}
    assert house.simulator.swept == [{mount.id}]


async def test_a_row_with_a_claim_that_somebody_wrote_is_deleted_and_not_mounted(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write the table may not mount by that: nobody has asked polkit."""
    mount = await house.mount(idle_timeout=7200)
    await end(house, "crashed")
    with monkeypatch.context() as patch:  # one waits, which is another matter
        house.fail(patch, "backup")
        await house.resume.load()
    sql(
        tmp_path,
        "INSERT INTO restore_mounts SELECT 'x', 'b2', NULL, NULL, mount_path, nbd_device, filesystem_type,"
        " mount_mode, 'mounted', '', created_at, last_accessed_at, expires_at, journal, 0, options"
        " FROM restore_mounts",
    )
    sql(
        tmp_path,
        "INSERT INTO restore_claims SELECT 'x', uid, on_behalf_of, since, expires_at, idle_timeout"
        " FROM restore_claims",
    )
    await house.sweep.run()
    assert set(await house.rows()) == {mount.id}
    assert [each.id for each in house.mounts] == [mount.id]
    await built(house, house.mounts.get(mount.id))


async def test_an_own_database_that_is_locked_in_the_midst_ends_no_wish(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await house.mount(idle_timeout=7200), await house.mount(backup="b2", idle_timeout=7200)
    await house.mount(BERT, backup="b2", idle_timeout=60)
    await end(house, "crashed")
    with monkeypatch.context() as patch:
        house.fail(patch, "backup")
        assert await house.resume.load() == 0
    house.clock.advance(60)
    with monkeypatch.context() as patch:
        house.fail(patch, "delete_claim")
        with pytest.raises(errors.CatalogUnavailable):
            await house.sweep.run()
    await house.sweep.run()
    for mount in (first, second):
        again = house.mounts.get(mount.id)
        await built(house, again)
        assert await serves(again)
    assert set(await house.rows()) == {first.id, second.id}


async def test_a_state_that_somebody_changed_is_set_right(house: House, tmp_path: Path) -> None:
    mount = await house.mount()
    sql(tmp_path, "UPDATE restore_mounts SET status = 'failed'")
    await house.sweep.run()
    assert await house.rows() == {mount.id: MountStatus.MOUNTED}


async def test_what_could_not_be_taken_away_is_tried_again(house: House) -> None:
    mount = await house.mount()
    house.simulator.refuse["free"] = errors.Busy("the device is still in use")
    with pytest.raises(errors.Busy):
        await house.unmount(mount)
    assert mount.session.state is State.UNMOUNTING
    assert await house.sweep.run() == 0
    house.simulator.refuse.clear()
    assert await house.sweep.run() == 1
    await house.nothing_is_left()


async def test_a_mount_that_has_lived_long_enough_is_no_longer_suspected(house: House) -> None:
    mount = await house.mount(idle_timeout=7200)
    await end(house, "crashed")
    await house.resume.load()
    await built(house, house.mounts.get(mount.id))
    await house.sweep.run()
    (row,) = await house.store.mount_rows()
    assert row.resume_attempts == 1
    house.clock.advance(601)
    await house.sweep.run()
    (row,) = await house.store.mount_rows()
    assert row.resume_attempts == 0


async def test_it_runs_by_the_clock_and_goes_on_after_a_failure(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = asyncio.Event()
    results: list[Exception | None] = [errors.CatalogUnavailable("locked"), None]

    async def rows() -> list[object]:
        ran.set()
        if error := results.pop(0):
            raise error
        return []

    monkeypatch.setattr(house.store, "mount_rows", rows)
    house.sweep.start()
    assert house.sweep.next == int(house.clock.unix()) + 900
    for _ in range(2):
        house.clock.advance(900)
        await ran.wait()
        ran.clear()
        await house.becomes(lambda: house.sweep.next == int(house.clock.unix()) + 900)
    assert results == []


async def test_another_interval_counts_from_now_on(house: House) -> None:
    house.sweep.start()
    settings = config.Mounts(directory=house.simulator.mounts, sweep_interval=60)
    house.mounts.reload(config.Config(mounts=settings))
    house.sweep.reload()
    assert house.sweep.next == int(house.clock.unix()) + 60


async def test_the_history_is_kept_short(house: House) -> None:
    house.mounts.reload(config.Config(events=config.Events(keep=100), mounts=house.settings.mounts))
    for _ in range(150):
        house.events.record("tested", actor=Actor(ANNA))
    await house.events.flush()
    await house.sweep.run()
    assert len((await house.store.events(limit=1000))[0]) == 100


# A catalogue that is away


async def test_a_catalogue_that_is_away_ends_no_mount(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = await house.mount()
    with monkeypatch.context() as patch:
        house.fail(patch, "backup_ids")
        for _ in range(2):
            assert await house.sweep.run() == 0
        assert await serves(mount)
        # All else is looked after meanwhile.
        await house.store.delete_mount(mount.id)
        assert await house.sweep.run() == 0
        assert await house.rows() == {mount.id: MountStatus.MOUNTED}
    await house.unmount(mount)
    await house.nothing_is_left()


async def test_what_a_catalogue_that_is_away_keeps_from_coming_back_comes_soon_after_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = await house.mount(idle_timeout=7200)
    await end(house, "crashed")
    with monkeypatch.context() as patch:
        house.fail(patch, "backup")
        assert await house.resume.load() == 0
        for _ in range(2):
            with pytest.raises(errors.Unavailable, match="not made again yet"):
                house.mounts.get(mount.id)
            with pytest.raises(errors.MountNotFound):
                house.mounts.get("another")
            await house.sweep.run()
        house.sweep.start()
        assert house.sweep.next == int(house.clock.unix() + PAUSE)
        house.clock.advance(PAUSE)  # and again, as long as it is away
        await house.becomes(lambda: house.sweep.next == int(house.clock.unix() + PAUSE))
    house.clock.advance(PAUSE)
    await house.becomes(lambda: mount.id in {each.id for each in house.mounts})
    again = house.mounts.get(mount.id)
    await built(house, again)
    assert await serves(again)
    await house.becomes(lambda: house.sweep.next == int(house.clock.unix()) + 900)


async def test_what_was_removed_while_the_catalogue_was_away_is_gone_when_it_is_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = await house.mount()
    await end(house, "crashed")
    with monkeypatch.context() as patch:
        house.fail(patch, "backup")
        await house.resume.load()
        await house.sweep.run()
    await house.store.delete_mount(mount.id)  # with its backup, where the row refers to it
    await house.sweep.run()
    with pytest.raises(errors.MountNotFound):
        house.mounts.get(mount.id)
    await house.nothing_is_left()
