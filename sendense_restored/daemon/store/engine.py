"""What the store asks of a database engine.

An engine owns one connection, which belongs to the thread that uses it; ``database.py`` is that thread. Two engines
are known: ``sqlite.py`` and ``mysql.py`` (MySQL and MariaDB). All that differs between them stands there: how to
connect, how transactions begin, what an error means, and the few expressions of the units of work whose SQL differs
(``Dialect``).
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Protocol, cast

from .models import database_of_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

    import peewee

    from .records import StoreError


LACKING = "lacks a table or column that is needed; the service's journal has the details"
"""See ``Engine.advice``."""


class Trouble(Enum):
    """What an error of a database means."""

    FAULT = auto()
    """A mistake of ours; the database is as good as before."""
    CONFLICT = auto()
    """The transaction was undone in favour of another one; the next attempt may succeed."""
    LOST = auto()
    """The connection is of no use any more."""
    OTHER = auto()
    """Something else that an administrator has to look at."""


class Dialect(Protocol):
    """A peewee database, with the expressions that differ."""

    def exact(self, column: peewee.Node) -> Any:  # noqa: ANN401  # an expression of peewee's, which has no types
        """The column's text, to be compared and ordered byte by byte whatever the collation of its table."""

    def beginning(self, column: peewee.Node, characters: int) -> Any:  # noqa: ANN401  # see above
        """The column's text, of which at least so many characters are needed; more of it may not be fetched."""

    def has_table(self, name: str) -> bool:
        """Whether there is a table or view of that name that may be looked into."""

    def is_missing(self, error: peewee.DatabaseError) -> bool:
        """Whether a table is not what it should be, or may not be read."""

    def is_dangling(self, error: peewee.IntegrityError) -> bool:
        """Whether a row was refused because what it refers to is not there."""

    def execute(self, query: peewee.Node) -> Any:  # noqa: ANN401  # the driver's cursor
        """See peewee."""

    def execute_sql(self, sql: str, params: Sequence[object] | None = None) -> Any:  # noqa: ANN401  # the same
        """See peewee. For what only one engine has; all else is a query of the models."""


class Engine(Protocol):
    """One connection to one database."""

    @property
    def name(self) -> str:
        """For the log and for the administrator; without the password."""

    @property
    def database(self) -> Any:  # noqa: ANN401  # of peewee, which has no types
        """The peewee database, which is a ``Dialect``."""

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What the driver and peewee raise."""

    @property
    def patience(self) -> float | None:
        """Seconds after which a unit that waits for its turn is given up, if others may take long before it."""

    @property
    def read_mode(self) -> str:
        """What a transaction begins with that only reads: all of it sees one state of the database."""

    @property
    def write_mode(self) -> str:
        """What one begins with that writes."""

    def prepare(self) -> None:
        """Make a database of our own ready: connect, bring it to the last version. Raises StoreError, ``errors``."""

    def connect(self) -> bool:
        """Connect if there is no connection, or one that is known to be of no use; whether there was none.

        Raises ``errors``.
        """

    def disconnect(self) -> None:
        """End the connection, in whatever state it is. May be called again."""

    def trouble(self, error: BaseException) -> Trouble:
        """What an error means."""

    def advice(self, error: BaseException) -> str:
        """What a client is told after an error: what is the matter with the database, and what to do."""

    def refusal(self, error: BaseException) -> StoreError:
        """What the administrator is told who starts the service with a database of ours that cannot be used."""


def here() -> Dialect:
    """The database of this thread, as a unit of work needs it."""
    return cast("Dialect", database_of_thread())
