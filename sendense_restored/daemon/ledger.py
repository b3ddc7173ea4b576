"""What is written down of mounts: their rows and claims, and what happened to them.

The row is the wish and the claims go with it. What has to be there before something is done raises if it cannot be
written; all else holds nevertheless, is logged, and the sweep writes it later. What was asked of the database first
is done first, so who changes a mount and has that written, without a pause in between, is never overtaken.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sendense_restored import errors

from .events import OK, SERVICE, cut
from .store import ClaimRow, MountRow, MountStatus

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from typing import Unpack

    from .events import Actor, Events
    from .lease import Holder
    from .mount import Mount
    from .session import Session
    from .store import MountChanges, Store

log = logging.getLogger(__name__)


class Ledger:
    """Writes for ``Mounts``; owns nothing."""

    def __init__(self, store: Store, events: Events) -> None:
        self._store, self._events = store, events

    async def begin(self, mount: Mount) -> None:
        """Write down the wish, before anything is built. Raises CatalogUnavailable, BackupNotFound."""
        mount.written = True
        await self._store.insert_mount(_row(mount), _claims(mount))

    async def finish(self, mount: Mount) -> None:
        """Write down what came of it, and that its time begins now. Raises CatalogUnavailable, MountNotFound."""
        await self._renew(mount, **_columns(mount))

    async def again(self, mount: Mount) -> None:
        """Write all of it anew: somebody took the row of a finished mount away though its backup is there."""
        await _quietly(self._store.insert_mount(_row(mount), _claims(mount)), f"row of {mount.id}")
        await self.note(mount, **_columns(mount))

    async def note(self, mount: Mount, **changes: Unpack[MountChanges]) -> None:
        """Write down what has changed of a mount."""
        if "error_message" in changes:
            changes["error_message"] = cut(changes["error_message"])  # it may quote a tool, or an image
        if mount.written:
            await _quietly(self._store.update_mount(mount.id, **changes), f"state of {mount.id}")

    async def renew(self, mount: Mount) -> None:
        """Write down when a mount was used, and when it and its claims end."""
        await _quietly(self._renew(mount), f"use of {mount.id}")

    async def _renew(self, mount: Mount, **changes: Unpack[MountChanges]) -> None:
        changes["last_accessed_at"], changes["expires_at"] = _utc(mount.last_accessed_at), _utc(mount.expires_at)
        await self._store.renew(mount.id, _claims(mount), **changes)

    async def end(self, mount: Mount) -> None:
        """Delete what is written of a mount that is gone."""
        await _quietly(self._store.delete_mount(mount.id), f"end of {mount.id}")

    async def claim(self, mount: Mount, holder: Holder) -> None:
        """Write down the claim of a holder, if the mount itself is; else it goes with that."""
        if mount.written:
            await _quietly(self._store.put_claim(_claim(mount, holder)), f"claim of {holder}")

    async def unclaim(self, mount: Mount, holders: Sequence[Holder]) -> None:
        """Strike out claims that were dropped, but for those that came back meanwhile."""
        for holder in holders:
            if holder not in mount.lease.claims:
                await _quietly(self._store.delete_claim(mount.id, *holder), f"dropped claim of {holder}")

    def record(
        self,
        what: str,
        mount: Mount,
        *,
        actor: Actor = SERVICE,
        outcome: str = OK,
        detail: str = "",
        bytes_: int | None = None,
    ) -> None:
        """Write into the history what happened to a mount; see ``Events.record``."""
        backup = mount.session.wish.backup.id
        self._events.record(
            what, actor=actor, outcome=outcome, mount_id=mount.id, backup_id=backup, detail=detail, bytes=bytes_
        )


def filesystem_type(session: Session) -> str:
    """The type of the largest mounted volume, or an empty text."""
    mounted = [volume.found for volume in session.volumes.values() if volume.mounted]
    return max(mounted, key=lambda found: found.size).filesystem if mounted else ""


async def _quietly(writing: Coroutine[None, None, object], what: str) -> None:
    try:
        await writing
    except (errors.CatalogUnavailable, errors.BackupNotFound, errors.MountNotFound) as error:
        log.warning("%s is not written down: %s", what, error)


def _row(mount: Mount) -> MountRow:
    wish = mount.session.wish
    single = None if wish.all_disks else wish.disks[0]
    return MountRow(
        id=mount.id,
        backup_id=wish.backup.id,
        backup_disk_id=single.id if single else None,
        disk_index=single.index if single else None,
        mount_path=str(mount.session.path),
        journal=wish.journal,
        created_at=_utc(mount.session.created_at),
        last_accessed_at=_utc(mount.last_accessed_at),
        expires_at=_utc(mount.expires_at),
    )


def _columns(mount: Mount) -> MountChanges:
    """What the row says of a finished mount."""
    return {
        "status": MountStatus.MOUNTED,
        "nbd_device": next(iter(mount.devices), ""),
        "filesystem_type": filesystem_type(mount.session),
        "options": {"devices": mount.devices},
    }


def _claims(mount: Mount) -> list[ClaimRow]:
    return [_claim(mount, holder) for holder in mount.lease.claims]


def _claim(mount: Mount, holder: Holder) -> ClaimRow:
    claim = mount.lease.claims[holder]
    expires = mount.unix(mount.lease.expiry(claim))
    return ClaimRow(mount.id, *holder, _utc(claim.since), _utc(expires), claim.timeout)


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
