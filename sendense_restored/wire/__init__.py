"""The message bus from a socket up: whole messages, descriptors with an owner, answers from whom was asked.

``marshal`` turns values into bytes, ``codec`` whole messages, and those back; ``connection`` carries them, ``caller``
makes calls. Daemon and clients stand on this one ground, and nobody else imports the D-Bus library: each fault of it
is mended once.
"""

from .caller import DRIVER, DRIVER_PATH, BusCallError, Caller
from .codec import (
    Incoming,
    MessageFlag,
    MessageType,
    TooLongError,
    Variant,
    WireError,
    check,
    close_all,
    encode,
    types_of,
    variant,
)
from .connection import BusError, Connection
from .marshal import Rows

__all__ = [
    "DRIVER",
    "DRIVER_PATH",
    "BusCallError",
    "BusError",
    "Caller",
    "Connection",
    "Incoming",
    "MessageFlag",
    "MessageType",
    "Rows",
    "TooLongError",
    "Variant",
    "WireError",
    "check",
    "close_all",
    "encode",
    "types_of",
    "variant",
]
