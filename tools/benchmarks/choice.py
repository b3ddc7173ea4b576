"""The command line of ``tools/bench``, and the list of what there is to measure."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import footprint, listing, mounting, reading
from .figures import Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .figures import Measured
    from .stage import Stage

BENCHMARKS: Mapping[str, Callable[[Stage, Plan], Measured]] = {
    "idle": footprint.idle,
    "mount": mounting.mount,
    "list": listing.pages,
    "stream": listing.stream,
    "open": reading.reading,
    "mounts": mounting.mounts,
    "depth": mounting.depth,
    "growth": listing.growth,
}
_PAIRS, _QUICK_PAIRS = 20, 3


@dataclass(frozen=True)
class Choice:
    """What is to be done."""

    names: tuple[str, ...]
    plan: Plan
    write: bool


def choose(arguments: Sequence[str]) -> Choice:
    """Read the command line; SystemExit with a usage message if it makes no sense."""
    listed = "\n".join(f"  {name:8} {function.__doc__}" for name, function in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description="Measures the service against the bare tools, in one run and in pairs.",
        epilog=f"benchmarks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to measure; everything if none is given")
    parser.add_argument("--pairs", type=int, metavar="N", help=f"how many pairs each ratio has (default {_PAIRS})")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that the benchmarks work")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md and its plots")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if name not in BENCHMARKS]:
        parser.error(f"there is no {', '.join(unknown)}; known are {', '.join(BENCHMARKS)}")
    if given.write and (given.names or given.quick):
        parser.error("--write needs a whole run: no names, no --quick")
    pairs = given.pairs if given.pairs is not None else _QUICK_PAIRS if given.quick else _PAIRS
    if pairs < 1:
        parser.error("--pairs must be at least 1")
    names = tuple(dict.fromkeys(given.names)) or tuple(BENCHMARKS)
    return Choice(names, Plan(pairs, given.quick), given.write)
