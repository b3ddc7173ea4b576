"""A change of a block device wakes those who wait for it."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

from sendense_restored.daemon.host.udev import BlockEvents


async def test_what_is_true_already_needs_no_event(events: BlockEvents) -> None:
    assert await events.until(lambda: True, seconds=0)


async def test_what_does_not_come_true_ends_with_its_time(events: BlockEvents) -> None:
    assert not await events.until(lambda: False, seconds=0.05)


async def test_an_event_of_the_kernel_is_a_reason_to_look_again(events: BlockEvents, tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(1 << 20))
    attach = subprocess.run(["losetup", "--find", "--show", backing], check=True, capture_output=True, text=True)  # noqa: ASYNC221
    sysfs = Path("/sys/block", Path(attach.stdout.strip()).name, "loop/backing_file")
    looks: list[bool] = []

    def gone() -> bool:
        looks.append(sysfs.exists())
        return not looks[-1]

    waiting = asyncio.create_task(events.until(gone, seconds=20))
    await asyncio.sleep(0)  # one turn, in which it looks for the first time
    subprocess.run(["losetup", "--detach", attach.stdout.strip()], check=True)  # noqa: ASYNC221
    assert await waiting
    assert looks[0]
    assert len(looks) < 20  # by events, not by looking all the time


async def test_it_looks_after_an_event_and_at_no_other_time(events: BlockEvents) -> None:
    """With the kernel's events withheld, and given one by one."""
    assert events._monitor is not None
    asyncio.get_running_loop().remove_reader(events._monitor.fileno())
    looks: list[bool] = []
    there = False

    def look() -> bool:
        looks.append(there)
        return there

    assert not await events.until(look, seconds=0.3)
    assert looks == [False, False], "at the beginning, and when time is up"
    looks.clear()
    waiting = asyncio.create_task(events.until(look, seconds=20))
    for seen in range(1, 4):
        await asyncio.wait({waiting}, timeout=0.05)
        assert len(looks) == seen
        events._drain()
    await asyncio.wait({waiting}, timeout=0.05)
    there = True
    await asyncio.wait({waiting}, timeout=0.05)
    assert not waiting.done(), "nothing has said that it is there"
    events._drain()
    assert await waiting
    assert looks == [False] * 4 + [True]


async def test_an_overflow_is_one_more_reason_to_look(events: BlockEvents) -> None:
    """POLLERR, which is how a lost event shows, must not end the listening."""
    calls = iter([OSError("overflow"), None])

    class Broken:
        def poll(self, _timeout: int) -> None:
            if (error := next(calls)) is not None:
                raise error

    looks: list[int] = []
    waiting = asyncio.create_task(events.until(lambda: bool(looks), seconds=20))
    await asyncio.sleep(0)  # one turn, in which it looks for the first time
    monitor, events._monitor = events._monitor, Broken()
    looks.append(1)
    events._drain()
    events._monitor = monitor
    assert await waiting


def test_the_descriptor_goes_with_the_listening() -> None:
    async def listen() -> None:
        before = {path.name for path in Path("/proc/self/fd").iterdir()}
        BlockEvents().close()
        assert {path.name for path in Path("/proc/self/fd").iterdir()} == before

    asyncio.run(listen())
