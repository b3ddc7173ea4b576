"""Every command of the README, in its order and as it stands there, with the ids filled in.

A line whose comment says so is root's, the others are those of a member of the group.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.vm.appliance import MANAGER, MEMBER, Appliance, call, mounts, restore, run
from tests.vm.terminal import terminal
from tools.lab.vm.project import MOUNTED

if TYPE_CHECKING:
    from collections.abc import Iterator

README = MOUNTED / "README.md"
PROGRAMS = ("sendense-restore", "busctl")
HOME = f"/home/{MEMBER}"
REPOSITORY = Path("/srv/readme")


def commands(section: str = "") -> list[tuple[list[str], str]]:
    """Those of a section of the README, or of all of it; each with the user whom it is for."""
    text = README.read_text(encoding="utf-8")
    if section:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [
        (shlex.split(line, comments=True), "root" if re.search(r"# as root\b", line) else MEMBER)
        for line in text.splitlines()
        if line.startswith("    ") and line.split()[0] in PROGRAMS
    ]


def follow(section: str, ids: dict[str, str]) -> list[str]:
    """Run its commands, with what the ones answer given to the others; the second words of all of them."""
    for words, user in commands(section):
        command = [ids.get(word, word) for word in words]
        assert not {"REPOSITORY", "BACKUP", "MOUNT", "OBJECT"} & set(command), (
            f"no command has answered it: {command}"
        )
        said = run_it(command, user)
        if words[1:3] == ["catalog", "add-repository"]:
            ids["REPOSITORY"] = said.strip()
        elif words[1:3] == ["catalog", "scan"]:
            backups, _ = call(MANAGER, "ListBackups", "a{sv}", "1", "repository_id", "s", ids["REPOSITORY"])
            ids["BACKUP"] = backups[0]["backup_id"]["data"]
        elif words[1] == "mount":
            ids["MOUNT"] = said.strip()
        elif words[:2] == ["busctl", "tree"]:
            assert "/com/sendense/Restore1" in said
        elif "ListFiles" in words:
            assert '"hostname"' in said
        elif "Mount" in words:
            (ids["OBJECT"],) = re.findall(r'^o "(/com/sendense/Restore1/mounts/\w+)"$', said, re.MULTILINE)
    return [words[1] for words, _ in commands(section)]


@pytest.fixture
def repository(appliance: Appliance) -> Iterator[None]:
    """A directory of backups that the catalogue does not know yet."""
    (REPOSITORY / "web01").mkdir(parents=True)
    shutil.copy(appliance.chain.backups[0].image, REPOSITORY / "web01")
    yield
    for each in restore("catalog", "repositories", user="root"):
        if each["path"] == str(REPOSITORY):
            restore("catalog", "remove-repository", each["repository_id"], user="root")
    shutil.rmtree(REPOSITORY)


@pytest.mark.long
@pytest.mark.usefixtures("repository")
def test_the_command_line() -> None:
    # The names that the machine has something of already are other ones here.
    done = follow("Using it", {"nightly": "readme", "/srv/backups": str(REPOSITORY)})
    assert {"catalog", "mount", "ls", "get", "unmount", "shell"} <= set(done)
    hostname = Path(HOME, "hostname")
    assert hostname.read_text(encoding="utf-8") == "web01\n"
    hostname.unlink()
    assert mounts() == []


def test_busctl(appliance: Appliance) -> None:
    done = follow("By hand over D-Bus", {"BACKUP": appliance.backups[-1]})
    assert {"tree", "introspect", "get-property", "call", "monitor"} <= set(done)
    assert mounts() == []


def test_no_command_is_left_out() -> None:
    assert commands() == commands("Using it") + commands("By hand over D-Bus")


def run_it(command: list[str], user: str) -> str:
    """What it prints; those that only end when they are told to are told."""
    if command[:2] == ["sendense-restore", "shell"]:
        with terminal(user, *command, agent=False) as there:
            there.type("exit")
            status, said = there.end()
        assert status == 0, said
        return said
    if command[:2] == ["busctl", "monitor"]:
        assert user == "root"
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as program:
            assert program.stdout is not None
            assert program.stderr is not None
            assert "Monitoring" in program.stderr.readline()
            call(MANAGER, "ListMounts", "a{sv}", "0")
            first = program.stdout.readline()
            program.kill()
        assert first.strip(), "it shows nothing"
        return first
    return run("/usr/bin/env", f"--chdir={HOME}", *command, user=user).stdout
