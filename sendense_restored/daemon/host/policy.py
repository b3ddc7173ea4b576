"""The policy of mounting: which driver and options each file system gets, and what its refusals mean.

A constant table; no text of a client or of a disk ever becomes an option. Whatever has no line here is not mounted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from .process import ToolError, internal
from .signatures import RESTORE_DISK, VolumeState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sendense_restored import errors

    from .volumes import Volume

Journal = Literal["replay", "as-crashed"]


@dataclass(frozen=True)
class Policy:
    """How one kind of file system is mounted."""

    driver: str
    """The type given to mount(8), or ``ntfs-3g``."""
    options: tuple[str, ...] = ()
    unreplayed: tuple[str, ...] | None = None
    """Options that leave a journal alone; None if the file system has none."""
    always_writes: bool = False
    """Whether its driver writes to a device that it could replay a journal on, though there is none to replay."""
    identified: bool = False
    """Whether a kernel may refuse it because a copy of it is mounted, so that it is given an identity of its own."""


# Without nosymfollow: the reader resolves symlinks itself, inside the volume, which that flag would forbid.
FLAGS: Final = ("ro", "nodev", "nosuid", "noexec")

# An ext superblock may ask the kernel to panic on errors, so the answer to errors is always given.
_EXT4 = Policy("ext4", ("errors=remount-ro",), unreplayed=("noload",))
POLICIES: Final[Mapping[str, Policy]] = {
    # The ext4 driver serves all three; what blkid calls ext2 has no journal.
    "ext2": replace(_EXT4, unreplayed=None),
    "ext3": _EXT4,
    "ext4": _EXT4,
    # Two backups of one machine have the same UUID.
    "xfs": Policy("xfs", ("nouuid",), unreplayed=("norecovery",), always_writes=True),
    # The top level, whatever the default subvolume is: all subvolumes are directories below it.
    "btrfs": Policy("btrfs", ("subvolid=5",), unreplayed=("rescue=nologreplay",), identified=True),
    "vfat": Policy("vfat", ("utf8=1", "shortname=mixed")),
    "exfat": Policy("exfat", ("iocharset=utf8",)),
    "iso9660": Policy("iso9660", ("iocharset=utf8",)),
    "squashfs": Policy("squashfs"),
    # allow_other: the reader has another uid. no_def_opts: no option but these. norecover: never reset a log.
    # efs_raw: encrypted files are known by their size, and are the reader's to refuse (reader/ntfs.py says why).
    "ntfs": Policy(
        "ntfs-3g",
        (
            *("allow_other", "no_def_opts", "no_detach", "norecover", "noatime", "streams_interface=windows"),
            *("efs_raw", "uid=0", "gid=0", "fmask=0333", "dmask=0222"),
        ),
        unreplayed=(),
    ),
}


def needs_writable(volume: Volume, journal: Journal) -> bool:
    """Whether the device of ``volume`` must be writable (backed by an overlay) for this view."""
    policy = POLICIES.get(volume.filesystem)
    if policy is None:
        return False
    return policy.identified or (journal == "replay" and policy.unreplayed is not None)


class MountRefused(Exception):  # noqa: N818 - as errors.py has it: named for what happened
    """A volume cannot be mounted; ``state`` and ``reason`` are what the client sees of it."""

    def __init__(self, state: VolumeState, reason: str, *, retry_as_crashed: bool = False) -> None:
        super().__init__(f"{state}: {reason}")
        self.state = state
        self.reason = reason
        self.retry_as_crashed = retry_as_crashed
        """The journal could not be replayed: a read-only device and ``as-crashed`` may still work."""


# Exit codes of ntfs-3g and ntfs-3g.probe.
_NTFS_NOT_NTFS = 12
_NTFS_CORRUPT = 13
NTFS_HIBERNATED = 14
NTFS_UNCLEAN = 15
_NTFS_RAID = 17
_NTFS_NO_PRIVILEGE = 19
_NTFS_FUSE = 21

_MOUNT_FAILED = 32
_TOO_SLOW = "mounting it did not finish in time; check the repository and mount the backup again"
_ON_A_COPY = "restore the whole disk and repair a copy of it"


def is_copy_refused(error: ToolError) -> bool:
    """Whether mount(8) failed because the kernel has a copy of the same file system mounted."""
    return error.returncode == _MOUNT_FAILED and "File exists" in error.stderr


def refusal_of_kernel(filesystem: str, journal: Journal, error: ToolError) -> MountRefused | errors.Failed:
    """What a failure of mount(8) means, by its exit code and its (untranslated) message."""
    policy = POLICIES[filesystem]
    if error.returncode is None:
        return MountRefused(VolumeState.DAMAGED, _TOO_SLOW)
    if error.returncode != _MOUNT_FAILED:
        return internal("mounting a volume", error)
    if "unknown filesystem type" in error.stderr:
        reason = f"this system's kernel has no driver for {policy.driver}; use a kernel that has one"
        return MountRefused(VolumeState.UNSUPPORTED, reason)
    if is_copy_refused(error):
        reason = (
            f"another copy of the same {filesystem} is mounted, this system's kernel cannot open two, and this one"
            " cannot be given another identity; unmount the other backup first"
        )
        return MountRefused(VolumeState.UNSUPPORTED, reason)
    if "No space left" in error.stderr:
        reason = "there is no space to replay its journal; raise attach.overlay_size or mount it as-crashed"
    elif "Structure needs cleaning" in error.stderr:
        reason = f"the {filesystem} is damaged; {_ON_A_COPY}"
    else:
        others = ", or lies on further disks as well" if filesystem == "btrfs" else ""
        reason = (
            f"the {filesystem} is damaged, or uses features that this system's kernel lacks{others}; {_ON_A_COPY}"
        )
    retry = journal == "replay" and policy.unreplayed is not None
    return MountRefused(VolumeState.DAMAGED, reason, retry_as_crashed=retry)


def refusal_of_ntfs_3g(returncode: int | None) -> MountRefused | errors.Failed:
    """What an exit code of ntfs-3g or its probe means; None: no answer in time."""
    if returncode is None:
        return MountRefused(VolumeState.DAMAGED, _TOO_SLOW)
    if returncode in {_NTFS_NO_PRIVILEGE, _NTFS_FUSE}:
        return internal("mounting a volume", RuntimeError(f"ntfs-3g ended with {returncode}"))
    if returncode == _NTFS_RAID:
        reason = f"part of a Windows software RAID, which this version does not assemble; {RESTORE_DISK}"
        return MountRefused(VolumeState.INCOMPLETE, reason)
    if returncode in {_NTFS_NOT_NTFS, _NTFS_CORRUPT}:
        return MountRefused(VolumeState.DAMAGED, f"the NTFS is damaged; {_ON_A_COPY} with chkdsk")
    return MountRefused(VolumeState.DAMAGED, f"the NTFS cannot be opened; {_ON_A_COPY} with chkdsk")
