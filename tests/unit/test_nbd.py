"""A disk that becomes an NBD device, with programs and a kernel that do what a test says: who ends, who is faster."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from sendense_restored import config, errors
from sendense_restored.daemon.host import attach, nbd, served
from sendense_restored.daemon.host import image as images
from sendense_restored.daemon.host.attach import Attacher
from sendense_restored.daemon.host.nbd import NbdAttachment, NotWithNbdError
from sendense_restored.daemon.host.nbd_pool import NbdDevice, Pool
from sendense_restored.daemon.host.nbd_socket import connect, listen
from sendense_restored.daemon.host.threads import Threads
from sendense_restored.daemon.host.uids import Uids
from tests.nbd import FakeEvents, Sysfs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from sendense_restored.daemon.host.attach import Attachment
    from sendense_restored.daemon.host.image import Image
    from sendense_restored.daemon.host.process import Jail, Tools
    from sendense_restored.daemon.host.udev import BlockEvents
    from sendense_restored.daemon.host.workplace import Workplace

SIZE = 1 << 20


class FakeChild:
    """A program that ends when a test says so."""

    def __init__(self, pid: int) -> None:
        self.pid, self.stderr, self.status = pid, "", 0
        self.killed = False
        self.stuck = False
        """Whether the kernel does not let it go."""
        self._ended = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def end(self, status: int, stderr: str = "") -> None:
        if not self.ended:
            self.status, self.stderr = status, stderr
            self._ended.set()

    async def wait(self) -> int:
        await self._ended.wait()
        return self.status

    async def ends_within(self, seconds: float) -> bool:
        del seconds
        return self.ended

    def kill(self) -> None:
        self.killed = True
        self.end(-9)

    async def close(self) -> bool:
        if self.stuck:
            return False
        self.kill()
        return True


@dataclass
class Host:
    """The machine: ``client`` says what each nbd-client does once it has been started."""

    sysfs: Sysfs
    events: FakeEvents
    client: list[Callable[[FakeChild, int], None]] = field(default_factory=list)
    started: list[tuple[Jail, tuple[str, ...]]] = field(default_factory=list)
    children: list[FakeChild] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=lambda: {name: f"/x/{name}" for name in nbd.TOOLS})
    answers: bool = True
    connection: socket.socket | None = None
    """The daemon's to the server."""
    closed: str = ""
    """What the kernel says when the server's uid opens the image."""
    uids: Uids = field(default_factory=lambda: Uids(range(7, 13)))

    def has(self, name: str) -> bool:
        return name in self.paths

    def _child(self, jail: Jail, arguments: tuple[str, ...]) -> FakeChild:
        self.started.append((jail, arguments))
        child = FakeChild(1000 + len(self.children))
        self.children.append(child)
        return child

    async def spawn_listening(
        self, jail: Jail, name: str, *arguments: str, listening: int, fds: Sequence[int]
    ) -> FakeChild:
        assert name == "qemu-nbd"
        assert stat_is_socket(listening)
        assert fds
        return self._child(jail, (name, *arguments))

    def _asked(self, jail: Jail) -> FakeChild:
        """A shell that is asked whether the image can be opened."""
        server = self.started[-1][0]
        assert (jail.uid, jail.capabilities, jail.own_mounts) == (server.uid, server.capabilities, True)
        child = FakeChild(3000)
        if self.closed != "nothing":
            said = f"sh: 1: cannot open /proc/self/fd/9: {self.closed}" if self.closed else ""
            child.end(nbd.NOT_OPENED if self.closed else 0, said)
        return child

    async def spawn(self, jail: Jail, name: str, *arguments: str, fds: Sequence[int], label: str = "") -> FakeChild:
        if not label:
            return self._asked(jail)
        assert fds
        assert label == "nbd-client"
        child = self._child(jail, (name, *arguments))
        number = int(arguments[-1].rpartition("nbd")[2])
        self.client.pop(0)(child, number)
        return child

    def connects(self, child: FakeChild, number: int) -> None:
        self.sysfs.process(child.pid)
        self.sysfs.connect(number, child.pid, SIZE)
        self.events.happen()

    def loses_it(self, child: FakeChild, number: int) -> None:
        """Somebody else connects the device first."""
        self.sysfs.process(4000 + number)
        self.sysfs.connect(number, 4000 + number, SIZE)
        child.end(75)

    @property
    def devices(self) -> list[str]:
        """Which devices clients were given."""
        return [arguments[-1].rpartition("/")[2] for _, arguments in self.started if "/x/nbd-client" in arguments]


def stat_is_socket(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith("socket:")


@dataclass
class FakeWorkplace:
    path: Path
    overlay_limit: int | None = None


@dataclass
class FakeImage:
    layers: list[Any] = field(default_factory=list)
    virtual_size: int = SIZE


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(Sysfs(tmp_path, devices=3, max_part=31), FakeEvents())

    async def overlay(*_: object, **__: object) -> int:
        return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

    async def connects(door: int, export: str) -> socket.socket | None:
        del door, export
        if not host.answers:
            host.children[-1].end(1, "qemu-nbd: it was refused")
            return None
        host.connection = socket.socket(socket.AF_UNIX)
        return host.connection

    monkeypatch.setattr(served.Served, "_make_overlay", overlay)
    monkeypatch.setattr(images, "blockdev", lambda _: {})
    monkeypatch.setattr(images, "changed", lambda _: False)
    monkeypatch.setattr(nbd, "connect", connects)
    monkeypatch.setattr(NbdAttachment, "_make_node", lambda *_: None)
    monkeypatch.setattr(NbdDevice, "settle", lambda _: None)
    monkeypatch.setattr(os, "chown", lambda *_, **__: None)
    return host


@pytest.fixture
async def pool(host: Host) -> AsyncIterator[Pool]:
    pool = Pool(range(3), cast("BlockEvents", host.events), Threads(), **host.sysfs.places)
    yield pool
    await pool.close()


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    (tmp_path / "work").mkdir()
    return cast("Workplace", FakeWorkplace(tmp_path / "work"))


async def opened(host: Host, pool: Pool, workplace: Workplace, *, seconds: float = 20.0) -> NbdAttachment:
    """One disk, on a device taken from the pool."""
    taken = pool.take(1, "m")
    assert taken is not None
    settings = config.parse({"attach": {"timeout": seconds}})
    parts = (cast("Tools", host), settings, cast("BlockEvents", host.events), Threads())
    image = cast("Image", FakeImage())
    attachment = NbdAttachment(*parts, pool, host.uids, taken[0])
    try:
        await attachment.open(image, workplace, 0)
    except BaseException:
        await attachment.close()
        raise
    finally:
        assert host.connection is None or host.connection.fileno() < 0, "it keeps the server, and is to be let go of"
    return attachment


def states(pool: Pool) -> list[str]:
    return [each.state for each in pool.states()]


async def taken_down(host: Host, attachment: NbdAttachment) -> None:
    host.sysfs.disconnect(attachment.device.number)
    assert await attachment.close() is None


# --- connecting -----------------------------------------------------------------------------------------------------


async def test_a_disk_stands_when_the_kernel_shows_client_and_size(
    host: Host, pool: Pool, workplace: Workplace
) -> None:
    host.client = [host.connects]
    attachment = await opened(host, pool, workplace)
    assert (attachment.size, host.devices, states(pool)) == (SIZE, ["nbd0"], ["ours", "free", "free"])
    assert not attachment.lost.done()
    await taken_down(host, attachment)
    assert states(pool) == ["free", "free", "free"]
    assert all(child.killed for child in host.children)
    assert await attachment.close() is None, "again is nothing"


async def test_server_and_client_have_little_and_are_not_where_the_daemon_is(
    host: Host, pool: Pool, workplace: Workplace
) -> None:
    host.client = [host.connects]
    attachment = await opened(host, pool, workplace)
    (server, serving), (client, connecting) = host.started
    assert (server.uid, set(server.capabilities)) == (7, {"dac_read_search"})
    assert (client.uid, set(client.capabilities)) == (8, {"sys_admin"})
    daemon = (workplace.path.parent, Path("/mnt/sendense/restore"))
    for jail, without in ((server, daemon), (client, (*daemon, Path("/dev")))):
        assert jail.own_mounts
        assert not jail.network
        assert jail.without == without
    assert server.own_processes
    assert server.bare == workplace.path.parent
    assert not {"--fork", "-c", "--connect", "--persistent"} & set(serving)
    assert {"-nonetlink", "-nofork", "-timeout", "-unix"} < set(connecting)
    await taken_down(host, attachment)


async def test_no_two_helpers_have_the_same_uid_while_they_run(host: Host, pool: Pool, workplace: Workplace) -> None:
    host.client = [host.connects] * 3
    first, second = [await opened(host, pool, workplace) for _ in range(2)]
    assert [jail.uid for jail, _ in host.started] == [7, 8, 9, 10]
    await taken_down(host, first)
    assert host.uids.free == 4
    third = await opened(host, pool, workplace)
    assert [jail.uid for jail, _ in host.started][4:] == [11, 12], "those just given back rest"
    await taken_down(host, second)
    await taken_down(host, third)
    assert host.uids.free == 6


@pytest.mark.parametrize("stuck", [0, 1], ids=["server", "client"])
async def test_one_that_does_not_end_keeps_its_device_and_uids_until_it_does(
    host: Host, pool: Pool, workplace: Workplace, stuck: int
) -> None:
    host.client = [host.connects]
    attachment = await opened(host, pool, workplace)
    host.children[stuck].stuck = True
    with pytest.raises(errors.Busy):
        await attachment.close()
    assert host.children[1 - stuck].killed, "the other is not kept for it"
    assert (states(pool), host.uids.free) == (["ours", "free", "free"], 4)
    host.children[stuck].stuck = False
    await taken_down(host, attachment)
    assert (states(pool), host.uids.free) == (["free"] * 3, 6)


async def test_waiting_for_the_device_looks_after_events_and_at_no_other_time(
    host: Host, pool: Pool, workplace: Workplace
) -> None:
    clients: list[FakeChild] = []
    host.client = [lambda child, _: clients.append(child)]
    opening = asyncio.create_task(opened(host, pool, workplace))
    while not clients:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await host.events.idle()
    looks = host.events.looks
    assert looks == 1
    host.sysfs.process(clients[0].pid)
    host.sysfs.connect(0, clients[0].pid, SIZE)
    await asyncio.wait({opening}, timeout=0.1)  # the time that a look by the clock would have
    assert host.events.looks == looks
    host.events.happen()
    attachment = await opening
    assert host.events.looks == looks + 1
    await taken_down(host, attachment)


async def test_an_event_that_does_not_come_is_a_timeout_with_one_last_look(
    host: Host, pool: Pool, workplace: Workplace
) -> None:
    host.client = [lambda _, __: None]
    with pytest.raises(errors.Timeout):
        await opened(host, pool, workplace, seconds=0.05)
    assert host.events.looks <= 3
    assert states(pool) == ["free", "free", "free"]
    assert all(child.killed for child in host.children)


async def test_a_lost_event_costs_time_and_nothing_else(host: Host, pool: Pool, workplace: Workplace) -> None:
    def silently(child: FakeChild, number: int) -> None:
        host.sysfs.process(child.pid)
        asyncio.get_running_loop().call_soon(host.sysfs.connect, number, child.pid, SIZE)

    host.client = [silently]
    attachment = await opened(host, pool, workplace, seconds=0.05)
    await taken_down(host, attachment)


async def test_a_device_that_is_taken_meanwhile_is_left_to_whoever_has_it_and_the_next_one_used(
    host: Host, pool: Pool, workplace: Workplace
) -> None:
    host.client = [host.loses_it, host.loses_it, host.connects]
    attachment = await opened(host, pool, workplace)
    assert host.devices == ["nbd0", "nbd1", "nbd2"]
    assert states(pool) == ["foreign", "foreign", "ours"]
    assert len(host.children) == 4, "one server for all attempts"
    await taken_down(host, attachment)
    assert states(pool) == ["foreign", "foreign", "free"]


async def test_a_client_that_fails_on_a_device_tries_each_once(host: Host, pool: Pool, workplace: Workplace) -> None:
    def fails(child: FakeChild, number: int) -> None:
        del number
        child.end(1, "Ioctl NBD_SET_SOCK failed: Device or resource busy")

    host.client = [fails, fails, fails]
    with pytest.raises(NotWithNbdError):
        await opened(host, pool, workplace)
    assert host.devices == ["nbd0", "nbd1", "nbd2"]
    assert states(pool) == ["free", "free", "free"]
    assert host.children[0].killed


async def test_a_client_that_ends_after_it_had_set_the_device_up_does_not_count_as_connected(
    host: Host, pool: Pool, workplace: Workplace
) -> None:
    def half(child: FakeChild, number: int) -> None:
        host.sysfs.process(child.pid)
        host.sysfs.connect(number, child.pid, 0)
        host.events.happen()
        child.end(1)
        host.sysfs.disconnect(number)

    host.client = [half, host.connects]
    attachment = await opened(host, pool, workplace)
    assert host.devices == ["nbd0", "nbd1"]
    await taken_down(host, attachment)


async def test_another_program_that_is_connected_is_not_taken_for_our_client(
    host: Host, pool: Pool, workplace: Workplace
) -> None:
    def another(child: FakeChild, number: int) -> None:
        host.sysfs.process(4000)
        host.sysfs.connect(number, 4000, SIZE)
        host.events.happen()
        asyncio.get_running_loop().call_soon(child.end, 1)

    host.client = [another, host.connects]
    attachment = await opened(host, pool, workplace)
    assert host.devices == ["nbd0", "nbd1"]
    await taken_down(host, attachment)


# --- the server -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ('qemu-nbd: Failed to get shared "write" lock', errors.BackupNotReady),
        ("qemu-nbd: No space left on device", errors.NoSpace),
        ("qemu-nbd: Image is not in qcow2 format", errors.ImageRefused),
        ("unshare: unshare failed: No space left on device", errors.Failed),
        ("mount: /usr: permission denied.", errors.Failed),
        ("", errors.Failed),
    ],
)
async def test_what_the_server_refuses_is_known_before_a_device_is_touched(
    host: Host,
    pool: Pool,
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    kind: type[errors.RestoreError],
) -> None:
    async def ended(door: int, export: str) -> None:
        del door, export
        host.children[0].end(1, said)

    monkeypatch.setattr(nbd, "connect", ended)
    with pytest.raises(kind):
        await opened(host, pool, workplace)
    assert host.devices == []
    assert states(pool) == ["free", "free", "free"]


async def test_a_server_that_ends_while_the_client_connects_is_a_refusal_and_no_reason_for_another_device(
    host: Host, pool: Pool, workplace: Workplace
) -> None:
    def server_ends(child: FakeChild, number: int) -> None:
        del child, number
        host.children[0].end(1, "qemu-nbd: I/O error")

    host.client = [server_ends]
    with pytest.raises(errors.ImageRefused):
        await opened(host, pool, workplace)
    assert host.devices == ["nbd0"]
    assert host.children[1].killed


async def test_an_image_that_was_changed_meanwhile_is_not_connected(
    host: Host, pool: Pool, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "changed", lambda _: True)
    with pytest.raises(errors.BackupNotReady):
        await opened(host, pool, workplace)
    assert host.devices == []


# --- losing it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "name"), [(0, "image server"), (1, "device client")])
async def test_the_end_of_either_program_is_a_loss(
    host: Host, pool: Pool, workplace: Workplace, which: int, name: str
) -> None:
    host.client = [host.connects]
    attachment = await opened(host, pool, workplace)
    host.children[which].end(1)
    async with asyncio.timeout(20):
        assert name in await attachment.lost
    await taken_down(host, attachment)


async def test_a_device_that_is_held_abroad_is_handed_back_draining(
    host: Host, pool: Pool, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sendense_restored.daemon.host.nbd_pool._DETACH", 0.05)
    host.client = [host.connects]
    attachment = await opened(host, pool, workplace)
    attachment.kill()
    left = await attachment.close()
    assert left is attachment.device
    assert states(pool) == ["draining", "free", "free"]
    host.sysfs.disconnect(0)
    host.events.happen()
    async with asyncio.timeout(20):
        await left.freed()
    await host.events.idle()
    assert states(pool) == ["free", "free", "free"]


async def test_a_cancelled_start_leaves_nothing(host: Host, pool: Pool, workplace: Workplace) -> None:
    begun = asyncio.Event()
    host.client = [lambda _, __: begun.set()]
    opening = asyncio.create_task(opened(host, pool, workplace))
    await begun.wait()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert all(child.killed for child in host.children)
    assert states(pool) == ["free", "free", "free"]


# --- the socket -----------------------------------------------------------------------------------------------------


@contextmanager
def door(directory: Path) -> Iterator[tuple[socket.socket, int]]:
    handle = os.open(directory, os.O_PATH)
    listening, through = listen(handle, "server-0")
    os.close(handle)
    try:
        yield listening, through
    finally:
        listening.close()
        os.close(through)


HELLO = b"NBDMAGICIHAVEOPT\0\3"


async def test_the_socket_has_no_name_and_is_reached_through_its_descriptor(tmp_path: Path) -> None:
    with door(tmp_path) as (listening, through):
        assert list(tmp_path.iterdir()) == []
        connecting = asyncio.create_task(connect(through, "disk"))
        await asyncio.sleep(0)  # one turn, in which it connects
        server, _ = listening.accept()
        with server:
            server.send(HELLO[:8])
            server.send(HELLO[8:])
            server.settimeout(20)
            asked = await asyncio.to_thread(server.recv, 100)
            assert asked == b"\0\0\0\3" + b"IHAVEOPT" + b"\0\0\0\1" + b"\0\0\0\4" + b"disk"
            server.send(b"\0" * 10)
            connection = await connecting
            assert connection is not None
            connection.close()
            assert server.recv(100) == b"", "it asked for nothing more"


@pytest.mark.parametrize("said", [b"", HELLO[:17], HELLO, HELLO + b"\0" * 9])
async def test_a_server_that_does_not_come_to_serve_has_ended(tmp_path: Path, said: bytes) -> None:
    with door(tmp_path) as (listening, through):
        connecting = asyncio.create_task(connect(through, "disk"))
        await asyncio.sleep(0)  # one turn, in which it connects
        server, _ = listening.accept()
        with server:
            server.send(said)
            server.shutdown(socket.SHUT_WR)
            assert await connecting is None


async def test_a_server_that_ended_before_it_took_the_connection_is_noticed_at_once(tmp_path: Path) -> None:
    with door(tmp_path) as (listening, through):
        connecting = asyncio.create_task(connect(through, "disk"))
        await asyncio.sleep(0)  # one turn, in which it connects
        listening.close()
        async with asyncio.timeout(20):
            assert await connecting is None


# --- which way ------------------------------------------------------------------------------------------------------


class FakeFuse:
    """``FuseAttachment``, as far as choosing goes."""

    made = 0

    def __init__(self, *_: object) -> None:
        type(self).made += 1

    async def open(self, *_: object) -> None:
        pass


@pytest.fixture
def attacher(host: Host, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Attacher]:
    monkeypatch.setattr(attach, "FuseAttachment", FakeFuse)
    monkeypatch.setattr(attach, "Pool", lambda *_: pool)
    FakeFuse.made = 0

    def make(backend: str) -> Attacher:
        settings = config.parse({"attach": {"backend": backend, "timeout": "20s"}})
        return Attacher(cast("Tools", host), settings, cast("BlockEvents", host.events), Threads())

    return make


async def attached(attacher: Attacher, workplace: Workplace, disks: int) -> list[Attachment]:
    made: list[Attachment] = []
    await attacher.attach([cast("Image", FakeImage()) for _ in range(disks)], workplace, made)
    return made


async def test_all_disks_go_through_nbd(
    host: Host, attacher: Callable[[str], Attacher], workplace: Workplace, pool: Pool
) -> None:
    host.client = [host.connects, host.connects]
    choosing = attacher("auto")
    assert choosing.backend == "nbd"
    for each in await attached(choosing, workplace, 2):
        assert isinstance(each, NbdAttachment)
        await taken_down(host, each)
    assert states(pool) == ["free"] * 3


async def test_with_too_few_devices_all_disks_go_through_fuse(
    host: Host, attacher: Callable[[str], Attacher], workplace: Workplace
) -> None:
    host.sysfs.process(4000)
    host.sysfs.connect(1, 4000, SIZE)
    assert all(isinstance(each, FakeFuse) for each in await attached(attacher("auto"), workplace, 3))
    assert FakeFuse.made == 3
    assert host.devices == []


async def test_if_the_last_devices_go_meanwhile_those_that_stand_are_taken_down_for_fuse(
    host: Host, attacher: Callable[[str], Attacher], workplace: Workplace, pool: Pool
) -> None:
    def connects_for_a_while(child: FakeChild, number: int) -> None:
        host.connects(child, number)
        kill = child.kill

        def disconnects() -> None:
            kill()
            host.sysfs.disconnect(number)

        child.kill = disconnects  # type: ignore[method-assign]

    host.client = [connects_for_a_while, host.loses_it, host.loses_it]
    made = await attached(attacher("auto"), workplace, 2)
    assert [type(each).__name__ for each in made] == ["FakeFuse", "FakeFuse"]
    assert states(pool) == ["free", "foreign", "foreign"]


async def test_nbd_or_nothing_is_no_device_when_there_are_too_few(
    attacher: Callable[[str], Attacher], workplace: Workplace, pool: Pool
) -> None:
    choosing = attacher("nbd")
    with pytest.raises(errors.NoDevice):
        await attached(choosing, workplace, 4)
    assert FakeFuse.made == 0
    assert states(pool) == ["free"] * 3


async def test_fuse_and_nothing_else_asks_for_no_device(
    attacher: Callable[[str], Attacher], workplace: Workplace
) -> None:
    choosing = attacher("fuse")
    assert (choosing.backend, choosing.devices()) == ("fuse", [])
    await attached(choosing, workplace, 1)
    assert FakeFuse.made == 1


async def test_an_image_that_its_storage_opens_to_root_alone_goes_through_fuse(
    host: Host, attacher: Callable[[str], Attacher], workplace: Workplace, pool: Pool
) -> None:
    host.answers, host.closed = False, "Permission denied"
    made = await attached(attacher("auto"), workplace, 2)
    assert [type(each).__name__ for each in made] == ["FakeFuse", "FakeFuse"]
    assert states(pool) == ["free"] * 3
    with pytest.raises(errors.NoDevice, match=r"to root alone.*attach\.backend"):
        await attached(attacher("nbd"), workplace, 1)


async def assert_refused(attacher: Attacher, workplace: Workplace) -> None:
    """The image is, and no server that runs as root has seen it."""
    made: list[Attachment] = []
    with pytest.raises(errors.ImageRefused):
        await attacher.attach([cast("Image", FakeImage())], workplace, made)
    assert FakeFuse.made == 0
    for each in made:
        await each.close()


@pytest.mark.parametrize("closed", ["Stale file handle", "nothing"])
async def test_an_image_that_its_storage_does_not_read_is_refused(
    host: Host, attacher: Callable[[str], Attacher], workplace: Workplace, closed: str
) -> None:
    host.answers, host.closed = False, closed
    await assert_refused(attacher("auto"), workplace)


async def test_the_journal_says_why_it_is_not_nbd(
    host: Host, attacher: Callable[[str], Attacher], workplace: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await attached(attacher("auto"), workplace, 4)
    assert "instead of NBD for mount work: not enough devices are free" in caplog.text
    host.answers, host.closed = False, "Permission denied"
    await attached(attacher("auto"), workplace, 1)
    assert "instead of NBD for mount work: the repository's storage opens the image to root alone" in caplog.text


async def test_what_a_server_says_of_itself_does_not_lead_to_one_that_runs_as_root(
    host: Host, attacher: Callable[[str], Attacher], workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ended(door: int, export: str) -> None:
        del door, export
        host.children[0].end(1, "qemu-nbd: Could not open '/proc/self/fd/9': Permission denied")

    monkeypatch.setattr(nbd, "connect", ended)
    await assert_refused(attacher("auto"), workplace)


@pytest.mark.parametrize(("backend", "expected"), [("auto", "fuse"), ("nbd", "nbd")])
async def test_without_the_programs_or_the_module_there_is_no_nbd(
    host: Host,
    attacher: Callable[[str], Attacher],
    workplace: Workplace,
    backend: str,
    expected: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    del host.paths["nbd-client"]
    with caplog.at_level(logging.INFO):
        choosing = attacher(backend)
    assert "not installed: nbd-client (package nbd-client)" in caplog.text
    assert (choosing.backend, choosing.devices()) == (expected, [])
    if backend == "nbd":
        with pytest.raises(errors.NoDevice, match="has no NBD"):
            await attached(choosing, workplace, 1)


async def test_an_error_of_the_second_disk_leaves_both_to_the_caller_and_no_device_besides(
    host: Host, attacher: Callable[[str], Attacher], workplace: Workplace, pool: Pool
) -> None:
    def server_ends(child: FakeChild, number: int) -> None:
        del child, number
        host.children[2].end(1, "qemu-nbd: damaged")

    host.client = [host.connects, server_ends]
    made: list[Attachment] = []
    images = [cast("Image", FakeImage()) for _ in range(3)]
    with pytest.raises(errors.ImageRefused):
        await attacher("auto").attach(images, workplace, made)
    assert states(pool) == ["ours", "ours", "free"]
    first, second = made
    assert isinstance(first, NbdAttachment)
    await taken_down(host, first)
    await second.close()
    assert states(pool) == ["free"] * 3
