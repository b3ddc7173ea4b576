"""Functions that may never come back, each in a thread of its own.

Storage that has gone away (NFS, above all) holds whoever asks it in the kernel, for as long as it likes. A thread
that waits there cannot be ended; it can only be left behind. So none is borrowed from a pool that others need, none
keeps the daemon from ending (they are daemon threads), and a place that has several of them waiting gets no more
until one comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from typing import TYPE_CHECKING, TypeVar

from sendense_restored import errors

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

MOST_WAITING = 8
"""Threads of one place, whether their callers still wait or not."""


class Threads:
    """Starts them and counts them by place."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()

    async def run(
        self,
        place: str,
        function: Callable[[], _T],
        *,
        seconds: float | None,
        discard: Callable[[_T], object] = lambda _: None,
    ) -> _T:
        """The result of ``function``, or what it raises.

        If the caller is cancelled or ``seconds`` are over first, the result is given to ``discard`` (on the loop)
        when it comes. Raises TimeoutError; errors.Unavailable if ``place`` has too many that did not come back.
        """
        if self._running[place] >= MOST_WAITING:
            raise errors.Unavailable("the storage does not answer; check that it is reachable and try again")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_T] = loop.create_future()

        def returned(value: _T) -> None:
            self._running[place] -= 1
            if answer.done():
                discard(value)
            else:
                answer.set_result(value)

        def raised(error: BaseException) -> None:
            self._running[place] -= 1
            if not answer.done():
                answer.set_exception(error)

        def work() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there any more
                try:
                    value = function()
                except BaseException as error:  # noqa: BLE001 - handed on, whatever it is
                    loop.call_soon_threadsafe(raised, error)
                else:
                    loop.call_soon_threadsafe(returned, value)

        self._running[place] += 1
        threading.Thread(target=work, name=f"waits for {place}", daemon=True).start()
        try:
            async with asyncio.timeout(seconds):
                return await answer
        except BaseException:
            # Given up, maybe in the very moment in which the result came.
            if not answer.cancel() and not answer.cancelled() and answer.exception() is None:
                discard(answer.result())
            raise
