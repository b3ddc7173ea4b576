"""How long a mount stays: the claims on it, what holds it, and its last day.

A claim belongs to a holder, a user or a user on somebody's behalf, and lasts its own timeout after the holder's last
use. The mount lasts as long as a claim does, and never longer than its lifetime. While something holds it (a stream
that runs) no claim runs out. All times are those of the clock that is handed in (``host.clock``): seconds that go on
while the machine sleeps. Nothing here acts: ``Mounts`` asks what is due, and when to ask again.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .host.clock import Clock

FIRST_BACK_OFF = 30.0
"""Seconds after which a mount that could not be closed, because somebody reads, is tried again; doubled each time."""
LONGEST_BACK_OFF = 900.0
_SOONEST = 1.0
"""Seconds between two looks at a mount that is held, however short its claims are."""


class Holder(NamedTuple):
    """Whose claim it is. ``on_behalf_of`` is empty for the user itself."""

    uid: int
    on_behalf_of: str = ""

    def __str__(self) -> str:
        return f"uid {self.uid}" + (f" on behalf of {self.on_behalf_of}" if self.on_behalf_of else "")


@dataclass
class Claim:
    """A holder's claim: since when (unix seconds), for how long without use, and when it was last used (clock)."""

    since: int
    timeout: float
    used: float

    @property
    def expires(self) -> float:
        """When it runs out if nobody uses it (clock)."""
        return self.used + self.timeout


class Lease:
    """The claims on one mount. ``ends`` is the moment (clock) that no use of it moves."""

    def __init__(self, clock: Clock, *, ends: float) -> None:
        self._clock = clock
        self.ends = ends
        self.claims: dict[Holder, Claim] = {}
        self.used = clock.now()
        """When anybody last used it (clock)."""
        self._holds = 0
        self._not_before = -math.inf
        self._back_off = FIRST_BACK_OFF

    @property
    def held(self) -> bool:
        """Whether something holds it just now."""
        return self._holds > 0

    @property
    def uids(self) -> set[int]:
        """The users that hold a claim, on whoever's behalf."""
        return {holder.uid for holder in self.claims}

    def of(self, uid: int, on_behalf_of: str = "") -> list[Holder]:
        """The claims that a caller speaks for: the one on that behalf, or without one all of the user's."""
        return [holder for holder in self.claims if holder.uid == uid and on_behalf_of in ("", holder.on_behalf_of)]

    def claim(self, holder: Holder, timeout: float) -> Claim:
        """Give ``holder`` a claim, or renew the one it has; ``timeout`` (seconds) is what was asked for last."""
        since = self.claims[holder].since if holder in self.claims else int(self._clock.unix())
        self.claims[holder] = Claim(since, timeout, self._clock.now())
        self._used()
        return self.claims[holder]

    def touch(self, uid: int, on_behalf_of: str = "") -> None:
        """Note that a caller used the mount. One without a claim keeps everybody's: the mount is in use."""
        now = self._clock.now()
        for holder in self.of(uid, on_behalf_of) or self.claims:
            self.claims[holder].used = now
        self._used()

    def paused(self, since: float) -> None:
        """The time since then (clock) is nobody's: the mount could not be used."""
        now = self._clock.now()
        for claim in self.claims.values():
            claim.used += now - max(claim.used, since)
        self.used += now - max(self.used, since)

    def _used(self) -> None:
        self.used = self._clock.now()
        self._not_before = -math.inf
        self._back_off = FIRST_BACK_OFF

    @contextlib.contextmanager
    def hold(self, uid: int, on_behalf_of: str = "") -> Iterator[None]:
        """Keep the mount while something runs for a caller; its beginning and its end count as use."""
        self.touch(uid, on_behalf_of)
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            self.touch(uid, on_behalf_of)

    def postpone(self) -> None:
        """It could not be closed: let its claims be for a while, each time twice as long."""
        self._not_before = self._clock.now() + self._back_off
        self._back_off = min(self._back_off * 2, LONGEST_BACK_OFF)

    def expired(self) -> list[Holder]:
        """The claims whose time is up."""
        now = self._clock.now()
        if self.held or now < self._not_before:
            return []
        return [holder for holder, claim in self.claims.items() if claim.expires <= now]

    @property
    def overdue(self) -> bool:
        """Whether its claims ran out and it is still there because somebody reads."""
        now = self._clock.now()
        waits = now < self._not_before and not self.held
        return waits and all(claim.expires <= now for claim in self.claims.values())

    def expiry(self, claim: Claim) -> float:
        """When a claim runs out if nobody uses it from now on (clock); while something holds the mount, from then."""
        return max(claim.expires, self._clock.now() + claim.timeout) if self.held else claim.expires

    @property
    def expires(self) -> float:
        """When it ends if nobody uses it from now on (clock); while something holds it, from when that ends."""
        last = max(map(self.expiry, self.claims.values()), default=self._clock.now())
        return min(max(last, self._not_before), self.ends)

    @property
    def next(self) -> float:
        """When to look again for what is due (clock)."""
        if self.held:
            # Nothing runs out meanwhile; but what is written down does, and a crash would leave no more than that.
            shortest = min((claim.timeout for claim in self.claims.values()), default=math.inf)
            return min(self._clock.now() + max(shortest / 2, _SOONEST), self.ends)
        first = min((claim.expires for claim in self.claims.values()), default=math.inf)
        return min(max(first, self._not_before), self.ends)
