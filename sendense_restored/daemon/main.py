"""Assembly of the daemon, in one visible order, and its end in the reverse one.

Crash-only: nothing here has to run for the machine to be clean. The kernel takes mounts, loops and children away
with the daemon's mount namespace; what is done at the end only makes it quicker and kinder to those who still read.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import fcntl
import logging
import os
import resource
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import sdnotify

from sendense_restored import __version__, config

from .authority import Authority
from .bus import Bus, BusError
from .catalog import Catalog
from .host.machine import Machine, enter_private_namespace
from .host.process import ToolMissingError
from .host.udev import BlockEvents
from .interface import BUS_NAME, Parts, Service
from .mounts import Mounts
from .store import Store, StoreError

log = logging.getLogger(__name__)

EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h: the service cannot run as it is set up, and a restart would not help."""


def main() -> None:
    """The program ``sendense-restored``."""
    parser = argparse.ArgumentParser(prog="sendense-restored", description="File-level restore over D-Bus.")
    parser.add_argument("--config", type=Path, default=config.DEFAULT_FILE, help="default: %(default)s")
    parser.add_argument("--debug", action="store_true", help="log what is tried as well as what happened")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if arguments.debug:
        logging.getLogger("sendense_restored").setLevel(logging.DEBUG)
    try:
        settings = config.load(arguments.config)
        prepare(settings)
        sys.exit(asyncio.run(run(settings)))
    except (config.ConfigError, ToolMissingError, StoreError) as error:
        log.critical("not starting: %s", error)
        sys.exit(EXIT_CONFIG)
    except (BusError, OSError) as error:
        log.critical("not starting: %s", error)
        sys.exit(1)


def prepare(settings: config.Config) -> None:
    """What has to happen before any thread starts. Raises config.ConfigError."""
    if os.geteuid() != 0:
        raise config.ConfigError("the service must run as root: it attaches block devices and mounts file systems")
    os.umask(0o077)
    # A mount holds a descriptor for each layer of its chain; children get limits of their own.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    be_the_only_one(settings.paths.runtime)
    try:
        enter_private_namespace(settings)
    except OSError as error:
        hint = " ('/' is no mount point here, as in a plain chroot)" if error.errno == errno.EINVAL else ""
        raise config.ConfigError(f"no private mount namespace: {error}{hint}") from None
    if sys.version_info < (3, 12):
        # The default of 3.11 starts a thread for each child; 3.12 and later use pidfds by themselves.
        asyncio.get_event_loop_policy().set_child_watcher(asyncio.PidfdChildWatcher())


def be_the_only_one(directory: Path) -> None:
    """Hold a lock on ``directory`` until the process ends, however it ends. Raises config.ConfigError.

    The bus has room for one service anyway, but before that shows, a second one would have cleared the first one's
    records. On the directory itself: the daemon's own mount over it hides no file of the host's.
    """
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise config.ConfigError(f"another one runs already: {directory} is locked") from None
    except OSError as error:
        raise config.ConfigError(f"{directory} cannot be used: {error}") from None


async def run(settings: config.Config) -> int:
    """Serve until told to stop, or until the bus is lost; returns the exit status."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    notifier = sdnotify.SystemdNotifier()
    async with AsyncExitStack() as stack:
        events = BlockEvents()
        stack.callback(events.close)
        machine = await Machine.start(settings, events)
        stack.push_async_callback(machine.close)
        store = await Store.open(settings.database.url)
        stack.push_async_callback(store.close)
        if leftovers := await store.delete_all_mounts():
            log.info("%d mounts of an earlier run are forgotten", leftovers)
        service = Service()
        bus = await Bus.connect(None, handler=service.handle)
        stack.push_async_callback(bus.close)
        mounts = Mounts(settings, store, machine, service)
        stack.push_async_callback(mounts.stop)
        service.open(bus, Parts(Authority(bus), store, Catalog(store, machine), mounts, settings.mounts.max))
        await bus.own(BUS_NAME)
        notifier.notify("READY=1")
        log.info("ready: %s, up to %d mounts, backend %s", BUS_NAME, settings.mounts.max, machine.backend)
        stopping = asyncio.create_task(stop.wait(), name="wait for a signal")
        ends: set[asyncio.Future[Any]] = {stopping, bus.lost}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        notifier.notify("STOPPING=1")
        if bus.lost.done():
            log.error("the bus is gone; ending")
            return 1
        log.info("stopping")
        return 0
