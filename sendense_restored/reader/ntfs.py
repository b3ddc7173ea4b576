"""What is different about a volume that ntfs-3g serves; for other file systems there is no ``Ntfs``.

Streams. With ``streams_interface=windows`` a file's alternate streams open as ``name:stream``, and no entry of a
directory has a name with a colon: ntfs-3g leaves such out. So a colon in a path is refused. It would give a file more
texts than one (``a:`` is ``a``), and reach what only the option ``stream`` may name.

Links. ntfs-3g gives an absolute link of Windows as a path of this host, below where it has mounted the volume. Within
the volume that leads nowhere, so links are followed here, with that beginning taken off. The kernel follows none on
such a volume (RESOLVE_NO_SYMLINKS), for another reason too:

What cannot be read faithfully. A reparse point that ntfs-3g has no plug-in for looks like a symbolic link whose
target is a sentence with its tag, to which a hostile disk may well have a file. It is told as a file with a reason;
its size is 0 because nobody knows it, and that it is a directory in Windows, as those of a cloud service are, cannot
be seen. With a plug-in it is an ordinary file. (A link made by Linux that has just this text is taken for one; it
loses nothing but its target.)

Encrypted files (EFS) look like all others; only an open file tells the flag, and to open each would double what a
listing costs. That is why ``efs_raw`` is among the mount options: with it those files, and by chance one of 512
others, have a size that leaves 2 when divided by 512, and only these are opened and asked. The option has a price:
without it reading would fail, with it what is read is the ciphertext. So no file may leave before ``check`` has seen
its descriptor, and what that cannot find out is a refusal.

The disk is hostile, and so is all that it says: values are of bounded length (the kernel passes on 64 KiB of an
extended attribute) and have one valid form, or are refused.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from typing import NamedTuple

from sendense_restored import errors, linux, names

from .protocol import MAX_STREAM_NAMES

_RESOLVE = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS | linux.RESOLVE_NO_XDEV | linux.RESOLVE_NO_SYMLINKS
_BELOW = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_MAGICLINKS | linux.RESOLVE_NO_XDEV | linux.RESOLVE_NO_SYMLINKS
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_MOST_LINKS = 40  # as many as the kernel follows (path_resolution(7))

_ATTRIBUTES = "system.ntfs_attrib_be"
_STREAMS = "ntfs.streams.list"

# winnt.h, FILE_ATTRIBUTE_*. RECALL_ON_OPEN (0x40000) is left out: on a disk that bit means "has extended attributes".
_REPARSE_POINT = 0x400
_OFFLINE = 0x1000
_ENCRYPTED = 0x4000
_RECALL_ON_DATA_ACCESS = 0x400000

_SECTOR = 512
_PADDING = 2  # what ``efs_raw`` adds to the size of an encrypted file, after rounding it up to sectors
_MODE = 0o444  # that of all files, by the mount options

_UNSUPPORTED = re.compile(rb"unsupported reparse tag 0x([0-9a-f]{8})")

_ELSEWHERE = "restore the whole disk and read it with Windows"
_EFS = "encrypted by Windows (EFS) for certain users; restore the whole disk and read it as one of them"
_CLOUD = (
    "kept by a cloud service (such as OneDrive), this backup may have a placeholder only; get it from that service, "
    f"or {_ELSEWHERE}"
)
_MIGRATED = f"moved to other storage by Windows (HSM); get it from there, or {_ELSEWHERE}"
_SYNCED = f"kept by Azure File Sync, this backup may have a placeholder only; get it from there, or {_ELSEWHERE}"
_CONTAINER = f"a layer of a Windows container; {_ELSEWHERE}"
_PROJECTED = f"made up by a program of the guest when it is read (ProjFS), and not on the disk; {_ELSEWHERE}"
_DFS = f"an entry of Windows' distributed file system (DFS), and not on this disk; {_ELSEWHERE}"
_DAMAGED = "damaged, or its storage failed; try an older backup"
_LEADS_AWAY = "a link of Windows that leads to another disk or to nothing; look at that disk, if it was backed up"

# winnt.h and [MS-FSCC] 2.1.2.1, IO_REPARSE_TAG_*
_CLOUD_TAG, _CLOUD_MASK = 0x9000001A, 0xFFFF0FFF  # the service that keeps it has a number from 0 to 15
_LINKS = frozenset({0xA0000003, 0xA000000C, 0xA000001D})  # mount point, symbolic link, link of Linux
_REASONS = {
    0x80000013: f"deduplicated by Windows, its data lies in the volume's chunk store; {_ELSEWHERE}",
    0x80000017: f"compressed by Windows (CompactOS, WOF) in a way that cannot be read here; {_ELSEWHERE}",
    0x80000007: f"deduplicated by Windows (single instance storage); {_ELSEWHERE}",
    0xC0000004: _MIGRATED,
    0x80000006: _MIGRATED,
    0x8000000A: _DFS,
    0x80000012: _DFS,
    0x80000014: f"a link of Windows' NFS client or server; {_ELSEWHERE}",
    0x80000018: _CONTAINER,
    0x90001018: _CONTAINER,
    0xA0000027: _CONTAINER,
    0xA0001027: _CONTAINER,
    0xA000001F: _CONTAINER,
    0x8000001B: "an alias of an app (WindowsApps), which holds no data; restore the app itself",
    0x8000001E: _SYNCED,
    0x90000027: _SYNCED,
    0x80000021: _CLOUD,
    0x9000001C: _PROJECTED,
    0xA0000022: _PROJECTED,
}


class NtfsError(OSError):
    """One that ntfs-3g does not have."""

    def told(self, what: str) -> errors.RestoreError:
        """What a client hears of it; ``what`` is the path that was asked for, in quotes."""
        raise NotImplementedError


class UnfaithfulError(NtfsError):
    """It is there and cannot be read faithfully; ``reason`` goes on after "it is", and says what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EOPNOTSUPP, reason)
        self.reason = reason

    def told(self, what: str) -> errors.RestoreError:
        """See NtfsError."""
        return errors.Unreadable(f"{what} is {self.reason}")


class ColonError(NtfsError):
    """A path with a colon, which no file has."""

    def __init__(self) -> None:
        super().__init__(errno.ENOENT, os.strerror(errno.ENOENT))

    def told(self, what: str) -> errors.RestoreError:
        """See NtfsError."""
        return errors.PathNotFound(
            f"there is no {what}: no path on NTFS has a ':'; a stream of a file is asked for with the option 'stream'"
        )


class Look(NamedTuple):
    """What an entry is, where its inode tells something else. ``unreadable`` is a reason, or empty."""

    kind: str
    size: int
    mode: int
    target: str
    unreadable: str


class Ntfs:
    """One volume, which ntfs-3g has mounted on the directory ``place`` of this host. Safe to use from threads."""

    def __init__(self, place: str) -> None:
        self._place = os.fsencode(place)

    # --- paths ------------------------------------------------------------------------------------------------------

    def resolve(self, root: int, path: tuple[bytes, ...], flags: int, *, stream: bytes = b"") -> int:
        """Open ``path``, or a stream of what is there, as if ``root`` were ``/``.

        Links are followed, the last one not with O_NOFOLLOW. Raises OSError, NtfsError among them.
        """
        if any(b":" in name for name in path):
            raise ColonError
        if stream:  # also of a link there would be one with this name: its own
            path = self._without_links(root, path, last=True)
            return _open(root, (*path[:-1], (path[-1] if path else b"") + b":" + stream), flags | os.O_NOFOLLOW)
        try:
            return _open(root, path, flags)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        return _open(root, self._without_links(root, path, last=not flags & os.O_NOFOLLOW), flags)

    def _without_links(self, root: int, path: tuple[bytes, ...], *, last: bool) -> tuple[bytes, ...]:
        """The path of the same place with no links in it, except where the ``last`` one is not to be followed."""
        left, done, links = [*reversed(path)], list[bytes](), 0
        while left:
            name = left.pop()
            if name == b"..":
                del done[-1:]
            if name in {b"", b".", b".."}:
                continue
            if b":" in name:  # of a link's target
                raise ColonError
            done.append(name)
            if not (left or last):
                break
            handle = _open(root, tuple(done), os.O_PATH | os.O_NOFOLLOW)
            try:
                if not stat.S_ISLNK(os.fstat(handle).st_mode):
                    continue
                target = self._target(b"", handle)
            finally:
                os.close(handle)
            if (tag := _tag(target)) is not None:
                raise FileNotFoundError(errno.ENOENT, "") if tag in _LINKS else UnfaithfulError(_reason(tag))
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if not target:  # path_resolution(7): an empty path leads nowhere
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            done.clear() if target.startswith(b"/") else done.pop()
            left.extend(reversed(target.split(b"/")))
        return tuple(done)

    def _target(self, name: bytes, directory: int) -> bytes:
        # A damaged link may hold a NUL; what the kernel would follow ends there.
        target = os.readlink(name, dir_fd=directory).split(b"\0")[0]
        if target == self._place or target.startswith(self._place + b"/"):
            return target[len(self._place) :] or b"/"
        return target

    # --- what is there ----------------------------------------------------------------------------------------------

    def look(self, directory: int, name: bytes, status: os.stat_result) -> Look | None:
        """See whether the entry of a directory is something else than ``status`` says. Raises OSError."""
        if stat.S_ISLNK(status.st_mode):
            return self.look_at_link(name, directory)
        if not (stat.S_ISREG(status.st_mode) and status.st_size % _SECTOR == _PADDING):
            return None
        try:
            descriptor = linux.openat2(directory, name, _READ, resolve=_BELOW)
        except OSError as error:
            if error.errno != errno.EIO:  # which is ntfs-3g's answer to one that is only half encrypted
                raise
            return Look("file", status.st_size, _MODE, "", _DAMAGED)
        try:
            if not os.path.samestat(os.fstat(descriptor), status):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return self.look_at_file(descriptor, status)
        finally:
            os.close(descriptor)

    def look_at_link(self, name: bytes, directory: int) -> Look:
        """What a symbolic link is; with an empty ``name`` the descriptor is its own. Raises OSError."""
        target = self._target(name, directory)
        if (tag := _tag(target)) is None:
            return Look("symlink", len(target), 0o777, names.to_text(target), "")
        if tag in _LINKS:
            return Look("symlink", 0, 0o777, "", _LEADS_AWAY)
        return Look("file", 0, _MODE, "", _reason(tag))

    def look_at_file(self, descriptor: int, status: os.stat_result) -> Look | None:
        """The same for an open file; raises OSError when that cannot be found out.

        With a stream's ``status`` this is for the stream; the descriptor is still the file's, or the directory's.
        """
        flags = parse_attributes(self._attribute(descriptor, _ATTRIBUTES))
        size = status.st_size
        if flags & _ENCRYPTED and size:
            return Look("file", size - _PADDING if size % _SECTOR == _PADDING else size, _MODE, "", _EFS)
        if flags & _RECALL_ON_DATA_ACCESS:
            return Look("file", size, _MODE, "", _CLOUD)
        if flags & _OFFLINE and flags & _REPARSE_POINT:  # a plug-in serves it, and may not know of this
            return Look("file", size, _MODE, "", _MIGRATED)
        return None

    def check(self, descriptor: int, status: os.stat_result) -> None:
        """Raises UnfaithfulError for what ``look_at_file`` finds to be unreadable, and OSError."""
        if (look := self.look_at_file(descriptor, status)) is not None:
            raise UnfaithfulError(look.unreadable)

    def streams(self, descriptor: int) -> list[str]:
        """The names of the streams of a file or directory; none if their names together exceed 64 KiB."""
        try:
            return parse_streams(self._attribute(descriptor, _STREAMS))
        except OSError as error:
            if error.errno in {errno.ERANGE, errno.E2BIG}:
                return []
            raise

    def is_stream_of(self, status: os.stat_result, owner: os.stat_result) -> bool:
        """Whether both are of one file, or directory: ntfs-3g gives a stream its owner's number.

        A test's file system, which has no streams of its own, puts another answer here.
        """
        return os.path.samestat(status, owner)

    def _attribute(self, descriptor: int, name: str) -> bytes:
        return os.getxattr(descriptor, name)


def _open(root: int, path: tuple[bytes, ...], flags: int) -> int:
    return linux.openat2(root, b"/".join(path) or b".", flags, resolve=_RESOLVE)


def parse_attributes(value: bytes) -> int:
    """The attributes of a file (FILE_ATTRIBUTE_*). Raises OSError for what are none."""
    if len(value) != 4:
        raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
    flags: int = struct.unpack(">I", value)[0]
    return flags


def parse_streams(value: bytes) -> list[str]:
    """The streams that can be asked for, in text form; the first 8 KiB of them."""
    kept: dict[str, None] = {}  # a set that keeps the order
    size = 0
    for name in value.split(b"\0"):
        if not 0 < len(name) <= names.MAX_NAME or b"/" in name or b":" in name:
            continue
        size += len(name) + 1
        if size > MAX_STREAM_NAMES:
            break
        kept[names.to_text(name)] = None
    return list(kept)


def _tag(target: bytes) -> int | None:
    match = _UNSUPPORTED.fullmatch(target)
    return int(match[1], 16) if match else None


def _reason(tag: int) -> str:
    if tag & _CLOUD_MASK == _CLOUD_TAG:
        return _CLOUD
    if known := _REASONS.get(tag):
        return known
    return f"behind a reparse point of Windows of a kind that cannot be read here (0x{tag:08X}); {_ELSEWHERE}"
