"""The rig for virtual machines, without one: what it reports when machines and tests end as they should not."""

from __future__ import annotations

import ast
import contextlib
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tools.lab.guest import Backup, Chain
from tools.lab.vm import backups, image, inside, outside, project, qemu, runner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path("/tests/vm")
Messages = list[dict[str, Any]]


# --- outside --------------------------------------------------------------------------------------------------------


def report(test: str, outcome: str = "passed", when: str = "call", text: str = "", **more: object) -> dict[str, Any]:
    fields: dict[str, object] = {
        "duration": 1.0,
        "expected": None,
        "sections": [],
        "text": text,
        "when": when,
        "outcome": outcome,
    }
    return {"event": "report", "test": test, **fields, **more}


def ended(test: str) -> dict[str, Any]:
    return {"event": "end", "test": test}


class FakeMachine:
    """Tells what it was given, then it has hung."""

    def __init__(self, messages: Messages) -> None:
        self.left = deque(messages)
        self.closed = False
        self.patience: list[float] = []

    def message(self, *, silence: float) -> dict[str, Any]:
        self.patience.append(silence)
        if not self.left:
            raise qemu.MachineError("the virtual machine said nothing")
        return self.left.popleft()

    def last_words(self) -> str:
        return "its last words"

    def close(self) -> None:
        self.closed = True


@dataclass
class Run:
    """A run of pytest with an ``Outside``, as far as that looks at it."""

    tests: tuple[tuple[str, str], ...]
    """Name and release, in order."""
    machines: list[FakeMachine]
    """Those that are booted, one after the other."""
    agendas: list[project.Agenda] = field(default_factory=list)
    reports: list[pytest.TestReport] = field(default_factory=list)
    markers: set[str] = field(default_factory=set)
    """Of each test."""

    def __post_init__(self) -> None:
        self.plugin = outside.Outside(HERE)
        ihook = SimpleNamespace(
            pytest_runtest_logstart=lambda **_: None,
            pytest_runtest_logfinish=lambda **_: None,
            pytest_runtest_logreport=self._reported,
        )
        session = SimpleNamespace(items=[])
        session.items += [
            SimpleNamespace(
                nodeid=f"{name}[{release}]",
                location=("test_it.py", 3, name),
                keywords={name: 1},
                path=HERE / "test_it.py",
                callspec=SimpleNamespace(params={"debian": release}),
                session=session,
                config=SimpleNamespace(getoption=lambda _: False),
                ihook=ihook,
                get_closest_marker=lambda name: name if name in self.markers else None,
            )
            for name, release in self.tests
        ]
        self.items = session.items

    def _reported(self, *, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def go(self) -> list[tuple[str, str]]:
        """Run all; each report's test and outcome."""
        for item, following in zip(self.items, [*self.items[1:], None], strict=True):
            assert self.plugin.pytest_runtest_protocol(cast("pytest.Item", item), following) is True
        self.plugin.pytest_sessionfinish()
        return [(each.nodeid, each.outcome) for each in self.reports]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    def make(*tests: tuple[str, str], machines: list[Messages]) -> Run:
        run = Run(tests, [FakeMachine(messages) for messages in machines])
        booted = iter(run.machines)

        def booted_with(processors: int) -> FakeMachine:
            assert processors > 0
            return next(booted)

        monkeypatch.setattr(qemu, "VirtualMachine", lambda *_, processors: booted_with(processors))
        monkeypatch.setattr(project, "make_disk", lambda *arguments: run.agendas.append(arguments[-1]))
        return run

    monkeypatch.setattr(qemu, "may_run", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    monkeypatch.setattr(backups, "make", lambda _: None)
    monkeypatch.setattr(project, "build_packages", lambda directory: directory)
    monkeypatch.setattr(image, "get", lambda _: None)
    return make


def test_reports_of_a_machine_are_those_of_the_run(rig: Callable[..., Run]) -> None:
    told = [
        {"event": "boot", "again": False},
        {"event": "start", "test": "a[13]"},
        report("a[13]", when="setup"),
        report("a[13]", "failed", text="assert 1 == 2", sections=[["journal", "it said so"]]),
        ended("a[13]"),
        report("b[13]", "skipped", when="setup", text="Skipped: not today"),
        ended("b[13]"),
        {"event": "done"},
    ]
    run = rig(("a", "13"), ("b", "13"), machines=[told])
    assert run.go() == [("a[13]", "passed"), ("a[13]", "failed"), ("b[13]", "skipped")]
    failed = run.reports[1]
    assert failed.longreprtext == "assert 1 == 2"
    assert failed.sections == [("journal", "it said so")]
    assert run.reports[2].longrepr == ("test_it.py", 3, "Skipped: not today")
    assert run.machines[0].closed


def test_a_failure_that_was_expected_is_one_out_here_too(rig: Callable[..., Run]) -> None:
    run = rig(("a", "13"), machines=[[report("a[13]", "skipped", expected="a known bug"), ended("a[13]")]])
    run.go()
    assert run.reports[0].wasxfail == "a known bug"


def test_each_release_has_a_machine_with_its_own_tests(rig: Callable[..., Run]) -> None:
    machines = [
        [report(f"{name}[{release}]"), ended(f"{name}[{release}]")] for name, release in (("a", "13"), ("a", "12"))
    ]
    run = rig(("a", "13"), ("a", "12"), machines=machines)
    assert run.go() == [("a[13]", "passed"), ("a[12]", "passed")]
    assert [(agenda.release, agenda.tests) for agenda in run.agendas] == [("13", ("a[13]",)), ("12", ("a[12]",))]


def test_after_a_machine_that_hangs_the_next_test_has_another(rig: Callable[..., Run]) -> None:
    run = rig(("a", "13"), ("b", "13"), machines=[[report("a[13]", when="setup")], [report("b[13]"), ended("b[13]")]])
    assert run.go() == [("a[13]", "passed"), ("a[13]", "failed"), ("b[13]", "passed")]
    assert [agenda.tests for agenda in run.agendas] == [("a[13]", "b[13]"), ("b[13]",)]
    assert all(machine.closed for machine in run.machines)


def test_a_machine_that_goes_on_without_a_report_has_failed_the_test(rig: Callable[..., Run]) -> None:
    run = rig(("a", "13"), machines=[[{"event": "done"}]])
    assert run.go() == [("a[13]", "failed")]
    assert "its last words" in run.reports[0].longreprtext


def test_when_no_machine_works_the_rest_fails_at_once(rig: Callable[..., Run]) -> None:
    names = [(f"t{number}", "13") for number in range(6)]
    run = rig(*names, machines=[[], [], []])
    assert run.go() == [(f"{name}[13]", "failed") for name, _ in names]
    assert len(run.agendas) == 3


@pytest.mark.parametrize("long", [False, True])
def test_a_machine_may_be_silent_for_longer_than_its_test_takes(rig: Callable[..., Run], *, long: bool) -> None:
    run = rig(("a", "13"), machines=[[report("a[13]"), ended("a[13]")]])
    run.markers |= {"long"} if long else set()
    run.go()
    assert min(run.machines[0].patience) > project.seconds_for_a_test(long=long)


def test_a_start_that_a_test_asks_for_has_no_hour(rig: Callable[..., Run]) -> None:
    """Also if the test that asked has; afterwards it has its time again."""
    told: Messages = [{"event": "reboot"}, {"event": "boot", "again": True}, report("a[13]"), ended("a[13]")]
    run = rig(("a", "13"), machines=[told])
    run.markers.add("long")
    assert run.go() == [("a[13]", "passed")]
    hour = project.seconds_for_a_test(long=True) + 300
    assert run.machines[0].patience == [hour, 900, hour, hour]


def test_packages_that_cannot_be_built_fail_the_tests(
    rig: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> Path:
        raise subprocess.CalledProcessError(1, "tools/deb")

    run = rig(("a", "13"), machines=[])
    monkeypatch.setattr(project, "build_packages", fail)
    assert run.go() == [("a[13]", "failed")]


def test_who_may_run_no_machine_skips_them(rig: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = rig(("a", "13"), machines=[])
    monkeypatch.setattr(qemu, "may_run", lambda: False)
    assert run.go() == [("a[13]", "skipped")]


def test_a_tool_that_is_missing_is_a_failure(rig: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it a reason to skip, all would be green where nothing has run."""
    run = rig(("a", "13"), machines=[])
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "mmdebstrap" else tool)
    assert run.go() == [("a[13]", "failed")]
    assert "mmdebstrap" in run.reports[0].longreprtext


def test_a_start_that_nobody_asked_for_comes_with_the_console(rig: Callable[..., Run]) -> None:
    told = [{"event": "boot", "again": True}, report("a[13]", "failed", text="it was started anew"), ended("a[13]")]
    run = rig(("a", "13"), machines=[told])
    run.go()
    assert run.reports[0].sections == [("console", "its last words")]


# --- qemu -----------------------------------------------------------------------------------------------------------


def program(file: Path, text: str) -> None:
    """One in Python."""
    file.write_text(f"#!{sys.executable}\n{text}\n", encoding="utf-8")
    file.chmod(0o755)


FAKE_QEMU = """import os, signal, sys
(channel,) = (int(each.rpartition("=")[2]) for each in sys.argv if each.startswith("socket,id=tests,fd="))
"""


@pytest.fixture
def boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], qemu.VirtualMachine]]:
    """Machines whose qemu is a Python program with the channel's descriptor in its hands."""
    tools, directory = tmp_path / "tools", tmp_path / "machine"
    tools.mkdir()
    directory.mkdir()
    machines: list[qemu.VirtualMachine] = []

    def make(text: str) -> qemu.VirtualMachine:
        program(tools / "qemu-system-x86_64", FAKE_QEMU + text)
        system = image.Image(tmp_path / "disk", tmp_path / "kernel", tmp_path / "initrd")
        machines.append(qemu.VirtualMachine(system, tmp_path / "project", directory, processors=3))
        return machines[-1]

    program(tools / "qemu-img", "")
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    yield make
    for machine in machines:
        machine.close()


def test_what_a_machine_tells_is_read_from_its_channel(boot: Callable[[str], qemu.VirtualMachine]) -> None:
    parts = (b'{"event": "boot"}\n{"event": "do', b'ne"}\n')
    machine = boot("".join(f"os.write(channel, {part!r})\n" for part in parts) + "signal.pause()")
    assert [machine.message(silence=60) for _ in range(2)] == [{"event": "boot"}, {"event": "done"}]
    with pytest.raises(qemu.MachineError, match="said nothing for 0 s"):
        machine.message(silence=0)
    pid = machine._qemu.pid
    machine.close()
    assert not Path(f"/proc/{pid}").exists()


def test_a_machine_ends_with_its_owner_also_if_that_is_killed(tmp_path: Path) -> None:
    program(tmp_path / "qemu-img", "")
    program(tmp_path / "qemu-system-x86_64", FAKE_QEMU + "os.write(channel, b'1\\n')\nsignal.pause()")
    code = f"""
import os, signal
from pathlib import Path
from tools.lab.vm import image, qemu
here = Path({str(tmp_path)!r})
machine = qemu.VirtualMachine(image.Image(here, here, here), here, here, processors=1)
assert machine.message(silence=60) == 1
print(machine._qemu.pid, flush=True)
signal.pause()
"""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(project.CHECKOUT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as owner:
        assert owner.stdout is not None
        machine = os.pidfd_open(int(owner.stdout.readline()))
        owner.kill()
    poll = select.poll()
    poll.register(machine, select.POLLIN)
    try:
        assert poll.poll(60_000), "it runs for nobody"
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(machine, signal.SIGKILL)
        os.close(machine)


def test_a_machine_that_does_not_start_says_why(boot: Callable[[str], qemu.VirtualMachine]) -> None:
    machine = boot("sys.exit('there is no such accelerator')")
    for _ in range(2):
        with pytest.raises(qemu.MachineError, match=r"ended\n.*no such accelerator"):
            machine.message(silence=60)


# --- what it boots --------------------------------------------------------------------------------------------------


def test_what_an_image_is_built_for_removes_what_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older images of that release, and what is left of a build that was killed."""

    def build(_: str, work: Path) -> None:
        (work / "image").mkdir()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(image, "_build", build)
    cache = tmp_path / "sendense-restored/vm"
    for name in ("debian-13-older", "making-13-killed/root", "debian-12-older", "making-12-at-it/root"):
        (cache / name).mkdir(parents=True)
    made = image.get("13").disk.parent
    found = {each.name for each in cache.iterdir() if each.is_dir()}
    assert found == {made.name, "debian-12-older", "making-12-at-it"}


def test_an_image_is_built_once_for_each_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def build(suite: str, work: Path) -> None:
        built.append(suite)
        (work / "image").mkdir()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(image, "_build", build)
    first = image.get("13")
    assert image.get("13") == first
    assert len(built) == 1
    monkeypatch.setattr(image, "_TESTS", image._TESTS + " another")
    assert image.get("13") != first
    assert len(built) == 2


@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"], ids=["before", "3.13"])
def test_backups_that_another_python_has_made_are_read(tmp_path: Path, module: bytes) -> None:
    chain = Chain("web01", 1, (), (Backup(Path("/srv/a"), "", {}, b""),))
    written = pickle.dumps(chain, protocol=0)
    own = f"c{type(tmp_path).__module__}\n".encode()
    assert own in written
    (tmp_path / "chain").write_bytes(written.replace(own, b"c" + module + b"\n"))
    assert backups.load(tmp_path) == chain


def test_what_the_tests_import_is_on_the_disk() -> None:
    """Of our own. What a machine cannot import is found out only when it stands, minutes later."""
    carried = [project.CHECKOUT / part for part in project.PARTS]
    files = [file for part in carried for file in (part.rglob("*.py") if part.is_dir() else (part,))]
    wanted = {
        project.CHECKOUT / f"{name.replace('.', '/')}{suffix}"
        for file in files
        if file.suffix == ".py"
        for name in imports_of(file)
        for suffix in (".py", "/__init__.py")
    }
    missing = {path for path in wanted if path.exists() and not any(path.is_relative_to(part) for part in carried)}
    assert wanted
    assert missing == set()


def imports_of(file: Path) -> Iterator[str]:
    """The modules of tests and tools that a file imports, or that might be ones; the packages have all others."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.startswith(("tests", "tools")))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("tests", "tools")):
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{each.name}" for each in node.names)


def test_a_part_that_is_missing_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "PARTS", ("README.md", "no-such-part"))
    with pytest.raises(FileNotFoundError, match="no-such-part"):
        project.make_disk(tmp_path / "disk", tmp_path, tmp_path, project.Agenda("13", (), long=False))


# --- inside ---------------------------------------------------------------------------------------------------------


@dataclass
class Guest:
    """The machine's own side, with pytest and apt played by ``ran``."""

    told: Messages
    commands: list[tuple[str, ...]]
    ran: Callable[[tuple[str, ...]], int]

    def outcomes(self) -> dict[str, str]:
        return {each["test"]: each["text"] for each in self.told if each["event"] == "report"}


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    """Two tests on the agenda of a machine that starts for the first time."""
    guest = Guest([], [], lambda _: 0)

    def run(*command: str) -> int:
        guest.commands.append(command)
        return guest.ran(command)

    for module in (inside, runner):
        for name in ("STATE", "RUNNING", "REBOOTING", "TRACE", "INSTALLED", "_LEFT", "_BEGUN", "_OUTPUT"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, tmp_path / name)
        monkeypatch.setattr(module, "tell", lambda **message: guest.told.append(message))
        monkeypatch.setattr(module, "flight_record", list)
    monkeypatch.setattr(runner, "_run", run)
    monkeypatch.setattr(runner, "_said", lambda: "what it said")
    agenda = project.Agenda("13", ("a", "b"), long=False)
    monkeypatch.setattr(project.Agenda, "read", classmethod(lambda *_: agenda))
    inside.STATE.mkdir()
    inside.TRACE.write_text("where it was")
    return guest


def pytest_runs(command: tuple[str, ...]) -> bool:
    return "pytest" in command


def finishing(*tests: str) -> Callable[[tuple[str, ...]], int]:
    """A pytest that runs these; and an apt that has nothing to do."""

    def run(command: tuple[str, ...]) -> int:
        for test in tests if pytest_runs(command) else ():
            inside.done(test)
        return 0

    return run


def test_packages_are_installed_and_then_the_tests_run(guest: Guest) -> None:
    guest.ran = finishing("a", "b")
    runner.main()
    assert [pytest_runs(command) for command in guest.commands] == [False, False, True]
    assert inside.INSTALLED.read_text() == "what it said"
    assert guest.told[-1] == {"event": "done"}
    assert guest.outcomes() == {}


def test_packages_that_do_not_install_fail_all(guest: Guest) -> None:
    guest.ran = lambda _: 100
    runner.main()
    assert all("100" in text and "what it said" in text for text in guest.outcomes().values())
    assert list(guest.outcomes()) == ["a", "b"]


def test_a_test_that_takes_pytest_down_fails_alone(guest: Guest) -> None:
    def crash_once(command: tuple[str, ...]) -> int:
        if "a" in command:
            inside.RUNNING.write_text("a")
            return -11
        return finishing("b")(command)

    guest.ran = crash_once
    runner.main()
    assert list(guest.outcomes()) == ["a"]
    assert "where it was" in guest.outcomes()["a"]
    assert guest.told[-1] == {"event": "done"}


def test_a_pytest_that_cannot_begin_fails_all_and_ends(guest: Guest) -> None:
    guest.ran = lambda command: 4 if pytest_runs(command) else 0
    runner.main()
    assert list(guest.outcomes()) == ["a", "b"]


def test_a_test_that_starts_the_machine_anew_is_run_again(guest: Guest) -> None:
    def reboot_in_it(command: tuple[str, ...]) -> int:
        if pytest_runs(command):
            inside.RUNNING.write_text("a")
            inside.REBOOTING.touch()
        return 0

    guest.ran = reboot_in_it
    runner.main()
    assert guest.told[-1]["event"] == "boot"
    guest.ran = finishing("a", "b")
    runner.main()
    assert guest.commands[-1][-2:] == ("a", "b")
    assert guest.outcomes() == {}


def test_a_start_that_nobody_asked_for_fails_the_test_that_ran(guest: Guest) -> None:
    inside.leave(["a", "b"])
    runner._BEGUN.touch()
    inside.RUNNING.write_text("a")
    guest.ran = finishing("b")
    runner.main()
    assert list(guest.outcomes()) == ["a"]
    assert "no test had asked for it" in guest.outcomes()["a"]


def test_a_flight_record_is_of_the_test_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it is told after its pytest has ended, by the runner. What it asks are stubs."""
    ready, go = tmp_path / "ready", tmp_path / "go"
    for pipe in (ready, go):
        os.mkfifo(pipe)
    events = ("sh", "-c", f"echo before; echo >{ready}; read go <{go}; echo meanwhile")
    monkeypatch.setattr(inside, "STATE", tmp_path)
    monkeypatch.setattr(inside, "RUNNING", tmp_path / "running")
    monkeypatch.setattr(inside, "_JOURNALS", {"journal": ("echo", "asked for")})
    monkeypatch.setattr(inside, "_RECORDERS", {"udev": events})
    assert inside.flight_record() == [("journal", "asked for\n"), ("udev", "")]
    recorder = inside._Recorder("udev", events)
    try:
        assert ready.read_text() == "\n"
        inside.RUNNING.write_text("a")
        os.utime(inside.RUNNING, (1000, 1000))
        recorder.mark()
        go.write_text("\n")
        assert recorder._program.wait(60) == 0
    finally:
        recorder.close()
    told = [("journal", "asked for --since=@1000\n"), ("udev", "meanwhile\n")]
    assert inside.flight_record() == told
    again = inside._Recorder("udev", ("true",))  # the next pytest begins
    again.close()
    assert inside.flight_record()[1] == ("udev", "")
    (tmp_path / "udev.mark").write_bytes(b"")  # as after a panic
    assert inside.flight_record()[1] == ("udev", "")


def test_tests_run_in_the_order_of_the_agenda(guest: Guest) -> None:  # noqa: ARG001 - its state directory
    inside.leave(["a[x]", "a[y]", "b"])
    items = [cast("pytest.Item", SimpleNamespace(nodeid=test)) for test in ("a[x]", "b", "a[y]")]
    inside.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == inside.left()
