"""What is different on NTFS, in ordinary directories: the simulator's ``Ntfs`` stands for what ntfs-3g serves."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sendense_restored import errors, linux, names
from sendense_restored.daemon.host import answers
from sendense_restored.reader import ntfs, pages, protocol, tree
from sendense_restored.reader.protocol import Filters, Start
from tests import simulator as sim
from tests.unit.test_reader_stream import listed as streamed_lines

if TYPE_CHECKING:
    from pathlib import Path

    from sendense_restored.reader.protocol import Entry, FileInfo

PLACE = "/mnt/mount/v"
DEDUP = "unsupported reparse tag 0x80000013"
ENCRYPTED, REPARSE_POINT, OFFLINE, RECALLED = 0x4000, 0x400, 0x1000, 0x400000


class Says(ntfs.Ntfs):
    """A driver that gives every file these attributes, or this error, and is otherwise as the kernel has it."""

    def __init__(self, answer: bytes | int | OSError) -> None:
        super().__init__(PLACE)
        self._answer = struct.pack(">I", answer) if isinstance(answer, int) else answer

    def _attribute(self, descriptor: int, name: str) -> bytes:
        del descriptor
        if isinstance(self._answer, OSError):
            raise self._answer
        return b"" if name == "ntfs.streams.list" else self._answer


SIMULATED = sim.Ntfs(PLACE)


def opened(root: int, *path: bytes, stream: bytes = b"", as_: ntfs.Ntfs = SIMULATED) -> tuple[bytes, FileInfo]:
    descriptor, info = tree.open_file(root, path, stream=stream, ntfs=as_)
    try:
        return os.read(descriptor, 1000), info
    finally:
        os.close(descriptor)


def listed(root: int, *path: bytes, as_: ntfs.Ntfs = SIMULATED) -> dict[str, Entry]:
    page = pages.list_directory(root, path, limit=1000, cursor="", check=lambda: None, ntfs=as_)
    return {entry.name: entry for entry in page.entries}


# --- values of a hostile disk


@given(st.binary(max_size=16))
def test_attributes_have_one_form(value: bytes) -> None:
    if len(value) == 4:
        assert ntfs.parse_attributes(value) == int.from_bytes(value, "big")
        return
    with pytest.raises(OSError, match="message"):
        ntfs.parse_attributes(value)


NAME = st.binary(max_size=20) | st.text(max_size=400).map(lambda text: text.encode(errors="surrogatepass"))


@given(st.lists(NAME, max_size=60), st.integers(1, 60))
def test_every_stream_that_is_told_can_be_asked_for_and_all_fit(found: list[bytes], times: int) -> None:
    told = ntfs.parse_streams(b"\0".join(found * times))
    assert len(set(told)) == len(told)
    raw = [names.parse_stream(name) for name in told]
    assert set(raw) <= set(b"\0".join(found).split(b"\0"))
    assert sum(map(len, raw)) <= protocol.MAX_STREAM_NAMES
    info = protocol.FileInfo("file", 1, 1, 0, 0, 0, 0, 0, 0, 1, "", [], told, "")
    frame = protocol.answer_frame(1, info)
    assert len(frame) <= protocol.MAX_FRAME
    assert answers.parse_info(list(info)).streams == told


def test_the_longest_streams_fit_a_frame_with_the_longest_attributes() -> None:
    shortest = b"\0".join(bytes((first, second)) for first in range(1, 32) for second in range(1, 256))
    streams = ntfs.parse_streams(shortest + b"\0" + b"\1" * 900)
    info = protocol.FileInfo("file", 1, 1, 0, 0, 0, 0, 0, 0, 1, "\1" * 4095, [], streams, "")
    assert len(streams) > 2000
    assert len(protocol.answer_frame(1, info)) <= protocol.MAX_FRAME


@pytest.mark.parametrize(("place", "most"), [(11, protocol.MAX_XATTRS), (12, protocol.MAX_STREAM_NAMES)])
def test_no_reader_can_tell_of_more_names_than_an_honest_one(place: int, most: int) -> None:
    row: list[object] = ["file", 1, 1, 0, 0, 0, 0, 0, 0, 1, "", [], [], "", False]
    whole = ["n" * 16] * (most // 16)
    row[place] = whole
    assert answers.parse_info(row)[place] == whole
    for many in ([*whole, "n"], ["n"] * (most + 1)):
        row[place] = many
        with pytest.raises(protocol.ProtocolError):
            answers.parse_info(row)


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "a\0b", "x" * 1021, "\ud800", "\uefc3\uefa9", 7, None])
def test_no_reader_can_tell_of_a_stream_that_there_cannot_be(name: object) -> None:
    info = protocol.FileInfo("file", 1, 1, 0, 0, 0, 0, 0, 0, 1, "", [], [], "")
    with pytest.raises(protocol.ProtocolError):
        answers.parse_info([*info[:12], [name], *info[13:]])


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        (0x80000013, "deduplicated"),
        (0x80000017, "CompactOS"),
        (0x9000001A, "cloud"),
        (0x9000101A, "cloud"),
        (0x9000F01A, "cloud"),
        (0xC0000004, "HSM"),
        (0x80000006, "HSM"),
        (0x9001001A, "(0x9001001A)"),
        (0xFFFFFFFF, "(0xFFFFFFFF)"),
        (0, "(0x00000000)"),
    ],
)
def test_each_reparse_point_has_a_reason_that_can_be_shown(root: int, volume: Path, tag: int, words: str) -> None:
    (volume / "point").symlink_to(f"unsupported reparse tag 0x{tag:08x}")
    info = tree.stat(root, (b"point",), ntfs=SIMULATED)
    assert words in info.unreadable
    assert answers.parse_info(list(info)) == info


# --- paths


@pytest.mark.parametrize("path", ["a:b", "a:", ":b", "a::$DATA", "dir/x:y", "dir:/x", ":"])
def test_no_path_has_a_colon(root: int, volume: Path, path: str) -> None:
    """Whatever the driver would make of it: here such files are there."""
    for name in ("a", "a:b", "a:", ":b", "a::$DATA", ":"):
        (volume / name).touch()
    for name in ("dir", "dir:"):
        (volume / name).mkdir()
        (volume / name / "x").touch()
        (volume / name / "x:y").touch()
    parts = tuple(path.encode().split(b"/"))
    for act in (
        lambda: tree.open_file(root, parts, ntfs=SIMULATED),
        lambda: tree.stat(root, parts, ntfs=SIMULATED),
        lambda: listed(root, *parts),
        lambda: tree.open_directory(root, parts, ntfs=SIMULATED),
    ):
        with pytest.raises(errors.PathNotFound, match="option 'stream'"):
            act()
    os.close(tree.open_file(root, parts)[0])  # on other file systems it is a name like any other


@pytest.mark.parametrize(
    ("target", "leads_to"),
    [
        *(("dir/file", "file"), ("./dir/../dir//file", "file"), ("/dir/file", "file")),
        *((f"{PLACE}/dir/file", "file"), ("../../../dir/file", "file"), ("to/file", "file"), ("twice", "file")),
        *((f"{PLACE}/to/file", "file"),),
    ],
)
def test_links_are_followed_within_the_volume(root: int, volume: Path, target: str, leads_to: str) -> None:
    (volume / "dir").mkdir()
    (volume / "dir/file").write_text(leads_to)
    (volume / "to").symlink_to(f"{PLACE}/dir")
    (volume / "twice").symlink_to("to/file")
    (volume / "link").symlink_to(target)
    assert opened(root, b"link")[0] == leads_to.encode()
    assert set(listed(root, b"to")) == {"file"}
    assert tree.stat(root, (b"to", b"file"), ntfs=SIMULATED).size == 4
    assert tree.stat(root, (b"link",), ntfs=SIMULATED).kind == "symlink"


@pytest.mark.parametrize(
    ("target", "error"),
    [
        *(("nothing", errors.PathNotFound), ("link", errors.PathNotFound), ("file/x", errors.PathNotFound)),
        *((f"{PLACE}x/file", errors.PathNotFound), ("a:b", errors.PathNotFound), ("a:", errors.PathNotFound)),
        *((DEDUP, errors.Unreadable), ("point", errors.Unreadable), ("point/x", errors.Unreadable)),
        *(("unsupported reparse tag 0xa0000003", errors.PathNotFound), ("/", errors.NotAFile)),
        *((PLACE, errors.NotAFile), ("../..", errors.NotAFile)),
    ],
)
def test_links_that_lead_to_no_file(root: int, volume: Path, target: str, error: type[Exception]) -> None:
    for name in ("file", "a", "a:b", DEDUP, "unsupported reparse tag 0xa0000003"):
        (volume / name).touch()
    (volume / "point").symlink_to(DEDUP)
    (volume / "link").symlink_to(target)
    with pytest.raises(error):
        tree.open_file(root, (b"link",), ntfs=SIMULATED)


def test_as_many_links_as_the_kernel_follows_and_no_more(root: int, volume: Path) -> None:
    (volume / "0").write_text("end")
    for number in range(1, 42):
        (volume / str(number)).symlink_to(str(number - 1))
    assert opened(root, b"40")[0] == b"end"
    with pytest.raises(errors.PathNotFound, match="circle"):
        opened(root, b"41")


@pytest.mark.parametrize(
    ("target", "told"),
    [
        *((f"{PLACE}/Users", "/Users"), (PLACE, "/"), (f"{PLACE}2/x", f"{PLACE}2/x"), ("../x", "../x")),
        *((f"{PLACE}/.NTFS-3G/D:/x", "/.NTFS-3G/D:/x"), ("unsupported reparse tag 0x8000001", None)),
    ],
)
def test_targets_are_told_as_seen_from_the_volume(root: int, volume: Path, target: str, told: str | None) -> None:
    (volume / "link").symlink_to(target)
    told = target if told is None else told
    info, entry = tree.stat(root, (b"link",), ntfs=SIMULATED), listed(root)["link"]
    assert (info.kind, info.target, info.size) == ("symlink", told, len(told))
    assert (entry.kind, entry.target, entry.size, entry.extras) == ("symlink", told, len(told), {})
    (line,) = streamed_ntfs(root)
    assert (line["kind"], line["target"], line["size"]) == ("symlink", told, len(told))


# --- streams


@pytest.fixture
def streams(volume: Path) -> None:
    (volume / "dir").mkdir()
    for name in ("a", "a:s", "a:caf\udce9", "dir:of", "a.efs", "a.efs:s", "big"):
        (volume / name).write_bytes(name.encode(errors="surrogateescape"))
    (volume / "link").symlink_to("a")
    os.mkfifo(volume / "fifo")


@pytest.mark.usefixtures("streams")
def test_streams_are_told_and_opened(root: int) -> None:
    assert tree.stat(root, (b"a",), ntfs=SIMULATED).streams == ["caf\uefe9", "s"]
    assert tree.stat(root, (b"dir",), ntfs=SIMULATED).streams == ["of"]
    assert opened(root, b"a", stream=b"s")[0] == opened(root, b"link", stream=b"s")[0] == b"a:s"
    content, info = opened(root, b"a", stream=b"caf\xe9")
    assert (content, info.size, info.kind) == (b"a:caf\xe9", 6, "file")
    assert opened(root, b"dir", stream=b"of")[0] == b"dir:of"


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize(
    ("path", "stream", "error"),
    [
        *((b"a", b"none", errors.PathNotFound), (b"none", b"s", errors.PathNotFound)),
        *((b"fifo", b"s", errors.NotAFile), (b"a.efs", b"s", errors.Unreadable)),
    ],
)
def test_streams_that_do_not_open(root: int, path: bytes, stream: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        opened(root, path, stream=stream)


@pytest.mark.usefixtures("streams")
def test_what_belongs_to_another_file_is_no_stream(root: int) -> None:
    with pytest.raises(errors.Unreadable, match="damaged"):
        opened(root, b"a", stream=b"s", as_=Says(0x20))


def test_what_is_no_file_is_no_stream(root: int, volume: Path) -> None:
    (volume / "a").touch()
    (volume / "a:d").mkdir()
    os.mkfifo(volume / "a:p")
    (volume / "a:l").symlink_to("a")
    for stream in (b"d", b"p", b"l"):
        with pytest.raises(errors.Unreadable):
            opened(root, b"a", stream=stream)


@pytest.mark.usefixtures("streams")
def test_the_size_that_is_wanted_is_that_of_the_stream(root: int) -> None:
    os.close(tree.open_file(root, (b"a",), stream=b"s", most=3, ntfs=SIMULATED)[0])
    os.close(tree.open_file(root, (b"big",), most=3)[0])
    for stream in (b"", b"s"):
        with pytest.raises(errors.TooLarge, match=r"limits\.file_bytes"):
            tree.open_file(root, (b"a",), stream=stream, most=0, ntfs=SIMULATED)
    with pytest.raises(errors.TooLarge, match="has 3 bytes, and files of more than 2"):
        tree.open_file(root, (b"big",), most=2)


@pytest.mark.parametrize("number", [errno.ERANGE, errno.E2BIG])
def test_more_streams_than_the_kernel_passes_on_are_none(volume: Path, number: int) -> None:
    (volume / "a").touch()
    handle = os.open(volume / "a", os.O_RDONLY)
    try:
        assert Says(OSError(number, "too many")).streams(handle) == []
    finally:
        os.close(handle)


# --- what cannot be read faithfully


def streamed_ntfs(root: int, filters: Filters = Filters()) -> list[dict[str, object]]:  # noqa: B008 - immutable
    return streamed_lines(root, filters, starts=[Start("v", ())], ntfs={"v": SIMULATED})


def test_a_reparse_point_is_a_file_wherever_it_is_told(root: int, volume: Path) -> None:
    (volume / "point").symlink_to(DEDUP)
    (volume / "link").symlink_to("point")
    info, entry = tree.stat(root, (b"point",), ntfs=SIMULATED), listed(root)["point"]
    (line,) = streamed_ntfs(root, Filters(kind="file"))
    assert (info.kind, info.size, info.mode, info.target) == ("file", 0, 0o444, "")
    assert (entry.kind, entry.size, entry.mode, entry.target) == ("file", 0, 0o444, "")
    assert (line["path"], line["kind"], line["size"], line["mode"]) == ("/v/point", "file", 0, 0o444)
    assert info.unreadable == entry.extras["unreadable"] == line["unreadable"] != ""
    assert [line["path"] for line in streamed_ntfs(root, Filters(kind="symlink"))] == ["/v/link"]
    assert streamed_ntfs(root, Filters(kind="directory")) == []
    for path in (b"point", b"link"):
        with pytest.raises(errors.Unreadable, match="deduplicated"):
            opened(root, path)


def test_an_encrypted_file_is_known_by_its_size_and_asked(root: int, volume: Path) -> None:
    for name in ("a", "a.efs"):
        (volume / name).write_bytes(bytes(514))
    (volume / "other.efs").write_bytes(bytes(513))
    entries = listed(root)
    assert {name: entry.size for name, entry in entries.items()} == {"a": 514, "a.efs": 512, "other.efs": 513}
    assert [name for name, entry in entries.items() if entry.extras] == ["a.efs"]
    assert tree.stat(root, (b"a.efs",), ntfs=SIMULATED).size == 512
    lines = {line["path"]: line for line in streamed_ntfs(root)}
    assert {path: line["size"] for path, line in lines.items()} == {"/v/a": 514, "/v/a.efs": 512, "/v/other.efs": 513}
    assert lines["/v/a.efs"]["unreadable"] == entries["a.efs"].extras["unreadable"]
    assert opened(root, b"a")[1].size == 514
    for encrypted in (b"a.efs", b"other.efs"):  # whatever the size: nothing leaves that was not asked
        with pytest.raises(errors.Unreadable, match="EFS"):
            opened(root, encrypted)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        *((ENCRYPTED, "EFS"), (RECALLED, "cloud"), (OFFLINE | REPARSE_POINT, "HSM"), (ENCRYPTED | 0x20, "EFS")),
        *((OFFLINE, ""), (REPARSE_POINT, ""), (0x40000, ""), (0, ""), (0x10, "")),
    ],
)
def test_attributes_decide_on_what_is_opened(root: int, volume: Path, flags: int, words: str) -> None:
    (volume / "a").write_bytes(b"content")
    info = tree.stat(root, (b"a",), ntfs=Says(flags))
    assert words in info.unreadable
    if not words:
        assert info.unreadable == ""
        assert opened(root, b"a", as_=Says(flags))[0] == b"content"
        return
    with pytest.raises(errors.Unreadable, match=words):
        opened(root, b"a", as_=Says(flags))


@pytest.mark.parametrize("flags", [ENCRYPTED, RECALLED, OFFLINE | REPARSE_POINT])
def test_the_flags_of_a_directory_are_for_what_is_made_in_it(root: int, volume: Path, flags: int) -> None:
    (volume / "d").mkdir()
    for number in range(200):
        (volume / "d" / str(number)).touch()
    info = tree.stat(root, (b"d",), ntfs=Says(flags))
    assert (info.kind, info.unreadable, info.mode) == ("directory", "", (volume / "d").stat().st_mode & 0o7777)


def test_a_link_to_an_empty_path_leads_nowhere(root: int, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (volume / "link").symlink_to("any")  # no file system lets an empty one be made
    monkeypatch.setattr(os, "readlink", lambda _name, *, dir_fd: b"" if dir_fd >= 0 else None)
    with pytest.raises(errors.PathNotFound):
        tree.open_directory(root, (b"link",), ntfs=SIMULATED)


def test_an_encrypted_file_without_content_is_faithful(root: int, volume: Path) -> None:
    (volume / "a").touch()
    assert tree.stat(root, (b"a",), ntfs=Says(ENCRYPTED)).unreadable == ""
    assert opened(root, b"a", as_=Says(ENCRYPTED))[0] == b""


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        *((b"", errors.Unreadable), (b"12345", errors.Unreadable), (OSError(errno.EIO, ""), errors.Unreadable)),
        *((OSError(errno.ENODATA, ""), errors.Unreadable), (OSError(errno.EINVAL, ""), errors.Unreadable)),
        *((OSError(errno.ENOTSUP, ""), errors.Unreadable), (OSError(errno.ENOMEM, ""), errors.Unavailable)),
    ],
)
def test_what_cannot_be_found_out_is_a_refusal(
    root: int, volume: Path, answer: bytes | OSError, error: type[Exception]
) -> None:
    (volume / "a").write_bytes(b"content")
    with pytest.raises(error):
        opened(root, b"a", as_=Says(answer))
    assert tree.stat(root, (b"a",), ntfs=Says(answer)).unreadable


def test_in_a_listing_one_that_does_not_open_is_unreadable(
    root: int, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (volume / "a").write_bytes(bytes(514))
    real = linux.openat2

    def fail(directory: int, path: bytes, flags: int, *, resolve: int) -> int:
        if path == b"a":
            raise OSError(errno.EIO, "corrupt attribute flags")
        return real(directory, path, flags, resolve=resolve)

    monkeypatch.setattr(linux, "openat2", fail)
    entry = listed(root)["a"]
    assert (entry.kind, entry.size) == ("file", 514)
    assert "damaged" in str(entry.extras["unreadable"])
    (line,) = streamed_ntfs(root)
    assert line["unreadable"] == entry.extras["unreadable"]


def test_other_file_systems_are_asked_nothing(root: int, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "a:s"):
        (volume / name).write_bytes(bytes(514))
    (volume / "link").symlink_to(DEDUP)

    def fail(*_: object) -> bytes:
        raise AssertionError

    monkeypatch.setattr(os, "getxattr", fail)
    page = pages.list_directory(root, (), limit=10, cursor="", check=lambda: None)
    assert [(entry.name, entry.kind, entry.size, entry.extras) for entry in page.entries] == [
        *(("a", "file", 514, {}), ("a:s", "file", 514, {}), ("link", "symlink", len(DEDUP), {}))
    ]
    assert {line["path"]: line["kind"] for line in streamed_lines(root)} == {
        "/v/a": "file",
        "/v/a:s": "file",
        "/v/link": "symlink",
    }
    os.close(tree.open_file(root, (b"a",))[0])
    assert tree.stat(root, (b"a",)).streams == []
