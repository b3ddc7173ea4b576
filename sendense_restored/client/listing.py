"""The stream of a directory: JSON lines from a pipe, read as they come without ever blocking the event loop.

A ``Listing`` owns the pipe's reading end; closing it cancels the work on the other side. It keeps no more than a pipe
holds and one line. A line that is too long, or no record, is a fault of the service (``Failed``). A stream that ends
before its summary is not complete, and says so (``Unavailable``).
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import stat
from collections import deque
from typing import Self

from sendense_restored import errors

from .answers import Found, Problem, Summary

_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 18
"""Bytes. A path and a link's target have at most 4095, each of which JSON may write in six characters."""


class Listing:
    """Iterates over ``Found`` and ``Problem``; then ``summary`` is known."""

    def __init__(self, fd: int) -> None:
        """Takes ``fd`` over, whatever happens. Raises Failed if it is not the reading end of a pipe."""
        self._fd = fd
        self._buffer = bytearray()
        self._lines: deque[bytes] = deque()
        self._summary: Summary | None = None
        try:
            reads = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            if not (reads and stat.S_ISFIFO(os.fstat(fd).st_mode)):
                raise errors.Failed("the restore service answered with a file that is no stream; try again")
            os.set_blocking(fd, False)
        except BaseException:
            self.close()
            raise

    @property
    def summary(self) -> Summary:
        """What the stream says of itself at its end. Raises Unavailable before."""
        if self._summary is None:
            raise errors.Unavailable("the listing has not been read to its end")
        return self._summary

    def close(self) -> None:
        """Close the pipe. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Found | Problem:
        if self._summary is not None:
            raise StopAsyncIteration
        while not self._lines:
            await self._more()
        record = _decoded(self._lines.popleft())
        if not isinstance(record, Summary):
            return record
        if self._lines or self._buffer:
            raise errors.Failed("the restore service's listing goes on after its end; report this as a fault")
        self._summary = record
        self.close()
        raise StopAsyncIteration

    async def _more(self) -> None:
        """Read until there is a whole line."""
        # One turn for the others even if the pipe is never empty.
        await asyncio.sleep(0)
        chunk = await self._chunk()
        if not chunk:
            raise errors.Unavailable(
                "the listing ended before it was complete: the mount was closed or its reader failed; list again"
            )
        first, *others = chunk.split(b"\n")
        self._buffer += first
        if others:
            self._lines.append(bytes(self._buffer))
            self._lines.extend(others[:-1])
            self._buffer = bytearray(others[-1])
        if len(self._buffer) > _LONGEST_LINE:
            raise errors.Failed("the restore service's listing has a line without end; report this as a fault")

    async def _chunk(self) -> bytes:
        """What the pipe holds, at least one byte; nothing at its end."""
        if self._fd < 0:
            raise errors.Cancelled("the listing was closed while it was read")
        while True:
            try:
                return os.read(self._fd, _CHUNK)
            except BlockingIOError:
                await self._readable()

    async def _readable(self) -> None:
        loop, fd = asyncio.get_running_loop(), self._fd
        ready = asyncio.Event()
        loop.add_reader(fd, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(fd)


def _decoded(line: bytes) -> Found | Problem | Summary:
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: no JSON, no UTF-8, or a number of thousands of digits
        answer = None
    if not isinstance(answer, dict):
        raise errors.Failed("the restore service's listing has a line that is no record; report this as a fault")
    if "summary" in answer:
        return Summary.decode(answer["summary"])
    return Problem.decode(answer) if "error" in answer else Found.decode(answer)
