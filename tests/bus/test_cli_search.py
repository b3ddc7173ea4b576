"""``find`` and ``tree`` against a service whose answers the test decides."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest

from sendense_restored import errors
from tests.bus.command_line import Outcome, Terminal, ended, program
from tests.bus.fake import MOUNT_ID, Answer, FakeService, entry, found, object_of, summary

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bus.command_line import CommandLine
    from tests.bus.peer import Message

LISTING = "a(sstuxsa{sv})s"
HOSTILE = "\x1b]0;owned\x07\u202etxt.exe\n"


@pytest.fixture
def service(service: FakeService, bus_address: str, monkeypatch: pytest.MonkeyPatch) -> FakeService:
    """The one of all tests here, which the command line finds."""
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus_address)
    return service


# find


async def test_find_prints_a_path_a_line(service: FakeService, cli: CommandLine) -> None:
    service.answers["OpenListing"] = service.stream(found("/disk/a"), found("/disk/caf\uefe9"), summary(2))
    assert await cli("find", MOUNT_ID) == Outcome(0, "/disk/a\n/disk/caf\uefe9\n", "")
    assert service.called_with("OpenListing") == ["/", {"recursive": True}]


async def test_find_ends_each_with_a_nul_for_xargs(service: FakeService, cli: CommandLine) -> None:
    service.answers["OpenListing"] = service.stream(found("/disk/a\nb"), found("/disk/c"), summary(2))
    assert (await cli("find", MOUNT_ID, "-0")).out == "/disk/a\nb\0/disk/c\0"


async def test_find_long(service: FakeService, cli: CommandLine) -> None:
    service.answers["OpenListing"] = service.stream(
        found("/disk/l", "symlink", 3, target="a"), found("/disk/e", size=9, unreadable="EFS"), summary(2)
    )
    link, hidden = (await cli("find", MOUNT_ID, "-l")).out.splitlines()
    assert re.fullmatch(r"lrw-r--r-- +3 2023-11-1\d \d\d:\d\d /disk/l -> a", link)
    assert re.fullmatch(r"-rw-r--r-- +9 .{16} /disk/e \(unreadable: EFS\)", hidden)


async def test_find_sends_the_conditions_in_the_contracts_units(service: FakeService, cli: CommandLine) -> None:
    service.answers["OpenListing"] = service.stream(summary(0))
    outcome = await cli(
        *("find", MOUNT_ID, "/disk//etc/", "--name", "*.co\udce9", "--kind", "file", "--min-size", "10M"),
        *("--max-size", "0", "--newer", "1970-01-01T00:00:00Z", "--older", "2023-11-14T22:13:20Z"),
        *("--max-depth", "3", "--limit", "5"),
    )
    assert outcome == Outcome(0, "", "")
    assert service.called_with("OpenListing") == [
        "/disk/etc",
        {
            "recursive": True,
            "max_depth": 3,
            "name": "*.co\uefe9",
            "kind": "file",
            "limit": 5,
            "min_size": 10 << 20,
            "max_size": 0,
            "newer": 0,
            "older": 1_700_000_000 * 10**9,
        },
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kind", "door"],
        ["--min-size", "big"],
        ["--max-size", "1MB"],
        ["--newer", "yesterday"],
        ["--older", "2023-13-01"],
        ["--limit", "-1"],
        ["--max-depth", "x"],
    ],
    ids=" ".join,
)
async def test_find_refuses_a_condition_that_makes_no_sense(
    service: FakeService, cli: CommandLine, arguments: list[str]
) -> None:
    outcome = await cli("find", MOUNT_ID, "/", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert arguments[0] in outcome.err
    assert not service.calls


async def test_find_tells_what_could_not_be_read_and_that_more_is_there(
    service: FakeService, cli: CommandLine
) -> None:
    service.answers["OpenListing"] = service.stream(
        found("/disk/a"), {"path": "/disk/b", "error": "damaged"}, summary(1, 1, truncated=True)
    )
    outcome = await cli("find", MOUNT_ID)
    assert (outcome.code, outcome.out) == (8, "/disk/a\n")
    assert "/disk/b: damaged\n" in outcome.err
    assert "--limit" in outcome.err
    assert "not everything" in outcome.err
    with_json = await cli("find", MOUNT_ID, "--json")
    assert with_json.code == 8
    assert [record.get("error") for record in with_json.json] == [None, "damaged"]
    assert [json.loads(line).get("code") for line in with_json.err.splitlines()] == [None, "Unreadable"]


async def test_find_that_was_cut_short_as_asked_succeeds(service: FakeService, cli: CommandLine) -> None:
    service.answers["OpenListing"] = service.stream(found("/disk/a"), summary(1, truncated=True))
    outcome = await cli("find", MOUNT_ID, "--limit", "1")
    assert (outcome.code, outcome.out) == (0, "/disk/a\n")
    assert "first 1" in outcome.err


async def test_find_json_has_the_form_of_ls(service: FakeService, cli: CommandLine) -> None:
    service.answers["OpenListing"] = service.stream(
        found("/disk/l", "symlink", 3, target="a"), found("/disk", "volume", display_name="Disk"), summary(2)
    )
    link, volume = (await cli("find", MOUNT_ID, "--json")).json
    assert link == {
        "name": "l",
        "path": "/disk/l",
        "kind": "symlink",
        "size": 3,
        "mode": "0644",
        "modified_time": "2023-11-14T22:13:20Z",
        "mtime_ns": 1_700_000_000 * 10**9,
        "symlink_target": "a",
    }
    assert (volume["name"], volume["path"], volume["display_name"]) == ("disk", "/disk", "Disk")


async def test_a_find_that_breaks_off_is_no_json_and_no_success(service: FakeService, cli: CommandLine) -> None:
    service.answers["OpenListing"] = service.stream(found("/disk/a"))
    assert (await cli("find", MOUNT_ID)).code == 15
    outcome = await cli("find", MOUNT_ID, "--json")
    assert outcome.code == 15
    with pytest.raises(json.JSONDecodeError):
        outcome.json  # noqa: B018 - a property


@pytest.mark.parametrize("options", [["-l"], ["--json"], ["-0"], []])
async def test_find_on_a_terminal_is_harmless(service: FakeService, options: list[str]) -> None:
    service.answers["OpenListing"] = service.stream(
        found("/disk/" + HOSTILE, "symlink", target=HOSTILE + "\x9b2J", unreadable=HOSTILE),
        {"path": "/disk/" + HOSTILE, "error": HOSTILE},
        summary(1, 1),
    )
    terminal = Terminal()
    code, _, _ = await ended(await program("find", MOUNT_ID, *options, stdout=terminal.fd, stderr=terminal.fd))
    shown = terminal.read()
    assert code == 8
    assert "owned" in shown
    assert not re.search("[\x01-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", shown)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_find_stopped_by_a_signal_closes_the_stream(
    service: FakeService, number: signal.Signals, code: int
) -> None:
    reading, writing = service.pipe()
    service.answers["OpenListing"] = Answer("h", 0, fds=(reading,))
    os.write(writing, (json.dumps(found("/disk/a")) + "\n").encode())
    process = await program("find", MOUNT_ID, stdout=(terminal := Terminal()).fd)
    os.close(terminal.fd)
    # A terminal gets each line at once: when the first has come, the stream is being read.
    first = await asyncio.to_thread(os.read, terminal._reading, 100)
    assert b"/disk/a" in first
    service.let_go(reading)
    process.send_signal(number)
    assert (await ended(process))[0] == code
    os.close(terminal._reading)
    with pytest.raises(BrokenPipeError):
        os.write(writing, b"x")
    os.close(writing)


@pytest.mark.parametrize("arguments", [["find", MOUNT_ID], ["find", MOUNT_ID, "--json"], ["tree", MOUNT_ID]])
async def test_a_reader_that_goes_away_ends_it_quietly(service: FakeService, arguments: list[str]) -> None:
    service.answers["OpenListing"] = service.stream(*[found(f"/{number:0200}") for number in range(2000)])
    service.answers["ListFiles"] = Answer(LISTING, [entry(f"{number:0200}") for number in range(2000)], "")
    reading, writing = os.pipe()
    os.close(reading)
    process = await program(*arguments, stdout=writing)
    os.close(writing)
    code, _, err = await ended(process)
    assert (code, err) == (141, b"")


# tree


def directories(**listings: Any) -> Callable[[Message], object]:  # noqa: ANN401 - entries or errors
    """ListFiles of a guest: keys are the paths, with _ for the root and __ for each slash."""
    known = {"/" + key.strip("_").replace("__", "/"): value for key, value in listings.items()}

    def answer(message: Message) -> object:
        path, options = message.body
        value = known.get(path, errors.PathNotFound(f"there is no {path}"))
        if isinstance(value, Exception):
            return value
        start = int(options["cursor"].value) if "cursor" in options else 0
        page = value[start : start + 2]  # pages of two, so that they matter
        if any(isinstance(each, Exception) for each in page):
            return next(each for each in page if isinstance(each, Exception))
        return Answer(LISTING, page, str(start + 2) if start + 2 < len(value) else "")

    return answer


GUEST = {
    "_": [entry("partition-1", "volume"), entry("partition-2", "volume")],
    "_partition-1": [entry(".hidden"), entry("etc", "directory"), entry("link", "symlink", 0, "etc"), entry("z")],
    "_partition-1__etc": [entry("a"), entry("b"), entry("c")],
    "_partition-2": errors.VolumeUnavailable("BitLocker; unlock it"),
}


async def test_tree_draws_what_is_below(service: FakeService, cli: CommandLine) -> None:
    service.answers["ListFiles"] = directories(**GUEST)
    outcome = await cli("tree", MOUNT_ID, "/partition-1")
    assert outcome == Outcome(
        0,
        "/partition-1\n├── etc\n│   ├── a\n│   ├── b\n│   └── c\n├── link -> etc\n└── z\n\n1 directories, 5 files\n",
        "",
    )
    assert "├── .hidden\n" in (await cli("tree", MOUNT_ID, "/partition-1", "-a")).out
    assert "etc\n├── link" in (await cli("tree", MOUNT_ID, "/partition-1", "--depth", "1")).out


async def test_tree_goes_on_after_what_cannot_be_read(service: FakeService, cli: CommandLine) -> None:
    service.answers["ListFiles"] = directories(**GUEST)
    outcome = await cli("tree", MOUNT_ID)
    assert outcome.code == 8
    assert "└── partition-2\n    └── [BitLocker; unlock it]\n" in outcome.out
    assert "│   ├── etc\n│   │   ├── a\n" in outcome.out
    records = (await cli("tree", MOUNT_ID, "--json")).json
    assert [record["path"] for record in records][:4] == [
        "/partition-1",
        "/partition-1/etc",
        "/partition-1/etc/a",
        "/partition-1/etc/b",
    ]
    assert records[-1] == {"path": "/partition-2", "error": "BitLocker; unlock it"}


async def test_a_page_that_fails_does_not_hide_those_before_it(service: FakeService, cli: CommandLine) -> None:
    broken = [entry("a"), entry("b"), errors.Unreadable("damaged here"), entry("d")]
    service.answers["ListFiles"] = directories(_=[entry("disk", "volume")], _disk=broken)
    outcome = await cli("tree", MOUNT_ID)
    assert outcome.code == 8
    assert "    ├── a\n    ├── b\n    └── [damaged here]\n" in outcome.out


@pytest.mark.parametrize("error", [errors.Expired("it was idle"), errors.Unavailable("the reader died")])
async def test_tree_ends_with_the_mount(service: FakeService, cli: CommandLine, error: errors.RestoreError) -> None:
    service.answers["ListFiles"] = directories(_=[entry("disk", "volume")], _disk=error)
    assert (await cli("tree", MOUNT_ID)).code == error.exit_code


async def test_tree_of_what_is_no_directory_is_the_services_error(service: FakeService, cli: CommandLine) -> None:
    service.answers["ListFiles"] = errors.NotADirectory("it is a file")
    outcome = await cli("tree", MOUNT_ID, "/disk/a")
    assert (outcome.code, outcome.err) == (5, "sendense-restore: it is a file\n")


async def test_tree_goes_as_deep_as_guests_do(service: FakeService, cli: CommandLine) -> None:
    depth = 1500  # more than Python nests calls

    def answer(message: Message) -> Answer:
        deep = message.body[0].count("d")
        return Answer(LISTING, [entry("d", "directory")] if deep < depth else [], "")

    service.answers["ListFiles"] = answer
    outcome = await cli("tree", MOUNT_ID, "/x")
    assert outcome.code == 0
    assert outcome.out.endswith(f"\n\n{depth} directories, 0 files\n")


async def test_tree_on_a_terminal_is_harmless(service: FakeService) -> None:
    service.answers["ListFiles"] = directories(
        _=[entry(HOSTILE, "symlink", 0, HOSTILE), entry("d", "directory")], _d=errors.Unreadable(HOSTILE)
    )
    terminal = Terminal()
    assert (await ended(await program("tree", MOUNT_ID, stdout=terminal.fd)))[0] == 8
    shown = terminal.read()
    assert shown.count("owned") == 3
    assert not re.search("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", shown)


# ls, as completions use it


async def test_ls_marks_directories_and_ends_with_nul(service: FakeService, cli: CommandLine) -> None:
    service.answers["ListFiles"] = Answer(LISTING, [entry("a\nb"), entry("d", "directory"), entry("v", "volume")], "")
    assert (await cli("ls", MOUNT_ID, "-p", "-0")).out == "a\nb\0d/\0v/\0"
    assert service.calls[-1].path == object_of(MOUNT_ID)
