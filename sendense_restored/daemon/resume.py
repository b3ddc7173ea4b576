"""After a start: the mounts that an earlier daemon held are made again, under the same ids and with the same claims.

The kernel took everything away with the daemon; the database has the wishes. ``load`` takes them in before the
service has its name, so that no client ever finds one missing; building goes on in the background, one mount after
the other: the number of attempts is written down *before* each, and if an image brings down the machine, that one
alone is blamed. After two attempts it has failed. A stop in good order sets the number back.

Whoever may write the database grants mounts, but no more than that: an id becomes a path, a uid a right and a time an
alarm only if the service itself could have written them.

What a wish means stands in the catalogue. As long as that cannot be read, a wish stays what it is, and the sweep asks
for it again. Nothing else is ever made of a row: one that was not there at the start is nobody's wish, who could have
asked for it, and was allowed to, over the bus.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sendense_restored import errors, names
from sendense_restored.config import SHORTEST_IDLE_TIMEOUT

from .ended import REMEMBERED
from .events import SERVICE
from .lease import Claim, Holder, Lease
from .mounts import check_ready
from .session import Session, State
from .store import MountStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .events import Events
    from .host.clock import Clock
    from .mount import Mount
    from .mounts import Mounts
    from .store import ClaimRow, MountRow, Store
    from .volume import Machine

log = logging.getLogger(__name__)

ATTEMPTS = 2
PAUSE = 30.0
"""Seconds between two attempts: storage that is mounted late, after a reboot, may be there then."""


_LARGEST_UID = 2**32 - 2


class _UnreadableError(Exception):
    """The catalogue does not say what a wish means."""


class Resume:
    """Makes mounts again, once, after a start."""

    def __init__(self, mounts: Mounts, store: Store, machine: Machine, events: Events, clock: Clock) -> None:
        self._mounts, self._store, self._machine = mounts, store, machine
        self._events, self._clock = events, clock
        self._turn = asyncio.Lock()

    async def load(self) -> int:
        """Take in all mounts that are wished for and begin to build them; how many. Raises CatalogUnavailable."""
        from_now = self._clock.unix()
        self._mounts.ended.load(await self._store.ended_mounts(datetime.fromtimestamp(from_now - REMEMBERED, UTC)))
        return await self._consider_all(await self._store.wished())

    async def missing(self) -> None:
        """Take in what ``load`` has found and could not tell: the catalogue could not be read when it was tried.

        Raises CatalogUnavailable.
        """
        if waiting := self._mounts.ended.waiting - {mount.id for mount in self._mounts}:
            await self._consider_all([each for each in await self._store.wished() if each[0].id in waiting])

    async def _consider_all(self, wished: Sequence[tuple[MountRow, Sequence[ClaimRow]]]) -> int:
        """Take in what is wished for; how many. What cannot be told yet is ``waiting``."""
        taken, waiting = 0, set()
        for row, claims in wished:
            try:
                taken += await self._consider(row, claims)
            except _UnreadableError as error:
                log.warning("not resuming %s yet: %s", row.id, error)
                waiting.add(row.id)
        self._mounts.ended.waiting = frozenset(waiting)
        return taken

    async def _consider(self, row: MountRow, claims: Sequence[ClaimRow]) -> bool:
        """Take a mount in if it is wished for; whether it was. Raises _UnreadableError."""
        now = self._clock.unix()
        valid = [
            claim
            for claim in claims
            if (claim.expires_at is None or claim.expires_at.timestamp() > now) and 0 <= claim.uid <= _LARGEST_UID
        ]
        if reason := self._over(row, valid):
            await self._end(row, reason)
            return False
        try:
            wish = await self._mounts.wish(
                row.backup_id,
                disk_index=row.disk_index or 0,
                all_disks=row.disk_index is None,
                journal=row.journal,
            )
        except errors.CatalogUnavailable as error:
            raise _UnreadableError(error.message) from error  # that says nothing about the wish
        except errors.RestoreError as error:
            await self._end(row, f"it could not be made again: {error.message}")
            return False
        if any(mount.session.wish.key == wish.key for mount in self._mounts):
            await self._end(row, "it was mounted anew before it could be made again")
            return False
        for claim in claims:
            if claim not in valid:
                await self._drop(row, claim)
        created_at = int(row.created_at.timestamp())
        self._take_in(Session(row.id, wish, self._machine, created_at=created_at), row, valid)
        return True

    def _over(self, row: MountRow, claims: Sequence[ClaimRow]) -> str:
        """Why a row is no wish any more; empty if it is one."""
        if not _is_id(row.id):
            return "its row was not written by the service: its id is none"
        if row.status is MountStatus.UNMOUNTING:
            return "it was being unmounted when the service ended"
        if row.status is MountStatus.FAILED:
            return f"it failed: {row.error_message}"
        if not claims:
            return "its time ran out while the service was down"
        if self._lifetime(row) <= 0:
            return "it reached the longest time that a mount may last while the service was down"
        return ""

    def _lifetime(self, row: MountRow) -> float:
        longest = self._mounts.config.mounts.max_lifetime
        return min(row.created_at.timestamp() + longest - self._clock.unix(), longest)

    async def _end(self, row: MountRow, reason: str) -> None:
        await self._store.delete_mount(row.id)  # if that cannot be, the next start sees what to do
        self._mounts.ended.add(row.id, reason)
        self._events.record("ended", actor=SERVICE, mount_id=row.id, backup_id=row.backup_id, detail=reason)

    async def _drop(self, row: MountRow, claim: ClaimRow) -> None:
        holder = Holder(claim.uid, claim.on_behalf_of)
        await self._store.delete_claim(row.id, *holder)
        self._events.record(
            "claim expired", actor=SERVICE, mount_id=row.id, backup_id=row.backup_id, detail=str(holder)
        )

    def _take_in(self, session: Session, row: MountRow, claims: Sequence[ClaimRow]) -> None:
        now, unix = self._clock.now(), self._clock.unix()
        lease = Lease(self._clock, ends=now + self._lifetime(row))
        lease.used = min(now + max(row.last_accessed_at.timestamp(), 0.0) - unix, now)
        for claim in claims:
            timeout = min(max(SHORTEST_IDLE_TIMEOUT, claim.timeout), self._mounts.config.mounts.max_idle_timeout)
            left = claim.expires_at.timestamp() - unix if claim.expires_at is not None else timeout
            # Its last use was before now by as much as is missing of its time.
            used = now - max(timeout - left, 0.0)
            holder = Holder(claim.uid, claim.on_behalf_of)
            lease.claims[holder] = Claim(max(int(claim.since.timestamp()), 0), timeout, used)
        mount = self._mounts.register(session, lease)
        mount.written = True
        self._mounts.build(mount, self._build(mount, max(row.resume_attempts, 0)))

    async def _build(self, mount: Mount, attempts: int) -> None:
        """Make a mount when its turn has come, within the attempts that are left. Raises the last one's error."""
        try:
            if attempts >= ATTEMPTS:
                raise errors.Failed(
                    f"the service ended {attempts} times while it made this mount, so it is not tried again;"
                    " look at the journal, then unmount it and mount the backup anew"
                )
            while True:
                try:
                    await self._attempt(mount, attempts + 1)
                except errors.RestoreError as error:
                    if mount.unwanted:
                        raise asyncio.CancelledError from error
                    # It is not to blame for a database that cannot be used.
                    attempts += not isinstance(error, errors.CatalogUnavailable)
                    if attempts >= ATTEMPTS or mount.session.standing:
                        raise
                    log.warning("not resuming %s yet: %s", mount.id, names.displayable(error.message))
                    mount.session.state, mount.session.error = State.MOUNTING, f"not made again yet: {error.message}"
                    self._mounts.changed(mount)
                else:
                    return
                await self._pause()
        except asyncio.CancelledError:
            raise  # unmounted meanwhile; whoever did that removes it
        except errors.RestoreError as error:
            outcome = type(error).__name__
            await self._mounts.failed(mount, f"it could not be made again: {error.message}", outcome=outcome)
            raise
        except BaseException:
            await self._mounts.failed(mount, "an internal error; the service's journal has more", outcome="Failed")
            raise

    async def _attempt(self, mount: Mount, number: int) -> None:
        async with self._turn:
            check_ready(mount.session.wish)
            # Not on to the next step if this one cannot be written: the count is what breaks a circle of crashes.
            await self._store.update_mount(mount.id, resume_attempts=number, status=MountStatus.MOUNTING)
            await self._mounts.make(mount)
            self._events.record("resumed", actor=SERVICE, mount_id=mount.id, backup_id=mount.session.wish.backup.id)

    async def _pause(self) -> None:
        over = asyncio.Event()
        timer = self._clock.call_at(self._clock.now() + PAUSE, over.set)
        try:
            await over.wait()
        finally:
            timer.cancel()


def _is_id(text: str) -> bool:
    """Whether it is an id as the service gives them to mounts."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False
