"""The calls that we make on a connection, and who may answer them.

An answer counts only with the number of a pending call, and from the connection that owns the name which was called;
the bus tells us of each new owner before it passes on what that one says. The descriptors of an answer belong to the
one who awaits it, and those of an answer that nobody awaits are closed here: it came too late, or from a stranger.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any

from .codec import MOST_SENT, Incoming, MessageFlag, MessageType, WireError, close_all, encode
from .connection import BusError, Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

DRIVER = "org.freedesktop.DBus"
"""The name of the bus itself."""
DRIVER_PATH = "/org/freedesktop/DBus"
_SECONDS = 10.0
"""How long the bus itself may take."""


class BusCallError(Exception):
    """A call of ours was answered with an error."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message


def _untold(_name: str, _owner: str) -> None:
    pass


class Caller:
    """Owns a connection, whose ``end`` ends it all, and the calls that are pending there.

    ``on_message`` gets and owns what is no answer: signals, and calls by others. ``on_owner`` is told of each name
    whose owner has changed and of the new one ("" for none), as far as we have asked the bus for such signals.
    """

    def __init__(
        self,
        address: str | None,
        *,
        on_message: Callable[[Incoming], None],
        on_end: Callable[[str], None],
        on_owner: Callable[[str, str], None] = _untold,
        most_received: int = MOST_SENT,
    ) -> None:
        self._on_message = on_message
        self._on_owner = on_owner
        self._on_end = on_end
        self._pending: dict[int, tuple[str, asyncio.Future[Incoming | None]]] = {}
        self._watched: dict[str, asyncio.Lock] = {}
        self._owners: dict[str, str] = {}
        self.connection = Connection(
            address, on_message=self._received, on_end=self._ended, most_received=most_received
        )

    async def open(self, *, seconds: float = _SECONDS) -> str:
        """Authenticate and say hello; gives our unique name. Raises BusError; the connection has ended then."""
        await self.connection.open(seconds=seconds)
        try:
            (name,) = await self.ask("Hello")
        except (BusCallError, TimeoutError, ValueError) as error:
            self.connection.end("refused")
            raise BusError(f"the message bus does not accept us ({str(error) or 'no answer'})") from error
        except BaseException:
            self.connection.end("cancelled")
            raise
        return str(name)

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        seconds: float,
        flags: MessageFlag = MessageFlag.NONE,
        fds: Sequence[int] = (),
    ) -> Incoming:
        """Call a method; the answer, whose descriptors are the caller's.

        ``fds`` are sent along, an ``h`` in the body is an index into them; they stay the caller's as well.
        Raises BusCallError for an error answer, TimeoutError, BusError if the connection has ended, WireError if the
        arguments do not fit.
        """
        await self.watch(destination)
        if self.connection.ended:
            raise BusError("there is no connection to the message bus")
        header = {"destination": destination, "path": path, "interface": interface, "member": member}
        serial = self.connection.next_serial()
        data = encode(
            MessageType.METHOD_CALL, serial, header, signature=signature, body=body, fds=len(fds), flags=flags
        )
        answer: asyncio.Future[Incoming | None] = asyncio.get_running_loop().create_future()
        self._pending[serial] = destination, answer
        message = None
        try:
            self.connection.transmit(data, [os.dup(fd) for fd in fds])
            async with asyncio.timeout(seconds):
                message = await answer
        finally:
            del self._pending[serial]
            # Cancelled as the answer came: nobody else will ever close what it brought.
            if message is None and answer.done() and not answer.cancelled() and (late := answer.result()):
                late.release()
        if message is None:
            raise BusError("the connection to the message bus has ended")
        if message.kind is MessageType.ERROR:
            message.release()
            raise BusCallError(message.error_name, _reason(message))
        return message

    async def ask(self, member: str, signature: str = "", *body: object) -> list[Any]:
        """Call a method of the bus itself. Raises BusCallError, TimeoutError, BusError."""
        message = await self.call(DRIVER, DRIVER_PATH, DRIVER, member, signature, body, seconds=_SECONDS)
        close_all(message.take())  # a pidfd of a caller, from the bus itself: no stranger's
        return message.body()

    async def match(self, sender: str, path: str, interface: str, member: str, **arguments: str) -> None:
        """Have the bus send us a signal, ``arg0`` and so on as given. Raises BusCallError, TimeoutError, BusError."""
        rule = {
            "type": "signal",
            "sender": sender,
            "path": path,
            "interface": interface,
            "member": member,
            **arguments,
        }
        await self.ask("AddMatch", "s", ",".join(f"{key}='{value}'" for key, value in rule.items()))

    async def watch(self, name: str) -> str:
        """Know from now on which connection owns ``name``; the one that does now, "" for none.

        Raises BusCallError, TimeoutError, BusError.
        """
        if name == DRIVER or name.startswith(":"):
            return name
        async with self._watched.setdefault(name, asyncio.Lock()):
            if name not in self._owners:
                await self.match(DRIVER, DRIVER_PATH, DRIVER, "NameOwnerChanged", arg0=name)
                try:
                    (owner,) = await self.ask("GetNameOwner", "s", name)
                except BusCallError as error:
                    if error.name != f"{DRIVER}.Error.NameHasNoOwner":
                        raise
                    owner = ""
                # A change that came in while we asked is newer than the answer.
                self._owners.setdefault(name, owner)
            return self._owners[name]

    def comes_from(self, sender: str, name: str) -> bool:
        """Whether ``sender`` is ``name``, or owns it and it is watched."""
        return bool(sender) and sender in {name, self._owners.get(name)}

    def _received(self, message: Incoming) -> None:
        if message.kind in {MessageType.METHOD_RETURN, MessageType.ERROR}:
            self._answered(message)
            return
        if message.kind is MessageType.SIGNAL and (message.sender, message.member) == (DRIVER, "NameOwnerChanged"):
            name, _, owner = message.body()
            if name in self._watched:
                self._owners[name] = owner
            self._on_owner(name, owner)
        self._on_message(message)

    def _answered(self, message: Incoming) -> None:
        destination, answer = self._pending.get(message.reply_serial, ("", None))
        if answer is None or answer.done():
            message.release()
            return
        # An error may also be the bus' own, about a destination that is not there.
        expected = self.comes_from(message.sender, destination)
        if expected or (message.kind is MessageType.ERROR and message.sender == DRIVER):
            answer.set_result(message)
        else:
            message.release()
            log.warning("ignoring an answer by %s to a call of %s", message.sender, destination)

    def _ended(self, reason: str) -> None:
        for _, answer in self._pending.values():
            if not answer.done():
                answer.set_result(None)
        self._on_end(reason)


def _reason(message: Incoming) -> str:
    """The text of an error answer."""
    if message.signature.startswith("s"):
        try:
            return str(message.body()[0])
        except WireError as error:
            return str(error)
    return "it gave no reason"
