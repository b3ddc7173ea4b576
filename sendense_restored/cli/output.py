"""What the command line prints: text for people, JSON for programs.

Guest names, labels and VM names come from strangers. On a terminal they are escaped; in a pipe they stay as they are,
so that they can be given back as arguments. With ``--json`` a command writes one JSON document, a listing is an array
that is written as it arrives: if the command fails in the middle the array is not closed, so nobody can take half of
a listing for the whole.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from rich.cells import cell_len

from sendense_restored import names
from sendense_restored.client import Entry, Problem

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from sendense_restored.client import Backup, Event, FileInfo, Found, MountInfo, Vm, Volume

PROGRAM = "sendense-restore"

Json = dict[str, Any]
Item = TypeVar("Item")


def prepare() -> None:
    """Make stdout and stderr take every text: a pipe gets UTF-8, a terminal escapes for what it does not know."""
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # TextIOWrapper at this point
        else:
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]  # the same


def shown(text: str) -> str:
    """``text`` as stdout may have it."""
    return names.displayable(text) if sys.stdout.isatty() else text


def line(text: str = "", *, end: str = "\n") -> None:
    """Print a line, made safe for a terminal."""
    print(shown(text), end=end)


def note(text: str, *, as_json: bool = False) -> None:
    """Say something on stderr that is no result."""
    print(json.dumps({"note": text}) if as_json else f"{PROGRAM}: {names.displayable(text)}", file=sys.stderr)


def document(value: object) -> None:
    """Print a JSON document."""
    print(_encoded(value, indent=2))


async def listing(items: AsyncIterator[Item], form: Callable[[Item], Json]) -> None:
    """Print a JSON array, an element a line, as they arrive."""
    separator = "["
    async for item in items:
        print(f"{separator}\n{_encoded(form(item))}", end="")
        separator = ","
    print("[]" if separator == "[" else "\n]")


def _encoded(value: object, indent: int | None = None) -> str:
    # JSON leaves C1 and bidi characters alone, which a terminal must not get.
    return json.dumps(value, indent=indent, ensure_ascii=sys.stdout.isatty())


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print rows in columns; those numbered in ``right`` are aligned to the right."""
    lines = [header, *([shown(cell) or "-" for cell in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        padded = []
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            space = " " * (width - cell_len(cell))
            padded.append(space + cell if number in right else cell + space)
        print("  ".join(padded).rstrip())


def size(count: int) -> str:
    """A number of bytes in the largest unit that leaves at least one: ``1.5 GiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def local_time(seconds: int, *, form: str = "%Y-%m-%d %H:%M") -> str:
    """A time for people, in their time zone; nothing for 0."""
    moment = _moment(seconds)
    return moment.astimezone().strftime(form) if seconds and moment else ""


def duration(seconds: int) -> str:
    """A duration for people, in the largest unit that divides it: ``90 s``, ``15 min``, ``1 h``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds and seconds % length == 0:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def rfc3339(seconds: int) -> str | None:
    """A time for programs, in UTC; None for 0 and for what the calendar does not have."""
    moment = _moment(seconds)
    return moment.isoformat().replace("+00:00", "Z") if seconds and moment else None


def _moment(seconds: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):  # beyond the year 9999, which file systems can write
        return None


def backup_json(backup: Backup) -> Json:
    """A backup, with the names that the REST API has."""
    times = ("created_at", "started_at", "completed_at")
    return (
        asdict(backup) | {name: rfc3339(getattr(backup, name)) for name in times} | {"disks_count": len(backup.disks)}
    )


def mount_json(mount: MountInfo) -> Json:
    """A mount with its volumes."""
    answer: Json = {"mount_id": mount.id} | asdict(mount)
    del answer["id"]
    for name in ("created_at", "last_accessed_at", "expires_at"):
        answer[name] = rfc3339(answer[name])
    for claim in answer["claims"]:
        for name in ("since", "expires"):
            claim[name] = rfc3339(claim[name])
    return answer


def volume_json(volume: Volume) -> Json:
    """A volume."""
    return asdict(volume)


def entry_json(entry: Entry, directory: str) -> Json:
    """An entry of the directory ``directory``; what the service adds for a kind of file stands beside the rest."""
    answer: Json = {
        **entry.extras,
        "name": entry.name,
        "path": f"{directory.rstrip('/')}/{entry.name}",
        "kind": entry.kind,
        "size": entry.size,
        "mode": f"{entry.mode:04o}",
        "modified_time": rfc3339(entry.mtime_ns // 10**9),
        "mtime_ns": entry.mtime_ns,
    }
    if entry.kind == "symlink":
        answer["symlink_target"] = entry.target
    return answer


def found_json(record: Found | Problem) -> Json:
    """A record of a listing stream as ``entry_json`` has it; of what could not be read, ``path`` and ``error``."""
    if isinstance(record, Problem):
        return asdict(record)
    directory, _, name = record.path.rpartition("/")
    extras = ("unreadable", "nlink", "time_clamped", "display_name")
    more = {key: getattr(record, key) for key in extras if getattr(record, key)}
    entry = Entry(name, record.kind, record.size, record.mode, record.mtime_ns, record.target, more)
    return entry_json(entry, directory)


def event_json(event: Event) -> Json:
    """Something that has happened; ``at`` with its microseconds."""
    seconds, micro = divmod(event.at, 10**6)
    moment = rfc3339(seconds)
    return asdict(event) | {"at": moment and f"{moment.removesuffix('Z')}.{micro:06}Z"}


def vm_json(vm: Vm) -> Json:
    """A virtual machine."""
    return asdict(vm) | {"newest": rfc3339(vm.newest)}


def info_json(info: FileInfo, path: str) -> Json:
    """One file."""
    return {"path": path} | asdict(info) | {"mode": f"{info.mode:04o}"}


def is_directory(kind: str) -> bool:
    """Whether there may be something in it."""
    return kind in {"directory", "volume"}


def long_line(
    kind: str, bits: int, count: int, mtime_ns: int, name: str, target: str, note: str, unreadable: str
) -> str:
    """A line of ``ls -l``; what there is to note, and why it cannot be read, stand at its end."""
    time = local_time(mtime_ns // 10**9) or "-"
    text = f"{mode(kind, bits)} {count:>15} {time:>16} {name}"
    if kind == "symlink":
        text += f" -> {target}"
    return text + (f" ({note})" if note else "") + (f" (unreadable: {unreadable})" if unreadable else "")


def mode(kind: str, bits: int) -> str:
    """Kind and permissions as ``ls -l`` has them."""
    letters = {"directory": "d", "volume": "d", "symlink": "l", "fifo": "p", "socket": "s", "block": "b", "char": "c"}
    text = ["rwxrwxrwx"[place] if bits >> (8 - place) & 1 else "-" for place in range(9)]
    for bit, place, letter in ((0o4000, 2, "s"), (0o2000, 5, "s"), (0o1000, 8, "t")):
        if bits & bit:
            text[place] = letter if text[place] == "x" else letter.upper()
    return letters.get(kind, "-") + "".join(text)
