"""Programs run in the jail that was asked for, and none outlives its purpose."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from sendense_restored.daemon.host.process import Jail, ToolError, ToolMissingError, Tools

NOBODY = Jail(65534)
PYTHON = "/usr/bin/python3"
"""The distribution's: a virtual environment may lie where only root can go."""
TOOLS = dict.fromkeys(("cat", "env", "false", "readlink", "sh", "sleep"), "coreutils")


@pytest.fixture
def tools() -> Tools:
    return Tools.find(TOOLS, ("no-such-program",))


async def status_in(tools: Tools, jail: Jail) -> dict[str, str]:
    """``/proc/self/status`` of a program in ``jail``."""
    done = await tools.run(jail, "cat", "/proc/self/status", seconds=20)
    return dict(line.split(":\t", 1) for line in done.stdout.decode().splitlines() if ":\t" in line)


def test_a_missing_program_is_named_with_its_package() -> None:
    with pytest.raises(ToolMissingError, match=r"no-such-program \(package nothing\)"):
        Tools.find({"no-such-program": "nothing"})


def test_an_optional_program_may_be_missing(tools: Tools) -> None:
    assert not tools.has("no-such-program")


async def test_a_program_has_its_uid_and_no_group_and_no_capability(tools: Tools) -> None:
    status = await status_in(tools, NOBODY)
    assert status["Uid"].split() == ["65534"] * 4
    assert status["Gid"].split() == ["65534"] * 4
    assert status["Groups"].split() == []
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"


@pytest.mark.parametrize("uid", [0, 65534])
async def test_a_program_has_just_the_capabilities_that_it_was_given(tools: Tools, uid: int) -> None:
    status = await status_in(tools, Jail(uid, frozenset({"dac_read_search", "sys_admin"})))
    wanted = 1 << 2 | 1 << 21  # capabilities(7)
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert int(status[name], 16) == wanted, name


async def test_a_program_has_a_network_only_if_it_was_given_one(tools: Tools) -> None:
    ours = str(Path("/proc/self/ns/net").readlink())
    for network in (False, True):
        done = await tools.run(Jail(65534, network=network), "readlink", "/proc/self/ns/net", seconds=20)
        assert (done.stdout.decode().strip() == ours) is network


async def test_a_program_has_its_limits(tools: Tools) -> None:
    jail = Jail(65534, memory=64 << 20, cpu=7, files=33)
    done = await tools.run(jail, "cat", "/proc/self/limits", seconds=20)
    limits = {line[:26].strip(): line[26:].split()[:2] for line in done.stdout.decode().splitlines()}
    assert limits["Max data size"] == [str(64 << 20)] * 2
    assert limits["Max cpu time"] == ["7", "7"]
    assert limits["Max open files"] == ["33", "33"]
    assert limits["Max core file size"] == ["0", "0"]


async def test_a_program_gets_no_environment_but_ours_and_no_descriptor_but_those_named(tools: Tools) -> None:
    os.environ["NOTIFY_SOCKET"] = "/nowhere"
    named, other = os.pipe2(0)  # both inheritable
    try:
        done = await tools.run(NOBODY, "env", seconds=20, environment={"MORE": "1"})
        assert {line.split("=")[0] for line in done.stdout.decode().split()} == {
            "PATH",
            "LC_ALL",
            "MORE",
            "PWD",
        }  # PWD is the shell's
        script = "import os; print(*os.listdir('/proc/self/fd'))"
        listed = await tools.run(NOBODY, PYTHON, "-I", "-c", script, seconds=20, fds=[named])
    finally:
        del os.environ["NOTIFY_SOCKET"]
        os.close(named)
        os.close(other)
    numbers = set(map(int, listed.stdout.split()))
    assert named in numbers
    assert len(numbers - {0, 1, 2, named}) == 1  # that of the listing itself


async def test_a_failing_program_tells_its_status_and_what_it_said(tools: Tools) -> None:
    with pytest.raises(ToolError, match=r"ended with 1: .*No such file") as failed:
        await tools.run(NOBODY, "cat", "/nowhere", seconds=20)
    assert failed.value.returncode == 1
    assert (await tools.run(NOBODY, "false", seconds=20, accept=(0, 1))).returncode == 1


async def test_what_a_program_says_cannot_forge_the_journal(tools: Tools) -> None:
    script = r"import sys; sys.stderr.write('one\x1b[31m\u202ered\n' + 'x' * 9999); sys.exit(3)"
    with pytest.raises(ToolError) as failed:
        await tools.run(NOBODY, PYTHON, "-X", "utf8", "-c", script, seconds=20)
    first, second = failed.value.stderr.split("\n")
    assert first == r"one\x1b[31m\u202ered"
    assert len(second) == 500


async def test_a_program_that_takes_too_long_is_killed(tools: Tools) -> None:
    with pytest.raises(ToolError) as failed:
        await tools.run(NOBODY, "sleep", "1000", seconds=0.2)
    assert failed.value.returncode is None


async def test_a_program_that_writes_too_much_is_killed(tools: Tools) -> None:
    with pytest.raises(ToolError, match="wrote more than"):
        await tools.run(NOBODY, "cat", "/dev/zero", seconds=20)


async def test_a_cancelled_run_kills_its_program(tools: Tools) -> None:
    reading, writing = os.pipe()
    script = f"import os, signal; os.write({writing}, b'%d' % os.getpid()); signal.pause()"
    running = asyncio.create_task(tools.run(NOBODY, PYTHON, "-c", script, seconds=1000, fds=[writing]))
    started = asyncio.Event()
    asyncio.get_running_loop().add_reader(reading, started.set)
    async with asyncio.timeout(60):
        await started.wait()
    asyncio.get_running_loop().remove_reader(reading)
    pid = os.read(reading, 100)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not Path(f"/proc/{int(pid)}").exists()
    os.close(reading)
    os.close(writing)


async def test_a_child_ends_once_and_tells_how(tools: Tools) -> None:
    child = await tools.spawn(NOBODY, "sleep", "1000")
    assert not child.ended
    assert await child.close()
    assert await child.wait() == -signal.SIGKILL
    assert await child.close()


async def test_a_program_dies_with_the_one_who_started_it() -> None:
    script = f"""
import asyncio
from sendense_restored.daemon.host.process import Jail, Tools
async def main():
    child = await Tools.find({TOOLS!r}).spawn(Jail(65534), "sh", "-c", "echo $$ >&1; exec sleep 1000", capture=True)
    print((await child.process.stdout.readline()).decode(), end="", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    starter = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert starter.stdout is not None
    pid = int(await starter.stdout.readline())
    gone = os.pidfd_open(pid)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(gone, ended.set)
    starter.kill()
    await starter.wait()
    async with asyncio.timeout(60):
        await ended.wait()
    asyncio.get_running_loop().remove_reader(gone)
    os.close(gone)


FORKS = """
import os, signal
children = []
try:
    while len(children) < 100:
        child = os.fork()
        if not child:
            signal.pause()
        children.append(child)
except BlockingIOError:
    pass
print(len(children))
for child in children:
    os.kill(child, signal.SIGKILL)
    os.wait()
"""


async def test_a_jail_bounds_what_its_uid_can_have_running(tools: Tools) -> None:
    """All its jails together, and no other uid."""

    async def children(jail: Jail) -> int:
        return int((await tools.run(jail, PYTHON, "-I", "-c", FORKS, seconds=20)).stdout)

    jail = Jail(61997, processes=8)
    assert await children(jail) == 7
    other = await tools.spawn(
        jail, PYTHON, "-I", "-c", "import signal; print(flush=True); signal.pause()", capture=True
    )
    try:
        assert other.process.stdout is not None
        await other.process.stdout.readline()
        assert await children(jail) == 6
        assert await children(Jail(61996, processes=8)) == 7
    finally:
        await other.close()


async def test_a_jail_bounds_the_files_that_are_written(tools: Tools, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.fchmod(descriptor, 0o666)
    write = f"trap '' XFSZ; cat /dev/zero > /proc/self/fd/{descriptor}"
    try:
        with pytest.raises(ToolError) as refusal:
            await tools.run(Jail(61997, file_size=4096), "sh", "-c", write, seconds=20, fds=[descriptor])
        assert "File too large" in refusal.value.stderr
        assert os.fstat(descriptor).st_size == 4096
    finally:
        os.close(descriptor)


def test_a_jail_that_would_unmount_the_daemon_s_own_places_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for the daemon as well"):
        Jail(7, without=(tmp_path,))
