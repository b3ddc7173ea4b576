"""Programs run in the jail that was asked for, and none outlives its purpose."""

from __future__ import annotations

import asyncio
import os
import resource
import select
import signal
import socket
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from sendense_restored.daemon.host.process import Jail, ToolError, ToolMissingError, Tools
from tools.lab.children import first_child, guarded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sendense_restored.daemon.host.child import Child

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


@pytest.mark.parametrize(
    "jail",
    [
        "Jail(65534)",
        "Jail(65534, own_processes=True)",
        "Jail(65534, frozenset({'dac_read_search'}), own_mounts=True, own_processes=True, bare=Path('/mnt'))",
    ],
    ids=["alone", "guarded", "server"],
)
async def test_a_program_dies_with_the_one_who_started_it(jail: str) -> None:
    script = f"""
import asyncio
from pathlib import Path
from sendense_restored.daemon.host.process import Jail, Tools
async def main():
    said = "read -r pid rest </proc/self/stat; echo $pid; exec sleep 1000"
    child = await Tools.find({TOOLS!r}).spawn({jail}, "sh", "-c", said, capture=True)
    print((await child.process.stdout.readline()).decode(), end="", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    starter = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert starter.stdout is not None
    pid = int(await starter.stdout.readline())
    gone = os.pidfd_open(pid)
    starter.kill()
    await starter.wait()
    await ended(gone)
    os.close(gone)


async def ended(*pidfds: int) -> None:
    """Once these processes have."""
    for pidfd in pidfds:
        event = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, event.set)
        async with asyncio.timeout(60):
            await event.wait()
        asyncio.get_running_loop().remove_reader(pidfd)


# --- a process namespace --------------------------------------------------------------------------------------------

APART = Jail(61994, own_processes=True)
HOSTILE = """
import ctypes, os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG: none
numbers, tell = os.pipe()
if not os.fork():
    os.setsid()
    if not os.fork():
        os.write(tell, os.readlink("/proc/self").encode())
        os.closerange(0, 10)
        while True:
            signal.pause()
    os._exit(0)
os.close(tell)
print(os.readlink("/proc/self"), os.read(numbers, 100).decode(), flush=True)
os.closerange(0, 10)
while True:
    signal.pause()
"""
"""A program that wants to stay, and starts another one that leaves its session; it tells the numbers of both."""


@pytest.fixture
async def apart(tools: Tools) -> AsyncIterator[tuple[Child, list[int]]]:
    """A guard, and pidfds of the first process, of the program and of what that has started."""
    child = await tools.spawn(APART, PYTHON, "-I", "-c", HOSTILE, capture=True)
    pidfds: list[int] = []
    try:
        assert child.process.stdout is not None
        program, other = map(int, (await child.process.stdout.readline()).split())
        assert program == guarded(child.pid)
        pidfds += [os.pidfd_open(pid) for pid in (first_child(child.pid), program, other)]
        yield child, pidfds
    finally:
        await child.close()
        for pidfd in pidfds:
            os.close(pidfd)


def over(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


async def test_all_that_was_started_in_a_process_namespace_has_ended_when_its_program_was_killed(
    apart: tuple[Child, list[int]],
) -> None:
    child, pidfds = apart
    assert await child.close()
    assert await child.wait() != 0
    assert all(map(over, pidfds)), "not one of them is about to end: it has"


async def test_a_guard_that_somebody_kills_takes_all_along(apart: tuple[Child, list[int]]) -> None:
    child, pidfds = apart
    os.kill(child.pid, signal.SIGKILL)
    await ended(*pidfds)
    assert await child.wait() == -signal.SIGKILL


async def test_a_guard_is_killed_where_there_is_no_descriptor_to_find_its_program(
    apart: tuple[Child, list[int]],
) -> None:
    child, pidfds = apart
    with no_descriptors():
        child.kill()
    await ended(*pidfds)
    assert await child.wait() == -signal.SIGKILL


@contextmanager
def no_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("times", [1, 2])
async def test_a_start_that_is_cancelled_leaves_nothing(
    tools: Tools, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Not even a hostile program that has begun by then, and not when it is cancelled once more."""
    loop = asyncio.get_running_loop()
    start, began, go_on = loop.subprocess_exec, asyncio.Event(), asyncio.Event()
    reading, telling = os.pipe()
    loop.add_reader(reading, began.set)

    async def slowly(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        started = await start(*args, **options)
        await go_on.wait()
        return started

    monkeypatch.setattr(loop, "subprocess_exec", slowly)
    script = HOSTILE.replace("print(", f"os.write({telling}, b'.'); print(", 1)
    starting = asyncio.create_task(tools.spawn(APART, PYTHON, "-I", "-c", script, fds=(telling,)))
    await began.wait()
    for _ in range(times):
        starting.cancel()
        await asyncio.wait({starting}, timeout=0.05)
    (ending,) = (task for task in asyncio.all_tasks() if task.get_name() == "end python3")
    go_on.set()
    await asyncio.wait({starting, ending})
    assert starting.cancelled()
    assert processes_of(APART.uid) == []
    loop.remove_reader(reading)
    os.close(reading)
    os.close(telling)


async def test_a_start_that_fails_says_so(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cast("dict[str, str]", tools.paths), "setpriv", "/no/such/program")
    with pytest.raises(FileNotFoundError):
        await tools.spawn(APART, "sleep", "1000")


async def test_a_guard_that_somebody_has_stopped_is_not_in_the_way(apart: tuple[Child, list[int]]) -> None:
    child, pidfds = apart
    os.kill(child.pid, signal.SIGSTOP)
    assert await child.close()
    assert all(map(over, pidfds))


def processes_of(uid: int) -> list[str]:
    """Those that have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(FileNotFoundError, ProcessLookupError):
            text = status.read_text(encoding="utf-8", errors="replace")
            if f"\nUid:\t{uid}\t" in text and "\nState:\tZ" not in text:
                found.append(text)
    return found


async def test_a_guard_has_the_status_of_its_program(tools: Tools) -> None:
    done = await tools.run(APART, "sh", "-c", "exit 7", seconds=20, accept=(7,))
    assert done.returncode == 7
    done = await tools.run(APART, "sh", "-c", "kill -TERM $$", seconds=20, accept=(143,))
    assert done.returncode == 128 + signal.SIGTERM


async def test_a_program_can_be_killed_before_its_namespace_stands(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "unshare"
    slow.write_text("#!/bin/sh\nexec sleep 1000\n", encoding="utf-8")
    slow.chmod(0o755)
    monkeypatch.setitem(cast("dict[str, str]", tools.paths), "unshare", str(slow))
    child = await tools.spawn(APART, "sleep", "1000")
    assert await child.close()
    assert await child.wait() == -signal.SIGKILL


async def test_killing_the_group_of_a_guard_ends_all(
    apart: tuple[Child, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As is done when it has no child yet, and may have one in the next moment."""
    child, pidfds = apart
    monkeypatch.setattr(child, "_kill_guarded", lambda: False)
    assert await child.close()
    await ended(*pidfds)


@pytest.mark.parametrize("jail", [NOBODY, APART], ids=["alone", "guarded"])
async def test_a_program_whose_parent_has_gone_does_not_begin(tools: Tools, jail: Jail) -> None:
    """As it is when the daemon is killed before the parent-death signal was set."""
    argv = tools.argv(jail, "sh", "-c", "echo begun")
    other = [each if each != str(os.getpid()) else str(os.getppid()) for each in argv]
    for command, said in ((argv, b"begun\n"), (other, b"")):
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert (await process.communicate())[0] == said


async def test_the_first_process_does_not_begin_without_its_guard(tools: Tools) -> None:
    argv = tools.argv(APART, "sh", "-c", "echo begun")
    unguarded = argv[argv.index(tools.paths["prlimit"]) :]
    for guard, said in ((None, b"begun\n"), ("1", b"")):
        # The shell becomes what it runs; a guard has its number.
        script = f'GUARD={guard or "$$"} exec "$@"'
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", script, "sh", *unguarded, stdout=asyncio.subprocess.PIPE
        )
        assert (await process.communicate())[0] == said


async def test_what_a_program_leaves_behind_does_not_keep_it_from_ending(tools: Tools) -> None:
    """Whoever holds its standard error, for one."""
    script = (
        "import os; os.fork() or (os.setsid(), print(os.getpid(), flush=True), os.execlp('sleep', 'sleep', '1000'))"
    )
    child = await tools.spawn(NOBODY, PYTHON, "-I", "-c", script, capture=True)
    assert child.process.stdout is not None
    left = int(await child.process.stdout.readline())
    try:
        async with asyncio.timeout(60):
            assert await child.wait() == 0
        assert await child.close()
    finally:
        os.kill(left, signal.SIGKILL)


async def test_a_server_in_a_process_namespace_finds_its_socket(tools: Tools) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("")
        listening.listen()
        jail = replace(APART, own_mounts=True)
        said = 'echo "$LISTEN_FDS $((LISTEN_PID - $$)) ${GUARD-none} $(readlink /proc/self/fd/3)" >&2'
        child = await tools.spawn_listening(jail, "sh", "-c", said, listening=listening.fileno())
        try:
            assert await child.wait() == 0
            assert child.stderr == f"1 0 none {os.readlink(f'/proc/self/fd/{listening.fileno()}')}"  # noqa: PTH115
        finally:
            await child.close()


# --- limits ---------------------------------------------------------------------------------------------------------


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
    write = f"cat /dev/zero > /proc/self/fd/{descriptor}"
    try:
        with pytest.raises(ToolError) as refusal:
            await tools.run(Jail(61997, file_size=4096), "sh", "-c", write, seconds=20, fds=[descriptor])
        assert "File too large" in refusal.value.stderr
        assert os.fstat(descriptor).st_size == 4096
    finally:
        os.close(descriptor)


def test_a_jail_that_could_be_left_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave"):
        Jail(7, frozenset({"sys_chroot"}), own_mounts=True, bare=tmp_path)


@pytest.mark.parametrize("change", ["without", "bare"])
def test_a_jail_that_would_change_the_daemon_s_own_mounts_cannot_be_made(tmp_path: Path, change: str) -> None:
    with pytest.raises(ValueError, match="the daemon's as well"):
        Jail(7, without=(tmp_path,)) if change == "without" else Jail(7, bare=tmp_path)


async def test_a_bare_jail_has_programs_and_nothing_else(tools: Tools, tmp_path: Path) -> None:
    file = os.open(tmp_path / "handed over", os.O_RDWR | os.O_CREAT)
    os.write(file, b"known\n")
    jail = Jail(61997, capabilities=frozenset({"dac_read_search"}), own_mounts=True, bare=tmp_path)
    writes = "for place in / /usr /proc; do (: >$place/x) 2>/dev/null && echo $place; done"
    see = f"[ $PWD = / ] && ls -A / /usr/local; cat /proc/self/fd/$1; {writes}; :"
    try:
        done = await tools.run(jail, "sh", "-c", see, "sh", str(file), seconds=20, fds=[file])
    finally:
        os.close(file)
    seen = set(done.stdout.decode().split()) - {"lib32", "lib64", "libx32", "/:", "/usr/local:"}
    assert seen == {"bin", "lib", "proc", "sbin", "usr", "known"}
    assert [path.name for path in tmp_path.iterdir()] == ["handed over"]
