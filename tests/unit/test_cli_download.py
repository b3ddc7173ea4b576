"""Restoring one file: whole or not at all, and never over another file unasked."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.cli import download

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MTIME = 1_234_567_890_123_456_789
KIB, MIB = 1 << 10, 1 << 20


@dataclass
class Source:
    """The descriptor of a guest file, and the directory that it is restored to."""

    fd: int
    size: int
    content: bytes
    directory: Path

    def save(
        self, name: str = "new", *, force: bool = False, copied: Callable[[int], object] = int, **more: int
    ) -> None:
        values = {"size": self.size, "mode": 0o644, "mtime_ns": MTIME} | more
        download.save(
            self.fd, self.directory / name, force=force, copied=lambda done: copied(done) and None, **values
        )

    def left(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())


@pytest.fixture(params=["unnamed", "named"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    """On a file system that has unnamed files, and on one that has not."""
    if request.param == "named":
        really_open = os.open

        def without_unnamed_files(path: str, flags: int, *rest: int, **more: int) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return really_open(path, flags, *rest, **more)

        monkeypatch.setattr(os, "open", without_unnamed_files)
    content = os.urandom(3 * MIB + 17)
    (tmp_path / "guest").write_bytes(content)
    directory = tmp_path / "here"
    directory.mkdir()
    fd = os.open(tmp_path / "guest", os.O_RDONLY)
    yield Source(fd, len(content), content, directory)
    os.close(fd)


def test_a_file_is_restored_whole(source: Source) -> None:
    done: list[int] = []
    source.save(copied=done.append)
    new = source.directory / "new"
    assert new.read_bytes() == source.content
    assert new.stat().st_mtime_ns == MTIME
    assert source.left() == ["new"]
    assert done == sorted(done)
    assert done[-1] == source.size


@pytest.mark.parametrize(("mode", "result"), [(0o777, 0o750), (0o6755, 0o750), (0o400, 0o400), (0, 0)])
def test_permissions_are_the_guests_as_far_as_the_umask_goes(source: Source, mode: int, result: int) -> None:
    before = os.umask(0o027)
    try:
        source.save(mode=mode)
    finally:
        assert os.umask(before) == 0o027
    assert (source.directory / "new").stat().st_mode & 0o7777 == result


@pytest.mark.parametrize("taken", ["file", "directory", "link", "dangling"])
def test_nothing_is_replaced_unasked(source: Source, taken: str) -> None:
    (source.directory / "file").write_text("mine")
    (source.directory / "directory").mkdir()
    (source.directory / "link").symlink_to("file")
    (source.directory / "dangling").symlink_to("nothing")
    before = source.left()
    with pytest.raises(FileExistsError):
        source.save(taken)
    assert source.left() == before
    assert (source.directory / "file").read_text() == "mine"


def test_a_file_that_appears_meanwhile_is_not_replaced(source: Source) -> None:
    with pytest.raises(FileExistsError):
        source.save(copied=lambda _: (source.directory / "new").write_text("quicker"))
    assert (source.directory / "new").read_text() == "quicker"
    assert source.left() == ["new"]


def test_force_replaces_a_file_but_no_directory(source: Source) -> None:
    (source.directory / "file").write_text("mine")
    (source.directory / "directory").mkdir()
    source.save("file", force=True)
    assert (source.directory / "file").read_bytes() == source.content
    with pytest.raises(IsADirectoryError):
        source.save("directory", force=True)
    assert source.left() == ["directory", "file"]


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, SystemExit, OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("force", [True, False])
def test_an_end_in_the_middle_leaves_nothing(
    source: Source, trouble: type[BaseException] | BaseException, force: bool
) -> None:
    def interrupted(done: int) -> None:
        if done > MIB:
            raise trouble

    with pytest.raises((KeyboardInterrupt, SystemExit, OSError)):
        source.save(copied=interrupted, force=force)
    assert source.left() == []


def test_until_it_is_whole_it_does_not_have_its_name(source: Source) -> None:
    seen: list[list[str]] = []
    source.save(copied=lambda _: seen.append(source.left()))
    assert len(seen) > 3
    assert not any("new" in names for names in seen)


@pytest.mark.parametrize("difference", [-1, 1, MIB])
def test_a_file_of_another_size_is_not_restored(source: Source, difference: int) -> None:
    with pytest.raises(errors.Failed, match="size"):
        source.save(size=source.size + difference)
    assert source.left() == []


def test_a_file_cut_off_in_a_hole_is_not_restored(tmp_path: Path) -> None:
    guest = tmp_path / "guest"
    with guest.open("wb") as file:
        file.write(b"x" * 64 * KIB)
        file.seek(8 * MIB)
        file.write(b"y" * 64 * KIB)
    size = guest.stat().st_size
    fd = os.open(guest, os.O_RDONLY)
    try:
        with pytest.raises(errors.Failed, match="size"):
            download.save(
                fd,
                tmp_path / "new",
                size=size,
                mode=0o600,
                mtime_ns=0,
                force=False,
                copied=lambda _: os.truncate(guest, 1 * MIB),
            )
    finally:
        os.close(fd)
    assert not (tmp_path / "new").exists()


def test_an_unreadable_backup_says_where_it_ended(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    really_read = os.preadv

    def failing(fd: int, buffers: list[memoryview], position: int) -> int:
        if position >= 2 * MIB:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return really_read(fd, buffers, position)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(errors.Unavailable, match=f"after {2 * MIB} bytes"):
        source.save()
    assert source.left() == []


@pytest.mark.parametrize(
    "extents",
    [
        [],
        [(0, 64)],
        [(64, 64)],
        [(0, 4), (1024, 8)],
        [(512, 2048), (4096, 4)],
    ],
)
@pytest.mark.parametrize("tail", [0, 1, 777])
def test_holes_stay_holes(tmp_path: Path, extents: list[tuple[int, int]], tail: int) -> None:
    """``extents`` are data, in KiB; the file ends ``tail`` bytes into a hole of 8 MiB after the last."""
    guest, new = tmp_path / "guest", tmp_path / "new"
    size = (max((start + length for start, length in extents), default=0) * KIB + 8 * MIB if tail else 0) + tail
    with guest.open("wb") as file:
        for start, length in extents:
            file.seek(start * KIB)
            file.write(os.urandom(length * KIB))
        size = max(size, file.tell())
        file.truncate(size)
        file.flush()
        os.fsync(file.fileno())
    fd = os.open(guest, os.O_RDONLY)
    try:
        download.save(fd, new, size=size, mode=0o600, mtime_ns=0, force=False, copied=lambda _: None)
    finally:
        os.close(fd)
    assert new.read_bytes() == guest.read_bytes()
    assert new.stat().st_blocks <= guest.stat().st_blocks


@pytest.mark.parametrize("name", ["no/new", "file/new"])
def test_a_directory_that_is_none_is_the_hosts_trouble(source: Source, name: str) -> None:
    (source.directory / "file").touch()
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        source.save(name)
    assert source.left() == ["file"]


@pytest.mark.parametrize("left", [0, 2 * MIB])
def test_a_file_that_gets_shorter_is_not_restored(source: Source, tmp_path: Path, left: int) -> None:
    with pytest.raises((errors.Unavailable, errors.Failed)):
        source.save(copied=lambda _: os.truncate(tmp_path / "guest", left))
    assert source.left() == []


def test_content_goes_out_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(MIB + 13)
    (tmp_path / "guest").write_bytes(content)
    really_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: really_write(fd, data[:70_001]))
    source = os.open(tmp_path / "guest", os.O_RDONLY)
    target = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    download.write_out(source, target)
    os.close(source)
    os.close(target)
    assert (tmp_path / "out").read_bytes() == content
