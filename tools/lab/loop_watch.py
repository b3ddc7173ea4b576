"""How long the callbacks of an event loop hold it: what asyncio's debug mode logs as "Executing ... took", counted.

Debug mode takes the time on the wall, and so blames a callback for whatever else the machine did meanwhile; it also
makes every callback slower. Here the same calls (``Handle._run``, one step of a task or one callback) are measured by
the CPU time of the loop's own thread, which neither a busy machine nor another thread changes. A callback that waits
in the kernel does not show; it is work, such as packing a long answer, that this finds.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Turns:
    """What the loop of one thread has run."""

    count: int = 0
    longest: list[tuple[float, str]] = field(default_factory=list)
    """CPU seconds and the callback, of the ten that took longest, the worst first."""

    def add(self, seconds: float, handle: asyncio.Handle) -> None:
        """Note a callback that has run."""
        self.count += 1
        if len(self.longest) < 10 or seconds > self.longest[-1][0]:
            self.longest = sorted([*self.longest, (seconds, _name(handle))], reverse=True)[:10]

    def over(self, seconds: float) -> list[str]:
        """Those of the longest that took more, as text."""
        return [f"{taken * 1000:.1f} ms: {what}" for taken, what in self.longest if taken > seconds]


def _name(handle: asyncio.Handle) -> str:
    """The callback, or the task of which it is a step."""
    callback = handle._callback  # type: ignore[attr-defined]  # noqa: SLF001 - it tells nobody else
    owner = getattr(callback, "__self__", None)
    return owner.get_name() if isinstance(owner, asyncio.Task) else repr(callback)


@contextlib.contextmanager
def watched() -> Iterator[Turns]:
    """Measure what the event loop of this thread runs while the context lasts."""
    turns, own = Turns(), threading.get_ident()
    real = asyncio.Handle._run  # noqa: SLF001 - what the loop calls; it has no hook of this kind

    def run(handle: asyncio.Handle) -> None:
        if threading.get_ident() != own:
            real(handle)
            return
        began = time.thread_time()
        real(handle)
        turns.add(time.thread_time() - began, handle)

    with mock.patch.object(asyncio.Handle, "_run", run):
        yield turns
