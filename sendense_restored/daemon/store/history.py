"""Units of work on ``restore_events``: what happened, written once and read newest first.

Each function runs on the store's thread inside a transaction (see ``database.py``) and returns records only. The
order is that of writing, which a step of the wall clock does not change; only the age of an event is its time.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from . import cursors
from .models import RestoreEvent
from .records import ENDED, Event

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

_COLUMNS = tuple(name for name in Event.__dataclass_fields__ if name != "id")
_FIELDS = [RestoreEvent._meta.fields[name] for name in _COLUMNS]  # noqa: SLF001  # peewee's public face
# Few: making a statement holds the interpreter, and so the event loop, for some 40 us a row; running it does not.
_ROWS_AT_ONCE = 25


def add_events(events: Sequence[Event]) -> None:
    """Write events down in their order; ids that they bring do not count."""
    rows = [tuple(getattr(event, name) for name in _COLUMNS) for event in events]
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        RestoreEvent.insert_many(rows[start : start + _ROWS_AT_ONCE], fields=_FIELDS).execute()


def events(limit: int, cursor: str, mount_id: str | None) -> tuple[list[Event], str]:
    """A page of events, newest first, and the cursor of the next (``""`` at the end). Raises InvalidOption."""
    cursors.check_limit(limit)
    query = RestoreEvent.select()
    if mount_id is not None:
        query = query.where(RestoreEvent.mount_id == mount_id)
    if cursor:
        place = re.fullmatch(r"event:([0-9]{1,18})", cursors.decode(cursor, "events"))
        if place is None:
            raise cursors.foreign("events")
        query = query.where(RestoreEvent.id < int(place[1]))
    rows = list(query.order_by(RestoreEvent.id.desc()).limit(limit + 1))
    page = [Event(**{name: getattr(row, name) for name in _COLUMNS}, id=row.id) for row in rows[:limit]]
    return page, cursors.encode(f"event:{page[-1].id}") if len(rows) > limit else ""


def trim_events(keep: int, before: datetime) -> int:
    """Take away what is older than ``before``, and of the rest all but the newest ``keep``; how many that were."""
    gone = int(RestoreEvent.delete().where(RestoreEvent.at < before).execute())
    last = RestoreEvent.select(RestoreEvent.id).order_by(RestoreEvent.id.desc()).offset(keep).limit(1).first()
    if last is not None:
        gone += int(RestoreEvent.delete().where(RestoreEvent.id <= last.id).execute())
    return gone


def ended_mounts(since: datetime) -> dict[str, tuple[datetime, str]]:
    """The mounts that have ended since then: by id, when and why."""
    rows = RestoreEvent.select(RestoreEvent.mount_id, RestoreEvent.at, RestoreEvent.detail)
    rows = rows.where((RestoreEvent.what == ENDED) & (RestoreEvent.at >= since)).order_by(RestoreEvent.id)
    return {mount_id: (at, reason) for mount_id, at, reason in rows.tuples()}
