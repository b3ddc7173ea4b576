"""The history: what is written for what was recorded, and what happens when the database does not play along."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sendense_restored import errors, names
from sendense_restored.daemon import events as module
from sendense_restored.daemon.events import ALIKE_EVERY, MOST_QUEUED, SERVICE, Actor, Events
from sendense_restored.daemon.lease import Holder
from sendense_restored.daemon.store import Event, Store
from tests.records import open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

NOON = datetime(2025, 3, 1, 12, tzinfo=UTC)
ANNA = Actor(1001, "", "session-3.scope")
AGENT = Actor(990, "alice", "hub.service")


class Clock:
    def __init__(self) -> None:
        self.passed = 0.0

    def unix(self) -> float:
        return NOON.timestamp() + self.passed

    def monotonic(self) -> float:
        return 5.0 + self.passed


class Table(Store):
    """The store, as far as the history needs it: takes batches when the test lets it."""

    def __init__(self) -> None:
        self.batches: list[list[Event]] = []
        self.broken: Exception | None = None
        self.tries = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def add_events(self, events: Sequence[Event]) -> None:
        self.tries += 1
        batch = list(events)
        await self.gate.wait()
        if self.broken is not None:
            raise self.broken
        self.batches.append(batch)

    async def trim_events(self, keep: int, before: datetime) -> int:
        del keep, before
        return 0

    @property
    def rows(self) -> list[Event]:
        return [event for batch in self.batches for event in batch]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
async def events(table: Table, clock: Clock) -> AsyncIterator[Events]:
    events = Events(table, unix=clock.unix, monotonic=clock.monotonic)
    yield events
    table.gate.set()
    await events.close()


async def turn() -> None:
    """Let every task that can run do so once."""
    await asyncio.sleep(0)


# What is written


async def test_an_event_is_written_whole(tmp_path: Path, clock: Clock) -> None:
    async with await open_store(f"sqlite:///{tmp_path}/restore.db") as store:
        events = Events(store, unix=clock.unix, monotonic=clock.monotonic)
        events.record("opened", actor=AGENT, mount_id="m1", backup_id="b1", path="/disk/a\uef80b", size=7)
        clock.passed = 1.5
        events.record("listed", actor=SERVICE, outcome="Unavailable", detail="it\nended", bytes=0)
        await events.flush()
        (second, first), _ = await store.events()
        await events.close()
    assert first == Event(
        NOON, "opened", "ok", 990, "hub.service", "alice", "m1", "b1", "/disk/a\uef80b", "", None, 7, first.id
    )
    assert (second.uid, second.outcome, second.detail, second.bytes) == (None, "Unavailable", "it\\nended", 0)
    assert second.at.timestamp() == NOON.timestamp() + 1.5


def test_an_actor_names_the_holder_of_its_claims() -> None:
    assert AGENT.holder == Holder(990, "alice")
    assert ANNA.holder == Holder(1001)
    assert SERVICE.holder == Holder(0)
    assert [str(actor) for actor in (AGENT, ANNA, SERVICE)] == [
        "uid 990 (hub.service) on behalf of alice",
        "uid 1001 (session-3.scope)",
        "the service",
    ]


HOSTILE = "a\n\x1b[2Jb\u202e\0\ud800\uef80 %s"


async def test_other_peoples_text_is_harmless_in_the_log_and_can_be_stored(
    events: Events, table: Table, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    actor = Actor(1, HOSTILE, HOSTILE)
    events.record(
        "opened", actor=actor, outcome=HOSTILE, mount_id=HOSTILE, backup_id=HOSTILE, path=HOSTILE, detail=HOSTILE
    )
    events.refused(actor, HOSTILE, HOSTILE, HOSTILE)
    await events.flush()
    for record in caplog.records:
        shown = [record.getMessage(), *record.fields.values()]  # type: ignore[attr-defined]
        assert [text for text in shown if names.displayable(text) != text] == []
    async with await open_store(f"sqlite:///{tmp_path}/restore.db") as store:
        await store.add_events(table.rows)
        (_, read), _ = await store.events()
    assert read.path == "a\n\x1b[2Jb\u202e\\x00\\ud800\uef80 %s"  # but for what no path holds, as it was
    assert names.displayable(read.detail) == read.detail


@given(st.text(max_size=50), st.integers(0, 3))
def test_a_text_that_is_too_long_is_cut_to_what_the_column_holds(text: str, more: int) -> None:
    long = text + "ä\ud800\0" * (more * 8192)
    for column, length in module._LENGTHS.items():
        short = module._short(column, long)
        assert len(short) <= length
        short.encode()
    cut = module.cut(long)
    assert len(cut.encode()) <= 16384
    assert "\0" not in cut


async def test_the_longest_path_is_not_cut(events: Events, table: Table) -> None:
    path = names.format_path([b"disk", *[b"\xff" * 1020] * 3, b"\xff" * 1024])
    assert len(path.encode()) > 12000
    events.record("opened", actor=ANNA, path=path, size=2**70, bytes=-1)
    await events.flush()
    assert table.rows[0].path == path
    assert table.rows[0].size == 2**63 - 1


@pytest.mark.parametrize(
    ("what", "columns", "level", "line"),
    [
        (
            "opened",
            {"actor": AGENT, "mount_id": "m1", "path": "/disk/x", "size": 5},
            logging.INFO,
            "opened /disk/x of m1 for uid 990 (hub.service) on behalf of alice, 5 bytes offered",
        ),
        (
            "listed",
            {"actor": Actor(7), "mount_id": "m1", "path": "/", "bytes": 0, "detail": "3 entries"},
            logging.INFO,
            "listed / of m1 for uid 7, 0 bytes out: 3 entries",
        ),
        (
            "mounted",
            {"actor": Actor(7), "backup_id": "b1", "outcome": "NoSpace", "detail": "the disk is full"},
            logging.WARNING,
            "not mounted b1 for uid 7: NoSpace: the disk is full",
        ),
        (
            "listed",
            {"actor": Actor(7), "mount_id": "m1", "outcome": "Cancelled"},
            logging.INFO,
            "not listed m1 for uid 7: Cancelled",
        ),
        ("swept", {"actor": SERVICE, "detail": "2 loops"}, logging.INFO, "swept for the service: 2 loops"),
    ],
)
async def test_a_line_says_it_in_words_and_its_fields_one_by_one(
    events: Events,
    caplog: pytest.LogCaptureFixture,
    what: str,
    columns: dict[str, object],
    level: int,
    line: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    events.record(what, **columns)  # type: ignore[arg-type]
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (level, line)
    fields = record.fields  # type: ignore[attr-defined]
    assert fields["what"] == what
    assert fields["outcome"] == columns.get("outcome", "ok")
    assert all(isinstance(value, str) and value for value in fields.values())
    for name in ("mount_id", "backup_id", "path", "bytes", "size"):
        assert fields.get(name) == (str(columns[name]) if name in columns else None)


# Batches


async def test_what_comes_while_a_batch_is_written_is_the_next_batch(events: Events, table: Table) -> None:
    table.gate.clear()
    events.record("one", actor=ANNA)
    await turn()
    for number in range(100):
        events.record(f"two {number}", actor=ANNA)
    await turn()
    assert (table.tries, table.batches) == (1, [])
    table.gate.set()
    await events.flush()
    assert [len(batch) for batch in table.batches] == [1, 100]
    assert [row.what for row in table.rows[1:]] == [f"two {number}" for number in range(100)]


async def test_a_transaction_is_never_too_long_for_others(events: Events, table: Table) -> None:
    for _ in range(1200):
        events.record("opened", actor=ANNA)
    await events.flush()
    assert [len(batch) for batch in table.batches] == [512, 512, 176]


async def test_nothing_runs_when_there_is_nothing_to_write(events: Events) -> None:
    before = asyncio.all_tasks()
    await events.flush()
    events.record("opened", actor=ANNA)
    assert len(asyncio.all_tasks() - before) == 1
    await events.flush()
    assert asyncio.all_tasks() == before


# A database that fails


async def test_a_database_that_fails_is_tried_again_with_the_next_event(
    events: Events, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    table.broken = errors.CatalogUnavailable("locked")
    for number in range(3):
        events.record(f"try {number}", actor=ANNA)
        await events.flush()
    assert (table.tries, table.batches) == (3, [])
    said = [record for record in caplog.records if "for later" in record.getMessage()]
    assert len(said) == 1
    table.broken = None
    events.record("try 3", actor=ANNA)
    await events.flush()
    assert [row.what for row in table.rows] == ["try 0", "try 1", "try 2", "try 3"]


async def test_what_does_not_fit_is_counted_and_told_once_there_is_room(
    events: Events, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    table.broken = errors.CatalogUnavailable("locked")
    for number in range(MOST_QUEUED + 30):
        events.record(f"{number}", actor=ANNA)
    assert len([record for record in caplog.records if hasattr(record, "fields")]) == MOST_QUEUED + 30
    await events.flush()
    table.broken = None
    await events.flush()
    rows = table.rows
    assert [row.what for row in rows if row.uid is not None] == [str(number) for number in range(MOST_QUEUED)]
    lost = [row for row in rows if row.uid is None]
    assert [(row.what, row.detail.split()[0]) for row in lost] == [("lost", "30")]
    events.record("after", actor=ANNA)
    await events.flush()
    assert [row.what for row in table.rows[len(rows) :]] == ["after"]


async def test_a_fault_of_ours_is_seen_and_stops_nobody(
    events: Events, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    table.broken = ZeroDivisionError()
    events.record("one", actor=ANNA)
    await events.flush()
    await turn()
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]
    table.broken = None
    events.record("two", actor=ANNA)
    await events.flush()
    assert [row.what for row in table.rows] == ["one", "two"]


# The end


async def test_close_writes_what_is_queued_and_may_be_called_again(events: Events, table: Table) -> None:
    table.gate.clear()
    for number in range(3):
        events.record(f"{number}", actor=ANNA)
        await turn()
    closing = asyncio.create_task(events.close())
    await turn()
    assert not closing.done()
    table.gate.set()
    await closing
    await events.close()
    assert [row.what for row in table.rows] == ["0", "1", "2"]


async def test_after_close_there_is_only_the_log(
    events: Events, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await events.close()
    events.record("late", actor=ANNA)
    events.refused(ANNA, "mount", "b1", "no")
    await events.flush()
    assert table.tries == 0
    assert "late" in caplog.text


async def test_close_does_not_wait_for_a_database_that_fails(
    events: Events, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    table.broken = errors.CatalogUnavailable("stopping")
    for _ in range(3):
        events.record("one", actor=ANNA)
    await events.close()
    assert table.tries == 1
    assert "3 events are not in the database" in caplog.text


async def test_a_flush_that_is_given_up_stops_no_writing(events: Events, table: Table) -> None:
    table.gate.clear()
    events.record("one", actor=ANNA)
    flushing = asyncio.create_task(events.flush())
    await turn()
    flushing.cancel()
    await asyncio.wait([flushing])
    table.gate.set()
    await events.flush()
    assert [row.what for row in table.rows] == ["one"]


# Refusals


async def test_a_flood_of_refusals_is_one_event_a_minute_and_a_number(
    events: Events, table: Table, clock: Clock
) -> None:
    for _ in range(1000):
        events.refused(ANNA, "mount", "b1", "you may not")
    events.refused(ANNA, "read-others", "m1", "you may not")
    events.refused(AGENT, "mount", "b1", "you may not")
    await events.flush()
    assert [(row.uid, row.what, row.outcome, row.detail) for row in table.rows] == [
        (1001, "refused", "NotAuthorized", "mount on b1: you may not"),
        (1001, "refused", "NotAuthorized", "read-others on m1: you may not"),
        (990, "refused", "NotAuthorized", "mount on b1: you may not"),
    ]
    clock.passed = ALIKE_EVERY - 0.1
    events.refused(ANNA, "mount", "b2", "you may not")
    await events.flush()
    assert len(table.rows) == 3
    clock.passed = ALIKE_EVERY
    events.refused(ANNA, "mount", "b3", "you may not")
    await events.flush()
    assert [(row.uid, row.detail) for row in table.rows[3:]] == [
        (1001, "mount: 1000 more within a minute"),
        (1001, "mount on b3: you may not"),
    ]


async def test_the_number_left_out_is_told_at_the_end_at_the_latest(events: Events, table: Table) -> None:
    for _ in range(3):
        events.refused(ANNA, "mount", "", "no")
    await events.close()
    assert [row.detail for row in table.rows] == ["mount: no", "mount: 2 more within a minute"]


async def test_the_number_left_out_is_told_by_the_sweep(events: Events, table: Table, clock: Clock) -> None:
    for _ in range(3):
        events.refused(ANNA, "mount", "", "no")
    clock.passed = ALIKE_EVERY
    await events.trim(keep=1000, older=86_400)
    await events.flush()
    assert [row.detail for row in table.rows] == ["mount: no", "mount: 2 more within a minute"]


async def test_refusals_of_long_ago_are_forgotten(events: Events, clock: Clock) -> None:
    for uid in range(1000):
        events.refused(Actor(uid), "mount", "b1", "no")
    clock.passed = ALIKE_EVERY
    events.refused(ANNA, "mount", "b1", "no")
    assert len(events._alike) == 1


def fail(events: Events, path: str, *, actor: Actor = ANNA, outcome: str = "PathNotFound", mount: str = "m1") -> None:
    events.failed(
        "opened", actor=actor, outcome=outcome, mount_id=mount, backup_id="b1", path=path, detail=f"not {path}"
    )


async def test_failures_alike_are_one_event_a_minute_and_a_number(events: Events, table: Table, clock: Clock) -> None:
    for number in range(1000):
        fail(events, f"/{number}")
    fail(events, "/other", outcome="TooLarge")
    fail(events, "/other", mount="m2")
    fail(events, "/other", actor=AGENT)
    fail(events, "/other", actor=AGENT._replace(on_behalf_of="bob"))
    await events.flush()
    alike = [("m1", "PathNotFound"), ("m1", "TooLarge"), ("m2", "PathNotFound"), *[("m1", "PathNotFound")] * 2]
    assert [(row.mount_id, row.outcome) for row in table.rows] == alike
    assert [(row.what, row.path, row.detail, row.size) for row in table.rows[:2]] == [
        ("opened", "/0", "not /0", None),
        ("opened", "/other", "not /other", None),
    ]
    clock.passed = ALIKE_EVERY
    fail(events, "/later")
    await events.flush()
    assert [(row.mount_id, row.outcome, row.path, row.detail) for row in table.rows[5:]] == [
        ("m1", "PathNotFound", "", "999 more within a minute"),
        ("m1", "PathNotFound", "/later", "not /later"),
    ]
    assert len(events._alike) == 1


# The bound


async def test_the_history_is_trimmed_by_number_and_age(tmp_path: Path, clock: Clock) -> None:
    async with await open_store(f"sqlite:///{tmp_path}/restore.db") as store:
        events = Events(store, unix=clock.unix)
        for number in range(10):
            clock.passed = number
            events.record(f"{number}", actor=ANNA)
        await events.flush()
        assert await events.trim(keep=100, older=5) == 4
        assert await events.trim(keep=2, older=5) == 4
        assert [event.what for event in (await store.events())[0]] == ["9", "8"]
        await events.close()
