"""What clients are promised of their mounts, as a model: no task, no database, nothing that waits.

``Model`` is told what people do and what happens to the host, always after time has been moved to that moment, and
then ``go_on`` draws the consequences of that moment: claims and mounts that end, those in the queue that get a place,
mounts that are made again. It borrows the clock and the names of mounts from the house that it is compared with; all
else it works out by itself, from the contract and not from the code.
"""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from sendense_restored import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sendense_restored.daemon.lease import Holder
    from sendense_restored.daemon.volume import Journal
    from tests.clock import FakeClock

FAILED_STAYS = 600
REMEMBERED = 86_400
PAUSE = 30
PROVEN = 600
TRY_AGAIN = 60
FIRST_BACK_OFF, LONGEST_BACK_OFF = 30, 900
FULL = "the simulator is full"


class Key(NamedTuple):
    """What is mounted; no disk means all of them."""

    backup: str
    disk: int | None
    journal: Journal

    @property
    def volumes(self) -> tuple[str, ...]:
        """Those that are mountable, of the backups that the walk makes."""
        if self.disk is None:
            return "disk-0-partition-1", "disk-0-partition-2", "disk-1-partition-1"
        return ("partition-1",) if self.disk else ("partition-1", "partition-2")

    @property
    def disks(self) -> int:
        return 2 if self.disk is None else 1

    def standing(self, *what: str) -> collections.Counter[str]:
        """How much of some kinds of things it takes."""
        many = {
            "image": self.disks,
            "attachment": self.disks,
            "device": len(self.volumes),
            "mount": len(self.volumes),
        }
        return collections.Counter({each: many.get(each, 1) for each in what})


WHOLE = ("workplace", "reader", "image", "attachment", "device", "mount")


@dataclass
class Claim:
    since: int
    timeout: float
    used: float

    @property
    def expires(self) -> float:
        return self.used + self.timeout

    def in_whole_seconds(self) -> Claim:
        """As the database has it; the clock's seconds are those of the day."""
        return replace(self, used=math.floor(self.expires) - self.timeout)


@dataclass
class Client:
    """Somebody who asked for a mount, and what there is to be told: its id or an error; None while they wait."""

    holder: Holder
    key: Key
    timeout: float | None
    """As asked for; without one a claim that is there keeps its own."""
    wait: bool = False
    told: str | type[errors.RestoreError] | None = None


@dataclass
class Settings:
    most: int = 3
    per_holder: int = 0
    idle_timeout: float = 1200
    lifetime: float = 5000
    evict_after: float = 300
    listings: int = 2


@dataclass
class Promised:
    """A mount. Times are the clock's but for ``created``."""

    id: str
    key: Key
    created: int
    ends: float
    used: float
    state: Literal["mounting", "mounted", "unmounting", "failed"] = "mounting"
    error: str = ""
    claims: dict[Holder, Claim] = field(default_factory=dict)
    written: dict[Holder, Claim] = field(default_factory=dict)
    """The claims as the database has them."""
    written_used: float = 0
    """When it was used, as the database has it."""
    written_at: float = 0
    """When its use was last written down because of that use."""
    streams: list[tuple[int, Holder]] = field(default_factory=list)
    """The reading ends of their pipes, and whose they are."""
    open_files: set[str] = field(default_factory=set)
    """Volumes with files that somebody outside has open."""
    met_open_file: bool = False
    remains: collections.Counter[str] = field(default_factory=collections.Counter)
    """What could not be taken away of one that has failed, or is stuck in being unmounted."""
    not_before: float = -math.inf
    back_off: float = FIRST_BACK_OFF
    spared_until: float = 0
    begun_at: float = 0
    made_at: float = 0
    failed_at: float = 0
    """When it failed, or got stuck."""
    attempts: int = 0
    retry_at: float | None = None
    """When it is made again, of one that was there before the daemon was."""
    waiting: list[Client] = field(default_factory=list)
    """Those who are told how making it went."""

    @property
    def takes_a_place(self) -> bool:
        return self.state != "failed" or bool(self.remains)

    @property
    def standing(self) -> collections.Counter[str]:
        return self.key.standing(*WHOLE) if self.state == "mounted" else self.remains

    def of(self, holder: Holder) -> list[Holder]:
        """The claims for which somebody speaks: without a name, those on all names."""
        uid, name = holder
        return [each for each in self.claims if each.uid == uid and name in ("", each.on_behalf_of)]

    def kept(self, claim: Claim, now: float) -> Claim:
        """A claim as it is if nobody uses it any more: the time while a stream runs is nobody's."""
        return replace(claim, used=max(claim.used, now)) if self.streams else claim

    def expires(self, now: float) -> float:
        last = max(self.kept(claim, now).expires for claim in self.claims.values())
        return min(max(last, self.not_before), self.ends)

    def use(self, now: float) -> None:
        self.used, self.not_before, self.back_off = now, -math.inf, FIRST_BACK_OFF

    def wrote(self, used: float, written_at: float, claims: dict[Holder, tuple[float, float]], now: float) -> None:
        """How often it is written that a stream goes on is not promised, but that nothing of it has run out."""
        assert claims.keys() == self.written.keys()
        for holder, (timeout, expires) in claims.items():
            assert timeout == self.claims[holder].timeout
            assert now - 1 < expires <= now + timeout
            self.written[holder] = replace(self.written[holder], timeout=timeout, used=expires - timeout)
        self.written_used, self.written_at = used, written_at

    def write_down(self, now: float) -> None:
        self.written = {holder: self.kept(claim, now).in_whole_seconds() for holder, claim in self.claims.items()}
        self.written_used = math.floor(self.used)


@dataclass
class Draining:
    mount: str
    holders: frozenset[Holder]


class Model:
    """``begun`` gives the name that the house gave to the next mount of a key.

    ``is_there`` tells whether the house still has one: asked only where the moment of its end is not promised.
    """

    def __init__(
        self, clock: FakeClock, begun: Callable[[Key], str], is_there: Callable[[str], bool], settings: Settings
    ) -> None:
        self._clock, self._begun, self._is_there, self.settings = clock, begun, is_there, settings
        self.mounts: dict[str, Promised] = {}
        self.gone: dict[str, tuple[float, str]] = {}
        """When each has ended, and how the reason begins."""
        self.draining: list[Draining] = []
        self.queue: list[Client] = []
        self._looked = clock.now()
        self.broken = False
        """Whether nothing can be mounted just now."""
        self.pipes: list[int] = []
        """Of streams that have ended."""

    @property
    def now(self) -> float:
        return self._clock.now()

    @property
    def next(self) -> float:
        """When something happens by itself (clock)."""
        moments = [self._next_of(mount) for mount in self.mounts.values()]
        if any(not self.full(client.holder) for client in self.queue):
            moments += [when for when, _ in self._evictable()]
        return min(moments, default=math.inf)

    def _next_of(self, mount: Promised) -> float:
        if mount.state == "mounted":
            first = min(claim.expires for claim in mount.claims.values())
            return mount.ends if mount.streams else min(max(first, mount.not_before), mount.ends)
        if mount.state == "failed":
            return mount.failed_at + FAILED_STAYS
        if mount.state == "unmounting":  # it is tried then, or a little earlier
            return max(mount.ends, mount.failed_at + TRY_AGAIN) + TRY_AGAIN
        return math.inf if mount.retry_at is None else mount.retry_at

    # --- room ---------------------------------------------------------------------------------------------------

    @property
    def taken(self) -> int:
        standing = {mount.id for mount in self.mounts.values() if mount.takes_a_place}
        return len(standing | {draining.mount for draining in self.draining})

    def held_by(self, holder: Holder) -> int:
        """How many places somebody takes."""
        held = {mount.id for mount in self.mounts.values() if mount.takes_a_place and holder in mount.claims}
        return len(held | {draining.mount for draining in self.draining if holder in draining.holders})

    def full(self, holder: Holder) -> bool:
        return 0 < self.settings.per_holder <= self.held_by(holder)

    def joinable(self, key: Key) -> Promised | None:
        there = [each for each in self.mounts.values() if each.key == key and each.state in {"mounting", "mounted"}]
        assert len(there) <= 1, "two mounts of one key"
        return there[0] if there else None

    def _evictable(self) -> list[tuple[float, Promised]]:
        return [
            (max(mount.used + self.settings.evict_after, mount.spared_until), mount)
            for mount in self.mounts.values()
            if mount.state == "mounted" and not mount.streams
        ]

    def has_turn(self, client: Client) -> bool:
        before = self.queue[: self.queue.index(client)] if client in self.queue else self.queue
        ahead = sum(not self.full(each.holder) for each in before)
        return self.settings.most - self.taken - ahead > 0 and not self.full(client.holder)

    # --- what people do -----------------------------------------------------------------------------------------

    def ask(self, *clients: Client) -> None:
        """Some want a mount, at once."""
        self.queue += clients
        self.go_on()

    def touch(self, mount: Promised, holder: Holder) -> None:
        """Somebody reads, or says that they will."""
        self._use(mount, holder)
        shortest = min(claim.timeout for claim in mount.claims.values())
        if mount.state == "mounted" and self.now - mount.written_at > min(60, shortest / 4):
            mount.written_at = self.now
            mount.write_down(self.now)

    def _use(self, mount: Promised, holder: Holder) -> None:
        for each in mount.of(holder) or mount.claims:
            mount.claims[each].used = self.now
        mount.use(self.now)

    def stream(self, mount: Promised, holder: Holder, pipe: int) -> None:
        mount.streams.append((pipe, holder))

    def stream_ended(self, mount: Promised, pipe: int) -> None:
        stream = next(each for each in mount.streams if each[0] == pipe)
        mount.streams.remove(stream)
        self.pipes.append(pipe)
        self._use(mount, stream[1])

    def closes(self, mount: Promised, holder: Holder, *, force: bool) -> bool:
        """Whether an unmount by somebody is to close the mount, and not just to drop claims."""
        held = mount.of(holder)
        return force or not held or len(held) == len(mount.claims)

    def unmount(self, mount: Promised, holder: Holder, *, force: bool) -> type[errors.RestoreError] | None:
        """The error that they are told."""
        if not self.closes(mount, holder, force=force):
            for each in mount.of(holder):
                del mount.claims[each]
                mount.written.pop(each)
            return None
        how = "unmounted by force" if force else "unmounted"
        return self.close(mount, f"{how} by {holder}", force=force)

    def close(self, mount: Promised, reason: str, *, force: bool = False) -> type[errors.RestoreError] | None:
        if mount.state == "mounted" and not force:
            if mount.streams:
                return errors.Busy
            if mount.open_files:
                mount.met_open_file = True
                return errors.Busy
        self._ended(mount, reason)
        return None

    def _ended(self, mount: Promised, reason: str) -> None:
        self._taken_away(mount)
        del self.mounts[mount.id]
        self.gone[mount.id] = (self.now, reason)
        for client in mount.waiting:
            client.told = errors.Cancelled

    def _taken_away(self, mount: Promised) -> None:
        """Its servers are gone, and its streams; devices that are in use abroad are freed later."""
        if mount.open_files:
            self.draining.append(Draining(mount.id, frozenset(mount.claims)))
            mount.open_files.clear()
        while mount.streams:
            self.pipes.append(mount.streams.pop()[0])

    # --- what happens -------------------------------------------------------------------------------------------

    def fails(self, mount: Promised, reason: str, *, remains: Iterable[str] = ()) -> None:
        self._taken_away(mount)
        mount.state, mount.error, mount.failed_at, mount.retry_at = "failed", reason, self.now, None
        mount.remains = mount.key.standing(*remains)
        if not mount.remains:
            mount.met_open_file = False
        for client in mount.waiting:
            client.told = errors.NoSpace
        mount.waiting.clear()

    def sticks(self, mount: Promised, *, remains: Iterable[str]) -> None:
        """It is half unmounted."""
        mount.state, mount.met_open_file, mount.failed_at = "unmounting", True, self.now
        mount.remains = mount.key.standing(*remains)

    def sweep(self) -> int:
        """How many it ends."""
        before = len(self.mounts)
        for mount in list(self.mounts.values()):
            if mount.state == "unmounting":
                self._ended(mount, "what was left of it could be taken away at last")
            elif mount.state == "mounted":
                if mount.not_before > self.now and not mount.streams:
                    self._try_to_close(mount, "its time is up")
                    continue
                if self.now - mount.made_at > PROVEN:
                    mount.attempts = 0
                mount.write_down(self.now)
        return before - len(self.mounts)

    def stop(self) -> None:
        """In good order: what is not to come back has been written down, and all attempts are forgiven."""
        for mount in self.mounts.values():
            if mount.state in {"mounting", "mounted"}:
                mount.attempts = 0
                mount.write_down(self.now)
            for client in mount.waiting:
                client.told = errors.Unavailable
        while self.queue:
            self.queue.pop(0).told = errors.Unavailable

    def die(self) -> None:
        """The daemon is no more, in good order or not, and neither are those who waited."""
        self.queue.clear()
        self.draining.clear()
        for mount in self.mounts.values():
            mount.waiting.clear()
            while mount.streams:
                self.pipes.append(mount.streams.pop()[0])

    def resume(self) -> int:
        """A new daemon takes in what is wished for; how many."""
        before = sorted(self.mounts.values(), key=lambda mount: (mount.created, mount.id))
        self.mounts.clear()
        self.gone = {name: (math.floor(when), reason) for name, (when, reason) in self.gone.items()}
        for mount in before:
            left = mount.created + self.settings.lifetime - self._clock.unix()
            valid = {holder: replace(claim) for holder, claim in mount.written.items() if claim.expires > self.now}
            if mount.state == "unmounting":
                self.gone[mount.id] = (self.now, "it was being unmounted when the service ended")
            elif mount.state == "failed":
                self.gone[mount.id] = (self.now, f"it failed: {mount.error}")
            elif not valid:
                self.gone[mount.id] = (self.now, "its time ran out while the service was down")
            elif left <= 0:
                self.gone[mount.id] = (self.now, "it reached the longest time")
            else:
                self.mounts[mount.id] = Promised(
                    mount.id, mount.key, mount.created, self.now + left, mount.written_used, claims=valid,
                    written={holder: replace(claim) for holder, claim in valid.items()},
                    written_used=mount.written_used, attempts=mount.attempts, begun_at=self.now,
                    written_at=self.now, retry_at=self.now,
                )  # fmt: skip
        for mount in list(self.mounts.values()):
            if mount.attempts >= 2:
                self.fails(mount, "it could not be made again: the service ended 2 times")
        return len(self.mounts)

    # --- what follows -------------------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Until nothing more is to be done at this moment.

        If time has passed, what is due comes first; what people ask for makes deadlines that are met only when they
        have got it: two who ask at once find the same.
        """
        while self._looked < self.now and self._due():
            pass
        self._looked = self.now
        while self._grant() or self._make() or self._due():
            pass

    def _due(self) -> bool:
        due = [
            mount
            for mount in self.mounts.values()
            if mount.retry_at is None
            and (
                self._next_of(mount) <= self.now
                or (mount.state == "unmounting" and mount.ends <= self.now and not self._is_there(mount.id))
            )
        ]
        for mount in due:
            expired = [holder for holder, claim in mount.claims.items() if claim.expires <= self.now]
            if mount.state == "failed":
                self._ended(mount, f"it failed: {mount.error}")
            elif mount.ends <= self.now:
                self.close(mount, "it has reached the longest time that a mount may last", force=True)
            elif len(expired) == len(mount.claims):
                self._try_to_close(mount, "nobody used it for")
            else:
                for holder in expired:
                    del mount.claims[holder]
                    mount.written.pop(holder)
        return bool(due)

    def _try_to_close(self, mount: Promised, reason: str) -> None:
        if self.close(mount, reason):
            mount.not_before = self.now + mount.back_off
            mount.back_off = min(mount.back_off * 2, LONGEST_BACK_OFF)

    def _grant(self) -> bool:
        """What those in the queue get, one after the other."""
        for client in self.queue:
            due = [mount for when, mount in self._evictable() if when <= self.now]
            there = self.joinable(client.key)
            if there is not None and (client.holder in there.claims or not self.full(client.holder)):
                self.queue.remove(client)
                self._join(there, client)
            elif self.has_turn(client):
                self.queue.remove(client)
                self._begin(client)
            elif not client.wait and self.full(client.holder):
                self.queue.remove(client)
                client.told = errors.LimitReached
            elif due and not self.full(client.holder):
                mount = min(due, key=lambda each: each.used)
                if self.close(mount, "another mount needed its place"):
                    mount.spared_until = self.now + self.settings.evict_after
            elif not client.wait:
                self.queue.remove(client)
                client.told = errors.LimitReached
            else:
                continue
            return True
        return False

    def _join(self, mount: Promised, client: Client) -> None:
        self._claim(mount, client)
        if mount.state == "mounted":
            client.told = mount.id
        else:
            mount.waiting.append(client)

    def _claim(self, mount: Promised, client: Client) -> None:
        known = mount.claims.get(client.holder)
        since = known.since if known else int(self._clock.unix())
        timeout = client.timeout or (known.timeout if known else self.settings.idle_timeout)
        mount.claims[client.holder] = Claim(since, timeout, self.now)
        mount.written[client.holder] = mount.claims[client.holder].in_whole_seconds()
        mount.use(self.now)

    def _begin(self, client: Client) -> None:
        for old in list(self.mounts.values()):
            if old.key == client.key and old.state == "failed" and not old.remains:
                self._ended(old, f"it failed: {old.error}")
        mount = Promised(
            self._begun(client.key), client.key, int(self._clock.unix()), self.now + self.settings.lifetime, self.now,
            begun_at=self.now, written_at=self.now, written_used=math.floor(self.now),
        )  # fmt: skip
        self.mounts[mount.id] = mount
        self._claim(mount, client)
        mount.waiting.append(client)

    def _make(self) -> bool:
        """All that are to be made now are made, or not."""
        making = [
            mount
            for mount in self.mounts.values()
            if mount.state == "mounting" and (mount.retry_at is None or mount.retry_at <= self.now)
        ]
        for mount in making:
            again = mount.retry_at is not None
            mount.attempts += again
            if not self.broken:
                mount.state, mount.error, mount.retry_at, mount.made_at = "mounted", "", None, self.now
                for claim in mount.claims.values():  # while it could not be used nobody's time went by
                    claim.used += self.now - max(claim.used, mount.begun_at)
                mount.used += self.now - max(mount.used, mount.begun_at)
                mount.write_down(self.now)
                for client in mount.waiting:
                    client.told = mount.id if client.holder in mount.claims else errors.Cancelled
                mount.waiting.clear()
            elif again and mount.attempts < 2:
                mount.retry_at, mount.error = self.now + PAUSE, f"not made again yet: {FULL}"
            else:
                self.fails(mount, f"it could not be made again: {FULL}" if again else FULL)
        return bool(making)
