"""Rows of a catalogue as the driver gives them, and the values in them as we need them.

The appliance's tables are not ours: a word may be an ENUM, a flag a BIT, a number a DECIMAL, an id a number, a time a
naive one (UTC, which the session sees to), and a column may be NULL where ours cannot be. All of that is read for
what it means. What means nothing is said with the names of table and column, so that it can be corrected there.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Generic, TypeVar

import peewee

from sendense_restored.errors import CatalogUnavailable, InvalidOption

from .engine import here
from .models import table_of, to_stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

log = logging.getLogger(__name__)

_T = TypeVar("_T")

LARGEST = 2**63 - 1
LONGEST_TEXT = 4096
"""Characters of a text that may be one: names and paths have fewer."""
_KEYS_AT_ONCE = 500
_ROWS_AT_ONCE = 500
"""When more rows are needed than were asked for: all queries but the first fetch as many."""
_MOST_PASSED = 5000
"""Rows that mean nothing, after which a page ends with what was found."""
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
NO_DATE = "0000-00-00"
"""MySQL's other NULL."""
_YES = {"1", "y", "yes", "t", "true", "on"}
_NO = {"", "0", "n", "no", "f", "false", "off"}


class Row:
    """One row: values by the names of their columns. Its methods raise CatalogUnavailable."""

    def __init__(self, table: str, values: dict[str, object]) -> None:
        self._table, self._values = table, values

    @property
    def label(self) -> str:
        """What it is called in the log: its first column."""
        return f"{next(iter(self._values.values()))!r:.80}"

    def text(self, column: str, default: str = "", *, longest: int = LONGEST_TEXT) -> str:
        """A text; ``default`` for NULL. ``longest``: characters that it may have."""
        value = self._values[column]
        if value is None:
            return default
        if isinstance(value, str | bytes | bytearray) and len(value) > 4 * longest:  # not looked at any closer
            raise self._broken(column, f"more than {longest} characters")
        if isinstance(value, bytes | bytearray):
            try:
                value = value.decode()
            except UnicodeDecodeError:
                raise self._broken(column, "bytes that are no UTF-8") from None
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise self._broken(column, "something else than text")
        if not is_text(value):
            raise self._broken(column, "characters that no text has")
        if len(value) > longest:
            raise self._broken(column, f"more than {longest} characters")
        return value

    def number(self, column: str, *, unit: int = 1, largest: int = LARGEST) -> int:
        """A number, which may have a fraction, of so many units, as a whole one to ``largest``; 0 for NULL."""
        value = self._values[column]
        if value is None:
            return 0
        if isinstance(value, str):
            value = _number(value)
        # Compared before it is made whole: what is far too large may be beyond float and Decimal when multiplied.
        with contextlib.suppress(ArithmeticError, ValueError):
            if isinstance(value, int | float | Decimal) and -1 < value <= largest:
                found = round(value * unit)
                if 0 <= found <= largest:
                    return found
        raise self._broken(column, f"{value!r:.40}, which is no number that it can be")

    def flag(self, column: str, default: bool) -> bool:  # noqa: FBT001  # what a missing value means
        """Yes or no; ``default`` for NULL."""
        value = self._values[column]
        if value is None:
            return default
        if isinstance(value, bytes | bytearray) and len(value) == 1 and value[0] < 2:  # a BIT
            return bool(value[0])
        if isinstance(value, int | Decimal):
            return bool(value)
        word = self.text(column).strip().lower()
        if word not in _YES | _NO:
            raise self._broken(column, f"{word!r:.40}, which is neither yes nor no")
        return word in _YES

    def moment(self, column: str) -> datetime | None:
        """A time, or None for NULL."""
        value = self._values[column]
        if isinstance(value, str):
            if value.startswith(NO_DATE):
                return None
            with contextlib.suppress(ValueError):  # said below
                value = datetime.fromisoformat(value)
        if value is None:
            return None
        if not isinstance(value, datetime):
            raise self._broken(column, f"{value!r:.40}, which is no time")
        try:
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        except OverflowError:
            raise self._broken(column, f"{value!s:.40}, which is beyond all times") from None

    def stored(self, column: str) -> str:
        """The text by which the database compares a time; empty for NULL."""
        value = self._values[column]
        if isinstance(value, datetime):
            return to_stored(value.replace(tzinfo=UTC))
        return "" if value is None else str(value)

    def _broken(self, column: str, what: str) -> CatalogUnavailable:
        return CatalogUnavailable(
            f"column {column} of table {self._table} holds {what}; correct that row of the catalogue"
        )


def _number(text: str) -> object:
    try:
        return Decimal(text) if math.isfinite(float(text)) else text
    except (ValueError, ArithmeticError):  # a Decimal has its own words for too small
        return text


def fetch(query: peewee.Query, model: type[peewee.Model], columns: Iterable[str]) -> list[Row]:
    """The rows of a query of a table, with names for its columns. Raises CatalogUnavailable if they are others."""
    names, table = list(columns), table_of(model)
    rows = here().execute(query).fetchall()
    if any(len(values) != len(names) for values in rows):
        raise CatalogUnavailable(
            f"the server answers with other columns of table {table} than it was asked for; check which server it is"
        )
    return [Row(table, dict(zip(names, values, strict=True))) for values in rows]


class Shortened(peewee.WrappedNode):  # type: ignore[misc]  # peewee 3 has no type information
    """A text as it is selected: no more of it than shows that it is too long."""

    def __init__(self, column: peewee.Node, longest: int = LONGEST_TEXT) -> None:
        super().__init__(column)
        self._characters = longest + 1

    def __sql__(self, ctx: peewee.Context) -> peewee.Context:
        """See peewee."""
        return ctx.sql(here().beginning(self.node, self._characters))


class _Meant(Generic[_T]):
    """What rows mean. Those that mean nothing are left out, since the others still serve, and told of once."""

    def __init__(self, what: str) -> None:
        self._what, self._label, self._why, self._others = what, "", "", 0

    def of(self, rows: Iterable[Row], convert: Callable[[Row], _T]) -> Iterator[_T]:
        for row in rows:
            try:
                yield convert(row)
            except CatalogUnavailable as error:
                if self._why:
                    self._others += 1
                else:
                    self._label, self._why = row.label, str(error)

    def tell(self) -> None:
        if self._why:
            more = f" and {self._others} more, the first" if self._others else ""
            log.warning("not listing %s %s%s: %s", self._what, self._label, more, self._why)


def meant(rows: Iterable[Row], convert: Callable[[Row], _T], what: str) -> list[_T]:
    """What rows mean, without those that mean nothing; the log has a line about those."""
    found: _Meant[_T] = _Meant(what)
    things = list(found.of(rows, convert))
    found.tell()
    return things


def paged(
    query: peewee.Query,
    model: type[peewee.Model],
    columns: Iterable[str],
    limit: int,
    prepare: Callable[[Sequence[Row]], Callable[[Row], _T]],
    what: str,
) -> tuple[list[_T], bool, Sequence[Row]]:
    """The first ``limit`` things that rows of a query mean, and whether there are more.

    ``prepare`` is given rows and gives what they are converted with. After too many that mean nothing the page ends;
    the last rows that were looked at are given then.
    """
    names = list(columns)
    meaning: _Meant[_T] = _Meant(what)
    found: list[_T] = []
    passed, size = 0, limit + 1
    stopped: Sequence[Row] = ()
    while True:
        rows = fetch(query.limit(size).offset(passed), model, names)
        found += meaning.of(rows, prepare(rows))
        passed += len(rows)
        if len(found) > limit or len(rows) < size:
            break
        if passed - len(found) >= _MOST_PASSED:
            stopped = rows
            break
        size = max(limit + 1, _ROWS_AT_ONCE)
    meaning.tell()
    return found[:limit], len(found) > limit, stopped


def last_cursor(rows: Sequence[Row], cursor_of: Callable[[Row], str]) -> str:
    """The cursor of the last of these rows that one can go on from; empty if there is none."""
    for row in reversed(rows):
        with contextlib.suppress(CatalogUnavailable, InvalidOption):
            return cursor_of(row)
    return ""


def is_text(value: str) -> bool:
    """Whether characters are all such as a text has, and can be encoded."""
    return _NO_TEXT.search(value) is None


def in_parts(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    """So many at a time as one query takes."""
    return (keys[start : start + _KEYS_AT_ONCE] for start in range(0, len(keys), _KEYS_AT_ONCE))
