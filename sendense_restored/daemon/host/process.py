"""The only place that says which programs are started, and how.

A program is an absolute path found once at start in a fixed list of directories, an argv list, an environment built
here, stdin from nowhere and descriptors named one by one. How much it may do stands in its ``Jail``: uid,
capabilities, network, memory and processor time. Every child carries a parent-death signal, so that a killed daemon
leaves none behind; children are started from the event loop's (main) thread only, because that signal follows the
thread. What runs is a ``Child``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sendense_restored import errors

from . import mountinfo
from .child import Child, TooMuchOutputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

DIRECTORIES = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
_JAIL_TOOLS = {"prlimit": "util-linux", "setpriv": "util-linux", "unshare": "util-linux", "sh": "dash"}
# $0 is the number of the parent that there should be: go on only if that is still the one.
_WITH_PARENT = '[ "$PPID" = "$0" ] && exec "$@"'
# The same for the guard of a process namespace, and for the first process in there, whose parent has no number but in
# our /proc. That one stays root and as it is, while what it runs may be taken over and could ignore a parent's death.
# Nor does a program expect to be the first, who is safe from most signals and has to wait for orphans. That it says
# "exit" is what keeps the shell there: its last command would take its place otherwise.
_GUARD = '[ "$PPID" = "$0" ] && GUARD=$$ exec "$@"'
_FIRST = """
while read -r key value; do [ "$key" != PPid: ] || break; done </proc/self/status
[ "$value" = "$GUARD" ] || exit
unset GUARD
"$@"
exit $?
"""
# What this shell would say of one that a signal has ended goes nowhere, its status tells. What setsid says of itself
# goes with it.
_FIRST_QUIETLY = _FIRST.replace('"$@"', '{ "$@"; } 2>/dev/null')
# A file that is full is an error (EFBIG) to the program, and not its end.
_BOUNDED = "trap '' XFSZ"
# A session without a terminal gets the one that it opens, unless that has a session; taking it away from one, as root
# may (TIOCSCTTY), would leave its programs without.
_ON_TERMINAL = """exec <>/proc/self/fd/0 >&0 2>&0
(: </dev/tty) 2>/dev/null && exec "$@"
echo 'sendense-restored: this terminal cannot be had, another session has it; make a new one' >&2
exit 126"""
# Lets go of mounts whose copies came with a new namespace: their places stand first, up to a dash.
_WITHOUT = """
while [ "$1" != - ]; do
    umount -i -n --lazy "$1"
    shift
done
shift
exec "$@"
"""
# A root directory in the place $1, with programs and nothing else. All systems that we run on have merged /usr.
_BARE = """
place=$1 links=
shift
mount -i -n -t tmpfs -o nosuid,nodev,noexec,size=64k,mode=0755 sendense "$place"
mkdir "$place/usr" "$place/proc"
mount -i -n --rbind /usr "$place/usr"
mount -i -n --rbind /proc "$place/proc"
[ ! -d /usr/local ] || mount -i -n -t tmpfs -o ro,nosuid,nodev,noexec,size=4k,mode=0755 sendense "$place/usr/local"
for path in /bin /sbin /lib*; do [ ! -L "$path" ] || links="$links usr$path"; done
ln -s -t "$place" -- $links
exec chroot "$place" "$@"
"""
# Makes of the standard input what sd_listen_fds(3) looks for. The process stays the same through exec, so $$ is the
# program's own number. Its input becomes /dev/null, copied from its output, which is open for both: in a bare root
# there is none to open.
_ACTIVATED = 'exec 3<&0 <&1; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
_ACTIVATED_NUMBER = 3


class ToolMissingError(Exception):
    """A program that the daemon cannot work without is not installed; the message names it and its package."""


class ToolError(Exception):
    """A program failed. ``str()`` is for the journal: it holds argv and stderr, never for a client."""

    def __init__(self, argv: Sequence[str], returncode: int | None, stderr: str) -> None:
        how = "was killed" if returncode is None else f"ended with {returncode}"
        super().__init__(f"{shlex.join(argv)} {how}: {stderr.strip() or '(no message)'}")
        self.argv = tuple(argv)
        self.returncode = returncode
        """None if it was killed: its time was up, or it wrote too much."""
        self.stderr = stderr


@dataclass(frozen=True)
class Jail:
    """What a program may do. The default is: nothing but compute.

    ``uid`` also is the gid, with no supplementary groups; ``capabilities`` are lower-case names without ``cap_``,
    and are inheritable, ambient (if ``uid`` is not 0) and the whole bounding set. ``memory`` is RLIMIT_DATA in
    bytes, ``cpu`` is RLIMIT_CPU in seconds, None is unlimited (for servers). ``processes`` is RLIMIT_NPROC: the
    kernel counts the processes and threads that a uid has in all its jails together, so a uid that many jails share
    needs room for all of them. It does not hold root; a program that starts as root and takes a uid of its own (a
    reader) is held by it from then on.
    """

    uid: int
    capabilities: frozenset[str] = frozenset()
    network: bool = False
    own_mounts: bool = False
    """Whether it gets a mount namespace of its own, a copy of ours. A server must: one that is the last to hold a
    namespace takes its mounts down while it dies, and waits for ever for itself if it serves one of them."""
    without: tuple[Path, ...] = ()
    """Places that it lets go of there, with all that is mounted on and below them; ``own_mounts`` only. Needs
    umount(8)."""
    bare: Path | None = None
    """A directory of root's that its own root directory is made in, with nothing but /usr (without /usr/local) and
    /proc; ``own_mounts`` only, and not for one who could leave it again. Needs mount(8)."""
    own_objects: bool = False
    """Whether it has an IPC namespace (ipc_namespaces(7)): System V objects outlive who made them, and would belong
    to a uid that others get."""
    own_processes: bool = False
    """Whether it has a process namespace (pid_namespaces(7)): whatever it has started ends with it. Its ``Child`` is
    a guard."""
    memory: int = 512 << 20
    cpu: int | None = 60
    files: int = 256
    processes: int = 512
    file_size: int | None = None
    """The most bytes that a file may have which it writes to (RLIMIT_FSIZE); beyond that is EFBIG."""

    def __post_init__(self) -> None:
        if (self.without or self.bare) and not self.own_mounts:
            raise ValueError("what it lets go of, or mounts, would be the daemon's as well")
        if self.bare and self.capabilities & {"sys_admin", "sys_chroot", "sys_ptrace"}:
            raise ValueError("it could leave its root directory")


@dataclass(frozen=True)
class Completed:
    """A program that ended with 0, or with a status that the caller said is fine."""

    returncode: int
    stdout: bytes
    stderr: str


@dataclass(frozen=True)
class Tools:
    """The programs that this daemon may start, by name."""

    paths: Mapping[str, str]
    held: int = field(default=-1, kw_only=True)
    """A descriptor for every program that shares our mount namespace, if there is one (``keeper``)."""

    @classmethod
    def find(cls, required: Mapping[str, str], optional: Sequence[str] = ()) -> Tools:
        """Look for programs in ``DIRECTORIES``.

        ``required`` maps a program to the Debian package that has it. Raises ToolMissingError.
        """
        wanted = {**_JAIL_TOOLS, **required}
        paths = {}
        for name in (*wanted, *optional):
            for directory in DIRECTORIES:
                candidate = Path(directory, name)
                if os.access(candidate, os.X_OK):
                    paths[name] = str(candidate)
                    break
        missing = [f"{name} (package {wanted[name]})" for name in wanted if name not in paths]
        if missing:
            raise ToolMissingError(f"not found in {':'.join(DIRECTORIES)}: {', '.join(missing)}; install them")
        return cls(paths)

    def has(self, name: str) -> bool:
        """Whether an optional program is there."""
        return name in self.paths

    def argv(self, jail: Jail, name: str, *arguments: str) -> list[str]:
        """The command line that runs program ``name`` (or, with a slash in it, that very file) in ``jail``.

        The jail is made by util-linux' own tools, one exec after the other, so no Python runs between fork and exec.
        """
        program = name if "/" in name else self.paths[name]
        limits = [f"--data={jail.memory}", f"--nofile={jail.files}", f"--nproc={jail.processes}", "--core=0"]
        if jail.cpu is not None:
            limits.append(f"--cpu={jail.cpu}")
        if jail.file_size is not None:
            limits.append(f"--fsize={jail.file_size}")
        sh, parent = self.paths["sh"], str(os.getpid())
        command = [self.paths["prlimit"], *limits, "--"]
        spaces = [] if jail.network else ["--net"]
        if jail.own_mounts:
            spaces += ["--mount", "--propagation=slave"]
        if jail.own_objects:
            spaces.append("--ipc")
        if jail.own_processes:
            command, parent = self._guarded(command, spaces, _FIRST), "1"
        elif spaces:
            command += [self.paths["unshare"], *spaces, "--"]
        if there := [str(place) for place in jail.without if mountinfo.mounted_on(place) is not None]:
            # While it still may: most programs end up without the right to unmount anything.
            command += [sh, "-euc", _WITHOUT, "sh", *there, "-"]
        if jail.bare is not None:
            command += [sh, "-euc", _BARE, "sh", str(jail.bare)]
        kept = "".join(f",+{capability}" for capability in sorted(jail.capabilities))
        # From here on its parent's death kills it; one that came earlier is found out by the last link of the chain.
        command += [self.paths["setpriv"], "--no-new-privs", "--pdeathsig=KILL", f"--bounding-set=-all{kept}"]
        command.append(f"--inh-caps=-all{kept}")
        if jail.uid != 0:
            command += [f"--ambient-caps=-all{kept}"]
        command += [f"--reuid={jail.uid}", f"--regid={jail.uid}", "--clear-groups", "--"]
        last = _WITH_PARENT if jail.file_size is None else f"{_BOUNDED}\n{_WITH_PARENT}"
        return [*command, sh, "-c", last, parent, program, *arguments]

    def _guarded(self, limits: Sequence[str], spaces: Sequence[str], first: str) -> list[str]:
        """How a command line begins whose program is in a process namespace: guard, namespaces, first process."""
        setpriv, sh, unshare = (self.paths[name] for name in ("setpriv", "sh", "unshare"))
        return [
            *(setpriv, "--pdeathsig=KILL", "--", sh, "-c", _GUARD, str(os.getpid()), *limits),
            *(unshare, *spaces, "--pid", "--fork", "--kill-child=KILL", "--", sh, "-c", first, "sh"),
        ]

    async def run(
        self,
        jail: Jail,
        name: str,
        *arguments: str,
        seconds: float,
        fds: Sequence[int] = (),
        accept: Sequence[int] = (0,),
        environment: Mapping[str, str] | None = None,
    ) -> Completed:
        """Run a program to its end, and to that of all who have its standard output.

        ``fds`` stay open in it under their own numbers. Raises ToolError if it ends with a status that is not in
        ``accept``, or is not done after ``seconds`` or writes too much (it is killed then). Cancelling kills it. One
        that the kernel does not let go is left to itself after a few seconds more.
        """
        child = await self.spawn(jail, name, *arguments, fds=fds, capture=True, environment=environment)
        try:
            async with asyncio.timeout(seconds):
                stdout = await child.output()
                returncode = await child.wait()
        except TimeoutError:
            said = f"no answer in {seconds:g} s; {child.stderr}"
            raise ToolError([name, *arguments], None, said) from None
        except TooMuchOutputError as error:
            raise ToolError([name, *arguments], None, str(error)) from None
        finally:
            await child.close()
        if returncode not in accept:
            raise ToolError([name, *arguments], returncode, child.stderr)
        return Completed(returncode, stdout, child.stderr)

    async def spawn(
        self,
        jail: Jail,
        name: str,
        *arguments: str,
        fds: Sequence[int] = (),
        capture: bool = False,
        environment: Mapping[str, str] | None = None,
        label: str = "",
    ) -> Child:
        """Start a program; whoever calls this owns it and must ``close`` it. Raises OSError.

        ``label`` is what the journal calls it, where a shell starts what is meant.
        """
        if self.held >= 0 and not jail.own_mounts:
            fds = (*fds, self.held)
        argv = self.argv(jail, name, *arguments)
        return await _spawn(
            argv, label or name, fds, capture=capture, environment=environment, guard=jail.own_processes
        )

    async def spawn_listening(
        self, jail: Jail, name: str, *arguments: str, listening: int, fds: Sequence[int] = ()
    ) -> Child:
        """The same for a server that serves a socket which listens already (sd_listen_fds(3), LISTEN_FDS)."""
        if _ACTIVATED_NUMBER in fds or not jail.own_mounts:
            raise ValueError("descriptor 3 will be the socket, and a server has mounts of its own")
        argv = self.argv(jail, "sh", "-euc", _ACTIVATED, "sh", self.paths[name], *arguments)
        return await _spawn(argv, name, fds, guard=jail.own_processes, stdin=listening)

    async def spawn_keeper(self, name: str, *arguments: str, stdin: int) -> Child:
        """Start the one program that outlives the daemon for a moment (``keeper``): no parent-death signal."""
        command = [self.paths["setpriv"], "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        # Root without a capability: whoever has a process's uid can look through its /proc/PID/root, and this one is
        # in the mount namespace where all guests' files are.
        command += ["--clear-groups", "--", self.paths[name], *arguments]
        return await _spawn(command, name, (), stdin=stdin)

    async def spawn_shell(
        self, name: str, *arguments: str, terminal: int, directory: Path, environment: Mapping[str, str]
    ) -> Child:
        """Start the one program that is in no jail (``shell``), on ``terminal``, in ``directory``. Raises OSError.

        The child is a guard that ends as the program does. The program leads a session on ``terminal`` and is in a
        process namespace: when it or the guard ends, the kernel kills all that it has started.
        """
        command = [*self._guarded([], [], _FIRST_QUIETLY), self.paths["setsid"]]
        command += [self.paths["sh"], "-c", _ON_TERMINAL, "sh", self.paths[name], *arguments]
        # Standard error is the guard's; the program has the terminal for all three.
        return await Child.start(
            command,
            Path(name).name,
            guard=True,
            stdin=terminal,
            stdout=asyncio.subprocess.DEVNULL,
            cwd=directory,
            env=dict(environment),
        )


async def _spawn(
    argv: Sequence[str],
    name: str,
    fds: Sequence[int],
    *,
    capture: bool = False,
    environment: Mapping[str, str] | None = None,
    guard: bool = False,
    stdin: int = asyncio.subprocess.DEVNULL,
) -> Child:
    return await Child.start(
        argv,
        Path(name).name,
        guard=guard,
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE if capture else asyncio.subprocess.DEVNULL,
        pass_fds=tuple(fds),
        cwd="/",
        env={"PATH": ":".join(DIRECTORIES), "LC_ALL": "C", **(environment or {})},
    )


def internal(what: str, error: Exception) -> errors.Failed:
    """The error for a client when a program failed for no reason that the client can act on; logs the details."""
    log.error("%s: %s", what, error)
    return errors.Failed(f"{what} failed; the service's journal has the details")
