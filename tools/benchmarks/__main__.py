"""``python -m tools.benchmarks``: what ``tools/bench`` runs, as root."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from tools.lab import leftovers, namespace
from tools.lab.bus import CHECKOUT

from . import plots, report
from .choice import BENCHMARKS, choose
from .figures import MeasurementError
from .stage import Stage, machine

if TYPE_CHECKING:
    from .figures import Plan

_PAGE = CHECKOUT / "docs/performance.md"
_PLOTS = CHECKOUT / "docs/performance"


def main() -> None:
    """Measure, print, and write if that is asked; status 1 if something could not be measured, or is left."""
    choice = choose(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that everything is taken down
    with leftovers.alone_on_the_machine():
        namespace.enter()
        before = leftovers.of_the_machine()
        with Stage.open(quick=choice.plan.quick) as stage:
            outcomes = [_outcome(name, stage, choice.plan) for name in choice.names]
        left = leftovers.left_on_the_machine(before)
    print(report.terminal(outcomes))
    if left:
        print("\nLEFT BEHIND:", *left, sep="\n  ")
    if choice.write:
        _PLOTS.mkdir(exist_ok=True)
        for old in _PLOTS.glob("*.svg"):
            old.unlink()
        _PAGE.write_text(report.page(outcomes, machine()), encoding="utf-8")
        for outcome in outcomes:
            for growth in outcome.measured.growths:
                plots.draw(growth, _PLOTS)
    sys.exit(bool(left) or any(outcome.failure for outcome in outcomes))


def _outcome(name: str, stage: Stage, plan: Plan) -> report.Outcome:
    """One benchmark; what it could not measure is part of the report, and does not stop the others."""
    started = time.monotonic()
    print(f"{name} … ", end="", file=sys.stderr, flush=True)
    try:
        outcome = report.Outcome(name, BENCHMARKS[name](stage, plan))
    except (MeasurementError, RuntimeError, TimeoutError, OSError, subprocess.SubprocessError) as error:
        outcome = report.Outcome(name, failure="; ".join([str(error), *getattr(error, "__notes__", [])]))
    print(f"{time.monotonic() - started:.0f} s{' FAILED' if outcome.failure else ''}", file=sys.stderr, flush=True)
    return outcome


if __name__ == "__main__":
    main()
