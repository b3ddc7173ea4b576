"""How a start ends that cannot be: whether the service manager should try again; and who may hold the lock."""

from __future__ import annotations

import fcntl
import os
import stat
import sys
from typing import TYPE_CHECKING

import pytest

from sendense_restored import config, errors
from sendense_restored.daemon import main
from sendense_restored.daemon.store import StoreError, StoreUnreachableError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Manager:
    """A service manager that listens."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StoreUnreachableError("MySQL database x: cannot be reached"), 1),
        (StoreError("the database holds tables that this service did not make"), main.EXIT_CONFIG),
        (config.ConfigError("unknown key"), main.EXIT_CONFIG),
        (errors.CatalogUnavailable("the catalogue does not answer"), 1),
        (OSError("no such thing"), 1),
        (main.AnotherRunsError("another one runs already"), 1),
    ],
)
def test_only_what_another_start_may_mend_is_tried_again(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def run(*_: object) -> int:
        raise error

    manager = Manager()
    monkeypatch.setattr("sendense_restored.daemon.notify.ServiceManager.take", lambda: manager)
    monkeypatch.setattr("sendense_restored.daemon.journal.set_up", lambda **_: None)
    monkeypatch.setattr(main, "prepare", lambda _: None)
    monkeypatch.setattr(main, "run", run)
    monkeypatch.setattr(sys, "argv", ["sendense-restored", "--config", str(tmp_path / "missing.toml")])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == status
    assert manager.notices == [f"not starting: {error}"]


# --- the lock -------------------------------------------------------------------------------------------------------


@pytest.fixture
def wide() -> Iterator[None]:
    """Whatever the mask is, the mode is what was asked for."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("wide")
def test_nobody_else_can_open_what_the_lock_is_on(tmp_path: Path) -> None:
    place = tmp_path / "run"
    lock = main.be_the_only_one(place)
    assert mode(place) == 0o700
    assert not os.get_inheritable(lock)
    os.close(lock)


@pytest.mark.parametrize("bits", [0o755, 0o711, 0o770])
def test_a_directory_that_others_can_open_is_closed_to_them(tmp_path: Path, bits: int) -> None:
    place = tmp_path / "run"
    place.mkdir()
    place.chmod(bits)
    os.close(main.be_the_only_one(place))
    assert mode(place) == 0o700


def test_it_is_closed_to_them_before_it_is_locked(tmp_path: Path) -> None:
    """Who holds the lock because the directory was open to all holds it no longer than that."""
    place = tmp_path / "run"
    place.mkdir(mode=0o755)
    held = os.open(place, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(main.AnotherRunsError):
        main.be_the_only_one(place)
    assert mode(place) == 0o700
    os.close(held)
    os.close(main.be_the_only_one(place))


def test_a_directory_with_things_of_others_is_left_as_it_is(tmp_path: Path) -> None:
    """``/run`` itself, say: closed to all others, nothing on the machine would work any more."""
    (tmp_path / "theirs").touch()
    tmp_path.chmod(0o755)
    with pytest.raises(config.ConfigError, match="directory of its own"):
        main.be_the_only_one(tmp_path)
    assert mode(tmp_path) == 0o755


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(config.ConfigError, match="belongs to another user"):
        main.be_the_only_one(tmp_path)


def test_a_second_one_is_told_apart_from_a_wrong_setup(tmp_path: Path) -> None:
    lock = main.be_the_only_one(tmp_path / "run")
    with pytest.raises(main.AnotherRunsError, match="another one runs already"):
        main.be_the_only_one(tmp_path / "run")
    os.close(lock)
    (tmp_path / "file").touch()
    with pytest.raises(config.ConfigError, match="cannot be used"):
        main.be_the_only_one(tmp_path / "file")
