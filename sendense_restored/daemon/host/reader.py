"""One reader process, seen from the daemon: what is asked of it, and how far its answers are believed.

The daemon hands it the roots of the mount's volumes and asks for listings and files; it reads no guest file itself.
What a reader says is believed no further than it can be checked: an answer that an honest reader would not give
(``answers.py``), or a descriptor of anything but a file of the volume it was asked from (``lent.py``), ends the
process, fails what is under way and resolves ``Reader.lost``.

A ``Reader`` has one owner, who closes it; ``readers`` starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sendense_restored import errors, names
from sendense_restored.reader import protocol

from . import answers
from .channel import Channel
from .lent import Lent
from .process import internal

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection, Mapping, Sequence

    from sendense_restored.reader.protocol import FileInfo, Filters, Listing, Start, StreamEnd, Usage

    from .child import Child

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")
_Fds = list[int]  # by a name of its own, as ``list`` is a method of the class below

MOST_REQUESTS = 64
"""Requests that one reader may have unanswered, those that were given up included."""

_GRACE = 1.0
"""Seconds that a reader which has closed its socket gets to end by itself."""


class Stream:
    """A listing that a reader writes into a pipe. ``end`` is done when it has ended, in whatever way.

    Its exception is Unavailable if the reader ended first.
    """

    def __init__(self, end: asyncio.Future[StreamEnd], cancel: Callable[[], None]) -> None:
        self.end = end
        self.cancel = cancel
        """Have the reader end it, soon; may be called again."""


class _Asked(Generic[_Answer]):
    """One request without an answer yet."""

    def __init__(self, finish: Callable[[object, _Fds], _Answer], parts: answers.ListingParts | None = None) -> None:
        self.finish = finish
        """Checks the answer, takes the descriptors that it keeps; raises ProtocolError."""
        self.parts = parts
        self.begun: asyncio.Future[None] | None = None
        """Of a stream: done when it has begun, which its one part says."""
        self.answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self.fds: _Fds = []
        """What came with the answer; belongs to the one who asked."""


class Reader:
    """One mount's reader process."""

    def __init__(
        self, child: Child, uid: int, sock: socket.socket, root: int, *, seconds: float, gone: Callable[[], None]
    ) -> None:
        """Takes over ``sock`` and ``root``; calls ``gone`` once when the process is gone."""
        loop = asyncio.get_running_loop()
        self.uid = uid
        self.lost: asyncio.Future[str] = loop.create_future()
        """Done, with a reason, when the process ends by itself or misbehaves; cancelled by ``close``."""
        self._child = child
        self._lent = Lent(root)
        self._seconds = seconds
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Asked[Any]] = {0: _Asked(_nothing)}
        self._streaming: set[int] = set()
        """Those of the requests that are streams."""
        self._last_kill: asyncio.TimerHandle | None = None
        self._channel: Channel | None = Channel(sock, self._answered, self._channel_ended)
        self._watch = asyncio.create_task(self._follow(gone), name=f"reader[{child.pid}]")

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    async def ready(self) -> None:
        """Wait until it is confined and serves. Raises Unavailable or Timeout."""
        await self._wait_for(self._asked[0].answer)

    # --- requests -----------------------------------------------------------------------------------------------

    async def give(
        self, roots: Mapping[str, int], *, ntfs: Collection[str] = (), directory: str = ""
    ) -> dict[str, Usage]:
        """Lend the roots of volumes, O_PATH descriptors by name; the caller keeps and closes its own.

        Each volume must be mounted in the mount's directory, under its name; those of ``ntfs`` by ntfs-3g, which was
        told to mount them in ``directory``. Answers how full each is. Raises Unavailable or Timeout.
        """
        usage: dict[str, Usage] = {}
        for volumes in _batches(sorted(roots), protocol.MAX_FDS):
            if self._channel is None:  # and so, maybe, no process whose root is above theirs
                raise _stopped()
            fds = [roots[volume] for volume in volumes]
            self._lent.add(dict(zip(volumes, fds, strict=True)))

            def finish(answer: object, _fds: _Fds, volumes: Sequence[str] = volumes) -> dict[str, Usage]:
                return answers.parse_usage(answer, volumes)

            special = [volume for volume in volumes if volume in ntfs]
            arguments = {"volumes": volumes, "ntfs": special, "directory": directory}
            usage |= await self._ask(_Asked(finish), "give", arguments, fds)
        return usage

    async def take_back(self) -> None:
        """Wait until the reader has closed all roots, or is gone; running requests are done or refused then.

        Raises Timeout; the reader still closes them as soon as it can.
        """
        if self._channel is not None:
            # Unavailable: it ended meanwhile.
            with contextlib.suppress(errors.Unavailable):
                await self._ask(_Asked(_nothing), "take_back", {})
        self._lent.clear()
        if self._channel is None:
            await self._wait_for(asyncio.shield(self._watch))

    async def list(self, volume: str, path: tuple[bytes, ...], *, limit: int, cursor: str) -> Listing:
        """A page of a directory: up to ``limit`` (1..10000) entries after the name ``cursor``.

        Raises InvalidOption, or what the reader says: NotADirectory, PathNotFound, ...
        """
        if not 1 <= limit <= protocol.MAX_LIMIT:
            raise errors.InvalidOption(f"limit must be from 1 to {protocol.MAX_LIMIT}")
        try:
            if len(cursor) > names.MAX_NAME:
                raise errors.InvalidPath("the name is too long")
            parts = answers.ListingParts(limit=limit, cursor=cursor)
        except errors.InvalidPath:
            raise errors.InvalidOption("cursor must be empty or what the last answer said") from None
        asked = _Asked(lambda answer, _fds: parts.listing(answer), parts)
        arguments = {"volume": volume, "path": names.format_path(path), "limit": limit, "cursor": cursor}
        return await self._ask(asked, "list", arguments)

    async def stream(self, starts: Sequence[Start], filters: Filters, out: int, *, stall: float) -> Stream:
        """Have a listing written into a pipe, whose write end ``out`` stays the caller's.

        Returns when it has begun. ``stall``: seconds that nobody may read before it ends. Raises InvalidOption, or
        what the reader says; nothing is written then.
        """
        protocol.check_filters(filters)
        if self._channel is None:
            raise _stopped()
        if len(self._streaming) >= protocol.MAX_STREAMS:
            raise errors.LimitReached("too many listings of this mount run; read one to its end or close it")
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def finish(answer: object, _fds: _Fds) -> StreamEnd:
            if not begun.done():
                raise protocol.ProtocolError("the end of a stream that has not begun")
            return answers.parse_stream_end(answer, filters.limit)

        asked = _Asked(finish)
        asked.begun = begun
        number = next(self._numbers)
        *first, last = protocol.stream_frames(number, starts, filters, stall)
        for frame in first:
            self._channel.send_frame(frame)
        self._channel.send_frame(last, [out])
        self._asked[number] = asked
        self._streaming.add(number)
        asked.answer.add_done_callback(lambda _: self._streaming.discard(number))

        def cancel() -> None:
            if self._channel is not None and not asked.answer.done():
                self._channel.send({"id": number, "op": "cancel"})

        either: list[asyncio.Future[Any]] = [begun, asked.answer]
        waiting = asyncio.ensure_future(asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED))
        try:
            await self._wait_for(waiting)
        except BaseException:
            cancel()
            raise
        if not begun.done():
            await asked.answer  # which says why not
        return Stream(asked.answer, cancel)

    async def stat(self, volume: str, path: tuple[bytes, ...]) -> FileInfo:
        """What is known of one file; a symbolic link is described, not followed."""
        asked = _Asked(lambda answer, _fds: answers.parse_info(answer))
        return await self._ask(asked, "stat", {"volume": volume, "path": names.format_path(path)})

    async def open(
        self, volume: str, path: tuple[bytes, ...], *, stream: bytes = b"", most: int | None = None
    ) -> tuple[int, FileInfo]:
        """A checked, read-only descriptor of a regular file, which belongs to the caller; links are followed.

        ``stream``: that of an alternate stream, on a volume that was given as ``ntfs``. Raises TooLarge for one of
        more than ``most`` bytes.
        """

        def finish(answer: object, fds: _Fds) -> FileInfo:
            info = answers.parse_info(answer)
            if most is not None and info.size > most:
                raise protocol.ProtocolError("a file larger than what was asked for")
            self._lent.check_file(volume, info, fds)
            asked.fds.append(fds.pop())
            return info

        asked = _Asked(finish)
        arguments = {"volume": volume, "path": names.format_path(path), "stream": names.to_text(stream)}
        try:
            info = await self._ask(asked, "open", {**arguments, "most": most})
            return asked.fds.pop(), info
        finally:
            protocol.close_all(asked.fds)  # the answer came in the moment that the caller gave up

    async def _ask(
        self, asked: _Asked[_Answer], op: str, arguments: Mapping[str, object], fds: Sequence[int] = ()
    ) -> _Answer:
        if self._channel is None:
            raise _stopped()
        if len(self._asked) - len(self._streaming) >= MOST_REQUESTS and op != "take_back":
            raise errors.LimitReached("too many requests of this mount wait for an answer; try again in a moment")
        number = next(self._numbers)
        self._channel.send({"id": number, "op": op, **arguments}, fds)
        self._asked[number] = asked
        return await self._wait_for(asked.answer)

    async def _wait_for(self, answer: asyncio.Future[_Answer]) -> _Answer:
        """The answer. One that comes after this has given up finds its future done, and is dropped."""
        try:
            async with asyncio.timeout(self._seconds):
                return await answer
        except TimeoutError:
            raise errors.Timeout(
                "the mount's storage did not answer in time; try again, or unmount it with force"
            ) from None

    # --- answers ------------------------------------------------------------------------------------------------

    def _answered(self, message: dict[str, Any], fds: _Fds) -> None:
        reply = answers.parse_reply(message)
        asked = self._asked.get(reply.id)
        if asked is None:
            raise protocol.ProtocolError("an answer that nobody waits for")
        if reply.more:
            if fds or not self._take_part(asked, reply.answer):
                raise protocol.ProtocolError("a part of something that has no parts")
            return
        if reply.error is not None and asked.begun is not None and asked.begun.done():
            raise protocol.ProtocolError("an error of a stream that has begun")
        if asked.answer.done():  # given up
            del self._asked[reply.id]
            return
        result, error = None, reply.error
        if error is None:
            try:
                result = asked.finish(reply.answer, fds)
            except OSError as failure:  # while checking a file: we are short of descriptors, most likely
                protocol.close_all(fds)
                fds.clear()
                error = internal("checking a file", failure)
        if fds:
            raise protocol.ProtocolError("a descriptor that nobody asked for")
        del self._asked[reply.id]
        if error is not None:
            _fail(asked, error)
        else:
            asked.answer.set_result(result)

    @staticmethod
    def _take_part(asked: _Asked[Any], answer: object) -> bool:
        if asked.parts is not None:
            asked.parts.add(answer, last=False)
            return True
        if asked.begun is None or asked.begun.done() or answer is not None:
            return False
        asked.begun.set_result(None)
        return True

    # --- the end ------------------------------------------------------------------------------------------------

    def _channel_ended(self, offence: protocol.ProtocolError | None) -> None:
        if offence is None:
            # It is ending, most likely, and its own status tells more than that of a kill would.
            self._last_kill = asyncio.get_running_loop().call_later(_GRACE, self._child.kill)
            self._stop_asking()
            return
        log.warning("reader %d sent %s; killing it", self.pid, offence)
        self._child.kill()
        self._stop_asking()
        self._tell_lost(f"the process that reads the mount's files misbehaved (it sent {offence}) and was stopped")

    def _stop_asking(self) -> None:
        """Fail what is under way, and all that comes."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        for asked in self._asked.values():
            _fail(asked, _stopped())
        self._asked.clear()

    def _tell_lost(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)

    async def _follow(self, gone: Callable[[], None]) -> None:
        status = await self._child.wait()
        self._lent.close()
        gone()
        if self._last_kill is not None:
            self._last_kill.cancel()
        self._stop_asking()
        if not self.lost.done():
            how = f"by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"with status {status}"
            log.warning("reader %d ended %s: %s", self.pid, how, names.displayable(self._child.stderr) or "(silent)")
            self._tell_lost(f"the process that reads the mount's files ended {how}")

    async def close(self) -> None:
        """End the process and wait until it is gone. May be called again.

        A process that waits for storage which is hung goes only when the storage, or its server, does: raises
        errors.Busy then.
        """
        self.lost.cancel()
        self._stop_asking()
        if not await self._child.close():
            raise errors.Busy("the process that reads the mount's files cannot be ended: its storage does not answer")
        await asyncio.shield(self._watch)


def _fail(asked: _Asked[Any], error: errors.RestoreError) -> None:
    if not asked.answer.done():
        asked.answer.set_exception(error)
        asked.answer.exception()  # seen: the one who asked may have been cancelled in this very moment


def _stopped() -> errors.Unavailable:
    return errors.Unavailable("the process that reads this mount's files has stopped; unmount and mount again")


def _nothing(answer: object, _fds: _Fds) -> None:
    if answer is not None:
        raise protocol.ProtocolError("an answer where there is nothing to say")


def _batches(items: Sequence[str], size: int) -> list[Sequence[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
