"""Calls of the service and their answers: time limits, the answer's form, the descriptors that it brings.

The ground under ``service`` and ``mounts``, which have the methods. Whoever gets a descriptor from here owns it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sendense_restored import errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .connection import Argument, Connection, Reply

BUS_NAME = "com.sendense.Restore1"
ROOT = "/com/sendense/Restore1"


@dataclass(frozen=True)
class Timeouts:
    """Seconds that the service has for an answer."""

    call: float = 60.0
    long: float = 300.0
    """For Mount and Scan, and for every call that a person may first have to type a password for."""


class Messages:
    """Calls of the service over one connection; ``interactive`` lets polkit ask for a password."""

    def __init__(self, connection: Connection, *, interactive: bool, timeouts: Timeouts) -> None:
        self._connection = connection
        self._interactive = interactive
        self._timeouts = Timeouts(timeouts.long, timeouts.long) if interactive else timeouts

    async def _call(
        self,
        path: str,
        interface: str,
        member: str,
        *arguments: Argument,
        answer: str,
        seconds: float = 0,
        fds: Sequence[int] = (),
    ) -> list[Any]:
        """The values that a method without descriptors in its answer returns."""
        reply = await self._exchange(path, interface, member, *arguments, answer=answer, seconds=seconds, fds=fds)
        reply.close()
        return reply.values

    async def _exchange(
        self,
        path: str,
        interface: str,
        member: str,
        *arguments: Argument,
        answer: str,
        seconds: float = 0,
        fds: Sequence[int] = (),
    ) -> Reply:
        """Call a method whose answer has the signature ``answer``; the caller owns the reply and keeps ``fds``."""
        seconds = seconds or self._timeouts.call
        try:
            reply = await self._connection.call(
                BUS_NAME, path, interface, member, arguments, interactive=self._interactive, seconds=seconds, fds=fds
            )
        except TimeoutError:
            raise errors.Timeout(
                f"the restore service gave no answer to {member} within {seconds:g} s; look at its journal"
            ) from None
        if reply.signature != answer:
            reply.close()
            raise errors.Failed(f"the restore service answered {member} in another form; are both of one version?")
        return reply


def given(**options: Argument) -> dict[str, Argument]:
    """The options that say something: nothing, zero and false are what the service assumes anyway."""
    return {name: (kind, value) for name, (kind, value) in options.items() if value}


def advanced(cursor: str, following: str) -> str:
    """The cursor of the next page; a service that gives the same page for ever is stopped here."""
    if following and following == cursor:
        raise errors.Failed("the restore service's listing does not advance; report this as a fault")
    return following


def taken(reply: Reply, index: int) -> int:
    """The descriptor that an ``h`` of the reply means, which is the caller's from now on."""
    if index >= len(reply.fds):
        raise errors.Failed("the restore service's answer came without its file; try again")
    return reply.fds.pop(index)
