"""Who has files of a mount open is found among all processes, whatever these do meanwhile."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import linux
from sendense_restored.daemon.host import holders
from sendense_restored.daemon.host.holders import Holding

if TYPE_CHECKING:
    from collections.abc import Mapping

OURS, OTHERS = 77, 7


class Processes:
    """A /proc of our own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "self/ns").mkdir(parents=True)
        (path / "self/ns/mnt").symlink_to("mnt:[1]")

    def add(
        self,
        pid: int,
        descriptors: Mapping[int, str],
        *,
        comm: bytes = b"cat",
        uid: int = 1000,
        cwd: str = "/",
        namespace: int = 1,
    ) -> Path:
        process = self.path / str(pid)
        (process / "fdinfo").mkdir(parents=True)
        (process / "ns").mkdir()
        for number, info in descriptors.items():
            (process / "fdinfo" / str(number)).write_text(info)
        (process / "cwd").symlink_to(cwd)
        (process / "root").symlink_to("/")
        (process / "ns/mnt").symlink_to(f"mnt:[{namespace}]")
        (process / "comm").write_bytes(comm + b"\n")
        (process / "status").write_text(f"Name:\tx\nUid:\t{uid}\t0\t0\t0\n")
        return process

    def holders(self, *mount_ids: int, exclude: tuple[int, ...] = ()) -> list[Holding]:
        return holders.holders(mount_ids, exclude=exclude, proc=self.path)


@pytest.fixture
def processes(tmp_path: Path) -> Processes:
    return Processes(tmp_path / "proc")


def info(mount: int, more: str = "") -> str:
    return f"pos:\t0\nflags:\t0100000\nmnt_id:\t{mount}\nino:\t77\n{more}"


def test_those_with_the_most_come_first_and_others_are_left_out(processes: Processes) -> None:
    processes.add(5, {0: info(OTHERS), 3: info(OURS)})
    processes.add(6, {0: info(OURS), 3: info(OURS), 4: info(OTHERS)}, comm=b"tar", uid=1001)
    processes.add(9, {0: info(OTHERS)})
    assert processes.holders(OURS) == [Holding(6, 1001, "tar", 2), Holding(5, 1000, "cat", 1)]
    assert [holding.pid for holding in processes.holders(OURS, OTHERS)] == [6, 5, 9]


def test_the_service_itself_is_left_out(processes: Processes) -> None:
    processes.add(5, {3: info(OURS)})
    processes.add(6, {3: info(OURS)})
    assert [holding.pid for holding in processes.holders(OURS, exclude=(5,))] == [6]


def test_without_mounts_nobody_is_asked(processes: Processes) -> None:
    (processes.path / "self/ns/mnt").unlink()
    assert processes.holders() == []


@pytest.mark.parametrize(
    "text",
    ["", "pos:\t0\n", "mnt_id:\t77", info(770), info(7), info(7, "mnt_id:\t77\n"), "pos:\t0\nxmnt_id:\t77\n"],
)
def test_only_the_mount_id_itself_counts(processes: Processes, text: str) -> None:
    processes.add(5, {3: text})
    assert processes.holders(OURS) == []


def test_a_long_text_is_read_only_at_its_beginning(processes: Processes) -> None:
    processes.add(5, {3: info(OURS, "inotify wd:1\n" * 100_000)})
    assert processes.holders(OURS)[0].count == 1


def test_a_name_in_no_encoding_is_shown_with_escapes(processes: Processes) -> None:
    processes.add(5, {3: info(OURS)}, comm=b"\xff\n\x1b[2J")
    assert processes.holders(OURS)[0].comm == "\\xff\n\x1b[2J"


def test_what_ends_while_one_looks_is_left_out(processes: Processes) -> None:
    (processes.add(5, {3: info(OURS)}) / "comm").unlink()
    processes.add(6, {3: info(OURS)})
    gone = processes.add(7, {}) / "fdinfo/3"
    gone.symlink_to("nowhere")  # a descriptor that is closed between listing and reading
    (processes.path / "8").mkdir()
    assert [holding.pid for holding in processes.holders(OURS)] == [6]


def test_it_takes_no_longer_than_it_may(processes: Processes, caplog: pytest.LogCaptureFixture) -> None:
    processes.add(5, {3: info(OURS)})
    found = holders.holders([OURS], exclude=(), proc=processes.path, seconds=0)
    assert found == []
    assert "no time to ask all" in caplog.text


def test_what_cannot_be_looked_at_is_told(
    processes: Processes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    processes.add(5, {3: info(OURS)})
    processes.add(6, {3: info(OURS)})

    def count(process: str, wanted: frozenset[bytes], until: float) -> int:
        del until
        if process.endswith("/5"):
            raise PermissionError
        return len(wanted)

    monkeypatch.setattr(holders, "_descriptors", count)
    assert [holding.pid for holding in processes.holders(OURS)] == [6]
    assert "not let us: 1 processes" in caplog.text


def test_a_working_directory_counts_in_our_namespace_only(processes: Processes) -> None:
    point = Path("/proc")
    descriptor = os.open(point, os.O_PATH)
    mount = linux.mount_id(descriptor)
    os.close(descriptor)
    processes.add(5, {}, cwd="/proc/sys")
    processes.add(6, {}, cwd="/proc", namespace=2)
    processes.add(7, {}, cwd="/process")
    processes.add(8, {3: info(mount)}, cwd="/proc")
    assert [(holding.pid, holding.count) for holding in processes.holders(mount)] == [(8, 2), (5, 1)]


async def test_a_real_process_is_found_until_it_closes_the_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    descriptor = os.open(file, os.O_RDONLY)
    mount = linux.mount_id(descriptor)
    script = "import os, sys; print(flush=True); input(); os.close(int(sys.argv[1])); print(flush=True); input()"
    reader = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, str(descriptor)),
        pass_fds=(descriptor,),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd="/proc",
    )
    assert reader.stdin is not None
    assert reader.stdout is not None

    def count() -> int:
        found = holders.holders([mount], exclude=[os.getpid()])
        return sum(holding.count for holding in found if holding.pid == reader.pid)

    await reader.stdout.readline()
    before = await asyncio.to_thread(count)
    reader.stdin.write(b"\n")
    await reader.stdout.readline()
    assert await asyncio.to_thread(count) == before - 1
    (found,) = [each for each in holders.holders([mount], exclude=[]) if each.pid == os.getpid()]
    assert found.uid == os.getuid()
    await reader.communicate(b"\n")
    os.close(descriptor)
