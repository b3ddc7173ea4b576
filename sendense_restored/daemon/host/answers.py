"""A reader's answers: nothing is believed.

A reader reads hostile file systems, and may have been taken over by one. Every value that comes from it is checked
here for type, size and range, and a frame that an honest reader would not send is a ProtocolError, which ends it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sendense_restored import errors, names
from sendense_restored.reader.protocol import (
    I64,
    KINDS,
    MAX_MESSAGE,
    MAX_PAGE,
    MAX_STREAM_NAMES,
    MAX_XATTRS,
    U32,
    U64,
    Entry,
    FileInfo,
    Listing,
    ProtocolError,
    Reply,
    StreamEnd,
    Usage,
    space_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# What a reader may say went wrong: not, for example, that the caller is not authorized.
_ERRORS = {
    cls.__name__: cls
    for cls in (
        errors.InvalidPath,
        errors.PathNotFound,
        errors.NotAFile,
        errors.NotADirectory,
        errors.Unreadable,
        errors.TooLarge,
        errors.Unavailable,
    )
}
_ENTRY_LENGTH = len(Entry._fields)


def _number(value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:  # not isinstance: True is no number
        raise ProtocolError("a number of the wrong type or size")
    return value


def _truth(value: object) -> bool:
    if type(value) is not bool:
        raise ProtocolError("a truth value of the wrong type")
    return value


def _row(value: object, length: int) -> list[object]:
    if not isinstance(value, list) or len(value) != length:
        raise ProtocolError("a record of the wrong shape")
    return value


def _sentence(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_MESSAGE or names.displayable(value) != value:
        raise ProtocolError("a message that cannot be shown")
    return value


def _text(value: object, longest: int) -> tuple[str, bytes]:
    """A name or link target in text form, and the bytes that it stands for."""
    if not isinstance(value, str) or len(value) > longest:
        raise ProtocolError("a name of the wrong type or length")
    try:
        raw = value.encode() if value.isascii() else names.to_bytes(value)
    except errors.InvalidPath:
        raise ProtocolError("a name that is not in text form") from None
    if b"\0" in raw or len(raw) > longest:
        raise ProtocolError("a name that no file can have")
    return value, raw


def _name(value: object) -> tuple[str, bytes]:
    text, raw = _text(value, names.MAX_NAME)
    if raw in {b"", b".", b".."} or b"/" in raw:
        raise ProtocolError("a name that no file can have")
    return text, raw


def _stream(value: object) -> str:
    try:
        if isinstance(value, str):
            names.parse_stream(value)
            return value
    except errors.InvalidOption:
        pass
    raise ProtocolError("a stream's name that can be none")


def _names(value: object, check: Callable[[object], str], longest: int) -> list[str]:
    """Names that have no more than so many bytes together."""
    # The shortest name has one byte; those that are more are not even looked at.
    if not isinstance(value, list) or len(value) > longest:
        raise ProtocolError("a record of the wrong shape")
    checked = [check(name) for name in value]
    if sum(len(names.to_bytes(name)) for name in checked) > longest:
        raise ProtocolError("more names than a reader tells")
    return checked


def _kind(value: object) -> str:
    if not isinstance(value, str) or value not in KINDS:
        raise ProtocolError("a kind of file that there is not")
    return value


def parse_reply(message: dict[str, Any]) -> Reply:
    """The frame of an answer. Raises ProtocolError."""
    number = _number(message.get("id"), 0, U32)
    if message.keys() == {"id", "error", "message"}:
        name, sentence = message["error"], _sentence(message["message"])
        if not isinstance(name, str) or name not in _ERRORS:
            raise ProtocolError("an error that a reader cannot have")
        return Reply(number, more=False, answer=None, error=_ERRORS[name](sentence))
    if "ok" not in message or not message.keys() <= {"id", "more", "ok"}:
        raise ProtocolError("an answer of the wrong shape")
    return Reply(number, more=_truth(message.get("more", False)), answer=message["ok"], error=None)


def parse_usage(answer: object, volumes: Sequence[str]) -> dict[str, Usage]:
    """The answer to ``give``: how full each of ``volumes`` is. Raises ProtocolError."""
    if not isinstance(answer, dict) or answer.keys() != set(volumes):
        raise ProtocolError("the usage of other volumes than asked for")
    rows = {volume: _row(answer[volume], 2) for volume in volumes}
    return {volume: Usage(_number(size, 0, U64), _number(used, 0, U64)) for volume, (size, used) in rows.items()}


def parse_info(answer: object) -> FileInfo:
    """The answer to ``stat``, and to ``open``. Raises ProtocolError."""
    row = _row(answer, len(FileInfo._fields))
    (
        kind,
        size,
        allocated,
        mode,
        uid,
        gid,
        atime,
        mtime,
        ctime,
        nlink,
        target,
        xattrs,
        streams,
        unreadable,
        clamped,
    ) = row
    return FileInfo(
        kind=_kind(kind),
        size=_number(size, 0, U64),
        allocated=_number(allocated, 0, U64),
        mode=_number(mode, 0, 0o7777),
        uid=_number(uid, 0, U32),
        gid=_number(gid, 0, U32),
        atime_ns=_number(atime, -I64 - 1, I64),
        mtime_ns=_number(mtime, -I64 - 1, I64),
        ctime_ns=_number(ctime, -I64 - 1, I64),
        nlink=_number(nlink, 0, U32),
        target=_text(target, names.MAX_PATH)[0],
        xattrs=_names(xattrs, lambda name: _text(name, names.MAX_NAME)[0], MAX_XATTRS),
        streams=_names(streams, _stream, MAX_STREAM_NAMES),
        unreadable=_sentence(unreadable),
        time_clamped=_truth(clamped),
    )


def parse_stream_end(answer: object, limit: int | None) -> StreamEnd:
    """The last answer to ``stream``, with at most ``limit`` entries. Raises ProtocolError."""
    entries, failed, truncated, size, complete = _row(answer, len(StreamEnd._fields))
    return StreamEnd(
        entries=_number(entries, 0, U64 if limit is None else limit),
        errors=_number(failed, 0, U64),
        truncated=_truth(truncated),
        bytes=_number(size, 0, U64),
        complete=_truth(complete),
    )


def _parse_entry(value: object) -> tuple[bytes, Entry]:
    """A line of a page. As short a way as can be, while still everything is checked: a page has thousands."""
    name, kind, size, mode, mtime, target, extras = _row(value, _ENTRY_LENGTH)
    text, raw = _name(name)
    if type(size) is not int or type(mode) is not int or type(mtime) is not int:
        raise ProtocolError("a number of the wrong type or size")
    if not (0 <= size <= U64 and 0 <= mode <= 0o7777 and -I64 - 1 <= mtime <= I64):
        raise ProtocolError("a number of the wrong type or size")
    linked = _text(target, names.MAX_PATH)[0] if target != "" else ""
    return raw, Entry(text, _kind(kind), size, mode, mtime, linked, _parse_extras(extras) if extras != {} else {})


def _parse_extras(extras: object) -> dict[str, str | int | bool]:
    if not isinstance(extras, dict) or not extras.keys() <= {"unreadable", "time_clamped", "nlink"}:
        raise ProtocolError("extras that there are not")
    checked: dict[str, str | int | bool] = {}
    if "unreadable" in extras:
        checked["unreadable"] = _sentence(extras["unreadable"])
    if "time_clamped" in extras:
        checked["time_clamped"] = _truth(extras["time_clamped"])
    if "nlink" in extras:
        checked["nlink"] = _number(extras["nlink"], 0, U32)
    return checked


class ListingParts:
    """Puts the frames of one listing together.

    Names must rise from frame to frame and begin after the cursor that was asked with, so that no reader can send a
    client round in circles; their number is bounded by the limit that was asked for, and what they take by
    ``protocol.MAX_PAGE``.
    """

    def __init__(self, *, limit: int, cursor: str) -> None:
        self._left, self._room = limit, MAX_PAGE
        self._last = names.to_bytes(cursor)
        self._entries: list[Entry] = []

    def add(self, answer: object, *, last: bool) -> None:
        """One more frame. Raises ProtocolError."""
        if not isinstance(answer, dict) or answer.keys() != ({"entries", "cursor"} if last else {"entries"}):
            raise ProtocolError("a listing of the wrong shape")
        rows = answer["entries"]
        if not isinstance(rows, list) or len(rows) > self._left or not (rows or last):
            raise ProtocolError("a listing of the wrong length")
        self._left -= len(rows)
        for row in rows:
            raw, entry = _parse_entry(row)
            if raw <= self._last:
                raise ProtocolError("a listing that is not in order")
            self._last = raw
            self._room -= space_of(entry)
            if self._room < 0 and self._entries:
                raise ProtocolError("a listing that is too long")
            self._entries.append(entry)

    def listing(self, answer: object) -> Listing:
        """The whole page, of which ``answer`` is the last frame. Raises ProtocolError."""
        self.add(answer, last=True)
        assert isinstance(answer, dict)
        cursor = answer["cursor"]
        if cursor != "" and (not self._entries or cursor != self._entries[-1].name):
            raise ProtocolError("a cursor that is not the last name")
        return Listing(self._entries, str(cursor))
