"""The command ``shell``: a terminal inside the user's, with a root shell of the service at its other end.

The service gets one side of a new pseudo-terminal; the other one stays here, and what is typed and shown passes
through. So the shell has nothing of the user's session, and whatever ends this process hangs it up. The user's
terminal is taken over (raw mode) when the shell first says something, and given back on every way out that a process
sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from typing import TYPE_CHECKING, Any, Self

from sendense_restored import errors

from .frame import call

if TYPE_CHECKING:
    from sendense_restored.client import Client

_CHUNK = 65536
_HINT = """\
This is a root shell in the restore service. Each mount is a directory here; 'sendense-restore mounts' tells what is
what. What is open in here, and the directory one is in, keep a mount busy. A guest's absolute symbolic links lead to
files of this host. The shell and all that is started in it end with the service, or with 'exit'.
"""


def shell() -> int:
    """Open a shell as root where the mounts are; for root only."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise errors.InvalidOption("a shell needs a terminal; do not redirect the input or output of this command")
    sys.stdout.flush()
    return call(_work)


async def _work(client: Client) -> int:
    with contextlib.ExitStack() as stack:
        terminal = _reopened(stack)
        ours, theirs = os.openpty()
        stack.callback(os.close, ours)
        stack.callback(os.close, theirs)
        os.set_blocking(ours, False)
        termios.tcsetattr(theirs, termios.TCSANOW, termios.tcgetattr(terminal))
        with _Relay(terminal, ours) as relay:
            running = asyncio.create_task(client.open_shell(theirs, term=os.environ.get("TERM", "")))
            ends: set[asyncio.Future[Any]] = {running, relay.gone}
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if not running.done():
                    raise errors.Cancelled("the terminal has gone, and the shell with it")
                await relay.finish()
                return running.result()
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)


def _reopened(stack: contextlib.ExitStack) -> int:
    """The user's terminal, opened anew: that it does not block then is no business of the programs that share it."""
    try:
        terminal = os.open("/proc/self/fd/0", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        raise errors.NotAuthorized("this terminal belongs to another user; the shell is for root only") from None
    except OSError as error:
        raise errors.InvalidOption(f"this terminal cannot be opened ({error.strerror}); use another one") from None
    stack.callback(os.close, terminal)
    return terminal


class _Relay:
    """Carries bytes both ways between the user's terminal and our side of the shell's; neither descriptor blocks.

    What one side does not take yet is kept, and as long nothing more is read from the other. ``gone`` is done when
    the user's terminal has gone.
    """

    def __init__(self, terminal: int, ours: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._terminal, self._ours = terminal, ours
        self._modes = termios.tcgetattr(terminal)
        self._taken = False
        self._to_show, self._to_type = bytearray(), bytearray()
        self._shown = asyncio.Event()
        self._shown.set()
        self.gone: asyncio.Future[None] = self._loop.create_future()

    def __enter__(self) -> Self:
        self._resize()
        self._loop.add_signal_handler(signal.SIGWINCH, self._resize)
        self._loop.add_signal_handler(signal.SIGCONT, self._resume)
        self._loop.add_reader(self._ours, self._read_ours)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number in (signal.SIGWINCH, signal.SIGCONT):
            self._loop.remove_signal_handler(number)
        for descriptor in (self._ours, self._terminal):
            self._loop.remove_reader(descriptor)
            self._loop.remove_writer(descriptor)
        if self._taken:
            if kind is not None:  # what is said about it stands on a line of its own
                with contextlib.suppress(OSError):
                    os.write(self._terminal, b"\r\n")
            with contextlib.suppress(termios.error):  # the terminal has gone
                termios.tcsetattr(self._terminal, termios.TCSANOW, self._modes)

    async def finish(self) -> None:
        """Show what the shell wrote last; it has ended, so all of it is there."""
        while self._read_ours():
            await self._all_shown()
        await self._all_shown()

    async def _all_shown(self) -> None:
        shown = asyncio.create_task(self._shown.wait())
        ends: set[asyncio.Future[Any]] = {shown, self.gone}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        shown.cancel()
        await asyncio.gather(shown, return_exceptions=True)

    def _resize(self) -> None:
        with contextlib.suppress(termios.error):  # either side has gone
            termios.tcsetwinsize(self._ours, termios.tcgetwinsize(self._terminal))

    def _resume(self) -> None:
        """The user's shell takes the terminal back while we are stopped."""
        if self._taken:
            tty.setraw(self._terminal, termios.TCSANOW)
        self._resize()

    def _take(self) -> None:
        self._taken = True
        self._to_show += _HINT.replace("\n", "\r\n").encode()
        tty.setraw(self._terminal, termios.TCSANOW)
        self._loop.add_reader(self._terminal, self._read_terminal)

    def _lost(self) -> None:
        self._loop.remove_reader(self._terminal)
        self._loop.remove_writer(self._terminal)
        if not self.gone.done():
            self.gone.set_result(None)

    # From the shell.

    def _read_ours(self) -> bool:
        """Show what there is to be read; False if there is nothing (more)."""
        if self.gone.done():
            return False
        try:
            data = os.read(self._ours, _CHUNK)
        except BlockingIOError:
            return False
        except OSError:  # EIO: nobody has the other side any more
            self._loop.remove_reader(self._ours)
            return False
        try:
            if not self._taken:
                self._take()
        except termios.error:
            self._lost()
            return False
        self._to_show += data
        self._shown.clear()
        self._loop.remove_reader(self._ours)
        self._show()
        return bool(data)

    def _show(self) -> None:
        try:
            del self._to_show[: os.write(self._terminal, self._to_show)]
        except BlockingIOError:
            pass
        except OSError:
            self._lost()
            return
        if self._to_show:
            self._loop.add_writer(self._terminal, self._show)
            return
        self._loop.remove_writer(self._terminal)
        self._loop.add_reader(self._ours, self._read_ours)
        self._shown.set()

    # To the shell.

    def _read_terminal(self) -> None:
        try:
            data = os.read(self._terminal, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost()
            return
        self._to_type += data
        self._loop.remove_reader(self._terminal)
        self._type()

    def _type(self) -> None:
        try:
            del self._to_type[: os.write(self._ours, self._to_type)]
        except BlockingIOError:
            pass
        except OSError:  # the shell has ended; its answer is on the way
            self._to_type.clear()
        if self._to_type:
            self._loop.add_writer(self._ours, self._type)
            return
        self._loop.remove_writer(self._ours)
        self._loop.add_reader(self._terminal, self._read_terminal)
