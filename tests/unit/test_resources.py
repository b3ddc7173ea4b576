"""What is left of the machine is read rightly, and a mount is refused before it is used up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sendense_restored import errors
from sendense_restored.daemon.host import resources

MIB = 1 << 20


def group(
    directory: Path, most: str, used: int, statistics: str = "anon 1\ninactive_file 0\nactive_file 0\n"
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{most}\n")
    (directory / "memory.current").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(statistics)


def test_the_narrowest_of_the_groups_above_counts(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("memory\n")  # the uppermost group has no limits
    group(tmp_path / "system.slice", "3000", 1000)
    group(tmp_path / "system.slice/restore.service", "max", 700)
    assert resources._left_in_group("0::/system.slice/restore.service\n", tmp_path) == 2000
    group(tmp_path / "system.slice/restore.service", "1000", 700)
    assert resources._left_in_group("0::/system.slice/restore.service\n", tmp_path) == 300


def test_without_a_limit_there_is_none(tmp_path: Path) -> None:
    group(tmp_path / "a", "max", 700)
    assert resources._left_in_group("0::/a\n", tmp_path) is None
    assert resources._left_in_group("0::/\n", tmp_path) is None
    assert resources._left_in_group("4:memory:/a\n", tmp_path) is None  # the first version of groups
    assert resources._left_in_group("", tmp_path) is None


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    group(tmp_path / "a", "1000", 1500)
    assert resources._left_in_group("0::/a\n", tmp_path) == 0


def test_what_was_only_read_from_files_can_be_had(tmp_path: Path) -> None:
    group(tmp_path / "a", "1000", 900, "file 800\ninactive_file 300\nworkingset_refault_file 7\nshmem 500\n")
    assert resources._left_in_group("0::/a\n", tmp_path) == 400


@pytest.mark.parametrize("statistics", ["", "inactive_file\n", "inactive_file many\n", "x_inactive_file 5\n"])
def test_odd_statistics_are_no_memory(tmp_path: Path, statistics: str) -> None:
    group(tmp_path / "a", "1000", 900, statistics)
    assert resources._left_in_group("0::/a\n", tmp_path) == 100


@pytest.mark.parametrize("path", ["/../a", "/..", "/a/../../b"])
def test_a_group_that_cannot_be_seen_is_not_looked_for_elsewhere(tmp_path: Path, path: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("a", "b"):
        group(tmp_path / name, "1000", 900)
        group(inside / name, "1000", 900)
    assert resources._left_in_group(f"0::{path}\n", inside) is None


@pytest.mark.parametrize("most", ["", "-1", "max", "1e9"])
def test_a_limit_that_is_no_number_is_none(tmp_path: Path, most: str) -> None:
    group(tmp_path / "a", most, 10)
    assert resources._left_in_group("0::/a\n", tmp_path) is None


def process(proc: Path, pid: int, parent: int, kib: int | None, name: str = "x") -> None:
    (proc / str(pid)).mkdir()
    resident = "" if kib is None else f"VmRSS:\t  {kib} kB\n"
    (proc / str(pid) / "status").write_text(f"Name:\t{name}\nUmask:\t0022\nPPid:\t{parent}\n{resident}")


def test_memory_is_that_of_the_process_and_of_all_below_it(tmp_path: Path) -> None:
    process(tmp_path, 10, 1, 100)
    process(tmp_path, 11, 10, 20)
    process(tmp_path, 12, 11, 3)
    process(tmp_path, 13, 10, None)  # a zombie has none
    process(tmp_path, 20, 1, 1000, name="PPid:\\t10 VmRSS:\\t9 kB")  # the kernel escapes what would break the line
    (tmp_path / "14").mkdir()  # just ended
    (tmp_path / "uptime").write_text("1 1\n")
    assert resources.memory(10, tmp_path) == 123 << 10


def test_processes_that_change_while_they_are_read_make_no_circle(tmp_path: Path) -> None:
    process(tmp_path, 10, 11, 1)
    process(tmp_path, 11, 10, 2)
    assert resources.memory(10, tmp_path) == 3 << 10


def test_of_this_process_it_is_what_the_kernel_says() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert resources.memory(os.getpid()) >= pages * os.sysconf("SC_PAGE_SIZE") * 0.8


def test_there_is_memory_on_this_machine() -> None:
    assert resources.available_memory() > 0


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(resources, "available_memory", lambda: 1 << 40)
    monkeypatch.setattr(resources, "open_fds", lambda: 50)
    monkeypatch.setattr(resources, "fds_limit", lambda: 1 << 20)
    return monkeypatch


@pytest.mark.usefixtures("roomy")
def test_where_there_is_room_nothing_is_refused() -> None:
    resources.check_room(1, 8, depth=512, uids_free=1)


@pytest.mark.usefixtures("roomy")
def test_without_a_uid_for_its_reader_a_mount_is_refused() -> None:
    with pytest.raises(errors.LimitReached, match=r"readers\.uids"):
        resources.check_room(1, 1, depth=128, uids_free=0)


def test_memory_is_kept_for_others_and_more_disks_take_more(roomy: pytest.MonkeyPatch) -> None:
    roomy.setattr(resources, "available_memory", lambda: 300 * MIB)
    resources.check_room(1, 1, depth=128, uids_free=1)
    with pytest.raises(errors.NoSpace, match="300 MiB"):
        resources.check_room(1, 2, depth=128, uids_free=1)
    roomy.setattr(resources, "available_memory", lambda: 400 * MIB)
    resources.check_room(1, 2, depth=128, uids_free=1)
    with pytest.raises(errors.NoSpace, match="what has begun"):
        resources.check_room(2, 2, depth=128, uids_free=1)


def test_descriptors_are_counted_with_the_longest_chain_that_may_come(roomy: pytest.MonkeyPatch) -> None:
    roomy.setattr(resources, "fds_limit", lambda: 1024)
    resources.check_room(1, 4, depth=128, uids_free=1)
    with pytest.raises(errors.LimitReached, match="descriptors"):
        resources.check_room(1, 8, depth=128, uids_free=1)
    with pytest.raises(errors.LimitReached, match="descriptors"):
        resources.check_room(1, 2, depth=512, uids_free=1)
