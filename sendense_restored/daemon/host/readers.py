"""Starts the processes that touch guest files, and lends each a uid of the configured range.

Each mount has one reader, a child with a uid of its own that gives up everything else at its start (``reader/``, in
the package); ``reader.Reader`` is what the daemon has of it. Its uid is free again when the process is really gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sendense_restored import errors
from sendense_restored.reader import protocol

from .process import Jail, ToolError, internal
from .reader import Reader
from .uids import Uids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sendense_restored.config import Config

    from .child import Child
    from .process import Tools

_FDS_OF_STREAM = 56
"""What one stream may have open: 24 directories, twice each, and its pipe (``reader/stream.py``)."""

_PACKAGE_PARENT = str(Path(__file__).parents[3])

# What the reader's own confinement takes; it ends with dac_read_search alone. It leaves the host's network itself,
# together with the other namespaces, so the jail need not.
_JAIL = Jail(
    uid=0,
    capabilities=frozenset({"dac_read_search", "setgid", "setpcap", "setuid", "sys_admin", "sys_chroot"}),
    network=True,
    memory=256 << 20,
    cpu=None,
    files=1024 + protocol.MAX_STREAMS * _FDS_OF_STREAM,
)


class Readers:
    """Starts readers, and lends each a uid of the configured range."""

    def __init__(
        self, tools: Tools, config: Config, *, program: Sequence[str] = ("-m", "sendense_restored.reader")
    ) -> None:
        """``program`` is what Python runs; tests put a compromised reader there."""
        self._tools = tools
        self._config = config
        self._program = program
        self._uids = Uids(config.readers.uids)
        self._running: set[int] = set()

    @property
    def uids_free(self) -> int:
        """How many more readers there can be."""
        return self._uids.free

    @property
    def pids(self) -> set[int]:
        """The readers that run."""
        return set(self._running)

    async def start(self, mount_id: str) -> Reader:
        """Start a reader and wait until it is confined; whoever calls this owns it.

        The mount's directory (``mounts.directory/<mount_id>``) must exist: it becomes the reader's root, because
        from the root of a volume ``..`` leads to where it is mounted, and on up to the root of the process.
        Raises LimitReached if no uid is free, Failed if the process does not come up.
        """
        if not self._uids.free:
            raise errors.LimitReached("no uid is free for another reader; unmount something or widen readers.uids")
        uid = self._uids.take()
        with contextlib.ExitStack() as undo:
            undo.callback(self._uids.give_back, uid)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(ours.close)
            with theirs:
                try:
                    root = os.open(self._config.mounts.directory / mount_id, os.O_PATH | os.O_DIRECTORY)
                    undo.callback(os.close, root)
                    child = await self._spawn(theirs.fileno(), root, uid, mount_id)
                except OSError as failure:
                    raise internal("starting the mount's reader", failure) from None
            undo.pop_all()
        seconds = self._config.readers.timeout
        self._running.add(child.pid)

        def gone() -> None:
            self._running.discard(child.pid)
            self._uids.give_back(uid)

        reader = Reader(child, uid, ours, root, seconds=seconds, gone=gone)
        try:
            await reader.ready()
        except errors.RestoreError as failure:
            await reader.close()
            details = ToolError([child.name], None, child.stderr or failure.message)
            raise internal("starting the mount's reader", details) from None
        except asyncio.CancelledError:
            await reader.close()
            raise
        return reader

    async def _spawn(self, descriptor: int, root: int, uid: int, mount_id: str) -> Child:
        # -s -P: no modules from the user's or the current directory; -B: root writes no bytecode.
        python = (sys.executable, "-s", "-P", "-B", "-X", "utf8", *self._program)
        numbers = map(str, (descriptor, root, uid, os.getpid()))
        return await self._tools.spawn(
            _JAIL,
            *(*python, *numbers, str(self._config.paths.runtime), mount_id),
            fds=[descriptor, root],
            environment={"PYTHONPATH": _PACKAGE_PARENT},
        )
