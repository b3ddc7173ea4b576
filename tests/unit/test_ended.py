"""What became of mounts that are gone: told for a day, and then forgotten."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from sendense_restored import errors
from sendense_restored.daemon.ended import REMEMBERED, Ended
from tests.clock import FakeClock

DAY = 86_400


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def ended(clock: FakeClock) -> Ended:
    return Ended(clock)


def told(ended: Ended, mount_id: str) -> str:
    """The reason that is told, empty if the mount is not known."""
    error = ended.error(mount_id)
    if isinstance(error, errors.MountNotFound):
        return ""
    assert isinstance(error, errors.Expired)
    return error.message


def test_the_reason_and_the_time_are_told_and_what_to_do(clock: FakeClock, ended: Ended) -> None:
    ended.add("m1", "nobody used it")
    clock.advance(100)
    when = f"{datetime.fromtimestamp(clock.unix() - 100, UTC):%Y-%m-%d %H:%M} UTC"
    assert told(ended, "m1") == f"the mount has ended ({when}): nobody used it; mount the backup again"
    assert told(ended, "m2") == ""


def test_a_mount_that_ended_without_a_reason_is_known_too(ended: Ended) -> None:
    ended.add("m1", "")
    assert told(ended, "m1")


def test_after_a_day_it_is_forgotten(clock: FakeClock, ended: Ended) -> None:
    assert REMEMBERED == DAY
    ended.add("m1", "unmounted")
    clock.step_wall(-3 * DAY)  # which moves nothing
    clock.advance(DAY)
    assert told(ended, "m1")
    clock.advance(1)
    assert told(ended, "m1") == ""


def test_what_an_earlier_daemon_wrote_down_is_remembered_for_the_rest_of_its_day(
    clock: FakeClock, ended: Ended
) -> None:
    def ago(seconds: float) -> datetime:
        return datetime.fromtimestamp(clock.unix() - seconds, UTC)

    ended.load({"young": (ago(100), "a"), "old": (ago(DAY - 50), "b"), "forgotten": (ago(DAY + 50), "c")})
    assert [bool(told(ended, name)) for name in ("young", "old", "forgotten")] == [True, True, False]
    clock.advance(51)
    assert [bool(told(ended, name)) for name in ("young", "old")] == [True, False]


def test_it_does_not_grow_without_end(clock: FakeClock, ended: Ended) -> None:
    for number in range(10_100):
        ended.add(f"m{number}", "unmounted")
    assert (told(ended, "m99"), bool(told(ended, "m100"))) == ("", True)
    for number in range(10_100, 30_000):
        clock.advance(10)
        ended.add(f"m{number}", "unmounted")
    assert len(ended._ended) < 9_000
