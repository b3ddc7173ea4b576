"""A root shell among the mounts is a shell like any other, and nothing of it outlives what it must not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.client import Client
from sendense_restored.daemon.host import shell
from sendense_restored.daemon.host.process import Tools
from sendense_restored.daemon.host.shell import Shells
from tests.terminal import Terminal
from tools.lab.bus import CHECKOUT
from tools.lab.service import service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
    from typing import Any

    from tools.lab.guest import Chain
    from tools.lab.people import Person
    from tools.lab.service import Service

    from .conftest import Machine

    CommandLine = Callable[..., Coroutine[Any, Any, asyncio.subprocess.Process]]

PROMPT = r"sendense-restore\S*[#$] "


@pytest.fixture
async def terminal() -> AsyncIterator[Terminal]:
    with Terminal() as terminal:
        yield terminal


@pytest.fixture
async def shells(tmp_path: Path) -> AsyncIterator[Shells]:
    shells = Shells(Tools.find(shell.REQUIRED_TOOLS, shell.OPTIONAL_TOOLS), tmp_path)
    yield shells
    await shells.close()


@contextlib.asynccontextmanager
async def opened(shells: Shells, terminal: Terminal, term: str = "xterm") -> AsyncIterator[asyncio.Task[int]]:
    """A shell that shows its prompt; its task gives the status."""
    task = asyncio.create_task(shells.run(terminal.fd, term=term))
    try:
        await terminal.shows(PROMPT)
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


async def status_of(task: asyncio.Task[int]) -> int:
    async with asyncio.timeout(60):
        return await task


class Trace:
    """A FIFO that processes hold open, the last of which can be waited for."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def close(self) -> None:
        os.close(self._fd)

    @property
    def held(self) -> bool:
        """Whether one that has been there still is."""
        poll = select.poll()
        poll.register(self._fd, 0)
        return not poll.poll(0)

    async def gone(self) -> None:
        """Return when no process holds it any more."""
        ended = asyncio.Event()
        poll = select.epoll()
        poll.register(self._fd, select.EPOLLHUP)
        asyncio.get_running_loop().add_reader(poll.fileno(), ended.set)
        try:
            async with asyncio.timeout(60):
                await ended.wait()
        finally:
            asyncio.get_running_loop().remove_reader(poll.fileno())
            poll.close()


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Trace]:
    trace = Trace(tmp_path / "trace")
    yield trace
    trace.close()


async def start_stubborn_programs(terminal: Terminal, trace: Trace) -> None:
    """In the foreground, in the background, and as far away as a program can get; none listens to SIGHUP."""
    terminal.types(f"exec 9>{trace.path}; trap '' HUP TERM\n")
    await terminal.shows(PROMPT)
    terminal.types("(setsid nohup sleep 1000 >/dev/null 2>&1 </dev/null & ); sleep 1000 &\n")
    await terminal.shows(PROMPT)
    terminal.types("echo they  run; sleep 1000\n")
    await terminal.shows("they run")
    assert trace.held


# --- a shell --------------------------------------------------------------------------------------------------------


async def test_it_starts_where_the_mounts_are_and_answers_its_status(
    shells: Shells, terminal: Terminal, tmp_path: Path
) -> None:
    async with opened(shells, terminal) as task:
        terminal.types("pwd; id -u; exit 7\n")
        await terminal.shows(f"{tmp_path}\r\n0\r\n")
        assert await status_of(task) == 7


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
async def test_a_signal_that_ends_it_is_in_its_status(shells: Shells, terminal: Terminal, number: int) -> None:
    async with opened(shells, terminal) as task:
        terminal.types(f"kill -{number} $$\n")
        assert await status_of(task) == 128 + number


async def test_it_has_a_session_on_the_terminal_with_job_control(shells: Shells, terminal: Terminal) -> None:
    async with opened(shells, terminal):
        terminal.types("tty; cat </dev/tty\n")
        await terminal.shows(os.ttyname(terminal.fd))
        terminal.types("typed\n")
        await terminal.shows("typed\r\ntyped\r\n")
        terminal.types("\x1a")
        await terminal.shows("Stopped")
        await terminal.shows(PROMPT)
        terminal.types("fg\n")
        await terminal.shows("cat < */dev/tty\r\n")
        terminal.types("again\n")
        await terminal.shows("again\r\nagain\r\n")
        terminal.types("\x03")
        await terminal.shows(PROMPT)
        terminal.types("echo status  $?\n")
        await terminal.shows("status 130")


async def test_its_window_is_the_terminals(shells: Shells, terminal: Terminal) -> None:
    async with opened(shells, terminal):
        terminal.types("trap 'echo now  $(stty size)' WINCH; stty size\n")
        await terminal.shows("24 200")
        await terminal.shows(PROMPT)
        terminal.resize(50, 132)
        terminal.types("\n")
        await terminal.shows("now 50 132")


async def test_its_environment_is_roots_and_nothing_of_the_daemons(
    shells: Shells, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    inheritable = os.pipe2(0)
    try:
        async with opened(shells, terminal, term="xterm-256color"):
            terminal.types("env -0 | sort -z | tr '\\0' ' '; echo; ls /proc/self/fd | tr '\\n' ' '; echo the end\n")
            shown = (await terminal.shows(r"(?s)echo the end\r\n(.*)\r\n(.*)the end")).groups()
    finally:
        for descriptor in inheritable:
            os.close(descriptor)
    assert "HOME=/root" in shown[0]
    assert "TERM=xterm-256color" in shown[0]
    assert "NOTIFY_SOCKET" not in shown[0]
    assert shown[1].split() == ["0", "1", "2", "3"]  # the last is that of the listing


async def test_without_a_kind_of_terminal_it_is_a_dumb_one(shells: Shells, terminal: Terminal) -> None:
    async with opened(shells, terminal, term=""):
        terminal.types("echo kind  $TERM\n")
        await terminal.shows("kind dumb")


async def test_there_is_a_shell_where_there_is_no_bash(tmp_path: Path, terminal: Terminal) -> None:
    shells = Shells(Tools.find(shell.REQUIRED_TOOLS), tmp_path)
    async with opened(shells, terminal) as task:
        terminal.types("echo $0; exit 3\n")
        await terminal.shows("/sh\r\n")
        assert await status_of(task) == 3


# --- what is refused ------------------------------------------------------------------------------------------------


def _opened(path: str, flags: int = os.O_RDWR) -> Callable[[Terminal], int]:
    return lambda _: os.open(path, flags | os.O_NOCTTY)


@pytest.mark.parametrize(
    "make",
    [
        _opened("/dev/null"),
        _opened("/proc/self/mem"),
        _opened("/dev/ptmx"),
        lambda _: os.memfd_create("x"),
        lambda _: os.eventfd(0),
        lambda _: os.pidfd_open(os.getpid()),
        lambda terminal: os.open(os.ttyname(terminal.fd), os.O_RDONLY | os.O_NOCTTY),
        lambda terminal: os.open(os.ttyname(terminal.fd), os.O_WRONLY | os.O_NOCTTY),
        lambda terminal: os.open(os.ttyname(terminal.fd), os.O_PATH),
    ],
)
async def test_what_is_no_terminal_for_programs_is_refused(
    shells: Shells, terminal: Terminal, make: Callable[[Terminal], int]
) -> None:
    descriptor = make(terminal)
    try:
        with pytest.raises(errors.InvalidOption):
            await shells.run(descriptor, term="")
    finally:
        os.close(descriptor)


async def test_a_terminal_that_was_hung_up_is_refused(shells: Shells) -> None:
    keyboard, side = os.openpty()
    os.close(keyboard)
    with pytest.raises(errors.InvalidOption):
        await shells.run(side, term="")
    os.close(side)


@pytest.mark.parametrize("term", ["/etc/passwd", "../x", "x y", "x\n", "-x", "x" * 65, "ä"])
async def test_a_kind_of_terminal_that_is_none_is_refused(shells: Shells, terminal: Terminal, term: str) -> None:
    with pytest.raises(errors.InvalidOption):
        await shells.run(terminal.fd, term=term)


async def test_a_terminal_is_not_taken_away_from_a_session_that_has_it(shells: Shells, terminal: Terminal) -> None:
    async with opened(shells, terminal) as first:
        assert await shells.run(terminal.fd, term="") == 126
        await terminal.shows("another session has it")
        terminal.types("echo still  here\n")
        await terminal.shows("still here\r\n")
        assert not first.done()


async def test_at_most_four_are_open(shells: Shells, terminal: Terminal) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(opened(shells, stack.enter_context(Terminal())))
        starting = [asyncio.create_task(shells.run(stack.enter_context(Terminal()).fd, term="")) for _ in range(3)]
        done, pending = await asyncio.wait(starting, timeout=0)
        while len(done) < 2:
            done, pending = await asyncio.wait(starting, return_when=asyncio.FIRST_COMPLETED)
        assert [type(task.exception()) for task in done] == [errors.LimitReached] * 2
        for task in pending:
            task.cancel()
        await asyncio.wait(pending)
        async with opened(shells, terminal) as fourth:
            with pytest.raises(errors.LimitReached):
                await shells.run(terminal.fd, term="")
            assert not fourth.done()


# --- its end --------------------------------------------------------------------------------------------------------


async def test_nothing_that_was_started_in_it_stays_when_it_is_left(
    shells: Shells, terminal: Terminal, trace: Trace
) -> None:
    async with opened(shells, terminal) as task:
        terminal.types(f"exec 9>{trace.path}; (setsid nohup sleep 1000 >/dev/null 2>&1 </dev/null &)\n")
        await terminal.shows(PROMPT)
        assert trace.held
        terminal.types("exit 0\n")
        assert await status_of(task) == 0
        assert not trace.held


async def test_a_cancelled_one_ends_with_all_that_was_started_in_it(
    shells: Shells, terminal: Terminal, trace: Trace
) -> None:
    async with opened(shells, terminal) as task:
        await start_stubborn_programs(terminal, trace)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not trace.held


async def test_one_whose_output_nobody_takes_ends_as_well(shells: Shells, terminal: Terminal, trace: Trace) -> None:
    async with opened(shells, terminal) as task:
        terminal.types(f"exec 9>{trace.path}; yes\n")
        await terminal.shows("y\r\ny\r\n")
        terminal.look_away()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not trace.held


async def test_one_whose_terminal_is_closed_ends(shells: Shells, trace: Trace) -> None:
    terminal = Terminal()
    terminal.look()
    side = os.dup(terminal.fd)
    task = asyncio.create_task(shells.run(side, term=""))
    await terminal.shows(PROMPT)
    terminal.types(f"exec 9>{trace.path}\n")
    await terminal.shows(PROMPT)
    terminal.close()
    assert await status_of(task) == 128 + signal.SIGHUP
    assert not trace.held
    os.close(side)


async def test_they_all_end_with_the_machine_and_no_more_are_started(
    shells: Shells, terminal: Terminal, trace: Trace
) -> None:
    with Terminal() as other:
        async with opened(shells, other) as second, opened(shells, terminal) as first:
            await start_stubborn_programs(terminal, trace)
            await shells.close()
            assert not trace.held
            assert 0 not in await asyncio.gather(first, second, return_exceptions=True)
            with pytest.raises(errors.Unavailable):
                await shells.run(terminal.fd, term="")
    await shells.close()


async def test_it_dies_with_a_killed_daemon_and_so_does_all_that_was_started_in_it(
    terminal: Terminal, trace: Trace, tmp_path: Path
) -> None:
    script = f"""
import asyncio, pathlib
from sendense_restored.daemon.host import shell
from sendense_restored.daemon.host.process import Tools
shells = shell.Shells(Tools.find(shell.REQUIRED_TOOLS), pathlib.Path({str(tmp_path)!r}))
asyncio.run(shells.run({terminal.fd}, term=""))
"""
    starter = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, pass_fds=[terminal.fd], env={"PYTHONPATH": str(CHECKOUT)}
    )
    await terminal.shows(PROMPT)
    await start_stubborn_programs(terminal, trace)
    starter.kill()
    await starter.wait()
    await trace.gone()


# --- the whole way --------------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(machine: Machine, tmp_path: Path) -> Iterator[Service]:
    with service(machine.bus, tmp_path) as running:
        yield running


@pytest.fixture
async def mounted(machine: Machine, daemon: Service, chain: Chain) -> AsyncIterator[str]:
    """A mount, held by root."""
    del daemon
    async with await Client.connect(machine.bus.address) as client:
        await client.scan(await client.add_repository("lab", str(chain.backups[0].image.parent.parent)))
        yield await client.mount((await client.list_backups())[0][0].backup_id)


@pytest.fixture
def command_line(machine: Machine, terminal: Terminal) -> CommandLine:
    """``sendense-restore shell`` on the terminal, typed by root or by somebody else."""

    async def start(who: Person | None = None) -> asyncio.subprocess.Process:
        python = str(machine.checkout / Path(sys.executable).relative_to(CHECKOUT)) if who else sys.executable
        argv = [python, "-m", "sendense_restored.cli", "shell"]
        return await asyncio.create_subprocess_exec(
            *(who.command(*argv) if who else argv),
            stdin=terminal.fd,
            stdout=terminal.fd,
            stderr=terminal.fd,
            env={**os.environ, **machine.bus.environment, "PYTHONPATH": str(machine.checkout), "TERM": "xterm"},
        )

    return start


async def exit_code(process: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(60):
        return await process.wait()


async def test_root_sees_the_mounts_that_nobody_else_sees(
    command_line: CommandLine, terminal: Terminal, mounted: str
) -> None:
    modes = terminal.modes
    typed = await command_line()
    await terminal.shows(PROMPT)
    terminal.types("ls\n")
    await terminal.shows(mounted)
    terminal.types(f"cat {mounted}/partition-1/etc/hostname; pwd\n")
    directory = (await terminal.shows(r"web01\r\n(\S+)\r\n"))[1]
    assert not Path(directory, mounted).exists()
    terminal.types(f"touch {mounted}/partition-1/x\n")
    await terminal.shows("Read-only file system")
    terminal.types("exit 5\n")
    assert await exit_code(typed) == 5
    assert terminal.modes == modes


async def test_nobody_but_root_gets_a_shell(
    command_line: CommandLine, machine: Machine, terminal: Terminal, daemon: Service
) -> None:
    del daemon
    member, stranger = machine.people.member, machine.people.stranger
    for person, owner in ((member, member.uid), (stranger, stranger.uid), (member, 0)):
        os.fchown(terminal.fd, owner, -1)
        assert await exit_code(await command_line(person)) == errors.NotAuthorized.exit_code
        await terminal.shows("sendense-restore: ")
        assert "root shell" not in terminal.text


async def test_a_killed_command_line_takes_its_shell_along(
    command_line: CommandLine, terminal: Terminal, mounted: str, trace: Trace
) -> None:
    del mounted
    typed = await command_line()
    await terminal.shows(PROMPT)
    await start_stubborn_programs(terminal, trace)
    typed.kill()
    await typed.wait()
    await trace.gone()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_service_that_ends_takes_its_shells_along_and_gives_the_terminal_back(
    command_line: CommandLine, daemon: Service, terminal: Terminal, mounted: str, trace: Trace, number: int
) -> None:
    modes = terminal.modes
    typed = await command_line()
    await terminal.shows(PROMPT)
    terminal.types(f"cd {mounted}/partition-1\n")
    await terminal.shows(PROMPT)
    await start_stubborn_programs(terminal, trace)
    os.kill(daemon.pid, number)
    await trace.gone()
    assert await exit_code(typed) == errors.Unavailable.exit_code
    assert terminal.modes == modes
