"""What it costs to open and to read a file through the service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .figures import Measured, MeasurementError, amount, compared, paired
from .material import BLOB, VOLUME

if TYPE_CHECKING:
    from .figures import Plan
    from .stage import Stage, Worker

_OPENS = 50  # of each side in one pair


def reading(stage: Stage, plan: Plan) -> Measured:
    """OpenFile alone, and with all that is in a large file."""
    path = f"/{VOLUME}/{BLOB}"
    with stage.daemon(stage.tree) as running, running.mounted(running.chains["tree"][0]) as mount:
        place = running.place(mount, path)
        opens = paired(
            lambda: running.member.seconds("open_file", mount=mount, path=path, count=_OPENS),
            lambda: running.bare.seconds("open_file", path=place, count=_OPENS),
            plan.pairs,
        )
        size = int(running.bare.ask("read_file", path=place)["bytes"])
        reads = paired(
            lambda: _read(running.member, size, mount=mount, path=path),
            lambda: _read(running.bare, size, path=place),
            plan.pairs,
        )
    what = f"OpenFile and reading {size >> 20} MiB"
    return Measured(
        (
            compared(what, "open and read in the mount", reads),
            compared("OpenFile", "open(2)", opens),
        ),
        (
            amount("OpenFile", [ours * 1000 for ours, _ in opens], "ms"),
            amount(what, [ours for ours, _ in reads], "s"),
        ),
        remark="OpenFile: a call through the bus to the daemon, to the reader and back, with the descriptor closed"
        " at the end; beside it, open and close in the same mount. Reads are of 1 MiB, from the page cache"
        " on both sides.",
    )


def _read(worker: Worker, size: int, **arguments: object) -> float:
    """Seconds. Raises MeasurementError if anything is missing."""
    answer = worker.ask("read_file", **arguments)
    if answer["bytes"] != size:
        raise MeasurementError(f"{answer['bytes']} bytes were read of {size}")
    return float(answer["seconds"])
