"""One database, one connection, one thread.

The connection belongs to the thread and ends with it. Whatever is done with the database is a unit of work: one
plain function, run on the thread inside one transaction, so that no ``await`` can stand in the middle of it, and two
tasks of the event loop cannot share a transaction. Units run in the order in which they were asked for. A cancelled
caller stops waiting; a unit that has begun is finished all the same.

A database that fails is said here, once, as CatalogUnavailable; at start it is StoreError.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import sqlite3
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import peewee

from sendense_restored.errors import CatalogUnavailable, InvalidOption

from .migrations import migrate
from .models import bind_to_thread
from .records import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

BUSY_TIMEOUT = 5.0
_SCHEME = "sqlite:///"

# Reads see one snapshot. Writers take the lock at once: a transaction that starts as a reader and then wants to write
# fails with "locked" without any waiting if somebody else wrote in between.
_READ = "DEFERRED"
_WRITE = "IMMEDIATE"

# full: the count of resume attempts must be on the disk before an image is touched that may crash the kernel.
_PRAGMAS = {"journal_mode": "wal", "foreign_keys": 1, "synchronous": "full"}


class Database:
    """An open database. Open it with ``open``, close it with ``close``."""

    def __init__(self, path: Path, busy_timeout: float) -> None:
        self._path = path
        # The timeout is sqlite's busy_timeout, in seconds, in force before the first pragma.
        self._database = peewee.SqliteDatabase(os.fspath(path), pragmas=_PRAGMAS, timeout=busy_timeout)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._closing: Future[None] | None = None

    @classmethod
    async def open(cls, url: str, *, busy_timeout: float = BUSY_TIMEOUT) -> Database:
        """Open ``sqlite:///`` + absolute path, made if it is not there, and migrate it.

        ``busy_timeout`` is how many seconds another process' lock is waited for. Raises StoreError.
        """
        path = Path(url.removeprefix(_SCHEME))
        if not url.startswith(_SCHEME) or not path.is_absolute():
            raise StoreError(f"database.url is {url!r}; it must be '{_SCHEME}' and an absolute path")
        self = cls(path, busy_timeout)
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._prepare)
        except BaseException:
            await self.close()
            raise
        return self

    def _prepare(self) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _alone_in(self._path.parent):
                _create(self._path)
                bind_to_thread(self._database)
                self._database.connect()
                migrate(self._database)
        except StoreError as error:
            raise StoreError(f"{self._path}: {error}") from None
        except OSError as error:
            raise StoreError(f"{self._path}: cannot be created: {error.strerror}") from error
        except (peewee.PeeweeException, sqlite3.Error) as error:
            raise StoreError(
                f"{self._path}: cannot be opened: {error}; move a damaged one away and scan the repositories again"
            ) from error

    async def read(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a unit of work that only reads."""
        return await self._run(_READ, partial(work, *args, **kwargs))

    async def write(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a unit of work that writes: all of it comes to pass, or, if it raises, nothing."""
        return await self._run(_WRITE, partial(work, *args, **kwargs))

    async def _run(self, lock: str, work: Callable[[], T]) -> T:
        if self._closing is not None:
            raise CatalogUnavailable("the service is stopping; try again when it runs")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._unit, lock, work)

    def _unit(self, lock: str, work: Callable[[], T]) -> T:
        try:
            with self._database.atomic(lock):
                return work()
        except (peewee.IntegrityError, peewee.ProgrammingError) as error:
            _release(error)
            raise  # a fault of ours, not of the database
        except UnicodeEncodeError:
            raise InvalidOption("a text holds half a surrogate pair, which no name has") from None
        except (peewee.DatabaseError, sqlite3.DatabaseError) as error:  # peewee lets errors while fetching through
            _release(error)
            log.warning("not using %s: %s", self._path, error)
            if "locked" in str(error):
                raise CatalogUnavailable("the catalogue is locked by another program; try again") from error
            raise CatalogUnavailable("the catalogue cannot be used; the service's journal has the details") from error

    async def close(self) -> None:
        """Refuse new work, finish what was asked for, close the connection and join the thread. May be repeated."""
        if self._closing is None:
            self._closing = self._thread.submit(self._disconnect)
        await asyncio.shield(asyncio.wrap_future(self._closing))
        self._thread.shutdown()  # the thread is idle by now: this joins without waiting

    def _disconnect(self) -> None:
        self._database.close()


def _release(error: BaseException | None) -> None:
    """Let go of what the frames of a failed statement hold.

    That is its cursor, which would keep the database's files open beyond ``close`` for as long as the error lives.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Wait until no other process or thread prepares a database there.

    SQLite itself does not wait when two connections change the journal mode of a new database at once.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _create(path: Path) -> None:
    """Make an empty file of mode 0600; SQLite gives its side files the same mode.

    An existing one is not even opened: closing a descriptor of it would drop the locks of this process (fcntl(2)).
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return
