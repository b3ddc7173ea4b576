"""The conversation with the service manager: what state the daemon is in, and that it is alive (sd_notify(3)).

``ServiceManager.take`` takes the manager's variables out of the environment, so that nothing that is started later
can speak in the daemon's name, and owns the socket until ``close``. Without a manager everything here does nothing.

The watchdog (sd_watchdog_enabled(3)) is told of life every half of its interval, by a timer of the event loop, and
only after the message bus has answered a ping: a daemon whose loop turns but whom nobody can reach is dead to its
callers, and starting it again is what helps. Without a watchdog there is no timer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING, Protocol

import sdnotify

from .bus import BusCallError, BusError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
_LONGEST_STATUS = 1000


class _Timer(Protocol):
    def cancel(self) -> object:
        """Do not call back."""


class ServiceManager:
    """What the daemon tells its manager. ``watchdog`` is the manager's patience in seconds, 0 for endless."""

    def __init__(self, notifier: sdnotify.SystemdNotifier | None, *, watchdog: float) -> None:
        self.watchdog = watchdog
        self._notifier = notifier
        self._status = self._notice = ""
        self._told = ""
        self._timer: _Timer | None = None
        self._proof: asyncio.Task[None] | None = None

    @classmethod
    def take(cls) -> ServiceManager:
        """The manager that the environment names, if it names one; its variables are not there any more then."""
        watchdog = _watchdog()
        notifier = None
        if os.environ.get("NOTIFY_SOCKET"):
            try:
                # "debug": errors come to us, who log them.
                notifier = sdnotify.SystemdNotifier(debug=True)
                notifier.socket.settimeout(0)  # a manager that hangs must not hang us
            except (OSError, ValueError) as error:
                log.error("the service manager cannot be reached: %s", error)  # noqa: TRY400 - errno says it all
        for name in _VARIABLES:
            os.environ.pop(name, None)
        return cls(notifier, watchdog=watchdog)

    def ready(self) -> None:
        """The service can be used; also the end of a reload."""
        self._tell("READY=1")

    def status(self, text: str) -> None:
        """What an operator sees in the manager's status line: one sentence on how things are."""
        self._status = text
        self._tell_status()

    def notice(self, text: str) -> None:
        """A sentence behind the status that stays until another one, or an empty one, takes its place."""
        self._notice = text
        self._tell_status()

    def reloading(self) -> None:
        """The configuration is being read again; ``ready`` ends that (``Type=notify-reload``)."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """The service is going down."""
        self._tell("STOPPING=1")

    def extend(self, seconds: float) -> None:
        """Starting, reloading or stopping goes on: wait ``seconds`` more from now before giving up on us."""
        self._tell(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def watch(
        self,
        ping: Callable[[float], Awaitable[object]],
        *,
        call_later: Callable[[float, Callable[[], None]], _Timer] | None = None,
    ) -> None:
        """Tell of life from now on, if the manager wants it.

        ``ping`` is given the seconds that an answer may take, and raises BusCallError, BusError or TimeoutError.
        ``call_later`` is the event loop's, whose clock is the manager's as well (CLOCK_MONOTONIC).
        """
        if not self.watchdog or self._timer is not None:
            return
        later = call_later or asyncio.get_running_loop().call_later
        half = self.watchdog / 2

        def beat() -> None:
            self._timer = later(half, beat)
            if self._proof is None or self._proof.done():
                # An answer just before the deadline still leaves a quarter of the interval until it is too late.
                self._proof = asyncio.create_task(self._prove(ping, half / 2), name="prove to be alive")

        beat()

    async def _prove(self, ping: Callable[[float], Awaitable[object]], seconds: float) -> None:
        try:
            await ping(seconds)
        except (BusCallError, BusError, TimeoutError) as error:
            log.error("the message bus does not answer: %s", error or "no answer in time")  # noqa: TRY400 - says it all
        else:
            self._tell("WATCHDOG=1")

    async def unwatch(self) -> None:
        """Prove nothing any more: what would have to be proven is going away. May be called again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._proof is not None:
            self._proof.cancel()
            await asyncio.wait([self._proof])
            self._proof = None

    def close(self) -> None:
        """Say nothing any more. May be called again."""
        if self._notifier is not None:
            self._notifier.socket.close()
            self._notifier = None

    def _tell_status(self) -> None:
        text = "; ".join(filter(None, (self._status, self._notice)))
        # The library knows latin-1 only, and a line break would begin another message.
        line = "".join(char if char.isprintable() else " " for char in text).encode("ascii", "backslashreplace")
        told = f"STATUS={line[:_LONGEST_STATUS].decode('ascii')}"
        if told != self._told:
            self._told = told
            self._tell(told)

    def _tell(self, state: str) -> None:
        if self._notifier is None:
            return
        try:
            self._notifier.notify(state)
        except OSError as error:
            log.warning("the service manager does not take %r: %s", state.partition("=")[0], error)


def _watchdog() -> float:
    """The interval in seconds in which the manager wants to hear from this process, 0 if it does not."""
    interval, pid = os.environ.get("WATCHDOG_USEC"), os.environ.get("WATCHDOG_PID")
    if interval is None or (pid is not None and pid != str(os.getpid())):
        return 0.0
    if not (interval.isascii() and interval.isdigit()):
        log.warning("WATCHDOG_USEC is %r, which is no number: there will be no watchdog", interval)
        return 0.0
    return int(interval) / 1e6
