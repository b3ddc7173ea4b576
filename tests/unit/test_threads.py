"""Storage that does not answer holds nobody but those who ask it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.daemon.host.threads import MOST_WAITING, Threads

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def dead() -> Iterator[threading.Event]:
    """What a function waits for that does not come back; it does at the end of the test."""
    event = threading.Event()
    yield event
    event.set()
    for thread in threading.enumerate():
        if thread.name.startswith("waits for"):
            thread.join(20)


async def test_a_result_and_an_exception_come_back() -> None:
    threads = Threads()
    assert await threads.run("here", lambda: 42, seconds=20) == 42
    with pytest.raises(FileNotFoundError):
        await threads.run("here", lambda: Path("/nowhere").stat(), seconds=20)


async def test_what_does_not_answer_is_given_up_and_its_late_result_discarded(dead: threading.Event) -> None:
    threads, late = Threads(), asyncio.get_running_loop().create_future()
    with pytest.raises(TimeoutError):
        await threads.run("dead", dead.wait, seconds=0.05, discard=late.set_result)
    dead.set()
    async with asyncio.timeout(60):
        assert await late is True


async def test_a_cancelled_caller_leaves_the_result_to_be_discarded(dead: threading.Event) -> None:
    threads, late = Threads(), asyncio.get_running_loop().create_future()
    asking = asyncio.create_task(threads.run("dead", dead.wait, seconds=None, discard=late.set_result))
    await asyncio.sleep(0)  # one turn, in which it starts
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    dead.set()
    async with asyncio.timeout(60):
        assert await late is True


async def test_a_result_that_comes_in_the_moment_of_the_cancellation_is_discarded() -> None:
    threads, late = Threads(), asyncio.get_running_loop().create_future()
    asking = asyncio.create_task(threads.run("here", lambda: "result", seconds=None, discard=late.set_result))
    await asyncio.sleep(0)  # one turn, in which it starts
    for thread in threading.enumerate():
        if thread.name == "waits for here":
            thread.join(20)
    asyncio.get_running_loop().call_soon(asking.cancel)  # behind the result, which is on the loop already
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert late.result() == "result"


async def test_a_dead_place_gets_no_more_threads_and_others_are_served(dead: threading.Event) -> None:
    threads = Threads()
    for _ in range(MOST_WAITING):
        with pytest.raises(TimeoutError):
            await threads.run("dead", dead.wait, seconds=0)
    with pytest.raises(errors.Unavailable):
        await threads.run("dead", dead.wait, seconds=0)
    assert await threads.run("alive", lambda: "served", seconds=20) == "served"
    dead.set()
    for thread in threading.enumerate():
        if thread.name == "waits for dead":
            await asyncio.to_thread(thread.join, 20)
    await asyncio.sleep(0)  # the last answers are on the loop
    assert await threads.run("dead", lambda: "again", seconds=20) == "again"


def test_a_thread_that_never_comes_back_does_not_keep_the_process() -> None:
    script = """
import asyncio, threading
from sendense_restored.daemon.host.threads import Threads
async def main():
    try:
        await Threads().run("dead", threading.Event().wait, seconds=0)
    except TimeoutError:
        print("given up")
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60)
    assert done.stdout == b"given up\n"
