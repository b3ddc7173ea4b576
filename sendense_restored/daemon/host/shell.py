"""A root shell among the mounts, which exist in the daemon's mount namespace only.

The shell is a child of the daemon on a pseudo-terminal that the caller made and keeps the other side of. Its owner
is the call that asked for it. It ends when its user leaves it, when the call is cancelled, and with the daemon,
however that ends; a caller that closes the terminal hangs it up (SIGHUP). It has a process namespace of its own, so
that with it the kernel kills all that was ever started in it: no job in the background, however detached, keeps the
mount namespace and with it a mount alive. The price: the process ids that tools read from /proc are the host's, and
signals from inside reach the shell's own processes only, by their own numbers (``$!``, ``%1``).
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from typing import TYPE_CHECKING, Final

from sendense_restored import errors

if TYPE_CHECKING:
    from pathlib import Path

    from .child import Child
    from .process import Tools

log = logging.getLogger(__name__)

REQUIRED_TOOLS: Final = {"setpriv": "util-linux", "unshare": "util-linux", "setsid": "util-linux", "sh": "dash"}
OPTIONAL_TOOLS: Final = ("bash",)
_MOST = 4
_PSEUDO_TERMINALS = range(136, 144)
"""Major numbers of the sides that programs get (Documentation/admin-guide/devices.txt: Unix98 PTY slaves)."""
_NO_TERM = "dumb"

# What a login would set, and nothing of the daemon's. No history: the names in a guest are nobody's business later.
_ENVIRONMENT: Final = {
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HISTFILE": "",
    "LESSHISTFILE": "-",
}
_BASH: Final = ("bash", "--noprofile", "--norc", "-i")
"""root's own start-up files would take the prompt away that says where one is."""
_BASH_PROMPT = r"sendense-restore:\w\$ "
_SH: Final = ("sh", "-i")
_SH_PROMPT = "sendense-restore# "


class Shells:
    """All shells of the daemon. They start in ``directory``."""

    def __init__(self, tools: Tools, directory: Path) -> None:
        self._tools, self._directory = tools, directory
        self._starting = 0
        self._running: dict[int, Child] = {}
        self._closed = False

    async def run(self, terminal: int, *, term: str) -> int:
        """Run a shell on ``terminal`` to its end; its exit status, 128 + n after signal n.

        ``terminal`` stays the caller's, and open until this returns. ``term`` is its kind, "" for unknown. Raises
        InvalidOption, LimitReached, Unavailable, Failed. Cancelling ends the shell and all that was started in it.
        """
        _check_terminal(terminal)
        if term and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+._-]{0,63}", term):
            raise errors.InvalidOption("term is no name of a kind of terminal; give what the variable TERM holds")
        if self._closed:
            raise errors.Unavailable("the service is stopping; try again in a moment")
        if self._starting + len(self._running) >= _MOST:
            raise errors.LimitReached(f"{_MOST} shells are open in the service; leave one of them")
        child = await self._start(terminal, term)
        log.info("shell[%d] on %s", child.pid, _name(terminal))
        try:
            status = await child.wait()
        finally:
            del self._running[child.pid]
            # It is not asked first: the files that it works with are about to go.
            await child.close()
        if child.stderr:  # of its guard: the shell's own is the terminal
            log.error("shell[%d] ended with %d: %s", child.pid, status, child.stderr)
            raise errors.Failed("the shell was not started or was killed; the service's journal has the details")
        status = 128 - status if status < 0 else status
        log.info("shell[%d] ended with %d", child.pid, status)
        return status

    async def _start(self, terminal: int, term: str) -> Child:
        bash = self._tools.has("bash")
        environment = {
            **_ENVIRONMENT,
            "TERM": term or _NO_TERM,
            "SHELL": self._tools.paths["bash" if bash else "sh"],
            "PS1": _BASH_PROMPT if bash else _SH_PROMPT,
        }
        self._starting += 1
        try:
            child = await self._tools.spawn_shell(
                *(_BASH if bash else _SH), terminal=terminal, directory=self._directory, environment=environment
            )
        except OSError as error:
            log.error("no shell: %s", error)  # noqa: TRY400 - the error says it all
            raise errors.Failed("the shell cannot be started; the service's journal has the details") from None
        finally:
            self._starting -= 1
        self._running[child.pid] = child
        if self._closed:
            child.kill()
        return child

    async def close(self) -> None:
        """Kill all shells; no more are started. May be called again."""
        self._closed = True
        for child in tuple(self._running.values()):
            await child.close()


def _check_terminal(terminal: int) -> None:
    """Raises InvalidOption unless it is the right side of a pseudo-terminal, for reading and writing.

    Only such a one is hung up when its owner goes away; a console or a serial line would keep the shell for ever.
    """
    is_terminal = os.isatty(terminal) and os.major(os.fstat(terminal).st_rdev) in _PSEUDO_TERMINALS
    if not is_terminal or fcntl.fcntl(terminal, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise errors.InvalidOption(
            "a shell needs a pseudo-terminal, the programs' side of it, open for reading and writing; make a new one"
        )


def _name(terminal: int) -> str:
    try:
        return os.ttyname(terminal)
    except OSError:
        return "a terminal that is not in our /dev"
