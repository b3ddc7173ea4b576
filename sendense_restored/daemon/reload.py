"""The configuration read again while the service runs (SIGHUP, ``systemctl reload``).

``Reload`` holds the configuration that is in force. One reload runs at a time; requests that come meanwhile are one
more reload after it, so the last word of the file always counts. What is wrong with a new file is told, and the old
configuration stays as a whole. The service manager hears of the beginning and the end of each, whatever came of it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from sendense_restored import config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .notify import ServiceManager

log = logging.getLogger(__name__)


class Reload:
    """Reads ``file`` on request; ``apply`` is given each configuration that differs from the one in force.

    Only keys in ``config.RELOADABLE`` ever differ there. ``apply`` runs on the event loop and must not fail.
    """

    def __init__(
        self, file: Path, current: config.Config, manager: ServiceManager, apply: Callable[[config.Config], None]
    ) -> None:
        self.current = current
        self._file, self._manager, self._apply = file, manager, apply
        self._requested = False
        self._closed = False
        self._running: asyncio.Task[None] | None = None

    def request(self) -> None:
        """Read the file again, now or after the reload that runs; a handler of signals on the event loop."""
        if self._closed:
            return
        self._requested = True
        if self._running is None:
            self._running = asyncio.create_task(self._run(), name="reload")

    async def close(self) -> None:
        """Begin no reload any more, and wait for one that runs. May be called again."""
        self._closed = True
        self._requested = False
        if self._running is not None:
            await asyncio.wait([self._running])

    async def _run(self) -> None:
        try:
            while self._requested:
                self._requested = False
                self._manager.reloading()
                try:
                    await self._reload()
                finally:
                    self._manager.ready()
        finally:
            self._running = None

    async def _reload(self) -> None:
        try:
            # Not on the event loop: the file may lie on storage that takes its time.
            new = await asyncio.to_thread(config.load, self._file)
            merged = config.taken_over(self.current, new, config.RELOADABLE)
        except config.ConfigError as error:
            log.error("not reloading, the configuration before stays: %s", error)  # noqa: TRY400 - the message says it
            self._manager.notice(f"not reloaded: {error}")
            return
        taken = sorted(config.differences(self.current, merged))
        waiting = sorted(config.differences(merged, new))
        if taken:
            self.current = merged
            self._apply(merged)
        log.info("reloaded %s: %s", self._file, f"changed {', '.join(taken)}" if taken else "nothing changed")
        for key in waiting:
            log.warning("takes effect at the next start: %s", key)
        self._manager.notice(f"restart to apply {', '.join(waiting)}" if waiting else "")
