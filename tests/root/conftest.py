"""For the root tier: a machine of our own, and nothing left on it after a test.

The tests run in a private mount namespace with an empty ``/run`` and ``/mnt``, made here, so that plain
``pytest tests/root`` does not touch the machine either.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import linux
from sendense_restored.daemon.host.attach import Workplace
from sendense_restored.daemon.host.udev import BlockEvents
from tools.lab import bus, guest, leftovers, namespace
from tools.lab.people import People, people

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@dataclass(frozen=True)
class Machine:
    """A system bus with the real polkitd, and users."""

    bus: bus.PrivateBus
    people: People
    checkout: Path
    """The checkout where every user can read it."""


@pytest.fixture(scope="session", autouse=True)
def private_namespace(pytestconfig: pytest.Config) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with contextlib.ExitStack() as stack:
        # It may have to wait for another run, and says so; that must be seen while it waits.
        with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            stack.enter_context(leftovers.alone_on_the_machine())
        namespace.enter()
        yield


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    directory = Path("/run/machine")
    directory.mkdir(mode=0o755)
    checkout = directory / "checkout"
    namespace.publish(bus.CHECKOUT, checkout)
    with people(directory) as users, bus.private_bus(directory) as system_bus, bus.polkit(system_bus, directory):
        yield Machine(system_bus, users, checkout)


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> guest.Chain:
    """A full backup and two incrementals with ext4, xfs and btrfs; shared by all tests, so never write to it."""
    work = tmp_path_factory.mktemp("guest")
    return guest.make_chain(tmp_path_factory.mktemp("repository"), work)


@pytest.fixture
def small_chain(tmp_path: Path) -> Path:
    """8 MiB without file systems, for one test: a full backup with a pattern, and an increment; its second MiB."""
    base, top = tmp_path / "full.qcow2", tmp_path / "inc.qcow2"
    size = str(8 << 20)
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*create, base, size], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P 0x11 0 {size}", base], check=True, capture_output=True)
    subprocess.run([*create, "-b", "full.qcow2", "-F", "qcow2", top], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 0x22 1M 1M", top], check=True, capture_output=True)
    return top


@pytest.fixture
async def events() -> AsyncIterator[BlockEvents]:
    listening = BlockEvents()
    yield listening
    listening.close()


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Workplace]:
    runtime = tmp_path / "runtime"  # a mount of its own, as the daemon makes one
    runtime.mkdir()
    linux.mount("runtime", runtime, "tmpfs")
    place = Workplace(runtime / "mount", 64 << 20)
    place.make()
    yield place
    place.close()
    assert not place.path.exists()
    linux.umount(runtime)


@pytest.fixture(autouse=True)
def nothing_left_on_the_machine(nothing_left: None) -> Iterator[None]:  # noqa: ARG001 - for the order
    before = leftovers.of_the_machine()
    yield
    if left := leftovers.left_on_the_machine(before):
        pytest.fail("left on the machine: " + ", ".join(left))
