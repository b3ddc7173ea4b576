"""What ends by itself, and what makes room: over a simulated host and a clock that the test moves."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from sendense_restored import config, errors
from sendense_restored.daemon.events import Actor
from sendense_restored.daemon.lease import Holder
from sendense_restored.daemon.places import MOST_QUEUED
from sendense_restored.daemon.session import State
from sendense_restored.daemon.store import MountStatus
from sendense_restored.reader.protocol import Filters
from tests.unit.house import ANNA, BERT, House, lose, opened, serves, start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sendense_restored.daemon.mount import Mount


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path) as house:
        yield house


def is_gone(house: House, mount: Mount) -> bool:
    return mount not in list(house.mounts)


async def what(house: House) -> list[str]:
    """What the history has, the oldest first."""
    await house.events.flush()
    return [event.what for event in reversed((await house.store.events(limit=1000))[0])]


# --- time -----------------------------------------------------------------------------------------------------------


async def test_it_ends_when_the_last_claim_runs_out(house: House) -> None:
    mount = await house.mount(ANNA, idle_timeout=60)
    await house.mount(BERT, idle_timeout=120)
    house.clock.advance(60)
    await house.until(lambda: mount.lease.uids == {BERT})
    assert await serves(mount)
    house.clock.advance(60)
    await house.until(lambda: is_gone(house, mount))
    await house.settled()
    await house.nothing_is_left()
    assert await what(house) == ["mounted", "claimed", "claimed", "claim expired", "ended"]


async def test_the_time_of_the_claim_is_in_the_database(house: House) -> None:
    mount = await house.mount(idle_timeout=600)
    house.clock.advance(100)
    mount.touch(Actor(ANNA))
    await house.settled()
    (row,) = await house.store.mount_rows()
    (claim,) = await house.store.claims(mount.id)
    now = house.clock.unix()
    assert row.last_accessed_at.timestamp() == int(now)
    assert row.expires_at is not None
    assert claim.expires_at is not None
    assert (int(row.expires_at.timestamp()), int(claim.expires_at.timestamp())) == (int(now) + 600, int(now) + 600)
    assert claim.timeout == 600


async def test_busy_when_its_time_is_up_it_stays_and_is_tried_again(house: House) -> None:
    mount = await house.mount(idle_timeout=60)
    house.simulator.busy.add("partition-1")
    house.clock.advance(60)
    await house.until(lambda: mount.lease.overdue)
    assert mount.session.state is State.MOUNTED
    assert await serves(mount)
    assert (await house.rows())[mount.id] is MountStatus.MOUNTED
    house.simulator.busy.clear()
    house.clock.advance(29)
    assert not is_gone(house, mount)
    house.clock.advance(1)
    await house.until(lambda: is_gone(house, mount))


async def test_at_the_end_of_its_life_it_is_closed_whoever_reads(house: House) -> None:
    mount = await house.mount(idle_timeout=86_400)
    house.simulator.busy.add("partition-1")
    for _ in range(23):
        house.clock.advance(3600)
        mount.touch(Actor(ANNA))
        await house.settled()
    assert mount.expires_at == mount.session.created_at + 86_400
    house.clock.advance(3600)
    await house.until(lambda: is_gone(house, mount))
    with pytest.raises(errors.Expired, match=r"longest time that a mount may last \(24 h\)"):
        house.mounts.get(mount.id)


async def test_a_stream_does_not_keep_it_beyond_the_end_of_its_life(house: House) -> None:
    mount = await house.mount()
    directory = house.simulator.attachments[0].volumes[0]
    for number in range(3000):
        (directory / f"a-file-with-a-name-of-some-length-{number}").touch()
    pipe = await mount.open_listing(Actor(ANNA), (b"partition-1",), Filters())
    house.clock.advance(86_399)
    assert mount.busy
    house.clock.advance(1)
    await house.until(lambda: is_gone(house, mount))
    os.close(pipe)


async def test_while_it_is_being_made_nobodys_time_runs(house: House) -> None:
    gate = house.simulator.stop_at("attach")
    mounting = start(house.mount(idle_timeout=60))
    await gate.reached.wait()
    house.clock.advance(3600)
    gate.open()
    mount = await mounting
    house.clock.advance(59)
    assert await serves(mount)
    house.clock.advance(1)
    await house.until(lambda: is_gone(house, mount))


async def test_one_timer_is_enough_for_a_mount_however_often_it_is_used(house: House) -> None:
    mount = await house.mount()
    for _ in range(1000):
        mount.touch(Actor(ANNA))
    await house.settled()
    assert len([timer for timer in house.clock._timers if timer.callback is not None]) == 1
    assert len(house.clock._timers) < 20


async def test_a_failed_mount_goes_after_ten_minutes(house: House) -> None:
    mount = await house.mount()
    await lose(house, mount)
    house.clock.advance(599)
    assert house.mounts.get(mount.id) is mount
    house.clock.advance(1)
    await house.until(lambda: is_gone(house, mount))
    with pytest.raises(errors.Expired, match="it failed: the image server ended"):
        house.mounts.get(mount.id)
    await house.settled()
    await house.nothing_is_left()
    house.clock.advance(86_399)
    with pytest.raises(errors.Expired):
        house.mounts.get(mount.id)
    house.clock.advance(2)
    with pytest.raises(errors.MountNotFound):
        house.mounts.get(mount.id)


async def test_a_failed_mount_that_cannot_be_freed_takes_its_place_until_it_can(house: House) -> None:
    mount = await house.mount()
    house.simulator.refuse["detach"] = OSError(5, "Input/output error")
    await lose(house, mount)
    assert len(house.mounts) == 1
    house.clock.advance(600)
    await house.until(lambda: mount.failed_at == house.clock.now())
    assert mount.ending is not None
    await asyncio.wait([mount.ending])
    assert (is_gone(house, mount), mount.session.error) == (False, "the image server ended")
    house.simulator.refuse.clear()
    house.clock.advance(600)
    await house.until(lambda: is_gone(house, mount))


async def test_of_many_that_failed_the_oldest_go(house: House) -> None:
    house.simulator.refuse["attach"] = errors.NoDevice("none is free")
    for number in range(40):
        house.simulator.refuse["attach"] = errors.NoDevice(f"none is free ({number})")
        # Keys that differ, so that none takes the place of another.
        journal = "replay" if number % 2 else "as-crashed"
        with pytest.raises(errors.NoDevice):
            await house.mount(backup=f"b{number % 4 + 1}", disk=number // 4 % 2, journal=journal)  # type: ignore[arg-type]
        house.clock.advance(1)
    assert len(list(house.mounts)) <= 16
    await house.settled()


# --- room -----------------------------------------------------------------------------------------------------------


async def test_a_holder_has_so_many_and_no_more_joined_ones_included(house: House) -> None:
    house.mounts.reload(
        config.Config(mounts=config.Mounts(directory=house.simulator.mounts, max=4, max_per_holder=1))
    )
    mine = await house.mount(ANNA)
    theirs = await house.mount(BERT, "b2")
    for backup in ("b2", "b3"):
        with pytest.raises(errors.LimitReached, match=f"uid {ANNA} holds 1 mounts"):
            await house.mount(ANNA, backup)
    assert theirs.lease.uids == {BERT}
    assert await house.mount(ANNA) is mine
    assert await serves(await house.mount(ANNA, "b3", behalf="carol"))  # another holder
    await house.unmount(mine, ANNA, behalf="")
    # All that Anna speaks for went with it but the one on carol's behalf, which is another mount.
    assert await serves(await house.mount(ANNA, "b4"))


async def test_one_that_waits_for_itself_keeps_nobody(house: House) -> None:
    house.mounts.reload(
        config.Config(mounts=config.Mounts(directory=house.simulator.mounts, max=3, max_per_holder=1))
    )
    mine = await house.mount(ANNA)
    waiting = start(house.mount(ANNA, "b2", wait=True))
    await house.becomes(lambda: house.mounts.places.queued > 0)
    assert await serves(await house.mount(BERT, "b3"))
    await house.unmount(mine, ANNA)
    assert await serves(await waiting)


async def test_nobody_overtakes_one_who_waits(house: House) -> None:
    mounted = [await house.mount(ANNA, backup) for backup in ("b1", "b2", "b3")]
    first = start(house.mount(BERT, "b4", wait=True))
    await house.becomes(lambda: house.mounts.places.queued == 1)
    ending = start(house.unmount(mounted[0], ANNA))
    await house.becomes(lambda: is_gone(house, mounted[0]))
    try:
        await house.mount(ANNA, "b1", journal="as-crashed")
    except errors.LimitReached:
        overtaken = False
    else:
        overtaken = not first.done()
    await ending
    assert not overtaken
    assert await serves(await first)


async def test_one_who_waits_joins_what_somebody_else_mounts(house: House) -> None:
    mounted = [await house.mount(ANNA, backup) for backup in ("b1", "b2", "b3")]
    waiting = [start(house.mount(uid, "b4", wait=True)) for uid in (ANNA, BERT)]
    await house.becomes(lambda: house.mounts.places.queued == 2)
    await house.unmount(mounted[0], ANNA)
    first, second = await asyncio.gather(*waiting)
    assert first is second
    assert first.lease.uids == {ANNA, BERT}


async def test_one_that_is_read_is_spared_for_a_while(house: House) -> None:
    mounted = [await house.mount(ANNA, backup) for backup in ("b1", "b2", "b3")]
    house.simulator.busy |= {f"{mount.id}/partition-1" for mount in mounted[:2]}
    house.clock.advance(300)
    new = await house.mount(BERT, "b4")
    assert [is_gone(house, mount) for mount in mounted] == [False, False, True]
    with pytest.raises(errors.LimitReached):
        await house.mount(BERT, "b3")  # the new one was just used, and the others were just tried
    house.simulator.busy.clear()
    new.touch(Actor(BERT))
    house.clock.advance(299)
    new.touch(Actor(BERT))
    with pytest.raises(errors.LimitReached):
        await house.mount(BERT, "b3")
    house.clock.advance(1)
    assert await serves(await house.mount(BERT, "b3"))
    await house.settled()


async def test_a_draining_device_counts_for_those_who_held_it(house: House) -> None:
    house.mounts.reload(
        config.Config(mounts=config.Mounts(directory=house.simulator.mounts, max=3, max_per_holder=1))
    )
    mount = await house.mount(ANNA)
    house.simulator.busy.add("partition-1")
    await house.unmount(mount, ANNA, force=True)
    (draining,) = house.mounts.places.draining
    assert (draining.mount_id, set(draining.holders)) == (mount.id, {Holder(ANNA)})
    with pytest.raises(errors.LimitReached, match=f"uid {ANNA} holds 1"):
        await house.mount(ANNA, "b2")
    assert await serves(await house.mount(BERT, "b2"))
    waiting = start(house.mount(ANNA, "b3", wait=True))
    await house.becomes(lambda: house.mounts.places.queued > 0)
    draining.devices[0].let_go()  # type: ignore[attr-defined]  # the simulator's
    house.simulator.busy.clear()
    assert await serves(await waiting)


async def test_what_the_machine_has_no_room_for_is_not_begun(house: House) -> None:
    house.simulator.refuse["room"] = errors.NoSpace("the machine is short of memory")
    with pytest.raises(errors.NoSpace):
        await house.mount()
    await house.nothing_is_left()
    assert house.mounts.places.queued == 0


async def test_room_is_asked_for_together_with_those_that_are_being_made(house: House) -> None:
    gate = house.simulator.stop_at("attach")
    first = start(house.mount(ANNA, "b2", all_disks=True))
    await gate.reached.wait()
    second = start(house.mount(BERT))
    await house.becomes(lambda: len(house.simulator.room_asked) == 2)
    disks = len((await house.store.backup("b2")).disks)
    assert house.simulator.room_asked == [(1, disks), (2, disks + 1)]
    gate.open()
    await first
    await second
    await house.mount(ANNA, "b3")
    assert house.simulator.room_asked[-1] == (1, 1)


async def test_one_whose_reader_never_answers_is_forced_at_the_end_of_its_life(house: House) -> None:
    mount = await house.mount(idle_timeout=60)
    house.simulator.refuse["take_back"] = errors.Timeout("the reader does not answer")
    house.clock.advance(60)
    await house.until(lambda: mount.session.state is State.UNMOUNTING and mount.closing is None)
    house.clock.advance(80_000)
    await house.sweep.run()
    assert not is_gone(house, mount)
    house.clock.advance(6400)
    await house.until(lambda: is_gone(house, mount))
    assert not house.simulator.standing


async def test_the_queue_is_no_longer_than_it_may_be(house: House) -> None:
    mounted = [await house.mount(ANNA, backup) for backup in ("b1", "b2", "b3")]
    waiting = [start(house.mount(2000 + number, "b4", wait=True)) for number in range(MOST_QUEUED)]
    await house.becomes(lambda: house.mounts.places.queued == MOST_QUEUED)
    with pytest.raises(errors.LimitReached, match=f"{MOST_QUEUED} wait for a mount already"):
        await house.mount(BERT, "b4", wait=True)
    await house.unmount(mounted[0], ANNA)
    assert len({mount.id for mount in await asyncio.gather(*waiting)}) == 1


async def test_a_caller_who_goes_leaves_no_claim_half_written(house: House) -> None:
    mount = await house.mount(ANNA)
    joining = start(house.mount(BERT))
    await house.becomes(lambda: mount.lease.uids == {ANNA, BERT})
    joining.cancel()
    await asyncio.wait([joining])
    await house.settled()
    assert await house.claimed(mount) == [ANNA, BERT]
    leaving = start(house.unmount(mount, ANNA))
    await house.becomes(lambda: mount.lease.uids == {BERT})
    leaving.cancel()
    await asyncio.wait([leaving])
    await house.settled()
    assert await house.claimed(mount) == [BERT]


async def test_a_claim_that_could_not_be_written_is_written_by_the_sweep(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = await house.mount(ANNA)
    with monkeypatch.context() as patch:
        house.fail(patch, "put_claim")
        await house.mount(BERT)
    await house.sweep.run()
    assert await house.claimed(mount) == [ANNA, BERT]
