"""What the command line prints, piece by piece."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sendense_restored import errors
from sendense_restored.cli import frame, output
from sendense_restored.client import Backup, Disk, Entry, FileInfo, MountInfo, Volume

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 30, "1.0 GiB"),
        (3 << 49, "1.5 PiB"),
        (2**63 - 1, "8192.0 PiB"),
    ],
)
def test_sizes_have_the_largest_unit_that_fits(count: int, text: str) -> None:
    assert output.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1_700_000_000, "2023-11-14T22:13:20Z"),
        (-1, "1969-12-31T23:59:59Z"),
        (0, None),
        (2**62, None),
        (-(2**62), None),
    ],
)
def test_times_for_programs(seconds: int, text: str | None) -> None:
    assert output.rfc3339(seconds) == text


@given(st.integers(-(2**63), 2**63 - 1))
def test_no_time_that_a_file_system_can_write_is_too_much(seconds: int) -> None:
    assert isinstance(output.local_time(seconds), str)


@pytest.mark.parametrize(
    ("kind", "bits", "text"),
    [
        ("file", 0o644, "-rw-r--r--"),
        ("directory", 0o1777, "drwxrwxrwt"),
        ("volume", 0o755, "drwxr-xr-x"),
        ("symlink", 0o777, "lrwxrwxrwx"),
        ("file", 0o4755, "-rwsr-xr-x"),
        ("file", 0o6644, "-rwSr-Sr--"),
        ("directory", 0o1000, "d--------T"),
        ("fifo", 0, "p---------"),
        ("something new", 0o600, "-rw-------"),
    ],
)
def test_modes_as_ls_has_them(kind: str, bits: int, text: str) -> None:
    assert output.mode(kind, bits) == text


def test_columns_are_as_wide_as_their_widest_cell(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("NAME", "SIZE"), [("a", "1.0 KiB"), ("日本", "7 B"), ("", "")], right=(1,))
    assert capsys.readouterr().out.splitlines() == [
        "NAME     SIZE",
        "a     1.0 KiB",
        "日本      7 B",
        "-           -",
    ]


def test_an_empty_table_has_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("NAME", "SIZE"), [])
    assert capsys.readouterr().out == "NAME  SIZE\n"


async def _items(*values: int) -> AsyncIterator[int]:
    for value in values:
        yield value


@pytest.mark.parametrize("values", [(), (1,), (1, 2, 3)])
async def test_a_listing_is_one_array(capsys: pytest.CaptureFixture[str], values: tuple[int, ...]) -> None:
    await output.listing(_items(*values), lambda value: {"value": value})
    assert json.loads(capsys.readouterr().out) == [{"value": value} for value in values]


async def test_a_listing_that_fails_is_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    async def failing() -> AsyncIterator[int]:
        yield 1
        raise errors.Unavailable("gone")

    with pytest.raises(errors.Unavailable):
        await output.listing(failing(), lambda value: {"value": value})
    with pytest.raises(json.JSONDecodeError):
        json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("terminal", [True, False])
def test_names_are_escaped_for_terminals_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    name = "\x9b2J\u202eä"
    output.line(name)
    output.table(("NAME",), [(name,)])
    output.document({"name": name})
    line, _, cell, *document = capsys.readouterr().out.splitlines()
    assert line == cell == ("\\x9b2J\\u202eä" if terminal else name)
    assert json.loads("".join(document)) == {"name": name}
    assert "".join(document).isascii() == terminal


def test_a_backup_has_the_rest_apis_names() -> None:
    backup = Backup(backup_id="b", vm_name="web", created_at=1_700_000_000, disks=(Disk(0, 5, 7),))
    assert output.backup_json(backup) == {
        "backup_id": "b",
        "vm_name": "web",
        "backup_type": "",
        "status": "",
        "repository_id": "",
        "parent_backup_id": "",
        "total_bytes": 0,
        "bytes_transferred": 0,
        "created_at": "2023-11-14T22:13:20Z",
        "started_at": None,
        "completed_at": None,
        "disks": ({"index": 0, "size": 5, "backup_disk_id": 7},),
        "disks_count": 1,
    }


def test_a_mount_has_its_id_first_and_its_times_in_words() -> None:
    mount = output.mount_json(MountInfo(id="m", created_at=1_700_000_000, volumes=(Volume(name="disk"),)))
    assert next(iter(mount.items())) == ("mount_id", "m")
    assert "id" not in mount
    assert (mount["created_at"], mount["last_accessed_at"]) == ("2023-11-14T22:13:20Z", None)
    assert mount["volumes"][0]["name"] == "disk"
    json.dumps(mount)


def test_what_the_service_adds_cannot_replace_what_a_file_is() -> None:
    entry = Entry("a", "file", 1, 0o640, -1, "", {"size": 99, "path": "/etc/shadow", "unreadable": "EFS"})
    listed = output.entry_json(entry, "/partition-1")
    assert (listed["size"], listed["path"], listed["unreadable"]) == (1, "/partition-1/a", "EFS")
    assert (listed["mode"], listed["modified_time"]) == ("0640", "1969-12-31T23:59:59Z")
    assert "symlink_target" not in listed


def test_a_file_has_its_path_and_mode_in_octal() -> None:
    info = output.info_json(FileInfo(kind="file", mode=0o4755, streams=("zone",)), "/disk/a")
    assert (info["path"], info["mode"], info["streams"]) == ("/disk/a", "4755", ("zone",))


# Arguments


@pytest.mark.parametrize(
    ("argument", "path"),
    [
        ("/partition-1//a/", "/partition-1/a"),
        ("/partition-1/caf\udce9", "/partition-1/caf\uefe9"),
        ("/partition-1/caf\uefe9", "/partition-1/caf\uefe9"),
        # Raw bytes that happen to hold the UTF-8 of U+EFE9 beside a stray byte: all of it is taken for raw.
        ("/partition-1/\udce9\uefe9", "/partition-1/\uefe9\uefee\uefbf\uefa9"),
    ],
)
def test_guest_paths_are_typed_or_pasted(argument: str, path: str) -> None:
    assert frame.guest_path(argument) == path


@pytest.mark.parametrize("argument", ["", "a", "/..", "/a\udce9/..", "/\uefc3\uefa9"])
def test_what_is_no_guest_path_is_refused(argument: str) -> None:
    with pytest.raises(errors.InvalidPath):
        frame.guest_path(argument)


def test_a_directory_of_the_host_that_cannot_be_told_is_refused() -> None:
    with pytest.raises(errors.InvalidOption, match="UTF-8"):
        frame.host_path("/srv/caf\udce9")
