"""The whole way of a restore, as a member of the group, against the service as it was installed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.vm.appliance import MEMBER, Appliance, output, restore, run


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
