"""The packages on a real machine: what installing, upgrading and purging do, and what systemd makes of the unit."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.vm.appliance import BUS_NAME, MEMBER, SERVICE, Appliance, main_pid, output, restore, run, unit
from tools.lab.vm import backups

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.long  # until it has been seen green on both releases, in one run

PACKAGES = sorted(map(str, Path("/srv/project/packages").glob("*.deb")))
SYSTEMCTL = "/usr/bin/systemctl"
PATIENCE = 120.0
"""Seconds for the service to be there again."""
MOST_EXPOSURE = 3.8


def apt(*arguments: str) -> None:
    run("/usr/bin/env", "DEBIAN_FRONTEND=noninteractive", "/usr/bin/apt-get", "-q", "-y", *arguments)


def await_another(pid: int) -> None:
    """Wait until the service is ready, in another process than ``pid``."""
    until = time.monotonic() + PATIENCE
    while main_pid() in {0, pid} or unit(SERVICE, "ActiveState") != "active":
        assert time.monotonic() < until, "the service has not come back"
        time.sleep(0.5)


def await_mounted(mount: str) -> None:
    until = time.monotonic() + PATIENCE
    while [each["state"] for each in restore("mounts") if each["mount_id"] == mount] != ["mounted"]:
        assert time.monotonic() < until, "the mount was not made again"
        time.sleep(0.5)


def journal_since(begun: float) -> str:
    return output("/usr/bin/journalctl", "--unit", SERVICE, "--no-pager", f"--since=@{begun:.0f}")


@contextlib.contextmanager
def drop_in(text: str) -> Iterator[None]:
    """The unit with other settings, started anew; and as it was."""
    file = Path(f"/run/systemd/system/{SERVICE}.d/test.conf")
    file.parent.mkdir(parents=True)
    try:
        file.write_text(text, encoding="utf-8")
        run(SYSTEMCTL, "daemon-reload")
        run(SYSTEMCTL, "restart", SERVICE)
        yield
    finally:
        file.unlink()
        file.parent.rmdir()
        run(SYSTEMCTL, "daemon-reload")
        run(SYSTEMCTL, "restart", SERVICE)


def test_installing_has_started_it() -> None:
    assert unit(SERVICE, "ActiveState") == "active"
    assert unit(SERVICE, "UnitFileState") == "enabled"
    owner = output("/usr/bin/busctl", "--system", "status", BUS_NAME)
    assert f"PID={main_pid()}\n" in owner


def test_its_users_are_in_the_group_and_can_log_in_nowhere() -> None:
    members = output("/usr/bin/getent", "group", "sendense-restore").strip().rpartition(":")[2].split(",")
    for user in ("sendense-oma", "sendense-restore-gw"):
        assert user in members
        assert output("/usr/bin/getent", "passwd", user).strip().endswith(":/usr/sbin/nologin")


def test_the_unit_is_no_more_exposed_than_it_was() -> None:
    table = output("/usr/bin/systemd-analyze", "security", "--no-pager", SERVICE)
    found = re.search(r"Overall exposure level for .*: ([0-9.]+)", table)
    assert found is not None
    assert float(found[1]) <= MOST_EXPOSURE, table


def test_the_drivers_are_loaded_as_the_package_says() -> None:
    parameters = Path("/sys/module/nbd/parameters")
    assert (parameters / "nbds_max").read_text(encoding="ascii").strip() == "16"
    assert (parameters / "max_part").read_text(encoding="ascii").strip() == "31"


@pytest.mark.usefixtures("appliance")
def test_a_caller_has_the_bus_start_it() -> None:
    run(SYSTEMCTL, "stop", SERVICE)
    assert unit(SERVICE, "ActiveState") == "inactive"
    assert restore("mounts") == []
    assert unit(SERVICE, "ActiveState") == "active"


@pytest.mark.usefixtures("appliance")
def test_nobody_starts_what_is_disabled() -> None:
    run(SYSTEMCTL, "disable", "--now", SERVICE)
    try:
        refused = run("/usr/bin/sendense-restore", "mounts", user=MEMBER, check=False)
        assert "cannot be reached" in refused.stderr
        assert unit(SERVICE, "ActiveState") == "inactive"
    finally:
        run(SYSTEMCTL, "enable", "--now", SERVICE)


def test_to_stop_is_to_unmount(appliance: Appliance) -> None:
    mount, begun = appliance.mount(), time.time()
    run(SYSTEMCTL, "restart", SERVICE)
    await_mounted(mount)
    said = journal_since(begun)
    early = re.findall(r"(?:image server|device client|reader|ntfs-3g) .*ended.*", said)
    assert early == [], "a child was stopped before the daemon took its mount down"
    assert "SIGKILL" not in said


def test_a_reload_takes_the_configuration_over() -> None:
    file = Path("/etc/sendense/restored.toml")
    before = file.read_text(encoding="utf-8")
    pid = main_pid()
    try:
        file.write_text(before.replace("#max = 8 ", "max = 3 "), encoding="utf-8")
        run(SYSTEMCTL, "reload", SERVICE)
        until = time.monotonic() + PATIENCE
        while restore("status", user="root")["max_mounts"] != 3:
            assert time.monotonic() < until
            time.sleep(0.5)
    finally:
        file.write_text(before, encoding="utf-8")
        run(SYSTEMCTL, "reload", SERVICE)
    assert main_pid() == pid


def test_after_a_kill_the_mounts_are_there_again(appliance: Appliance) -> None:
    mount, pid, begun = appliance.mount(), main_pid(), time.time()
    os.kill(pid, signal.SIGKILL)
    await_another(pid)
    await_mounted(mount)
    assert "with signal SIGKILL" not in journal_since(begun), "children were killed before they had ended"


@pytest.mark.long
def test_a_daemon_that_hangs_is_started_anew(appliance: Appliance) -> None:
    with drop_in("[Service]\nWatchdogSec=20\n"):
        mount, pid, begun = appliance.mount(), main_pid(), time.time()
        os.kill(pid, signal.SIGSTOP)
        await_another(pid)
        await_mounted(mount)
        assert "Watchdog timeout" in journal_since(begun)


def test_an_upgrade_keeps_the_mounts(appliance: Appliance) -> None:
    mount, pid = appliance.mount(), main_pid()
    run("/usr/bin/dpkg", "--install", *PACKAGES)
    assert main_pid() not in {0, pid}
    await_mounted(mount)


def test_purging_leaves_nothing_but_the_users(appliance: Appliance) -> None:
    appliance.mount()
    apt("purge", "sendense-restored", "sendense-restore")
    try:
        left = [
            path
            for directory in ("/etc", "/mnt", "/run", "/usr", "/var/lib")
            for path in output("/usr/bin/find", directory, "-xdev", "-iname", "*sendense*").splitlines()
            if not path.startswith("/var/lib/sendense-tests") and "sendense-tests" not in Path(path).name
        ]
        assert left == []
        assert run("/usr/bin/getent", "passwd", "sendense-oma").returncode == 0
        assert output(SYSTEMCTL, "--failed", "--no-legend", "--plain") == ""
    finally:
        apt("install", *PACKAGES)
        known = restore("catalog", "add-repository", "nightly", str(backups.REPOSITORY), user="root")
        restore("catalog", "scan", known["repository_id"], user="root")
