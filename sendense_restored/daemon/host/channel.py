"""The daemon's end of a reader's socketpair, on the event loop.

Nothing here blocks: a frame that the socket does not take waits in a queue, with descriptors of its own, and goes out
when there is room; one frame is read per turn of the loop, so that a flood from one reader delays the others by no
more than that. The channel owns the socket until ``close``, and every descriptor that arrives: the handler of a frame
takes what it keeps out of the list, the rest is closed. After an offence or the peer's end it reads no more.
"""

from __future__ import annotations

import asyncio
import fcntl
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from sendense_restored.reader import protocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

_MOST_FDS = 1  # an opened file; nothing else is ever sent this way


class _Unsent(NamedTuple):
    frame: bytes
    fds: list[int]


class Channel:
    """Frames to and from one peer.

    ``received(message, fds)`` may raise ProtocolError; ``ended(offence)`` is called once, with None if the peer has
    just closed its end.
    """

    def __init__(
        self,
        sock: socket.socket,
        received: Callable[[dict[str, Any], list[int]], None],
        ended: Callable[[protocol.ProtocolError | None], None],
    ) -> None:
        sock.settimeout(0)  # never blocks
        protocol.prepare(sock)
        self._sock = sock
        self._received = received
        self._ended = ended
        self._unsent: deque[_Unsent] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._take_in)

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send a message with copies of ``fds``, now or when there is room; to a peer that has gone, not at all."""
        self.send_frame(protocol.encode(message), fds)

    def send_frame(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """The same for a message that is encoded already."""
        if not self._unsent:
            try:
                protocol.send(self._sock, frame, fds)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._send_more)
            except (BrokenPipeError, ConnectionResetError):
                return  # the reading side sees the end, too, and tells it
            else:
                return
        # The caller may close its own as soon as this returns.
        self._unsent.append(_Unsent(frame, [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in fds]))

    def _send_more(self) -> None:
        while self._unsent:
            unsent = self._unsent[0]
            try:
                protocol.send(self._sock, unsent.frame, unsent.fds)
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):
                self._forget_unsent()
                break
            self._unsent.popleft()
            protocol.close_all(unsent.fds)
        self._loop.remove_writer(self._sock)

    def _forget_unsent(self) -> None:
        while self._unsent:
            protocol.close_all(self._unsent.popleft().fds)

    def _take_in(self) -> None:
        try:
            frame = protocol.receive(self._sock, most_fds=_MOST_FDS)
            if frame is None:
                self._end(None)
                return
            message, fds = frame
            try:
                self._received(message, fds)
            finally:
                protocol.close_all(fds)
        except BlockingIOError:
            return
        except ConnectionResetError:
            self._end(None)
        except protocol.ProtocolError as offence:
            self._end(offence)

    def _end(self, offence: protocol.ProtocolError | None) -> None:
        self.close()
        self._ended(offence)

    def close(self) -> None:
        """Close the socket, and forget what was not sent. May be called again."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._forget_unsent()
        self._sock.close()
