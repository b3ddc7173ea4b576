"""Mount options are a constant, refusals become sentences, and mountinfo is read rightly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.config import Config
from sendense_restored.daemon.host import filesystem, mountinfo
from sendense_restored.daemon.host.policy import (
    FLAGS,
    POLICIES,
    MountRefused,
    needs_writable,
    refusal_of_kernel,
    refusal_of_ntfs_3g,
)
from sendense_restored.daemon.host.process import ToolError, Tools
from sendense_restored.daemon.host.signatures import MOUNTABLE, VolumeState
from sendense_restored.daemon.host.volumes import Volume

if TYPE_CHECKING:
    from sendense_restored.daemon.host.policy import Journal

JOURNALING = {"ext3", "ext4", "xfs", "btrfs", "ntfs"}


def volume(kind: str) -> Volume:
    return Volume("disk", 0, 0, 1 << 20, kind, "a,rw,suid", "", VolumeState.MOUNTABLE, "")


def failure(stderr: str, returncode: int | None = 32) -> ToolError:
    return ToolError(["mount"], returncode, stderr)


def test_every_mount_is_read_only_and_trusts_nothing_in_it() -> None:
    assert set(FLAGS) == {"ro", "nodev", "nosuid", "noexec"}


@pytest.mark.parametrize("kind", sorted(MOUNTABLE))
def test_no_policy_can_undo_the_flags_or_breaks_the_readers_symlinks(kind: str) -> None:
    options = {*POLICIES[kind].options, *(POLICIES[kind].unreplayed or ())}
    assert not options & {"rw", "dev", "suid", "exec", "nosymfollow", "auto", "user", "users", "remove_hiberfile"}
    assert all(re.fullmatch(r"[a-z0-9_=-]+", option) for option in options)


@pytest.mark.parametrize(("kind", "option"), [
    ("ext2", "errors=remount-ro"),
    ("ext4", "errors=remount-ro"),
    ("xfs", "nouuid"),
    ("btrfs", "subvolid=5"),
    ("vfat", "utf8=1"),
    ("ntfs", "norecover"),
    ("ntfs", "allow_other"),
    ("ntfs", "no_detach"),
    ("ntfs", "streams_interface=windows"),
    ("ntfs", "efs_raw"),
])  # fmt: skip
def test_what_each_file_system_cannot_do_without(kind: str, option: str) -> None:
    assert option in POLICIES[kind].options


@pytest.mark.parametrize("kind", sorted(MOUNTABLE))
@pytest.mark.parametrize("journal", ["replay", "as-crashed"])
def test_a_journal_to_replay_needs_a_writable_device_and_so_does_an_identity(kind: str, journal: Journal) -> None:
    assert needs_writable(volume(kind), journal) == (kind == "btrfs" or (journal == "replay" and kind in JOURNALING))


def test_what_is_not_mountable_needs_no_writable_device() -> None:
    assert not needs_writable(volume("LVM2_member"), "replay")


@pytest.mark.parametrize(("stderr", "state", "words", "retry"), [
    ("mount: /m: unknown filesystem type 'ext4'.", VolumeState.UNSUPPORTED, "no driver for ext4", False),
    ("mount(2) system call failed: File exists.", VolumeState.UNSUPPORTED, "unmount the other backup", False),
    ("mount(2) system call failed: Structure needs cleaning.", VolumeState.DAMAGED, "the ext4 is damaged;", True),
    ("mount(2) system call failed: No space left on device.", VolumeState.DAMAGED, "attach.overlay_size", True),
    ("mount: /m: wrong fs type, bad option, bad superblock", VolumeState.DAMAGED, "kernel lacks; restore", True),
    ("mount: /m: can't read superblock on /dev/loop0.", VolumeState.DAMAGED, "kernel lacks", True),
])  # fmt: skip
def test_a_refusal_of_the_kernel_becomes_a_sentence(
    stderr: str, state: VolumeState, words: str, *, retry: bool
) -> None:
    refusal = refusal_of_kernel("ext4", "replay", failure(stderr))
    assert isinstance(refusal, MountRefused)
    assert refusal.state == state
    assert words in refusal.reason
    assert "/dev" not in refusal.reason
    assert refusal.retry_as_crashed == retry


def test_as_crashed_is_offered_only_where_it_is_another_way() -> None:
    broken = failure("mount(2) system call failed: Structure needs cleaning.")
    for kind, journal in (("squashfs", "replay"), ("ext2", "replay"), ("ext4", "as-crashed")):
        refusal = refusal_of_kernel(kind, journal, broken)  # type: ignore[arg-type]  # a literal loses its type here
        assert isinstance(refusal, MountRefused)
        assert not refusal.retry_as_crashed


def test_a_btrfs_may_lie_on_further_disks() -> None:
    refusal = refusal_of_kernel("btrfs", "replay", failure("can't read superblock"))
    assert isinstance(refusal, MountRefused)
    assert "lies on further disks" in refusal.reason


def test_a_mount_that_hangs_is_damaged_and_not_tried_again_at_once() -> None:
    for refusal in (refusal_of_kernel("xfs", "replay", failure("", None)), refusal_of_ntfs_3g(None)):
        assert isinstance(refusal, MountRefused)
        assert refusal.state == VolumeState.DAMAGED
        assert "did not finish in time" in refusal.reason
        assert not refusal.retry_as_crashed


def test_a_failure_of_the_program_is_no_fault_of_the_volume() -> None:
    assert isinstance(refusal_of_kernel("ext4", "replay", failure("mount: only root can do that", 1)), errors.Failed)
    assert isinstance(refusal_of_ntfs_3g(21), errors.Failed)


@pytest.mark.parametrize(("status", "state", "words"), [
    (12, VolumeState.DAMAGED, "the NTFS is damaged"),
    (13, VolumeState.DAMAGED, "chkdsk"),
    (17, VolumeState.INCOMPLETE, "Windows software RAID"),
    (18, VolumeState.DAMAGED, "cannot be opened"),
    (-11, VolumeState.DAMAGED, "cannot be opened"),
])  # fmt: skip
def test_an_exit_status_of_ntfs_3g_becomes_a_sentence(status: int, state: VolumeState, words: str) -> None:
    refusal = refusal_of_ntfs_3g(status)
    assert isinstance(refusal, MountRefused)
    assert refusal.state == state
    assert words in refusal.reason


class Unused:
    """A device that must not be touched."""

    path = Path("/nonexistent")
    read_only = False

    def set_read_only(self, *, refuse: bool) -> None:
        raise AssertionError(refuse)

    def sectors_written(self) -> int:
        raise AssertionError

    def is_freed(self) -> bool:
        raise AssertionError

    async def freed(self) -> None:
        raise AssertionError

    async def close(self) -> None:
        raise AssertionError


async def test_without_ntfs_3g_an_ntfs_names_the_package_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(MountRefused, match=r"unsupported: .*install") as refusal:
        await filesystem.mount(Tools({}), Config(), volume("ntfs"), Unused(), tmp_path / "m", journal="replay")
    assert "ntfs-3g" in refusal.value.reason
    assert not (tmp_path / "m").exists()


async def test_a_mount_point_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(FileExistsError):
        await filesystem.mount(Tools({}), Config(), volume("ext4"), Unused(), tmp_path / "m", journal="replay")
    assert (tmp_path / "m").exists()


# --- mountinfo


MOUNTINFO = """\
36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue
42 27 7:0 / /m ro,nosuid,nodev,noexec,relatime - ext4 /dev/loop0 ro,errors=remount-ro
43 42 0:50 / /m ro - btrfs /dev/a\\134b ro,space_cache=v2,subvolid=5,subvol=/
"""


def test_mountinfo_is_read_with_its_optional_fields_and_escapes() -> None:
    spaced, plain, covering = mountinfo.parse(MOUNTINFO)
    odd = "".join("\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")  # what text.splitlines() takes for ends of lines
    assert mountinfo.parse(f"1 2 0:3 / /tmp/{odd} rw - tmpfs any rw\n{MOUNTINFO}")[1:] == (spaced, plain, covering)
    assert (spaced.id, spaced.root, spaced.path) == (36, "/mnt1", "/mnt 2")
    assert (spaced.filesystem, spaced.source) == ("ext3", "/dev/root")
    assert plain.options >= {"ro", "nosuid", "nodev", "noexec"}
    assert "errors=remount-ro" in plain.super_options
    assert covering.source == "/dev/a\\b"


def test_the_uppermost_mount_of_a_path_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mountinfo"
    file.write_text(MOUNTINFO, encoding="utf-8")
    monkeypatch.setattr(mountinfo, "_FILE", file)
    found = mountinfo.mounted_on(Path("/m"))
    assert found is not None
    assert found.id == 43
    assert mountinfo.mounted_on(Path("/mnt")) is None


async def test_what_is_mounted_already_has_appeared() -> None:
    with mountinfo.Watch() as watch:
        assert (await watch.appeared(Path("/proc"))).filesystem == "proc"
