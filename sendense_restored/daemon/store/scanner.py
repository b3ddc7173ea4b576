"""Which backups lie in a repository: a walk over its files.

The layout is ``<root>/<vm>/.../<name>.qcow2``: the first directory is the virtual machine's name. A file whose name
ends in ``-diskN`` (N from 0, no leading zeros) is disk N of the backup that the rest of the name and the directory
stand for; any other file is a backup of its own, with disk 0. A backup is incremental if one of its disks has a
backing file; its parent is the backup that has, under the same number, the backing file of its lowest disk (which
excludes circles of parents, since circles of files are refused). Its time is the latest modification of its files.

Only headers are read. Everything is opened beneath the root, without symbolic links for what is walked, and a file
must be a regular one before it is opened for reading. What cannot be used is reported and left out. All of it blocks
as long as the repository's storage does: call ``scan`` in a thread, never in the store's.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from heapq import heappop, heappush
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from sendense_restored import errors, linux, names
from sendense_restored.daemon.host.qcow2 import Qcow2Error, read_header
from sendense_restored.daemon.host.repositories import open_root

from .records import DiskFile, Found, FoundBackup, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_SUFFIX = ".qcow2"
_DISK = re.compile(r"(.+)-disk(0|[1-9][0-9]{0,3})\.qcow2", re.DOTALL)
_WALK = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS
_FOLLOW = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_MAGICLINKS  # as host/image.py opens backing files
_LATEST = datetime(9999, 1, 1, tzinfo=UTC).timestamp()


class _Unusable(Exception):  # noqa: N818  # a finding, caught by the walk
    """Why a file is left out; the rest of a sentence that begins with its name."""


@dataclass(frozen=True)
class _File:
    path: str
    backing: str | None
    virtual_size: int
    stored: int
    modified: float


def scan(repository_root: Path, allowed: Sequence[Path] | None = None) -> Found:
    """Find the backups in the directory ``repository_root``. ``allowed``: see ``host.repositories``.

    Raises Unavailable if the directory itself cannot be read, and ImageRefused if it may not be.
    """
    try:
        root, real = open_root(repository_root, allowed, os.O_RDONLY)
        try:
            return _Scan(root, (PurePosixPath(repository_root), real)).run()
        finally:
            os.close(root)
    except OSError as error:
        raise errors.Unavailable(
            f"the repository's directory cannot be read: {error.strerror}; check that its storage is mounted"
        ) from None


def key_of(path: str) -> tuple[str, int]:
    """The key of the backup that a file of the repository belongs to, and its number among the disks."""
    # A key of several disks ends in "-diskN" and one of a single file in ".qcow2": they never meet.
    if match := _DISK.fullmatch(path):
        return f"{match[1]}-diskN", int(match[2])
    return path, 0


class _Scan:
    """One scan under way."""

    def __init__(self, root: int, roots: Sequence[PurePosixPath]) -> None:
        self._root = root
        self._roots = roots
        self._files: dict[str, _File] = {}
        self._images: dict[tuple[int, int], str] = {}  # path by device and inode, also of those with a problem
        self._problems: dict[str, str] = {}
        self._sound: set[str] = set()

    def run(self) -> Found:
        for path in self._walk():
            with self._reported(path):
                self._files[path] = self._read(path)
        below: dict[str, str] = {}  # which image is an image's backing file
        for path, file in self._files.items():
            with self._reported(path):
                if file.backing is not None and (base := self._images.get(self._find_backing(path, file.backing))):
                    below[path] = base
        for path in self._files:
            with self._reported(path):
                self._check_chain(path, below)
        backups = self._group(below)
        return Found(tuple(backups), tuple(Problem(*item) for item in sorted(self._problems.items())))

    @contextmanager
    def _reported(self, path: str) -> Iterator[None]:
        try:
            yield
        except (_Unusable, Qcow2Error) as error:
            self._problems.setdefault(path, str(error))
        except OSError as error:
            self._problems.setdefault(path, f"cannot be read: {error.strerror}")

    def _walk(self) -> Iterator[str]:
        """The paths of all images in the root's directories, in order within each."""
        directories = [""]
        while directories:
            directory = heappop(directories)
            images: list[str] = []
            with self._reported(directory or "/"):
                for name, is_directory in self._entries(directory):
                    path = f"{directory}/{name}" if directory else name
                    if is_directory:
                        heappush(directories, path)
                    else:
                        images.append(path)
            yield from sorted(images)

    def _entries(self, directory: str) -> Iterator[tuple[str, bool]]:
        """The names of directories (True) and images (False) in one directory."""
        fd = self._open(directory or ".", os.O_RDONLY | os.O_DIRECTORY, _WALK)
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    if entry.name.startswith("."):  # snapshot directories of file servers, unfinished copies
                        continue
                    is_directory = entry.is_dir(follow_symlinks=False)
                    if not is_directory and not entry.name.endswith(_SUFFIX):
                        continue
                    shown = names.to_text(os.fsencode(f"{directory}/{entry.name}" if directory else entry.name))
                    if not _is_utf8(entry.name):
                        self._problems[shown] = "has a name that is not UTF-8; rename it"
                    elif not directory and not is_directory:
                        self._problems[shown] = (
                            "lies beside the directories of the virtual machines; move it into one"
                        )
                    else:
                        yield entry.name, is_directory
        finally:
            os.close(fd)

    def _read(self, path: str) -> _File:
        identity = self._judge(path, _WALK)
        self._images.setdefault(identity, path)
        fd = self._open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, _WALK)
        try:
            opened = os.fstat(fd)
            if (opened.st_dev, opened.st_ino) != identity:
                raise _Unusable("was replaced during the scan; scan again")
            header = read_header(fd, opened.st_size)
        finally:
            os.close(fd)
        if not header.virtual_size:
            raise _Unusable("is an empty disk")
        return _File(path, header.backing, header.virtual_size, opened.st_size, opened.st_mtime)

    def _judge(self, path: str, resolve: int) -> tuple[int, int]:
        """Device and inode of a regular file, not opened: an open may block on a FIFO, and act on a device."""
        fd = self._open(path, os.O_PATH | (os.O_NOFOLLOW if resolve == _WALK else 0), resolve)
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        if stat.S_ISLNK(status.st_mode):
            raise _Unusable("is a symbolic link; only the file itself is taken")
        if not stat.S_ISREG(status.st_mode):
            raise _Unusable("is not a regular file")
        return status.st_dev, status.st_ino

    def _open(self, path: str, flags: int, resolve: int) -> int:
        return linux.openat2(self._root, os.fsencode(path), flags, resolve=resolve)

    def _find_backing(self, path: str, name: str) -> tuple[int, int]:
        """Device and inode of the backing file that the header of ``path`` names."""
        if ":" in name.partition("/")[0]:
            raise _Unusable("has a backing file that is named by a protocol, which is not allowed")
        target = PurePosixPath(name)
        if target.is_absolute():
            base = next((root for root in self._roots if target.is_relative_to(root)), None)
            if base is None:
                raise _Unusable("has a backing file outside the repository")
            target = target.relative_to(base)
        else:
            target = PurePosixPath(path).parent / target
        try:
            return self._judge(str(target), _FOLLOW)
        except _Unusable as error:
            raise _Unusable(f"has a backing file that {error}") from None
        except FileNotFoundError:
            raise _Unusable("has a backing file that is not there; bring it back or take a full backup") from None
        except OSError as error:
            outside = error.errno == errno.EXDEV
            raise _Unusable(
                "has a backing file outside the repository"
                if outside
                else f"has a backing file that cannot be read: {error.strerror}"
            ) from None

    def _check_chain(self, path: str, below: dict[str, str]) -> None:
        way: set[str] = set()
        at: str | None = path
        while at is not None and at not in self._sound:
            if at in way:
                raise _Unusable("has a chain of backing files that goes in a circle")
            if at in self._problems and at != path:
                raise _Unusable(f"needs {at}, which cannot be used")
            way.add(at)
            at = below.get(at)
        if path not in self._problems:
            self._sound.update(way)

    def _group(self, below: dict[str, str]) -> Iterator[FoundBackup]:
        groups: dict[str, dict[int, _File]] = {}
        for path, file in self._files.items():
            if path not in self._problems:
                key, index = key_of(path)
                groups.setdefault(key, {})[index] = file
        for key, files in groups.items():
            lowest = min(files)
            parent, index = key_of(below.get(files[lowest].path, ""))
            yield FoundBackup(
                key=key,
                vm_name=key.partition("/")[0],
                backup_type="incremental" if any(file.backing is not None for file in files.values()) else "full",
                parent=parent if index == lowest and parent != key else "",
                created_at=_moment(max(file.modified for file in files.values())),
                stored_bytes=sum(file.stored for file in files.values()),
                disks=tuple(
                    DiskFile(number, files[number].path, files[number].virtual_size) for number in sorted(files)
                ),
            )


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _moment(timestamp: float) -> datetime:
    """A file's time, within the years that the catalogue can hold."""
    return datetime.fromtimestamp(min(max(timestamp, 0.0), _LATEST), UTC)
