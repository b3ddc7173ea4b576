"""The codec: messages to bytes, by our own marshaller, and back, by dbus-next's.

A message is decoded in two steps: its header at once, its body only when somebody wants it, so that what a stranger
sends costs little. Encoding refuses what Python allows and the bus punishes by cutting the connection.

This module, ``marshal`` and ``connection`` are the only ones that import dbus-next.
"""

# mypy: allow-untyped-calls
# The library's codec has no annotations.

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dbus_next._private.unmarshaller import MarshallerStreamEndError, Unmarshaller
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from .closing import close_foreign
from .marshal import UNENCODABLE, marshal, tree, variant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Incoming", "MessageFlag", "MessageType", "TooLongError", "Variant", "WireError", "variant"]

MOST_SENT = 8 << 20
"""Bytes of a message that we send. dbus-daemon cuts the connection at 32 MiB; nothing of ours comes near."""
MOST_FDS = 16
"""Descriptors of a message; dbus-daemon cuts the connection for more (``max_message_unix_fds``)."""

# What the decoder raises, all told, for bytes that are no message.
UNDECODABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    RecursionError,
    struct.error,
    MarshallerStreamEndError,
)


class WireError(ValueError):
    """A value that has no form on the wire; the text is for the journal."""


class TooLongError(WireError):
    """A message that is longer than the bus would take."""


@dataclass
class Incoming:
    """A received message: its header, and its body still undecoded. Absent header fields are empty or 0."""

    kind: MessageType
    flags: MessageFlag
    serial: int
    reply_serial: int
    sender: str
    path: str
    interface: str
    member: str
    error_name: str
    signature: str
    fds: list[int]
    oversized: bool
    """The body was longer than we take and has been thrown away."""
    _payload: bytes
    _endian: int

    def body(self) -> list[Any]:
        """The decoded body. Raises WireError."""
        if self.oversized:
            raise WireError("the message is longer than we take")
        decoder = _decoder(self._payload)
        decoder.endian = self._endian
        try:
            return [decoder.read_argument(part) for part in tree(self.signature).types]
        except UNDECODABLE as error:
            raise WireError(f"the message cannot be decoded: {error!r}") from None

    def take(self) -> tuple[int, ...]:
        """Its descriptors, which belong to the caller from now on."""
        fds, self.fds = tuple(self.fds), []
        return fds

    def release(self) -> None:
        """Close its descriptors, which are a stranger's."""
        close_foreign(self.take())


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that we own."""
    for fd in fds:
        os.close(fd)


def encode(
    kind: MessageType,
    serial: int,
    header: Mapping[str, Any],
    *,
    signature: str = "",
    body: Sequence[Any] = (),
    fds: int = 0,
    flags: MessageFlag = MessageFlag.NONE,
) -> bytes:
    """The bytes of a message; ``header`` holds fields under the names that ``dbus_next.Message`` gives them.

    Raises WireError if a value does not fit the signature, TooLongError.
    """
    if fds > MOST_FDS:
        raise WireError(f"a message with {fds} descriptors, more than {MOST_FDS}")
    try:
        payload = marshal(signature, body)
        # Message checks the names and the fields that its kind needs; the bus cuts the connection for a wrong one.
        message = Message(message_type=kind, flags=flags, **header)
        fields = [
            (code, variant(type_, value))
            for code, type_, value in (
                (1, "o", message.path),
                (2, "s", message.interface),
                (3, "s", message.member),
                (4, "s", message.error_name),
                (5, "u", message.reply_serial),
                (6, "s", message.destination),
                (8, "g", signature),
                (9, "u", fds),
            )
            if value
        ]
        head = marshal("yyyyuua(yv)", (ord("l"), kind.value, int(flags), 1, len(payload), serial, fields))
    except UNENCODABLE as error:
        raise WireError(f"a message cannot be encoded as {signature!r}: {error!r}") from error
    data = b"".join((head, bytes(-len(head) & 7), payload))
    if len(data) > MOST_SENT:
        raise TooLongError(f"a message of {len(data)} bytes is longer than {MOST_SENT}")
    return data


def check(signature: str, value: object) -> Variant:
    """``value`` as a variant that is sure to be encodable. Raises WireError."""
    try:
        made = variant(signature, value)
        marshal("v", [made])
    except UNENCODABLE as error:
        raise WireError(f"a value cannot be encoded as {signature!r}: {error!r}") from error
    return made


def types_of(signature: str) -> tuple[str, ...]:
    """The complete types of a signature: ``sa{sv}`` gives ``("s", "a{sv}")``. Raises ValueError."""
    return tuple(part.signature for part in tree(signature).types)


def _decoder(data: bytes) -> Unmarshaller:
    # The bytes are put where it keeps what it has read, so it can run out of them but never wait for more.
    decoder = Unmarshaller(io.BytesIO())
    decoder.buf = bytearray(data)
    return decoder


def decode(data: bytes, head: int, fds: list[int], *, oversized: bool) -> Incoming:
    """The message in ``data``, whose header ends at ``head``. Raises one of ``UNDECODABLE``."""
    # With a body length of 0 the decoder stops behind the header.
    decoder = _decoder(data[:4] + bytes(4) + data[8:head])
    tree("")  # the decoder keeps signatures too
    message = decoder.unmarshall()
    if message is None:
        raise EOFError("the header is shorter than it says")
    return Incoming(
        kind=message.message_type,
        flags=message.flags,
        serial=message.serial,
        reply_serial=message.reply_serial or 0,
        sender=message.sender or "",
        path=message.path or "",
        interface=message.interface or "",
        member=message.member or "",
        error_name=message.error_name or "",
        signature=message.signature,
        fds=fds,
        oversized=oversized,
        _payload=data[head:],
        _endian=data[0],
    )
