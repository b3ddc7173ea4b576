"""A GUID partition table, as UEFI 2.10 (chapter 5) has it.

Written here rather than by sfdisk: that one ends with a sync of every file system of the machine, which takes as long
as the slowest of them, and for ever if one is stuck.
"""

from __future__ import annotations

import os
import struct
import uuid
import zlib
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Sequence

_SECTOR = 512
_LINUX_DATA = uuid.UUID("0FC63DAF-8483-4772-8E79-3D69D8477DE4")
_ENTRIES, _ENTRY = 128, struct.Struct("<16s16sQQQ72x")
_ENTRY_SECTORS = _ENTRIES * _ENTRY.size // _SECTOR
_HEADER = struct.Struct("<8s4sIIIQQQQ16sQIII")


def write(disk: BinaryIO, partitions: Sequence[tuple[int, int]]) -> None:
    """Write a table of ``(start, size)`` partitions, in sectors, to both ends of ``disk``."""
    last = disk.seek(0, os.SEEK_END) // _SECTOR - 1
    entries = b"".join(
        _ENTRY.pack(_LINUX_DATA.bytes_le, uuid.uuid4().bytes_le, start, start + size - 1, 0)
        for start, size in partitions
    ).ljust(_ENTRIES * _ENTRY.size, b"\0")
    identity = uuid.uuid4().bytes_le
    table, backup_table = 2, last - _ENTRY_SECTORS
    _put(disk, 0, _protective_mbr(last))
    _put(disk, table, entries)
    _put(disk, backup_table, entries)
    for here, other, at in ((1, last, table), (last, 1, backup_table)):
        _put(disk, here, _header(here, other, table + _ENTRY_SECTORS, backup_table - 1, identity, at, entries))


def _header(here: int, other: int, first: int, final: int, identity: bytes, at: int, entries: bytes) -> bytes:
    def packed(checksum: int) -> bytes:
        return _HEADER.pack(
            *(b"EFI PART", b"\0\0\1\0", _HEADER.size, checksum, 0, here, other, first, final, identity),
            *(at, _ENTRIES, _ENTRY.size, zlib.crc32(entries)),
        )

    return packed(zlib.crc32(packed(0)))


def _protective_mbr(last: int) -> bytes:
    """One partition over the whole disk, so that tools which know nothing of GPT do not take it for empty."""
    entry = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, min(last, 0xFFFFFFFF))
    return bytes(446) + entry + bytes(48) + b"\x55\xaa"


def _put(disk: BinaryIO, sector: int, content: bytes) -> None:
    disk.seek(sector * _SECTOR)
    disk.write(content)
