"""Another identity for a btrfs is a few bytes of its superblock, under a checksum that is right."""

from __future__ import annotations

import hashlib
import uuid

import pytest

from sendense_restored.daemon.host import btrfs_identity
from sendense_restored.daemon.host.btrfs_identity import SIZE, with_identity

OLD, NEW, THIRD = (uuid.UUID(int=number << 64 | number) for number in (1, 2, 3))


def superblock(*, devices: int = 1, checksum: int = 0, features: int = 0x341) -> bytes:
    block = bytearray(index % 251 for index in range(SIZE))
    block[0x20:0x30] = OLD.bytes
    block[0x40:0x48] = b"_BHRfS_M"
    block[0x88:0x90] = devices.to_bytes(8, "little")
    block[0xBC:0xC4] = features.to_bytes(8, "little")
    block[0xC4:0xC6] = checksum.to_bytes(2, "little")
    body = bytes(block[32:])
    block[:32] = {
        2: hashlib.sha256(body).digest(),
        3: hashlib.blake2b(body, digest_size=32).digest(),
    }.get(checksum, btrfs_identity._crc32c(body) + bytes(28))
    return bytes(block)


def test_the_checksum_is_castagnoli_s() -> None:
    assert btrfs_identity._crc32c(b"123456789") == (0xE3069283).to_bytes(4, "little")


@pytest.mark.parametrize("checksum", [0, 2, 3])
def test_it_has_the_new_identity_and_remembers_the_one_that_its_metadata_bear(checksum: int) -> None:
    before = superblock(checksum=checksum)
    after = with_identity(before, NEW)
    assert (after[0x20:0x30], after[0x23B:0x24B]) == (NEW.bytes, OLD.bytes)
    assert int.from_bytes(after[0xBC:0xC4], "little") == 0x741
    changed = {*range(0x30), *range(0xBC, 0xC4), *range(0x23B, 0x24B)}
    assert all(after[index] == before[index] for index in range(SIZE) if index not in changed)
    assert after[:32] != before[:32]
    again = with_identity(after, THIRD)  # which looks at the checksum
    assert (again[0x20:0x30], again[0x23B:0x24B]) == (THIRD.bytes, OLD.bytes)


@pytest.mark.parametrize(("block", "why"), [
    (bytes(SIZE), "no btrfs"),
    (superblock()[:-1], "no btrfs"),
    (b"", "no btrfs"),
    (superblock(devices=2), "several devices"),
    (superblock(devices=0), "several devices"),
    (superblock(checksum=1), "of kind 1"),
    (superblock(checksum=65535), "of kind 65535"),
    (superblock()[:-1] + b"\0", "damaged"),
])  # fmt: skip
def test_what_it_cannot_vouch_for_is_left_alone(block: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        with_identity(block, NEW)
