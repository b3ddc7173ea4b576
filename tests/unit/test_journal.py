"""Where the log goes, and what of a record gets there."""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from sendense_restored.daemon import journal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def record(message: str = "hello %s", *args: object, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    logger = logging.getLogger("sendense_restored.daemon.test")
    return logger.makeRecord(logger.name, level, "/x/y.py", 12, message, args, None, "work", extra or None)


def fields(entry: list[bytes]) -> dict[str, str]:
    return dict(part.decode().split("=", 1) for part in entry)


def test_an_entry_has_the_parts_of_its_record() -> None:
    one = record("hello %s", "x", fields={"mount_id": "m1", "caller_uid": "7", "what": "opened"})
    assert fields(journal.entry(one, one.getMessage())) == {
        "MESSAGE": "hello x",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "sendense-restored",
        "LOGGER": "sendense_restored.daemon.test",
        "CODE_FILE": "/x/y.py",
        "CODE_LINE": "12",
        "CODE_FUNC": "work",
        "SENDENSE_MOUNT_ID": "m1",
        "SENDENSE_CALLER_UID": "7",
        "SENDENSE_WHAT": "opened",
    }


def test_what_calls_over_the_bus_bring_is_there_too() -> None:
    one = fields(journal.entry(record(uid=1000, sender=":1.7", object="/com/sendense/Restore1"), "x"))
    assert {name: value for name, value in one.items() if name.startswith("SENDENSE_")} == {
        "SENDENSE_CALLER_UID": "1000",
        "SENDENSE_SENDER": ":1.7",
        "SENDENSE_OBJECT": "/com/sendense/Restore1",
    }


@pytest.mark.parametrize(
    ("level", "priority"),
    [
        (logging.DEBUG, "7"),
        (5, "7"),
        (logging.INFO, "6"),
        (logging.WARNING, "4"),
        (logging.ERROR, "3"),
        (logging.CRITICAL, "2"),
        (60, "2"),
    ],
)
def test_a_level_is_a_priority(level: int, priority: str) -> None:
    assert fields(journal.entry(record(level=level), "x"))["PRIORITY"] == priority


def test_a_text_that_is_no_text_is_still_an_entry() -> None:
    assert b"MESSAGE=a\\udc80\nb" in journal.entry(record(), "a\udc80\nb")


@pytest.fixture
def pipe() -> Iterator[tuple[Any, Any]]:
    ends = os.pipe()
    with open(ends[0], "rb") as reading, open(ends[1], "w", encoding="utf-8") as writing:  # noqa: PTH123
        yield reading, writing


@pytest.fixture
def journald(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: tuple[Any, Any]) -> Iterator[pytest.MonkeyPatch]:
    """Standard error leads to a journal, and there is one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "socket"))
        status = os.fstat(pipe[1].fileno())
        monkeypatch.setattr("sys.__stderr__", pipe[1])
        monkeypatch.setattr(journal, "_SOCKET", tmp_path / "socket")
        monkeypatch.setattr(journal, "systemd_journal", object())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        yield monkeypatch


def test_standard_error_of_a_service_is_the_journal(journald: pytest.MonkeyPatch) -> None:
    assert journald
    assert journal.stderr_is_the_journal()


@pytest.mark.parametrize("stream", [None, "", "1:2", "no", "8:5:3"])
def test_a_stream_that_is_another_one_is_not(journald: pytest.MonkeyPatch, stream: str | None) -> None:
    """A program that the service starts inherits the variable, and may have its output elsewhere."""
    if stream is None:
        journald.delenv("JOURNAL_STREAM")
    else:
        journald.setenv("JOURNAL_STREAM", stream)
    assert not journal.stderr_is_the_journal()


def test_without_a_journal_that_can_be_reached_there_are_lines(journald: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert journald
    (tmp_path / "socket").unlink()
    assert not journal.stderr_is_the_journal()
    (tmp_path / "socket").touch()
    assert not journal.stderr_is_the_journal()


def test_without_systemds_binding_there_are_lines(journald: pytest.MonkeyPatch) -> None:
    journald.setattr(journal, "systemd_journal", None)
    assert not journal.stderr_is_the_journal()


def test_without_standard_error_there_is_no_journal(journald: pytest.MonkeyPatch, pipe: tuple[Any, Any]) -> None:
    assert journald
    pipe[1].close()
    assert not journal.stderr_is_the_journal()


class Refusing:
    """systemd's library when the journal does not take an entry."""

    def __init__(self) -> None:
        self.entries: list[tuple[bytes, ...]] = []

    def sendv(self, *entry: bytes) -> None:
        self.entries.append(entry)
        raise ConnectionRefusedError


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def test_an_entry_that_the_journal_does_not_take_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing, kept = Refusing(), Kept()
    monkeypatch.setattr(journal, "systemd_journal", refusing)
    one = record()
    journal.JournalHandler(kept).handle(one)
    assert kept.records == [one]
    assert len(refusing.entries) == 1
