"""What became of mounts that are gone, for a day: their callers are told why, and not just that there is nothing.

So are those of mounts that are to be made again and cannot be yet.
"""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sendense_restored import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .host.clock import Clock

REMEMBERED = 86400.0
"""Seconds."""
_MOST = 10_000


class Ended:
    """Ids of mounts that ended, with the reason."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ended: dict[str, tuple[float, str]] = {}  # in the order of their end: clock, reason
        self.waiting: frozenset[str] = frozenset()
        """Mounts of an earlier daemon that nothing can be said of: what they are is in a catalogue that is away."""

    def add(self, mount_id: str, reason: str) -> None:
        """A mount has ended just now."""
        self._put(mount_id, self._clock.now(), reason)

    def load(self, earlier: Mapping[str, tuple[datetime, str]]) -> None:
        """What an earlier daemon has written down."""
        since = self._clock.now() - self._clock.unix()
        for mount_id, (at, reason) in sorted(earlier.items(), key=lambda each: each[1][0]):
            self._put(mount_id, at.timestamp() + since, reason)

    def _put(self, mount_id: str, at: float, reason: str) -> None:
        self._ended[mount_id] = (at, reason)
        for oldest in list(itertools.islice(self._ended, 2)):  # one comes and two may go, so that they become fewer
            if len(self._ended) > _MOST or self._is_forgotten(self._ended[oldest][0]):
                del self._ended[oldest]

    def _is_forgotten(self, at: float) -> bool:
        return at < self._clock.now() - REMEMBERED

    def knows(self, mount_id: str) -> bool:
        """Whether that mount has ended, as far as it is remembered."""
        return mount_id in self._ended

    def error(self, mount_id: str) -> errors.RestoreError:
        """What somebody who asks for that mount is told."""
        if mount_id in self.waiting:
            return errors.Unavailable("the mount is not made again yet, as the catalogue cannot be read; try again")
        if mount_id not in self._ended or self._is_forgotten(self._ended[mount_id][0]):
            return errors.MountNotFound("there is no such mount; list the mounts to see yours")
        at, reason = self._ended[mount_id]
        when = datetime.fromtimestamp(self._clock.unix() - (self._clock.now() - at), UTC)
        return errors.Expired(f"the mount has ended ({when:%Y-%m-%d %H:%M} UTC): {reason}; mount the backup again")
