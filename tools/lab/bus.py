"""A system bus of our own and the real polkitd on it.

``private_bus`` is a ``dbus-daemon`` with the rules of the distribution's system bus and this project's policy file;
it works for root and for any user. ``polkit`` is the distribution's ``polkitd``, which sees this project's actions
and rule beside the host's; it needs root and the mount namespace of ``namespace.enter``. Both end with their context
manager; if its owner dies the kernel ends the bus, and polkitd ends because its bus is gone.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from sendense_restored.wire import Caller, Incoming

from . import children

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKOUT = Path(__file__).resolve().parents[2]
POLKIT_NAME = "org.freedesktop.PolicyKit1"
_POLKITD = "/usr/lib/polkit-1/polkitd"
_POLKIT_DATA = Path("/usr/share/polkit-1")
_POLKIT_BUS_POLICY = Path("/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf")
_SECONDS = 60.0

# The policy of dbus-daemon's own system.conf: nobody owns a name or calls anybody unless a file included below says
# so; signals, and replies to calls that were made, pass.
_CONFIGURATION = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Introspectable"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Properties"/>
    <deny send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"
          send_member="UpdateActivationEnvironment"/>
  </policy>
  <include ignore_missing="yes">{polkit}</include>
  <include>{ours}</include>
  {in_roots_place}
</busconfig>
"""
# On a bus that an ordinary user started, that user may be the services that only root may be on the real one.
_IN_ROOTS_PLACE = """\
  <policy user="{uid}">
    <allow own="com.sendense.Restore1"/>
    <allow own="{polkit}"/>
    <allow send_destination="{polkit}"/>
  </policy>
"""


@dataclass(frozen=True)
class PrivateBus:
    """A running bus; ``address`` is what ``DBUS_SYSTEM_BUS_ADDRESS`` takes."""

    address: str
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """What makes this the system bus for a program started with it."""
        return {"DBUS_SYSTEM_BUS_ADDRESS": self.address}

    def wait_for_name(self, name: str, owner: int, seconds: float = _SECONDS) -> None:
        """Return once somebody owns ``name``.

        Raises RuntimeError if the process ``owner``, which is expected to, ends before, BusError and TimeoutError.
        """
        # A loop in a thread of its own: the caller may be inside a running loop or have none.
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            executor.submit(asyncio.run, _wait_for_name(self.address, name, owner, seconds)).result()


@contextlib.contextmanager
def message_bus(directory: Path, configuration: str) -> Iterator[PrivateBus]:
    """A bus with a configuration file of that text; it and the bus' output go to ``directory``."""
    file, log = directory / "bus.conf", directory / "bus.log"
    file.write_text(configuration, encoding="utf-8")
    with contextlib.ExitStack() as stack:
        reading, writing = os.pipe()
        announced = stack.enter_context(os.fdopen(reading, encoding="utf-8"))
        try:
            argv = ["dbus-daemon", "--nofork", "--nopidfile", f"--config-file={file}", f"--print-address={writing}"]
            process = stack.enter_context(children.running(argv, log=log, fds=[writing]))
        finally:
            os.close(writing)
        address = announced.readline().strip()  # written once it listens; the end of the pipe if it never will
        if not address:
            raise RuntimeError(f"dbus-daemon did not start: {log.read_text(encoding='utf-8')}")
        yield PrivateBus(address, process.pid)


@contextlib.contextmanager
def private_bus(directory: Path) -> Iterator[PrivateBus]:
    """A bus whose socket and configuration lie in ``directory``, which every caller must be able to reach."""
    uid = os.geteuid()
    text = _CONFIGURATION.format(
        socket=escape(str(directory / "bus.socket")),
        polkit=_POLKIT_BUS_POLICY,
        ours=escape(str(CHECKOUT / "dbus/com.sendense.Restore1.conf")),
        in_roots_place="" if uid == 0 else _IN_ROOTS_PLACE.format(uid=uid, polkit=POLKIT_NAME),
    )
    with message_bus(directory, text) as bus:
        yield bus


@contextlib.contextmanager
def polkit(bus: PrivateBus, directory: Path) -> Iterator[int]:
    """The real polkitd on ``bus``, for root; gives its pid once it answers.

    ``directory`` takes copies of the host's actions and rules, with ours among them, and must be reachable for
    polkitd's own user. They are mounted over the host's for this polkitd alone.
    """
    script = "exec " + _POLKITD + " --no-debug"
    for kind, pattern in (("actions", "*.policy"), ("rules.d", "*.rules")):
        copies = directory / kind
        copies.mkdir(mode=0o755)
        for source in (*(_POLKIT_DATA / kind).glob(pattern), *(CHECKOUT / "polkit").glob(pattern)):
            shutil.copyfile(source, copies / source.name)
        script = f'mount --bind "$1/{kind}" {_POLKIT_DATA / kind}; {script}'
    argv = ["unshare", "--mount", "sh", "-ec", script, "sh", str(directory)]
    with children.running(argv, log=directory / "polkitd.log", environment=bus.environment) as process:
        bus.wait_for_name(POLKIT_NAME, process.pid)
        yield process.pid


async def _wait_for_name(address: str, name: str, owner: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    seen: asyncio.Future[bool] = loop.create_future()

    def settle(*, owned: bool) -> None:
        if not seen.done():
            seen.set_result(owned)

    def on_owner(changed: str, unique_name: str) -> None:
        if changed == name and unique_name:
            settle(owned=True)

    with contextlib.ExitStack() as stack:
        ended = os.pidfd_open(owner)
        stack.callback(os.close, ended)
        loop.add_reader(ended, lambda: settle(owned=False))
        stack.callback(loop.remove_reader, ended)
        caller = Caller(address, on_message=Incoming.release, on_owner=on_owner, on_end=lambda _: settle(owned=False))
        stack.callback(caller.connection.end, "done")
        await caller.open()
        if await caller.watch(name):
            settle(owned=True)
        async with asyncio.timeout(seconds):
            if not await seen:
                raise RuntimeError(f"process {owner}, or the bus, ended before it became {name}")
