"""The daemon, which is killed at one act of building or closing a mount: before it, or right after it.

The first argument names the act, the moment, and the how manieth time: ``CLASS.METHOD before 1``, or ``... after 2``.
``ACTS`` has all acts. Nothing of the daemon knows of this.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from sendense_restored.daemon import main, session, volume
from sendense_restored.daemon.host import attach, filesystem, loop, machine, reader
from sendense_restored.daemon.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

BUILDING: tuple[tuple[type, str], ...] = (
    (Store, "insert_mount"),
    (attach.Workplace, "make"),
    (machine.Machine, "start_reader"),
    (machine.Machine, "open_image"),
    (machine.Machine, "attach"),
    (machine.Machine, "discover"),
    (machine.Machine, "slice"),
    (machine.Machine, "mount"),
    (reader.Reader, "give"),
    (Store, "renew"),
)
CLOSING: tuple[tuple[type, str], ...] = (
    (Store, "update_mount"),
    (reader.Reader, "take_back"),
    (filesystem.Mounted, "unmount"),
    (volume.SessionVolume, "unmount"),
    (loop.LoopDevice, "close"),
    (attach.FuseAttachment, "close"),
    (session.Session, "_close_images"),
    (reader.Reader, "close"),
    (session.Session, "_close_directory"),
    (attach.Workplace, "close"),
    (Store, "delete_mount"),
)


def name_of(act: tuple[type, str]) -> str:
    return f"{act[0].__name__}.{act[1]}"


ACTS = {name_of(act): act for act in (*BUILDING, *CLOSING)}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def dying(function: Callable[..., Any], moment: str, time: int) -> Callable[..., Any]:
    """``function``, which ends the process the ``time``-th time it is called."""
    count = 0

    def now(wanted: str, number: int) -> None:
        if moment == wanted and number == time:
            die()

    @functools.wraps(function)
    async def asynchronous(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever it takes
        nonlocal count
        count += 1
        number = count  # others may begin meanwhile
        now("before", number)
        result = await function(*arguments, **named)
        now("after", number)
        return result

    @functools.wraps(function)
    def synchronous(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever it takes
        nonlocal count
        count += 1
        now("before", count)
        result = function(*arguments, **named)
        now("after", count)
        return result

    return asynchronous if inspect.iscoroutinefunction(function) else synchronous


if __name__ == "__main__":
    act, moment, time = sys.argv.pop(1).split()
    owner, method = ACTS[act]
    setattr(owner, method, dying(getattr(owner, method), moment, int(time)))
    main.main()
