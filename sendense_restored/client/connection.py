"""One connection to the message bus: calls go out, replies and their descriptors come in.

It is a ``wire.Caller`` that speaks in errors of the closed list. A reply's descriptors belong to whoever gets the
reply; all others are closed at once, for any local user may send them. When the connection ends, for whatever reason,
pending and later calls raise ``Unavailable``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sendense_restored import errors
from sendense_restored.wire import (
    BusCallError,
    BusError,
    Caller,
    Incoming,
    MessageFlag,
    Variant,
    WireError,
    check,
    close_all,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Argument = tuple[str, Any]
"""A value and, before it, its D-Bus type. The value of an ``a{sv}`` is a mapping from names to Arguments."""


@dataclass(frozen=True)
class Reply:
    """A method's answer, variants taken off. ``fds`` belong to whoever holds the reply; an ``h`` is an index."""

    signature: str
    values: list[Any]
    fds: list[int]

    def close(self) -> None:
        """Close the descriptors that are still in ``fds``."""
        close_all(self.fds)
        self.fds.clear()


class Connection:
    """A connection to the bus at ``address``, by default the system bus."""

    def __init__(self, address: str | None) -> None:
        # Nobody has business calling a client or sending it signals.
        self._caller = Caller(address, on_message=Incoming.release, on_end=lambda _: None)

    @classmethod
    async def open(cls, address: str | None, *, seconds: float) -> Connection:
        """Connect and say hello. Raises Unavailable."""
        try:
            connection = cls(address)
            await connection._caller.open(seconds=seconds)
        except BusError as error:
            raise errors.Unavailable(f"{error}; is it running?") from None
        return connection

    @property
    def ended(self) -> bool:
        """Whether no call can be made any more."""
        return self._caller.connection.ended

    def close(self) -> None:
        """End the connection. May be called again."""
        self._caller.connection.end("closed")

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        arguments: Sequence[Argument],
        *,
        interactive: bool,
        seconds: float,
        fds: Sequence[int] = (),
    ) -> Reply:
        """Call a method and wait for its answer; raises TimeoutError after so many seconds.

        ``fds`` are sent along and stay the caller's; an ``h`` among the arguments is an index into them.
        An error reply is raised as the error of the closed list that it stands for.
        """
        signature = "".join(kind for kind, _ in arguments)
        body = [_packed("an argument", kind, value) for kind, value in arguments]
        flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else MessageFlag.NONE
        try:
            answer = await self._caller.call(
                destination, path, interface, member, signature, body, flags=flags, seconds=seconds, fds=fds
            )
        except BusCallError as error:
            raise errors.from_dbus(error.name, error.message) from None
        except BusError:
            raise errors.Unavailable("the connection to the message bus has ended; try again") from None
        except WireError:
            raise errors.InvalidOption(f"what {member} was given does not fit into a message; give it less") from None
        try:
            return Reply(answer.signature, _plain(answer.body()), list(answer.take()))
        except WireError:
            answer.release()
            raise errors.Failed(f"the answer to {member} cannot be decoded; are both of one version?") from None


def _plain(value: Any) -> Any:  # noqa: ANN401 - D-Bus values of every type pass through
    """``value`` with every variant in it replaced by what it holds."""
    if isinstance(value, Variant):
        return _plain(value.value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _packed(name: str, kind: str, value: object) -> object:
    """``value`` as the wire takes it. Raises InvalidOption for what no message can carry."""
    if kind == "a{sv}":
        options: Mapping[str, Argument] = value  # type: ignore[assignment]  # as Argument says
        return {key: Variant(sort, _packed(key, sort, item)) for key, (sort, item) in options.items()}
    try:
        check(kind, value)
    except WireError:
        raise errors.InvalidOption(
            f"{name} does not fit into a message: a number out of range, or text with a NUL character or half a"
            " surrogate pair; correct it"
        ) from None
    return value
