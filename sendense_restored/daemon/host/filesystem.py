"""Mounting a volume as ``policy`` says, and unmounting it with the busy rule.

Each mount belongs to one ``Mounted``, which holds an O_PATH descriptor of its root until ``unmount`` (asks the
kernel, refuses when somebody still reads) or ``abandon`` (by force) ends it. Kernel file systems are mounted by
mount(8), NTFS by an ntfs-3g process that serves the mount as long as it lives; both are children, so a mount that
hangs on a dead device hangs there, and the daemon goes on after its deadline.

Which view of the files the user gets is found out, not guessed. With ``replay``, a journaling file system is tried
first with the device's read-only flag set: one that was left cleanly mounts, and nothing can have been written. One
with a dirty journal refuses; the flag is lifted, the kernel replays into the overlay, and the view is ``replayed`` if
it wrote. The flag is needed because XFS clears stale log blocks (2 MiB) on every mount of a writable device, clean
or not, and would look replayed each time. ntfs-3g never replays a log here: ``ntfs-3g.probe`` tells beforehand
whether there is one, or Windows was hibernated, and the view then is ``as-crashed``.

The kernel's own ntfs3 is left out: Debian 12 has none, and it knows neither the streams nor the plug-ins that
ntfs-3g serves.

A kernel before Linux 6.7 refuses a btrfs of which another copy is mounted. The overlay is given another identity then
(``btrfs_identity``), and nothing else is written for the ``as-crashed`` view.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from sendense_restored import errors, linux

from . import mountinfo
from .policy import (
    FLAGS,
    NTFS_HIBERNATED,
    NTFS_UNCLEAN,
    POLICIES,
    MountRefused,
    is_copy_refused,
    needs_writable,
    refusal_of_kernel,
    refusal_of_ntfs_3g,
)
from .process import Jail, ToolError, internal
from .signatures import VolumeState

if TYPE_CHECKING:
    from sendense_restored.config import Config

    from .child import Child
    from .loop import BlockDevice
    from .policy import Journal, Policy
    from .process import Tools
    from .volumes import Volume

__all__ = ["MountRefused", "Mounted", "View", "mount", "needs_writable"]

log = logging.getLogger(__name__)

REQUIRED_TOOLS: Final = {"mount": "mount", "umount": "mount", "stat": "coreutils"}
OPTIONAL_TOOLS: Final = ("ntfs-3g", "ntfs-3g.probe")

View = Literal["clean", "replayed", "as-crashed"]

_MOUNT_JAIL = Jail(uid=0, capabilities=frozenset({"sys_admin"}), memory=64 << 20)
_EXAMINE_JAIL = Jail(uid=0, memory=256 << 20)
# sys_admin to mount, setgid because ntfs-3g insists on calling setgroups(2); a server's processor time has no limit.
_NTFS_JAIL = Jail(uid=0, capabilities=frozenset({"sys_admin", "setgid"}), memory=256 << 20, cpu=None)
# Seconds for a server to end by itself once the kernel has told it to, before it is killed.
_GRACE = 5.0
_GIVE_IDENTITY = (sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("btrfs_identity.py")))


# --- mounting -------------------------------------------------------------------------------------------------------


async def mount(
    tools: Tools, config: Config, volume: Volume, device: BlockDevice, where: Path, *, journal: Journal
) -> Mounted:
    """Mount ``volume`` from ``device`` on the new directory ``where``.

    Raises MountRefused, errors.Failed if that is not the volume's fault, OSError if ``where`` cannot be made.
    Whatever was begun is undone then.
    """
    policy = POLICIES[volume.filesystem]
    work = _Mounting(tools, config.attach.timeout, volume, policy, device, where, journal)
    where.mkdir(mode=0o700)
    try:
        return await (work.with_ntfs_3g() if policy.driver == "ntfs-3g" else work.by_kernel())
    except BaseException as failure:
        if isinstance(failure, MountRefused):
            log.warning("not mounting %s: %s", volume.name, failure.__cause__ or failure)
        # Also a cancellation in the midst of it. Nobody has a descriptor in there yet, so this leaves nothing.
        try:
            await _detach(tools, where, config.attach.timeout, "--lazy")
            where.rmdir()
        except (ToolError, OSError) as error:
            log.warning("not clearing %s: %s", where, error)
        raise


@dataclass(frozen=True)
class _Mounting:
    """One attempt to mount."""

    tools: Tools
    seconds: float
    volume: Volume
    policy: Policy
    device: BlockDevice
    where: Path
    journal: Journal

    async def by_kernel(self) -> Mounted:
        """With a file system driver of the kernel."""
        if self.policy.unreplayed is None:
            await self._mount()
            return self._mounted("clean")
        if self.journal == "as-crashed" or self.device.read_only:
            await self._mount(*self.policy.unreplayed)
            return self._mounted("as-crashed")
        if self.policy.always_writes and await self._mounts_read_only():
            return self._mounted("clean")
        before = await self._mount()
        return self._mounted("replayed" if self.device.sectors_written() != before else "clean")

    async def _mounts_read_only(self) -> bool:
        """Whether it has mounted on a device that refuses writes, which no file system does that has to replay."""
        self._set_read_only(refuse=True)
        try:
            await self._mount()
        except MountRefused as refusal:
            if not refusal.retry_as_crashed:
                raise
            log.debug("%s has a journal to replay, or is damaged: %s", self.volume.name, refusal.__cause__)
            return False
        finally:
            self._set_read_only(refuse=False)
        return True

    def _set_read_only(self, *, refuse: bool) -> None:
        try:
            self.device.set_read_only(refuse=refuse)
        except OSError as error:
            raise internal("preparing a volume's device", error) from error

    async def _mount(self, *more: str) -> int:
        """Have the kernel mount it; ``sectors_written`` before that. Raises MountRefused, errors.Failed."""
        options = ",".join((*FLAGS, *self.policy.options, *more))
        what = ("-t", self.policy.driver, "-o", options, str(self.device.path), str(self.where))
        before = self.device.sectors_written()
        try:
            try:
                await self._run_mount(*what)
            except ToolError as error:
                if not (is_copy_refused(error) and await self._give_identity()):
                    raise
                before = self.device.sectors_written()
                await self._run_mount(*what)
        except ToolError as error:
            raise refusal_of_kernel(self.volume.filesystem, "as-crashed" if more else "replay", error) from error
        return before

    async def _run_mount(self, *what: str) -> None:
        failing_fast = asyncio.create_task(self._fail_fast(), name=f"errors of {self.device.path.name}")
        try:
            # No helper programs (-i), no record in /run/mount (-n).
            await self.tools.run(_MOUNT_JAIL, "mount", "-i", "-n", *what, seconds=self.seconds)
        finally:
            failing_fast.cancel()
            await asyncio.wait({failing_fast})

    async def _give_identity(self) -> bool:
        """Make it another file system than its copies in the eyes of the kernel; whether that was possible."""
        if not self.policy.identified or self.device.read_only:
            return False
        program, *arguments = _GIVE_IDENTITY
        try:
            await self.tools.run(
                _EXAMINE_JAIL, program, *arguments, str(self.device.path), str(uuid.uuid4()), seconds=self.seconds
            )
        except ToolError as error:
            log.warning("%s keeps its identity: %s", self.volume.name, error)
            return False
        log.debug("%s has an identity of its own: a copy of it is mounted", self.volume.name)
        return True

    async def _fail_fast(self) -> None:
        """Make XFS give up on a device that fails, from the first moment on.

        By itself it tries to write metadata again for ever (max_retries, Documentation/admin-guide/xfs.rst), and
        mount(2) waits for that while the log is replayed: a full overlay or a dead server would hold the process and
        the device until the next boot. The switches are there as soon as the kernel has begun to mount. No event
        tells of that, so this looks every few milliseconds until they are, or the mount has ended.
        """
        if self.policy.driver != "xfs":
            return
        switches = Path("/sys/fs/xfs", self.device.path.name, "error/metadata")
        while not (found := list(switches.glob("*/max_retries"))):  # noqa: ASYNC110 - sysfs has no event for it
            await asyncio.sleep(0.002)
        for switch in found:
            with contextlib.suppress(FileNotFoundError):  # the mount has failed meanwhile
                switch.write_text("0", encoding="ascii")

    async def with_ntfs_3g(self) -> Mounted:
        """With a server process."""
        if not self.tools.has("ntfs-3g") or not self.tools.has("ntfs-3g.probe"):
            raise MountRefused(VolumeState.UNSUPPORTED, "NTFS needs the package ntfs-3g; install it and try again")
        view: View = "as-crashed"
        if self.journal == "replay" and not self.device.read_only:
            view = await self._ntfs_view()
        options = ",".join((*FLAGS, *self.policy.options))
        with mountinfo.Watch() as watch:
            server = await self.tools.spawn(
                _NTFS_JAIL, "ntfs-3g", "-o", options, str(self.device.path), str(self.where)
            )
            try:
                await self._await_service(watch, server)
                return self._mounted(view, server)
            except BaseException:
                await server.close()
                raise

    async def _ntfs_view(self) -> View:
        # Opened for writing, the library looks at the log and the hibernation file; it writes nothing to find out.
        try:
            probed = await self.tools.run(
                _EXAMINE_JAIL,
                "ntfs-3g.probe", "--readwrite", str(self.device.path),
                seconds=self.seconds,
                accept=(0, NTFS_HIBERNATED, NTFS_UNCLEAN),
            )  # fmt: skip
        except ToolError as error:
            raise refusal_of_ntfs_3g(error.returncode) from error
        return "clean" if probed.returncode == 0 else "as-crashed"

    async def _await_service(self, watch: mountinfo.Watch, server: Child) -> None:
        """Wait until ``server`` has mounted and answers a request, or ended."""
        appeared = asyncio.create_task(watch.appeared(self.where), name="mount of ntfs-3g")
        ended = asyncio.create_task(server.wait(), name="end of ntfs-3g")
        try:
            await asyncio.wait({appeared, ended}, timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
            if appeared.done():
                # The mount stands before the server's last steps of starting; one that fails there is found here.
                with contextlib.suppress(ToolError):
                    await self.tools.run(
                        _EXAMINE_JAIL, "stat", "--file-system", str(self.where), seconds=self.seconds
                    )
                    return
                await asyncio.wait({ended}, timeout=_GRACE)
            status = ended.result() if ended.done() else None
            failure = ToolError(["ntfs-3g", str(self.device.path)], status, server.stderr)
            raise refusal_of_ntfs_3g(status) from failure
        finally:
            appeared.cancel()
            ended.cancel()
            await asyncio.wait({appeared, ended})

    def _mounted(self, view: View, server: Child | None = None) -> Mounted:
        """Check that what was asked for is there, and open its root."""
        found = mountinfo.mounted_on(self.where)
        expected = "fuseblk" if server else self.policy.driver
        if (
            found is None
            or found.filesystem != expected
            or found.source != str(self.device.path)
            or found.root != "/"
            or not found.options.issuperset(FLAGS)
        ):
            raise internal("mounting a volume", RuntimeError(f"{self.where}: found {found}, expected {expected}"))
        root = _open_root(self.where)
        if linux.mount_id(root) != found.id:
            os.close(root)
            raise internal("mounting a volume", RuntimeError(f"{self.where}: the mount changed meanwhile"))
        log.info("mounted %s (%s, %s)", self.volume.name, self.policy.driver, view)
        return Mounted(self.tools, self.seconds, self.where, self.policy.driver, view, root, found.id, server)


def _open_root(path: Path) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


async def _detach(tools: Tools, path: Path, seconds: float, *how: str) -> None:
    """Run umount(8), if something is mounted there. Raises ToolError."""
    if mountinfo.mounted_on(path) is not None:
        await tools.run(_MOUNT_JAIL, "umount", "-i", "-n", "-c", *how, str(path), seconds=seconds)


# --- the mount ------------------------------------------------------------------------------------------------------


class Mounted:
    """A mounted volume; ends with a successful ``unmount`` or with ``abandon``, whichever its one owner calls."""

    def __init__(
        self,
        tools: Tools,
        seconds: float,
        path: Path,
        driver: str,
        view: View,
        root: int,
        mount_id: int,
        server: Child | None,
    ) -> None:
        self.path = path
        self.driver = driver
        self.view = view
        self.root = root
        """An O_PATH descriptor of its root directory; -1 once it is unmounted."""
        self.mount_id = mount_id
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done, with a reason, when the process that serves it ends without our doing; cancelled with the mount."""
        self._tools = tools
        self._seconds = seconds
        self._server = server
        self._ending = False
        self._follower = asyncio.create_task(self._follow(server), name=f"ntfs-3g of {path}") if server else None

    async def _follow(self, server: Child) -> None:
        await server.wait()
        self._check_server()

    def _check_server(self) -> None:
        if self._server is not None and self._server.ended and not self._ending and not self.lost.done():
            log.error("ntfs-3g of %s ended: %s", self.path, self._server.stderr)
            self.lost.set_result("the process that serves its files ended; mount the backup again")

    async def unmount(self) -> None:
        """Unmount it, if nobody else holds anything in it.

        Raises errors.Busy if somebody does (it stays usable, with a new ``root``), errors.Timeout if the device does
        not answer, errors.Failed.
        """
        self._close_root()
        self._ending = True
        try:
            await _detach(self._tools, self.path, self._seconds)
        except ToolError as error:
            raise self._still_there(error) from error
        if mountinfo.mounted_on(self.path) is not None:
            raise self._still_there(RuntimeError(f"{self.path} is still mounted after umount"))
        if self._server is not None:
            # The kernel has told it to end; it only has to close the device.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GRACE):
                    await self._server.wait()
        await self._finish()

    def _still_there(self, error: Exception) -> errors.RestoreError:
        self._ending = False
        self._check_server()
        found = mountinfo.mounted_on(self.path)
        if found is not None and found.id == self.mount_id:
            self.root = _open_root(self.path)
        if not isinstance(error, ToolError):
            return internal("unmounting a volume", error)
        if error.returncode is None:
            log.warning("not unmounting %s: %s", self.path, error)
            return errors.Timeout("the volume's device does not answer; unmount with force")
        if "target is busy" in error.stderr:
            return errors.Busy("files of this volume are still open; close them, or unmount with force")
        return internal("unmounting a volume", error)

    def kill(self) -> None:
        """End its server at once, if it has one: who waits for an answer of it gets an error."""
        if self._server is not None:
            self._server.kill()

    async def abandon(self) -> None:
        """End it by force, whoever still reads; call it when the device is to go anyway. May be called again.

        The server goes first, so that nothing waits for it. Then the mount is detached lazily, here and nowhere
        else: those who still hold files keep a mount that nobody can enter any more, and it goes with the last of
        them; a plain umount would refuse. Raises errors.Failed if the kernel does not even do that.
        """
        self._close_root()
        self._ending = True
        if self._server is not None:
            self._server.kill()
        try:
            await _detach(self._tools, self.path, self._seconds, "--lazy")
        except ToolError as error:
            raise internal("detaching a volume by force", error) from error
        await self._finish()

    async def _finish(self) -> None:
        if self._server is not None and self._follower is not None:
            await self._server.close()
            self._follower.cancel()
            await asyncio.wait({self._follower})
        with contextlib.suppress(FileNotFoundError):
            self.path.rmdir()
        self.lost.cancel()

    def _close_root(self) -> None:
        if self.root >= 0:
            os.close(self.root)
            self.root = -1
