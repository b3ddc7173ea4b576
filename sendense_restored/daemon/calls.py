"""The method calls that others make: who they are, what they may cost us, and what goes back.

Each call runs as a task of its own, owned here: it ends with an answer whatever happens in it, is cancelled when its
caller leaves the bus, and counts against limits that are checked before anything else is done for the caller. Who
the caller is comes from the bus, once per connection of theirs.

Errors of ``errors`` go to the caller by name; anything else is a bug of ours: its traceback goes to the journal, the
caller gets a reference to it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sendense_restored import errors, names
from sendense_restored.wire import Incoming, MessageFlag, MessageType, TooLongError, WireError, close_all

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

log = logging.getLogger(__name__)

STANDARD_ERROR = "org.freedesktop.DBus.Error."
_MOST_ERROR_TEXT = 2000
_LONG = 500
_STOPPING = "the service is stopping; try again in a moment"


class BadCallError(Exception):
    """A call that is wrong in a way for which D-Bus itself has an error name."""

    def __init__(
        self,
        kind: Literal[
            "UnknownObject", "UnknownInterface", "UnknownMethod", "UnknownProperty", "PropertyReadOnly", "InvalidArgs"
        ],
        message: str,
    ) -> None:
        super().__init__(message)
        self.name = STANDARD_ERROR + kind


@dataclass(frozen=True)
class Limits:
    """How many calls may run at once."""

    per_sender: int = 64
    per_uid: int = 128
    total: int = 512


@dataclass(frozen=True)
class Call:
    """A method call. ``sender`` is the caller's unique name, ``uid`` its user as the bus knows it.

    ``fds`` stay the bus' own: they are valid until the handler returns.
    """

    sender: str
    uid: int
    path: str
    interface: str
    member: str
    signature: str = ""
    body: tuple[Any, ...] = ()
    interactive: bool = False
    """The caller accepts being asked to authenticate."""
    fds: tuple[int, ...] = ()
    unit: str = ""
    """The systemd unit that the caller ran in when it was first looked at, as far as is known; to be told in the log
    and never to decide by."""


class Who(NamedTuple):
    """Who is behind a connection: the user as the bus knows it, and the systemd unit, "" if it is not known."""

    uid: int
    unit: str = ""


@dataclass(frozen=True)
class Reply:
    """The answer to a call. ``fds`` belong to the bus from the moment the handler returns."""

    signature: str = ""
    body: Sequence[Any] = ()
    fds: tuple[int, ...] = ()


def _is_long(reply: Reply) -> bool:
    """Whether encoding it takes milliseconds. One with descriptors is not, and they would need an owner meanwhile."""
    return not reply.fds and any(isinstance(value, list | dict) and len(value) > _LONG for value in reply.body)


@dataclass
class _Sender:
    """What is known of a connection that has called us; ends when it leaves the bus."""

    who: Who | None = None
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class Calls:
    """The calls being answered.

    ``ask_who`` tells who is behind a unique name, or raises RestoreError. ``send`` takes a message's kind, header,
    signature, body and descriptors, owns the descriptors from then on, and raises WireError.
    """

    def __init__(
        self,
        handler: Callable[[Call], Awaitable[Reply]],
        limits: Limits,
        *,
        ask_who: Callable[[str], Awaitable[Who]],
        send: Callable[[MessageType, dict[str, Any], str, Sequence[Any], tuple[int, ...]], None],
    ) -> None:
        self._handler = handler
        self._limits = limits
        self._ask_who = ask_who
        self._send = send
        self._closing = False
        self._senders: dict[str, _Sender] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: Counter[int] = Counter()  # by uid

    def accept(self, message: Incoming) -> None:
        """Start answering a call, or refuse it."""
        sender = self._senders.setdefault(message.sender, _Sender())
        refusal: errors.RestoreError | None = None
        if self._closing:
            refusal = errors.Unavailable(_STOPPING)
        elif len(self._tasks) >= self._limits.total:
            refusal = errors.LimitReached("the service has too many calls to answer; try again in a moment")
        elif len(sender.tasks) >= self._limits.per_sender:
            refusal = errors.LimitReached(
                f"{self._limits.per_sender} calls of this connection are running; wait until some have ended"
            )
        if refusal is not None:
            message.release()
            self._answer_error(message, refusal)
            return
        task = asyncio.create_task(
            self._serve(message, sender), name=f"{message.sender} {message.path} {message.interface}.{message.member}"
        )
        for tasks in (self._tasks, sender.tasks):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        # Here and not in the task, which runs nothing at all if it is cancelled before its first step.
        task.add_done_callback(lambda ended: self._finished(message, ended))

    def left(self, name: str) -> None:
        """Cancel the calls of a connection that has left the bus, and forget it."""
        sender = self._senders.pop(name, None)
        for task in sender.tasks if sender else ():
            task.cancel()

    def cancel(self) -> None:
        """Cancel all calls; further ones are refused."""
        self._closing = True
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Cancel all calls and wait until they have ended and been answered."""
        self.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, message: Incoming, sender: _Sender) -> None:
        try:
            reply = await self._handle(message, sender)
            if _is_long(reply):
                await asyncio.sleep(0)  # packing it took this turn of the event loop; encoding it gets one of its own
        except (BadCallError, errors.RestoreError) as error:
            self._answer_error(message, error)
        except Exception as bug:  # noqa: BLE001 - the edge: whatever it is, the caller gets an answer
            self._answer_bug(message, bug)
        else:
            self._answer(message, reply)

    def _finished(self, message: Incoming, task: asyncio.Task[None]) -> None:
        message.release()
        if task.cancelled() and self._closing:
            self._answer_error(message, errors.Unavailable(_STOPPING))
        elif task.cancelled():
            self._answer_error(message, errors.Cancelled("the call was cancelled; ask again if it is still wanted"))

    async def _handle(self, message: Incoming, sender: _Sender) -> Reply:
        async with sender.asking:
            if sender.who is None:
                sender.who = await self._ask_who(message.sender)
        uid, unit = sender.who
        if self._running[uid] >= self._limits.per_uid:
            raise errors.LimitReached(
                f"{self._limits.per_uid} calls of this user are running; wait until some have ended"
            )
        self._running[uid] += 1
        try:
            try:
                body = message.body()
            except WireError:
                raise BadCallError("InvalidArgs", "the arguments are too long or cannot be decoded") from None
            return await self._handler(
                Call(
                    sender=message.sender,
                    uid=uid,
                    path=message.path,
                    interface=message.interface,
                    member=message.member,
                    signature=message.signature,
                    body=tuple(body),
                    interactive=bool(message.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION),
                    fds=tuple(message.fds),
                    unit=unit,
                )
            )
        finally:
            self._running[uid] -= 1
            if not self._running[uid]:
                del self._running[uid]

    def _answer(self, message: Incoming, reply: Reply) -> None:
        if message.flags & MessageFlag.NO_REPLY_EXPECTED:
            close_all(reply.fds)
            return
        header = {"destination": message.sender, "reply_serial": message.serial}
        try:
            self._send(MessageType.METHOD_RETURN, header, reply.signature, reply.body, reply.fds)
        except TooLongError:
            self._answer_error(
                message,
                errors.TooLarge("the answer does not fit into a message; ask for less at a time"),
            )
        except WireError as bug:
            self._answer_bug(message, bug)

    def _answer_bug(self, message: Incoming, bug: Exception) -> None:
        reference = secrets.token_hex(4)
        log.error("%s.%s failed (reference %s)", message.interface, message.member, reference, exc_info=bug)
        self._answer_error(message, errors.Failed(f"internal error (reference {reference}); the journal has more"))

    def _answer_error(self, message: Incoming, error: BadCallError | errors.RestoreError) -> None:
        if message.flags & MessageFlag.NO_REPLY_EXPECTED:
            return
        name = error.dbus_name() if isinstance(error, errors.RestoreError) else error.name
        header = {"destination": message.sender, "reply_serial": message.serial, "error_name": name}
        # Guest file names end up in error texts: no NUL or half character may make the answer unsendable.
        text = names.displayable(str(error))[:_MOST_ERROR_TEXT]
        self._send(MessageType.ERROR, header, "s", [text], ())
