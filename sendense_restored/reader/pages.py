"""Pages of a directory, sorted: what ListFiles answers.

A directory is read once per page, and only the page is held and looked at, so memory does not grow with the directory
and there is no size from which order is lost.
"""

from __future__ import annotations

import errno
import os
import stat as stat_module
from typing import TYPE_CHECKING

from sendense_restored import names

from .protocol import I64, MAX_PAGE, U32, Entry, Listing, space_of
from .tree import KINDS, NO_RESOURCES, clamped, link_target, open_directory, refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .ntfs import Ntfs

_CHECK_EVERY = 256
_AFTER_ALL = b"\xff" * (names.MAX_NAME + 1)
_TYPE, _MODE = stat_module.S_IFMT(0xFFFF), 0o7777


def list_directory(
    root: int,
    path: tuple[bytes, ...],
    *,
    limit: int,
    cursor: str,
    check: Callable[[], None],
    ntfs: Ntfs | None = None,
) -> Listing:
    """The ``limit`` entries after the name ``cursor``, in the order of the names' bytes; links to it are followed.

    There are fewer if their texts are very long, and then a cursor that asks for the rest. The directory is read once
    per page, and only the page is held and looked at, so memory does not grow with the directory and there is no size
    from which order is lost. ``check`` is called now and then and may raise.
    Raises NotADirectory, PathNotFound, InvalidPath, Unreadable or Unavailable.
    """
    after = names.to_bytes(cursor)
    directory = open_directory(root, path, ntfs=ntfs)
    try:
        with os.scandir(directory) as scan:
            found = _first_names(scan, after, limit + 1, check)
            entries: list[Entry] = []
            complete, room = len(found) <= limit, MAX_PAGE
            for name, _, entry in found[:limit]:
                text = names.to_text(name)
                if entries and text == entries[-1].name:  # a damaged directory may have a name twice
                    continue
                row = _entry(directory, path, name, text, entry, ntfs)
                room -= space_of(row)
                if entries and room < 0:
                    complete = False
                    break
                entries.append(row)
    except OSError as error:
        raise refused(error, path) from None
    finally:
        os.close(directory)
    return Listing(entries, "" if complete else entries[-1].name)


def _first_names(
    scan: Iterator[os.DirEntry[str]], after: bytes, most: int, check: Callable[[], None]
) -> list[tuple[bytes, int, os.DirEntry[str]]]:
    """The ``most`` smallest names after ``after``, in order; there are never more than twice as many in memory."""
    kept: list[tuple[bytes, int, os.DirEntry[str]]] = []
    last = _AFTER_ALL
    for index, entry in enumerate(scan):
        if not index % _CHECK_EVERY:
            check()
        # scandir of a descriptor gives text with surrogates, whose order is not that of the bytes
        name = entry.name.encode("utf-8", "surrogateescape")
        # An empty name (a NUL at its start, on a damaged disk) is never greater, and one too long is no path's part.
        if after < name < last and len(name) <= names.MAX_NAME:
            kept.append((name, index, entry))  # the index decides between equal names: entries cannot be compared
            if len(kept) >= 2 * most:
                kept.sort()
                del kept[most:]
                last = kept[-1][0]  # of a long directory, most names need no more than this one comparison
    kept.sort()
    return kept[:most]


def _entry(
    directory: int,
    path: tuple[bytes, ...],
    name: bytes,
    text: str,
    found: os.DirEntry[str],
    ntfs: Ntfs | None = None,
) -> Entry:
    """One entry of the directory at ``path``. As short a way as can be: a page has thousands."""
    look = None
    try:
        status = found.stat(follow_symlinks=False)
        bits, size, mtime = status.st_mode, status.st_size, status.st_mtime_ns
        kind = KINDS.get(bits & _TYPE, "")
        if ntfs is not None:
            look = ntfs.look(directory, name, status)
        target = link_target(name, directory) if kind == "symlink" and ntfs is None else ""
    except OSError as error:
        if error.errno in NO_RESOURCES:
            raise
        if error.errno == errno.ENOENT:  # the directory says there is something, its inode says there is not
            error.errno = errno.EUCLEAN
        unreadable = refused(error, (*path, name)).message
        return Entry(text, _remembered_kind(found), 0, 0, 0, "", {"unreadable": unreadable})
    extras: dict[str, str | int | bool] = {}
    if look is not None:
        kind, size, bits, target = look.kind, look.size, look.mode, look.target
        if look.unreadable:
            extras["unreadable"] = look.unreadable
    if not kind:
        extras["unreadable"] = refused(OSError(errno.EUCLEAN, ""), (*path, name)).message
    if not -I64 <= mtime <= I64:
        mtime = clamped(mtime)
        extras["time_clamped"] = True
    if kind == "file" and status.st_nlink > 1:
        extras["nlink"] = min(status.st_nlink, U32)
    return Entry(text, kind or "file", max(size, 0), bits & _MODE, mtime, target, extras)


def _remembered_kind(found: os.DirEntry[str]) -> str:
    """What the directory itself says about an entry that cannot be looked at."""
    try:
        if found.is_symlink():
            return "symlink"
        return "directory" if found.is_dir(follow_symlinks=False) else "file"
    except OSError:
        return "file"
