"""The daemon's side of a reader, against a peer on the other end of the socketpair that says what a test wants."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest

from sendense_restored import errors, linux
from sendense_restored.daemon.host import reader as host_reader
from sendense_restored.daemon.host.channel import Channel
from sendense_restored.daemon.host.reader import MOST_REQUESTS, Reader, Stream
from sendense_restored.reader import protocol
from sendense_restored.reader.protocol import Entry, FileInfo, Filters, Listing, Start, StreamEnd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from sendense_restored.daemon.host.child import Child

LONG = 60.0
FILE = FileInfo("file", 5, 4096, 0o644, 0, 0, 1, 2, 3, 1, "", [], [], "")


class Process:
    """What a Reader needs of a child: it ends when it is killed, or when the test says so."""

    def __init__(self) -> None:
        self.pid = 4242
        self.stderr = "its last words"
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def kill(self) -> None:
        self.end(-9)

    async def close(self) -> bool:
        self.kill()
        return True

    def end(self, status: int) -> None:
        if not self.ended.done():
            self.ended.set_result(status)

    async def wait(self) -> int:
        return await asyncio.shield(self.ended)


class Peer:
    """The other end."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(0)
        protocol.prepare(sock)
        self.sock = sock

    async def request(self) -> tuple[dict[str, Any], list[int]]:
        """The next request; descriptors belong to the caller."""
        readable = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self.sock, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self.sock)
        frame = protocol.receive(self.sock, most_fds=protocol.MAX_FDS)
        assert frame is not None
        return frame

    async def number(self) -> int:
        """The id of the next request."""
        message, fds = await self.request()
        protocol.close_all(fds)
        return int(message["id"])

    def says(self, message: object, *fds: int) -> None:
        protocol.send(self.sock, message if isinstance(message, bytes) else json.dumps(message).encode(), fds)


class Scene:
    """A reader and its peer, with one volume ``v`` given."""

    def __init__(self, directory: Path) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = Process()
        self.peer = Peer(theirs)
        self.gone = 0
        root = os.open(directory, os.O_PATH)
        self.reader = Reader(cast("Child", self.process), 61000, ours, root, seconds=LONG, gone=self._gone)

    def _gone(self) -> None:
        self.gone += 1

    async def give(self, root: int) -> None:
        giving = asyncio.create_task(self.reader.give({"v": root}))
        self.peer.says({"id": await self.peer.number(), "ok": {"v": [100, 40]}})
        assert await giving == {"v": (100, 40)}


@asynccontextmanager
async def a_scene(volume: Path) -> AsyncIterator[Scene]:
    scene = Scene(volume.parent)
    root = os.open(volume, os.O_PATH)
    try:
        scene.peer.says({"id": 0, "ok": None})
        await scene.reader.ready()
        await scene.give(root)
        yield scene
    finally:
        await scene.reader.close()
        scene.peer.sock.close()
        os.close(root)
        assert scene.gone == 1


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    volume = tmp_path / "v"
    volume.mkdir()
    return volume


@pytest.fixture
async def scene(volume: Path) -> AsyncIterator[Scene]:
    async with a_scene(volume) as scene:
        yield scene


@pytest.fixture
def file(volume: Path) -> Iterator[int]:
    """A file of the volume as an honest reader opens it."""
    (volume / "file").write_bytes(b"12345")
    descriptor = os.open(volume / "file", os.O_RDONLY | os.O_NONBLOCK)
    yield descriptor
    os.close(descriptor)


# --- an honest reader -------------------------------------------------------------------------------------------


async def test_a_file_is_handed_over_without_the_flags_it_was_opened_with(scene: Scene, file: int) -> None:
    opening = asyncio.create_task(scene.reader.open("v", (b"file",)))
    message, _ = await scene.peer.request()
    assert (message["op"], message["volume"], message["path"]) == ("open", "v", "/file")
    scene.peer.says({"id": message["id"], "ok": FILE}, file)
    descriptor, info = await opening
    try:
        assert info == FILE
        assert os.read(descriptor, 10) == b"12345"
        assert not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_NONBLOCK
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)


async def test_answers_may_come_in_any_order_and_in_parts(scene: Scene) -> None:
    listing = asyncio.create_task(scene.reader.list("v", (), limit=2, cursor=""))
    first = await scene.peer.number()
    stat = asyncio.create_task(scene.reader.stat("v", (b"file",)))
    second = await scene.peer.number()
    one, two = (Entry(name, "file", 1, 0o600, 0, "", {}) for name in "ab")
    scene.peer.says({"id": first, "more": True, "ok": {"entries": [one]}})
    scene.peer.says({"id": second, "ok": FILE})
    assert await stat == FILE
    scene.peer.says({"id": first, "ok": {"entries": [two], "cursor": "b"}})
    assert await listing == Listing([one, two], "b")


async def test_an_error_of_the_reader_is_raised_as_it_is(scene: Scene) -> None:
    stat = asyncio.create_task(scene.reader.stat("v", ()))
    scene.peer.says({"id": await scene.peer.number(), "error": "PathNotFound", "message": "there is no such file"})
    with pytest.raises(errors.PathNotFound, match="no such file"):
        await stat
    assert not scene.reader.lost.done()


@pytest.mark.parametrize(("limit", "cursor"), [(0, ""), (10_001, ""), (5, "\ud800"), (5, "x" * 1021)])
async def test_a_limit_or_cursor_out_of_range_is_the_callers_fault(scene: Scene, limit: int, cursor: str) -> None:
    with pytest.raises(errors.InvalidOption):
        await scene.reader.list("v", (), limit=limit, cursor=cursor)


async def test_many_roots_go_in_several_frames(scene: Scene, tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_PATH)
    try:
        volumes = dict.fromkeys([f"w{number:03}" for number in range(100)], root)
        for volume in volumes:
            (tmp_path / volume).mkdir()
        giving = asyncio.create_task(scene.reader.give(volumes))
        for _ in range(2):
            message, fds = await scene.peer.request()
            assert len(fds) == len(message["volumes"])
            protocol.close_all(fds)
            scene.peer.says({"id": message["id"], "ok": dict.fromkeys(message["volumes"], (1, 1))})
        assert (await giving).keys() == volumes.keys()
    finally:
        os.close(root)


async def test_it_is_told_which_volumes_are_ntfs_and_where_they_are(scene: Scene, tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_PATH)
    try:
        volumes = dict.fromkeys([f"w{number:03}" for number in range(70)], root)
        for volume in volumes:
            (tmp_path / volume).mkdir()
        giving = asyncio.create_task(scene.reader.give(volumes, ntfs=["w001", "w069"], directory="/mnt/x"))
        for ntfs in (["w001"], ["w069"]):
            message, fds = await scene.peer.request()
            protocol.close_all(fds)
            assert (message["ntfs"], message["directory"]) == (ntfs, "/mnt/x")
            scene.peer.says({"id": message["id"], "ok": dict.fromkeys(message["volumes"], (1, 1))})
        await giving
    finally:
        os.close(root)


async def test_a_stream_and_the_largest_size_are_asked_for(scene: Scene, file: int) -> None:
    opening = asyncio.create_task(scene.reader.open("v", (b"file",), stream=b"caf\xe9", most=5))
    message, _ = await scene.peer.request()
    assert (message["path"], message["stream"], message["most"]) == ("/file", "caf\uefe9", 5)
    scene.peer.says({"id": message["id"], "ok": FILE}, file)
    descriptor, info = await opening
    os.close(descriptor)
    assert info.size == 5


async def test_that_a_file_is_too_large_is_for_the_caller(scene: Scene) -> None:
    opening = asyncio.create_task(scene.reader.open("v", (b"file",), most=4))
    scene.peer.says({"id": await scene.peer.number(), "error": "TooLarge", "message": "it has 5"})
    with pytest.raises(errors.TooLarge, match="it has 5"):
        await opening
    assert not scene.reader.lost.done()


async def test_a_file_that_is_larger_than_asked_for_is_no_honest_answer(scene: Scene, file: int) -> None:
    opening = asyncio.create_task(scene.reader.open("v", (b"file",), most=4))
    scene.peer.says({"id": await scene.peer.number(), "ok": FILE}, file)
    with pytest.raises(errors.Unavailable):
        await opening
    assert "larger than what was asked for" in await scene.reader.lost


async def test_a_file_that_cannot_be_checked_is_not_handed_over(
    scene: Scene, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_descriptor: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    opening = asyncio.create_task(scene.reader.open("v", (b"file",)))
    number = await scene.peer.number()
    monkeypatch.setattr(linux, "mount_id", failing)
    scene.peer.says({"id": number, "ok": FILE}, file)
    with pytest.raises(errors.Failed):
        await opening
    assert not scene.reader.lost.done()


# --- a hostile one ----------------------------------------------------------------------------------------------


def of_null() -> int:
    return os.open("/dev/null", os.O_RDONLY)


def of_memory() -> int:
    return os.memfd_create("hostile")


def of_a_pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


@pytest.mark.parametrize(
    "make",
    [
        of_null,
        of_memory,
        of_a_pipe,
        lambda: os.open("/proc/self/status", os.O_RDONLY),  # a regular file, of another mount
        lambda: os.open("file", os.O_WRONLY),
        lambda: os.open("file", os.O_RDWR),
        lambda: os.open("file", os.O_PATH),
        lambda: os.open(".", os.O_RDONLY),
        lambda: os.open(".", os.O_PATH),
        lambda: os.open("fifo", os.O_RDONLY | os.O_NONBLOCK),
    ],
    ids=["null", "memfd", "pipe", "other mount", "for writing", "for both", "O_PATH", "directory", "root", "fifo"],
)
async def test_a_descriptor_that_is_no_file_of_the_volume_ends_the_reader(
    scene: Scene, file: int, volume: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], int]
) -> None:
    assert file >= 0
    os.mkfifo(volume / "fifo")
    monkeypatch.chdir(volume)
    descriptor = make()
    try:
        opening = asyncio.create_task(scene.reader.open("v", (b"file",)))
        scene.peer.says({"id": await scene.peer.number(), "ok": FILE}, descriptor)
        with pytest.raises(errors.Unavailable):
            await opening
        assert "misbehaved" in await scene.reader.lost
        assert scene.process.ended.done()
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("answer", [FILE._replace(kind="directory"), FILE._replace(size=-1), None])
async def test_a_good_file_with_a_bad_description_ends_the_reader(scene: Scene, file: int, answer: object) -> None:
    opening = asyncio.create_task(scene.reader.open("v", (b"file",)))
    scene.peer.says({"id": await scene.peer.number(), "ok": answer}, file)
    with pytest.raises(errors.Unavailable):
        await opening
    await scene.reader.lost


async def test_an_answer_without_the_file_ends_the_reader(scene: Scene) -> None:
    opening = asyncio.create_task(scene.reader.open("v", (b"file",)))
    scene.peer.says({"id": await scene.peer.number(), "ok": FILE})
    with pytest.raises(errors.Unavailable):
        await opening
    await scene.reader.lost


async def test_a_file_of_a_volume_that_was_taken_back_ends_the_reader(scene: Scene, file: int) -> None:
    taking = asyncio.create_task(scene.reader.take_back())
    scene.peer.says({"id": await scene.peer.number(), "ok": None})
    await taking
    opening = asyncio.create_task(scene.reader.open("v", (b"file",)))
    scene.peer.says({"id": await scene.peer.number(), "ok": FILE}, file)
    with pytest.raises(errors.Unavailable):
        await opening
    await scene.reader.lost


@pytest.mark.parametrize(
    "words",
    [
        lambda _: [(b"garbage", False)],
        lambda _: [({"id": 999, "ok": None}, False)],
        lambda _: [({"id": 0, "ok": None}, False)],
        lambda number: [({"id": number, "ok": FILE}, True)],
        lambda number: [({"id": number, "error": "NotAFile", "message": "no"}, True)],
        lambda number: [({"id": number, "ok": FILE}, False), ({"id": number, "ok": FILE}, False)],
        lambda number: [({"id": number, "more": True, "ok": FILE}, False)],
        lambda number: [({"id": number, "ok": FILE._replace(target="a\0b")}, False)],
        lambda number: [({"id": number, "error": "WrongSecret", "message": "what is it?"}, False)],
        lambda _: [({}, True)],
    ],
    ids=["garbage", "unknown", "again", "fd", "error+fd", "twice", "part", "NUL", "error", "only fd"],
)
async def test_words_of_no_honest_reader_end_it(scene: Scene, file: int, words: Any) -> None:  # noqa: ANN401 - lambdas
    asking = asyncio.create_task(scene.reader.stat("v", ()))
    other = asyncio.create_task(scene.reader.list("v", (), limit=1, cursor=""))
    number = await scene.peer.number()
    await scene.peer.number()
    for message, with_file in words(number):
        scene.peer.says(message, *([file] if with_file else []))
    with pytest.raises(errors.Unavailable):
        await other
    assert "misbehaved" in await scene.reader.lost
    assert scene.process.ended.done()
    await asyncio.wait([asking])
    assert asking.exception() is None or isinstance(asking.exception(), errors.Unavailable)
    with pytest.raises(errors.Unavailable):
        await scene.reader.stat("v", ())


@pytest.mark.parametrize("rows", [[], [["x"]]])
async def test_parts_without_end_are_cut_off_even_when_nobody_waits_for_them(
    scene: Scene, rows: list[object]
) -> None:
    listing = asyncio.create_task(scene.reader.list("v", (), limit=5, cursor=""))
    number = await scene.peer.number()
    listing.cancel()
    scene.peer.says({"id": number, "more": True, "ok": {"entries": rows}})
    await scene.reader.lost


# --- streams ----------------------------------------------------------------------------------------------------

END = StreamEnd(5, 1, truncated=False, bytes=700, complete=True)


@pytest.fixture
def pipe() -> Iterator[int]:
    """A pipe's write end."""
    reading, writing = os.pipe()
    yield writing
    os.close(reading)
    os.close(writing)


def asked_for(scene: Scene, pipe: int, filters: Filters = Filters()) -> asyncio.Task[Stream]:  # noqa: B008 - a constant
    return asyncio.create_task(scene.reader.stream([Start("v", (b"a",))], filters, pipe, stall=30))


async def begun(scene: Scene, pipe: int, filters: Filters = Filters()) -> tuple[int, Stream]:  # noqa: B008 - a constant
    """A stream that has begun, and the id of its request."""
    asking = asked_for(scene, pipe, filters)
    number = await scene.peer.number()
    scene.peer.says({"id": number, "more": True, "ok": None})
    return number, await asking


async def test_a_stream_gets_the_pipe_and_is_there_when_it_has_begun(scene: Scene, pipe: int) -> None:
    filters = Filters(recursive=True, name="*", kind="file", newer=-5, limit=7)
    asking = asked_for(scene, pipe, filters)
    message, fds = await scene.peer.request()
    assert (message["op"], message["stall"]) == ("stream", 30)
    assert (protocol.starts_of(message), Filters(*message["filters"])) == ([Start("v", (b"a",))], filters)
    assert [os.path.sameopenfile(pipe, descriptor) for descriptor in fds] == [True]
    protocol.close_all(fds)
    assert not asking.done()
    scene.peer.says({"id": message["id"], "more": True, "ok": None})
    stream = await asking
    assert not stream.end.done()
    scene.peer.says({"id": message["id"], "ok": END})
    assert await stream.end == END
    stream.cancel()  # after the end it asks nothing of the reader:
    stat = asyncio.create_task(scene.reader.stat("v", ()))
    message, _ = await scene.peer.request()
    assert message["op"] == "stat"
    scene.peer.says({"id": message["id"], "ok": FILE})
    await stat


async def test_a_stream_that_cannot_begin_says_why(scene: Scene, pipe: int) -> None:
    asking = asked_for(scene, pipe)
    scene.peer.says({"id": await scene.peer.number(), "error": "NotADirectory", "message": "it is a file"})
    with pytest.raises(errors.NotADirectory, match="it is a file"):
        await asking
    assert not scene.reader.lost.done()


async def test_filters_that_mean_nothing_do_not_get_to_the_reader(scene: Scene, pipe: int) -> None:
    with pytest.raises(errors.InvalidOption):
        await asked_for(scene, pipe, Filters(limit=0))
    stat = asyncio.create_task(scene.reader.stat("v", ()))
    message, _ = await scene.peer.request()
    assert message["op"] == "stat"
    scene.peer.says({"id": message["id"], "ok": FILE})
    await stat


async def test_cancelling_a_stream_is_told_to_the_reader(scene: Scene, pipe: int) -> None:
    number, stream = await begun(scene, pipe)
    stream.cancel()
    assert await scene.peer.request() == ({"id": number, "op": "cancel"}, [])
    scene.peer.says({"id": number, "ok": END._replace(complete=False)})
    assert not (await stream.end).complete


@pytest.mark.parametrize("how", ["timeout", "cancelled"])
@pytest.mark.parametrize("answers", ["begins and ends", "cannot begin", "dies"])
async def test_a_stream_that_is_given_up_before_it_begins_is_cancelled(
    scene: Scene, pipe: int, how: str, answers: str
) -> None:
    if how == "timeout":
        scene.reader._seconds = 0.01
    asking = asked_for(scene, pipe)
    number = await scene.peer.number()
    if how == "cancelled":
        asking.cancel()
    with pytest.raises((errors.Timeout, asyncio.CancelledError)):
        await asking
    assert await scene.peer.request() == ({"id": number, "op": "cancel"}, [])
    scene.reader._seconds = LONG
    if answers == "dies":
        scene.process.end(3)
        await scene.reader.lost
        return
    if answers == "begins and ends":
        scene.peer.says({"id": number, "more": True, "ok": None})
        scene.peer.says({"id": number, "ok": END})
    else:
        scene.peer.says({"id": number, "error": "PathNotFound", "message": "no"})
    stat = asyncio.create_task(scene.reader.stat("v", ()))
    scene.peer.says({"id": await scene.peer.number(), "ok": FILE})
    await stat
    assert not scene.reader.lost.done()
    assert not scene.reader._streaming


@pytest.mark.parametrize(
    "words",
    [
        [{"more": True, "ok": None}, {"more": True, "ok": None}],
        [{"more": True, "ok": {}}],
        [{"ok": END}],
        [{"ok": None}],
        [{"more": True, "ok": None}, {"ok": None}],
        [{"more": True, "ok": None}, {"ok": END[:4]}],
        [{"more": True, "ok": None}, {"ok": END._replace(entries=8)}],
        [{"more": True, "ok": None}, {"ok": END._replace(entries=-1)}],
        [{"more": True, "ok": None}, {"ok": END._replace(errors=2**64)}],
        [{"more": True, "ok": None}, {"ok": END._replace(bytes=1.5)}],  # type: ignore[arg-type]
        [{"more": True, "ok": None}, {"ok": END._replace(truncated=0)}],  # type: ignore[arg-type]
        [{"more": True, "ok": None}, {"ok": END._replace(complete=None)}],  # type: ignore[arg-type]
        [{"more": True, "ok": None}, {"error": "PathNotFound", "message": "too late"}],
        [{"more": True, "ok": None}, {"ok": END}, {"ok": END}],
    ],
)
async def test_a_stream_of_no_honest_reader_ends_it(scene: Scene, pipe: int, words: list[dict[str, object]]) -> None:
    asking = asked_for(scene, pipe, Filters(limit=7))
    number = await scene.peer.number()
    for message in words:
        scene.peer.says({"id": number} | message)
    assert "misbehaved" in await scene.reader.lost
    assert scene.process.ended.done()
    await asyncio.wait([asking])
    if asking.exception() is None:
        await asyncio.wait([asking.result().end])


@pytest.mark.parametrize("how", ["dies", "is closed"])
async def test_a_stream_whose_reader_is_gone_ends_as_unavailable(scene: Scene, pipe: int, how: str) -> None:
    _, stream = await begun(scene, pipe)
    if how == "dies":
        scene.process.end(-11)
    else:
        await scene.reader.close()
    with pytest.raises(errors.Unavailable):
        await stream.end
    stream.cancel()
    with pytest.raises(errors.Unavailable):
        await asked_for(scene, pipe)


async def test_streams_do_not_count_as_requests_but_have_a_bound_of_their_own(scene: Scene, pipe: int) -> None:
    streams = [await begun(scene, pipe) for _ in range(protocol.MAX_STREAMS)]
    with pytest.raises(errors.LimitReached):
        await asked_for(scene, pipe)
    asking = [asyncio.create_task(scene.reader.stat("v", ())) for _ in range(MOST_REQUESTS)]
    numbers = [await scene.peer.number() for _ in asking]
    with pytest.raises(errors.LimitReached):
        await scene.reader.stat("v", ())
    scene.peer.says({"id": streams[0][0], "ok": END})
    assert await streams[0][1].end == END
    number, _ = await begun(scene, pipe)
    scene.peer.says({"id": number, "ok": END})
    for each in numbers:
        scene.peer.says({"id": each, "ok": FILE})
    await asyncio.gather(*asking)


async def test_more_volumes_than_fit_one_frame_are_asked_for_in_several(scene: Scene, pipe: int) -> None:
    entry = Entry("w", "volume", 0, 0, 0, "", {"unreadable": "x" * 2000})
    starts = [Start("w", (), entry, open=False)] * 200
    asking = asyncio.create_task(scene.reader.stream(starts, Filters(), pipe, stall=30))
    found: list[Start] = []
    while len(found) < len(starts):
        message, fds = await scene.peer.request()
        protocol.close_all(fds)
        found += protocol.starts_of(message)
        assert len(fds) == (len(found) == len(starts))
    assert found == starts
    scene.peer.says({"id": message["id"], "more": True, "ok": None})
    await asking


# --- time, load and the end -------------------------------------------------------------------------------------


async def test_an_answer_that_comes_too_late_is_dropped_with_its_file(scene: Scene, file: int) -> None:
    scene.reader._seconds = 0.01
    with pytest.raises(errors.Timeout):
        await scene.reader.open("v", (b"file",))
    scene.peer.says({"id": await scene.peer.number(), "ok": FILE}, file)
    scene.reader._seconds = LONG
    stat = asyncio.create_task(scene.reader.stat("v", ()))  # its answer comes after the late one
    scene.peer.says({"id": await scene.peer.number(), "ok": FILE})
    assert await stat == FILE
    assert not scene.reader.lost.done()


async def test_a_root_outside_of_the_mounts_directory_is_not_lent(scene: Scene, volume: Path) -> None:
    elsewhere = os.open("/proc", os.O_PATH)
    try:
        (volume.parent / "w").mkdir()
        for name in ("w", "missing"):
            with pytest.raises(errors.Failed):
                await scene.reader.give({name: elsewhere})
    finally:
        os.close(elsewhere)


async def test_nothing_is_lent_to_a_reader_that_is_gone(scene: Scene, volume: Path) -> None:
    root = os.open(volume, os.O_PATH)
    try:
        await scene.reader.close()
        with pytest.raises(errors.Unavailable):
            await scene.reader.give({"v": root})
    finally:
        os.close(root)


async def test_a_file_that_arrives_in_the_moment_of_giving_up_is_closed(scene: Scene, file: int) -> None:
    opening = asyncio.create_task(scene.reader.open("v", (b"file",)))
    number = await scene.peer.number()
    scene.peer.says({"id": number, "ok": FILE}, file)
    scene.reader._channel._take_in()  # type: ignore[union-attr] # the answer is in, the task has not run yet
    opening.cancel()
    await asyncio.wait([opening])
    assert opening.cancelled()  # and the check for leftovers sees whether the descriptor is closed


async def test_requests_beyond_the_bound_are_refused_until_some_are_answered(scene: Scene) -> None:
    asking = [asyncio.create_task(scene.reader.stat("v", ())) for _ in range(MOST_REQUESTS)]
    numbers = [await scene.peer.number() for _ in asking]
    with pytest.raises(errors.LimitReached):
        await scene.reader.stat("v", ())
    asking[0].cancel()
    await asyncio.wait([asking[0]])
    with pytest.raises(errors.LimitReached):  # given up, but the reader still works on it
        await scene.reader.stat("v", ())
    scene.peer.says({"id": numbers[0], "ok": FILE})
    scene.peer.says({"id": numbers[1], "ok": FILE})
    await asking[1]
    asking.append(asyncio.create_task(scene.reader.stat("v", ())))
    await scene.peer.number()
    await scene.reader.close()
    done, _ = await asyncio.wait(asking[2:])
    assert all(isinstance(task.exception(), errors.Unavailable) for task in done)


async def test_roots_can_be_taken_back_when_all_else_hangs(scene: Scene) -> None:
    asking = [asyncio.create_task(scene.reader.stat("v", ())) for _ in range(MOST_REQUESTS)]
    for _ in asking:
        await scene.peer.number()
    taking = asyncio.create_task(scene.reader.take_back())
    scene.peer.says({"id": await scene.peer.number(), "ok": None})
    await taking
    await scene.reader.close()
    await asyncio.wait(asking)


@pytest.mark.parametrize(("status", "reason"), [(-31, "signal 31"), (3, "status 3")])
async def test_a_reader_that_ends_by_itself_is_lost_and_tells_how(scene: Scene, status: int, reason: str) -> None:
    asking = asyncio.create_task(scene.reader.stat("v", ()))
    await scene.peer.number()
    scene.process.end(status)
    assert reason in await scene.reader.lost
    with pytest.raises(errors.Unavailable):
        await asking
    await scene.reader.take_back()  # nothing holds the roots any more


async def test_a_closed_socket_ends_the_reader(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_reader, "_GRACE", 0.01)
    asking = asyncio.create_task(scene.reader.stat("v", ()))
    await scene.peer.number()
    scene.peer.sock.close()
    await scene.reader.lost
    assert scene.process.ended.done()
    with pytest.raises(errors.Unavailable):
        await asking


async def test_closing_cancels_lost(scene: Scene) -> None:
    await scene.reader.close()
    await scene.reader.close()
    assert scene.reader.lost.cancelled()


# --- the channel ------------------------------------------------------------------------------------------------


async def test_frames_that_find_no_room_wait_and_arrive_in_order_with_descriptors() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer = Peer(theirs)
    channel = Channel(ours, lambda _message, _fds: None, lambda _offence: None)
    try:
        for number in range(50):
            with open("/dev/null", "rb") as null:  # noqa: ASYNC230, PTH123 - closed before its frame is out
                channel.send({"number": number, "fill": "x" * 100_000}, [null.fileno()])
        for number in range(50):
            message, fds = await peer.request()
            protocol.close_all(fds)
            assert (message["number"], len(fds)) == (number, 1)
    finally:
        channel.close()
        theirs.close()


@pytest.mark.parametrize("closed_by", ["us", "them"])
async def test_descriptors_of_frames_that_never_go_out_are_closed(closed_by: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ended = asyncio.get_running_loop().create_future()
    channel = Channel(ours, lambda _message, _fds: None, ended.set_result)
    with open("/dev/null", "rb") as null:  # noqa: ASYNC230, PTH123 - any file
        for _ in range(50):
            channel.send({"fill": "x" * 100_000}, [null.fileno()])
    if closed_by == "them":
        theirs.close()
        assert await ended is None
    else:
        channel.close()
        theirs.close()
