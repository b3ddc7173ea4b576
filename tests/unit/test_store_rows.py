"""Values of a catalogue that is not ours, and what they mean."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import peewee
import pytest

from sendense_restored.daemon.store import Store
from sendense_restored.daemon.store.rows import LARGEST, LONGEST_TEXT, Row
from sendense_restored.database_url import parse
from sendense_restored.errors import CatalogUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def row(value: object) -> Row:
    return Row("backup_disks", {"id": 1, "value": value})


@pytest.mark.parametrize(
    "value",
    [
        *(1e300, -1e300, float("inf"), float("nan"), Decimal("1e400000"), Decimal("-1e400000"), Decimal("NaN")),
        *(Decimal("sNaN"), "1e300", "1e-99999999999999999999", "1e99999999999999999999", "nan", -1, 10**100),
    ],
)
def test_a_number_that_cannot_be_is_a_broken_row(value: object) -> None:
    with pytest.raises(CatalogUnavailable, match=r"column value of table backup_disks holds .* no number"):
        row(value).number("value", unit=1 << 30)


@pytest.mark.parametrize(("value", "meant"), [(0.5, 1 << 29), ("0.5", 1 << 29), (Decimal("1.5"), 3 << 29), (None, 0)])
def test_a_number_may_have_a_fraction(value: object, meant: int) -> None:
    assert row(value).number("value", unit=1 << 30) == meant


def test_the_largest_number_is_one() -> None:
    assert row(LARGEST).number("value") == LARGEST
    with pytest.raises(CatalogUnavailable):
        row(LARGEST).number("value", unit=2)


@pytest.mark.parametrize("value", ["\0", "a\0b", "\ud800", "ä\udfff", "x" * (LONGEST_TEXT + 1), b"\xff"])
def test_a_text_that_is_none_is_a_broken_row(value: object) -> None:
    with pytest.raises(CatalogUnavailable, match="column value of table backup_disks holds"):
        row(value).text("value")


@pytest.mark.parametrize("end", ["\0", b"\xff"])
def test_a_huge_text_is_not_looked_at(end: str | bytes) -> None:
    """Else there would be a complaint of how it ends."""
    huge = end.rjust(4 * LONGEST_TEXT + 1)
    with pytest.raises(CatalogUnavailable, match="more than"):
        row(huge).text("value")


TABLES = """
    CREATE TABLE backup_repositories (id, name, repository_type, enabled, config, is_immutable);
    CREATE TABLE backup_jobs (id, vm_name, repository_id, backup_type, status, parent_backup_id, total_bytes,
        bytes_transferred, created_at, started_at, completed_at);
    CREATE TABLE backup_disks (id, backup_job_id, disk_index, qcow2_path, size_gb, status);
"""
MANY = """
    WITH RECURSIVE numbers (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers LIMIT {count})
    INSERT INTO backup_jobs (id, vm_name, total_bytes, created_at)
    SELECT printf('{prefix}%06d', n), {name}, {bytes}, '2025-01-01 00:00:00+00:00' FROM numbers;
"""


@pytest.fixture
def appliance(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "theirs.db", isolation_level=None)) as connection:
        connection.executescript(TABLES)
        yield connection


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those that are made from now on."""
    made: list[str] = []
    usual = peewee.Database.execute_sql

    def execute_sql(self: peewee.Database, sql: str, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401  # peewee's own
        made.append(sql)
        return usual(self, sql, *arguments, **options)

    monkeypatch.setattr(peewee.Database, "execute_sql", execute_sql)
    return made


async def opened(tmp_path: Path) -> Store:
    return await Store.open(parse(f"sqlite:///{tmp_path}/ours.db"), parse(f"sqlite:///{tmp_path}/theirs.db"))


async def test_rows_that_mean_nothing_cost_few_queries_and_one_line(
    appliance: sqlite3.Connection, queries: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    appliance.executescript(MANY.format(count=2000, prefix="x", name="'web'", bytes=-1))
    appliance.executescript(MANY.format(count=2, prefix="a", name="'web'", bytes=1))
    async with await opened(tmp_path) as store:
        queries.clear()
        page, cursor = await store.backups(limit=1)
        assert [backup.id for backup in page] == ["a000001"]
        assert len(queries) <= 20
        (line,) = caplog.messages
        assert line.startswith("not listing backup 'x001999' and 1999 more, the first: column total_bytes")
        assert [backup.id for backup in (await store.backups(limit=1, cursor=cursor))[0]] == ["a000000"]


async def test_a_page_ends_when_too_much_means_nothing_and_the_next_goes_on(
    appliance: sqlite3.Connection, queries: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    appliance.executescript(MANY.format(count=12_000, prefix="x", name="'web'", bytes=-1))
    appliance.executescript(MANY.format(count=1, prefix="a", name="'web'", bytes=1))
    async with await opened(tmp_path) as store:
        cursor = ""
        pages: list[list[str]] = []
        while not pages or cursor:
            queries.clear()
            page, cursor = await store.backups(limit=10, cursor=cursor)
            pages.append([backup.id for backup in page])
            assert len(queries) <= 50
    assert pages == [[], [], ["a000000"]]
    assert len(caplog.messages) == 3


async def test_machines_without_a_name_cost_few_queries_and_one_line(
    appliance: sqlite3.Connection, queries: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    appliance.executescript(MANY.format(count=2000, prefix="x", name="'a' || n || char(0)", bytes=1))
    appliance.executescript(MANY.format(count=1, prefix="a", name="'web'", bytes=1))
    async with await opened(tmp_path) as store:
        queries.clear()
        assert [vm.vm_name for vm in (await store.vms(limit=1))[0]] == ["web"]
        assert len(queries) <= 20
    assert len(caplog.messages) == 1


async def test_contexts_of_another_form_leave_machines_their_names(
    appliance: sqlite3.Connection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    appliance.executescript(MANY.format(count=1, prefix="a", name="'web'", bytes=1))
    appliance.execute("CREATE TABLE vm_backup_contexts (context_id, vm_name)")
    async with await opened(tmp_path) as store:
        assert [vm.context_id for vm in (await store.vms())[0]] == ["web"]
    assert len(caplog.messages) == 1
    assert "vm_backup_contexts cannot be read" in caplog.text


async def test_half_a_surrogate_pair_is_no_directory(
    appliance: sqlite3.Connection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, path in (("good", "/b"), ("bad", "/b\\ud800"), ("long", "/" + "x" * 70_000)):
        appliance.execute(
            "INSERT INTO backup_repositories (id, config) VALUES (?, ?)", (name, f'{{"path":"{path}"}}')
        )
    async with await opened(tmp_path) as store:
        assert [repository.id for repository in await store.repositories()] == ["good"]
        with pytest.raises(CatalogUnavailable, match="names no absolute directory"):
            await store.repository("bad")
        with pytest.raises(CatalogUnavailable, match="more than 65536 characters"):
            await store.repository("long")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
