"""All mounts: one flight per key, claims, and the one way in which a mount ends, over a simulated host."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest

from sendense_restored import errors
from sendense_restored.daemon.events import Actor
from sendense_restored.daemon.host.filesystem import MountRefused
from sendense_restored.daemon.lease import Holder
from sendense_restored.daemon.session import State
from sendense_restored.daemon.store import MountStatus
from tests import simulator as sim
from tests.unit.house import ANNA, BERT, CARL, House, lose, opened, serves, start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path) as house:
        yield house


# --- mounting -------------------------------------------------------------------------------------------------------


async def test_a_mount_is_written_down_before_it_is_built_and_after_it_stands(house: House) -> None:
    gate = house.simulator.stop_at("attach")
    mounting = start(house.mount())
    await gate.reached.wait()
    (row,) = await house.store.mount_rows()
    assert (row.status, row.backup_id, row.disk_index, row.journal) == (MountStatus.MOUNTING, "b1", 0, "replay")
    gate.open()
    mount = await mounting
    (row,) = await house.store.mount_rows()
    assert (row.id, row.status, row.mount_path) == (mount.id, MountStatus.MOUNTED, str(mount.session.path))
    assert row.filesystem_type == "xfs"  # that of the larger one
    assert len(row.options["devices"]) == 2
    assert row.nbd_device == row.options["devices"][0]
    assert await house.claimed(mount) == [ANNA]
    assert house.heard[0] == ("added", mount.id)
    assert house.heard[-1] == ("mounted", mount.id)
    assert await serves(mount)


async def test_what_is_written_of_a_claim_s_time_begins_when_the_mount_stands(house: House) -> None:
    gate = house.simulator.stop_at("attach")
    mounting = start(house.mount())
    await gate.reached.wait()
    house.clock.advance(100)
    gate.open()
    mount = await mounting
    (claim,) = await house.store.claims(mount.id)
    assert claim.expires_at is not None
    left = claim.expires_at.timestamp() - house.clock.unix()
    assert left == mount.lease.claims[Holder(ANNA)].timeout, "a crash now would cost it the time of the mounting"


async def test_all_disks_have_a_row_without_a_disk(house: House) -> None:
    mount = await house.mount(all_disks=True)
    (row,) = await house.store.mount_rows()
    assert (row.disk_index, row.backup_disk_id) == (None, None)
    assert set(mount.session.volumes) == {
        *("disk-0-partition-1", "disk-0-partition-2", "disk-0-partition-3", "disk-1-partition-1")
    }


async def test_two_who_ask_for_the_same_get_the_same(house: House) -> None:
    gate = house.simulator.stop_at("mount partition-1")
    first, second = start(house.mount(ANNA)), start(house.mount(BERT))
    await gate.reached.wait()
    gate.open()
    assert await first is await second
    mount = await house.mount(CARL)
    assert mount is first.result()
    assert house.simulator.steps.count("attach") == 1
    assert await house.claimed(mount) == [ANNA, BERT, CARL]


@pytest.mark.parametrize(
    "other",
    [{"backup": "b2"}, {"disk": 1}, {"all_disks": True}, {"journal": "as-crashed"}],
    ids=["backup", "disk", "all disks", "journal"],
)
async def test_what_differs_is_another_mount(house: House, other: dict[str, Any]) -> None:
    first, second = await house.mount(), await house.mount(**other)
    assert first is not second
    assert len(await house.rows()) == 2


async def test_the_same_user_twice_is_one_claim(house: House) -> None:
    mount = await house.mount()
    since = mount.lease.claims[Holder(ANNA)].since
    house.clock.advance(100)
    assert await house.mount() is mount
    assert {holder: claim.since for holder, claim in mount.lease.claims.items()} == {Holder(ANNA): since}
    await house.unmount(mount)
    await house.nothing_is_left()


async def test_a_backup_or_disk_that_is_not_there(house: House) -> None:
    with pytest.raises(errors.BackupNotFound):
        await house.mount(backup="nothing")
    with pytest.raises(errors.BackupNotFound, match="no disk 2; it has 0, 1"):
        await house.mount(disk=2)
    await house.nothing_is_left()


@pytest.mark.parametrize("what", ["backup", "disk", "repository"])
async def test_what_is_not_complete_or_enabled_is_not_mounted(house: House, what: str) -> None:
    wish = await house.mounts.wish("b1", disk_index=0, all_disks=False, journal="replay")
    if what == "backup":
        wish = dataclasses.replace(wish, backup=dataclasses.replace(wish.backup, status="running"))
    elif what == "disk":
        wish = dataclasses.replace(wish, disks=(dataclasses.replace(wish.disks[0], status="failed"),))
    else:
        wish = dataclasses.replace(wish, repository=dataclasses.replace(wish.repository, enabled=False))
    with pytest.raises(errors.BackupNotReady):
        await house.mounts.mount(wish, Actor(ANNA))
    await house.nothing_is_left()


FAILURES = [
    errors.NoDevice("none is free"),
    OSError(28, "No space left on device"),
    sim.refused(),
    ZeroDivisionError("a bug"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("step", sim.BUILD_STEPS)
async def test_whatever_fails_in_building_everybody_is_told_and_nothing_is_left(
    house: House, step: str, failure: Exception
) -> None:
    house.simulator.refuse[step] = failure
    gate = house.simulator.stop_at("open_image")
    waiting = [start(house.mount(uid)) for uid in (ANNA, BERT)]
    if step != "workplace":
        await gate.reached.wait()
    gate.open()
    told = await asyncio.gather(*waiting, return_exceptions=True)
    if step in {"slice", "mount"} and isinstance(failure, MountRefused):
        assert {type(each) for each in told} == {errors.NoMountableVolume}
    else:
        assert told == [failure, failure]
    failed = await house.it_has_failed()
    if isinstance(failure, errors.RestoreError):
        assert failed.session.error == failure.message
    else:
        assert str(failure) not in failed.session.error
    del house.simulator.refuse[step]
    again = await house.mount()
    assert await serves(again)
    assert list(house.mounts) == [again]  # it takes the place of the one that failed
    assert [what for what, _ in house.heard].count("removed") == 1


@pytest.mark.parametrize("step", sim.BUILD_STEPS[1:])
async def test_unmounting_while_mounting_tells_those_who_wait_and_leaves_nothing(house: House, step: str) -> None:
    gate = house.simulator.stop_at(step)
    waiting = [start(house.mount(uid)) for uid in (ANNA, BERT)]
    await gate.reached.wait()
    (mount,) = house.mounts
    await house.until(lambda: len(mount.lease.claims) == 2)
    await house.unmount(mount, CARL)  # who has no claim, so it ends for all
    for told in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(told, errors.Cancelled)
    gate.open()
    await house.nothing_is_left()
    assert await serves(await house.mount())


async def test_unmounting_in_the_moment_of_mounting(house: House) -> None:
    """Before the build has taken its first step."""
    wish = await house.mounts.wish("b1", disk_index=0, all_disks=False, journal="replay")
    mounting = start(house.mounts.mount(wish, Actor(ANNA)))
    await house.until(lambda: len(house.mounts) == 1)
    (mount,) = house.mounts
    await house.unmount(mount)
    with pytest.raises(errors.Cancelled):
        await mounting
    await house.nothing_is_left()


async def test_one_of_two_who_wait_may_leave(house: House) -> None:
    gate = house.simulator.stop_at("attach")
    waiting = [start(house.mount(uid)) for uid in (ANNA, BERT)]
    await gate.reached.wait()
    (mount,) = house.mounts
    await house.until(lambda: len(mount.lease.claims) == 2)
    await house.unmount(mount, ANNA)
    gate.open()
    with pytest.raises(errors.Cancelled):
        await waiting[0]
    assert await waiting[1] is mount
    assert await house.claimed(mount) == [BERT]


async def test_a_caller_who_gives_up_does_not_stop_the_flight(house: House) -> None:
    gate = house.simulator.stop_at("attach")
    mounting = start(house.mount())
    await gate.reached.wait()
    mounting.cancel()
    await asyncio.wait([mounting])
    assert mounting.cancelled()
    gate.open()
    mount = await house.mount(BERT)
    assert await serves(mount)
    assert mount.lease.uids == {ANNA, BERT}  # ANNA finds it when she asks again
    await house.unmount(mount, BERT)
    assert await serves(mount)
    await house.unmount(mount, ANNA)
    await house.nothing_is_left()


async def test_a_refused_build_that_cannot_be_taken_away_stays_until_it_can(house: House) -> None:
    house.simulator.refuse |= {"give": errors.Timeout("no answer"), "detach": OSError(5, "Input/output error")}
    with pytest.raises(errors.Timeout, match="no answer"):
        await house.mount()
    (mount,) = house.mounts
    assert mount.session.state is State.FAILED
    assert mount.session.error
    with pytest.raises(errors.Failed, match="unmount it again"):
        await house.unmount(mount)
    house.simulator.refuse.clear()
    await house.unmount(mount)
    await house.nothing_is_left()


# --- limits ---------------------------------------------------------------------------------------------------------


async def test_there_are_so_many_mounts_and_no_more(house: House) -> None:
    mounted = [await house.mount(backup=backup) for backup in ("b1", "b2", "b3")]
    with pytest.raises(errors.LimitReached, match="all 3 mounts"):
        await house.mount(backup="b4")
    assert await house.mount(BERT, "b1") is mounted[0]  # joining takes none
    await house.unmount(mounted[2])
    assert await serves(await house.mount(backup="b4"))


async def test_those_under_way_count(house: House) -> None:
    gate = house.simulator.stop_at("attach")
    waiting = [start(house.mount(backup=backup)) for backup in ("b1", "b2", "b3", "b4")]
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert [type(task.exception()) for task in done] == [errors.LimitReached]
    gate.open()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_failed_one_does_not_count(house: House) -> None:
    mounted = [await house.mount(backup=backup) for backup in ("b1", "b2", "b3")]
    await lose(house, mounted[1])
    assert await serves(await house.mount(backup="b4"))


# --- unmounting -----------------------------------------------------------------------------------------------------


async def test_the_last_claim_closes_the_mount(house: House) -> None:
    mount = await house.mount(ANNA)
    await house.mount(BERT)
    await house.unmount(mount, ANNA)
    assert await serves(mount)
    assert await house.claimed(mount) == [BERT]
    await house.unmount(mount, BERT)
    await house.nothing_is_left()
    assert [what for what, _ in house.heard].count("removed") == 1
    with pytest.raises(errors.Expired, match=f"unmounted by uid {BERT}"):
        house.mounts.get(mount.id)


async def test_unmounting_without_a_claim_closes_it_for_all(house: House) -> None:
    mount = await house.mount(ANNA)
    await house.mount(BERT)
    await house.unmount(mount, CARL)
    await house.nothing_is_left()


async def test_force_closes_it_for_all_and_whoever_reads(house: House) -> None:
    mount = await house.mount(ANNA)
    await house.mount(BERT)
    house.simulator.busy.add("partition-1")
    await house.unmount(mount, ANNA, force=True)
    await house.nothing_is_left()


async def test_busy_leaves_everything_as_it_was(house: House) -> None:
    mount = await house.mount()
    house.simulator.busy.add("partition-2")
    for _ in range(2):
        with pytest.raises(errors.Busy):
            await house.unmount(mount)
        assert mount.session.busy
        assert await serves(mount)
        assert await serves(mount, b"partition-2")
        assert await house.claimed(mount) == [ANNA]
        assert await house.rows() == {mount.id: MountStatus.MOUNTED}
    assert await house.mount(BERT) is mount
    house.simulator.busy.clear()
    await house.unmount(mount, ANNA)
    await house.unmount(mount, BERT)
    await house.nothing_is_left()
    assert not mount.session.busy


async def test_those_who_unmount_at_once_all_learn_how_it_went(house: House) -> None:
    mount = await house.mount()
    house.simulator.busy.add("partition-1")
    gate = house.simulator.stop_at("unmount partition-1")
    ending = [start(house.unmount(mount)) for _ in range(3)]
    await gate.reached.wait()
    gate.open()
    assert [type(told) for told in await asyncio.gather(*ending, return_exceptions=True)] == [errors.Busy] * 3
    house.simulator.busy.clear()
    assert await asyncio.gather(*(house.unmount(mount) for _ in range(3))) == [None] * 3
    await house.nothing_is_left()


async def test_a_caller_who_gives_up_does_not_leave_a_mount_half_closed(house: House) -> None:
    mount = await house.mount()
    gate = house.simulator.stop_at("free")
    ending = start(house.unmount(mount))
    await gate.reached.wait()
    ending.cancel()
    await asyncio.wait([ending])
    gate.open()
    await house.until(lambda: len(house.mounts) == 0)
    assert mount.ending is not None
    await asyncio.wait([mount.ending])
    await house.nothing_is_left()


@pytest.mark.parametrize("step", [*sim.CLOSE_STEPS, "leave workplace"])
async def test_a_mount_that_cannot_be_taken_away_is_kept_and_the_next_attempt_goes_on(
    house: House, step: str
) -> None:
    mount = await house.mount()
    house.simulator.refuse[step] = OSError(5, "Input/output error", "/dev/loop7")
    with pytest.raises(errors.Failed) as told:
        await house.unmount(mount)
    assert "/dev" not in told.value.message
    assert (mount.session.state, house.mounts.get(mount.id)) == (State.FAILED, mount)
    assert set(await house.rows()) == {mount.id}
    del house.simulator.refuse[step]
    await house.unmount(mount)
    await house.nothing_is_left()


@pytest.mark.parametrize("step", ["take_back", "unmount partition-1"])
async def test_a_device_that_does_not_answer_is_left_to_force(house: House, step: str) -> None:
    mount = await house.mount()
    house.simulator.refuse[step] = errors.Timeout("it does not answer; unmount with force")
    with pytest.raises(errors.Timeout):
        await house.unmount(mount)
    await house.unmount(mount, force=True)
    await house.nothing_is_left()


async def test_who_mounts_what_is_just_being_unmounted_waits_and_gets_a_new_one(house: House) -> None:
    old = await house.mount()
    gate = house.simulator.stop_at("detach")
    ending = start(house.unmount(old))
    mounting = start(house.mount(BERT))
    await gate.reached.wait()
    gate.open()
    await ending
    new = await mounting
    assert new is not old
    assert await serves(new)
    assert await house.claimed(new) == [BERT]


async def test_who_mounts_in_the_moment_of_the_unmount_gets_one_that_works(house: House) -> None:
    """Between the decision to close a mount and the first step of doing so."""
    old = await house.mount()
    wish = old.session.wish
    ending = start(house.unmount(old))
    await asyncio.sleep(0)
    assert old.ending is not None
    new = await house.mounts.mount(wish, Actor(BERT))
    await ending
    assert new is not old
    assert await serves(new)


async def test_who_mounts_what_turns_out_to_be_busy_joins_it(house: House) -> None:
    mount = await house.mount()
    house.simulator.busy.add("partition-2")
    gate = house.simulator.stop_at("unmount partition-2")
    ending = start(house.unmount(mount))
    await gate.reached.wait()
    mounting = start(house.mount(BERT))
    await asyncio.sleep(0)
    gate.open()
    with pytest.raises(errors.Busy):
        await ending
    assert await mounting is mount
    assert await serves(mount)


async def test_who_joins_one_does_not_wait_for_the_end_of_a_failed_one_beside_it(house: House) -> None:
    failed = await house.mount()
    house.simulator.refuse["detach"] = OSError(5, "Input/output error")  # else a new one takes its place
    await lose(house, failed)
    house.simulator.refuse.clear()
    whole = await house.mount()
    ending = start(house.unmount(failed))
    await asyncio.sleep(0)
    assert failed.closing is not None
    mounting = start(house.mounts.mount(whole.session.wish, Actor(BERT)))
    await asyncio.sleep(0)
    assert whole.lease.uids == {ANNA, BERT}
    assert await mounting is whole
    await ending


async def test_who_mounts_while_a_refused_one_is_taken_away_gets_a_new_one(house: House) -> None:
    house.simulator.refuse["give"] = errors.Timeout("no answer")
    gate = house.simulator.stop_at("detach")
    first = start(house.mount())
    await gate.reached.wait()
    house.simulator.refuse.clear()
    second = start(house.mount(BERT))
    gate.open()
    with pytest.raises(errors.Timeout):
        await first
    assert await serves(await second)


async def test_unmounting_one_that_is_being_rolled_back_lets_that_finish(house: House) -> None:
    house.simulator.refuse["give"] = errors.NoDevice("none is free")
    gate = house.simulator.stop_at("detach")
    mounting = start(house.mount())
    await gate.reached.wait()
    (mount,) = house.mounts
    ending = start(house.unmount(mount))
    await asyncio.sleep(0)
    assert mount.ending is not None
    await asyncio.sleep(0)
    gate.open()
    await ending
    with pytest.raises(errors.NoDevice):  # which is why it ended
        await mounting
    assert house.simulator.steps.count("detach") == 1
    await house.nothing_is_left()


# --- parts that are lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["server", "reader", "driver"])
async def test_a_mount_that_has_lost_a_part_has_failed_and_tells_why(house: House, part: str) -> None:
    mount = await house.mount()
    house.simulator.busy.add("partition-1")
    await lose(house, mount, part)
    assert mount.session.state is State.FAILED
    assert mount.session.error == f"the {'image server' if part == 'server' else part} ended"
    assert not house.simulator.standing
    (row,) = await house.store.mount_rows()
    assert (row.status, row.error_message) == (MountStatus.FAILED, mount.session.error)
    assert house.heard[-1] == ("failed", mount.id)
    with pytest.raises(errors.Unavailable, match="ended"):
        await mount.session.list((b"partition-1",), limit=1, cursor="")
    house.simulator.busy.clear()
    again = await house.mount(BERT)
    assert again is not mount
    assert await serves(again)
    with pytest.raises(errors.Expired, match=f"it failed: {mount.session.error}"):
        house.mounts.get(mount.id)
    await house.settled()
    assert set(await house.rows()) == {again.id}


async def test_a_part_lost_while_building_is_no_success(house: House) -> None:
    gate = house.simulator.stop_at("give")
    mounting = start(house.mount())
    await gate.reached.wait()
    house.simulator.attachments[0].die("the image server ended")
    gate.open()
    with pytest.raises(errors.Unavailable, match="the image server ended"):
        await mounting
    await house.it_has_failed()


async def test_a_part_lost_while_closing_does_not_stop_that(house: House) -> None:
    mount = await house.mount()
    gate = house.simulator.stop_at("take_back")
    ending = start(house.unmount(mount))
    await gate.reached.wait()
    house.simulator.readers[0].die("the reader ended")
    gate.open()
    await ending
    await house.nothing_is_left()


async def test_a_part_lost_while_a_close_is_refused_fails_the_mount(house: House) -> None:
    mount = await house.mount()
    house.simulator.busy.add("partition-2")
    gate = house.simulator.stop_at("unmount partition-2")
    ending = start(house.unmount(mount))
    await gate.reached.wait()
    house.simulator.attachments[0].die("the image server ended")
    await asyncio.sleep(0)
    gate.open()
    with pytest.raises(errors.Busy):
        await ending
    assert mount.ending is not None
    await asyncio.wait([mount.ending])
    assert mount.session.state is State.FAILED
    assert not house.simulator.standing
    await house.unmount(mount)


@pytest.mark.parametrize(
    "failure", [OSError(5, "Input/output error"), errors.Busy("the server cannot be ended")], ids=["OSError", "Busy"]
)
async def test_a_failed_mount_that_cannot_be_freed_is_failed_all_the_same(house: House, failure: Exception) -> None:
    mount = await house.mount()
    house.simulator.refuse["detach"] = failure
    await lose(house, mount)
    assert mount.session.state is State.FAILED
    assert (await house.rows())[mount.id] is MountStatus.FAILED
    house.simulator.refuse.clear()
    await house.unmount(mount)
    await house.nothing_is_left()


async def test_a_failed_mount_is_unmounted_whoever_still_reads(house: House) -> None:
    """They get errors anyway, as its server is gone."""
    mount = await house.mount()
    house.simulator.busy.add("partition-1")
    house.simulator.refuse["abandon"] = OSError(5, "Input/output error")
    await lose(house, mount)
    assert any(what.startswith("mount ") for what in house.simulator.standing)
    house.simulator.refuse.clear()
    await house.unmount(mount)
    await house.nothing_is_left()


async def test_a_failed_mount_is_not_mentioned_to_the_catalogue_if_that_does_not_answer(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = await house.mount()
    house.fail(monkeypatch, "update_mount", errors.MountNotFound("no such row"))
    await lose(house, mount)
    assert mount.session.state is State.FAILED
    assert mount.ending is not None
    assert mount.ending.exception() is None


# --- the store fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["backup", "repository", "insert_mount", "renew"])
async def test_a_mount_that_cannot_be_written_down_is_not_made(
    house: House, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    with monkeypatch.context() as patch:
        house.fail(patch, method)
        with pytest.raises(errors.CatalogUnavailable):
            await house.mount()
    if method in {"backup", "repository"}:
        await house.nothing_is_left()
    else:
        assert not house.simulator.standing
        assert "catalogue" in next(iter(house.mounts)).session.error
    assert await serves(await house.mount())


async def test_a_claim_that_cannot_be_written_down_counts_all_the_same(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        house.fail(patch, "put_claim")
        mount = await house.mount(ANNA)
        await house.mount(BERT)
    assert await serves(mount)
    assert mount.lease.uids == {ANNA, BERT}
    await house.unmount(mount, BERT)
    assert await serves(mount)
    await house.unmount(mount, ANNA)


async def test_a_claim_that_cannot_be_struck_out_is_dropped_all_the_same(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = await house.mount(ANNA)
    await house.mount(BERT)
    with monkeypatch.context() as patch:
        house.fail(patch, "delete_claim")
        await house.unmount(mount, ANNA)
    assert mount.lease.uids == {BERT}
    await house.unmount(mount, BERT)
    await house.nothing_is_left()


async def test_a_row_that_cannot_be_deleted_keeps_no_mount(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = await house.mount()
    with monkeypatch.context() as patch:
        house.fail(patch, "delete_mount")
        await house.unmount(mount)
    assert not house.simulator.standing
    assert list(house.mounts) == []
    assert await house.rows() == {mount.id: MountStatus.UNMOUNTING}  # over, as the next start sees


async def test_a_row_that_somebody_else_deleted_is_not_missed(house: House, tmp_path: Path) -> None:
    mount = await house.mount()
    connection = sqlite3.connect(tmp_path / "restore.db", isolation_level=None)
    connection.execute("DELETE FROM restore_mounts")
    connection.close()
    assert await house.mount(BERT) is mount
    assert await serves(mount)
    await house.unmount(mount, BERT)
    await house.unmount(mount, ANNA)
    await house.nothing_is_left()


# --- the end --------------------------------------------------------------------------------------------------------


async def test_stopping_ends_all_mounts_whatever_state_they_are_in(house: House) -> None:
    whole = await house.mount()
    busy = await house.mount(backup="b2", disk=1)
    house.simulator.busy.add(f"{busy.id}/partition-1")
    gate = house.simulator.stop_at("attach")
    mounting = start(house.mount(backup="b3"))
    await gate.reached.wait()
    await house.mounts.stop()
    with pytest.raises(errors.Unavailable, match="stopping"):
        await mounting
    assert not house.simulator.standing
    assert list(house.mounts) == []
    rows = await house.rows()
    assert (rows.pop(whole.id), rows.pop(busy.id)) == (MountStatus.MOUNTED, MountStatus.MOUNTED)  # still wished for
    assert list(rows.values()) == [MountStatus.MOUNTING]  # this, too
    with pytest.raises(errors.Unavailable, match="stopping"):
        await house.mount()


async def test_stopping_goes_on_after_one_that_hangs_or_fails(house: House) -> None:
    mounts = [await house.mount(backup=backup) for backup in ("b1", "b2", "b3")]
    house.simulator.refuse["unmount"] = errors.Timeout("it does not answer; unmount with force")
    house.simulator.refuse["abandon"] = OSError(5, "Input/output error")
    await house.mounts.stop()
    assert list(house.mounts) == []
    assert set(await house.rows()) == {mount.id for mount in mounts}
    house.simulator.refuse.clear()
    for mount in mounts:  # in the place of the kernel, which takes what is left with the namespace
        await mount.session.force()


async def test_stopping_while_one_is_being_unmounted(house: House) -> None:
    mount = await house.mount()
    gate = house.simulator.stop_at("free")
    ending = start(house.unmount(mount))
    await gate.reached.wait()
    stopping = start(house.mounts.stop())
    await asyncio.sleep(0)
    gate.open()
    await stopping
    await ending
    await house.nothing_is_left()
