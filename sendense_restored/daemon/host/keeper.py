"""Keeps the mount namespace until the servers in it are gone.

When the daemon is killed, its mounts end with the last process in its mount namespace, in the exit of that very
process. If that is a FUSE server whose file system is one of them, the kernel waits there for an answer which only
the dying server could give (of a fuseblk mount it asks for FUSE_DESTROY, without a way to interrupt it): the process
can never end, nor can anything that touches those mounts. The image servers are out of this, because they have mount
namespaces of their own; ntfs-3g has to mount where the daemon sees it.

So there is one more process in the namespace, which does nothing but wait for the end of a pipe. The daemon and every
child that shares its namespace hold the other end (``Tools.held``); when the last of them is gone, the namespace goes
with the keeper.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from .child import Child
    from .process import Tools

log = logging.getLogger(__name__)

# Seconds; more than a killed child takes, unless a device or a server does not answer it.
_GRACE = 5.0

REQUIRED_TOOLS: Final = {"env": "coreutils", "cat": "coreutils"}


class Keeper:
    """The waiting process. ``held`` is the descriptor that children inherit."""

    def __init__(self, child: Child, held: int) -> None:
        self._child = child
        self.held = held
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done, with a reason, when it ended though nobody let it go."""
        self._watch = asyncio.create_task(self._follow(), name="watch the keeper")

    @classmethod
    async def start(cls, tools: Tools) -> Self:
        """Start it, in the namespace of this process. Raises OSError."""
        reading, held = os.pipe2(os.O_CLOEXEC)
        try:
            # A service manager that stops the daemon, or aborts one that hangs, signals its children too; this one
            # has to be the last.
            child = await tools.spawn_keeper("env", "--ignore-signal=TERM,INT,HUP,ABRT", "cat", stdin=reading)
        except BaseException:
            os.close(held)
            raise
        finally:
            os.close(reading)
        return cls(child, held)

    async def _follow(self) -> None:
        status = await self._child.wait()
        if self.held >= 0 and not self.lost.done():
            self.lost.set_result(f"the process that keeps the mount namespace ended with {status}")

    async def close(self) -> None:
        """Let it go; it ends when the last server has ended. May be called again."""
        if self.held >= 0:
            os.close(self.held)
            self.held = -1
        try:
            async with asyncio.timeout(_GRACE):
                await self._child.wait()
        except TimeoutError:
            log.warning("a child does not end, so the mount namespace stays for now")
            self._watch.cancel()
        await asyncio.wait([self._watch])
        self.lost.cancel()
