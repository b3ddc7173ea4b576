"""Another program on the bus: dbus-next as it is, with the means to misbehave."""

# mypy: allow-untyped-calls
# dbus-next has functions without annotations.

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Self

from dbus_next.aio.message_bus import MessageBus
from dbus_next.auth import AuthExternal
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Message", "MessageFlag", "MessageType", "Peer", "error_of", "signal"]

_ERRORS = "com.sendense.Restore1.Error."


class _AuthAs(AuthExternal):
    def __init__(self, uid: int) -> None:
        super().__init__()
        self._uid = uid

    def _authentication_start(self, negotiate_unix_fd: bool = False) -> str:
        super()._authentication_start(negotiate_unix_fd)
        return f"AUTH EXTERNAL {str(self._uid).encode().hex()}"


class Peer:
    """A connection; as another user (for root only) with ``uid``."""

    def __init__(self, address: str, uid: int | None = None) -> None:
        self._address = address
        self._uid = os.geteuid() if uid is None else uid
        self.messages: list[Message] = []
        self._arrived = asyncio.Event()
        self.bus: MessageBus

    async def __aenter__(self) -> Self:
        # The kernel notes the effective uid when the socket is connected, and the bus asks the kernel.
        own = os.geteuid()
        if self._uid != own:
            os.seteuid(self._uid)
        try:
            self.bus = MessageBus(self._address, auth=_AuthAs(self._uid), negotiate_unix_fd=True)
        finally:
            if self._uid != own:
                os.seteuid(own)
        await self.bus.connect()
        self.bus.add_message_handler(self._seen)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()

    async def leave(self) -> None:
        """Disconnect, closing everything that dbus-next leaves open. May be called again."""
        if self.bus._stream.closed:
            return
        self.bus.disconnect()
        await asyncio.wait([self.bus._disconnect_future])
        self.bus._disconnect_future.exception()
        self.bus._stream.close()
        self.bus._sock.close()

    @property
    def name(self) -> str:
        return str(self.bus.unique_name)

    async def call(
        self,
        destination: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        path: str = "/com/sendense/Restore1",
        interface: str = "com.example.Test",
        flags: MessageFlag = MessageFlag.NONE,
        fds: Sequence[int] = (),
    ) -> Message:
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
            flags=flags,
            unix_fds=list(fds),
        )
        async with asyncio.timeout(60):
            reply = await self.bus.call(message)
        return reply if reply is not None else message

    async def send(self, message: Message) -> None:
        await self.bus.send(message)

    async def send_raw(self, data: bytes) -> None:
        """Bytes of the test's own making, between messages."""
        await asyncio.get_running_loop().sock_sendall(self.bus._sock, data)

    async def own(self, name: str) -> None:
        await self.bus.request_name(name)

    async def listen(self, rule: str) -> None:
        reply = await self.call(
            "org.freedesktop.DBus",
            "AddMatch",
            "s",
            [rule],
            path="/org/freedesktop/DBus",
            interface="org.freedesktop.DBus",
        )
        assert reply.message_type is MessageType.METHOD_RETURN, reply.body

    async def ping(self) -> None:
        """Return once the bus has dealt with everything that we sent."""
        driver = "org.freedesktop.DBus"
        await self.call(driver, "GetId", path="/org/freedesktop/DBus", interface=driver)

    async def wait_for(self, member: str, count: int = 1) -> list[Message]:
        """The signals and calls of that name that have come in, once there are so many."""
        async with asyncio.timeout(60):
            while len(self.all(member)) < count:
                self._arrived.clear()
                await self._arrived.wait()
        return self.all(member)

    def all(self, member: str) -> list[Message]:
        return [message for message in self.messages if message.member == member]

    def _seen(self, message: Message) -> Message | bool | None:
        self.messages.append(message)
        self._arrived.set()
        return self.answer(message) if message.message_type is MessageType.METHOD_CALL else None

    def answer(self, message: Message) -> Message | bool:
        """The answer to a call that came in; True for none."""
        raise AssertionError(f"nobody was expected to call {message.member}")


def signal(
    member: str,
    signature: str = "",
    body: Sequence[Any] = (),
    *,
    path: str = "/com/example",
    interface: str = "com.example.Test",
    destination: str | None = None,
    unix_fds: Sequence[int] = (),
    serial: int = 0,
) -> Message:
    return Message(
        message_type=MessageType.SIGNAL,
        path=path,
        interface=interface,
        member=member,
        signature=signature,
        body=list(body),
        destination=destination,  # type: ignore[arg-type]  # None is its own default
        unix_fds=list(unix_fds),
        serial=serial,
    )


def error_of(reply: Message) -> tuple[str, str]:
    """Name, without our prefix, and text of an error reply."""
    assert reply.message_type is MessageType.ERROR, f"no error but {reply.body}"
    return str(reply.error_name).removeprefix(_ERRORS), reply.body[0]
