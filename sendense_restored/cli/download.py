"""A guest file's content, from its descriptor into a file of this host.

The new file has no name until it is complete: it is born unnamed (O_TMPFILE), so that no end of this process leaves
half a file behind, not even SIGKILL. Where the file system cannot do that it has a temporary name, removed on every
way out that a process sees. It gets its name in one step that never replaces a file unless that was asked for.
"""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from sendense_restored import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_CHUNK = 1 << 20
_NO_UNNAMED_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}


def save(
    source: int, target: Path, *, size: int, mode: int, mtime_ns: int, force: bool, copied: Callable[[int], object]
) -> None:
    """Copy ``source``, a file of ``size`` bytes, to ``target``; holes stay holes.

    ``mode`` is restricted by the umask and loses set-id bits. ``copied`` hears how many bytes are done. Raises
    FileExistsError if there is a ``target`` and no ``force``, OSError for this host's troubles, Unavailable for the
    backup's.
    """
    directory = os.open(target.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _unpublished(directory) as (new, temporary):
            _copy(source, new, size, copied)
            os.fchmod(new, mode & 0o777 & ~_umask())
            os.utime(new, ns=(mtime_ns, mtime_ns))
            os.fsync(new)
            _publish(new, temporary, directory, target.name, force=force)
    finally:
        os.close(directory)


@contextmanager
def _unpublished(directory: int) -> Iterator[tuple[int, str]]:
    """A new file in ``directory`` and its temporary name, under which it need not exist."""
    temporary = f".sendense-restore-{secrets.token_hex(8)}.part"
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        try:
            new = os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=directory)
        except OSError as error:
            if error.errno not in _NO_UNNAMED_FILES:
                raise
            new = os.open(temporary, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
        try:
            yield new, temporary
        finally:
            os.close(new)
    finally:
        _remove(temporary, directory)


def _publish(new: int, temporary: str, directory: int, name: str, *, force: bool) -> None:
    unnamed = os.fstat(new).st_nlink == 0
    if not force and unnamed:
        _link(new, name, directory)
        return
    if unnamed:
        _link(new, temporary, directory)
    if not force:
        # Takes the name if it is free; rename alone would replace whatever has it.
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory))
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)


def _link(new: int, name: str, directory: int) -> None:
    os.link(f"/proc/self/fd/{new}", name, dst_dir_fd=directory, follow_symlinks=True)


def _remove(name: str, directory: int) -> None:
    with suppress(FileNotFoundError):  # it never had the name, or has its real one by now
        os.unlink(name, dir_fd=directory)


def _copy(source: int, new: int, size: int, copied: Callable[[int], object]) -> None:
    _check_size(source, size)
    buffer = memoryview(bytearray(_CHUNK))
    position = 0
    while (extent := _next_data(source, position, size)) is not None:
        position, end = extent
        while position < end:
            count = _read(source, buffer[: min(_CHUNK, end - position)], position)
            written = 0
            while written < count:
                written += os.pwrite(new, buffer[written:count], position + written)
            position += count
            copied(position)
    _check_size(source, size)
    os.ftruncate(new, size)
    copied(size)


def _check_size(source: int, size: int) -> None:
    # A file that is, or became, shorter would look as if it ended in a hole.
    if os.fstat(source).st_size != size:
        raise errors.Failed("the file's size is not what the service says; mount the backup again and repeat")


def _next_data(source: int, position: int, size: int) -> tuple[int, int] | None:
    """Where data begins and ends, from ``position`` on; None if nothing but a hole is left."""
    if position >= size:
        return None
    try:
        start = os.lseek(source, position, os.SEEK_DATA)
        return start, min(os.lseek(source, start, os.SEEK_HOLE), size)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise _unreadable(error, position) from None


def _read(source: int, buffer: memoryview, position: int) -> int:
    try:
        count = os.preadv(source, [buffer], position)
    except OSError as error:
        raise _unreadable(error, position) from None
    if count == 0:
        raise errors.Unavailable(f"the file ends early, after {position} bytes; mount the backup again and repeat")
    return count


def write_out(source: int, output: int) -> None:
    """Write all of ``source`` to the descriptor ``output``. Raises as ``save``."""
    buffer = memoryview(bytearray(_CHUNK))
    position, size = 0, os.fstat(source).st_size
    while position < size:
        count = _read(source, buffer[: min(_CHUNK, size - position)], position)
        written = 0
        while written < count:
            written += os.write(output, buffer[written:count])
        position += count


def _unreadable(error: OSError, position: int) -> errors.Unavailable:
    return errors.Unavailable(
        f"reading stopped after {position} bytes ({error.strerror}): the mount was closed or its image cannot be "
        "read; mount the backup again and repeat"
    )


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
