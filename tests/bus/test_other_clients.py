"""Clients of other making: GDBus (GLib) and busctl (sd-bus) see the same service as ours."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sendense_restored.client import BUS_NAME, MANAGER, MOUNT, ROOT, Client, mount_id, mount_object
from tests.bus.served import Served, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

GDBUS_CLIENT = Path(__file__).with_name("gdbus_client.py")
EXAMPLE = Path(__file__).parents[2] / "examples/copy_file.py"
DISTRIBUTION_PYTHON = "/usr/bin/python3"


@pytest.fixture
async def service(bus_address: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with served(bus_address, tmp_path) as service:
        yield service


async def run(*argv: str) -> str:
    """What a program prints; it has to succeed."""
    done = await asyncio.to_thread(
        subprocess.run, argv, capture_output=True, check=False, timeout=120, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


async def busctl(service: Served, *arguments: str) -> Any:  # noqa: ANN401 - a JSON document
    """What busctl prints with --json, or its text if that is no JSON."""
    program = shutil.which("busctl")
    assert program is not None, "tools/setup --dev installs it"
    said = await run(program, f"--address={service.address}", "--json=short", *arguments)
    try:
        return json.loads(said)
    except ValueError:
        return said


async def test_a_restore_through_gdbus(service: Served) -> None:
    said = json.loads(await run(DISTRIBUTION_PYTHON, str(GDBUS_CLIENT), service.address))
    assert said["entries"] == [["hostname", "file"], ["motd", "file"]]
    assert (said["content"], said["size"], said["cursor"]) == ("web01\n", 6, "")
    assert said["listing"][-1] == {"summary": {"entries": 5, "errors": 0, "truncated": False}}
    assert said["error"] == f"{BUS_NAME}.Error.PathNotFound"
    path, heard = said["path"], said["heard"]
    assert [each[:2] for each in heard if each[0] != "changed"] == [["added", path], ["removed", path]]
    changed = {name for each in heard if each[0] == "changed" for name in each[2]}
    assert changed <= {"State", "Busy", "ExpiresAt"}
    assert "State" in changed
    # GDBus takes what a signal brings, so a property that is in none is not there without asking.
    assert (said["state"], said["backup"]) == ("mounted", None)


def example(service: Served, *arguments: str) -> list[str]:
    return [
        "/usr/bin/env",
        f"DBUS_SYSTEM_BUS_ADDRESS={service.address}",
        DISTRIBUTION_PYTHON,
        str(EXAMPLE),
        *arguments,
    ]


async def test_the_example(service: Served, tmp_path: Path) -> None:
    target = tmp_path / "hostname"
    said = await run(*example(service, "b1", "/partition-1/etc/hostname", str(target)))
    assert said == f"{target}: 6 bytes\n"
    assert target.read_text(encoding="utf-8") == "web01\n"
    async with await Client.connect(service.address) as client:
        assert await client.list_mounts() == []


async def test_what_the_example_says_of_errors(service: Served, tmp_path: Path) -> None:
    command = example(service, "b1", "/partition-1/nothing", str(tmp_path / "nothing"))
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=False, timeout=120)
    assert done.returncode == 1
    assert not done.stderr.startswith(b"GDBus")
    assert done.stderr.endswith(f" ({BUS_NAME}.Error.PathNotFound)\n".encode())
    assert not (tmp_path / "nothing").exists()
    async with await Client.connect(service.address) as client:
        assert await client.list_mounts() == []


async def test_what_busctl_shows_of_the_service(service: Served) -> None:
    async with await Client.connect(service.address) as client:
        mount = await client.mount("b1")
    tree = await busctl(service, "tree", "--list", BUS_NAME)
    assert mount_object(mount) in str(tree)
    shown = str(await busctl(service, "introspect", BUS_NAME, mount_object(mount), MOUNT))
    for member in (".ListFiles", ".OpenListing", ".Unmount", ".ExpiresAt"):
        assert member in shown
    found = await busctl(service, "get-property", BUS_NAME, mount_object(mount), MOUNT, "State")
    assert found == {"type": "s", "data": "mounted"}


async def test_a_restore_through_busctl(service: Served) -> None:
    arguments = ("Mount", "sa{sv}", "b1", "1", "idle_timeout", "t", "600")
    answer = await busctl(service, "call", BUS_NAME, ROOT, MANAGER, *arguments)
    (path,) = answer["data"]
    answer = await busctl(service, "call", BUS_NAME, path, MOUNT, "ListFiles", "sa{sv}", "/partition-1/etc", "0")
    assert [entry[0] for entry in answer["data"][0]] == ["hostname", "motd"]
    await busctl(service, "call", BUS_NAME, path, MOUNT, "Unmount", "a{sv}", "0")
    assert service.mounts.ended.error(mount_id(path)).message.startswith("the mount has ended")


async def test_busctl_hears_signals_from_the_right_paths(service: Served) -> None:
    program = shutil.which("busctl")
    assert program is not None
    match = f"--match=type='signal',sender='{BUS_NAME}'"
    # A connection that becomes a monitor gives its name up.
    listening = asyncio.Event()
    service.bus.on_left(lambda _: listening.set())
    monitor = await asyncio.create_subprocess_exec(
        *(program, f"--address={service.address}", "--json=short", match, "monitor"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert monitor.stdout is not None
    try:
        await asyncio.wait_for(listening.wait(), 60)
        async with await Client.connect(service.address) as client:
            mount = await client.mount("b1")
            await client.unmount(mount)
        heard: list[dict[str, Any]] = []
        async with asyncio.timeout(60):
            while not heard or heard[-1]["member"] != "InterfacesRemoved":
                heard.append(json.loads(await monitor.stdout.readline()))
    finally:
        monitor.terminate()
        await monitor.communicate()
    manager, path = "org.freedesktop.DBus.ObjectManager", mount_object(mount)
    assert (heard[0]["member"], heard[0]["path"], heard[0]["interface"]) == ("InterfacesAdded", ROOT, manager)
    assert (heard[-1]["member"], heard[-1]["path"], heard[-1]["interface"]) == ("InterfacesRemoved", ROOT, manager)
    assert {each["path"] for each in heard[1:-1]} == {path}
    assert all(each["payload"]["data"][0] == MOUNT for each in heard[1:-1])
