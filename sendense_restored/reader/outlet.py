"""The write end of a client's pipe, and what ends the writing: nobody reads, nobody reads fast enough, or an order.

An ``Outlet`` owns the pipe's end and an eventfd. One thread writes; it waits for room no longer than ``stall`` and
is woken by ``stop``, which any thread may call. So a client that has stopped reading holds up nothing but its own
stream.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import threading
from typing import TYPE_CHECKING, Self

from sendense_restored import errors

if TYPE_CHECKING:
    from types import TracebackType


_LONGEST = 2**31 - 1  # milliseconds that poll(2) can wait


class Ended(Exception):  # noqa: N818 - no error: whoever reads may stop when they like
    """Nothing more is to be written."""


class Outlet:
    """A pipe's write end. A context manager, which closes it; a second ``close`` is nothing."""

    def __init__(self, descriptor: int, *, stall: float) -> None:
        """Takes over ``descriptor``, also if it raises Unavailable: for what is no pipe's write end, for one."""
        self.written = 0
        """Bytes."""
        self._descriptor = descriptor
        self._milliseconds = min(stall * 1000, _LONGEST)
        self._lock = threading.Lock()
        try:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            if not stat.S_ISFIFO(os.fstat(descriptor).st_mode) or flags & (os.O_ACCMODE | os.O_PATH) != os.O_WRONLY:
                raise errors.Unavailable("the mount's reader was given no pipe to write to; restart the service")
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_NONBLOCK)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            os.close(descriptor)
            raise errors.Unavailable("the mount's reader is short of descriptors; try again in a moment") from None
        except errors.Unavailable:
            os.close(descriptor)
            raise
        self._stopped = select.poll()
        self._stopped.register(self._wake, select.POLLIN)
        self._stopped.register(descriptor, 0)  # POLLERR alone, which is always told: the last reader has gone
        self._room = select.poll()
        self._room.register(self._wake, select.POLLIN)
        self._room.register(descriptor, select.POLLOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _failure: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()

    def check(self) -> None:
        """Raises Ended if writing is of no use any more."""
        if self._stopped.poll(0):
            raise Ended

    def write(self, data: bytes) -> None:
        """Write all of ``data``. Raises Ended."""
        left = memoryview(data)
        while left:
            try:
                size = os.write(self._descriptor, left)
            except BlockingIOError:
                self._wait_for_room()
            except BrokenPipeError:
                raise Ended from None
            else:
                self.written += size
                left = left[size:]

    def _wait_for_room(self) -> None:
        ready = dict(self._room.poll(self._milliseconds))
        if self._wake in ready or not ready.get(self._descriptor, 0) & select.POLLOUT:
            raise Ended

    def stop(self) -> None:
        """End the writing, also the waiting for room that is under way. Safe to call from any thread."""
        with self._lock:
            if self._descriptor >= 0:
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Close the pipe, so that whoever reads it sees its end."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                os.close(self._wake)
                self._descriptor = -1
