"""What a hostile or unlucky peer, or a bug of ours, can do to the bus connection: nothing that lasts."""

# mypy: allow-untyped-calls
# dbus-next, which plays the peers, has functions without annotations.

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal as signals
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from dbus_next.signature import SignatureTree

from sendense_restored import errors
from sendense_restored.daemon.bus import (
    BadCallError,
    Bus,
    BusCallError,
    BusError,
    Call,
    Limits,
    Reply,
    Who,
    WireError,
)
from sendense_restored.wire import closing, connection, marshal, types_of
from tests.bus.peer import Message, MessageFlag, MessageType, Peer, error_of, signal
from tools.lab.leftovers import of_this_process

if TYPE_CHECKING:
    from pathlib import Path

    from tools.lab.bus import PrivateBus

    from .conftest import Handler

Method = Callable[[Call], Awaitable[Reply]]

PATH = "/com/sendense/Restore1"
INTERFACE = "com.example.Test"
DRIVER = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")


def answering(*values: object, signature: str = "") -> Method:
    async def answer(_: Call) -> Reply:
        return Reply(signature, values)

    return answer


def raising(error: BaseException) -> Method:
    async def fail(_: Call) -> Reply:
        raise error

    return fail


def silent(message: Message) -> bool:
    """The answer of a peer that takes a call and says nothing."""
    return message.message_type is MessageType.METHOD_CALL


class Hanging:
    """A method that never answers; ``started`` counts, ``ended`` tells how."""

    def __init__(self) -> None:
        self.started = asyncio.Semaphore(0)
        self.cancelled = 0
        self.ended = asyncio.Event()

    async def __call__(self, _: Call) -> Reply:
        self.started.release()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            self.ended.set()
            raise
        raise AssertionError("nothing ends the wait")

    async def wait(self, count: int) -> None:
        async with asyncio.timeout(60):
            for _ in range(count):
                await self.started.acquire()


async def ping(peer: Peer, bus: Bus, handler: Handler) -> None:
    """The daemon's side still answers, and has seen everything that ``peer`` sent before."""
    handler.on["Ping"] = answering()
    reply = await peer.call(bus.unique_name, "Ping")
    assert reply.message_type is MessageType.METHOD_RETURN, reply.body


# Full sockets


def settled() -> dict[str, str]:
    """What this process has, once the descriptors of strangers are closed."""
    closing.settle()
    return of_this_process()


async def test_a_burst_of_20000_signals_loses_nothing_and_keeps_the_connection(bus: Bus, peer: Peer) -> None:
    await peer.listen("type='signal',member='Last'")
    await peer.listen("type='signal',member='Some'")
    text = "x" * 1000
    for number in range(20_000):
        bus.emit(PATH, INTERFACE, "Some" if number % 200 == 0 else "Most", "us", [number, text])
    bus.emit(PATH, INTERFACE, "Last")
    await peer.wait_for("Last")
    assert [message.body for message in peer.all("Some")] == [[number, text] for number in range(0, 20_000, 200)]
    assert not bus.lost.done()


async def test_messages_larger_than_the_socket_buffer_arrive_whole_and_in_order(bus: Bus, peer: Peer) -> None:
    await peer.listen("type='signal',member='Large'")
    for number in range(40):
        bus.emit(PATH, INTERFACE, "Large", "s", [chr(ord("A") + number % 26) * 300_000])
    received = await peer.wait_for("Large", 40)
    assert [(m.body[0][0], len(set(m.body[0])), len(m.body[0])) for m in received] == [
        (chr(ord("A") + number % 26), 1, 300_000) for number in range(40)
    ]


async def test_a_bus_that_takes_nothing_ends_the_connection_instead_of_growing_the_daemon(
    monkeypatch: pytest.MonkeyPatch, mortal_bus: PrivateBus
) -> None:
    monkeypatch.setattr(connection, "_MOST_QUEUED", 1 << 20)
    bus = await Bus.connect(mortal_bus.address)
    os.kill(mortal_bus.pid, signals.SIGSTOP)
    for _ in range(3000):
        bus.emit(PATH, INTERFACE, "Signal", "s", ["x" * 1000])
    assert "does not take" in await bus.lost
    os.kill(mortal_bus.pid, signals.SIGCONT)
    await bus.close()


async def test_while_answers_pile_up_no_further_calls_are_read(
    monkeypatch: pytest.MonkeyPatch, mortal_bus: PrivateBus, handler: Handler
) -> None:
    monkeypatch.setattr(connection, "_PAUSE_READING", 1 << 20)
    monkeypatch.setattr(connection, "_RESUME_READING", 1 << 19)
    bus = await Bus.connect(mortal_bus.address, handler)
    async with Peer(mortal_bus.address) as peer:
        os.kill(mortal_bus.pid, signals.SIGSTOP)
        for _ in range(3000):
            bus.emit(PATH, INTERFACE, "Signal", "s", ["x" * 1000])
        assert bus._connection._paused
        os.kill(mortal_bus.pid, signals.SIGCONT)
        await ping(peer, bus, handler)
        assert not bus._connection._paused
    await bus.close()


# Descriptors


async def test_returned_descriptors_are_closed_once_sent(
    bus: Bus, handler: Handler, peer: Peer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("content")

    async def open_file(_: Call) -> Reply:
        return Reply("h", [0], (os.open(tmp_path / "file", os.O_RDONLY),))

    handler.on["Open"] = open_file
    await ping(peer, bus, handler)
    before = of_this_process()
    for _ in range(100):
        reply = await peer.call(bus.unique_name, "Open")
        os.close(reply.unix_fds[0])
    assert settled() == before


async def test_a_descriptor_that_waits_in_the_queue_cannot_become_another_file(
    bus: Bus, handler: Handler, peer: Peer, tmp_path: Path
) -> None:
    (tmp_path / "wanted").write_text("wanted")
    (tmp_path / "secret").write_text("secret")

    async def open_file(_: Call) -> Reply:
        for _number in range(2000):  # so that the answer waits behind a full socket
            bus.emit(PATH, INTERFACE, "Signal", "s", ["x" * 1000])
        return Reply("h", [0], (os.open(tmp_path / "wanted", os.O_RDONLY),))

    handler.on["Open"] = open_file
    asking = asyncio.create_task(peer.call(bus.unique_name, "Open"))
    secrets: list[int] = []
    while not asking.done():  # any number that is free goes to the secret at once
        if len(secrets) < 200:
            secrets.append(os.open(tmp_path / "secret", os.O_RDONLY))
        await asyncio.sleep(0)
    (number,) = (await asking).unix_fds
    assert os.read(number, 100) == b"wanted"
    for each in (number, *secrets):
        os.close(each)


@pytest.mark.parametrize(
    ("reply", "name"),
    [
        (Reply("hs", [0, "a\0b"]), "Failed"),
        (Reply("hs", [0, "x" * (9 << 20)]), "TooLarge"),
        (Reply("s", [0]), "Failed"),
    ],
    ids=["not encodable", "too large", "wrong type"],
)
async def test_descriptors_of_an_answer_that_cannot_be_sent_are_closed(
    bus: Bus, handler: Handler, peer: Peer, reply: Reply, name: str
) -> None:
    async def answer(_: Call) -> Reply:
        return Reply(reply.signature, reply.body, (os.open("/dev/null", os.O_RDONLY),))

    handler.on["Open"] = answer
    await ping(peer, bus, handler)
    before = of_this_process()
    assert error_of(await peer.call(bus.unique_name, "Open"))[0] == name
    assert settled() == before


async def test_an_answer_with_more_descriptors_than_the_bus_takes_is_refused_by_us(
    bus: Bus, handler: Handler, peer: Peer
) -> None:
    async def answer(_: Call) -> Reply:
        fds = tuple(os.open("/dev/null", os.O_RDONLY) for _ in range(17))
        return Reply("ah", [list(range(17))], fds)

    handler.on["Open"] = answer
    assert error_of(await peer.call(bus.unique_name, "Open"))[0] == "Failed"
    await ping(peer, bus, handler)


async def test_descriptors_that_strangers_send_are_closed(bus: Bus, handler: Handler, peer: Peer) -> None:
    handler.on["Known"] = answering()
    await ping(peer, bus, handler)
    before = of_this_process()
    fds = [1] * 16
    indexes = list(range(16))
    for _ in range(100):
        await peer.send(signal("Flood", "ah", [indexes], destination=bus.unique_name, unix_fds=fds))
    for member in ("Known", "Unknown") * 20:
        await peer.call(bus.unique_name, member, "ah", [indexes], fds=fds)
    # An answer to a call that was never made, and one whose long body is thrown away.
    await peer.send(
        Message(
            message_type=MessageType.METHOD_RETURN,
            destination=bus.unique_name,
            reply_serial=4711,
            signature="ah",
            body=[indexes],
            unix_fds=fds,
        )
    )
    await peer.call(bus.unique_name, "Known", "ahs", [indexes, "x" * 400_000], fds=fds)
    await ping(peer, bus, handler)
    assert settled() == before


async def test_a_method_that_takes_descriptors_gets_them_until_it_returns(
    bus: Bus, handler: Handler, peer: Peer
) -> None:
    bus.accepts_fds = lambda path, interface, member: (path, interface, member) == (PATH, INTERFACE, "Unlock")
    secrets: list[bytes] = []

    async def unlock(call: Call) -> Reply:
        assert not os.get_inheritable(call.fds[0])
        secrets.append(os.read(call.fds[call.body[0]], 100))
        return Reply()

    handler.on["Unlock"] = unlock
    await ping(peer, bus, handler)
    reading, writing = os.pipe()
    os.write(writing, b"secret")
    before = of_this_process()
    await peer.call(bus.unique_name, "Unlock", "h", [0], fds=[reading])
    assert settled() == before
    assert secrets == [b"secret"]
    os.close(reading)
    os.close(writing)


# Who calls, and how much


async def test_concurrent_callers_keep_their_identity(bus: Bus, handler: Handler, peer: Peer, stranger: Peer) -> None:
    both_in = asyncio.Barrier(2)

    async def who(call: Call) -> Reply:
        await both_in.wait()
        return Reply("su", [call.sender, call.uid])

    handler.on["Who"] = who
    replies = await asyncio.gather(*(each.call(bus.unique_name, "Who") for each in (peer, stranger)))
    assert [reply.body for reply in replies] == [[each.name, os.geteuid()] for each in (peer, stranger)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
async def test_the_uid_is_the_callers(bus: Bus, handler: Handler, bus_address: str) -> None:
    async def who(call: Call) -> Reply:
        return Reply("u", [call.uid])

    handler.on["Who"] = who
    async with Peer(bus_address, uid=65534) as other:
        assert (await other.call(bus.unique_name, "Who")).body == [65534]


async def test_a_caller_is_asked_after_once(
    bus: Bus, handler: Handler, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = bus._who

    async def counted(name: str) -> Who:
        asked.append(name)
        return await original(name)

    monkeypatch.setattr(bus._calls, "_ask_who", counted)
    handler.on["Ping"] = answering()
    await asyncio.gather(*(peer.call(bus.unique_name, "Ping") for _ in range(20)))
    assert asked == [peer.name]


@pytest.mark.parametrize("limits", [Limits(per_sender=5), Limits(per_uid=5), Limits(total=5)], ids=repr)
async def test_more_calls_than_the_limit_are_refused_and_the_rest_goes_on(
    bus_address: str, handler: Handler, peer: Peer, limits: Limits
) -> None:
    bus = await Bus.connect(bus_address, handler, limits=limits)
    handler.on["Hang"] = hanging = Hanging()
    calls = [asyncio.create_task(peer.call(bus.unique_name, "Hang")) for _ in range(8)]
    await hanging.wait(5)
    while sum(call.done() for call in calls) < 3:
        await asyncio.wait([call for call in calls if not call.done()], return_when=asyncio.FIRST_COMPLETED)
    assert {error_of(call.result())[0] for call in calls if call.done()} == {"LimitReached"}
    await bus.close()
    replies = await asyncio.gather(*calls)
    assert sorted(error_of(reply)[0] for reply in replies) == ["LimitReached"] * 3 + ["Unavailable"] * 5
    assert hanging.cancelled == 5


async def test_a_caller_that_leaves_takes_its_calls_with_it(
    bus: Bus, handler: Handler, bus_address: str, peer: Peer
) -> None:
    handler.on["Hang"] = hanging = Hanging()
    left: list[str] = []
    bus.on_left(left.append)
    async with Peer(bus_address) as leaving:
        await leaving.send(Message(destination=bus.unique_name, path=PATH, interface=INTERFACE, member="Hang"))
        await hanging.wait(1)
    async with asyncio.timeout(60):
        await hanging.ended.wait()
    assert left == [leaving.name]
    assert leaving.name not in bus._calls._senders
    await ping(peer, bus, handler)


async def test_a_thousand_calls_of_many_callers_are_all_answered(
    bus: Bus, handler: Handler, bus_address: str
) -> None:
    handler.on["Echo"] = lambda call: answering(*call.body, signature="s")(call)
    async with AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(Peer(bus_address)) for _ in range(20)]

        async def many(peer: Peer) -> list[str]:
            return [(await peer.call(bus.unique_name, "Echo", "s", [f"{peer.name} {n}"])).body[0] for n in range(50)]

        results = await asyncio.gather(*map(many, peers))
        assert results == [[f"{peer.name} {n}" for n in range(50)] for peer in peers]


async def test_a_call_that_wants_no_reply_gets_none(bus: Bus, handler: Handler, peer: Peer) -> None:
    handler.on["Quiet"] = answering("x", signature="s")
    before = of_this_process()

    async def with_descriptor(_: Call) -> Reply:
        return Reply("h", [0], (os.open("/dev/null", os.O_RDONLY),))

    handler.on["Open"] = with_descriptor
    for member in ("Quiet", "Open", "Unknown"):
        await peer.call(bus.unique_name, member, flags=MessageFlag.NO_REPLY_EXPECTED)
    await ping(peer, bus, handler)
    assert [call.member for call in handler.seen] == ["Quiet", "Open", "Unknown", "Ping"]
    replies = [each for each in peer.messages if each.message_type in (MessageType.METHOD_RETURN, MessageType.ERROR)]
    assert len([each for each in replies if each.sender == bus.unique_name]) == 1
    assert settled() == before


async def test_leave_to_prompt_is_passed_on(bus: Bus, handler: Handler, peer: Peer) -> None:
    handler.on["Ask"] = answering()
    await peer.call(bus.unique_name, "Ask")
    await peer.call(bus.unique_name, "Ask", flags=MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION)
    assert [call.interactive for call in handler.seen] == [False, True]


# What goes back


async def test_errors_of_the_list_go_out_by_name(bus: Bus, handler: Handler, peer: Peer) -> None:
    handler.on["Fail"] = raising(errors.BackupNotFound("there is no such backup; ask ListBackups"))
    reply = await peer.call(bus.unique_name, "Fail")
    assert error_of(reply) == ("BackupNotFound", "there is no such backup; ask ListBackups")


async def test_standard_errors_have_the_standard_names(bus: Bus, handler: Handler, peer: Peer) -> None:
    handler.on["Fail"] = raising(BadCallError("UnknownMethod", "no such method"))
    assert (await peer.call(bus.unique_name, "Fail")).error_name == "org.freedesktop.DBus.Error.UnknownMethod"


async def test_a_bug_is_told_to_the_journal_and_not_to_the_caller(
    bus: Bus, handler: Handler, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    handler.on["Fail"] = raising(RuntimeError("/srv/secret is gone"))
    name, text = error_of(await peer.call(bus.unique_name, "Fail"))
    assert name == "Failed"
    assert "/srv" not in text
    assert "Traceback" not in text
    assert ".py" not in text
    reference = re.search(r"reference ([0-9a-f]{8})", text)
    assert reference
    (record,) = [each for each in caplog.records if reference[1] in each.getMessage()]
    assert record.levelno == logging.ERROR
    assert record.exc_info
    assert "/srv/secret" in str(record.exc_info[1])


async def test_a_handler_that_is_cancelled_from_inside_still_answers(bus: Bus, handler: Handler, peer: Peer) -> None:
    handler.on["Fail"] = raising(asyncio.CancelledError())
    assert error_of(await peer.call(bus.unique_name, "Fail"))[0] == "Cancelled"


@pytest.mark.parametrize("text", ["lone \udcff", "nul \0", "line\nbreak", "x" * 100_000, ""])
async def test_any_error_text_can_be_sent(bus: Bus, handler: Handler, peer: Peer, text: str) -> None:
    handler.on["Fail"] = raising(errors.PathNotFound(text))
    name, shown = error_of(await peer.call(bus.unique_name, "Fail"))
    assert name == "PathNotFound"
    assert len(shown) <= 2000
    assert shown.isprintable()
    await ping(peer, bus, handler)


@pytest.mark.parametrize(
    ("signature", "value"),
    [
        ("s", "nul \0"),
        ("s", "lone \udcff"),
        ("s", None),
        ("o", "no path"),
        ("u", -1),
        ("u", 1 << 32),
        ("a{sv}", {"key": "no variant"}),
        ("(ss)", ["one"]),
        ("y)", 1),
    ],
)
async def test_a_value_that_cannot_be_sent_is_a_bug_and_does_not_cost_the_connection(
    bus: Bus, handler: Handler, peer: Peer, signature: str, value: object
) -> None:
    handler.on["Get"] = answering(value, signature=signature)
    assert error_of(await peer.call(bus.unique_name, "Get"))[0] == "Failed"
    await ping(peer, bus, handler)


async def test_a_signal_that_cannot_be_sent_is_logged_and_left_out(
    bus: Bus, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    await peer.listen(f"type='signal',interface='{INTERFACE}'")
    bus.emit(PATH, INTERFACE, "Bad", "s", ["nul \0"])
    bus.emit(PATH, INTERFACE, "Good", "s", ["text"])
    await peer.wait_for("Good")
    assert not peer.all("Bad")
    assert "not sending com.example.Test.Bad" in caplog.text


async def test_an_answer_beyond_the_size_of_a_message_is_too_large(bus: Bus, handler: Handler, peer: Peer) -> None:
    handler.on["Get"] = answering("x" * (8 << 20), signature="s")
    assert error_of(await peer.call(bus.unique_name, "Get"))[0] == "TooLarge"
    await ping(peer, bus, handler)


# What comes in


async def test_a_call_with_a_huge_body_is_refused_undecoded(bus: Bus, handler: Handler, peer: Peer) -> None:
    handler.on["Take"] = answering()
    reply = await peer.call(bus.unique_name, "Take", "s", ["x" * (30 << 20)])
    assert reply.error_name == "org.freedesktop.DBus.Error.InvalidArgs"
    assert not handler.seen
    await ping(peer, bus, handler)


async def test_a_message_of_a_type_not_yet_invented_is_dropped_alone(bus: Bus, handler: Handler, peer: Peer) -> None:
    data = bytearray(signal("Odd", destination=bus.unique_name, serial=peer.bus.next_serial())._marshall())
    data[1] = 5
    await peer.send_raw(bytes(data))
    await ping(peer, bus, handler)


def test_signatures_that_strangers_invent_are_not_kept_for_ever() -> None:
    """The codec itself, as everybody in this process shares the library's memory of signatures."""
    most = 0
    for number in range(1, 1501):
        signature = "".join("yu"[int(bit)] for bit in f"{number:b}")
        assert types_of(signature) == tuple(signature)
        most = max(most, len(SignatureTree._cache))
    assert most <= marshal._MOST_KEPT + 1


async def test_a_call_of_ours_ends_after_its_time(bus: Bus, peer: Peer) -> None:
    peer.answer = silent  # type: ignore[method-assign]
    with pytest.raises(TimeoutError):
        await bus.call(peer.name, "/", INTERFACE, "Hang", timeout=0.05)
    assert not bus._caller._pending


async def test_an_error_answer_is_an_exception_with_its_name(bus: Bus) -> None:
    with pytest.raises(BusCallError) as caught:
        await bus.call("com.example.Absent", "/", INTERFACE, "Get", timeout=5)
    assert caught.value.name == "org.freedesktop.DBus.Error.ServiceUnknown"


async def test_an_answer_of_another_type_than_expected_is_none(bus: Bus) -> None:
    with pytest.raises(WireError, match="'s' instead of 'u'"):
        await bus.call(*DRIVER, "GetId", timeout=5, expect="u")


async def test_an_answer_counts_only_from_whom_was_asked(bus: Bus, peer: Peer, stranger: Peer) -> None:
    await peer.own("com.example.Asked")
    asked: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    def take(message: Message) -> bool:
        asked.set_result(message)
        return True

    peer.answer = take  # type: ignore[method-assign]
    calling = asyncio.create_task(bus.call("com.example.Asked", "/", INTERFACE, "Get", timeout=20))
    question = await asked
    await stranger.send(Message.new_method_return(question, "s", ["forged"]))
    await stranger.send(Message.new_error(question, "com.example.Forged", "forged"))
    await stranger.ping()
    await peer.send(Message.new_method_return(question, "s", ["genuine"]))
    assert await calling == ["genuine"]


async def test_a_signal_counts_only_from_the_owner_of_the_name(bus: Bus, peer: Peer, stranger: Peer) -> None:
    heard: list[list[Any]] = []
    await peer.own("com.example.Speaker")
    await bus.subscribe("com.example.Speaker", "/com/example", INTERFACE, "Said", heard.append)
    await stranger.send(signal("Said", "s", ["forged"], destination=bus.unique_name))
    await stranger.send(signal("Said", "s", ["forged, to all"]))
    await bus.is_connected(stranger.name)
    await stranger.ping()
    await peer.send(signal("Said", "s", ["genuine"]))
    await peer.bus.release_name("com.example.Speaker")
    await stranger.own("com.example.Speaker")
    await stranger.send(signal("Said", "s", ["the new owner"]))
    async with asyncio.timeout(60):
        while len(heard) < 2:
            await bus.is_connected(peer.name)
    assert heard == [["genuine"], ["the new owner"]]


async def test_nobody_can_forge_that_a_caller_has_left(
    bus: Bus, handler: Handler, peer: Peer, stranger: Peer
) -> None:
    handler.on["Hang"] = hanging = Hanging()
    await peer.send(Message(destination=bus.unique_name, path=PATH, interface=INTERFACE, member="Hang"))
    await hanging.wait(1)
    await stranger.send(
        signal(
            "NameOwnerChanged",
            "sss",
            [peer.name, peer.name, ""],
            path=DRIVER[1],
            interface=DRIVER[2],
            destination=bus.unique_name,
        )
    )
    await ping(stranger, bus, handler)
    assert not hanging.cancelled


# Beginning and end


async def test_a_name_that_somebody_owns_is_not_waited_for(bus: Bus, peer: Peer) -> None:
    await peer.own("com.sendense.Restore1")
    with pytest.raises(BusError, match="belongs to another process"):
        await bus.own("com.sendense.Restore1")
    await peer.bus.release_name("com.sendense.Restore1")
    await bus.own("com.sendense.Restore1")
    assert await bus.is_connected("com.sendense.Restore1")


async def test_a_bus_that_dies_is_noticed_and_ends_everything(mortal_bus: PrivateBus, handler: Handler) -> None:
    handler.on["Hang"] = hanging = Hanging()
    bus = await Bus.connect(mortal_bus.address, handler)
    async with Peer(mortal_bus.address) as peer:
        peer.answer = silent  # type: ignore[method-assign]
        asking = asyncio.create_task(bus.call(peer.name, "/", INTERFACE, "Hang", timeout=20))
        await peer.send(Message(destination=bus.unique_name, path=PATH, interface=INTERFACE, member="Hang"))
        await hanging.wait(1)
        os.kill(mortal_bus.pid, signals.SIGKILL)
        assert "closed" in await bus.lost
        with pytest.raises(BusError):
            await asking
    async with asyncio.timeout(60):
        await hanging.ended.wait()
    with pytest.raises(BusError):
        await bus.call(*DRIVER, "GetId", timeout=5)
    bus.emit(PATH, INTERFACE, "Signal")
    await bus.close()


async def test_closing_answers_what_runs_and_leaves_nothing_open(
    bus_address: str, handler: Handler, peer: Peer
) -> None:
    before = of_this_process()
    handler.on["Hang"] = hanging = Hanging()
    bus = await Bus.connect(bus_address, handler)
    calls = [asyncio.create_task(peer.call(bus.unique_name, "Hang")) for _ in range(10)]
    await hanging.wait(10)
    await bus.close()
    await bus.close()
    assert {error_of(reply) for reply in await asyncio.gather(*calls)} == {
        ("Unavailable", "the service is stopping; try again in a moment")
    }
    assert bus.lost.result() == "closed"
    assert settled() == before


@pytest.mark.parametrize("address", ["unix:path=/nonexistent/socket", "tcp:host=localhost,port=1", "nonsense"])
async def test_no_bus_is_an_error_of_its_own(address: str) -> None:
    before = of_this_process()
    with pytest.raises(BusError):
        await Bus.connect(address)
    assert settled() == before
