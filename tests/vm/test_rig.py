"""The machine itself: what is real in it."""

from __future__ import annotations

import subprocess
from pathlib import Path


def test_it_is_a_running_system(debian: str) -> None:
    assert f'VERSION_ID="{debian}"' in Path("/etc/os-release").read_text()
    assert Path("/proc/1/comm").read_text() == "systemd\n"
    # The bus starts polkit for the first question only.
    subprocess.run(["/usr/bin/systemctl", "start", "polkit"], check=True)
    state = subprocess.run(
        ["/usr/bin/systemctl", "is-active", "dbus", "polkit"], capture_output=True, text=True, check=False
    )
    assert state.stdout.split() == ["active", "active"]
