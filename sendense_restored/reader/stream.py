"""Listings of any length, written into the pipe that a client reads, in memory that does not grow with them.

One JSON object a line, in the order of the directory: ``{"path", "kind", "size", "mode", "mtime_ns"}`` of an entry,
with ``target``, ``nlink``, ``time_clamped``, ``unreadable`` and ``display_name`` where an ordinary listing has them;
``{"path", "error"}`` for what could not be looked at or, after its own line, not be read; and last
``{"summary": {"entries", "errors", "truncated"}}``. Whoever finds no summary has not seen everything.

A ``Walk`` goes depth first and holds no entries: each directory on the way down is an iterator that has stopped in
the middle. Only so many of them stay open. One further out is closed, and when the walk comes back it is opened
again and the entries that it has already given are skipped, which a file system that never changes allows.

A directory is opened below the one that it was found in, never by a path through others, and links are not followed.
A damaged file system may have a directory that holds one of those above it: that is told as an error.

``Walk`` is long for a class: it is one loop, unrolled into steps that share where it stands.
"""

from __future__ import annotations

import errno
import os
import stat as stat_module
from contextlib import ExitStack, contextmanager
from itertools import islice
from json.encoder import encode_basestring as quoted
from types import MappingProxyType
from typing import TYPE_CHECKING

from sendense_restored import errors, linux, names

from . import tree
from .lines import unusual
from .outlet import Ended
from .protocol import I64, StreamEnd, matcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from .ntfs import Look, Ntfs
    from .outlet import Outlet
    from .protocol import Filters, Start

MOST_OPEN = 24
"""Directories that one walk has open; each takes two descriptors, as scandir has one of its own."""

_BELOW = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS | linux.RESOLVE_NO_XDEV
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_ROUND = 256  # entries between two looks at whether to go on
_ROUND_OF_LONG = 32  # the same where paths are long, so that what has not been written stays below 2 MiB
_LONG = 512
_FULL = 60_000  # characters; an empty pipe holds 64 KiB
_CIRCLE = "this directory is also one of those above it; the file system is damaged"
_TOO_DEEP = "the path of what is in this directory is too long to be asked for"
_IMPOSSIBLE = "the directory holds a name that no file can have; the file system is damaged"


class _Level:
    """A directory on the way down."""

    __slots__ = ("above", "descriptor", "given", "identity", "name", "scan")

    def __init__(self, name: bytes, above: int, descriptor: int, identity: tuple[int, int]) -> None:
        self.name = name
        self.above = above
        """The length of the beginning of lines, and so of the path, in the directory above."""
        self.descriptor = descriptor
        """-1 while it is closed."""
        self.scan: os._ScandirIterator[str] | None = None
        self.identity = identity
        self.given = 0

    def close(self) -> None:
        if self.scan is not None:
            self.scan.close()
            self.scan = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Walk:
    """One stream, from its opening to its summary. See ``opened``."""

    def __init__(
        self,
        starts: Sequence[Start],
        filters: Filters,
        lend: Callable[[str], AbstractContextManager[int]],
        outlet: Outlet,
        ntfs: Mapping[str, Ntfs],
    ) -> None:
        self._starts = starts
        self._filters = filters
        self._lend = lend
        self._outlet = outlet
        self._all_ntfs = ntfs
        self._ntfs: Ntfs | None = None
        """That of the volume which is walked, if it has one."""
        bounds = (filters.min_size, filters.max_size, filters.newer, filters.older)
        self._sized = any(bound is not None for bound in bounds)
        self._matches = pattern.match if (pattern := matcher(filters.name)) else None
        self._first = -1
        """The directory that the stream is of, if that is in a volume."""
        self._lines: list[str] = []
        self._size = 0
        self._looked_at = 0
        self._entries = 0
        self._errors = 0
        self._truncated = False
        # The way down: the directories, which they are, the beginning of lines in the innermost, its path's length.
        self._way: list[_Level] = []
        self._above: set[tuple[int, int]] = set()
        self._head = ""
        self._path_length = 0

    def open(self, stack: ExitStack) -> None:
        """Open what the stream is of. Raises what ``tree.open_directory`` raises."""
        if self._starts and self._starts[0].entry is None:
            first = self._starts[0]
            root = stack.enter_context(self._lend(first.volume))
            self._first = tree.open_directory(root, first.path, ntfs=self._all_ntfs.get(first.volume))
            stack.callback(os.close, self._first)

    def run(self) -> StreamEnd:
        """Write everything. It ends early when there is no use in going on."""
        complete = False
        try:
            if self._first >= 0:
                self._walk(self._starts[0], self._first, 1)
            else:
                self._walk_volumes()
            self._finish()
            complete = True
        except (Ended, errors.Unavailable, MemoryError):  # Unavailable: the volumes were asked back
            pass
        return StreamEnd(self._entries, self._errors, self._truncated, self._outlet.written, complete)

    # --- lines --------------------------------------------------------------------------------------------------

    def _put(self, line: str) -> None:
        self._lines.append(line)
        self._size += len(line)

    def _put_error(self, head: str, text: str | None, message: str) -> None:
        """An error of ``text`` in the directory whose lines begin with ``head``, or of that itself."""
        self._errors += 1
        path = f'{head[:-1]}"' if text is None else f"{head}{quoted(text)[1:]}"
        self._put(f'{path},"error":{quoted(message)}}}\n')

    def _flush(self) -> None:
        if self._lines:
            data = "".join(self._lines).encode()
            self._lines.clear()
            self._size = 0
            self._outlet.write(data)

    def _look(self) -> None:
        """Now and then: is there any use in going on? What is known by then is written. Raises Ended."""
        if self._looked_at >= _ROUND or self._size >= _FULL:
            self._looked_at = 0
            self._outlet.check()
            self._flush()

    def _finish(self) -> None:
        truncated = "true" if self._truncated else "false"
        summary = f'"entries":{self._entries},"errors":{self._errors},"truncated":{truncated}'
        self._put(f'{{"summary":{{{summary}}}}}\n')
        self._flush()

    # --- volumes ------------------------------------------------------------------------------------------------

    def _walk_volumes(self) -> None:
        descend = self._filters.recursive and self._filters.max_depth != 1
        for start in self._starts:
            self._put_volume(start)
            if self._truncated:
                return
            if not descend or not start.open:
                continue
            with ExitStack() as stack:
                try:
                    root = stack.enter_context(self._lend(start.volume))
                    descriptor = tree.open_directory(root, start.path, ntfs=self._all_ntfs.get(start.volume))
                except (errors.PathNotFound, errors.NotADirectory, errors.Unreadable) as failure:
                    self._put_error('{"path":"/', start.volume, failure.message)
                    continue
                stack.callback(os.close, descriptor)
                self._walk(start, descriptor, 2)
            if self._truncated:
                return

    def _put_volume(self, start: Start) -> None:
        entry, wanted = start.entry, self._filters
        assert entry is not None
        if (
            (self._matches and not self._matches(entry.name))
            or (wanted.kind and entry.kind != wanted.kind)
            or not self._fits(entry.size, entry.mtime_ns)
        ):
            return
        if wanted.limit is not None and self._entries >= wanted.limit:
            self._truncated = True
            return
        self._entries += 1
        extras = "".join(f',"{key}":{quoted(value)}' for key, value in entry.extras.items() if isinstance(value, str))
        self._put(
            f'{{"path":"/{quoted(entry.name)[1:]},"kind":"{entry.kind}","size":{entry.size},"mode":{entry.mode}'
            f',"mtime_ns":{entry.mtime_ns}{extras}}}\n'
        )

    def _fits(self, size: int, mtime: int) -> bool:
        wanted = self._filters
        return (
            (wanted.min_size is None or size >= wanted.min_size)
            and (wanted.max_size is None or size <= wanted.max_size)
            and (wanted.newer is None or mtime >= wanted.newer)
            and (wanted.older is None or mtime <= wanted.older)
        )

    # --- directories --------------------------------------------------------------------------------------------

    def _walk(self, start: Start, descriptor: int, depth: int) -> None:
        """Everything below the directory ``descriptor``, whose entries have the depth ``depth``."""
        self._ntfs = self._all_ntfs.get(start.volume)
        path = (names.to_bytes(start.volume), *start.path)
        self._head = f'{{"path":{quoted(names.format_path(path))[:-1]}/'
        self._path_length = sum(map(len, path)) + len(path)
        try:
            identity = _identity(os.fstat(descriptor))
        except OSError as failure:
            self._put_error(self._head, None, tree.problem(failure))
            return
        self._way.append(_Level(b"", 0, -1, identity))
        self._above.add(identity)
        try:
            while self._way and not self._truncated:
                level = self._way[-1]
                try:
                    if level.scan is None:
                        self._open_again(descriptor, level)
                    below = self._read(level, depth + len(self._way) - 1)
                except OSError as failure:
                    self._put_error(self._head, None, tree.problem(failure))
                    below = False
                if not below:
                    self._leave()
        finally:
            while self._way:
                self._leave()

    def _leave(self) -> None:
        level = self._way.pop()
        level.close()
        self._above.discard(level.identity)
        self._head = self._head[: level.above]
        self._path_length -= len(level.name) + 1

    def _open_again(self, first: int, level: _Level) -> None:
        """Open a directory for the first time, or go on where it was closed. Raises OSError or Ended."""
        if level.descriptor < 0:
            path = b"/".join(level.name for level in self._way[1:]) or b"."
            level.descriptor = linux.openat2(first, path, _DIRECTORY, resolve=_BELOW)
            if _identity(os.fstat(level.descriptor)) != level.identity:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        level.scan = os.scandir(level.descriptor)
        skipped = 0
        while skipped < level.given:
            again = sum(1 for _ in islice(level.scan, min(1 << 14, level.given - skipped)))
            if not again:  # it has become shorter
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            skipped += again
            self._outlet.check()

    def _descend(self, level: _Level, text: str, name: bytes, status: os.stat_result | None) -> bool:
        """Open a directory that was found in the innermost one; False if it cannot be read, which is told then."""
        if self._path_length + len(name) + 1 >= names.MAX_PATH:
            self._put_error(self._head, text, _TOO_DEEP)
            return False
        try:
            descriptor = linux.openat2(level.descriptor, name, _DIRECTORY, resolve=_BELOW)
        except OSError as failure:
            self._put_error(self._head, text, tree.problem(failure))
            return False
        below = _Level(name, len(self._head), descriptor, (0, 0))
        try:
            opened = os.fstat(descriptor)
            below.identity = _identity(opened)
            if below.identity in self._above:
                problem = _CIRCLE
            elif status is not None and not os.path.samestat(status, opened):
                problem = tree.problem(OSError(errno.ESTALE, ""))
            else:
                problem = ""
        except OSError as failure:
            problem = tree.problem(failure)
        if problem:
            below.close()
            self._put_error(self._head, text, problem)
            return False
        self._way.append(below)
        self._above.add(below.identity)
        self._head += f"{quoted(text)[1:-1]}/"
        self._path_length += len(name) + 1
        if len(self._way) > MOST_OPEN:
            self._close_one()
        return True

    def _close_one(self) -> None:
        """If too many are open, close that of the outer ones in which the place is found again soonest.

        Were it always the outermost, a large directory of deep ones would be read again from its start for each.
        """
        is_open = [level for level in self._way if level.descriptor >= 0]
        if len(is_open) > MOST_OPEN:
            min(is_open[: MOST_OPEN // 2], key=lambda level: level.given).close()

    def _read(self, level: _Level, depth: int) -> bool:
        """Go on in a directory: True with one more level on the way down, False at the end. Raises OSError."""
        assert level.scan is not None
        wanted = self._filters
        descending = wanted.recursive and (wanted.max_depth is None or depth < wanted.max_depth)
        size_of_round = _ROUND if len(self._head) < _LONG else _ROUND_OF_LONG
        given = size_of_round
        while given == size_of_round and not self._truncated:
            self._look()
            given = 0
            try:
                for found in islice(level.scan, size_of_round):
                    given += 1
                    text = found.name
                    name = text.encode("utf-8", "surrogateescape")
                    if not name or len(name) > names.MAX_NAME:
                        self._put_error(self._head, None, _IMPOSSIBLE)
                        continue
                    if not text.isascii():
                        text = names.to_text(name)
                    status = None
                    if self._may_match(found, text):
                        try:
                            status = found.stat(follow_symlinks=False)
                            look = self._ntfs.look(level.descriptor, name, status) if self._ntfs is not None else None
                        except OSError as failure:
                            self._put_error(self._head, text, tree.problem(failure))
                            continue
                        self._tell(level.descriptor, status, text, name, look)
                        if self._truncated:
                            return False
                    if descending and _is_directory(found, status) and self._descend(level, text, name, status):
                        return True
            finally:
                level.given += given
                self._looked_at += given
        return False

    def _may_match(self, found: os.DirEntry[str], text: str) -> bool:
        """Whether an entry has to be looked at: its name and, where the directory tells that, its kind would do."""
        kind = self._filters.kind
        if self._matches and self._matches(text) is None:
            return False
        # On NTFS a file that cannot be read looks like a link.
        return not kind or _may_be(found, kind) or (kind == "file" and self._ntfs is not None)

    def _tell(self, directory: int, status: os.stat_result, text: str, name: bytes, look: Look | None) -> None:
        """Write the line of an entry, if it is wanted."""
        wanted = self._filters
        mode, size, mtime = status.st_mode, status.st_size, status.st_mtime_ns
        kind = tree.KINDS.get(stat_module.S_IFMT(mode), "")
        if look is not None:
            kind, size = look.kind, look.size
        told = kind or "file"
        if (wanted.kind and told != wanted.kind) or (self._sized and not self._fits(size, mtime)):
            return
        if self._entries == wanted.limit:
            self._truncated = True
            return
        self._entries += 1
        line = f'{self._head}{quoted(text)[1:]},"kind":"{told}"'
        if kind == "file" and status.st_nlink == 1 and -I64 <= mtime <= I64 and size >= 0 and look is None:
            self._put(f'{line},"size":{size},"mode":{mode & 0o7777},"mtime_ns":{mtime}}}\n')
        else:
            self._put(line + unusual(directory, name, kind, status, look))


def _is_directory(found: os.DirEntry[str], status: os.stat_result | None) -> bool:
    return stat_module.S_ISDIR(status.st_mode) if status is not None else _may_be(found, "directory")


def _may_be(found: os.DirEntry[str], kind: str) -> bool:
    """Whether an entry may be of a kind, as far as its directory says; most do, and no inode is looked at then."""
    try:
        if kind == "directory":
            return found.is_dir(follow_symlinks=False)
        if kind == "symlink":
            return found.is_symlink()
        return not (found.is_dir(follow_symlinks=False) or found.is_symlink())
    except OSError:
        return True


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@contextmanager
def opened(
    starts: Sequence[Start],
    filters: Filters,
    lend: Callable[[str], AbstractContextManager[int]],
    outlet: Outlet,
    ntfs: Mapping[str, Ntfs] = MappingProxyType({}),
) -> Iterator[Walk]:
    """A walk whose first directory is open; ``lend`` gives the root of a volume for as long as it is used.

    ``ntfs`` has the volumes that are NTFS.

    Raises NotADirectory, PathNotFound, InvalidPath, Unreadable or Unavailable: nothing was written then.
    """
    with ExitStack() as stack:
        walk = Walk(starts, filters, lend, outlet, ntfs)
        walk.open(stack)
        yield walk
