"""What a signature on a disk means: whether a volume can be opened, and if not, the sentence that says why.

Pure functions over what ``blkid -p`` prints. They know every type that blkid can answer; one that they have never
heard of is listed with its name as unsupported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from sendense_restored import names

if TYPE_CHECKING:
    from collections.abc import Mapping

_LONGEST_TEXT = 255


class VolumeState(StrEnum):
    """What a client may do with a volume, and if nothing, why.

    MOUNTABLE is not part of the contract: it is the promise of ``discover`` that a mount is worth trying, and a
    mount turns it into one of the others.
    """

    MOUNTABLE = "mountable"
    MOUNTED = "mounted"
    UNSUPPORTED = "unsupported"
    ENCRYPTED = "encrypted"
    DAMAGED = "damaged"
    INCOMPLETE = "incomplete"
    EMPTY = "empty"
    SWAP = "swap"


MOUNTABLE: Final = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "ntfs", "vfat", "exfat", "iso9660", "squashfs"})
"""The file systems, as blkid calls them, that ``filesystem`` has a policy for."""

RESTORE_DISK = "restore the whole disk to reach its files"
_ENCRYPTED = {
    "crypto_LUKS": "LUKS",
    "BitLocker": "BitLocker",
    "cs_fvault2": "FileVault 2",
}
_SWAP = {
    "swap": "Linux swap space, which holds no files",
    "swsuspend": "the memory of a hibernated Linux in its swap space, which holds no files",
}
_PART_OF = {
    "LVM2_member": "an LVM volume group",
    "LVM1_member": "an LVM 1 volume group",
    "linux_raid_member": "a Linux software RAID (md)",
    "ddf_raid_member": "a DDF RAID",
    "isw_raid_member": "an Intel Matrix RAID",
    "zfs_member": "a ZFS pool",
    "bcache": "a bcache device",
    "stratis": "a Stratis pool",
    "drbd": "a DRBD device",
    "vdo": "a VDO (deduplicated) volume",
    "VMFS_volume_member": "a VMware VMFS datastore",
    "ceph_bluestore": "a Ceph cluster",
    "mpool": "an mpool",
    "DM_snapshot_cow": "a device-mapper snapshot",
    "DM_verity_hash": "a dm-verity device",
    "DM_integrity": "a dm-integrity device",
}
_HOLDS_NO_FILES = {
    "jbd": "the external journal of an ext3 or ext4 file system",
    "xfs_external_log": "the external log of an XFS file system",
    "drbdmanage_control_volume": "a control volume of DRBD",
}

_NOTHING_FOUND = "no known file system was found: it is empty, of an unknown kind, or its superblock is damaged"
# Entries of a table in which nothing was found, by their type there: GPT type GUIDs (UEFI specification, Microsoft's
# PARTITION_INFORMATION_GPT, the Discoverable Partitions Specification) and MBR type bytes.
_LDM = (
    VolumeState.UNSUPPORTED,
    f"part of a Windows dynamic disk, which this version does not assemble; {RESTORE_DISK}",
)
_NESTED_BSD = (
    VolumeState.UNSUPPORTED,
    f"a BSD slice with a table of its own, which this version does not open; {RESTORE_DISK}",
)
_BY_PARTITION_TYPE: Final[Mapping[str, tuple[VolumeState, str]]] = {
    "E3C9E316-0B5C-4DB8-817D-F92DF00215AE": (
        VolumeState.EMPTY,
        "a Microsoft reserved partition, which holds no files",
    ),
    "21686148-6449-6E6F-744E-656564454649": (VolumeState.EMPTY, "a BIOS boot partition: boot loader code, no files"),
    "9E1A2D38-C612-4316-AA26-8B49521E5A8B": (VolumeState.EMPTY, "a PReP boot partition: boot loader code, no files"),
    "41": (VolumeState.EMPTY, "a PReP boot partition: boot loader code, no files"),
    "C12A7328-F81F-11D2-BA4B-00A0C93EC93B": (
        VolumeState.DAMAGED,
        "an EFI system partition without a readable FAT file system: it was never formatted or is damaged",
    ),
    "5808C8AA-7E8F-42E0-85D2-E1E90434CFB3": _LDM,
    "AF9B60A0-1431-4F62-BC68-3311714A69AD": _LDM,
    "42": _LDM,
    "E75CAF8F-F680-4CEE-AFA3-B001E56EFC2D": (
        VolumeState.UNSUPPORTED,
        f"part of a Windows storage pool, which this version does not assemble; {RESTORE_DISK}",
    ),
    "a5": _NESTED_BSD,
    "a6": _NESTED_BSD,
    "a9": _NESTED_BSD,
    "ee": (
        VolumeState.DAMAGED,
        (
            "it stands for a GPT that cannot be read: the GPT is damaged, the disk was cut short, or it was written "
            f"for another sector size; {RESTORE_DISK}"
        ),
    ),
}


@dataclass(frozen=True)
class Signature:
    """What blkid found in one range of the disk."""

    type: str = ""
    usage: str = ""
    label: str = ""
    uuid: str = ""
    table: str = ""
    """The kind of a partition table, if there is one."""
    ambivalent: tuple[str, ...] = ()
    """Several types that exclude each other; nothing else is told then."""
    failure: str = ""
    """A sentence, if blkid gave no answer."""


def parse_signature(output: bytes) -> Signature:
    r"""Read the output of ``blkid -p -o udev``.

    Of blkid's formats only this one is safe against text from the disk: a label with a line feed in it would forge
    lines in the others. The ``_ENC`` values have every unsafe byte as ``\xHH``.
    """
    pairs: dict[str, str] = {}
    for line in output.split(b"\n"):
        key, separator, value = line.partition(b"=")
        if separator and key.startswith(b"ID_"):
            pairs.setdefault(key.decode("ascii", "replace"), _decoded(value))
    return Signature(
        type=pairs.get("ID_FS_TYPE", ""),
        usage=pairs.get("ID_FS_USAGE", ""),
        label=pairs.get("ID_FS_LABEL_ENC", ""),
        uuid=pairs.get("ID_FS_UUID_ENC", ""),
        table=pairs.get("ID_PART_TABLE_TYPE", ""),
        ambivalent=tuple(re.findall(r"\w+:(\w+)", pairs.get("ID_FS_AMBIVALENT", ""))),
    )


def _decoded(value: bytes) -> str:
    raw = re.sub(rb"\\x([0-9a-fA-F]{2})", lambda match: bytes([int(match[1], 16)]), value)
    # Shown, never interpreted: what a disk says about itself may hold anything.
    return names.displayable(raw.decode(errors="replace")[:_LONGEST_TEXT])


def classify(found: Signature, partition_type: str) -> tuple[VolumeState, str]:
    """State and reason of a volume with this signature; what the table calls it counts if nothing was found."""
    if found.failure:
        return VolumeState.DAMAGED, found.failure
    if found.ambivalent:
        kinds = " and ".join(dict.fromkeys(found.ambivalent))
        return VolumeState.DAMAGED, f"it looks like {kinds} at the same time, so neither is opened; {RESTORE_DISK}"
    if found.type:
        return _classify_type(found.type, found.usage)
    if partition_type in _BY_PARTITION_TYPE:
        return _BY_PARTITION_TYPE[partition_type]
    if found.table:
        reason = f"a partition table ({found.table}) of its own, which this version does not open; {RESTORE_DISK}"
        return VolumeState.UNSUPPORTED, reason
    return VolumeState.EMPTY, _NOTHING_FOUND


def _classify_type(kind: str, usage: str) -> tuple[VolumeState, str]:
    if kind in MOUNTABLE:
        return VolumeState.MOUNTABLE, ""
    if kind in _SWAP:
        return VolumeState.SWAP, _SWAP[kind]
    if kind in _ENCRYPTED or usage == "crypto":
        what = f"encrypted with {_ENCRYPTED.get(kind, kind)}"
        return VolumeState.ENCRYPTED, f"{what}, which this version does not unlock; {RESTORE_DISK}"
    if kind in _HOLDS_NO_FILES:
        return VolumeState.UNSUPPORTED, f"{_HOLDS_NO_FILES[kind]}, which holds no files of its own"
    if kind in _PART_OF or usage == "raid":
        what = f"part of {_PART_OF.get(kind, f'a set of disks ({kind})')}"
        return VolumeState.UNSUPPORTED, f"{what}, which this version does not assemble; {RESTORE_DISK}"
    what = "a file system" if usage == "filesystem" else "something"
    return VolumeState.UNSUPPORTED, f"{what} of type {kind}, which this version does not open; {RESTORE_DISK}"
