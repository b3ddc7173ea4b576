"""Sizes, durations and times as people type them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.cli import values

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = 1_700_000_000 * 10**9
DAY = 86400 * 10**9


@pytest.fixture
def somewhere_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two hours before UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "EAST-2")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("7B", 7),
        ("10K", 10 << 10),
        ("10M", 10 << 20),
        ("1GiB", 1 << 30),
        ("1.5GiB", 3 << 29),
        ("2T", 2 << 40),
        ("1PiB", 1 << 50),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert values.size("--min-size", text) == count


@pytest.mark.parametrize("text", ["", "-1", "1 M", "M", "1MB", "1m", "1e3", "1.", "٣", "9999999P", "9" * 30, "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(errors.InvalidOption, match="--min-size"):
        values.size("--min-size", text)


@pytest.mark.parametrize(
    ("text", "count"), [("90s", 90), ("15min", 900), ("2h", 7200), ("7d", 604800), ("1w", 7 * 86400)]
)
def test_durations(text: str, count: int) -> None:
    assert values.seconds("--idle-timeout", text) == count


@pytest.mark.parametrize("text", ["", "0s", "90", "2H", "1.5h", "-1h", "1h30min", "999999999999w", "٣h", "1m"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(errors.InvalidOption, match="--idle-timeout"):
        values.seconds("--idle-timeout", text)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("7d", NOW - 7 * DAY),
        ("30min", NOW - 1800 * 10**9),
        ("2023-11-14T22:13:20Z", NOW),
        ("2023-11-14t22:13:20z", NOW),
        ("2023-11-14T23:13:20+01:00", NOW),
        ("2023-11-14 22:13:20.000001+00:00", NOW + 1000),
        ("1969-12-31T23:59:59Z", -(10**9)),
        ("2023-11-15", 1_699_999_200 * 10**9),
        ("2023-11-15T00:13:20", NOW),
    ],
)
@pytest.mark.usefixtures("somewhere_east")
def test_times(text: str, moment: int) -> None:
    assert values.moment("--newer", text, now_ns=NOW) == moment


@pytest.mark.parametrize(
    "text", ["", "yesterday", "2023", "2023-13-01", "2023-02-30", "2023-W01-1", "20230101", "0001-01-01", "7", "-7d"]
)
@pytest.mark.usefixtures("somewhere_east")
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(errors.InvalidOption, match="--newer"):
        values.moment("--newer", text, now_ns=NOW)
