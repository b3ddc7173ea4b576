"""A person at a terminal: a program there, an agent of polkit's that asks for passwords, and what is typed."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.vm.appliance import TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

# The program begins when the agent is registered, which closes its end of the pipe then. What the agent asks for goes
# to the terminal itself.
_WITH_AGENT = 'exec 3< <(exec pkttyagent --process $$ --notify-fd 1); cat <&3 >/dev/null; exec 3<&- "$@"'
_ASKS = "Password: "


class Terminal:
    """A program in a terminal of its own, from ``terminal``."""

    def __init__(self, program: Any) -> None:  # noqa: ANN401 - pexpect has no types
        self._program = program

    @property
    def ended(self) -> bool:
        return not self._program.isalive()

    def asked(self) -> str:
        """Wait until a password is asked for; what was printed before."""
        self._program.expect_exact(_ASKS)
        # The agent throws away what is typed before it has switched the echo off.
        assert self._program.waitnoecho(), "the password would be seen"
        return str(self._program.before)

    def type(self, line: str) -> None:
        self._program.sendline(line)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._program.sendintr()

    def end(self) -> tuple[int, str]:
        """Wait until the program has ended; its exit status, and what was printed since it last asked."""
        import pexpect  # noqa: PLC0415 - only in the machine

        self._program.expect(pexpect.EOF)
        self._program.wait()
        return self._program.exitstatus, str(self._program.before)


@contextmanager
def terminal(user: str, *command: str, agent: bool = True) -> Iterator[Terminal]:
    """Start a program as ``user``, with an agent for it alone."""
    import pexpect  # noqa: PLC0415 - only in the machine

    wrapped = ("/bin/bash", "-c", _WITH_AGENT, "bash", *command) if agent else command
    program = pexpect.spawn(
        "/usr/sbin/runuser",
        ["-u", user, "--", *wrapped],
        timeout=TIMEOUT,
        encoding="utf-8",
        dimensions=(50, 200),
        env={**os.environ, "TERM": "dumb", "LC_ALL": "C.UTF-8"},
    )
    try:
        yield Terminal(program)
    finally:
        program.close(force=True)  # the agent goes with its terminal
