"""The whole service over an appliance's catalogue, on a server that goes and comes back."""

# mypy: allow-untyped-calls
# dbus-next, which plays the clients, has functions without annotations.

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from sendense_restored import errors
from sendense_restored.client import CATALOG, MANAGER, ROOT, Client
from tests import simulator as sim
from tests.bus.appliance import CONTEXTS, Hand, make_tables
from tests.bus.appliance import database as hand_of
from tests.bus.peer import error_of
from tests.bus.served import ANNA, Served, served, variants

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.bus.command_line import CommandLine
    from tools.lab.mariadb import Server

HOSTNAME = "/partition-1/etc/hostname"


@pytest.fixture
def appliance(mortal_mariadb: Server, tmp_path: Path) -> Iterator[Hand]:
    mortal_mariadb.execute("CREATE DATABASE appliance COLLATE utf8mb4_unicode_ci")
    with hand_of(mortal_mariadb, "appliance") as hand:
        make_tables(hand)
        hand.execute(CONTEXTS)
        hand.add_repository("main", str(tmp_path / "repository"))
        for number in (1, 2):
            hand.add(f"b{number}", vm_name=f"vm{number}")
        hand.insert("vm_backup_contexts", context_id="ctx-1", vm_name="vm1", repository_id="main")
        yield hand


@pytest.fixture
async def service(bus_address: str, tmp_path: Path, appliance: Hand, mortal_mariadb: Server) -> AsyncIterator[Served]:
    del appliance  # it is there before
    async with served(bus_address, tmp_path, mortal_mariadb.url("appliance")) as service:
        for number in (1, 2):
            sim.make_images(tmp_path / "repository", f"b{number}", (("mountable-ext4",),))
        yield service


async def content(client: Client, mount: str) -> bytes:
    descriptor, _ = await client.open_file(mount, HOSTNAME)
    try:
        return os.read(descriptor, 100)
    finally:
        os.close(descriptor)


async def test_what_the_appliance_has_is_listed_and_mounted(client: Client) -> None:
    found, cursor = await client.list_backups()
    assert (sorted(backup.backup_id for backup in found), cursor) == (["b1", "b2"], "")
    assert [(vm.vm_name, vm.context_id) for vm in (await client.list_vms())[0]] == [("vm1", "ctx-1"), ("vm2", "vm2")]
    assert [repository.repository_id for repository in await client.list_repositories()] == ["main"]
    mount = await client.mount("b1")
    assert await content(client, mount) == sim.FILES["etc/hostname"]
    with pytest.raises(errors.BackupNotFound):
        await client.mount("B1")


async def test_who_may_not_mount_learns_nothing_of_the_catalogue(service: Served, mortal_mariadb: Server) -> None:
    anna = await service.user(ANNA)
    service.polkit.allowed.discard("mount")
    mortal_mariadb.kill()
    for backup in ("b1", "no such backup"):
        assert error_of(await anna.ask("Mount", "sa{sv}", backup, {}))[0] == "NotAuthorized"
    service.polkit.allowed.add("mount")
    assert error_of(await anna.ask("Mount", "sa{sv}", "b1", {}))[0] == "CatalogUnavailable"


async def test_a_catalogue_that_is_away_ends_no_mount_and_comes_back(
    service: Served, client: Client, mortal_mariadb: Server, appliance: Hand
) -> None:
    mount = await client.mount("b1")
    mortal_mariadb.kill()
    for call in (client.list_backups(), client.list_vms(), client.list_repositories(), client.mount("b2")):
        with pytest.raises(errors.CatalogUnavailable, match="try again when its server runs"):
            await call
    for _ in range(2):
        assert await service.sweep.run() == 0
    assert await content(client, mount) == sim.FILES["etc/hostname"]
    assert [row.id for row in await service.store.mount_rows()] == [mount]
    await client.unmount(mount)
    assert await service.store.mount_rows() == []

    mortal_mariadb.start()
    with hand_of(mortal_mariadb, "appliance") as hand:
        mount, other = await client.mount("b1"), await client.mount("b2")
        assert await service.sweep.run() == 0
        hand.remove("b1")
        assert await service.sweep.run() == 1
        with pytest.raises(errors.Expired, match="its backup is no longer in the catalogue"):
            await client.keep_alive(mount)
        assert await content(client, other) == sim.FILES["etc/hostname"]
        assert [row.id for row in await service.store.mount_rows()] == [other]
        assert len((await client.list_backups())[0]) == 1
    del appliance


async def test_an_appliances_catalogue_is_not_changed_from_here(service: Served, client: Client) -> None:
    user = await service.user(ANNA)
    service.polkit.allowed.add("manage")
    reply = await user.ask("Introspect", "", interface="org.freedesktop.DBus.Introspectable")
    names = {each.attrib["name"] for each in ET.fromstring(reply.body[0]).iter("interface")}
    assert MANAGER in names
    assert CATALOG not in names
    answer = await user.ask("Scan", "sa{sv}", "main", variants(), interface=CATALOG)
    assert error_of(answer)[0] == "org.freedesktop.DBus.Error.UnknownInterface"
    properties = "org.freedesktop.DBus.Properties"
    answer = await user.ask("GetAll", "s", CATALOG, interface=properties, path=ROOT)
    assert error_of(answer)[0] == "org.freedesktop.DBus.Error.UnknownInterface"
    for call in (client.add_repository("x", "/"), client.scan("main"), client.remove_backup("b1")):
        with pytest.raises(
            errors.InvalidOption, match=r"belongs to the appliance, or to another program.*change it there"
        ):
            await call


async def test_the_command_line_says_that_the_catalogue_is_elsewhere(
    service: Served, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", service.address)
    listed = await cli("catalog", "vms", "--json")
    assert (listed.code, "ctx-1" in listed.out) == (0, True)
    refused = await cli("catalog", "scan", "main")
    assert (refused.code, refused.out) == (2, "")
    assert "the catalogue belongs to the appliance" in refused.err
    assert "change it there" in refused.err


async def test_a_catalogue_that_hangs_does_not_stop_the_records(service: Served, client: Client) -> None:
    """Both databases have a thread of their own."""
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hang() -> None:
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()

    hanging = asyncio.create_task(service.store._catalogue.read(hang))
    async with asyncio.timeout(60):
        assert await client.list_mounts() == []
        assert await service.store.mount_rows() == []
    assert not hanging.done()
    gate.set()
    await hanging
