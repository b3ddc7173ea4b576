"""One mount: how its layers come, go and come back, whatever goes wrong in between."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.daemon.session import Session, State, Wish
from tests import simulator as sim

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from sendense_restored.daemon.store import Store
    from sendense_restored.daemon.volume import Journal
    from tests.simulator import Simulator

ONE = (("mountable-ext4",),)
THREE = (("mountable-ext4", "mountable-ntfs", "mountable-xfs"),)
TWO_DISKS = (("mountable-ext4", "swap-swap"), ("mountable-xfs",))

# What a step may raise: an error for the client, one of the kernel, and a fault of ours.
FAILURES = [errors.NoDevice("none is free"), OSError(28, "No space left on device"), ZeroDivisionError("a bug")]


class House:
    """A host and a store; makes sessions."""

    def __init__(self, simulator: Simulator, store: Store) -> None:
        self.simulator, self.store = simulator, store
        self._made = 0

    async def session(self, disks: tuple[tuple[str, ...], ...] = ONE, journal: Journal = "replay") -> Session:
        """A session on a new backup of these disks, all of them, not built."""
        self._made += 1
        backup = await sim.add_backup(self.store, f"b{self._made}", disks)
        repository = await self.store.repository("main")
        wish = Wish(backup, repository, backup.disks, all_disks=len(disks) > 1, journal=journal)
        return Session(f"m{self._made}", wish, self.simulator.machine, created_at=1)

    async def built(self, disks: tuple[tuple[str, ...], ...] = ONE, journal: Journal = "replay") -> Session:
        session = await self.session(disks, journal)
        await session.build()
        return session


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with sim.house(tmp_path) as (simulator, store):
        yield House(simulator, store)


async def names_in(session: Session, *path: bytes) -> list[str]:
    listing = await session.list(path, limit=100, cursor="")
    return [entry.name for entry in listing.entries]


async def test_a_session_is_built_from_the_image_up_and_taken_down_from_the_reader_on(house: House) -> None:
    session = await house.built()
    steps = house.simulator.steps
    built = [step for step in steps if step != "reader"]  # it starts meanwhile
    assert built == ["workplace", "open_image", "attach", "discover", "slice", "mount", "give"]
    assert session.state is State.MOUNTED
    steps.clear()
    await session.close()
    assert steps == ["take_back", "unmount", "free", "detach", "end reader", "leave workplace"]
    assert not house.simulator.standing
    assert session.lost.cancelled()


async def test_the_reader_starts_while_the_disk_is_being_attached(house: House) -> None:
    gate = house.simulator.stop_at("attach")
    session = await house.session()
    building = asyncio.create_task(session.build())
    await gate.reached.wait()
    reader = house.simulator.readers[0]
    assert reader.stands
    gate.open()
    await building
    await session.close()


async def test_all_volumes_of_all_disks_are_there_and_the_others_say_why_not(house: House) -> None:
    session = await house.built(TWO_DISKS)
    assert await names_in(session) == ["disk-0-partition-1", "disk-0-partition-2", "disk-1-partition-1"]
    assert await names_in(session, b"disk-1-partition-1", b"etc") == ["hostname", "motd"]
    with pytest.raises(errors.VolumeUnavailable, match="swap: the simulator says swap"):
        await names_in(session, b"disk-0-partition-2")
    with pytest.raises(errors.PathNotFound):
        await names_in(session, b"partition-1")
    await session.close()


async def test_the_list_of_volumes_comes_in_pages(house: House) -> None:
    session = await house.built(THREE)
    first = await session.list((), limit=2, cursor="")
    assert ([entry.name for entry in first.entries], first.cursor) == (["partition-1", "partition-2"], "partition-2")
    second = await session.list((), limit=2, cursor=first.cursor)
    assert ([entry.name for entry in second.entries], second.cursor) == (["partition-3"], "")
    await session.close()


async def test_a_file_is_opened_read_only_and_belongs_to_the_caller(house: House) -> None:
    session = await house.built()
    descriptor, info = await session.open((b"partition-1", b"etc", b"hostname"))
    assert (os.read(descriptor, 100), info.kind) == (b"web01\n", "file")
    os.close(descriptor)
    with pytest.raises(errors.NotAFile):
        await session.open(())
    assert (await session.stat(())).kind == "directory"
    assert (await session.stat((b"partition-1",))).kind == "volume"
    assert (await session.stat((b"partition-1", b"etc"))).kind == "directory"
    await session.close()


@pytest.mark.parametrize("state", ["mounting", "unmounting", "failed"])
async def test_a_mount_that_is_not_mounted_answers_nothing_not_even_an_incomplete_list(
    house: House, state: str
) -> None:
    session = await house.built(THREE)
    session.state = State(state)
    for path in ((), (b"partition-1",)):
        with pytest.raises(errors.Unavailable, match="mount"):
            await session.list(path, limit=10, cursor="")
        with pytest.raises(errors.Unavailable, match="mount"):
            await session.stat(path)
    session.state = State.MOUNTED
    await session.close()


async def test_nothing_that_can_be_mounted_is_an_error_that_names_each_volume(house: House) -> None:
    session = await house.session((("encrypted-crypto_LUKS", "swap-swap"),))
    with pytest.raises(errors.NoMountableVolume, match=r"partition-1: .*encrypted; partition-2: .*swap"):
        await session.build()
    await session.close()


async def test_an_empty_disk_says_so(house: House) -> None:
    session = await house.session(((),))
    with pytest.raises(errors.NoMountableVolume, match="empty"):
        await session.build()
    await session.close()


@pytest.mark.parametrize("ending", [Session.close, Session.force])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("step", sim.BUILD_STEPS)
async def test_whatever_fails_all_that_was_made_can_be_taken_away(
    house: House, step: str, failure: Exception, ending: Callable[[Session], AsyncIterator[None]]
) -> None:
    house.simulator.refuse[step] = failure
    session = await house.session(TWO_DISKS)
    with pytest.raises(type(failure)):
        await session.build()
    await ending(session)  # type: ignore[misc]  # both are methods without arguments
    assert not house.simulator.standing


@pytest.mark.parametrize("ending", [Session.close, Session.force])
@pytest.mark.parametrize("step", sim.BUILD_STEPS[1:])
async def test_a_build_that_is_cancelled_at_any_step_leaves_nothing(
    house: House, step: str, ending: Callable[[Session], AsyncIterator[None]]
) -> None:
    gate = house.simulator.stop_at(step)
    session = await house.session(TWO_DISKS)
    building = asyncio.create_task(session.build())
    await gate.reached.wait()
    building.cancel()
    await asyncio.wait([building])
    assert building.cancelled()
    gate.open()
    await ending(session)  # type: ignore[misc]  # both are methods without arguments
    assert not house.simulator.standing


async def test_one_volume_that_is_refused_does_not_keep_the_others(house: House) -> None:
    house.simulator.refuse["mount partition-2"] = sim.refused()
    session = await house.built(THREE)
    assert [volume.mounted is not None for volume in session.volumes.values()] == [True, False, True]
    with pytest.raises(errors.VolumeUnavailable, match="damaged: the driver does not like it"):
        await names_in(session, b"partition-2")
    assert session.volumes["partition-2"].device is None
    await session.close()


async def test_one_volume_that_fails_takes_the_others_away_with_it(house: House) -> None:
    house.simulator.refuse["mount partition-2"] = errors.Timeout("it hangs")
    session = await house.session(THREE)
    with pytest.raises(errors.Timeout):
        await session.build()
    assert sum(what.startswith("mount ") for what in house.simulator.standing) == 2  # none is left half-way
    await session.close()


async def test_a_build_does_not_fail_as_long_as_a_volume_is_still_being_mounted(house: House) -> None:
    """Which would otherwise be mounted behind the back of those who clean up."""
    house.simulator.refuse["mount partition-1"] = errors.Timeout("it hangs")
    gate = house.simulator.stop_at("mount partition-3")
    session = await house.session(THREE)
    building = asyncio.create_task(session.build())
    await gate.reached.wait()
    await asyncio.wait([building], timeout=0)
    assert not building.done()
    gate.open()
    with pytest.raises(errors.Timeout):
        await building
    assert session.volumes["partition-3"].mounted is not None
    await session.close()


async def test_a_journal_that_cannot_be_replayed_is_left_alone_and_the_reason_said(house: House) -> None:
    house.simulator.refuse["mount replay"] = sim.refused(retry_as_crashed=True)
    session = await house.built()
    volume = session.volumes["partition-1"]
    assert volume.mounted is not None
    assert volume.mounted.view == "as-crashed"
    assert "at the moment of the backup: the driver does not like it" in volume.reason
    assert [step for step in house.simulator.steps if step in {"slice", "free"}] == ["slice", "free", "slice"]
    await session.close()


async def test_a_volume_that_is_refused_both_ways_tells_of_the_second(house: House) -> None:
    house.simulator.refuse |= {
        "mount replay": sim.refused(retry_as_crashed=True),
        "mount as-crashed": sim.refused(retry_as_crashed=True),
    }
    session = await house.session()
    with pytest.raises(errors.NoMountableVolume, match="does not like it"):
        await session.build()
    await session.close()


async def test_as_crashed_is_not_tried_twice(house: House) -> None:
    house.simulator.refuse["mount"] = sim.refused(retry_as_crashed=True)
    session = await house.session(journal="as-crashed")
    with pytest.raises(errors.NoMountableVolume):
        await session.build()
    assert house.simulator.steps.count("mount") == 1
    await session.close()


async def test_busy_makes_the_mount_whole_again(house: House) -> None:
    session = await house.built(THREE)
    before = len(house.simulator.standing)
    house.simulator.busy.add("partition-2")
    with pytest.raises(errors.Busy):
        await session.close()
    assert (session.state, session.busy) == (State.MOUNTED, True)
    for volume in (b"partition-1", b"partition-2", b"partition-3"):
        assert await names_in(session, volume, b"etc") == ["hostname", "motd"]
    assert len(house.simulator.standing) == before  # the volume that had gone has its own device back, no second one
    house.simulator.busy.clear()
    await session.close()
    assert not session.busy


async def test_busy_again_and_again(house: House) -> None:
    session = await house.built(THREE)
    house.simulator.busy.add("partition-3")
    before = len(house.simulator.standing)
    for _ in range(3):
        with pytest.raises(errors.Busy):
            await session.close()
        assert len(house.simulator.standing) == before
    house.simulator.busy.clear()
    await session.close()


async def test_a_volume_that_does_not_come_back_after_busy_says_so_and_the_others_serve(house: House) -> None:
    session = await house.built(THREE)
    house.simulator.busy.add("partition-2")
    house.simulator.refuse["mount partition-1"] = sim.refused()
    with pytest.raises(errors.Busy):
        await session.close()
    assert session.state is State.MOUNTED
    assert await names_in(session, b"partition-2", b"etc") == ["hostname", "motd"]
    with pytest.raises(errors.VolumeUnavailable, match="damaged"):
        await names_in(session, b"partition-1")
    house.simulator.busy.clear()
    await session.close()


@pytest.mark.parametrize("step", ["mount partition-1", "give"])
async def test_a_mount_that_cannot_be_made_whole_after_busy_is_still_taken_away_later(
    house: House, step: str
) -> None:
    session = await house.built(THREE)
    house.simulator.busy.add("partition-2")
    house.simulator.refuse[step] = errors.Timeout("it hangs")
    with pytest.raises(errors.RestoreError):
        await session.close()
    assert session.state is State.UNMOUNTING
    house.simulator.busy.clear()
    await session.close()


async def test_a_device_that_others_still_use_is_not_used_again_and_the_next_close_goes_on(house: House) -> None:
    """It was given back: by now the kernel may have made it somebody else's."""
    session = await house.built(THREE)
    house.simulator.refuse["free"] = errors.Busy("the device is still in use")
    with pytest.raises(errors.Busy):
        await session.close()
    assert (session.state, session.busy) == (State.UNMOUNTING, True)
    assert not any(volume.mounted for volume in session.volumes.values())
    with pytest.raises(errors.Unavailable):
        await names_in(session, b"partition-1")
    del house.simulator.refuse["free"]
    await session.close()
    assert house.simulator.standing == set()


async def test_force_ends_the_servers_before_the_reader_that_may_wait_for_them(house: House) -> None:
    session = await house.built()
    house.simulator.steps.clear()
    await session.force()
    steps = house.simulator.steps
    assert steps.index("kill partition-1") < next(n for n, step in enumerate(steps) if step.startswith("end reader"))
    assert house.simulator.standing == set()


async def test_busy_with_the_server_gone_is_not_made_whole(house: House) -> None:
    session = await house.built(THREE)
    house.simulator.busy.add("partition-2")
    gate = house.simulator.stop_at("unmount partition-2")
    closing = asyncio.create_task(session.close())
    await gate.reached.wait()
    house.simulator.attachments[0].die("the image server ended")
    assert await session.lost == "the image server ended"
    gate.open()
    with pytest.raises(errors.Busy):
        await closing
    assert session.state is State.UNMOUNTING
    await session.force()


@pytest.mark.parametrize("step", [*sim.CLOSE_STEPS, "leave workplace"])
async def test_a_teardown_that_fails_goes_on_from_there(house: House, step: str) -> None:
    session = await house.built(TWO_DISKS)
    house.simulator.refuse[step] = OSError(5, "Input/output error")
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            await session.close()
    assert session.state is State.UNMOUNTING
    del house.simulator.refuse[step]
    await session.close()
    assert not house.simulator.standing


@pytest.mark.parametrize("step", [*sim.CLOSE_STEPS, "abandon", "leave workplace"])
async def test_force_that_fails_goes_on_from_there(house: House, step: str) -> None:
    session = await house.built(TWO_DISKS)
    house.simulator.refuse[step] = OSError(5, "Input/output error")
    if step in {"take_back", "unmount"}:  # which force does without
        await session.force()
        return
    with pytest.raises(OSError, match="Input/output error"):
        await session.force()
    del house.simulator.refuse[step]
    await session.force()
    assert not house.simulator.standing


@pytest.mark.parametrize("step", sim.CLOSE_STEPS)
async def test_a_teardown_that_is_cancelled_can_be_taken_up_again(house: House, step: str) -> None:
    session = await house.built(TWO_DISKS)
    gate = house.simulator.stop_at(step)
    closing = asyncio.create_task(session.close())
    await gate.reached.wait()
    closing.cancel()
    await asyncio.wait([closing])
    gate.open()
    await session.close()
    assert not house.simulator.standing


async def test_force_ends_the_server_before_anything_that_may_wait_for_it(house: House) -> None:
    session = await house.built(THREE)
    house.simulator.busy |= {"partition-1", "partition-2"}
    gate = house.simulator.stop_at("end reader")
    forcing = asyncio.create_task(session.force())
    await gate.reached.wait()
    assert house.simulator.attachments[0].dead
    gate.open()
    await forcing
    assert not house.simulator.standing


async def test_after_force_no_volume_claims_to_be_mounted(house: House) -> None:
    session = await house.built(THREE)
    await session.force()
    assert {volume.state.value for volume in session.volumes.values()} == {"mountable"}


@pytest.mark.parametrize("part", ["server", "reader", "driver"])
async def test_the_loss_of_a_part_is_told_once_with_its_reason(house: House, part: str) -> None:
    session = await house.built(THREE)
    if part == "server":
        house.simulator.attachments[0].die("gone")
    elif part == "reader":
        house.simulator.readers[0].die("gone")
    else:
        mounted = session.volumes["partition-2"].mounted
        assert mounted is not None
        mounted.lost.set_result("gone")
    assert await session.lost == "gone"
    house.simulator.attachments[0].die("also gone")
    await session.force()


@pytest.mark.parametrize("step", ["discover", "mount", "give"])
async def test_a_part_that_is_lost_while_building_is_no_success(house: House, step: str) -> None:
    gate = house.simulator.stop_at(step)
    session = await house.session()
    building = asyncio.create_task(session.build())
    await gate.reached.wait()
    house.simulator.attachments[0].die("the image server ended")
    gate.open()
    with pytest.raises(errors.Unavailable, match="the image server ended"):
        await building
    await session.force()


async def test_closing_what_was_never_built_is_nothing(house: House) -> None:
    session = await house.session()
    await session.close()
    await session.force()
    assert house.simulator.steps == []
