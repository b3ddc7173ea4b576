"""Where a database is: the text of ``database.url`` and ``database.catalog_url``, taken apart.

    sqlite:////absolute/path
    mysql://USER[:PASSWORD]@HOST[:PORT]/NAME
    mysql://USER[:PASSWORD]@/NAME?unix_socket=/absolute/path

What is reserved in a URL is written in percent form (``p%40ss``). No error and no text form made here holds the
password, nor any other part of a text that could not be read: the password may be anywhere in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

_SQLITE = "sqlite:///"
_MYSQL = "mysql://"
_MYSQL_PORT = 3306
_LONGEST_NAME = 64  # of a database, in MySQL


@dataclass(frozen=True)
class SqliteUrl:
    """A file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class MysqlUrl:
    """A database of a server, which is at ``socket`` if that is not empty, else at ``host`` and ``port``."""

    user: str
    password: str = field(repr=False)
    host: str
    port: int
    socket: str
    name: str

    def __str__(self) -> str:
        return f"MySQL database {self.name} at {self.socket or f'{self.host}:{self.port}'}"


DatabaseUrl = SqliteUrl | MysqlUrl


def parse(text: str) -> DatabaseUrl:
    """The place that a URL names. Raises ValueError, whose message goes on after the key's name."""
    if text.startswith(_SQLITE):
        path = text.removeprefix(_SQLITE)
        if path.startswith("/") and "\0" not in path:
            return SqliteUrl(Path(path))
    elif text.startswith(_MYSQL):
        return _mysql(text)
    raise ValueError(
        f"must be '{_SQLITE}' and an absolute path, or '{_MYSQL}USER:PASSWORD@HOST/NAME' for MySQL and MariaDB"
    )


def _mysql(text: str) -> MysqlUrl:
    try:
        parts = urlsplit(text)
        port = parts.port
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True)) if parts.query else {}
        user, password, name = (
            unquote(part, errors="strict") for part in (parts.username or "", parts.password or "", parts.path[1:])
        )
    except ValueError:
        # Not what it says of itself: the message may quote the text.
        raise ValueError("is no URL; write '@', ':', '/', '%' and '?' in a password in percent form") from None
    socket = options.pop("unix_socket", "")
    if options or parts.fragment:
        raise ValueError("has options that are not known; 'unix_socket' is, and what is reserved is in percent form")
    if socket and not socket.startswith("/"):
        raise ValueError("must have an absolute path as 'unix_socket'")
    if not user or not (socket or parts.hostname):
        raise ValueError("must name a user, and a host or 'unix_socket'")
    if not 1 <= len(name) <= _LONGEST_NAME or "/" in name or "\0" in text:
        raise ValueError("must name one database after the host, as in '/sendense_restore'")
    return MysqlUrl(user, password, parts.hostname or "", port or _MYSQL_PORT, socket, name)
