"""Room for mounts: how many there may be, who waits for it in which order, and who makes some.

A mount takes a place from its beginning until nothing of it is left, devices that somebody abroad still holds
included; these count for those who held the mount. Requests get free places in the order of asking. One that finds
none closes the mount that has not been used for longest, if that is long enough; else it waits for a change, or is
refused if it does not want to wait. A holder that has as many mounts as one may waits for itself and keeps nobody.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sendense_restored import errors, names

from .session import State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable

    from sendense_restored.config import Mounts as Settings

    from .host.clock import Clock
    from .host.loop import Drain
    from .lease import Holder
    from .mount import Mount
    from .session import Key

_MOST_NAMED = 16
_MOST_HOLDERS = 4
MOST_QUEUED = 64
"""Requests that wait for room; each looks again after every change."""


class Draining:
    """Devices of a mount that has ended, still held by somebody abroad."""

    def __init__(self, mount_id: str, holders: Collection[Holder], devices: Collection[Drain]) -> None:
        self.mount_id = mount_id
        self.holders = frozenset(holders)
        self.devices = list(devices)

    async def freed(self) -> None:
        """Wait until the kernel has freed them all."""
        while self.devices:
            await self.devices[0].freed()
            del self.devices[0]


class _Request:
    """Somebody in the queue, and what for."""

    def __init__(self, holder: Holder, key: Key) -> None:
        self.holder, self.key = holder, key


class Places:
    """``mounts`` gives all mounts, ``settings`` the configuration as it is now.

    ``evict`` closes a mount in favour of another one, and raises a RestoreError if that cannot be.
    """

    def __init__(
        self,
        mounts: Callable[[], Iterable[Mount]],
        settings: Callable[[], Settings],
        clock: Clock,
        evict: Callable[[Mount], Awaitable[None]],
    ) -> None:
        self._mounts, self._settings, self._clock, self._evict = mounts, settings, clock, evict
        self._queue: list[_Request] = []
        self._news = asyncio.Event()
        self._evicting = 0
        """How many mounts are being closed in favour of others."""
        self._draining: dict[asyncio.Task[None], Draining] = {}

    @property
    def queued(self) -> int:
        """How many wait."""
        return len(self._queue)

    @property
    def draining(self) -> list[Draining]:
        """What has ended and still takes a place."""
        return list(self._draining.values())

    @property
    def taken(self) -> int:
        """How many places are taken; by one mount only one, also if some of its devices drain and more is left."""
        standing = {mount.id for mount in self._mounts() if takes_a_place(mount)}
        return len(standing | {draining.mount_id for draining in self.draining})

    def changed(self) -> None:
        """There may be room now: those who wait look again."""
        self._news.set()
        self._news = asyncio.Event()

    def drain(self, mount: Mount) -> None:
        """Keep the place of a mount that ends until its last device is freed."""
        known = [device for draining in self.draining for device in draining.devices]
        devices = [device for device in mount.session.draining if device not in known]
        if not devices:
            return
        draining = Draining(mount.id, mount.lease.claims, devices)
        task = asyncio.create_task(draining.freed(), name=f"drain {mount.id}")
        self._draining[task] = draining
        task.add_done_callback(self._drained)

    def _drained(self, task: asyncio.Task[None]) -> None:
        del self._draining[task]
        self.changed()

    async def close(self) -> None:
        """Do not follow any longer what drains: the kernel frees it without us."""
        tasks = list(self._draining)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def check_holder(self, holder: Holder) -> None:
        """Raises LimitReached if ``holder`` has as many mounts as one may have."""
        if self._is_full(holder):
            most = self._settings().max_per_holder
            raise errors.LimitReached(f"{holder} holds {most} mounts, as many as one may; unmount one and try again")

    def _is_full(self, holder: Holder) -> bool:
        most = self._settings().max_per_holder
        held = {mount.id for mount in self._mounts() if takes_a_place(mount) and holder in mount.lease.claims}
        held |= {draining.mount_id for draining in self.draining if holder in draining.holders}
        return 0 < most <= len(held)

    async def enter(
        self, holder: Holder, key: Key, join: Callable[[], Mount | None], begin: Callable[[], Mount], *, wait: bool
    ) -> Mount:
        """The mount that ``join`` finds, or else the one that ``begin`` makes when there is room for it.

        Neither awaits, so that no place is given twice. Raises LimitReached, and what they raise.
        """
        if len(self._queue) >= MOST_QUEUED:
            raise errors.LimitReached(f"{len(self._queue)} wait for a mount already; try again later")
        request = _Request(holder, key)
        self._queue.append(request)
        try:
            while True:
                mount = join()
                if mount is not None and (holder in mount.lease.claims or not self._is_full(holder)):
                    return mount
                news = self._news
                if self._has_turn(request):
                    return begin()
                if not wait:
                    self.check_holder(holder)
                unused, when = self._least_recently_used()
                if unused is not None and not self._is_full(holder) and not self._is_asked_for_before(request):
                    await self._make_room(unused)
                elif wait or self._evicting:  # what others make room with may be what is missing here
                    await self._until(news, when)
                else:
                    raise self._refusal()
        finally:
            self._queue.remove(request)
            self.changed()

    def _is_asked_for_before(self, request: _Request) -> bool:
        """Whether somebody before it sees to the same mount, which it can join then."""
        before = self._queue[: self._queue.index(request)]
        return any(each.key == request.key and not self._is_full(each.holder) for each in before)

    def _has_turn(self, request: _Request) -> bool:
        """Whether a place is left for it after those who came before it have theirs."""
        free = self._settings().max - self.taken
        before = self._queue[: self._queue.index(request)]
        free -= sum(not self._is_full(each.holder) for each in before)
        return free > 0 and not self._is_full(request.holder)

    def _least_recently_used(self) -> tuple[Mount | None, float | None]:
        """The mount to be closed in favour of another one; if there is none yet, when there will be (clock)."""
        after = self._settings().evict_after
        found = [
            (max(mount.lease.used + after, mount.spared_until), mount)
            for mount in self._mounts()
            if mount.session.state is State.MOUNTED and mount.closing is None and not mount.lease.held
        ]
        now = self._clock.now()
        if due := [mount for when, mount in found if when <= now]:
            return min(due, key=lambda mount: mount.lease.used), None
        return None, min((when for when, _ in found), default=None)

    async def _make_room(self, unused: Mount) -> None:
        self._evicting += 1
        try:
            await self._evict(unused)
        except errors.RestoreError:
            # Somebody still reads: it is left alone as long as if it had just been used.
            unused.spared_until = self._clock.now() + self._settings().evict_after
        finally:
            self._evicting -= 1
            self.changed()

    async def _until(self, news: asyncio.Event, when: float | None) -> None:
        timer = self._clock.call_at(when, self.changed) if when is not None else None
        try:
            await news.wait()
        finally:
            if timer is not None:
                timer.cancel()

    def _refusal(self) -> errors.LimitReached:
        """Who holds what, so that the one who is refused knows whom to ask."""
        lines = []
        for mount in self._mounts():
            if takes_a_place(mount):
                holders = _listed([str(holder) for holder in mount.lease.claims])
                ago = int(self._clock.now() - mount.lease.used)
                lines.append(f"{mount.session.wish.backup.id} held by {holders}, last used {ago} s ago")
        lines += [f"a device still held open after an unmount, of {each.mount_id}" for each in self.draining]
        named = names.displayable("; ".join(lines[:_MOST_NAMED]))
        waiting = f"; {len(self._queue) - 1} wait already" if len(self._queue) > 1 else ""
        return errors.LimitReached(
            f"all {self._settings().max} mounts are in use ({named}{waiting}); unmount one, or wait in the queue"
        )


def _listed(holders: list[str]) -> str:
    more = f" and {len(holders) - _MOST_HOLDERS} more" if len(holders) > _MOST_HOLDERS else ""
    return ", ".join(holders[:_MOST_HOLDERS]) + more if holders else "nobody"


def takes_a_place(mount: Mount) -> bool:
    """Whether it counts: all do but those that have failed and of which nothing is left."""
    return mount.session.state is not State.FAILED or mount.session.standing
