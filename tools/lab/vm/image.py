"""The system disk of a virtual machine: a Debian release with all that the project's packages depend on.

Built by mmdebstrap and mke2fs, kept in ``~/.cache/sendense-restored/vm`` (XDG_CACHE_HOME) under a hash of the recipe,
which is this module's constants: a change of them builds a new one, and the old one goes. The machine has no network,
so what is missing here is missing in there, and ``apt install`` of the packages fails for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .project import MOUNTED, PORT

if TYPE_CHECKING:
    from collections.abc import Iterator

SUITES = {"13": "trixie", "12": "bookworm"}
"""Debian's releases by number: all that are tested where nobody chooses some with ``--debian``."""

_DISK_SIZE = "4G"  # sparse

_SYSTEM = """
    linux-image-cloud-amd64 initramfs-tools zstd
    systemd systemd-sysv dbus dbus-user-session udev polkitd pkexec libpam-systemd kmod procps sudo
    util-linux login passwd
    gdisk fdisk lsof strace psmisc
"""
# What the packages depend on, so that installing them needs no network.
_DEPENDENCIES = """
    python3 python3-dbus-next python3-pyudev python3-sdnotify python3-peewee python3-seccomp python3-systemd
    python3-typer python3-rich python3-pymysql python3-cryptography adduser
    qemu-utils nbd-client fuse3 mount
    e2fsprogs xfsprogs btrfs-progs ntfs-3g dosfstools exfatprogs squashfs-tools
"""
_TESTS = """
    python3-pytest python3-pytest-asyncio python3-gi gir1.2-glib-2.0 python3-pexpect
    lvm2 mdadm cryptsetup-bin udisks2
"""
# The image server has moved: Debian 13 has qemu-storage-daemon in qemu-utils.
_OF_A_RELEASE = {"12": "qemu-system-common", "13": ""}

# The modules that the kernel needs to find its root; the default set makes an initrd that is slow to make and boot.
_INITRAMFS_HOOK = """#!/bin/sh
[ "$1" = prereqs ] && exit
. /usr/share/initramfs-tools/hook-functions
manual_add_modules virtio_pci virtio_blk ext4
"""
_JOURNAL = "[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\n"
_INITRAMFS = "MODULES=list\nCOMPRESS=zstd\nFSTYPE=ext4\n"

_UNIT = f"""[Unit]
Description=Tests of sendense-restored
Requires=dev-virtio\\x2dports-{PORT}.device
After=multi-user.target dbus.service dev-virtio\\x2dports-{PORT}.device
RequiresMountsFor={MOUNTED}

[Service]
ExecStart=/usr/bin/python3 -m tools.lab.vm.runner
WorkingDirectory={MOUNTED}
Environment=PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/root
StandardOutput=file:/dev/console
StandardError=inherit
KillMode=mixed

[Install]
WantedBy=graphical.target
"""
# Slow things of a new system that no test needs. The getty would talk on the console.
_MASKED = """
    serial-getty@ttyS0.service getty@tty1.service apt-daily.timer apt-daily-upgrade.timer fstrim.timer man-db.timer
    e2scrub_all.timer e2scrub_reap.service systemd-networkd.service systemd-timesyncd.service dpkg-db-backup.timer
    systemd-firstboot.service mdmonitor.service
"""
_SETUP = f"""set -eu
cd "$1"
echo restore-test > etc/hostname
echo '/dev/vda / ext4 defaults,noatime 0 1' > etc/fstab
# What is tested: the second disk (``project``).
echo '/dev/disk/by-id/virtio-project {MOUNTED} squashfs ro 0 0' >> etc/fstab
mkdir -p {MOUNTED.relative_to("/")}
chroot . passwd -d root >/dev/null
for unit in $2; do ln -sf /dev/null "etc/systemd/system/$unit"; done
chroot . systemctl enable sendense-tests.service 2>/dev/null
rm -rf var/cache/apt/archives/*.deb var/lib/apt/lists/* usr/share/doc usr/share/locale
# Compiled once here, and not at each start of a program in a machine that emulates every instruction.
chroot . python3 -m compileall -q /usr/lib/python3/dist-packages >/dev/null || true
"""


@dataclass(frozen=True)
class Image:
    """A system that boots; not to be written to."""

    disk: Path
    """An ext4 file system, raw, without partitions."""
    kernel: Path
    initrd: Path


def packages(release: str) -> list[str]:
    """What is installed in it."""
    return f"{_SYSTEM} {_DEPENDENCIES} {_TESTS} {_OF_A_RELEASE[release]}".split()


def mirror() -> str:
    """Where packages come from; DEBIAN_MIRROR in the environment may name another place."""
    return os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")


def get(release: str) -> Image:
    """The image of a release, built if it is not there. Raises CalledProcessError."""
    recipe = repr((packages(release), _DISK_SIZE, _INITRAMFS_HOOK, _INITRAMFS, _JOURNAL, _UNIT, _MASKED, _SETUP))
    name = f"debian-{release}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sendense-restored/vm")
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache / name
    with _only_one(cache / f"debian-{release}.lock"):
        if not directory.exists():
            # Images of other recipes, and what a build has left that was killed.
            for old in (*cache.glob(f"debian-{release}-*"), *cache.glob(f"making-{release}-*")):
                shutil.rmtree(old)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f"making-{release}-") as making:
                _build(release, Path(making))
                Path(making, "image").rename(directory)
    return Image(directory / "disk", directory / "kernel", directory / "initrd")


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(release: str, work: Path) -> None:
    root, image, log = work / "root", work / "image", work / "log"
    files = work / "files"
    for path, text, mode in (
        ("etc/initramfs-tools/conf.d/rig", _INITRAMFS, 0o644),
        ("etc/initramfs-tools/hooks/rig", _INITRAMFS_HOOK, 0o755),
        ("etc/systemd/system/sendense-tests.service", _UNIT, 0o644),
        ("etc/systemd/journald.conf.d/rig.conf", _JOURNAL, 0o644),
    ):
        target = files / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        target.chmod(mode)
    setup = work / "setup"
    setup.write_text(_SETUP, encoding="utf-8")
    image.mkdir()
    # If this process is killed, so are mmdebstrap and all that it runs, and what it has mounted in the tree goes with
    # them: whoever removes the tree later must not find the host's /dev/shm in it.
    command = [
        *("setpriv", "--pdeathsig=KILL", "--", "unshare", "--mount", "--pid", "--fork", "--kill-child=KILL"),
        *("--mount-proc", "--", "mmdebstrap", "--variant=minbase", "--mode=root"),
        f"--include={','.join(packages(release))}",
        f"--essential-hook=cp -r {files}/. $1/",
        f"--customize-hook=sh {setup} $1 '{' '.join(_MASKED.split())}'",
        *(SUITES[release], str(root), mirror()),
    ]
    with log.open("wb") as output:
        try:
            subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=True)
        except subprocess.CalledProcessError:
            print(log.read_text(errors="replace")[-4000:])
            raise
    (kernel,) = root.glob("boot/vmlinuz-*")
    (initrd,) = root.glob("boot/initrd.img-*")
    shutil.copy(kernel, image / "kernel")
    shutil.copy(initrd, image / "initrd")
    options = ["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1,nodiscard", "-m", "0"]
    subprocess.run(
        ["/sbin/mke2fs", *options, "-d", root, image / "disk", _DISK_SIZE], stdin=subprocess.DEVNULL, check=True
    )
