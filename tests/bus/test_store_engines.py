"""The store over either engine, wherever our records and the catalogue are: the same answers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sendense_restored import errors
from sendense_restored.daemon.store import (
    Backup,
    BackupDisk,
    ClaimRow,
    DiskFile,
    Event,
    Found,
    MountStatus,
    Repository,
    Vm,
    vms,
)
from sendense_restored.daemon.store.rows import Row, fetch
from tests.bus.appliance import LAYOUTS, House
from tests.bus.appliance import house as opened
from tests.records import GIB, NOON, event, mount

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tools.lab.mariadb import Server


@pytest.fixture(params=LAYOUTS)
async def any_house(request: pytest.FixtureRequest, tmp_path: Path, mariadb: Server) -> AsyncIterator[House]:
    async with opened(request.param, tmp_path, mariadb) as house:
        yield house


@pytest.fixture(params=["embedded", "two databases", "records in a file"])
async def house(request: pytest.FixtureRequest, tmp_path: Path, mariadb: Server) -> AsyncIterator[House]:
    """Where it does not matter how the catalogue is read."""
    async with opened(request.param, tmp_path, mariadb) as house:
        yield house


# The catalogue


async def test_a_backup_reads_back_with_its_disks(any_house: House) -> None:
    house = any_house
    times: dict[str, Any] = {"started_at": NOON - timedelta(hours=1), "completed_at": NOON + timedelta(hours=1)}
    house.appliance.add("full", disks=(GIB, 3 * GIB // 2))
    house.appliance.add("b1", parent_backup_id="full", backup_type="incremental", bytes_transferred=77, **times)
    disks = [disk.id for disk in (await house.store.backup("full")).disks]
    assert await house.store.backup("full") == Backup(
        *("full", "web", "main", "full", "completed", None, 5 * GIB // 2, 0, NOON, None, None),
        disks=(
            BackupDisk(disks[0], 0, "full/disk0", GIB, "completed"),
            BackupDisk(disks[1], 1, "full/disk1", 3 * GIB // 2, "completed"),
        ),
    )
    found = await house.store.backup("b1")
    assert (found.parent_backup_id, found.backup_type, found.bytes_transferred) == ("full", "incremental", 77)
    assert (found.started_at, found.completed_at) == (times["started_at"], times["completed_at"])
    assert [backup.id for backup in (await house.store.backups())[0]] == ["full", "b1"]
    repository = Repository("main", "main", "local", True, Path("/srv/backups"), False)
    assert await house.store.repository("main") == repository
    assert await house.store.repositories() == [repository]


async def test_what_is_not_there_is_not_found(any_house: House) -> None:
    house = any_house
    house.appliance.add("b1")
    for call in (house.store.backup, house.store.repository):
        for unknown in ("nope", "B1", "MAIN", "b1 ", "", "0"):
            with pytest.raises(errors.BackupNotFound, match="there is no"):
                await call(unknown)


async def test_the_catalogue_is_written_only_where_it_is_ours(any_house: House) -> None:
    house = any_house
    adding = house.store.add_repository("Other", "/srv/other")
    if house.store.embedded:
        assert (await adding).id == "other"
        return
    for call in (
        adding,
        house.store.remove_repository("main"),
        house.store.add_backup("main", "web", [DiskFile(0, "x", 1)]),
        house.store.remove_backup("b1"),
        house.store.record_scan("main", Found((), ())),
    ):
        with pytest.raises(errors.InvalidOption, match="belongs to the appliance"):
            await call
    assert [one.id for one in await house.store.repositories()] == ["main"]


async def test_a_mount_needs_its_backup_where_the_database_can_tell(any_house: House) -> None:
    house = any_house
    if not house.tied:
        await house.store.insert_mount(mount())
        assert await house.store.mount_rows() == [mount()]
        return
    with pytest.raises(errors.BackupNotFound, match="b1"):
        await house.store.insert_mount(mount(), [ClaimRow("m1", 7, "", NOON, NOON)])
    assert await house.store.wished() == []


async def test_pages_are_newest_first_and_complete(any_house: House) -> None:
    house = any_house
    # Three share each moment, so that pages end inside a moment as well.
    ids = [f"b{n:02}" for n in range(20)]
    for number, backup_id in enumerate(ids):
        house.appliance.add(backup_id, created_at=NOON + timedelta(seconds=number // 3))
    for limit in (1, 2, 3, 7, 19, 20, 1000):
        seen: list[str] = []
        cursor = ""
        for _ in ids:  # so many pages at most
            page, cursor = await house.store.backups(limit=limit, cursor=cursor)
            seen += [backup.id for backup in page]
            if not cursor:
                break
            assert len(page) == limit
        assert seen == ids[::-1]


async def test_a_page_goes_on_where_it_ended_when_backups_come_and_go(any_house: House) -> None:
    house = any_house
    for number in range(4):
        house.appliance.add(f"b{number}", created_at=NOON + timedelta(hours=number))
    page, cursor = await house.store.backups(limit=2)
    assert [backup.id for backup in page] == ["b3", "b2"]
    house.appliance.remove("b2")
    house.appliance.add("new", created_at=NOON + timedelta(days=1))
    page, cursor = await house.store.backups(limit=2, cursor=cursor)
    assert ([backup.id for backup in page], cursor) == (["b1", "b0"], "")


async def test_filters_are_combined(any_house: House) -> None:
    house = any_house
    house.appliance.add_repository("other", "/srv/other")
    house.appliance.add("web1")
    house.appliance.add("web2")
    house.appliance.add("db1", vm_name="db")
    house.appliance.add("other1", repository_id="other")
    house.appliance.execute("UPDATE backup_jobs SET status = 'failed' WHERE id = 'web2'")

    async def ids(**filters: str) -> list[str]:
        return [backup.id for backup in (await house.store.backups(**filters))[0]]  # type: ignore[arg-type]

    assert await ids() == ["web2", "web1", "other1", "db1"]
    assert await ids(vm_name="web") == ["web2", "web1", "other1"]
    assert await ids(vm_name="web", status="completed") == ["web1", "other1"]
    assert await ids(vm_name="web", status="completed", repository_id="main") == ["web1"]
    assert await ids(vm_name="WEB") == await ids(vm_name="w%") == await ids(status="") == []


async def test_machines_are_listed_by_name_with_their_newest_backup(any_house: House) -> None:
    house = any_house
    house.appliance.add_repository("other", "/srv/other")
    assert await house.store.vms() == ([], "")
    house.appliance.add("w1", created_at=NOON)
    house.appliance.add("w2", created_at=NOON + timedelta(hours=2))
    house.appliance.add("w3", repository_id="other", created_at=NOON + timedelta(hours=1))
    # Of the same moment: the one that the list of backups shows first.
    house.appliance.add("d1", vm_name="db", created_at=NOON + timedelta(hours=2))
    house.appliance.add("d2", vm_name="db", repository_id="other", created_at=NOON + timedelta(hours=2))
    assert await house.store.vms() == (
        [
            Vm("db", "db", "other", 2, NOON + timedelta(hours=2)),
            Vm("web", "web", "main", 3, NOON + timedelta(hours=2)),
        ],
        "",
    )
    house.appliance.remove("w2")
    assert (await house.store.vms())[0][1] == Vm("web", "web", "other", 2, NOON + timedelta(hours=1))


async def test_of_many_backups_of_a_moment_the_newest_alone_is_fetched(
    any_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = any_house
    fetched: list[Row] = []

    def counted(*query: Any) -> list[Row]:  # noqa: ANN401  # those of ``fetch``
        rows = fetch(*query)
        fetched.extend(rows)
        return rows

    monkeypatch.setattr(vms, "fetch", counted)
    house.appliance.add_repository("other", "/srv/other")
    names = ["WEB", "db", "web", "wéb"]
    for place, name in enumerate(names):
        for number in range(20):
            house.appliance.add(
                f"b{place}{number:02}", vm_name=name, repository_id="main" if number < 19 else "other"
            )
    expected = [Vm(name, name, "other", 20, NOON) for name in names]
    assert (await house.store.vms())[0] == expected
    assert len(fetched) == len(names)
    if not house.store.embedded:  # which knows the time of each
        fetched.clear()
        house.appliance.execute("UPDATE backup_jobs SET created_at = NULL WHERE id < 'b319'")
        assert (await house.store.vms())[0] == [replace(vm, newest=None) for vm in expected[:-1]] + expected[-1:]
        assert len(fetched) == len(names)


async def test_pages_of_machines_are_complete_whatever_their_names(any_house: House) -> None:
    house = any_house
    names = sorted(["a", "A", "ä", "b:c", "vm:x", "%", "x" * 255, "0", "🙂", "\uef80"])
    for number, name in enumerate(names):
        house.appliance.add(f"b{number}", vm_name=name)
    for limit in (1, 3, 9, 10, 1000):
        seen: list[str] = []
        cursor = ""
        for _ in names:
            page, cursor = await house.store.vms(limit, cursor)
            seen += [vm.vm_name for vm in page]
            if not cursor:
                break
            assert len(page) == limit
        assert seen == names


async def test_a_cursor_is_good_for_its_own_list_only(any_house: House) -> None:
    house = any_house
    for number in range(3):
        house.appliance.add(f"b{number}", vm_name=f"vm{number}")
    await house.store.add_events([Event(NOON, "mounted")] * 3)
    lists: list[Callable[..., Awaitable[tuple[Any, str]]]] = [
        house.store.backups,
        house.store.vms,
        house.store.events,
    ]
    cursors = [(await each(limit=2))[1] for each in lists]
    for place, list_ in enumerate(lists):
        for foreign in (*cursors[:place], *cursors[place + 1 :], "x", "%%", "ZXZlbnQ6LTE", "ZXZlbnQ6MXgK", "dm0"):
            with pytest.raises(errors.InvalidOption, match="cursor"):
                await list_(cursor=foreign)
        for limit in (0, -1, 1001):
            with pytest.raises(errors.InvalidOption, match="1000"):
                await list_(limit=limit)


async def test_ids_that_are_still_there_are_told_from_others(any_house: House) -> None:
    house = any_house
    house.appliance.add("b1")
    house.appliance.add("b2")
    assert await house.store.backup_ids([]) == set()
    assert await house.store.backup_ids(["b2", "b2", "gone", *(f"x{number}" for number in range(3000)), "b1"]) == {
        "b1",
        "b2",
    }


async def test_tasks_that_interleave_lose_nothing(house: House) -> None:
    async def one(number: int) -> None:
        house.appliance.add(f"b{number}")
        await house.store.insert_mount(mount(f"m{number}", f"b{number}"))
        with pytest.raises(errors.MountNotFound):  # rolled back, and with it nobody else's work
            await house.store.insert_mount(mount(f"x{number}"), [ClaimRow("nope", 1, "", NOON, NOON)])
        await house.store.put_claim(ClaimRow(f"m{number}", number, "", NOON, NOON))
        await house.store.update_mount(f"m{number}", resume_attempts=number)

    await asyncio.gather(*map(one, range(40)))
    assert len((await house.store.backups())[0]) == 40
    assert sorted(row.resume_attempts for row in await house.store.mount_rows()) == list(range(40))
    assert [len(await house.store.claims(f"m{number}")) for number in range(40)] == [1] * 40


# Mounts and claims


async def test_a_mount_reads_back(house: House) -> None:
    house.appliance.add("b1")
    row = mount(
        options={"devices": ["/dev/loop0"], "n": 1}, backup_disk_id=None, disk_index=None, journal="as-crashed"
    )
    await house.store.insert_mount(row)
    assert await house.store.mount_rows() == [row]


async def test_columns_change_and_others_stay(house: House) -> None:
    house.appliance.add("b1")
    await house.store.insert_mount(mount())
    await house.store.insert_mount(mount("m2"))
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
    await house.store.update_mount("m1", **changes)
    await house.store.update_mount("m1")
    assert await house.store.mount_rows() == [replace(mount(), **changes), mount("m2")]


@pytest.mark.parametrize("column", ["id", "backup_id", "created_at", "nonsense", "journal"])
async def test_a_column_that_does_not_change_is_refused(house: House, column: str) -> None:
    house.appliance.add("b1")
    await house.store.insert_mount(mount())
    with pytest.raises(TypeError, match=column):
        await house.store.update_mount("m1", **{column: "x"})  # type: ignore[arg-type]
    assert await house.store.mount_rows() == [mount()]


async def test_a_naive_time_is_refused(house: House) -> None:
    house.appliance.add("b1")
    with pytest.raises(ValueError, match="time zone"):
        await house.store.insert_mount(mount(expires_at=datetime(2025, 1, 1)))  # noqa: DTZ001
    assert await house.store.mount_rows() == []


async def test_a_mount_that_is_gone_says_so(house: House) -> None:
    with pytest.raises(errors.MountNotFound):
        await house.store.update_mount("m1", status=MountStatus.MOUNTED)
    with pytest.raises(errors.MountNotFound):
        await house.store.put_claim(ClaimRow("m1", 0, "", NOON, NOON))
    assert not await house.store.delete_mount("m1")
    assert not await house.store.delete_claim("m1", 0)
    assert await house.store.claims("m1") == []


async def test_claims_are_put_replaced_and_deleted(house: House) -> None:
    house.appliance.add("b1")
    await house.store.insert_mount(mount())
    first = ClaimRow("m1", 1000, "", NOON, NOON, 60.0)
    second = ClaimRow("m1", 1000, "alice", NOON + timedelta(1), NOON, 86400.5)
    for claim in (second, first):
        await house.store.put_claim(claim)
    assert await house.store.claims("m1") == [first, second]
    two = NOON + timedelta(hours=2)
    for later in (replace(first, expires_at=None), replace(first, expires_at=two, timeout=90.0)):
        await house.store.put_claim(later)
        assert await house.store.claims("m1") == [later, second]
    assert await house.store.delete_claim("m1", 1000)
    assert not await house.store.delete_claim("m1", 1000)
    assert await house.store.claims("m1") == [second]


async def test_claims_end_with_their_mount_and_mounts_with_their_backup(house: House) -> None:
    house.appliance.add("b1")
    for mount_id in ("m1", "m2", "m3"):
        await house.store.insert_mount(mount(mount_id))
        await house.store.put_claim(ClaimRow(mount_id, 7, "", NOON, NOON))
    assert await house.store.delete_mount("m1")
    assert await house.store.claims("m1") == []
    assert len(await house.store.claims("m2")) == 1
    assert await house.store.delete_all_mounts() == 2
    assert house.ours.execute("SELECT count(*) FROM restore_claims") == [(0,)]

    await house.store.insert_mount(mount())
    await house.store.put_claim(ClaimRow("m1", 7, "", NOON, NOON))
    house.appliance.remove("b1")  # its own housekeeping
    left = 0 if house.tied else 1
    assert len(await house.store.mount_rows()) == left
    assert len(await house.store.claims("m1")) == left


async def test_what_is_wished_comes_with_its_claims_the_oldest_first(house: House) -> None:
    assert await house.store.wished() == []
    house.appliance.add("b1")
    rows = [mount(f"m{number}", created_at=NOON - timedelta(hours=number)) for number in range(3)]
    for row in rows:
        await house.store.insert_mount(row)
    claims = [ClaimRow("m0", uid, "", NOON - timedelta(hours=uid), None, 60.0 * uid) for uid in (1, 2)]
    other = ClaimRow("m2", 1, "alice", NOON, NOON)
    for claim in (*claims, other):
        await house.store.put_claim(claim)
    assert await house.store.wished() == [(rows[2], (other,)), (rows[1], ()), (rows[0], (claims[1], claims[0]))]


async def test_a_mount_is_written_down_with_its_claims_or_not_at_all(house: House) -> None:
    house.appliance.add("b1")
    claims = (ClaimRow("m1", 7, "", NOON, NOON, 60.0), ClaimRow("m1", 8, "alice", NOON, None, 90.0))
    await house.store.insert_mount(mount(), claims)
    assert await house.store.wished() == [(mount(), claims)]
    with pytest.raises(errors.MountNotFound):
        await house.store.insert_mount(mount("m2"), [replace(claims[0], mount_id="m3")])
    assert await house.store.wished() == [(mount(), claims)]


async def test_a_mount_is_renewed_with_the_claims_that_are_given(house: House) -> None:
    house.appliance.add("b1")
    for mount_id in ("m1", "m2"):
        await house.store.insert_mount(mount(mount_id, resume_attempts=1))
    claims = [ClaimRow(mount_id, 7, behalf, NOON, NOON, 60.0) for mount_id in ("m1", "m2") for behalf in ("", "a")]
    for claim in claims:
        await house.store.put_claim(claim)
    used, end = NOON + timedelta(minutes=1), NOON + timedelta(hours=5)
    renewed = replace(claims[1], expires_at=end, timeout=1.0)
    unwritten = replace(claims[1], uid=8)  # it could not be written when it was given
    # The first one was not struck out when it was dropped.
    await house.store.renew("m1", [renewed, unwritten], last_accessed_at=used, expires_at=end, nbd_device="/dev/nbd1")
    assert await house.store.claims("m1") == [renewed, unwritten]
    assert await house.store.claims("m2") == claims[2:]
    changed = mount("m1", resume_attempts=1, last_accessed_at=used, expires_at=end, nbd_device="/dev/nbd1")
    assert await house.store.mount_rows() == [changed, mount("m2", resume_attempts=1)]
    await house.store.renew("m1", [], expires_at=None)
    assert (await house.store.mount_rows())[0] == replace(changed, expires_at=None)
    assert await house.store.claims("m1") == []


async def test_a_mount_that_is_gone_is_not_renewed(house: House) -> None:
    with pytest.raises(errors.MountNotFound):
        await house.store.renew("m1", [ClaimRow("m1", 7, "", NOON, NOON)], last_accessed_at=NOON)
    assert await house.store.claims("m1") == []


# What happened


async def test_an_event_reads_back(house: House) -> None:
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
    await house.store.add_events([])
    await house.store.add_events([full, Event(NOON, "swept")])
    (swept, opened), cursor = await house.store.events()
    assert cursor == ""
    assert (opened, swept) == (replace(full, id=opened.id), Event(NOON, "swept", id=swept.id))
    assert 0 < opened.id < swept.id


async def test_events_come_newest_first_in_the_order_of_writing(house: House) -> None:
    # The wall clock was set back meanwhile: what was written later is newer all the same.
    await house.store.add_events([event(10), event(11)])
    await house.store.add_events([event(number) for number in range(5)])
    assert [one.uid for one in (await house.store.events())[0]] == [4, 3, 2, 1, 0, 11, 10]


async def test_an_id_of_an_event_is_never_given_again(house: House) -> None:
    await house.store.add_events([event(1), event(2)])
    (last, *_), _ = await house.store.events()
    assert await house.store.trim_events(0, NOON + timedelta(days=1)) == 2
    await house.store.add_events([event(3)])
    (new,), _ = await house.store.events()
    assert new.id > last.id


async def test_pages_of_events_stand_still_while_others_come(house: House) -> None:
    await house.store.add_events(
        [event(number, mount_id="even" if number % 2 == 0 else "odd") for number in range(1000)]
    )
    for mount_id, wanted in (("even", range(998, -1, -2)), ("", ()), (None, range(999, -1, -1))):
        seen: list[int | None] = []
        cursor = ""
        for _ in range(1000):
            page, cursor = await house.store.events(limit=99, cursor=cursor, mount_id=mount_id)
            seen += [one.uid for one in page]
            if not cursor:
                break
            assert len(page) == 99
            await house.store.add_events([event(-1, mount_id="new")])
        assert [uid for uid in seen if uid != -1] == list(wanted)
        assert -1 not in seen[99:]  # what came after the first page is on none


async def test_the_history_is_bounded_by_number_and_by_age(house: House) -> None:
    await house.store.add_events([event(number) for number in range(20)])

    async def left() -> list[int | None]:
        return [one.uid for one in (await house.store.events())[0]]

    assert await house.store.trim_events(100, NOON) == 0
    assert await house.store.trim_events(20, NOON + timedelta(seconds=5)) == 5  # what is exactly so old stays
    assert await left() == [*range(19, 4, -1)]
    assert await house.store.trim_events(3, NOON) == 12
    assert await left() == [19, 18, 17]
    assert await house.store.trim_events(3, NOON + timedelta(days=1)) == 3
    assert await left() == []
    assert await house.store.trim_events(3, NOON + timedelta(days=1)) == 0


async def test_mounts_that_ended_are_known_with_their_reason(house: House) -> None:
    await house.store.add_events(
        [
            event(0, what="ended", mount_id="early", detail="expired"),
            event(1, what="ended", mount_id="m1", detail="expired"),
            event(2, what="ended", mount_id="m2", detail="failed"),
            event(3, what="mounted", mount_id="m3"),
            event(4, what="ended", mount_id="m2", detail="gone"),
        ]
    )
    assert await house.store.ended_mounts(NOON + timedelta(seconds=1)) == {
        "m1": (NOON + timedelta(seconds=1), "expired"),
        "m2": (NOON + timedelta(seconds=4), "gone"),
    }


async def test_events_outlive_mount_and_backup(house: House) -> None:
    house.appliance.add("b1")
    await house.store.insert_mount(mount())
    await house.store.add_events([event(0, mount_id="m1", backup_id="b1")])
    await house.store.delete_mount("m1")
    house.appliance.remove("b1")
    assert [one.mount_id for one in (await house.store.events(mount_id="m1"))[0]] == ["m1"]


@pytest.mark.parametrize(("column", "value"), [("status", "'unmounted'"), ("mount_mode", "'rw'"), ("journal", "''")])
async def test_the_database_itself_refuses_other_words(house: House, column: str, value: str) -> None:
    house.appliance.add("b1")
    await house.store.insert_mount(mount())
    with pytest.raises(Exception, match=r"(?i)constraint"):
        house.ours.execute(f"UPDATE restore_mounts SET {column} = {value}")


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE restore_mounts SET options = '['",
        "UPDATE restore_mounts SET options = '[]'",
    ],
)
async def test_a_row_that_cannot_be_read_names_its_column(house: House, damage: str) -> None:
    house.appliance.add("b1")
    await house.store.insert_mount(mount())
    house.ours.execute(damage)
    with pytest.raises(errors.CatalogUnavailable, match=damage.split()[3]):
        await house.store.mount_rows()
