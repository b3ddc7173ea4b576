"""How the schema comes to be: numbered steps, each applied once and written down in the marker table.

A step is frozen SQL and is never edited after a release: a change of a table is a new step. A test compares what the
steps build with what ``models.py`` expects. The marker table also tells our tables from others of the same name,
which are never touched. The steps are each engine's own: ``migrations_sqlite.py``, ``migrations_mysql.py``.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .models import table_of
from .records import StoreError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    import peewee

log = logging.getLogger(__name__)

MARKER = "restore_migrations"
_CREATED = re.compile(r"CREATE TABLE (\w+)")


@dataclass(frozen=True)
class Migration:
    """One step; ``version`` counts from 1 without a gap."""

    version: int
    what: str
    statements: tuple[str, ...]


def names_of(models: Iterable[type[peewee.Model]]) -> set[str]:
    """The names of tables."""
    return {table_of(model) for model in models}


def refuse_newer(found: int, migrations: Sequence[Migration]) -> None:
    """Raises StoreError for a schema that a newer release has made."""
    if found > migrations[-1].version:
        raise StoreError(
            f"the database has schema version {found}, this release knows {migrations[-1].version}; "
            "install the newer release again or restore the database from before the upgrade"
        )


def refuse_foreign(tables: Iterable[str]) -> None:
    """Raises StoreError if there are tables with names of ours, in a database without the marker."""
    if foreign := sorted(tables):
        raise StoreError(
            f"the database holds tables that this service did not make ({', '.join(foreign)}); "
            "set database.url to a database of its own"
        )


def refuse_incomplete(
    migrations: Sequence[Migration], taken: Collection[int], there: Collection[str], remedy: str
) -> None:
    """Raises StoreError if our tables that are ``there`` are not those of the steps that were ``taken``.

    For a database with the marker: somebody has emptied that, or dropped other tables alone.
    """
    if there and not taken:
        raise StoreError(f"{MARKER} is empty, so nobody knows what the tables are; {remedy}")
    made = {
        name
        for migration in migrations
        if migration.version in taken
        for statement in migration.statements
        for name in _CREATED.findall(statement)
    }
    if missing := sorted(made.difference(there, {MARKER})):
        raise StoreError(f"tables that the service has made are missing ({', '.join(missing)}); {remedy}")


def applied(migration: Migration) -> None:
    """Tell of a step that was taken."""
    log.info("migrated the database to version %d: %s", migration.version, migration.what)
