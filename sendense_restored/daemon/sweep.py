"""Now and then: what should be, compared with what is.

Everything has an event of its own that should have dealt with it; the sweep is for what slipped through, and for
what changes without telling us: backups that leave the catalogue, rows that somebody deleted, parts that could not
be taken away at first. It runs every so often by the clock, and at once when asked; and sooner than usual as long as
mounts of an earlier daemon wait for a catalogue that is away.

Only a catalogue that can be read, and does not have a backup, ends a mount of it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from sendense_restored import errors

from .resume import PAUSE
from .session import State
from .store import MountStatus

if TYPE_CHECKING:
    from .events import Events
    from .host.clock import Clock, Timer
    from .mount import Mount
    from .mounts import Mounts
    from .resume import Resume
    from .store import MountRow, Store
    from .volume import Machine

log = logging.getLogger(__name__)

_PROVEN = 600.0
"""Seconds of life after which a mount that was made again has not brought the service down."""


class Sweep:
    """Owns the timer, from ``start`` to ``close``."""

    def __init__(
        self, mounts: Mounts, resume: Resume, store: Store, machine: Machine, events: Events, clock: Clock
    ) -> None:
        self._mounts, self._resume, self._store, self._machine = mounts, resume, store, machine
        self._events, self._clock = events, clock
        self._one_at_a_time = asyncio.Lock()
        self._timer: Timer | None = None
        self._running: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def next(self) -> int:
        """When it runs next (unix seconds)."""
        when = self._timer.when if self._timer is not None else self._clock.now()
        return int(self._clock.unix() + when - self._clock.now())

    def begin(self) -> None:
        """Run now, and from now on each time after the configured interval."""
        self._due()

    def reload(self) -> None:
        """The interval may be another one."""
        if self._timer is not None and self._timer.callback is not None:
            self._timer.cancel()
            self.start()

    def start(self) -> None:
        """Run from now on, each time after the configured interval."""
        interval = self._mounts.config.mounts.sweep_interval
        if self._mounts.ended.waiting:
            interval = min(interval, PAUSE)
        self._timer = self._clock.call_at(self._clock.now() + interval, self._due)

    def _due(self) -> None:
        self._running = asyncio.create_task(self._run_and_go_on(), name="sweep")

    async def _run_and_go_on(self) -> None:
        try:
            await self.run()
        except errors.CatalogUnavailable as error:
            log.warning("not sweeping: %s", error)
        finally:
            if not self._closed:
                self.start()

    async def close(self) -> None:
        """Run no more, and wait for the one that runs."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._running is not None:
            await asyncio.wait([self._running])

    async def run(self) -> int:
        """Compare and mend; how many mounts it has ended. Raises CatalogUnavailable."""
        async with self._one_at_a_time:
            mounts = list(self._mounts)  # before the rows are read: one that begins meanwhile has none among them
            rows = {row.id: row for row in await self._store.mount_rows()}
            there = await self._in_the_catalogue({mount.session.wish.backup.id for mount in mounts})
            ended = 0
            for mount in mounts:
                if not await self._look_at(mount, rows.get(mount.id), known=mount.session.wish.backup.id in there):
                    ended += 1
            waiting = self._mounts.ended.waiting
            await self._resume.missing()
            for row_id in rows.keys() - self._ids() - waiting:
                log.info("forgetting the row of %s, which is no mount", row_id)
                await self._store.delete_mount(row_id)
            # In one go with asking who lives: no mount can begin in between.
            for sentence in self._machine.sweep(self._ids()):
                log.info("%s", sentence)
            kept = self._mounts.config.events
            await self._events.trim(keep=kept.keep, older=kept.max_age)
        return ended

    async def _in_the_catalogue(self, ids: set[str]) -> set[str]:
        """Those of these backups that are there, as far as is known."""
        try:
            return await self._store.backup_ids(ids)
        except errors.CatalogUnavailable as error:
            log.warning("not looking for backups that are gone: %s", error)
            return ids

    async def _look_at(self, mount: Mount, row: MountRow | None, *, known: bool) -> bool:
        """Mend what is wrong with one mount; whether it still is there."""
        state = mount.session.state
        if state is State.MOUNTING or mount.closing is not None or not self._is_there(mount):
            return True
        if state is State.FAILED:
            await self._mounts.expire(mount)
            return self._is_there(mount)
        if not known:
            return not await self._mounts.try_to_close(mount, "its backup is no longer in the catalogue")
        if state is State.UNMOUNTING:
            return not await self._mounts.try_to_close(mount, "what was left of it could be taken away at last")
        if mount.lease.overdue:
            return not await self._mounts.try_to_close(mount, "its time is up")
        if row is None:
            await self._mounts.ledger.again(mount)
        elif row.status is not MountStatus.MOUNTED:
            await self._mounts.ledger.note(mount, status=MountStatus.MOUNTED)
        if row is not None and row.resume_attempts and self._clock.now() - mount.made_at > _PROVEN:
            await self._mounts.ledger.note(mount, resume_attempts=0)
        await self._mounts.ledger.renew(mount)
        return True

    def _ids(self) -> set[str]:
        return {mount.id for mount in self._mounts}

    def _is_there(self, mount: Mount) -> bool:
        return any(each is mount for each in self._mounts)
