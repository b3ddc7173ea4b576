"""The host's udev, LVM, md, btrfs and udisks leave a guest's disk alone.

One disk has something for each of them. Attached where the rules do not reach, it shows what they would do: without
that, a test in which nothing happens would prove nothing.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.vm.appliance import tool
from tests.vm.udev import FLAGS, left_alone, links_to, properties, settle
from tools.lab import leftovers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WORK = Path("/var/tmp/hands-off")
PARTITIONS = {"lvm": 1, "btrfs": 2, "md": 3, "luks": 4, "ext4": 5}
START, SIZE = 2048, 81920
"""Sectors: where the first begins, and what each has; they follow one another."""
EXT4_UUID = "0b5e57a1-1234-4321-8888-5e4de45e0001"
ARRAY_UUID = "0b5e57a1-1234-4321-8888-5e4de45e0002"


def await_devices(condition: Callable[[], bool], otherwise: str) -> None:
    """Wait until it is so; each event of a block device is a reason to look again."""
    assert leftovers.left_in_time({}, lambda: {} if condition() else {otherwise: otherwise}, seconds=60) == []


def active_volumes() -> set[str]:
    return set(tool("dmsetup", "ls", "--target", "linear").split()) & {"guest-root", "sendense-root"}


def arrays() -> list[str]:
    return [path.name for path in Path("/sys/block").glob("md*")]


def offset(partition: str) -> int:
    return (START + (PARTITIONS[partition] - 1) * SIZE) * 512


@contextlib.contextmanager
def loop(file: Path, start: int = 0, size: int = 0) -> Iterator[str]:
    """A loop device over a part of a file."""
    part = ("--offset", str(start), "--sizelimit", str(size)) if size else ()
    device = tool("losetup", "--find", "--show", *part, str(file)).strip()
    try:
        settle()
        yield device
    finally:
        tool("losetup", "--detach", device)
        settle()


@contextlib.contextmanager
def exported(file: Path) -> Iterator[Path]:
    """The file under a path that the exports of image servers have."""
    export = Path("/run/sendense-restore/test-disk-0")
    export.touch()
    tool("mount", "--bind", str(file), str(export))
    try:
        yield export
    finally:
        tool("umount", str(export))
        export.unlink()


@contextlib.contextmanager
def nbd(number: int, image: Path) -> Iterator[str]:
    """A disk on one of the kernel's NBD devices, connected by hand, with its partitions; it stays as it is."""
    device = f"/dev/nbd{number}"
    tool("qemu-nbd", f"--connect={device}", "--snapshot", "--format=raw", str(image))
    try:
        tool("udevadm", "wait", "--timeout=60", f"{device}p5")
        settle()
        yield device
    finally:
        tool("qemu-nbd", "--disconnect", device)
        await_devices(lambda: not Path(f"/sys/block/nbd{number}/pid").exists(), "somebody holds the device")
        settle()


def assert_hidden_from_udisks(device: str) -> None:
    """Depending on the release, it does not know of the device, or is to show it to nobody."""
    told = tool("udisksctl", "info", "--block-device", device, check=False)
    assert told == "" or "HintIgnore:                 true" in told
    assert EXT4_UUID not in told


def let_go() -> None:
    """Undo what the host has made of a disk that it was let at."""
    tool("vgchange", "-an", "guest", check=False)
    for array in arrays():
        tool("mdadm", "--stop", f"/dev/{array}", check=False)
    settle()


def fill(export: Path) -> None:
    """Make what is on the partitions."""
    with loop(export, offset("lvm"), SIZE * 512) as device:
        tool("vgcreate", "guest", device)
        tool("lvcreate", "--yes", "--name=root", "--extents=4", "guest")
        tool("vgchange", "-an", "guest")
    with loop(export, offset("btrfs"), SIZE * 512) as device:
        tool("mkfs.btrfs", "--quiet", "--mixed", device)
    with loop(export, offset("md"), SIZE * 512) as device:
        tool(
            "mdadm",
            "--create",
            "/dev/md/guest",
            "--run",
            "--level=1",
            "--raid-devices=2",
            device,
            "missing",
        )
        tool("mkfs.ext4", "-q", "-U", ARRAY_UUID, "-L", "guest-array", "/dev/md/guest")
        tool("mdadm", "--stop", "/dev/md/guest")
    with loop(export, offset("luks"), SIZE * 512) as device:
        key = WORK / "key"
        key.write_text("secret", encoding="ascii")
        tool(
            "cryptsetup",
            "-q",
            "luksFormat",
            "--type=luks1",
            "--pbkdf-force-iterations=1000",
            device,
            str(key),
        )
    with loop(export, offset("ext4"), SIZE * 512) as device:
        tool("mkfs.ext4", "-q", "-U", EXT4_UUID, "-L", "guest-data", device)


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    """A guest's disk; and beside it a volume group of the host's own, whose name is like ours."""
    WORK.mkdir()
    image = WORK / "disk.raw"
    image.touch()
    tool("truncate", "--size=220M", str(image))
    table = WORK / "table"
    table.write_text(
        "label: gpt\n" + "".join(f"start={START + n * SIZE}, size={SIZE}\n" for n in range(len(PARTITIONS))),
        encoding="utf-8",
    )
    tool("sh", "-c", f"sfdisk --quiet {image} <{table}")
    # Made where the rules reach, or the host would have it all at once.
    with exported(image) as export:
        fill(export)
    let_go()
    own = WORK / "own.raw"
    own.touch()
    tool("truncate", "--size=40M", str(own))
    with loop(own) as device:
        tool("vgcreate", "sendense", device)
        tool("lvcreate", "--yes", "--name=root", "--extents=4", "sendense")
        yield image
        assert "sendense-root" in active_volumes(), "the host's own volume group was touched"
        tool("vgremove", "--yes", "sendense")
    tool("rm", "--recursive", str(WORK))
    for group in ("guest", "sendense"):  # what LVM remembers of them
        for kept in Path("/etc/lvm").glob(f"*/{group}*"):
            kept.unlink()


def test_without_the_rules_the_host_takes_everything(disk: Path) -> None:
    with nbd(8, disk):
        try:
            await_devices(
                lambda: "guest-root" in active_volumes() and bool(arrays()),
                "the machine shows nothing of what the rules are against",
            )
            settle()
            links = links_to("/dev/nbd8p5")
            assert {f"/dev/disk/by-uuid/{EXT4_UUID}", "/dev/disk/by-label/guest-data"} <= set(links)
            assert [link for link in links if link.startswith("/dev/disk/by-partuuid/")]
            assert "ID_BTRFS_READY=1" in properties("/dev/nbd8p2")
        finally:
            let_go()


def test_disks_on_our_nbd_devices_are_left_alone(disk: Path) -> None:
    with nbd(0, disk):
        devices = ["/dev/nbd0", *(f"/dev/nbd0p{number}" for number in PARTITIONS.values())]
        for device in devices:
            assert left_alone(device), properties(device)
        assert "guest-root" not in active_volumes()
        assert arrays() == []
        # A disk that is written to and closed is not looked at again.
        tool("sh", "-c", "exec 3<>/dev/nbd0p1")
        settle()
        assert "guest-root" not in active_volumes()
        assert links_to(*devices) == []


def test_udisks_offers_nothing_of_them(disk: Path) -> None:
    with nbd(0, disk), nbd(8, disk):
        try:
            tool("systemctl", "restart", "udisks2.service")  # it looks at everything before it has its name
            assert EXT4_UUID in tool("udisksctl", "info", "--block-device", "/dev/nbd8p5")
            assert_hidden_from_udisks("/dev/nbd0p5")
        finally:
            let_go()


def test_udisks_offers_nothing_of_loops_and_nodes_that_are_ours(disk: Path) -> None:
    name = "sndrst_udisks"
    part = (offset("ext4"), SIZE * 512)
    with exported(disk) as export, loop(export, *part) as device, loop(disk, *part) as anybodys:
        tool("dmsetup", "create", name, "--table", f"0 {SIZE} linear {device} 0")
        try:
            settle()
            tool("systemctl", "restart", "udisks2.service")
            assert EXT4_UUID in tool("udisksctl", "info", "--block-device", anybodys)
            assert_hidden_from_udisks(device)
            assert_hidden_from_udisks(f"/dev/mapper/{name}")
        finally:
            tool("dmsetup", "remove", name)
            settle()


@pytest.mark.parametrize("partition", PARTITIONS)
def test_loops_over_an_export_are_left_alone(disk: Path, partition: str) -> None:
    """As the fallback makes them, whose files have paths below the run-time directory."""
    with exported(disk) as export, loop(export, offset(partition), SIZE * 512) as device:
        assert left_alone(device), properties(device)
        assert "guest-root" not in active_volumes()
        assert arrays() == []


def test_a_loop_that_served_us_is_anybodys_again(disk: Path) -> None:
    with exported(disk) as export, loop(export, offset("ext4"), SIZE * 512) as ours:
        pass
    with loop(disk, offset("ext4"), SIZE * 512) as theirs:
        assert theirs == ours
        assert f"/dev/disk/by-uuid/{EXT4_UUID}" in links_to(theirs)


def test_nodes_of_the_device_mapper_that_are_ours_have_no_links(disk: Path) -> None:
    with loop(disk, offset("ext4"), SIZE * 512) as device:
        try:
            for name, linked in (("sndrst_0123456789ab", False), ("anybody", True)):
                tool("dmsetup", "create", name, "--table", f"0 {SIZE} linear {device} 0")
                settle()
                node = str(Path(f"/dev/mapper/{name}").resolve())
                assert (f"/dev/disk/by-uuid/{EXT4_UUID}" in links_to(node)) == linked
                assert (properties(node) >= FLAGS) != linked
                assert bool(links_to(node)) == linked
                tool("dmsetup", "remove", name)
        finally:
            for name in ("sndrst_0123456789ab", "anybody"):
                tool("dmsetup", "remove", name, check=False)
            settle()


def test_arrays_of_md_that_are_ours_have_no_links(disk: Path) -> None:
    names = WORK / "mdadm.conf"
    names.write_text("CREATE names=yes\n", encoding="ascii")  # the node is /dev/md_NAME, not /dev/md127
    with loop(disk, offset("md"), SIZE * 512) as device:
        try:
            for name, linked in (("sndrst_0", False), ("anybody", True)):
                let_go()
                tool("mdadm", "--assemble", f"--config={names}", "--run", f"/dev/md/{name}", device)
                settle()
                node = f"/dev/md_{name}"
                assert (f"/dev/disk/by-uuid/{ARRAY_UUID}" in links_to(node)) == linked
                assert ("/dev/disk/by-label/guest-array" in links_to(node)) == linked
                assert (properties(node) >= FLAGS) != linked
                assert bool(links_to(node)) == linked
        finally:
            let_go()
