"""One connection to the message bus: whole messages and descriptors in, whole messages and descriptors out.

dbus-next gives the authentication and the codec. Its reader, writer, dispatcher and service classes are replaced or
never reached: they lose the connection when the socket is full or one message cannot be decoded, decode whatever a
stranger sends, and leak descriptors. Here a message is first cut out of the stream by its length, and one that
cannot be decoded is dropped alone.

Descriptors have one owner at any time: received ones belong to their ``Incoming`` until ``release`` or ``take``;
those to be sent belong to the queue and are closed once the kernel has them or the connection has ended. The queue
is bounded: while it is long nothing new is read, and if it still grows the connection is given up.
"""

# mypy: allow-untyped-calls
# The library's authentication has no annotations.

from __future__ import annotations

import array
import asyncio
import logging
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType
from dbus_next.errors import AuthError, InvalidAddressError

from .closing import close_foreign
from .codec import MOST_SENT, UNDECODABLE, Incoming, close_all, decode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

_MOST_HEADER = 64 << 10
_MOST_BY_SPECIFICATION = 1 << 27

_PAUSE_READING = 4 << 20
_RESUME_READING = 1 << 20
_MOST_QUEUED = 64 << 20

_BATCH = 64  # reads per turn of the event loop, so that a flood does not starve everything else
_CHUNK = 256 << 10
_DESCRIPTOR_SPACE = socket.CMSG_SPACE(253 * array.array("i").itemsize)  # SCM_MAX_FD of unix(7)
_FIXED_HEADER = 16


class BusError(Exception):
    """The bus cannot be used: not reached, not let in, ended, or without the name that we need."""


class Connection(MessageBus):
    """dbus-next's connection with its reading and writing replaced.

    ``on_message`` gets each message and owns it; ``on_end`` is called once, with the reason, when nothing more can
    be sent or received. Of a message whose body has more than ``most_received`` bytes only the header is kept.
    """

    def __init__(
        self,
        address: str | None,
        *,
        on_message: Callable[[Incoming], None],
        on_end: Callable[[str], None],
        most_received: int = MOST_SENT,
    ) -> None:
        try:
            super().__init__(bus_address=address, bus_type=BusType.SYSTEM, negotiate_unix_fd=True)  # type: ignore[arg-type]  # None is its own default
        except (OSError, InvalidAddressError) as error:
            raise BusError(f"the message bus cannot be reached ({_why(error)})") from error
        self._hand_over = on_message
        self._on_end = on_end
        self._most_received = most_received
        self._last_serial = 0
        self._buffer = bytearray()
        self._wanted = _FIXED_HEADER
        self._head = 0  # where the header ends, once known
        self._unwanted = 0  # length of a body that is too long to be kept
        self._skip = 0  # bytes to be thrown away before the next message
        self._fds: list[int] = []
        self._undecodable = 0
        self._queue: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._queued = 0
        self._armed = False
        self._paused = False
        self._drained = asyncio.Event()
        self._drained.set()
        self.ended = False

    async def open(self, *, seconds: float) -> None:
        """Authenticate and start reading. Raises BusError; the connection is closed then."""
        try:
            async with asyncio.timeout(seconds):
                await self._authenticate()
        except (OSError, AuthError, ValueError) as error:  # TimeoutError is an OSError
            self.end("authentication failed")
            raise BusError(f"the message bus does not let us in ({_why(error)})") from error
        except BaseException:
            self.end("cancelled")
            raise
        self._loop.add_reader(self._fd, self._readable)

    def next_serial(self) -> int:
        """A number for the next message that we send, never 0 (it is 32 bits on the wire)."""
        self._last_serial = self._last_serial % 0xFFFFFFFF + 1
        return self._last_serial

    def transmit(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Queue a message made by ``encode``. Takes the descriptors over, whatever happens."""
        if self.ended:
            close_all(fds)
            return
        self._queue.append((memoryview(data), fds))
        self._queued += len(data)
        self._drained.clear()
        if not self._armed:
            self._write()
        if self._queued > _MOST_QUEUED:
            self.end(f"the message bus does not take our messages: more than {_MOST_QUEUED} bytes wait")
        elif self._queued > _PAUSE_READING and not self._paused:
            # What we do not read cannot ask for more answers; the callers wait in the bus' own queue.
            self._paused = True
            self._loop.remove_reader(self._fd)

    async def drained(self) -> None:
        """Wait until everything that was queued is sent or thrown away."""
        await self._drained.wait()

    def end(self, reason: str) -> None:
        """Close the socket and all descriptors; ``on_end`` is told. May be called again."""
        if self.ended:
            return
        self.ended = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        close_foreign(self._fds)
        for _, fds in self._queue:
            close_all(fds)
        self._fds = []
        self._queue.clear()
        self._drained.set()
        self._stream.close()
        self._sock.close()
        self._on_end(reason)

    # What dbus-next calls itself.

    def _setup_socket(self) -> None:
        # Local sockets only: the caller's uid is worth nothing over anything else.
        paths = [
            options["path"] if "path" in options else "\0" + options["abstract"]
            for transport, options in self._bus_address
            if transport == "unix" and ("path" in options or "abstract" in options)
        ]
        if not paths:
            raise InvalidAddressError("no local socket in the bus address")
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.settimeout(5)
            self._sock.connect(paths[0])
        except BaseException:
            self._sock.close()
            raise
        self._sock.settimeout(0)
        self._stream = self._sock.makefile("rwb")
        self._fd = self._sock.fileno()

    async def _auth_readline(self) -> str:
        line = b""
        while not line.endswith(b"\r\n"):
            # One by one: what follows the last line is not ours to read yet. The library itself would spin at EOF.
            byte = await self._loop.sock_recv(self._sock, 1)
            if not byte or len(line) > 1024:
                raise AuthError("the connection was closed during authentication")
            line += byte
        return line[:-2].decode("ascii")

    # Reading.

    def _readable(self) -> None:
        for _ in range(_BATCH):
            if self._paused or self.ended or not self._receive():
                return

    def _receive(self) -> bool:
        """One read; False if there is nothing (more) to read."""
        wanted = self._skip or self._wanted - len(self._buffer)
        try:
            data, ancillary, _, _ = self._sock.recvmsg(
                min(wanted, _CHUNK), _DESCRIPTOR_SPACE, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self.end(f"reading from the message bus failed: {error}")
            return False
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                self._fds.extend(numbers)
        if not data:
            self.end("the message bus closed the connection")
            return False
        if self._skip:
            self._skip -= len(data)
            if not self._skip:
                close_foreign(self._fds)
                self._fds = []
            return True
        self._buffer += data
        if len(self._buffer) == self._wanted:
            self._advance()
        return not self.ended

    def _advance(self) -> None:
        if not self._head:
            order = {ord("l"): "<", ord("B"): ">"}.get(self._buffer[0])
            if order is None:
                self.end("the message bus sent something that is no message")
                return
            body, _, fields = struct.unpack(order + "4xIII", self._buffer)
            self._head = _FIXED_HEADER + -(-fields // 8) * 8
            if self._head + body > _MOST_BY_SPECIFICATION:
                self.end("the message bus sent a message that is longer than D-Bus allows")
                return
            if self._head > _MOST_HEADER:
                self._deliver(skip=self._head + body - _FIXED_HEADER)
                return
            self._wanted = self._head + body
            if body > self._most_received:
                self._wanted, self._unwanted = self._head, body
            if self._wanted > _FIXED_HEADER:
                return
        self._deliver(skip=self._unwanted)

    def _deliver(self, *, skip: int) -> None:
        data, head, fds = bytes(self._buffer), self._head, self._fds
        self._buffer, self._wanted, self._head, self._fds = bytearray(), _FIXED_HEADER, 0, []
        self._skip, self._unwanted = skip, 0
        try:
            if len(data) < head:
                raise EOFError("the header is too long")
            incoming = decode(data, head, fds, oversized=skip > 0)
        except UNDECODABLE as error:
            # Anybody may send such things, so only the first is worth a warning.
            log.log(logging.DEBUG if self._undecodable else logging.WARNING, "dropping a message: %r", error)
            self._undecodable += 1
            close_foreign(fds)
            return
        self._hand_over(incoming)

    # Writing.

    def _write(self) -> None:
        while self._queue:
            view, fds = self._queue[0]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self._sock.sendmsg([view], ancillary)
            except (BlockingIOError, InterruptedError):
                if not self._armed:
                    self._armed = True
                    self._loop.add_writer(self._fd, self._write)
                break
            except OSError as error:
                self.end(f"writing to the message bus failed: {error}")
                return
            close_all(fds)
            self._queued -= sent
            if sent == len(view):
                self._queue.popleft()
            else:
                self._queue[0] = (view[sent:], ())
        else:
            self._drained.set()
            if self._armed:
                self._armed = False
                self._loop.remove_writer(self._fd)
        if self._paused and self._queued < _RESUME_READING:
            self._paused = False
            self._loop.add_reader(self._fd, self._readable)


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
