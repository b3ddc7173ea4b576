"""From two places to open databases: which engines, which of the two has what, and what ties them together.

Where ``database.catalog_url`` names the same SQLite file as ``database.url``, or nothing, the catalogue is the
embedded one, which is ours to make and to write. Every other catalogue belongs to others. A MySQL database that is
both has one connection for both; our tables stand beside the appliance's then.
"""

from __future__ import annotations

import logging
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sendense_restored.database_url import DatabaseUrl, MysqlUrl, SqliteUrl
from sendense_restored.errors import CatalogUnavailable

from . import catalogue
from .database import Database
from .records import StoreError, StoreUnreachableError
from .sqlite import OwnFile, ReadOnlyFile

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Databases:
    """Both databases, which may be one. ``embedded``: the catalogue is ours as well."""

    records: Database
    catalogue: Database
    embedded: bool

    async def close(self) -> None:
        """Close both. May be called again."""
        await self.records.close()
        await self.catalogue.close()


async def open_databases(at: DatabaseUrl, catalog_at: DatabaseUrl | None, *, busy_timeout: float) -> Databases:
    """Open both databases, and ours migrated. Raises StoreError.

    A catalogue of others that cannot be read is only logged: it may come back.
    """
    catalogue_at = at if catalog_at is None or _same(at, catalog_at) else catalog_at
    embedded = isinstance(at, SqliteUrl) and catalogue_at == at
    async with AsyncExitStack() as undo:
        what = "the catalogue" if catalogue_at == at else "the service's own database"
        records = theirs = await Database.open(_own(at, embedded=embedded, busy_timeout=busy_timeout), what)
        undo.push_async_callback(records.close)
        if catalogue_at != at:
            theirs = await Database.open(_foreign(catalogue_at, busy_timeout), ours=False)
            undo.push_async_callback(theirs.close)
        if not embedded:
            await _look_at(theirs)
            await _tie(records, theirs, at, catalogue_at)
        undo.pop_all()
    return Databases(records, theirs, embedded)


def _same(one: DatabaseUrl, other: DatabaseUrl) -> bool:
    if isinstance(one, SqliteUrl) and isinstance(other, SqliteUrl):
        return os.path.realpath(one.path) == os.path.realpath(other.path)
    return one == other


def _own(url: DatabaseUrl, *, embedded: bool, busy_timeout: float) -> Engine:
    if isinstance(url, SqliteUrl):
        return OwnFile(url.path, embedded=embedded, busy_timeout=busy_timeout)
    return _server(url, busy_timeout)


def _foreign(url: DatabaseUrl, busy_timeout: float) -> Engine:
    if isinstance(url, SqliteUrl):
        return ReadOnlyFile(url.path, busy_timeout=busy_timeout)
    return _server(url, busy_timeout)


def _server(url: MysqlUrl, timeout: float) -> Engine:
    try:
        from .mysql import Server  # noqa: PLC0415  # its driver is needed by those only who use it
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "pymysql":
            raise
        raise StoreError(f"{url}: the driver PyMySQL is missing; install the package python3-pymysql") from None
    return Server(url, timeout=timeout)


async def _look_at(theirs: Database) -> None:
    """Say at the start, and not only when somebody asks, if a catalogue cannot be read."""
    try:
        await theirs.read(catalogue.check)
    except CatalogUnavailable as error:
        log.warning("the catalogue in %s cannot be read yet: %s", theirs.name, error)
    else:
        log.info("reading the catalogue in %s", theirs.name)


async def _tie(records: Database, theirs: Database, at: DatabaseUrl, catalogue_at: DatabaseUrl) -> None:
    """See ``mysql_reference``. Raises StoreError."""
    if isinstance(at, MysqlUrl):
        from . import mysql_reference  # noqa: PLC0415  # the driver again

        schema = catalogue_at.name if isinstance(catalogue_at, MysqlUrl) else ""
        try:
            why = await mysql_reference.set_up(records, theirs if schema else None, schema)
        except CatalogUnavailable as error:
            raise StoreUnreachableError(f"{records.name}: {error}") from error
    else:
        why = "the catalogue and our records are in different databases"
    if why:
        log.info("a mount whose backup leaves the catalogue ends at the next sweep, and its row with it: %s", why)
    else:
        log.info("a mount's row ends with its backup; the mount itself at the next sweep")
