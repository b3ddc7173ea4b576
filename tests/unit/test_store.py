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
    ClaimRow,
    DiskFile,
    Event,
    Found,
    FoundBackup,
    MountRow,
    MountStatus,
    Problem,
    ScanResult,
    Store,
    Vm,
)
from sendense_restored.daemon.store.catalogue import decode_cursor, encode_cursor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

NOON = datetime(2025, 3, 1, 12, tzinfo=UTC)
GIB = 1 << 30


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with await Store.open(f"sqlite:///{tmp_path}/db/restore.db") as store:
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


def mount(mount_id: str = "m1", backup_id: str = "b1", **columns: Any) -> MountRow:  # noqa: ANN401  # those of MountRow
    row = MountRow(
        id=mount_id,
        backup_id=backup_id,
        backup_disk_id=1,
        disk_index=0,
        mount_path=f"/mnt/{mount_id}",
        journal="replay",
        created_at=NOON,
        last_accessed_at=NOON,
        expires_at=NOON + timedelta(hours=1),
    )
    return replace(row, **columns)


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


async def test_pages_are_newest_first_and_complete(store: Store) -> None:
    # Three share each moment, so that pages end inside a moment as well.
    ids = [f"b{n:02}" for n in range(20)]
    for number, backup_id in enumerate(ids):
        await add(store, backup_id, created_at=NOON + timedelta(seconds=number // 3))
    for limit in (1, 2, 3, 7, 19, 20, 1000):
        seen: list[str] = []
        cursor = ""
        for _ in ids:  # so many pages at most
            page, cursor = await store.backups(limit=limit, cursor=cursor)
            seen += [backup.id for backup in page]
            if not cursor:
                break
            assert len(page) == limit
        assert seen == ids[::-1]


async def test_a_page_goes_on_where_it_ended_when_backups_come_and_go(store: Store) -> None:
    for number in range(4):
        await add(store, f"b{number}", created_at=NOON + timedelta(hours=number))
    page, cursor = await store.backups(limit=2)
    assert [backup.id for backup in page] == ["b3", "b2"]
    await store.remove_backup("b2")
    await add(store, "new", created_at=NOON + timedelta(days=1))
    page, cursor = await store.backups(limit=2, cursor=cursor)
    assert ([backup.id for backup in page], cursor) == (["b1", "b0"], "")


async def test_filters_are_combined(store: Store, raw: sqlite3.Connection) -> None:
    await store.add_repository("Other", "/srv/other")
    await add(store, "web1")
    await add(store, "web2")
    await add(store, "db1", vm_name="db")
    await store.add_backup("other", "web", [DISK], backup_id="other1", created_at=NOON)
    raw.execute("UPDATE backup_jobs SET status = 'failed' WHERE id = 'web2'")

    async def ids(**filters: str) -> list[str]:
        return [backup.id for backup in (await store.backups(**filters))[0]]  # type: ignore[arg-type]

    assert await ids() == ["web2", "web1", "other1", "db1"]
    assert await ids(vm_name="web") == ["web2", "web1", "other1"]
    assert await ids(vm_name="web", status="completed") == ["web1", "other1"]
    assert await ids(vm_name="web", status="completed", repository_id="main") == ["web1"]
    assert await ids(vm_name="WEB") == await ids(vm_name="w%") == await ids(status="") == []


@pytest.mark.parametrize("limit", [0, -1, 1001])
async def test_a_limit_out_of_range_is_refused(store: Store, limit: int) -> None:
    with pytest.raises(errors.InvalidOption, match="1000"):
        await store.backups(limit=limit)


@given(st.text() | st.binary().map(lambda data: base64.urlsafe_b64encode(data).decode().rstrip("=")))
def test_any_text_is_a_cursor_or_an_invalid_option(text: str) -> None:
    try:
        created_at, backup_id = decode_cursor(text)
    except errors.InvalidOption:
        return
    assert encode_cursor(created_at, backup_id) == text


@given(st.datetimes(timezones=st.just(UTC)), st.text(st.characters(exclude_categories=["Cs"]), max_size=64))
def test_a_cursor_reads_back(created_at: datetime, backup_id: str) -> None:
    cursor = encode_cursor(created_at, backup_id)
    assert decode_cursor(cursor) == (created_at, backup_id)
    for other in (cursor + "=", cursor + "\n", " " + cursor):  # a place has one text
        with pytest.raises(errors.InvalidOption):
            decode_cursor(other)


async def test_a_bad_cursor_is_refused_by_the_list(store: Store) -> None:
    with pytest.raises(errors.InvalidOption, match="cursor"):
        await store.backups(cursor="MjAyNS0wMS0wMQ")


async def test_machines_are_listed_by_name_with_their_newest_backup(store: Store) -> None:
    await store.add_repository("Other", "/srv/other")
    assert await store.vms() == ([], "")
    await add(store, "w1", created_at=NOON)
    await add(store, "w2", created_at=NOON + timedelta(hours=2))
    await store.add_backup("other", "web", [DISK], backup_id="w3", created_at=NOON + timedelta(hours=1))
    # Of the same moment: the one that the list of backups shows first.
    await add(store, "d1", vm_name="db", created_at=NOON + timedelta(hours=2))
    await store.add_backup(
        "other", "db", [replace(DISK, path="db/x.qcow2")], backup_id="d2", created_at=NOON + timedelta(hours=2)
    )
    assert await store.vms() == (
        [
            Vm("db", "db", "other", 2, NOON + timedelta(hours=2)),
            Vm("web", "web", "main", 3, NOON + timedelta(hours=2)),
        ],
        "",
    )
    await store.remove_backup("w2")
    assert (await store.vms())[0][1] == Vm("web", "web", "other", 2, NOON + timedelta(hours=1))


async def test_pages_of_machines_are_complete_whatever_their_names(store: Store) -> None:
    names = sorted(["a", "A", "ä", "b:c", "vm:x", "%", "x" * 255, "0", "🙂", "\uef80"])
    for number, name in enumerate(names):
        await add(store, f"b{number}", vm_name=name, disks=[DiskFile(0, f"v/{number}", 1)])
    for limit in (1, 3, 9, 10, 1000):
        seen: list[str] = []
        cursor = ""
        for _ in names:
            page, cursor = await store.vms(limit, cursor)
            seen += [vm.vm_name for vm in page]
            if not cursor:
                break
            assert len(page) == limit
        assert seen == names


async def test_a_cursor_is_good_for_its_own_list_only(store: Store) -> None:
    for number in range(3):
        await add(store, f"b{number}", vm_name=f"vm{number}")
    await store.add_events([Event(NOON, "mounted")] * 3)
    lists: list[Callable[..., Awaitable[tuple[Any, str]]]] = [store.backups, store.vms, store.events]
    cursors = [(await each(limit=2))[1] for each in lists]
    for place, list_ in enumerate(lists):
        for foreign in (*cursors[:place], *cursors[place + 1 :], "x", "%%", "ZXZlbnQ6LTE", "ZXZlbnQ6MXgK", "dm0"):
            with pytest.raises(errors.InvalidOption, match="cursor"):
                await list_(cursor=foreign)
        for limit in (0, -1, 1001):
            with pytest.raises(errors.InvalidOption, match="1000"):
                await list_(limit=limit)


async def test_ids_that_are_still_there_are_told_from_others(store: Store) -> None:
    await add(store, "b1")
    await add(store, "b2")
    assert await store.backup_ids([]) == set()
    assert await store.backup_ids(["b2", "b2", "gone", *(f"x{number}" for number in range(3000)), "b1"]) == {
        "b1",
        "b2",
    }


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


# Mounts and claims


async def test_a_mount_reads_back(store: Store) -> None:
    await add(store, "b1")
    row = mount(
        options={"devices": ["/dev/loop0"], "n": 1}, backup_disk_id=None, disk_index=None, journal="as-crashed"
    )
    await store.insert_mount(row)
    assert await store.mount_rows() == [row]


async def test_columns_change_and_others_stay(store: Store) -> None:
    await add(store, "b1")
    await store.insert_mount(mount())
    await store.insert_mount(mount("m2"))
    changes: dict[str, Any] = {
        "status": MountStatus.MOUNTED,
        "nbd_device": "/dev/nbd0",
        "filesystem_type": "ext4",
        "resume_attempts": 2,
        "options": {"a": [1]},
        "error_message": "",
        "mount_path": "/mnt/other",
        "last_accessed_at": NOON + timedelta(minutes=1),
        "expires_at": NOON + timedelta(minutes=2, microseconds=1),
    }
    await store.update_mount("m1", **changes)
    await store.update_mount("m1")
    assert await store.mount_rows() == [replace(mount(), **changes), mount("m2")]


@pytest.mark.parametrize("column", ["id", "backup_id", "created_at", "nonsense", "journal"])
async def test_a_column_that_does_not_change_is_refused(store: Store, column: str) -> None:
    await add(store, "b1")
    await store.insert_mount(mount())
    with pytest.raises(TypeError, match=column):
        await store.update_mount("m1", **{column: "x"})  # type: ignore[arg-type]
    assert await store.mount_rows() == [mount()]


async def test_a_naive_time_is_refused(store: Store) -> None:
    await add(store, "b1")
    with pytest.raises(ValueError, match="time zone"):
        await store.insert_mount(mount(expires_at=datetime(2025, 1, 1)))  # noqa: DTZ001
    assert await store.mount_rows() == []


async def test_a_mount_that_is_gone_says_so(store: Store) -> None:
    with pytest.raises(errors.MountNotFound):
        await store.update_mount("m1", status=MountStatus.MOUNTED)
    with pytest.raises(errors.MountNotFound):
        await store.put_claim(ClaimRow("m1", 0, "", NOON, NOON))
    assert not await store.delete_mount("m1")
    assert not await store.delete_claim("m1", 0)
    assert await store.claims("m1") == []


async def test_claims_are_put_replaced_and_deleted(store: Store) -> None:
    await add(store, "b1")
    await store.insert_mount(mount())
    first = ClaimRow("m1", 1000, "", NOON, NOON, 60.0)
    second = ClaimRow("m1", 1000, "alice", NOON + timedelta(1), NOON, 86400.5)
    for claim in (second, first):
        await store.put_claim(claim)
    assert await store.claims("m1") == [first, second]
    two = NOON + timedelta(hours=2)
    for later in (replace(first, expires_at=None), replace(first, expires_at=two, timeout=90.0)):
        await store.put_claim(later)
        assert await store.claims("m1") == [later, second]
    assert await store.delete_claim("m1", 1000)
    assert not await store.delete_claim("m1", 1000)
    assert await store.claims("m1") == [second]


async def test_claims_end_with_their_mount_and_mounts_with_their_backup(
    store: Store, raw: sqlite3.Connection
) -> None:
    await add(store, "b1")
    for mount_id in ("m1", "m2", "m3"):
        await store.insert_mount(mount(mount_id))
        await store.put_claim(ClaimRow(mount_id, 7, "", NOON, NOON))
    assert await store.delete_mount("m1")
    assert await store.claims("m1") == []
    assert len(await store.claims("m2")) == 1
    assert await store.delete_all_mounts() == 2
    assert raw.execute("SELECT count(*) FROM restore_claims").fetchone() == (0,)

    await store.insert_mount(mount())
    await store.put_claim(ClaimRow("m1", 7, "", NOON, NOON))
    raw.execute("DELETE FROM backup_jobs WHERE id = 'b1'")  # the appliance's own housekeeping
    assert await store.mount_rows() == []
    assert await store.claims("m1") == []


async def test_what_is_wished_comes_with_its_claims_the_oldest_first(store: Store) -> None:
    assert await store.wished() == []
    await add(store, "b1")
    rows = [mount(f"m{number}", created_at=NOON - timedelta(hours=number)) for number in range(3)]
    for row in rows:
        await store.insert_mount(row)
    claims = [ClaimRow("m0", uid, "", NOON - timedelta(hours=uid), None, 60.0 * uid) for uid in (1, 2)]
    other = ClaimRow("m2", 1, "alice", NOON, NOON)
    for claim in (*claims, other):
        await store.put_claim(claim)
    assert await store.wished() == [(rows[2], (other,)), (rows[1], ()), (rows[0], (claims[1], claims[0]))]


async def test_a_mount_is_written_down_with_its_claims_or_not_at_all(store: Store) -> None:
    await add(store, "b1")
    claims = (ClaimRow("m1", 7, "", NOON, NOON, 60.0), ClaimRow("m1", 8, "alice", NOON, None, 90.0))
    await store.insert_mount(mount(), claims)
    assert await store.wished() == [(mount(), claims)]
    with pytest.raises(errors.MountNotFound):
        await store.insert_mount(mount("m2"), [replace(claims[0], mount_id="m3")])
    assert await store.wished() == [(mount(), claims)]


async def test_a_mount_is_renewed_with_the_claims_that_are_given(store: Store) -> None:
    await add(store, "b1")
    for mount_id in ("m1", "m2"):
        await store.insert_mount(mount(mount_id, resume_attempts=1))
    claims = [ClaimRow(mount_id, 7, behalf, NOON, NOON, 60.0) for mount_id in ("m1", "m2") for behalf in ("", "a")]
    for claim in claims:
        await store.put_claim(claim)
    used, end = NOON + timedelta(minutes=1), NOON + timedelta(hours=5)
    renewed = replace(claims[1], expires_at=end, timeout=1.0)
    unwritten = replace(claims[1], uid=8)  # it could not be written when it was given
    await store.renew("m1", used, end, [renewed, unwritten])  # and the first one not struck out when it was dropped
    assert await store.claims("m1") == [renewed, unwritten]
    assert await store.claims("m2") == claims[2:]
    changed = mount("m1", resume_attempts=1, last_accessed_at=used, expires_at=end)
    assert await store.mount_rows() == [changed, mount("m2", resume_attempts=1)]
    await store.renew("m1", used, None, [])
    assert (await store.mount_rows())[0] == replace(changed, expires_at=None)
    assert await store.claims("m1") == []


async def test_a_mount_that_is_gone_is_not_renewed(store: Store) -> None:
    with pytest.raises(errors.MountNotFound):
        await store.renew("m1", NOON, NOON, [ClaimRow("m1", 7, "", NOON, NOON)])
    assert await store.claims("m1") == []


# What happened


def event(number: int, **columns: Any) -> Event:  # noqa: ANN401  # those of Event
    return replace(Event(NOON + timedelta(seconds=number), "mounted", uid=number), **columns)


async def test_an_event_reads_back(store: Store) -> None:
    full = Event(
        at=NOON,
        what="opened",
        outcome="Unreadable",
        uid=2**32 - 2,
        unit="restore-gui.service",
        on_behalf_of="alice@example.org",
        mount_id="4e5b0c1e-0000-4000-8000-000000000000",
        backup_id="b1",
        path="/partition-1/\uefff/" + "x" * 12000,
        detail="line\nline",
        bytes=2**63 - 1,
        size=0,
    )
    await store.add_events([])
    await store.add_events([full, Event(NOON, "swept")])
    (swept, opened), cursor = await store.events()
    assert cursor == ""
    assert (opened, swept) == (replace(full, id=opened.id), Event(NOON, "swept", id=swept.id))
    assert 0 < opened.id < swept.id


async def test_events_come_newest_first_in_the_order_of_writing(store: Store) -> None:
    # The wall clock was set back meanwhile: what was written later is newer all the same.
    await store.add_events([event(10), event(11)])
    await store.add_events([event(number) for number in range(5)])
    assert [one.uid for one in (await store.events())[0]] == [4, 3, 2, 1, 0, 11, 10]


async def test_pages_of_events_stand_still_while_others_come(store: Store) -> None:
    await store.add_events([event(number, mount_id="even" if number % 2 == 0 else "odd") for number in range(1000)])
    for mount_id, wanted in (("even", range(998, -1, -2)), ("", ()), (None, range(999, -1, -1))):
        seen: list[int | None] = []
        cursor = ""
        for _ in range(1000):
            page, cursor = await store.events(limit=99, cursor=cursor, mount_id=mount_id)
            seen += [one.uid for one in page]
            if not cursor:
                break
            assert len(page) == 99
            await store.add_events([event(-1, mount_id="new")])
        assert [uid for uid in seen if uid != -1] == list(wanted)
        assert -1 not in seen[99:]  # what came after the first page is on none


async def test_the_history_is_bounded_by_number_and_by_age(store: Store) -> None:
    await store.add_events([event(number) for number in range(20)])

    async def left() -> list[int | None]:
        return [one.uid for one in (await store.events())[0]]

    assert await store.trim_events(100, NOON) == 0
    assert await store.trim_events(20, NOON + timedelta(seconds=5)) == 5  # what is exactly so old stays
    assert await left() == [*range(19, 4, -1)]
    assert await store.trim_events(3, NOON) == 12
    assert await left() == [19, 18, 17]
    assert await store.trim_events(3, NOON + timedelta(days=1)) == 3
    assert await left() == []
    assert await store.trim_events(3, NOON + timedelta(days=1)) == 0


async def test_mounts_that_ended_are_known_with_their_reason(store: Store) -> None:
    await store.add_events(
        [
            event(0, what="ended", mount_id="early", detail="expired"),
            event(1, what="ended", mount_id="m1", detail="expired"),
            event(2, what="ended", mount_id="m2", detail="failed"),
            event(3, what="mounted", mount_id="m3"),
            event(4, what="ended", mount_id="m2", detail="gone"),
        ]
    )
    assert await store.ended_mounts(NOON + timedelta(seconds=1)) == {
        "m1": (NOON + timedelta(seconds=1), "expired"),
        "m2": (NOON + timedelta(seconds=4), "gone"),
    }


async def test_events_outlive_mount_and_backup(store: Store) -> None:
    await add(store, "b1")
    await store.insert_mount(mount())
    await store.add_events([event(0, mount_id="m1", backup_id="b1")])
    await store.delete_mount("m1")
    await store.remove_backup("b1")
    assert [one.mount_id for one in (await store.events(mount_id="m1"))[0]] == ["m1"]


@pytest.mark.parametrize(
    ("column", "value"), [("status", "'unmounted'"), ("mount_mode", "'rw'"), ("journal", "''"), ("backup_id", "'x'")]
)
async def test_the_database_itself_refuses_other_words(
    store: Store, raw: sqlite3.Connection, column: str, value: str
) -> None:
    await add(store, "b1")
    await store.insert_mount(mount())
    with pytest.raises(sqlite3.IntegrityError):
        raw.execute(f"UPDATE restore_mounts SET {column} = {value}")


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE restore_mounts SET options = '['",
        "UPDATE restore_mounts SET options = '[]'",
        "UPDATE restore_mounts SET expires_at = 'soon'",
        "UPDATE restore_mounts SET expires_at = 5",
    ],
)
async def test_a_row_that_cannot_be_read_names_its_column(store: Store, raw: sqlite3.Connection, damage: str) -> None:
    await add(store, "b1")
    await store.insert_mount(mount())
    raw.execute(damage)
    with pytest.raises(errors.CatalogUnavailable, match=damage.split()[3]):
        await store.mount_rows()


# Tasks that run at the same time


async def test_tasks_that_interleave_lose_nothing(store: Store) -> None:
    async def one(number: int) -> None:
        await add(store, f"b{number}")
        await store.insert_mount(mount(f"m{number}", f"b{number}"))
        with pytest.raises(errors.InvalidOption):  # rolled back, and with it nobody else's work
            await add(store, f"b{number}")
        await store.put_claim(ClaimRow(f"m{number}", number, "", NOON, NOON))
        await store.update_mount(f"m{number}", resume_attempts=number)

    await asyncio.gather(*map(one, range(40)))
    assert len((await store.backups())[0]) == 40
    assert sorted(row.resume_attempts for row in await store.mount_rows()) == list(range(40))
    assert [len(await store.claims(f"m{number}")) for number in range(40)] == [1] * 40


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
