"""The store on a real server: rights, a server that goes, hangs and comes back, and an appliance's rows."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import peewee
import pytest

from sendense_restored import database_url, errors
from sendense_restored.daemon.store import ClaimRow, MountStatus, Store, StoreError, StoreUnreachableError, Vm
from sendense_restored.daemon.store.database import Database
from sendense_restored.daemon.store.engine import here
from sendense_restored.daemon.store.migrations import MARKER, Migration
from sendense_restored.daemon.store.migrations_mysql import _MARKER_TABLE, MIGRATIONS, migrate
from sendense_restored.daemon.store.models import RECORDS, BackupJob, RestoreMount, bind_to_thread
from sendense_restored.daemon.store.mysql import Server as Engine
from sendense_restored.database_url import MysqlUrl
from tests.bus.appliance import CONTEXTS, TABLES, Hand, fresh, make_tables
from tests.bus.appliance import database as hand_of
from tests.records import GIB, NOON, event, mount, open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tools.lab.mariadb import Server

PAGE = (Path(__file__).parents[2] / "docs/database.md").read_text(encoding="utf-8")
PASSWORD = "p@ss:w/rd?#%42'\"\\ü"
SOON = 0.2
"""Seconds that the service waits for a server that will not answer; twice that for an answer."""


class Place:
    """Two databases of a server, ours and the appliance's, and who may do what there."""

    def __init__(self, server: Server, records: str, catalogue: str, appliance: Hand) -> None:
        self.server, self.records, self.catalogue, self.appliance = server, records, catalogue, appliance
        self.user, self.password = "root", ""
        self.url = server.url(records)
        self.catalog_url: str | None = server.url(catalogue)

    async def open(self, **options: Any) -> Store:  # noqa: ANN401  # those of Store.open
        return await open_store(self.url, self.catalog_url, **options)

    def references(self) -> list[tuple[str, str]]:
        """What the rows of mounts refer to."""
        return self.server.execute(
            "SELECT referenced_table_schema, referenced_table_name FROM information_schema.key_column_usage"
            " WHERE table_schema = %s AND table_name = 'restore_mounts' AND referenced_table_name IS NOT NULL",
            self.records,
        )


@contextlib.contextmanager
def place_on(server: Server) -> Iterator[Place]:
    with fresh(server, "records", "appliance") as (records, catalogue), hand_of(server, catalogue) as appliance:
        make_tables(appliance)
        appliance.add_repository("main", "/srv/backups")
        yield Place(server, records, catalogue, appliance)


@pytest.fixture
def place(mariadb: Server) -> Iterator[Place]:
    with place_on(mariadb) as place:
        yield place


@pytest.fixture
async def store(place: Place) -> AsyncIterator[Store]:
    async with await place.open() as store:
        yield store


# Accounts and rights


@pytest.fixture
def account(place: Place) -> Iterator[Place]:
    """The place, with the account that the page for administrators tells to make."""
    (statements,) = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
    text = re.sub(r"\bsendense_restore(?=\.)", place.records, statements)
    text = re.sub(r"\bsendense(?=\.)", place.catalogue, text).replace("--", "#")
    text = text.replace("CREATE DATABASE sendense_restore ", f"CREATE DATABASE IF NOT EXISTS {place.records} ")
    text = text.replace("'SECRET'", "%s")
    place.appliance.execute(CONTEXTS)
    try:
        for statement in filter(str.strip, text.split(";")):
            place.server.execute(statement, *[PASSWORD] * statement.count("%s"))
        place.url = place.server.url(place.records, "sendense_restore", PASSWORD)
        place.catalog_url = place.server.url(place.catalogue, "sendense_restore", PASSWORD)
        yield place
    finally:
        place.server.execute("DROP USER 'sendense_restore'@'localhost'")


def revoke(place: Place, right: str, table: str = "backup_jobs") -> None:
    place.server.execute(f"REVOKE {right} ON {place.catalogue}.{table} FROM 'sendense_restore'@'localhost'")


async def test_the_documented_rights_are_enough(account: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    account.appliance.add("b1")
    account.appliance.insert("vm_backup_contexts", context_id="ctx-1", vm_name="web", repository_id="main")
    for _ in range(2):
        async with await account.open() as store:
            assert [backup.id for backup in (await store.backups())[0]] == ["b1"]
            assert (await store.vms())[0][0].context_id == "ctx-1"
            await store.insert_mount(mount(), [ClaimRow("m1", 7, "", NOON, NOON)])
            await store.update_mount("m1", status=MountStatus.MOUNTED)
            await store.renew("m1", [ClaimRow("m1", 8, "x", NOON, NOON)], last_accessed_at=NOON)
            await store.add_events([event(1)])
            await store.trim_events(0, NOON)
            assert await store.delete_mount("m1")
    assert account.references() == [(account.catalogue, "backup_jobs")]
    assert "row ends with its backup" in caplog.text
    # The other way round: where the catalogue is elsewhere, nothing may refer to this one.
    with place_on(account.server) as other:
        account.catalog_url = other.catalog_url
        async with await account.open() as store:
            await store.insert_mount(mount())
        assert account.references() == []
    assert PASSWORD not in caplog.text


async def test_without_references_rows_end_with_the_sweep(account: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    account.appliance.add("b1")
    async with await account.open():
        pass
    assert account.references()
    revoke(account, "REFERENCES")
    async with await account.open() as store:
        assert account.references() == []  # what is not granted any more is given back
        await store.insert_mount(mount())
        account.appliance.remove("b1")
        assert len(await store.mount_rows()) == 1
        assert await store.backup_ids(["b1"]) == set()
    assert caplog.text.count("may not refer to") == 1
    assert "grant REFERENCES" in caplog.text


async def test_rights_for_the_whole_server_count_too(place: Place) -> None:
    place.server.execute("CREATE USER everything@localhost")
    try:
        place.server.execute("GRANT ALL ON *.* TO everything@localhost")
        place.url = place.server.url(place.records, "everything")
        async with await place.open():
            assert place.references()
    finally:
        place.server.execute("DROP USER everything@localhost")


async def test_without_the_right_to_read_it_starts_and_says_so(
    account: Place, caplog: pytest.LogCaptureFixture
) -> None:
    account.appliance.add("b1")
    revoke(account, "SELECT", "backup_disks")
    async with await account.open() as store:
        assert "SELECT command denied" in caplog.text
        for call in (store.backups(), store.backup("b1")):
            with pytest.raises(errors.CatalogUnavailable, match="administrator has to grant"):
                await call
        assert [one.id for one in await store.repositories()] == ["main"]
        user = "'sendense_restore'@'localhost'"
        account.server.execute(f"GRANT SELECT ON {account.catalogue}.backup_disks TO {user}")
        assert (await store.backup("b1")).disks[0].size == GIB


async def test_contexts_that_may_not_be_read_are_as_if_they_were_not_there(account: Place) -> None:
    account.appliance.add("b1")
    account.appliance.insert("vm_backup_contexts", context_id="ctx-1", vm_name="web", repository_id="main")
    revoke(account, "SELECT", "vm_backup_contexts")
    async with await account.open() as store:
        assert (await store.vms())[0][0].context_id == "web"


@pytest.mark.parametrize(
    ("change", "kind", "complaint"),
    [
        ({"user": "nobody"}, StoreError, "Access denied"),
        ({"password": "wrong-one"}, StoreError, "Access denied"),
        ({"name": "elsewhere"}, StoreError, r"denied.*docs/database\.md"),
        ({"socket": "/nowhere/socket"}, StoreUnreachableError, "cannot be reached"),
    ],
)
async def test_a_database_of_ours_that_cannot_be_used_refuses_to_start_and_tells_no_password(
    account: Place, change: dict[str, Any], kind: type[StoreError], complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = database_url.parse(account.url)
    assert isinstance(url, MysqlUrl)
    wanted = {"user": url.user, "password": url.password, "name": url.name, "socket": url.socket, **change}
    text = account.server.url(wanted["name"], wanted["user"], wanted["password"])
    text = text.replace(str(account.server.socket), wanted["socket"])
    with pytest.raises(StoreError, match=complaint) as caught:
        await open_store(text)
    assert type(caught.value) is kind
    chain = " ".join([str(caught.value), repr(caught.value.__cause__), repr(url), str(url), caplog.text])
    assert "p@ss" not in chain
    assert "wrong-one" not in chain


# Whose tables they are


@pytest.mark.parametrize("name", ["restore_mounts", "restore_claims", "restore_events"])
async def test_tables_of_our_names_without_our_marker_refuse_to_start(place: Place, name: str) -> None:
    with hand_of(place.server, place.records) as ours:
        ours.execute(f"CREATE TABLE {name} (id INTEGER)")
        ours.execute(f"INSERT INTO {name} VALUES (7)")
        with pytest.raises(StoreError, match=f"did not make .{name}"):
            await place.open()
        assert ours.execute("SHOW TABLES") == [(name,)]
        assert ours.execute(f"SELECT * FROM {name}") == [(7,)]


def tables(hand: Hand, *names: str) -> list[Any]:
    return [hand.execute(f"SHOW CREATE TABLE {name}") for name in names or ("backup_jobs", "backup_disks")]


async def test_the_appliances_tables_stay_as_they_are(place: Place) -> None:
    place.appliance.add("b1")
    before = tables(place.appliance)
    place.url, place.catalog_url = place.server.url(place.catalogue), None
    async with await place.open() as store:
        await store.insert_mount(mount())
    assert tables(place.appliance) == before
    names = {name for (name,) in place.appliance.execute("SHOW TABLES")}
    made = {f"restore_{name}" for name in ("mounts", "claims", "events", "migrations")}
    assert names == {"backup_jobs", "backup_disks", "backup_repositories", *made}


async def test_tables_of_the_appliance_are_not_made(place: Place) -> None:
    place.catalog_url = None
    async with await place.open() as store:
        with pytest.raises(errors.CatalogUnavailable, match="lacks a table"):
            await store.backups()
        await store.add_events([event(1)])
    with hand_of(place.server, place.records) as ours:
        assert all(name.startswith("restore_") for (name,) in ours.execute("SHOW TABLES"))


async def test_a_unit_that_only_reads_can_do_nothing_else(place: Place) -> None:
    place.appliance.add("b1")
    url = database_url.parse(place.server.url(place.catalogue))
    assert isinstance(url, MysqlUrl)
    database = await Database.open(Engine(url, timeout=5), ours=False)
    with pytest.raises(errors.CatalogUnavailable):
        await database.read(lambda: BackupJob.delete().execute())
    await database.close()
    assert place.appliance.execute("SELECT id FROM backup_jobs") == [("b1",)]


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE backup_jobs ENGINE = MyISAM",
        "ALTER TABLE backup_jobs MODIFY id VARBINARY(64) NOT NULL",
        "ALTER TABLE backup_jobs DROP PRIMARY KEY",
    ],
)
async def test_a_table_that_cannot_be_referred_to_leaves_it_to_the_sweep(
    place: Place, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    place.appliance.execute(change)
    place.appliance.add("b1")
    async with await place.open() as store:
        await store.insert_mount(mount())
        assert (await store.backup("b1")).id == "b1"
    assert caplog.text.count("ends at the next sweep, and its row with it:") == 1
    assert place.references() == []


@pytest.mark.parametrize(
    "collation", ["latin1_swedish_ci", "utf8mb4_unicode_ci", "utf8mb3_general_ci", "utf8mb4_bin"]
)
async def test_the_reference_fits_every_collation(place: Place, collation: str) -> None:
    charset = collation.partition("_")[0]
    place.appliance.execute(f"ALTER TABLE backup_jobs CONVERT TO CHARACTER SET {charset} COLLATE {collation}")
    place.appliance.add("bé1")
    async with await place.open() as store:
        await store.insert_mount(mount(backup_id="bé1"))
        assert (await store.backup("bé1")).id == "bé1"
        assert await store.backup_ids(["bé1", "bé2", "BÉ1"]) == {"bé1"}
        place.appliance.remove("bé1")
        assert await store.mount_rows() == []
    assert place.references() == [(place.catalogue, "backup_jobs")]


async def test_a_reference_is_given_back_when_the_catalogue_is_elsewhere(place: Place, tmp_path: Path) -> None:
    place.appliance.add("b1")
    async with await place.open() as store:
        await store.insert_mount(mount())
    place.catalog_url = f"sqlite:///{tmp_path}/nothing.db"
    async with await place.open() as store:
        await store.insert_mount(mount("m2", "of-another-one"))
        assert len(await store.mount_rows()) == 2
    assert place.references() == []
    place.catalog_url = place.server.url(place.catalogue)
    async with await place.open() as store:  # one row has no backup there, and nothing is thrown away for that
        assert len(await store.mount_rows()) == 2
        await store.delete_mount("m2")
    assert place.references() == []
    async with await place.open():
        assert place.references() == [(place.catalogue, "backup_jobs")]


# How tables come to be


def shape(hand: Hand, schema: str) -> dict[str, Any]:
    columns = (
        "SELECT table_name, column_name, column_type, is_nullable, collation_name, extra"
        " FROM information_schema.columns WHERE table_schema = ? ORDER BY table_name, ordinal_position"
    )
    indexes = (
        "SELECT table_name, non_unique, GROUP_CONCAT(column_name ORDER BY seq_in_index)"
        " FROM information_schema.statistics WHERE table_schema = ? GROUP BY table_name, index_name, non_unique"
    )
    foreign = (
        "SELECT k.table_name, k.column_name, k.referenced_table_name, r.delete_rule"
        " FROM information_schema.key_column_usage k JOIN information_schema.referential_constraints r"
        " ON r.constraint_schema = k.constraint_schema AND r.constraint_name = k.constraint_name"
        " WHERE k.table_schema = ?"
    )
    ours = {model._meta.table_name for model in RECORDS}
    return {
        what: sorted(row for row in hand.execute(query, schema) if row[0] in ours)
        for what, query in (("columns", columns), ("indexes", indexes), ("foreign", foreign))
    }


def in_thread(server: Server, name: str, work: Callable[[Any], None]) -> None:
    """Run ``work`` with the peewee database ``name`` of a server, as a store's thread would."""
    url = database_url.parse(server.url(name))
    assert isinstance(url, MysqlUrl)
    failed: list[BaseException] = []

    def run() -> None:
        engine = Engine(url, timeout=5)
        bind_to_thread(engine.database)
        try:
            engine.connect()
            work(engine.database)
        except BaseException as error:  # noqa: BLE001  # it is raised below
            failed.append(error)
        finally:
            engine.disconnect()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


async def test_the_migrations_build_what_the_models_expect(place: Place) -> None:
    (collation,) = next(iter(place.server.execute("SHOW COLLATION LIKE 'utf8mb4_nopad_bin'")))[:1]
    place.appliance.execute(f"ALTER TABLE backup_jobs CONVERT TO CHARACTER SET utf8mb4 COLLATE {collation}")
    async with await place.open():
        pass
    with fresh(place.server, "models") as (name,), hand_of(place.server, name) as models:
        models.execute(f"ALTER DATABASE {name} COLLATE {collation}")
        models.execute("CREATE TABLE backup_jobs (id VARCHAR(64) NOT NULL PRIMARY KEY)")
        in_thread(place.server, name, lambda database: database.create_tables(RECORDS, safe=False))
        expected = shape(models, name)
    with hand_of(place.server, place.records) as ours:
        assert shape(ours, place.records) == expected


class Crash(BaseException):
    """The process ends here."""


# The marker table; and for each step its row, what it does, and that it is done.
STATEMENTS = 1 + sum(2 + len(migration.statements) for migration in MIGRATIONS)


@pytest.mark.parametrize("after", range(STATEMENTS))
def test_a_crash_between_two_statements_is_gone_on_from(
    mariadb: Server, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh(mariadb, "crashed", "straight") as (crashed, straight):
        in_thread(mariadb, straight, migrate)
        execute = peewee.MySQLDatabase.execute_sql
        left = [after]

        def crashing(self: Any, sql: str, *more: Any) -> Any:  # noqa: ANN401
            if not sql.startswith("SELECT"):
                if not left[0]:
                    raise Crash
                left[0] -= 1
            return execute(self, sql, *more)

        with monkeypatch.context() as patch:
            patch.setattr(peewee.MySQLDatabase, "execute_sql", crashing)
            with pytest.raises(Crash):
                in_thread(mariadb, crashed, migrate)
            left[0] = STATEMENTS
            in_thread(mariadb, crashed, migrate)
        in_thread(mariadb, crashed, migrate)
        with hand_of(mariadb, crashed) as one, hand_of(mariadb, straight) as other:
            assert shape(one, crashed) == shape(other, straight)
            assert one.execute(f"SELECT version FROM {MARKER} WHERE applied_at IS NOT NULL ORDER BY version") == [
                (migration.version,) for migration in MIGRATIONS
            ]


def test_a_table_of_others_in_the_way_of_a_step_is_not_taken_over(mariadb: Server) -> None:
    newer = Migration(len(MIGRATIONS) + 1, "more", ("CREATE TABLE restore_more (id INTEGER)",))
    with fresh(mariadb, "records") as (name,), hand_of(mariadb, name) as hand:
        in_thread(mariadb, name, migrate)
        hand.execute("CREATE TABLE restore_more (theirs INTEGER)")
        for _ in range(2):
            with pytest.raises(peewee.OperationalError, match="already exists"):
                in_thread(mariadb, name, lambda database: migrate(database, (*MIGRATIONS, newer)))
        hand.execute("DROP TABLE restore_more")
        in_thread(mariadb, name, lambda database: migrate(database, (*MIGRATIONS, newer)))
        with pytest.raises(StoreError, match=f"version {newer.version}, this release knows {len(MIGRATIONS)}"):
            in_thread(mariadb, name, migrate)


OURS = ("restore_claims", "restore_mounts", "restore_events", MARKER)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("DROP TABLE restore_events", "missing .restore_events"),
        ("DROP TABLE restore_claims", "missing .restore_claims"),
        (f"DELETE FROM {MARKER}", f"{MARKER} is empty"),
        (f"DROP TABLE {MARKER}", "did not make"),
    ],
)
async def test_tables_of_ours_that_went_alone_refuse_to_start(place: Place, change: str, complaint: str) -> None:
    place.appliance.add("b1")
    async with await place.open() as store:
        await store.insert_mount(mount(), [ClaimRow("m1", 7, "", NOON, NOON)])
    with hand_of(place.server, place.records) as ours:
        ours.execute(change)
        with pytest.raises(StoreError, match=complaint) as caught:
            await place.open()
        assert "did not make" in complaint or "drop restore_claims, restore_mounts" in str(caught.value)
        # As the page says.
        for table in OURS:
            ours.execute(f"DROP TABLE IF EXISTS {table}")
        async with await place.open() as store:
            await store.insert_mount(mount(), [ClaimRow("m1", 7, "", NOON, NOON)])
        for table in OURS[:-1]:
            ours.execute(f"DELETE FROM {table}")
        async with await place.open() as store:
            assert await store.mount_rows() == []


@pytest.mark.parametrize("right", ["SELECT", "INSERT", "UPDATE", "DELETE"])
async def test_without_a_right_to_our_own_tables_it_does_not_start(account: Place, right: str) -> None:
    async with await account.open() as store:
        await store.add_events([event(1)])
    account.server.execute(f"REVOKE {right} ON {account.records}.* FROM 'sendense_restore'@'localhost'")
    with pytest.raises(StoreError, match=rf"{right} command denied.*docs/database\.md") as caught:
        await account.open()
    assert type(caught.value) is StoreError
    account.server.execute(f"GRANT {right} ON {account.records}.* TO 'sendense_restore'@'localhost'")
    async with await account.open() as store:
        assert len((await store.events())[0]) == 1


async def test_of_services_that_start_at_once_one_has_the_database(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    opened = await asyncio.gather(*(place.open(busy_timeout=1) for _ in range(4)), return_exceptions=True)
    (store,) = (each for each in opened if isinstance(each, Store))
    for other in opened:
        if other is not store:
            assert type(other) is StoreUnreachableError
            assert "another service uses this database" in str(other)
            assert "try again" not in str(other)
    await store.add_events([event(1)])
    with place_on(place.server) as elsewhere:  # another database of the same server
        async with await elsewhere.open():
            pass
    await store.close()
    async with await place.open() as store:
        assert len((await store.events())[0]) == 1
    assert caplog.text.count(f"migrated the database to version {len(MIGRATIONS)}") == 2


async def test_one_that_comes_back_finds_that_another_has_taken_its_database(place: Place) -> None:
    async with await place.open(busy_timeout=1) as store:
        (connection,) = connections(place)
        taken = hand_of(place.server, place.records)
        with taken as other:
            place.server.execute(f"KILL {connection}")
            (lock,) = other.execute(
                "SELECT GET_LOCK(?, 5)", f"sendense-restore {hashlib.sha256(place.records.encode()).hexdigest()[:32]}"
            )
            assert lock == (1,)
            for call in (store.mount_rows(), store.add_events([event(1)])):
                with pytest.raises(errors.CatalogUnavailable, match="another service has taken the service's own"):
                    await call
            assert await store.backups() == ([], "")  # which is another database
        await store.add_events([event(1)])
        assert len((await store.events())[0]) == 1


async def test_a_connection_of_ours_whose_end_was_not_seen_is_no_other_service(place: Place) -> None:
    engine = engine_of(place, 1)
    database = await Database.open(engine)
    before = connections(place)
    kept = []

    def lose_sight() -> None:
        kept.append(engine.database.connection())
        engine.database._state.reset()  # as if the network had gone: nobody says good-bye

    await database.change(lose_sight)
    assert await database.read(lambda: RestoreMount.select().count()) == 0
    after = connections(place)
    assert len(before) == len(after) == 1
    assert before != after
    await database.close()
    kept[0]._force_close()


def connections(place: Place) -> list[int]:
    """Those that have our own database."""
    query = "SELECT id FROM information_schema.processlist WHERE db = %s"
    return [number for (number,) in place.server.execute(query, place.records)]


# A server that goes


def engine_of(place: Place, timeout: float = 5.0) -> Engine:
    url = database_url.parse(place.url)
    assert isinstance(url, MysqlUrl)
    return Engine(url, timeout=timeout)


@pytest.fixture
def mortal(mortal_mariadb: Server) -> Iterator[Place]:
    """A place on a server that may be away at the end."""
    server = mortal_mariadb
    server.execute("CREATE DATABASE records")
    server.execute("CREATE DATABASE appliance COLLATE utf8mb4_unicode_ci")
    with hand_of(server, "appliance") as appliance:
        make_tables(appliance)
        appliance.add_repository("main", "/srv/backups")
        appliance.add("b1")
        yield Place(server, "records", "appliance", appliance)


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_server_that_was_restarted_between_two_calls_is_not_noticed(mortal: Place, how: str) -> None:
    async with await mortal.open() as store:
        await store.insert_mount(mount())
        getattr(mortal.server, how)()
        mortal.server.start()
        assert [row.id for row in await store.mount_rows()] == ["m1"]
        assert (await store.backup("b1")).id == "b1"
        await store.add_events([event(1)])


async def test_while_a_server_is_away_every_call_says_so(mortal: Place, caplog: pytest.LogCaptureFixture) -> None:
    async with await mortal.open(busy_timeout=SOON) as store:
        mortal.server.kill()
        for _ in range(2):
            with pytest.raises(errors.CatalogUnavailable, match=r"^the catalogue does not answer; try again when"):
                await store.backups()
            with pytest.raises(errors.CatalogUnavailable, match=r"^the service's own database does not answer"):
                await store.add_events([event(1)])
        mortal.server.start()
        await store.add_events([event(1)])
        assert len((await store.backups())[0]) == 1
    assert str(mortal.server.socket) in caplog.text


async def test_a_unit_in_whose_midst_the_server_dies_is_not_repeated(mortal: Place) -> None:
    database = await Database.open(engine_of(mortal))
    runs = []

    def unit() -> None:
        runs.append(1)
        RestoreMount.select().execute()
        mortal.server.kill()
        RestoreMount.delete().execute()

    with pytest.raises(errors.CatalogUnavailable, match="does not answer"):
        await database.write(unit)
    assert runs == [1]
    mortal.server.start()
    assert await database.read(lambda: RestoreMount.select().count()) == 0
    await database.close()


async def test_a_connection_that_is_killed_is_replaced(place: Place) -> None:
    database = await Database.open(engine_of(place))

    def number() -> int:
        return int(here().execute_sql("SELECT CONNECTION_ID()").fetchone()[0])

    first = await database.read(number)
    place.server.execute(f"KILL {first}")
    second = await database.write(number)
    assert second != first
    runs = []

    def killed() -> None:
        runs.append(1)
        with contextlib.suppress(peewee.PeeweeException):
            here().execute_sql(f"KILL {second}")
        RestoreMount.select().count()

    with pytest.raises(errors.CatalogUnavailable, match="does not answer"):
        await database.write(killed)
    assert runs == [1]
    assert await database.read(number) not in {first, second}
    await database.close()


async def test_a_hung_server_is_waited_for_within_bounds(mortal: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Engine] = []
    connect = Engine.connect

    def counted(self: Engine) -> bool:
        tried.append(self)
        return connect(self)

    monkeypatch.setattr(Engine, "connect", counted)
    async with await mortal.open(busy_timeout=SOON) as store:
        assert len((await store.backups())[0]) == 1
        tried.clear()
        with mortal.server.hanging():
            calls = [store.backups() for _ in range(20)] + [store.mount_rows() for _ in range(20)]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, errors.CatalogUnavailable)
                assert "does not answer" in outcome.message
            with pytest.raises(errors.CatalogUnavailable):  # nor by a new connection
                await store.backups()
            assert len(tried) < 10  # the others have waited long enough when it is their turn
        assert len((await store.backups())[0]) == 1
        assert await store.mount_rows() == []


async def test_a_hung_server_of_ours_refuses_to_start_in_time(mortal: Place) -> None:
    with mortal.server.hanging(), pytest.raises(StoreUnreachableError, match="cannot be reached"):
        await mortal.open(busy_timeout=SOON)


async def test_a_catalogue_that_is_away_at_the_start_comes_later(
    mortal: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mortal.server.stop()
    mortal.url = f"sqlite:///{tmp_path}/restore.db"
    async with await mortal.open(busy_timeout=SOON) as store:
        assert "cannot be read yet" in caplog.text
        await store.insert_mount(mount())
        for call in (store.backups(), store.vms(), store.backup_ids(["b1"]), store.repository("main")):
            with pytest.raises(errors.CatalogUnavailable, match="try again when its server runs"):
                await call
        mortal.server.start()
        assert await store.backup_ids(["b1", "b2"]) == {"b1"}
        assert [row.id for row in await store.mount_rows()] == ["m1"]


async def test_a_reference_stays_while_the_catalogue_is_away(place: Place, mortal: Place) -> None:
    async with await mortal.open():
        assert mortal.references()
    mortal.catalog_url = str(mortal.catalog_url).replace(str(mortal.server.socket), "/nowhere/socket")
    async with await mortal.open():
        assert mortal.references() == [("appliance", "backup_jobs")]
    mortal.catalog_url = place.catalog_url  # of another server: a name proves nothing
    async with await mortal.open() as store:
        assert mortal.references() == []
        await store.insert_mount(mount(backup_id="of-the-other"))


async def test_what_undid_a_transaction_is_tried_once_more(place: Place) -> None:
    database = await Database.open(engine_of(place))
    runs: list[int] = []

    def deadlocked(times: int) -> int:
        runs.append(1)
        if len(runs) <= times:
            here().execute_sql("SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'Deadlock'")
        return len(runs)

    assert await database.write(deadlocked, 1) == 2
    runs.clear()
    with pytest.raises(errors.CatalogUnavailable, match="locked by another program; try again"):
        await database.write(deadlocked, 5)
    assert len(runs) == 2
    await database.close()


@pytest.mark.parametrize(
    ("seconds", "complaint"),
    [(1, "is locked by another program; try again"), (SOON, "does not answer; try again when its server runs")],
)
async def test_a_lock_of_others_is_waited_for_within_bounds(place: Place, seconds: float, complaint: str) -> None:
    """The server counts the wait for a lock in whole seconds; who waits for less has given the answer up before."""
    place.appliance.add("b1")
    async with await place.open(busy_timeout=seconds) as store:
        await store.insert_mount(mount())
        with hand_of(place.server, place.records) as ours:
            ours.execute("START TRANSACTION")
            ours.execute("UPDATE restore_mounts SET resume_attempts = 5")
            with pytest.raises(errors.CatalogUnavailable, match=complaint):
                await store.update_mount("m1", resume_attempts=1)
            assert [row.resume_attempts for row in await store.mount_rows()] == [0]
            ours.execute("ROLLBACK")
        await store.update_mount("m1", resume_attempts=1)
        assert [row.resume_attempts for row in await store.mount_rows()] == [1]


async def test_what_has_waited_too_long_for_its_turn_is_not_begun(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = await Database.open(engine_of(place, 5))
    now = [0.0]
    monkeypatch.setattr("sendense_restored.daemon.store.database.time", SimpleNamespace(monotonic=lambda: now[0]))
    begun, go_on = threading.Event(), threading.Event()
    runs: list[int] = []

    def long() -> None:
        begun.set()
        assert go_on.wait(30)

    first = asyncio.create_task(database.read(long))
    assert await asyncio.to_thread(begun.wait, 30)
    second = asyncio.create_task(database.read(runs.append, 1))
    await asyncio.sleep(0)  # it has asked
    now[0] = 10.5
    go_on.set()
    await first
    with pytest.raises(errors.CatalogUnavailable, match=r"^the catalogue does not answer; try again later$"):
        await second
    await database.read(runs.append, 2)
    assert runs == [2]
    await database.close()


async def test_the_session_is_as_it_must_be_whatever_the_server_says(mortal: Place) -> None:
    mortal.server.execute("SET GLOBAL sql_mode = 'ANSI_QUOTES,NO_BACKSLASH_ESCAPES', GLOBAL time_zone = '+05:00'")
    mortal.server.execute("SET GLOBAL TRANSACTION ISOLATION LEVEL SERIALIZABLE")
    async with await mortal.open() as store:
        mortal.appliance.execute("SET time_zone = '+05:00'")
        mortal.appliance.execute("UPDATE backup_jobs SET started_at = '2025-03-01 17:00:00'")  # a TIMESTAMP
        found = await store.backup("b1")
        assert found.started_at == found.created_at == NOON
        row = mount(options={"odd": "\\'\"%s\n"})
        await store.insert_mount(row)
        assert await store.mount_rows() == [row]
    database = await Database.open(engine_of(mortal))

    def session() -> tuple[Any, ...]:
        query = "SELECT @@time_zone, @@innodb_lock_wait_timeout, @@sql_mode LIKE '%%STRICT_TRANS%%'"
        return tuple(here().execute_sql(query).fetchone())

    assert await database.read(session) == ("+00:00", 5, 1)
    await database.close()


# Over TCP


@contextlib.asynccontextmanager
async def listening(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> AsyncIterator[int]:
    """A port of this host; what connects to it is served."""
    serving: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            await serve(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(connected, "127.0.0.1")
    async with server:
        yield server.sockets[0].getsockname()[1]
    await asyncio.gather(*serving)


async def test_a_server_is_reached_over_tcp(place: Place) -> None:
    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def bridge(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_unix_connection(place.server.socket)
        await asyncio.gather(copy(reader, forth), copy(back, writer))
        await forth.wait_closed()

    place.appliance.add("b1")
    async with listening(bridge) as port:
        place.url, place.catalog_url = (
            f"mysql://root@127.0.0.1:{port}/{name}" for name in (place.records, place.catalogue)
        )
        async with await place.open() as store:
            assert (await store.backup("b1")).id == "b1"
            await store.insert_mount(mount())


async def test_a_port_where_something_else_or_nobody_listens_is_said(place: Place) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")

    async with listening(greet) as port:
        place.catalog_url = f"mysql://root@127.0.0.1:{port}/appliance"
        async with await place.open(busy_timeout=SOON) as store:
            with pytest.raises(errors.CatalogUnavailable, match="does not answer"):
                await store.backups()
    async with await place.open(busy_timeout=SOON) as store:  # refused now
        with pytest.raises(errors.CatalogUnavailable, match="does not answer"):
            await store.backups()
    with pytest.raises(StoreUnreachableError, match="refused"):
        await open_store(place.catalog_url)


class AsksForAPassword:
    """A server of MySQL 8, as far as its question for the password, which has to be encrypted by us over TCP."""

    def __init__(self) -> None:
        self.open = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        capabilities = 0x0008_A208.to_bytes(4, "little")
        greeting = b"\x0a8.0.36\0" + bytes(4) + b"saltsalt\0" + capabilities[:2] + b"\xff\2\0" + capabilities[2:]
        greeting += b"\x15" + bytes(10) + b"saltsaltsalt\0" + b"caching_sha2_password\0"
        await self._tell(writer, 0, greeting)
        await self._hear(reader)
        await self._tell(writer, 2, b"\1\4")  # it does not know the password yet, and wants all of it
        await self._hear(reader)
        await self._tell(writer, 4, b"\1-----BEGIN PUBLIC KEY-----")
        assert await reader.read() == b""
        self.open -= 1

    async def _tell(self, writer: asyncio.StreamWriter, number: int, packet: bytes) -> None:
        writer.write(len(packet).to_bytes(3, "little") + bytes([number]) + packet)
        await writer.drain()

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readexactly(4)
        await reader.readexactly(int.from_bytes(head[:3], "little"))


async def test_a_password_that_cannot_be_said_is_told_with_what_to_install(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pymysql._auth._have_cryptography", False)
    server = AsksForAPassword()
    async with listening(server) as port:
        url = f"mysql://somebody:secret@127.0.0.1:{port}/appliance"
        with pytest.raises(StoreError, match="install python3-cryptography or use the server's socket") as caught:
            await open_store(url)
        assert type(caught.value) is StoreError  # another start would find the same
        place.catalog_url = url
        async with await place.open() as store:
            with pytest.raises(errors.CatalogUnavailable, match="journal has the details"):
                await store.backups()
    assert server.open == 0  # all have been closed by us
    assert "install python3-cryptography" in caplog.text
    assert "secret" not in caplog.text + str(caught.value)


# Texts and times of ours


async def test_texts_are_told_apart_byte_by_byte(store: Store, place: Place) -> None:
    place.appliance.add("b1")
    await store.insert_mount(mount())
    names = ["alice", "Alice", "alice ", "älice", "a\u0308lice", "", "🙂", "a%", "a\\"]
    claims = [ClaimRow("m1", 7, name, NOON, None, 1.5) for name in names]
    for claim in claims:
        await store.put_claim(claim)
    assert {claim.on_behalf_of for claim in await store.claims("m1")} == set(names)
    assert await store.delete_claim("m1", 7, "ALICE") is False
    with pytest.raises(errors.InvalidOption, match="surrogate"):
        await store.put_claim(ClaimRow("m1", 7, "half \udc80", NOON, None))
    with pytest.raises(errors.InvalidOption, match="surrogate"):
        await store.backups(vm_name="half \ud800")
    assert len(await store.claims("m1")) == len(names)


async def test_times_keep_their_microseconds(store: Store, place: Place) -> None:
    place.appliance.add("b1")
    moment = datetime(2038, 1, 19, 3, 14, 8, 123456, tzinfo=UTC)  # beyond what a TIMESTAMP holds
    await store.insert_mount(mount(expires_at=moment))
    assert [row.expires_at for row in await store.mount_rows()] == [moment]


# An appliance's rows


async def test_names_and_ids_differ_by_case_and_blanks(store: Store, place: Place) -> None:
    for number, name in enumerate(["web", "WEB", "Web", "web ", "wéb"]):
        place.appliance.add(f"b{number}", vm_name=name)
    assert [vm.vm_name for vm in (await store.vms())[0]] == ["WEB", "Web", "web", "web ", "wéb"]
    for number, name in enumerate(["web", "WEB", "Web", "web ", "wéb"]):
        assert [backup.id for backup in (await store.backups(vm_name=name))[0]] == [f"b{number}"]
    assert await store.backups(vm_name="wEB") == ([], "")
    assert await store.backups(status="COMPLETED") == ([], "")
    assert await store.backup_ids(["B1", "b1", "b1 "]) == {"b1"}


async def test_ids_of_the_same_moment_are_ordered_byte_by_byte(place: Place) -> None:
    place.appliance.execute("ALTER TABLE backup_jobs MODIFY id VARCHAR(64) COLLATE utf8mb4_nopad_bin NOT NULL")
    place.appliance.execute("ALTER TABLE backup_disks MODIFY backup_job_id VARCHAR(64) COLLATE utf8mb4_bin NOT NULL")
    ids = sorted(["a", "B", "b", "é", "e", "Z", "_", "a1", "A"], reverse=True)
    async with await place.open() as store:
        for backup_id in ids:
            place.appliance.add(backup_id)
        seen: list[str] = []
        cursor = ""
        while len(seen) < len(ids):
            page, cursor = await store.backups(limit=2, cursor=cursor)
            seen += [backup.id for backup in page]
        assert (seen, cursor) == (ids, "")
        assert [(await store.backup(backup_id)).id for backup_id in ids] == ids


async def test_nothing_but_ids_need_be_known(store: Store, place: Place) -> None:
    place.appliance.execute("INSERT INTO backup_jobs (id, status) VALUES ('b1', NULL), ('b2', 'running')")
    place.appliance.execute("INSERT INTO backup_disks (backup_job_id) VALUES ('b1')")
    place.appliance.add("b3")
    page, cursor = await store.backups(limit=2)
    assert [backup.id for backup in page] == ["b3", "b2"]
    assert (page[1].created_at, page[1].vm_name, page[1].total_bytes, page[1].backup_type) == (None, "", 0, "")
    page, cursor = await store.backups(limit=2, cursor=cursor)
    assert ([backup.id for backup in page], cursor) == (["b1"], "")
    (disk,) = page[0].disks
    assert (disk.index, disk.size, disk.qcow2_path, disk.status) == (0, 0, "", "pending")
    assert [vm.vm_name for vm in (await store.vms())[0]] == ["web"]
    place.appliance.execute("UPDATE backup_repositories SET name = NULL, enabled = NULL, is_immutable = NULL")
    (repository,) = await store.repositories()
    assert (repository.name, repository.enabled, repository.immutable) == ("main", True, False)
    place.appliance.execute("UPDATE backup_repositories SET enabled = 0, is_immutable = b'1'")
    (repository,) = await store.repositories()
    assert (repository.enabled, repository.immutable) == (False, True)


async def test_numbers_may_be_ids_and_sizes_whole(place: Place) -> None:
    for change in (
        "ALTER TABLE backup_repositories MODIFY id INT NOT NULL",
        "ALTER TABLE backup_jobs MODIFY repository_id INT",
        "ALTER TABLE backup_jobs MODIFY created_at TIMESTAMP NULL",
        "ALTER TABLE backup_disks MODIFY size_gb INT",
        "ALTER TABLE backup_disks MODIFY qcow2_path VARBINARY(512)",
    ):
        place.appliance.execute("DELETE FROM backup_repositories")
        place.appliance.execute(change)
    place.appliance.add_repository("5", "/srv/five", name="Five")
    place.appliance.add("b1", repository_id=5, disks=(3 * GIB,))
    async with await place.open() as store:
        assert str((await store.repository("5")).root) == "/srv/five"
        for unknown in ("05", "five", "5x"):
            with pytest.raises(errors.BackupNotFound):
                await store.repository(unknown)
        found = await store.backup("b1")
        assert (found.repository_id, found.disks[0].size, found.disks[0].qcow2_path) == ("5", 3 * GIB, "b1/disk0")
        assert [backup.id for backup in (await store.backups(repository_id="5"))[0]] == ["b1"]
        assert await store.backups(repository_id="5x") == ([], "")
        assert (await store.vms())[0] == [Vm("web", "web", "5", 1, NOON)]


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        ("UPDATE backup_jobs SET total_bytes = -1 WHERE id = 'b1'", "total_bytes"),
        ("UPDATE backup_jobs SET vm_name = 'a\\0b' WHERE id = 'b1'", "vm_name"),
        ("UPDATE backup_jobs SET bytes_transferred = 99999999999999999999 WHERE id = 'b1'", "bytes_transferred"),
        ("UPDATE backup_disks SET disk_index = -1 WHERE backup_job_id = 'b1'", "disk_index"),
        ("UPDATE backup_disks SET size_gb = -0.5 WHERE backup_job_id = 'b1'", "size_gb"),
        ("UPDATE backup_disks SET qcow2_path = x'41FF00' WHERE backup_job_id = 'b1'", "qcow2_path"),
        ("INSERT INTO backup_disks (backup_job_id, disk_index) VALUES ('b1', 0)", "disk_index"),
    ],
)
async def test_a_row_that_means_nothing_is_left_out_and_named(
    place: Place, damage: str, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    place.appliance.execute("ALTER TABLE backup_disks MODIFY qcow2_path VARBINARY(512)")
    async with await place.open() as store:
        for number in range(4):
            place.appliance.add(f"b{number}", created_at=NOON + timedelta(hours=number))
        place.appliance.execute(damage)
        page, cursor = await store.backups(limit=2)
        assert [backup.id for backup in page] == ["b3", "b2"]
        page, cursor = await store.backups(limit=2, cursor=cursor)
        assert ([backup.id for backup in page], cursor) == (["b0"], "")
        assert "not listing backup 'b1'" in caplog.text
        with pytest.raises(errors.CatalogUnavailable, match=f"{word}.*correct that"):
            await store.backup("b1")
        assert (await store.vms())[0][-1].vm_name == "web"
        assert await store.backup_ids(["b1"]) == {"b1"}  # it is there, so no mount of it ends


async def test_many_broken_rows_do_not_end_a_list(store: Store, place: Place) -> None:
    for number in range(30):
        place.appliance.add(f"b{number:02}", total_bytes=-1 if 3 <= number < 28 else 1)
    page, cursor = await store.backups(limit=3)
    assert [backup.id for backup in page] == ["b29", "b28", "b02"]
    page, cursor = await store.backups(limit=3, cursor=cursor)
    assert ([backup.id for backup in page], cursor) == (["b01", "b00"], "")


async def test_a_time_that_is_none_is_left_out(place: Place) -> None:
    place.appliance.execute("ALTER TABLE backup_jobs MODIFY created_at VARCHAR(40)")
    place.appliance.add("b1")
    place.appliance.add("b2", created_at="soon")
    place.appliance.add("b3", completed_at=None, created_at="2025-03-01T13:00:00+01:00")
    async with await place.open() as store:
        assert {(backup.id, backup.created_at) for backup in (await store.backups())[0]} == {
            ("b1", NOON),
            ("b3", NOON),
        }
        with pytest.raises(errors.CatalogUnavailable, match=r"created_at of table backup_jobs holds 'soon'"):
            await store.backup("b2")


async def test_the_zero_date_is_no_time_and_pages_go_on_from_it(store: Store, place: Place) -> None:
    for number in range(4):
        place.appliance.add(f"z{number}", created_at="0000-00-00 00:00:00")
    place.appliance.add("dated")
    place.appliance.add("timeless", created_at=None)
    seen: list[tuple[str, datetime | None]] = []
    cursor = ""
    for _ in range(6):
        page, cursor = await store.backups(limit=1, cursor=cursor)
        seen += [(backup.id, backup.created_at) for backup in page]
    assert seen == [("dated", NOON), *((each, None) for each in ("z3", "z2", "z1", "z0", "timeless"))]
    assert cursor == ""


async def test_what_the_appliance_calls_its_machines(store: Store, place: Place) -> None:
    place.appliance.add_repository("other", "/srv/other")
    place.appliance.add("w1", repository_id="main")
    place.appliance.add("w2", repository_id="other", created_at=NOON + timedelta(hours=1))
    place.appliance.add("d1", vm_name="db")
    place.appliance.add("n1", vm_name="new")

    async def contexts() -> dict[str, str]:
        return {vm.vm_name: vm.context_id for vm in (await store.vms())[0]}

    assert await contexts() == {"web": "web", "db": "db", "new": "new"}
    place.appliance.execute(CONTEXTS)  # an upgrade of the appliance
    for context_id, name, repository in (
        *(("ctx-1", "web", "main"), ("ctx-2", "web", "other"), ("ctx-3", "WEB", "other")),
        *(("ctx-5", "db", "gone"), ("ctx-4", "db", "elsewhere"), ("ctx-6", "web ", "other")),
    ):
        place.appliance.insert("vm_backup_contexts", context_id=context_id, vm_name=name, repository_id=repository)
    assert await contexts() == {"web": "ctx-2", "db": "ctx-4", "new": "new"}


@pytest.mark.parametrize(
    "view",
    [
        "CREATE VIEW vm_backup_contexts AS SELECT context_id, vm_name FROM contexts",
        "CREATE DEFINER = nobody@nowhere VIEW vm_backup_contexts AS SELECT * FROM contexts",
        "CREATE VIEW vm_backup_contexts AS SELECT * FROM gone",
    ],
)
async def test_contexts_that_cannot_be_read_leave_machines_their_names(
    store: Store, place: Place, view: str, caplog: pytest.LogCaptureFixture
) -> None:
    place.appliance.add("b1")
    for statement in (CONTEXTS, "RENAME TABLE vm_backup_contexts TO contexts", "CREATE TABLE gone (x INT)", view):
        place.appliance.execute(statement)
    place.appliance.execute("DROP TABLE gone")
    assert [vm.context_id for vm in (await store.vms())[0]] == ["web"]
    assert caplog.text.count("virtual machines go by their names") == 1


async def test_machines_whose_long_names_end_differently_have_repositories_of_their_own(
    store: Store, place: Place
) -> None:
    place.appliance.execute("ALTER TABLE backup_jobs DROP INDEX vm_name, MODIFY vm_name TEXT")
    for end in ("a", "b", "c"):
        place.appliance.add_repository(end, "/srv")
        place.appliance.add(end, vm_name="x" * 2000 + end, repository_id=end)
    assert [(vm.vm_name[-1], vm.repository_id) for vm in (await store.vms())[0]] == [*zip("abc", "abc", strict=True)]


def bytes_sent(server: Server) -> int:
    """So many since it was started, to all who have asked it."""
    ((_, count),) = server.execute("SHOW GLOBAL STATUS LIKE 'Bytes_sent'")
    return int(count)


async def test_of_huge_texts_no_more_is_fetched_than_shows_it(store: Store, place: Place) -> None:
    place.appliance.execute("ALTER TABLE backup_jobs DROP INDEX vm_name, MODIFY vm_name LONGTEXT")
    place.appliance.add("b0")
    for number in range(1, 10):
        place.appliance.add(f"b{number}", vm_name="x" * 1_000_000)
    before = bytes_sent(place.server)
    assert [backup.id for backup in (await store.backups())[0]] == ["b0"]
    assert [vm.vm_name for vm in (await store.vms())[0]] == ["web"]
    assert bytes_sent(place.server) - before < 100_000  # of the ten million that the two could have asked for
    place.appliance.execute(
        "UPDATE backup_repositories SET config = CONCAT('{\"path\":\"/', REPEAT('x', 70000), '\"}')"
    )
    with pytest.raises(errors.CatalogUnavailable, match="more than 65536 characters"):
        await store.repository("main")


@pytest.mark.parametrize("name", ["restore_mounts", "restore_claims"])
async def test_a_marker_without_marks_makes_no_table_ours(place: Place, name: str) -> None:
    place.server.execute(_MARKER_TABLE, database=place.records)
    place.server.execute(f"CREATE TABLE {name} (x INT)", database=place.records)
    for _ in range(2):
        with pytest.raises(StoreError, match="restore_migrations is empty"):
            await place.open()
    place.server.execute(f"DROP TABLE {name}", database=place.records)
    async with await place.open():
        pass


def test_the_tables_of_the_test_are_not_ours() -> None:
    """They would prove little if they were."""
    assert not any(word in table for table in TABLES for word in ("REAL", "_bin"))
