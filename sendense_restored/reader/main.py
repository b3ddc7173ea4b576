"""A reader's life: confined first, then it serves one mount until its socket closes.

The main thread only takes frames in. A few threads of equal standing work on them, so that a slow directory or a
damaged file holds up one request and not the mount; asking the roots back is not queued behind them, and stops the
streams. Each stream has a thread of its own, which is held up by whoever reads it. A reader has nothing to clean up:
it ends by the end of its process.
"""

from __future__ import annotations

import encodings.unicode_escape  # noqa: F401  # names.displayable needs it, and there is no file to import from later
import os
import socket
import sys
import threading
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from sendense_restored import errors, names

from . import pages, protocol, stream, tree
from .confine import Cell, confine
from .ntfs import Ntfs
from .outlet import Outlet
from .roots import Roots

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

THREADS = 4
"""Enough that three slow requests leave one thread for the others; the daemon bounds what can wait."""

_STACK = 512 << 10  # the stacks of threads count as data, which the jail limits


class _Request(NamedTuple):
    id: int
    op: str
    arguments: dict[str, Any]
    fds: list[int]


def main(arguments: Sequence[str]) -> None:
    """Entry point; ``arguments`` are socket, root, uid, daemon's pid, a directory, and an id for people to see."""
    cell, sock = prepare(arguments)
    confine(cell)
    serve(sock)
    os._exit(0)  # threads may hang in a dead file system; nothing is left that would have to be flushed


def prepare(arguments: Sequence[str]) -> tuple[Cell, socket.socket]:
    """What comes before the confinement."""
    descriptor, root, uid, parent = map(int, arguments[:4])
    # Family and type are given because asking for them is not allowed later.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=descriptor)
    protocol.prepare(sock)
    return Cell(uid=uid, parent=parent, directory=arguments[4], root=root, socket=descriptor), sock


def serve(sock: socket.socket) -> None:
    """Answer requests until the daemon closes its end."""
    server = _Server(sock)
    threading.excepthook = _die
    threading.stack_size(_STACK)
    for _ in range(THREADS):
        threading.Thread(target=server.work, daemon=True).start()
    server.take_in()


def _die(failure: threading.ExceptHookArgs) -> None:
    """A thread that fails is a fault of ours: end, so that the daemon notices, and not with one thread less."""
    sys.excepthook(failure.exc_type, failure.exc_value or failure.exc_type(), failure.exc_traceback)
    os._exit(70)


def _out_of_memory() -> errors.Unavailable:
    return errors.Unavailable("the mount's reader is short of memory; try again in a moment")


class _Server:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._roots = Roots()
        self._ntfs: dict[str, Ntfs] = {}
        self._waiting: SimpleQueue[_Request] = SimpleQueue()
        self._starts: dict[int, list[protocol.Start]] = {}  # of streams of which not all frames have come
        self._outlets: dict[int, Outlet] = {}  # by the id of their stream

    def take_in(self) -> None:
        self._send([protocol.answer_frame(0, None)])  # ready: what the daemon's request 0, never sent, waits for
        while received := protocol.receive(self._sock, most_fds=protocol.MAX_FDS):
            message, fds = received
            request = _Request(int(message["id"]), str(message["op"]), message, fds)
            if request.op == "take_back":
                for outlet in tuple(self._outlets.values()):
                    outlet.stop()
                self._roots.take_back(partial(self._send, [protocol.answer_frame(request.id, None)]))
            elif request.op == "stream":
                self._begin_stream(request)
            elif request.op == "cancel":
                writing = self._outlets.get(request.id)  # its thread may take it out at any moment
                if writing is not None:
                    writing.stop()
            else:
                self._waiting.put(request)

    def work(self) -> None:
        while True:
            request = self._waiting.get()
            try:
                self._serve(request)
            except errors.RestoreError as error:
                self._send([protocol.error_frame(request.id, error)])
            except MemoryError:
                self._send([protocol.error_frame(request.id, _out_of_memory())])

    def _serve(self, request: _Request) -> None:
        arguments = request.arguments
        if request.op == "give":
            self._give(request)
            return
        path, ntfs = names.parse_path(arguments["path"]), self._ntfs.get(arguments["volume"])
        with self._roots.use(arguments["volume"]) as root:
            if request.op == "list":
                limit, cursor = arguments["limit"], arguments["cursor"]
                page = pages.list_directory(
                    root, path, limit=limit, cursor=cursor, check=self._roots.check, ntfs=ntfs
                )
                self._send(protocol.listing_frames(request.id, page))
            elif request.op == "stat":
                self._send([protocol.answer_frame(request.id, tree.stat(root, path, ntfs=ntfs))])
            elif request.op == "open":
                stream_name = names.to_bytes(arguments["stream"])
                descriptor, info = tree.open_file(root, path, stream=stream_name, most=arguments["most"], ntfs=ntfs)
                try:
                    protocol.send(self._sock, protocol.answer_frame(request.id, info), [descriptor])
                finally:
                    os.close(descriptor)
            else:
                raise errors.Unavailable(f"this reader cannot {request.op!r}; restart the service")

    def _begin_stream(self, request: _Request) -> None:
        """Collect the frames of a request for a stream; with the last one comes the pipe, and the stream begins."""
        try:
            found = protocol.starts_of(request.arguments)
        except errors.InvalidPath as error:
            protocol.close_all(request.fds)
            self._send([protocol.error_frame(request.id, error)])
            return
        if not request.fds:
            self._starts.setdefault(request.id, []).extend(found)
            return
        starts = [*self._starts.pop(request.id, []), *found]
        filters = protocol.Filters(*request.arguments["filters"])
        try:
            outlet = self._outlets[request.id] = Outlet(request.fds[0], stall=request.arguments["stall"])
            work = partial(self._stream, request.id, starts, filters, outlet)
            threading.Thread(target=work, daemon=True).start()
        except errors.RestoreError as error:
            self._send([protocol.error_frame(request.id, error)])
        except RuntimeError:  # no thread can be started
            self._outlets.pop(request.id).close()
            full = errors.Unavailable("the mount's reader is short of threads; try again in a moment")
            self._send([protocol.error_frame(request.id, full)])

    def _stream(
        self, number: int, starts: Sequence[protocol.Start], filters: protocol.Filters, outlet: Outlet
    ) -> None:
        try:
            with outlet, stream.opened(starts, filters, self._roots.use, outlet, self._ntfs) as walk:
                self._send([protocol.part_frame(number, None)])
                end = walk.run()
        except errors.RestoreError as error:
            self._send([protocol.error_frame(number, error)])
        except MemoryError:  # while opening: a walk that runs ends by itself
            self._send([protocol.error_frame(number, _out_of_memory())])
        else:
            # After the pipe was closed: once the daemon knows, so does the client.
            self._send([protocol.answer_frame(number, end)])
        finally:
            del self._outlets[number]

    def _give(self, request: _Request) -> None:
        roots = dict(zip(request.arguments["volumes"], request.fds, strict=True))
        directory = request.arguments["directory"]
        self._ntfs |= {volume: Ntfs(f"{directory}/{volume}") for volume in request.arguments["ntfs"]}
        # Asked before they are lent, while they are surely still open.
        usage = {volume: tree.usage(root) for volume, root in roots.items()}
        self._roots.give(roots)
        self._send([protocol.answer_frame(request.id, usage)])

    def _send(self, frames: Iterable[bytes]) -> None:
        for frame in frames:
            protocol.send(self._sock, frame)
