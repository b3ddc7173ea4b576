"""The machine starts anew with mounts up: they are back, under the same ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored.client import Client
from tests.vm.watching import Watch, Wished, assert_at_rest
from tools.lab.vm.inside import STATE, reboot

if TYPE_CHECKING:
    from tests.vm.appliance import Appliance

BEFORE = STATE / "before-the-reboot"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@pytest.mark.long
async def test_mounts_are_back_after_a_reboot(appliance: Appliance) -> None:
    async with await Client.connect() as client, Watch.open() as watch:
        if not BEFORE.exists():
            mounts = [
                await client.mount(appliance.backups[0], idle_timeout=7200, on_behalf_of="eve"),
                await client.mount(appliance.backups[-1], idle_timeout=3600, journal="as-crashed"),
            ]
            wished = Wished.of([await client.mount_info(mount) for mount in mounts])
            BEFORE.write_text(json.dumps([BOOT_ID.read_text(), wished.to_json()]), encoding="utf-8")
            reboot()
        boot, text = json.loads(BEFORE.read_text(encoding="utf-8"))
        BEFORE.unlink()
        assert BOOT_ID.read_text() != boot
        before = Wished.from_json(text)
        assert sorted(await client.list_mounts()) == sorted(before.claims)
        infos = await watch.states(client, list(before.claims), "mounted")
        before.check(Wished.of(infos))
        assert {info.journal for info in infos} == {"replay", "as-crashed"}
        for info in infos:
            await client.unmount(info.id)
    assert_at_rest()
