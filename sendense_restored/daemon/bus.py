"""The message bus, made safe: what the daemon knows of D-Bus below its objects.

``Bus`` owns the connection with the calls that we make (``wire.Caller``) and, through ``calls``, those that others
make. Signals, like answers, count only when they come from the owner of the name they should come from. When the
connection ends, ``lost`` is done and every call is cancelled: a daemon without its bus is of no use and ends.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sendense_restored import errors
from sendense_restored.wire import (
    DRIVER,
    DRIVER_PATH,
    BusCallError,
    BusError,
    Caller,
    Incoming,
    MessageFlag,
    MessageType,
    Rows,
    Variant,
    WireError,
    close_all,
    encode,
    variant,
)

from .calls import BadCallError, Call, Calls, Limits, Reply, Who

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

__all__ = [
    "BadCallError",
    "Bus",
    "BusCallError",
    "BusError",
    "Call",
    "Limits",
    "Reply",
    "Rows",
    "Variant",
    "Who",
    "WireError",
    "variant",
]

log = logging.getLogger(__name__)

_MOST_RECEIVED = 256 << 10
"""Bytes of a body that is decoded; the worst of that size costs a fraction of a second, and none of ours needs it."""
_SECONDS_TO_DRAIN = 10.0
_MOST_OF_CGROUPS = 16 << 10  # bytes; the path of a group is shorter than 4 KiB, and there are a dozen hierarchies
_DO_NOT_QUEUE = 4  # of RequestName, and its answers "primary owner" and "already owner"
_OURS = {1, 4}


@dataclass(frozen=True)
class _Subscription:
    sender: str
    path: str
    interface: str
    member: str
    callback: Callable[[list[Any]], None]


def unit_of(pid: int, processes: Path = Path("/proc")) -> str:
    """The systemd unit (a service or scope) that a process is in, "" if it is in none or cannot be looked at.

    What a user's own service manager made is named by its users: this is for the log.
    """
    try:
        with (processes / str(pid) / "cgroup").open("rb", buffering=0) as file:
            groups = file.read(_MOST_OF_CGROUPS)
    except OSError:
        return ""
    for line in groups.splitlines():
        if line.startswith(b"0::"):  # the unified hierarchy, cgroups(7)
            parts = line.removesuffix(b" (deleted)").split(b"/")
            unit = next((part for part in reversed(parts) if part.endswith((b".service", b".scope"))), b"")
            return unit.decode(errors="backslashreplace")
    return ""


async def _nothing_here(call: Call) -> Reply:
    raise BadCallError("UnknownObject", f"there is no object at {call.path}")


def _none(_path: str, _interface: str, _member: str) -> bool:
    return False


class Bus:
    """The connection to the message bus; made by ``connect``, ended by ``close``."""

    def __init__(self, address: str | None, handler: Callable[[Call], Awaitable[Reply]], limits: Limits) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done, with the reason, when the connection has ended."""
        self.unique_name = ""
        self.accepts_fds: Callable[[str, str, str], bool] = _none
        """Whether a method (path, interface, member) takes descriptors; all others have theirs closed unseen."""
        self._calls = Calls(handler, limits, ask_who=self._who, send=self._send)
        self._subscriptions: list[_Subscription] = []
        self._on_left: list[Callable[[str], None]] = [self._calls.left]
        self._caller = Caller(
            address,
            on_message=self._received,
            on_owner=self._owner_changed,
            on_end=self._ended,
            most_received=_MOST_RECEIVED,
        )
        self._connection = self._caller.connection

    @classmethod
    async def connect(
        cls,
        address: str | None,
        handler: Callable[[Call], Awaitable[Reply]] = _nothing_here,
        *,
        limits: Limits | None = None,
    ) -> Bus:
        """Connect to the bus at ``address``, None for the system bus. Raises BusError."""
        bus = cls(address, handler, limits or Limits())
        bus.unique_name = await bus._caller.open()
        try:
            # One rule for every connection that ends; a rule per caller would run into the bus' limit of rules.
            await bus._caller.match(DRIVER, DRIVER_PATH, DRIVER, "NameOwnerChanged", arg2="")
        except (BusCallError, TimeoutError) as error:
            await bus.close()
            raise BusError(f"the message bus does not tell us who leaves it: {error}") from error
        except BaseException:
            await bus.close()
            raise
        return bus

    async def own(self, name: str) -> None:
        """Become the owner of ``name``, at once or not at all. Raises BusError."""
        try:
            (result,) = await self._caller.ask("RequestName", "su", name, _DO_NOT_QUEUE)
        except (BusCallError, TimeoutError) as error:
            raise BusError(f"the name {name} cannot be had ({error}); is the bus policy file installed?") from error
        if result not in _OURS:
            raise BusError(f"the name {name} belongs to another process; stop that one first")

    async def close(self) -> None:
        """Cancel the running calls and wait for them, send what is queued, and disconnect. May be called again."""
        await self._calls.close()
        try:
            async with asyncio.timeout(_SECONDS_TO_DRAIN):
                await self._connection.drained()
        except TimeoutError:
            log.warning("the message bus has not taken the last answers")
        finally:
            self._connection.end("closed")

    async def ping(self, seconds: float) -> None:
        """Have the bus itself answer. Raises BusCallError, TimeoutError, BusError."""
        # Not Peer.Ping: the policy of a system bus lets nobody call that of the bus itself.
        await self.call(DRIVER, DRIVER_PATH, DRIVER, "GetId", timeout=seconds)

    # What we ask of others.

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        timeout: float,  # noqa: ASYNC109 - a remote call has one: what waits for its answer must go with it
        expect: str | None = None,
    ) -> list[Any]:
        """Call a method; returns the body of the answer, whose signature must be ``expect`` unless that is None.

        Descriptors in an answer are closed. Raises BusCallError for an error answer, TimeoutError (``timeout`` is in
        seconds), BusError if the connection has ended, WireError if arguments or answer do not fit.
        """
        message = await self._caller.call(destination, path, interface, member, signature, body, seconds=timeout)
        message.release()
        if expect is not None and message.signature != expect:
            raise WireError(f"{interface}.{member} answered with {message.signature!r} instead of {expect!r}")
        return message.body()

    def tell(
        self, destination: str, path: str, interface: str, member: str, signature: str = "", body: Sequence[Any] = ()
    ) -> None:
        """Call a method without wanting an answer. Raises WireError."""
        header = {"destination": destination, "path": path, "interface": interface, "member": member}
        flags = MessageFlag.NO_REPLY_EXPECTED
        self._send(MessageType.METHOD_CALL, header, signature, body, flags=flags)

    def emit(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        destination: str | None = None,
    ) -> None:
        """Send a signal, to everybody or to one connection.

        One that cannot be encoded is a bug: it is logged and not sent, and the caller, who is in the midst of a
        change of state, goes on.
        """
        header = {"destination": destination, "path": path, "interface": interface, "member": member}
        try:
            self._send(MessageType.SIGNAL, header, signature, body)
        except WireError:
            log.exception("not sending %s.%s from %s", interface, member, path)

    async def subscribe(
        self, sender: str, path: str, interface: str, member: str, callback: Callable[[list[Any]], None]
    ) -> None:
        """Have ``callback`` called with the body of each such signal that comes from the owner of name ``sender``.

        Raises BusCallError, TimeoutError, BusError.
        """
        await self._caller.watch(sender)
        await self._caller.match(sender, path, interface, member)
        self._subscriptions.append(_Subscription(sender, path, interface, member, callback))

    def on_left(self, callback: Callable[[str], None]) -> None:
        """Have ``callback`` called with the unique name of each connection that leaves the bus."""
        self._on_left.append(callback)

    async def is_connected(self, unique_name: str) -> bool:
        """Whether that connection is on the bus. Raises BusCallError, TimeoutError, BusError."""
        (answer,) = await self._caller.ask("NameHasOwner", "s", unique_name)
        return answer is True

    async def _who(self, unique_name: str) -> Who:
        """Who is behind a connection. Only the uid is beyond doubt: a process id may be another's by now."""
        try:
            (known,) = await self._caller.ask("GetConnectionCredentials", "s", unique_name)
            uid = int(known["UnixUserID"].value)
        except (BusCallError, TimeoutError, KeyError) as error:
            log.warning("not answering %s: its user is unknown: %s", unique_name, error)
            raise errors.Unavailable("the bus does not say who is calling; try again") from error
        process = known.get("ProcessID")
        return Who(uid, unit_of(process.value) if process is not None else "")

    # What comes in.

    def _received(self, message: Incoming) -> None:
        if message.kind is MessageType.METHOD_CALL:
            if not self.accepts_fds(message.path, message.interface, message.member):
                message.release()
            self._calls.accept(message)
            return
        message.release()  # no signal for us brings any
        signal = (message.path, message.interface, message.member)
        for each in self._subscriptions:
            if signal != (each.path, each.interface, each.member) or not self._caller.comes_from(
                message.sender, each.sender
            ):
                continue
            try:
                body = message.body()
            except WireError as error:
                log.warning("ignoring a signal %s.%s: %s", message.interface, message.member, error)
            else:
                each.callback(body)

    def _owner_changed(self, name: str, owner: str) -> None:
        if name.startswith(":") and not owner:
            for callback in self._on_left:
                callback(name)

    def _ended(self, reason: str) -> None:
        self._calls.cancel()  # nobody is left to take their answers
        if not self.lost.done():
            self.lost.set_result(reason)

    # What goes out.

    def _send(
        self,
        kind: MessageType,
        header: dict[str, Any],
        signature: str,
        body: Sequence[Any],
        fds: tuple[int, ...] = (),
        *,
        flags: MessageFlag = MessageFlag.NONE,
    ) -> None:
        """Queue a message; the descriptors are its own, whatever happens. Raises WireError."""
        serial = self._connection.next_serial()
        try:
            data = encode(kind, serial, header, signature=signature, body=body, fds=len(fds), flags=flags)
        except BaseException:
            close_all(fds)
            raise
        self._connection.transmit(data, fds)
