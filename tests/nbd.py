"""A kernel with NBD that is made of files, and events that come when a test says so."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Sysfs:
    """``/sys``, ``/dev``, ``/proc`` and the directory for locks, as far as the pool looks at them."""

    def __init__(self, root: Path, *, devices: int, max_part: int | None) -> None:
        self.sys, self.dev, self.proc, self.locks = (root / name for name in ("sys", "dev", "proc", "lock"))
        for directory in (self.sys / "block", self.dev, self.proc):
            directory.mkdir(parents=True)
        if max_part is not None:
            self.parameter("nbds_max", devices)
            self.parameter("max_part", max_part)
        for number in range(devices):
            self.block(number).mkdir()
            self._write(number, "size", 0)
            self._write(number, "dev", f"43:{number << 5}")
            (self.dev / f"nbd{number}").touch()

    @property
    def places(self) -> dict[str, Path]:
        """Keyword arguments of ``Pool``."""
        return {"sys": self.sys, "dev": self.dev, "proc": self.proc, "locks": self.locks}

    def block(self, number: int) -> Path:
        return self.sys / "block" / f"nbd{number}"

    def parameter(self, name: str, value: int) -> None:
        directory = self.sys / "module/nbd/parameters"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"{value}\n")

    def _write(self, number: int, name: str, value: object) -> None:
        (self.block(number) / name).write_text(f"{value}\n")

    def size(self, number: int, size: int) -> None:
        self._write(number, "size", size // 512)

    def connect(self, number: int, pid: int | None, size: int) -> None:
        if pid is not None:
            self._write(number, "pid", pid)
        self.size(number, size)

    def disconnect(self, number: int) -> None:
        self.size(number, 0)
        (self.block(number) / "pid").unlink(missing_ok=True)

    def partition(self, number: int, partition: int, *, start: int, sectors: int) -> None:
        directory = self.block(number) / f"nbd{number}p{partition}"
        directory.mkdir()
        for name, value in {"start": start, "size": sectors, "dev": f"43:{(number << 5) + partition}"}.items():
            (directory / name).write_text(f"{value}\n")

    def vanish(self, number: int, partition: int) -> None:
        shutil.rmtree(self.block(number) / f"nbd{number}p{partition}")

    def process(self, pid: int, *, leader: int | None = None) -> None:
        directory = self.proc / str(pid)
        directory.mkdir()
        (directory / "status").write_text(f"Name:\tnbd-client\nTgid:\t{leader or pid}\nPid:\t{pid}\n")

    def process_ends(self, pid: int) -> None:
        shutil.rmtree(self.proc / str(pid))


class FakeEvents:
    """``BlockEvents`` whose events a test makes; it counts how often somebody looked."""

    def __init__(self) -> None:
        self.looks = 0
        self._waiting: set[asyncio.Event] = set()

    def happen(self) -> None:
        """One event, for everybody who waits."""
        for event in self._waiting:
            event.set()

    async def seen(self) -> None:
        """Let those who wait look, as far as they have something to see."""
        while any(event.is_set() for event in self._waiting):  # noqa: ASYNC110 - turns, no time
            await asyncio.sleep(0)

    async def idle(self) -> None:
        """Let everybody come to rest."""
        for _ in range(10):
            await asyncio.sleep(0)

    async def until(self, condition: Callable[[], bool], *, seconds: float | None) -> bool:
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            async with asyncio.timeout(seconds):
                while not self._look(condition):
                    await event.wait()
                    event.clear()
        except TimeoutError:
            return self._look(condition)
        finally:
            self._waiting.discard(event)
        return True

    def _look(self, condition: Callable[[], bool]) -> bool:
        self.looks += 1
        return condition()
