"""How often a process wakes up: the context switches of all its threads, from /proc/PID/task/*/status.

A process that only waits is switched to when something wakes it, and away when it waits again; so what is counted
while nobody asks it for anything are its own timers, threads and polling.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from pathlib import Path

_FIELD = re.compile(r"^(?:non)?voluntary_ctxt_switches:\s*(\d+)$", re.MULTILINE)


def switches(pid: int) -> Counter[str]:
    """Context switches so far, by thread (``TID NAME``); voluntary and not."""
    found: Counter[str] = Counter()
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            text, name = (task / "status").read_text("utf-8"), (task / "comm").read_text("utf-8").strip()
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
            continue
        found[f"{task.name} {name}"] = sum(map(int, _FIELD.findall(text)))
    return found


def switches_during(pid: int, seconds: float) -> Counter[str]:
    """Context switches within so many seconds, by thread; threads without any are left out."""
    before = switches(pid)
    time.sleep(seconds)  # the time that passes is what is measured
    return switches(pid) - before


if __name__ == "__main__":
    counted = switches_during(int(sys.argv[1]), float(sys.argv[2]))
    for thread, count in counted.most_common():
        print(f"{count:6} {thread}")
    print(f"{counted.total():6} in {sys.argv[2]} s")
