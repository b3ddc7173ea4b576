"""What the machine's udev knows of a block device, and the links that it has made to it."""

from __future__ import annotations

from pathlib import Path

from tests.vm.appliance import tool

FLAGS = {
    "UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG=1",
    "DM_UDEV_DISABLE_OTHER_RULES_FLAG=1",
    "SYSTEMD_READY=0",
    "UDISKS_IGNORE=1",
}
"""What is said of every device of ours to those who look at devices."""


def settle() -> None:
    tool("udevadm", "settle", "--timeout=60")


def properties(device: str) -> set[str]:
    return set(tool("udevadm", "info", "--query=property", f"--name={device}").splitlines())


def links_to(*devices: str) -> list[str]:
    """The links in /dev/disk that lead to one of the devices, but for the numbers of use (by-diskseq)."""
    found = [link for link in Path("/dev/disk").glob("*/*") if link.parent.name != "by-diskseq"]
    return [str(link) for link in found if str(link.resolve()) in devices]


def left_alone(device: str) -> bool:
    """Whether the host has looked at nothing on the device, and made no link to it."""
    known = properties(device)
    looked = [each for each in known if each.startswith(("ID_FS_", "ID_PART_", "ID_BTRFS_", "LVM_"))]
    return known >= FLAGS and not looked and not links_to(device)
