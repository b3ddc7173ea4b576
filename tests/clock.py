"""A clock that goes when the test says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sendense_restored.daemon.host.clock import Timer

if TYPE_CHECKING:
    from collections.abc import Callable


class FakeClock:
    """See ``host.clock.Clock``; it begins at noon of some day."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._epoch = 1_700_000_000.0
        self._timers: list[Timer] = []

    def now(self) -> float:
        return self._now

    def unix(self) -> float:
        return self._epoch + self._now

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        timer = Timer(when, callback)
        self._timers.append(timer)
        return timer

    def step_wall(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self._epoch += seconds

    def forget(self) -> None:
        """Whoever asked for deadlines has ended: there are none."""
        self._timers.clear()

    @property
    def next(self) -> float | None:
        """Seconds until the earliest deadline."""
        waiting = [timer.when for timer in self._timers if timer.callback is not None]
        return min(waiting) - self._now if waiting else None

    def advance(self, seconds: float) -> int:
        """Let time pass; deadlines are met one after the other, each at its own time. How many there were."""
        end = self._now + seconds
        met = 0
        while True:
            self._timers = [timer for timer in self._timers if timer.callback is not None]
            due = min(
                (timer for timer in self._timers if timer.when <= end), key=lambda each: each.when, default=None
            )
            if due is None:
                self._now = end
                return met
            self._now = max(self._now, due.when)
            callback, due.callback = due.callback, None
            if callback is not None:
                callback()
                met += 1
