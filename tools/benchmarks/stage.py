"""What the measurements stand on: bus, polkit, a member of the group, daemons and workers.

The stage is a context manager that owns a directory with everything in it; daemons and workers are context managers
of their own, and each measurement makes its own daemon, so that none sees the traces of another in its memory. Root,
inside ``namespace.enter``.
"""

from __future__ import annotations

import compileall
import contextlib
import functools
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from sendense_restored import linux
from tools.lab import bus, children, leftovers, namespace
from tools.lab.people import People, people
from tools.lab.service import service

from . import material
from .figures import MeasurementError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.lab.people import Person

_STEPS = Path(__file__).with_name("mount_steps.sh")
_PLACE = Path("/run/bench")
_SECONDS = 900.0
"""The most that one task may take; only keeps a run from hanging."""
_LAST_LINES = 40


class Worker:
    """A running ``worker.py``; ends with its standard input."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """Have it do a task. Raises MeasurementError if it cannot."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise MeasurementError(f"{do}: the measuring process has ended") from None
        answer: dict[str, Any] = json.loads(_line(self._process.stdout, do) or b'{"error": "it has ended"}')
        if "error" in answer:
            raise MeasurementError(f"{do}: {answer['error']}")
        return answer

    def seconds(self, do: str, **arguments: object) -> float:
        """How long a task took."""
        return float(self.ask(do, **arguments)["seconds"])


class Running:
    """A daemon with a catalogue, and who works with it."""

    def __init__(self, pid: int, member: Worker, root: Worker, bare: Worker, repository: Path) -> None:
        self.pid, self.member, self.bare = pid, member, bare
        self._root = root
        self.chains: dict[str, list[str]] = root.ask("catalogue", path=str(repository))["chains"]

    @contextlib.contextmanager
    def mounted(self, backup: str) -> Iterator[str]:
        """The object of a mount that the member holds."""
        mount: str = self.member.ask("mount", backup=backup)["mount"]
        yield mount
        self.member.ask("unmount", mount=mount)

    def place(self, mount: str, path: str) -> str:
        """Where a guest path lies for the bare tools of root: the mounts are in the daemon's namespace."""
        return f"/proc/{self.pid}/root{self._root.ask('place', mount=mount)['path']}{path}"

    def readers(self) -> list[int]:
        """The pids of the readers."""
        return [pid for pid in _children(self.pid) if b"sendense_restored.reader" in _command_line(pid)]


@dataclass(frozen=True)
class Steps:
    """The shell script's times, in seconds."""

    mount: float
    unmount: float


class Stage:
    """Everything but the daemon."""

    def __init__(self, directory: Path, people: People, system_bus: bus.PrivateBus, *, quick: bool) -> None:
        self._directory, self._people, self._bus, self._quick = directory, people, system_bus, quick
        self._number = 0

    @functools.cached_property
    def four_volumes(self) -> tuple[material.Repository, list[tuple[int, int, str]]]:
        """See ``material``."""
        return material.four_volumes(self._directory / "four")

    @functools.cached_property
    def tree(self) -> material.Repository:
        """Directories of 1000, 10,000 and 100,000 entries (quick: not the last), and a GiB (quick: 64 MiB)."""
        sizes, blob = ((1000, 10_000), 64 << 20) if self._quick else ((1000, 10_000, 100_000), 1 << 30)
        return material.tree(self._directory / "tree", sizes, blob)

    @functools.cached_property
    def crowd(self) -> material.Repository:
        """A directory of a million entries (quick: 20,000)."""
        return material.tree(self._directory / "crowd", (self.most,), 1 << 20)

    @property
    def most(self) -> int:
        """How many entries the directory of ``crowd`` has."""
        return 20_000 if self._quick else 1_000_000

    def fresh(self) -> Path:
        """A new directory on the disk that the material lies on."""
        self._number += 1
        path = self._directory / f"fresh-{self._number}"
        path.mkdir(mode=0o700)
        return path

    @contextlib.contextmanager
    def daemon(self, repository: material.Repository, settings: str = "") -> Iterator[Running]:
        """A fresh daemon whose catalogue has that repository."""
        with contextlib.ExitStack() as stack:
            # As the script does it that is beside it; where the kernel has NBD, the service would take that.
            fuse = '[attach]\nbackend = "fuse"\n'
            running = stack.enter_context(service(self._bus, self.fresh(), fuse + settings))
            member = stack.enter_context(self._worker("caller", self._people.member))
            root, bare = stack.enter_context(self._worker("caller")), stack.enter_context(self._worker("bare"))
            try:
                yield Running(running.pid, member, root, bare, repository.path)
            except MeasurementError:
                lines = running.log.read_text(encoding="utf-8", errors="replace").splitlines()
                print("\nthe daemon's log ends with:", *lines[-_LAST_LINES:], sep="\n  ", file=sys.stderr)
                raise

    @contextlib.contextmanager
    def _worker(self, kind: str, person: Person | None = None) -> Iterator[Worker]:
        # The checkout may lie where only root can go.
        checkout = _PLACE / "checkout"
        python = str(checkout / Path(sys.executable).relative_to(bus.CHECKOUT))
        argv = [python, "-s", "-P", "-m", "tools.benchmarks.worker", kind]
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "PYTHONPATH": str(checkout)}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        process = subprocess.Popen(
            person.command(*argv) if person else argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env=environment | self._bus.environment,
        )
        with process:
            try:
                yield Worker(process)
            except BaseException:
                process.kill()
                raise

    def steps(self, image: Path, partitions: list[tuple[int, int, str]]) -> Steps:
        """Run ``mount_steps.sh`` once; without partitions it looks for them itself."""
        self._number += 1
        work = _PLACE / f"steps-{self._number}"
        work.mkdir()
        told = [str(value) for partition in partitions for value in partition]
        argv = ["sh", str(_STEPS), str(image), str(work), *told]
        started = time.perf_counter()
        # The script takes everything away when its input ends, which leaving the context sees to.
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as script:
            assert script.stdin is not None
            assert script.stdout is not None
            said = _line(script.stdout, "the shell script")
            mounted = time.perf_counter()
            script.stdin.close()
            script.wait(_SECONDS)
            ended = time.perf_counter()
        if said != b"mounted\n" or script.returncode:
            raise MeasurementError(f"the shell script ended with {script.returncode}")
        return Steps(mounted - started, ended - mounted)

    @classmethod
    @contextlib.contextmanager
    def open(cls, *, quick: bool) -> Iterator[Self]:
        """A bus, polkit and users, with a directory below ``/var/tmp`` that is removed in the end."""
        # As a package installs it: without, each reader would compile its modules at its start.
        compileall.compile_dir(bus.CHECKOUT / "sendense_restored", quiet=1)
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp")))
            _PLACE.mkdir(mode=0o755)
            namespace.publish(bus.CHECKOUT, _PLACE / "checkout")
            stack.callback(linux.umount, _PLACE / "checkout", linux.MNT_DETACH)
            users = stack.enter_context(people(_PLACE))
            system_bus = stack.enter_context(bus.private_bus(_PLACE))
            stack.enter_context(bus.polkit(system_bus, _PLACE))
            yield cls(directory, users, system_bus, quick=quick)


def _line(stream: IO[bytes], who: str) -> bytes:
    """The next line, empty at the end. Raises MeasurementError if none comes in time."""
    if not select.select([stream], [], [], _SECONDS)[0]:
        raise MeasurementError(f"{who}: nothing came within {_SECONDS:g} s")
    return stream.readline()


def status(pid: int, field: str) -> int:
    """A number of ``/proc/PID/status``: bytes for sizes."""
    return status_number(Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), field)


def status_number(text: str, field: str) -> int:
    """The same from the file's text. Raises MeasurementError if the kernel does not tell."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            number, _, unit = value.strip().partition(" ")
            return int(number) * (1024 if unit == "kB" else 1)
    raise MeasurementError(f"this kernel does not tell {field} of a process")


def switches(pid: int) -> int:
    """Context switches of all threads of a process so far."""
    fields = ("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
    texts = [file.read_text(encoding="utf-8") for file in Path(f"/proc/{pid}/task").glob("*/status")]
    return sum(status_number(text, field) for text in texts for field in fields)


def forget_peak(pid: int) -> None:
    """Have VmHWM of a process begin anew, from what it holds now (proc_pid_clear_refs(5))."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


def _children(pid: int) -> list[int]:
    return [int(identity.removeprefix("process ")) for identity in leftovers.children_of(pid)]


def _command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")


def machine() -> list[tuple[str, str]]:
    """What the numbers were measured on: names and values, none of which names the host."""
    cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in cpus if line.startswith("model name")), os.uname().machine
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    system = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    name = next((line.partition("=")[2].strip('"') for line in system if line.startswith("PRETTY_NAME=")), "Linux")
    qemu = children.run("qemu-img", "--version").splitlines()[0].removeprefix("qemu-img version ")
    # Numbers alone: what builders add to a version may name them, or the machine.
    kernel = re.match(r"[\d.]*\d", os.uname().release)
    return [
        ("Processor", f"{model}, {os.cpu_count()} cores"),
        ("Memory", f"{memory / 1e9:.0f} GB"),
        ("System", f"{name}, Linux {kernel[0] if kernel else ''}".strip()),
        ("Python", sys.version.split()[0]),
        ("QEMU", qemu.partition(" ")[0]),
        ("Disks", "FUSE and loop devices, which every kernel has, on both sides"),
    ]
