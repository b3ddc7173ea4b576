"""One database, one connection, one thread.

The connection belongs to the thread and ends with it. Whatever is done with the database is a unit of work: one
plain function, run on the thread inside one transaction, so that no ``await`` can stand in the middle of it, and two
tasks of the event loop cannot share a transaction. Units run in the order in which they were asked for. A cancelled
caller stops waiting; a unit that has begun is finished all the same.

A connection that is found dead before a unit has begun, which a server's restart or a long silence makes of it, is
replaced, and the unit runs on the new one. A unit that fails in its midst is not repeated: nobody knows how far it
came. Only where the database says that it has undone the transaction in favour of another one, it is tried once more.

A database that fails is said here, once, as CatalogUnavailable; at start, a database of our own is StoreError, and
one of others is tried again whenever it is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from sendense_restored import names
from sendense_restored.errors import CatalogUnavailable, InvalidOption

from .engine import Trouble
from .models import bind_to_thread
from .records import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from .engine import Engine

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Database:
    """An open database. Open it with ``open``, close it with ``close``.

    ``what`` it is begins the sentences that clients are told when it fails.
    """

    def __init__(self, engine: Engine, what: str, *, ours: bool = True) -> None:
        self.name = engine.name
        self._engine, self._what, self._ours = engine, what, ours
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._closing: Future[None] | None = None

    @classmethod
    async def open(cls, engine: Engine, what: str = "the catalogue", *, ours: bool = True) -> Database:
        """Open a database: one that is ``ours`` is made ready, with StoreError if that cannot be.

        One of others is connected to when it is used.
        """
        self = cls(engine, what, ours=ours)
        try:
            await self._do(self._prepare if ours else self._bind)
        except BaseException:
            await self.close()
            raise
        return self

    async def _do(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _bind(self) -> None:
        bind_to_thread(self._engine.database)

    def _prepare(self) -> None:
        self._bind()
        expected: tuple[type[Exception], ...] = (StoreError, OSError, *self._engine.errors)
        try:
            self._engine.prepare()
        except expected as error:
            _release(error)
            raise self._engine.refusal(error) from error

    async def read(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a unit of work that only reads."""
        return await self._run(self._engine.read_mode, partial(work, *args, **kwargs))

    async def write(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a unit of work that writes: all of it comes to pass, or, if it raises, nothing."""
        return await self._run(self._engine.write_mode, partial(work, *args, **kwargs))

    async def change(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what cannot be in a transaction: a change of the tables themselves."""
        return await self._run(None, partial(work, *args, **kwargs))

    async def _run(self, mode: str | None, work: Callable[[], T]) -> T:
        if self._closing is not None:
            raise CatalogUnavailable("the service is stopping; try again when it runs")
        return await self._do(partial(self._unit, mode, work, time.monotonic()))

    def _unit(self, mode: str | None, work: Callable[[], T], asked: float) -> T:
        if self._overdue(asked):
            # Those before it have waited for a server that hangs; one that is asked for from now on tries again.
            raise CatalogUnavailable(f"{self._what} does not answer; try again later")
        try:
            return self._attempt(mode, work)
        except _TryAgainError as error:
            if self._overdue(asked):
                raise self._unavailable(error.reason) from error.reason
        try:
            return self._attempt(mode, work)
        except _TryAgainError as error:
            raise self._unavailable(error.reason) from error.reason

    def _overdue(self, asked: float) -> bool:
        patience = self._engine.patience
        return patience is not None and time.monotonic() - asked > patience

    def _attempt(self, mode: str | None, work: Callable[[], T]) -> T:
        """Run a unit once. Raises _TryAgainError if that may be done again, and else what it is to raise."""
        begun, new = False, True
        try:
            new = self._engine.connect()
            with self._engine.database.atomic(mode) if mode else contextlib.nullcontext():
                begun = True
                return work()
        except UnicodeEncodeError:
            raise InvalidOption("a text holds half a surrogate pair, which no name has") from None
        except self._engine.errors as error:
            _release(error)
            trouble = self._engine.trouble(error)
            if trouble is Trouble.LOST:
                self._engine.disconnect()
            if trouble is Trouble.CONFLICT or (trouble is Trouble.LOST and not begun and not new):
                raise _TryAgainError(error) from error
            if trouble is Trouble.FAULT and self._ours:  # others' may answer a good question with any error
                raise
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> CatalogUnavailable:
        log.warning("not using %s: %s", self.name, names.displayable(f"{error!s:.500}"))
        return CatalogUnavailable(f"{self._what} {self._engine.advice(error)}")

    async def close(self) -> None:
        """Refuse new work, finish what was asked for, close the connection and join the thread. May be repeated."""
        if self._closing is None:
            self._closing = self._thread.submit(self._engine.disconnect)
        await asyncio.shield(asyncio.wrap_future(self._closing))
        self._thread.shutdown()  # the thread is idle by now: this joins without waiting


class _TryAgainError(Exception):
    """The unit has left nothing behind, and may succeed if it is run again."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _release(error: BaseException | None) -> None:
    """Let go of what the frames of a failed statement hold.

    That is its cursor, which would keep the database's files open beyond ``close`` for as long as the error lives.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
