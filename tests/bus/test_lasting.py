"""What lasts and what ends, as callers see it: claims, time, room, streams, the history, over a simulated host."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from sendense_restored import errors
from sendense_restored.client import MOUNT, ROOT, Client, mount_id, mount_object
from tests import simulator as sim
from tests.bus.peer import Message, MessageType, error_of
from tests.bus.served import ANNA, BERT, ROOT_UID, Served, served, variants

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.bus.served import User


@pytest.fixture
async def service(bus_address: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with served(bus_address, tmp_path) as service:
        yield service


async def become(service: Served, condition: Callable[[], bool]) -> None:
    """Let the service work until something is so."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0)
    del service


async def call(user: User, member: str, mount: str, *arguments: object, **options: tuple[str, object]) -> Message:
    signature = "s" * len(arguments) + "a{sv}"
    path = mount_object(mount)
    return await user.ask(member, signature, *arguments, variants(**options), path=path, interface=MOUNT)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: variant.value for name, variant in values.items()}


async def claims(user: User, mount: str) -> list[dict[str, Any]]:
    return [plain(claim) for claim in (await user.properties(mount)).body[0]["Claims"].value]


# --- time -----------------------------------------------------------------------------------------------------------


async def test_a_mount_that_nobody_uses_ends_to_the_second_and_says_why(service: Served, client: Client) -> None:
    mount = await client.mount("b1", idle_timeout=120)
    service.clock.advance(119)
    assert (await client.mount_info(mount)).expires_at == int(service.clock.unix()) + 1
    service.clock.advance(1)
    await become(service, lambda: not list(service.mounts))
    with pytest.raises(errors.Expired, match="nobody used it for 2 min"):
        await client.list_files(mount, "/")
    assert not service.simulator.standing


@pytest.mark.parametrize(
    "member", ["ListFiles", "GetFileInfo", "ValidatePath", "OpenFile", "OpenListing", "KeepAlive"]
)
async def test_every_use_counts(service: Served, client: Client, anna: User, member: str) -> None:
    mount = await client.mount("b1", idle_timeout=120)
    service.clock.advance(100)
    path = "/partition-1/etc/hostname" if member == "OpenFile" else "/partition-1/etc"
    reply = await call(anna, member, mount, *([] if member == "KeepAlive" else [path]))
    assert reply.message_type is MessageType.METHOD_RETURN, reply.body
    for descriptor in reply.unix_fds:
        os.close(descriptor)
    await become(service, lambda: all(each.streams == 0 for each in service.mounts))
    service.clock.advance(119)
    assert await client.list_mounts() == [mount]


async def test_to_look_at_a_mount_is_no_use_of_it(service: Served, client: Client, anna: User) -> None:
    mount = await client.mount("b1", idle_timeout=120)
    service.clock.advance(100)
    await anna.properties(mount)
    await anna.objects()
    await client.list_mounts()
    service.clock.advance(20)
    await become(service, lambda: not list(service.mounts))


@pytest.mark.parametrize("seconds", [0, 59, 86401, 2**64 - 1])
async def test_an_idle_timeout_beyond_the_bounds_is_refused(anna: User, seconds: int) -> None:
    reply = await anna.ask("Mount", "sa{sv}", "b1", variants(idle_timeout=("t", seconds)))
    name, text = error_of(reply)
    assert (name, "from 60 to 86400 seconds" in text) == ("InvalidOption", True)


async def test_signals_tell_of_the_time_now_and_then_and_properties_always(
    service: Served, client: Client, bert: User, mount: str
) -> None:
    await bert.listen(f"type='signal',path='{mount_object(mount)}'")
    for _ in range(100):
        service.clock.advance(10)
        await client.keep_alive(mount)
        assert (await client.mount_info(mount)).expires_at == int(service.clock.unix()) + 3600
    await bert.objects()
    told = [plain(each.body[1]) for each in bert.all("PropertiesChanged")]
    assert all(change.keys() == {"ExpiresAt"} for change in told)
    assert 1 <= len(told) <= 4


# --- claims ---------------------------------------------------------------------------------------------------------


async def test_each_has_a_claim_with_a_time_of_its_own(service: Served, anna: User, bert: User) -> None:
    mount = mount_id((await anna.ask("Mount", "sa{sv}", "b1", variants(idle_timeout=("t", 600)))).body[0])
    assert mount_id((await bert.ask("Mount", "sa{sv}", "b1", variants(idle_timeout=("t", 60)))).body[0]) == mount
    now = int(service.clock.unix())
    assert [(claim["uid"], claim["on_behalf_of"], claim["expires"] - now) for claim in await claims(anna, mount)] == [
        (ANNA, "", 600),
        (BERT, "", 60),
    ]
    service.clock.advance(60)
    await become(service, lambda: len(next(iter(service.mounts)).lease.claims) == 1)
    assert [claim["uid"] for claim in await claims(anna, mount)] == [ANNA]
    assert error_of(await bert.properties(mount))[0] == "NotAuthorized"


async def test_on_behalf_needs_leave_and_makes_claims_that_end_one_by_one(
    service: Served, anna: User, bert: User
) -> None:
    for who in ("carol", "dave"):
        reply = await anna.ask("Mount", "sa{sv}", "b1", variants(on_behalf_of=("s", who)))
        assert error_of(reply)[0] == "NotAuthorized"
    assert list(service.mounts) == []
    service.polkit.allowed.add("act-on-behalf")
    service.polkit.questions.clear()
    anna = await service.user(ANNA)
    for who in ("carol", "dave"):
        mount = mount_id((await anna.ask("Mount", "sa{sv}", "b1", variants(on_behalf_of=("s", who)))).body[0])
    what = {"backup_id": "b1", "vm_name": "web", "repository_id": "main"}
    assert ("act-on-behalf", {**what, "on_behalf_of": "carol"}) in service.polkit.questions
    assert [claim["on_behalf_of"] for claim in await claims(anna, mount)] == ["carol", "dave"]
    service.clock.advance(3000)
    await call(anna, "KeepAlive", mount, on_behalf_of=("s", "dave"))
    service.clock.advance(600)
    await become(service, lambda: len(next(iter(service.mounts)).lease.claims) == 1)
    assert [claim["on_behalf_of"] for claim in await claims(anna, mount)] == ["dave"]
    # Nobody has a claim on carol's behalf now, and Bert never had one.
    for user, who in ((anna, "carol"), (bert, "dave")):
        assert error_of(await call(user, "ListFiles", mount, "/", on_behalf_of=("s", who)))[0] == "InvalidOption"
    root = await service.user(ROOT_UID)
    assert error_of(await call(root, "Unmount", mount, on_behalf_of=("s", "carol")))[0] == "InvalidOption"
    assert error_of(await call(anna, "Unmount", mount, on_behalf_of=("s", "x" * 256)))[0] == "InvalidOption"
    reply = await call(anna, "Unmount", mount, on_behalf_of=("s", "dave"))
    assert reply.message_type is MessageType.METHOD_RETURN
    assert list(service.mounts) == []


async def test_a_caller_without_a_name_speaks_for_all_its_claims(service: Served) -> None:
    service.polkit.allowed.add("act-on-behalf")
    anna, bert = await service.user(ANNA), await service.user(BERT)
    for who in ("carol", "dave"):
        mount = mount_id((await anna.ask("Mount", "sa{sv}", "b1", variants(on_behalf_of=("s", who)))).body[0])
    await bert.ask("Mount", "sa{sv}", "b1", {})
    await call(anna, "Unmount", mount)
    assert [claim["uid"] for claim in await claims(bert, mount)] == [BERT]


# --- room -----------------------------------------------------------------------------------------------------------


async def test_who_finds_no_room_is_told_who_has_it(service: Served, client: Client, anna: User) -> None:
    await client.mount("b1")
    service.clock.advance(42)
    await client.mount("b2")
    await sim.add_backup(service.store, "b3")
    name, text = error_of(await anna.ask("Mount", "sa{sv}", "b3", {}))
    assert name == "LimitReached"
    assert f"b1 held by uid {ANNA}, last used 42 s ago; b2 held by uid {ANNA}, last used 0 s ago" in text


async def test_the_one_that_was_not_used_for_longest_makes_room(service: Served, client: Client) -> None:
    await sim.add_backup(service.store, "b3")
    first, second = await client.mount("b1"), await client.mount("b2")
    service.clock.advance(300)
    await client.keep_alive(first)
    third = await client.mount("b3")
    assert sorted(await client.list_mounts()) == sorted([first, third])
    with pytest.raises(errors.Expired, match="another mount needed its place"):
        await client.mount_info(second)


async def test_who_waits_gets_a_place_in_turn(service: Served, client: Client, anna: User, bert: User) -> None:
    for name in ("b3", "b4"):
        await sim.add_backup(service.store, name)
    first, second = await client.mount("b1"), await client.mount("b2")
    waiting = [
        asyncio.create_task(user.ask("Mount", "sa{sv}", backup, variants(wait=("b", True))))
        for user, backup in ((anna, "b3"), (bert, "b4"))
    ]
    await become(service, lambda: service.mounts.places.queued == 2)
    with pytest.raises(errors.LimitReached, match="2 wait already"):
        await client.mount("b1", journal="as-crashed")
    await client.unmount(second)
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert [task.done() for task in waiting] == [True, False]
    service.clock.advance(300)  # by now all are old enough
    reply = await waiting[1]
    assert reply.message_type is MessageType.METHOD_RETURN, reply.body
    with pytest.raises(errors.Expired):
        await client.mount_info(first)


async def test_who_leaves_the_bus_leaves_the_queue(service: Served, client: Client, bert: User) -> None:
    await sim.add_backup(service.store, "b3")
    await client.mount("b1")
    await client.mount("b2")
    waiting = asyncio.create_task(bert.ask("Mount", "sa{sv}", "b3", variants(wait=("b", True))))
    await become(service, lambda: service.mounts.places.queued == 1)
    await bert.leave()
    waiting.cancel()
    await asyncio.wait([waiting])
    await become(service, lambda: service.mounts.places.queued == 0)


async def test_a_device_that_somebody_still_holds_keeps_its_place(service: Served, client: Client) -> None:
    root = await service.user(ROOT_UID)
    first, _ = await client.mount("b1"), await client.mount("b2")
    service.simulator.busy.add("partition-1")
    await call(root, "Unmount", first, force=("b", True))
    resources = plain((await root.ask("GetResources", "a{sv}", {})).body[0])
    assert (resources["active_mounts"], resources["available_slots"]) == (1, 0)
    devices = [plain(device) for device in resources["devices"]]
    assert [(device["state"], device["mount"]) for device in devices if device["state"] == "draining"] == [
        ("draining", first)
    ]
    with pytest.raises(errors.LimitReached, match=f"a device still held open after an unmount, of {first}"):
        await client.mount("b1")
    (draining,) = service.mounts.places.draining
    draining.devices[0].let_go()  # type: ignore[attr-defined]  # the simulator's
    await become(service, lambda: not service.mounts.places.draining)
    service.simulator.busy.clear()
    await client.mount("b1")


async def test_no_more_files_are_open_at_once_than_configured(
    service: Served, client: Client, mount: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = service.mounts.config.limits.open_files
    service.simulator.outside = [sim.Reading(count=most - 1)]
    for _ in range(most + 1):
        descriptor, _ = await client.open_file(mount, "/partition-1/etc/motd")
        os.close(descriptor)
    service.simulator.outside = [sim.Reading(count=most)]
    with pytest.raises(errors.LimitReached, match=f"{most} files of this mount are open"):
        await client.open_file(mount, "/partition-1/etc/motd")
    service.simulator.outside = []
    descriptor, _ = await client.open_file(mount, "/partition-1/etc/motd")
    os.close(descriptor)
    del monkeypatch


async def test_busy_names_who_reads(service: Served, client: Client, mount: str) -> None:
    service.simulator.busy.add("partition-1")
    service.simulator.outside = [sim.Reading(comm="evil\x1b[2J\nname")]
    with pytest.raises(errors.Busy, match=r"open in evil\\x1b\[2J\\nname \(process 4242 of uid 1003\)"):
        await client.unmount(mount)


# --- streams --------------------------------------------------------------------------------------------------------


async def read_all(descriptor: int) -> list[dict[str, Any]]:
    def read() -> bytes:
        with open(descriptor, "rb") as file:
            return file.read()

    return [json.loads(line) for line in (await asyncio.to_thread(read)).splitlines()]


async def test_a_listing_streams_and_counts(service: Served, client: Client, anna: User, mount: str) -> None:
    reply = await call(anna, "OpenListing", mount, "/", recursive=("b", True))
    *entries, summary = await read_all(reply.unix_fds[0])
    assert {entry["path"] for entry in entries} == {
        *("/partition-1", "/partition-2", "/partition-1/etc", "/partition-1/etc/hostname", "/partition-1/etc/motd")
    }
    assert summary == {"summary": {"entries": 5, "errors": 0, "truncated": False}}
    await become(service, lambda: all(each.streams == 0 for each in service.mounts))
    properties = plain((await anna.properties(mount)).body[0])
    assert (properties["BytesOut"] > 0, properties["Busy"]) == (True, False)
    root = await service.user(ROOT_UID)
    (events, _) = (await root.ask("ListEvents", "a{sv}", variants(mount_id=("s", mount), limit=("u", 1)))).body
    event = plain(events[0])
    assert (event["what"], event["outcome"], event["bytes"]) == ("listed", "ok", properties["BytesOut"])
    assert (event["uid"], event["path"], event["backup_id"]) == (ANNA, "/", "b1")
    assert await client.list_mounts() == [mount]


async def test_a_stream_keeps_the_mount_and_closing_it_cancels(
    service: Served, client: Client, anna: User, bert: User, mount: str
) -> None:
    await bert.listen(f"type='signal',path='{mount_object(mount)}'")
    root = next(iter(service.simulator.attachments)).volumes[0]
    for number in range(3000):  # more than a pipe takes
        (root / f"a-file-with-a-name-of-some-length-{number}").touch()
    reply = await call(anna, "OpenListing", mount, "/partition-1", recursive=("b", True))
    service.clock.advance(7200)
    assert (await client.mount_info(mount)).busy
    with pytest.raises(errors.Busy, match="a listing of it runs"):
        await client.unmount(mount)
    os.close(reply.unix_fds[0])
    await become(service, lambda: all(each.streams == 0 for each in service.mounts))
    assert not (await client.mount_info(mount)).busy
    await bert.objects()
    told = [plain(each.body[1]).get("Busy") for each in bert.all("PropertiesChanged")]
    assert [busy for busy in told if busy is not None] == [True, False]
    await client.unmount(mount)


async def test_so_many_streams_and_no_more(service: Served, anna: User, mount: str) -> None:
    root = next(iter(service.simulator.attachments)).volumes[0]
    for number in range(3000):
        (root / f"a-file-with-a-name-of-some-length-{number}").touch()
    most = service.mounts.config.limits.listings
    replies = [await call(anna, "OpenListing", mount, "/partition-1") for _ in range(most)]
    name, text = error_of(await call(anna, "OpenListing", mount, "/partition-1"))
    assert (name, f"{most} listings" in text) == ("LimitReached", True)
    for reply in replies:
        os.close(reply.unix_fds[0])


@pytest.mark.parametrize(
    ("options", "about"),
    [
        ({"kind": ("s", "door")}, "kind must be one of"),
        ({"max_depth": ("u", 1)}, "max_depth"),
        ({"recursive": ("b", True), "max_depth": ("u", 0)}, "max_depth"),
        ({"name": ("s", "x" * 1025)}, "name must not be longer"),
        ({"limit": ("t", 0)}, "limit"),
    ],
)
async def test_what_a_listing_does_not_take(
    anna: User, mount: str, options: dict[str, tuple[str, object]], about: str
) -> None:
    name, text = error_of(await call(anna, "OpenListing", mount, "/partition-1", **options))
    assert (name, about in text) == ("InvalidOption", True)


async def test_a_listing_that_cannot_begin_is_an_error_and_no_empty_pipe(anna: User, mount: str) -> None:
    for path, error in (
        ("/partition-1/nothing", "PathNotFound"),
        ("/partition-1/etc/motd", "NotADirectory"),
        ("/partition-2", "VolumeUnavailable"),
        ("partition-1", "InvalidPath"),
    ):
        assert error_of(await call(anna, "OpenListing", mount, path))[0] == error


async def test_the_canonical_path(client: Client, mount: str) -> None:
    assert await client.validate_path(mount, "//partition-1/./etc/") == "/partition-1/etc"
    with pytest.raises(errors.PathNotFound):
        await client.validate_path(mount, "/partition-1/nothing")


# --- what there is to know ------------------------------------------------------------------------------------------


async def test_machines_repositories_and_files_in_use(
    service: Served, client: Client, anna: User, mount: str
) -> None:
    vms, cursor = (await anna.ask("ListVms", "a{sv}", {})).body
    assert ([(plain(vm)["vm_name"], plain(vm)["backups"]) for vm in vms], cursor) == ([("db", 1), ("web", 1)], "")
    (repositories,) = (await anna.ask("ListRepositories", "a{sv}", {})).body
    root = str((await service.store.repository("main")).root)
    assert [(plain(each)["repository_id"], plain(each)["path"]) for each in repositories] == [("main", root)]
    (files,) = (await anna.ask("InUse", "a{sv}", {})).body
    assert [plain(file) for file in files] == [{"repository": "main", "file": "b1/disk0", "mount": mount}]
    await client.unmount(mount)
    assert (await anna.ask("InUse", "a{sv}", {})).body == [[]]


async def test_resources(service: Served, mount: str) -> None:
    service.polkit.allowed.add("status")
    anna = await service.user(ANNA)
    found = plain((await anna.ask("GetResources", "a{sv}", {})).body[0])
    assert (found["active_mounts"], found["max_mounts"], found["available_slots"]) == (1, 2, 1)
    assert (found["sweep_interval"], found["idle_timeout"], found["backend"]) == (900, 3600, "fuse")
    assert [plain(device)["mount"] for device in found["devices"]] == [mount]
    assert (found["expired_mounts"], found["queued"]) == (0, 0)


async def test_the_history_has_who_did_what(service: Served, client: Client, mount: str) -> None:
    root = await service.user(ROOT_UID)
    descriptor, _ = await client.open_file(mount, "/partition-1/etc/motd")
    os.close(descriptor)
    service.polkit.allowed.discard("list-backups")
    with pytest.raises(errors.NotAuthorized):
        await client.list_backups()
    await client.unmount(mount)
    events, _ = (await root.ask("ListEvents", "a{sv}", {})).body
    found = [plain(event) for event in events]
    assert [event["what"] for event in found] == ["ended", "refused", "opened", "claimed", "mounted"]
    opened = found[2]
    assert (opened["uid"], opened["path"], opened["size"]) == (ANNA, "/partition-1/etc/motd", 8)
    assert "bytes" not in opened
    assert found[0]["detail"] == f"unmounted by uid {ANNA}"
    assert "uid" not in found[4]  # the service itself
    first, cursor = (await root.ask("ListEvents", "a{sv}", variants(limit=("u", 2)))).body
    rest, end = (await root.ask("ListEvents", "a{sv}", variants(cursor=("s", cursor)))).body
    assert ([plain(event)["id"] for event in first + rest], end) == ([event["id"] for event in found], "")


async def test_cleanup_now_ends_what_should_have_ended(service: Served, client: Client, mount: str) -> None:
    root = await service.user(ROOT_UID)
    service.simulator.busy.add("partition-1")
    service.clock.advance(3600)
    await become(service, lambda: next(iter(service.mounts)).lease.overdue)
    assert plain((await root.ask("GetResources", "a{sv}", {})).body[0])["expired_mounts"] == 1
    assert (await root.ask("CleanupNow", "a{sv}", {})).body == [0]
    service.simulator.busy.clear()
    assert (await root.ask("CleanupNow", "a{sv}", {})).body == [1]
    with pytest.raises(errors.Expired, match="its time is up"):
        await client.mount_info(mount)
    assert service.simulator.swept[-1] == set()


async def test_a_shell_is_for_root_alone(service: Served, anna: User) -> None:
    master, slave = os.openpty()
    try:
        service.polkit.allowed |= {"manage", "status"}
        reply = await anna.ask("OpenShell", "ha{sv}", 0, {}, path=ROOT, fds=[slave])
        assert error_of(reply)[0] == "NotAuthorized"
        root = await service.user(ROOT_UID)
        reply = await root.ask("OpenShell", "ha{sv}", 0, variants(term=("s", "vt100")), fds=[slave])
        assert reply.body == [0]
    finally:
        os.close(master)
        os.close(slave)


async def test_another_limit_is_told(service: Served, client: Client, bert: User) -> None:
    await bert.listen(f"type='signal',path='{ROOT}'")
    settings = dataclasses.replace(service.mounts.config.mounts, max=5)
    service.mounts.reload(dataclasses.replace(service.mounts.config, mounts=settings))
    service.service.reloaded()
    await bert.objects()
    (change,) = bert.all("PropertiesChanged")
    assert plain(change.body[1]) == {"MaxMounts": 5}
    await client.mount("b1")


async def test_one_mount_has_so_many_claims_and_no_more(service: Served) -> None:
    service.polkit.allowed.add("act-on-behalf")
    anna = await service.user(ANNA)
    for number in range(256):
        await anna.ask("Mount", "sa{sv}", "b1", variants(on_behalf_of=("s", f"person {number}")))
    reply = await anna.ask("Mount", "sa{sv}", "b1", variants(on_behalf_of=("s", "one more")))
    assert error_of(reply)[0] == "LimitReached"
    reply = await anna.ask("Mount", "sa{sv}", "b1", variants(on_behalf_of=("s", "person 7")))
    assert reply.message_type is MessageType.METHOD_RETURN


async def test_to_mount_again_does_not_shorten_a_claim(service: Served, client: Client, anna: User) -> None:
    mount = await client.mount("b1", idle_timeout=20_000)
    assert await client.mount("b1") == mount
    (claim,) = await claims(anna, mount)
    assert claim["expires"] == int(service.clock.unix()) + 20_000
    assert await client.mount("b1", idle_timeout=60) == mount
    (claim,) = await claims(anna, mount)
    assert claim["expires"] == int(service.clock.unix()) + 60
