"""What sfdisk and blkid print becomes volumes with a truthful state; the programs themselves are canned here."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.config import Config
from sendense_restored.daemon.host import policy
from sendense_restored.daemon.host.process import Completed, Jail, ToolError, Tools
from sendense_restored.daemon.host.signatures import MOUNTABLE, Signature, VolumeState, classify, parse_signature
from sendense_restored.daemon.host.volumes import MOST_VOLUMES, Volume, discover, parse_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NODE = Path("/run/x/probe-0")
DISK = 64 << 20
SECTOR = 512
NO_TABLE = "sfdisk: /run/x/probe-0: does not contain a recognized partition table\n"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


@dataclass(frozen=True)
class CannedTools(Tools):
    """Answers instead of running: sfdisk with ``table``, blkid with what is at each offset."""

    table: bytes | ToolError = field(default_factory=lambda: ToolError(["sfdisk"], 1, NO_TABLE))
    signatures: Mapping[int, bytes | ToolError | Completed] = field(default_factory=dict)
    jails: list[Jail] = field(default_factory=list)
    running: list[int] = field(default_factory=list)

    async def run(
        self,
        jail: Jail,
        name: str,
        *arguments: str,
        seconds: float,
        fds: Sequence[int] = (),
        accept: Sequence[int] = (0,),
        environment: Mapping[str, str] | None = None,
    ) -> Completed:
        assert seconds > 0
        assert not fds
        assert environment is None
        self.jails.append(jail)
        assert arguments[-1] == str(NODE)
        if name == "sfdisk":
            answer = self.table
        else:
            assert name == "blkid"
            assert 8 in accept
            self.running.append(self.running[-1] + 1 if self.running else 1)
            await asyncio.sleep(0)
            self.running.append(self.running[-1] - 1)
            found = self.signatures.get(int(arguments[arguments.index("-O") + 1]), b"")
            if isinstance(found, Completed):
                return found
            answer = found
        if isinstance(answer, ToolError):
            raise answer
        return Completed(0 if answer else 2, answer, "")


def table(
    label: str, *entries: tuple[int, int, int, str], sector: int = SECTOR, node: str = str(NODE) + "p"
) -> bytes:
    """What sfdisk prints; an entry is (number, first sector, sectors, type)."""
    partitions = [
        {"node": f"{node}{number}", "start": start, "size": size, "type": kind}
        for number, start, size, kind in entries
    ]
    body = {"label": label, "device": str(NODE), "unit": "sectors", "sectorsize": sector}
    return json.dumps({"partitiontable": {**body, **({"partitions": partitions} if partitions else {})}}).encode()


def found(kind: str, usage: str = "filesystem", **more: str) -> bytes:
    pairs = {"ID_FS_TYPE": kind, "ID_FS_USAGE": usage, **more}
    return "".join(f"{key}={value}\n" for key, value in pairs.items() if value).encode()


async def disk(tools: CannedTools, prefix: str = "", size: int = DISK) -> tuple[Volume, ...]:
    return await discover(tools, Config(), NODE, size, prefix=prefix)


# --- names and places


async def test_each_partition_is_named_by_its_number_in_the_table() -> None:
    tools = CannedTools(
        {},
        table("gpt", (7, 2048, 8, LINUX), (1, 34, 8, LINUX)),
        {34 * SECTOR: found("ext4", ID_FS_LABEL_ENC="root", ID_FS_UUID_ENC="12-34")},
    )
    first, second = await disk(tools)
    assert first == Volume(
        name="partition-1",
        number=1,
        start=34 * SECTOR,
        size=8 * SECTOR,
        filesystem="ext4",
        label="root",
        uuid="12-34",
        state=VolumeState.MOUNTABLE,
        reason="",
    )
    assert (second.name, second.state) == ("partition-7", VolumeState.EMPTY)


@pytest.mark.parametrize(("prefix", "whole", "first"), [
    ("", "disk", "partition-1"),
    ("disk-3", "disk-3", "disk-3-partition-1"),
])  # fmt: skip
async def test_a_prefix_tells_the_disks_of_one_backup_apart(prefix: str, whole: str, first: str) -> None:
    assert [volume.name for volume in await disk(CannedTools({}, signatures={0: found("xfs")}), prefix)] == [whole]
    tools = CannedTools({}, table("dos", (1, 2048, 8, "83")))
    assert [volume.name for volume in await disk(tools, prefix)] == [first]


async def test_sectors_of_4096_bytes_are_counted_as_such() -> None:
    tools = CannedTools({}, table("gpt", (1, 256, 16, LINUX), sector=4096), {256 * 4096: found("ext4")})
    (volume,) = await disk(tools)
    assert (volume.start, volume.size, volume.filesystem) == (256 * 4096, 16 * 4096, "ext4")


async def test_logical_partitions_are_volumes_and_their_container_is_none() -> None:
    tools = CannedTools({}, table("dos", (1, 2048, 8, "83"), (2, 4096, 100, "5"), (5, 4100, 8, "83")))
    assert [volume.name for volume in await disk(tools)] == ["partition-1", "partition-5"]


@pytest.mark.parametrize(("label", "frame"), [("bsd", "0"), ("sgi", "6"), ("sgi", "0"), ("sun", "5")])
async def test_the_entry_for_the_whole_disk_in_an_old_label_is_no_volume(label: str, frame: str) -> None:
    tools = CannedTools({}, table(label, (1, 100, 50, "83"), (3, 0, 1000, frame)), {51200: found("ext2")})
    assert [(volume.name, volume.state) for volume in await disk(tools)] == [("partition-1", "mountable")]


@pytest.mark.parametrize(("entries", "reasons"), [
    ([(1, 2048, DISK // SECTOR, LINUX)], ["it ends 1048576 bytes beyond the end of the disk"]),
    ([(1, 2048, 2**64 - 1, LINUX)], ["beyond the end of the disk"]),
    ([(1, 2048, 0, LINUX)], ["the partition table gives it no size"]),
    ([(1, 2048, 100, LINUX), (2, 2100, 100, LINUX)], ["it overlaps partition 2", "it overlaps partition 1"]),
])  # fmt: skip
async def test_a_partition_in_an_impossible_place_is_damaged_and_not_examined(
    entries: list[tuple[int, int, int, str]], reasons: list[str]
) -> None:
    tools = CannedTools({}, table("gpt", *entries), {2048 * SECTOR: found("ext4")})
    volumes = await disk(tools)
    assert [volume.state for volume in volumes] == [VolumeState.DAMAGED] * len(reasons)
    assert all(reason in volume.reason for volume, reason in zip(volumes, reasons, strict=True))
    assert all(volume.filesystem == "" and volume.size < 2**63 for volume in volumes)


async def test_many_partitions_are_examined_a_few_at_a_time_and_not_without_end() -> None:
    tools = CannedTools({}, table("gpt", *((number, number * 8, 8, LINUX) for number in range(1, 400))))
    assert len(await disk(tools)) == MOST_VOLUMES
    assert 1 < max(tools.running) <= 4


async def test_both_programs_run_without_any_privilege() -> None:
    tools = CannedTools({}, table("gpt", (1, 2048, 8, LINUX)))
    await disk(tools)
    assert len(tools.jails) == 3
    for jail in tools.jails:
        assert jail.uid == Config().attach.probe_uid
        assert not jail.capabilities
        assert not jail.network
        assert jail.memory <= 64 << 20
        assert jail.cpu


# --- a disk that looks like several things


async def test_a_boot_sector_that_looks_like_a_table_is_a_file_system() -> None:
    garbage = table("dos", (1, 778135908, 1141509631, "72"), (2, 0, 2880, "1"))
    (volume,) = await disk(CannedTools({}, garbage, {0: found("vfat")}))
    assert (volume.name, volume.filesystem, volume.state) == ("disk", "vfat", "mountable")


async def test_a_table_wins_over_what_an_earlier_use_of_the_disk_left_behind() -> None:
    signatures = {0: found("ext4", ID_PART_TABLE_TYPE="dos"), 2048 * SECTOR: found("xfs")}
    (volume,) = await disk(CannedTools({}, table("dos", (1, 2048, 8, "83")), signatures))
    assert (volume.name, volume.filesystem) == ("partition-1", "xfs")


async def test_a_file_system_wins_over_a_table_in_which_nothing_is_found() -> None:
    tools = CannedTools({}, table("dos", (1, 2048, 8, "83")), {0: found("ext3", ID_PART_TABLE_TYPE="dos")})
    (volume,) = await disk(tools)
    assert (volume.name, volume.filesystem, volume.state) == ("disk", "ext3", "mountable")


async def test_a_hybrid_optical_image_is_one_volume() -> None:
    signatures = {0: found("iso9660", ID_PART_TABLE_TYPE="gpt"), 64 * SECTOR: found("vfat")}
    (volume,) = await disk(CannedTools({}, table("gpt", (2, 64, 8, LINUX)), signatures))
    assert (volume.name, volume.filesystem) == ("disk", "iso9660")


async def test_contradicting_signatures_do_not_hide_a_table() -> None:
    both = b"ID_FS_AMBIVALENT=filesystem:ext4:1.0 filesystem:btrfs\n"
    (volume,) = await disk(CannedTools({}, table("gpt", (1, 2048, 8, LINUX)), {0: both}))
    assert volume.name == "partition-1"
    (volume,) = await disk(CannedTools({}, signatures={0: both}))
    assert (volume.name, volume.state) == ("disk", VolumeState.DAMAGED)
    assert "ext4 and btrfs at the same time" in volume.reason


@pytest.mark.parametrize(("answer", "blkid", "state", "words"), [
    (None, b"", VolumeState.EMPTY, "no known file system was found"),
    (table("dos"), b"", VolumeState.EMPTY, "(dos) without partitions"),
    (table("dos", (1, 63, 99, "f")), b"", VolumeState.EMPTY, "(dos) without partitions"),
    (None, b"ID_PART_TABLE_TYPE=atari\n", VolumeState.UNSUPPORTED, "of type atari"),
])  # fmt: skip
async def test_a_disk_without_volumes_says_why(
    answer: bytes | None, blkid: bytes, state: VolumeState, words: str
) -> None:
    tools = CannedTools({}, signatures={0: blkid}) if answer is None else CannedTools({}, answer, {0: blkid})
    (volume,) = await disk(tools)
    assert (volume.name, volume.number, volume.start, volume.size) == ("disk", 0, 0, DISK)
    assert volume.state == state
    assert words in volume.reason


async def test_a_gpt_of_which_only_the_protective_entry_is_left_is_damaged() -> None:
    tools = CannedTools({}, table("dos", (1, 1, 131071, "ee")), {0: b"ID_PART_TABLE_TYPE=PMBR\n"})
    (volume,) = await disk(tools)
    assert (volume.name, volume.state) == ("partition-1", VolumeState.DAMAGED)
    assert "a GPT that cannot be read" in volume.reason


# --- programs that fail


@pytest.mark.parametrize(("answer", "words"), [
    (ToolError(["blkid"], None, ""), "could not be examined in time"),
    (ToolError(["blkid"], -11, ""), "failed on its content"),
    (Completed(2, b"", "blkid: error: /run/x: Input/output error"), "could not be read"),
])  # fmt: skip
async def test_a_volume_that_cannot_be_examined_does_not_hide_the_others(
    answer: ToolError | Completed, words: str
) -> None:
    entries = [(1, 2048, 8, LINUX), (2, 4096, 8, LINUX)]
    bad, good = await disk(
        CannedTools({}, table("gpt", *entries), {2048 * SECTOR: answer, 4096 * SECTOR: found("xfs")})
    )
    assert bad.state == VolumeState.DAMAGED
    assert words in bad.reason
    assert "/run" not in bad.reason
    assert good.state == VolumeState.MOUNTABLE


@pytest.mark.parametrize("answer", [
    ToolError(["sfdisk"], 1, "sfdisk: cannot open /run/x/probe-0: Permission denied"),
    ToolError(["sfdisk"], None, ""),
    b"Segmentation fault",
    b'{"partitiontable": {"label": "gpt"}}',
    b"[" * 100_000,
    table("gpt", (1, -5, 10, LINUX)),
    table("gpt", (1, 5, 10, LINUX), (1, 50, 10, LINUX)),
    table("gpt", (1, 5, 10, LINUX), node="/dev/sda"),
])  # fmt: skip
async def test_an_unreadable_device_or_nonsense_is_an_internal_error(answer: bytes | ToolError) -> None:
    with pytest.raises(errors.Failed, match="reading the partition table"):
        await disk(CannedTools({}, answer))


# --- parsing


@pytest.mark.parametrize(("disk_node", "partition", "number"), [
    ("/x/probe", "/x/probe1", 1),
    ("/x/probe-0", "/x/probe-0p12", 12),
    ("/dev/disk/by-id/a", "/dev/disk/by-id/a-part3", 3),
    ("disk.img", "disk.img5", 5),
])  # fmt: skip
def test_the_number_is_taken_from_the_name_that_sfdisk_makes_up(disk_node: str, partition: str, number: int) -> None:
    entry = {"node": partition, "start": 1, "size": 2, "type": "83"}
    body = {"label": "dos", "sectorsize": 512, "partitions": [entry]}
    parsed = parse_table(json.dumps({"partitiontable": body}).encode(), disk_node)
    assert [partition.number for partition in parsed.partitions] == [number]


@pytest.mark.parametrize(("encoded", "label"), [
    (rb"a\x0aID_FS_TYPE=xfs", r"a\nID_FS_TYPE=xfs"),
    (rb"D\x20\x22x\x22\x20\x5c", 'D "x" \\'),
    ("Дом".encode(), "Дом"),
    (rb"\xe5\xe5", "��"),
    (rb"\x00\x1b[31m", r"\x00\x1b[31m"),
    ("a\u202eb".encode(), r"a\u202eb"),
    (rb"a=b", "a=b"),
    (b"x" * 10_000, "x" * 255),
])  # fmt: skip
def test_a_label_is_text_from_the_disk_and_made_harmless(encoded: bytes, label: str) -> None:
    signature = parse_signature(b"ID_FS_LABEL=raw\nID_FS_LABEL_ENC=" + encoded + b"\nID_FS_TYPE=ext4\n")
    assert signature == Signature(type="ext4", label=label)
    assert label.isprintable()


def test_the_first_of_two_equal_keys_counts_and_strange_lines_do_not() -> None:
    output = b"ID_FS_TYPE=ext4\nID_FS_TYPE=xfs\n\xff\xfe=1\nnonsense\n=\nID_FS_USAGE=filesystem"
    assert parse_signature(output) == Signature(type="ext4", usage="filesystem")


# --- states and sentences


@pytest.mark.parametrize(("kind", "usage", "state", "words"), [
    ("swap", "other", VolumeState.SWAP, "Linux swap space"),
    ("swsuspend", "other", VolumeState.SWAP, "hibernated"),
    ("crypto_LUKS", "crypto", VolumeState.ENCRYPTED, "encrypted with LUKS"),
    ("BitLocker", "crypto", VolumeState.ENCRYPTED, "encrypted with BitLocker"),
    ("cs_fvault2", "crypto", VolumeState.ENCRYPTED, "FileVault 2"),
    ("new_cipher", "crypto", VolumeState.ENCRYPTED, "encrypted with new_cipher"),
    ("LVM2_member", "raid", VolumeState.UNSUPPORTED, "part of an LVM volume group"),
    ("linux_raid_member", "raid", VolumeState.UNSUPPORTED, "software RAID (md)"),
    ("zfs_member", "filesystem", VolumeState.UNSUPPORTED, "part of a ZFS pool"),
    ("bcache", "other", VolumeState.UNSUPPORTED, "part of a bcache device"),
    ("via_raid_member", "raid", VolumeState.UNSUPPORTED, "a set of disks (via_raid_member)"),
    ("jbd", "other", VolumeState.UNSUPPORTED, "external journal"),
    ("apfs", "filesystem", VolumeState.UNSUPPORTED, "a file system of type apfs"),
    ("ReFS", "filesystem", VolumeState.UNSUPPORTED, "a file system of type ReFS"),
    ("squashfs3", "filesystem", VolumeState.UNSUPPORTED, "squashfs3"),
    ("mystery", "", VolumeState.UNSUPPORTED, "something of type mystery"),
])  # fmt: skip
def test_what_cannot_be_opened_says_what_it_is(kind: str, usage: str, state: VolumeState, words: str) -> None:
    got, reason = classify(Signature(type=kind, usage=usage), LINUX)
    assert got == state
    assert words in reason


@pytest.mark.parametrize(("partition_type", "state", "words"), [
    ("E3C9E316-0B5C-4DB8-817D-F92DF00215AE", VolumeState.EMPTY, "Microsoft reserved"),
    ("21686148-6449-6E6F-744E-656564454649", VolumeState.EMPTY, "BIOS boot"),
    ("C12A7328-F81F-11D2-BA4B-00A0C93EC93B", VolumeState.DAMAGED, "EFI system partition"),
    ("AF9B60A0-1431-4F62-BC68-3311714A69AD", VolumeState.UNSUPPORTED, "Windows dynamic disk"),
    ("42", VolumeState.UNSUPPORTED, "Windows dynamic disk"),
    ("E75CAF8F-F680-4CEE-AFA3-B001E56EFC2D", VolumeState.UNSUPPORTED, "storage pool"),
    ("a5", VolumeState.UNSUPPORTED, "BSD slice"),
    (LINUX, VolumeState.EMPTY, "empty, of an unknown kind, or its superblock is damaged"),
    ("83", VolumeState.EMPTY, "its superblock is damaged"),
])  # fmt: skip
def test_where_nothing_is_found_the_partition_type_speaks(
    partition_type: str, state: VolumeState, words: str
) -> None:
    got, reason = classify(Signature(), partition_type)
    assert got == state
    assert words in reason


def test_a_file_system_counts_more_than_the_partition_type() -> None:
    assert classify(Signature(type="ntfs", usage="filesystem"), "42") == (VolumeState.MOUNTABLE, "")


def test_a_table_within_a_partition_is_not_opened_and_says_so() -> None:
    state, reason = classify(Signature(table="dos"), "83")
    assert state == VolumeState.UNSUPPORTED
    assert "a partition table (dos) of its own" in reason


def test_every_mountable_file_system_has_a_policy_and_no_other_has() -> None:
    assert set(policy.POLICIES) == MOUNTABLE


def test_every_reason_is_a_sentence_without_a_path() -> None:
    kinds = ["swap", "swsuspend", "crypto_LUKS", "LVM2_member", "vdo", "jbd", "apfs", "x"]
    reasons = [classify(Signature(type=kind), "")[1] for kind in kinds]
    for reason in reasons:
        assert reason[0].islower() or reason.startswith(("Linux",))
        assert not reason.endswith(".")
        assert "/" not in reason
