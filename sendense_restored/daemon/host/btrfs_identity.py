"""Gives a btrfs another identity: the program ``btrfs_identity.py DEVICE UUID``, run in a jail, on an overlay.

A kernel before Linux 6.7 takes two file systems of one UUID for the same, and refuses the second, be it an older
backup of the machine, or the very one whose device still drains. Since Linux 5.0 the UUID that the kernel goes by
need not be the one that all metadata bear (BTRFS_FEATURE_INCOMPAT_METADATA_UUID), so that changing it takes a few
bytes of the superblock.

``btrfstune -M`` makes the same change and more: it commits a transaction, whereupon the log of what was synced last
does not fit the superblock any more. The kernel then refuses to replay it, and to mount. Here nothing else changes.

Offsets are those of struct btrfs_super_block (linux/btrfs_tree.h). The kernel mounts by the first copy alone.
"""

from __future__ import annotations

import hashlib
import os
import sys
import uuid
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

OFFSET: Final = 64 << 10
SIZE: Final = 4096
_CHECKSUM = slice(0, 32)
_FSID = slice(0x20, 0x30)
_MAGIC = slice(0x40, 0x48)
_DEVICES = slice(0x88, 0x90)
_INCOMPAT = slice(0xBC, 0xC4)
_CHECKSUM_TYPE = slice(0xC4, 0xC6)
_METADATA_UUID = slice(0x23B, 0x24B)
_HAS_METADATA_UUID = 1 << 10


def _crc32c(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return (crc ^ 0xFFFFFFFF).to_bytes(4, "little")


# By number. Not xxhash (1), which Python lacks.
_CHECKSUMS: Mapping[int, Callable[[bytes], bytes]] = {
    0: _crc32c,
    2: lambda data: hashlib.sha256(data).digest(),
    3: lambda data: hashlib.blake2b(data, digest_size=32).digest(),
}


def with_identity(superblock: bytes, identity: uuid.UUID) -> bytes:
    """The superblock of the same file system under the UUID ``identity``. Raises ValueError."""
    block = bytearray(superblock)
    if len(block) != SIZE or block[_MAGIC] != b"_BHRfS_M":
        raise ValueError("there is no btrfs")
    if int.from_bytes(block[_DEVICES], "little") != 1:
        raise ValueError("it lies on several devices")
    kind = int.from_bytes(block[_CHECKSUM_TYPE], "little")
    if kind not in _CHECKSUMS:
        raise ValueError(f"its checksums are of kind {kind}")
    if block[_CHECKSUM] != _checksum(kind, block):
        raise ValueError("its superblock is damaged")
    features = int.from_bytes(block[_INCOMPAT], "little")
    if not features & _HAS_METADATA_UUID:
        block[_METADATA_UUID] = block[_FSID]
        block[_INCOMPAT] = (features | _HAS_METADATA_UUID).to_bytes(8, "little")
    block[_FSID] = identity.bytes
    block[_CHECKSUM] = _checksum(kind, block)
    return bytes(block)


def _checksum(kind: int, block: bytearray) -> bytes:
    return _CHECKSUMS[kind](bytes(block[_CHECKSUM.stop :])).ljust(32, b"\0")


def main() -> None:
    """The program. It ends with 1, and a sentence on stderr, if the identity stays what it was."""
    path, identity = sys.argv[1:]
    device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        block = with_identity(os.pread(device, SIZE, OFFSET), uuid.UUID(identity))
    except ValueError as error:
        sys.exit(str(error))
    os.pwrite(device, block, OFFSET)
    os.fsync(device)


if __name__ == "__main__":
    main()
