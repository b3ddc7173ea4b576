"""Deadlines on CLOCK_BOOTTIME: met in order, at most once, and with nothing to wait for there is no timer."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import linux
from sendense_restored.daemon.host.clock import BootClock, Timer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def clock() -> AsyncIterator[BootClock]:
    clock = BootClock()
    yield clock
    clock.close()
    clock.close()


def timers() -> list[str]:
    """What the kernel says of the timer descriptors of this process (proc_pid_fdinfo(5))."""
    found = []
    for descriptor in tuple(Path("/proc/self/fdinfo").iterdir()):
        try:
            text = descriptor.read_text(encoding="ascii")
        except FileNotFoundError:
            continue
        if "clockid:" in text:
            found.append(text)
    return found


async def met(event: asyncio.Event) -> None:
    async with asyncio.timeout(60):
        await event.wait()


async def test_deadlines_are_met_in_their_order(clock: BootClock) -> None:
    order: list[str] = []
    last = asyncio.Event()
    now = clock.now()

    def third() -> None:
        order.append("third")
        last.set()

    clock.call_at(now + 0.02, third)
    clock.call_at(now + 0.01, lambda: order.append("second"))
    clock.call_at(now - 5, lambda: order.append("first"))
    await met(last)
    assert order == ["first", "second", "third"]
    assert clock.now() >= now + 0.02


async def test_it_counts_the_time_that_the_machine_sleeps(clock: BootClock) -> None:
    clock.call_at(clock.now() + 1000, lambda: None)
    (timer,) = timers()
    assert f"clockid: {time.CLOCK_BOOTTIME}" in timer
    assert abs(clock.now() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 60
    assert abs(clock.unix() - time.time()) < 60


async def test_without_a_deadline_nothing_is_armed(clock: BootClock) -> None:
    assert "it_value: (0, 0)" in timers()[0]
    done = asyncio.Event()
    clock.call_at(clock.now(), done.set)
    await met(done)
    assert "it_value: (0, 0)" in timers()[0]


async def test_what_was_cancelled_is_not_called_and_no_longer_waited_for(clock: BootClock) -> None:
    called: list[str] = []
    done = asyncio.Event()
    early = clock.call_at(clock.now() + 0.01, lambda: called.append("early"))
    clock.call_at(clock.now() + 0.02, done.set)
    early.cancel()
    early.cancel()
    await met(done)
    assert called == []


async def test_when_the_last_one_is_cancelled_nothing_is_armed(clock: BootClock) -> None:
    early, late = (clock.call_at(clock.now() + seconds, lambda: None) for seconds in (100, 200))
    armed = timers()
    early.cancel()
    assert timers() != armed
    late.cancel()
    assert "it_value: (0, 0)" in timers()[0]


async def test_one_deadline_may_cancel_another_of_the_same_moment(clock: BootClock) -> None:
    called: list[str] = []
    done = asyncio.Event()
    now = clock.now()
    later: list[Timer] = []

    def cancel() -> None:
        later[0].cancel()

    clock.call_at(now, cancel)
    later.append(clock.call_at(now, lambda: called.append("second")))
    clock.call_at(now, done.set)
    await met(done)
    assert called == []


async def test_a_callback_may_set_the_next_deadline(clock: BootClock) -> None:
    done = asyncio.Event()
    left = 3

    def again() -> None:
        nonlocal left
        left -= 1
        if left:
            clock.call_at(clock.now(), again)
        else:
            done.set()

    clock.call_at(clock.now(), again)
    await met(done)


async def test_one_deadline_that_fails_does_not_cost_the_others(clock: BootClock) -> None:
    done = asyncio.Event()
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
    clock.call_at(clock.now(), lambda: 1 // 0)
    clock.call_at(clock.now(), done.set)
    await met(done)
    assert [type(each) for each in told] == [ZeroDivisionError]


async def test_after_the_end_nothing_is_called(clock: BootClock) -> None:
    called: list[str] = []
    clock.call_at(clock.now(), lambda: called.append("late"))
    clock.close()
    clock.call_at(clock.now(), lambda: called.append("later"))
    await asyncio.sleep(0)
    assert called == []
    assert timers() == []


def test_the_kernel_says_no_as_an_error() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        linux.timerfd_create(12345)
    with pytest.raises(OSError, match="Bad file descriptor"):
        linux.timerfd_set(-1, 1.0)
