"""What is mounted in the daemon's own namespace, and the news that it changed.

``/proc/self/mountinfo`` (proc_pid_mountinfo(5)) is the one truth about mounts; reading it touches no file system, so
it never waits for one that hangs.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

_FILE: Final = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo."""

    id: int
    root: str
    path: str
    options: frozenset[str]
    """Flags of this mount (``ro``, ``nodev``, ...)."""
    filesystem: str
    source: str
    super_options: frozenset[str]
    """Options of the file system itself."""


def parse(text: str) -> tuple[Mount, ...]:
    """The mounts in the text of a mountinfo file, in its order: one that covers another comes later."""
    mounts = []
    # Not splitlines(): paths are anybody's, and the kernel leaves as they are the other characters that it splits at.
    for line in text.split("\n")[:-1]:
        # id parent major:minor root path options [optional ...] - type source super-options
        before, _, after = line.partition(" - ")
        fields, (filesystem, source, super_options) = before.split(" "), after.split(" ", 2)
        mounts.append(
            Mount(
                id=int(fields[0]),
                root=_unescaped(fields[3]),
                path=_unescaped(fields[4]),
                options=frozenset(fields[5].split(",")),
                filesystem=filesystem,
                source=_unescaped(source),
                super_options=frozenset(super_options.split(",")),
            )
        )
    return tuple(mounts)


def _unescaped(field: str) -> str:
    """Spaces, tabs, line feeds and backslashes are written in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def current() -> tuple[Mount, ...]:
    """All that is mounted now."""
    return parse(_FILE.read_text(encoding="utf-8", errors="surrogateescape"))


def mounted_on(path: Path) -> Mount | None:
    """What is mounted on ``path`` now, the uppermost if several are."""
    return next((mount for mount in reversed(current()) if mount.path == str(path)), None)


class Watch:
    """Waits for changes of the mount table; made before what makes the change is started."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._descriptor = os.open(_FILE, os.O_RDONLY | os.O_CLOEXEC)
        # The file is always readable; a change shows as POLLERR and POLLPRI, for which the event loop has no call.
        # An epoll of its own asks for these, and is itself readable when they come.
        self._epoll = select.epoll()
        self._epoll.register(self._descriptor, select.EPOLLPRI)
        self._loop.add_reader(self._epoll.fileno(), self._on_change)

    def _on_change(self) -> None:
        self._epoll.poll(0)
        self._changed.set()

    async def appeared(self, path: Path) -> Mount:
        """Wait until something is mounted on ``path``; the caller sets the deadline."""
        while (mount := mounted_on(path)) is None:
            await self._changed.wait()
            self._changed.clear()
        return mount

    def close(self) -> None:
        """Stop watching."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
