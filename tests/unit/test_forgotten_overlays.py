"""Only what surely is a forgotten overlay of ours is removed from a directory that is not ours alone."""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.daemon.host import workplace
from sendense_restored.daemon.host.workplace import Workplace, remove_forgotten

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GONE, LIVE = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))


@pytest.fixture
def nameless_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without O_TMPFILE."""
    opening: Callable[..., int] = os.open

    def refusing(path: object, flags: int, *arguments: int, **named: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return opening(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", refusing)


def test_an_overlay_on_a_disk_has_no_name(tmp_path: Path) -> None:
    place = Workplace(tmp_path / GONE, 1 << 20, tmp_path)
    overlay = place.open_overlay(0)
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(overlay).st_nlink == 0
    os.write(overlay, b"x")
    os.close(overlay)
    place.close()


@pytest.mark.usefixtures("nameless_is_unknown")
def test_where_it_needs_a_name_it_loses_it_at_once(tmp_path: Path) -> None:
    place = Workplace(tmp_path / GONE, 1 << 20, tmp_path)
    overlay = place.open_overlay(0)
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(overlay).st_nlink == 0
    assert os.fstat(overlay).st_mode & 0o777 == 0o600
    again = os.open(f"/proc/self/fd/{overlay}", os.O_RDWR)
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is not locked any more
    os.close(again)
    os.close(overlay)
    place.close()


@pytest.mark.usefixtures("nameless_is_unknown")
def test_what_lies_there_already_is_not_used(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"theirs")
    (tmp_path / f"sendense-{GONE}-0").symlink_to(theirs)
    place = Workplace(tmp_path / GONE, 1 << 20, tmp_path)
    with pytest.raises(errors.Unavailable):
        place.open_overlay(0)
    assert theirs.read_bytes() == b"theirs"
    place.close()


def test_a_directory_that_is_missing_is_the_operators_to_mend(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Workplace(tmp_path / GONE, 1 << 20, tmp_path / "missing")
    with pytest.raises(errors.Unavailable, match=r"attach\.overlay_dir") as refusal:
        place.open_overlay(0)
    assert str(tmp_path) not in refusal.value.message
    assert str(tmp_path / "missing") in caplog.text


def test_a_forgotten_overlay_is_removed(tmp_path: Path) -> None:
    file = tmp_path / f"sendense-{GONE}-0"
    file.touch()
    (said,) = remove_forgotten(tmp_path, [LIVE], [os.getuid()])
    assert said == f"removed {file}, which belonged to no mount"
    assert list(tmp_path.iterdir()) == []
    assert remove_forgotten(tmp_path, [LIVE], [os.getuid()]) == []


@pytest.mark.parametrize(
    "name",
    [
        f"sendense-{LIVE}-0",
        f"sendense-{GONE}-",
        f"sendense-{GONE}-0.qcow2",
        f"xsendense-{GONE}-0",
        f"sendense-{GONE.replace('-', '')}-0",
        f"sendense-{'-' * 36}-0",
        f"sendense-{GONE}-0\n",
        GONE,
        "sendense-restored.db",
    ],
)
def test_what_is_named_otherwise_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert remove_forgotten(tmp_path, [LIVE], [os.getuid()]) == []
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_what_is_somebody_elses_stays(tmp_path: Path) -> None:
    (tmp_path / f"sendense-{GONE}-0").touch()
    assert remove_forgotten(tmp_path, [], [os.getuid() + 1]) == []
    assert len(list(tmp_path.iterdir())) == 1


def test_what_has_another_name_stays(tmp_path: Path) -> None:
    (tmp_path / "theirs").touch()
    (tmp_path / f"sendense-{GONE}-0").hardlink_to(tmp_path / "theirs")
    assert remove_forgotten(tmp_path, [], [os.getuid()]) == []
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_locked_is_in_use_and_stays(tmp_path: Path) -> None:
    file = tmp_path / f"sendense-{GONE}-0"
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert remove_forgotten(tmp_path, [], [os.getuid()]) == []
    assert file.exists()
    assert len(remove_forgotten(tmp_path, [], [os.getuid()])) == 1


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_what_is_no_regular_file_stays_and_stops_nobody(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "overlays"
    directory.mkdir()
    victim = tmp_path / "victim"
    victim.touch()
    path = directory / f"sendense-{GONE}-0"
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    assert remove_forgotten(directory, [], [os.getuid()]) == []
    assert list(directory.iterdir()) == [path]
    assert victim.exists()


def test_one_that_cannot_be_removed_does_not_keep_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        (tmp_path / f"sendense-{GONE}-{number}").touch()
    removing = workplace._remove_if_forgotten

    def failing(place: int, name: str, owners: list[int]) -> bool:
        if name.endswith("-0"):
            raise OSError(errno.EROFS, "Read-only file system")
        return removing(place, name, owners)

    monkeypatch.setattr(workplace, "_remove_if_forgotten", failing)
    said = remove_forgotten(tmp_path, [], [os.getuid()])
    assert ["Read-only file system" in said[0], said[1].startswith("removed")] == [True, True]
