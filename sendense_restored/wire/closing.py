"""Closing descriptors that strangers have sent, where it may take as long as they like.

close(2) of the last descriptor of a socket with SO_LINGER waits for its peer, that of a file on FUSE for its server;
both can be anybody's. So the event loop closes only what cannot wait, pipes; all else is closed by threads, which are
started as they are needed. When as many as there may be hang in the kernel, what comes then stays open: descriptors
that leak are a lesser harm than a service that stands still.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from sendense_restored import linux

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

MOST_THREADS = 8
_IDLE = 5.0  # seconds after which a thread with nothing to do ends

_waiting: SimpleQueue[int] = SimpleQueue()
_lock = threading.Condition()
_threads = _open = 0  # of the latter, those that are being closed as well


def close_foreign(fds: Sequence[int]) -> None:
    """Close descriptors that came from others, some of them later. Never waits."""
    for descriptor in fds:
        if stat.S_ISFIFO(linux.file_type(descriptor)):
            os.close(descriptor)
        else:
            _see_to_it(descriptor)


def settle() -> None:
    """Wait until all of them are closed."""
    with _lock:
        _lock.wait_for(lambda: not _open)


def _see_to_it(descriptor: int) -> None:
    """Have it closed, by a new thread unless there is one for each that is open."""
    global _threads, _open  # noqa: PLW0603 - descriptors belong to the process, and so does this
    with _lock:
        _open += 1
        _waiting.put(descriptor)
        if _open <= _threads:
            return
        if _threads == MOST_THREADS:
            log.warning("descriptors that others have sent cannot be closed; some stay open")
            return
        _threads += 1
    threading.Thread(target=_work, name="close", daemon=True).start()


def _work() -> None:
    global _threads, _open  # noqa: PLW0603 - as above
    while True:
        try:
            descriptor = _waiting.get(timeout=_IDLE)
        except Empty:
            with _lock:
                if _waiting.empty():
                    _threads -= 1
                    return
            continue
        os.close(descriptor)
        with _lock:
            _open -= 1
            _lock.notify_all()
