"""A process whose work is timed: ``python -m tools.benchmarks.worker``.

It reads one JSON object a line (``do``, and the arguments of that task) and answers each with one; it ends with its
standard input. Times are taken in here, around the work alone, so that neither the start of an interpreter nor the
talk with the benchmark counts. One worker is an unprivileged caller of the service, with the D-Bus library as it is;
another one, root's, does the bare thing. All seconds are of the monotonic clock.
"""

# mypy: allow-untyped-calls
# dbus-next has functions without annotations.

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import subprocess
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

from sendense_restored.client import Client

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the library warns of what it imports
    from dbus_next._private.unmarshaller import Unmarshaller
    from dbus_next.aio.message_bus import MessageBus
    from dbus_next.constants import BusType, MessageType
    from dbus_next.message import Message
    from dbus_next.signature import Variant

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

_NAME = "com.sendense.Restore1"
_ROOT = "/com/sendense/Restore1"
_CHUNK = 1 << 20
_PAGE = 10_000
# The fields of a line of OpenListing.
_FIND = ("find", ".", "-mindepth", "1", "-printf", r"%P\t%y\t%s\t%m\t%T@\t%n\t%l\n")

Answer = dict[str, Any]


class Bare:
    """The bare tools, on paths of this machine."""

    async def scan_directory(self, path: str) -> Answer:
        """``scandir`` and an ``lstat`` of each entry, kept in a list."""
        with _directory(path) as descriptor:
            started = time.perf_counter()
            with os.scandir(descriptor) as entries:
                found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
            return {"seconds": time.perf_counter() - started, "entries": len(found)}

    async def find(self, path: str) -> Answer:
        """GNU find's lines, through a pipe."""
        started = time.perf_counter()
        with subprocess.Popen(_FIND, cwd=path, stdout=subprocess.PIPE) as process:  # noqa: ASYNC220 - nothing else to do
            assert process.stdout is not None
            lines = _lines(process.stdout.fileno())
        return {"seconds": time.perf_counter() - started, "entries": lines, "status": process.returncode}

    async def open_file(self, path: str, count: int) -> Answer:
        """``open`` and ``close``; the time of one."""
        directory, _, name = path.rpartition("/")
        with _directory(directory) as descriptor:
            started = time.perf_counter()
            for _ in range(count):
                os.close(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=descriptor))
            return {"seconds": (time.perf_counter() - started) / count}

    async def read_file(self, path: str) -> Answer:
        """``open``, and all that is in it."""
        started = time.perf_counter()
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = _all(descriptor)
        finally:
            os.close(descriptor)
        return {"seconds": time.perf_counter() - started, "bytes": size}


class Library:
    """The D-Bus library alone."""

    async def unpack(self, count: int) -> Answer:
        """What every client that uses it pays for an answer of ListFiles, whoever made the answer."""
        listed = [[f"document-{n:07}.txt", "file", 0, 0o644, time.time_ns(), "", {}] for n in range(count)]
        message = Message(
            message_type=MessageType.METHOD_RETURN,
            serial=1,
            reply_serial=1,
            signature="a(sstuxsa{sv})s",
            body=[listed, ""],
        )
        packed = io.BytesIO(message._marshall())  # noqa: SLF001 - it has no other way
        started = time.perf_counter()
        unpacked = Unmarshaller(packed).unmarshall()
        return {"seconds": time.perf_counter() - started, "entries": len(unpacked.body[0])}


class Caller:
    """The service, asked with dbus-next and nothing around it."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus

    async def _call(self, path: str, interface: str, member: str, signature: str, *body: object) -> Message:
        message = Message(
            destination=_NAME,
            path=path,
            interface=f"{_NAME}.{interface}",
            member=member,
            signature=signature,
            body=list(body),
        )
        reply = await self._bus.call(message)
        assert reply is not None
        if reply.message_type is MessageType.ERROR:
            raise RuntimeError(f"{member}: {reply.error_name}: {' '.join(map(str, reply.body))}")
        return reply

    async def mount(self, backup: str) -> Answer:
        """Mount it; the object."""
        started = time.perf_counter()
        reply = await self._call(_ROOT, "Manager", "Mount", "sa{sv}", backup, {})
        return {"seconds": time.perf_counter() - started, "mount": reply.body[0]}

    async def unmount(self, mount: str) -> Answer:
        """Unmount it."""
        started = time.perf_counter()
        await self._call(mount, "Mount", "Unmount", "a{sv}", {})
        return {"seconds": time.perf_counter() - started}

    async def list_files(self, mount: str, path: str, limit: int) -> Answer:
        """One page."""
        started = time.perf_counter()
        reply = await self._call(mount, "Mount", "ListFiles", "sa{sv}", path, {"limit": Variant("u", limit)})
        return {"seconds": time.perf_counter() - started, "entries": len(reply.body[0])}

    async def list_pages(self, mount: str, path: str) -> Answer:
        """Page by page, the largest that there are, to the end."""
        started = time.perf_counter()
        entries, cursor = 0, ""
        while True:
            options = {"limit": Variant("u", _PAGE), "cursor": Variant("s", cursor)}
            reply = await self._call(mount, "Mount", "ListFiles", "sa{sv}", path, options)
            entries += len(reply.body[0])
            cursor = reply.body[1]
            if not cursor:
                return {"seconds": time.perf_counter() - started, "entries": entries}

    async def list_stream(self, mount: str, path: str) -> Answer:
        """OpenListing, read to its end; the summary is not counted."""
        started = time.perf_counter()
        reply = await self._call(mount, "Mount", "OpenListing", "sa{sv}", path, {})
        descriptor = reply.unix_fds[reply.body[0]]
        try:
            os.set_blocking(descriptor, True)
            lines = _lines(descriptor)
        finally:
            os.close(descriptor)
        return {"seconds": time.perf_counter() - started, "entries": lines - 1}

    async def open_file(self, mount: str, path: str, count: int) -> Answer:
        """OpenFile, and the descriptor closed; the time of one."""
        started = time.perf_counter()
        for _ in range(count):
            reply = await self._call(mount, "Mount", "OpenFile", "sa{sv}", path, {})
            os.close(reply.unix_fds[reply.body[0]])
        return {"seconds": (time.perf_counter() - started) / count}

    async def read_file(self, mount: str, path: str) -> Answer:
        """OpenFile, and all that is in it."""
        started = time.perf_counter()
        reply = await self._call(mount, "Mount", "OpenFile", "sa{sv}", path, {})
        descriptor = reply.unix_fds[reply.body[0]]
        try:
            size = _all(descriptor)
        finally:
            os.close(descriptor)
        return {"seconds": time.perf_counter() - started, "bytes": size}


class Own:
    """The service, asked with the project's own client."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def own_list_files(self, mount: str, path: str, limit: int) -> Answer:
        """One page, as frozen values."""
        identity = _identity(mount)
        started = time.perf_counter()
        entries, _ = await self._client.list_files(identity, path, limit=limit)
        return {"seconds": time.perf_counter() - started, "entries": len(entries)}

    async def place(self, mount: str) -> Answer:
        """Where a mount lies in the daemon's view, and its open volumes."""
        info = await self._client.mount_info(_identity(mount))
        return {"path": info.mount_path, "volumes": [v.name for v in info.volumes if v.state == "mounted"]}

    async def catalogue(self, path: str) -> Answer:
        """Add a repository and all that is in it; by virtual machine the ids of its chain, oldest first."""
        await self._client.scan(await self._client.add_repository("bench", path))
        children: dict[tuple[str, str], str] = {}
        async for backup in self._client.backups():
            children[backup.vm_name, backup.parent_backup_id] = backup.backup_id
        chains: dict[str, list[str]] = {}
        for vm in {vm for vm, _ in children}:
            below = ""
            while below := children.get((vm, below), ""):
                chains.setdefault(vm, []).append(below)
        return {"chains": chains}


def _identity(mount: str) -> str:
    return mount.rpartition("/")[2].replace("_", "-")


@contextlib.contextmanager
def _directory(path: str) -> Any:  # noqa: ANN401 - an iterator of a descriptor
    """The directory, open: how it is reached is not part of what is timed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lines(descriptor: int) -> int:
    """How many there are until its end."""
    lines = 0
    while chunk := os.read(descriptor, _CHUNK):
        lines += chunk.count(b"\n")
    return lines


def _all(descriptor: int) -> int:
    """How many bytes there are until its end."""
    buffer, size = bytearray(_CHUNK), 0
    while count := os.readv(descriptor, [buffer]):
        size += count
    return size


def _tasks(*owners: object) -> dict[str, Callable[..., Awaitable[Answer]]]:
    return {name: getattr(owner, name) for owner in owners for name in dir(owner) if not name.startswith("_")}


async def _serve(owners: Sequence[object]) -> None:
    tasks = _tasks(*owners)
    while line := sys.stdin.readline():  # blocking: between two requests there is nothing to do
        request = json.loads(line)
        try:
            answer = await tasks[request.pop("do")](**request)
        except (RuntimeError, OSError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


async def _main(kind: str) -> None:
    if kind == "bare":
        await _serve([Bare()])
        return
    bus = await MessageBus(bus_type=BusType.SYSTEM, negotiate_unix_fd=True).connect()
    async with await Client.connect() as client:
        await _serve([Library(), Caller(bus), Own(client)])


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
