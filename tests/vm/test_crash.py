"""The service dies, in every way that there is; systemd brings it back, and it keeps its promises.

Every mount is there again under its id, with its claims and the time that each had left. What of the old ones is
still open abroad answers EIO and holds its device until it is closed; nothing else is left.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.client import Client
from tests.vm import udev
from tests.vm.appliance import SERVICE, journal_since, main_pid, run, unit
from tests.vm.watching import Watch, Wished, descriptors, ended, let_go, nbd_disks, wished
from tools.lab import leftovers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.vm.appliance import Appliance

LARGE = "/srv/large.bin"
HOUR = 3600
JOURNALS = ("replay", "as-crashed")


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with await Client.connect() as client:
        yield client


@pytest.fixture
async def watch() -> AsyncIterator[Watch]:
    async with Watch.open() as watch:
        yield watch


@pytest.fixture(autouse=True)
def all_at_rest(at_rest: None) -> None:
    """Each test of this module."""


async def unmount_all(client: Client) -> None:
    for mount in await client.list_mounts():
        await client.unmount(mount)


async def read(client: Client, mount: str, path: str) -> bytes:
    descriptor, _ = await client.open_file(mount, path)
    with open(descriptor, "rb") as file:  # noqa: ASYNC230, PTH123 - a descriptor of a small file
        return file.read()


async def nbd_states(client: Client) -> dict[str, str]:
    """What becomes of each of the service's NBD devices."""
    devices = (await client.resources()).devices
    return {device.path: device.state for device in devices if device.path.startswith("/dev/nbd")}


def restarts() -> int:
    """How often systemd has started it again because it had failed."""
    return int(unit(SERVICE, "NRestarts"))


# --- killed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.long)])
async def test_killed_with_mounts_of_which_one_is_held(
    appliance: Appliance, client: Client, watch: Watch, held: list[int], count: int
) -> None:
    """With two, and with as many as there are places and NBD devices."""
    keys = itertools.product(appliance.backups, JOURNALS, (False, True))
    mounts = [
        await client.mount(backup, journal=journal, all_disks=all_disks, idle_timeout=time, on_behalf_of="eve")
        for time, (backup, journal, all_disks) in enumerate(itertools.islice(keys, count), start=HOUR)
    ]
    infos = [await client.mount_info(mount) for mount in mounts]
    assert {volume.state for info in infos for volume in info.volumes} == {"mounted"}
    before = Wished.of(infos)
    for volume in infos[0].volumes:
        held += (await client.open_file(mounts[0], f"/{volume.name}{LARGE}"))[:1]
    (drains,) = nbd_disks(infos[0])
    listing = await client.listing(mounts[1], "/", recursive=True)
    first = await anext(listing)
    failures, processes, owner, begun = restarts(), descriptors(), watch.owner, time.time()

    os.kill(main_pid(), signal.SIGKILL)
    await ended(processes)
    with pytest.raises(errors.Unavailable):
        async for _ in listing:
            pass
    listing.close()
    assert first
    for descriptor in held:
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(descriptor, 4096, 1 << 20)

    await watch.another(than=owner)
    assert restarts() == failures + 1
    assert "with signal SIGKILL" not in journal_since(begun), "children were killed before they had ended"
    assert sorted(await client.list_mounts()) == sorted(mounts)
    infos = await watch.states(client, mounts, "mounted")
    before.check(Wished.of(infos))
    for info in infos:
        for volume in info.volumes:
            assert volume.state == "mounted", volume
            if info.journal == "replay":  # what a journal has is all that there is of a young XFS
                assert await read(client, info.id, f"/{volume.name}/etc/hostname") == b"web01\n"
    states = await nbd_states(client)
    assert states.pop(drains) == "draining"
    ours = {path for path, state in states.items() if state == "ours"}
    assert nbd_disks(*infos) == ours
    loops = [device for info in infos for device in info.devices if device.startswith("/dev/loop")]
    if count <= len(states):  # each mount has a device of its own, and none the one that drains
        assert (len(ours), loops) == (count, [])
    else:
        assert (len(ours), len(loops)) == (len(states), 3), "the last has not gone another way"
    udev.settle()
    seen = {device for info in infos for device in info.devices if not udev.left_alone(device)}
    assert seen == set(), "the host looked at them"

    await unmount_all(client)
    assert {path for path, state in (await nbd_states(client)).items() if state != "free"} == {drains}
    connected = Path("/sys/block", Path(drains).name, "pid")
    assert connected.exists()
    let_go(held)
    assert leftovers.left_in_time({}, lambda: {drains: "held"} if connected.exists() else {}) == []
    assert set((await nbd_states(client)).values()) == {"free"}
    assert appliance.chain.unchanged()


# --- copies of one machine ------------------------------------------------------------------------------------------


@pytest.mark.long
async def test_a_file_system_is_mounted_again_while_it_still_drains(
    appliance: Appliance, client: Client, held: list[int]
) -> None:
    """A kernel before 6.7 takes one btrfs for the other; and what was synced last is there all the same."""
    path = "/partition-3" + os.fsdecode(appliance.chain.backups[-1].journal_only)
    first = await client.mount(appliance.backups[-1])
    held.append((await client.open_file(first, "/partition-3/etc/hostname"))[0])
    await client.unmount(first, force=True)
    views = {}
    for journal in JOURNALS:
        mount = await client.mount(appliance.backups[-1], journal=journal)
        volume = next(each for each in (await client.mount_info(mount)).volumes if each.name == "partition-3")
        assert volume.state == "mounted", volume.reason
        views[journal] = volume.view
        if journal == "replay":
            assert await read(client, mount, path) == b"synced, then the power went\n"
        else:
            with pytest.raises(errors.PathNotFound):
                await read(client, mount, path)
    assert views == {"replay": "replayed", "as-crashed": "as-crashed"}
    await unmount_all(client)
    let_go(held)
    assert appliance.chain.unchanged()


# --- stopped --------------------------------------------------------------------------------------------------------


@pytest.mark.long
async def test_restarted_in_good_order(appliance: Appliance, client: Client, watch: Watch) -> None:
    mounts = [
        await client.mount(appliance.backups[0], idle_timeout=HOUR, on_behalf_of="eve"),
        await client.mount(appliance.backups[1], idle_timeout=2 * HOUR),
    ]
    assert await client.mount(appliance.backups[0], idle_timeout=3 * HOUR) == mounts[0]
    before, owner = await wished(client), watch.owner
    run("/usr/bin/systemctl", "restart", SERVICE)
    assert watch.owner == owner, "the watch hears of it only now"
    await watch.another(than=owner)
    before.check(Wished.of(await watch.states(client, mounts, "mounted")))
    await unmount_all(client)


@contextlib.contextmanager
def drop_in(text: str) -> Iterator[None]:
    """The unit with these lines, from its next start on."""
    directory = Path(f"/run/systemd/system/{SERVICE}.d")
    directory.mkdir(parents=True)
    (directory / "test.conf").write_text(text, encoding="utf-8")
    try:
        run("/usr/bin/systemctl", "daemon-reload")
        yield
    finally:
        shutil.rmtree(directory)
        run("/usr/bin/systemctl", "daemon-reload")
        run("/usr/bin/systemctl", "restart", SERVICE)


@pytest.mark.long
async def test_one_that_hangs_is_ended_by_the_watchdog(appliance: Appliance, client: Client, watch: Watch) -> None:
    begun = time.time()
    with drop_in("[Service]\nWatchdogSec=20\n"):
        run("/usr/bin/systemctl", "restart", SERVICE)
        mount = await client.mount(appliance.backups[0], idle_timeout=HOUR)
        before, count, owner = await wished(client), restarts(), await watch.another(than="")
        os.kill(main_pid(), signal.SIGSTOP)
        await watch.another(than=owner)
        assert restarts() == count + 1
        before.check(Wished.of(await watch.states(client, [mount], "mounted")))
        await unmount_all(client)
    assert "Watchdog timeout" in journal_since(begun)


@pytest.mark.long
async def test_one_that_was_stopped_is_started_by_a_call(appliance: Appliance, client: Client, watch: Watch) -> None:
    mount = await client.mount(appliance.backups[0], idle_timeout=HOUR)
    before, owner = await wished(client), watch.owner
    run("/usr/bin/systemctl", "stop", SERVICE)
    assert main_pid() == 0
    assert await client.list_mounts() == [mount]
    await watch.another(than=owner)
    before.check(Wished.of(await watch.states(client, [mount], "mounted")))
    await unmount_all(client)


# --- what it depends on ---------------------------------------------------------------------------------------------


@pytest.mark.long
async def test_it_ends_with_the_message_bus_and_comes_back(
    appliance: Appliance, client: Client, watch: Watch
) -> None:
    mount = await client.mount(appliance.backups[0], idle_timeout=HOUR)
    before, count = await wished(client), restarts()
    daemon = os.pidfd_open(main_pid())
    os.kill(int(unit("dbus.service", "MainPID")), signal.SIGKILL)
    await watch.end_of_the_bus()
    await ended([daemon])
    async with Watch.open() as later, await Client.connect() as anew:
        await later.another(than="")
        assert restarts() == count + 1
        before.check(Wished.of(await later.states(anew, [mount], "mounted")))
        await unmount_all(anew)
