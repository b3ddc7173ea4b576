"""The house has floors, and its folders are privilege boundaries: who may import whom, read from the sources.

Imports for the type checker count as well: a type from above ties a module to what is above.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import sendense_restored

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(sendense_restored.__file__).parent
PACKAGE = sendense_restored.__name__

# From the ground up. A module imports from its own floor and from those below; the longest prefix decides. A new
# module at the top of daemon/ has no floor until somebody has thought about which.
FLOORS = {
    "errors": 0,
    "config": 0,
    "database_url": 0,
    "names": 0,
    "linux": 0,
    "wire": 0,
    "reader.protocol": 0,
    "reader": 1,
    "client": 1,
    "cli": 2,
    "gateway": 2,
    "daemon.journal": 1,
    "daemon.host": 1,
    "daemon.store": 2,
    "daemon.events": 3,
    "daemon.volume": 3,
    "daemon.session": 3,
    "daemon.lease": 3,
    "daemon.ended": 3,
    "daemon.ledger": 4,
    "daemon.mount": 4,
    "daemon.places": 4,
    "daemon.mounts": 4,
    "daemon.resume": 4,
    "daemon.sweep": 4,
    "daemon.catalog": 4,
    "daemon.calls": 5,
    "daemon.bus": 5,
    "daemon.exported": 5,
    "daemon.exports": 5,
    "daemon.authority": 5,
    "daemon.notify": 6,
    "daemon.reload": 6,
    "daemon.packing": 6,
    "daemon.interface": 6,
    "daemon.main": 7,
    "daemon.__main__": 8,
}

# Packages that are no room themselves: the version, and a docstring.
HALLS = {"": 0, "daemon": 0}

# Libraries that are kept behind one door, and the modules or folders that are the door.
DOORS = {
    "dbus_next": {"wire.codec", "wire.connection", "wire.marshal"},
    "peewee": {"daemon.store"},
    "pymysql": {"daemon.store"},
    "pyudev": {"daemon.host.udev"},
    "sdnotify": {"daemon.notify"},
    "systemd": {"daemon.journal"},
    "seccomp": {"reader"},
    "typer": {"cli"},
    "click": {"cli"},
    "rich": {"cli"},
    "subprocess": {"daemon.host.child"},
    "multiprocessing": set(),
    "pty": set(),
}

# Who may know that there is a message bus. The wire is ground, but host, store and session are not on it, and the
# confined reader least of all.
ON_THE_WIRE = {
    *("wire", "client", "gateway"),
    *(f"daemon.{name}" for name in ("bus", "calls", "exported", "exports")),
}

# Other ways to start a program; only the door of ``subprocess`` has them.
STARTERS = {
    *("fork", "forkpty", "posix_spawn", "posix_spawnp", "system", "popen", "startfile"),
    *(f"{kind}{how}" for kind in ("exec", "spawn") for how in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
    *("create_subprocess_exec", "create_subprocess_shell", "subprocess_exec", "subprocess_shell"),
}


@dataclass(frozen=True)
class Module:
    """One source file. ``name`` is below the package: ``daemon.host.image``, ``daemon.store`` for a package."""

    name: str
    tree: ast.Module
    is_package: bool = False

    def imports(self, known: frozenset[str]) -> Iterator[tuple[str, bool]]:
        """What it imports, and whether only for the type checker; what is ours without the package's name and with a
        dot in front."""
        for_types = {
            id(part)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for part in ast.walk(node)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = list(self._from(node, known))
            else:
                continue
            for name in names:
                ours = name == PACKAGE or name.startswith(f"{PACKAGE}.")
                yield f".{name.removeprefix(PACKAGE).removeprefix('.')}" if ours else name, id(node) in for_types

    def _from(self, node: ast.ImportFrom, known: frozenset[str]) -> Iterator[str]:
        base = node.module or ""
        if node.level:
            here = [PACKAGE, *filter(None, self.name.split("."))]
            above = here[: len(here) - node.level + self.is_package]
            base = ".".join([*above, *filter(None, [base])])
        for alias in node.names:
            submodule = f"{base}.{alias.name}"
            yield submodule if submodule.removeprefix(f"{PACKAGE}.") in known else base


def below(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}.")


def floor(name: str) -> int | None:
    if name in HALLS:
        return HALLS[name]
    found = [known for known in FLOORS if below(name, known)]
    return FLOORS[max(found, key=len)] if found else None


def modules() -> list[Module]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        found.append(Module(name, ast.parse(path.read_text(encoding="utf-8"), str(path)), is_package))
    return found


def broken(module: Module, known: frozenset[str]) -> list[str]:
    """The rules that a module breaks, each as a sentence."""
    complaints = []
    own = floor(module.name)
    if own is None:
        return [f"{module.name} has no floor: give it one in FLOORS"]
    for name, for_types in module.imports(known):
        if not name.startswith("."):
            library = name.partition(".")[0]
            if library in DOORS and not any(below(module.name, door) for door in DOORS[library]):
                complaints.append(f"{module.name} imports {library}, which only {sorted(DOORS[library])} may")
            continue
        other = name[1:]
        side = module.name.partition(".")[0]
        if side != "daemon" and below(other, "daemon"):
            complaints.append(f"{module.name} imports {other}: root's code stays with root")
        elif side != "reader" and below(other, "reader") and other != "reader.protocol":
            complaints.append(f"{module.name} imports {other}: only the reader's protocol is for others")
        elif side not in {"cli", "gateway"} and other.partition(".")[0] in {"cli", "gateway"}:
            complaints.append(f"{module.name} imports {other}, which is nobody's ground")
        elif side == "daemon" and below(other, "client"):
            complaints.append(f"{module.name} imports {other}: the service is not its own client")
        elif other == "daemon.host.child" and not for_types and module.name != "daemon.host.process":
            complaints.append(f"{module.name} imports {other}: what starts must go through daemon.host.process")
        elif below(other, "wire") and not any(below(module.name, user) for user in ON_THE_WIRE):
            complaints.append(f"{module.name} imports {other}, which only {sorted(ON_THE_WIRE)} may")
        elif (its := floor(other)) is None or its > own:
            complaints.append(f"{module.name} (floor {own}) imports {other} (floor {its})")
    if module.name not in DOORS["subprocess"]:
        complaints += [
            f"{module.name} starts programs ({node.attr}): go through daemon/host/process.py"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Attribute) and node.attr in STARTERS
        ]
    return complaints


MODULES = modules()
KNOWN = frozenset(module.name for module in MODULES)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name or PACKAGE)
def test_a_module_keeps_to_its_floor_and_its_side(module: Module) -> None:
    assert broken(module, KNOWN) == []


def test_no_module_waits_for_itself() -> None:
    graph = {
        module.name: {
            name[1:]
            for name, for_types in module.imports(KNOWN)
            if name.startswith(".") and not for_types and name[1:] != module.name
        }
        for module in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("cli.main", "from sendense_restored.daemon.host import image", "root's code"),
        ("cli.main", "from ..daemon import session", "root's code"),
        ("cli.main", "import sendense_restored.daemon.session", "root's code"),
        ("gateway.main", "if TYPE_CHECKING:\n    from sendense_restored.daemon.bus import Bus", "root's code"),
        ("reader.tree", "def f():\n    from sendense_restored.daemon.host import image", "root's code"),
        ("names", "from .daemon.host.process import Tools", "root's code"),
        ("daemon.host.readers", "from sendense_restored.reader.tree import walk", "only the reader's protocol"),
        ("daemon.host.readers", "from sendense_restored import reader", "only the reader's protocol"),
        ("daemon.main", "from sendense_restored.client import Client", "not its own client"),
        ("daemon.main", "from sendense_restored.cli.output import line", "nobody's ground"),
        ("daemon.host.image", "from sendense_restored.daemon.session import Session", "floor 3"),
        ("daemon.session", "from . import mounts", "floor 4"),
        ("daemon.session", "from .mounts import Mounts", "floor 4"),
        ("daemon.session", "if TYPE_CHECKING:\n    from .mounts import Mounts", "floor 4"),
        ("daemon.nobody_thought_about_it", "", "no floor"),
        ("daemon.interface", "import dbus_next", "dbus_next"),
        ("daemon.interface", "from dbus_next.message import Message", "dbus_next"),
        ("client.connection", "from dbus_next.message import Message", "dbus_next"),
        ("daemon.session", "from sendense_restored.wire import Variant", "imports wire"),
        ("reader.main", "from sendense_restored.wire.codec import encode", "imports wire"),
        ("cli.main", "import peewee", "peewee"),
        ("daemon.main", "from pymysql.err import MySQLError", "pymysql"),
        ("daemon.session", "import subprocess", "subprocess"),
        ("daemon.session", "asyncio.create_subprocess_exec('x')", "starts programs"),
        ("reader.main", "os.execv('/bin/sh', [])", "starts programs"),
        ("daemon.host.process", "asyncio.create_subprocess_exec('x')", "starts programs"),
        ("daemon.host.readers", "from .child import Child", "go through daemon.host.process"),
    ],
)
def test_the_rules_see_what_breaks_them(name: str, source: str, complaint: str) -> None:
    known = KNOWN | {"daemon.session", "daemon.mounts", "reader", "reader.tree", "daemon.host.image"}
    (found,) = broken(Module(name, ast.parse(source)), known)
    assert complaint in found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("daemon.host.readers", "from sendense_restored.reader import protocol"),
        ("daemon.host.readers", "from sendense_restored.reader.protocol import Entry"),
        ("daemon.host.child", "import subprocess\nasyncio.create_subprocess_exec('x')"),
        ("daemon.host.process", "from .child import Child"),
        ("daemon.host.readers", "if TYPE_CHECKING:\n    from .child import Child"),
        ("daemon.store.models", "import peewee"),
        ("daemon.bus", "from sendense_restored.wire import Caller"),
        ("wire.codec", "import dbus_next"),
        ("daemon.session", "from .host import image\nfrom .store import Store"),
        ("cli.main", "from sendense_restored import errors\nfrom . import output"),
    ],
)
def test_the_rules_let_pass_what_keeps_them(name: str, source: str) -> None:
    known = KNOWN | {"reader.protocol", "daemon.host.image"}
    assert broken(Module(name, ast.parse(source)), known) == []
