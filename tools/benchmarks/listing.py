"""What listings cost: pages of ListFiles, streams of OpenListing, and how both grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .figures import Growth, Measured, MeasurementError, Series, amount, compared, paired, spread
from .material import VOLUME
from .stage import forget_peak, status

if TYPE_CHECKING:
    from collections.abc import Callable

    from .figures import Plan, Spread
    from .stage import Running, Stage, Worker

_MB = 1_000_000
_THOUSAND = 1000


def pages(stage: Stage, plan: Plan) -> Measured:
    """ListFiles of 1000 entries, against scandir and lstat."""
    path = f"/{VOLUME}/{_THOUSAND}"
    with stage.daemon(stage.tree) as running, running.mounted(running.chains["tree"][0]) as mount:
        place = running.place(mount, path)

        def bare() -> float:
            return _timed(running.bare, _THOUSAND, "scan_directory", path=place)

        def plain() -> float:
            return _timed(running.member, _THOUSAND, "list_files", mount=mount, path=path, limit=_THOUSAND)

        def own() -> float:
            return _timed(running.member, _THOUSAND, "own_list_files", mount=mount, path=path, limit=_THOUSAND)

        def library() -> float:
            return _timed(running.member, _THOUSAND, "unpack", count=_THOUSAND)

        by_plain, by_own, by_library = (paired(ours, bare, plan.pairs) for ours in (plain, own, library))
    what, beside = "ListFiles of 1000 entries", "scandir + lstat"
    return Measured(
        (
            compared(f"{what}, dbus-next client", beside, by_plain, 12),
            compared("of that, unpacking the answer in a dbus-next client", beside, by_library),
            compared(f"{what}, the project's client", beside, by_own, 12),
        ),
        (amount(f"{what}, dbus-next client", [ours for ours, _ in by_plain], "s", 2),),
        remark="ListFiles: an unprivileged member of the group calls, from a connection that stands, until the"
        " answer is unpacked; beside it, one Python process lists the same directory of the same mount with"
        " scandir and keeps an lstat of each entry. polkit is asked as the service sees fit.",
    )


def stream(stage: Stage, plan: Plan) -> Measured:
    """OpenListing of 100,000 entries against find, and the memory that a million take."""
    size = 10_000 if plan.quick else 100_000
    path = f"/{VOLUME}/{size}"
    with stage.daemon(stage.tree) as running, running.mounted(running.chains["tree"][0]) as mount:
        place = running.place(mount, path)
        pairs = paired(
            lambda: _timed(running.member, size, "list_stream", mount=mount, path=path),
            lambda: _timed(running.bare, size, "find", path=place),
            plan.pairs,
        )
    path = f"/{VOLUME}/{stage.most}"
    with stage.daemon(stage.crowd) as running, running.mounted(running.chains["tree"][0]) as mount:
        # What any first listing needs (modules, buffers) is not what the size of this one costs.
        running.member.ask("list_stream", mount=mount, path=f"/{VOLUME}/lost+found")
        who = {"daemon": running.pid, "reader": running.readers()[0], "client": running.member.pid}
        before = {}
        for name, pid in who.items():
            forget_peak(pid)
            before[name] = status(pid, "VmHWM")
        _timed(running.member, stage.most, "list_stream", mount=mount, path=path)
        moved = {name: (status(pid, "VmHWM") - before[name]) / _MB for name, pid in who.items()}
    return Measured(
        (
            compared(f"OpenListing of {size:,} entries", "find -printf into a pipe", pairs, 3),
            *(
                amount(f"OpenListing of {stage.most:,} entries: the {name}'s peak moves by", [by], "MB", 32)
                for name, by in moved.items()
            ),
        ),
        remark="OpenListing: both streams carry path, kind, size, mode, mtime, links and target of each entry, and"
        " are read to the end in chunks of 1 MiB with their lines counted. find starts anew each time, the"
        " service and its reader run already. Memory is VmHWM, set back before.",
    )


def growth(stage: Stage, plan: Plan) -> Measured:
    """The time of a whole listing by the size of the directory, in all four ways."""
    sizes = (1000, 10_000) if plan.quick else (1000, 10_000, 100_000)
    kinds: dict[str, list[tuple[int, Spread]]] = {}
    for repository, some in ((stage.tree, sizes), (stage.crowd, (stage.most,))):
        with stage.daemon(repository) as running, running.mounted(running.chains["tree"][0]) as mount:
            for size in some:
                for name, once in _ways(running, mount, size).items():
                    rounds = 1 if size > 100_000 else min(plan.pairs, 5)
                    once()
                    kinds.setdefault(name, []).append((size, spread([once() for _ in range(rounds)])))
    series = tuple(Series(name, tuple(points)) for name, points in kinds.items())
    title = "Time of a whole listing by size of the directory"
    return Measured(growths=(Growth("listing", title, "entries", "seconds", series, logarithmic=True),))


def _ways(running: Running, mount: str, size: int) -> dict[str, Callable[[], float]]:
    path = f"/{VOLUME}/{size}"
    place = running.place(mount, path)
    return {
        "ListFiles, pages of 10,000": lambda: _timed(running.member, size, "list_pages", mount=mount, path=path),
        "OpenListing": lambda: _timed(running.member, size, "list_stream", mount=mount, path=path),
        "scandir + lstat": lambda: _timed(running.bare, size, "scan_directory", path=place),
        "find -printf": lambda: _timed(running.bare, size, "find", path=place),
    }


def _timed(worker: Worker, entries: int, do: str, **arguments: object) -> float:
    """Seconds of a listing. Raises MeasurementError if it was not whole."""
    answer = worker.ask(do, **arguments)
    if answer["entries"] != entries:
        raise MeasurementError(f"{do} gave {answer['entries']} entries of {entries}")
    return float(answer["seconds"])
