"""Opening, migrating, locking and closing the database."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
import sys
import threading
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import peewee
import pytest

from sendense_restored import errors
from sendense_restored.daemon.store import ClaimRow, DiskFile, Event, StoreError
from sendense_restored.daemon.store.database import Database
from sendense_restored.daemon.store.migrations import MARKER, Migration
from sendense_restored.daemon.store.migrations_sqlite import MIGRATIONS, migrate
from sendense_restored.daemon.store.models import MODELS, BackupJob, bind_to_thread, to_stored
from sendense_restored.daemon.store.sqlite import OwnFile, ReadOnlyFile
from tests.records import NOON, event, mount, open_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "restore.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert [thread for thread in threading.enumerate() if thread not in before and "store" in thread.name] == []


def connect(path: Path) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(path, isolation_level=None))


def execute(path: Path, *statements: str) -> None:
    with connect(path) as connection:
        for statement in statements:
            connection.execute(statement)


async def open_database(path: Path, busy_timeout: float = 5.0) -> Database:
    return await Database.open(OwnFile(path, embedded=True, busy_timeout=busy_timeout))


async def make(url: str) -> None:
    async with await open_store(url) as store:
        await store.add_repository("Main", "/srv/backups")
        await store.add_backup("main", "web", [DiskFile(0, "web/a.qcow2", 1)], backup_id="b1")


# Opening


async def test_file_and_directory_are_for_the_owner_only(url: str, path: Path) -> None:
    old = os.umask(0)
    try:
        async with await open_store(url) as store:
            await store.add_repository("Main", "/srv/backups")
            modes = {entry.name: entry.stat().st_mode & 0o777 for entry in path.parent.iterdir()}
    finally:
        os.umask(old)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert modes == {"restore.db": 0o600, "restore.db-wal": 0o600, "restore.db-shm": 0o600}
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["restore.db"]


async def test_what_was_written_is_there_after_a_restart(url: str) -> None:
    await make(url)
    async with await open_store(url) as store:
        assert (await store.backup("b1")).vm_name == "web"


async def test_the_connection_is_set_up_as_it_must_be(path: Path) -> None:
    database = await open_database(path, 1.5)

    def pragma(name: str) -> object:
        return BackupJob._meta.database.execute_sql(f"PRAGMA {name}").fetchone()[0]

    wanted = {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 1500, "synchronous": 2}
    assert {name: await database.read(pragma, name) for name in wanted} == wanted
    await database.close()


@pytest.mark.parametrize("where", ["/proc/nothing/here/restore.db", "{tmp}/file/restore.db", "{tmp}/directory"])
async def test_a_place_that_cannot_be_written_is_said_plainly(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    where = where.format(tmp=tmp_path)
    with pytest.raises(StoreError, match="cannot be") as caught:
        await open_store(f"sqlite:///{where}")
    assert where in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_directory_without_write_permission_is_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        await open_store(f"sqlite:///{tmp_path}/shut/restore.db")


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
async def test_a_file_that_is_no_database_refuses_to_start_and_stays_as_it_is(
    url: str, path: Path, content: bytes
) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(StoreError, match="move a damaged one away"):
        await open_store(url)
    assert path.read_bytes() == content


# Migrations


def shape(path: Path) -> dict[str, Any]:
    """All that SQLite tells of the tables' columns, keys and indexes; names of indexes do not count."""
    affinities = {"INTEGER": "int", "BIGINT": "int", "TEXT": "text", "REAL": "real", "DATETIME": "time"}
    with connect(path) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]

        def rows(pragma: str, argument: str) -> list[tuple[Any, ...]]:
            return connection.execute(f"PRAGMA {pragma}('{argument}')").fetchall()

        return {
            table: {
                "columns": [
                    (name, affinities.get(type_.upper(), type_.upper()), notnull, key)
                    for _, name, type_, notnull, _, key in rows("table_info", table)
                ],
                "foreign": sorted((row[2], row[3], row[4], row[6]) for row in rows("foreign_key_list", table)),
                "indexes": sorted(
                    (tuple(column[2] for column in rows("index_info", row[1])), row[2])
                    for row in rows("index_list", table)
                ),
            }
            for table in tables
            if table not in {MARKER, "sqlite_sequence"}  # the other one is SQLite's own
        }


async def test_the_migrations_build_what_the_models_expect(url: str, path: Path, tmp_path: Path) -> None:
    await make(url)
    database = peewee.SqliteDatabase(tmp_path / "models.db")
    bind_to_thread(database)
    try:
        database.create_tables(MODELS)
    finally:
        bind_to_thread(None)
        database.close()
    built, expected = shape(path), shape(tmp_path / "models.db")
    assert built.keys() == expected.keys() == {model._meta.table_name for model in MODELS}
    for table, wanted in expected.items():
        assert built[table] == wanted, table


def test_versions_count_from_one_without_a_gap() -> None:
    assert [migration.version for migration in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))


NEXT = Migration(
    len(MIGRATIONS) + 1,
    "a note on repositories",
    (
        "ALTER TABLE backup_repositories ADD COLUMN note TEXT",
        "UPDATE backup_repositories SET note = 'migrated'",
    ),
)


def migrate_file(path: Path, *migrations: Migration) -> None:
    database = peewee.SqliteDatabase(path, timeout=0.05)
    try:
        migrate(database, migrations)
    finally:
        database.close()


def versions(path: Path) -> list[int]:
    with connect(path) as connection:
        return [row[0] for row in connection.execute(f"SELECT version FROM {MARKER} ORDER BY version")]


@pytest.mark.parametrize("earlier", range(len(MIGRATIONS) + 1))
def test_every_earlier_version_becomes_the_last(tmp_path: Path, earlier: int) -> None:
    path, straight = tmp_path / "a.db", tmp_path / "b.db"
    if earlier:
        migrate_file(path, *MIGRATIONS[:earlier])
    migrate_file(path, *MIGRATIONS)
    migrate_file(path, *MIGRATIONS)
    migrate_file(straight, *MIGRATIONS)
    assert versions(path) == [migration.version for migration in MIGRATIONS]
    assert shape(path) == shape(straight)


async def test_the_rows_of_version_1_are_kept_and_its_claims_get_a_timeout(url: str, path: Path) -> None:
    path.parent.mkdir()
    migrate_file(path, *MIGRATIONS[:1])
    moment = "2025-03-01 12:00:00.000000"
    execute(
        path,
        """INSERT INTO backup_repositories VALUES ('main', 'Main', 'local', 1, '{"path": "/srv"}', 0)""",
        f"""INSERT INTO backup_jobs VALUES
            ('b1', 'web', 'main', 'full', 'completed', '/srv', NULL, 1, 1, '{moment}', NULL, NULL)""",
        "INSERT INTO backup_disks VALUES (5, 'b1', 0, 'a.qcow2', 1.0, 'completed')",
        f"""INSERT INTO restore_mounts VALUES ('m1', 'b1', 5, 0, '/mnt/m1', '/dev/loop0', 'ext4', 'read-only',
            'mounted', '', '{moment}', '{moment}', NULL, 'replay', 1, '{{}}')""",
        f"INSERT INTO restore_claims VALUES ('m1', 1000, 'alice', '{moment}', NULL)",
    )
    noon = datetime(2025, 3, 1, 12, tzinfo=UTC)
    async with await open_store(url) as store:
        ((row, claims),) = await store.wished()
        assert (row.id, row.backup_disk_id, row.nbd_device, row.resume_attempts) == ("m1", 5, "/dev/loop0", 1)
        assert claims == (ClaimRow("m1", 1000, "alice", noon, None, 3600.0),)
        assert [disk.size for disk in (await store.backup("b1")).disks] == [1 << 30]
        assert await store.events() == ([], "")
    assert versions(path) == [migration.version for migration in MIGRATIONS]


async def test_the_events_of_version_2_are_kept_with_their_ids(url: str, path: Path) -> None:
    path.parent.mkdir()
    migrate_file(path, *MIGRATIONS[:2])
    for number in (3, 70):
        execute(
            path,
            f"""INSERT INTO restore_events VALUES ({number}, '2025-03-01 12:00:00.000000', 'opened', 'ok', 7,
                'a.service', 'alice', 'm1', 'b1', '/etc/{number}', 'x', NULL, {number})""",
        )
    async with await open_store(url) as store:
        events, _ = await store.events()
        kept = Event(NOON, "opened", "ok", 7, "a.service", "alice", "m1", "b1", "/etc/70", "x", None, 70, 70)
        assert events == [kept, replace(kept, path="/etc/3", size=3, id=3)]
        assert [one.id for one in (await store.events(mount_id="m1"))[0]] == [70, 3]
        await store.trim_events(0, NOON)
        await store.add_events([event(1)])
        assert [one.id for one in (await store.events())[0]] == [71]
    assert versions(path) == [1, 2, 3]


@pytest.mark.parametrize(
    ("version", "digest"),
    [
        (1, "934d3aa5aaa6ecfcaba2c4baeeebeee6a33583e27f00352b8f189cba4e5f4572"),
        (2, "4081fd649638850c62a43fd35bd7b5155eef11e8ad62028814db6438270629b3"),
        (3, "feff78acfd368f98f43e52a70e2d50ae272d71edafbd2e6b79243c7fa6977ec9"),
    ],
)
def test_a_step_stays_as_it_was_released(version: int, digest: str) -> None:
    """Databases hold what it made; a change of it would be a new step."""
    statements = MIGRATIONS[version - 1].statements
    assert hashlib.sha256("\0".join(statements).encode()).hexdigest() == digest


async def test_a_next_step_keeps_the_rows_and_is_applied_once(url: str, path: Path) -> None:
    await make(url)
    for _ in range(2):
        migrate_file(path, *MIGRATIONS, NEXT)
    assert versions(path) == [*range(1, NEXT.version + 1)]
    with connect(path) as connection:
        assert connection.execute("SELECT id, note FROM backup_repositories").fetchall() == [("main", "migrated")]


async def test_a_step_that_fails_leaves_nothing_of_itself(url: str, path: Path) -> None:
    await make(url)
    before = shape(path)
    broken = Migration(NEXT.version, "broken", (*NEXT.statements, "CREATE TABLE backup_jobs (id INTEGER)"))
    with pytest.raises(peewee.OperationalError, match="already exists"):
        migrate_file(path, *MIGRATIONS, broken)
    assert shape(path) == before
    assert versions(path) == [migration.version for migration in MIGRATIONS]
    migrate_file(path, *MIGRATIONS, NEXT)


async def test_a_newer_schema_refuses_to_start(url: str, path: Path) -> None:
    await make(url)
    migrate_file(path, *MIGRATIONS, NEXT)
    with pytest.raises(StoreError, match=f"version {NEXT.version}, this release knows {len(MIGRATIONS)}"):
        await open_store(url)


@pytest.mark.parametrize("table", [model._meta.table_name for model in MODELS])
async def test_tables_of_our_names_without_our_marker_refuse_to_start(url: str, path: Path, table: str) -> None:
    path.parent.mkdir()
    execute(path, f"CREATE TABLE {table} (id INTEGER)", f"INSERT INTO {table} VALUES (7)")
    with pytest.raises(StoreError, match=table):
        await open_store(url)
    with connect(path) as connection:
        assert connection.execute(f"SELECT * FROM {table}").fetchall() == [(7,)]
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [(table,)]


async def test_tables_of_other_names_are_none_of_our_business(url: str, path: Path) -> None:
    path.parent.mkdir()
    execute(path, "CREATE TABLE something_else (id INTEGER)")
    await make(url)


@pytest.mark.parametrize("table", [model._meta.table_name for model in MODELS])
async def test_a_table_of_ours_that_was_dropped_alone_refuses_to_start(url: str, path: Path, table: str) -> None:
    await make(url)
    execute(path, "PRAGMA foreign_keys = 0", f"DROP TABLE {table}")
    before = digest_of_tables(path)
    with pytest.raises(StoreError, match=rf"are missing \({table}\); .* move it away"):
        await open_store(url)
    assert digest_of_tables(path) == before


async def test_a_marker_that_was_emptied_refuses_to_start(url: str, path: Path) -> None:
    await make(url)
    execute(path, f"DELETE FROM {MARKER}")
    with pytest.raises(StoreError, match=rf"{MARKER} is empty, .* move it away"):
        await open_store(url)


async def test_two_that_open_an_empty_database_at_once_migrate_it_once(url: str, path: Path) -> None:
    stores = await asyncio.gather(*(open_store(url) for _ in range(4)))
    for number, store in enumerate(stores):  # each on its own thread and connection, and to one database
        await store.add_repository(f"r{number}", f"/srv/{number}")
    assert [len(await store.repositories()) for store in stores] == [4] * 4
    await asyncio.gather(*(store.close() for store in stores))
    assert versions(path) == [migration.version for migration in MIGRATIONS]


# Trouble while it runs


async def test_another_programs_lock_is_waited_for(url: str, path: Path) -> None:
    await make(url)
    async with await open_store(url, busy_timeout=30) as store:
        with connect(path) as other:
            other.execute("BEGIN IMMEDIATE")
            writing = asyncio.create_task(store.add_repository("Second", "/srv/2"))
            done, _ = await asyncio.wait([writing], timeout=0.1)
            assert not done
            other.execute("COMMIT")
        assert (await writing).id == "second"


async def test_a_lock_that_stays_makes_the_catalogue_unavailable_for_writers_only(url: str, path: Path) -> None:
    await make(url)
    async with await open_store(url, busy_timeout=0.05) as store:
        with connect(path) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(errors.CatalogUnavailable, match="locked by another program; try again"):
                await store.add_repository("Second", "/srv/2")
            assert [one.id for one in await store.repositories()] == ["main"]
            other.execute("ROLLBACK")
        assert (await store.add_repository("Second", "/srv/2")).id == "second"


async def test_a_lock_that_stays_at_start_refuses_to_start(url: str, path: Path) -> None:
    path.parent.mkdir()
    with connect(path) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="locked"):
            await open_store(url, busy_timeout=0.05)


async def test_a_writer_never_loses_to_one_that_wrote_in_between(url: str, path: Path) -> None:
    """A unit that reads first and writes later holds the lock from its beginning."""
    await make(url)
    database = await open_database(path, 5)
    refused: list[str] = []

    def read_then_write() -> None:
        status = BackupJob.get_by_id("b1").status
        with closing(sqlite3.connect(path, timeout=0)) as other:
            try:
                other.execute("UPDATE backup_jobs SET status = 'failed'")
            except sqlite3.OperationalError as error:
                refused.append(str(error))
        BackupJob.update(status=status).execute()

    await database.write(read_then_write)
    await database.close()
    assert refused == ["database is locked"]


async def test_damage_that_is_met_later_makes_the_catalogue_unavailable(url: str, path: Path) -> None:
    await make(url)
    content = bytearray(path.read_bytes())
    with connect(path) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'backup_jobs'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    content[(page - 1) * size : page * size] = b"\xff" * size
    path.write_bytes(content)
    async with await open_store(url) as store:
        with pytest.raises(errors.CatalogUnavailable, match="journal has the details") as caught:
            await store.backups()
        assert str(path) not in caught.value.message
        assert [one.id for one in await store.repositories()] == ["main"]


async def test_a_table_that_is_missing_makes_the_catalogue_unavailable(url: str, path: Path) -> None:
    await make(url)
    async with await open_store(url) as store:
        execute(path, "PRAGMA foreign_keys = 0", "DROP TABLE backup_disks")
        with pytest.raises(errors.CatalogUnavailable, match=r"^the catalogue lacks a table or column that is needed"):
            await store.backup("b1")


@pytest.mark.parametrize("change", ["DROP TABLE backup_disks", "ALTER TABLE backup_disks RENAME qcow2_path TO path"])
async def test_what_a_file_of_others_lacks_is_said_as_it_is_of_a_server(
    url: str, theirs: str, tmp_path: Path, change: str
) -> None:
    execute(tmp_path / "theirs/restore #1?.db", "PRAGMA foreign_keys = 0", change)
    async with await open_store(url, theirs) as store:
        with pytest.raises(errors.CatalogUnavailable, match=r"^the catalogue lacks a table or column that is needed"):
            await store.backup("b1")


async def test_a_unit_that_raises_is_rolled_back_whole(url: str, path: Path) -> None:
    await make(url)
    database = await open_database(path)

    def fail() -> None:
        BackupJob.update(status="failed").execute()
        raise ZeroDivisionError

    def status() -> str:
        return str(BackupJob.get_by_id("b1").status)

    with pytest.raises(ZeroDivisionError):
        await database.write(fail)
    assert await database.read(status) == "completed"
    await database.close()


async def test_the_event_loops_thread_has_no_database(url: str) -> None:
    async with await open_store(url) as store:
        with pytest.raises((peewee.InterfaceError, AttributeError)):
            BackupJob.get_or_none(BackupJob.id == "b1")
        assert await store.backups() == ([], "")


# A catalogue in a file of others


@pytest.fixture
async def theirs(tmp_path: Path) -> str:
    """The catalogue of another installation, which has one backup; it is a file with a journal of writes ahead."""
    url = f"sqlite:///{tmp_path}/theirs/restore #1?.db"
    await make(url)
    return url


async def test_a_file_of_others_is_read_while_they_write(url: str, theirs: str) -> None:
    async with await open_store(url, theirs) as store, await open_store(theirs) as owner:
        assert not store.embedded
        assert [backup.id for backup in (await store.backups())[0]] == ["b1"]
        await owner.add_backup("main", "web", [DiskFile(0, "web/b.qcow2", 1)], backup_id="b2")
        assert await store.backup_ids(["b1", "b2", "b3"]) == {"b1", "b2"}
        await store.insert_mount(mount())
        await owner.remove_backup("b1")
        assert len(await store.mount_rows()) == 1  # it ends with the sweep


def digest_of_tables(path: Path) -> str:
    with connect(path) as connection:
        return hashlib.sha256("\n".join(connection.iterdump()).encode()).hexdigest()


async def test_a_file_of_others_is_never_written(url: str, theirs: str, tmp_path: Path) -> None:
    file = tmp_path / "theirs/restore #1?.db"
    before = digest_of_tables(file)
    database = await Database.open(ReadOnlyFile(file, busy_timeout=5), ours=False)
    with pytest.raises(errors.CatalogUnavailable):
        await database.write(lambda: BackupJob.delete().execute())
    assert await database.read(lambda: BackupJob.select().count()) == 1
    await database.close()
    async with await open_store(url, theirs) as store:
        await store.backups()
    assert digest_of_tables(file) == before


async def test_a_file_of_others_may_come_go_and_be_replaced(
    url: str, theirs: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "theirs/restore #1?.db"
    kept = file.rename(tmp_path / "kept.db")
    async with await open_store(url, theirs) as store:
        assert "cannot be read yet" in caplog.text
        assert not file.exists()  # nor made
        with pytest.raises(errors.CatalogUnavailable):
            await store.backups()
        kept.rename(file)
        assert len((await store.backups())[0]) == 1
        await make(f"sqlite:///{tmp_path}/new.db")
        execute(tmp_path / "new.db", "UPDATE backup_jobs SET id = 'new'")
        (tmp_path / "new.db").replace(file)
        assert [backup.id for backup in (await store.backups())[0]] == ["new"]
        file.unlink()
        with pytest.raises(errors.CatalogUnavailable):
            await store.backups()
        await store.add_events([])


async def test_the_same_file_by_another_name_is_the_embedded_catalogue(url: str, path: Path, tmp_path: Path) -> None:
    await make(url)
    (tmp_path / "link").symlink_to(path.parent)
    async with await open_store(url, f"sqlite:///{tmp_path}/link/restore.db") as store:
        assert store.embedded


async def test_records_stay_when_the_catalogue_moves_and_comes_back(url: str, theirs: str, path: Path) -> None:
    await make(url)
    async with await open_store(url) as store:
        await store.insert_mount(mount(), [ClaimRow("m1", 7, "", NOON, NOON)])
    async with await open_store(url, theirs) as store:
        await store.insert_mount(mount("m2", "of theirs"), [ClaimRow("m2", 7, "", NOON, NOON)])
        assert len(await store.mount_rows()) == 2
    async with await open_store(url) as store:
        assert len(await store.mount_rows()) == 2
        await store.update_mount("m2", resume_attempts=1)
        await store.delete_mount("m2")
        await store.delete_mount("m1")
    with connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM restore_claims").fetchone() == (0,)


async def test_times_of_another_form_are_read_and_paged(url: str, theirs: str, tmp_path: Path) -> None:
    forms = ["2025-03-01T12:00:00Z", "2025-03-01T13:00:00+00:00", "2025-03-01T14:00:00.123456Z"]
    async with await open_store(theirs) as owner:
        for number in range(len(forms)):
            await owner.add_backup("main", "web", [DiskFile(0, f"web/{number}", 1)], backup_id=f"t{number}")
        await owner.remove_backup("b1")
    for number, form in enumerate(forms):
        execute(
            tmp_path / "theirs/restore #1?.db", f"UPDATE backup_jobs SET created_at = '{form}' WHERE id = 't{number}'"
        )
    async with await open_store(url, theirs) as store:
        seen, cursor = [], ""
        for _ in forms:
            page, cursor = await store.backups(limit=1, cursor=cursor)
            seen += [(backup.id, backup.created_at) for backup in page]
    noon = NOON.replace(microsecond=123456)
    assert (seen, cursor) == (
        [("t2", noon + timedelta(hours=2)), ("t1", NOON + timedelta(hours=1)), ("t0", NOON)],
        "",
    )


async def test_texts_that_are_none_leave_the_other_rows(
    url: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await make(url)
    async with await open_store(url) as store:
        await store.add_backup("main", "web", [DiskFile(0, "web/b.qcow2", 1)], backup_id="b2")
        execute(path, "UPDATE backup_jobs SET vm_name = CAST(x'ff41' AS TEXT) WHERE id = 'b1'")
        assert [backup.id for backup in (await store.backups())[0]] == ["b2"]
        assert [vm.vm_name for vm in (await store.vms())[0]] == ["web"]
        assert "not listing backup 'b1'" in caplog.text
        with pytest.raises(errors.CatalogUnavailable, match="vm_name"):
            await store.backup("b1")


# A driver that is missing


@pytest.mark.parametrize("key", ["url", "catalog_url"])
async def test_without_the_driver_it_says_what_to_install(
    url: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "pymysql" or name.startswith("sendense_restored.daemon.store.mysql"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pymysql", None)
    server = "mysql://user:secret@host/name"
    with pytest.raises(StoreError, match="install the package python3-pymysql") as caught:
        await (open_store(server) if key == "url" else open_store(url, server))
    assert "secret" not in str(caught.value)
    async with await open_store(url) as store:  # who has no such server needs no driver
        assert store.embedded


# Closing


async def test_close_finishes_what_was_asked_for(url: str) -> None:
    store = await open_store(url)
    tasks = [asyncio.create_task(store.add_repository(f"r{number}", f"/srv/{number}")) for number in range(10)]
    await asyncio.sleep(0)  # each has asked
    await asyncio.gather(store.close(), store.close())
    assert [(await task).name for task in tasks] == [f"r{number}" for number in range(10)]
    await store.close()
    with pytest.raises(errors.CatalogUnavailable, match="stopping"):
        await store.backups()
    async with await open_store(url) as store:
        assert len(await store.repositories()) == 10


async def test_a_close_that_is_cancelled_can_be_finished(path: Path) -> None:
    database = await open_database(path)
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(30)

    unit = asyncio.create_task(database.read(wait))
    assert await asyncio.to_thread(begun.wait, 30)
    closing_ = asyncio.create_task(database.close())
    await asyncio.sleep(0)
    closing_.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing_
    go_on.set()
    await unit
    await database.close()


# Times


@pytest.mark.parametrize("year", [1, 999, 1970, 9999])
def test_all_times_are_stored_with_the_same_width(year: int) -> None:
    assert len(to_stored(datetime(year, 1, 1, tzinfo=UTC))) == len("2025-01-01 00:00:00.000000")
