"""What comes between two steps of a mount's life: another caller, the clock, a stop, a slow database."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest

from sendense_restored import config, errors
from sendense_restored.daemon.events import Actor
from sendense_restored.daemon.lease import Holder
from sendense_restored.daemon.session import State
from sendense_restored.daemon.store import DiskFile, MountStatus
from sendense_restored.reader.protocol import Filters
from tests import simulator as sim
from tests.unit.house import ANNA, BERT, CARL, House, lose, opened, serves, start
from tests.unit.test_resume import sql

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sendense_restored.daemon.mount import Mount


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path) as house:
        yield house


def slow(house: House, monkeypatch: pytest.MonkeyPatch, method: str) -> sim.Gate:
    """Have a method of the store wait before it does anything."""
    gate, real = sim.Gate(), getattr(house.store, method)

    async def wait(*args: Any, **kwargs: Any) -> object:  # noqa: ANN401 - whatever it takes
        await gate.passed()
        return await real(*args, **kwargs)

    monkeypatch.setattr(house.store, method, wait)
    return gate


def limit(house: House, **limits: Any) -> None:  # noqa: ANN401 - any setting
    house.settings = config.Config(mounts=config.Mounts(directory=house.simulator.mounts, **limits))
    house.mounts.reload(house.settings)


async def ended(house: House, mount: Mount) -> None:
    await house.until(lambda: mount not in list(house.mounts))
    assert mount.ending is not None
    await asyncio.wait([mount.ending])


async def written(house: House) -> list[tuple[str, str]]:
    await house.events.flush()
    return [(event.what, event.detail) for event in (await house.store.events(limit=1000))[0]]


# --- claims ---------------------------------------------------------------------------------------------------------


async def test_no_mount_is_left_without_a_claim(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two claims run out at once, and while that is being written down the third is dropped."""
    mount = await house.mount(ANNA, idle_timeout=60)
    await house.mount(BERT, idle_timeout=60)
    await house.mount(CARL, idle_timeout=600)
    gate = slow(house, monkeypatch, "delete_claim")
    house.clock.advance(60)
    await gate.reached.wait()
    assert mount.lease.uids == {CARL}
    await house.unmount(mount, CARL)
    gate.open()
    await ended(house, mount)


async def test_a_claim_that_comes_back_while_it_is_struck_out_is_kept(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = await house.mount(BERT)
    await house.mount(ANNA)
    await house.mount(ANNA, behalf="carol")
    with monkeypatch.context() as patch:
        gate = slow(house, patch, "delete_claim")
        leaving = start(house.unmount(mount, ANNA))  # both of Anna's
        await gate.reached.wait()
        await house.mount(ANNA, behalf="carol")
        gate.open()
        await leaving
    assert mount.lease.claims.keys() == {Holder(BERT), Holder(ANNA, "carol")}
    assert await house.claimed(mount) == [ANNA, BERT]


async def test_one_who_joins_a_mount_that_is_unmounted_meanwhile_is_told(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = await house.mount(ANNA)
    gate = slow(house, monkeypatch, "put_claim")
    joining = start(house.mount(BERT))
    await gate.reached.wait()
    await house.unmount(mount, CARL)
    gate.open()
    with pytest.raises(errors.Cancelled):
        await joining
    await house.nothing_is_left()


async def test_one_who_has_too_many_waits_to_join_as_well(house: House) -> None:
    limit(house, max=3, max_per_holder=1)
    mine, theirs = await house.mount(ANNA), await house.mount(BERT, "b2")
    joining = start(house.mount(ANNA, "b2", wait=True))
    await house.becomes(lambda: house.mounts.places.queued == 1)
    await house.unmount(mine, ANNA)
    assert await joining is theirs
    assert await house.claimed(theirs) == [ANNA, BERT]


async def test_a_listing_that_does_not_begin_holds_nothing(house: House) -> None:
    mount = await house.mount(ANNA, idle_timeout=60)
    gate = house.simulator.stop_at("stream")
    listing = start(mount.open_listing(Actor(ANNA), (b"partition-1",), Filters()))
    await gate.reached.wait()
    house.clock.advance(600)  # the timer looks, and finds that it is held
    assert mount.busy
    await house.becomes(lambda: house.clock.next == 30)  # and looks again, to write that down
    house.simulator.refuse["stream"] = errors.Timeout("no answer")
    gate.open()
    with pytest.raises(errors.Timeout):
        await listing
    assert not mount.busy
    house.clock.advance(60)
    await ended(house, mount)


async def test_as_many_files_are_open_as_may_be_however_many_ask_at_once(house: House) -> None:
    limits = config.Limits(open_files=4)
    house.mounts.reload(config.Config(mounts=house.settings.mounts, limits=limits))
    mount = await house.mount()
    house.simulator.outside.append(sim.Reading(count=4))
    asking = [mount.open(Actor(ANNA), "/partition-1/etc/motd") for _ in range(8)]
    told = await asyncio.gather(*asking, return_exceptions=True)
    given = [each[0] for each in told if isinstance(each, tuple)]
    for descriptor in given:
        os.close(descriptor)
    assert [type(each) for each in told if isinstance(each, Exception)] == [errors.LimitReached] * 4
    assert len(given) == 4


# --- the sweep ------------------------------------------------------------------------------------------------------


async def test_what_was_spared_for_another_reason_is_not_overdue(house: House, tmp_path: Path) -> None:
    mount = await house.mount(idle_timeout=600)
    house.simulator.busy.add("partition-1")
    backup = await house.store.backup("b1")
    sql(tmp_path, "DELETE FROM backup_jobs WHERE id = 'b1'")
    assert await house.sweep.run() == 0
    assert not mount.lease.overdue
    house.simulator.busy.clear()
    files = [DiskFile(disk.index, disk.qcow2_path, disk.size) for disk in backup.disks]
    await house.store.add_backup("main", "web", files, backup_id="b1")  # it was a mistake
    assert await house.sweep.run() == 0
    assert await serves(mount)


async def test_a_mount_that_begins_while_the_sweep_reads_is_left_alone(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.mount()
    gate = slow(house, monkeypatch, "backup_ids")
    sweeping = start(house.sweep.run())
    await gate.reached.wait()
    new = await house.mount(backup="b2")
    gate.open()
    assert await sweeping == 0
    assert await serves(new)
    assert house.simulator.swept[-1] == {mount.id for mount in house.mounts}


async def test_the_sweep_goes_on_after_a_bug_in_it(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = asyncio.Event()

    def sweep(_: object) -> list[str]:
        ran.set()
        raise ZeroDivisionError

    monkeypatch.setattr(house.simulator, "sweep", sweep)
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
    house.sweep.start()
    for _ in range(2):
        house.clock.advance(900)
        await ran.wait()
        ran.clear()
        await house.becomes(lambda: house.sweep.next == int(house.clock.unix()) + 900)


# --- failed ones ----------------------------------------------------------------------------------------------------


async def test_a_failed_one_whose_time_is_up_is_not_taken_away_twice_at_once(house: House) -> None:
    mount = await house.mount()
    house.simulator.refuse["detach"] = OSError(5, "Input/output error")
    await lose(house, mount)
    house.simulator.refuse.clear()
    house.simulator.steps.clear()
    gate = house.simulator.stop_at("detach")
    house.clock.advance(600)
    await gate.reached.wait()
    unmounting = start(house.unmount(mount))
    sweeping = start(house.sweep.run())
    gate.open()
    await unmounting
    await sweeping
    assert house.simulator.steps.count("detach") == 1
    await house.nothing_is_left()


async def test_a_failed_one_that_cannot_be_taken_away_still_tells_why_it_failed(house: House) -> None:
    mount = await house.mount()
    house.simulator.refuse["detach"] = errors.Timeout("it does not answer")
    await lose(house, mount)
    with pytest.raises(errors.Timeout):
        await house.unmount(mount, force=True)
    assert (mount.session.state, mount.session.error) == (State.FAILED, "the image server ended")
    house.simulator.refuse.clear()
    await house.unmount(mount)
    await house.nothing_is_left()


# --- building -------------------------------------------------------------------------------------------------------


async def test_who_unmounts_what_is_being_made_does_not_get_it_back_after_a_crash(house: House) -> None:
    gate = house.simulator.stop_at("attach")
    mounting = start(house.mount())
    await gate.reached.wait()
    rolling_back = house.simulator.stop_at("end reader")
    (mount,) = house.mounts
    unmounting = start(house.unmount(mount))
    await rolling_back.reached.wait()
    # What was given to the database before is done when it answers.
    assert await house.rows() == {mount.id: MountStatus.UNMOUNTING}
    rolling_back.open()
    await asyncio.wait([mounting, unmounting])
    assert isinstance(mounting.exception(), errors.Cancelled)
    await house.nothing_is_left()


async def test_a_bug_in_making_a_mount_is_logged_though_nobody_waits(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    mount = await house.mount()
    await house.mounts.stop()
    house.begin()
    house.simulator.refuse["discover"] = ZeroDivisionError("a bug")
    await house.resume.load()
    again = house.mounts.get(mount.id)
    await house.until(lambda: again.session.state is State.FAILED)
    await again.built()
    await house.becomes(lambda: "ZeroDivisionError" in caplog.text)
    assert "journal" in again.session.error


# --- stopping -------------------------------------------------------------------------------------------------------


async def test_those_who_wait_for_room_are_told_that_the_service_stops(house: House) -> None:
    for backup in ("b1", "b2", "b3"):
        await house.mount(backup=backup)
    waiting = [start(house.mount(uid, "b4", wait=True)) for uid in (ANNA, BERT)]
    await house.becomes(lambda: house.mounts.places.queued == 2)
    await house.mounts.stop()
    for told in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(told, errors.Unavailable)


async def test_who_unmounts_while_the_service_stops_is_told_that_it_was_not(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = await house.mount()
    gate = slow(house, monkeypatch, "renew")
    stopping = start(house.mounts.stop())
    await gate.reached.wait()
    for force in (False, True):
        with pytest.raises(errors.Unavailable, match="stopping"):
            await house.unmount(mount, force=force)
    gate.open()
    await stopping
    assert set(await house.rows()) == {mount.id}


async def test_what_is_read_when_the_service_stops_comes_back(house: House) -> None:
    """A stream that has run for longer than the claim lasts without use."""
    mount = await house.mount(idle_timeout=60)
    directory = house.simulator.attachments[0].volumes[0]
    for number in range(3000):
        (directory / f"a-file-with-a-name-of-some-length-{number}").touch()
    pipe = await mount.open_listing(Actor(ANNA), (b"partition-1",), Filters())
    house.clock.advance(600)
    assert mount.busy
    await house.mounts.stop()
    os.close(pipe)
    house.begin()
    assert await house.resume.load() == 1
    again = house.mounts.get(mount.id)
    await house.until(lambda: again.session.state is State.MOUNTED)


async def test_stops_in_good_order_are_no_failed_attempts(house: House) -> None:
    mount = await house.mount()
    for _ in range(4):
        await house.mounts.stop()
        (row,) = await house.store.mount_rows()
        assert row.resume_attempts == 0
        gate = house.simulator.stop_at("attach")
        house.begin()
        assert await house.resume.load() == 1
        await gate.reached.wait()
        gate.open()
    again = house.mounts.get(mount.id)
    await house.until(lambda: again.session.state is State.MOUNTED)


# --- resuming -------------------------------------------------------------------------------------------------------


async def test_nobodys_time_runs_while_a_mount_waits_for_its_turn(house: House) -> None:
    await house.mount(idle_timeout=600)
    second = await house.mount(backup="b2", idle_timeout=60)
    house.clock.advance(20)
    await house.mounts.stop()
    house.begin()
    gate = house.simulator.stop_at("attach")
    await house.resume.load()
    await gate.reached.wait()
    house.clock.advance(300)
    gate.open()
    again = house.mounts.get(second.id)
    await house.until(lambda: again.session.state is State.MOUNTED)
    assert again.lease.expires - house.clock.now() == pytest.approx(40, abs=1)


async def test_claims_that_ran_out_while_nobody_was_there_are_struck_out(house: House) -> None:
    mount = await house.mount(ANNA, idle_timeout=600)
    await house.mount(BERT, idle_timeout=60)
    await house.mounts.stop()
    house.begin()
    house.clock.advance(100)
    await house.resume.load()
    again = house.mounts.get(mount.id)
    await house.until(lambda: again.session.state is State.MOUNTED)
    assert await house.claimed(again) == [ANNA]
    assert ("claim expired", f"uid {BERT}") in await written(house)


async def test_a_wall_clock_that_was_set_back_makes_no_life_longer(house: House) -> None:
    mount = await house.mount()
    await house.mounts.stop()
    house.begin()
    house.clock.step_wall(-86_400 * 365)
    assert await house.resume.load() == 1
    again = house.mounts.get(mount.id)
    assert again.lease.ends == house.clock.now() + 86_400
    assert again.lease.expires == house.clock.now() + 3600
    await house.until(lambda: again.session.state is State.MOUNTED)


async def test_a_wish_is_not_lost_with_the_database(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = await house.mount()
    await house.mounts.stop()
    house.begin()
    with monkeypatch.context() as patch:
        house.fail(patch, "backup")
        assert await house.resume.load() == 0
    assert set(await house.rows()) == {mount.id}
    await house.sweep.run()  # which asks again
    again = house.mounts.get(mount.id)
    await house.until(lambda: again.session.state is State.MOUNTED)


async def test_what_rests_of_a_first_attempt_is_not_built_upon(house: House) -> None:
    mount = await house.mount()
    await house.mounts.stop()
    house.begin()
    house.simulator.refuse |= {"give": errors.Timeout("no answer"), "detach": OSError(5, "Input/output error")}
    await house.resume.load()
    again = house.mounts.get(mount.id)
    await house.until(lambda: again.session.state is State.FAILED)
    assert again.session.standing
    house.simulator.refuse.clear()
    await house.unmount(again)
    await house.nothing_is_left()


async def test_who_asks_for_a_mount_between_two_attempts_gets_it_with_the_second(house: House) -> None:
    mount = await house.mount()
    await house.mounts.stop()
    house.begin()
    house.simulator.refuse["attach"] = errors.NoDevice("none is free")
    await house.resume.load()
    again = house.mounts.get(mount.id)
    await house.becomes(lambda: house.clock.next is not None and house.clock.next <= 30)
    joining = start(house.mount(BERT))
    await house.becomes(lambda: BERT in again.lease.uids)
    house.simulator.refuse.clear()
    house.clock.advance(30)
    assert await joining is again
    assert await serves(again)


async def test_it_may_be_unmounted_between_two_attempts(house: House) -> None:
    mount = await house.mount()
    await house.mounts.stop()
    house.begin()
    house.simulator.refuse["attach"] = errors.NoDevice("none is free")
    await house.resume.load()
    again = house.mounts.get(mount.id)
    await house.becomes(lambda: house.clock.next is not None and house.clock.next <= 30)
    await house.unmount(again)
    await house.nothing_is_left()
    assert house.clock.next is None


async def test_who_unmounts_while_a_first_attempt_is_rolled_back_does_not_wait_for_a_second(house: House) -> None:
    mount = await house.mount()
    await house.mounts.stop()
    house.begin()
    house.simulator.refuse["give"] = errors.Timeout("no answer")
    gate = house.simulator.stop_at("detach")
    await house.resume.load()
    await gate.reached.wait()
    unmounting = start(house.unmount(house.mounts.get(mount.id)))
    await house.becomes(lambda: house.mounts.get(mount.id).ending is not None)
    gate.open()
    await unmounting
    await house.nothing_is_left()
    assert house.clock.next is None


async def test_a_stop_while_a_first_attempt_is_rolled_back_keeps_the_wish(house: House) -> None:
    mount = await house.mount()
    await house.mounts.stop()
    house.begin()
    house.simulator.refuse["give"] = errors.Timeout("no answer")
    gate = house.simulator.stop_at("detach")
    await house.resume.load()
    await gate.reached.wait()
    stopping = start(house.mounts.stop())
    await asyncio.sleep(0)
    gate.open()
    await stopping
    house.simulator.refuse.clear()
    house.begin()
    assert await house.resume.load() == 1
    again = house.mounts.get(mount.id)
    await house.until(lambda: again.session.state is State.MOUNTED)


async def test_a_database_that_fails_costs_a_mount_no_attempt(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = await house.mount()
    await house.mounts.stop()
    house.begin()
    with monkeypatch.context() as patch:
        house.fail(patch, "update_mount")
        await house.resume.load()
        for _ in range(3):
            await house.becomes(lambda: house.clock.next is not None and house.clock.next <= 30)
            house.clock.advance(30)
        await house.becomes(lambda: house.clock.next is not None and house.clock.next <= 30)
    house.clock.advance(30)
    again = house.mounts.get(mount.id)
    await house.until(lambda: again.session.state is State.MOUNTED)


async def test_the_service_stops_and_no_deadline_is_left(house: House) -> None:
    await lose(house, await house.mount())
    await house.mount(backup="b2")
    waiting = start(house.mount(backup="b3"))
    await house.becomes(lambda: len(list(house.mounts)) == 3)
    await house.mounts.stop()
    await asyncio.wait([waiting])
    assert isinstance(waiting.exception(), errors.Unavailable)
    assert house.clock.next is None


# --- room -----------------------------------------------------------------------------------------------------------


async def test_a_mount_takes_one_place_however_much_is_left_of_it(house: House) -> None:
    limit(house, max=3, max_per_holder=2)
    mount = await house.mount(ANNA)
    house.simulator.busy.add(f"{mount.id}/partition-1")
    house.simulator.refuse["detach"] = OSError(5, "Input/output error")
    await lose(house, mount)  # a device that drains, and more that could not be taken away
    house.simulator.refuse.clear()
    assert mount.session.standing
    ((device,),) = (each.devices for each in house.mounts.places.draining)
    assert house.mounts.places.taken == 1
    other = await house.mount(ANNA, "b2")
    await house.unmount(mount, ANNA)
    assert house.mounts.places.taken == 2
    with pytest.raises(errors.LimitReached, match=f"uid {ANNA} holds 2"):
        await house.mount(ANNA, "b3")
    device.let_go()  # type: ignore[attr-defined]  # the simulator's
    await house.becomes(lambda: house.mounts.places.taken == 1)
    await house.unmount(other, ANNA)


async def test_two_who_make_room_at_once_both_get_it_whoever_is_done_first(house: House) -> None:
    limit(house, max=2, evict_after=300)
    slower = await house.mount(ANNA, "b1")  # it has a second volume, where its end is stopped
    quicker = await house.mount(ANNA, "b2", disk=1)
    gate = house.simulator.stop_at("unmount partition-2")
    house.clock.advance(300)
    first, second = start(house.mount(BERT, "b3")), start(house.mount(CARL, "b4"))
    await gate.reached.wait()
    await ended(house, quicker)
    assert list(house.mounts) == [slower]
    await asyncio.sleep(0)
    assert not first.done()
    assert not second.done()
    gate.open()
    assert await serves(await first)
    assert await serves(await second)
