"""The command line, from arguments to output and exit code, against a service whose answers the test decides.

Most tests run it in a thread of this process, beside the service; those about terminals, pipes and signals start the
real program.
"""

from __future__ import annotations

import json
import os
import re
import signal
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from tests.bus.command_line import Outcome, Terminal, ended, program
from tests.bus.fake import (
    HANG,
    MOUNT_ID,
    Answer,
    FakeService,
    entry,
    object_of,
    only_properties,
    properties,
    variants,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.bus.command_line import CommandLine

LISTING = "a(sstuxsa{sv})s"
HOSTILE = "\x1b]0;owned\x07\u202etxt.exe\n"


@pytest.fixture
def service(service: FakeService, bus_address: str, monkeypatch: pytest.MonkeyPatch) -> FakeService:
    """The one of all tests here, which the command line finds and which has mounts."""
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus_address)
    service.answers["GetAll"] = only_properties
    return service


# Errors


@pytest.mark.parametrize("error", errors.BY_NAME.values())
async def test_every_error_has_its_exit_code_and_is_one_line(
    service: FakeService, cli: CommandLine, error: type[errors.RestoreError]
) -> None:
    service.answers["Mount"] = error("do this next")
    outcome = await cli("mount", "backup-1")
    assert outcome == Outcome(error.exit_code, "", "sendense-restore: do this next\n")


async def test_with_json_an_error_is_json_on_stderr(service: FakeService, cli: CommandLine) -> None:
    service.answers["Mount"] = errors.BackupNotFound("no such backup")
    outcome = await cli("mount", "backup-1", "--json")
    assert (outcome.code, outcome.out) == (4, "")
    assert json.loads(outcome.err) == {"error": "no such backup", "code": "BackupNotFound"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["mount"],
        ["mount", "b", "--journal", "maybe"],
        ["mount", "b", "--disk", "-1"],
        ["mount", "b", "--disk", "0", "--all-disks"],
        ["ls", MOUNT_ID, "relative"],
        ["ls", MOUNT_ID, "/partition-1/.."],
        ["stat", "abc", "/partition-1/a"],
        ["stat", "mount-1", "/partition-1/a"],
        ["backups", "--limit", "-1"],
        ["catalog", "add", "repository", "vm"],
    ],
    ids=" ".join,
)
async def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    service: FakeService, cli: CommandLine, arguments: list[str]
) -> None:
    outcome = await cli(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"sendense-restore: [^\n]+\n", outcome.err)
    assert not service.calls
    assert json.loads((await cli(*arguments, "--json")).err)["code"] in {"InvalidOption", "InvalidPath"}


async def test_without_a_bus_it_is_unavailable(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/nothing")
    outcome = await cli("mounts")
    assert outcome.code == 15
    assert "message bus cannot be reached" in outcome.err


async def test_an_error_text_cannot_move_the_cursor(service: FakeService, cli: CommandLine) -> None:
    service.answers["Mount"] = errors.BackupNotFound(f"no {HOSTILE}")
    assert (await cli("mount", "b")).err == "sendense-restore: no \\x1b]0;owned\\x07\\u202etxt.exe\\n\n"


# Which mount


async def test_the_beginning_of_an_id_is_enough(service: FakeService, cli: CommandLine) -> None:
    service.answers |= {"ListMounts": Answer("ao", [object_of(MOUNT_ID), object_of("aaaa" + MOUNT_ID[4:])])}
    outcome = await cli("volumes", MOUNT_ID[:4].upper(), "--json")
    assert [volume["name"] for volume in outcome.json] == ["partition-1", "partition-2"]
    assert service.calls[-1].path == object_of(MOUNT_ID)


async def test_a_beginning_of_two_ids_is_refused(service: FakeService, cli: CommandLine) -> None:
    service.answers["ListMounts"] = Answer("ao", [object_of(MOUNT_ID), object_of(MOUNT_ID[:-1] + "0")])
    outcome = await cli("unmount", MOUNT_ID[:8])
    assert (outcome.code, "2 mounts" in outcome.err) == (2, True)


async def test_a_beginning_of_no_id_is_not_found(service: FakeService, cli: CommandLine) -> None:
    service.answers["ListMounts"] = Answer("ao", [])
    assert (await cli("unmount", "3f2b")).code == 4


async def test_a_whole_id_is_given_to_the_service_which_knows_what_became_of_it(
    service: FakeService, cli: CommandLine
) -> None:
    service.answers["Unmount"] = errors.Expired("the mount was idle for an hour")
    assert (await cli("unmount", MOUNT_ID)).code == 13


# Commands


async def test_backups(service: FakeService, cli: CommandLine) -> None:
    disks = [variants(index=0, size=3 << 30, backup_disk_id=7), variants(index=1, size=1 << 30, backup_disk_id=8)]
    found = [
        variants(backup_id=f"backup-{number}", vm_name="web", status="completed", disks=disks) for number in "12"
    ]
    found[0] |= variants(created_at=1_700_000_000)
    service.answers["ListBackups"] = Answer("aa{sv}s", found, "")
    outcome = await cli("backups", "--vm", "web", "--status", "completed", "--limit", "1", "--json")
    assert outcome.code == 0
    assert service.called_with("ListBackups") == [{"vm_name": "web", "status": "completed", "limit": 1}]
    (backup,) = outcome.json
    assert (backup["backup_id"], backup["disks_count"]) == ("backup-1", 2)
    assert (backup["created_at"], backup["completed_at"]) == ("2023-11-14T22:13:20Z", None)
    assert backup["disks"][1] == {"index": 1, "size": 1 << 30, "backup_disk_id": 8}
    table = (await cli("backups")).out.splitlines()
    assert table[0].split() == ["BACKUP", "VM", "CREATED", "TYPE", "STATUS", "DISKS", "SIZE"]
    assert re.search(r"^backup-2 +web +- +- +completed +2 +4\.0 GiB$", table[2])


async def test_an_empty_listing_is_an_empty_array(service: FakeService, cli: CommandLine) -> None:
    service.answers |= {"ListBackups": Answer("aa{sv}s", [], ""), "ListMounts": Answer("ao", [])}
    service.answers["ListFiles"] = Answer(LISTING, [], "")
    for arguments in (["backups"], ["mounts"], ["ls", MOUNT_ID]):
        assert (await cli(*arguments, "--json")).json == []


async def test_a_listing_that_fails_in_the_middle_is_no_json(service: FakeService, cli: CommandLine) -> None:
    pages = [Answer(LISTING, [entry("a")], "a"), errors.Unavailable("the image server died")]
    service.answers["ListFiles"] = lambda _: pages.pop(0)
    outcome = await cli("ls", MOUNT_ID, "/partition-1", "--json")
    assert outcome.code == 15
    with pytest.raises(json.JSONDecodeError):
        outcome.json  # noqa: B018 - a property


async def test_mount_prints_the_id_alone_or_the_whole_mount(service: FakeService, cli: CommandLine) -> None:
    service.answers["Mount"] = Answer("o", object_of(MOUNT_ID))
    assert await cli("mount", "backup-1") == Outcome(0, f"{MOUNT_ID}\n", "")
    assert service.called_with("Mount") == ["backup-1", {"journal": "replay"}]
    mount = (await cli("mount", "backup-1", "--all-disks", "--journal", "as-crashed", "--json")).json
    assert service.called_with("Mount") == ["backup-1", {"all_disks": True, "journal": "as-crashed"}]
    assert (mount["mount_id"], mount["state"], mount["created_at"]) == (MOUNT_ID, "mounted", "2023-11-14T22:13:20Z")
    assert mount["volumes"][0]["reason"] == "BitLocker; unlock it"
    assert mount["claims"] == [
        {"uid": 1000, "on_behalf_of": "", "since": "2023-11-14T22:13:20Z", "expires": "2023-11-14T23:13:20Z"}
    ]
    assert mount["expires_at"] == "2023-11-14T23:13:20Z"
    await cli("mount", "backup-1", "--disk", "3")
    assert service.called_with("Mount") == ["backup-1", {"disk_index": 3, "journal": "replay"}]


async def test_mounts_leaves_out_what_ended_meanwhile(service: FakeService, cli: CommandLine) -> None:
    other = MOUNT_ID[:-1] + "0"
    service.answers["ListMounts"] = Answer("ao", [object_of(other), object_of(MOUNT_ID)])
    service.answers["GetAll"] = lambda message: (
        properties() if message.path == object_of(MOUNT_ID) else errors.Expired("it was idle")
    )
    assert [mount["mount_id"] for mount in (await cli("mounts", "--json")).json] == [MOUNT_ID]
    assert re.search(
        rf"^{MOUNT_ID} +backup-1 +web +mounted +1 +- +2023-11-1. ..:.. +no$", (await cli("mounts")).out, re.MULTILINE
    )


@pytest.mark.usefixtures("service")
async def test_volumes_says_why_one_is_not_open(cli: CommandLine) -> None:
    lines = (await cli("volumes", MOUNT_ID)).out.splitlines()
    assert re.match(r"partition-1 +encrypted +- +- +100\.0 MiB", lines[1])
    assert re.match(r"partition-2 +mounted +ext4 +root +3\.0 GiB +1\.0 GiB +clean", lines[2])
    assert lines[3] == "partition-1: BitLocker; unlock it"


async def test_ls_json(service: FakeService, cli: CommandLine) -> None:
    entries = [entry("link", "symlink", 3, "etc"), entry("hidden", size=9, unreadable="EFS")]
    service.answers["ListFiles"] = Answer(LISTING, entries, "")
    link, hidden = (await cli("ls", MOUNT_ID, "/partition-1//", "--json")).json
    assert service.called_with("ListFiles")[0] == "/partition-1"
    assert link == {
        "name": "link",
        "path": "/partition-1/link",
        "kind": "symlink",
        "size": 3,
        "mode": "0644",
        "modified_time": "2023-11-14T22:13:20Z",
        "mtime_ns": 1_700_000_000 * 10**9,
        "symlink_target": "etc",
    }
    assert hidden["unreadable"] == "EFS"


async def test_ls_of_the_root_lists_the_volumes(service: FakeService, cli: CommandLine) -> None:
    volume = entry("partition-1", "volume", display_name='Partition 1 (100.4 GB, NTFS "Data")')
    service.answers["ListFiles"] = Answer(LISTING, [volume], "")
    assert (await cli("ls", MOUNT_ID)).out == "partition-1\n"
    assert service.called_with("ListFiles")[0] == "/"
    long = (await cli("ls", MOUNT_ID, "-l")).out
    assert re.match(r'drw-r--r-- +0 2023-11-1. ..:.. partition-1 \(Partition 1 \(100.4 GB, NTFS "Data"\)\)$', long)
    (listed,) = (await cli("ls", MOUNT_ID, "--json")).json
    assert listed["path"] == "/partition-1"


async def test_stat(service: FakeService, cli: CommandLine) -> None:
    info = variants(kind="file", size=1536, allocated=4096, mode=0o4755, uid=0, gid=5, nlink=2, xattrs=["user.a"])
    service.answers["GetFileInfo"] = Answer("a{sv}", info)
    answer = (await cli("stat", MOUNT_ID, "/partition-1/a", "--json")).json
    assert (answer["path"], answer["mode"], answer["xattrs"]) == ("/partition-1/a", "4755", ["user.a"])
    text = (await cli("stat", MOUNT_ID, "/partition-1/a")).out
    assert "mode:       4755 (-rwsr-xr-x)\n" in text
    assert "size:       1536 (1.5 KiB, 4.0 KiB on disk)\n" in text
    assert "stream" not in text
    assert "unreadable" not in text


async def test_stat_tells_streams_and_why_a_file_cannot_be_read(service: FakeService, cli: CommandLine) -> None:
    info = variants(kind="file", size=9, streams=["Zone.Identifier", "two words"], unreadable="encrypted; ask her")
    service.answers["GetFileInfo"] = Answer("a{sv}", info)
    answer = (await cli("stat", MOUNT_ID, "/partition-1/a", "--json")).json
    assert answer["streams"] == ["Zone.Identifier", "two words"]
    lines = (await cli("stat", MOUNT_ID, "/partition-1/a")).out.splitlines()
    assert lines[-3:] == ["unreadable: encrypted; ask her", "stream:     Zone.Identifier", "stream:     two words"]


async def test_ls_long_marks_what_cannot_be_read(service: FakeService, cli: CommandLine) -> None:
    service.answers["ListFiles"] = Answer(LISTING, [entry("hidden", size=9, unreadable="EFS"), entry("open")], "")
    hidden, readable = (await cli("ls", MOUNT_ID, "-l")).out.splitlines()
    assert hidden.endswith(" hidden (unreadable: EFS)")
    assert readable.endswith(" open")


async def test_unmount(service: FakeService, cli: CommandLine) -> None:
    service.answers["Unmount"] = Answer()
    assert await cli("unmount", MOUNT_ID) == Outcome(0, f"gave back {MOUNT_ID}\n", "")
    assert (await cli("unmount", MOUNT_ID, "--force", "--json")).json == {"mount_id": MOUNT_ID}
    assert service.called_with("Unmount") == [{"force": True}]


async def test_catalog(
    service: FakeService, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped = [variants(path="a.qcow2", reason="it is encrypted")]
    service.answers |= {
        "AddRepository": Answer("s", "repo-1"),
        "Scan": Answer("a{sv}", variants(added=["a", "b"], gone=["c"], unchanged=7, skipped=skipped)),
        "AddBackup": Answer("s", "backup-9"),
        "RemoveBackup": Answer(),
        "RemoveRepository": Answer(),
    }
    monkeypatch.chdir(tmp_path)
    assert (await cli("catalog", "add-repository", "nas", "here")).out == "repo-1\n"
    assert service.called_with("AddRepository") == ["nas", str(tmp_path / "here"), {}]
    outcome = await cli("catalog", "scan", "repo-1")
    assert outcome.out.splitlines() == [
        "added a",
        "added b",
        "gone c",
        "skipped a.qcow2: it is encrypted",
        "7 unchanged",
    ]
    assert (await cli("catalog", "scan", "repo-1", "--json")).json == {
        "unchanged": 7,
        "added": ["a", "b"],
        "updated": [],
        "gone": ["c"],
        "kept": [],
        "skipped": [{"path": "a.qcow2", "reason": "it is encrypted"}],
    }
    added = await cli("catalog", "add", "repo-1", "web", "a.qcow2", "b.qcow2", "--parent", "backup-8", "--json")
    assert added.json == {"backup_id": "backup-9"}
    assert service.called_with("AddBackup") == [
        {
            "disks": ["a.qcow2", "b.qcow2"],
            "repository_id": "repo-1",
            "vm_name": "web",
            "parent_backup_id": "backup-8",
        },
        {},
    ]
    assert (await cli("catalog", "remove-backup", "backup-9")).out == "removed backup-9\n"
    assert (await cli("catalog", "remove-repository", "repo-1", "--json")).json == {"repository_id": "repo-1"}


async def test_help_and_version_need_no_service(cli: CommandLine) -> None:
    assert (await cli("--version")).out.startswith("sendense-restore ")
    for arguments in ([], ["--help"], ["get", "--help"], ["catalog", "--help"]):
        outcome = await cli(*arguments)
        assert (outcome.code, "Usage:" in outcome.out, outcome.err) == (0, True, "")


# Names


async def test_in_a_pipe_names_are_in_their_text_form(service: FakeService, cli: CommandLine) -> None:
    service.answers["ListFiles"] = Answer(LISTING, [entry(HOSTILE), entry("caf\uefe9")], "")
    assert (await cli("ls", MOUNT_ID)).out == f"{HOSTILE}\ncaf\uefe9\n"
    assert [file["name"] for file in (await cli("ls", MOUNT_ID, "--json")).json] == [HOSTILE, "caf\uefe9"]


@pytest.mark.parametrize(
    "arguments", [["ls", MOUNT_ID], ["ls", MOUNT_ID, "-l"], ["ls", MOUNT_ID, "--json"], ["backups"]]
)
async def test_on_a_terminal_hostile_names_are_harmless(service: FakeService, arguments: list[str]) -> None:
    service.answers["ListFiles"] = Answer(LISTING, [entry(HOSTILE, "symlink", 0, HOSTILE + "\x9b2J")], "")
    service.answers["ListBackups"] = Answer("aa{sv}s", [variants(vm_name=HOSTILE + "\x9b2J")], "")
    terminal = Terminal()
    assert (await ended(await program(*arguments, stdout=terminal.fd)))[0] == 0
    shown = terminal.read()
    assert "owned" in shown
    assert not re.search("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", shown)


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        (b"/partition-1/caf\xe9", "/partition-1/caf\uefe9"),
        ("/partition-1/café".encode(), "/partition-1/café"),
        ("/partition-1/caf\uefe9".encode(), "/partition-1/caf\uefe9"),
    ],
)
async def test_a_name_can_be_given_raw_or_in_its_text_form(service: FakeService, typed: bytes, sent: str) -> None:
    service.answers["GetFileInfo"] = Answer("a{sv}", variants(kind="file"))
    code, _, err = await ended(await program("stat", MOUNT_ID, typed))
    assert (code, err) == (0, b"")
    assert service.called_with("GetFileInfo")[0] == sent


async def test_a_text_that_is_no_names_form_is_refused(service: FakeService, cli: CommandLine) -> None:
    assert (await cli("stat", MOUNT_ID, "/partition-1/\uefc3\uefa9")).code == 2  # the bytes of é
    assert not service.calls


# Content


@pytest.fixture
def guest_file(service: FakeService, tmp_path: Path) -> Path:
    """A file that OpenFile gives, of 1 MiB data, a hole of 8 MiB and a line."""
    path = tmp_path / "guest file"
    with path.open("wb") as file:
        file.write(os.urandom(1 << 20))
        file.seek(9 << 20)
        file.write(b"the end\n")
    info = variants(kind="file", size=path.stat().st_size, mode=0o4640, mtime_ns=1_234_567_890_123_456_789)
    service.answers["OpenFile"] = lambda _: Answer("ha{sv}", 0, info, fds=(service.open(path),))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "here"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


async def test_get_restores_content_time_mode_and_holes(cli: CommandLine, guest_file: Path, here: Path) -> None:
    outcome = await cli("get", MOUNT_ID, "/partition-1/dir/fi\uefe9le")
    assert outcome == Outcome(0, "saved fi\uefe9le (9.0 MiB)\n", "")
    (restored,) = here.iterdir()
    assert os.fsencode(restored.name) == b"fi\xe9le"
    assert restored.read_bytes() == guest_file.read_bytes()
    stat = restored.stat()
    assert stat.st_mtime_ns == 1_234_567_890_123_456_789
    assert stat.st_mode & 0o7777 == 0o640 & ~0o022
    assert stat.st_blocks <= guest_file.stat().st_blocks


async def test_get_json(cli: CommandLine, guest_file: Path, here: Path) -> None:
    outcome = await cli("get", MOUNT_ID, "/partition-1/a", "new", "--json")
    assert outcome.json == {"path": "/partition-1/a", "destination": "new", "size": guest_file.stat().st_size}
    assert [path.name for path in here.iterdir()] == ["new"]


@pytest.mark.parametrize("destination", ["taken", ".", "link", "dangling"])
@pytest.mark.usefixtures("guest_file")
async def test_get_replaces_nothing_without_force(
    service: FakeService, cli: CommandLine, here: Path, destination: str
) -> None:
    (here / "taken").write_text("mine")
    (here / "link").symlink_to("taken")
    (here / "dangling").symlink_to("nothing")
    outcome = await cli("get", MOUNT_ID, "/partition-1/taken", destination)
    assert (outcome.code, "--force" in outcome.err) == (2, True)
    assert (here / "taken").read_text() == "mine"
    assert sorted(path.name for path in here.iterdir()) == ["dangling", "link", "taken"]
    assert not service.calls


async def test_get_with_force_replaces_the_file_whole(cli: CommandLine, guest_file: Path, here: Path) -> None:
    (here / "taken").write_text("mine")
    (here / "link").symlink_to("taken")
    assert (await cli("get", MOUNT_ID, "/partition-1/a", "link", "--force")).code == 0
    assert not (here / "link").is_symlink()
    assert (here / "link").read_bytes() == guest_file.read_bytes()
    assert (here / "taken").read_text() == "mine"
    assert len(list(here.iterdir())) == 2


@pytest.mark.parametrize(
    "arguments", [["/partition-1"], ["/"], ["/partition-1/a", "no/such"], ["/partition-1/a", "no/"]]
)
async def test_get_of_no_file_or_to_no_directory_asks_nobody(
    service: FakeService, cli: CommandLine, here: Path, arguments: list[str]
) -> None:
    assert (await cli("get", MOUNT_ID, *arguments)).code in {2, 5}
    assert not service.calls
    assert not list(here.iterdir())


async def test_get_of_a_file_of_another_size_leaves_nothing(
    service: FakeService, cli: CommandLine, guest_file: Path, here: Path
) -> None:
    service.answers["OpenFile"] = Answer("ha{sv}", 0, variants(size=1 << 30), fds=(service.open(guest_file),))
    assert (await cli("get", MOUNT_ID, "/partition-1/a")).code == 1
    assert not list(here.iterdir())


async def test_a_stream_is_opened_by_its_name_and_saved_beside_its_file(
    service: FakeService, cli: CommandLine, guest_file: Path, here: Path
) -> None:
    outcome = await cli("get", MOUNT_ID, "/partition-1/a", "--stream", "Zone.Identifier")
    assert outcome == Outcome(0, "saved a:Zone.Identifier (9.0 MiB)\n", "")
    assert service.called_with("OpenFile") == ["/partition-1/a", {"stream": "Zone.Identifier"}]
    assert (here / "a:Zone.Identifier").read_bytes() == guest_file.read_bytes()
    assert (await cli("get", MOUNT_ID, "/partition-1", "out", "--stream", "of the root")).code == 0
    assert service.called_with("OpenFile") == ["/partition-1", {"stream": "of the root"}]


async def test_cat_of_a_stream_takes_its_name_raw_or_in_its_text_form(service: FakeService, guest_file: Path) -> None:
    for typed in (b"caf\xe9", "caf\uefe9".encode()):
        code, out, _ = await ended(await program("cat", MOUNT_ID, "/partition-1/a", "--stream", typed))
        assert (code, out) == (0, guest_file.read_bytes())
        assert service.called_with("OpenFile") == ["/partition-1/a", {"stream": "caf\uefe9"}]


@pytest.mark.parametrize("stream", ["", "a:b", "a/b"])
async def test_get_of_what_is_no_stream_asks_nobody(
    service: FakeService, cli: CommandLine, here: Path, stream: str
) -> None:
    assert (await cli("get", MOUNT_ID, "/partition-1/a", "--stream", stream)).code == 2
    assert (await cli("get", MOUNT_ID, "/", "--stream", "s")).code == 5
    assert not service.calls
    assert not list(here.iterdir())


async def test_cat_is_byte_for_byte(guest_file: Path) -> None:
    code, out, err = await ended(await program("cat", MOUNT_ID, "/partition-1/a"))
    assert (code, err) == (0, b"")
    assert out == guest_file.read_bytes()


# Terminals, pipes, signals


@pytest.mark.usefixtures("guest_file", "here")
async def test_get_shows_its_progress_on_a_terminal_only() -> None:
    terminal = Terminal()
    process = await program("get", MOUNT_ID, "/partition-1/[red]a", stderr=terminal.fd)
    assert (await ended(process))[0] == 0
    assert "[red]a" in terminal.read()
    assert (await ended(await program("get", MOUNT_ID, "/partition-1/b")))[2] == b""


@pytest.mark.parametrize(
    "arguments", [["ls", MOUNT_ID], ["ls", MOUNT_ID, "--json"], ["cat", MOUNT_ID, "/partition-1/a"]]
)
@pytest.mark.usefixtures("guest_file")
async def test_a_reader_that_goes_away_ends_it_quietly(service: FakeService, arguments: list[str]) -> None:
    service.answers["ListFiles"] = Answer(LISTING, [entry(f"{number:0200}") for number in range(2000)], "")
    reading, writing = os.pipe()
    os.close(reading)
    process = await program(*arguments, stdout=writing)
    os.close(writing)
    code, _, err = await ended(process)
    assert (code, err) == (141, b"")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
async def test_a_signal_while_it_waits_ends_it_quietly_and_leaves_nothing(
    service: FakeService, here: Path, number: signal.Signals, code: int
) -> None:
    service.answers["OpenFile"] = HANG
    process = await program("get", MOUNT_ID, "/partition-1/a")
    await service.called.wait()
    process.send_signal(number)
    assert await ended(process) == (code, b"", b"")
    assert not list(here.iterdir())
