"""One virtual machine: qemu with a throw-away copy of an image, and the channel on which it tells what it does.

Emulated in software, because a KVM that is there need not work (nested ones are known to end QEMU); QEMU_ACCEL=kvm in
the environment uses it. A machine ends with its owner, also if that is killed (parent-death signal), and when it says
nothing for too long.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import socket
import subprocess
import threading
from typing import TYPE_CHECKING, Any, cast

from .project import CHECKOUT, PORT

if TYPE_CHECKING:
    from pathlib import Path

    from .image import Image

_MEMORY = "2048"
# Its patience with devices and services is that of a machine of its own; this one shares its processors with others.
_SYSTEMD = "systemd.show_status=0 systemd.default_device_timeout_sec=600"
_LAST_WORDS = 6000


class MachineError(Exception):
    """The machine did not start, ended, or says nothing any more; the message holds the last that its console had."""


class VirtualMachine:
    """A machine that runs from its making until ``close``. ``directory`` is its own, and stays."""

    def __init__(self, image: Image, project: Path, directory: Path, *, processors: int) -> None:
        self._console, self._messages = directory / "console", directory / "qemu"
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        disk = directory / "disk.qcow2"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image.disk, disk],  # noqa: S607
            check=True,
            stdin=subprocess.DEVNULL,
        )
        # Nobody has to wait for qemu to listen: it is born with its end, and if it does not start that end closes.
        self._channel, theirs = socket.socketpair()
        command: list[str | Path] = [
            *("setpriv", "--pdeathsig=KILL", "--", "qemu-system-x86_64", "-nodefaults", "-display", "none"),
            *("-machine", "q35", "-accel", os.environ.get("QEMU_ACCEL", "tcg,thread=multi"), "-cpu", "max"),
            *("-smp", str(processors), "-m", _MEMORY),
            *("-kernel", image.kernel, "-initrd", image.initrd),
            # A panic is a new start, which the runner in there tells from one that was asked for.
            *("-append", f"root=/dev/vda rw console=ttyS0 panic=1 oops=panic quiet {_SYSTEMD}"),
            *("-drive", f"file={disk},format=qcow2,if=none,id=root,cache=unsafe"),
            *("-device", "virtio-blk-pci,drive=root,serial=root"),
            *("-drive", f"file={project},format=raw,if=none,id=project,readonly=on"),
            *("-device", "virtio-blk-pci,drive=project,serial=project"),
            *("-device", "virtio-serial-pci", "-chardev", f"socket,id=tests,fd={theirs.fileno()}"),
            *("-device", f"virtserialport,chardev=tests,name={PORT}"),
            *("-device", "virtio-rng-pci", "-chardev", f"file,id=console,path={self._console}"),
            *("-serial", "chardev:console", "-nic", "none", "-monitor", "none"),
        ]
        try:
            with theirs, self._messages.open("wb") as messages:
                self._qemu = subprocess.Popen(
                    command,
                    cwd=CHECKOUT,
                    stdin=subprocess.DEVNULL,
                    stdout=messages,
                    stderr=messages,
                    pass_fds=[theirs.fileno()],
                    process_group=0,
                )
        except BaseException:
            self._channel.close()
            raise
        # Whoever waits for another machine meanwhile must not hold this one up.
        self._reading = threading.Thread(target=self._read, name=f"read {directory.name}")
        self._reading.start()

    def _read(self) -> None:
        with contextlib.suppress(ConnectionError), self._channel.makefile("rb") as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(b"")

    def message(self, *, silence: float) -> dict[str, Any]:
        """The next that it tells. Raises MachineError if there is none within ``silence`` seconds."""
        try:
            line = self._lines.get(timeout=silence)
        except queue.Empty:
            raise MachineError(f"the virtual machine said nothing for {silence:.0f} s\n{self.last_words()}") from None
        if not line.endswith(b"\n"):
            self._lines.put(b"")  # nothing more will come
            raise MachineError(f"the virtual machine ended\n{self.last_words()}")
        return cast("dict[str, Any]", json.loads(line))

    def last_words(self) -> str:
        """The end of what is on its console, and what qemu itself had to say."""
        texts = [file.read_text(errors="replace") for file in (self._messages, self._console) if file.exists()]
        return "\n".join(text[-_LAST_WORDS:] for text in texts)

    def close(self) -> None:
        """Switch it off; nothing on its disk is wanted any more."""
        self._qemu.kill()
        self._qemu.wait()
        self._reading.join()
        self._channel.close()


def may_run() -> bool:
    """Whether this user can make a virtual machine."""
    return os.geteuid() == 0


def check_tools() -> None:
    """Raises MachineError if something is missing that it takes."""
    missing = [tool for tool in ("qemu-system-x86_64", "mmdebstrap", "mksquashfs") if shutil.which(tool) is None]
    if missing:
        raise MachineError(f"not installed: {', '.join(missing)}; tools/setup --dev installs them")
