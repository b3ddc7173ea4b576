"""All mounts: who asked for what, one flight per key, and the one way in which a mount ends.

A mount is shared by everybody who asked for the same key (backup, disks, journal view) and may; each of them has a
claim, and the last claim to be dropped closes the mount. The database row is written before anything is built and
deleted after everything is gone. Building is a task of ours, not of the caller: a caller that gives up stops waiting,
nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from sendense_restored import errors

from .session import Session, State, Wish
from .store import ClaimRow, MountRow, MountStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from sendense_restored.config import Config

    from .session import Key
    from .store import Store
    from .volume import Journal, Machine

log = logging.getLogger(__name__)

# What a backup's row may say when its files are complete.
_COMPLETE = "completed"


class Listener(Protocol):
    """Hears of mounts that come, change and go; the D-Bus side."""

    def added(self, mount: Mount) -> None:
        """A mount has begun."""

    def changed(self, mount: Mount) -> None:
        """Its state, its claims or what it holds may be others than before."""

    def removed(self, mount: Mount) -> None:
        """It is gone."""


class Mount:
    """A session with those who hold it, and the tasks that build and end it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.claims: dict[int, int] = {}
        """uid -> since when (unix seconds)."""
        self.building: asyncio.Task[None] | None = None
        self.ending: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        """The mount's UUID."""
        return self.session.id

    @property
    def closing(self) -> asyncio.Task[None] | None:
        """The task that takes it away just now, if one does; it may be refused, and the mount stay."""
        if self.ending is not None and not self.ending.done():
            return self.ending
        rolling_back = self.session.state is State.UNMOUNTING
        return self.building if rolling_back and self.building is not None and not self.building.done() else None


class Mounts:
    """The owner of all sessions."""

    def __init__(self, config: Config, store: Store, machine: Machine, listener: Listener) -> None:
        self._config, self._store, self._machine, self._listener = config, store, machine, listener
        self._mounts: dict[str, Mount] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    @property
    def backend(self) -> str:
        """How block devices are made."""
        return self._machine.backend

    def __iter__(self) -> Iterator[Mount]:
        return iter(list(self._mounts.values()))

    def __len__(self) -> int:
        return len(self._mounts)

    def get(self, mount_id: str) -> Mount:
        """The mount of that id. Raises errors.MountNotFound."""
        mount = self._mounts.get(mount_id)
        if mount is None:
            raise errors.MountNotFound("there is no such mount; it may have ended")
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

    # --- beginning --------------------------------------------------------------------------------------------

    async def mount(self, wish: Wish, uid: int) -> Mount:
        """A finished mount of ``wish`` with a claim of ``uid`` on it. Raises a RestoreError.

        One of the same key that is just ending is waited for. A caller that is cancelled stops waiting; the mount
        and the claim stay.
        """
        _check_ready(wish)
        while (mount := self._of_key(wish.key)) is not None and mount.closing is not None:
            # It may turn out busy and stay, to be joined; and until it is gone it takes one of the places.
            await asyncio.wait([mount.closing])
        if mount is None:
            mount = self._begin(wish)
        since = mount.claims.setdefault(uid, int(time.time()))
        self._listener.changed(mount)
        assert mount.building is not None
        try:
            await asyncio.shield(mount.building)
        except asyncio.CancelledError:
            if mount.building.cancelled():  # not the caller gave up, but somebody unmounted it
                raise errors.Cancelled("the mount was unmounted while it was being made") from None
            raise
        if uid not in mount.claims:
            raise errors.Cancelled("the mount was unmounted while it was being made")
        try:
            await self._store.put_claim(ClaimRow(mount.id, uid, "", _utc(since), None))
        except (errors.CatalogUnavailable, errors.MountNotFound) as error:
            # The claim holds, which is what counts; an error would leave it to a caller who knows nothing of it.
            log.warning("claim of uid %d on %s not written down: %s", uid, mount.id, error)
        return mount

    def _of_key(self, key: Key) -> Mount | None:
        """The mount of that key which can be joined, or may turn out so once it is not ``closing`` any more."""
        joinable = {State.MOUNTING, State.MOUNTED}
        found = [
            mount
            for mount in self._mounts.values()
            if mount.session.wish.key == key and (mount.session.state in joinable or mount.closing is not None)
        ]
        return min(found, key=lambda mount: mount.closing is not None, default=None)

    def _begin(self, wish: Wish) -> Mount:
        """Register a mount and start to build it, in one step without an await: one flight per key."""
        if self._stopping:
            raise errors.Unavailable("the service is stopping; try again in a moment")
        held = [mount for mount in self._mounts.values() if mount.session.state is not State.FAILED]
        if len(held) >= self._config.mounts.max:
            raise errors.LimitReached(f"all {self._config.mounts.max} mounts are in use; unmount one and try again")
        mount = Mount(Session(str(uuid.uuid4()), wish, self._machine))
        self._mounts[mount.id] = mount
        mount.building = self._task(self._build(mount), f"build {mount.id}")
        mount.building.add_done_callback(_log_refusal(mount))
        self._listener.added(mount)
        return mount

    async def _build(self, mount: Mount) -> None:
        session = mount.session
        began = time.monotonic()
        log.debug("mounting %s", session.wish.backup.id)
        try:
            await self._store.insert_mount(_row(session, self._config))
            await session.build()
            await self._store.update_mount(
                mount.id,
                status=MountStatus.MOUNTED,
                nbd_device=next(iter(devices(session)), ""),
                filesystem_type=filesystem_type(session),
                options={"devices": devices(session)},
            )
        except BaseException:
            # Rolled back whatever the reason, a cancellation by ``close`` included. If that fails as well, it is
            # logged and left to an unmount; those who wait want to know what went wrong first.
            try:
                await self._take_down(mount, force=True)
            except errors.RestoreError as error:
                session.state, session.error = State.FAILED, str(error)
                self._listener.changed(mount)
            raise
        session.lost.add_done_callback(lambda lost: self._part_lost(mount, lost))
        self._listener.changed(mount)
        log.info("mounted %s on %s in %.1f s", session.wish.backup.id, session.path, time.monotonic() - began)

    def _task(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- ending -----------------------------------------------------------------------------------------------

    async def unmount(self, mount: Mount, uid: int, *, force: bool) -> None:
        """Drop the claim of ``uid``; the last one, a caller without one, or ``force`` closes the mount.

        Raises errors.Busy, with every claim as it was, when somebody still reads.
        """
        if not force and uid in mount.claims and len(mount.claims) > 1:
            del mount.claims[uid]
            self._listener.changed(mount)
            try:
                await self._store.delete_claim(mount.id, uid)
            except errors.CatalogUnavailable as error:
                # The claim is dropped, which is what counts; its row goes with the mount's.
                log.warning("claim of uid %d on %s not struck out: %s", uid, mount.id, error)
            return
        await self.close(mount, f"unmounted by uid {uid}", force=force)

    async def close(self, mount: Mount, reason: str, *, force: bool = False) -> None:
        """End a mount: every end of every mount goes through here. Raises errors.Busy unless ``force``.

        The work is a task of ours: a caller that gives up does not leave a mount half closed.
        """
        while mount.ending is not None and not mount.ending.done():
            await asyncio.wait([mount.ending])
        if mount.id not in self._mounts:
            return
        mount.ending = self._task(self._end(mount, reason, force=force), f"end {mount.id}")
        await asyncio.shield(mount.ending)

    async def _end(self, mount: Mount, reason: str, *, force: bool) -> None:
        if mount.building is not None and not mount.building.done():
            if mount.session.state is not State.UNMOUNTING:
                mount.building.cancel()
            await asyncio.wait([mount.building])  # rolls back by itself
        if mount.id in self._mounts:
            await self._take_down(mount, force=force)
        log.info("unmounted %s: %s", mount.id, reason)

    async def _take_down(self, mount: Mount, *, force: bool) -> None:
        session = mount.session
        try:
            await (session.force() if force or session.lost.done() else session.close())
        except errors.RestoreError as error:
            log.info("not unmounting %s: %s", mount.id, error)
            raise
        except OSError as error:
            # What is left stays noted in the session; the next attempt goes on from there.
            session.state, session.error = State.FAILED, "a part of the mount could not be taken away"
            log.error("not unmounting %s: %s", mount.id, error)  # noqa: TRY400 - errno and path say it all
            raise errors.Failed("the mount could not be taken away whole; unmount it again") from None
        finally:
            self._listener.changed(mount)
        del self._mounts[mount.id]
        self._listener.removed(mount)
        try:
            await self._store.delete_mount(mount.id)
        except errors.CatalogUnavailable as error:
            # The mount is gone, which is what counts; a start deletes rows that nothing stands behind.
            log.warning("row of %s not deleted: %s", mount.id, error)

    def _part_lost(self, mount: Mount, lost: asyncio.Future[str]) -> None:
        if lost.cancelled() or mount.id not in self._mounts:
            return
        if mount.ending is not None and not mount.ending.done():
            # It is being closed; only if that is refused there is something left to do.
            mount.ending.add_done_callback(lambda _: self._part_lost(mount, lost))
            return
        mount.ending = self._task(self._fail(mount, lost.result()), f"fail {mount.id}")

    async def _fail(self, mount: Mount, reason: str) -> None:
        """Something below a mount ended by itself: free what is left; the object stays to tell the reason."""
        session = mount.session
        log.warning("mount %s has failed: %s", mount.id, reason)
        session.error = reason
        try:
            await session.force()
        except (OSError, errors.RestoreError) as error:
            # What is left stays noted in the session, for an unmount to go on from.
            log.error("not unmounting %s: %s", mount.id, error)  # noqa: TRY400 - errno and path say it all
        session.state = State.FAILED
        self._listener.changed(mount)
        try:
            await self._store.update_mount(mount.id, status=MountStatus.FAILED, error_message=reason)
        except (errors.CatalogUnavailable, errors.MountNotFound) as error:
            log.warning("row of %s not updated: %s", mount.id, error)

    async def stop(self) -> None:
        """End all mounts, by force where somebody still reads: the service is going down."""
        self._stopping = True
        await asyncio.gather(*map(self._stop, self))
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _stop(self, mount: Mount) -> None:
        try:
            await self.close(mount, "the service stops")
        except errors.RestoreError:
            # What force does not take away either goes with the service's mount namespace.
            with contextlib.suppress(errors.RestoreError):
                await self.close(mount, "the service stops", force=True)


def devices(session: Session) -> list[str]:
    """The block devices below a mount."""
    return [str(volume.device.path) for volume in session.volumes.values() if volume.device]


def filesystem_type(session: Session) -> str:
    """The type of the largest mounted volume, or an empty text."""
    mounted = [volume.found for volume in session.volumes.values() if volume.mounted]
    return max(mounted, key=lambda found: found.size).filesystem if mounted else ""


def _utc(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _check_ready(wish: Wish) -> None:
    if not wish.repository.enabled:
        raise errors.BackupNotReady("the backup's repository is disabled; enable it and try again")
    for what, status in (
        ("backup", wish.backup.status),
        *((f"disk {disk.index}", disk.status) for disk in wish.disks),
    ):
        if status != _COMPLETE:
            raise errors.BackupNotReady(f"the {what} is {status!r}; only a completed one can be mounted")


def _row(session: Session, config: Config) -> MountRow:
    """The wish, written down before anything is built."""
    wish = session.wish
    single = None if wish.all_disks else wish.disks[0]
    return MountRow(
        id=session.id,
        backup_id=wish.backup.id,
        backup_disk_id=single.id if single else None,
        disk_index=single.index if single else None,
        mount_path=str(config.mounts.directory / session.id),
        journal=wish.journal,
        created_at=_utc(session.created_at),
        last_accessed_at=_utc(session.created_at),
        expires_at=None,
    )


def _log_refusal(mount: Mount) -> Callable[[asyncio.Task[None]], None]:
    def log_refusal(building: asyncio.Task[None]) -> None:
        if not building.cancelled() and (error := building.exception()) is not None:
            log.warning("not mounting %s: %s", mount.session.wish.backup.id, error)

    return log_refusal
