"""The package, the unit and the rules say what the code does: compared without building or installing anything.

That they work is for tests/vm; here, what is written in two places is held together.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import pytest

from sendense_restored import config
from sendense_restored.daemon.host import attach, filesystem, keeper, nbd_pool, process, shell, volumes
from sendense_restored.daemon.interface import BUS_NAME
from sendense_restored.daemon.main import EXIT_CONFIG
from sendense_restored.database_url import SqliteUrl

CHECKOUT = Path(__file__).parents[2]
UNIT = CHECKOUT / "systemd/sendense-restored.service"
RULES = CHECKOUT / "udev/59-sendense-restore.rules"
EXAMPLE = CHECKOUT / "config/restored.toml"
INSTALLS = {package: CHECKOUT / f"debian/{package}.install" for package in ("sendense-restored", "sendense-restore")}

MOST_EXPOSURE = 3.8
ESSENTIAL = {"coreutils", "dash", "util-linux"}
"""What every Debian has."""
FOR_TESTS_ONLY = {
    "python3": "${python3:Depends} brings it",
    "fuse3": "its mount helper is for users; root mounts by itself",
    "dosfstools": "makes the file systems of tests",
    "exfatprogs": "makes the file systems of tests",
    "squashfs-tools": "makes the file systems of tests",
}
"""What tools/setup installs, and the package does not ask for."""
NO_DEFAULT = {"attach.overlay_dir", "image.repositories", "database.catalog_url"}
"""Keys without a default, for which the example has an example."""


def read(path: str) -> str:
    return (CHECKOUT / path).read_text(encoding="utf-8")


def directives() -> list[tuple[str, str]]:
    """The unit's settings, in order; a name may come more than once."""
    return re.findall(r"^(\w+)=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)


def values(name: str) -> list[str]:
    """All words of all settings of one name."""
    return [word for key, value in directives() if key == name for word in value.split()]


def asked_for(paragraph: str, field: str) -> set[str]:
    """The packages in a field of debian/control, alternatives included, without versions and substitutions."""
    paragraphs = {text.splitlines()[0]: text for text in read("debian/control").strip().split("\n\n")}
    found = re.search(rf"^{field}:\n((?: .*\n)+)", paragraphs[paragraph] + "\n", re.MULTILINE)
    names = re.split(r"[|,]", found[1]) if found else []
    return {name.split()[0] for name in names if name.strip() and "$" not in name}


# --- the unit -------------------------------------------------------------------------------------------------------


def test_each_setting_of_the_unit_stands_below_a_comment() -> None:
    """Of its own or of a group, and never after an empty line without one."""
    explained, where = False, ""
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            explained, where = False, line
        elif line.startswith("#"):
            explained = True
        elif not line:
            explained = False
        elif where == "[Service]":
            assert explained, f"{line} has no reason"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.skipif(os.geteuid() != 0, reason="systemd-analyze makes a directory in /run")
def test_the_unit_is_understood_and_no_more_exposed_than_it_was() -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for .*: ([0-9.]+)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) <= MOST_EXPOSURE
    assert not re.search(r"Unknown|Failed to parse|ignoring", done.stderr), done.stderr


def test_the_unit_leaves_what_the_helpers_keep() -> None:
    """A jail cannot give what the service does not have: setpriv fails then."""
    given = {name.removeprefix("CAP_").lower() for name in values("CapabilityBoundingSet")}
    kept = set()
    for path in sorted((CHECKOUT / "sendense_restored/daemon/host").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "frozenset":
                elements = [element for argument in node.args for element in ast.walk(argument)]
                kept |= {str(item.value) for item in elements if isinstance(item, ast.Constant)} & CAPABILITIES
    assert {"sys_admin", "dac_read_search"} <= kept, "nothing was found in the sources"
    assert kept <= given


CAPABILITIES = {
    *("audit_control", "audit_read", "audit_write", "block_suspend", "bpf", "checkpoint_restore", "chown"),
    *("dac_override", "dac_read_search", "fowner", "fsetid", "ipc_lock", "ipc_owner", "kill", "lease"),
    *("linux_immutable", "mac_admin", "mac_override", "mknod", "net_admin", "net_bind_service", "net_broadcast"),
    *("net_raw", "perfmon", "setfcap", "setgid", "setpcap", "setuid", "sys_admin", "sys_boot", "sys_chroot"),
    *("sys_module", "sys_nice", "sys_pacct", "sys_ptrace", "sys_rawio", "sys_resource", "sys_time"),
    *("sys_tty_config", "syslog", "wake_alarm"),
}


def test_the_unit_lets_readers_and_shells_have_their_namespaces() -> None:
    confine = read("sendense_restored/reader/confine.py")
    named = {"NEWNS": "mnt", "NEWNET": "net", "NEWIPC": "ipc", "NEWUTS": "uts"}
    needed = {named[flag] for flag in re.findall(r"linux\.CLONE_(\w+)", confine)} | {"pid"}
    assert '"--pid"' in read("sendense_restored/daemon/host/process.py"), "a shell has no process ids of its own"
    assert set(values("RestrictNamespaces")) == needed


def test_the_unit_and_the_configuration_mean_the_same_places() -> None:
    defaults = config.Config()
    assert values("RuntimeDirectory") == [str(defaults.paths.runtime.relative_to("/run"))]
    # Only root opens what the daemon's lock is on; and a start that is tried again meets the same lock.
    assert (values("RuntimeDirectoryMode"), values("RuntimeDirectoryPreserve")) == (["0700"], ["restart"])
    database = defaults.database.url
    assert isinstance(database, SqliteUrl)
    assert values("StateDirectory") == [str(database.path.parent.relative_to("/var/lib"))]
    for directory in (defaults.mounts.directory, nbd_pool.LOCKS):
        assert re.search(rf"^d {directory} 0700 root root -$", read(TMPFILES), re.MULTILINE)
    assert str(nbd_pool.LOCKS.parent) in values("ReadWritePaths"), "what is in their place could not be moved aside"


TMPFILES = "systemd/tmpfiles.d/sendense-restore.conf"


def test_the_unit_is_not_started_again_after_what_a_start_cannot_mend() -> None:
    assert values("RestartPreventExitStatus") == [str(EXIT_CONFIG)]


def test_the_bus_starts_the_unit_by_its_alias() -> None:
    activation = dict(re.findall(r"^(\w+)=(.*)$", read(f"dbus/{BUS_NAME}.service"), re.MULTILINE))
    assert activation["Name"] == BUS_NAME == values("BusName")[0]
    assert activation["SystemdService"] == f"dbus-{BUS_NAME}.service" == values("Alias")[0]


def test_repositories_on_the_network_are_mounted_before_it_starts() -> None:
    assert "remote-fs.target" in values("After")


# --- udev, and the other files --------------------------------------------------------------------------------------


def test_the_rules_are_for_the_paths_and_devices_of_the_configuration() -> None:
    rules = RULES.read_text(encoding="utf-8")
    assert f'ATTR{{loop/backing_file}}=="{config.Config().paths.runtime}/*"' in rules
    devices = config.Config().attach.nbd_devices
    assert f'KERNEL=="nbd[{min(devices)}-{max(devices)}]|nbd[{min(devices)}-{max(devices)}]p*"' in rules
    assert f'ATTR{{loop/backing_file}}=="/dev/nbd[{min(devices)}-{max(devices)}]"' in rules


def test_the_rules_are_read_between_those_they_rest_on_and_those_they_stop() -> None:
    others = ("55-dm.rules", "60-block.rules", "60-persistent-storage.rules")
    assert sorted((*others, RULES.name))[1] == RULES.name


def test_who_is_given_rights_by_the_rule_of_polkit_is_made_by_the_package() -> None:
    users = read("systemd/sysusers.d/sendense-restore.conf")
    assert 'isInGroup("sendense-restore")' in read("polkit/com.sendense.restore1.rules")
    assert re.search(r"^g sendense-restore ", users, re.MULTILINE)
    for user in ("sendense-oma", "sendense-restore-gw"):
        assert re.search(rf"^u {user} - .* /usr/sbin/nologin$", users, re.MULTILINE)
        assert f"m {user} sendense-restore\n" in users


STATE = "/var/lib/sendense-restore"


def purge(root: Path, *, rm: str = "") -> subprocess.CompletedProcess[str]:
    """Run what the package does then, with all its directories below ``root``, and perhaps another ``rm``."""
    text = re.sub(r"(?<![\w./])/(?=(?:var|run|mnt)/)", f"{root}/", read("debian/sendense-restored.postrm"))
    command = ["sh", "-c", f"{rm}\n{text}", "postrm", "purge"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_purge_takes_the_records_away_and_no_locks(tmp_path: Path) -> None:
    """Somebody may hold one; and where its directory is missing, anybody can make another."""
    state, lock = tmp_path / STATE[1:], tmp_path / "run/lock/sendense-restore/nbd0"
    for directory in (state / "overlays", lock, tmp_path / "mnt/sendense/restore"):
        directory.mkdir(parents=True)
    done = purge(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not state.exists()
    assert not (tmp_path / "mnt/sendense").exists()
    assert lock.exists()


def test_a_purge_that_has_to_leave_something_says_so_and_does_not_fail(tmp_path: Path) -> None:
    """As after rm has met a file system that somebody mounted there."""
    state = tmp_path / STATE[1:]
    (state / "overlays").mkdir(parents=True)
    done = purge(tmp_path, rm="rm() { echo skipping >&2; return 1; }")
    assert (done.returncode, done.stdout) == (0, "")
    (said,) = done.stderr.splitlines()
    assert str(state) in said
    assert said.endswith(": overlays")


def test_purging_takes_away_what_the_service_had() -> None:
    postrm = read("debian/sendense-restored.postrm")
    defaults = config.Config()
    for path in (STATE, str(defaults.paths.runtime), str(defaults.mounts.directory)):
        assert path in postrm


# --- the example of a configuration ---------------------------------------------------------------------------------


def example(*, uncommented: bool) -> str:
    text = EXAMPLE.read_text(encoding="utf-8")
    return re.sub(r"^#(?=\w+ = )", "", text, flags=re.MULTILINE) if uncommented else text


def test_the_example_changes_nothing() -> None:
    assert config.parse(tomllib.loads(example(uncommented=False))) == config.Config()


def test_the_example_has_every_key_with_its_default() -> None:
    document = tomllib.loads(example(uncommented=True))
    known = {f"{section.name}.{key}" for section in fields(config.Config) for key in keys_of(section.name)}
    assert {f"{section}.{key}" for section in document for key in document[section]} == known
    parsed = config.parse(document)
    assert config.differences(config.Config(), parsed) == NO_DEFAULT


def keys_of(section: str) -> list[str]:
    return [key.name for key in fields(getattr(config.Config(), section))]


# --- the packages ---------------------------------------------------------------------------------------------------


def test_the_halves_of_the_python_package_do_not_overlap_and_leave_nothing_out() -> None:
    patterns = {
        package: re.findall(r"dist-packages/sendense_restored/(\S+)", path.read_text(encoding="utf-8"))
        for package, path in INSTALLS.items()
    }
    for entry in sorted((CHECKOUT / "sendense_restored").iterdir()):
        if entry.name != "__pycache__":
            homes = [
                package for package, wanted in patterns.items() if any(fnmatch(entry.name, one) for one in wanted)
            ]
            assert len(homes) == 1, f"{entry.name} goes to {homes or 'nowhere'}"
            privileged = entry.name in {"daemon", "reader"}
            assert homes == ["sendense-restored" if privileged else "sendense-restore"]


def test_everything_that_is_installed_exists_and_everything_that_exists_is_installed() -> None:
    lists = [*(CHECKOUT / "debian").glob("*.install"), *(CHECKOUT / "debian").glob("*.manpages")]
    named = {line.split()[0] for path in lists for line in path.read_text(encoding="utf-8").splitlines()}
    from_source = {name for name in named if not name.startswith("usr/")}
    from_source |= set(re.findall(r"install -D .*?(\S+/\S+) \\", read("debian/rules")))
    there = {
        str(path.relative_to(CHECKOUT))
        for directory in ("completions", "config", "dbus", "man", "polkit", "systemd", "udev")
        for path in (CHECKOUT / directory).rglob("*")
        if path.is_file()
    }
    assert from_source == there


def test_the_package_depends_on_what_the_daemon_refuses_to_start_without() -> None:
    depends = asked_for("Package: sendense-restored", "Depends")
    required = {**process._JAIL_TOOLS}
    for module in (attach, filesystem, keeper, shell, volumes):
        required |= module.REQUIRED_TOOLS
    # One of them is a sentence, as it differs between the releases.
    wanted = {name for text in required.values() for name in re.split(r" on Debian 12, | on 13", text) if name}
    assert wanted - ESSENTIAL <= depends


def test_the_package_asks_for_what_setup_installs() -> None:
    setup = read("tools/setup")
    found = re.search(r'\npackages="([^"]+)"', setup)
    assert found is not None
    listed = set(found[1].split())
    fields = ("Depends", "Recommends", "Suggests")
    asked = {name for package in INSTALLS for field in fields for name in asked_for(f"Package: {package}", field)}
    assert listed - FOR_TESTS_ONLY.keys() - ESSENTIAL <= asked
    assert not FOR_TESTS_ONLY.keys() & asked


def test_each_package_depends_on_the_libraries_that_its_half_imports() -> None:
    found: dict[str, set[str]] = {"sendense-restored": set(), "sendense-restore": set()}
    for file in (CHECKOUT / "sendense_restored").rglob("*.py"):
        half = file.relative_to(CHECKOUT / "sendense_restored").parts[0]
        package = "sendense-restored" if half in {"daemon", "reader"} else "sendense-restore"
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                found[package] |= {each.name.partition(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found[package].add(node.module.partition(".")[0])
    for package, modules in found.items():
        foreign = modules - sys.stdlib_module_names - {"sendense_restored"}
        wanted = {f"python3-{name.replace('_', '-')}" for name in foreign}
        # typer brings click; the client of MySQL is for those who have a server.
        depends = asked_for(f"Package: {package}", "Depends") | {"python3-click", "python3-pymysql"}
        assert wanted <= depends
        assert len(wanted) >= 3
    assert "python3-pymysql" in asked_for("Package: sendense-restored", "Recommends")


def test_setup_installs_what_building_asks_for() -> None:
    installed = re.search(r'"\$deb" = yes \]; then packages="([^"]+)"', read("tools/setup"))
    assert installed is not None
    building = asked_for("Source: sendense-restored", "Build-Depends")
    # A dh-sequence is a name that another package provides.
    wanted = {name for name in building if not name.startswith(("debhelper-compat", "dh-sequence"))}
    assert wanted <= set(installed[1].split())


def test_versions_agree() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    changelog = re.match(r"sendense-restored \(([^)]+)\)", read("debian/changelog"))
    assert changelog is not None
    assert changelog[1] == project["version"]
    assert read("debian/control").count(f"X-Python3-Version: {project['requires-python'].replace('>=', '>= ')}") == 1
