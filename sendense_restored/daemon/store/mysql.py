"""MySQL and MariaDB: one connection with bounded waits.

A server may be away, restart, hang, or end an idle connection. Whoever waits for it waits for seconds: connecting,
each answer, and each lock have a limit, and a unit of work that has waited too long for its turn is not begun.

A database of our own has one service: each would take the other's rows for mounts that are gone. So the connection to
it holds a lock of the server's, from before the tables are looked at until it ends, and nothing is done without it.

The session says what the server's configuration could say otherwise: UTC, a strict mode, text in utf8mb4, the
isolation of each transaction. Writers are READ COMMITTED, so that they hold no more locks than they need; what only
reads is READ ONLY, which the server itself sees to, and sees one snapshot.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import socket
import struct
import time
import uuid
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import peewee
from pymysql.connections import Connection
from pymysql.constants import CLIENT
from pymysql.err import MySQLError, OperationalError

from sendense_restored.errors import CatalogUnavailable

from .engine import LACKING, Trouble
from .migrations_mysql import migrate
from .models import RECORDS, table_of
from .mysql_errors import (
    CONFLICT,
    DANGLING,
    DENIED,
    LOST,
    MALFORMED,
    MISSING,
    SERVER_LOST,
    UNPROVEN,
    UNREACHABLE,
    code_of,
    said,
)
from .records import StoreError, StoreUnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sendense_restored.database_url import MysqlUrl

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MODE = "STRICT_TRANS_TABLES,STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION,ERROR_FOR_DIVISION_BY_ZERO"
_MIGRATING = 600.0
"""Seconds for one step of a migration."""
_LONGEST_ANSWER = 256 << 20
"""Bytes that a statement's answer may have, which is kept in memory."""
_NONSENSE = (struct.error, IndexError, KeyError, AssertionError, RuntimeError, ValueError, ArithmeticError)
"""What the driver raises, besides errors of its own, when what a server sends is not what it must be."""


def _understood(
    method: Callable[Concatenate[_Connection, _P], _T],
) -> Callable[Concatenate[_Connection, _P], _T]:
    """Part of a connection whose answer made no sense, and say so: nobody knows where the next answer begins."""

    @functools.wraps(method)
    def understood(self: _Connection, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return method(self, *args, **kwargs)
        except UnicodeEncodeError:
            raise  # what was to be sent is no text; nothing was
        except _NONSENSE as error:
            self._force_close()
            text = f"the server's answer makes no sense ({type(error).__name__}: {error!s:.200})"
            raise OperationalError(MALFORMED, text) from error

    return understood


class _Connection(Connection):  # type: ignore[misc]  # PyMySQL has no type information
    """The driver's connection with some of its faults mended.

    Its timeouts begin anew with every byte. Here connecting, a statement and a transaction have an end each.
    """

    _until = _latest = math.inf
    _connecting = False
    _received = 0

    @_understood
    def connect(self, sock: socket.socket | None = None) -> None:
        """Connect. Newer versions of the driver lose sight of a socket that finds nobody, so it is made here."""
        self._until, self._connecting, self._received = time.monotonic() + 2 * self.connect_timeout, True, 0
        try:
            super().connect(sock or self._socket())
        except RuntimeError as error:  # a library is missing that the server's way of asking for a password needs
            hint = "; install python3-cryptography or use the server's socket" if "cryptography" in str(error) else ""
            raise OperationalError(UNPROVEN, f"no way to say the password: {error}{hint}") from None
        finally:
            self._connecting = False

    def _socket(self) -> socket.socket:
        with contextlib.ExitStack() as undo:
            try:
                if self.unix_socket:
                    made = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                    made.settimeout(self.connect_timeout)
                    made.connect(self.unix_socket)
                    self._secure = True  # nobody listens in: see the driver's own
                else:
                    made = undo.enter_context(socket.create_connection((self.host, self.port), self.connect_timeout))
                    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            except OSError as error:
                raise OperationalError(
                    UNREACHABLE, f"no connection to {self.unix_socket or self.host}: {error}"
                ) from None
            undo.pop_all()
        return made

    def limit(self, seconds: float) -> None:
        """Give all statements until the transaction ends so long together."""
        self._latest = time.monotonic() + seconds

    @_understood
    def commit(self) -> None:
        """See the driver's. The time is its own: what a unit has done is not to fail by how long it took."""
        self._latest = math.inf
        super().commit()

    @_understood
    def rollback(self) -> None:
        """See the driver's. Where the connection is closed the server does it, and what closed it is to be told."""
        self._latest = math.inf
        if self.open:
            super().rollback()

    def _execute_command(self, command: int, sql: str | bytes) -> None:
        if not self._connecting:
            self._until, self._received = min(time.monotonic() + self._read_timeout, self._latest), 0
        super()._execute_command(command, sql)

    def _read_bytes(self, num_bytes: int) -> bytes:
        self._received += num_bytes
        try:
            if self._received > _LONGEST_ANSWER:
                raise OperationalError(MALFORMED, "the server's answer is too long")
            found = bytearray()
            while len(found) < num_bytes:
                left = self._until - time.monotonic()
                if left <= 0:
                    raise OperationalError(SERVER_LOST, "the server takes too long to answer")
                self._sock.settimeout(left)
                there = len(self._rfile.peek())  # receives once at most
                if not there:
                    raise OperationalError(SERVER_LOST, "the server has closed the connection")
                found += self._rfile.read(min(there, num_bytes - len(found)))
        except OSError as error:
            self._force_close()
            raise OperationalError(SERVER_LOST, f"the connection was lost: {error}") from None
        except OperationalError:
            self._force_close()
            raise
        return bytes(found)

    def _process_auth(self, plugin_name: bytes, auth_packet: Any) -> Any:  # noqa: ANN401  # the driver's
        if plugin_name == b"mysql_clear_password" and not self.unix_socket:
            raise OperationalError(
                UNPROVEN, "the server asks for the password in clear text, which is sent over a Unix socket only"
            )
        return super()._process_auth(plugin_name, auth_packet)

    def answer_within(self, seconds: float) -> None:
        """Wait so long for each answer from now on."""
        self._read_timeout = seconds

    @_understood
    def query(self, sql: str | bytes, unbuffered: bool = False) -> Any:  # noqa: ANN401, FBT001, FBT002  # the driver's
        """Send a statement. Raises UnicodeEncodeError for half a surrogate pair, which the driver would send."""
        return super().query(sql.encode() if isinstance(sql, str) else sql, unbuffered)


class _Database(peewee.MySQLDatabase):  # type: ignore[misc]  # peewee 3 has no type information
    """See ``engine.Dialect``. Connecting is ours: peewee takes whichever driver it finds."""

    field_types = {**peewee.MySQLDatabase.field_types, "DATETIME": "DATETIME(6)"}  # noqa: RUF012  # as peewee has it

    def __init__(self, url: MysqlUrl, timeout: float) -> None:
        super().__init__(url.name)
        self._url, self._timeout = url, timeout
        self.answer_timeout = 2 * timeout
        """Seconds; longer than a lock is waited for, which is a second at least, if ``timeout`` is half of that."""
        self.lock_timeout = max(1, math.floor(timeout))
        """Seconds, which the server counts in whole ones."""

    def commit(self) -> None:
        """The driver's, which knows how long it may take; some versions of peewee send a statement instead."""
        self.connection().commit()

    def rollback(self) -> None:
        """The driver's, which knows whether there is anything to be rolled back."""
        self.connection().rollback()

    def _connect(self) -> Any:  # noqa: ANN401  # peewee's own signature
        url, lock = self._url, self.lock_timeout
        return _Connection(
            user=url.user,
            password=url.password.encode(),
            unix_socket=url.socket or None,
            host=url.host or None,
            port=url.port,
            database=url.name,
            ssl_disabled=bool(url.socket),
            charset="utf8mb4",
            autocommit=True,
            sql_mode=_MODE,
            init_command=f"SET time_zone = '+00:00', innodb_lock_wait_timeout = {lock}, lock_wait_timeout = {lock}",
            # How many rows were matched, as in SQLite, and not how many have changed.
            client_flag=CLIENT.FOUND_ROWS,
            connect_timeout=self._timeout,
            read_timeout=self.answer_timeout,
            write_timeout=self._timeout,
        )

    def begin(self, mode: str = "") -> None:
        """Begin a transaction; the first that it does shows whether the connection is alive."""
        level = "REPEATABLE READ" if mode == Server.read_mode else "READ COMMITTED"
        # Not by peewee's execute_sql, which (before 3.16) commits whatever it has not begun itself.
        connection = self.connection()
        connection.limit(2 * self.answer_timeout)
        connection.query(f"SET TRANSACTION ISOLATION LEVEL {level}")
        connection.query(f"START TRANSACTION {mode}")

    def exact(self, column: peewee.Node) -> Any:  # noqa: ANN401
        # As binary text: even the binary collations of text take "a" and "a " for the same.
        return peewee.NodeList((peewee.SQL("CAST(CONVERT("), column, peewee.SQL("USING utf8mb4) AS BINARY)")))

    def beginning(self, column: peewee.Node, characters: int) -> Any:  # noqa: ANN401
        return peewee.fn.LEFT(column, characters)

    def has_table(self, name: str) -> bool:
        query = "SELECT 1 FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = %s"
        return self.execute_sql(query, (name,)).fetchone() is not None

    def is_missing(self, error: peewee.DatabaseError) -> bool:
        return code_of(error) in MISSING | DENIED

    def is_dangling(self, error: peewee.IntegrityError) -> bool:
        return code_of(error) == DANGLING


class Server:
    """A database of a server; see ``engine.Engine``."""

    errors = (peewee.PeeweeException, MySQLError)
    read_mode, write_mode = "READ ONLY", "READ WRITE"

    def __init__(self, url: MysqlUrl, *, timeout: float) -> None:
        self.name = str(url)
        self.database = _Database(url, timeout)
        self.patience = 2 * timeout
        self._lock = f"sendense-restore {hashlib.sha256(url.name.encode()).hexdigest()[:32]}"
        """Its name, which is short, and one for all databases of the server."""
        self._mark = f"sendense-restore {uuid.uuid4().hex}"
        """The name of another one, which tells a connection of ours from those of other services."""
        self._ours = False

    def connect(self) -> bool:
        """See ``engine.Engine``."""
        new = bool(self.database.connect(reuse_if_open=True))
        if new and self._ours:
            try:
                alone = self._is_the_only_one()
            except BaseException:
                self.disconnect()
                raise
            if not alone:
                self.disconnect()
                raise CatalogUnavailable(
                    "another service has taken the service's own database; stop it, or give each one of its own"
                )
        return new

    def _is_the_only_one(self) -> bool:
        if self._ask("SELECT GET_LOCK(%s, 0)", self._lock) != 1:
            # A connection of ours whose end the server has not seen has it: one that we have waited for in vain, or,
            # for hours, one of a network that went away.
            holder = self._ask("SELECT IS_USED_LOCK(%s)", self._lock)
            if holder is not None and holder == self._ask("SELECT IS_USED_LOCK(%s)", self._mark):
                with contextlib.suppress(peewee.OperationalError):  # it has ended just now
                    self.database.execute_sql(f"KILL {holder}")
            if self._ask("SELECT GET_LOCK(%s, %s)", self._lock, self.database.lock_timeout) != 1:
                return False
        self._ask("SELECT GET_LOCK(%s, 0)", self._mark)
        return True

    def _ask(self, query: str, *parameters: object) -> Any:  # noqa: ANN401  # what the server answers
        return self.database.execute_sql(query, parameters).fetchone()[0]

    def disconnect(self) -> None:
        """See ``engine.Engine``."""
        try:
            self.database.close()
        except self.errors:
            return  # peewee has forgotten it all the same

    def prepare(self) -> None:
        """See ``engine.Engine``."""
        self._ours = True
        try:
            self.connect()
        except CatalogUnavailable:
            raise StoreUnreachableError(
                "another service uses this database; stop it, or set database.url to a database of this one's own"
            ) from None
        # What changes a table of some size takes longer than any answer may take later.
        connection = self.database.connection()
        connection.answer_within(_MIGRATING)
        migrate(self.database)
        self._check_rights()
        connection.answer_within(self.database.answer_timeout)

    def _check_rights(self) -> None:
        """Raises ``errors`` if the account may not write our tables; it would be known by the first mount only."""
        for model in RECORDS:
            table, column = table_of(model), next(iter(model._meta.columns))  # noqa: SLF001  # peewee's public face
            for statement in (
                f"INSERT INTO {table} SELECT * FROM {table} WHERE 1 = 0",  # noqa: S608  # constants
                f"UPDATE {table} SET {column} = {column} WHERE 1 = 0",  # noqa: S608
                f"DELETE FROM {table} WHERE 1 = 0",  # noqa: S608
            ):
                self.database.execute_sql(statement)

    def trouble(self, error: BaseException) -> Trouble:
        """See ``engine.Engine``."""
        code = code_of(error)
        if code in CONFLICT:
            return Trouble.CONFLICT
        if isinstance(error, peewee.IntegrityError):
            return Trouble.FAULT
        if code in LOST:
            return Trouble.LOST
        wrong = isinstance(error, peewee.ProgrammingError) and code not in MISSING
        return Trouble.FAULT if wrong or code is None else Trouble.OTHER

    def advice(self, error: BaseException) -> str:
        """See ``engine.Engine``."""
        code = code_of(error)
        if code in CONFLICT:
            return "is locked by another program; try again"
        if code in DENIED:
            return "may not be read or written by the service; its administrator has to grant that"
        if code in MISSING:
            return LACKING
        if code in LOST:
            return "does not answer; try again when its server runs"
        return "cannot be used; the service's journal has the details"

    def refusal(self, error: BaseException) -> StoreError:
        """See ``engine.Engine``."""
        if isinstance(error, StoreError):
            return type(error)(f"{self.name}: {error}")
        code = code_of(error)
        if code in LOST or code in CONFLICT:
            return StoreUnreachableError(f"{self.name}: cannot be reached: {said(error)}")
        hint = "; docs/database.md says what has to be granted" if code in DENIED or code in MISSING else ""
        return StoreError(f"{self.name}: cannot be used: {said(error)}{hint}")
