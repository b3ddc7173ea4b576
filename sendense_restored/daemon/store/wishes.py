"""Units of work on our own tables: the mounts that are wished for, and who claims them.

Each function runs on the store's thread inside a transaction (see ``database.py``) and returns records only. The
claims of a mount are deleted with it here, because foreign keys are not always on (``sqlite.py``); and where a
mount's row refers to its backup, it may end with that at any time (``mysql_reference.py``).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import peewee

from sendense_restored.errors import BackupNotFound, MountNotFound

from .engine import here
from .models import RestoreClaim, RestoreMount
from .records import ClaimRow, MountChanges, MountRow, MountStatus

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sendense_restored.errors import RestoreError

_COLUMNS = tuple(name for name in MountRow.__dataclass_fields__ if name != "status")
_CHANGEABLE = frozenset(MountChanges.__annotations__)


def _unknown() -> MountNotFound:
    return MountNotFound("the mount is no longer known; its backup may have been removed")


@contextlib.contextmanager
def _referring(missing: RestoreError) -> Iterator[None]:
    """Within, a row is written that refers to another one. Raises ``missing`` if that is not there (any more)."""
    dangling = False
    try:
        yield
    except peewee.IntegrityError as error:
        dangling = here().is_dangling(error)
        if not dangling:
            raise
    if dangling:  # out here, so that nothing holds on to the failed statement
        raise missing


def mount_rows() -> list[MountRow]:
    """All rows, the oldest first."""
    rows = RestoreMount.select().order_by(RestoreMount.created_at, RestoreMount.id)
    return [
        MountRow(**{name: getattr(row, name) for name in _COLUMNS}, status=MountStatus(row.status)) for row in rows
    ]


def insert_mount(row: MountRow, claims: Sequence[ClaimRow] = ()) -> None:
    """Write a mount and the claims on it down.

    Raises BackupNotFound if the row refers to a backup that is not, or no longer, in the catalogue.
    """
    missing = BackupNotFound(f"there is no backup {row.backup_id[:64]!r}; list the backups to see their ids")
    with _referring(missing):
        RestoreMount.create(**{name: getattr(row, name) for name in _COLUMNS}, status=str(row.status))
    for claim in claims:
        put_claim(claim)


def update_mount(mount_id: str, changes: Mapping[str, object]) -> None:
    """Change columns of a mount. Raises MountNotFound: the row ends when its backup leaves the catalogue."""
    if unknown := changes.keys() - _CHANGEABLE:
        raise TypeError(f"a mount's row has no column to change named {', '.join(sorted(unknown))}")
    values = {name: str(value) if name == "status" else value for name, value in changes.items()}
    if not values:
        there = RestoreMount.select(RestoreMount.id).where(RestoreMount.id == mount_id).exists()
    else:
        there = RestoreMount.update(**values).where(RestoreMount.id == mount_id).execute()
    if not there:
        raise _unknown()


def delete_mount(mount_id: str) -> bool:
    """Take a mount and its claims away; whether there was one."""
    RestoreClaim.delete().where(RestoreClaim.mount == mount_id).execute()
    return bool(RestoreMount.delete().where(RestoreMount.id == mount_id).execute())


def delete_all_mounts() -> int:
    """Take all mounts and claims away; how many mounts there were."""
    RestoreClaim.delete().execute()
    return int(RestoreMount.delete().execute())


def wished() -> list[tuple[MountRow, tuple[ClaimRow, ...]]]:
    """All mounts with their claims, each the oldest first: what a start has to bring back."""
    held: dict[str, list[ClaimRow]] = {}
    for claim in _claims(RestoreClaim.select()):
        held.setdefault(claim.mount_id, []).append(claim)
    return [(row, tuple(held.get(row.id, ()))) for row in mount_rows()]


def renew(mount_id: str, claims: Sequence[ClaimRow], changes: Mapping[str, object]) -> None:
    """Change columns of a mount, and write down that these are the claims on it. Raises MountNotFound."""
    update_mount(mount_id, changes)
    RestoreClaim.delete().where(RestoreClaim.mount == mount_id).execute()
    for claim in claims:
        put_claim(claim)


def claims(mount_id: str) -> list[ClaimRow]:
    """The claims on a mount, the oldest first."""
    return _claims(RestoreClaim.select().where(RestoreClaim.mount == mount_id))


def _claims(rows: peewee.ModelSelect) -> list[ClaimRow]:
    return [
        ClaimRow(row.mount_id, row.uid, row.on_behalf_of, row.since, row.expires_at, row.idle_timeout)
        for row in rows.order_by(RestoreClaim.since, RestoreClaim.uid, RestoreClaim.on_behalf_of)
    ]


def _is_claim(mount_id: str, uid: int, on_behalf_of: str) -> peewee.Expression:
    return (RestoreClaim.mount == mount_id) & (RestoreClaim.uid == uid) & (RestoreClaim.on_behalf_of == on_behalf_of)


def put_claim(claim: ClaimRow) -> None:
    """Write a claim down; it takes the place of one of the same uid on the same behalf. Raises MountNotFound."""
    if not RestoreMount.select(RestoreMount.id).where(RestoreMount.id == claim.mount_id).exists():
        raise _unknown()
    with _referring(_unknown()):
        RestoreClaim.replace(
            mount=claim.mount_id,
            uid=claim.uid,
            on_behalf_of=claim.on_behalf_of,
            since=claim.since,
            expires_at=claim.expires_at,
            idle_timeout=claim.timeout,
        ).execute()


def delete_claim(mount_id: str, uid: int, on_behalf_of: str) -> bool:
    """Take a claim away; whether there was one."""
    return bool(RestoreClaim.delete().where(_is_claim(mount_id, uid, on_behalf_of)).execute())
