"""polkit for real: who is asked, who is not, what a site may decide, and what happens when it does not work.

Nobody here has a session of logind's, as on a machine that is used through ssh without one: the defaults of
``allow_any`` count.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pytest

from tests.vm import polkit
from tests.vm.appliance import (
    ADMIN,
    BUS_NAME,
    GROUP,
    MANAGER,
    MEMBER,
    PASSWORD,
    STRANGER,
    TIMEOUT,
    Appliance,
    call,
    mount_object,
    mounts,
    output,
    run,
)
from tests.vm.polkit import QUESTION, TAKEN_BACK, Ear, rule
from tests.vm.terminal import terminal
from tools.lab.vm import backups
from tools.lab.vm.project import MOUNTED

if TYPE_CHECKING:
    from collections.abc import Iterator

CLI = "/usr/bin/sendense-restore"
BUSCTL: Final = ("/usr/bin/busctl", f"--timeout={TIMEOUT:.0f}", "call", BUS_NAME)
LIST: Final = (*BUSCTL, *MANAGER, "ListRepositories", "a{sv}", "0")
"""A call that polkit is asked about."""
CATALOG: Final = (MANAGER[0], f"{BUS_NAME}.Catalog")
HOSTNAME = "/partition-1/etc/hostname"
REFUSED = 3
"""The command line's exit status."""
ATTEMPTS = 5
"""How often a test is repeated in which the service's own few seconds were over before the test had done its part."""


@pytest.fixture(autouse=True)
def polkit_works() -> Iterator[None]:
    yield
    polkit.wake()
    assert not [file.name for file in polkit.RULES.glob("*test*")]


@pytest.fixture(scope="module")
def other_vm(appliance: Appliance) -> Iterator[str]:
    """The backup of a second machine, ``db01``."""
    directory = backups.REPOSITORY / "db01"
    directory.mkdir()
    shutil.copy(appliance.chain.backups[0].image, directory)
    ((repository,),) = call(MANAGER, "ListRepositories", "a{sv}", "0")
    (result,) = call(CATALOG, "Scan", "sa{sv}", repository["repository_id"]["data"], "0")
    (backup,) = result["added"]["data"]
    yield backup
    call(CATALOG, "RemoveBackup", "sa{sv}", backup, "0")
    shutil.rmtree(directory)


def mount(backup: str, user: str) -> str:
    (path,) = call(MANAGER, "Mount", "sa{sv}", backup, "0", user=user)
    return str(path).rpartition("/")[2].replace("_", "-")


def unmount(mount: str, user: str) -> None:
    call(mount_object(mount), "Unmount", "a{sv}", "0", user=user)


def read(mount: str, user: str) -> None:
    _, info = call(mount_object(mount), "OpenFile", "sa{sv}", HOSTNAME, "0", user=user)
    assert info["size"]["data"] == len("web01\n")


def refused(target: tuple[str, str], method: str, *arguments: str, user: str, because: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        call(target, method, *arguments, user=user)
    assert because in caught.value.stderr


def not_mounted(backup: str, user: str, because: str = "com.sendense.restore1.mount is not allowed to you") -> None:
    refused(MANAGER, "Mount", "sa{sv}", backup, "0", user=user, because=because)


def mount_call(backup: str) -> tuple[str, ...]:
    return (*BUSCTL, *MANAGER, "Mount", "sa{sv}", backup)


# --- who is asked ---------------------------------------------------------------------------------------------------


def test_members_are_not_asked(appliance: Appliance) -> None:
    mounted = appliance.mount(user=MEMBER)
    with terminal(MEMBER, CLI, "cat", mounted, HOSTNAME) as there:
        status, said = there.end()
    assert (status, said) == (0, "web01\r\n")
    call(MANAGER, "GetResources", "a{sv}", "0", user=MEMBER)
    unmount(mounted, MEMBER)


def test_others_are_refused_where_nobody_can_be_asked(appliance: Appliance) -> None:
    done = run(CLI, "mount", appliance.backups[-1], user=STRANGER, check=False)
    assert done.returncode == REFUSED
    assert done.stdout == ""
    assert done.stderr == (
        "sendense-restore: com.sendense.restore1.mount needs an authentication;"
        " allow it to be asked for, with an agent running\n"
    )
    for method in ("ListBackups", "ListVms", "GetResources", "ListEvents", "InUse"):
        refused(MANAGER, method, "a{sv}", "0", user=STRANGER, because="is not allowed to you")


def test_others_are_refused_at_a_terminal_without_an_agent(appliance: Appliance) -> None:
    with terminal(STRANGER, CLI, "mount", appliance.backups[-1], agent=False) as there:
        status, said = there.end()
    assert status == REFUSED, said
    assert f"com.sendense.restore1.mount is not allowed to you; an administrator can allow it (group {GROUP}" in said


def test_an_administrators_password_lets_somebody_in(appliance: Appliance) -> None:
    with terminal(STRANGER, CLI, "mount", appliance.backups[-1]) as there:
        asked = there.asked()
        assert "AUTHENTICATING FOR com.sendense.restore1.mount" in asked
        assert "Authentication is required to open a backup and read the files in it" in asked
        assert f"Authenticating as: {ADMIN}" in asked
        there.type(PASSWORD)
        status, said = there.end()
    assert status == 0, said
    assert PASSWORD not in said
    # What was opened is his: reading and closing it need no further password.
    (mounted,) = mounts()
    read(mounted, STRANGER)
    unmount(mounted, STRANGER)
    # And it was allowed once.
    not_mounted(appliance.backups[-1], STRANGER)


@pytest.mark.long
def test_a_wrong_password_does_not(appliance: Appliance) -> None:
    with terminal(STRANGER, *mount_call(appliance.backups[-1]), "0") as there:
        there.asked()
        there.type("not the password")
        status, said = there.end()
    assert status != 0
    assert "AUTHENTICATION FAILED" in said
    assert "com.sendense.restore1.mount is not allowed to you" in said
    assert mounts() == []


@pytest.mark.long
def test_whoever_gives_up_is_not_asked_any_longer(appliance: Appliance) -> None:
    command = (*mount_call(appliance.backups[-1]), "0")
    with Ear(TAKEN_BACK) as ear, terminal(STRANGER, *command) as there:
        there.asked()
        there.interrupt()
        ear.wait_for("Member=CancelCheckAuthorization")
    assert mounts() == []


def test_a_question_to_a_human_holds_nobody_up(appliance: Appliance) -> None:
    with terminal(STRANGER, *mount_call(appliance.backups[-1]), "0") as there:
        there.asked()
        read(appliance.mount(user=MEMBER), MEMBER)
        assert not there.ended
        there.type(PASSWORD)
        status, said = there.end()
        assert status == 0, said


def test_who_does_not_want_to_be_asked_is_not(appliance: Appliance) -> None:
    command = (*mount_call(appliance.backups[-1]), "1", "auth.no_user_interaction", "b")
    with terminal(STRANGER, *command, "true") as there:
        status, said = there.end()
    assert status != 0
    assert "com.sendense.restore1.mount needs an authentication" in said
    assert "AUTHENTICATING" not in said
    with terminal(STRANGER, *command, "false") as there:
        assert "AUTHENTICATING" in there.asked()


# --- what the group does not get ------------------------------------------------------------------------------------


def test_members_have_no_say_about_others(appliance: Appliance) -> None:
    others = appliance.mount(user="root")
    own = appliance.mount(0, user=MEMBER)
    assert call(MANAGER, "ListMounts", "a{sv}", "0", user=MEMBER) == [[mount_object(own)[0]]]
    for action, target, method, *arguments in (
        ("read-others", mount_object(others), "ListFiles", "sa{sv}", "/", "0"),
        ("read-others", mount_object(others), "OpenFile", "sa{sv}", HOSTNAME, "0"),
        ("unmount-others", mount_object(others), "Unmount", "a{sv}", "0"),
        ("force-unmount", mount_object(own), "Unmount", "a{sv}", "1", "force", "b", "true"),
        ("manage", MANAGER, "ListEvents", "a{sv}", "0"),
        ("manage", MANAGER, "CleanupNow", "a{sv}", "0"),
        ("manage", CATALOG, "AddRepository", "ssa{sv}", "mine", "/home", "0"),
    ):
        refused(
            target, method, *arguments, user=MEMBER, because=f"com.sendense.restore1.{action} is not allowed to you"
        )
    assert set(mounts()) == {own, others}


@pytest.mark.long
def test_an_administrators_password_opens_what_others_have_opened(appliance: Appliance) -> None:
    others = appliance.mount(user="root")
    command = (*BUSCTL, *mount_object(others), "GetFileInfo", "sa{sv}", HOSTNAME, "0")
    with terminal(MEMBER, *command) as there:
        assert "AUTHENTICATING FOR com.sendense.restore1.read-others" in there.asked()
        there.type(PASSWORD)
        status, said = there.end()
    assert status == 0, said
    assert '"kind" s "file"' in said


# --- what a site decides --------------------------------------------------------------------------------------------


def test_a_site_gives_one_machine_to_somebody(appliance: Appliance, other_vm: str) -> None:
    allow = f"""polkit.addRule(function (action, subject) {{
        if (action.id === "com.sendense.restore1.mount" && subject.user === "{STRANGER}" &&
            action.lookup("vm_name") === "db01") {{
            return polkit.Result.YES;
        }}
        return undefined;
    }});"""
    with rule(allow):
        mounted = mount(other_vm, STRANGER)
        read(mounted, STRANGER)
        not_mounted(appliance.backups[-1], STRANGER)
        unmount(mounted, STRANGER)
    not_mounted(other_vm, STRANGER)


@pytest.mark.long
def test_a_site_takes_one_machine_from_the_group(appliance: Appliance, other_vm: str) -> None:
    before = mount(other_vm, MEMBER)
    deny = f"""polkit.addRule(function (action, subject) {{
        if (action.id.indexOf("com.sendense.restore1.") === 0 && action.lookup("vm_name") === "db01" &&
            subject.isInGroup("{GROUP}")) {{
            return polkit.Result.NO;
        }}
        return undefined;
    }});"""
    with rule(deny):
        not_mounted(other_vm, MEMBER)
        # Reading stops at once, also where it had been opened before.
        arguments = ("OpenFile", "sa{sv}", HOSTNAME, "0")
        refused(mount_object(before), *arguments, user=MEMBER, because="com.sendense.restore1.read is not allowed")
        read(appliance.mount(user=MEMBER), MEMBER)
    read(before, MEMBER)


# --- a yes is reused ------------------------------------------------------------------------------------------------

# Asks over one connection, once per line of its input, and tells when it has begun and ended.
_ASKER = """
import asyncio, sys, time
from sendense_restored import errors
from sendense_restored.client import Client

async def main():
    async with await Client.connect() as client:
        for _ in sys.stdin:
            begun = time.monotonic()
            try:
                await client.list_repositories()
                answer = "yes"
            except errors.NotAuthorized:
                answer = "no"
            print(answer, begun, time.monotonic(), flush=True)

asyncio.run(main())
"""
_REUSED = 5.0
"""Seconds for which the service may reuse a yes."""
NOBODY = 'polkit.addRule(function (action) { return action.id.indexOf("com.sendense.") === 0 ? "no" : undefined; });'


class Asker:
    """One connection of a member's, which asks the same again."""

    def __init__(self, program: subprocess.Popen[str]) -> None:
        self._program = program
        self._allowed = self._begun = self._ended = 0.0

    def ask(self) -> str:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write("\n")
        self._program.stdin.flush()
        answer, begun, ended = self._program.stdout.readline().split()
        self._begun, self._ended = float(begun), float(ended)
        return answer

    def ask_first(self) -> str:
        answer = self.ask()
        self._allowed = self._begun
        return answer

    @property
    def in_time(self) -> bool:
        """Whether the last answer came when the first could still be reused."""
        return self._ended - self._allowed < _REUSED


@contextmanager
def asker() -> Iterator[Asker]:
    command = ["/usr/sbin/runuser", "-u", MEMBER, "--", "/usr/bin/python3", "-c", _ASKER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        yield Asker(program)
        assert program.stdin is not None
        program.stdin.close()


@pytest.mark.long
def test_a_yes_is_reused_for_a_moment(appliance: Appliance) -> None:  # noqa: ARG001
    polkit.wake()
    process = polkit.pid()
    with asker() as member:
        for _ in range(ATTEMPTS):
            assert member.ask_first() == "yes"
            with polkit.stopped(process):
                answer = member.ask()
            if member.in_time:
                assert answer == "yes"
                return
    pytest.fail("the machine is too slow for this")


@pytest.mark.long
@pytest.mark.parametrize("before", ["running", "restarted"])
def test_a_yes_is_dropped_when_polkit_says_that_something_has_changed(
    appliance: Appliance,  # noqa: ARG001
    before: str,
) -> None:
    with asker() as member:
        assert member.ask() == "yes"  # it listens to polkit from here on
        if before == "restarted":
            output("/usr/bin/systemctl", "restart", polkit.UNIT)
        for _ in range(ATTEMPTS):
            with polkit.prepared(NOBODY) as appears:
                assert member.ask_first() == "yes"
                appears()
                answer = member.ask()
            assert answer == "no"
            if member.in_time:
                return
    pytest.fail("the machine is too slow for this")


# --- polkit does not work -------------------------------------------------------------------------------------------


@pytest.mark.long
def test_without_polkit_only_root_gets_in(appliance: Appliance) -> None:
    mounted = appliance.mount(user=MEMBER)
    with polkit.masked():
        done = run(CLI, "mount", appliance.backups[-1], user=MEMBER, check=False)
        assert done.returncode == REFUSED
        assert done.stderr == (
            "sendense-restore: whether this is allowed cannot be found out because polkit does not work;"
            " until it does, only root may\n"
        )
        not_mounted(appliance.backups[-1], STRANGER, because="polkit does not work")
        refused(mount_object(mounted), "KeepAlive", "a{sv}", "0", user=MEMBER, because="polkit does not work")
        read(mounted, "root")
        unmount(appliance.mount(0, user="root"), "root")
    read(mounted, MEMBER)


def test_while_polkit_hangs_others_are_refused_and_root_is_answered_meanwhile(
    appliance: Appliance,  # noqa: ARG001
) -> None:
    polkit.wake()
    process = polkit.pid()
    for _ in range(ATTEMPTS):
        with Ear(QUESTION) as ear, polkit.stopped(process):
            with waiting(*LIST, user=MEMBER) as asking:
                ear.wait_for("com.sendense.restore1.list-backups")
                output(*LIST, user="root")
                first = asking.poll() is None
                _, said = asking.communicate(timeout=TIMEOUT)
            assert asking.returncode != 0
            assert "polkit does not work" in said
        # It goes on, with an answer to a question that nobody waits for any more.
        output(*LIST, user=MEMBER)
        if first:
            return
    pytest.fail("root was never answered before the one that waits for polkit")


@pytest.mark.long
def test_a_slow_polkit_is_waited_for(appliance: Appliance) -> None:  # noqa: ARG001
    polkit.wake()
    process = polkit.pid()
    for _ in range(ATTEMPTS):
        with Ear(QUESTION) as ear, polkit.stopped(process):
            with waiting(*LIST, user=MEMBER) as asking:
                ear.wait_for("com.sendense.restore1.list-backups")
                assert asking.poll() is None
                os.kill(process, signal.SIGCONT)
                _, said = asking.communicate(timeout=TIMEOUT)
            if asking.returncode == 0:
                return
            assert "polkit does not work" in said
    pytest.fail("it was never waited for")


@contextmanager
def waiting(*command: str, user: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        ["/usr/sbin/runuser", "-u", user, "--", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            yield program
        finally:
            program.kill()


@pytest.mark.long
@pytest.mark.parametrize("how", ["restart", "kill"])
def test_polkit_that_comes_back_is_used(appliance: Appliance, how: str) -> None:
    mounted = appliance.mount(user=MEMBER)
    if how == "restart":
        output("/usr/bin/systemctl", "restart", polkit.UNIT)
    else:  # the bus starts it again for the next question
        output("/usr/bin/systemctl", "kill", "--signal=KILL", polkit.UNIT)
    read(mounted, MEMBER)
    not_mounted(appliance.backups[-1], STRANGER)


# --- a client of its own --------------------------------------------------------------------------------------------

EXAMPLE = str(MOUNTED / "examples/copy_file.py")


def example(appliance: Appliance, target: str) -> tuple[str, ...]:
    return ("/usr/bin/python3", EXAMPLE, appliance.backups[-1], HOSTNAME, target)


def test_the_example_works_without_a_password_for_members(appliance: Appliance) -> None:
    target = f"/home/{MEMBER}/restored"
    assert output(*example(appliance, target), user=MEMBER) == f"{target}: 6 bytes\n"
    assert output("/bin/cat", target) == "web01\n"
    assert mounts() == []
    run("/bin/rm", target)


@pytest.mark.long
def test_the_example_works_with_a_password_for_others(appliance: Appliance) -> None:
    target = f"/home/{STRANGER}/restored"
    with terminal(STRANGER, *example(appliance, target)) as there:
        assert "AUTHENTICATING FOR com.sendense.restore1.mount" in there.asked()
        there.type(PASSWORD)
        status, said = there.end()
    assert status == 0, said
    assert output("/bin/cat", target) == "web01\n"
    assert mounts() == []
    run("/bin/rm", target)


@pytest.mark.long
def test_the_example_says_what_was_refused(appliance: Appliance) -> None:
    done = run(*example(appliance, f"/home/{STRANGER}/restored"), user=STRANGER, check=False)
    assert done.returncode == 1
    assert re.fullmatch(
        r"com\.sendense\.restore1\.mount is not allowed .*\(com\.sendense\.Restore1\.Error\.NotAuthorized\)\n",
        done.stderr,
    ), done.stderr
