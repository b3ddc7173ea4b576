"""The header of a QCOW2 image, read by ourselves.

Format only, no policy: this file knows what the bytes mean (QEMU's ``docs/interop/qcow2.txt``, versions 2 and 3) and
refuses what contradicts itself, what is damaged and what could not be read faithfully. Where a name in a header may
lead is decided in ``image``. Nothing is followed, cached or written, and the caller keeps the descriptor.
"""

from __future__ import annotations

import enum
import os
import struct
import sys
from array import array
from dataclasses import dataclass
from typing import Literal

MAGIC = b"QFI\xfb"
LONGEST_NAME = 1023
"""Bytes of a backing file's name, as the format has it."""

_COMMON = struct.Struct(">4sIQIIQIIQQIIQ")  # all of version 2, the beginning of version 3
_VERSION_3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_EXTENSION_END = 0
_EXTENSION_BACKING_FORMAT = 0xE2792ACA
_COMPRESSION_TYPE_AT = _COMMON.size + _VERSION_3.size
_COMPRESSIONS: dict[int, Literal["zlib", "zstd"]] = {0: "zlib", 1: "zstd"}
_LONGEST_FORMAT = 15  # as in QEMU
_AUTOCLEAR_RAW_DATA_FILE = 1 << 1

# QEMU refuses larger tables, and so bounds what one header can make it, or us, read.
_MOST_L1 = 32 << 20
_MOST_REFCOUNT_TABLE = 8 << 20
_MOST_SNAPSHOTS = 65536
_MOST_OFFSET = 1 << 63
_SMALLEST_SNAPSHOT = 40

_SECTOR = 512
_L1_OFFSET = 0x00FF_FFFF_FFFF_FE00
_L1_CHUNK = 64 << 10


class Qcow2Error(Exception):
    """The image cannot be used. The message is the rest of a sentence that begins with the name of the file."""


class Incompatible(enum.IntFlag):
    """Features that a program must know to read the image."""

    DIRTY = 1 << 0
    """Reference counts may be stale; only a writer needs them."""
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


_KNOWN = sum(Incompatible)


@dataclass(frozen=True)
class Header:
    """What one image says of itself. Sizes and offsets are bytes."""

    version: int
    cluster_size: int
    virtual_size: int
    backing: str | None
    """The backing file's name as it stands there, undecodable bytes as surrogates (``os.fsencode`` gives them back);
    None for a base."""
    backing_format: str | None
    incompatible: Incompatible
    compression: Literal["zlib", "zstd"]
    l1_offset: int
    l1_entries: int
    """Entries of the first-level table that the disk needs; the table may be longer."""
    format: Literal["qcow2"] = "qcow2"


def read_header(fd: int, size: int) -> Header:
    """The header of the open file ``fd``, which is ``size`` bytes long.

    Raises Qcow2Error, and OSError if the file cannot be read.
    """
    first = _first_cluster(fd)
    fields = _COMMON.unpack_from(first)
    version, backing_at, backing_length, cluster_bits, disk_size, encryption = fields[1:7]
    l1_length, l1_at, refcounts_at, refcount_clusters, snapshots, snapshots_at = fields[7:]
    cluster_size = len(first)
    incompatible, compression, header_length = Incompatible(0), 0, _COMMON.size
    if version == 3:
        incompatible, compression, header_length = _version_3(first)
    if compression not in _COMPRESSIONS or bool(compression) != (Incompatible.COMPRESSION in incompatible):
        raise Qcow2Error(f"has compression type {compression}, and this program reads zlib and zstd; convert it")
    if encryption:
        raise Qcow2Error("is encrypted by QCOW2 itself, which cannot be opened here; convert it to a plain image")
    extended = Incompatible.EXTENDED_L2 in incompatible
    if extended and cluster_bits < 14:
        raise Qcow2Error(f"is damaged: clusters of 2^{cluster_bits} bytes cannot have extended entries")
    # One first-level entry covers one cluster full of second-level entries, of 8 bytes or (extended) 16.
    needed = -(-disk_size // (cluster_size * (cluster_size // (16 if extended else 8))))
    if l1_length < needed:
        raise Qcow2Error("is damaged: its first-level table is too short for the size of its disk")
    if not refcount_clusters:
        raise Qcow2Error("is damaged: it has no reference counts")
    for what, offset, length, most in (
        ("first-level table", l1_at, l1_length * 8, _MOST_L1),
        ("reference count table", refcounts_at, refcount_clusters * cluster_size, _MOST_REFCOUNT_TABLE),
        ("snapshot table", snapshots_at, snapshots * _SMALLEST_SNAPSHOT, _MOST_SNAPSHOTS * _SMALLEST_SNAPSHOT),
    ):
        if length > most or offset % cluster_size or offset + length >= _MOST_OFFSET:
            raise Qcow2Error(f"is damaged: its {what} is too large or at an impossible place")
        if length and offset + length > size:
            raise Qcow2Error(f"is cut off before the end of its {what}; copy it again from where it came")
    return Header(
        version=version,
        cluster_size=cluster_size,
        virtual_size=disk_size - disk_size % _SECTOR,  # as QEMU has it: a last part of a sector is not there
        backing=_backing_name(first, backing_at, backing_length) if backing_at else None,
        backing_format=_backing_format(first, header_length, backing_at or cluster_size),
        incompatible=incompatible,
        compression=_COMPRESSIONS[compression],
        l1_offset=l1_at,
        l1_entries=needed,
    )


def check_mapping(fd: int, size: int, header: Header) -> None:
    """Check that every part of the image's mapping lies inside the file.

    QEMU reads zeros beyond the end of a file. A mapping out there, as in a copy that broke off, would make it show
    the backing file's old contents, or zeros, as the disk's own, without an error. Raises Qcow2Error and OSError.
    """
    end = header.l1_offset + header.l1_entries * 8
    for position in range(header.l1_offset, end, _L1_CHUNK):
        chunk = os.pread(fd, min(_L1_CHUNK, end - position), position)
        if len(chunk) < min(_L1_CHUNK, end - position):
            raise Qcow2Error("is cut off before the end of its first-level table; copy it again from where it came")
        entries = array("Q", chunk)
        if sys.byteorder == "little":
            entries.byteswap()
        for entry in entries:
            offset = entry & _L1_OFFSET
            if offset % header.cluster_size:
                raise Qcow2Error("is damaged: a second-level table is not at the start of a cluster")
            if offset >= size:
                raise Qcow2Error("is cut off before the end of its mapping; copy it again from where it came")


def _first_cluster(fd: int) -> bytes:
    """The first cluster, which holds the header, its extensions and the backing file's name."""
    start = os.pread(fd, _COMMON.size, 0)
    if not start.startswith(MAGIC):
        raise Qcow2Error("is not a QCOW2 image; check the disk's path in the catalogue")
    if len(start) < _COMMON.size:
        raise Qcow2Error("is cut off inside its header; copy it again from where it came")
    version, cluster_bits = struct.unpack_from(">I", start, 4)[0], struct.unpack_from(">I", start, 20)[0]
    if version not in {2, 3}:
        raise Qcow2Error(f"has version {version} of the QCOW2 format, and this program reads 2 and 3; convert it")
    if not 9 <= cluster_bits <= 21:
        raise Qcow2Error(f"is damaged: its clusters cannot have 2^{cluster_bits} bytes")
    first = os.pread(fd, 1 << cluster_bits, 0)
    if len(first) < 1 << cluster_bits:
        raise Qcow2Error("is cut off inside its header; copy it again from where it came")
    return first


def _version_3(first: bytes) -> tuple[Incompatible, int, int]:
    """What only version 3 has: the features, the number of the compression type, the header's length in bytes."""
    bits, _, autoclear, refcount_order, length = _VERSION_3.unpack_from(first, _COMMON.size)
    if not _COMPRESSION_TYPE_AT <= length <= len(first) or length % 8:
        raise Qcow2Error(f"is damaged: its header cannot have {length} bytes")
    if refcount_order > 6:
        raise Qcow2Error(f"is damaged: its reference counts cannot have 2^{refcount_order} bits")
    return _features(bits, autoclear), first[_COMPRESSION_TYPE_AT] if length > _COMPRESSION_TYPE_AT else 0, length


def _features(bits: int, autoclear: int) -> Incompatible:
    if bits & Incompatible.CORRUPT:
        raise Qcow2Error("is marked as corrupt by the program that wrote it; see what 'qemu-img check' says")
    # The second bit claims a data file for an image without one, which contradicts itself.
    if bits & Incompatible.DATA_FILE or autoclear & _AUTOCLEAR_RAW_DATA_FILE:
        raise Qcow2Error("keeps its data in another file, which is not allowed here; convert it to a plain image")
    if unknown := bits & ~_KNOWN:
        raise Qcow2Error(f"needs features that this program does not know (bits {unknown:#x}); convert it")
    return Incompatible(bits)


def _backing_name(first: bytes, offset: int, length: int) -> str:
    if not length:
        raise Qcow2Error("has a backing file whose name is empty; set the right one with 'qemu-img rebase -u'")
    if length > LONGEST_NAME:
        raise Qcow2Error(f"has a backing file whose name is longer than {LONGEST_NAME} bytes")
    if offset + length > len(first):
        raise Qcow2Error("is damaged: the name of its backing file is not in its first cluster")
    name = first[offset : offset + length]
    if b"\0" in name:
        raise Qcow2Error("has a backing file whose name holds a NUL character")
    return os.fsdecode(name)


def _backing_format(first: bytes, start: int, end: int) -> str | None:
    """The backing file's format, from the header's extensions in ``first[start:end]``."""
    found, end = None, min(end, len(first))
    # Both 72 and every longer header length are multiples of 8, as are extensions: the two words are there.
    while start < end:
        kind, length = _EXTENSION.unpack_from(first, start)
        start += _EXTENSION.size
        if length > end - start:
            raise Qcow2Error("is damaged: its header extensions run into what follows them")
        if kind == _EXTENSION_END:
            break
        if kind == _EXTENSION_BACKING_FORMAT:
            if length > _LONGEST_FORMAT:
                raise Qcow2Error("is damaged: no format has a name as long as the one of its backing file")
            found = first[start : start + length].decode("ascii", "backslashreplace")
        start += (length + 7) & ~7
    return found
