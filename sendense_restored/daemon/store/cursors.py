"""Cursors of lists: the text by which a client asks for the next page.

To clients a cursor is opaque. A place in a list has exactly one cursor, and whatever is not one is refused: what a
client sends back is put into a query.
"""

from __future__ import annotations

import base64
import binascii

from sendense_restored.errors import InvalidOption


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
