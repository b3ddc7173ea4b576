"""The wire between the daemon and a reader: frames, answers and file descriptors over a socketpair.

A frame is one packet of a SOCK_SEQPACKET pair, at most 128 KiB, and holds one JSON object. The daemon asks
``{id, op, ...}``; the reader answers ``{id, ok}`` or ``{id, error, message}``, and a long listing in several frames,
all but the last marked ``more``. Descriptors travel beside their frame (SCM_RIGHTS).

A stream is a listing that goes to its client and not through the daemon: ``stream`` carries the write end of a pipe
and is answered twice, with a part when the directory is open, and at the end with what came of it. The lines that go
into the pipe are JSON objects, which ``reader/stream.py`` describes. ``cancel`` with the stream's own id has no
answer.

Both sides import this module, and of the reader's modules the daemon imports this one only. So it holds no policy and
imports little: a reader's start has to be quick. What the daemon believes of the answers is its own affair
(``daemon/host/answers.py``).
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from sendense_restored import errors, names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_FRAME = 128 << 10
"""Bytes of the longest frame: below the default send buffer of a socket (net.core.wmem_default), which bounds it."""

MAX_FDS = 64
"""Descriptors in one frame; the kernel's own limit is 253 (SCM_MAX_FD)."""

MAX_LIMIT = 10_000
"""Entries of the longest page of a listing."""

MAX_PAGE = 6 << 20
"""Bytes of a page (``space_of``), but for one that has one entry: what the daemon makes of it has to fit a message of
the bus (8 MiB, ``wire.codec``), and a guest's names and targets can be long."""

MAX_XATTRS = 16 << 10
"""Bytes of a file's extended attribute names that are told, so that they always fit a frame."""

MAX_STREAM_NAMES = 8 << 10
"""The same for the names of its alternate streams (NTFS), which no prefix makes longer."""

MAX_STREAMS = 64
"""Streams that one reader has at a time; each takes a thread and a few descriptors."""

MAX_PATTERN = 1024
"""Bytes of the longest glob that is looked for."""

MAX_MESSAGE = 2000
"""Characters of the longest message of an error."""

_SEND_BUFFER = 2 * MAX_FRAME
_AT_ONCE = 64  # entries; encoding them one by one takes half as long again
_BESIDES_TEXTS = 256  # of an entry; on the bus it is 147 at most
_FRAME_MARGIN = 256  # what stands around the entries of a listing, apart from the cursor

U32, U64, I64 = 2**32 - 1, 2**64 - 1, 2**63 - 1

KINDS = frozenset({"file", "directory", "symlink", "fifo", "socket", "block", "char"})


class ProtocolError(Exception):
    """The other side sent what an honest one never sends; the message says what, in a few words."""


class Usage(NamedTuple):
    """How full a volume is, in bytes; both are 0 where the file system cannot say."""

    size: int
    used: int


class Entry(NamedTuple):
    """One line of a listing. ``name`` and ``target`` are in text form, ``mode`` has the permission bits.

    ``extras`` may hold ``unreadable`` (a sentence), ``time_clamped``, and ``nlink`` of a file with several names.
    """

    name: str
    kind: str
    size: int
    mode: int
    mtime_ns: int
    target: str
    extras: dict[str, str | int | bool]


def space_of(entry: Entry) -> int:
    """Bytes that an entry takes of a page: its texts, and something for all else. Both sides ask for every entry."""
    taken = _BESIDES_TEXTS + _bytes_of(entry.name)
    if entry.target:
        taken += _bytes_of(entry.target)
    if entry.extras:
        taken += _bytes_of(str(entry.extras.get("unreadable", "")))
    return taken


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


class Listing(NamedTuple):
    """A page of a directory; ``cursor`` asks for the next one and is empty on the last."""

    entries: list[Entry]
    cursor: str


class FileInfo(NamedTuple):
    """What is known of one file: sizes in bytes, times in ns since the epoch, names in text form."""

    kind: str
    size: int
    allocated: int
    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    nlink: int
    target: str
    xattrs: list[str]
    streams: list[str]
    unreadable: str
    """Why its content cannot be given faithfully; empty if it can."""
    time_clamped: bool = False


class Filters(NamedTuple):
    """Which entries a stream tells. None and the empty text leave a filter out."""

    recursive: bool = False
    """Also what is below; a directory that does not match is descended all the same."""
    max_depth: int | None = None
    """How far down, with ``recursive``; 1 is what an ordinary listing has."""
    name: str = ""
    """A glob of the shell (``*``, ``?``, ``[a-z]``) for the last part of the path, in text form; case counts."""
    kind: str = ""
    min_size: int | None = None
    max_size: int | None = None
    """Bytes, both bounds included."""
    newer: int | None = None
    older: int | None = None
    """Changed after, before this moment: ns since the epoch, both bounds included."""
    limit: int | None = None
    """Entries, at most."""


class Start(NamedTuple):
    """Where a stream begins: a directory in a volume, or, with ``entry``, a whole volume as one of several.

    The volume's own line is written then, and what is in it is looked at if it is ``open`` and ``recursive`` says so.
    """

    volume: str
    path: tuple[bytes, ...]
    entry: Entry | None = None
    open: bool = True


class StreamEnd(NamedTuple):
    """What came of a stream: how many entries and errors it told, and ``bytes`` that were written."""

    entries: int
    errors: int
    truncated: bool
    """There were more entries than the limit."""
    bytes: int
    complete: bool
    """It went on to its summary line. If not, nobody read it any more, or it was stopped."""


class Reply(NamedTuple):
    """An answer whose frame is well formed: either ``error`` is set, or ``answer`` holds what is still unchecked."""

    id: int
    more: bool
    answer: object
    error: errors.RestoreError | None


# --- frames -----------------------------------------------------------------------------------------------------

_dump = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode


def prepare(sock: socket.socket) -> None:
    """Make room for frames of full length."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)


def encode(message: dict[str, Any]) -> bytes:
    """The frame that carries ``message``."""
    frame = _dump(message).encode()
    if len(frame) > MAX_FRAME:
        raise ProtocolError("a message too long for a frame")
    return frame


def send(sock: socket.socket, frame: bytes, fds: Sequence[int] = ()) -> None:
    """Send a frame with copies of ``fds``. Raises OSError: BlockingIOError on a full socket that does not block."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    sock.sendmsg([frame], rights, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, *, most_fds: int) -> tuple[dict[str, Any], list[int]] | None:
    """The next frame and the descriptors that came with it, which belong to the caller; None if the peer has closed.

    Raises ProtocolError for a frame that is no message, with its descriptors closed, and OSError.
    """
    room = socket.CMSG_SPACE(max(most_fds, 1) * 4)
    data, ancillary, flags, _ = sock.recvmsg(MAX_FRAME + 1, room, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.extend(struct.unpack(f"{len(content) // 4}i", content[: len(content) // 4 * 4]))
    if not data and not fds:
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(data) > MAX_FRAME:
            raise ProtocolError("a frame that is too long")
        if len(fds) > most_fds:
            raise ProtocolError("more descriptors than any frame has")
        return _decode(data), fds
    except ProtocolError:
        close_all(fds)
        raise


def _decode(data: bytes) -> dict[str, Any]:
    try:
        message = json.loads(data.decode())
    except (ValueError, RecursionError):
        raise ProtocolError("a frame that is not JSON") from None
    if not isinstance(message, dict):
        raise ProtocolError("a frame that is no message")
    return message


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors."""
    for descriptor in fds:
        os.close(descriptor)


# --- asking for a stream ----------------------------------------------------------------------------------------


def check_filters(filters: Filters) -> None:
    """Raises InvalidOption for filters that no stream can have."""
    if filters.max_depth is not None and not (filters.recursive and 1 <= filters.max_depth <= U32):
        raise errors.InvalidOption("max_depth must be at least 1, and goes with recursive")
    if filters.limit is not None and not 1 <= filters.limit <= U64:
        raise errors.InvalidOption("limit must be at least 1")
    if filters.kind and filters.kind not in KINDS | {"volume"}:
        raise errors.InvalidOption(f"kind must be one of volume, {', '.join(sorted(KINDS))}")
    for size in (filters.min_size, filters.max_size):
        if size is not None and not 0 <= size <= U64:
            raise errors.InvalidOption("sizes must be from 0 to 2^64 - 1")
    for moment in (filters.newer, filters.older):
        if moment is not None and not -I64 - 1 <= moment <= I64:
            raise errors.InvalidOption("times must be nanoseconds that fit 64 bits")
    matcher(filters.name)


def matcher(name: str) -> re.Pattern[str] | None:
    """What ``Filters.name`` means to ``match``; None if every name will do. Raises InvalidOption.

    No pattern makes it slow: Python's translation of a glob never goes back to an earlier ``*``.
    """
    try:
        if len(name.encode()) > MAX_PATTERN:
            raise errors.InvalidOption(f"name must not be longer than {MAX_PATTERN} bytes")
    except UnicodeEncodeError:
        raise errors.InvalidOption("name holds half a surrogate pair, which no file name has") from None
    return re.compile(fnmatch.translate(name)) if name.strip("*") else None


def stream_frames(number: int, starts: Sequence[Start], filters: Filters, stall: float) -> list[bytes]:
    """The frames of request ``number`` for a stream, of which the last goes with the pipe's write end.

    ``stall`` is how long the pipe may stay full, in seconds. A disk can have more volumes than fit one frame.
    """
    frames: list[bytes] = []
    rows: list[str] = []
    room = MAX_FRAME // 2
    for start in starts:
        row = _dump((start.volume, names.format_path(start.path), start.entry, start.open))
        size = len(row.encode())
        if size > room:
            frames.append(_starts_frame(number, rows))
            rows, room = [], MAX_FRAME // 2
        rows.append(row)
        room -= size
    frames.append(_starts_frame(number, rows, f',"filters":{_dump(filters)},"stall":{_dump(stall)}'))
    return frames


def _starts_frame(number: int, rows: Sequence[str], rest: str = "") -> bytes:
    frame = f'{{"id":{number},"op":"stream","starts":[{",".join(rows)}]{rest}}}'.encode()
    if len(frame) > MAX_FRAME:
        raise ProtocolError("a message too long for a frame")
    return frame


def starts_of(message: dict[str, Any]) -> list[Start]:
    """The starts in a frame of such a request, which comes from the daemon and is believed. Raises InvalidPath."""
    return [
        Start(volume, names.parse_path(path), Entry(*entry) if entry else None, bool(is_open))
        for volume, path, entry, is_open in message["starts"]
    ]


# --- the reader's side of answers -------------------------------------------------------------------------------


def error_frame(number: int, error: errors.RestoreError) -> bytes:
    """The frame that says why request ``number`` failed."""
    message = names.displayable(error.message)[:MAX_MESSAGE]
    return encode({"id": number, "error": type(error).__name__, "message": message})


def answer_frame(number: int, answer: object) -> bytes:
    """The frame that answers request ``number``."""
    return encode({"id": number, "ok": answer})


def part_frame(number: int, answer: object) -> bytes:
    """The frame that answers request ``number`` in part."""
    return encode({"id": number, "more": True, "ok": answer})


def listing_frames(number: int, listing: Listing) -> Iterator[bytes]:
    """The frames that answer request ``number`` with a page, each as full as it can be."""
    cursor = _dump(listing.cursor).encode()
    room = MAX_FRAME - _FRAME_MARGIN - len(cursor)
    parts: list[bytes] = []
    size = 0
    for part in _encoded(listing.entries, room):
        if size + len(part) + 1 > room:
            yield b'{"id":%d,"more":true,"ok":{"entries":[%s]}}' % (number, b",".join(parts))
            parts, size = [], 0
        parts.append(part)
        size += len(part) + 1
    yield b'{"id":%d,"ok":{"entries":[%s],"cursor":%s}}' % (number, b",".join(parts), cursor)


def _encoded(entries: Sequence[Entry], room: int) -> Iterator[bytes]:
    """``entries`` as JSON, without the brackets, many at a time; each piece fits into ``room``."""
    for start in range(0, len(entries), _AT_ONCE):
        many = entries[start : start + _AT_ONCE]
        piece = _dump(many).encode()[1:-1]
        if len(piece) < room:
            yield piece
        else:
            for entry in many:
                yield _dump(entry).encode()
