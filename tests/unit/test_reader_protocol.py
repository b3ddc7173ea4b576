"""The wire of a reader: what an honest one sends arrives, and nothing else does."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sendense_restored import errors, names
from sendense_restored.daemon.host import answers
from sendense_restored.reader import protocol
from sendense_restored.reader.protocol import Entry, FileInfo, Filters, Listing, ProtocolError, Start

if TYPE_CHECKING:
    from collections.abc import Iterator

Pair = tuple[socket.socket, socket.socket]

ENTRY = Entry("name", "file", 5, 0o644, 17, "", {})
INFO = FileInfo("file", 5, 4096, 0o644, 0, 0, 1, 2, 3, 1, "", ["user.a"], [], "")


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, two:
        protocol.prepare(one)
        yield one, two


def received(pair: Pair, *, most_fds: int = 0) -> tuple[dict[str, Any], list[int]]:
    frame = protocol.receive(pair[1], most_fds=most_fds)
    assert frame is not None
    return frame


# --- frames -----------------------------------------------------------------------------------------------------


def test_a_frame_arrives_whole_with_descriptors_that_are_not_inherited(pair: Pair) -> None:
    with open("/dev/null", "rb") as file:  # noqa: PTH123 - any file
        protocol.send(pair[0], protocol.encode({"text": "\uef80\U0001f600"}), [file.fileno()] * 3)
        message, fds = received(pair, most_fds=3)
        try:
            assert message == {"text": "\uef80\U0001f600"}
            assert [os.path.sameopenfile(file.fileno(), descriptor) for descriptor in fds] == [True] * 3
            assert not any(map(os.get_inheritable, fds))
        finally:
            protocol.close_all(fds)


def test_the_longest_frame_fits_and_a_longer_message_is_not_sent(pair: Pair) -> None:
    longest = {"t": "x" * (protocol.MAX_FRAME - 8)}
    assert len(protocol.encode(longest)) == protocol.MAX_FRAME
    protocol.send(pair[0], protocol.encode(longest))
    assert received(pair) == (longest, [])
    with pytest.raises(ProtocolError):
        protocol.encode({"t": longest["t"] + "x"})


def test_a_closed_peer_is_the_end(pair: Pair) -> None:
    pair[0].close()
    assert protocol.receive(pair[1], most_fds=0) is None


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff\xfe",
        b"{",
        b"[]",
        b"7",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b'{"a":' * 20_000,
        b'{"id":%s}' % (b"9" * 5000),
        '{"a":1}'.encode("utf-16"),
        b"{}" + b" " * protocol.MAX_FRAME,
    ],
    ids=lambda frame: repr(frame[:10]),
)
def test_garbage_is_refused(pair: Pair, frame: bytes) -> None:
    pair[0].send(frame)
    with pytest.raises(ProtocolError):
        protocol.receive(pair[1], most_fds=0)


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (200, 1), (200, 64)])
def test_too_many_descriptors_are_refused_and_closed(pair: Pair, count: int, most: int) -> None:
    with open("/dev/null", "rb") as file:  # noqa: PTH123 - any file
        protocol.send(pair[0], b"{}", [file.fileno()] * count)
    with pytest.raises(ProtocolError):
        protocol.receive(pair[1], most_fds=most)


def test_descriptors_of_garbage_are_closed(pair: Pair) -> None:
    with open("/dev/null", "rb") as file:  # noqa: PTH123 - any file
        for frame in (b"garbage", b""):
            protocol.send(pair[0], frame, [file.fileno()])
    for _ in range(2):
        with pytest.raises(ProtocolError):
            protocol.receive(pair[1], most_fds=1)


# --- answers ----------------------------------------------------------------------------------------------------


def replies(frames: Iterator[bytes]) -> list[protocol.Reply]:
    return [answers.parse_reply(json.loads(frame)) for frame in frames]


def test_a_page_of_the_longest_names_goes_in_frames_that_fit() -> None:
    # Control characters are the longest in JSON: six bytes for one.
    entries = [
        Entry(f"{number:04}" + "\x01" * (names.MAX_NAME - 4), "symlink", 0, 0o777, -1, "\x01" * names.MAX_PATH, {})
        for number in range(100)
    ]
    frames = list(protocol.listing_frames(7, Listing(entries, entries[-1].name)))
    assert all(len(frame) <= protocol.MAX_FRAME for frame in frames)
    *middle, last = replies(iter(frames))
    assert len(middle) > 10
    assert all(reply.more for reply in middle)
    parts = answers.ListingParts(limit=100, cursor="")
    for reply in middle:
        parts.add(reply.answer, last=False)
    assert parts.listing(last.answer) == Listing(entries, entries[-1].name)


@given(raw=st.lists(st.binary(min_size=1, max_size=40), unique=True, max_size=30), limit=st.integers(1, 10_000))
def test_any_names_survive_the_wire(raw: list[bytes], limit: int) -> None:
    honest = sorted(name for name in raw if not {b"\0", b"/"} & {name[i : i + 1] for i in range(len(name))})
    honest = [name for name in honest if name not in {b".", b".."}][:limit]
    page = Listing([ENTRY._replace(name=names.to_text(name)) for name in honest], "")
    (reply,) = replies(protocol.listing_frames(1, page))
    assert answers.ListingParts(limit=limit, cursor="").listing(reply.answer) == page


def test_an_empty_page_is_one_frame() -> None:
    (reply,) = replies(protocol.listing_frames(3, Listing([], "")))
    assert answers.ListingParts(limit=1, cursor="x").listing(reply.answer) == Listing([], "")


def test_file_info_survives_the_wire() -> None:
    reply = answers.parse_reply(json.loads(protocol.answer_frame(9, INFO)))
    assert (reply.id, reply.more, reply.error) == (9, False, None)
    assert answers.parse_info(reply.answer) == INFO


def test_the_most_attributes_fit_a_frame() -> None:
    info = INFO._replace(xattrs=["\x01" * 255] * (protocol.MAX_XATTRS // 255))
    assert answers.parse_info(json.loads(protocol.answer_frame(1, info))["ok"]) == info


@pytest.mark.parametrize("name", ["InvalidPath", "PathNotFound", "NotAFile", "NotADirectory", "Unreadable"])
def test_an_error_arrives_as_the_same_class_and_showable(name: str) -> None:
    sent = errors.BY_NAME[name]("there is no '\x1b[2J\u202e'; " + "x" * 5000)
    reply = answers.parse_reply(json.loads(protocol.error_frame(4, sent)))
    assert type(reply.error) is type(sent)
    assert reply.error.message.startswith(r"there is no '\x1b[2J\u202e'")


GOOD = [*ENTRY]


def row(**changed: object) -> list[object]:
    return list(ENTRY._replace(**changed))  # type: ignore[arg-type] # hostile on purpose


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {},
        {"entries": []},
        {"entries": [], "cursor": "", "extra": 1},
        {"entries": {}, "cursor": ""},
        {"entries": [None], "cursor": ""},
        {"entries": [GOOD[:-1]], "cursor": ""},
        {"entries": [[*GOOD, 1]], "cursor": ""},
        {"entries": [row(name=7)], "cursor": ""},
        {"entries": [row(name="")], "cursor": ""},
        {"entries": [row(name=".")], "cursor": ""},
        {"entries": [row(name="..")], "cursor": ""},
        {"entries": [row(name="a/b")], "cursor": ""},
        {"entries": [row(name="a\0b")], "cursor": ""},
        {"entries": [row(name="\ud800")], "cursor": ""},
        {"entries": [row(name="\uef80\uef80\uefc3\uefa9")], "cursor": ""},  # two bytes that are valid UTF-8
        {"entries": [row(name="n" * 1021)], "cursor": ""},
        {"entries": [row(name="\u20ac" * 400)], "cursor": ""},  # 1200 bytes
        {"entries": [row(kind="volume")], "cursor": ""},
        {"entries": [row(kind=[])], "cursor": ""},
        {"entries": [row(size=-1)], "cursor": ""},
        {"entries": [row(size=2**64)], "cursor": ""},
        {"entries": [row(size=1.0)], "cursor": ""},
        {"entries": [row(size=True)], "cursor": ""},
        {"entries": [row(mode=0o10000)], "cursor": ""},
        {"entries": [row(mtime_ns=2**63)], "cursor": ""},
        {"entries": [row(mtime_ns=-(2**63) - 1)], "cursor": ""},
        {"entries": [row(target="\0")], "cursor": ""},
        {"entries": [row(target="\udcff")], "cursor": ""},
        {"entries": [row(target="t" * 4096)], "cursor": ""},
        {"entries": [row(extras=[])], "cursor": ""},
        {"entries": [row(extras={"display_name": "C:"})], "cursor": ""},
        {"entries": [row(extras={"unreadable": "\x1b]0;gotcha"})], "cursor": ""},
        {"entries": [row(extras={"unreadable": "x" * 2001})], "cursor": ""},
        {"entries": [row(extras={"time_clamped": 1})], "cursor": ""},
        {"entries": [GOOD], "cursor": "other"},
        {"entries": [GOOD], "cursor": 7},
        {"entries": [GOOD], "cursor": None},
        {"entries": [], "cursor": "name"},
        {"entries": [GOOD, GOOD], "cursor": ""},  # twice
        {"entries": [row(name="b"), row(name="a")], "cursor": ""},
        {"entries": [row(name="A")], "cursor": ""},  # not after the cursor that was asked with
        {"entries": [row(name=f"b{number}") for number in range(6)], "cursor": ""},  # more than asked for
    ],
    ids=lambda answer: ascii(answer)[:60],
)
def test_a_hostile_listing_is_refused(answer: object) -> None:
    with pytest.raises(ProtocolError):
        answers.ListingParts(limit=5, cursor="AA").listing(answer)


def test_the_limit_holds_over_all_frames_and_none_is_empty() -> None:
    parts = answers.ListingParts(limit=3, cursor="")
    parts.add({"entries": [row(name="a"), row(name="b")]}, last=False)
    with pytest.raises(ProtocolError):
        parts.add({"entries": []}, last=False)
    with pytest.raises(ProtocolError):
        parts.add({"entries": [row(name="c"), row(name="d")]}, last=False)


def test_a_page_has_a_length_too_over_all_frames() -> None:
    """Else one that has as many entries as it may, each as long as it may be, would have 200 MiB."""
    parts = answers.ListingParts(limit=10_000, cursor="")
    longest = {"kind": "symlink", "target": "\uefff" * names.MAX_PATH, "extras": {"unreadable": "x" * 2000}}
    rows = [row(name=f"{number:04}", **longest) for number in range(1000)]
    accepted = 0

    def add() -> None:
        nonlocal accepted
        for each in rows:
            parts.add({"entries": [each]}, last=False)
            accepted += protocol.space_of(Entry(*each))  # type: ignore[arg-type]

    with pytest.raises(ProtocolError, match="too long"):
        add()
    assert protocol.MAX_PAGE - 20_000 < accepted <= protocol.MAX_PAGE


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "volume"},
        {"size": -1},
        {"allocated": 2**64},
        {"mode": -1},
        {"uid": 2**32},
        {"gid": "0"},
        {"atime_ns": None},
        {"ctime_ns": 2**63},
        {"nlink": -1},
        {"target": "a\0"},
        {"xattrs": "user.a"},
        {"xattrs": [7]},
        {"xattrs": ["\ud800"]},
        {"streams": {}},
        {"unreadable": "\u202e"},
        {"time_clamped": "no"},
    ],
    ids=str,
)
def test_hostile_file_info_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        answers.parse_info(list(INFO._replace(**changed)))


@pytest.mark.parametrize("answer", [None, {}, [], [*INFO][:-1], [*INFO, 0]])
def test_file_info_of_the_wrong_shape_is_refused(answer: object) -> None:
    with pytest.raises(ProtocolError):
        answers.parse_info(answer)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"id": 1},
        {"ok": None},
        {"id": "1", "ok": None},
        {"id": -1, "ok": None},
        {"id": 2**32, "ok": None},
        {"id": True, "ok": None},
        {"id": 1, "ok": None, "error": "Failed"},
        {"id": 1, "ok": None, "more": 1},
        {"id": 1, "error": "PathNotFound"},
        {"id": 1, "error": "PathNotFound", "message": 7},
        {"id": 1, "error": "PathNotFound", "message": "\ud800"},
        {"id": 1, "error": "PathNotFound", "message": "a\nb"},
        {"id": 1, "error": "NotAuthorized", "message": "type your password"},
        {"id": 1, "error": "RestoreError", "message": "x"},
        {"id": 1, "error": [], "message": "x"},
        {"id": 1, "error": "PathNotFound", "message": "x", "more": True},
    ],
    ids=str,
)
def test_a_hostile_reply_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        answers.parse_reply(message)


@pytest.mark.parametrize(
    "answer", [None, [], {}, {"v": [1, 2], "w": [1, 2]}, {"v": [1]}, {"v": [1, -1]}, {"v": [2**64, 0]}, {"w": [1, 2]}]
)
def test_hostile_usage_is_refused(answer: object) -> None:
    with pytest.raises(ProtocolError):
        answers.parse_usage(answer, ["v"])


# --- streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        *(None, {}, [], [1, 0, False, 9], [1, 0, False, 9, True, 0], "12345"),
        *([-1, 0, False, 9, True], [11, 0, True, 9, True], [True, 0, False, 9, True], ["1", 0, False, 9, True]),
        *([1, -1, False, 9, True], [1, 2**64, False, 9, True], [1, None, False, 9, True]),
        *([1, 0, 0, 9, True], [1, 0, None, 9, True], [1, 0, False, 9, 1], [1, 0, False, 9, "yes"]),
        *([1, 0, False, -1, True], [1, 0, False, 2**64, True], [1, 0, False, 9.0, True]),
    ],
    ids=str,
)
def test_a_hostile_end_of_a_stream_is_refused(answer: object) -> None:
    with pytest.raises(ProtocolError):
        answers.parse_stream_end(answer, 10)


def test_an_end_within_the_limit_is_taken_and_without_one_any_number_is() -> None:
    assert answers.parse_stream_end([10, 3, True, 700, True], 10) == (10, 3, True, 700, True)
    assert answers.parse_stream_end([2**64 - 1, 0, False, 2**64 - 1, False], None).entries == 2**64 - 1


def test_a_request_for_a_stream_arrives_as_it_was_sent(pair: Pair) -> None:
    entry = Entry("w\uef80", "volume", 1 << 40, 0o555, -1, "", {"display_name": 'Data "one"', "unreadable": "no"})
    starts = [Start("v", (b"a\xff", b'"\\\n')), Start("w\uef80", (), entry, open=False)]
    filters = Filters(recursive=True, name="*\uefff[!a]", max_size=2**64 - 1, newer=-(2**63), limit=1)
    (frame,) = protocol.stream_frames(2**32 - 1, starts, filters, 0.5)
    protocol.send(pair[0], frame)
    message, _ = received(pair)
    assert (message["id"], message["op"], message["stall"]) == (2**32 - 1, "stream", 0.5)
    assert protocol.starts_of(message) == starts
    assert Filters(*message["filters"]) == filters


def test_the_longest_path_and_pattern_fit_a_frame(pair: Pair) -> None:
    path = (b"\x01" * 255,) * 15 + (b"\x01" * 254,)
    (frame,) = protocol.stream_frames(1, [Start("v", path)], Filters(name="\x01" * 1024), 1.0)
    protocol.send(pair[0], frame)
    assert protocol.starts_of(received(pair)[0])[0].path == path
