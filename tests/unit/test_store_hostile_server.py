"""A catalogue's server that is none, or somebody else's: it is never believed, nor waited for for long."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from typing import TYPE_CHECKING

import pytest

from sendense_restored.daemon.store import Store, StoreError, StoreUnreachableError
from sendense_restored.database_url import parse
from sendense_restored.errors import CatalogUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

SOON = 0.2
OK = b"\0\0\0\x02\0\0\0"
EOF = b"\xfe\0\0\x02\0"
GREETING = (
    b"\x0a5.7.0\0\x01\0\0\x0012345678\0\xff\xf7\x21\x02\0\x0f\0\x15"
    + bytes(10)
    + b"123456789012\0mysql_native_password\0"
)
COLUMN = b"\x03def\0\0\0\x01a\0\x0c" + struct.pack("<HIBHB", 45, 10, 253, 0, 0) + b"\0\0"
DECIMAL = b"\x03def\0\0\0\x01a\0\x0c" + struct.pack("<HIBHB", 63, 10, 246, 0, 0) + b"\0\0"


def packet(number: int, body: bytes) -> bytes:
    return struct.pack("<I", len(body))[:3] + bytes([number]) + body


def answer(*bodies: bytes) -> bytes:
    return b"".join(packet(number, body) for number, body in enumerate(bodies, 1))


class Server:
    """Greets, lets in and agrees with everything, but answers ``SELECT ... FROM`` with ``rows``."""

    def __init__(self, greeting: bytes = packet(0, GREETING), rows: bytes = answer(OK), login: bytes = OK) -> None:
        self.greeting, self.rows, self.login = greeting, rows, login
        self.connections = 0
        self.heard = b""
        self.pace = 0.0
        """Seconds between two bytes of an answer; 0 for all at once."""
        self.dripped = 0
        """Bytes that were said one by one."""
        self._over = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._say(writer, self.greeting)
                number, _ = await self._hear(reader)
                await self._say(writer, packet(number + 1, self.login))
                if self.login != OK:
                    number, _ = await self._hear(reader)
                    await self._say(writer, packet(number + 1, OK))
                while True:
                    _, said = await self._hear(reader)
                    await self._say(writer, self.rows if b" FROM " in said else answer(OK))
        finally:
            writer.close()

    async def _hear(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        head = await reader.readexactly(4)
        body = await reader.readexactly(int.from_bytes(head[:3], "little"))
        self.heard += body
        return head[3], body

    async def _say(self, writer: asyncio.StreamWriter, text: bytes) -> None:
        if not self.pace:
            writer.write(text)
            return
        for byte in text:
            writer.write(bytes([byte]))
            await writer.drain()
            self.dripped += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), self.pace)


@contextlib.asynccontextmanager
async def listening(server: Server, path: Path | None) -> AsyncIterator[str]:
    """The URL of a server on a Unix socket, or on TCP."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        await server.serve(reader, writer)

    if path is None:
        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"mysql://somebody:SECRET@127.0.0.1:{listener.sockets[0].getsockname()[1]}/catalogue"
    else:
        listener = await asyncio.start_unix_server(serve, path)
        url = f"mysql://somebody:SECRET@/catalogue?unix_socket={path}"
    try:
        yield url
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


NONSENSE: dict[str, Callable[[], Server]] = {
    "a greeting cut short": lambda: Server(packet(0, b"\x0ahello")),
    "an empty greeting": lambda: Server(packet(0, b"")),
    "the X protocol": lambda: Server(bytes.fromhex("050000000b08051a00")),
    "another protocol": lambda: Server(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "a file is asked for": lambda: Server(rows=answer(b"\xfb/etc/shadow")),
    "columns cut short": lambda: Server(rows=answer(b"\x05", b"\x01")),
    "no end of columns": lambda: Server(rows=answer(b"\x01", COLUMN, OK)),
    "bytes that are no text": lambda: Server(rows=answer(b"\x01", COLUMN, EOF, b"\x02\xff\xfe", EOF)),
    "a number that is none": lambda: Server(rows=answer(b"\x01", DECIMAL, EOF, b"\x05hello", EOF)),
    "an error that would be ours": lambda: Server(rows=answer(b"\xff\x28\x04#42000no SQL")),
    "a row that cannot be": lambda: Server(rows=answer(b"\xff\x26\x04#23000duplicate")),
    "an empty packet": lambda: Server(rows=answer(b"")),
}

IN_STEP = {"an error that would be ours", "a row that cannot be"}


@pytest.mark.parametrize("what", NONSENSE)
async def test_nonsense_is_a_catalogue_that_is_away(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = NONSENSE[what]()
    async with (
        listening(server, tmp_path / "socket") as url,
        await Store.open(parse(f"sqlite:///{tmp_path}/records.db"), parse(url), busy_timeout=5) as store,
    ):
        assert caplog.text.count("cannot be read yet") == 1
        assert "(0, '')" not in caplog.text  # but what was wrong
        for _ in range(2):
            before = server.connections
            with pytest.raises(CatalogUnavailable):
                await store.backups()
            # Nothing is read from one that is out of step.
            assert server.connections == before + (what not in IN_STEP)
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


async def test_other_columns_than_were_asked_for_are_nothing(tmp_path: Path) -> None:
    server = Server(rows=answer(b"\x01", COLUMN, EOF, b"\x01x", EOF))
    async with (
        listening(server, tmp_path / "socket") as url,
        await Store.open(parse(f"sqlite:///{tmp_path}/records.db"), parse(url), busy_timeout=5) as store,
    ):
        with pytest.raises(CatalogUnavailable, match="other columns"):
            await store.backups()


async def test_a_server_of_ours_that_speaks_nonsense_refuses_to_start(tmp_path: Path) -> None:
    async with listening(Server(packet(0, b"\x0ahello")), tmp_path / "socket") as url:
        with pytest.raises(StoreUnreachableError, match="makes no sense"):
            await Store.open(parse(url), busy_timeout=5)


@pytest.mark.parametrize("slow", ["greeting", "rows"])
async def test_a_server_that_drips_is_not_waited_for(slow: str, tmp_path: Path) -> None:
    server = Server(rows=answer(b"\x01", COLUMN, EOF, *[b"\x01x"] * 100, EOF))
    if slow == "greeting":
        server.pace = SOON / 4
    async with listening(server, tmp_path / "socket") as url:
        opened = Store.open(parse(f"sqlite:///{tmp_path}/records.db"), parse(url), busy_timeout=SOON)
        async with await opened as store:
            server.pace = SOON / 4
            with pytest.raises(CatalogUnavailable):
                await store.backup_ids(["b1"])
    assert server.dripped < len(GREETING)  # the beginnings of two answers, and neither to its end


async def test_no_password_goes_in_clear_text_over_a_network(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(login=b"\xfemysql_clear_password\0")
    async with listening(server, None) as url:
        async with await Store.open(parse(f"sqlite:///{tmp_path}/records.db"), parse(url), busy_timeout=5):
            assert "in clear text" in caplog.text
        assert server.connections
        assert b"SECRET" not in server.heard
    # Nobody listens in on a Unix socket, and some servers know no other way (PAM).
    server = Server(login=b"\xfemysql_clear_password\0")
    async with listening(server, tmp_path / "socket") as url:
        async with await Store.open(parse(f"sqlite:///{tmp_path}/records.db"), parse(url), busy_timeout=5):
            pass
        assert b"SECRET" in server.heard


async def test_what_a_server_says_is_shown_within_bounds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evil = b"\xff\x50\x04#42000evil\nJan  1 host sudo: \x1b[2J\xe2\x80\xae" + b"A" * 100_000
    async with listening(Server(rows=answer(evil)), tmp_path / "socket") as url:
        await (await Store.open(parse(f"sqlite:///{tmp_path}/records.db"), parse(url), busy_timeout=5)).close()
    async with listening(Server(packet(0, evil)), tmp_path / "another") as url:
        with pytest.raises(StoreError) as refused:
            await Store.open(parse(url), busy_timeout=5)
    for text in (str(refused.value), *caplog.messages):
        assert len(text) < 1000
        assert not set(text) & set("\n\x1b\u202e")
