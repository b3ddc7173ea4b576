"""The history: who did what, when, and how it went; one line in the log and one row in the database for each.

``Events`` owns the rows that are not written yet. To record is to log and to queue, so it can be done anywhere and
waits for nothing; a task that lives as long as something is queued writes whatever has come up while it wrote the
last batch. A database that fails keeps the rows here, up to a bound, until the next event tries again; beyond the
bound rows are counted, and one event says how many are missing (the log has them all).

Texts come from guests and from other people. The row has a path as it is, in the text form of ``names``, so that it
can be asked for again; in the log, and in ``detail``, control characters are escaped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from sendense_restored import errors, names

from .lease import Holder
from .store import Event

if TYPE_CHECKING:
    from collections.abc import Callable

    from .store import Store

log = logging.getLogger(__name__)

_TRIM_EVERY = 4096  # rows, so that nobody fills the disk between two sweeps
MOST_QUEUED = 4096
"""Events that wait for the database."""
_MOST_AT_ONCE = 512  # rows of one transaction; between two of them others get their turn at the database
MOST_TEXT = 16 << 10
"""Bytes of a text: a path (the longest has 12 KiB in its text form), a detail, a mount's error."""
_MOST_NUMBER = 2**63 - 1
_LENGTHS = {"what": 32, "outcome": 64, "unit": 255, "on_behalf_of": 255, "mount_id": 36, "backup_id": 64}
OK, LOST, REFUSED = "ok", "lost", "refused"
_EXPECTED = {OK, errors.Cancelled.__name__}

ALIKE_EVERY = 60.0
"""Seconds in which one user gets one event for refusals of one action, and for failures of one kind on one mount."""


class Actor(NamedTuple):
    """Who does something: a user by uid, None for the service itself; on whose behalf; and from which unit.

    ``unit`` is what the process said to be when it was looked at: information, and nothing to decide by.
    """

    uid: int | None
    on_behalf_of: str = ""
    unit: str = ""

    @property
    def holder(self) -> Holder:
        """Whose claims these are; the service itself is root."""
        return Holder(self.uid or 0, self.on_behalf_of)

    def __str__(self) -> str:
        who = "the service" if self.uid is None else f"uid {self.uid}"
        unit = f" ({self.unit})" if self.unit else ""
        return names.displayable(who + unit + (f" on behalf of {self.on_behalf_of}" if self.on_behalf_of else ""))


SERVICE = Actor(None)


@dataclass
class _Alike:
    """Those that are alike since one of them became an event."""

    since: float
    alike: dict[str, Any]
    """What their events have in common."""
    about: str
    left_out: int = 0


class Events:
    """The history; ``close`` writes what is queued. ``unix`` and ``monotonic`` give the time in seconds.

    All methods are for the event loop's thread.
    """

    def __init__(
        self, store: Store, *, unix: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._unix, self._monotonic = unix, monotonic
        self._queue: deque[Event] = deque()
        self._lost = 0
        self._writing: asyncio.Task[None] | None = None
        self._failing = False
        self._bounds: tuple[int, float] | None = None
        self._since_trim = 0
        self._closed = False
        self._alike: dict[tuple[object, ...], _Alike] = {}  # the oldest first

    def record(
        self,
        what: str,
        *,
        actor: Actor,
        outcome: str = OK,
        mount_id: str = "",
        backup_id: str = "",
        path: str = "",
        detail: str = "",
        bytes: int | None = None,  # noqa: A002 - the column has this name
        size: int | None = None,
    ) -> None:
        """Log what happened and queue it for the database. Never waits, never raises.

        ``what`` is a participle ("mounted"), ``outcome`` is "ok" or the name of an error. ``path`` is a guest path in
        its text form. ``bytes`` left through a pipe, ``size`` is that of a file that was handed out; None where there
        is none. Texts are cut to what the columns hold.
        """
        event = Event(
            at=datetime.fromtimestamp(self._unix(), UTC),
            what=_short("what", what),
            outcome=_short("outcome", outcome),
            uid=actor.uid,
            unit=_short("unit", actor.unit),
            on_behalf_of=_short("on_behalf_of", actor.on_behalf_of),
            mount_id=_short("mount_id", mount_id),
            backup_id=_short("backup_id", backup_id),
            path=cut(path),
            detail=cut(names.displayable(cut(detail))),
            bytes=_number(bytes),
            size=_number(size),
        )
        _log(event, actor)
        if self._closed or len(self._queue) >= MOST_QUEUED:
            self._lost += 1
        else:
            self._queue.append(event)
            self._write_soon()

    def refused(self, actor: Actor, action: str, object: str, message: str) -> None:  # noqa: A002 - what it is about
        """Record that ``actor`` may not do ``action`` with ``object``; once a minute for one user and action.

        Further ones are counted, and the next event of that kind (or the first refusal of any, after the minute)
        tells how many there were.
        """
        self._seldom(
            (actor.uid, action),
            f"{action}: ",
            {"what": REFUSED, "actor": actor, "outcome": errors.NotAuthorized.__name__},
            detail=f"{action} on {object}: {message}" if object else f"{action}: {message}",
        )

    def failed(
        self, what: str, *, actor: Actor, outcome: str, mount_id: str, backup_id: str, path: str, detail: str
    ) -> None:
        """Record that something on a mount came to nothing, as ``record`` has it and in the same bounds.

        Alike are those of one actor on one mount with the same outcome.
        """
        alike = {"what": what, "actor": actor, "outcome": outcome, "mount_id": mount_id, "backup_id": backup_id}
        key = (actor.uid, actor.on_behalf_of, what, outcome, mount_id)
        self._seldom(key, "", alike, path=path, detail=detail)

    def _seldom(
        self, key: tuple[object, ...], about: str, alike: dict[str, Any], *, detail: str, path: str = ""
    ) -> None:
        self._settle_alike(self._monotonic() - ALIKE_EVERY)
        if (known := self._alike.get(key)) is not None:
            known.left_out += 1
            return
        self._alike[key] = _Alike(self._monotonic(), alike, about)
        self.record(**alike, path=path, detail=detail)

    def _settle_alike(self, until: float) -> None:
        """Tell how many were left out since the events up to then, and forget those."""
        for key, refusals in list(self._alike.items()):
            if refusals.since > until:
                return
            del self._alike[key]
            if refusals.left_out:
                self.record(**refusals.alike, detail=f"{refusals.about}{refusals.left_out} more within a minute")

    async def flush(self) -> None:
        """Wait until what was recorded so far is in the database, or the database has failed to take it."""
        self._write_soon()
        if self._writing is not None:
            await asyncio.wait([self._writing])

    async def close(self) -> None:
        """Write what is queued; what is recorded after that is only logged. May be called again."""
        if not self._closed:
            self._settle_alike(self._monotonic())
            self._closed = True
        await self.flush()
        if missing := len(self._queue) + self._lost:
            log.warning("%d events are not in the database, only in the log", missing)
            self._queue.clear()
            self._lost = 0

    async def trim(self, *, keep: int, older: float) -> int:
        """Delete all but the newest ``keep`` events, and those ``older`` than so many seconds; how many that were.

        From then on it is done again whenever many have come. Raises errors.CatalogUnavailable.
        """
        self._bounds, self._since_trim = (keep, older), 0
        self._settle_alike(self._monotonic() - ALIKE_EVERY)  # nobody may try again for long
        return await self._store.trim_events(keep, datetime.fromtimestamp(self._unix() - older, UTC))

    def _write_soon(self) -> None:
        if self._queue and (self._writing is None or self._writing.done()):
            self._writing = asyncio.create_task(self._write(), name="write events")
            self._writing.add_done_callback(_report)

    async def _write(self) -> None:
        while self._queue:
            batch = [self._queue[place] for place in range(min(len(self._queue), _MOST_AT_ONCE))]
            try:
                await self._store.add_events(batch)
            except errors.CatalogUnavailable as error:
                if not self._failing:
                    self._failing = True
                    log.warning("keeping up to %d events for later: %s", MOST_QUEUED, error)
                return
            for _ in batch:
                self._queue.popleft()
            self._since_trim += len(batch)
            if self._bounds is not None and self._since_trim >= _TRIM_EVERY:
                with contextlib.suppress(errors.CatalogUnavailable):  # the sweep tries again
                    await self.trim(keep=self._bounds[0], older=self._bounds[1])
            if self._failing:
                self._failing = False
                log.info("writing events again")
            if self._lost and not self._closed:
                lost, self._lost = self._lost, 0
                self.record(
                    LOST,
                    actor=SERVICE,
                    outcome=errors.CatalogUnavailable.__name__,
                    detail=f"{lost} events are missing here; the log has them",
                )


def _short(column: str, text: str) -> str:
    """``text`` as a column takes it: no longer, and nothing that a database or the bus cannot hold."""
    return _clean(text[: _LENGTHS[column]])[: _LENGTHS[column]]


def cut(text: str) -> str:
    """A text as every database takes it, without the end of one that is too long."""
    encoded = _clean(text[:MOST_TEXT]).encode()
    if len(text) <= MOST_TEXT and len(encoded) <= MOST_TEXT:
        return encoded.decode()
    return encoded[: MOST_TEXT - 3].decode(errors="ignore") + "…"


def _clean(text: str) -> str:
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\x00")


def _number(value: int | None) -> int | None:
    return None if value is None else min(value, _MOST_NUMBER)


def _log(event: Event, actor: Actor) -> None:
    """One line, and its parts as fields (see ``journal.py``)."""
    about = " of ".join(filter(None, [event.path, event.mount_id or event.backup_id]))
    counts = [(event.bytes, "out"), (event.size, "offered")]
    good = event.outcome == OK
    line = "".join(
        [
            "" if good or event.what in {LOST, REFUSED} else "not ",
            f"{event.what} {about}".rstrip(),
            f" for {actor}",
            *(f", {number} bytes {how}" for number, how in counts if number is not None),
            *(f": {said}" for said in ("" if good else event.outcome, event.detail) if said),
        ]
    )
    parts = {
        "what": event.what,
        "outcome": event.outcome,
        "caller_uid": event.uid,
        "unit": event.unit,
        "on_behalf_of": event.on_behalf_of,
        "mount_id": event.mount_id,
        "backup_id": event.backup_id,
        "path": event.path,
        "bytes": event.bytes,
        "size": event.size,
    }
    fields = {name: names.displayable(str(value)) for name, value in parts.items() if value not in {None, ""}}
    level = logging.INFO if event.outcome in _EXPECTED else logging.WARNING
    log.log(level, "%s", names.displayable(line), extra={"fields": fields})


def _report(writing: asyncio.Task[None]) -> None:
    """A bug in writing must not go unseen; the events stay queued."""
    if not writing.cancelled() and (bug := writing.exception()) is not None:
        log.critical("events cannot be written", exc_info=bug)
