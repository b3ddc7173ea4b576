"""A message bus with the limits of a system bus, a daemon's side of it, misbehaving peers and a fake service.

And a database server.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored.cli.main import run
from sendense_restored.client import Client
from sendense_restored.daemon.bus import Bus, Call, Reply
from tests.bus.command_line import Outcome
from tests.bus.fake import FakeService
from tests.bus.peer import Peer
from tests.bus.served import ANNA, BERT
from tools.lab import mariadb as lab_mariadb
from tools.lab.bus import PrivateBus, message_bus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from tests.bus.command_line import CommandLine
    from tests.bus.served import Served, User

# A system bus (its limits on sizes, descriptors and pending replies are the built-in defaults), except that everybody
# may send everything, even answers that nobody asked for: what protects the daemon here is the daemon.
_CONFIGURATION = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="false" send_type="method_return"/>
    <allow send_requested_reply="false" send_type="error"/>
    <allow receive_sender="*"/>
    <allow receive_requested_reply="false" receive_type="method_return"/>
    <allow receive_requested_reply="false" receive_type="error"/>
  </policy>
</busconfig>
"""


@contextlib.contextmanager
def open_bus() -> Iterator[PrivateBus]:
    # Not below pytest's own directory, which other users cannot enter.
    with tempfile.TemporaryDirectory(prefix="restore-bus-") as name:
        Path(name).chmod(0o755)
        with message_bus(Path(name), _CONFIGURATION.format(socket=Path(name) / "socket")) as bus:
            yield bus


@pytest.fixture(scope="session")
def bus_address() -> Iterator[str]:
    with open_bus() as bus:
        yield bus.address


@pytest.fixture
def mortal_bus() -> Iterator[PrivateBus]:
    """A bus of the test's own, to be stopped or killed."""
    with open_bus() as bus:
        yield bus


class Handler:
    """What the daemon's side does with calls: ``on`` maps a member to an async function."""

    def __init__(self) -> None:
        self.on: dict[str, Callable[[Call], Awaitable[Reply]]] = {}
        self.seen: list[Call] = []

    async def __call__(self, call: Call) -> Reply:
        self.seen.append(call)
        return await self.on[call.member](call)


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture
async def bus(bus_address: str, handler: Handler) -> AsyncIterator[Bus]:
    bus = await Bus.connect(bus_address, handler)
    yield bus
    await bus.close()


@pytest.fixture
async def peer(bus_address: str) -> AsyncIterator[Peer]:
    """Somebody else on the bus."""
    async with Peer(bus_address) as peer:
        yield peer


@pytest.fixture
async def stranger(bus_address: str) -> AsyncIterator[Peer]:
    """And a third one."""
    async with Peer(bus_address) as peer:
        yield peer


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> CommandLine:
    async def command(*arguments: str) -> Outcome:
        capfd.readouterr()
        code = await asyncio.to_thread(run, arguments)
        sys.stdout.flush()
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return command


@pytest.fixture
async def service(bus_address: str) -> AsyncIterator[FakeService]:
    async with FakeService(bus_address) as service:
        yield service


@pytest.fixture(scope="session")
def installed_mariadb() -> Iterator[Path]:
    """The data of a server that has never run."""
    with tempfile.TemporaryDirectory(prefix="restore-mariadb-") as name:
        lab_mariadb.install(Path(name) / "data")
        yield Path(name) / "data"


@pytest.fixture(scope="session")
def mariadb(installed_mariadb: Path) -> Iterator[lab_mariadb.Server]:
    """A server that stays as it is; what a test makes in it, it takes away."""
    with a_server(installed_mariadb) as server:
        yield server


@pytest.fixture
def mortal_mariadb(installed_mariadb: Path) -> Iterator[lab_mariadb.Server]:
    """One of the test's own, to be stopped, killed or to hang."""
    with a_server(installed_mariadb) as server:
        yield server


@contextlib.contextmanager
def a_server(installed: Path) -> Iterator[lab_mariadb.Server]:
    with tempfile.TemporaryDirectory(prefix="restore-mariadb-") as name:
        shutil.copytree(installed, Path(name) / "data")
        with lab_mariadb.Server(Path(name)) as server:
            yield server


# The real service, which a test module names ``service``, and those who use it.


@pytest.fixture
async def anna(service: Served) -> User:
    return await service.user(ANNA)


@pytest.fixture
async def bert(service: Served) -> User:
    return await service.user(BERT)


@pytest.fixture
async def client(service: Served) -> AsyncIterator[Client]:
    """The real client; of Anna."""
    async with await Client.connect(service.address) as client:
        yield client


@pytest.fixture
async def mount(client: Client) -> str:
    """The id of a mount on which Anna has the only claim."""
    return await client.mount("b1")
