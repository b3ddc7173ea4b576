"""The whole way of a restore, as a member of the group, against the service as it was installed."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import pytest

from tests.vm.appliance import MANAGER, MEMBER, Appliance, call, output, repository, restore, run


def test_a_member_restores_a_file(appliance: Appliance) -> None:
    mount = appliance.mount()
    content = output("/usr/bin/sendense-restore", "cat", mount, "/partition-1/etc/hostname", user=MEMBER)
    assert content == "web01\n"
    run("/usr/bin/sendense-restore", "unmount", mount, user=MEMBER)
    assert restore("mounts") == []


def test_every_file_of_every_file_system(appliance: Appliance) -> None:
    mount = appliance.mount()
    expected = appliance.chain.backups[-1].files
    for volume in expected:
        file = expected[volume][b"/srv/large.bin"]
        where = f"/home/{MEMBER}/large.bin"
        run("/usr/bin/sendense-restore", "get", mount, f"/{volume}/srv/large.bin", where, user=MEMBER)
        with Path(where).open("rb") as restored:
            assert hashlib.file_digest(restored, "sha256").hexdigest() == file.sha256
        run("/bin/rm", where)
    assert appliance.chain.unchanged()


@pytest.mark.long
def test_all_disks_of_a_backup(appliance: Appliance) -> None:
    """The two are copies of one, so each file system is there twice with the same identity."""
    directory = Path("/srv/twins")
    (directory / "web02").mkdir(parents=True)
    for number in (0, 1):
        shutil.copy(appliance.chain.backups[0].image, directory / f"web02/full-disk{number}.qcow2")
    with repository("twins", directory) as known:
        ((backup,), _) = call(MANAGER, "ListBackups", "a{sv}", "1", "repository_id", "s", known)
        backup_id = backup["backup_id"]["data"]
        mount = output("/usr/bin/sendense-restore", "mount", "--all-disks", backup_id, user=MEMBER).strip()
        (info,) = restore("mounts")
        assert [(volume["name"], volume["state"]) for volume in info["volumes"]] == [
            (f"disk-{disk}-partition-{part}", "mounted") for disk in (0, 1) for part in (1, 2, 3)
        ]
        assert {re.sub(r"p[0-9]+$", "", device) for device in info["devices"]} == {"/dev/nbd0", "/dev/nbd1"}
        for disk in (0, 1):
            file = f"/disk-{disk}-partition-1/etc/hostname"
            assert output("/usr/bin/sendense-restore", "cat", mount, file, user=MEMBER) == "web01\n"
        run("/usr/bin/sendense-restore", "unmount", mount, user=MEMBER)
