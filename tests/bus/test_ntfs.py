"""NTFS as callers see it, over a simulated host: streams, what cannot be read faithfully; and attempts in vain."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import pytest

from sendense_restored import errors
from sendense_restored.client import MOUNT, Client, Found, mount_object
from tests.bus.peer import error_of
from tests.bus.served import ANNA, BERT, ROOT_UID, Served, served, variants

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.bus.served import User

MOTD = "/disk-1-partition-1/etc/motd"
LINUX = "/disk-0-partition-1/etc/motd"


@pytest.fixture
async def service(bus_address: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with served(bus_address, tmp_path) as service:
        etc = (await service.store.repository("main")).root / "b1/disk1/1-mountable-ntfs/etc"
        (etc / "motd:Zone.Identifier").write_bytes(b"[ZoneTransfer]\n")
        (etc / "motd:two words").write_bytes(b"2")
        (etc / "secret.efs").write_bytes(bytes(514))
        (etc / "dedup").symlink_to("unsupported reparse tag 0x80000013")
        yield service


@pytest.fixture
async def mount(client: Client) -> str:
    return await client.mount("b1", all_disks=True)


async def content(client: Client, mount: str, path: str, stream: str | None = None) -> tuple[bytes, int]:
    descriptor, info = await client.open_file(mount, path, stream=stream)
    with open(descriptor, "rb") as file:  # noqa: ASYNC230, PTH123 - a descriptor of a small file
        return file.read(), info.size


async def test_streams_are_told_and_opened(client: Client, mount: str) -> None:
    assert (await client.file_info(mount, MOTD)).streams == ("Zone.Identifier", "two words")
    assert (await client.file_info(mount, LINUX)).streams == ()
    assert await content(client, mount, MOTD, "Zone.Identifier") == (b"[ZoneTransfer]\n", 15)
    assert await content(client, mount, MOTD, "two words") == (b"2", 1)
    assert await content(client, mount, MOTD) == (b"welcome\n", 8)


@pytest.mark.parametrize("stream", ["", "a/b", "/", "a:b", "Zone.Identifier:$DATA", ":", "x" * 1021, "\uefc3\uefa9"])
async def test_a_stream_has_a_name_of_its_own(service: Served, client: Client, mount: str, stream: str) -> None:
    with pytest.raises(errors.InvalidOption, match="stream"):
        await client.open_file(mount, MOTD, stream=stream)
    with pytest.raises(errors.InvalidOption):  # whatever the path
        await client.open_file(mount, LINUX, stream=stream)
    assert not service.simulator.readers[0].lost.done()


@pytest.mark.parametrize(
    ("path", "stream", "error"),
    [
        (MOTD, "none", errors.PathNotFound),
        (MOTD + "x", "Zone.Identifier", errors.PathNotFound),
        (LINUX, "Zone.Identifier", errors.InvalidOption),
        ("/", "Zone.Identifier", errors.NotAFile),
        ("/disk-0-partition-2", "Zone.Identifier", errors.VolumeUnavailable),
        ("/disk-1-partition-1/etc/dedup", "x", errors.Unreadable),
    ],
)
async def test_streams_that_there_are_not(
    client: Client, mount: str, path: str, stream: str, error: type[errors.RestoreError]
) -> None:
    with pytest.raises(error):
        await client.open_file(mount, path, stream=stream)


async def test_no_path_names_a_stream(client: Client, mount: str) -> None:
    path = MOTD + ":Zone.Identifier"
    for ask in (client.file_info, client.open_file, client.list_files, client.validate_path, client.listing):
        with pytest.raises(errors.PathNotFound, match="option 'stream'"):
            await ask(mount, path)
    with pytest.raises(errors.PathNotFound):
        await client.open_file(mount, path, stream="two words")


async def test_what_cannot_be_read_is_told_everywhere_and_not_given(client: Client, mount: str) -> None:
    entries, _ = await client.list_files(mount, "/disk-1-partition-1/etc")
    listed = {entry.name: entry for entry in entries}
    async with await client.listing(mount, "/", recursive=True) as found:
        lines = {record.path: record async for record in found if isinstance(record, Found)}
    for name, words, size in (("dedup", "deduplicated", 0), ("secret.efs", "EFS", 512)):
        path = f"/disk-1-partition-1/etc/{name}"
        info = await client.file_info(mount, path)
        assert (info.kind, info.size, words in info.unreadable) == ("file", size, True)
        assert (listed[name].kind, listed[name].size) == (lines[path].kind, lines[path].size) == ("file", size)
        assert listed[name].extras["unreadable"] == lines[path].unreadable == info.unreadable
        with pytest.raises(errors.Unreadable, match=words):
            await client.open_file(mount, path)


def limit(service: Served, most: int | None) -> None:
    settings = dataclasses.replace(service.mounts.config.limits, file_bytes=most)
    service.mounts.reload(dataclasses.replace(service.mounts.config, limits=settings))


async def test_a_file_that_is_larger_than_the_limit(service: Served, client: Client, mount: str) -> None:
    limit(service, 7)
    for path in (MOTD, LINUX):
        with pytest.raises(errors.TooLarge, match=r"has 8 bytes.*limits\.file_bytes"):
            await client.open_file(mount, path)
    assert await content(client, mount, MOTD, "two words") == (b"2", 1)
    limit(service, 8)
    assert await content(client, mount, MOTD) == (b"welcome\n", 8)
    with pytest.raises(errors.TooLarge):
        await client.open_file(mount, MOTD, stream="Zone.Identifier")
    limit(service, None)
    assert await content(client, mount, MOTD, "Zone.Identifier") == (b"[ZoneTransfer]\n", 15)


# --- the history of what came to nothing


async def history(service: Served, what: str = "opened") -> list[dict[str, Any]]:
    """Who opened what, the oldest first."""
    root = await service.user(ROOT_UID)
    events, _ = (await root.ask("ListEvents", "a{sv}", {})).body
    plain = [{name: variant.value for name, variant in event.items()} for event in reversed(events)]
    return [event for event in plain if event["what"] == what]


async def ask(user: User, mount: str, path: str, **options: tuple[str, object]) -> str:
    """Open a file in vain: the error's name."""
    place = mount_object(mount)
    return error_of(await user.ask("OpenFile", "sa{sv}", path, variants(**options), path=place, interface=MOUNT))[0]


async def test_a_file_that_was_asked_for_in_vain_is_in_the_history(
    service: Served, client: Client, mount: str
) -> None:
    limit(service, 7)
    service.polkit.allowed.add("act-on-behalf")
    anna = await service.user(ANNA)
    await client.mount("b1", all_disks=True, on_behalf_of="eva")
    attempts = [
        ("PathNotFound", "/disk-1-partition-1/no", {}, "there is no '/no' in this volume"),
        ("InvalidPath", "disk/\n", {}, "a path starts with '/'"),
        ("NotAFile", "/disk-1-partition-1/etc", {}, "is a directory"),
        ("Unreadable", "/disk-1-partition-1/etc/dedup", {}, "deduplicated"),
        ("TooLarge", MOTD, {}, "has 8 bytes"),
        ("VolumeUnavailable", "/disk-0-partition-2/x", {}, "encrypted"),
        ("InvalidOption", MOTD, {"stream": ("s", "a:b")}, "stream a:b: stream must be"),
        ("TooLarge", LINUX, {"on_behalf_of": ("s", "eva")}, "has 8 bytes"),
    ]
    for error, path, options, _ in attempts:
        assert await ask(anna, mount, path, **options) == error
    os.close((await client.open_file(mount, MOTD, stream="two words"))[0])
    *failed, opened = await history(service)
    told = [(event["outcome"], event["path"], event["on_behalf_of"]) for event in failed]
    assert told == [(error, path, options.get("on_behalf_of", ("s", ""))[1]) for error, path, options, _ in attempts]
    for event, (*_, words) in zip(failed, attempts, strict=True):
        assert words in event["detail"]
        assert (event["uid"], event["mount_id"], event["backup_id"]) == (ANNA, mount, "b1")
        assert "size" not in event
    assert (opened["outcome"], opened["detail"], opened["size"]) == ("ok", "stream two words", 1)


async def test_attempts_alike_are_one_event_a_minute_and_a_number(
    service: Served, client: Client, mount: str
) -> None:
    anna, bert = await service.user(ANNA), await service.user(BERT)
    assert await client.mount("b2") != mount
    other = next(each.id for each in service.mounts if each.id != mount)
    await bert.ask("Mount", "sa{sv}", "b1", variants(all_disks=("b", True)))
    for number in range(50):
        assert await ask(anna, mount, f"/disk-1-partition-1/{number}") == "PathNotFound"
    for user, where in ((bert, mount), (anna, other)):
        assert await ask(user, where, "/none/0") == "PathNotFound"
    assert await ask(anna, mount, "/disk-1-partition-1/etc") == "NotAFile"
    service.clock.advance(60)
    assert await ask(anna, mount, "/disk-1-partition-1/later") == "PathNotFound"
    found = [
        (event["uid"], event["mount_id"] == mount, event["path"], event["detail"]) for event in await history(service)
    ]
    assert [(uid, here, path) for uid, here, path, _ in found] == [
        (ANNA, True, "/disk-1-partition-1/0"),
        (BERT, True, "/none/0"),
        (ANNA, False, "/none/0"),
        (ANNA, True, "/disk-1-partition-1/etc"),
        (ANNA, True, ""),
        (ANNA, True, "/disk-1-partition-1/later"),
    ]
    assert found[4][3] == "49 more within a minute"


async def test_who_may_not_read_is_refused_as_before(service: Served, mount: str) -> None:
    """One event of the refusal, none of an attempt."""
    bert = await service.user(BERT)
    for path in (MOTD, "no path"):
        assert await ask(bert, mount, path) == "NotAuthorized"
    assert await history(service) == []
    assert len(await history(service, "refused")) == 1
