"""The machine itself: what is real in it, and that it survives what tests do to it."""

from __future__ import annotations

import subprocess
from pathlib import Path


def test_it_is_a_running_system(debian: str) -> None:
    assert f'VERSION_ID="{debian}"' in Path("/etc/os-release").read_text()
    assert Path("/proc/1/comm").read_text() == "systemd\n"
    state = subprocess.run(["systemctl", "is-active", "dbus", "polkit"], capture_output=True, text=True, check=False)
    assert state.stdout.split() == ["active", "active"] or state.stdout.split()[0] == "active"
