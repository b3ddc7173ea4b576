"""Users and the group `sendense-restore`, in this mount namespace's view of the machine only.

Changed copies of ``/etc/passwd`` and ``/etc/group`` are mounted over the machine's files, so that the machine itself
never has the users, not even after a crash.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sendense_restored import linux

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUP = "sendense-restore"
_PASSWD, _GROUP = Path("/etc/passwd"), Path("/etc/group")
# Above what distributions hand out by themselves, below the daemon's pools (60998 and up).
_IDS = range(60900, 60990)


@dataclass(frozen=True)
class Person:
    """An unprivileged user; the primary group has the user's name and number."""

    name: str
    uid: int

    def command(self, *argv: str) -> list[str]:
        """The command line that runs ``argv`` as this user, with the user's groups and no privilege."""
        become = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--init-groups", "--inh-caps=-all"]
        return [*become, "--no-new-privs", "--", *argv]


@dataclass(frozen=True)
class People:
    """Who is there: somebody who may restore, and somebody who may not."""

    member: Person
    """In the group."""
    stranger: Person


@contextlib.contextmanager
def people(directory: Path) -> Iterator[People]:
    """Make the users. ``directory`` takes the copies. Root, inside ``namespace.enter``."""
    users = _PASSWD.read_text(encoding="utf-8").splitlines()
    groups = _GROUP.read_text(encoding="utf-8").splitlines()
    taken = {int(line.split(":")[2]) for line in (*users, *groups) if line.count(":") >= 3 and line[0] not in "+-"}
    free = (number for number in _IDS if number not in taken)
    member, stranger = Person("sendense-demo", next(free)), Person("sendense-stranger", next(free))
    for person in (member, stranger):
        users.append(f"{person.name}:x:{person.uid}:{person.uid}::/nonexistent:/usr/sbin/nologin")
        groups.append(f"{person.name}:x:{person.uid}:")
    if not any(line.startswith(f"{GROUP}:") for line in groups):
        groups.append(f"{GROUP}:x:{next(free)}:")
    groups = [_joined(line, member.name) if line.startswith(f"{GROUP}:") else line for line in groups]
    with _replaced(_PASSWD, users, directory), _replaced(_GROUP, groups, directory):
        yield People(member, stranger)


def _joined(group: str, name: str) -> str:
    """A line of ``/etc/group`` with one more member."""
    return f"{group}{'' if group.endswith(':') else ','}{name}"


@contextlib.contextmanager
def _replaced(file: Path, lines: list[str], directory: Path) -> Iterator[None]:
    copy = directory / file.name
    copy.write_text("\n".join(lines) + "\n", encoding="utf-8")
    copy.chmod(0o644)
    linux.mount(str(copy), file, None, linux.MS_BIND)
    try:
        yield
    finally:
        linux.umount(file, linux.MNT_DETACH)  # somebody may just be reading it
