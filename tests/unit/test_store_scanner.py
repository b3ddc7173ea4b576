"""What a scan makes of the files in a repository."""

from __future__ import annotations

import os
import socket
import struct
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.daemon.store import DiskFile, Found, FoundBackup, Problem, scan
from sendense_restored.daemon.store.scanner import key_of
from tests.records import open_store

if TYPE_CHECKING:
    from pathlib import Path

NOON = int(datetime(2025, 3, 1, 12, tzinfo=UTC).timestamp())
CLUSTER = 1 << 16
MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "repository"
    path.mkdir()
    return path


def image(path: Path, backing: str = "", *, size: int = MIB, when: float = NOON, magic: bytes = b"QFI\xfb") -> Path:
    """An empty QCOW2 image: header, reference count table, first-level table."""
    name = os.fsencode(backing)
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(magic, 3, 512 if name else 0, len(name), 16, size, 0),
        *(1, 2 * CLUSTER, CLUSTER, 1, 0, 0),
        *(0, 0, 0, 4, 104),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write((header + bytes(8)).ljust(512, b"\0") + name)
        file.truncate(3 * CLUSTER)
    os.utime(path, (when, when))
    return path


def keys(found: Found) -> dict[str, str]:
    return {backup.key: backup.parent for backup in found.backups}


def problems(found: Found) -> dict[str, str]:
    return {problem.path: problem.reason for problem in found.problems}


def test_a_file_is_a_backup(root: Path) -> None:
    image(root / "web/full.qcow2", size=5 * MIB)
    assert scan(root) == Found(
        (
            FoundBackup(
                key="web/full.qcow2",
                vm_name="web",
                backup_type="full",
                parent="",
                created_at=datetime(2025, 3, 1, 12, tzinfo=UTC),
                stored_bytes=3 * CLUSTER,
                disks=(DiskFile(0, "web/full.qcow2", 5 * MIB),),
            ),
        ),
        (),
    )


def test_an_empty_repository_has_nothing(root: Path) -> None:
    (root / "web").mkdir()
    assert scan(root) == Found((), ())


def test_the_first_directory_is_the_machine_at_any_depth(root: Path) -> None:
    for path in ("web/a.qcow2", "db/2025/03/a.qcow2", "db/a.qcow2", "ümläut vm/ä.qcow2"):
        image(root / path)
    assert [(backup.vm_name, backup.key) for backup in scan(root).backups] == [
        ("db", "db/a.qcow2"),
        ("db", "db/2025/03/a.qcow2"),
        ("web", "web/a.qcow2"),
        ("ümläut vm", "ümläut vm/ä.qcow2"),
    ]


def test_files_of_several_disks_are_one_backup_of_the_latest_time(root: Path) -> None:
    image(root / "web/b-disk0.qcow2", size=MIB)
    image(root / "web/b-disk1.qcow2", size=2 * MIB, when=NOON + 60)
    image(root / "web/b-disk10.qcow2", size=3 * MIB)
    image(root / "web/other/b-disk0.qcow2")
    first, second = scan(root).backups
    assert [(disk.index, disk.path, disk.size) for disk in first.disks] == [
        (0, "web/b-disk0.qcow2", MIB),
        (1, "web/b-disk1.qcow2", 2 * MIB),
        (10, "web/b-disk10.qcow2", 3 * MIB),
    ]
    assert (first.created_at.timestamp(), first.stored_bytes) == (NOON + 60, 9 * CLUSTER)
    assert second.key == "web/other/b-diskN"


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("web/a.qcow2", ("web/a.qcow2", 0)),
        ("web/a-disk0.qcow2", ("web/a-diskN", 0)),
        ("web/a-disk12.qcow2", ("web/a-diskN", 12)),
        ("web/a-disk01.qcow2", ("web/a-disk01.qcow2", 0)),
        ("web/a-disk.qcow2", ("web/a-disk.qcow2", 0)),
        ("web/a-diskN.qcow2", ("web/a-diskN.qcow2", 0)),
        ("web/a-disk٣.qcow2", ("web/a-disk٣.qcow2", 0)),
        ("web/a-disk99999.qcow2", ("web/a-disk99999.qcow2", 0)),
        ("web/a\n-disk1.qcow2", ("web/a\n-diskN", 1)),
    ],
)
def test_the_rule_of_disk_names(path: str, key: tuple[str, int]) -> None:
    assert key_of(path) == key


def test_backing_files_make_chains(root: Path, tmp_path: Path) -> None:
    image(root / "web/full.qcow2")
    image(root / "web/1.qcow2", "full.qcow2")
    image(root / "web/2.qcow2", str(root / "web/1.qcow2"))
    image(root / "web/new/3.qcow2", "../2.qcow2")
    (tmp_path / "link").symlink_to(root)
    found = scan(tmp_path / "link")
    assert keys(found) == {
        "web/full.qcow2": "",
        "web/1.qcow2": "web/full.qcow2",
        "web/2.qcow2": "web/1.qcow2",
        "web/new/3.qcow2": "web/2.qcow2",
    }
    assert {backup.key for backup in found.backups if backup.backup_type == "full"} == {"web/full.qcow2"}
    assert found.problems == ()


def test_a_backing_file_may_be_named_by_a_link_inside(root: Path) -> None:
    image(root / "web/full.qcow2")
    (root / "web/latest").symlink_to("full.qcow2")
    image(root / "web/inc.qcow2", "latest")
    assert keys(scan(root)) == {"web/full.qcow2": "", "web/inc.qcow2": "web/full.qcow2"}


def test_a_base_that_is_no_backup_makes_an_incremental_without_parent(root: Path) -> None:
    (root / "golden.raw").write_bytes(bytes(512))
    image(root / "web/inc.qcow2", "../golden.raw")
    (backup,) = scan(root).backups
    assert (backup.backup_type, backup.parent) == ("incremental", "")


def test_disks_have_the_parent_of_their_own_number(root: Path) -> None:
    for number in (0, 1):
        image(root / f"web/full-disk{number}.qcow2")
        image(root / f"web/inc-disk{number}.qcow2", f"full-disk{number}.qcow2")
    # Crosswise, the two backups would be each other's parents.
    image(root / "web/x-disk0.qcow2", "y-disk1.qcow2")
    image(root / "web/x-disk1.qcow2")
    image(root / "web/y-disk0.qcow2", "x-disk1.qcow2")
    image(root / "web/y-disk1.qcow2")
    # A disk that backs another of the same backup does not make it its own parent.
    image(root / "web/z-disk0.qcow2", "z-disk1.qcow2")
    image(root / "web/z-disk1.qcow2")
    assert keys(scan(root)) == {
        "web/full-diskN": "",
        "web/inc-diskN": "web/full-diskN",
        "web/x-diskN": "",
        "web/y-diskN": "",
        "web/z-diskN": "",
    }


@pytest.mark.parametrize(
    ("backing", "reason"),
    [
        ("missing.qcow2", "has a backing file that is not there"),
        ("/etc/shadow", "has a backing file outside the repository"),
        ("../../outside.qcow2", "has a backing file outside the repository"),
        ("../../../../../../../../etc/passwd", "has a backing file outside the repository"),
        ("nbd://host/disk", "named by a protocol"),
        ('json:{"driver":"raw"}', "named by a protocol"),
        ("out", "has a backing file outside the repository"),
        ("absolute-out", "has a backing file outside the repository"),
        ("loop", "cannot be read"),
        ("fifo", "has a backing file that is not a regular file"),
        (".", "has a backing file that is not a regular file"),
        ("/dev/zero", "has a backing file outside the repository"),
        ("self.qcow2", "goes in a circle"),
        ("broken.qcow2", "needs web/broken.qcow2, which cannot be used"),
    ],
)
def test_a_chain_that_leads_nowhere_is_reported_with_all_that_builds_on_it(
    root: Path, backing: str, reason: str
) -> None:
    image(root.parent / "outside.qcow2")
    image(root / "web/good.qcow2")
    image(root / "web/self.qcow2", backing)
    image(root / "web/child.qcow2", "self.qcow2")
    image(root / "web/broken.qcow2", magic=b"QFI!")
    (root / "web/out").symlink_to("../../outside.qcow2")
    (root / "web/absolute-out").symlink_to("/etc/passwd")
    (root / "web/loop").symlink_to("loop")
    os.mkfifo(root / "web/fifo")
    found = scan(root)
    assert keys(found) == {"web/good.qcow2": ""}
    reported = problems(found)
    assert reason in reported.pop("web/self.qcow2")
    passed_on = reason if backing in {"self.qcow2", "broken.qcow2"} else "needs web/self.qcow2, which cannot be used"
    assert passed_on in reported.pop("web/child.qcow2")
    assert reported.keys() == {"web/broken.qcow2"}


def test_a_circle_of_many_is_found(root: Path) -> None:
    for number in range(5):
        image(root / f"web/{number}.qcow2", f"{(number + 1) % 5}.qcow2")
    image(root / "web/hanging.qcow2", "3.qcow2")
    found = scan(root)
    assert found.backups == ()
    assert len(found.problems) == 6


def test_a_long_chain_is_followed(root: Path) -> None:
    image(root / "web/0.qcow2")
    for number in range(1, 300):
        image(root / f"web/{number}.qcow2", f"{number - 1}.qcow2")
    found = scan(root)
    assert keys(found)["web/299.qcow2"] == "web/298.qcow2"
    assert len(found.backups) == 300


def test_what_is_no_image_is_reported_and_never_opened(root: Path) -> None:
    web = root / "web"
    image(web / "good.qcow2")
    os.mkfifo(web / "fifo.qcow2")  # would block an open for ever
    (web / "link.qcow2").symlink_to("good.qcow2")
    (web / "out.qcow2").symlink_to("/etc/passwd")
    (web / "empty.qcow2").touch()
    (web / "text.qcow2").write_text("hello")
    image(web / "no-disk.qcow2", size=0)
    image(root / "loose.qcow2")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(web / "s.qcow2"))
    found = scan(root)
    assert keys(found) == {"web/good.qcow2": ""}
    reported = problems(found)
    for path, reason in {
        "loose.qcow2": "move it into one",
        "web/fifo.qcow2": "not a regular file",
        "web/s.qcow2": "not a regular file",
        "web/link.qcow2": "symbolic link",
        "web/out.qcow2": "symbolic link",
        "web/empty.qcow2": "QCOW2",
        "web/text.qcow2": "QCOW2",
        "web/no-disk.qcow2": "empty disk",
    }.items():
        assert reason in reported.pop(path)
    assert reported == {}
    assert not any(str(root) in problem.reason for problem in found.problems)


def test_links_to_directories_and_hidden_names_are_passed_over(root: Path, tmp_path: Path) -> None:
    image(tmp_path / "elsewhere/a.qcow2")
    image(root / "web/.snapshot/hourly/a.qcow2")
    image(root / "web/.a.qcow2.partial")
    image(root / ".trash/a.qcow2")
    image(root / "web/a.qcow2.tmp")
    (root / "other").symlink_to(tmp_path / "elsewhere")
    assert scan(root) == Found((), ())


def test_a_directory_that_looks_like_an_image_is_a_directory(root: Path) -> None:
    image(root / "web/day.qcow2/a.qcow2")
    assert keys(scan(root)) == {"web/day.qcow2/a.qcow2": ""}


def test_names_that_are_no_text_are_reported_in_their_text_form(root: Path) -> None:
    bad = os.fsdecode(b"caf\xe9")
    image(root / "web" / f"{bad}.qcow2")
    image(root / bad / "a.qcow2")
    found = scan(root)
    assert found.backups == ()
    reason = "has a name that is not UTF-8; rename it"
    assert found.problems == (Problem("caf\uefe9", reason), Problem("web/caf\uefe9.qcow2", reason))


@pytest.mark.parametrize("when", [-(10**9), 0, 2**33])
def test_any_time_of_a_file_is_a_time(root: Path, when: int) -> None:
    path = image(root / "web/a.qcow2", when=when)
    (backup,) = scan(root).backups
    assert backup.created_at == datetime.fromtimestamp(max(path.stat().st_mtime, 0), UTC)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_reported(root: Path) -> None:
    image(root / "web/a.qcow2").chmod(0)
    image(root / "web/good.qcow2")
    image(root / "shut/a.qcow2")
    (root / "shut").chmod(0)
    found = scan(root)
    (root / "shut").chmod(0o700)
    assert keys(found) == {"web/good.qcow2": ""}
    denied = "cannot be read: Permission denied"
    assert problems(found) == {"shut": denied, "web/a.qcow2": denied}


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_a_root_that_is_no_directory_is_unavailable(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.Unavailable, match="storage is mounted") as caught:
        scan(tmp_path / name)
    assert str(tmp_path) not in caught.value.message


async def test_a_scan_goes_into_the_catalogue_and_comes_out_as_it_is(root: Path, tmp_path: Path) -> None:
    for number in (0, 1):
        image(root / f"web/full-disk{number}.qcow2", size=(number + 1) * MIB)
        image(root / f"web/inc-disk{number}.qcow2", f"full-disk{number}.qcow2", size=(number + 1) * MIB)
    image(root / "db/only.qcow2", when=NOON + 0.123456789)
    async with await open_store(f"sqlite:///{tmp_path}/restore.db") as store:
        repository = await store.add_repository("Main", str(root))
        added = (await store.record_scan(repository.id, scan(root))).added
        assert len(added) == 3
        assert (await store.record_scan(repository.id, scan(root))).unchanged == 3
        (root / "db/only.qcow2").unlink()
        os.utime(root / "web/inc-disk0.qcow2", (NOON + 5, NOON + 5))
        result = await store.record_scan(repository.id, scan(root))
        assert (len(result.gone), len(result.updated), result.unchanged) == (1, 1, 1)
        incremental = await store.backup(result.updated[0])
        assert incremental.parent_backup_id is not None
        assert (await store.backup(incremental.parent_backup_id)).backup_type == "full"
        assert [disk.size for disk in incremental.disks] == [MIB, 2 * MIB]


async def test_a_disk_that_cannot_be_read_any_more_stays_with_its_backup(root: Path, tmp_path: Path) -> None:
    for number in (0, 1):
        image(root / f"web/full-disk{number}.qcow2", size=(number + 1) * MIB)
        image(root / f"web/inc-disk{number}.qcow2", f"full-disk{number}.qcow2", size=(number + 1) * MIB)
    async with await open_store(f"sqlite:///{tmp_path}/restore.db") as store:
        repository = await store.add_repository("Main", str(root))
        await store.record_scan(repository.id, scan(root))
        before = await store.backups()
        image(root / "web/full-disk0.qcow2", magic=b"oops")
        found = scan(root)
        assert problems(found).keys() == {"web/full-disk0.qcow2", "web/inc-disk0.qcow2"}
        result = await store.record_scan(repository.id, found)
        assert (result.gone, result.kept, len(result.updated)) == ((), (), 2)
        after = await store.backups()
        assert [backup.disks for backup in after[0]] == [backup.disks for backup in before[0]]
        for number in (0, 1):
            image(root / f"web/full-disk{number}.qcow2", size=(number + 1) * MIB)
        await store.record_scan(repository.id, scan(root))
        assert await store.backups() == before
