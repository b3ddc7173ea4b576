"""All mounts: who asked for what, one flight per key, and the one way in which a mount ends.

A mount is shared by everybody who asked for the same key (backup, disks, journal view) and may; each of them has a
claim, and the last claim to be dropped or to run out closes the mount. The database row is the wish: it is written
before anything is built and deleted after everything is gone, so that the next daemon knows what to make again and
what not (``resume``). Building is a task of ours, not of the caller: a caller that gives up stops waiting, nothing
more. A mount that has failed stays for a while to tell why.

It is long because it is one thing: every change of the list of mounts is in here, and which of its awaits may come
between which others can be seen in one place only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from typing import TYPE_CHECKING

from sendense_restored import errors, names

from .ended import Ended
from .events import OK, SERVICE
from .lease import Lease
from .ledger import Ledger
from .mount import Mount
from .places import Places, takes_a_place
from .session import Session, State, Wish
from .store import MountStatus

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Sequence

    from sendense_restored.config import Config

    from .events import Actor, Events
    from .host.clock import Clock
    from .lease import Holder
    from .mount import Listener
    from .session import Key
    from .store import Store
    from .volume import Journal, Machine

log = logging.getLogger(__name__)

# What a backup's row may say when its files are complete.
_COMPLETE = "completed"

_UNMOUNTED_MEANWHILE = "the mount was unmounted while it was being made; mount the backup again if it is still wanted"

FAILED_STAYS = 600.0
"""Seconds that the object of a failed mount stays to tell why."""
_MOST_FAILED = 32
_TRY_AGAIN = 60.0
_LAST_WORDS = 0.5
_MOST_CLAIMS = 256
"""On one mount; each is a row, and a part of what everybody is told who looks at it."""
_WRITTEN_EVERY = 60.0
"""Seconds of use that a crash may make a mount forget, at most."""


class Mounts:
    """The owner of all sessions."""

    def __init__(
        self, config: Config, store: Store, machine: Machine, listener: Listener, events: Events, clock: Clock
    ) -> None:
        self.config, self.machine, self.events, self.clock = config, machine, events, clock
        self.ended = Ended(clock)
        """What became of mounts that are gone."""
        self.ledger = Ledger(store, events)
        self._store, self._listener = store, listener
        self._mounts: dict[str, Mount] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._places = Places(self.__iter__, lambda: self.config.mounts, clock, self._evict)

    @property
    def backend(self) -> str:
        """How block devices are made."""
        return self.machine.backend

    @property
    def places(self) -> Places:
        """Who has and who waits for room."""
        return self._places

    def __iter__(self) -> Iterator[Mount]:
        return iter(list(self._mounts.values()))

    def __len__(self) -> int:
        """How many there are that have not failed."""
        return sum(map(takes_a_place, self))

    def get(self, mount_id: str) -> Mount:
        """The mount of that id. Raises errors.MountNotFound, or Expired if it has ended lately."""
        mount = self._mounts.get(mount_id)
        if mount is None:
            raise self.ended.error(mount_id)
        return mount

    async def wish(self, backup_id: str, *, disk_index: int, all_disks: bool, journal: Journal) -> Wish:
        """Read from the catalogue what a request means.

        Raises errors.BackupNotFound or CatalogUnavailable.
        """
        backup = await self._store.backup(backup_id)
        repository = await self._store.repository(backup.repository_id)
        disks = tuple(disk for disk in backup.disks if all_disks or disk.index == disk_index)
        if not disks:
            known = ", ".join(str(disk.index) for disk in backup.disks)
            raise errors.BackupNotFound(
                f"the backup has no disk {disk_index}; it has {known}" if known else "the backup has no disks"
            )
        return Wish(backup, repository, disks, all_disks, journal)

    def reload(self, config: Config) -> None:
        """Go on with another configuration; what is mounted keeps the times that it was given."""
        self.config = config
        self._places.changed()

    # --- beginning --------------------------------------------------------------------------------------------

    async def mount(
        self, wish: Wish, actor: Actor, *, idle_timeout: float | None = None, wait: bool = False
    ) -> Mount:
        """A finished mount of ``wish`` with a claim of ``actor`` on it. Raises a RestoreError.

        One of the same key that is just ending is waited for. A caller that is cancelled stops waiting; the mount
        and the claim stay. ``idle_timeout`` is in seconds; ``wait``: for room, if there is none.
        """
        try:
            mount = await self._find_or_begin(wish, actor, idle_timeout, wait=wait)
        except errors.RestoreError as error:
            self.events.record(
                "mounted", actor=actor, outcome=type(error).__name__, backup_id=wish.backup.id, detail=error.message
            )
            raise
        await self._claim(mount, actor, idle_timeout)
        return mount

    async def _find_or_begin(self, wish: Wish, actor: Actor, idle_timeout: float | None, *, wait: bool) -> Mount:
        check_ready(wish)
        timeout = idle_timeout or self.config.mounts.idle_timeout
        while True:
            mount = await self._places.enter(
                actor.holder,
                wish.key,
                join=lambda: self._of_key(wish.key),
                begin=lambda: self._begin(wish, actor, timeout),
                wait=wait,
            )
            if mount.closing is None:
                if actor.holder not in mount.lease.claims and len(mount.lease.claims) >= _MOST_CLAIMS:
                    raise errors.LimitReached(
                        f"{_MOST_CLAIMS} hold this mount already; try again when some have let go"
                    )
                return mount
            # It may turn out busy and stay, to be joined; and until it is gone it takes one of the places.
            await asyncio.wait([mount.closing])

    async def _claim(self, mount: Mount, actor: Actor, idle_timeout: float | None) -> None:
        """Give ``actor`` a claim, or renew it, and wait until the mount is finished."""
        holder = actor.holder
        known = mount.lease.claims.get(holder)
        idle_timeout = idle_timeout or (known.timeout if known else self.config.mounts.idle_timeout)
        mount.lease.claim(holder, idle_timeout)
        self.changed(mount)
        if mount.written:  # else it goes with the row
            # A task of ours: a caller that goes must not leave the claim unwritten.
            await asyncio.shield(self.task(self.ledger.claim(mount, holder), f"write claim on {mount.id}"))
        if mount.building is not None:
            try:
                await asyncio.shield(mount.building)
            except asyncio.CancelledError:
                if not mount.building.cancelled():
                    raise  # the caller gave up
                self._check_running()
                raise errors.Cancelled(
                    "the mount was unmounted while it was being made; mount the backup again if it is still wanted"
                ) from None
        if holder not in mount.lease.claims or mount.id not in self._mounts:
            self._check_running()
            raise errors.Cancelled(
                "the mount was unmounted while it was being made; mount the backup again if it is still wanted"
            )
        self.ledger.record("claimed", mount, actor=actor, detail=f"for {idle_timeout:.0f} s without use")

    def _check_running(self) -> None:
        if self._stopping:
            raise errors.Unavailable("the service is stopping; try again in a moment")

    def _of_key(self, key: Key) -> Mount | None:
        """The mount of that key which can be joined, or may turn out so once it is not ``closing`` any more."""
        self._check_running()
        joinable = {State.MOUNTING, State.MOUNTED}
        found = [
            mount
            for mount in self._mounts.values()
            if mount.session.wish.key == key and (mount.session.state in joinable or mount.closing is not None)
        ]
        return min(found, key=lambda mount: mount.closing is not None, default=None)

    def _begin(self, wish: Wish, actor: Actor, timeout: float) -> Mount:
        """Register a mount and start to build it, in one step without an await: one flight per key."""
        # Those that are being built have not taken yet what they will need.
        begun = [mount.session.wish for mount in self if mount.session.state is State.MOUNTING]
        self.machine.check_room(len(begun) + 1, sum(len(each.disks) for each in (*begun, wish)))
        for old in self:
            # It has told why for long enough if somebody tries the same again.
            if old.session.state is State.FAILED and old.session.wish.key == wish.key and not old.session.standing:
                self._forget(old)
        lease = Lease(self.clock, ends=self.clock.now() + self.config.mounts.max_lifetime)
        lease.claim(actor.holder, timeout)
        session = Session(str(uuid.uuid4()), wish, self.machine, created_at=int(self.clock.unix()))
        mount = self.register(session, lease)
        self.build(mount, self._build(mount))
        return mount

    def register(self, session: Session, lease: Lease) -> Mount:
        """Take a session in, to be built."""
        mount = Mount(session, lease, self)
        self._mounts[mount.id] = mount
        self._listener.added(mount)
        return mount

    def build(self, mount: Mount, work: Coroutine[None, None, None]) -> None:
        """Have ``work`` build a mount that was registered."""
        mount.building = self.task(work, f"build {mount.id}")
        mount.building.add_done_callback(_built)

    async def _build(self, mount: Mount) -> None:
        try:
            await self.ledger.begin(mount)
            await self.make(mount)
        except asyncio.CancelledError:
            await self._strip(mount)
            raise
        except errors.RestoreError as error:
            await self.failed(mount, error.message, outcome=type(error).__name__)
            raise
        except BaseException:
            await self.failed(mount, "an internal error; the service's journal has more", outcome="Failed")
            raise

    async def make(self, mount: Mount) -> None:
        """Build all layers of a mount and write down what came of it. Raises a RestoreError, with its layers gone."""
        session = mount.session
        began = self.clock.now()
        log.debug("mounting %s", session.wish.backup.id)
        try:
            await session.build()
            mount.lease.paused(mount.begun_at)
            await self.ledger.finish(mount)
        except BaseException:
            await self._strip(mount)
            raise
        session.lost.add_done_callback(lambda lost: self._part_lost(mount, lost))
        mount.made_at = self.clock.now()
        self.changed(mount)
        seconds = mount.made_at - began
        self.ledger.record("mounted", mount, detail=f"{names.displayable(str(session.path))} in {seconds:.1f} s")

    async def _strip(self, mount: Mount) -> None:
        """Take away what was built of a mount. If that fails as well, it is logged and left to the sweep."""
        try:
            await mount.session.force()
        except (errors.RestoreError, OSError) as error:
            log.error("a part of %s is left: %s", mount.id, error)  # noqa: TRY400 - the error says it all
        await mount.streams_ended()
        self._places.drain(mount)

    def task(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        """Run ``work`` as a task that ``stop`` waits for."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- lasting ----------------------------------------------------------------------------------------------

    def changed(self, mount: Mount) -> None:
        """What others see of a mount, or when it is due, may have changed."""
        if mount.id not in self._mounts:
            return
        when = None
        if mount.session.state is State.MOUNTED:
            when = mount.lease.next
        elif mount.session.state is State.FAILED:
            when = mount.failed_at + FAILED_STAYS
        elif mount.session.state is State.UNMOUNTING:
            when = max(mount.lease.ends, self.clock.now() + _TRY_AGAIN)  # it was refused half-way
        # A timer that comes too early looks again, so that not each use sets one.
        if mount.timer is not None and (when is None or when < mount.timer.when or mount.timer.callback is None):
            mount.timer.cancel()
            mount.timer = None
        if when is not None and mount.timer is None and not self._stopping:
            mount.timer = self.clock.call_at(when, lambda: self._due(mount))
        self._listener.changed(mount)
        self._places.changed()

    def used(self, mount: Mount) -> None:
        """Somebody used a mount; now and then that is written down, for the case of a crash."""
        now = self.clock.now()
        shortest = min((claim.timeout for claim in mount.lease.claims.values()), default=_WRITTEN_EVERY)
        if now - mount.written_at > min(_WRITTEN_EVERY, shortest / 4) and mount.session.state is State.MOUNTED:
            mount.written_at = now
            self.task(self.ledger.renew(mount), f"write down {mount.id}")

    def _due(self, mount: Mount) -> None:
        self.task(self.expire(mount), f"look whether {mount.id} is due")

    async def expire(self, mount: Mount) -> None:
        """End a mount, or those claims on it, whose time is up; if nothing is due, see when to look again."""
        state, lease = mount.session.state, mount.lease
        if self._stopping or mount.id not in self._mounts or mount.closing is not None:
            return
        if lease.held:
            self.used(mount)
        if state is State.FAILED and self.clock.now() >= mount.failed_at + FAILED_STAYS:
            mount.failed_at = self.clock.now()
            with contextlib.suppress(errors.RestoreError):  # a part of it is left; the next time, then
                await self.close(mount, f"it failed: {mount.session.error}", force=True)
        elif state is not State.FAILED and self.clock.now() >= lease.ends:
            await self._end_of_life(mount)
        elif state is State.MOUNTED and len(expired := lease.expired()) == len(lease.claims):
            minutes = max((lease.claims[holder].timeout for holder in expired), default=0.0) / 60
            await self.try_to_close(mount, f"nobody used it for {minutes:.0f} min")
        elif state is State.MOUNTED:
            await self._drop(mount, expired)
        self.changed(mount)

    async def _end_of_life(self, mount: Mount) -> None:
        hours = self.config.mounts.max_lifetime / 3600
        reason = f"it has reached the longest time that a mount may last ({hours:.0f} h)"
        if not await self.try_to_close(mount, reason):
            with contextlib.suppress(errors.RestoreError):  # logged, and left to the sweep
                await self.close(mount, reason, force=True)

    async def try_to_close(self, mount: Mount, reason: str) -> bool:
        """Close it unless somebody reads; whether it is gone."""
        try:
            await self.close(mount, reason)
        except errors.RestoreError as error:
            mount.lease.postpone()
            self.ledger.record(
                "unmounted", mount, outcome=type(error).__name__, detail=f"{reason}, but {error.message}"
            )
            return False
        return True

    async def _evict(self, mount: Mount) -> None:
        await self.close(mount, "another mount needed its place, and it had not been used for longest")

    async def _drop(self, mount: Mount, holders: Sequence[Holder], actor: Actor = SERVICE) -> None:
        """Take claims away, all at once; the caller sees to it that others are left."""
        for holder in holders:
            del mount.lease.claims[holder]
            what = "claim expired" if actor is SERVICE else "unclaimed"
            self.ledger.record(what, mount, actor=actor, detail=str(holder))
        self.changed(mount)
        await asyncio.shield(self.task(self.ledger.unclaim(mount, holders), f"write claims on {mount.id}"))

    # --- ending -----------------------------------------------------------------------------------------------

    async def unmount(self, mount: Mount, actor: Actor, *, force: bool) -> None:
        """Drop the claims of ``actor``; the last one, a caller without one, or ``force`` closes the mount.

        Raises errors.Busy, with every claim as it was, when somebody still reads.
        """
        self._check_running()
        try:
            await self._unmount(mount, actor, force=force)
        except errors.RestoreError as error:
            self.ledger.record("unmounted", mount, actor=actor, outcome=type(error).__name__, detail=error.message)
            raise

    async def _unmount(self, mount: Mount, actor: Actor, *, force: bool) -> None:
        held = mount.lease.of(actor.holder.uid, actor.on_behalf_of)
        if not force and held and len(held) < len(mount.lease.claims):
            await self._drop(mount, held, actor)
            return
        how = "unmounted by force" if force else "unmounted"
        await self.close(mount, f"{how} by {actor.holder}", actor=actor, force=force)

    async def close(self, mount: Mount, reason: str, *, actor: Actor = SERVICE, force: bool = False) -> None:
        """End a mount: every end of every mount goes through here. Raises errors.Busy unless ``force``.

        The work is a task of ours: a caller that gives up does not leave a mount half closed.
        """
        while mount.ending is not None and not mount.ending.done():
            await asyncio.wait([mount.ending])
        self._check_running()
        if mount.id not in self._mounts:
            return
        mount.ending = self.task(self._end(mount, reason, actor, force=force), f"end {mount.id}")
        await asyncio.shield(mount.ending)

    async def _end(self, mount: Mount, reason: str, actor: Actor, *, force: bool) -> None:
        if self._stop_building(mount):
            await self.ledger.note(mount, status=MountStatus.UNMOUNTING)  # the wish ends here
        await mount.built()
        await self._take_down(mount, force=force)
        self._gone(mount, reason, actor)
        await self.ledger.end(mount)

    @staticmethod
    def _stop_building(mount: Mount) -> bool:
        """Have a build that goes on roll back, if it does not do so already; whether one goes on."""
        if mount.building is None or mount.building.done():
            return False
        mount.unwanted = True
        if mount.session.state is not State.UNMOUNTING:
            mount.building.cancel()
        return True

    async def _take_down(self, mount: Mount, *, force: bool) -> None:
        """Take the layers of a mount away. Raises a RestoreError, with the mount as it was if it could be made so."""
        session = mount.session
        if not force:
            # Who has read a stream to its end knows that it has ended a moment before we do.
            await mount.streams_ended(_LAST_WORDS)
        if not force and mount.streams:
            raise errors.Busy("a listing of it runs; read it to its end, close it, or unmount by force")
        before = session.state
        try:
            if before is State.MOUNTED:
                # The wish ends here: after a crash it must not be made again.
                session.state = State.UNMOUNTING
                self.changed(mount)
                await self.ledger.note(mount, status=MountStatus.UNMOUNTING)
            await (session.force() if force or session.lost.done() else session.close())
        except errors.Busy as error:
            raise await self._busy(mount, error) from None
        except OSError as error:
            # What is left stays noted in the session; the next attempt goes on from there.
            log.error("not unmounting %s: %s", mount.id, error)  # noqa: TRY400 - errno and path say it all
            await self.failed(mount, session.error or "a part of the mount could not be taken away")
            raise errors.Failed("the mount could not be taken away whole; unmount it again") from None
        finally:
            if before is State.FAILED and session.standing:
                session.state = before  # and it tells why as it did
            self.changed(mount)
        await mount.streams_ended()
        self._places.drain(mount)

    async def _busy(self, mount: Mount, error: errors.Busy) -> errors.Busy:
        """It goes on as before; the error that says who still reads."""
        if mount.session.state is State.MOUNTED:
            await self.ledger.note(mount, status=MountStatus.MOUNTED)
        found = await self.machine.holders(mount.session.mount_ids)
        readers = ", ".join(f"{each.comm} (process {each.pid} of uid {each.uid})" for each in found[:8])
        log.info("not unmounting %s: %s", mount.id, error)
        return errors.Busy(f"{error.message}; open in {names.displayable(readers)}") if readers else error

    def _gone(self, mount: Mount, reason: str, actor: Actor = SERVICE) -> None:
        """Nothing of it is left: take it off the list, and remember why."""
        if self._mounts.pop(mount.id, None) is None:
            return
        if mount.timer is not None:
            mount.timer.cancel()
            mount.timer = None
        self.ended.add(mount.id, reason)
        self._listener.removed(mount)
        self.ledger.record("ended", mount, actor=actor, detail=reason, bytes_=mount.bytes_out)
        self._places.changed()

    def _forget(self, mount: Mount) -> None:
        """Take a failed mount off the list."""
        self._gone(mount, f"it failed: {mount.session.error}")
        self.task(self.ledger.end(mount), f"forget {mount.id}")

    def _part_lost(self, mount: Mount, lost: asyncio.Future[str]) -> None:
        if lost.cancelled() or self._stopping or mount.id not in self._mounts:
            return
        if mount.ending is not None and not mount.ending.done():
            # It is being closed; only if that is refused there is something left to do.
            mount.ending.add_done_callback(lambda _: self._part_lost(mount, lost))
            return
        mount.ending = self.task(self._fail(mount, lost.result()), f"fail {mount.id}")

    async def _fail(self, mount: Mount, reason: str) -> None:
        """Something below it ended by itself: free what is left."""
        await self._strip(mount)
        await self.failed(mount, reason)

    async def failed(self, mount: Mount, reason: str, *, outcome: str = OK) -> None:
        """Nothing of it is left, or will be once the sweep has been there; the object stays to tell the reason."""
        mount.session.state, mount.session.error = State.FAILED, reason
        mount.failed_at = self.clock.now()
        self.changed(mount)
        # One that could not be made was not mounted, for some error; one that stood has failed.
        self.ledger.record("failed" if outcome == OK else "mounted", mount, outcome=outcome, detail=reason)
        await self.ledger.note(mount, status=MountStatus.FAILED, error_message=reason)
        failed = [each for each in self if each.session.state is State.FAILED and not each.session.standing]
        for old in sorted(failed, key=lambda each: each.failed_at)[: max(len(failed) - _MOST_FAILED, 0)]:
            self._forget(old)

    async def stop(self) -> None:
        """Take all mounts down, by force where somebody still reads: the service ends. Their rows stay."""
        self._stopping = True
        self._places.changed()
        for mount in self:
            self.task(self._stop(mount), f"stop {mount.id}")
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._places.close()

    async def _stop(self, mount: Mount) -> None:
        if mount.timer is not None:
            mount.timer.cancel()
        while mount.ending is not None and not mount.ending.done():
            await asyncio.wait([mount.ending])
        if mount.id not in self._mounts:
            return
        if self._stop_building(mount) or mount.session.state is State.MOUNTED:
            await self.ledger.renew(mount)
            await self.ledger.note(mount, resume_attempts=0)
        await mount.built()
        try:
            await (mount.session.force() if mount.session.lost.done() else mount.session.close())
        except (errors.RestoreError, OSError):
            await self._strip(mount)  # what that does not take away goes with the service's mount namespace
        await mount.streams_ended()
        del self._mounts[mount.id]


def _built(building: asyncio.Task[None]) -> None:
    """Whoever waits for a build is told how it ended; a bug must not go unseen even if nobody does."""
    bug = None if building.cancelled() else building.exception()
    if bug is not None and not isinstance(bug, errors.RestoreError):
        log.critical("%s failed", building.get_name(), exc_info=bug)


def check_ready(wish: Wish) -> None:
    """Raises errors.BackupNotReady for what must not be mounted."""
    if not wish.repository.enabled:
        raise errors.BackupNotReady("the backup's repository is disabled; enable it and try again")
    for what, status in (
        ("backup", wish.backup.status),
        *((f"disk {disk.index}", disk.status) for disk in wish.disks),
    ):
        if status != _COMPLETE:
            raise errors.BackupNotReady(f"the {what} is {status!r}; only a completed one can be mounted")
