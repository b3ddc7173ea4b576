"""The command line as tests run it: in a thread of this process, or the real program with pipes and terminals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    CommandLine = Callable[..., Coroutine[Any, Any, "Outcome"]]


@dataclass
class Outcome:
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # noqa: ANN401 - whatever was printed
        return json.loads(self.out)


async def program(*arguments: str | bytes, stdout: int = PIPE, stderr: int = PIPE) -> Process:
    """The real program; its output goes into pipes unless said otherwise."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sendense_restored.cli",
        *arguments,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm", "COLUMNS": "200"},
        stdin=PIPE,
        stdout=stdout,
        stderr=stderr,
    )


async def ended(process: Process) -> tuple[int, bytes, bytes]:
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out or b"", err or b""


class Terminal:
    """A terminal; ``read`` gives all that a program wrote to it, once the program has ended."""

    def __init__(self) -> None:
        self._reading, self.fd = pty.openpty()

    def read(self) -> str:
        os.close(self.fd)
        parts = []
        with contextlib.suppress(OSError):  # EIO, when the last program has closed it
            while part := os.read(self._reading, 65536):
                parts.append(part)
        os.close(self._reading)
        return b"".join(parts).decode()
