"""The real sfdisk and blkid, jailed, on images made here."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors, linux
from sendense_restored.config import Config
from sendense_restored.daemon.host import volumes
from sendense_restored.daemon.host.process import Tools

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sendense_restored.daemon.host.volumes import Volume

MIB = 1 << 20
Summary = list[tuple[str, str, str]]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that the unprivileged tools may enter, where device nodes work."""
    directory = Path("/run/volumes")
    directory.mkdir()
    linux.mount("tmpfs", directory, "tmpfs", 0, "mode=755")
    yield directory
    linux.umount(directory)
    directory.rmdir()


@pytest.fixture
def image(place: Path) -> Path:
    """An empty disk of 64 MiB."""
    path = place / "disk.img"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    path.chmod(0o400)
    os.chown(path, Config().attach.probe_uid, 0)
    return path


@pytest.fixture
def loop(image: Path) -> Iterator[Callable[[int], Path]]:
    """Makes the image a block device with the given sector size, behind a node like the daemon's."""
    made: list[tuple[str, Path]] = []

    def make(sector: int) -> Path:
        command = ["losetup", "--find", "--show", "-b", str(sector), str(image)]
        device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        node = image.with_name("probe-0")
        made.append((device, node))
        os.mknod(node, stat.S_IFBLK | 0o400, Path(device).stat().st_rdev)
        os.chown(node, Config().attach.probe_uid, 0)
        return node

    yield make
    for device, node in made:
        node.unlink()
        subprocess.run(["losetup", "--detach", device], check=True)


def partition(image: Path, script: str) -> None:
    subprocess.run(["sfdisk", "--quiet", str(image)], input=script, text=True, check=True, capture_output=True)


def make(kind: str, image: Path, at: int, size: int, *options: str) -> None:
    """Put a file system at an offset of the image."""
    part = image.with_name("part.img")
    with part.open("wb") as file:
        file.truncate(size)
    command = {"ntfs": ["mkntfs", "-q", "-F"], "swap": ["mkswap"]}.get(kind, [f"mkfs.{kind}"])
    subprocess.run([*command, *options, str(part)], check=True, capture_output=True)
    write(image, at, part.read_bytes())
    part.unlink()


def write(image: Path, at: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(at)
        file.write(data)


def flush(node: Path) -> None:
    """Let the block device forget what it has cached of its image."""
    subprocess.run(["blockdev", "--flushbufs", str(node)], check=True)


async def discover(node: Path, size: int = 64 * MIB) -> tuple[Volume, ...]:
    return await volumes.discover(Tools.find(volumes.REQUIRED_TOOLS), Config(), node, size, prefix="")


def summary(found: tuple[Volume, ...]) -> Summary:
    return [(volume.name, volume.filesystem, volume.state) for volume in found]


async def test_a_gpt_with_everything_a_machine_has(image: Path) -> None:
    reserved, boot, esp = (
        "E3C9E316-0B5C-4DB8-817D-F92DF00215AE",
        "21686148-6449-6E6F-744E-656564454649",
        "U",
    )
    partition(
        image,
        f"label: gpt\n4MiB,8MiB,{esp}\n,1MiB,{reserved}\n,1MiB,{boot}\n,8MiB,S\n,8MiB,L\n,8MiB,L\n,8MiB,L\n",
    )
    for kind, at, options in (
        ("vfat", 4, ("-F", "12")),
        ("swap", 14, ()),
        ("ext4", 22, ("-L", "root")),
        ("ntfs", 30, ("-L", "Data", "-s", "512", "-p", "0", "-H", "0", "-S", "0")),
    ):
        make(kind, image, at * MIB, 8 * MIB, *options)
    found = await discover(image)
    assert summary(found) == [
        ("partition-1", "vfat", "mountable"),
        ("partition-2", "", "empty"),
        ("partition-3", "", "empty"),
        ("partition-4", "swap", "swap"),
        ("partition-5", "ext4", "mountable"),
        ("partition-6", "ntfs", "mountable"),
        ("partition-7", "", "empty"),
    ]
    assert [volume.label for volume in found] == ["", "", "", "", "root", "Data", ""]
    assert (found[4].start, found[4].size) == (22 * MIB, 8 * MIB)
    assert len(found[4].uuid) == 36
    assert "Microsoft reserved" in found[1].reason
    assert "BIOS boot" in found[2].reason
    assert "superblock is damaged" in found[6].reason


async def test_an_mbr_with_logical_partitions(image: Path) -> None:
    partition(image, "label: dos\n1MiB,8MiB,83\n,,E\n,8MiB,83\n,8MiB,82\n")
    found = await discover(image)
    assert [volume.name for volume in found] == ["partition-1", "partition-5", "partition-6"]
    make("ext2", image, found[1].start, 8 * MIB)
    assert (await discover(image))[1].filesystem == "ext2"


@pytest.mark.parametrize(("kind", "options"), [
    ("vfat", ("-F", "32", "-s", "1")),
    ("ntfs", ()),
    ("exfat", ()),
    ("ext4", ()),
    ("xfs", ("-m", "reflink=0", "-n", "version=2")),
])  # fmt: skip
async def test_a_file_system_on_the_whole_disk_is_one_volume(
    image: Path, kind: str, options: tuple[str, ...]
) -> None:
    if kind == "xfs":
        with image.open("r+b") as file:
            file.truncate(320 * MIB)
    make(kind, image, 0, image.stat().st_size, *options)
    assert summary(await discover(image, image.stat().st_size)) == [("disk", kind, "mountable")]


async def test_boot_code_that_sfdisk_takes_for_partitions_does_not_hide_a_fat(image: Path) -> None:
    make("vfat", image, 0, 64 * MIB)
    # In range and plausible: only blkid can tell that this is no table.
    write(image, 446, bytes.fromhex("800101000c00000000080000000080000000"[:32]))
    assert summary(await discover(image)) == [("disk", "vfat", "mountable")]


async def test_an_empty_disk_is_empty(image: Path) -> None:
    (volume,) = await discover(image)
    assert (volume.name, volume.state) == ("disk", "empty")
    assert "no known file system" in volume.reason


async def test_a_zeroed_superblock_is_not_called_healthy(image: Path) -> None:
    partition(image, "label: gpt\n1MiB,16MiB,L\n")
    make("ext4", image, MIB, 16 * MIB)
    write(image, MIB + 1024, bytes(1024))
    (volume,) = await discover(image)
    assert (volume.name, volume.filesystem, volume.state) == ("partition-1", "", "empty")
    assert "its superblock is damaged" in volume.reason


async def test_a_label_cannot_forge_what_blkid_says(image: Path) -> None:
    make("ext4", image, 0, 64 * MIB, "-L", "a\nTYPE=xfs\n\x1b")
    (volume,) = await discover(image)
    assert (volume.filesystem, volume.label) == ("ext4", r"a\nTYPE=xfs\n\x1b")


async def test_the_backup_gpt_serves_when_the_first_is_gone(image: Path) -> None:
    partition(image, "label: gpt\n4MiB,8MiB,L\n")
    make("ext4", image, 4 * MIB, 8 * MIB)
    write(image, 512, bytes(512))
    assert summary(await discover(image)) == [("partition-1", "ext4", "mountable")]


async def test_a_gpt_without_header_and_backup_is_damaged(image: Path) -> None:
    partition(image, "label: gpt\n4MiB,8MiB,L\n")
    write(image, 512, bytes(512))
    write(image, 64 * MIB - 512, bytes(512))
    (volume,) = await discover(image)
    assert (volume.name, volume.state) == ("partition-1", "damaged")
    assert "a GPT that cannot be read" in volume.reason


async def test_a_disk_that_was_cut_short_says_so(image: Path) -> None:
    partition(image, "label: dos\n1MiB,8MiB,83\n32MiB,16MiB,83\n")
    make("ext4", image, MIB, 8 * MIB)
    os.truncate(image, 40 * MIB)
    first, second = await discover(image, 40 * MIB)
    assert first.state == "mountable"
    assert second.state == "damaged"
    assert f"it ends {8 * MIB} bytes beyond the end of the disk" in second.reason


async def test_an_encrypted_disk_says_so(image: Path) -> None:
    write(image, 0, b"LUKS\xba\xbe\x00\x01")
    (volume,) = await discover(image)
    assert (volume.filesystem, volume.state) == ("crypto_LUKS", "encrypted")
    assert "encrypted with LUKS" in volume.reason


async def test_two_file_systems_on_top_of_each_other_are_not_opened(image: Path) -> None:
    make("btrfs", image, 0, 128 * MIB, "-q")
    other = image.with_name("ext4.img")
    other.write_bytes(b"")
    os.truncate(other, 128 * MIB)
    make("ext4", other, 0, 128 * MIB)
    write(image, 1024, other.read_bytes()[1024:2048])
    (volume,) = await discover(image, 128 * MIB)
    assert volume.filesystem == ""
    if volume.state == "damaged":  # libblkid 2.38 sees both and says so
        assert "btrfs" in volume.reason
        assert "at the same time" in volume.reason
    else:  # 2.41 answers that there is nothing it knows
        assert volume.state == "empty"
        assert "its superblock is damaged" in volume.reason


@pytest.mark.parametrize("sector", [512, 4096])
async def test_a_block_node_of_the_probing_user_is_enough(
    image: Path, loop: Callable[[int], Path], sector: int
) -> None:
    node = loop(sector)
    partition(node, f"label: gpt\n{4 * MIB // sector},{8 * MIB // sector},L\n")
    make("ext4", image, 4 * MIB, 8 * MIB)
    flush(node)
    (volume,) = await discover(node)
    assert (volume.name, volume.start, volume.size) == ("partition-1", 4 * MIB, 8 * MIB)
    assert (volume.filesystem, volume.state) == ("ext4", "mountable")


async def test_a_node_that_the_probing_user_may_not_read_is_an_internal_error(image: Path) -> None:
    os.chown(image, 0, 0)
    with pytest.raises(errors.Failed, match="reading the partition table"):
        await discover(image)
