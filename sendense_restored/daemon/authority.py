"""polkit: may this caller do this? It fails closed.

A check returns or raises. Root passes without polkit; for everybody else no answer, a late one, a malformed one or an
error are all a no. polkit is first asked without leave to prompt, which is quick; only if it says that an
authentication would help, and the caller accepts being asked, a second question may wait for a human. That answer is
never reused: polkit itself remembers what it was told to keep.

A yes is reused for a few seconds for the same caller, action and details, until polkit says that something changed
or the caller leaves the bus.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from typing import TYPE_CHECKING

from sendense_restored import errors, names

from .bus import BusCallError, BusError, Variant, WireError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .bus import Bus, Call

log = logging.getLogger(__name__)

ACTIONS = "com.sendense.restore1."
"""What the id of each of our actions begins with."""

_POLKIT = "org.freedesktop.PolicyKit1"
_PATH = "/org/freedesktop/PolicyKit1/Authority"
_INTERFACE = "org.freedesktop.PolicyKit1.Authority"
_ALLOW_USER_INTERACTION = 1

_QUICK = 5.0
"""Seconds for an answer that needs no human; it is also how long a yes is reused."""
_HUMAN = 120.0
_MOST_REUSED = 4096
_MOST_DETAIL = 4000

_Key = tuple[str, str, frozenset[tuple[str, str]]]


class Authority:
    """polkit as seen from here; ``clock`` is a monotonic time in seconds."""

    def __init__(self, bus: Bus, clock: Callable[[], float] = time.monotonic) -> None:
        self._bus = bus
        self._clock = clock
        self._granted: dict[_Key, float] = {}  # until when
        self._changes = 0
        self._numbers = itertools.count(1)
        self._subscribing = asyncio.Lock()
        self._subscribed = False
        self._complaints: set[str] = set()
        bus.on_left(self._left)

    async def check(self, call: Call, action: str, details: Mapping[str, str]) -> None:
        """Return if the caller may do ``action`` (without its prefix).

        ``details`` go to polkit's rules and dialogs; they may hold any text. Raises NotAuthorized, or
        NotAuthorizedCanObtain if an authentication would help that the caller has not allowed.
        """
        if call.uid == 0:
            return
        key = call.sender, action, frozenset(details.items())
        if self._granted.get(key, 0.0) > self._clock():
            return
        changes = self._changes
        authorized, challenge = await self._ask(call, action, details, interactive=False)
        if authorized:
            # After a Changed the answer may be from before it: good for this call, not for further ones.
            if changes == self._changes:
                self._remember(key)
            return
        if challenge and not call.interactive:
            raise errors.NotAuthorizedCanObtain(
                f"{ACTIONS}{action} needs an authentication; allow it to be asked for, with an agent running"
            )
        if challenge:
            authorized, _ = await self._ask(call, action, details, interactive=True)
            # The answer took as long as a human does; whoever asked may have gone, and acting for nobody is wrong.
            if authorized and await self._is_connected(call.sender):
                return
        raise errors.NotAuthorized(
            f"{ACTIONS}{action} is not allowed to you; an administrator can allow it (group sendense-restore, polkit)"
        )

    async def allows(self, call: Call, action: str, details: Mapping[str, str]) -> bool:
        """Whether the caller may do ``action`` as things are; nobody is prompted."""
        try:
            await self.check(dataclasses.replace(call, interactive=False), action, details)
        except (errors.NotAuthorized, errors.NotAuthorizedCanObtain):
            return False
        return True

    async def _ask(
        self, call: Call, action: str, details: Mapping[str, str], *, interactive: bool
    ) -> tuple[bool, bool]:
        """Polkit's answer: whether it is a yes, and whether an authentication would make it one."""
        number = f"{self._bus.unique_name}-{next(self._numbers)}"
        shown = {name: names.displayable(value)[:_MOST_DETAIL] for name, value in details.items()}
        subject = ["system-bus-name", {"name": Variant("s", call.sender)}]
        body = [subject, ACTIONS + action, shown, _ALLOW_USER_INTERACTION if interactive else 0, number]
        try:
            await self._subscribe()
            ((authorized, challenge, _),) = await self._bus.call(
                _POLKIT,
                _PATH,
                _INTERFACE,
                "CheckAuthorization",
                "(sa{sv})sa{ss}us",
                body,
                timeout=_HUMAN if interactive else _QUICK,
                expect="(bba{ss})",
            )
        except (TimeoutError, asyncio.CancelledError) as error:
            # Else the dialog would stay on the screen, and polkit at work, for an answer that nobody waits for.
            self._bus.tell(_POLKIT, _PATH, _INTERFACE, "CancelCheckAuthorization", "s", [number])
            if isinstance(error, asyncio.CancelledError):
                raise
            if interactive:
                return False, False
            raise self._broken("timeout", "polkit does not answer") from None
        except BusCallError as error:
            raise self._broken(error.name, f"polkit answers with an error: {error}") from None
        except (BusError, WireError) as error:
            raise self._broken(type(error).__name__, f"polkit cannot be asked: {error}") from None
        self._complaints.clear()
        return bool(authorized), bool(challenge)

    def _broken(self, kind: str, what: str) -> errors.NotAuthorized:
        # Once per kind until it works again: anybody can make calls, and so log lines.
        if kind not in self._complaints:
            self._complaints.add(kind)
            log.error("%s; until it works only root may do anything", what)
        return errors.NotAuthorized(
            "whether this is allowed cannot be found out because polkit does not work; until it does, only root may"
        )

    async def _is_connected(self, sender: str) -> bool:
        try:
            return await self._bus.is_connected(sender)
        except (BusCallError, BusError, TimeoutError) as error:
            log.warning("whether %s is still there is unknown: %s", sender, error)
            return False

    async def _subscribe(self) -> None:
        """Hear of changes from before the first question on."""
        async with self._subscribing:
            if not self._subscribed:
                await self._bus.subscribe(_POLKIT, _PATH, _INTERFACE, "Changed", self._changed)
                self._subscribed = True

    def _changed(self, _body: list[object]) -> None:
        self._changes += 1
        self._granted.clear()

    def _left(self, sender: str) -> None:
        for key in [key for key in self._granted if key[0] == sender]:
            del self._granted[key]

    def _remember(self, key: _Key) -> None:
        now = self._clock()
        if len(self._granted) >= _MOST_REUSED:
            self._granted = {each: until for each, until in self._granted.items() if until > now}
        if len(self._granted) < _MOST_REUSED:
            self._granted[key] = now + _QUICK
