"""Who gets a yes, who gets a no, and that every failure of polkit is a no; polkit is played by the test."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import pytest

from sendense_restored import errors
from sendense_restored.daemon import authority as authority_module
from sendense_restored.daemon.authority import Authority
from sendense_restored.daemon.bus import Bus, Call
from tests.bus.peer import Message, Peer, signal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

POLKIT = "org.freedesktop.PolicyKit1"
PATH = "/org/freedesktop/PolicyKit1/Authority"
INTERFACE = "org.freedesktop.PolicyKit1.Authority"

YES = [True, False, {}]
NO = [False, False, {}]
CHALLENGE = [False, True, {"polkit.retains_authorization_after_challenge": "1"}]
DETAILS = {"backup_id": "b-1", "vm_name": "web"}


class FakePolkit(Peer):
    """Answers from a list, the last for ever; what it is asked is kept."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.answers: list[Any] = [YES]
        self.signature = "(bba{ss})"
        self.questions: list[tuple[str, str, dict[str, str], int]] = []
        self.numbers: list[str] = []
        self.asked = asyncio.Event()

    def answer(self, message: Message) -> Message | bool:
        if message.member != "CheckAuthorization":
            return True
        (kind, subject), action, details, flags, number = message.body
        assert (message.signature, kind, list(subject)) == ("(sa{sv})sa{ss}us", "system-bus-name", ["name"])
        self.questions.append((subject["name"].value, action, details, flags))
        self.numbers.append(number)
        self.asked.set()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:  # never
            return True
        if isinstance(answer, str):
            return Message.new_error(message, answer, "polkit says no more than this")
        return Message.new_method_return(message, self.signature, [answer])

    async def change(self) -> None:
        await self.send(signal("Changed", path=PATH, interface=INTERFACE))

    async def cancelled(self) -> list[str]:
        return [each.body[0] for each in await self.wait_for("CancelCheckAuthorization")]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def polkit(bus_address: str) -> AsyncIterator[FakePolkit]:
    async with FakePolkit(bus_address) as polkit:
        await polkit.own(POLKIT)
        yield polkit


@pytest.fixture
def authority(bus: Bus, clock: Clock) -> Authority:
    return Authority(bus, clock)


def by(peer: Peer, *, uid: int = 1000, interactive: bool = False) -> Call:
    return Call(peer.name, uid, "/", "com.sendense.Restore1.Manager", "Mount", interactive=interactive)


async def test_a_yes_lets_pass_and_the_question_is_right(
    authority: Authority, polkit: FakePolkit, peer: Peer
) -> None:
    await authority.check(by(peer), "mount", DETAILS)
    assert polkit.questions == [(peer.name, "com.sendense.restore1.mount", DETAILS, 0)]


async def test_a_no_raises_with_what_to_do(authority: Authority, polkit: FakePolkit, peer: Peer) -> None:
    polkit.answers = [NO]
    with pytest.raises(errors.NotAuthorized, match=r"com\.sendense\.restore1\.mount .* administrator"):
        await authority.check(by(peer), "mount", DETAILS)
    assert not await authority.allows(by(peer), "mount", DETAILS)


async def test_root_passes_without_polkit(authority: Authority, peer: Peer) -> None:
    await authority.check(by(peer, uid=0), "manage", {})


async def test_a_challenge_without_leave_to_prompt_can_be_obtained(
    authority: Authority, polkit: FakePolkit, peer: Peer
) -> None:
    polkit.answers = [CHALLENGE]
    with pytest.raises(errors.NotAuthorizedCanObtain):
        await authority.check(by(peer), "mount", DETAILS)
    assert [question[3] for question in polkit.questions] == [0]


async def test_with_leave_to_prompt_a_human_is_asked_only_after_a_challenge(
    authority: Authority, polkit: FakePolkit, peer: Peer
) -> None:
    polkit.answers = [CHALLENGE, YES]
    await authority.check(by(peer, interactive=True), "mount", DETAILS)
    assert [question[3] for question in polkit.questions] == [0, 1]
    assert len(set(polkit.numbers)) == 2


@pytest.mark.parametrize("second", [NO, CHALLENGE])
async def test_a_human_who_does_not_authenticate_is_a_no(
    authority: Authority, polkit: FakePolkit, peer: Peer, second: list[Any]
) -> None:
    polkit.answers = [CHALLENGE, second]
    with pytest.raises(errors.NotAuthorized):
        await authority.check(by(peer, interactive=True), "mount", DETAILS)


async def test_allows_never_prompts(authority: Authority, polkit: FakePolkit, peer: Peer) -> None:
    polkit.answers = [CHALLENGE]
    assert not await authority.allows(by(peer, interactive=True), "read-others", {})
    assert [question[3] for question in polkit.questions] == [0]


# polkit does not work


@pytest.mark.parametrize(
    ("answer", "signature"),
    [
        ("org.freedesktop.PolicyKit1.Error.Failed", "(bba{ss})"),
        ("org.freedesktop.DBus.Error.AccessDenied", "(bba{ss})"),
        ("yes", "s"),
        (True, "b"),
        ([True], "(b)"),
        (["yes", "", {}], "(ssa{ss})"),
    ],
)
@pytest.mark.parametrize("interactive", [False, True])
async def test_errors_and_malformed_answers_are_a_no(
    authority: Authority, polkit: FakePolkit, peer: Peer, answer: object, signature: str, interactive: bool
) -> None:
    if signature != "(bba{ss})":
        polkit.answer = lambda message: Message.new_method_return(message, signature, [answer])  # type: ignore[method-assign]
    polkit.answers = [answer]
    with pytest.raises(errors.NotAuthorized, match="polkit does not work"):
        await authority.check(by(peer, interactive=interactive), "mount", DETAILS)


async def test_a_missing_polkit_is_a_no_and_root_still_works(
    authority: Authority, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        with pytest.raises(errors.NotAuthorized, match="polkit does not work"):
            await authority.check(by(peer), "read", DETAILS)
    await authority.check(by(peer, uid=0), "read", DETAILS)
    assert [record.levelno for record in caplog.records if "only root" in record.getMessage()] == [logging.ERROR]


async def test_a_failure_is_logged_again_after_it_has_worked(
    authority: Authority, polkit: FakePolkit, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    failure = "org.freedesktop.PolicyKit1.Error.Failed"
    polkit.answers = [failure, failure, NO, failure, NO]
    for _ in range(4):
        assert not await authority.allows(by(peer), "read", DETAILS)
    assert len([record for record in caplog.records if "only root" in record.getMessage()]) == 2


async def test_polkit_that_comes_later_is_used(authority: Authority, bus_address: str, peer: Peer) -> None:
    assert not await authority.allows(by(peer), "read", DETAILS)
    async with FakePolkit(bus_address) as polkit:
        await polkit.own(POLKIT)
        assert await authority.allows(by(peer), "read", DETAILS)


async def test_no_answer_in_time_is_a_no_and_the_question_is_taken_back(
    authority: Authority, polkit: FakePolkit, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority_module, "_QUICK", 0.05)
    polkit.answers = [None]
    with pytest.raises(errors.NotAuthorized, match="polkit does not work"):
        await authority.check(by(peer), "mount", DETAILS)
    assert await polkit.cancelled() == polkit.numbers


async def test_a_human_who_takes_too_long_is_a_no_but_polkit_works(
    authority: Authority,
    polkit: FakePolkit,
    peer: Peer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(authority_module, "_HUMAN", 0.05)
    polkit.answers = [CHALLENGE, None]
    with pytest.raises(errors.NotAuthorized, match="not allowed"):
        await authority.check(by(peer, interactive=True), "mount", DETAILS)
    assert await polkit.cancelled() == polkit.numbers[1:]
    assert "only root" not in caplog.text


async def test_a_question_whose_asker_gives_up_is_taken_back(
    authority: Authority, polkit: FakePolkit, peer: Peer
) -> None:
    polkit.answers = [None]
    checking = asyncio.create_task(authority.check(by(peer), "mount", DETAILS))
    async with asyncio.timeout(60):
        await polkit.asked.wait()
    checking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await checking
    assert await polkit.cancelled() == polkit.numbers


async def test_a_yes_for_somebody_who_has_gone_meanwhile_is_a_no(
    authority: Authority, polkit: FakePolkit, bus_address: str
) -> None:
    async with Peer(bus_address) as leaving:
        call = by(leaving, interactive=True)
    polkit.answers = [CHALLENGE, YES]
    with pytest.raises(errors.NotAuthorized):
        await authority.check(call, "mount", DETAILS)


# A yes is reused


async def test_a_yes_holds_for_five_seconds(
    authority: Authority, polkit: FakePolkit, peer: Peer, clock: Clock
) -> None:
    for now, questions in ((0, 1), (4.9, 1), (5.0, 2), (9.9, 2), (10.1, 3)):
        clock.now = 1000 + now
        await authority.check(by(peer), "read", DETAILS)
        assert len(polkit.questions) == questions


async def test_a_yes_holds_for_the_same_question_only(
    authority: Authority, polkit: FakePolkit, peer: Peer, stranger: Peer
) -> None:
    await authority.check(by(peer), "read", DETAILS)
    polkit.answers = [NO]
    assert await authority.allows(by(peer), "read", dict(DETAILS))
    assert not await authority.allows(by(stranger), "read", DETAILS)
    assert not await authority.allows(by(peer), "mount", DETAILS)
    assert not await authority.allows(by(peer), "read", DETAILS | {"vm_name": "db"})
    assert not await authority.allows(by(peer), "read", {"backup_id": "b-1"})
    assert not await authority.allows(by(peer), "read", {})


async def test_a_no_is_asked_again(authority: Authority, polkit: FakePolkit, peer: Peer) -> None:
    polkit.answers = [NO, YES]
    assert not await authority.allows(by(peer), "read", DETAILS)
    assert await authority.allows(by(peer), "read", DETAILS)


async def test_what_a_human_allowed_is_left_to_polkit_to_remember(
    authority: Authority, polkit: FakePolkit, peer: Peer
) -> None:
    polkit.answers = [CHALLENGE, YES, CHALLENGE, NO]
    await authority.check(by(peer, interactive=True), "manage", {})
    with pytest.raises(errors.NotAuthorized):
        await authority.check(by(peer, interactive=True), "manage", {})


async def test_changed_ends_a_yes(authority: Authority, polkit: FakePolkit, peer: Peer, bus: Bus) -> None:
    await authority.check(by(peer), "read", DETAILS)
    polkit.answers = [NO]
    await polkit.change()
    await polkit.call("org.freedesktop.DBus", "GetId", path="/org/freedesktop/DBus", interface="org.freedesktop.DBus")
    await bus.is_connected(peer.name)  # the bus keeps the order, so the signal has come in too
    assert not await authority.allows(by(peer), "read", DETAILS)


async def test_changed_while_polkit_is_asked_keeps_the_answer_from_being_reused(
    authority: Authority, polkit: FakePolkit, peer: Peer
) -> None:
    questions: list[Message] = []

    def change_then_answer(message: Message) -> Message:
        questions.append(message)
        polkit.bus.send(signal("Changed", path=PATH, interface=INTERFACE))
        return Message.new_method_return(message, "(bba{ss})", [YES])

    polkit.answer = change_then_answer  # type: ignore[method-assign]
    await authority.check(by(peer), "read", DETAILS)
    await authority.check(by(peer), "read", DETAILS)
    assert len(questions) == 2


async def test_changed_by_a_stranger_means_nothing(
    authority: Authority, polkit: FakePolkit, peer: Peer, stranger: Peer, bus: Bus
) -> None:
    await authority.check(by(peer), "read", DETAILS)
    for destination in (None, bus.unique_name):
        await stranger.send(signal("Changed", path=PATH, interface=INTERFACE, destination=destination))
    await stranger.call(
        "org.freedesktop.DBus", "GetId", path="/org/freedesktop/DBus", interface="org.freedesktop.DBus"
    )
    await bus.is_connected(peer.name)
    await authority.check(by(peer), "read", DETAILS)
    assert len(polkit.questions) == 1


@pytest.mark.usefixtures("polkit")
async def test_a_caller_that_leaves_takes_its_yes_with_it(authority: Authority, bus_address: str, bus: Bus) -> None:
    left = asyncio.Event()
    bus.on_left(lambda _: left.set())
    async with Peer(bus_address) as leaving:
        await authority.check(by(leaving), "read", DETAILS)
        assert authority._granted
    async with asyncio.timeout(60):
        await left.wait()
    assert not authority._granted


@pytest.mark.usefixtures("polkit")
async def test_what_is_remembered_is_bounded(
    authority: Authority, peer: Peer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority_module, "_MOST_REUSED", 10)
    for number in range(30):
        await authority.check(by(peer), "read", {"path": str(number)})
    assert len(authority._granted) == 10
    clock.now += 6
    await authority.check(by(peer), "read", {"path": "new"})
    assert len(authority._granted) == 1


@pytest.mark.parametrize("text", ["nul \0", "lone \udcff", "line\nbreak", "x" * 100_000])
async def test_details_may_hold_any_text(authority: Authority, polkit: FakePolkit, peer: Peer, text: str) -> None:
    await authority.check(by(peer), "read", {"path": text})
    shown = polkit.questions[0][2]["path"]
    assert shown.isprintable()
    assert len(shown) <= 4000
