"""A disk's chain of images, walked and checked by us, never by QEMU.

A header can name any file, device or server as its backing file, and QEMU follows it. So every layer is opened
here: by ``openat2`` beneath the repository, judged a plain file before it is opened for reading, its header read by
``qcow2``. QEMU later gets these very descriptors and the whole chain spelled out by ``blockdev``; what a header
names, or what a name leads to after the check, no longer matters.

Names mean what they mean to QEMU: a relative one starts at the directory of the layer that holds it, as that layer
was named; an absolute one must begin with the repository's directory. Symbolic links are followed as long as they
stay beneath the repository, which gives a header no more than it could name directly; a link out, and any absolute
link, is refused by the kernel.

``Image`` owns the descriptors of its layers until ``close``. They are close-on-exec, read-only, and hold no lock, so
the programs that write backups are never kept out by them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from sendense_restored import errors, linux, names

from .qcow2 import Header, Qcow2Error, check_mapping, read_header
from .repositories import open_root

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Format = Literal["qcow2", "raw"]
Locking = Literal["auto", "off"]

_LOWEST = 10
"""The least number that a layer's descriptor has."""
_RESOLVE = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_MAGICLINKS

# QEMU takes a shared lock on byte 100 + N of an image for a permission that it uses and on byte 200 + N for one that
# it denies to others (block/file-posix.c). A conflict with reading are its writers (1), those who may resize it (3),
# and those who change what it shows as a whole, such as a commit job (0, denied).
_QEMU_CONFLICTS = (101, 103, 200)
_FLOCK = struct.Struct("@hhqqi0q")  # struct flock of 64-bit Linux
_NO_LOCKING = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})

# QEMU sets up to 32 MiB of address space aside for each layer's second-level tables, 4 GiB for 128 layers of a large
# disk, which no sensible memory limit of its process lets through. Long chains share what 32 layers would have.
_LAYER_CACHE = 32 << 20
_CHAIN_CACHE = 1 << 30


class Identity(NamedTuple):
    """Which file an open descriptor is, and in which state."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The identity in an fstat result."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Layer:
    """One image of a chain, open."""

    fd: int
    format: Format
    identity: Identity
    path: str
    """Relative to the repository, in the text form of ``names``."""


class Image:
    """A checked chain. Closes its descriptors with ``close`` or at the end of a ``with``."""

    def __init__(
        self, layers: tuple[Layer, ...], virtual_size: int, locking: Locking, descriptors: contextlib.ExitStack
    ) -> None:
        self.layers = layers
        """Top first, base last; empty once closed."""
        self.virtual_size = virtual_size
        """Bytes of the disk: the top's, whatever its backing files have."""
        self.locking = locking
        """``off`` when a layer lies on a file system that has no locks, where QEMU would fail to take its own."""
        self._descriptors = descriptors

    def close(self) -> None:
        """Close all layers; may be called again."""
        self.layers = ()  # a number that is used after this would be somebody else's file
        self._descriptors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_chain(repository: Path, top: str, *, depth: int, allowed: Sequence[Path] | None = None) -> Image:
    """Open and check the chain that begins at ``top``, a path inside ``repository`` or relative to it.

    Blocks as long as the repository's storage does: call it in a thread. ``depth`` is the most layers; ``allowed``:
    see ``repositories``. Errors of a layer name it by its number (1 is the top) and its path in the repository. It
    raises

    - ImageRefused: the repository is not allowed; a layer is damaged or not allowed, or a backing file is missing,
      which breaks the chain;
    - BackupNotFound: the top itself is missing: the catalogue has a backup that the repository has not;
    - BackupNotReady: some program is writing to a layer;
    - Unavailable: the storage cannot be read.
    """
    with _Repository.open(repository, allowed) as root, contextlib.ExitStack() as descriptors:
        path = root.locate(top, PurePosixPath())
        if path is None:
            raise errors.ImageRefused("the disk's path is not inside its repository; correct the catalogue")
        where: _Where | None = _Where(1, path, "qcow2", None)
        layers: list[Layer] = []
        virtual_size = 0
        locking: Locking = "auto"
        while where is not None:
            if where.number > depth:
                raise errors.ImageRefused(
                    f"the chain has more than {depth} layers; merge increments, or raise image.chain_depth"
                )
            with _explained(where, root):
                where = root.without_parents(where)
                fd = _open_file(root, where)
                descriptors.callback(os.close, fd)
                layer = Layer(fd, where.format, Identity.of(os.fstat(fd)), where.text)
                if any(layer.identity[:2] == other.identity[:2] for other in layers):
                    raise errors.ImageRefused(f"{where} is its own backing file: the chain goes in a circle")
                if not _check_unlocked(fd, where):
                    locking = "off"
                header = _read_layer(layer)
            layers.append(layer)
            if header is not None and where.number == 1:
                virtual_size = header.virtual_size
                if not virtual_size:
                    raise errors.ImageRefused(f"{where} holds a disk of zero bytes; choose another disk")
            where = _backing(root, where, header)
        return Image(tuple(layers), virtual_size, locking, descriptors.pop_all())


def changed(image: Image) -> bool:
    """Whether a layer is not the file any more that was checked: written to, truncated, or gone from a server."""
    for layer in image.layers:
        try:
            now = Identity.of(os.fstat(layer.fd))
        except OSError:  # ESTALE on NFS, EIO: what cannot be looked at cannot be called unchanged
            return True
        if now != layer.identity:
            return True
    return False


def blockdev(image: Image, *, locking: Locking | None = None) -> dict[str, object]:
    """The chain as one block node for QEMU (``BlockdevOptions``), each layer explicit, down to ``"backing": null``.

    QEMU then opens nothing but ``/proc/self/fd/N`` of these layers: whoever starts it passes their descriptors on
    under their own numbers. ``locking`` overrides what the image's own file systems can do.
    """
    if not image.layers:
        raise ValueError("the image is closed")
    locking = locking or image.locking
    cache: dict[str, object] = {}
    if len(image.layers) * _LAYER_CACHE > _CHAIN_CACHE:
        cache["l2-cache-size"] = _CHAIN_CACHE // len(image.layers)
    below: dict[str, object] | None = None
    for layer in reversed(image.layers):
        file = {"driver": "file", "filename": f"/proc/self/fd/{layer.fd}", "read-only": True, "locking": locking}
        node: dict[str, object] = {"driver": layer.format, "read-only": True, "file": file}
        if layer.format == "qcow2":
            node |= cache | {"backing": below}
        below = node
    assert below is not None
    return below


@dataclass(frozen=True)
class _Where:
    """A layer that is about to be opened. As text, the beginning of a sentence about it."""

    number: int
    path: PurePosixPath
    """Relative to the repository."""
    format: Format
    named_by: _Where | None

    @property
    def text(self) -> str:
        return names.to_text(os.fsencode(self.path))

    @property
    def shown(self) -> str:
        return names.displayable(self.text)

    def __str__(self) -> str:
        return f"layer {self.number} of the chain ({self.shown})"


@dataclass(frozen=True)
class _Repository:
    """The directory that no layer may leave, held open for one walk."""

    fd: int
    spellings: tuple[PurePosixPath, ...]
    """Its absolute paths: as configured, and with the links in that resolved."""

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, allowed: Sequence[Path] | None) -> Iterator[_Repository]:
        """Hold ``path`` open. Raises errors.Unavailable, ImageRefused."""
        try:
            fd, real = open_root(path, allowed)
        except OSError as error:
            raise errors.Unavailable(
                f"the repository cannot be reached ({error.strerror}); check that its storage is mounted"
            ) from None
        try:
            yield cls(fd, (PurePosixPath(path), real))
        finally:
            os.close(fd)

    def locate(self, name: str, directory: PurePosixPath) -> PurePosixPath | None:
        """The path in the repository that ``name`` means in ``directory``; None if it is plainly elsewhere.

        Only the beginning of an absolute name is judged here. Where ``..`` and links lead, the kernel judges.
        """
        if not name or "\0" in name:
            return None
        if not name.startswith("/"):
            return directory / name
        path = PurePosixPath("/" + name.lstrip("/"))  # pathlib keeps a double slash at the start apart
        for spelling in self.spellings:
            if path.is_relative_to(spelling):
                return path.relative_to(spelling)
        return None

    def without_parents(self, where: _Where) -> _Where:
        """``where`` with the ``..`` in its path resolved by the kernel.

        In a chain whose backing files are called ``../day-1/disk``, paths would grow with every layer. Taking the
        ``..`` out of the text would be wrong behind a symbolic link. Raises OSError.
        """
        if ".." not in where.path.parts:
            return where
        parent = linux.openat2(self.fd, os.fsencode(where.path.parent), os.O_PATH | os.O_DIRECTORY, resolve=_RESOLVE)
        try:
            directory, base = (Path(f"/proc/self/fd/{fd}").readlink() for fd in (parent, self.fd))
        finally:
            os.close(parent)
        if not directory.is_relative_to(base):  # moved away since it was opened
            return where
        return replace(where, path=PurePosixPath(directory.relative_to(base), where.path.name))

    def is_empty(self) -> bool:
        """Whether nothing is in it, as when its storage is not mounted."""
        try:
            with os.scandir(f"/proc/self/fd/{self.fd}") as entries:
                return next(entries, None) is None
        except OSError:
            return False


def _open_file(root: _Repository, where: _Where) -> int:
    """Open a layer for reading, if it is a regular file. Raises ImageRefused and OSError.

    O_PATH first: opening a device can already do something, and a FIFO would have a reader.
    """
    handle = linux.openat2(root.fd, os.fsencode(where.path), os.O_PATH, resolve=_RESOLVE)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise errors.ImageRefused(f"{where} is not a regular file, and only those are read; correct the chain")
        file = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    finally:
        os.close(handle)
    try:
        # QEMU gets it under the same number, and to programs the first few mean something (3: sd_listen_fds(3)).
        return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, _LOWEST)
    finally:
        os.close(file)


def _check_unlocked(fd: int, where: _Where) -> bool:
    """Refuse a layer that some program writes to; False if its file system has no locks to tell by.

    Only asks (F_OFD_GETLK): a lock of ours, held for a moment, could make a backup job fail. Raises BackupNotReady.
    """
    # An exclusive lock anywhere is somebody's way to say the same; QEMU's own locks are all shared ones.
    questions = [(fcntl.F_RDLCK, 0, 0), *((fcntl.F_WRLCK, byte, 1) for byte in _QEMU_CONFLICTS)]
    for kind, start, length in questions:
        question = _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
        try:
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question)
        except OSError as error:
            if error.errno in _NO_LOCKING:
                return False
            raise
        if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
            raise errors.BackupNotReady(f"{where} is being written by another program; try again when that is done")
    return True


def _read_layer(layer: Layer) -> Header | None:
    """The checked header of a layer, None for a raw one. Raises Qcow2Error and OSError."""
    if layer.format == "raw":
        return None
    header = read_header(layer.fd, layer.identity.size)
    check_mapping(layer.fd, layer.identity.size, header)
    return header


def _backing(root: _Repository, where: _Where, header: Header | None) -> _Where | None:
    """Which layer comes below ``where``, None below a base. Raises ImageRefused."""
    if header is None or header.backing is None:
        return None
    # What QEMU takes for a protocol (nbd:, json:, fat: ...): a colon before any slash.
    if ":" in header.backing.partition("/")[0]:
        raise errors.ImageRefused(
            f"{where} names its backing file through a protocol, and only plain paths are allowed; "
            "set a path with 'qemu-img rebase -u'"
        )
    if header.backing_format is None:
        raise errors.ImageRefused(
            f"{where} does not say which format its backing file has; state it with 'qemu-img rebase -u -F'"
        )
    if header.backing_format not in ("qcow2", "raw"):
        raise errors.ImageRefused(
            f"{where} has a backing file of format '{names.displayable(header.backing_format)}', "
            "and only qcow2 and raw are read; convert it"
        )
    path = root.locate(header.backing, where.path.parent)
    if path is None:
        raise _outside(where)
    return _Where(where.number + 1, path, "raw" if header.backing_format == "raw" else "qcow2", where)


def _outside(named_by: _Where | None) -> errors.ImageRefused:
    # The name itself is not repeated: it could tell what lies elsewhere on the host.
    if named_by is None:
        return errors.ImageRefused("the disk's path leads out of its repository; correct the catalogue")
    return errors.ImageRefused(
        f"{named_by} has a backing file outside the repository, or behind a link that leads out; "
        "move it into the repository and rebase"
    )


@contextlib.contextmanager
def _explained(where: _Where, root: _Repository) -> Iterator[None]:
    """Turn what goes wrong with a layer into an error of the list, once, here."""
    try:
        yield
    except Qcow2Error as error:
        raise errors.ImageRefused(f"{where} {error}") from None
    except OSError as error:
        raise _explain(error, where, root) from None


def _explain(error: OSError, where: _Where, root: _Repository) -> errors.RestoreError:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return _missing(where, root)
        case errno.EXDEV:
            return _outside(where.named_by)
        case errno.ELOOP:
            return errors.ImageRefused(f"{where} lies behind symbolic links that go in a circle; correct them")
        case errno.ENAMETOOLONG:
            return errors.ImageRefused(f"{where} has a path that is too long to be opened; use shorter names")
        case errno.EAGAIN:  # somebody's lease (fcntl(2)), or directories that are moved about under our feet
            return errors.BackupNotReady(f"{where} is held by another program; try again when that is done")
        case _:
            return errors.Unavailable(f"{where} cannot be read ({error.strerror}); check the repository's storage")


def _missing(where: _Where, root: _Repository) -> errors.RestoreError:
    if root.is_empty():
        return errors.Unavailable("the repository is empty; check that its storage is mounted")
    if where.named_by is None:
        return errors.BackupNotFound(
            f"the disk's image ({where.shown}) is not in the repository any more; choose another backup"
        )
    return errors.ImageRefused(f"{where} is missing; bring it back, or choose an older backup")
