"""Block device events on the event loop.

Events are hints and sysfs is the truth: whoever waits gives a condition that reads sysfs, and each event only says
that it is worth asking again. The monitor listens to the kernel's own multicast group, so it works without udevd; an
overflow of its buffer (ENOBUFS) is one more reason to ask again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

import pyudev

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

_BUFFER = 1 << 20


class BlockEvents:
    """Wakes those who wait for a block device to change."""

    def __init__(self) -> None:
        """Begin to listen, on the running loop."""
        self._waiting: set[asyncio.Event] = set()
        self._monitor: pyudev.Monitor | None = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
        self._monitor.filter_by("block")
        # Needs CAP_NET_ADMIN, and libudev's "done, by force" (1) is taken by pyudev for a failure with whatever errno
        # was left over. Without it the buffer only overflows earlier, which costs one more look at sysfs.
        with contextlib.suppress(OSError, ValueError):
            self._monitor.set_receive_buffer_size(_BUFFER)
        self._monitor.start()
        asyncio.get_running_loop().add_reader(self._monitor.fileno(), self._drain)

    def close(self) -> None:
        """Stop listening; may be called again. Whoever still waits runs into its own deadline, if it has one."""
        if self._monitor is not None:
            asyncio.get_running_loop().remove_reader(self._monitor.fileno())
            self._monitor = None  # pyudev closes the socket with its last reference, and in no other way

    def _drain(self) -> None:
        try:
            while self._monitor is not None and self._monitor.poll(0) is not None:
                pass
        except OSError as error:  # pyudev raises it for POLLERR, which is how an overflow shows
            log.info("block events were lost: %s", error)
        for event in self._waiting:
            event.set()

    async def until(self, condition: Callable[[], bool], *, seconds: float | None) -> bool:
        """Wait until ``condition()`` is true, asking at once and after each event; False if time ran out.

        Without ``seconds`` it waits as long as it takes.
        """
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    await event.wait()
                    event.clear()
        except TimeoutError:
            return condition()
        finally:
            self._waiting.discard(event)
        return True
