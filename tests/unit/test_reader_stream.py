"""Listings of any length: what stands in the lines, what ends them, and that they take no more than they should."""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import socket
import threading
import tracemalloc
import warnings
from contextlib import contextmanager, nullcontext
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sendense_restored import errors, linux, names
from sendense_restored.daemon.host import answers
from sendense_restored.reader import main, pages, protocol, stream
from sendense_restored.reader.outlet import Ended, Outlet
from sendense_restored.reader.protocol import I64, Entry, Filters, Start, StreamEnd, matcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from sendense_restored.reader.ntfs import Ntfs

LONG = 60.0
Line = dict[str, Any]
ALL = Filters(recursive=True)


@contextmanager
def a_pipe(*, stall: float = LONG) -> Iterator[tuple[int, Outlet]]:
    """A pipe: the end to read, which the test may close, and the outlet."""
    reading, writing = os.pipe()
    try:
        with Outlet(writing, stall=stall) as outlet:
            yield reading, outlet
    finally:
        try:
            os.close(reading)
        except OSError as error:
            assert error.errno == errno.EBADF  # noqa: PT017 - the test has closed it


def discarded(reading: int) -> None:
    while os.read(reading, 1 << 16):
        pass


def drained(reading: int) -> bytes:
    parts = []
    while part := os.read(reading, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def ran(
    root: int,
    filters: Filters = ALL,
    *path: bytes,
    starts: Sequence[Start] = (),
    lend: Callable[[str], AbstractContextManager[int]] | None = None,
    ntfs: Mapping[str, Ntfs] = MappingProxyType({}),
) -> tuple[list[Line], StreamEnd]:
    """The lines of a stream, the summary among them, and what the reader says of it."""
    ends: list[StreamEnd] = []
    with a_pipe() as (reading, outlet):

        def walk() -> None:
            with outlet, stream.opened(starts or [Start("v", path)], filters, lend_root, outlet, ntfs) as walking:
                ends.append(walking.run())

        lend_root = lend or (lambda _volume: nullcontext(root))
        thread = threading.Thread(target=walk)
        thread.start()
        data = drained(reading)
        thread.join()
    assert ends[0].bytes == len(data)
    return [json.loads(line) for line in data.decode().split("\n")[:-1]], ends[0]


def listed(
    root: int,
    filters: Filters = ALL,
    *path: bytes,
    starts: Sequence[Start] = (),
    ntfs: Mapping[str, Ntfs] = MappingProxyType({}),
) -> list[Line]:
    """The lines of a stream that met no error, without the summary, which is checked."""
    lines, end = ran(root, filters, *path, starts=starts, ntfs=ntfs)
    assert lines.pop() == {"summary": {"entries": len(lines), "errors": 0, "truncated": False}}
    assert end == StreamEnd(len(lines), 0, truncated=False, bytes=end.bytes, complete=True)
    return lines


def paths(lines: Sequence[Line]) -> list[str]:
    return [line["path"] for line in lines if "path" in line]


# --- lines ------------------------------------------------------------------------------------------------------


def test_a_line_tells_what_an_ordinary_listing_tells(root: int, volume: Path) -> None:
    (volume / "file").write_bytes(b"12345")
    (volume / "file").chmod(0o4640)
    os.utime(volume / "file", ns=(1, 1_234_567_890_123_456_789))
    (volume / "directory").mkdir()
    (volume / "link").symlink_to("../any\nwhere")
    (volume / "twice").hardlink_to(volume / "file")
    os.mkfifo(volume / "fifo")
    page = pages.list_directory(root, (), limit=100, cursor="", check=lambda: None)
    expected = [
        {"path": f"/v/{entry.name}", "kind": entry.kind, "size": entry.size, "mode": entry.mode}
        | {"mtime_ns": entry.mtime_ns}
        | ({"target": entry.target} if entry.target else {})
        | entry.extras
        for entry in page.entries
    ]
    assert sorted(listed(root), key=lambda line: str(line["path"])) == expected
    assert {"target", "nlink"} <= {key for line in expected for key in line}


def test_an_empty_directory_has_a_summary_alone(root: int) -> None:
    assert listed(root) == []


def test_every_name_comes_back_as_its_bytes(root: int, volume: Path) -> None:
    odd = [
        b"\xff\xfe",
        b'"',
        b"\\",
        b"\n",
        b"\x01\x1f\x7f",
        "\u2028\uef80\U0001f600".encode(),
        b"a\xc3(",
        b"{}",
        b" ",
    ]
    for name in odd:
        (volume / os.fsdecode(name)).mkdir()
        (volume / os.fsdecode(name) / os.fsdecode(name)).touch()
    found = {names.parse_path(path) for path in paths(listed(root))}
    assert found == {(b"v", name) for name in odd} | {(b"v", name, name) for name in odd}


def test_the_order_is_that_of_the_directory_and_what_is_in_one_follows_it(root: int, volume: Path) -> None:
    for number in range(50):
        (volume / f"{number:02}").mkdir()
        (volume / f"{number:02}" / "a").touch()
        (volume / f"{number:02}" / "b").touch()
    expected = []
    for name in os.listdir(volume):  # noqa: PTH208 - the order counts
        expected += [f"/v/{name}", *(f"/v/{name}/{below}" for below in os.listdir(volume / name))]  # noqa: PTH208
    assert paths(listed(root)) == expected


def test_without_recursive_there_are_only_direct_children(root: int, volume: Path) -> None:
    (volume / "a/b/c").mkdir(parents=True)
    assert paths(listed(root, Filters())) == ["/v/a"]
    assert paths(listed(root, Filters(), b"a")) == ["/v/a/b"]


def test_the_start_may_be_a_link_and_no_other_is_followed(root: int, volume: Path) -> None:
    (volume / "a/b").mkdir(parents=True)
    (volume / "a/up").symlink_to("..")
    (volume / "link").symlink_to("/a")
    assert sorted(paths(listed(root, ALL, b"link"))) == ["/v/link/b", "/v/link/up"]


@pytest.mark.parametrize(
    ("path", "error"),
    [("file", errors.NotADirectory), ("missing", errors.PathNotFound), ("n" * 300, errors.InvalidPath)],
)
def test_a_start_that_is_no_directory_is_an_error_before_anything_is_written(
    root: int, volume: Path, path: str, error: type[errors.RestoreError]
) -> None:
    (volume / "file").touch()
    with a_pipe() as (reading, outlet):
        with (
            pytest.raises(error),
            stream.opened([Start("v", (path.encode(),))], ALL, lambda _: nullcontext(root), outlet),
        ):
            pass
        outlet.close()
        assert drained(reading) == b""


# --- filters ----------------------------------------------------------------------------------------------------


@pytest.fixture
def things(volume: Path) -> None:
    """``directory/inner/small.txt`` (10 bytes, old), ``BIG.TXT`` (1000 bytes, new), a link and a pipe."""
    (volume / "directory/inner").mkdir(parents=True)
    (volume / "directory/inner/small.txt").write_bytes(b"x" * 10)
    (volume / "directory/BIG.TXT").write_bytes(b"x" * 1000)
    (volume / "directory/link").symlink_to("BIG.TXT")
    os.mkfifo(volume / "directory/fifo")
    for name, moment in (("inner/small.txt", 100), ("BIG.TXT", 300), ("inner", 200), ("fifo", 200), ("link", 200)):
        os.utime(volume / "directory" / name, ns=(moment, moment), follow_symlinks=False)
    os.utime(volume / "directory", ns=(200, 200))


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (Filters(name="*.txt"), {"small.txt"}),
        (Filters(name="[A-Z]*"), {"BIG.TXT"}),
        (Filters(name="*"), {"directory", "inner", "small.txt", "BIG.TXT", "link", "fifo"}),
        (Filters(name="directory/*"), set()),
        (Filters(kind="directory"), {"directory", "inner"}),
        (Filters(kind="file"), {"small.txt", "BIG.TXT"}),
        (Filters(kind="symlink"), {"link"}),
        (Filters(kind="fifo"), {"fifo"}),
        (Filters(kind="socket"), set()),
        (Filters(kind="volume"), set()),
        (Filters(kind="file", min_size=10), {"small.txt", "BIG.TXT"}),
        (Filters(kind="file", min_size=11), {"BIG.TXT"}),
        (Filters(kind="file", max_size=999), {"small.txt"}),
        (Filters(kind="file", min_size=10, max_size=10), {"small.txt"}),
        (Filters(newer=201), {"BIG.TXT"}),
        (Filters(newer=300), {"BIG.TXT"}),
        (Filters(older=100), {"small.txt"}),
        (Filters(newer=101, older=299, kind="symlink"), {"link"}),
        (Filters(max_depth=1), {"directory"}),
        (Filters(max_depth=2), {"directory", "inner", "BIG.TXT", "link", "fifo"}),
        (Filters(max_depth=2, name="*.[tT]*"), {"BIG.TXT"}),
        (Filters(max_depth=100), {"directory", "inner", "small.txt", "BIG.TXT", "link", "fifo"}),
    ],
)
@pytest.mark.usefixtures("things")
def test_filters_leave_out_what_does_not_match_and_look_below_it(
    root: int, filters: Filters, found: set[str]
) -> None:
    lines = listed(root, filters._replace(recursive=True))
    assert {path.rsplit("/", 1)[1] for path in paths(lines)} == found
    assert len(lines) == len(found)


def test_names_are_matched_in_text_form(root: int, volume: Path) -> None:
    (volume / os.fsdecode(b"a\xffb")).touch()
    assert paths(listed(root, Filters(name="a?b"))) == ["/v/a\uefffb"]
    assert paths(listed(root, Filters(name="*\uefff*"))) == ["/v/a\uefffb"]


@pytest.mark.parametrize("filtered", [False, True])
def test_a_limit_cuts_off_and_says_so_only_if_there_was_more(root: int, volume: Path, filtered: bool) -> None:
    for number in range(600):
        (volume / f"{number}").touch()
    (volume / "a").mkdir()
    (volume / "a/b").touch()
    filters = Filters(recursive=True, kind="file" if filtered else "")
    total = 601 if filtered else 602
    for limit, truncated in ((1, True), (total - 1, True), (total, False), (total + 1, False)):
        lines, end = ran(root, filters._replace(limit=limit))
        told = min(limit, total)
        assert lines[-1] == {"summary": {"entries": told, "errors": 0, "truncated": truncated}}
        assert len(lines) == told + 1
        assert (end.entries, end.truncated, end.complete) == (told, truncated, True)


@pytest.mark.parametrize(
    "filters",
    [
        Filters(max_depth=1),
        Filters(recursive=True, max_depth=0),
        Filters(limit=0),
        Filters(limit=-1),
        Filters(kind="door"),
        Filters(min_size=-1),
        Filters(max_size=2**64),
        Filters(newer=2**63),
        Filters(older=-(2**63) - 1),
        Filters(name="x" * 1025),
        Filters(name="\u20ac" * 342),
        Filters(name="\ud800"),
    ],
)
def test_filters_that_mean_nothing_are_refused(filters: Filters) -> None:
    with pytest.raises(errors.InvalidOption):
        protocol.check_filters(filters)


@given(st.text(st.sampled_from("ab*?[]!-^\\&|~.{}()+$\uefff"), max_size=30), st.text("ab-[]!^.\\", max_size=12))
def test_a_pattern_means_what_it_means_to_the_shell(pattern: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a set in a set: importing what tells of it is not possible in the jail
        matches = matcher(pattern)
    assert (matches is None or matches.match(name) is not None) == (not pattern or fnmatch.fnmatchcase(name, pattern))


@pytest.mark.parametrize(
    "pattern", ["*a" * 500 + "*b", "*?" * 500 + "b", "*[a-z]" * 170 + "*b", "*" + "a" * 500 + "b"]
)
def test_no_pattern_takes_for_ever(pattern: str) -> None:
    """Going back to each ``*`` would take longer than the universe has."""
    matches = matcher(pattern)
    assert matches is not None
    assert not matches.match("a" * names.MAX_NAME)


# --- volumes ----------------------------------------------------------------------------------------------------


def volumes(*, closed: str = "") -> list[Start]:
    starts = []
    for name in ("one", "two", "three"):
        extras: dict[str, str | int | bool] = {"display_name": f'Data "{name}"'}
        if name == closed:
            extras["unreadable"] = "encrypted: unlock it"
        entry = Entry(name, "volume", 1 << 30, 0o555, 77, "", extras)
        starts.append(Start(name, (), entry, open=name != closed))
    return starts


def test_the_volumes_are_told_and_what_is_in_the_open_ones(root: int, volume: Path) -> None:
    (volume / "a/b").mkdir(parents=True)
    starts = volumes(closed="two")
    assert paths(listed(root, Filters(), starts=starts)) == ["/one", "/two", "/three"]
    lines = listed(root, ALL, starts=starts)
    assert paths(lines) == ["/one", "/one/a", "/one/a/b", "/two", "/three", "/three/a", "/three/a/b"]
    line = {"path": "/one", "kind": "volume", "size": 1 << 30, "mode": 0o555, "mtime_ns": 77}
    assert lines[0] == line | {"display_name": 'Data "one"'}
    assert lines[3]["unreadable"] == "encrypted: unlock it"


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (Filters(max_depth=1), ["/one", "/two", "/three"]),
        (Filters(max_depth=2, kind="directory"), ["/one/a", "/two/a", "/three/a"]),
        (Filters(name="t*"), ["/two", "/three"]),
        (Filters(kind="volume"), ["/one", "/two", "/three"]),
        (Filters(newer=78, older=80), []),
        (Filters(min_size=1 << 31), []),
    ],
)
def test_filters_are_for_volumes_too(root: int, volume: Path, filters: Filters, found: list[str]) -> None:
    (volume / "a/b").mkdir(parents=True)
    assert paths(listed(root, filters._replace(recursive=True), starts=volumes())) == found


@pytest.mark.parametrize(("limit", "truncated"), [(1, True), (2, True), (3, True), (5, True), (6, False)])
def test_a_limit_is_one_for_all_volumes(root: int, volume: Path, limit: int, truncated: bool) -> None:
    (volume / "a").touch()
    lines, end = ran(root, Filters(recursive=True, limit=limit), starts=volumes())
    assert len(lines) == limit + 1
    assert end.truncated == truncated


def test_a_volume_that_cannot_be_opened_is_an_error_among_the_others(root: int, volume: Path) -> None:
    (volume / "a").touch()

    def lend(name: str) -> AbstractContextManager[int]:
        if name == "two":
            raise errors.PathNotFound("there is no such volume")
        return nullcontext(root)

    lines, end = ran(root, starts=volumes(), lend=lend)
    assert {"path": "/two", "error": "there is no such volume"} in lines
    assert paths(lines) == ["/one", "/one/a", "/two", "/two", "/three", "/three/a"]
    assert (end.entries, end.errors, end.complete) == (5, 1, True)


def test_it_ends_without_summary_when_the_volumes_are_asked_back(root: int) -> None:
    def lend(_name: str) -> AbstractContextManager[int]:
        raise errors.Unavailable("the mount is being closed")

    lines, end = ran(root, starts=volumes(), lend=lend)
    assert lines == []
    assert not end.complete


# --- deep and wide ----------------------------------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a number


def test_a_deep_tree_is_told_whole_with_few_directories_open(
    root: int, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each level has entries before and after the one that leads on, so coming back has to find its place."""
    expected, path = set(), volume
    for level in range(150):
        for number in range(4):
            (path / f"{level}-{number}").touch()
            expected.add(path / f"{level}-{number}")
        for number in range(4):
            (path / f"d{number}").mkdir()
            expected.add(path / f"d{number}")
        path /= "d2"
    most = [0]
    read = stream.Walk._read

    def counting(walk: stream.Walk, level: stream._Level, depth: int) -> bool:
        most[0] = max(most[0], open_files())
        return read(walk, level, depth)

    monkeypatch.setattr(stream.Walk, "_read", counting)
    before = open_files()
    found = paths(listed(root))
    assert len(found) == len(set(found))
    assert set(found) == {f"/v/{path.relative_to(volume)}" for path in expected}
    assert before < most[0] <= before + 2 * stream.MOST_OPEN + 8


def test_a_large_directory_of_deep_ones_is_not_read_again_for_each(
    root: int, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        (volume / f"large/{number}/a/b/c/d").mkdir(parents=True)
    monkeypatch.setattr(stream, "MOST_OPEN", 4)
    large = (volume / "large").stat().st_ino
    openings = 0
    real = os.scandir

    def counting(descriptor: int) -> object:
        nonlocal openings
        openings += os.fstat(descriptor).st_ino == large
        return real(descriptor)

    monkeypatch.setattr(os, "scandir", counting)
    assert len(listed(root)) == 1 + 60 * 5
    assert openings <= 2


def test_a_directory_that_is_another_one_when_it_is_opened_again_is_left_with_an_error(
    root: int, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (volume / "a/b/c/d").mkdir(parents=True)
    monkeypatch.setattr(stream, "MOST_OPEN", 2)
    # What is opened again is so by its path from the start.
    tampered(monkeypatch, b"a/b", lambda _: os.open("/", os.O_RDONLY))
    lines, end = ran(root)
    assert [line["path"] for line in lines if "error" in line] == ["/v/a/b"]
    assert [line["path"] for line in lines if "kind" in line] == ["/v/a", "/v/a/b", "/v/a/b/c", "/v/a/b/c/d"]
    assert (end.entries, end.errors, end.complete) == (4, 1, True)


def test_a_directory_that_has_become_shorter_is_left_with_an_error(
    root: int, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (volume / "a/b/c/d").mkdir(parents=True)
    monkeypatch.setattr(stream, "MOST_OPEN", 2)
    opened: list[int] = []
    scandir = os.scandir

    def emptied(descriptor: int) -> object:
        identity = os.fstat(descriptor).st_ino
        opened.append(identity)
        return Scan([]) if opened.count(identity) > 1 else scandir(descriptor)

    monkeypatch.setattr(os, "scandir", emptied)
    lines, end = ran(root)
    assert [line["path"] for line in lines if "error" in line] == ["/v/a/b", "/v/a", "/v"]
    assert (end.entries, end.errors, end.complete) == (4, 3, True)


def test_a_path_that_nobody_could_ask_for_is_an_error(root: int, volume: Path) -> None:
    directory = os.open(volume, os.O_RDONLY)
    for _ in range(18):
        os.mkdir("\x01" * 255, dir_fd=directory)
        below = os.open("\x01" * 255, os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(directory)
    lines, end = ran(root)
    (problem,) = [line for line in lines if "error" in line]
    assert "too long" in problem["error"]
    assert len(problem["path"]) == 2 + 16 * 256  # 15 of them still fit 4095
    assert (end.entries, end.errors, end.complete) == (16, 1, True)


def test_memory_does_not_grow_with_the_directory(root: int, volume: Path) -> None:
    for number in range(20_000):
        (volume / f"{number:0200}").touch()
    with a_pipe() as (reading, outlet):
        thread = threading.Thread(target=discarded, args=[reading])
        thread.start()
        with outlet, stream.opened([Start("v", ())], ALL, lambda _: nullcontext(root), outlet) as walk:
            tracemalloc.start()
            end = walk.run()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        thread.join()
    assert end.bytes > 5_000_000
    assert peak < 500_000


# --- damage -----------------------------------------------------------------------------------------------------


def tampered(monkeypatch: pytest.MonkeyPatch, name: bytes, act: Callable[[int], int]) -> None:
    """Opening ``name`` below a directory does something else."""
    real = linux.openat2

    def openat2(directory: int, path: bytes, flags: int, *, resolve: int, mode: int = 0) -> int:
        return act(directory) if path == name else real(directory, path, flags, resolve=resolve, mode=mode)

    monkeypatch.setattr(linux, "openat2", openat2)


def raising(number: int) -> Callable[[int], int]:
    def act(_directory: int) -> int:
        raise OSError(number, os.strerror(number))

    return act


@pytest.mark.parametrize("filters", [ALL, Filters(recursive=True, name="[!l]*")])
def test_a_directory_that_holds_one_above_it_is_told_and_not_entered(
    root: int, volume: Path, monkeypatch: pytest.MonkeyPatch, filters: Filters
) -> None:
    (volume / "a/b/loop").mkdir(parents=True)
    (volume / "a/b/z").touch()
    tampered(monkeypatch, b"loop", lambda _: os.open(volume / "a", os.O_RDONLY))
    lines, end = ran(root, filters)
    (problem,) = [line for line in lines if "error" in line]
    assert problem["path"] == "/v/a/b/loop"
    assert "above it" in problem["error"]
    assert {"/v/a", "/v/a/b", "/v/a/b/z"} <= set(paths(lines))
    assert (end.errors, end.complete) == (1, True)


def test_a_directory_that_is_not_the_one_that_was_listed_is_not_entered(
    root: int, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (volume / "a").mkdir()
    (volume / "a/inside").touch()
    tampered(monkeypatch, b"a", lambda _: os.open("/", os.O_RDONLY))
    lines, end = ran(root)
    assert [sorted(line) for line in lines[1:2]] == [["error", "path"]]
    assert (end.entries, end.errors) == (1, 1)


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.EIO, "damaged"), (errno.ELOOP, "damaged"), (errno.EMFILE, "short of"), (errno.EACCES, "ermission")],
)
def test_a_directory_that_cannot_be_read_is_told_after_its_line(
    root: int, volume: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    (volume / "bad").mkdir()
    (volume / "good").mkdir()
    (volume / "good/file").touch()
    tampered(monkeypatch, b"bad", raising(number))
    lines, end = ran(root)
    bad = [line for line in lines if line.get("path") == "/v/bad"]
    assert [line.get("kind") for line in bad] == ["directory", None]
    assert reason in bad[1]["error"]
    assert str(volume) not in bad[1]["error"]
    assert "/v/good/file" in paths(lines)
    assert lines[-1] == {"summary": {"entries": 3, "errors": 1, "truncated": False}}
    assert (end.entries, end.errors, end.complete) == (3, 1, True)


class Found:
    """An entry that a damaged directory might have."""

    def __init__(self, name: str, status: object) -> None:
        self.name, self._status = name, status

    def stat(self, *, follow_symlinks: bool) -> Any:  # noqa: ANN401 - what a test says
        assert not follow_symlinks
        if isinstance(self._status, OSError):
            raise self._status
        return self._status

    def is_dir(self, *, follow_symlinks: bool) -> bool:
        return not follow_symlinks and isinstance(self.stat(follow_symlinks=False), str)

    def is_symlink(self) -> bool:
        return False


class Scan:
    """What scandir gives, with an error at its end if there is one."""

    def __init__(self, found: Sequence[Found], error: OSError | None = None) -> None:
        self._left, self._error = iter(found), error

    def __iter__(self) -> Scan:
        return self

    def __next__(self) -> Found:
        try:
            return next(self._left)
        except StopIteration:
            if self._error is not None:
                raise self._error from None
            raise

    def close(self) -> None:
        pass


def status_of(mode: int, *, size: int = 5, mtime: int = 7, links: int = 1) -> SimpleNamespace:
    return SimpleNamespace(st_mode=mode, st_size=size, st_mtime_ns=mtime, st_nlink=links, st_dev=1, st_ino=2)


def test_what_a_damaged_directory_holds_is_told_as_far_as_it_goes(root: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        Found("good", status_of(0o100644)),
        Found("eio", OSError(errno.EIO, "I/O")),
        Found("gone", OSError(errno.ENOENT, "no")),
        Found("", status_of(0o100644)),
        Found("\u20ac" * 341, status_of(0o100644)),
        Found("no-kind", status_of(0o644)),
        Found("far", status_of(0o100644, mtime=I64 + 1)),
        Found("negative", status_of(0o100644, size=-1)),
    ]
    monkeypatch.setattr(os, "scandir", lambda _: Scan(found, OSError(errno.EIO, "I/O")))
    lines, end = ran(root)
    by_path: dict[str, list[Line]] = {}
    for line in lines[:-1]:
        by_path.setdefault(line["path"], []).append(line)
    assert by_path["/v/good"] == [{"path": "/v/good", "kind": "file", "size": 5, "mode": 0o644, "mtime_ns": 7}]
    assert "damaged" in by_path["/v/eio"][0]["error"]
    assert "damaged" in by_path["/v/gone"][0]["error"]
    assert len(by_path["/v"]) == 3  # two impossible names, and the directory's own end
    assert by_path["/v/no-kind"][0]["kind"] == "file"
    assert "damaged" in by_path["/v/no-kind"][0]["unreadable"]
    assert (by_path["/v/far"][0]["mtime_ns"], by_path["/v/far"][0]["time_clamped"]) == (I64, True)
    assert by_path["/v/negative"][0]["size"] == 0
    assert lines[-1] == {"summary": {"entries": 4, "errors": 5, "truncated": False}}
    assert end.complete


# --- the end ----------------------------------------------------------------------------------------------------


def fill(volume: Path) -> None:
    """More than fits a pipe."""
    for number in range(3000):
        (volume / f"{number:0100}").touch()


def ended(root: int, outlet: Outlet, filters: Filters = ALL) -> StreamEnd:
    with outlet, stream.opened([Start("v", ())], filters, lambda _: nullcontext(root), outlet) as walk:
        return walk.run()


def test_a_client_that_does_not_read_ends_its_stream(root: int, volume: Path) -> None:
    fill(volume)
    with a_pipe(stall=0.01) as (reading, outlet):
        end = ended(root, outlet)
        data = drained(reading)
    assert not end.complete
    assert 0 < len(data) == end.bytes
    assert b"summary" not in data


@pytest.mark.parametrize("filters", [ALL, Filters(name="nothing")])
def test_a_client_that_closes_the_pipe_ends_it_also_where_nothing_is_found(
    root: int, volume: Path, filters: Filters
) -> None:
    fill(volume)
    with a_pipe() as (reading, outlet):
        os.close(reading)
        end = ended(root, outlet, filters)
        assert (end.bytes, end.complete) == (0, False)


def test_an_order_ends_it_while_it_waits_for_room(root: int, volume: Path) -> None:
    fill(volume)
    ends: list[StreamEnd] = []
    with a_pipe() as (reading, outlet):
        thread = threading.Thread(target=lambda: ends.append(ended(root, outlet)))
        thread.start()
        os.read(reading, 1)  # it has begun, and there is more than fits
        outlet.stop()
        thread.join()
        outlet.stop()  # after the end it is nothing
    assert not ends[0].complete


def test_an_order_before_the_beginning_counts(root: int, volume: Path) -> None:
    fill(volume)
    with a_pipe() as (_, outlet):
        outlet.stop()
        with pytest.raises(Ended):
            outlet.check()
        assert not ended(root, outlet).complete


def test_lack_of_memory_ends_it_without_summary(root: int, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (volume / "a").touch()

    def full(_data: bytes) -> None:
        raise MemoryError

    with a_pipe() as (reading, outlet):
        monkeypatch.setattr(outlet, "write", full)
        assert not ended(root, outlet).complete
        assert drained(reading) == b""


def for_both() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    both = os.open(f"/proc/self/fd/{writing}", os.O_RDWR | os.O_NONBLOCK)
    os.close(writing)
    return both


def reading_end() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def path_only() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    path = os.open(f"/proc/self/fd/{writing}", os.O_PATH)
    os.close(writing)
    return path


@pytest.mark.parametrize(
    "make",
    [for_both, reading_end, path_only, lambda: os.open("/dev/null", os.O_WRONLY), lambda: os.memfd_create("x")],
)
def test_only_the_write_end_of_a_pipe_is_written_to(make: Callable[[], int]) -> None:
    descriptor = make()
    with pytest.raises(errors.Unavailable):
        Outlet(descriptor, stall=LONG)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)


# --- as the reader serves it ------------------------------------------------------------------------------------


class Serving:
    """The part of a reader that takes frames in, and the daemon's end of its socket."""

    def __init__(self, root: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(LONG)
        self._theirs = theirs
        self.sock = ours
        self.server = main._Server(theirs)
        self.server._roots.give({"v": os.dup(root)})
        self._thread = threading.Thread(target=self.server.take_in)
        self._thread.start()
        assert self.hears()["id"] == 0

    def hears(self) -> Line:
        frame = protocol.receive(self.sock, most_fds=0)
        assert frame is not None
        return frame[0]

    def stream(self, number: int, filters: Filters = ALL, *path: bytes) -> int:
        """Ask for a stream; the end to read, which belongs to the caller."""
        reading, writing = os.pipe()
        *first, last = protocol.stream_frames(number, [Start("v", path)], filters, LONG)
        for frame in first:
            protocol.send(self.sock, frame)
        protocol.send(self.sock, last, [writing])
        os.close(writing)
        return reading

    def begins(self, number: int, filters: Filters = ALL) -> int:
        reading = self.stream(number, filters)
        assert self.hears() == {"id": number, "more": True, "ok": None}
        return reading

    def says(self, number: int, op: str) -> None:
        protocol.send(self.sock, protocol.encode({"id": number, "op": op}))

    def close(self) -> None:
        self.sock.close()
        self._thread.join()
        self._theirs.close()
        self.server._roots.take_back(lambda: None)


@pytest.fixture
def serving(root: int, volume: Path) -> Iterator[Serving]:
    fill(volume)
    serving = Serving(root)
    yield serving
    serving.close()


def test_a_stream_is_answered_when_it_begins_and_when_it_has_ended(serving: Serving) -> None:
    reading = serving.begins(7)
    data = drained(reading)
    os.close(reading)
    answer = serving.hears()
    assert answer["id"] == 7
    assert answers.parse_stream_end(answer["ok"], None) == StreamEnd(3000, 0, False, len(data), True)


def test_a_stream_that_cannot_begin_is_an_error_and_its_pipe_is_closed(serving: Serving) -> None:
    reading = serving.stream(8, ALL, b"missing")
    assert drained(reading) == b""
    os.close(reading)
    assert serving.hears()["error"] == "PathNotFound"


def test_a_pipe_that_is_none_is_an_error(serving: Serving) -> None:
    (frame,) = protocol.stream_frames(9, [Start("v", ())], ALL, LONG)
    with open("/dev/null", "wb") as null:  # noqa: PTH123 - any file
        protocol.send(serving.sock, frame, [null.fileno()])
    assert serving.hears()["error"] == "Unavailable"


def test_streams_that_nobody_reads_hold_up_no_other_and_can_be_cancelled_one_by_one(serving: Serving) -> None:
    held = {number: serving.begins(number) for number in (1, 2, 3)}
    reading = serving.begins(4)
    assert b"summary" in drained(reading)
    assert serving.hears()["id"] == 4
    for number in (2, 1, 3):
        serving.says(number, "cancel")
        serving.says(number, "cancel")
        answer = serving.hears()
        assert (answer["id"], answer["ok"][-1]) == (number, False)
    serving.says(99, "cancel")  # of one that has ended long ago
    for descriptor in (reading, *held.values()):
        os.close(descriptor)


def test_asking_the_roots_back_ends_all_streams_before_it_is_answered(serving: Serving) -> None:
    held = [serving.begins(number) for number in (1, 2, 3)]
    serving.says(5, "take_back")
    answers = [serving.hears() for _ in range(4)]
    assert {answer["id"] for answer in answers} == {1, 2, 3, 5}
    assert not any(answer["ok"][-1] for answer in answers if answer["id"] != 5)
    refused = serving.stream(6)
    assert serving.hears()["error"] == "Unavailable"
    for descriptor in (refused, *held):
        os.close(descriptor)


def test_no_thread_for_a_stream_is_an_error_and_not_the_end(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", full)
        reading = serving.stream(1)
        answer = serving.hears()
    assert (answer["error"], "threads" in answer["message"]) == ("Unavailable", True)
    assert drained(reading) == b""
    os.close(reading)
    os.close(serving.begins(2))
    assert serving.hears()["id"] == 2


def test_lack_of_memory_while_opening_is_an_error_and_not_the_end(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> Any:  # noqa: ANN401 - never returns
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(stream, "opened", full)
        reading = serving.stream(1)
        assert serving.hears()["error"] == "Unavailable"
    os.close(reading)


def test_more_volumes_than_fit_one_frame_come_in_several(serving: Serving) -> None:
    reasons = "x" * 2000
    starts = [
        Start(f"w{number:04}", (), Entry(f"w{number:04}", "volume", 0, 0, 0, "", {"unreadable": reasons}), open=False)
        for number in range(300)
    ]
    frames = protocol.stream_frames(1, starts, Filters(), LONG)
    assert len(frames) > 3
    reading, writing = os.pipe()
    for frame in frames[:-1]:
        protocol.send(serving.sock, frame)
    protocol.send(serving.sock, frames[-1], [writing])
    os.close(writing)
    assert serving.hears()["more"]
    lines = [json.loads(line) for line in drained(reading).decode().split("\n")[:-1]]
    os.close(reading)
    assert paths(lines) == [f"/{start.volume}" for start in starts]
    assert cast("list[int]", serving.hears()["ok"])[0] == 300
