"""Listing streams as the client reads them: whole or not at all, in little memory, without blocking the loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.client import Client, Found, Listing, Problem, Summary
from tests.bus.fake import MOUNT_ID, Answer, FakeService, found, object_of, summary
from tools.lab.leftovers import of_this_process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture
async def client(bus_address: str) -> AsyncIterator[Client]:
    async with await Client.connect(bus_address) as client:
        yield client


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe of the test's own: the Listing has its reading end, the test writes."""
    reading, writing = os.pipe()
    yield reading, writing
    with contextlib.suppress(OSError):  # the test has closed it
        os.close(writing)


async def whole(listing: Listing) -> list[Found | Problem]:
    async with listing, asyncio.timeout(60):
        return [record async for record in listing]


async def test_records_arrive_typed_and_the_summary_at_the_end(service: FakeService, client: Client) -> None:
    service.answers["OpenListing"] = service.stream(
        found("/disk/a", size=5, novelty="x"),
        found("/disk/l", "symlink", target="a", nlink=2, time_clamped=True),
        {"path": "/disk/b", "error": "damaged"},
        summary(2, 1, truncated=True),
    )
    before = of_this_process()
    async with await client.listing(MOUNT_ID, "/disk") as listing:
        with pytest.raises(errors.Unavailable, match="to its end"):
            _ = listing.summary
        records = [record async for record in listing]
        assert listing.summary == Summary(2, 1, truncated=True)
        assert [record async for record in listing] == []
    mtime = 1_700_000_000 * 10**9
    assert records == [
        Found("/disk/a", "file", 5, 0o644, mtime),
        Found("/disk/l", "symlink", 0, 0o644, mtime, target="a", nlink=2, time_clamped=True),
        Problem("/disk/b", "damaged"),
    ]
    assert service.calls[-1].path == object_of(MOUNT_ID)
    # The service's own end was opened meanwhile; ours is closed.
    assert len(of_this_process()) <= len(before) + 1


async def test_filters_have_the_contracts_types_and_zero_bounds_count(service: FakeService, client: Client) -> None:
    service.answers["OpenListing"] = service.stream(summary(0))
    await whole(await client.listing(MOUNT_ID, "/"))
    assert service.called_with("OpenListing") == ["/", {}]
    await whole(
        await client.listing(
            MOUNT_ID,
            "/disk",
            recursive=True,
            max_depth=3,
            name="*.c",
            kind="file",
            min_size=1,
            max_size=0,
            newer=0,
            older=-1,
            limit=9,
            on_behalf_of="eva",
        )
    )
    sent = service.calls[-1].body[1]
    assert {key: variant.signature for key, variant in sent.items()} == {
        "recursive": "b",
        "max_depth": "u",
        "name": "s",
        "kind": "s",
        "min_size": "t",
        "max_size": "t",
        "newer": "x",
        "older": "x",
        "limit": "t",
        "on_behalf_of": "s",
    }
    assert (sent["max_size"].value, sent["older"].value) == (0, -1)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [found("/disk/a")],
        ['{"path": "/disk/a", "kind'],
    ],
    ids=["nothing", "no summary", "half a line"],
)
async def test_a_stream_that_ends_early_is_not_complete(
    service: FakeService, client: Client, lines: list[dict[str, object] | str]
) -> None:
    service.answers["OpenListing"] = service.stream(*lines[:-1])
    if lines and isinstance(lines[-1], str):  # without its newline
        reading, writing = service.pipe()
        os.write(writing, lines[-1].encode())
        os.close(writing)
        service.answers["OpenListing"] = Answer("h", 0, fds=(reading,))
    with pytest.raises(errors.Unavailable, match="complete"):
        await whole(await client.listing(MOUNT_ID, "/disk"))


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        "",
        "7",
        "[" * 100_000,
        '{"path": "/a", "kind": "file", "size": ' + "9" * 5000 + "}",
        '{"path": "/a", "kind": "file", "size": 18446744073709551616}',
        '{"path": "/a", "kind": "file", "size": "7"}',
        '{"path": "/a", "kind": "file", "size": 7.5}',
        '{"path": "/a", "kind": "file", "size": true}',
        '{"path": "/a", "kind": "file", "size": null}',
        '{"path": ["/a"], "kind": "file"}',
        '{"path": "", "kind": "file"}',
        '{"kind": "file"}',
        '{"path": "/a"}',
        '{"path": "/a", "error": 5}',
        '{"summary": 5}',
        '{"summary": {"entries": "many"}}',
        json.dumps(summary(0)) + "\n" + json.dumps(found("/late")),
    ],
    ids=lambda line: line[:60],
)
async def test_a_line_that_is_no_record_is_the_services_fault(
    service: FakeService, client: Client, line: str
) -> None:
    service.answers["OpenListing"] = service.stream(line, summary(0))
    with pytest.raises(errors.Failed):
        await whole(await client.listing(MOUNT_ID, "/disk"))


async def test_a_line_without_end_is_not_kept(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    reader = asyncio.create_task(whole(Listing(reading)))

    def write() -> None:
        try:
            while True:
                os.write(writing, b"x" * 65536)
        except BrokenPipeError:
            pass

    writer = asyncio.create_task(asyncio.to_thread(write))
    with pytest.raises(errors.Failed, match="without end"):
        await reader
    await writer


async def test_records_arrive_as_they_are_written_and_however_they_are_cut(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    data = "".join(json.dumps(line) + "\n" for line in (found("/é\udcff"), found("/b"), summary(2))).encode()
    async with Listing(reading) as listing:
        paths = []
        pending = asyncio.ensure_future(anext(listing))
        for byte in data:
            os.write(writing, bytes([byte]))
            await asyncio.sleep(0)  # rounds of the loop, in which the byte is read
            await asyncio.sleep(0)
            if pending.done() and pending.exception() is None:
                paths.append(pending.result())
                pending = asyncio.ensure_future(anext(listing))
        with pytest.raises(StopAsyncIteration):
            await pending
        assert listing.summary.entries == 2
    assert len(paths) == 2


async def test_a_pipe_that_says_nothing_does_not_stop_the_loop_and_can_be_left(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    before = of_this_process()
    reader = asyncio.create_task(whole(Listing(reading)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not reader.done()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    with pytest.raises(BrokenPipeError):
        os.write(writing, b"x")
    assert len(of_this_process()) == len(before) - 1


async def test_leaving_early_closes_the_pipe_and_so_ends_the_work(service: FakeService, client: Client) -> None:
    reading, writing = service.pipe()
    os.write(writing, (json.dumps(found("/disk/a")) + "\n").encode() * 5)
    service.answers["OpenListing"] = Answer("h", 0, fds=(reading,))
    async with await client.listing(MOUNT_ID, "/disk") as listing:
        service.let_go(reading)
        assert isinstance(await anext(listing), Found)
        os.write(writing, b"x")
    with pytest.raises(BrokenPipeError):
        os.write(writing, b"x")
    os.close(writing)
    with pytest.raises(errors.Cancelled):
        [record async for record in listing]


async def test_many_records_leave_the_loop_free(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    count = 20_000

    def write() -> None:
        with os.fdopen(os.dup(writing), "w") as file:
            for number in range(count):
                print(json.dumps(found(f"/disk/{number:08}")), file=file)
            print(json.dumps(summary(count)), file=file)

    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(others())
    writer = asyncio.create_task(asyncio.to_thread(write))
    assert len(await whole(Listing(reading))) == count
    await writer
    other.cancel()
    with pytest.raises(asyncio.CancelledError):
        await other
    assert turns > 10  # as often as the pipe was emptied, at least


@pytest.mark.parametrize("kind", ["file", "writing end"])
async def test_what_is_no_readable_pipe_is_refused_and_closed(
    service: FakeService, client: Client, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "file").write_text("{}")
    _, writing = service.pipe()
    fd = service.open(tmp_path / "file") if kind == "file" else writing
    service.answers["OpenListing"] = Answer("h", 0, fds=(fd,))
    before = of_this_process()
    with pytest.raises(errors.Failed, match="no stream"):
        await client.listing(MOUNT_ID, "/disk")
    assert of_this_process() == before
    os.close(writing)


@pytest.mark.parametrize("answer", [Answer("h", 3), Answer("h", 0), Answer("s", "no")], ids=["3", "0", "s"])
async def test_an_answer_without_its_pipe_leaves_no_descriptor(
    service: FakeService, client: Client, tmp_path: Path, answer: Answer
) -> None:
    (tmp_path / "file").touch()
    answer.fds = (service.open(tmp_path / "file"),) if answer.values != [0] else ()
    service.answers["OpenListing"] = answer
    before = of_this_process()
    with pytest.raises(errors.Failed):
        await client.listing(MOUNT_ID, "/disk")
    assert of_this_process() == before
