"""Sizes, durations and times as people type them; ``InvalidOption`` for what is none.

Written without spaces, so that none has to be quoted. A unit of sizes is a power of 1024 whether it is written ``M``
or ``MiB``; ``MB``, which means one thing to some and another to others, is refused.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

from sendense_restored import errors

_SIZE_UNITS = "KMGTP"
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_MOST_BYTES = (1 << 63) - 1
_MOST_SECONDS = 366 * 86400 * 1000


def size(option: str, text: str) -> int:
    """Bytes: ``10``, ``10B``, ``10K``, ``1.5GiB``."""
    match = re.fullmatch(rf"(\d{{1,20}}(?:\.\d{{1,9}})?)(?:([{_SIZE_UNITS}])(?:iB)?|B)?", text, re.ASCII)
    if match is None:
        raise errors.InvalidOption(f"{option} must be a size such as 4096, 10M or 1.5GiB, not {text!r}")
    count = round(float(match[1]) * 1024 ** (_SIZE_UNITS.index(match[2]) + 1)) if match[2] else round(float(match[1]))
    if count > _MOST_BYTES:
        raise errors.InvalidOption(f"{option} is more than any file has")
    return count


def seconds(option: str, text: str) -> int:
    """A duration: ``90s``, ``15min``, ``2h``, ``7d``, ``4w``; at least a second."""
    match = re.fullmatch(rf"(\d{{1,12}})({'|'.join(_SECONDS)})", text, re.ASCII)
    if match is None or not 0 < int(match[1]) * _SECONDS[match[2]] <= _MOST_SECONDS:
        raise errors.InvalidOption(f"{option} must be a duration such as 90s, 15min, 2h or 7d, not {text!r}")
    return int(match[1]) * _SECONDS[match[2]]


def moment(option: str, text: str, *, now_ns: int) -> int:
    """A time in ns since the epoch: a duration before ``now_ns``, or a date or time of RFC 3339.

    A date alone is its midnight, and without an offset it is in the time zone of this host.
    """
    if re.fullmatch(rf"\d+({'|'.join(_SECONDS)})", text, re.ASCII):
        return now_ns - seconds(option, text) * 10**9
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d([Tt ].+)?", text, re.ASCII):
            raise ValueError
        time = datetime.fromisoformat(text.upper())
        since = (time if time.tzinfo else time.astimezone()) - datetime.fromtimestamp(0, UTC)
    except (ValueError, OverflowError):
        raise errors.InvalidOption(
            f"{option} must be a time such as 2026-01-31, 2026-01-31T12:00:00Z or, that long ago, 7d, not {text!r}"
        ) from None
    return (since.days * 86400 + since.seconds) * 10**9 + since.microseconds * 1000
