"""Guest paths below a root, in ordinary directories and without any privilege."""

from __future__ import annotations

import errno
import os
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sendense_restored import errors, linux, names
from sendense_restored.daemon import packing
from sendense_restored.reader import pages, tree
from sendense_restored.reader.protocol import I64
from sendense_restored.wire.codec import MessageType, encode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sendense_restored.reader.protocol import Listing

NANOSECONDS = 1_000_000_000
OPENS_NOTHING = os.O_PATH


def proceed() -> None:
    """Nobody asks the roots back."""


def listed(root: int, *path: bytes, limit: int = 1000, cursor: str = "") -> Listing:
    return pages.list_directory(root, path, limit=limit, cursor=cursor, check=proceed)


def content(root: int, *path: bytes) -> bytes:
    descriptor, info = tree.open_file(root, path)
    try:
        assert info.kind == "file"
        return os.read(descriptor, 100)
    finally:
        os.close(descriptor)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


# --- listing ----------------------------------------------------------------------------------------------------


def the_pages(root: int, limit: int = 1000) -> Iterator[Listing]:
    """Of the volume's own directory, to its end."""
    page = listed(root, limit=limit)
    yield page
    while page.cursor:
        page = listed(root, limit=limit, cursor=page.cursor)
        yield page


async def test_a_page_fits_a_message_whatever_a_guest_has_made(root: int, volume: Path) -> None:
    """The longest names and targets, in bytes whose text form is the longest."""
    made = [b"%04d" % number + b"\xff" * 251 for number in range(1200)]
    for name in made:
        os.symlink(b"\xff" * 4095, os.path.join(os.fsencode(volume), name))  # noqa: PTH118, PTH211 - in bytes
    found = []
    for page in the_pages(root, limit=1000):
        assert len(page.entries) >= 400 or not page.cursor, "it makes use of the room"
        found += [names.to_bytes(entry.name) for entry in page.entries]
        rows = await packing.rows(page.entries)
        to = {"reply_serial": 1}
        encode(MessageType.METHOD_RETURN, 1, to, signature="a(sstuxsa{sv})s", body=[rows, page.cursor])
    assert found == made


async def test_a_page_of_what_cannot_be_read_fits_a_message(
    root: int, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each entry says why, and where it is: on a damaged disk, below a long path."""
    real = pages._entry
    extras: dict[str, str | int | bool] = {"unreadable": "\U0001f4a5" * 500}
    monkeypatch.setattr(pages, "_entry", lambda *given: real(*given)._replace(extras=extras))
    for number in range(6000):
        (volume / f"{number:04}").touch()
    sizes = [len(page.entries) for page in the_pages(root, limit=10_000)]
    assert sum(sizes) == 6000
    assert len(sizes) == 3
    rows = await packing.rows(listed(root, limit=10_000).entries)
    to = {"reply_serial": 1}
    encode(MessageType.METHOD_RETURN, 1, to, signature="a(sstuxsa{sv})s", body=[rows, ""])


def test_a_page_has_one_entry_at_least(root: int, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (volume / name).symlink_to("x" * 1000)
    monkeypatch.setattr(pages, "MAX_PAGE", 100)
    assert [[entry.name for entry in page.entries] for page in the_pages(root)] == [["a"], ["b"], ["c"]]


def test_a_listing_tells_kinds_sizes_modes_and_targets(root: int, volume: Path) -> None:
    (volume / "file").write_bytes(b"12345")
    (volume / "file").chmod(0o4640)
    os.utime(volume / "file", ns=(1, 1_234_567_890_123_456_789))
    (volume / "dir").mkdir()
    (volume / "link").symlink_to("../../anywhere")
    os.mkfifo(volume / "fifo")
    make_socket(volume / "socket")

    page = listed(root)
    assert page.cursor == ""
    assert {entry.name: entry.kind for entry in page.entries} == {
        "dir": "directory",
        "fifo": "fifo",
        "file": "file",
        "link": "symlink",
        "socket": "socket",
    }
    file, link = page.entries[2], page.entries[3]
    assert (file.size, file.mode, file.mtime_ns, file.target, file.extras) == (
        *(5, 0o4640, 1_234_567_890_123_456_789),
        *("", {}),
    )
    assert link.target == "../../anywhere"


def test_pages_follow_the_order_of_bytes_and_miss_nothing(root: int, volume: Path) -> None:
    # U+E000 sorts after U+10000 in UTF-16 and before it in bytes; lone bytes come last of all
    special = [b"\xff", b"\x80a", "\ue000".encode(), "\U00010000".encode(), "\uef80".encode(), b"A", b"a\nb", b" "]
    directory = os.fsencode(volume)
    for name in [b"%05d" % number for number in range(10_000)] + special:
        os.close(os.open(directory + b"/" + name, os.O_CREAT | os.O_WRONLY, 0o600))

    seen: list[bytes] = []
    cursor = ""
    for _ in range(6):
        page = listed(root, limit=2000, cursor=cursor)
        seen += [names.to_bytes(entry.name) for entry in page.entries]
        cursor = page.cursor
        assert cursor in {"", page.entries[-1].name}
    assert cursor == ""
    assert seen == sorted(os.listdir(directory))  # noqa: PTH208 - names as bytes


@given(
    st.lists(
        st.one_of(st.binary(max_size=2), st.sampled_from([b"\xff" * names.MAX_NAME, b"\xff" * 1021])), max_size=60
    ),
    st.binary(max_size=2),
    st.integers(2, 12),
)
def test_the_first_names_are_those_that_sorting_all_would_give(listing: list[bytes], after: bytes, most: int) -> None:
    """Whatever a damaged directory has: in any order, twice, empty, or longer than a path's part may be."""
    entries = cast("list[os.DirEntry[str]]", [SimpleNamespace(name=os.fsdecode(name)) for name in listing])
    found = pages._first_names(iter(entries), after, most, proceed)
    expected = sorted(name for name in listing if after < name and len(name) <= names.MAX_NAME)
    assert [name for name, _, _ in found] == expected[:most]
    assert [os.fsencode(entry.name) for _, _, entry in found] == expected[:most]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_page_that_takes_all_says_that_it_is_the_last(root: int, volume: Path, count: int) -> None:
    for number in range(count):
        (volume / str(number)).touch()
    page = listed(root, limit=3)
    assert (len(page.entries), page.cursor) == (count, "")


def test_only_the_page_is_looked_at(root: int, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(500):
        (volume / f"{number:03}").symlink_to("target")
    looked_at: list[bytes] = []
    readlink = os.readlink

    def counting(name: bytes, *, dir_fd: int) -> bytes:
        looked_at.append(name)
        return readlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "readlink", counting)
    assert len(listed(root, limit=10, cursor="099").entries) == 10
    assert looked_at == [b"%03d" % number for number in range(100, 110)]


def test_names_that_are_not_utf8_are_listed_and_found_again(root: int, volume: Path) -> None:
    name = b"caf\xe9 \xf0\x9f"
    with open(os.fsencode(volume) + b"/" + name, "wb") as file:  # noqa: PTH123 - a path of bytes
        file.write(b"found")
    (entry,) = listed(root).entries
    assert entry.name == "caf\uefe9 \ueff0\uef9f"
    assert content(root, names.to_bytes(entry.name)) == b"found"


def test_a_listing_follows_a_link_to_a_directory(root: int, volume: Path) -> None:
    (volume / "dir").mkdir()
    (volume / "dir/inside").touch()
    (volume / "link").symlink_to("/dir")
    assert [entry.name for entry in listed(root, b"link").entries] == ["inside"]


def test_a_time_beyond_64_bits_is_clamped_and_says_so(root: int, volume: Path) -> None:
    late = 12_000_000_000 * NANOSECONDS
    (volume / "late").touch()
    os.utime(volume / "late", ns=(late, late))
    if (volume / "late").stat().st_mtime_ns != late:
        pytest.skip("this file system does not know the year 2350")
    (entry,) = listed(root).entries
    assert entry.mtime_ns == I64
    assert entry.extras == {"time_clamped": True}
    info = tree.stat(root, (b"late",))
    assert (info.mtime_ns, info.time_clamped) == (I64, True)


class BrokenEntry:
    """A directory entry whose inode cannot be read."""

    def __init__(self, number: int) -> None:
        self.number = number

    def stat(self, *, follow_symlinks: bool) -> os.stat_result:
        assert not follow_symlinks
        raise OSError(self.number, os.strerror(self.number))

    def is_symlink(self) -> bool:
        return False

    def is_dir(self, *, follow_symlinks: bool) -> bool:
        assert not follow_symlinks
        return True


@pytest.mark.parametrize("number", [errno.EIO, errno.EUCLEAN, errno.ENOENT])
def test_an_entry_that_cannot_be_looked_at_is_listed_as_unreadable(number: int) -> None:
    entry = pages._entry(-1, (b"dir",), b"broken", "broken", BrokenEntry(number))  # type: ignore[arg-type] # stands in
    assert (entry.name, entry.kind, entry.size) == ("broken", "directory", 0)
    assert "'/dir/broken'" in str(entry.extras["unreadable"])
    assert "damaged" in str(entry.extras["unreadable"])


def test_running_out_of_memory_fails_the_page_and_blames_no_file() -> None:
    with pytest.raises(OSError, match="allocate"):
        pages._entry(-1, (), b"x", "x", BrokenEntry(errno.ENOMEM))  # type: ignore[arg-type] # stands in for an entry


def test_a_listing_ends_when_the_roots_are_asked_back(root: int, volume: Path) -> None:
    for number in range(600):
        (volume / str(number)).touch()
    calls = 0

    def asked_back() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise errors.Unavailable("now")

    with pytest.raises(errors.Unavailable):
        pages.list_directory(root, (), limit=10, cursor="", check=asked_back)


# --- paths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["/inner/file", "inner/file", "../inner/file", "/../../../inner/file", "/link-dir/file"]
)
def test_links_resolve_as_in_the_guest(root: int, volume: Path, target: str) -> None:
    (volume / "inner").mkdir()
    (volume / "inner/file").write_bytes(b"inside")
    (volume / "link-dir").symlink_to("/inner")
    (volume / "link").symlink_to(target)
    assert content(root, b"link") == b"inside"


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../../../../etc/passwd", "/proc/self/exe", "../outside"])
def test_no_link_leads_out(root: int, volume: Path, target: str) -> None:
    (volume.parent / "outside").write_bytes(b"secret")
    (volume / "link").symlink_to(target)
    with pytest.raises(errors.PathNotFound):
        tree.open_file(root, (b"link",))
    assert tree.stat(root, (b"link",)).target == target


def test_links_that_lead_in_a_circle_name_nothing(root: int, volume: Path) -> None:
    (volume / "one").symlink_to("two")
    (volume / "two").symlink_to("one")
    for touch in (tree.open_file, listed_at):
        with pytest.raises(errors.PathNotFound, match="circle"):
            touch(root, (b"one",))
    assert tree.stat(root, (b"one",)).kind == "symlink"


def listed_at(root: int, path: tuple[bytes, ...]) -> Listing:
    return listed(root, *path)


@pytest.mark.parametrize("path", [(b"missing",), (b"missing", b"below"), (b"file", b"below"), (b"dangling",)])
def test_what_is_not_there_is_not_found(root: int, volume: Path, path: tuple[bytes, ...]) -> None:
    (volume / "file").touch()
    (volume / "dangling").symlink_to("nowhere")
    for touch in (tree.open_file, listed_at):
        with pytest.raises(errors.PathNotFound):
            touch(root, path)


def test_a_name_too_long_is_an_invalid_path(root: int) -> None:
    for touch in (tree.open_file, tree.stat, listed_at):
        with pytest.raises(errors.InvalidPath):
            touch(root, (b"n" * 256,))


def test_deep_paths_work_to_the_kernels_limit(root: int, volume: Path) -> None:
    path = (b"d" * 9,) * 400  # 4000 bytes
    directory = os.open(volume, os.O_RDONLY)
    for name in path:
        os.mkdir(name, dir_fd=directory)
        below = os.open(name, os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=directory))
    os.close(directory)
    assert [entry.name for entry in listed(root, *path).entries] == ["bottom"]
    assert tree.stat(root, (*path, b"bottom")).kind == "file"


def test_a_file_is_no_directory(root: int, volume: Path) -> None:
    (volume / "file").touch()
    with pytest.raises(errors.NotADirectory):
        listed(root, b"file")


# --- open -------------------------------------------------------------------------------------------------------


def test_an_opened_file_is_for_reading_only_and_not_inherited(root: int, volume: Path) -> None:
    (volume / "file").write_bytes(b"12345")
    descriptor, info = tree.open_file(root, (b"file",))
    try:
        assert info.size == 5
        assert not os.get_inheritable(descriptor)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(descriptor, b"x")
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(("name", "what"), [("fifo", "named pipe"), ("socket", "socket"), ("dir", "directory")])
def test_what_is_no_regular_file_is_refused_without_being_opened(
    root: int, volume: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    os.mkfifo(volume / "fifo")
    make_socket(volume / "socket")
    (volume / "dir").mkdir()
    opened: list[int] = []
    real = linux.openat2

    def recording(directory: int, path: bytes, flags: int, *, resolve: int) -> int:
        opened.append(flags)
        return real(directory, path, flags, resolve=resolve)

    monkeypatch.setattr(linux, "openat2", recording)
    with pytest.raises(errors.NotAFile, match=what):
        tree.open_file(root, (name.encode(),))
    assert opened == [OPENS_NOTHING]


@pytest.mark.parametrize("swapped", ["fifo", "another"])
def test_a_name_that_changes_its_meaning_while_it_is_opened_is_refused(
    root: int, volume: Path, monkeypatch: pytest.MonkeyPatch, swapped: str
) -> None:
    (volume / "file").touch()
    (volume / "another").touch()
    os.mkfifo(volume / "fifo")
    real = linux.openat2

    def swapping(directory: int, path: bytes, flags: int, *, resolve: int) -> int:
        if flags & os.O_PATH:
            return real(directory, path, flags, resolve=resolve)
        return real(directory, swapped.encode(), flags, resolve=resolve)

    monkeypatch.setattr(linux, "openat2", swapping)
    with pytest.raises(errors.Unreadable):
        tree.open_file(root, (b"file",))


# --- stat -------------------------------------------------------------------------------------------------------


def test_stat_tells_what_the_kernel_knows(root: int, volume: Path) -> None:
    (volume / "file").write_bytes(b"x" * 5000)
    (volume / "other").hardlink_to(volume / "file")
    expected = (volume / "file").stat()
    info = tree.stat(root, (b"file",))
    assert (info.kind, info.size, info.allocated) == ("file", 5000, expected.st_blocks * 512)
    assert (info.uid, info.gid, info.nlink) == (os.getuid(), os.getgid(), 2)
    assert (info.mtime_ns, info.ctime_ns) == (expected.st_mtime_ns, expected.st_ctime_ns)
    assert (info.target, info.streams, info.unreadable) == ("", [], "")


def test_stat_of_no_component_is_the_volumes_root(root: int) -> None:
    assert tree.stat(root, ()).kind == "directory"


def test_stat_tells_the_names_of_attributes_not_their_values(root: int, volume: Path) -> None:
    (volume / "file").touch()
    try:
        os.setxattr(volume / "file", "user.origin", b"secret")
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            pytest.skip("this file system has no user attributes")
        raise
    assert tree.stat(root, (b"file",)).xattrs == ["user.origin"]


def test_a_file_that_does_not_open_is_described_and_says_why(
    root: int, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (volume / "file").write_bytes(b"123")
    real = linux.openat2

    def failing(directory: int, path: bytes, flags: int, *, resolve: int) -> int:
        if flags & os.O_PATH:
            return real(directory, path, flags, resolve=resolve)
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(linux, "openat2", failing)
    info = tree.stat(root, (b"file",))
    assert info.size == 3
    assert "damaged" in info.unreadable


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOENT, errors.PathNotFound),
        (errno.ENOTDIR, errors.PathNotFound),
        (errno.ELOOP, errors.PathNotFound),
        (errno.ENAMETOOLONG, errors.InvalidPath),
        (errno.EIO, errors.Unreadable),
        (errno.EUCLEAN, errors.Unreadable),
        (errno.EBADMSG, errors.Unreadable),
        (errno.ESTALE, errors.Unreadable),
        (errno.EACCES, errors.Unreadable),
        (errno.EXDEV, errors.Unreadable),
        (errno.ENOMEM, errors.Unavailable),
        (errno.EMFILE, errors.Unavailable),
        (errno.EAGAIN, errors.Unavailable),
    ],
)
def test_each_error_of_the_kernel_has_one_meaning(number: int, expected: type[errors.RestoreError]) -> None:
    assert type(tree.refused(OSError(number, "?"), (b"a", b"b"))) is expected


def test_a_message_shows_a_hostile_name_harmlessly_and_shortened() -> None:
    message = tree.refused(OSError(errno.EIO, "?"), (b"\x1b[2J", "\u202e".encode() * 1000)).message
    assert "\\x1b[2J" in message
    assert message.isprintable()
    assert len(message) < 400


def test_usage_is_what_statvfs_says(root: int, volume: Path) -> None:
    expected = os.statvfs(volume)
    assert tree.usage(root).size == expected.f_blocks * expected.f_frsize
    assert 0 < tree.usage(root).used <= tree.usage(root).size


def test_usage_of_what_cannot_say_is_unknown(monkeypatch: pytest.MonkeyPatch, root: int) -> None:
    def failing(_root: int) -> os.statvfs_result:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "fstatvfs", failing)
    assert tree.usage(root) == (0, 0)
