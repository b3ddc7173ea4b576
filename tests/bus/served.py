"""The whole service on a private bus: its objects over the mounts of a simulated host, and a polkit that the test is.

Who a caller is, the service asks the bus. Here every connection would be the one user who runs the tests, and root
too if root does; so ``Users`` answers in the bus' place. That the bus is asked rightly is tested with the bus.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dbus_next.message import Message
from dbus_next.signature import Variant

from sendense_restored import config
from sendense_restored.client import BUS_NAME, MOUNT, ROOT, mount_object
from sendense_restored.daemon.authority import Authority
from sendense_restored.daemon.bus import Bus, Who
from sendense_restored.daemon.catalog import Catalog
from sendense_restored.daemon.events import Events
from sendense_restored.daemon.interface import Parts, Service
from sendense_restored.daemon.mounts import Mounts
from sendense_restored.daemon.resume import Resume
from sendense_restored.daemon.sweep import Sweep
from tests import simulator as sim
from tests.bus.peer import Peer
from tests.clock import FakeClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from sendense_restored.daemon.store import Store
    from tests.bus.peer import MessageFlag
    from tests.simulator import Simulator

ROOT_UID, ANNA, BERT = 0, 1001, 1002
UNIT = "session-1.scope"
"""The systemd unit that everybody calls from."""
POLKIT = "org.freedesktop.PolicyKit1"
ACTIONS = "com.sendense.restore1."
FREELY = {"list-backups", "mount", "read", "unmount"}
"""What Anna and Bert may do as long as the test does not say otherwise."""


class Users(Bus):
    """The daemon's bus, which takes a connection for the user that the test says it is."""

    uids: dict[str, int]
    """By unique name; Anna is everybody else."""

    async def _who(self, unique_name: str) -> Who:
        return Who(self.uids.get(unique_name, ANNA), UNIT)


class Polkit(Peer):
    """Allows what is in ``allowed``, and would after an authentication what is in ``obtainable``."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.allowed = set(FREELY)
        self.obtainable: set[str] = set()
        self.questions: list[tuple[str, dict[str, str]]] = []

    def answer(self, message: Message) -> Message | bool:
        if message.member != "CheckAuthorization":
            return True
        _, action, details, _, _ = message.body
        name = action.removeprefix(ACTIONS)
        self.questions.append((name, details))
        return Message.new_method_return(message, "(bba{ss})", [[name in self.allowed, name in self.obtainable, {}]])


class User(Peer):
    """A client that may send anything."""

    async def ask(
        self,
        member: str,
        signature: str,
        *body: object,
        path: str = ROOT,
        interface: str = f"{BUS_NAME}.Manager",
        flags: MessageFlag | None = None,
        fds: Sequence[int] = (),
    ) -> Message:
        """Call a method of the service; the answer, also if it is an error."""
        more: dict[str, Any] = {} if flags is None else {"flags": flags}
        return await self.call(BUS_NAME, member, signature, body, path=path, interface=interface, fds=fds, **more)

    async def answers(self, serials: range) -> list[Message]:
        """The answers to calls of these numbers, once all have come."""
        async with asyncio.timeout(60):
            while len(found := [each for each in self.messages if each.reply_serial in serials]) < len(serials):
                self._arrived.clear()
                await self._arrived.wait()
        return found

    async def properties(self, mount: str) -> Message:
        interface = "org.freedesktop.DBus.Properties"
        return await self.ask("GetAll", "s", MOUNT, path=mount_object(mount), interface=interface)

    async def objects(self) -> dict[str, Any]:
        """GetManagedObjects."""
        reply = await self.ask("GetManagedObjects", "", interface="org.freedesktop.DBus.ObjectManager")
        assert reply.signature == "a{oa{sa{sv}}}", reply.body
        found: dict[str, Any] = reply.body[0]
        return found


@dataclass
class Served:
    """The parts of a running service, and its surroundings."""

    address: str
    simulator: Simulator
    store: Store
    mounts: Mounts
    bus: Users
    polkit: Polkit
    clock: FakeClock
    resume: Resume
    sweep: Sweep
    events: Events
    service: Service
    users: contextlib.AsyncExitStack

    async def user(self, uid: int = ANNA) -> User:
        """Somebody new on the bus."""
        user = await self.users.enter_async_context(User(self.address))
        self.bus.uids[user.name] = uid
        return user


@contextlib.asynccontextmanager
async def served(address: str, directory: Path, catalog_url: str | None = None) -> AsyncIterator[Served]:
    """A service with the backups ``b1`` (two disks) and ``b2``, or those that are in another catalogue."""
    async with contextlib.AsyncExitStack() as stack:
        simulator, store = await stack.enter_async_context(sim.house(directory, catalog_url))
        if catalog_url is None:
            await sim.add_backup(store, "b1", (("mountable-ext4", "encrypted-crypto_LUKS"), ("mountable-ntfs",)))
            await sim.add_backup(store, "b2", vm_name="db")
        polkit = await stack.enter_async_context(Polkit(address))
        await polkit.own(POLKIT)
        settings = config.Config(mounts=config.Mounts(directory=simulator.mounts, max=2))
        service = Service()
        Users.uids = {}
        bus = await Users.connect(address, service.handle)
        stack.push_async_callback(_gone, polkit)
        stack.push_async_callback(bus.close)
        assert isinstance(bus, Users)
        clock = FakeClock()
        events = Events(store, unix=clock.unix, monotonic=clock.now)
        stack.push_async_callback(events.close)
        mounts = Mounts(settings, store, simulator.machine, service, events, clock)
        stack.push_async_callback(mounts.stop)
        resume = Resume(mounts, store, simulator.machine, events, clock)
        sweep = Sweep(mounts, resume, store, simulator.machine, events, clock)
        stack.push_async_callback(sweep.close)
        catalog = Catalog(store, simulator.machine)
        parts = Parts(Authority(bus), store, catalog, mounts, sweep, events, simulator.machine)
        service.open(bus, parts)
        await bus.own(BUS_NAME)
        users = await stack.enter_async_context(contextlib.AsyncExitStack())
        yield Served(address, simulator, store, mounts, bus, polkit, clock, resume, sweep, events, service, users)


async def _gone(peer: Peer) -> None:
    """Wait until the bus knows that the service has left, for the next one takes the name at once or not at all."""
    driver = "org.freedesktop.DBus"
    while True:
        reply = await peer.call(
            driver, "NameHasOwner", "s", [BUS_NAME], path="/org/freedesktop/DBus", interface=driver
        )
        if reply.body == [False]:
            return


def variants(**options: tuple[str, object]) -> dict[str, Variant]:
    """Options as a message has them, each given as its type and value."""
    return {name: Variant(kind, value) for name, (kind, value) in options.items()}
