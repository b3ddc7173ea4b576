"""The foreign key from our mounts to the appliance's backups: a backup that leaves the catalogue takes them along.

It can be where both are on one server, in one database or two, and our account may refer to the appliance's table
(REFERENCES). It is made and taken away at each start, because where the catalogue is can change in between: one to
another catalogue would refuse our mounts. Our column takes on the collation of theirs, without which InnoDB refuses.

The row of a mount that stands may vanish by it at any moment; the sweep closes that mount, as it does where there is
no reference. So all that is lost without one is that the rows are gone at once.
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import peewee

from sendense_restored.errors import CatalogUnavailable

from .engine import here
from .migrations_mysql import collation_of
from .models import BackupJob, RestoreMount, table_of
from .mysql_errors import LOST, code_of, said

if TYPE_CHECKING:
    from .database import Database

log = logging.getLogger(__name__)

_NAME = "restore_mounts_backup_job"
_OURS, _THEIRS = table_of(RestoreMount), table_of(BackupJob)


@dataclass(frozen=True)
class _Target:
    """The column that is referred to; a collation is one of a character set."""

    schema: str
    charset: str
    collation: str


async def set_up(own: Database, catalogue: Database | None, schema: str) -> str:
    """Have our mounts refer to the ``catalogue`` if that can be; why it cannot, or an empty text.

    Both are databases of MySQL servers; ``schema`` is the name of the catalogue's. None: it is none of those. Raises
    CatalogUnavailable if our own fails.
    """
    if catalogue is None:
        await own.change(_refer, None)
        return "the catalogue and our records are not on one server"
    try:
        same = await _on_one_server(own, catalogue)
        target = await catalogue.read(_target) if same else None
    except CatalogUnavailable:
        # It stays as it is, unless it is to another one.
        await own.change(_keep_only, schema)
        return "the catalogue could not be read at the start"
    if not same:
        await own.change(_refer, None)
        return "the catalogue and our records are not on one server"
    if target is None:
        await own.change(_refer, None)
        return f"the catalogue has no table {_THEIRS} whose id is text"
    return await own.change(_refer, target)


async def _on_one_server(own: Database, catalogue: Database) -> bool:
    """Whether a lock that one connection holds is seen by the other: names of hosts prove nothing."""
    name = f"sendense-restore {uuid.uuid4().hex}"
    await own.change(_ask, "SELECT GET_LOCK(%s, 0)", name)
    try:
        return await catalogue.read(_ask, "SELECT IS_USED_LOCK(%s)", name) is not None
    finally:
        await own.change(_ask, "SELECT RELEASE_LOCK(%s)", name)


def _ask(query: str, *parameters: str) -> object:
    """The first value of the first row, or None."""
    row = here().execute_sql(query, parameters).fetchone()
    return None if row is None else row[0]


def _target() -> _Target | None:
    """The column of this thread's catalogue."""
    row = (
        here()
        .execute_sql(
            "SELECT table_schema, character_set_name, collation_name FROM information_schema.columns"
            " WHERE table_schema = DATABASE() AND table_name = %s AND column_name = 'id'"
            " AND character_set_name IS NOT NULL",
            (_THEIRS,),
        )
        .fetchone()
    )
    return None if row is None else _Target(*row)


def _references() -> list[tuple[str, str, str]]:
    """The name of each reference of the column there is, and the schema and table that it refers to."""
    found = here().execute_sql(
        "SELECT constraint_name, referenced_table_schema, referenced_table_name"
        " FROM information_schema.key_column_usage WHERE table_schema = DATABASE() AND table_name = %s"
        " AND column_name = 'backup_id' AND referenced_table_name IS NOT NULL",
        (_OURS,),
    )
    return [(name, schema, table) for name, schema, table in found.fetchall()]


def _drop(name: str) -> None:
    """Take a reference away; the column is again like all others of ours."""
    here().execute_sql(
        f"ALTER TABLE {_OURS} DROP FOREIGN KEY {_quoted(name)},"
        f" MODIFY backup_id VARCHAR(64) CHARACTER SET utf8mb4 COLLATE {collation_of(here())} NOT NULL"
    )


def _may_refer(target: _Target) -> bool:
    """Whether the account was granted REFERENCES. MariaDB itself would take any right to the table for it."""
    user, _, host = str(_ask("SELECT CURRENT_USER()")).rpartition("@")
    granted = "grantee = %s AND privilege_type = 'REFERENCES'"
    grantee = f"'{user}'@'{host}'"
    return any(
        _ask(f"SELECT 1 FROM information_schema.{view} WHERE {granted}{where} LIMIT 1", grantee, *parameters)  # noqa: S608
        for view, where, parameters in (
            ("user_privileges", "", ()),
            ("schema_privileges", " AND %s LIKE table_schema", (target.schema,)),  # a grant may be for a pattern
            ("table_privileges", " AND table_schema = %s AND table_name = %s", (target.schema, _THEIRS)),
        )
    )


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _keep_only(schema: str) -> None:
    for name, referred, _ in _references():
        if referred != schema:
            _drop(name)


def _refer(target: _Target | None) -> str:
    """Have this thread's mounts refer to ``target``, or to nothing; why it cannot be, or an empty text."""
    kept = False
    for name, schema, table in _references():
        if target is not None and (schema, table) == (target.schema, _THEIRS) and _may_refer(target):
            kept = True
        else:
            _drop(name)
    if target is None or kept:
        return ""
    if not _may_refer(target):
        return f"the account may not refer to {target.schema}.{_THEIRS}; grant REFERENCES on it if that is wanted"
    # Both in one statement: it is refused as a whole.
    statement = (
        f"ALTER TABLE {_OURS} MODIFY backup_id VARCHAR(64)"
        f" CHARACTER SET {_quoted(target.charset)} COLLATE {_quoted(target.collation)} NOT NULL,"
        f" ADD CONSTRAINT {_NAME} FOREIGN KEY (backup_id)"
        f" REFERENCES {_quoted(target.schema)}.{_THEIRS} (id) ON DELETE CASCADE"
    )
    try:
        here().execute_sql(statement)
    except peewee.DatabaseError as error:
        if code_of(error) in LOST:
            raise
        return f"the server refuses it: {said(error)}"
    return ""
