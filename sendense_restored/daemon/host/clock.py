"""Time for deadlines, which goes on while the machine sleeps.

CLOCK_BOOTTIME is monotonic and counts suspension (clock_gettime(2)): a mount that should end after an hour ends an
hour later also if the appliance slept meanwhile, and a step of the wall clock moves nothing. The event loop's own
clock does not count suspension, so deadlines hang on one timerfd (timerfd_create(2)), which is armed for the earliest
of them; with no deadline there is no timer, and nobody wakes up.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import os
import time
from typing import TYPE_CHECKING, Protocol

from sendense_restored import linux

if TYPE_CHECKING:
    from collections.abc import Callable


class Timer:
    """A deadline; ``cancel`` takes it away. May be cancelled again, or after it has passed.

    ``cancelled`` is how the clock hears that it need not wait any more.
    """

    def __init__(
        self, when: float, callback: Callable[[], object], cancelled: Callable[[Timer], object] | None = None
    ) -> None:
        self.when = when
        self.callback: Callable[[], object] | None = callback
        self._cancelled = cancelled

    def cancel(self) -> None:
        """Do not call the callback any more."""
        if self.callback is not None:
            self.callback = None
            if self._cancelled is not None:
                self._cancelled(self)


class Clock(Protocol):
    """What deadlines are measured with; tests put one here that they move themselves."""

    def now(self) -> float:
        """Seconds since some moment in the past; never goes back, and counts suspension."""

    def unix(self) -> float:
        """Seconds since the epoch, for people and for the database."""

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        """Call ``callback`` on the event loop once ``now()`` is ``when`` or more."""


class BootClock:
    """CLOCK_BOOTTIME; owns a timerfd until ``close``."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._descriptor = linux.timerfd_create(time.CLOCK_BOOTTIME)
        self._timers: list[Timer] = []
        """Those that are waited for, the earliest first; there are few."""
        self._armed: float | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._due)

    def close(self) -> None:
        """Forget all deadlines. May be called again."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            self._timers.clear()

    def now(self) -> float:
        """See ``Clock``."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def unix(self) -> float:
        """See ``Clock``."""
        return time.time()

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        """See ``Clock``."""
        timer = Timer(when, callback, self._forget)
        bisect.insort(self._timers, timer, key=_when)
        self._arm()
        return timer

    def _forget(self, timer: Timer) -> None:
        if timer in self._timers:
            self._timers.remove(timer)
            self._arm()

    def _arm(self) -> None:
        """Set the timerfd to the earliest deadline, if it is not set to that already."""
        when = self._timers[0].when if self._timers else None
        if when == self._armed or self._descriptor < 0:
            return
        self._armed = when
        # A deadline that has passed fires at once; it must not be zero, which disarms.
        linux.timerfd_set(self._descriptor, 0.0 if when is None else max(when, 1e-6))

    def _due(self) -> None:
        with contextlib.suppress(BlockingIOError):  # set anew meanwhile, and not due any more
            os.read(self._descriptor, 8)
        self._armed = None
        due = bisect.bisect_right(self._timers, self.now(), key=_when)
        # Each is called on its own, so that one that fails costs no other.
        for timer in self._timers[:due]:
            self._loop.call_soon(_call, timer)
        del self._timers[:due]
        self._arm()


def _when(timer: Timer) -> float:
    return timer.when


def _call(timer: Timer) -> None:
    """Unless it was cancelled in this very turn of the event loop."""
    callback, timer.callback = timer.callback, None
    if callback is not None:
        callback()
