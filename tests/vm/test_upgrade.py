"""A new version of the packages is installed while mounts are up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sendense_restored.client import Client
from tests.vm.appliance import main_pid, output, run
from tests.vm.watching import Watch, Wished, assert_at_rest, wished
from tools.lab.vm.project import MOUNTED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.vm.appliance import Appliance

PACKAGES = MOUNTED / "packages"


def version() -> str:
    return output("/usr/bin/dpkg-query", "--show", "--showformat=${Version}", "sendense-restored")


def install(directory: Path) -> None:
    run("/usr/bin/dpkg", "--install", *sorted(directory.glob("*.deb")))


@pytest.fixture
def newer(tmp_path: Path) -> Iterator[Path]:
    """The packages under a higher version, which the machine is rid of afterwards."""
    before = version()
    for package in PACKAGES.glob("*.deb"):
        tree = tmp_path / package.stem
        run("/usr/bin/dpkg-deb", "--raw-extract", package, tree)
        control = tree / "DEBIAN/control"
        control.write_text(control.read_text(encoding="utf-8").replace(before, f"{before}+1"), encoding="utf-8")
        run("/usr/bin/dpkg-deb", "-Znone", "--build", tree, tmp_path / package.name)
    yield tmp_path
    install(PACKAGES)
    assert version() == before


@pytest.mark.long
async def test_mounts_outlive_an_upgrade(appliance: Appliance, newer: Path) -> None:
    async with await Client.connect() as client, Watch.open() as watch:
        mounts = [
            await client.mount(appliance.backups[0], idle_timeout=7200, on_behalf_of="eve"),
            await client.mount(appliance.backups[-1], idle_timeout=3600, journal="as-crashed"),
        ]
        before, installed, pid, owner = await wished(client), version(), main_pid(), watch.owner
        install(newer)
        assert version() == f"{installed}+1"
        assert main_pid() not in {0, pid}
        await watch.another(than=owner)
        assert sorted(await client.list_mounts()) == sorted(mounts)
        before.check(Wished.of(await watch.states(client, mounts, "mounted")))
        for mount in mounts:
            await client.unmount(mount)
    assert_at_rest()
