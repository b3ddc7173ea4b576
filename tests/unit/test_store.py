"""The store as the daemon uses it: catalogue, mounts and claims."""

from __future__ import annotations

import asyncio
import base64
import re
import sqlite3
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sendense_restored import errors
from sendense_restored.daemon.store import (
    Backup,
    DiskFile,
    Found,
    FoundBackup,
    MountStatus,
    Problem,
    ScanResult,
    Store,
)
from sendense_restored.daemon.store.catalogue import Place, decode_cursor, encode_cursor
from sendense_restored.daemon.store.models import to_stored
from tests.records import GIB, NOON, mount, open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with await open_store(f"sqlite:///{tmp_path}/db/restore.db") as store:
        await store.add_repository("Main", "/srv/backups")
        yield store


@pytest.fixture
def raw(store: Store, tmp_path: Path) -> Iterator[sqlite3.Connection]:  # noqa: ARG001  # opened first
    connection = sqlite3.connect(tmp_path / "db/restore.db", isolation_level=None)
    connection.execute("PRAGMA foreign_keys = 1")
    yield connection
    connection.close()


async def add(store: Store, backup_id: str, **options: Any) -> Backup:  # noqa: ANN401  # those of add_backup
    disks = options.pop("disks", [DiskFile(0, f"web/{backup_id}.qcow2", GIB)])
    options.setdefault("created_at", NOON)
    return await store.add_backup("main", options.pop("vm_name", "web"), disks, backup_id=backup_id, **options)


def found(name: str, *, parent: str = "", when: datetime = NOON, sizes: tuple[int, ...] = (GIB,)) -> FoundBackup:
    key = f"web/{name}-diskN" if len(sizes) > 1 else f"web/{name}.qcow2"
    return FoundBackup(
        key=key,
        vm_name="web",
        backup_type="incremental" if parent else "full",
        parent=f"web/{parent}.qcow2" if parent else "",
        created_at=when,
        stored_bytes=1000,
        disks=tuple(DiskFile(index, key.replace("N", f"{index}.qcow2"), size) for index, size in enumerate(sizes)),
    )


def scan_of(*backups: FoundBackup, problems: tuple[Problem, ...] = ()) -> Found:
    return Found(backups, problems)


# Repositories


async def test_a_repository_reads_back_as_it_was_added(store: Store) -> None:
    added = await store.add_repository("Off-site NAS", "/mnt/nas/", type="nfs", immutable=True)
    assert added == await store.repository("off-site-nas")
    assert (added.name, added.type, str(added.root), added.immutable, added.enabled) == (
        "Off-site NAS",
        "nfs",
        "/mnt/nas",
        True,
        True,
    )
    assert [one.id for one in await store.repositories()] == ["main", "off-site-nas"]


async def test_names_that_read_alike_get_ids_of_their_own(store: Store) -> None:
    ids = [
        (await store.add_repository(name, f"/srv/{n}")).id for n, name in enumerate(("a b", "a-b", "a_b", "…", "‽"))
    ]
    assert ids == ["a-b", "a-b-2", "a-b-3", "repository", "repository-2"]


@pytest.mark.parametrize(
    ("name", "path", "type_", "word"),
    [
        ("", "/x", "local", "name"),
        ("x" * 256, "/x", "local", "name"),
        ("Main", "/x", "local", "another name"),
        ("x", "relative", "local", "absolute"),
        ("x", "/a/../b", "local", "absolute"),
        ("x", "/a\0b", "local", "absolute"),
        ("x", "/srv/backups", "local", "Main"),
        ("x", "/srv//backups/./", "local", "Main"),
        ("x", "/x", "no type", "type"),
        ("half \ud800", "/x", "local", "surrogate"),
    ],
)
async def test_a_repository_that_cannot_be_is_refused(
    store: Store, name: str, path: str, type_: str, word: str
) -> None:
    with pytest.raises(errors.InvalidOption, match=word):
        await store.add_repository(name, path, type=type_)
    assert [one.id for one in await store.repositories()] == ["main"]


@pytest.mark.parametrize(
    "config", ["", "{", "[]", "{}", '{"path": 5}', '{"path": "srv"}', '{"path": "/a/../b"}', "null"]
)
async def test_a_broken_configuration_names_its_repository(
    store: Store, raw: sqlite3.Connection, config: str
) -> None:
    raw.execute("UPDATE backup_repositories SET config = ?", (config,))
    with pytest.raises(errors.CatalogUnavailable, match="Main"):
        await store.repository("main")
    assert await store.repositories() == []


async def test_a_mount_point_serves_as_path(store: Store, raw: sqlite3.Connection) -> None:
    raw.execute("""UPDATE backup_repositories SET config = '{"mount_point": "/mnt/nas"}'""")
    assert str((await store.repository("main")).root) == "/mnt/nas"


async def test_a_repository_goes_with_its_backups(store: Store) -> None:
    await add(store, "b1")
    await store.remove_repository("main")
    assert await store.backups() == ([], "")
    for call in (store.repository, store.remove_repository):
        with pytest.raises(errors.BackupNotFound, match="main"):
            await call("main")


async def test_a_repository_stays_while_a_backup_of_it_is_mounted(store: Store) -> None:
    await add(store, "b1")
    await store.insert_mount(mount())
    with pytest.raises(errors.Busy, match="unmount"):
        await store.remove_repository("main")
    assert await store.mount_rows() == [mount()]
    await store.delete_mount("m1")
    await store.remove_repository("main")


# Backups


async def test_a_backup_reads_back_with_its_disks_in_order(store: Store) -> None:
    odd = 3 * GIB + 512
    added = await add(
        store, "b1", disks=[DiskFile(1, "/srv/backups/web/d1.qcow2", odd), DiskFile(0, "web/d0.qcow2", 512)]
    )
    assert added == await store.backup("b1") == (await store.backups())[0][0]
    assert [(disk.index, disk.qcow2_path, disk.size) for disk in added.disks] == [
        (0, "web/d0.qcow2", 512),
        (1, "web/d1.qcow2", odd),
    ]
    assert (added.backup_type, added.status, added.total_bytes) == ("full", "completed", odd + 512)
    assert added.created_at == added.completed_at == NOON
    assert added.created_at is not None
    assert added.created_at.tzinfo is UTC


@pytest.mark.parametrize("size", [1, 512, GIB - 1, GIB + 1, 10**13 + 7, 2**53 - 1])
async def test_a_size_survives_the_column_of_gib(store: Store, size: int) -> None:
    assert (await add(store, "b1", disks=[DiskFile(0, "web/a.qcow2", size)])).disks[0].size == size


async def test_a_time_of_another_zone_is_the_same_time(store: Store) -> None:
    there = NOON.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert (await add(store, "b1", created_at=there)).created_at == NOON


async def test_a_backup_with_a_parent_is_incremental_and_pins_it(store: Store) -> None:
    await add(store, "full")
    child = await add(store, "inc", parent_backup_id="full")
    assert (child.backup_type, child.parent_backup_id) == ("incremental", "full")
    with pytest.raises(errors.InvalidOption, match="inc"):
        await store.remove_backup("full")
    await store.remove_backup("inc")
    await store.remove_backup("full")
    assert await store.backups() == ([], "")


async def test_an_id_is_made_when_none_is_given(store: Store) -> None:
    added = await store.add_backup("main", "Web Server " * 20, [DiskFile(0, "w/a.qcow2", 1)])
    assert re.fullmatch(r"web-server-[a-z-]+-[0-9a-f]{12}", added.id)
    assert len(added.id) <= 64
    assert added.created_at is not None
    assert abs(added.created_at - datetime.now(UTC)) < timedelta(minutes=1)


DISK = DiskFile(0, "web/x.qcow2", 1)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"vm_name": ""}, "name"),
        ({"vm_name": "x" * 256}, "name"),
        ({"disks": []}, "at least one"),
        ({"disks": [DISK, replace(DISK, path="web/y.qcow2")]}, "index"),
        ({"disks": [replace(DISK, index=-1)]}, "index"),
        ({"disks": [replace(DISK, size=0)]}, "size"),
        ({"disks": [replace(DISK, size=2**63)]}, "size"),
        ({"disks": [replace(DISK, path="/etc/shadow")]}, "inside"),
        ({"disks": [replace(DISK, path="/srv/backups")]}, "inside"),
        ({"disks": [replace(DISK, path="../x")]}, "inside"),
        ({"disks": [replace(DISK, path="")]}, "inside"),
        ({"disks": [replace(DISK, path="a\0b")]}, "inside"),
        ({"disks": [replace(DISK, path="web/b1.qcow2")]}, "'b1'"),
        ({"backup_id": "b1"}, "another id"),
        ({"backup_id": "-x"}, "id"),
        ({"backup_id": "x" * 65}, "id"),
        ({"backup_id": "a b"}, "id"),
        ({"parent_backup_id": "elsewhere"}, "another repository"),
    ],
)
async def test_a_backup_that_cannot_be_is_refused(store: Store, change: dict[str, Any], word: str) -> None:
    await store.add_repository("Other", "/srv/other")
    await store.add_backup("other", "web", [DISK], backup_id="elsewhere")
    await add(store, "b1")
    before = await store.backups()
    options = {"vm_name": "web", "disks": [DISK], **change}
    with pytest.raises(errors.InvalidOption, match=word):
        await store.add_backup("main", options.pop("vm_name"), options.pop("disks"), **options)
    assert await store.backups() == before


async def test_unknown_ids_are_not_found(store: Store) -> None:
    for call in (
        store.backup("nope"),
        store.remove_backup("nope"),
        store.repository("nope"),
        store.add_backup("nope", "web", [DISK]),
        store.add_backup("main", "web", [DISK], parent_backup_id="nope"),
        store.record_scan("nope", scan_of()),
        store.insert_mount(mount(backup_id="nope")),
    ):
        with pytest.raises(errors.BackupNotFound, match="nope"):
            await call


@pytest.mark.parametrize("status", [MountStatus.MOUNTING, MountStatus.MOUNTED])
async def test_a_mounted_backup_stays(store: Store, status: MountStatus) -> None:
    await add(store, "b1")
    await store.insert_mount(mount(status=status))
    for removing in (store.remove_backup("b1"), store.remove_repository("main")):
        with pytest.raises(errors.Busy):
            await removing
    assert (await store.backup("b1")).id == "b1"


@pytest.mark.parametrize("status", [MountStatus.FAILED, MountStatus.UNMOUNTING])
async def test_a_mount_that_failed_or_ends_holds_nothing_back(store: Store, status: MountStatus) -> None:
    (backup_id,) = (await store.record_scan("main", scan_of(found("a")))).added
    await add(store, "b1")
    for number, mounted in enumerate((backup_id, "b1")):
        await store.insert_mount(mount(f"m{number}", mounted, status=status))
    await store.remove_backup("b1")
    problem = Problem("elsewhere", "cannot be read")
    assert (await store.record_scan("main", scan_of(problems=(problem,)))).gone == (backup_id,)
    assert await store.mount_rows() == []
    await add(store, "b1")
    await store.insert_mount(mount(status=status))
    await store.remove_repository("main")
    assert await store.mount_rows() == []


# Lists


@pytest.mark.parametrize("limit", [0, -1, 1001])
async def test_a_limit_out_of_range_is_refused(store: Store, limit: int) -> None:
    with pytest.raises(errors.InvalidOption, match="1000"):
        await store.backups(limit=limit)


@given(st.text() | st.binary().map(lambda data: base64.urlsafe_b64encode(data).decode().rstrip("=")))
def test_any_text_is_a_cursor_or_an_invalid_option(text: str) -> None:
    try:
        place = decode_cursor(text)
    except errors.InvalidOption:
        return
    assert encode_cursor(place) == text


@given(
    st.datetimes(timezones=st.just(UTC)).map(to_stored) | st.just(""),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=64),
)
def test_a_cursor_reads_back(moment: str, backup_id: str) -> None:
    cursor = encode_cursor(Place(moment, backup_id))
    assert decode_cursor(cursor) == (moment, backup_id)
    for other in (cursor + "=", cursor + "\n", " " + cursor):  # a place has one text
        with pytest.raises(errors.InvalidOption):
            decode_cursor(other)


async def test_a_bad_cursor_is_refused_by_the_list(store: Store) -> None:
    with pytest.raises(errors.InvalidOption, match="cursor"):
        await store.backups(cursor="MjAyNS0wMS0wMQ")


# What somebody else has written


@pytest.mark.parametrize("value", ["'soon'", "5"])
async def test_a_mount_with_a_time_that_is_none_names_the_column(
    store: Store, raw: sqlite3.Connection, value: str
) -> None:
    await add(store, "b1")
    await store.insert_mount(mount())
    raw.execute(f"UPDATE restore_mounts SET expires_at = {value}")
    with pytest.raises(errors.CatalogUnavailable, match="expires_at"):
        await store.mount_rows()


# Scans


async def test_a_scan_is_recorded_once(store: Store) -> None:
    scanned = scan_of(found("full"), found("inc", parent="full"), found("two", sizes=(1, 2)))
    first = await store.record_scan("main", scanned)
    assert (len(first.added), first.updated, first.gone, first.kept, first.unchanged) == (3, (), (), (), 0)
    before = await store.backups()
    assert await store.record_scan("main", scanned) == ScanResult((), (), (), (), 3)
    assert await store.backups() == before

    full, inc, two = [await store.backup(backup_id) for backup_id in first.added]
    assert (full.parent_backup_id, inc.parent_backup_id, inc.backup_type) == (None, full.id, "incremental")
    assert [(disk.index, disk.qcow2_path, disk.size) for disk in two.disks] == [
        (0, "web/two-disk0.qcow2", 1),
        (1, "web/two-disk1.qcow2", 2),
    ]
    assert (two.total_bytes, two.bytes_transferred, two.completed_at) == (3, 1000, NOON)


async def test_a_child_may_be_recorded_before_its_parent(store: Store) -> None:
    result = await store.record_scan("main", scan_of(found("inc", parent="full"), found("full")))
    assert (await store.backup(result.added[0])).parent_backup_id == result.added[1]


async def test_a_changed_file_updates_its_backup_and_keeps_the_ids(store: Store) -> None:
    (backup_id,) = (await store.record_scan("main", scan_of(found("a", sizes=(1, 2))))).added
    before = await store.backup(backup_id)
    result = await store.record_scan("main", scan_of(found("a", sizes=(1, 5, 6), when=NOON + timedelta(hours=1))))
    assert result == ScanResult((), (backup_id,), (), (), 0)
    after = await store.backup(backup_id)
    assert [disk.size for disk in after.disks] == [1, 5, 6]
    assert [disk.id for disk in after.disks[:2]] == [disk.id for disk in before.disks]
    assert after.created_at == NOON + timedelta(hours=1)
    lone = replace(found("a", sizes=(1, 5)), disks=(DiskFile(1, "web/a-disk1.qcow2", 5),))
    assert (await store.record_scan("main", scan_of(lone))).updated == (backup_id,)
    assert [disk.id for disk in (await store.backup(backup_id)).disks] == [before.disks[1].id]


async def test_what_is_gone_leaves_the_catalogue_unless_it_is_mounted(store: Store) -> None:
    result = await store.record_scan("main", scan_of(found("a"), found("b"), found("c", parent="b"), found("d")))
    a, b, c, d = result.added
    await store.insert_mount(mount(backup_id=c))
    assert await store.record_scan("main", scan_of(found("a"))) == ScanResult((), (), tuple(sorted([b, d])), (c,), 1)
    assert {backup.id for backup in (await store.backups())[0]} == {a, c}
    assert (await store.backup(c)).parent_backup_id is None
    assert [row.backup_id for row in await store.mount_rows()] == [c]
    await store.delete_mount("m1")
    assert (await store.record_scan("main", scan_of(found("a")))).gone == (c,)


@pytest.mark.parametrize("path", ["web/a.qcow2", "web", "/"])
async def test_what_is_there_but_unreadable_stays(store: Store, path: str) -> None:
    (a,) = (await store.record_scan("main", scan_of(found("a")))).added
    result = await store.record_scan("main", scan_of(problems=(Problem(path, "cannot be read"),)))
    assert (result.kept, result.gone) == ((a,), ())


async def test_an_unmounted_file_server_does_not_empty_the_catalogue(store: Store) -> None:
    assert await store.record_scan("main", scan_of()) == ScanResult((), (), (), (), 0)
    await store.record_scan("main", scan_of(found("a")))
    with pytest.raises(errors.Unavailable, match="storage is mounted"):
        await store.record_scan("main", scan_of())
    assert len((await store.backups())[0]) == 1


async def test_what_was_added_by_hand_is_not_touched_by_a_scan(store: Store) -> None:
    by_hand = await add(store, "b1", disks=[DiskFile(0, "web/full.qcow2", 77)])
    odd = await add(store, "odd", disks=[DiskFile(0, "loose.img", 77)])
    result = await store.record_scan("main", scan_of(found("full"), found("inc", parent="full")))
    assert (len(result.added), result.gone, result.unchanged) == (1, (), 1)
    assert await store.backup("b1") == by_hand
    assert await store.backup("odd") == odd
    assert (await store.backup(result.added[0])).parent_backup_id == "b1"


async def test_ids_differ_by_repository_and_never_by_what_else_is_there(store: Store) -> None:
    await store.add_repository("Other", "/srv/other")
    first = (await store.record_scan("main", scan_of(found("a"), found("A"), found("ä")))).added
    second = (await store.record_scan("other", scan_of(found("a")))).added
    assert len({*first, *second}) == 4
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", backup_id) for backup_id in (*first, *second))
    await store.remove_repository("main")
    await store.add_repository("Main", "/srv/backups")
    assert (await store.record_scan("main", scan_of(found("ä")))).added == first[2:]


async def test_a_long_name_makes_an_id_that_fits(store: Store) -> None:
    (backup_id,) = (await store.record_scan("main", scan_of(found("x" * 200)))).added
    assert len(backup_id) == 64


# Tasks that run at the same time


async def test_a_unit_that_fails_half_way_leaves_nothing(store: Store) -> None:
    broken = replace(found("b"), disks=(DiskFile(0, "web/b.qcow2", 1), DiskFile(0, "web/c.qcow2", 1)))
    with pytest.raises(Exception, match="UNIQUE"):
        await store.record_scan("main", scan_of(found("a"), broken))
    assert await store.backups() == ([], "")


async def test_a_cancelled_caller_stops_no_one_else(store: Store) -> None:
    tasks = [asyncio.create_task(add(store, f"b{number}")) for number in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    ids = {backup.id for backup in (await store.backups())[0]}
    assert {f"b{number}" for number in range(1, 20, 2)} <= ids
