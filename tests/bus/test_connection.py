"""The connection against a message bus that breaks every rule, played by the test over a bare socket."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from typing import TYPE_CHECKING, Self

import pytest

from sendense_restored.wire import BusError, Caller, Connection, Incoming, MessageType, encode
from sendense_restored.wire import caller as caller_module

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

MOST_RECEIVED = 256 << 10
HEADER = {"path": "/com/example", "interface": "com.example.Test", "member": "Said"}


def message(text: str = "text", **header: str) -> bytes:
    return encode(MessageType.SIGNAL, 1, HEADER | header, signature="s", body=[text])


class FakeBus:
    """Listens at ``address``; ``greet`` lets one client in."""

    def __init__(self, directory: Path) -> None:
        self.address = f"unix:path={directory / 'socket'}"
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(directory / "socket"))
        self._listening.listen()
        self._listening.setblocking(False)
        self.client: socket.socket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()
        if self.client:
            self.client.close()

    async def greet(self, *, answers: tuple[bytes, ...] = (b"OK 0123\r\n", b"AGREE_UNIX_FD\r\n")) -> socket.socket:
        loop = asyncio.get_running_loop()
        self.client, _ = await loop.sock_accept(self._listening)
        self.client.setblocking(False)
        for answer in answers:
            await loop.sock_recv(self.client, 1000)
            await loop.sock_sendall(self.client, answer)
        return self.client


class End:
    """Our end of the connection."""

    def __init__(self, bus: FakeBus) -> None:
        self.messages: asyncio.Queue[Incoming] = asyncio.Queue()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.connection = Connection(
            bus.address,
            on_message=self.messages.put_nowait,
            on_end=self.ended.set_result,
            most_received=MOST_RECEIVED,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.connection.end("closed by the test")
        while not self.messages.empty():
            self.messages.get_nowait().release()

    async def text(self) -> str:
        async with asyncio.timeout(60):
            received = await self.messages.get()
        received.release()
        return str(received.body()[0])


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[End, socket.socket]]:
    with FakeBus(tmp_path) as bus:
        async with End(bus) as end:
            _, client = await asyncio.gather(end.connection.open(seconds=10), bus.greet())
            assert await asyncio.get_running_loop().sock_recv(client, 100) == b"BEGIN\r\n"
            yield end, client


async def send(client: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(client, data)


async def test_messages_cut_anywhere_arrive_whole(pair: tuple[End, socket.socket]) -> None:
    end, client = pair
    data = message("first") + message("second")
    for at in range(0, len(data), 7):
        await send(client, data[at : at + 7])
    assert [await end.text(), await end.text()] == ["first", "second"]


def unknown_type() -> bytes:
    data = bytearray(message())
    data[1] = 9
    return bytes(data)


def unknown_header_field() -> bytes:
    data = bytearray(message())
    data[16] = 77
    return bytes(data)


def truncated_text() -> bytes:
    data = bytearray(message())
    struct.pack_into("<I", data, len(data) - 9, 4000)  # the text claims to be longer than the message
    return bytes(data)


def not_utf8() -> bytes:
    return message("\xe9\xe9\xe9\xe9").replace(b"\xc3\xa9", b"\xff\xff")


@pytest.mark.parametrize("data", [unknown_type(), unknown_header_field()])
async def test_a_message_that_cannot_be_decoded_is_dropped_alone(
    pair: tuple[End, socket.socket], data: bytes
) -> None:
    end, client = pair
    await send(client, data + message("after"))
    assert await end.text() == "after"


@pytest.mark.parametrize("data", [truncated_text(), not_utf8()])
async def test_a_body_that_cannot_be_decoded_is_an_error_when_it_is_wanted(
    pair: tuple[End, socket.socket], data: bytes
) -> None:
    end, client = pair
    await send(client, data + message("after"))
    async with asyncio.timeout(60):
        received = await end.messages.get()
    with pytest.raises(ValueError, match="cannot be decoded"):
        received.body()
    assert await end.text() == "after"


async def test_a_long_body_is_thrown_away_and_its_descriptors_are_closed(pair: tuple[End, socket.socket]) -> None:
    end, client = pair
    reading, writing = os.pipe()
    data = message("x" * (MOST_RECEIVED + 1))
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writing]))]
    sent = client.sendmsg([data[:100]], ancillary)
    sent += client.sendmsg([data[100:1000]], ancillary)
    os.close(writing)
    await send(client, data[sent:] + message("after"))
    async with asyncio.timeout(60):
        received = await end.messages.get()
    assert received.oversized
    assert len(received.fds) == 1
    received.release()
    assert await end.text() == "after"
    assert os.read(reading, 1) == b""  # nobody holds the other end any more
    os.close(reading)


async def test_a_header_beyond_all_measure_is_skipped(pair: tuple[End, socket.socket]) -> None:
    end, client = pair
    await send(client, message(path="/" + "x" * 100_000) + message("after"))
    assert await end.text() == "after"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "no message"),
        (b"l\4\0\1" + struct.pack("<III", 1 << 30, 1, 100), "longer than D-Bus allows"),
        (b"", "closed the connection"),
    ],
)
async def test_what_is_no_message_ends_the_connection(
    pair: tuple[End, socket.socket], data: bytes, reason: str
) -> None:
    end, client = pair
    await send(client, data)
    client.shutdown(socket.SHUT_WR)
    assert reason in await end.ended
    assert end.connection.ended


async def test_a_flood_leaves_room_for_everything_else_in_each_turn_of_the_loop(
    pair: tuple[End, socket.socket],
) -> None:
    end, client = pair
    many = 500
    await send(client, message() * many)  # less than the socket's buffer
    seen = 0
    while seen < many:
        await asyncio.sleep(0)
        assert end.messages.qsize() - seen <= 64
        seen = end.messages.qsize()
    for _ in range(many):
        assert await end.text() == "text"


@pytest.mark.parametrize(
    "answers",
    [(), (b"OK 0123\r\n",), (b"REJECTED EXTERNAL\r\n",), (b"nonsense\r\n",), (b"x" * 5000,), (b"\xff\r\n",)],
    ids=repr,
)
async def test_a_bus_that_hangs_up_or_refuses_during_authentication_is_an_error(
    tmp_path: Path, answers: tuple[bytes, ...]
) -> None:
    async def greet_and_hang_up(bus: FakeBus) -> None:
        (await bus.greet(answers=answers)).close()

    with FakeBus(tmp_path) as bus:
        async with End(bus) as end:
            hanging_up = asyncio.create_task(greet_and_hang_up(bus))
            with pytest.raises(BusError):
                await end.connection.open(seconds=10)
            assert end.connection.ended
            await hanging_up


async def test_a_bus_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    with FakeBus(tmp_path) as bus:
        async with End(bus) as end:
            with pytest.raises(BusError):
                await end.connection.open(seconds=0.05)
            assert end.connection.ended


@pytest.mark.parametrize("hangs_up", [True, False])
async def test_a_bus_that_does_not_answer_to_hello_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs_up: bool
) -> None:
    monkeypatch.setattr(caller_module, "_SECONDS", 20 if hangs_up else 0.05)
    ends: list[str] = []
    with FakeBus(tmp_path) as bus:
        caller = Caller(bus.address, on_message=Incoming.release, on_end=ends.append)
        opening = asyncio.create_task(caller.open(seconds=20))
        client = await bus.greet()
        if hangs_up:
            client.shutdown(socket.SHUT_RDWR)
        with pytest.raises(BusError):
            await opening
    assert caller.connection.ended
    assert len(ends) == 1
