"""The packages on a real machine: what installing, upgrading and purging do, and what systemd makes of the unit."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored.client import Client
from tests.vm.appliance import (
    BUS_NAME,
    MEMBER,
    SERVICE,
    STRANGER,
    journal_since,
    main_pid,
    output,
    restore,
    run,
    tool,
    unit,
)
from tests.vm.watching import LOCKS, Watch, logs, processes
from tools.lab import leftovers
from tools.lab.vm import backups
from tools.lab.vm.inside import INSTALLED
from tools.lab.vm.project import MOUNTED

if TYPE_CHECKING:
    from tests.vm.appliance import Appliance

PACKAGES = sorted(map(str, (MOUNTED / "packages").glob("*.deb")))
SYSTEMCTL = "/usr/bin/systemctl"
RUNTIME = Path("/run/sendense-restore")
STATE = Path("/var/lib/sendense-restore")
MOST_EXPOSURE = 3.8


def apt(*arguments: str) -> str:
    """What it and the packages say."""
    done = run("/usr/bin/env", "DEBIAN_FRONTEND=noninteractive", "/usr/bin/apt-get", "-q", "-y", *arguments)
    return done.stdout + done.stderr


def test_installing_has_started_it() -> None:
    """And not a caller: what systemd said before there was one."""
    assert {"ActiveState=active", "SubState=running"} <= set(INSTALLED.read_text(encoding="utf-8").split())
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


def test_the_unit_explains_what_it_leaves_open() -> None:
    """Each line that systemd marks, in the words of this release.

    What the unit sets stands below a comment that says why (a unit test); all else has to be named at its end.
    """
    table = output("/usr/bin/systemd-analyze", "security", "--no-pager", "--json=short", SERVICE)
    text = output("/usr/bin/systemctl", "cat", SERVICE)
    marked = {line["name"] for line in json.loads(table) if line["set"] is False and line["exposure"]}
    assert {"CapabilityBoundingSet=~CAP_SYS_ADMIN", "PrivateNetwork="} <= marked
    assert {name for name in marked if not any(re.search(what, text) for what in meant(name))} == set()


def meant(line: str) -> list[str]:
    """Patterns for what a line is about: ``User=/DynamicUser=``, or ``...=~CAP_(DAC_*|FOWNER)``.

    One of several is enough: which of them the unit leaves open the line does not tell.
    """
    directives, _, value = line.partition("=~")
    if not value:
        return [re.escape(f"{each.rstrip('=')}=") for each in directives.split("/")]
    prefix, _, choices = value.rstrip(")").partition("(")
    return [rf"(?<!\w){prefix}{choice}".replace("*", "") for choice in choices.split("|")]


async def test_what_serves_a_mount_is_in_the_bounded_slice_and_nobody_else_sees_the_mount(
    appliance: Appliance,
) -> None:
    group = Path("/sys/fs/cgroup" + unit(SERVICE, "ControlGroup"))
    limits = group.parent
    assert limits.name == "sendense-restore.slice"
    for name in ("memory.max", "memory.high", "pids.max"):
        assert (limits / name).read_text(encoding="ascii").strip().isdigit(), f"{name} of the slice has no bound"
    others, own = leftovers.mounts_of(1), leftovers.mounts_of(main_pid())
    async with await Client.connect() as client:
        mount = await client.mount(appliance.backups[0])
        running = processes()
        for part in ("qemu-nbd", "nbd-client", "sendense_restored.reader"):
            assert any(part in command for command in running.values()), part
        assert leftovers.added(own, leftovers.mounts_of(main_pid())), "it has mounted nothing"
        assert leftovers.added(others, leftovers.mounts_of(1)) == []
        await client.unmount(mount)


def test_what_people_read_and_press_tab_for_is_installed() -> None:
    installed = {
        package: output("/usr/bin/dpkg", "--listfiles", package).splitlines()
        for package in ("sendense-restore", "sendense-restored")
    }
    pages = ("man8/sendense-restored.8.gz", "man5/restored.toml.5.gz")
    assert {f"/usr/share/man/{page}" for page in pages} <= set(installed["sendense-restored"])
    completions = (
        "bash-completion/completions/sendense-restore",
        "zsh/vendor-completions/_sendense-restore",
        "fish/vendor_completions.d/sendense-restore.fish",
    )
    theirs = {"/usr/share/man/man1/sendense-restore.1.gz", *(f"/usr/share/{path}" for path in completions)}
    assert theirs <= set(installed["sendense-restore"])
    assert "/etc/sendense/restored.toml" in installed["sendense-restored"]


def test_no_helper_opens_a_file_by_its_handle() -> None:
    """Not even with CAP_DAC_READ_SEARCH: what systemd made of the filter, call by call."""
    allowed = unit(SERVICE, "SystemCallFilter").split()
    assert {"openat", "mount", "seccomp"} <= set(allowed)
    assert "open_by_handle_at" not in allowed


def test_the_drivers_are_loaded_as_the_package_says() -> None:
    parameters = Path("/sys/module/nbd/parameters")
    assert (parameters / "nbds_max").read_text(encoding="ascii").strip() == "16"
    assert (parameters / "max_part").read_text(encoding="ascii").strip() == "31"


@pytest.mark.long
def test_the_drivers_are_loaded_before_anybody_needs_them() -> None:
    """What systemd-modules-load.service runs, without the service, whose unit asks for them as well."""
    module = Path("/sys/module/nbd")
    run(SYSTEMCTL, "stop", SERVICE)
    try:
        tool("modprobe", "--remove", "nbd")
        assert not module.exists()
        run("/usr/lib/systemd/systemd-modules-load")
        assert module.exists()
    finally:
        run(SYSTEMCTL, "start", SERVICE)


@pytest.mark.long
@pytest.mark.usefixtures("appliance")
def test_nobody_starts_what_is_disabled() -> None:
    run(SYSTEMCTL, "disable", "--now", SERVICE)
    try:
        refused = run("/usr/bin/sendense-restore", "mounts", user=MEMBER, check=False)
        assert "cannot be reached" in refused.stderr
        assert unit(SERVICE, "ActiveState") == "inactive"
    finally:
        run(SYSTEMCTL, "enable", "--now", SERVICE)


@pytest.mark.usefixtures("appliance")
def test_no_stranger_locks_the_service_out() -> None:
    """Whoever could open the directory that the daemon locks could hold that lock."""

    def assert_closed() -> None:
        refused = run("/usr/bin/flock", "--nonblock", RUNTIME, "/bin/true", user=STRANGER, check=False)
        assert "Permission denied" in refused.stderr, refused

    assert_closed()
    run(SYSTEMCTL, "stop", SERVICE)
    try:
        assert_closed()  # nor made, if systemd has taken it away already
    finally:
        run(SYSTEMCTL, "start", SERVICE)
    assert_closed()


@pytest.mark.long
async def test_to_stop_is_to_unmount(appliance: Appliance) -> None:
    async with await Client.connect() as client, Watch.open() as watch:
        mount, begun, owner = await client.mount(appliance.backups[-1]), time.time(), watch.owner
        run(SYSTEMCTL, "restart", SERVICE)
        await watch.another(than=owner)
        await watch.states(client, [mount], "mounted")
        await client.unmount(mount)
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
        with logs("changed mounts.max"):
            run(SYSTEMCTL, "reload", SERVICE)
        assert restore("status", user="root")["max_mounts"] == 3
    finally:
        file.write_text(before, encoding="utf-8")
        with logs("changed mounts.max"):
            run(SYSTEMCTL, "reload", SERVICE)
    assert main_pid() == pid


@pytest.mark.long
def test_purging_leaves_the_users_and_what_is_others(appliance: Appliance) -> None:
    """At first all of its own goes; then there is something of others' in the state directory, and as locks."""
    try:
        apt("purge", "sendense-restored", "sendense-restore")
        assert [path for path in named_after_it() if not path.is_relative_to(LOCKS)] == []
    finally:
        install()
    theirs, elsewhere = STATE / "overlays/theirs", Path("/var/lib/theirs")
    for directory in (theirs.parent, elsewhere):
        directory.mkdir()
    run("/usr/bin/mount", "--bind", elsewhere, theirs.parent)  # of the same file system: rm alone would not see it
    try:
        theirs.touch()
        appliance.mount()
        run("/usr/bin/rm", "-r", LOCKS)
        run("/usr/bin/mkdir", "-p", LOCKS / "nbd0", user=STRANGER)
        said = apt("purge", "sendense-restored", "sendense-restore")
        # Locks stay until the machine starts anew, wherever /run/lock is mounted.
        assert [path for path in named_after_it() if not path.is_relative_to(LOCKS)] == [STATE]
        assert f"{STATE} stays" in said
        assert list(STATE.iterdir()) == [theirs.parent]
        assert theirs.exists()
        assert (LOCKS / "nbd0").owner() == STRANGER
        assert run("/usr/bin/getent", "passwd", "sendense-oma").returncode == 0
        assert output(SYSTEMCTL, "--failed", "--no-legend", "--plain") == ""
    finally:
        run("/usr/bin/umount", theirs.parent)
        theirs.parent.rmdir()
        shutil.rmtree(elsewhere)
        install()


def named_after_it() -> list[Path]:
    """All files of the machine that bear the name of the project."""
    return [
        Path(path)
        for directory in ("/etc", "/mnt", "/run", "/usr", "/var/lib")
        for path in output("/usr/bin/find", directory, "-xdev", "-iname", "*sendense*").splitlines()
        # The rig's own, and what LVM remembers of a volume group that an earlier test had.
        if not re.search(r"sendense[-.]tests|^/run/lvm/", path)
    ]


def install() -> None:
    """Install the packages anew, and have the catalogue know the backups."""
    apt("install", *PACKAGES)
    known = restore("catalog", "add-repository", "nightly", str(backups.REPOSITORY), user="root")
    restore("catalog", "scan", known["repository_id"], user="root")


async def test_locks_that_a_user_has_made_keep_nobody_from_a_device(appliance: Appliance) -> None:
    """Before the packages came, or after somebody has cleared /run/lock."""
    run("/usr/bin/rm", "-r", LOCKS)
    run("/usr/bin/mkdir", "-p", LOCKS / "nbd0", user=STRANGER)
    try:
        async with await Client.connect() as client:
            mount = await client.mount(appliance.backups[-1])
            assert (LOCKS / "nbd0").is_file()
            await client.unmount(mount)
        assert (LOCKS.owner(), LOCKS.stat().st_mode & 0o777) == ("root", 0o700)
        (aside,) = LOCKS.parent.glob(f"{LOCKS.name}.*")
        assert aside.owner() == STRANGER
    finally:
        for path in LOCKS.parent.glob(f"{LOCKS.name}.*"):
            run("/usr/bin/rm", "-r", path)
