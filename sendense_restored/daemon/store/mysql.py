"""MySQL and MariaDB: one connection with bounded waits.

A server may be away, restart, hang, or end an idle connection. Whoever waits for it waits for seconds: connecting,
each answer, and each lock have a limit, and a unit of work that has waited too long for its turn is not begun.

The session says what the server's configuration could say otherwise: UTC, a strict mode, text in utf8mb4, the
isolation of each transaction. Writers are READ COMMITTED, so that they hold no more locks than they need; what only
reads is READ ONLY, which the server itself sees to, and sees one snapshot.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import socket
from typing import TYPE_CHECKING, Any

import peewee
from pymysql.connections import Connection
from pymysql.constants import CLIENT
from pymysql.err import MySQLError, OperationalError

from .engine import Trouble
from .migrations_mysql import migrate
from .mysql_errors import CONFLICT, DANGLING, DENIED, LOST, MISSING, UNREACHABLE, code_of, said
from .records import StoreError, StoreUnreachableError

if TYPE_CHECKING:
    from sendense_restored.database_url import MysqlUrl

_MODE = "STRICT_TRANS_TABLES,STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION,ERROR_FOR_DIVISION_BY_ZERO"
_MIGRATING = 600.0
"""Seconds for one step of a migration."""
_OTHERS_MIGRATING = 60.0
"""Seconds for all that another process may be at."""


class _Connection(Connection):  # type: ignore[misc]  # PyMySQL has no type information
    """The driver's connection with two of its faults mended."""

    def connect(self, sock: socket.socket | None = None) -> None:
        """Connect. Newer versions of the driver lose sight of a socket that finds nobody, so it is made here."""
        super().connect(sock or self._socket())

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
        """Seconds, for connections made from now on; longer than a lock is waited for."""

    def _connect(self) -> Any:  # noqa: ANN401  # peewee's own signature
        url = self._url
        lock = max(1, math.floor(self._timeout))
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
        connection.query(f"SET TRANSACTION ISOLATION LEVEL {level}")
        connection.query(f"START TRANSACTION {mode}")

    def exact(self, column: peewee.Node) -> Any:  # noqa: ANN401
        # As binary text: even the binary collations of text take "a" and "a " for the same.
        return peewee.NodeList((peewee.SQL("CAST(CONVERT("), column, peewee.SQL("USING utf8mb4) AS BINARY)")))

    def has_table(self, name: str) -> bool:
        query = "SELECT 1 FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = %s"
        return self.execute_sql(query, (name,)).fetchone() is not None

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
        self._schema = url.name

    def connect(self) -> bool:
        """See ``engine.Engine``."""
        return bool(self.database.connect(reuse_if_open=True))

    def disconnect(self) -> None:
        """See ``engine.Engine``."""
        try:
            self.database.close()
        except self.errors:
            return  # peewee has forgotten it all the same

    def prepare(self) -> None:
        """See ``engine.Engine``."""
        self.connect()
        self.disconnect()
        # What changes a table of some size takes longer than any answer may take later.
        usual, self.database.answer_timeout = self.database.answer_timeout, _MIGRATING
        try:
            self.connect()
            # Released by the server with the connection, however that ends.
            (alone,) = self.database.execute_sql(
                "SELECT GET_LOCK(%s, %s)", (_lock_of(self._schema), _OTHERS_MIGRATING)
            ).fetchone()
            if alone != 1:
                raise StoreUnreachableError("another process is changing the tables; try again when it is done")
            migrate(self.database)
        finally:
            self.disconnect()
            self.database.answer_timeout = usual

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
            return "lacks a table or column that is needed; the service's journal has the details"
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


def _lock_of(schema: str) -> str:
    """The name of the lock for migrating a database: locks are the server's, and their names short."""
    return f"sendense-restore {hashlib.sha256(schema.encode()).hexdigest()[:32]}"
