"""Records that tests of the store begin with."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sendense_restored import database_url
from sendense_restored.daemon.store import Event, MountRow, Store

NOON = datetime(2025, 3, 1, 12, tzinfo=UTC)
GIB = 1 << 30


def mount(mount_id: str = "m1", backup_id: str = "b1", **columns: Any) -> MountRow:  # noqa: ANN401  # those of MountRow
    """A row of a mount."""
    row = MountRow(
        id=mount_id,
        backup_id=backup_id,
        backup_disk_id=1,
        disk_index=0,
        mount_path=f"/mnt/{mount_id}",
        journal="replay",
        created_at=NOON,
        last_accessed_at=NOON,
        expires_at=NOON + timedelta(hours=1),
    )
    return replace(row, **columns)


def event(number: int, **columns: Any) -> Event:  # noqa: ANN401  # those of Event
    """An event, so many seconds after noon."""
    return replace(Event(NOON + timedelta(seconds=number), "mounted", uid=number), **columns)


async def open_store(url: str, catalog_url: str | None = None, **options: Any) -> Store:  # noqa: ANN401  # of Store.open
    """The store, from URLs as the configuration has them."""
    return await Store.open(
        database_url.parse(url), None if catalog_url is None else database_url.parse(catalog_url), **options
    )
