"""A running program and its end.

A ``Child`` has one owner, who waits for it and closes it. It is started by ``process`` alone, which knows the command
lines: here is nothing that confines a program.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sendense_restored import names

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

_MOST_OUTPUT = 4 << 20
# A killed child ends at once, unless the kernel holds it in an uninterruptible wait for a device or a server.
_GRACE = 5.0  # seconds
_LAST_WORDS = 0.5  # seconds
_STREAM = 64 << 10  # bytes that are read ahead, as asyncio's own function has it
_STDERR_LINES = 40
# The event loop itself holds tasks by weak references only.
_FOLLOWED: set[asyncio.Task[Any]] = set()


class TooMuchOutputError(Exception):
    """A program wrote more than anything that we run has to say."""


class _Protocol(asyncio.subprocess.SubprocessStreamProtocol):
    """Tells of the end of the process itself.

    ``Process.wait`` of Python 3.11 waits for the ends of its pipes as well, and what a program has left behind may
    hold those for ever. ``create_subprocess_exec`` takes no protocol, so ``Child.start`` does what it does.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=_STREAM, loop=loop)
        self.exited: asyncio.Future[None] = loop.create_future()

    def process_exited(self) -> None:
        super().process_exited()
        if not self.exited.done():  # whoever waited has been cancelled, with all tasks
            self.exited.set_result(None)


_Followed = TypeVar("_Followed", bound="asyncio.Task[Any]")


def _followed(task: _Followed) -> _Followed:
    """Hold a task to its end."""
    _FOLLOWED.add(task)
    task.add_done_callback(_FOLLOWED.discard)
    return task


@dataclass
class Child:
    """A running program with one owner.

    Its stderr is read all the time (a full pipe would stop it); the last lines are kept for the error message.
    """

    name: str
    _transport: asyncio.SubprocessTransport
    _protocol: _Protocol
    guard: bool = field(default=False, kw_only=True)
    """Whether the process is the guard of a process namespace: the parent of its first process, which runs the
    program. It ends when all in there have ended, with the program's exit status, 128 + n after signal n."""
    _lines: deque[str] = field(default_factory=lambda: deque(maxlen=_STDERR_LINES))

    @classmethod
    async def start(cls, argv: Sequence[str], name: str, *, guard: bool = False, **options: Any) -> Self:  # noqa: ANN401
        """Start a process in a session of its own; ``options`` are those of ``subprocess.Popen``.

        Raises OSError. Cancelling ends what was started. It returns when that has ended, but not if the kernel does
        not let it go (``close``), or if it is cancelled once more: it is waited for in the background then.
        """
        loop = asyncio.get_running_loop()
        starting = asyncio.ensure_future(
            loop.subprocess_exec(
                lambda: _Protocol(loop), *argv, stderr=asyncio.subprocess.PIPE, start_new_session=True, **options
            )
        )
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The library would kill this one process, and a guard would end before what it guards. In a task, because
            # the caller may be cancelled once more.
            await asyncio.wait(
                {_followed(asyncio.create_task(cls._end(starting, name, guard=guard), name=f"end {name}"))}
            )
            raise
        return cls(name, *starting.result(), guard=guard)

    @classmethod
    async def _end(
        cls, starting: asyncio.Future[tuple[asyncio.SubprocessTransport, _Protocol]], name: str, *, guard: bool
    ) -> None:
        await asyncio.wait({starting})
        if not starting.cancelled() and starting.exception() is None:
            await cls(name, *starting.result(), guard=guard).close()

    def __post_init__(self) -> None:
        self._closed = False
        self.process = asyncio.subprocess.Process(self._transport, self._protocol, asyncio.get_running_loop())
        self._ended = _followed(asyncio.create_task(self._follow(), name=f"{self.name}[{self.pid}]"))

    @property
    def pid(self) -> int:
        """The program's process id, as the jail's tools replace each other by exec; of a guarded one, the guard's."""
        return self.process.pid

    @property
    def stderr(self) -> str:
        """The last lines that it wrote to stderr."""
        return "\n".join(self._lines)

    @property
    def ended(self) -> bool:
        """Whether it has ended and was waited for."""
        return self._ended.done()

    async def _follow(self) -> int:
        reading = asyncio.create_task(self._read_stderr(), name=f"stderr of {self.name}[{self.pid}]")
        await self._protocol.exited
        status = self.process.returncode
        assert status is not None
        # Its last words are in the pipe already, and take a moment to be read. The pipe's end may never come: a
        # process that it has left behind may hold the other side.
        await asyncio.wait({reading}, timeout=_LAST_WORDS)
        reading.cancel()
        await asyncio.wait({reading})
        return status

    async def _read_stderr(self) -> None:
        stream = self.process.stderr
        assert stream is not None
        rest = b""
        try:
            while chunk := await stream.read(4096):
                *lines, rest = (rest + chunk)[-65536:].split(b"\n")
                self._lines.extend(map(_shown, lines))
        finally:
            if rest:
                self._lines.append(_shown(rest))

    async def output(self) -> bytes:
        """All that it writes to stdout, at most 4 MiB; beyond that it is killed. Raises TooMuchOutputError."""
        assert self.process.stdout is not None
        parts, total = [], 0
        while chunk := await self.process.stdout.read(65536):
            total += len(chunk)
            if total > _MOST_OUTPUT:
                self.kill()
                raise TooMuchOutputError(f"wrote more than {_MOST_OUTPUT} bytes")
            parts.append(chunk)
        return b"".join(parts)

    async def wait(self) -> int:
        """Its exit status; after a signal -n, as subprocess has it, or 128 + n if it is guarded.

        Cancelling does not touch the program.
        """
        return await asyncio.shield(self._ended)

    async def ends_within(self, seconds: float) -> bool:
        """Wait for its end, but so many seconds at most; whether it has ended."""
        await asyncio.wait({self._ended}, timeout=seconds)
        return self.ended

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        # Not the library's way: that may reap the child on the side, and its status is lost then. As long as there is
        # no status, nobody has reaped it (the loop does, by a pidfd: see main), so the number is still its own.
        if self.process.returncode is None and not (self.guard and self._kill_guarded()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # it leads a session: what it has started goes along

    def _kill_guarded(self) -> bool:
        """Kill the first process of the namespace, if there is one yet.

        It ends after all others in there, and the guard after it. Killed itself, the guard would take them along, and
        not wait for that.
        """
        listing = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        try:
            for pid in listing.read_text(encoding="ascii").split():
                pidfd = os.pidfd_open(int(pid))
                try:
                    if pid in listing.read_text(encoding="ascii").split():  # it is still the same one
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                        os.kill(self.pid, signal.SIGCONT)  # a guard that somebody has stopped would not wait for it
                        return True
                finally:
                    os.close(pidfd)
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has just ended, and the guard is about to
        except OSError as error:  # most likely no descriptors are left
            log.warning("killing the guard of %s[%d] in the place of its program: %s", self.name, self.pid, error)
        return False

    async def close(self) -> bool:
        """Kill it if it still runs, and wait until the kernel has taken it away; may be called again.

        False if the kernel does not let it go (a device or server that does not answer): it is waited for in the
        background then, however long that takes.
        """
        self.kill()
        if not self._closed:
            self._closed = True
            self._ended.add_done_callback(self._let_go)
        # asyncio.wait leaves the task alone if the caller is cancelled: an unwaited child would stay as a zombie.
        await asyncio.wait({self._ended}, timeout=_GRACE)
        if not self.ended:
            log.error("%s[%d] was killed and does not end: what it waits for does not answer", self.name, self.pid)
        return self.ended

    def _let_go(self, _: object) -> None:
        # Nobody reads from it any more, and what it has left behind may hold the other sides of its pipes for ever. A
        # transport whose process runs would kill that, and not what it guards.
        if self.process.returncode is not None:
            self._transport.close()


def _shown(line: bytes) -> str:
    """A line for the journal: what a tool says may hold a guest's labels and names."""
    return names.displayable(line.decode(errors="replace"))[:500]
