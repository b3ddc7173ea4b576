"""SQLite: a file of our own, or a catalogue in a file that others write and we only read.

Our own file holds our records and the embedded catalogue. Where the catalogue is elsewhere, the embedded one stays in
the file unused, and foreign keys are switched off: that of ``restore_mounts`` would ask the wrong catalogue. What
they do besides, the units of work do themselves.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import peewee

from .engine import LACKING, Trouble
from .migrations_sqlite import migrate
from .records import StoreError, StoreUnreachableError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LOCKED = "locked"
_MISSING = ("no such table", "no such column")


class _Database(peewee.SqliteDatabase):  # type: ignore[misc]  # peewee 3 has no type information
    """See ``engine.Dialect``."""

    def _connect(self) -> Any:  # noqa: ANN401  # peewee's own signature
        connection = super()._connect()
        # A text that is no UTF-8 must not fail the whole query that meets it; ``rows.py`` tells it from others.
        connection.text_factory = _decoded
        return connection

    def exact(self, column: peewee.Node) -> Any:  # noqa: ANN401
        return column.collate("BINARY")

    def beginning(self, column: peewee.Node, characters: int) -> Any:  # noqa: ANN401, ARG002
        return column  # SUBSTR ends a text at NUL, which then would not be told

    def has_table(self, name: str) -> bool:
        found = self.execute_sql("SELECT 1 FROM sqlite_master WHERE name = ? AND type IN ('table', 'view')", (name,))
        return found.fetchone() is not None

    def is_missing(self, error: peewee.DatabaseError) -> bool:
        return "no such" in str(error)

    def is_dangling(self, error: peewee.IntegrityError) -> bool:
        return "FOREIGN KEY" in str(error)


def _decoded(stored: bytes) -> str:
    return stored.decode(errors="surrogateescape")


class _File:
    """What both kinds of file have in common; see ``engine.Engine``."""

    # Errors while rows are fetched come from the driver itself.
    errors = (peewee.PeeweeException, sqlite3.Error)
    patience = None
    # Reads see one snapshot. Writers take the lock at once: a transaction that starts as a reader and then wants to
    # write fails with "locked" without any waiting if somebody else wrote in between.
    read_mode, write_mode = "DEFERRED", "IMMEDIATE"

    def __init__(self, path: Path, database: _Database) -> None:
        self.path, self.database = path, database
        self.name = str(path)

    def connect(self) -> bool:
        return bool(self.database.connect(reuse_if_open=True))

    def disconnect(self) -> None:
        self.database.close()

    def trouble(self, error: BaseException) -> Trouble:
        if isinstance(error, peewee.IntegrityError | peewee.ProgrammingError):
            return Trouble.FAULT
        return Trouble.OTHER if isinstance(error, peewee.DatabaseError | sqlite3.DatabaseError) else Trouble.FAULT

    def advice(self, error: BaseException) -> str:
        if _LOCKED in str(error):
            return "is locked by another program; try again"
        if any(words in str(error) for words in _MISSING):
            return LACKING
        return "cannot be used; the service's journal has the details"

    def refusal(self, error: BaseException) -> StoreError:
        if isinstance(error, StoreError):
            return StoreError(f"{self.path}: {error}")
        if isinstance(error, OSError):
            return StoreError(f"{self.path}: cannot be created: {error.strerror}")
        if _LOCKED in str(error):
            return StoreUnreachableError(f"{self.path}: cannot be opened: {error} by another program")
        return StoreError(
            f"{self.path}: cannot be opened: {error}; move a damaged one away and scan the repositories again"
        )


class OwnFile(_File):
    """Our own file, made if it is not there; ``embedded`` if the catalogue in it is the one that counts."""

    def __init__(self, path: Path, *, embedded: bool, busy_timeout: float) -> None:
        # full: the count of resume attempts must be on the disk before an image is touched that may crash the kernel.
        pragmas = {"journal_mode": "wal", "foreign_keys": int(embedded), "synchronous": "full"}
        # The timeout is sqlite's busy_timeout, in seconds, in force before the first pragma.
        super().__init__(path, _Database(os.fspath(path), pragmas=pragmas, timeout=busy_timeout))

    def prepare(self) -> None:
        """See ``engine.Engine``."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone_in(self.path.parent):
            _create(self.path)
            self.connect()
            migrate(self.database)


class ReadOnlyFile(_File):
    """A catalogue of others. It may be away for a while, or be another file all of a sudden."""

    def __init__(self, path: Path, *, busy_timeout: float) -> None:
        place = f"file:{quote(os.fspath(path))}?mode=ro"
        super().__init__(path, _Database(place, uri=True, timeout=busy_timeout))
        self._opened: tuple[int, int] | None = None

    def prepare(self) -> None:
        """See ``engine.Engine``."""
        raise NotImplementedError("a catalogue of others is not ours to prepare")

    def connect(self) -> bool:
        """See ``engine.Engine``."""
        try:
            status = self.path.stat()
            there = (status.st_dev, status.st_ino)
        except OSError:
            there = None  # connecting says why
        if there != self._opened:
            self.disconnect()
        connected = super().connect()
        self._opened = there
        return connected

    def trouble(self, error: BaseException) -> Trouble:
        """See ``engine.Engine``."""
        # Nothing of it is our fault, and another connection costs nothing.
        found = super().trouble(error)
        return Trouble.LOST if found is Trouble.OTHER else found


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
