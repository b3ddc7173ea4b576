"""Guest paths below a volume's root: stat and open.

Every function takes the root as an O_PATH descriptor and a path as components. The kernel resolves the path as if the
root were ``/`` (RESOLVE_IN_ROOT): absolute links of the guest and ``..`` in them stay inside, magic links and other
mounts are refused. What an OSError means to a client is decided here: in ``refused`` for a path that was asked for,
in ``problem`` for what was met on the way.

The volume is read-only, but its driver may be hostile: nothing is opened before its type is known, and nothing is
believed to be the same because it has the same name.

A volume of NTFS comes with an ``Ntfs``, which resolves its paths instead of the kernel and knows what is not what it
looks like; for all others ``ntfs`` is None, and costs nothing.
"""

from __future__ import annotations

import errno
import os
import stat as stat_module
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sendense_restored import errors, linux, names

from .ntfs import NtfsError
from .protocol import I64, MAX_XATTRS, U32, U64, FileInfo, Usage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .ntfs import Ntfs

_RESOLVE = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS | linux.RESOLVE_NO_XDEV
# O_NOATIME is left out: it takes the owner's rights, and the mount is read-only anyway.
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
_LONGEST_SHOWN = 200

KINDS = {
    stat_module.S_IFREG: "file",
    stat_module.S_IFDIR: "directory",
    stat_module.S_IFLNK: "symlink",
    stat_module.S_IFIFO: "fifo",
    stat_module.S_IFSOCK: "socket",
    stat_module.S_IFBLK: "block",
    stat_module.S_IFCHR: "char",
}
_WITH_ARTICLE = {
    "directory": "a directory",
    "symlink": "a symbolic link",
    "fifo": "a named pipe",
    "socket": "a socket",
    "block": "a block device",
    "char": "a character device",
    "file": "a file",
}

_DAMAGED = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ESTALE})
NO_RESOURCES = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR})
_SHORT = "the mount's reader is short of memory or descriptors; try again in a moment"


def shown(path: tuple[bytes, ...]) -> str:
    """``path`` in quotes as a message may show it, shortened in the middle."""
    return _quoted(names.format_path(path))


def _quoted(text: str) -> str:
    text = names.displayable(text)
    if len(text) > _LONGEST_SHOWN:
        text = f"{text[: _LONGEST_SHOWN // 2]}...{text[-_LONGEST_SHOWN // 2 :]}"
    return f"'{text}'"


def refused(error: OSError, path: tuple[bytes, ...]) -> errors.RestoreError:
    """The error for a client, from what the kernel said about ``path``."""
    number, what = error.errno, shown(path)
    if isinstance(error, NtfsError):
        return error.told(what)
    if number in {errno.ENOENT, errno.ENOTDIR}:
        return errors.PathNotFound(f"there is no {what} in this volume; list the directory above it")
    if number == errno.ELOOP:
        # The path itself is fine, so this is no InvalidPath: what it names does not exist.
        return errors.PathNotFound(f"the symbolic links of {what} lead in a circle; no file is at their end")
    if number == errno.ENAMETOOLONG:
        return errors.InvalidPath(f"{what} is longer than this volume's file system allows")
    if number in NO_RESOURCES:
        return errors.Unavailable(_SHORT)
    return errors.Unreadable(_unreadable(number, what, f"at {what}"))


def problem(error: OSError) -> str:
    """Why what was listed a moment ago cannot be looked at, from what the kernel said; its path stands beside it."""
    number = error.errno
    if number in NO_RESOURCES:
        return _SHORT
    if number in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
        number = errno.EUCLEAN  # a file system that does not change says both that it is there and that it is not
    return _unreadable(number, "it", "here")


def _unreadable(number: int | None, what: str, where: str) -> str:
    reason = f"did not give {what} ({os.strerror(number) if number else 'unknown error'})"
    if number in _DAMAGED:
        reason = f"is damaged {where}, or its storage failed"
    return f"the file system {reason}; try an older backup"


def _resolve(root: int, path: tuple[bytes, ...], flags: int, ntfs: Ntfs | None, stream: bytes = b"") -> int:
    if ntfs is not None:
        return ntfs.resolve(root, path, flags, stream=stream)
    return linux.openat2(root, b"/".join(path) or b".", flags, resolve=_RESOLVE)


def clamped(nanoseconds: int) -> int:
    """A time that fits 64 bits."""
    # ext4 knows years beyond 2400, whose nanoseconds exceed 64 bits.
    return max(-I64 - 1, min(nanoseconds, I64))


def _kind(status: os.stat_result) -> str:
    return KINDS.get(stat_module.S_IFMT(status.st_mode), "")


def usage(root: int) -> Usage:
    """How full the volume is; zeros if it cannot say."""
    try:
        counts = os.fstatvfs(root)
    except OSError:
        return Usage(0, 0)
    size = counts.f_blocks * counts.f_frsize
    used = max(counts.f_blocks - counts.f_bfree, 0) * counts.f_frsize
    return Usage(min(size, U64), min(used, U64))


# --- open -------------------------------------------------------------------------------------------------------


def open_file(
    root: int,
    path: tuple[bytes, ...],
    *,
    stream: bytes = b"",
    most: int | None = None,
    ntfs: Ntfs | None = None,
) -> tuple[int, FileInfo]:
    """A read-only descriptor of the regular file at ``path``, which belongs to the caller; links are followed.

    With ``stream`` it is that of an alternate stream of the file or directory, which only ``ntfs`` has. ``most`` is
    the largest size that is wanted.

    Three steps, because opening is an act: it wakes the writer of a FIFO and reaches the driver of a device. First
    O_PATH, which opens nothing; the type is decided on that. Then the open that counts, by path, since an empty root
    has no /proc to reopen a descriptor through, and O_NONBLOCK in case that something else stands there now. Last
    proof that both are one inode. Raises NotAFile, PathNotFound, InvalidPath, Unreadable, TooLarge or Unavailable.
    """
    try:
        handle = _resolve(root, path, os.O_PATH, ntfs)
    except OSError as error:
        raise refused(error, path) from None
    try:
        status = os.fstat(handle)
        if stream:
            assert ntfs is not None, "only NTFS has streams"
            return _open_stream(root, path, status, stream, most, ntfs)
        if not stat_module.S_ISREG(status.st_mode):
            what = _WITH_ARTICLE.get(_kind(status), "no file")
            raise errors.NotAFile(f"{shown(path)} is {what}, and only regular files can be opened")
        _check_size(path, status, most)
        descriptor = _open_same(root, path, status, ntfs)
        if ntfs is not None:
            with _closed_on_failure(descriptor):
                ntfs.check(descriptor, status)
        return descriptor, _info(status, "", [], "")
    except OSError as error:
        raise refused(error, path) from None
    finally:
        os.close(handle)


def _open_stream(
    root: int, path: tuple[bytes, ...], status: os.stat_result, stream: bytes, most: int | None, ntfs: Ntfs
) -> tuple[int, FileInfo]:
    """The same three steps for a stream of what ``status`` describes. Raises OSError besides."""
    if _kind(status) not in {"file", "directory"}:
        what = _WITH_ARTICLE.get(_kind(status), "no file")
        raise errors.NotAFile(f"{shown(path)} is {what}; only files and directories have streams")
    # What the stream itself does not tell is asked of the one that it belongs to.
    owner = _open_same(root, path, status, ntfs)
    try:
        try:
            handle = _resolve(root, path, os.O_PATH, ntfs, stream)
        except FileNotFoundError:
            what = f"{shown(path)} has no stream {_quoted(names.to_text(stream))}"
            raise errors.PathNotFound(f"{what}; GetFileInfo tells those it has") from None
        try:
            found = os.fstat(handle)
            if not (stat_module.S_ISREG(found.st_mode) and ntfs.is_stream_of(found, status)):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            _check_size(path, found, most)
            ntfs.check(owner, found)
            return _open_same(root, path, found, ntfs, stream=stream), _info(found, "", [], "")
        finally:
            os.close(handle)
    finally:
        os.close(owner)


def _check_size(path: tuple[bytes, ...], status: os.stat_result, most: int | None) -> None:
    if most is not None and status.st_size > most:
        raise errors.TooLarge(
            f"{shown(path)} has {status.st_size} bytes, and files of more than {most} are not given out here; "
            "ask an administrator to raise limits.file_bytes"
        )


def _open_same(
    root: int,
    path: tuple[bytes, ...],
    status: os.stat_result,
    ntfs: Ntfs | None,
    flags: int = 0,
    stream: bytes = b"",
) -> int:
    """Open what ``status`` describes. Raises OSError, ESTALE if the path now leads elsewhere."""
    descriptor = _resolve(root, path, _READ | flags, ntfs, stream)
    with _closed_on_failure(descriptor):
        opened = os.fstat(descriptor)
        if not (os.path.samestat(status, opened) and status.st_mode == opened.st_mode):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return descriptor


@contextmanager
def _closed_on_failure(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise


# --- stat -------------------------------------------------------------------------------------------------------


def stat(root: int, path: tuple[bytes, ...], *, ntfs: Ntfs | None = None) -> FileInfo:
    """What is known of ``path``; a link at its end is described, not followed.

    Files and directories are opened too: only so their attribute names can be read, and a file that does not open is
    told apart. Raises PathNotFound, InvalidPath, Unreadable or Unavailable.
    """
    try:
        handle = _resolve(root, path, os.O_PATH | os.O_NOFOLLOW, ntfs)
        try:
            status = os.fstat(handle)
            target, look = "", None
            if stat_module.S_ISLNK(status.st_mode):
                if ntfs is None:
                    target = link_target(b"", handle)
                else:
                    look = ntfs.look_at_link(b"", handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise refused(error, path) from None
    xattrs, streams, unreadable = list[str](), list[str](), ""
    if stat_module.S_ISREG(status.st_mode) or stat_module.S_ISDIR(status.st_mode):
        try:
            descriptor = _open_same(root, path, status, ntfs, os.O_NOFOLLOW)
            try:
                if ntfs is None:
                    xattrs = _xattrs(descriptor)
                else:  # it lists none, and answers the question with the error of an earlier one (2022.10.3)
                    streams = ntfs.streams(descriptor)
                    if stat_module.S_ISREG(status.st_mode):  # of a directory the flags are for what is made in it
                        look = ntfs.look_at_file(descriptor, status)
            finally:
                os.close(descriptor)
        except OSError as error:
            unreadable = refused(error, path).message
    elif not _kind(status):
        unreadable = refused(OSError(errno.EUCLEAN, ""), path).message
    info = _info(status, target, xattrs, unreadable)._replace(streams=streams)
    return info if look is None else info._replace(**look._asdict())


def _info(status: os.stat_result, target: str, xattrs: list[str], unreadable: str) -> FileInfo:
    times = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
    atime, mtime, ctime = map(clamped, times)
    return FileInfo(
        kind=_kind(status) or "file",
        size=max(status.st_size, 0),
        allocated=min(max(status.st_blocks, 0) * 512, U64),
        mode=stat_module.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        atime_ns=atime,
        mtime_ns=mtime,
        ctime_ns=ctime,
        nlink=min(status.st_nlink, U32),
        target=target,
        xattrs=xattrs,
        streams=[],
        unreadable=unreadable,
        time_clamped=(atime, mtime, ctime) != times,
    )


def link_target(name: bytes, directory: int) -> str:
    """Where a symbolic link leads, in text form. Raises OSError."""
    # A damaged link may hold a NUL; what the kernel follows ends there.
    return names.to_text(os.readlink(name, dir_fd=directory).split(b"\0")[0])


def _xattrs(descriptor: int) -> list[str]:
    """The names of the file's extended attributes, the first 16 KiB of them; none where there are no such things."""
    try:
        found = [os.fsencode(name) for name in os.listxattr(descriptor)]
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return []
        raise
    kept, size = [], 0
    for name in found:
        size += len(name)
        if size > MAX_XATTRS:
            break
        kept.append(names.to_text(name))
    return kept


# --- directories --------------------------------------------------------------------------------------------------


def open_directory(root: int, path: tuple[bytes, ...], *, ntfs: Ntfs | None = None) -> int:
    """A descriptor of a directory, to be read; links to it are followed.

    Raises NotADirectory, PathNotFound, InvalidPath, Unreadable or Unavailable.
    """
    try:
        # O_DIRECTORY fails on anything else before it is opened (open(2)).
        return _resolve(root, path, _READ | os.O_DIRECTORY, ntfs)
    except OSError as error:
        if error.errno == errno.ENOTDIR and _exists(root, path, ntfs):
            raise errors.NotADirectory(f"{shown(path)} is not a directory; list the directory above it") from None
        raise refused(error, path) from None


def _exists(root: int, path: tuple[bytes, ...], ntfs: Ntfs | None) -> bool:
    try:
        os.close(_resolve(root, path, os.O_PATH, ntfs))
    except OSError:
        return False
    return True
