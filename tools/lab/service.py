"""The daemon itself, run as it runs on an appliance but on a private bus and with directories of our own."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import children
from .bus import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from subprocess import Popen

    from .bus import PrivateBus

BUS_NAME = "com.sendense.Restore1"


@dataclass(frozen=True)
class Service:
    """A running daemon."""

    process: Popen[bytes]
    log: Path
    """What it writes to its journal."""
    database: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid


@contextlib.contextmanager
def service(
    bus: PrivateBus,
    directory: Path,
    settings: str = "",
    *,
    ready: bool = True,
    python: str = sys.executable,
    program: Sequence[str] = ("-m", "sendense_restored.daemon"),
) -> Iterator[Service]:
    """A daemon on ``bus`` for as long as the context; ready when this yields, or, if not ``ready``, just started.

    Its configuration, database and log lie in ``directory``; ``settings`` is TOML that is added to the configuration.
    ``program`` is what Python runs; a test may put one there that runs the daemon in a way of its own.
    """
    configuration, database, log = directory / "restored.toml", directory / "restore.db", directory / "daemon.log"
    configuration.write_text(f'[database]\nurl = "sqlite:///{database}"\n{settings}', encoding="utf-8")
    argv = [python, "-s", "-P", *program, "--debug", "--config", str(configuration)]
    environment = {**bus.environment, "PYTHONPATH": str(CHECKOUT)}
    with children.running(argv, log=log, environment=environment) as process:
        if ready:
            try:
                bus.wait_for_name(BUS_NAME, process.pid)
            except RuntimeError as error:
                raise RuntimeError(f"the daemon did not start: {log.read_text(errors='replace')}") from error
        yield Service(process, log, database)
