"""What the daemon costs while nobody asks it for anything."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .figures import Measured, amount
from .stage import switches

if TYPE_CHECKING:
    from .figures import Plan
    from .stage import Stage

_TIMERS_DUE = 0  # the sweep is due every 15 minutes, a lease no earlier than after one
_SETTLED = 5.0  # seconds in which the daemon may end what the last call has started


def idle(stage: Stage, plan: Plan) -> Measured:
    """How often it wakes up in a minute, without a mount and with one."""
    seconds = 10 if plan.quick else 60
    repository, _ = stage.four_volumes
    with stage.daemon(repository) as running:
        (chain,) = running.chains.values()
        alone = _switches(running.pid, seconds)
        with running.mounted(chain[-1]):
            mounted = _switches(running.pid, seconds)
            readers = sum(_switches(pid, seconds) for pid in running.readers())
    what, goal = f"context switches in {seconds} s", _TIMERS_DUE + 2
    return Measured(
        (
            amount(f"{what}, daemon without a mount", [alone], "", goal),
            amount(f"{what}, daemon with a mount of 4 volumes", [mounted], "", goal),
            amount(f"{what}, its reader", [readers], "", goal),
        ),
        remark="Idle: all threads, 5 s after the last call was answered. No timer is due in that time.",
    )


def _switches(pid: int, seconds: float) -> int:
    time.sleep(_SETTLED)
    before = switches(pid)
    time.sleep(seconds)  # the time that passes is what is measured
    return switches(pid) - before
