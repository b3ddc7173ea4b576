"""Which unit a caller runs in, as the daemon learns it from the bus and the kernel."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from sendense_restored.daemon import bus as bus_module
from sendense_restored.daemon.bus import Bus, Call, Reply, Variant, unit_of
from tests.bus.peer import Peer, error_of

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Handler


async def test_the_unit_is_the_one_of_the_callers_process(
    bus: Bus, handler: Handler, peer: Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / str(os.getpid())).mkdir()
    (tmp_path / str(os.getpid()) / "cgroup").write_bytes(b"0::/system.slice/hub.service\n")
    monkeypatch.setattr(bus_module, "unit_of", lambda pid: unit_of(pid, tmp_path))

    async def who(call: Call) -> Reply:
        return Reply("us", [call.uid, call.unit])

    handler.on["Who"] = who
    assert (await peer.call(bus.unique_name, "Who")).body == [os.geteuid(), "hub.service"]


@pytest.mark.parametrize(
    ("groups", "unit"),
    [
        (b"0::/system.slice/hub.service\n", "hub.service"),
        (b"0::/system.slice/hub.service/worker\n", "hub.service"),
        (b"0::/user.slice/user-1000.slice/session-3.scope\n", "session-3.scope"),
        (
            b"0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-gnome-x.scope\n",
            "app-gnome-x.scope",
        ),
        (b"4:memory:/a.service\n1:name=systemd:/b.service\n0::/c.service\n", "c.service"),
        (b"0::/system.slice/hub.service (deleted)\n", "hub.service"),
        (b"0::/x\xff\x1b.service\n", "x\\xff\x1b.service"),
        (b"0::/\n", ""),
        (b"0::/system.slice\n", ""),
        (b"1:name=systemd:/b.service\n", ""),
        (b"", ""),
        (b"x" * 100_000 + b"\n0::/c.service\n", ""),
        (None, ""),
    ],
)
def test_a_unit_is_read_from_the_groups_of_a_process(tmp_path: Path, groups: bytes | None, unit: str) -> None:
    (tmp_path / "7").mkdir()
    if groups is not None:
        (tmp_path / "7/cgroup").write_bytes(groups)
    assert unit_of(7, tmp_path) == unit


def test_a_process_that_is_gone_is_in_no_unit() -> None:
    assert unit_of(0) == unit_of(2**31) == ""


@pytest.mark.parametrize("known", [{}, {"ProcessID": Variant("u", 1)}])
async def test_a_caller_whose_user_is_unknown_gets_nothing(
    bus: Bus, handler: Handler, peer: Peer, monkeypatch: pytest.MonkeyPatch, known: dict[str, Variant]
) -> None:
    async def ask(*_: object) -> list[object]:
        return [known]

    called = []

    async def method(call: Call) -> Reply:
        called.append(call)
        return Reply()

    handler.on["Ping"] = method
    monkeypatch.setattr(bus._caller, "ask", ask)
    assert error_of(await peer.call(bus.unique_name, "Ping"))[0] == "Unavailable"
    assert called == []
