"""How the program ends that could not start: whether the service manager should try again."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from sendense_restored import config, errors
from sendense_restored.daemon import main
from sendense_restored.daemon.store import StoreError, StoreUnreachableError

if TYPE_CHECKING:
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
