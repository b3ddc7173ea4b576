"""Assembly of the daemon, in one visible order, and its end in the reverse one.

Crash-only: nothing here has to run for the machine to be clean. The kernel takes mounts, loops and children away
with the daemon's mount namespace; what is done at the end only makes it quicker and kinder to those who still read.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import fcntl
import gc
import logging
import os
import resource
import signal
import stat
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sendense_restored import __version__, config
from sendense_restored.errors import CatalogUnavailable

from . import journal
from .authority import Authority
from .bus import Bus, BusError
from .catalog import Catalog
from .events import Events
from .host.clock import BootClock
from .host.machine import Machine, enter_private_namespace
from .host.process import ToolMissingError
from .host.udev import BlockEvents
from .interface import BUS_NAME, Parts, Service
from .mounts import Mounts
from .notify import ServiceManager
from .reload import Reload
from .resume import Resume
from .store import Store, StoreError, StoreUnreachableError
from .sweep import Sweep

if TYPE_CHECKING:
    from .mount import Mount

log = logging.getLogger(__name__)

EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h: the service cannot run as it is set up, and a restart would not help."""

_SECONDS_PER_MOUNT = 10.0
"""What the service manager is asked to wait for each mount that is taken down at the end, beside a step's timeout."""


def main() -> None:
    """The program ``sendense-restored``."""
    parser = argparse.ArgumentParser(prog="sendense-restored", description="File-level restore over D-Bus.")
    parser.add_argument("--config", type=Path, default=config.DEFAULT_FILE, help="default: %(default)s")
    parser.add_argument("--debug", action="store_true", help="log what is tried as well as what happened")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    arguments = parser.parse_args()
    journal.set_up(debug=arguments.debug)
    manager = ServiceManager.take()
    try:
        settings = config.load(arguments.config)
        prepare(settings)
        sys.exit(asyncio.run(run(settings, arguments.config, manager)))
    except (AnotherRunsError, BusError, OSError, CatalogUnavailable, StoreUnreachableError) as error:
        log.critical("not starting: %s", error)
        manager.notice(f"not starting: {error}")
        sys.exit(1)
    except (config.ConfigError, ToolMissingError, StoreError) as error:
        log.critical("not starting: %s", error)
        manager.notice(f"not starting: {error}")
        sys.exit(EXIT_CONFIG)


def prepare(settings: config.Config) -> None:
    """What has to happen before any thread starts. Raises config.ConfigError, AnotherRunsError."""
    if os.geteuid() != 0:
        raise config.ConfigError("the service must run as root: it attaches block devices and mounts file systems")
    os.umask(0o077)
    # A mount holds a descriptor for each layer of its chain; children get limits of their own.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    be_the_only_one(settings.paths.runtime)  # until the process ends, however it ends
    try:
        enter_private_namespace(settings)
    except OSError as error:
        hint = " ('/' is no mount point here, as in a plain chroot)" if error.errno == errno.EINVAL else ""
        raise config.ConfigError(f"no private mount namespace: {error}{hint}") from None
    if sys.version_info < (3, 12):
        # The default of 3.11 starts a thread for each child; 3.12 and later use pidfds by themselves.
        asyncio.get_event_loop_policy().set_child_watcher(asyncio.PidfdChildWatcher())


class AnotherRunsError(Exception):
    """The lock is somebody else's. It may be let go of, so this is no matter of the configuration."""


def be_the_only_one(directory: Path) -> int:
    """Hold a lock on ``directory`` for as long as the descriptor is open that this returns.

    The bus has room for one service anyway, but before that shows, a second one would have cleared the first one's
    records. On the directory itself: the daemon's own mount over it hides no file of the host's. Whoever can open it
    can lock it, so nobody else may. Raises config.ConfigError, AnotherRunsError.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _close_to_others(directory, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(descriptor)
            raise
    except BlockingIOError:
        raise AnotherRunsError(f"another one runs already: {directory} is locked") from None
    except OSError as error:
        raise config.ConfigError(f"{directory} cannot be used: {error}") from None
    return descriptor


def _close_to_others(directory: Path, descriptor: int) -> None:
    """Raises config.ConfigError, OSError."""
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid():
        raise config.ConfigError(f"{directory} belongs to another user (uid {status.st_uid})")
    if stat.S_IMODE(status.st_mode) & 0o077:
        # One that others use as well (/run itself, by mistake) is not taken away from them.
        if os.listdir(descriptor):
            raise config.ConfigError(f"{directory} holds other things: paths.runtime must be a directory of its own")
        os.fchmod(descriptor, 0o700)


class _Told:
    """Who hears of mounts: the D-Bus side, and in numbers the service manager."""

    def __init__(self, service: Service, manager: ServiceManager) -> None:
        self._service, self._manager = service, manager
        self.mounts: Mounts

    def added(self, mount: Mount) -> None:
        """See ``mount.Listener``."""
        self._service.added(mount)
        self._tell()

    def changed(self, mount: Mount) -> None:
        """See ``mount.Listener``."""
        self._service.changed(mount)
        self._tell()

    def removed(self, mount: Mount) -> None:
        """See ``mount.Listener``."""
        self._service.removed(mount)
        self._tell()

    def _tell(self) -> None:
        states = Counter(str(mount.session.state) for mount in self.mounts)
        self._manager.status(", ".join(f"{states[state]} {state}" for state in sorted(states)) or "no mounts")


async def run(settings: config.Config, file: Path, manager: ServiceManager) -> int:
    """Serve until told to stop, or until the bus is lost; returns the exit status. A reload reads ``file``."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, log.info, "not reloading: still starting")
    async with AsyncExitStack() as stack:
        events = BlockEvents()
        stack.callback(events.close)
        machine = await Machine.start(settings, events)
        stack.push_async_callback(machine.close)
        store = await Store.open(settings.database.url, settings.database.catalog_url)
        stack.push_async_callback(store.close)
        clock = BootClock()
        stack.callback(clock.close)
        history = Events(store, unix=clock.unix, monotonic=clock.now)
        stack.push_async_callback(history.close)
        service = Service()
        bus = await Bus.connect(None, handler=service.handle)
        stack.push_async_callback(bus.close)
        stack.push_async_callback(manager.unwatch)
        told = _Told(service, manager)
        mounts = told.mounts = Mounts(settings, store, machine, told, history, clock)
        stack.push_async_callback(mounts.stop)
        resume = Resume(mounts, store, machine, history, clock)
        sweep = Sweep(mounts, resume, store, machine, history, clock)
        stack.push_async_callback(sweep.close)
        service.open(
            bus,
            Parts(
                Authority(bus),
                store,
                Catalog(store, machine, settings.image.repositories),
                mounts,
                sweep,
                history,
                machine,
            ),
        )
        # Before the name is ours: no client finds a mount missing that is only not made again yet.
        resumed = await resume.load()
        await bus.own(BUS_NAME)
        sweep.begin()

        def apply(changed: config.Config) -> None:
            mounts.reload(changed)
            sweep.reload()
            service.reloaded()

        reload = Reload(file, settings, manager, apply)
        stack.push_async_callback(reload.close)
        loop.add_signal_handler(signal.SIGHUP, reload.request)
        # What stands now stays: the collector of garbage need not walk through it again, which would take it longer
        # than any request takes the event loop.
        gc.collect()
        gc.freeze()
        manager.ready()
        manager.watch(bus.ping)
        log.info(
            "ready: %s, up to %d mounts, backend %s, %d to be made again",
            *(BUS_NAME, settings.mounts.max, machine.backend, resumed),
        )
        status = await _until_the_end(stop, bus, machine)
        manager.stopping()
        manager.extend(settings.attach.timeout + _SECONDS_PER_MOUNT * len(mounts))
        return status


async def _until_the_end(stop: asyncio.Event, bus: Bus, machine: Machine) -> int:
    """Wait until it is told to stop, or cannot go on; the exit status."""
    stopping = asyncio.create_task(stop.wait(), name="wait for a signal")
    ends: set[asyncio.Future[Any]] = {stopping, bus.lost, machine.lost}
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if bus.lost.done():
        log.error("the bus is gone; ending")
        return 1
    if machine.lost.done():
        log.error("%s; ending", machine.lost.result())
        return 1
    log.info("stopping")
    return 0
