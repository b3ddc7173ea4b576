"""A service whose answers the test decides, on a real bus."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from typing import TYPE_CHECKING, Any, Self

from dbus_next.signature import Variant

from sendense_restored.client import BUS_NAME, MOUNT, ROOT
from tests.bus.peer import Message, Peer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sendense_restored.errors import RestoreError


class Answer:
    """Values of a reply and the descriptors that go with them; the service keeps its own until it is closed."""

    def __init__(self, signature: str = "", *values: object, fds: tuple[int, ...] = ()) -> None:
        self.signature = signature
        self.values = list(values)
        self.fds = fds


HANG = object()
"""The answer of a service that does not answer."""


class FakeService(Peer):
    """Answers each method with what ``answers`` has for its name: an Answer, an error, HANG, or a function of the
    message that gives one of these. Its ``leave`` is as sudden as if it were killed."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.answers: dict[str, Any] = {}
        self.calls: list[Message] = []
        self.called = asyncio.Event()
        self._fds: list[int] = []

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self.own(BUS_NAME)
        return self

    async def leave(self) -> None:
        await super().leave()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def open(self, path: Path) -> int:
        """A descriptor to answer with."""
        self._fds.append(os.open(path, os.O_RDONLY))
        return self._fds[-1]

    def pipe(self) -> tuple[int, int]:
        """A reading end to answer with, and the writing end for the test to close."""
        reading, writing = os.pipe()
        self._fds.append(reading)
        return reading, writing

    def stream(self, *lines: str | dict[str, object]) -> Callable[[Message], Answer]:
        """The answer to OpenListing: so many lines, which must fit into a pipe, and the end."""

        def answer(_: Message) -> Answer:
            reading, writing = self.pipe()
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 1 << 20)
            with os.fdopen(writing, "w", encoding="utf-8") as pipe:
                for line in lines:
                    print(line if isinstance(line, str) else json.dumps(line), file=pipe)
            return Answer("h", 0, fds=(reading,))

        return answer

    def let_go(self, fd: int) -> None:
        """Close a descriptor that has been answered with, so that only the client has it."""
        self._fds.remove(fd)
        os.close(fd)

    def called_with(self, member: str) -> list[Any]:
        """What the last call of ``member`` had as arguments, variants taken off."""
        return [_plain(value) for value in [call for call in self.calls if call.member == member][-1].body]

    async def reply(self, message: Message, answer: Answer) -> None:
        """Answer a call that was left hanging."""
        await self.send(Message.new_method_return(message, answer.signature, answer.values, list(answer.fds)))

    def answer(self, message: Message) -> Message | bool:
        self.calls.append(message)
        self.called.set()
        answer = self.answers.get(message.member)
        if callable(answer):
            answer = answer(message)
        if answer is HANG:
            return True
        if isinstance(answer, Exception):
            error: RestoreError = answer  # type: ignore[assignment]  # the tests answer with no others
            return Message.new_error(message, error.dbus_name(), error.message)
        assert isinstance(answer, Answer), f"the test has no answer to {message.member}"
        return Message.new_method_return(message, answer.signature, answer.values, list(answer.fds))


def variants(**values: object) -> dict[str, Variant]:
    """A dictionary as the service sends it; the types are the contract's."""
    return {name: _variant(value) for name, value in values.items()}


def _variant(value: object) -> Variant:
    match value:
        case bool():
            return Variant("b", value)
        case int():
            return Variant("x", value)
        case str():
            return Variant("s", value)
        case [dict(), *_]:
            return Variant("aa{sv}", value)
        case [int(), *_]:
            return Variant("ax", value)
        case list():
            return Variant("as", value)
        case _:
            raise AssertionError(f"no type for {value!r}")


def _plain(value: object) -> object:
    match value:
        case Variant():
            return _plain(value.value)
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case _:
            return value


MOUNT_ID = "3f2b8c1e-0d4a-4c57-9b1f-6a1f0e9c7d21"


def object_of(mount: str) -> str:
    return f"{ROOT}/mounts/{mount.replace('-', '_')}"


def properties(mount: str = MOUNT_ID, **more: object) -> Answer:
    """GetAll's answer for a mount with an open and an encrypted volume."""
    volumes = [
        variants(name="partition-1", state="encrypted", reason="BitLocker; unlock it", size=100 << 20, used=0),
        variants(
            name="partition-2",
            state="mounted",
            filesystem="ext4",
            label="root",
            size=3 << 30,
            used=1 << 30,
            view="clean",
        ),
    ]
    values: dict[str, object] = {
        "Id": mount,
        "BackupId": "backup-1",
        "BackupDiskIds": [7],
        "VmName": "web",
        "State": "mounted",
        "Volumes": volumes,
        "Claims": [variants(uid=1000, since=1_700_000_000, expires=1_700_003_600)],
        "CreatedAt": 1_700_000_000,
        "ExpiresAt": 1_700_003_600,
        "Busy": False,
        "SomethingOfALaterVersion": "x",
    }
    return Answer("a{sv}", variants(**values | more))


def entry(name: str, kind: str = "file", size: int = 0, target: str = "", **extras: object) -> list[object]:
    """One entry of ListFiles."""
    return [name, kind, size, 0o644, 1_700_000_000 * 10**9, target, variants(**extras)]


def found(path: str, kind: str = "file", size: int = 0, **more: object) -> dict[str, object]:
    """One line of a listing."""
    return {"path": path, "kind": kind, "size": size, "mode": 0o644, "mtime_ns": 1_700_000_000 * 10**9} | more


def summary(entries: int, errors: int = 0, *, truncated: bool = False) -> dict[str, object]:
    """The last line of a listing."""
    return {"summary": {"entries": entries, "errors": errors, "truncated": truncated}}


def only_properties(message: Message) -> Answer:
    """GetAll of the mount that was asked for."""
    assert message.body == [MOUNT]
    return properties(message.path.rpartition("/")[2].replace("_", "-"))


def sequence(*answers: object) -> Callable[[Message], object]:
    """One answer after the other."""
    remaining = list(answers)
    return lambda _: remaining.pop(0)
