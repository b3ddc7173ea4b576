"""Processes of the laboratory: each has one owner and does not outlive it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_SECONDS_TO_END = 10.0


@contextlib.contextmanager
def running(
    argv: Sequence[str], *, log: Path, fds: Sequence[int] = (), environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs for as long as the context: asked to end then, killed if it does not.

    What it prints goes to the file ``log``; ``environment`` is added to ours. The kernel kills it if this process
    dies (until it changes its uid, which clears the parent-death signal).
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", "--", *argv],  # noqa: S607 - the machine's own, wherever PATH finds it
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=fds,
            env={**os.environ, **(environment or {})},
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run(*argv: str, input_text: str | None = None) -> str:
    """Run a program to its end and return its output. Raises CalledProcessError with what it said."""
    try:
        return subprocess.run(argv, check=True, capture_output=True, text=True, input=input_text or "").stdout
    except subprocess.CalledProcessError as error:
        error.add_note(error.stderr.strip())
        raise


def guarded(guard: int) -> int:
    """The process id of the program that ``guard`` has in a process namespace (``daemon.host.child.Child``).

    It is the child of the first process there, which is the guard's.
    """
    return first_child(first_child(guard))


def first_child(pid: int) -> int:
    """The process id of the oldest child of a process. Raises IndexError if it has none."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()[0])
