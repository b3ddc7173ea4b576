"""Errors of MySQL, MariaDB and PyMySQL by their numbers, which the texts are not fit for.

The server's begin at 1000 (MariaDB's own at 1900), the client's at 2000. 0 is the driver's for a connection that has
been closed.
"""

from __future__ import annotations

from pymysql.err import MySQLError

from sendense_restored import names

DANGLING = 1452
"""A row refers to one that is not there."""
CONFLICT = frozenset({1020, 1205, 1213})
"""Another transaction was in the way."""
DENIED = frozenset({1044, 1045, 1142, 1143, 1227, 1370, 1698})
"""The account may not do that."""
MISSING = frozenset({1049, 1054, 1146, 1356, 1449})
"""There is no such database, table or column, or a view lacks what it needs."""
UNREACHABLE = 2003
"""No server answered."""
SERVER_LOST = 2013
"""The connection ended in the midst of an answer, or the answer took too long."""
MALFORMED = 2027
"""What the server sent makes no sense."""
UNPROVEN = 2059
"""There is no way to prove to the server who we are."""
DONE_ALREADY = frozenset({1050, 1060, 1061, 1091, 1826})
"""A table, a column, an index or a foreign key of that name is there already, or, to be dropped, is not."""
LOST = frozenset({0, 1040, 1053, 1129, 1152, 1158, 1159, 1160, 1161, 1203, 1317, 1927, 4031, *range(2000, 2100)}) - {
    UNPROVEN
}
"""There is no connection (any more)."""


_MOST_SAID = 500
"""Characters."""


def code_of(error: BaseException) -> int | None:
    """The number of an error of the server or the driver; None for one of peewee's own.

    An error of the driver without a number means that it made no sense of what came: the connection is lost.
    """
    for part in error.args:
        if isinstance(part, int):
            return part
    # peewee keeps the driver's error in its own.
    return 0 if isinstance(getattr(error, "orig", error), MySQLError) else None


def said(error: BaseException) -> str:
    """What the server said, in words: some, and such as may stand in a log."""
    texts = [part for part in error.args if isinstance(part, str)]
    return names.displayable((texts[-1] if texts else str(error))[:_MOST_SAID])
