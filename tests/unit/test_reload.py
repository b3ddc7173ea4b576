"""The configuration read again: what is taken over, what waits, what is refused, and what the manager hears."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, cast

import pytest

from sendense_restored import config
from sendense_restored.daemon.reload import Reload

if TYPE_CHECKING:
    from pathlib import Path

    from sendense_restored.daemon.notify import ServiceManager


class Manager:
    """See ``notify.ServiceManager``."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.noticed = ""

    def reloading(self) -> None:
        self.heard.append("reloading")

    def ready(self) -> None:
        self.heard.append("ready")

    def notice(self, text: str) -> None:
        self.noticed = text


class House:
    def __init__(self, directory: Path) -> None:
        self.file = directory / "restored.toml"
        self.manager = Manager()
        self.applied: list[config.Config] = []
        self.reload = Reload(self.file, config.Config(), cast("ServiceManager", self.manager), self.applied.append)

    async def again(self, text: str) -> None:
        self.file.write_text(text, encoding="utf-8")
        self.reload.request()
        task = self.reload._running
        assert task is not None
        await task


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


async def test_a_key_that_may_change_is_handed_on(house: House) -> None:
    await house.again("[mounts]\nmax = 3\n[events]\nkeep = 200")
    (new,) = house.applied
    assert (new.mounts.max, new.events.keep) == (3, 200)
    assert house.reload.current is new
    assert house.manager.heard == ["reloading", "ready"]
    await house.again("")
    assert house.applied[-1] == config.Config()


async def test_nothing_new_is_nothing_to_do(house: House) -> None:
    await house.again("[mounts]\nmax = 8")
    assert house.applied == []
    assert house.manager.heard == ["reloading", "ready"]


async def test_a_key_that_must_wait_is_named_each_time_and_stays(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    text = '[mounts]\nmax = 3\n[paths]\nruntime = "/run/x"'
    for _ in range(2):
        caplog.clear()
        await house.again(text)
        assert "takes effect at the next start: paths.runtime" in caplog.text
        assert house.manager.noticed == "restart to apply paths.runtime"
    assert len(house.applied) == 1
    assert house.reload.current.paths == config.Paths()
    await house.again("[mounts]\nmax = 3")
    assert house.manager.noticed == ""


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[mounts]\nmax = 0", "mounts.max must be"),
        ("[mounts]\nmax = 2\nmany = 1", "unknown key mounts.many"),
        ("[mounts", "restored.toml"),
        ('[mounts]\nmax = 100\n[readers]\nuids = "61000-61200"', "has 64 uids"),
    ],
)
async def test_a_mistake_changes_nothing_and_is_told(
    house: House, text: str, complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    await house.again(text)
    assert house.applied == []
    assert house.reload.current == config.Config()
    assert complaint in house.manager.noticed
    assert "the configuration before stays" in caplog.text
    assert house.manager.heard == ["reloading", "ready"]
    await house.again("[mounts]\nmax = 2")
    assert house.manager.noticed == ""
    assert house.applied[-1].mounts.max == 2


async def test_requests_that_come_meanwhile_are_one_more_reload(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun, go_on, threads = config.load, threading.Event(), threading.Event(), set()

    def load(path: Path) -> config.Config:
        threads.add(threading.get_ident())
        found = real(path)
        begun.set()
        assert go_on.wait(30)
        return found

    monkeypatch.setattr(config, "load", load)
    house.file.write_text("[mounts]\nmax = 3")
    house.reload.request()
    task = house.reload._running
    assert task is not None
    await asyncio.to_thread(begun.wait, 30)
    house.file.write_text("[mounts]\nmax = 4")  # read by the first one already
    for _ in range(3):
        house.reload.request()
    go_on.set()
    await task
    assert [each.mounts.max for each in house.applied] == [3, 4]
    assert house.manager.heard == ["reloading", "ready"] * 2
    assert threading.get_ident() not in threads


async def test_closing_waits_for_the_one_that_runs_and_begins_no_other(house: House) -> None:
    house.file.write_text("[mounts]\nmax = 3")
    house.reload.request()
    await asyncio.sleep(0)
    house.reload.request()
    await house.reload.close()
    assert house.manager.heard == ["reloading", "ready"]
    house.reload.request()
    await house.reload.close()
    assert house.manager.heard == ["reloading", "ready"]
    assert len(house.applied) == 1
