"""The command ``shell`` passes everything through, and gives the terminal back however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import sys
import termios
import tty
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.client import Client
from tests.bus.fake import HANG, Answer, FakeService
from tests.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.bus.peer import Message

PROMPT = b"prompt# "


class Shell:
    """The service's end: what a shell would read and write. ``fd`` is the terminal that the service was given."""

    def __init__(self, service: FakeService) -> None:
        self._service = service
        self._started = asyncio.Event()
        self.fd = -1
        self.message: Message
        service.answers["OpenShell"] = self._start

    def _start(self, message: Message) -> object:
        assert (message.signature, message.body[0], len(message.unix_fds)) == ("ha{sv}", 0, 1)
        self.message, self.fd = message, message.unix_fds[0]
        self._started.set()
        return HANG

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    async def starts(self) -> None:
        """Wait for the call; then the terminal passes every byte."""
        async with asyncio.timeout(60):
            await self._started.wait()
        tty.setraw(self.fd)
        os.set_blocking(self.fd, False)

    def writes(self, data: bytes) -> None:
        assert os.write(self.fd, data) == len(data)

    async def reads(self, count: int) -> bytes:
        """So many bytes that were typed."""
        data = b""
        while len(data) < count:
            await self._happens(select.EPOLLIN)
            data += os.read(self.fd, count - len(data))
        return data

    async def hung_up(self) -> None:
        await self._happens(select.EPOLLHUP)

    async def _happens(self, what: int) -> None:
        poll, happened = select.epoll(), asyncio.Event()
        poll.register(self.fd, what)
        loop = asyncio.get_running_loop()
        loop.add_reader(poll.fileno(), happened.set)
        try:
            async with asyncio.timeout(60):
                await happened.wait()
        finally:
            loop.remove_reader(poll.fileno())
            poll.close()

    async def ends(self, status: int) -> None:
        await self._service.reply(self.message, Answer("u", status))

    @property
    def size(self) -> tuple[int, int]:
        return termios.tcgetwinsize(self.fd)


@pytest.fixture
def shell(service: FakeService, bus_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus_address)
    shell = Shell(service)
    yield shell
    shell.close()


@pytest.fixture
async def terminal() -> AsyncIterator[Terminal]:
    with Terminal(rows=33, columns=99) as terminal:
        yield terminal


async def program(
    terminal: Terminal, *, stdin: int | None = None, stdout: int | None = None, stderr: int | None = None
) -> Process:
    """``sendense-restore shell``, its streams on the terminal unless said otherwise."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sendense_restored.cli",
        "shell",
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm"},
        stdin=terminal.fd if stdin is None else stdin,
        stdout=terminal.fd if stdout is None else stdout,
        stderr=terminal.fd if stderr is None else stderr,
    )


@contextlib.asynccontextmanager
async def running(shell: Shell, terminal: Terminal) -> AsyncIterator[Process]:
    """The same, whose shell shows a prompt; killed at the end if it still runs."""
    process = await program(terminal)
    try:
        await shell.starts()
        shell.writes(PROMPT)
        await terminal.shows(PROMPT.decode())
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def without_terminal(answer: object) -> Callable[[Message], object]:
    """An answer of a service that closes what it was given."""

    def close(message: Message) -> object:
        os.close(message.unix_fds[0])
        return answer

    return close


async def exit_code(process: Process) -> int:
    async with asyncio.timeout(60):
        return await process.wait()


async def test_what_is_typed_and_shown_passes_unchanged(shell: Shell, terminal: Terminal) -> None:
    async with running(shell, terminal):
        keys = bytes(range(256))
        terminal.types_bytes(keys)
        assert await shell.reads(len(keys)) == keys
        shell.writes(b"a\nb\r\n\x1b[31m\xc3\xa9 end")
        await terminal.shows("a\nb\r\n\x1b\\[31mé end")


async def test_the_status_of_the_shell_is_the_exit_code(shell: Shell, terminal: Terminal) -> None:
    modes = terminal.modes
    async with running(shell, terminal) as process:
        assert terminal.modes != modes
        await shell.ends(7)
        assert await exit_code(process) == 7
    assert terminal.modes == modes


async def test_the_shell_is_told_what_kind_of_terminal_it_has_and_its_size_and_modes(
    shell: Shell, service: FakeService, terminal: Terminal
) -> None:
    attributes = termios.tcgetattr(terminal.fd)
    attributes[6][termios.VERASE] = b"\x08"
    termios.tcsetattr(terminal.fd, termios.TCSANOW, attributes)
    async with running(shell, terminal) as process:
        assert service.called_with("OpenShell") == [0, {"term": "xterm"}]
        assert termios.tcgetattr(shell.fd)[6][termios.VERASE] == b"\x08"
        assert shell.size == (33, 99)
        terminal.resize(50, 132)
        process.send_signal(signal.SIGWINCH)
        while shell.size != (50, 132):
            terminal.types("x")  # a round trip
            await shell.reads(1)


async def test_it_says_where_one_is_once_the_shell_is_there_and_not_before(shell: Shell, terminal: Terminal) -> None:
    process = await program(terminal)
    await shell.starts()
    assert terminal.text == ""
    shell.writes(PROMPT)
    await terminal.shows(r"root shell in the restore service[^$]*\r\nprompt# ")
    await shell.ends(0)
    assert await exit_code(process) == 0
    assert terminal.text.count("root shell") == 1


async def test_everything_that_was_written_is_shown_even_if_the_user_reads_slowly(
    shell: Shell, terminal: Terminal
) -> None:
    async with running(shell, terminal) as process:
        terminal.look_away()
        written, line = 0, b"0123456789abcde\n"
        with contextlib.suppress(BlockingIOError):
            while True:  # until nothing in between takes any more
                written += os.write(shell.fd, line * 64)
        assert written > 4096
        await shell.ends(0)
        terminal.look()
        assert await exit_code(process) == 0
        whole, rest = divmod(written, len(line))
        text = (line * whole + line[:rest]).decode()
        await terminal.shows(text[-500:])
        assert terminal.text.count(line.decode()) == whole


async def test_a_shell_that_does_not_read_loses_nothing_that_is_typed(shell: Shell, terminal: Terminal) -> None:
    async with running(shell, terminal):
        keys = b"".join(b"%07d\n" % number for number in range(4096))
        typing = asyncio.create_task(terminal.pastes(keys))
        await asyncio.wait({typing}, timeout=0)
        assert await shell.reads(len(keys)) == keys
        await typing


async def test_a_refusal_is_told_and_the_terminal_is_not_touched(
    shell: Shell, service: FakeService, terminal: Terminal
) -> None:
    modes = terminal.modes
    service.answers["OpenShell"] = without_terminal(errors.NotAuthorized("only root may"))
    process = await program(terminal)
    assert await exit_code(process) == errors.NotAuthorized.exit_code
    await terminal.shows("only root may\r\n")
    assert terminal.text == "sendense-restore: only root may\r\n"
    assert terminal.modes == modes
    assert shell.fd == -1


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
async def test_without_a_terminal_there_is_no_shell(
    shell: Shell, service: FakeService, terminal: Terminal, stream: str
) -> None:
    process = await (program(terminal, stdin=PIPE) if stream == "stdin" else program(terminal, stdout=PIPE))
    await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == errors.InvalidOption.exit_code
    await terminal.shows("a shell needs a terminal")
    assert service.calls == []
    assert shell.fd == -1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
async def test_a_signal_gives_the_terminal_back_and_hangs_the_shell_up(
    shell: Shell, terminal: Terminal, number: int, code: int
) -> None:
    modes = terminal.modes
    async with running(shell, terminal) as process:
        process.send_signal(number)
        assert await exit_code(process) == code
        await shell.hung_up()
    assert terminal.modes == modes


async def test_a_killed_one_hangs_the_shell_up(shell: Shell, terminal: Terminal) -> None:
    async with running(shell, terminal) as process:
        process.kill()
        await exit_code(process)
        await shell.hung_up()


async def test_a_window_that_is_closed_hangs_the_shell_up(shell: Shell, terminal: Terminal) -> None:
    process = await program(terminal, stderr=PIPE)
    await shell.starts()
    shell.writes(PROMPT)
    await terminal.shows(PROMPT.decode())
    terminal.close()
    _, complaint = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == errors.Cancelled.exit_code
    assert b"Traceback" not in complaint
    await shell.hung_up()


async def test_a_service_that_is_gone_gives_the_terminal_back_and_is_told_of(
    shell: Shell, service: FakeService, terminal: Terminal
) -> None:
    modes = terminal.modes
    async with running(shell, terminal) as process:
        await service.leave()
        assert await exit_code(process) == errors.Unavailable.exit_code
        await terminal.shows("\r\nsendense-restore: .*\r\n")
    assert terminal.modes == modes


async def test_one_that_was_stopped_takes_the_terminal_again(shell: Shell, terminal: Terminal) -> None:
    modes = terminal.modes
    async with running(shell, terminal) as process:
        raw = terminal.modes
        process.send_signal(signal.SIGSTOP)
        termios.tcsetattr(terminal.fd, termios.TCSANOW, list(modes))  # type: ignore[arg-type]  # what it gave us
        process.send_signal(signal.SIGCONT)
        async with asyncio.timeout(60):
            while terminal.modes != raw:
                shell.writes(b".")  # a round trip
                await terminal.shows(r"\.")
        await shell.ends(0)
        assert await exit_code(process) == 0
    assert terminal.modes == modes


async def test_the_terminal_stays_the_clients_own(
    shell: Shell, service: FakeService, bus_address: str, terminal: Terminal
) -> None:
    del service
    async with await Client.connect(bus_address) as client:
        opening = asyncio.create_task(client.open_shell(terminal.fd))
        await shell.starts()
        assert os.path.samestat(os.fstat(shell.fd), os.fstat(terminal.fd))
        await shell.ends(3)
        assert await opening == 3
        assert os.isatty(terminal.fd)
        # Refused before it is sent: the copies of its descriptors must be closed then as well.
        with pytest.raises(errors.InvalidOption):
            await client.open_shell(terminal.fd, term="x\0")


async def test_an_answer_of_another_form_is_a_fault_of_the_service(
    service: FakeService, bus_address: str, terminal: Terminal
) -> None:
    service.answers["OpenShell"] = without_terminal(Answer("s", "0"))
    async with await Client.connect(bus_address) as client:
        with pytest.raises(errors.Failed):
            await client.open_shell(terminal.fd)
