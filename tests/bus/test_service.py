"""The whole service on a bus: every member of its interface, for those who may, those who may not, and vandals."""

# mypy: allow-untyped-calls
# dbus-next, which plays the clients, has functions without annotations.

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest
from dbus_next.signature import Variant

from sendense_restored import errors
from sendense_restored.client import BUS_NAME, CATALOG, MANAGER, MOUNT, ROOT, Client, mount_id, mount_object
from sendense_restored.daemon.session import State
from tests import simulator as sim
from tests.bus.peer import Message, MessageFlag, MessageType, error_of, signal
from tests.bus.served import ANNA, BERT, FREELY, ROOT_UID, Served, served, variants

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.bus.served import User

HOSTNAME = "/partition-1/etc/hostname"


@pytest.fixture
async def service(bus_address: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with served(bus_address, tmp_path) as service:
        yield service


# --- who may do what ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A method, with arguments that it accepts."""

    name: str
    interface: str
    signature: str
    arguments: tuple[object, ...]
    action: str
    without_claim: str = ""
    details: tuple[str, ...] = ()
    option: str = "auth.no_user_interaction"
    """One that it knows, and the wrong type for it."""
    wrong: tuple[str, object] = ("s", "yes")

    async def ask(self, user: User, mount: str, **options: tuple[str, object]) -> Message:
        path = mount_object(mount) if self.interface == MOUNT else ROOT
        body = (*self.arguments, variants(**options))
        return await user.ask(self.name, self.signature, *body, path=path, interface=self.interface)


_WHAT = ("backup_id", "repository_id", "vm_name")
_NEW = {"repository_id": Variant("s", "main"), "vm_name": Variant("s", "x"), "disks": Variant("as", ["b2/disk0"])}
MEMBERS = [
    Member("ListBackups", MANAGER, "a{sv}", (), "list-backups", option="limit", wrong=("s", "1")),
    Member("Mount", MANAGER, "sa{sv}", ("b2",), "mount", details=_WHAT, option="all_disks", wrong=("u", 1)),
    Member("ListVms", MANAGER, "a{sv}", (), "list-backups", option="cursor", wrong=("u", 1)),
    Member("ListRepositories", MANAGER, "a{sv}", (), "list-backups"),
    Member("GetResources", MANAGER, "a{sv}", (), "status"),
    Member("ListEvents", MANAGER, "a{sv}", (), "manage", option="mount_id", wrong=("o", "/")),
    Member("InUse", MANAGER, "a{sv}", (), "list-backups"),
    Member("CleanupNow", MANAGER, "a{sv}", (), "manage"),
    Member("ListMounts", MANAGER, "a{sv}", (), "read"),
    Member("AddRepository", CATALOG, "ssa{sv}", ("other", "/tmp"), "manage"),
    Member("RemoveRepository", CATALOG, "sa{sv}", ("other",), "manage"),
    Member("Scan", CATALOG, "sa{sv}", ("main",), "manage"),
    Member("AddBackup", CATALOG, "a{sv}a{sv}", (_NEW,), "manage"),
    Member("RemoveBackup", CATALOG, "sa{sv}", ("b2",), "manage"),
    *(
        Member(name, MOUNT, "sa{sv}", (HOSTNAME,), "read", "read-others", (*_WHAT, "path"))
        for name in ("GetFileInfo", "OpenFile", "ValidatePath")
    ),
    Member(
        *("ListFiles", MOUNT, "sa{sv}", ("/partition-1",), "read", "read-others", (*_WHAT, "path")),
        option="limit",
        wrong=("x", 1),
    ),
    Member(
        *("OpenListing", MOUNT, "sa{sv}", ("/partition-1",), "read", "read-others", (*_WHAT, "path")),
        option="newer",
        wrong=("t", 1),
    ),
    Member("KeepAlive", MOUNT, "a{sv}", (), "read", "read-others", _WHAT, option="on_behalf_of", wrong=("u", 1)),
    Member("Unmount", MOUNT, "a{sv}", (), "unmount", "unmount-others", _WHAT, option="force", wrong=("i", 1)),
]
every_member = pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)


@every_member
async def test_polkit_is_asked_about_the_action_and_its_no_counts(
    service: Served, anna: User, mount: str, member: Member
) -> None:
    service.polkit.allowed -= FREELY
    service.polkit.questions.clear()
    before = set(service.simulator.standing)
    assert error_of(await member.ask(anna, mount))[0] == "NotAuthorized"
    ((action, details),) = service.polkit.questions
    assert (action, sorted(details)) == (member.action, sorted(member.details))
    assert service.simulator.standing == before


@pytest.mark.parametrize("member", [each for each in MEMBERS if each.without_claim], ids=lambda member: member.name)
async def test_who_has_no_claim_needs_more(
    service: Served, anna: User, bert: User, mount: str, member: Member
) -> None:
    service.polkit.questions.clear()
    assert error_of(await member.ask(bert, mount))[0] == "NotAuthorized"
    assert [action for action, _ in service.polkit.questions] == [member.without_claim]
    service.polkit.allowed.add(member.without_claim)
    reply = await member.ask(await service.user(BERT), mount)
    assert reply.message_type is MessageType.METHOD_RETURN, reply.body
    for descriptor in reply.unix_fds:
        os.close(descriptor)
    del anna


@every_member
async def test_an_authentication_that_would_help_is_told(
    service: Served, anna: User, mount: str, member: Member
) -> None:
    service.polkit.allowed -= FREELY
    service.polkit.obtainable = {member.action}
    assert error_of(await member.ask(anna, mount))[0] == "NotAuthorizedCanObtain"


@every_member
async def test_root_is_allowed_without_polkit(service: Served, mount: str, member: Member) -> None:
    root = await service.user(ROOT_UID)
    service.polkit.questions.clear()
    reply = await member.ask(root, mount)
    if member.name == "RemoveRepository":
        assert error_of(reply)[0] == "BackupNotFound"
    elif member.name == "AddBackup":
        assert error_of(reply)[0] == "InvalidOption"  # the image belongs to another one
    else:
        assert reply.message_type is MessageType.METHOD_RETURN, reply.body
    for descriptor in reply.unix_fds:
        os.close(descriptor)
    assert service.polkit.questions == []


@every_member
async def test_an_unknown_option_is_refused_before_anybody_is_asked(
    service: Served, anna: User, mount: str, member: Member
) -> None:
    service.polkit.questions.clear()
    name, text = error_of(await member.ask(anna, mount, colour=("s", "blue")))
    assert (name, "'colour'" in text, member.option in text) == ("InvalidOption", True, True)
    assert service.polkit.questions == []


@every_member
async def test_an_option_of_a_wrong_type_is_refused(service: Served, anna: User, mount: str, member: Member) -> None:
    service.polkit.questions.clear()
    name, text = error_of(await member.ask(anna, mount, **{member.option: member.wrong}))
    assert (name, member.option in text) == ("InvalidOption", True)
    assert service.polkit.questions == []


@every_member
async def test_arguments_of_a_wrong_type_are_refused(anna: User, mount: str, member: Member) -> None:
    path = mount_object(mount) if member.interface == MOUNT else ROOT
    for signature, body in (("", ()), ("u", (1,)), (member.signature + "s", (*member.arguments, {}, "more"))):
        reply = await anna.ask(member.name, signature, *body, path=path, interface=member.interface)
        assert error_of(reply)[0] == "org.freedesktop.DBus.Error.InvalidArgs"


@every_member
async def test_descriptors_that_nobody_asked_for_are_closed(
    service: Served, anna: User, mount: str, member: Member
) -> None:
    """That none is left is found when the test ends."""
    service.polkit.allowed -= FREELY
    path = mount_object(mount) if member.interface == MOUNT else ROOT
    reading, writing = os.pipe()
    body = (*member.arguments, {})
    reply = await anna.ask(member.name, member.signature, *body, path=path, interface=member.interface, fds=[writing])
    assert error_of(reply)[0] == "NotAuthorized"
    os.close(writing)
    assert await asyncio.to_thread(os.read, reading, 1) == b""  # the service has none of its ends either
    os.close(reading)


async def test_force_is_an_action_of_its_own(service: Served, anna: User, mount: str) -> None:
    service.polkit.questions.clear()
    path = mount_object(mount)
    reply = await anna.ask("Unmount", "a{sv}", variants(force=("b", True)), path=path, interface=MOUNT)
    assert error_of(reply)[0] == "NotAuthorized"
    assert [action for action, _ in service.polkit.questions] == ["force-unmount"]
    service.polkit.allowed.add("force-unmount")
    service.simulator.busy.add("partition-1")
    again = await service.user(ANNA)
    reply = await again.ask("Unmount", "a{sv}", variants(force=("b", True)), path=path, interface=MOUNT)
    assert reply.message_type is MessageType.METHOD_RETURN, reply.body
    assert not service.simulator.standing


async def test_polkit_learns_what_it_is_about(service: Served, client: Client, mount: str) -> None:
    await client.file_info(mount, HOSTNAME)
    what = {"backup_id": "b1", "vm_name": "web", "repository_id": "main"}
    assert ("mount", what) in service.polkit.questions
    assert ("read", {**what, "path": HOSTNAME}) in service.polkit.questions
    with pytest.raises(errors.BackupNotFound):
        await client.mount("nothing")
    assert service.polkit.questions[-1] == ("mount", {"backup_id": "nothing"})


async def test_who_may_not_mount_does_not_learn_what_there_is(service: Served, client: Client) -> None:
    service.polkit.allowed.discard("mount")
    for backup in ("b1", "nothing"):
        with pytest.raises(errors.NotAuthorized):
            await client.mount(backup)


# --- what the members do --------------------------------------------------------------------------------------------


async def test_the_way_of_a_restore(service: Served, client: Client) -> None:
    found = {backup.backup_id: backup async for backup in client.backups(page=1)}
    assert set(found) == {"b1", "b2"}
    assert [(disk.index, disk.size) for disk in found["b1"].disks] == [(0, 1 << 30), (1, 1 << 30)]
    mount = await client.mount("b1")
    volumes = {entry.name: entry.extras async for entry in client.files(mount, "/", page=1)}
    assert set(volumes) == {"partition-1", "partition-2"}
    assert volumes["partition-2"]["unreadable"] == "encrypted: the simulator says encrypted"
    assert [entry.name async for entry in client.files(mount, "/partition-1/etc", page=1)] == ["hostname", "motd"]
    descriptor, info = await client.open_file(mount, HOSTNAME)
    with open(descriptor, "rb") as file:  # noqa: PTH123, ASYNC230 - a descriptor
        assert file.read() == sim.FILES["etc/hostname"]
    assert (info.kind, info.size) == ("file", 6)
    assert (await client.file_info(mount, HOSTNAME)).size == 6
    assert await client.list_mounts() == [mount]
    await client.unmount(mount)
    assert await client.list_mounts() == []
    assert not service.simulator.standing


async def test_backups_are_filtered_and_bad_limits_and_cursors_refused(client: Client, anna: User) -> None:
    assert [each.backup_id for each in (await client.list_backups(vm_name="db"))[0]] == ["b2"]
    assert (await client.list_backups(status="running"))[0] == []
    assert len((await client.list_backups(repository_id="main"))[0]) == 2
    for options in ({"limit": ("u", 0)}, {"limit": ("u", 1001)}, {"cursor": ("s", "nonsense")}):
        reply = await anna.ask("ListBackups", "a{sv}", variants(**options))
        assert error_of(reply)[0] == "InvalidOption"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"disk_index": ("u", 7)}, "BackupNotFound"),
        ({"disk_index": ("u", 0), "all_disks": ("b", True)}, "InvalidOption"),
        ({"journal": ("s", "maybe")}, "InvalidOption"),
    ],
)
async def test_what_mount_does_not_take(anna: User, options: dict[str, tuple[str, object]], error: str) -> None:
    assert error_of(await anna.ask("Mount", "sa{sv}", "b1", variants(**options)))[0] == error


async def test_all_disks_and_another_view_are_other_mounts(service: Served, client: Client, mount: str) -> None:
    other = await client.mount("b1", all_disks=True, journal="as-crashed")
    info = await client.mount_info(other)
    assert (info.disk_indexes, info.journal, info.filesystem_type) == ((0, 1), "as-crashed", "ext4")
    assert {volume.view for volume in info.volumes if volume.state == "mounted"} == {"as-crashed"}
    assert other != mount
    with pytest.raises(errors.LimitReached):
        await client.mount("b2")
    assert len(service.mounts) == 2


async def test_a_mount_that_fails_says_why_and_its_object_stays_for_a_while(service: Served, client: Client) -> None:
    service.simulator.refuse["attach"] = errors.NoDevice("no loop device is free")
    with pytest.raises(errors.NoDevice, match="no loop device is free"):
        await client.mount("b1")
    service.simulator.refuse["attach"] = ZeroDivisionError("/secret/path")
    (failed,) = await client.list_mounts()
    info = await client.mount_info(failed)
    assert (info.state, info.error, info.expires_at) == ("failed", "no loop device is free", 0)
    with pytest.raises(errors.Failed, match=r"internal error \(reference [0-9a-f]{8}\)"):
        await client.mount("b1")
    (again,) = await client.list_mounts()  # in the place of the one before
    assert "/secret" not in (await client.mount_info(again)).error
    with pytest.raises(errors.Expired, match="it failed: no loop device is free"):
        await client.list_files(failed, "/")
    service.clock.advance(600)
    while await client.list_mounts():
        pass
    with pytest.raises(errors.Expired, match="it failed: an internal error"):
        await client.list_files(again, "/")


async def test_busy_is_told_and_passes(service: Served, client: Client, mount: str) -> None:
    service.simulator.busy.add("partition-1")
    with pytest.raises(errors.Busy):
        await client.unmount(mount)
    info = await client.mount_info(mount)
    assert (info.busy, info.state, [claim.uid for claim in info.claims]) == (True, "mounted", [ANNA])
    service.simulator.busy.clear()
    await client.unmount(mount)
    with pytest.raises(errors.Expired, match=f"unmounted by uid {ANNA}; mount the backup again"):
        await client.unmount(mount)
    service.clock.advance(86400 + 1)
    with pytest.raises(errors.MountNotFound):
        await client.unmount(mount)


async def test_paths_that_lead_nowhere(client: Client, mount: str) -> None:
    wrong: dict[str, type[errors.RestoreError]] = {
        "/partition-1/nothing": errors.PathNotFound,
        "/partition-9": errors.PathNotFound,
        "/partition-2/x": errors.VolumeUnavailable,
        "/partition-1/../etc": errors.InvalidPath,
        "etc": errors.InvalidPath,
        "": errors.InvalidPath,
        "/partition-1/" + "x" * 5000: errors.InvalidPath,
    }
    for path, error in wrong.items():
        for ask in (client.file_info, client.open_file, client.list_files):
            with pytest.raises(error):
                await ask(mount, path)
    with pytest.raises(errors.NotADirectory):
        await client.list_files(mount, HOSTNAME)
    for path in ("/", "/partition-1", "/partition-1/etc"):
        with pytest.raises(errors.NotAFile):
            await client.open_file(mount, path)


async def test_a_mount_that_lost_its_server_stays_to_say_so(service: Served, client: Client, mount: str) -> None:
    service.simulator.attachments[0].die("the image server ended unexpectedly")
    while (await client.mount_info(mount)).state != "failed":
        pass
    info = await client.mount_info(mount)
    assert info.error == "the image server ended unexpectedly"
    assert "mounted" not in {volume.state for volume in info.volumes}
    for path in ("/", HOSTNAME):
        with pytest.raises(errors.Unavailable, match="the image server ended unexpectedly"):
            await client.file_info(mount, path)
    assert await client.list_mounts() == [mount]
    await client.unmount(mount)
    assert await client.list_mounts() == []


async def test_the_catalogue_is_filled_and_emptied(service: Served, client: Client, tmp_path: Path) -> None:
    service.polkit.allowed.add("manage")
    root = tmp_path / "more"
    (root / "web").mkdir(parents=True)
    header = struct.pack(
        *(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 16, 1 << 20, 0),
        *(1, 2 << 16, 1 << 16, 1, 0, 0, 0, 0, 0, 4, 104),
    )
    (root / "web/full.qcow2").write_bytes(header.ljust(3 << 16, b"\0"))
    (root / "web/broken.qcow2").write_bytes(b"nothing")
    (root / "by-hand").mkdir()
    repository = await client.add_repository("More", str(root))
    scanned = await client.scan(repository)
    assert (len(scanned.added), [each.path for each in scanned.skipped]) == (1, ["web/broken.qcow2"])
    assert (await client.scan(repository)).unchanged == 1
    full = {"repository_id": ("s", repository), "vm_name": ("s", "db"), "disks": ("as", ["by-hand"])}
    added = await client.add_backup({**full, "created_at": ("x", 1_700_000_000)})
    ((backup,), _) = await client.list_backups(vm_name="db", repository_id=repository)
    assert (backup.backup_id, backup.created_at, backup.total_bytes) == (added, 1_700_000_000, 1 << 30)
    await client.remove_backup(added)
    await client.remove_repository(repository)
    with pytest.raises(errors.BackupNotFound):
        await client.scan(repository)


async def test_what_the_catalogue_does_not_take(service: Served, client: Client, tmp_path: Path, mount: str) -> None:
    service.polkit.allowed.add("manage")
    for name, path in (("", "/"), ("x", "relative"), ("x", str(tmp_path / "nothing")), ("main", "/")):
        with pytest.raises(errors.InvalidOption):
            await client.add_repository(name, path)
    new: dict[str, tuple[str, Any]] = {
        "repository_id": ("s", "main"), "vm_name": ("s", "x"), "disks": ("as", ["nothing"])
    }  # fmt: skip
    with pytest.raises(errors.ImageRefused):
        await client.add_backup(new)
    for wrong in ({"vm_name": ("u", 1)}, {"colour": ("s", "blue")}, {"created_at": ("x", 1 << 60)}):
        with pytest.raises(errors.InvalidOption):
            await client.add_backup({**new, **wrong})
    with pytest.raises(errors.InvalidOption, match="needs repository_id, vm_name, disks"):
        await client.add_backup({})
    with pytest.raises(errors.BackupNotFound):
        await client.add_backup({**new, "repository_id": ("s", "nothing")})
    for remove, name in ((client.remove_backup, "b1"), (client.remove_repository, "main")):
        with pytest.raises(errors.Busy):
            await remove(name)
    assert await client.list_mounts() == [mount]


# --- who sees what --------------------------------------------------------------------------------------------------


async def seen(user: User) -> set[str]:
    """The mounts that a user learns of, which is the same in every way of asking."""
    objects = {mount_id(path) for path in await user.objects()}
    listed = {mount_id(path) for path in (await user.ask("ListMounts", "a{sv}", {})).body[0]}
    interface = "org.freedesktop.DBus.Introspectable"
    nodes = set()
    for path in (ROOT, f"{ROOT}/mounts"):
        reply = await user.ask("Introspect", "", path=path, interface=interface)
        if reply.message_type is MessageType.METHOD_RETURN:
            nodes |= {node.get("name", "") for node in ET.fromstring(reply.body[0]).findall("node")}
    assert listed == objects == {node.replace("_", "-") for node in nodes - {"mounts"}}
    return listed


async def test_everybody_sees_the_mounts_of_their_own(service: Served, anna: User, bert: User, mount: str) -> None:
    other = mount_id((await bert.ask("Mount", "sa{sv}", "b2", {})).body[0])
    assert (await seen(anna), await seen(bert)) == ({mount}, {other})
    assert error_of(await bert.properties(mount))[0] == "NotAuthorized"
    await bert.ask("Mount", "sa{sv}", "b1", {})  # the same again
    assert await seen(bert) == {mount, other}
    assert (await bert.properties(mount)).message_type is MessageType.METHOD_RETURN
    assert await seen(await service.user(ROOT_UID)) == {mount, other}


async def test_who_may_read_others_sees_all(service: Served, mount: str) -> None:
    service.polkit.allowed.add("read-others")
    assert await seen(await service.user(BERT)) == {mount}


async def test_properties(service: Served, anna: User, mount: str) -> None:
    properties = {name: value.value for name, value in (await anna.properties(mount)).body[0].items()}
    assert properties["Id"] == mount
    assert (properties["BackupId"], properties["VmName"], properties["State"]) == ("b1", "web", "mounted")
    assert (properties["DiskIndexes"], properties["Journal"], properties["Busy"]) == ([0], "replay", False)
    assert [claim["uid"].value for claim in properties["Claims"]] == [ANNA]
    assert [volume["state"].value for volume in properties["Volumes"]] == ["mounted", "encrypted"]
    assert properties["Devices"] == [str(service.simulator.attachments[0].volumes[0])]
    interface = "org.freedesktop.DBus.Properties"
    (reply,) = (await anna.ask("Get", "ss", MANAGER, "ActiveMounts", interface=interface)).body
    assert (reply.signature, reply.value) == ("u", 1)
    (manager,) = (await anna.ask("GetAll", "s", MANAGER, interface=interface)).body
    assert (manager["MaxMounts"].value, manager["Backend"].value) == (2, "fuse")


async def test_a_path_that_names_no_mount(anna: User, bert: User, mount: str) -> None:
    for name in ("3f2b8c1e_0d4a_4c57_9b1f_6a1f0e9c7d21", "x", "x/y"):
        path = f"{ROOT}/mounts/{name}"
        reply = await anna.ask("ListFiles", "sa{sv}", "/", {}, path=path, interface=MOUNT)
        assert error_of(reply)[0] == "MountNotFound"
    for path in ("/", "/com/sendense", f"{ROOT}/jobs/1"):
        reply = await anna.ask("ListFiles", "sa{sv}", "/", {}, path=path, interface=MOUNT)
        assert error_of(reply)[0] == "org.freedesktop.DBus.Error.UnknownObject"
    del bert, mount


# --- signals --------------------------------------------------------------------------------------------------------


async def heard(user: User) -> list[tuple[str, str]]:
    """Member and path of the service's signals so far, in order."""
    await user.objects()  # whose answer comes after all that was sent before
    members = {"InterfacesAdded", "InterfacesRemoved", "PropertiesChanged"}
    return [(each.member, each.path) for each in user.messages if each.member in members]


async def test_each_change_is_told_once_from_the_right_place(service: Served, client: Client, bert: User) -> None:
    await bert.listen(f"type='signal',sender='{BUS_NAME}'")
    mount = await client.mount("b1")
    path = mount_object(mount)
    assert await heard(bert) == [("InterfacesAdded", ROOT), ("PropertiesChanged", path)]
    service.simulator.busy.add("partition-1")
    with pytest.raises(errors.Busy):
        await client.unmount(mount)
    service.simulator.busy.clear()
    await client.unmount(mount)
    assert (await heard(bert))[2:] == [("PropertiesChanged", path)] * 4 + [("InterfacesRemoved", ROOT)]
    (added,) = bert.all("InterfacesAdded")
    assert added.body[0] == path
    assert {name: sorted(values) for name, values in added.body[1].items()} == {
        MOUNT: ["Busy", "ExpiresAt", "Id", "State"]
    }
    assert added.body[1][MOUNT]["State"].value == "mounting"
    changes = [{name: value.value for name, value in each.body[1].items()} for each in bert.all("PropertiesChanged")]
    assert [change.pop("ExpiresAt", None) for change in changes] == [None] * len(changes)  # no time has passed
    assert changes == [
        {"State": "mounted"},
        {"State": "unmounting"},
        {"State": "mounted", "Busy": True},
        {"State": "unmounting"},
        {"Busy": False},
    ]
    assert all(each.body[0] == MOUNT and each.body[2] == [] for each in bert.all("PropertiesChanged"))
    (removed,) = bert.all("InterfacesRemoved")
    assert removed.body == [path, [MOUNT]]


async def test_a_mount_that_fails_to_build_comes_fails_and_goes(service: Served, client: Client, bert: User) -> None:
    await bert.listen(f"type='signal',sender='{BUS_NAME}'")
    service.simulator.refuse["attach"] = errors.NoDevice("none is free")
    with pytest.raises(errors.NoDevice):
        await client.mount("b1")
    (mount,) = await client.list_mounts()
    await client.unmount(mount)
    told = [member for member, _ in await heard(bert)]
    assert (told[0], told[-1], told.count("InterfacesAdded")) == ("InterfacesAdded", "InterfacesRemoved", 1)
    assert {"State": "failed", "ExpiresAt": 0} in [
        {name: value.value for name, value in each.body[1].items()} for each in bert.all("PropertiesChanged")
    ]


async def test_a_joiner_is_no_news(client: Client, bert: User, mount: str) -> None:
    await bert.listen(f"type='signal',sender='{BUS_NAME}'")
    await bert.ask("Mount", "sa{sv}", "b1", {})
    await client.unmount(mount)  # Bert still has it
    assert await heard(bert) == []


# --- those who come and go, and vandals -----------------------------------------------------------------------------


async def test_a_caller_that_vanishes_finds_the_mount_when_it_comes_back(service: Served, client: Client) -> None:
    gate = service.simulator.stop_at("attach")
    user = await service.user(ANNA)
    asking = asyncio.create_task(user.ask("Mount", "sa{sv}", "b1", {}))
    await gate.reached.wait()
    (mount,) = service.mounts
    assert (await client.mount_info(mount.id)).state == "mounting"
    with pytest.raises(errors.Unavailable, match="mounting"):
        await client.list_files(mount.id, "/")
    await user.leave()
    asking.cancel()
    await asyncio.wait([asking])
    gate.open()
    assert await client.mount("b1") == mount.id
    assert mount.session.state is State.MOUNTED
    await client.unmount(mount.id)


async def test_those_who_wait_learn_that_it_was_unmounted(service: Served, client: Client, anna: User) -> None:
    gate = service.simulator.stop_at("attach")
    asking = asyncio.create_task(anna.ask("Mount", "sa{sv}", "b1", {}))
    await gate.reached.wait()
    (mount,) = await client.list_mounts()
    await client.unmount(mount)
    assert error_of(await asking)[0] == "Cancelled"
    gate.open()
    assert not service.simulator.standing


def raw(serial: int, member: str, *body: object, path: str = ROOT, interface: str = MANAGER) -> bytes:
    """A call as the bytes that travel."""
    message = Message(
        destination=BUS_NAME, path=path, interface=interface, member=member, signature="sa{sv}", body=list(body)
    )
    message.serial = serial
    return bytes(message._marshall(False))


async def test_a_thousand_calls_at_once_are_all_answered(service: Served, anna: User, mount: str) -> None:
    numbers = range(5000, 6000)
    path = mount_object(mount)
    calls = (raw(each, "ListFiles", "/partition-1/etc", {}, path=path, interface=MOUNT) for each in numbers)
    await anna.send_raw(b"".join(calls))
    answers = await anna.answers(numbers)
    assert sorted(each.reply_serial for each in answers) == list(numbers)
    refused = [each for each in answers if each.message_type is MessageType.ERROR]
    # The bus itself counts the answers that a connection waits for.
    limits = {"LimitReached", "org.freedesktop.DBus.Error.LimitsExceeded"}
    assert {error_of(each)[0] for each in refused} <= limits
    assert len(refused) < len(answers)
    assert len(service.mounts) == 1


async def test_files_that_nobody_takes_are_closed(service: Served, anna: User, mount: str) -> None:
    """That none is left is found when the test ends."""
    path = mount_object(mount)
    for _ in range(50):
        await anna.send(
            Message(
                destination=BUS_NAME,
                path=path,
                interface=MOUNT,
                member="OpenFile",
                signature="sa{sv}",
                body=[HOSTNAME, {}],
                flags=MessageFlag.NO_REPLY_EXPECTED,
            )
        )
    await anna.objects()
    gone = await service.user(ANNA)
    asking = asyncio.create_task(gone.ask("OpenFile", "sa{sv}", HOSTNAME, {}, path=path, interface=MOUNT))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait([asking])
    await gone.leave()
    await anna.objects()


@pytest.mark.parametrize("text", ["", "x" * 300_000, "\u202e\x1b[2J", "'; DROP TABLE backup_jobs; --", "../../etc"])
async def test_strange_texts_are_only_unknown(service: Served, anna: User, text: str) -> None:
    service.polkit.allowed.add("manage")
    for member, interface in (("Mount", MANAGER), ("Scan", CATALOG), ("RemoveBackup", CATALOG)):
        name, words = error_of(await anna.ask(member, "sa{sv}", text, {}, interface=interface))
        assert name in {"BackupNotFound", "org.freedesktop.DBus.Error.InvalidArgs"}
        assert len(words) < 3000
        assert "\x1b" not in words
    name, _ = error_of(await anna.ask("ListBackups", "a{sv}", {text: Variant("s", text)}))
    assert name in {"InvalidOption", "org.freedesktop.DBus.Error.InvalidArgs"}


@pytest.mark.parametrize("text", [b"a\0b", b"\xed\xa0\x80"], ids=["NUL", "surrogate"])
async def test_text_that_is_none_costs_its_sender_the_connection_and_nobody_else(
    service: Served, client: Client, text: bytes
) -> None:
    vandal = await service.user(BERT)
    data = raw(77, "Mount", "Q" * len(text), {}).replace(b"Q" * len(text), text)
    with contextlib.suppress(OSError):
        await vandal.send_raw(data)
    await asyncio.wait([vandal.bus._disconnect_future])
    assert len((await client.list_backups())[0]) == 2
    assert len(service.mounts) == 0


async def test_signals_and_answers_that_nobody_asked_for_change_nothing(
    service: Served, client: Client, bert: User, mount: str
) -> None:
    await bert.send(signal("Unmount", "a{sv}", [{}], path=mount_object(mount), interface=MOUNT, destination=BUS_NAME))
    await bert.objects()
    assert await client.list_mounts() == [mount]
    assert len(service.mounts) == 1


async def test_before_the_service_is_open_it_says_that_it_is_starting() -> None:
    from sendense_restored.daemon.bus import Call  # noqa: PLC0415 - only here
    from sendense_restored.daemon.interface import Service  # noqa: PLC0415 - only here

    with pytest.raises(errors.Unavailable, match="starting"):
        await Service().handle(Call(":1.1", ANNA, ROOT, MANAGER, "ListBackups"))
