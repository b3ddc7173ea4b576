"""A MariaDB server of our own: a private directory, a socket in it and nothing else, no service and no network.

``install`` makes the directory of a server that has never run, which takes a second; ``Server`` runs on one. It works
for root and for any user, and ends with its owner: by its pid, or by the kernel if the owner dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from pymysql.connections import Connection

from . import children

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

_SERVER = "/usr/sbin/mariadbd"
_SECONDS = 60.0
# Small, and with care for its own end, but none for a power cut.
_OPTIONS = (
    *("--skip-networking", "--skip-name-resolve", "--skip-log-bin", "--performance-schema=OFF"),
    *("--innodb-buffer-pool-size=16M", "--innodb-log-file-size=4M", "--innodb-flush-log-at-trx-commit=2"),
    *("--innodb-doublewrite=OFF", "--innodb-fast-shutdown=2", "--aria-pagecache-buffer-size=1M"),
)


def install(directory: Path) -> None:
    """Make ``directory`` a data directory whose ``root`` needs no password."""
    children.run(
        "mariadb-install-db",
        "--no-defaults",
        f"--datadir={directory}",
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
        *_as_root(),
        *_OPTIONS,
    )


class Server:
    """A server on the data directory ``data`` within ``directory``, which takes its socket and its log."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.socket = directory / "socket"
        self._running = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Run; returns once it answers."""
        ready = self._directory / "ready"
        # Of its own: a server that starts removes the temporary tables of all others in the same directory.
        temporary = self._directory / "tmp"
        temporary.mkdir(exist_ok=True)
        with (
            contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as told,
            contextlib.ExitStack() as undo,
        ):
            undo.callback(ready.unlink)
            told.bind(os.fspath(ready))
            told.settimeout(_SECONDS)
            argv = [
                *(_SERVER, "--no-defaults", f"--datadir={self._directory}/data", f"--socket={self.socket}"),
                *(f"--pid-file={self._directory}/pid", f"--tmpdir={temporary}", *_as_root(), *_OPTIONS),
            ]
            log = self._directory / "log"
            self._process = self._running.enter_context(
                children.running(argv, log=log, environment={"NOTIFY_SOCKET": os.fspath(ready)})
            )
            try:
                while b"READY=1" not in told.recv(4096).split(b"\n"):
                    pass
            except TimeoutError:
                self.stop()
                raise RuntimeError(f"mariadbd did not start: {log.read_text(encoding='utf-8')}") from None

    def stop(self) -> None:
        """End it in good order. May be called again."""
        self._running.close()
        self._process = None

    def kill(self) -> None:
        """End it at once."""
        self._signal(signal.SIGKILL)
        self.stop()

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Within, it accepts connections (the kernel does) and does nothing more."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def url(self, database: str, user: str = "root", password: str = "") -> str:
        """As ``database.url`` has it."""
        secret = f":{quote(password, safe='')}" if password else ""
        return f"mysql://{quote(user, safe='')}{secret}@/{database}?unix_socket={quote(os.fspath(self.socket))}"

    def connect(self, database: str | None = None, user: str = "root", password: str = "") -> Connection:
        """A connection for somebody else than the service."""
        return Connection(
            user=user,
            password=password.encode(),
            database=database,
            unix_socket=os.fspath(self.socket),
            ssl_disabled=True,
            charset="utf8mb4",
            autocommit=True,
            read_timeout=_SECONDS,
        )

    def execute(self, statement: str, *parameters: object, database: str | None = None) -> list[tuple[Any, ...]]:
        """Run one statement as ``root`` on a connection of its own; its rows."""
        with contextlib.closing(self.connect(database)) as connection, connection.cursor() as cursor:
            cursor.execute(statement, parameters or None)
            return list(cursor.fetchall())


def _as_root() -> list[str]:
    # It refuses to be root without being told so.
    return ["--user=root"] if os.geteuid() == 0 else []
