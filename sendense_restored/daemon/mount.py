"""A mount as those see it who hold it: a session with the claims on it, and what leaves through it.

Every request comes through here with the one who asks (``Actor``), counts as use of their claims, and is written into
the history when something leaves the house: files that were handed out or asked for in vain, streams that ran. A
stream is followed by a task of ours until its end, which keeps the mount from expiring. ``Mounts`` owns mounts and
ends them.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Protocol

from sendense_restored import errors, names

from .session import State

U64 = 2**64 - 1

if TYPE_CHECKING:
    from sendense_restored.config import Config
    from sendense_restored.reader.protocol import FileInfo, Filters, Listing

    from .events import Actor, Events
    from .host.clock import Clock, Timer
    from .host.reader import Stream
    from .lease import Lease
    from .session import Session
    from .volume import Machine

_ANNOUNCED_PART = 0.1
"""Signals tell of a new time of expiry when it has moved by this part of what is left; reading tells it exactly."""


class Listener(Protocol):
    """Hears of mounts that come, change and go; the D-Bus side."""

    def added(self, mount: Mount) -> None:
        """A mount has begun."""

    def changed(self, mount: Mount) -> None:
        """Its state, its claims or what it holds may be others than before."""

    def removed(self, mount: Mount) -> None:
        """It is gone."""


class House(Protocol):
    """What a mount needs of the one who owns it; ``Mounts`` is that."""

    config: Config
    machine: Machine
    events: Events
    clock: Clock

    def changed(self, mount: Mount) -> None:
        """What others see of the mount, or when it is due, may have changed."""

    def used(self, mount: Mount) -> None:
        """Somebody used it."""


class Mount:
    """A session with those who hold it, and the tasks that build and end it."""

    def __init__(self, session: Session, lease: Lease, house: House) -> None:
        self.session = session
        self.lease = lease
        self.building: asyncio.Task[None] | None = None
        self.ending: asyncio.Task[None] | None = None
        self.timer: Timer | None = None
        """When it is looked at next; ``Mounts`` sets it."""
        self.unwanted = False
        """Whether it is to go before it is finished: whatever builds it must not try again."""
        self.written = False
        """Whether its row was given to the store."""
        self.begun_at = self.written_at = house.clock.now()
        """When it was asked for, or taken in again after a start; and when its use was last written down (clock)."""
        self.made_at = 0.0
        """When it was finished (clock)."""
        self.failed_at = 0.0
        """When it failed (clock)."""
        self.spared_until = 0.0
        """Until when it is not closed in favour of another (clock): it was tried, and somebody read."""
        self.bytes_out = 0
        self._house = house
        self._streams: set[asyncio.Task[None]] = set()
        self._beginning = 0
        self._announced = lease.expires
        self._open_files = 0
        """As counted last, and one more for each that was asked for since: never too few."""

    @property
    def id(self) -> str:
        """The mount's UUID."""
        return self.session.id

    @property
    def streams(self) -> int:
        """How many streams run."""
        return len(self._streams) + self._beginning

    @property
    def busy(self) -> bool:
        """Whether somebody is known to read it: a stream runs, or the last unmount met an open file."""
        return self.streams > 0 or self.session.busy

    @property
    def expires_at(self) -> int:
        """When it ends if nobody uses it (unix seconds); 0 of one that has failed."""
        if self.session.state is State.FAILED:
            return 0
        return self.unix(self.lease.expires)

    @property
    def last_accessed_at(self) -> int:
        """When anybody last used it (unix seconds)."""
        return self.unix(self.lease.used)

    def unix(self, when: float) -> int:
        """A time of the clock in unix seconds, for people."""
        clock = self._house.clock
        return int(clock.unix() + when - clock.now())

    @property
    def devices(self) -> list[str]:
        """The block devices of its volumes."""
        return [str(volume.device.path) for volume in self.session.volumes.values() if volume.device]

    @property
    def closing(self) -> asyncio.Task[None] | None:
        """The task that takes it away just now, if one does; it may be refused, and the mount stay."""
        if self.ending is not None and not self.ending.done():
            return self.ending
        rolling_back = self.session.state is State.UNMOUNTING
        return self.building if rolling_back and self.building is not None and not self.building.done() else None

    async def built(self) -> None:
        """Wait until nothing builds it any more."""
        if self.building is not None:
            await asyncio.wait([self.building])

    # --- requests -----------------------------------------------------------------------------------------------

    def touch(self, actor: Actor) -> None:
        """Count as use by ``actor``."""
        self.lease.touch(actor.holder.uid, actor.on_behalf_of)
        expires, clock = self.lease.expires, self._house.clock
        if abs(expires - self._announced) > _ANNOUNCED_PART * max(expires - clock.now(), 0.0):
            self._announced = expires
            self._house.changed(self)
        self._house.used(self)

    async def list(self, actor: Actor, path: tuple[bytes, ...], *, limit: int, cursor: str) -> Listing:
        """A page of a directory; ``()`` lists the volumes."""
        self.touch(actor)
        return await self.session.list(path, limit=limit, cursor=cursor)

    async def stat(self, actor: Actor, path: tuple[bytes, ...]) -> FileInfo:
        """What is known of one file."""
        self.touch(actor)
        return await self.session.stat(path)

    async def open(self, actor: Actor, path: str, *, stream: str | None = None) -> tuple[int, FileInfo]:
        """A read-only descriptor of a regular file, or of its alternate ``stream``, which belongs to the caller.

        Both names are in text form, as they were asked for: an attempt that comes to nothing is in the history as
        well. Raises LimitReached, TooLarge, InvalidPath and InvalidOption besides.
        """
        self.touch(actor)
        about = "" if stream is None else f"stream {stream}"
        try:
            parsed = names.parse_path(path)
            name = b"" if stream is None else names.parse_stream(stream)
            await self._room_for_a_file()
            self._open_files += 1  # before it is handed out: others may ask meanwhile
            descriptor, info = await self.session.open(parsed, stream=name, most=self._house.config.limits.file_bytes)
        except errors.RestoreError as error:
            detail = f"{about}: {error.message}" if about else error.message
            self._house.events.failed(
                "opened",
                actor=actor,
                outcome=type(error).__name__,
                mount_id=self.id,
                backup_id=self.session.wish.backup.id,
                path=path,
                detail=detail,
            )
            raise
        self._record("opened", actor, parsed, detail=about, size=info.size)
        return descriptor, info

    async def _room_for_a_file(self) -> None:
        """Who has how many files open is nowhere told; the kernel is asked when it may be too many."""
        most = self._house.config.limits.open_files
        if self._open_files < most:
            return
        found = await self._house.machine.holders(self.session.mount_ids)
        self._open_files = sum(each.count for each in found)
        if self._open_files >= most:
            raise errors.LimitReached(
                f"{self._open_files} files of this mount are open, and {most} may be; close some and try again"
            )

    async def open_listing(self, actor: Actor, path: tuple[bytes, ...], filters: Filters) -> int:
        """The reading end of a pipe that a directory is written to; it belongs to the caller.

        Closing it cancels the stream. Raises LimitReached besides what ``list`` raises.
        """
        self.touch(actor)
        most = self._house.config.limits.listings
        if self.streams >= most:
            raise errors.LimitReached(f"{most} listings of this mount run already; read one to its end or close it")
        stall = self._house.config.mounts.idle_timeout
        try:
            ours, theirs = os.pipe2(os.O_CLOEXEC)
        except OSError:
            raise errors.LimitReached("the service is short of file descriptors; try again in a moment") from None
        self._beginning += 1
        try:
            with self.lease.hold(actor.holder.uid, actor.on_behalf_of):
                stream = await self.session.stream(path, filters, theirs, stall=stall)
                following = self._following(stream, actor, path)
                task = asyncio.create_task(following, name=f"follow a listing of {self.id}")
            self._streams.add(task)
            task.add_done_callback(self._stream_ended)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
            self._beginning -= 1
            self._house.changed(self)  # it was held, and maybe is not any more
        return ours

    async def _following(self, stream: Stream, actor: Actor, path: tuple[bytes, ...]) -> None:
        with self.lease.hold(actor.holder.uid, actor.on_behalf_of):
            try:
                end = await stream.end
            except errors.RestoreError as error:
                self._record("listed", actor, path, outcome=type(error).__name__, detail=error.message)
                return
        self.bytes_out = min(self.bytes_out + end.bytes, U64)
        outcome = "ok" if end.complete else "Cancelled"
        detail = f"{end.entries} entries, {end.errors} errors" + (", truncated" if end.truncated else "")
        self._record("listed", actor, path, outcome=outcome, detail=detail, bytes_=end.bytes)

    def _stream_ended(self, task: asyncio.Task[None]) -> None:
        self._streams.discard(task)
        self._house.changed(self)

    async def streams_ended(self, seconds: float | None = None) -> None:
        """Wait until no stream is followed any more, or time is up; they end with the reader at the latest."""
        if self._streams:
            await asyncio.wait(self._streams, timeout=seconds)

    def _record(
        self,
        what: str,
        actor: Actor,
        path: tuple[bytes, ...],
        *,
        outcome: str = "ok",
        detail: str = "",
        bytes_: int | None = None,
        size: int | None = None,
    ) -> None:
        self._house.events.record(
            what,
            actor=actor,
            outcome=outcome,
            mount_id=self.id,
            backup_id=self.session.wish.backup.id,
            path=names.format_path(path),
            detail=detail,
            bytes=bytes_,
            size=size,
        )
