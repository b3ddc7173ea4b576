"""The client against a service whose answers the test decides, on a real bus."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest
from dbus_next.constants import MessageFlag
from dbus_next.message import Message

from sendense_restored import errors
from sendense_restored.client import (
    Client,
    Device,
    HeldFile,
    Repository,
    Scanned,
    Timeouts,
    Vm,
    mount_id,
    mount_object,
)
from sendense_restored.wire import closing
from tests.bus.fake import (
    HANG,
    MOUNT_ID,
    Answer,
    FakeService,
    entry,
    object_of,
    only_properties,
    properties,
    sequence,
    summary,
    variants,
)
from tools.lab.leftovers import left_by_this_process, of_this_process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from sendense_restored.wire import Incoming
    from tests.bus.peer import Peer
    from tools.lab.bus import PrivateBus


@pytest.fixture
async def client(bus_address: str) -> AsyncIterator[Client]:
    async with await Client.connect(bus_address) as client:
        yield client


# Values


async def test_backups_come_page_by_page_and_unknown_keys_are_ignored(service: FakeService, client: Client) -> None:
    disk = variants(index=0, size=10 << 30, backup_disk_id=7)
    service.answers["ListBackups"] = sequence(
        Answer("aa{sv}s", [variants(backup_id="b", vm_name="web", created_at=5, disks=[disk], novelty="x")], "next"),
        Answer("aa{sv}s", [variants(backup_id="a")], ""),
    )
    found = [backup async for backup in client.backups(vm_name="web", page=1)]
    assert [(backup.backup_id, backup.vm_name, backup.created_at, len(backup.disks)) for backup in found] == [
        ("b", "web", 5, 1),
        ("a", "", 0, 0),
    ]
    assert found[0].disks[0].size == 10 << 30
    assert service.called_with("ListBackups") == [{"vm_name": "web", "limit": 1, "cursor": "next"}]


async def test_properties_of_a_mount_are_decoded(service: FakeService, client: Client) -> None:
    service.answers["GetAll"] = only_properties
    info = await client.mount_info(MOUNT_ID)
    assert (info.id, info.backup_id, info.vm_name, info.state) == (MOUNT_ID, "backup-1", "web", "mounted")
    assert info.backup_disk_ids == (7,)
    assert [volume.state for volume in info.volumes] == ["encrypted", "mounted"]
    assert (info.claims[0].uid, info.claims[0].expires) == (1000, 1_700_003_600)
    assert info.expires_at == 1_700_003_600
    assert service.calls[-1].path == object_of(MOUNT_ID)


async def test_a_value_of_the_wrong_type_is_the_services_fault(service: FakeService, client: Client) -> None:
    service.answers["GetAll"] = properties(VmName=7)
    with pytest.raises(errors.Failed, match="vm_name"):
        await client.mount_info(MOUNT_ID)


async def test_a_truth_value_is_no_number(service: FakeService, client: Client) -> None:
    service.answers["GetFileInfo"] = Answer("a{sv}", variants(size=True))
    with pytest.raises(errors.Failed, match="size"):
        await client.file_info(MOUNT_ID, "/partition-1/a")


async def test_an_answer_of_another_signature_is_refused(service: FakeService, client: Client) -> None:
    service.answers["Mount"] = Answer("s", "not an object path")
    with pytest.raises(errors.Failed, match="another form"):
        await client.mount("backup-1")


async def test_options_that_say_nothing_are_not_sent(service: FakeService, client: Client) -> None:
    service.answers["Mount"] = Answer("o", object_of(MOUNT_ID))
    assert await client.mount("backup-1") == MOUNT_ID
    assert service.called_with("Mount") == ["backup-1", {}]
    await client.mount("backup-1", all_disks=True, journal="as-crashed")
    assert service.called_with("Mount")[1] == {"all_disks": True, "journal": "as-crashed"}


async def test_a_listing_of_ten_thousand_entries_arrives_whole(service: FakeService, client: Client) -> None:
    page = [entry(f"{number:08}" + "x" * 40, size=number) for number in range(10_000)]
    service.answers["ListFiles"] = sequence(
        Answer("a(sstuxsa{sv})s", page, "more"), Answer("a(sstuxsa{sv})s", [entry("z", unreadable="EFS")], "")
    )
    found = [file async for file in client.files(MOUNT_ID, "/partition-1", page=10_000)]
    assert len(found) == 10_001
    assert found[9_999].size == 9_999
    assert found[-1].extras == {"unreadable": "EFS"}


async def test_an_answer_as_long_as_any_arrives_and_a_longer_one_costs_only_itself(
    service: FakeService, client: Client, file: Path
) -> None:
    most = 8 << 20  # more than the service ever sends: its limit is on the whole message, this one on the body
    text = "x" * (most - 4 - 1)  # without its length and its NUL
    service.answers["AddRepository"] = sequence(
        Answer("s", text), Answer("s", text + "x", fds=(service.open(file),)), Answer("s", "short")
    )
    assert await client.add_repository("nas", "/srv") == text
    before = of_this_process()
    with pytest.raises(errors.Failed, match="AddRepository"):
        await client.add_repository("nas", "/srv")
    await asyncio.to_thread(closing.settle)
    assert of_this_process() == before
    assert await client.add_repository("nas", "/srv") == "short"


async def test_a_listing_that_does_not_advance_is_stopped(service: FakeService, client: Client) -> None:
    service.answers["ListFiles"] = Answer("a(sstuxsa{sv})s", [entry("a")], "same")
    with pytest.raises(errors.Failed, match="advance"):
        [file async for file in client.files(MOUNT_ID, "/")]


async def test_catalogue_calls_have_the_contracts_form(service: FakeService, client: Client) -> None:
    service.answers |= {
        "AddRepository": Answer("s", "repo-1"),
        "Scan": Answer("a{sv}", variants(added=["a", "b"], unchanged=3)),
        "AddBackup": Answer("s", "b-1"),
        "RemoveBackup": Answer(),
        "RemoveRepository": Answer(),
    }
    assert await client.add_repository("nas", "/srv/backups") == "repo-1"
    assert await client.scan("repo-1") == Scanned(added=("a", "b"), unchanged=3)
    assert await client.add_backup({"vm_name": ("s", "web"), "disks": ("as", ["a.qcow2"])}) == "b-1"
    assert service.called_with("AddBackup") == [{"vm_name": "web", "disks": ["a.qcow2"]}, {}]
    await client.remove_backup("b-1")
    await client.remove_repository("repo-1")
    assert [call.signature for call in service.calls if call.interface.endswith("Catalog")] == [
        "ssa{sv}",
        "sa{sv}",
        "a{sv}a{sv}",
        "sa{sv}",
        "sa{sv}",
    ]


async def test_the_manager_answers_typed_values(service: FakeService, client: Client) -> None:
    device = variants(path="/dev/loop7", state="draining", mount=MOUNT_ID)
    service.answers |= {
        "ListVms": sequence(
            Answer("aa{sv}s", [variants(context_id="c", vm_name="web", backups=3, newest=5)], "web"),
            Answer("aa{sv}s", [], ""),
        ),
        "ListRepositories": Answer("aa{sv}", [variants(repository_id="r", name="nas", enabled=True)]),
        "GetResources": Answer("a{sv}", variants(active_mounts=2, memory=1 << 30, devices=[device], backend="fuse")),
        "InUse": Answer("aa{sv}", [variants(repository="r", file="web/a.qcow2", mount=MOUNT_ID)]),
        "CleanupNow": Answer("u", 4),
    }
    assert [vm async for vm in client.vms()] == [Vm("c", "web", "", 3, 5)]
    assert service.called_with("ListVms") == [{"cursor": "web"}]
    assert await client.list_repositories() == [Repository("r", "nas", enabled=True)]
    resources = await client.resources()
    assert (resources.active_mounts, resources.memory, resources.backend) == (2, 1 << 30, "fuse")
    assert resources.devices == (Device("/dev/loop7", "draining", MOUNT_ID),)
    assert await client.in_use() == [HeldFile("r", "web/a.qcow2", MOUNT_ID)]
    assert await client.cleanup_now() == 4


async def test_an_event_says_whether_anybody_did_it(service: FakeService, client: Client) -> None:
    listed = [variants(id=9, at=5, what="open", uid=0, size=0), variants(id=8, what="expire")]
    service.answers["ListEvents"] = sequence(Answer("aa{sv}s", listed, "8"), Answer("aa{sv}s", [], ""))
    root, nobody = [event async for event in client.events(mount=MOUNT_ID, page=2)]
    assert (root.uid, root.size, root.bytes) == (0, 0, None)
    assert (nobody.uid, nobody.size) == (None, None)
    assert service.called_with("ListEvents") == [{"mount_id": MOUNT_ID, "limit": 2, "cursor": "8"}]
    service.answers["ListEvents"] = Answer("aa{sv}s", [variants(uid=True)], "")
    with pytest.raises(errors.Failed, match="uid"):
        await client.list_events()


@pytest.mark.parametrize(
    ("member", "signature", "values"),
    [
        ("ListVms", "aa{sv}s", [[variants(backups="many")], ""]),
        ("ListRepositories", "aa{sv}", [[variants(enabled="yes")]]),
        ("GetResources", "a{sv}", [variants(devices=["/dev/loop0"])]),
        ("ListEvents", "aa{sv}s", [[variants(at="now")], ""]),
        ("InUse", "aa{sv}", [[variants(file=7)]]),
        ("CleanupNow", "s", ["4"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_answers_of_the_manager_in_another_form_are_refused(
    service: FakeService, client: Client, member: str, signature: str, values: list[object]
) -> None:
    service.answers[member] = Answer(signature, *values)
    methods: dict[str, Callable[[], Awaitable[object]]] = {
        "ListVms": client.list_vms,
        "ListRepositories": client.list_repositories,
        "GetResources": client.resources,
        "ListEvents": client.list_events,
        "InUse": client.in_use,
        "CleanupNow": client.cleanup_now,
    }
    with pytest.raises(errors.Failed):
        await methods[member]()


async def test_a_mount_that_waits_for_room_has_no_deadline(bus_address: str, service: FakeService) -> None:
    service.answers["Mount"] = HANG
    async with await Client.connect(bus_address, timeouts=Timeouts(call=0.05, long=0.05)) as client:
        waiting = asyncio.create_task(client.mount("b", idle_timeout=7200, wait=True, on_behalf_of="eva"))
        with pytest.raises(errors.Timeout):
            await client.mount("b")
        assert not waiting.done()
        first = next(call for call in service.calls if call.body[1])
        assert first.body[1]["idle_timeout"].signature == "t"
        assert {key: value.value for key, value in first.body[1].items()} == {
            "idle_timeout": 7200,
            "wait": True,
            "on_behalf_of": "eva",
        }
        await service.reply(first, Answer("o", object_of(MOUNT_ID)))
        assert await waiting == MOUNT_ID


async def test_methods_of_a_mount_can_speak_for_somebody(service: FakeService, client: Client, file: Path) -> None:
    service.answers |= {
        "ListFiles": Answer("a(sstuxsa{sv})s", [], ""),
        "OpenListing": service.stream(summary(0)),
        "ValidatePath": Answer("s", "/disk/a"),
        "GetFileInfo": Answer("a{sv}", {}),
        "OpenFile": lambda _: Answer("ha{sv}", 0, {}, fds=(service.open(file),)),
        "KeepAlive": Answer(),
        "Unmount": Answer(),
    }
    for name in ("", "eva"):
        await client.list_files(MOUNT_ID, "/", on_behalf_of=name)
        (await client.listing(MOUNT_ID, "/", on_behalf_of=name)).close()
        assert await client.validate_path(MOUNT_ID, "//disk/./a", on_behalf_of=name) == "/disk/a"
        await client.file_info(MOUNT_ID, "/disk/a", on_behalf_of=name)
        os.close((await client.open_file(MOUNT_ID, "/disk/a", on_behalf_of=name))[0])
        await client.keep_alive(MOUNT_ID, on_behalf_of=name)
        await client.unmount(MOUNT_ID, on_behalf_of=name)
        options = {"on_behalf_of": "eva"} if name else {}
        assert [service.called_with(member)[-1] for member in service.answers] == [options] * 7


async def test_a_stream_is_named_if_one_is_meant(service: FakeService, client: Client, file: Path) -> None:
    service.answers["OpenFile"] = lambda _: Answer("ha{sv}", 0, {}, fds=(service.open(file),))
    for stream, options in ((None, {}), ("a b", {"stream": "a b"}), ("", {"stream": ""})):
        os.close((await client.open_file(MOUNT_ID, "/disk/a", stream=stream))[0])
        assert service.called_with("OpenFile") == ["/disk/a", options]


async def test_unmount_says_force_only_when_asked(service: FakeService, client: Client) -> None:
    service.answers["Unmount"] = Answer()
    await client.unmount(MOUNT_ID)
    assert service.called_with("Unmount") == [{}]
    await client.unmount(MOUNT_ID, force=True)
    assert service.called_with("Unmount") == [{"force": True}]


def test_ids_and_object_paths_are_one_to_one() -> None:
    assert mount_object(MOUNT_ID) == object_of(MOUNT_ID)
    assert mount_id(object_of(MOUNT_ID)) == MOUNT_ID


@pytest.mark.parametrize("text", ["", "a/b", "ä", "a" * 65, "a_b", "../x", "a\n"])
def test_what_cannot_be_an_id_is_no_mount(text: str) -> None:
    with pytest.raises(errors.MountNotFound):
        mount_object(text)


@pytest.mark.parametrize("interactive", [True, False])
async def test_a_prompt_is_allowed_only_when_asked_for(
    bus_address: str, service: FakeService, interactive: bool
) -> None:
    service.answers["ListMounts"] = Answer("ao", [])
    async with await Client.connect(bus_address, interactive=interactive) as client:
        assert await client.list_mounts() == []
    assert bool(service.calls[-1].flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION) is interactive


# Errors


@pytest.mark.parametrize("error", errors.BY_NAME.values())
async def test_every_error_arrives_as_its_class(
    service: FakeService, client: Client, error: type[errors.RestoreError]
) -> None:
    service.answers["ListMounts"] = error("do this next")
    with pytest.raises(error, match="do this next") as caught:
        await client.list_mounts()
    assert type(caught.value) is error


async def test_without_a_service_it_is_unavailable(client: Client) -> None:
    with pytest.raises(errors.Unavailable, match="cannot be reached"):
        await client.list_mounts()


async def test_a_service_that_dies_fails_the_pending_call(service: FakeService, client: Client) -> None:
    service.answers["ListMounts"] = HANG
    pending = asyncio.create_task(client.list_mounts())
    await service.called.wait()
    await service.leave()
    with pytest.raises(errors.Unavailable):
        await pending
    assert client.connected


async def test_a_service_that_does_not_answer_is_a_timeout(bus_address: str, service: FakeService) -> None:
    service.answers["ListMounts"] = HANG
    async with await Client.connect(bus_address, timeouts=Timeouts(call=0.05, long=60)) as client:
        with pytest.raises(errors.Timeout, match="ListMounts"):
            await client.list_mounts()
        service.answers["ListMounts"] = Answer("ao", [])
        assert await client.list_mounts() == []


async def test_mounting_has_the_long_timeout(bus_address: str, service: FakeService) -> None:
    service.answers["Mount"] = HANG
    async with await Client.connect(bus_address, timeouts=Timeouts(call=60, long=0.05)) as client:
        with pytest.raises(errors.Timeout, match="Mount"):
            await client.mount("backup-1")


@pytest.mark.parametrize("text", ["a\0b", "\udcff"])
async def test_text_that_no_message_can_carry_does_not_cost_the_connection(
    service: FakeService, client: Client, text: str
) -> None:
    service.answers["ListMounts"] = Answer("ao", [])
    with pytest.raises(errors.InvalidOption):
        await client.mount(text)
    with pytest.raises(errors.InvalidOption):
        await client.list_backups(vm_name=text)
    with pytest.raises(errors.InvalidOption):
        await client.add_backup({"disks": ("as", ["ok", text])})
    assert await client.list_mounts() == []


async def test_arguments_that_are_too_long_for_the_bus_do_not_leave_the_client(
    service: FakeService, client: Client
) -> None:
    with pytest.raises(errors.InvalidOption, match="Mount"):
        await client.mount("x" * (8 << 20))
    assert not service.calls
    assert client.connected


@pytest.mark.parametrize("number", [-1, 2**32])
async def test_a_number_out_of_range_does_not_leave_the_client(client: Client, number: int) -> None:
    with pytest.raises(errors.InvalidOption, match="disk_index"):
        await client.mount("backup-1", disk_index=number)


async def test_calls_that_the_bus_cannot_take_at_once_wait(mortal_bus: PrivateBus) -> None:
    async with FakeService(mortal_bus.address) as service, await Client.connect(mortal_bus.address) as client:
        service.answers["ListFiles"] = Answer("a(sstuxsa{sv})s", [], "")
        await client.list_files(MOUNT_ID, "/")
        os.kill(mortal_bus.pid, signal.SIGSTOP)
        path = "/" + "x" * 4000  # a hundred of them are more than the socket holds
        calls = [asyncio.create_task(client.list_files(MOUNT_ID, path)) for _ in range(100)]
        await asyncio.sleep(0)  # one round of the loop, in which all are made
        assert client._connection._caller.connection._queue
        os.kill(mortal_bus.pid, signal.SIGCONT)
        assert await asyncio.gather(*calls) == [([], "")] * 100


# The end of the connection


async def test_when_the_bus_dies_pending_and_later_calls_are_unavailable(mortal_bus: PrivateBus) -> None:
    before = of_this_process()
    async with FakeService(mortal_bus.address) as service:
        service.answers |= {"ListMounts": HANG, "Mount": HANG}
        client = await Client.connect(mortal_bus.address)
        pending = [asyncio.create_task(client.list_mounts()), asyncio.create_task(client.mount("backup-1"))]
        await service.called.wait()
        os.kill(mortal_bus.pid, signal.SIGKILL)
        for outcome in await asyncio.gather(*pending, return_exceptions=True):
            assert isinstance(outcome, errors.Unavailable)
        assert not client.connected
        with pytest.raises(errors.Unavailable):
            await client.list_mounts()
        client.close()
    await asyncio.to_thread(closing.settle)
    assert of_this_process() == before


async def test_closing_fails_what_is_pending(bus_address: str, service: FakeService) -> None:
    service.answers["ListMounts"] = HANG
    client = await Client.connect(bus_address)
    pending = asyncio.create_task(client.list_mounts())
    await service.called.wait()
    client.close()
    client.close()
    with pytest.raises(errors.Unavailable):
        await pending


async def test_no_bus_is_unavailable(tmp_path: Path) -> None:
    before = of_this_process()
    with pytest.raises(errors.Unavailable, match="message bus"):
        await Client.connect(f"unix:path={tmp_path}/nothing")
    await asyncio.to_thread(closing.settle)
    assert of_this_process() == before


async def test_a_bus_that_hangs_up_while_greeting_is_unavailable(tmp_path: Path) -> None:
    before = of_this_process()
    path = tmp_path / "bus"
    async with await asyncio.start_unix_server(lambda _, writer: writer.close(), path):
        with pytest.raises(errors.Unavailable, match="message bus"):
            await Client.connect(f"unix:path={path}")
    assert left_by_this_process(before) == []


# Descriptors


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


async def test_an_opened_file_belongs_to_the_caller_alone(service: FakeService, client: Client, file: Path) -> None:
    service.answers["OpenFile"] = Answer("ha{sv}", 0, variants(kind="file", size=7), fds=(service.open(file),))
    before = of_this_process()
    fd, info = await client.open_file(MOUNT_ID, "/partition-1/file")
    assert os.read(fd, 100) == b"content"
    assert not os.get_inheritable(fd)
    assert info.size == 7
    os.close(fd)
    await asyncio.to_thread(closing.settle)
    assert of_this_process() == before


@pytest.mark.parametrize(
    "answer",
    [
        Answer("ha{sv}", 0, variants(size="seven")),
        Answer("ha{sv}", 3, {}),
        Answer("sa{sv}", "no descriptor", {}),
        Answer("h", 0),
    ],
    ids=["wrong type", "no such descriptor", "other type", "other signature"],
)
async def test_an_answer_that_makes_no_sense_leaves_no_descriptor(
    service: FakeService, client: Client, file: Path, answer: Answer
) -> None:
    answer.fds = (service.open(file), service.open(file))
    service.answers["OpenFile"] = answer
    before = of_this_process()
    with pytest.raises(errors.Failed):
        await client.open_file(MOUNT_ID, "/partition-1/file")
    await asyncio.to_thread(closing.settle)
    assert of_this_process() == before


async def test_descriptors_beyond_the_one_asked_for_are_closed(
    service: FakeService, client: Client, file: Path
) -> None:
    service.answers["OpenFile"] = Answer("ha{sv}", 1, {}, fds=(service.open(file), service.open(file)))
    service.answers["ListMounts"] = Answer("ao", [], fds=(service.open(file),))
    before = of_this_process()
    fd, _ = await client.open_file(MOUNT_ID, "/partition-1/file")
    await client.list_mounts()
    os.close(fd)
    await asyncio.to_thread(closing.settle)
    assert of_this_process() == before


async def test_an_answer_that_comes_too_late_leaves_no_descriptor(
    bus_address: str, service: FakeService, file: Path
) -> None:
    service.answers |= {"OpenFile": HANG, "ListMounts": Answer("ao", [])}
    late = Answer("ha{sv}", 0, {}, fds=(service.open(file),))
    async with await Client.connect(bus_address, timeouts=Timeouts(call=0.05)) as impatient:
        before = of_this_process()
        with pytest.raises(errors.Timeout):
            await impatient.open_file(MOUNT_ID, "/partition-1/file")
        await service.reply(service.calls[-1], late)
        await impatient.list_mounts()  # answered after the late one
        await asyncio.to_thread(closing.settle)
        assert of_this_process() == before


async def test_a_call_cancelled_as_its_answer_arrives_leaves_no_descriptor(
    service: FakeService, client: Client, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.answers["OpenFile"] = Answer("ha{sv}", 0, {}, fds=(service.open(file),))
    connection = client._connection._caller.connection
    hand_over = connection._hand_over
    brought = []

    def and_cancel(message: Incoming) -> None:
        fds = list(message.fds)
        hand_over(message)
        if fds:
            brought.extend(fds)
            call.cancel()

    monkeypatch.setattr(connection, "_hand_over", and_cancel)
    before = of_this_process()
    call = asyncio.create_task(client.open_file(MOUNT_ID, "/partition-1/file"))
    with pytest.raises(asyncio.CancelledError):
        await call
    assert brought
    await asyncio.to_thread(closing.settle)
    assert of_this_process() == before


async def test_an_answer_counts_only_from_the_service(service: FakeService, client: Client, stranger: Peer) -> None:
    service.answers["ListMounts"] = HANG
    call = asyncio.create_task(client.list_mounts())
    await service.called.wait()
    (question,) = service.calls
    await stranger.send(Message.new_method_return(question, "ao", [["/forged"]]))
    await stranger.send(Message.new_error(question, "com.example.Forged", "forged"))
    await stranger.ping()  # the bus has passed both on
    await service.reply(question, Answer("ao", [object_of(MOUNT_ID)]))
    assert await call == [MOUNT_ID]


async def test_descriptors_that_nobody_asked_for_are_closed(service: FakeService, client: Client, file: Path) -> None:
    service.answers["ListMounts"] = Answer("ao", [])
    await client.list_mounts()
    us = service.calls[-1].sender
    unasked = Message.new_signal("/x", "com.example.X", "Y", "h", [0], [service.open(file)] * 16)
    unasked.destination = us
    before = of_this_process()
    await service.send(unasked)
    await client.list_mounts()  # answered after it has arrived
    await asyncio.to_thread(closing.settle)
    assert of_this_process() == before
