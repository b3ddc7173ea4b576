"""Readers for real: what an honest one may do, and that a compromised one gains nothing."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import config, errors, linux
from sendense_restored.daemon.host import reader as host_reader
from sendense_restored.daemon.host.process import Tools
from sendense_restored.daemon.host.readers import Readers
from sendense_restored.reader import protocol
from sendense_restored.reader.protocol import Filters, Start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sendense_restored.daemon.host.reader import Reader, Stream

HOSTILE = (str(Path(__file__).with_name("hostile_reader.py")),)
KILLED = "signal 31"  # SIGSYS, by the filter
EVERYTHING = Filters(recursive=True)
DEPTH, FILES_A_LEVEL = 40, 100


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ext4 with a file that only root may read, a pipe and a device node."""
    directory = tmp_path_factory.mktemp("ext4")
    content = directory / "content"
    content.mkdir()
    (content / "file").write_bytes(b"12345")
    (content / "file").chmod(0o600)
    (content / "closed").mkdir(mode=0o700)
    (content / "closed/inside").write_bytes(b"inside")
    (content / "absolute").symlink_to("/closed/inside")
    (content / "out").symlink_to("/../../../../../../etc/shadow")
    os.mkfifo(content / "fifo")
    os.mknod(content / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    image = directory / "image"
    subprocess.run(["mkfs.ext4", "-q", "-d", content, image, "8M"], check=True, capture_output=True)
    return image


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ext4 with one directory in another, and enough files in each that no pipe takes them."""
    directory = tmp_path_factory.mktemp("deep")
    content = directory / "content"
    level = content
    for _ in range(DEPTH):
        level /= "d"
        level.mkdir(parents=True)
        for number in range(FILES_A_LEVEL):
            (level / f"{number:0100}").touch()
    image = directory / "image"
    subprocess.run(["mkfs.ext4", "-q", "-N", "8000", "-d", content, image, "32M"], check=True, capture_output=True)
    return image


@pytest.fixture
def settings(tmp_path: Path) -> config.Config:
    (tmp_path / "run").mkdir()
    (tmp_path / "mounts").mkdir()
    return config.Config(
        paths=config.Paths(runtime=tmp_path / "run"), mounts=config.Mounts(directory=tmp_path / "mounts")
    )


class Stage:
    """Mounts and readers of one test."""

    def __init__(self, settings: config.Config, image: Path) -> None:
        self.settings = settings
        self.image = image
        self.honest = Readers(Tools.find({}), settings)
        # Two pools, so each needs uids of its own: with one for both, one reader could kill the other.
        others = replace(settings, readers=replace(settings.readers, uids=range(61500, 61564)))
        self.hostile = Readers(Tools.find({}), others, program=HOSTILE)
        self.mounted: list[Path] = []

    def volume(self, mount_id: str, name: str) -> Path:
        """The image, mounted as a volume of a mount."""
        where = self.settings.mounts.directory / mount_id / name
        where.mkdir(parents=True)
        subprocess.run(["mount", "-o", "ro,nodev,nosuid,noexec,loop", self.image, where], check=True)
        self.mounted.append(where)
        return where

    @asynccontextmanager
    async def reader(self, pool: Readers, mount_id: str, *volumes: str) -> AsyncIterator[Reader]:
        """A reader that has its volumes."""
        roots = {volume: os.open(self.volume(mount_id, volume), os.O_PATH) for volume in volumes}
        try:
            reader = await pool.start(mount_id)
            try:
                await reader.give(roots)
                yield reader
            finally:
                await reader.close()
        finally:
            for root in roots.values():
                os.close(root)

    async def outcomes(self, attack: str) -> list[str]:
        """What a compromised reader says that it gained; or, if it was killed for trying, how it ended."""
        async with self.reader(self.hostile, attack, "v") as reader:
            try:
                listing = await reader.list("v", (), limit=100, cursor="")
            except errors.Unavailable:
                return [await reader.lost]
            return [entry.name[3:] for entry in listing.entries]


@pytest.fixture
def stage(settings: config.Config, image: Path) -> Iterator[Stage]:
    stage = Stage(settings, image)
    yield stage
    for where in reversed(stage.mounted):
        subprocess.run(["umount", where], check=True)


@pytest.fixture
async def honest(stage: Stage) -> AsyncIterator[Reader]:
    async with stage.reader(stage.honest, "mount", "v") as reader:
        yield reader


# --- an honest reader -------------------------------------------------------------------------------------------


async def test_it_reads_what_only_root_may_read(honest: Reader) -> None:
    listing = await honest.list("v", (), limit=1000, cursor="")
    kinds = {entry.name: entry.kind for entry in listing.entries}
    assert {name: kinds[name] for name in ("closed", "fifo", "file", "null", "out")} == {
        "closed": "directory",
        "fifo": "fifo",
        "file": "file",
        "null": "char",
        "out": "symlink",
    }
    for path in (("file",), ("closed", "inside"), ("absolute",)):
        descriptor, _ = await honest.open("v", tuple(map(os.fsencode, path)))
        with open(descriptor, "rb") as file:  # noqa: ASYNC230, PTH123 - a descriptor of a small file
            assert file.read() in {b"12345", b"inside"}
    assert (await honest.stat("v", (b"file",))).mode == 0o600


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("fifo", errors.NotAFile),
        ("null", errors.NotAFile),
        ("closed", errors.NotAFile),
        ("out", errors.PathNotFound),
        ("missing", errors.PathNotFound),
        ("file/below", errors.PathNotFound),
        ("n" * 300, errors.InvalidPath),
    ],
)
async def test_it_refuses_what_is_no_file_and_lives_on(
    honest: Reader, path: str, error: type[errors.RestoreError]
) -> None:
    with pytest.raises(error):
        await honest.open("v", tuple(path.encode().split(b"/")))
    assert (await honest.stat("v", ())).kind == "directory"


async def test_it_has_lost_all_that_it_does_not_need(stage: Stage, honest: Reader) -> None:
    status = Path(f"/proc/{honest.pid}/status").read_text(encoding="ascii")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == [str(honest.uid)] * 4
    assert fields["Gid"].split() == [str(honest.uid)] * 4
    assert fields["Groups"].split() == []
    only_read = f"{1 << linux.CAP_DAC_READ_SEARCH:016x}"
    assert [fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")] == [
        *("0" * 16, only_read, only_read, "0" * 16, "0" * 16)
    ]
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    for kind in ("mnt", "net", "ipc", "uts"):
        ours, theirs = (Path(f"/proc/{pid}/ns/{kind}").readlink() for pid in ("self", honest.pid))
        assert ours != theirs
    mounts = Path(f"/proc/{honest.pid}/mountinfo").read_text(encoding="utf-8")
    assert len(mounts.splitlines()) <= 1
    assert str(stage.settings.mounts.directory) not in mounts
    assert Path(f"/proc/{honest.pid}/root").samefile(stage.settings.mounts.directory / "mount")
    descriptors = [Path(f"/proc/{honest.pid}/fd/{name}").readlink() for name in os.listdir(f"/proc/{honest.pid}/fd")]  # noqa: PTH208
    assert sorted(str(target).split(":")[0] for target in descriptors) == [
        *(str(stage.settings.mounts.directory / "mount/v"), "pipe", "socket")
    ]


async def test_it_dies_with_the_daemon(stage: Stage) -> None:
    (stage.settings.mounts.directory / "mount").mkdir()
    script = """
import asyncio, os, sys
from pathlib import Path
from sendense_restored import config
from sendense_restored.daemon.host.process import Tools
from sendense_restored.daemon.host.readers import Readers
async def main():
    settings = config.Config(paths=config.Paths(Path(sys.argv[1])), mounts=config.Mounts(Path(sys.argv[2])))
    reader = await Readers(Tools.find({}), settings).start("mount")
    pidfd = os.pidfd_open(reader.pid)
    import socket
    with socket.socket(fileno=int(sys.argv[3])) as sock:
        socket.send_fds(sock, [b"pidfd"], [pidfd])
    await asyncio.Event().wait()
asyncio.run(main())
"""
    ours, theirs = socket.socketpair()
    paths = (str(stage.settings.paths.runtime), str(stage.settings.mounts.directory))
    with ours, theirs:
        daemon = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", script, *paths, str(theirs.fileno())), pass_fds=[theirs.fileno()]
        )
        theirs.close()
        _, (pidfd,), _, _ = await asyncio.to_thread(socket.recv_fds, ours, 10, 1)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, ended.set)
        try:
            assert not ended.is_set()
            daemon.kill()
            await daemon.wait()
            async with asyncio.timeout(60):
                await ended.wait()
        finally:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)


async def test_nothing_is_answered_after_the_roots_were_taken_back(honest: Reader) -> None:
    await honest.take_back()
    await honest.take_back()
    for asking in (honest.stat("v", ()), honest.open("v", (b"file",)), honest.list("v", (), limit=1, cursor="")):
        with pytest.raises(errors.Unavailable):
            await asking
    assert not honest.lost.done()


async def test_roots_keep_a_volume_busy_until_they_are_taken_back_and_can_be_given_again(stage: Stage) -> None:
    directory = stage.settings.mounts.directory / "mount"
    where = stage.volume("mount", "v")
    reader = await stage.honest.start("mount")
    try:
        root = os.open(where, os.O_PATH)
        await reader.give({"v": root})
        os.close(root)
        with pytest.raises(OSError, match="busy"):
            linux.umount(where)
        await reader.take_back()
        linux.umount(where)
        stage.mounted.clear()
        assert not any(directory.joinpath("v").iterdir())

        subprocess.run(["mount", "-o", "ro,loop", stage.image, where], check=True)  # noqa: ASYNC221 - short
        stage.mounted.append(where)
        root = os.open(where, os.O_PATH)
        await reader.give({"v": root})
        os.close(root)
        assert (await reader.stat("v", (b"file",))).size == 5
    finally:
        await reader.close()


async def test_a_reader_holds_no_mount_of_another_one(stage: Stage, honest: Reader) -> None:
    """A copy of a mount in the reader's namespace would keep the device busy after its unmount."""
    where = stage.volume("other", "w")
    later = await stage.honest.start("other")
    try:
        linux.umount(where)
        stage.mounted.remove(where)
        left = subprocess.run(["losetup", "-j", stage.image], check=True, capture_output=True)  # noqa: ASYNC221 - short
        assert len(left.stdout.splitlines()) == 1
        assert (await honest.stat("v", ())).kind == "directory"
    finally:
        await later.close()


async def test_uids_are_not_shared_and_come_back_when_the_process_is_gone(stage: Stage) -> None:
    settings = replace(stage.settings, readers=config.Readers(uids=range(61000, 61002)))
    pool = Readers(Tools.find({}), settings)
    for name in "abc":
        (settings.mounts.directory / name).mkdir()
    one, two = await pool.start("a"), await pool.start("b")
    try:
        assert {one.uid, two.uid} == {61000, 61001}
        with pytest.raises(errors.LimitReached):
            await pool.start("c")
        pid = one.pid
        await one.close()
        assert not Path(f"/proc/{pid}").exists()
        three = await pool.start("c")
        assert three.uid == one.uid
        await three.close()
    finally:
        await one.close()
        await two.close()


async def test_a_reader_that_does_not_come_up_leaves_nothing_and_gives_its_uid_back(stage: Stage) -> None:
    settings = replace(stage.settings, readers=config.Readers(uids=range(61000, 61001)))
    broken = Readers(Tools.find({}), settings, program=("-c", "raise SystemExit('no such thing')"))
    (settings.mounts.directory / "mount").mkdir()
    for mount_id in ("mount", "mount", "has-no-directory"):
        with pytest.raises(errors.Failed):
            await broken.start(mount_id)


@pytest.mark.parametrize("when", ["spawning", "waiting"])
async def test_cancelling_a_start_leaves_nothing(stage: Stage, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    (stage.settings.mounts.directory / "silent").mkdir()
    settings = replace(stage.settings, readers=config.Readers(uids=range(61000, 61001)))
    program = ("-c", "import signal; signal.pause()")
    starting = asyncio.create_task(Readers(Tools.find({}), settings, program=program).start("silent"))
    if when == "waiting":
        waiting = asyncio.Event()
        ready = host_reader.Reader.ready

        async def noted(reader: Reader) -> None:
            waiting.set()
            await ready(reader)

        monkeypatch.setattr(host_reader.Reader, "ready", noted)
        await waiting.wait()
    else:
        await asyncio.sleep(0)  # one turn: it has begun
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting


# --- streams of an honest one -----------------------------------------------------------------------------------


def drained(descriptor: int) -> bytes:
    """All that comes out of a pipe, which is closed."""
    with open(descriptor, "rb") as pipe:
        return pipe.read()


async def begun(reader: Reader, *path: bytes, filters: Filters = EVERYTHING) -> tuple[Stream, int]:
    """A stream of the volume, and the end to read, which belongs to the caller."""
    reading, writing = os.pipe()
    try:
        return await reader.stream([Start("v", path)], filters, writing, stall=60), reading
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)


async def test_a_stream_tells_what_only_root_may_see(honest: Reader) -> None:
    stream, reading = await begun(honest)
    data = await asyncio.to_thread(drained, reading)
    *entries, summary = map(json.loads, data.splitlines())
    kinds = {entry["path"]: entry["kind"] for entry in entries}
    assert kinds.pop("/v/lost+found") == "directory"
    shallow = {"/v/file": "file", "/v/fifo": "fifo", "/v/null": "char", "/v/closed": "directory"}
    assert kinds == shallow | {"/v/closed/inside": "file", "/v/absolute": "symlink", "/v/out": "symlink"}
    assert next(entry["target"] for entry in entries if entry["path"] == "/v/out").endswith("/etc/shadow")
    assert summary == {"summary": {"entries": len(entries), "errors": 0, "truncated": False}}
    assert await stream.end == (len(entries), 0, False, len(data), True)


@pytest.mark.parametrize(
    ("path", "error"), [(b"out", errors.PathNotFound), (b"file", errors.NotADirectory), (b"..", errors.InvalidPath)]
)
async def test_a_stream_that_cannot_begin_is_an_error_and_the_reader_lives_on(
    honest: Reader, path: bytes, error: type[errors.RestoreError]
) -> None:
    with pytest.raises(error):
        await begun(honest, path)
    assert (await honest.stat("v", ())).kind == "directory"


async def test_as_many_streams_as_there_may_be_run_at_once_in_the_jail(stage: Stage, deep: Path) -> None:
    """Each in a directory that is deeper than what it keeps open: threads, descriptors and memory suffice."""
    stage.image = deep
    async with stage.reader(stage.honest, "mount", "v") as reader:
        running = [await begun(reader) for _ in range(protocol.MAX_STREAMS)]
        with pytest.raises(errors.LimitReached):
            await begun(reader)
        assert (await reader.stat("v", ())).kind == "directory"
        for _, reading in running[1::2]:
            os.close(reading)
        for stream, _ in running[1::2]:
            assert not (await stream.end).complete
        for stream, reading in running[::2]:
            *entries, summary = map(json.loads, (await asyncio.to_thread(drained, reading)).splitlines())
            assert summary == {"summary": {"entries": len(entries), "errors": 0, "truncated": False}}
            assert len(entries) == 1 + DEPTH * (1 + FILES_A_LEVEL)
            assert (await stream.end).complete
        assert not reader.lost.done()


@pytest.fixture
def subvolumes(tmp_path: Path) -> Path:
    """A btrfs with a subvolume in a subvolume: each has a device number of its own, and all are one mount."""
    image, where = tmp_path / "btrfs", tmp_path / "where"
    where.mkdir()
    with image.open("wb") as file:
        file.truncate(128 << 20)
    subprocess.run(["mkfs.btrfs", "-q", image], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", image, where], check=True)
    try:
        for name in ("outer", "outer/inner"):
            subprocess.run(["btrfs", "subvolume", "create", where / name], check=True, capture_output=True)
            (where / name / "file").touch()
    finally:
        subprocess.run(["umount", where], check=True)
    return image


async def test_subvolumes_are_walked_as_directories_are(stage: Stage, subvolumes: Path) -> None:
    stage.image = subvolumes
    async with stage.reader(stage.honest, "mount", "v") as reader:
        stream, reading = await begun(reader)
        *entries, summary = map(json.loads, (await asyncio.to_thread(drained, reading)).splitlines())
        assert sorted(entry["path"] for entry in entries) == [
            *("/v/outer", "/v/outer/file", "/v/outer/inner", "/v/outer/inner/file")
        ]
        assert summary["summary"]["errors"] == 0
        assert (await stream.end).complete


async def test_streams_keep_a_volume_busy_no_longer_than_the_roots_are_lent(stage: Stage, deep: Path) -> None:
    stage.image = deep
    async with stage.reader(stage.honest, "mount", "v") as reader:
        stream, reading = await begun(reader)
        await reader.take_back()
        assert not (await stream.end).complete
        data = drained(reading)
        assert b"summary" not in data
        held = [os.readlink(f"/proc/{reader.pid}/fd/{name}") for name in os.listdir(f"/proc/{reader.pid}/fd")]  # noqa: PTH115, PTH208
        assert not [target for target in held if target.endswith("/v") or "/v/" in target]


async def test_a_stream_that_is_cancelled_ends(stage: Stage, deep: Path) -> None:
    stage.image = deep
    async with stage.reader(stage.honest, "mount", "v") as reader:
        stream, reading = await begun(reader)
        stream.cancel()
        stream.cancel()
        assert not (await stream.end).complete
        stream.cancel()
        assert b"summary" not in drained(reading)
        assert (await reader.stat("v", ())).kind == "directory"


# --- a compromised one, on the host -----------------------------------------------------------------------------


async def test_host_files_are_not_there(stage: Stage) -> None:
    assert set(await stage.outcomes("host_files")) == {"ENOENT"}


async def test_the_way_up_ends_at_the_mounts_own_directory(stage: Stage) -> None:
    *tried, top = await stage.outcomes("up_and_out")
    assert set(tried) == {"ENOENT"}
    assert top == "top: ['v']"


async def test_volumes_of_other_mounts_are_not_there(stage: Stage) -> None:
    stage.volume("neighbour", "v")
    assert set(await stage.outcomes("other_mounts=neighbour")) == {"ENOENT"}


async def test_nothing_can_be_written(stage: Stage) -> None:
    assert set(await stage.outcomes("write")) <= {"EROFS", "EPERM", "EACCES"}


async def test_no_code_can_be_brought_in(stage: Stage) -> None:
    assert await stage.outcomes("programs") == ["EPERM", "EPERM", "ENOSYS", "EPERM"]


@pytest.mark.parametrize(
    "attack",
    [
        *("kill=1", "ptrace=1", "read_memory=1", "by_handle", "execute", "mount", "namespace", "root_again"),
        *("io_uring", "bpf", "userfaultfd", "sockets=1", "sockets=2", "sockets=10", "sockets=16", "sockets=17"),
    ],
)
async def test_an_attack_on_the_kernel_or_another_process_is_the_end(stage: Stage, attack: str) -> None:
    (outcome,) = await stage.outcomes(attack)
    assert KILLED in outcome


@pytest.mark.parametrize("attack", ["kill", "ptrace", "read_memory"])
async def test_without_the_filter_other_processes_are_still_out_of_reach(
    stage: Stage, honest: Reader, attack: str
) -> None:
    """Another reader in the same kind of jail, and the daemon."""
    assert set(await stage.outcomes(f"unfiltered.{attack}={honest.pid}")) == {"EPERM"}
    assert (await honest.stat("v", (b"file",))).size == 5


async def test_the_filter_is_what_keeps_files_from_being_opened_by_their_number(stage: Stage) -> None:
    """The capability that lets a reader read would allow it, which also shows that the attack above is a real one."""
    (outcome,) = await stage.outcomes("unfiltered.by_handle")
    assert outcome.startswith("GAINED")


@pytest.mark.parametrize("attack", ["execute", "mount", "root_again"])
async def test_without_the_filter_there_is_still_nothing_to_run_and_no_right_to_it(stage: Stage, attack: str) -> None:
    assert set(await stage.outcomes(f"unfiltered.{attack}")) <= {"EPERM", "ENOENT"}


async def test_without_the_filter_the_volume_still_cannot_be_written(stage: Stage) -> None:
    assert set(await stage.outcomes("unfiltered.write")) <= {"EROFS", "EACCES", "EPERM"}


async def test_without_the_filter_no_service_of_the_host_is_in_reach(stage: Stage) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as service:
        service.bind("\0sendense-test-service")
        service.listen()
        assert await stage.outcomes("unfiltered.abstract_socket=sendense-test-service") == ["ECONNREFUSED"]


# --- a compromised one, on the daemon ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        *("foreign_file", "root_descriptor", "directory", "own_socket", "path_only", "two_files"),
        *("two_hundred_files", "unasked_file", "garbage", "too_long", "flood", "die", "hang_up"),
    ],
)
async def test_a_dishonest_answer_ends_this_reader_and_no_other(stage: Stage, honest: Reader, attack: str) -> None:
    async with stage.reader(stage.hostile, attack, "v", "w") as hostile:
        others = [asyncio.create_task(hostile.stat("v", ())) for _ in range(3)]
        with pytest.raises(errors.Unavailable):
            await hostile.open("v", (b"file",))
        await hostile.lost
        await asyncio.wait(others)
        assert all(isinstance(other.exception(), errors.Unavailable) for other in others)
        assert (await honest.stat("v", (b"file",))).size == 5
        with pytest.raises(errors.Unavailable):
            await hostile.stat("v", ())


async def test_a_listing_without_end_is_cut_off(stage: Stage, honest: Reader) -> None:
    async with stage.reader(stage.hostile, "parts_without_end", "v") as hostile:
        with pytest.raises(errors.Unavailable):
            await hostile.list("v", (), limit=1000, cursor="")
        assert "wrong length" in await hostile.lost
        assert (await honest.stat("v", (b"file",))).size == 5


@pytest.mark.parametrize(
    "attack",
    [
        *("end_without_beginning", "two_beginnings", "beginning_with_a_file", "error_after_the_beginning"),
        *("more_than_the_limit", "garbage", "flood", "die", "hang_up", "die_in_the_middle"),
    ],
)
async def test_a_dishonest_stream_ends_this_reader_and_no_other(stage: Stage, honest: Reader, attack: str) -> None:
    async with stage.reader(stage.hostile, attack, "v") as hostile:
        reading, writing = os.pipe()
        try:
            filters = Filters(recursive=True, limit=100)
            stream = await hostile.stream([Start("v", ())], filters, writing, stall=60)
            with pytest.raises(errors.Unavailable):
                await stream.end
        except errors.Unavailable:
            pass  # it was found out before it had begun
        finally:
            os.close(writing)
        await hostile.lost
        assert b"summary" not in await asyncio.to_thread(drained, reading)
        assert (await honest.stat("v", (b"file",))).size == 5


async def test_a_lie_in_the_pipe_is_the_clients_to_see_and_costs_nobody_else(stage: Stage, honest: Reader) -> None:
    async with stage.reader(stage.hostile, "lies", "v") as hostile:
        stream, reading = await begun(hostile)
        assert b"not JSON" in await asyncio.to_thread(drained, reading)
        assert (await stream.end).entries == 5
        assert (await honest.stat("v", (b"file",))).size == 5


async def test_a_reader_that_never_answers_times_out_alone(stage: Stage, honest: Reader) -> None:
    async with stage.reader(stage.hostile, "silence", "v") as hostile:
        hostile._seconds = 0.5  # it has started by now, for which that may be short
        silent = asyncio.create_task(hostile.open("v", (b"file",)))
        assert (await honest.stat("v", (b"file",))).size == 5
        with pytest.raises(errors.Timeout):
            await silent
        with pytest.raises(errors.Timeout):
            await hostile.take_back()
        assert not hostile.lost.done()
