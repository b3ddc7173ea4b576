"""Pages of lists: how long one may be, and the cursor, the text by which a client asks for the next.

To clients a cursor is opaque. A place in a list has exactly one cursor, and whatever is not one is refused: what a
client sends back is put into a query.
"""

from __future__ import annotations

import base64
import binascii

from sendense_restored.errors import InvalidOption

MOST_PER_PAGE = 1000


def encode(place: str) -> str:
    """The cursor of a place."""
    return base64.urlsafe_b64encode(place.encode()).decode().rstrip("=")


def decode(cursor: str, what: str) -> str:
    """The place that a cursor of the list of ``what`` stands for. Raises InvalidOption."""
    try:
        place = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except (ValueError, binascii.Error):
        raise foreign(what) from None
    if encode(place) != cursor:
        raise foreign(what)
    return place


def foreign(what: str) -> InvalidOption:
    """The refusal of a text that is no cursor of the list of ``what``."""
    return InvalidOption(f"this is no cursor of the list of {what}; begin again without one")


def check_limit(limit: int) -> None:
    """Raises InvalidOption if a page cannot be that long."""
    if not 1 <= limit <= MOST_PER_PAGE:
        raise InvalidOption(f"limit must be from 1 to {MOST_PER_PAGE}")
