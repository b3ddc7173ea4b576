"""``status``, ``events``, the catalogue's lists and claims, against a service whose answers the test decides."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.bus.command_line import Outcome, Terminal, ended, program
from tests.bus.fake import MOUNT_ID, Answer, FakeService, object_of, only_properties, variants

if TYPE_CHECKING:
    from tests.bus.command_line import CommandLine

HOSTILE = "\x1b]0;owned\x07\u202etxt.exe\n"
NOTHING = Answer("aa{sv}s", [], "")


@pytest.fixture
def service(service: FakeService, bus_address: str, monkeypatch: pytest.MonkeyPatch) -> FakeService:
    """The one of all tests here, which the command line finds and which has mounts."""
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus_address)
    service.answers["GetAll"] = only_properties
    return service


async def test_status(service: FakeService, cli: CommandLine) -> None:
    device = variants(path="/dev/loop7", state="draining", mount=MOUNT_ID)
    numbers = {"active_mounts": 2, "max_mounts": 8, "available_slots": 6, "overlay_used": 3 << 20, "open_fds": 40}
    more = {"overlay_limit": 2 << 30, "memory": 50 << 20, "sweep_interval": 900, "idle_timeout": 3600, "queued": 1}
    answer = variants(**numbers, **more, next_sweep=1_700_000_000, backend="fuse", devices=[device])
    service.answers["GetResources"] = Answer("a{sv}", answer)
    text = (await cli("status")).out
    for part in ("2 of 8, 6 free", "3.0 MiB of 2.0 GiB", "50.0 MiB", "1 waiting", "1 h", "every 15 min", "fuse"):
        assert part in text
    assert re.search(rf"^/dev/loop7 +draining +{MOUNT_ID}$", text, re.MULTILINE)
    as_json = (await cli("status", "--json")).json
    assert as_json.items() >= {"next_sweep": "2023-11-14T22:13:20Z", "expired_mounts": 0, **numbers, **more}.items()
    assert as_json["devices"] == [{"path": "/dev/loop7", "state": "draining", "mount": MOUNT_ID}]


async def test_status_of_the_files_in_use(service: FakeService, cli: CommandLine) -> None:
    held = {"repository": "repo-1", "file": "web/a.qcow2", "mount": MOUNT_ID}
    service.answers["InUse"] = Answer("aa{sv}", [variants(**held)])
    assert (await cli("status", "--in-use", "--json")).json == [held]
    assert (await cli("status", "--in-use")).out.splitlines()[1].split() == list(held.values())


async def test_events(service: FakeService, cli: CommandLine) -> None:
    opened = variants(
        id=2,
        at=1_700_000_000_000_042,
        what="open_file",
        outcome="ok",
        uid=1000,
        unit="web.service",
        on_behalf_of="eva",
        mount_id=MOUNT_ID,
        path="/disk/a",
        size=2048,
    )
    ended_ = variants(id=1, at=1_700_000_000_000_000, what="expire", outcome="Busy", backup_id="b")
    service.answers["ListEvents"] = Answer("aa{sv}s", [opened, ended_], "")
    lines = (await cli("events", "--mount", MOUNT_ID)).out.splitlines()
    assert service.called_with("ListEvents") == [{"mount_id": MOUNT_ID, "limit": 100}]
    assert re.search(rf"open_file +ok +uid 1000 \(web.service\) for eva +{MOUNT_ID} +/disk/a +2\.0 KiB +-$", lines[1])
    assert re.search(r"expire +Busy +- +b +- +- +-$", lines[2])
    first, second = (await cli("events", "--json")).json
    assert (first["at"], first["uid"], first["bytes"]) == ("2023-11-14T22:13:20.000042Z", 1000, None)
    assert second["uid"] is None
    assert len((await cli("events", "--limit", "1", "--json")).json) == 1
    assert service.called_with("ListEvents") == [{"limit": 1}]


async def test_an_event_beyond_the_calendar_has_no_time(service: FakeService, cli: CommandLine) -> None:
    service.answers["ListEvents"] = Answer("aa{sv}s", [variants(at=2**63 - 1)], "")
    assert (await cli("events", "--json")).json[0]["at"] is None
    assert (await cli("events")).code == 0


async def test_the_catalogues_machines_and_repositories(service: FakeService, cli: CommandLine) -> None:
    service.answers["ListVms"] = Answer("aa{sv}s", [variants(context_id="c", vm_name="web", backups=3, newest=5)], "")
    (vm,) = (await cli("catalog", "vms", "--json")).json
    assert (vm["vm_name"], vm["backups"], vm["newest"]) == ("web", 3, "1970-01-01T00:00:05Z")
    assert (await cli("catalog", "vms")).out.splitlines()[1].split()[:3] == ["web", "c", "3"]
    found = variants(repository_id="r", name="nas", type="local", path="/srv", enabled=True, immutable=False)
    service.answers["ListRepositories"] = Answer("aa{sv}", [found])
    (repository,) = (await cli("catalog", "repositories", "--json")).json
    assert repository["enabled"] is True
    line = (await cli("catalog", "repositories")).out.splitlines()[1]
    assert line.split() == ["r", "nas", "local", "/srv", "yes", "no"]


async def test_backups_of_one_repository(service: FakeService, cli: CommandLine) -> None:
    service.answers["ListBackups"] = NOTHING
    await cli("backups", "--repository", "repo-1")
    assert service.called_with("ListBackups") == [{"repository_id": "repo-1", "limit": 100}]


async def test_mount_for_somebody_for_a_while_in_the_queue(service: FakeService, cli: CommandLine) -> None:
    service.answers["Mount"] = Answer("o", object_of(MOUNT_ID))
    assert (await cli("mount", "b", "--idle-timeout", "2h", "--wait", "--on-behalf-of", "eva")).code == 0
    assert service.called_with("Mount") == [
        "b",
        {"journal": "replay", "idle_timeout": 7200, "wait": True, "on_behalf_of": "eva"},
    ]


async def test_unmount_for_somebody(service: FakeService, cli: CommandLine) -> None:
    service.answers["Unmount"] = Answer()
    await cli("unmount", MOUNT_ID, "--on-behalf-of", "eva")
    assert service.called_with("Unmount") == [{"on_behalf_of": "eva"}]


async def test_unmount_of_all_that_has_expired(service: FakeService, cli: CommandLine) -> None:
    service.answers["CleanupNow"] = Answer("u", 3)
    assert await cli("unmount", "--expired") == Outcome(0, "ended 3 mounts\n", "")
    assert (await cli("unmount", "--expired", "--json")).json == {"ended": 3}


@pytest.mark.parametrize(
    "arguments",
    [
        ["unmount"],
        ["unmount", MOUNT_ID, "--expired"],
        ["unmount", "--expired", "--force"],
        ["unmount", "--expired", "--on-behalf-of", "eva"],
        ["mount", "b", "--idle-timeout", "2 h"],
        ["events", "--mount", "x"],
        ["shell"],
    ],
    ids=" ".join,
)
async def test_what_makes_no_sense_asks_nobody(service: FakeService, cli: CommandLine, arguments: list[str]) -> None:
    assert (await cli(*arguments)).code == 2
    assert not service.calls


@pytest.mark.parametrize("arguments", [["events"], ["status"], ["status", "--in-use"], ["catalog", "vms"]])
async def test_on_a_terminal_what_strangers_named_is_harmless(service: FakeService, arguments: list[str]) -> None:
    service.answers |= {
        "ListEvents": Answer("aa{sv}s", [variants(path=HOSTILE, detail=HOSTILE, on_behalf_of=HOSTILE)], ""),
        "GetResources": Answer("a{sv}", variants(backend=HOSTILE, devices=[variants(path=HOSTILE)])),
        "InUse": Answer("aa{sv}", [variants(file=HOSTILE)]),
        "ListVms": Answer("aa{sv}s", [variants(vm_name=HOSTILE)], ""),
    }
    terminal = Terminal()
    assert (await ended(await program(*arguments, stdout=terminal.fd)))[0] == 0
    shown = terminal.read()
    assert "owned" in shown
    assert not re.search("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", shown)
