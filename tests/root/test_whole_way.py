"""The main job: from a backup id to a file's bytes in the hands of an unprivileged caller, every process real."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sendense_restored import errors, names
from sendense_restored.client import Client
from tests.root import windows
from tools.lab import leftovers
from tools.lab.bus import CHECKOUT
from tools.lab.service import service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tools.lab.guest import Chain
    from tools.lab.people import Person
    from tools.lab.service import Service

    from .conftest import Machine

ETC = "/partition-1/etc"


class Users:
    """Programs that users run: the command line, and a walk that opens every file."""

    def __init__(self, machine: Machine) -> None:
        # The checkout may lie where only root can go.
        self._environment = {**os.environ, **machine.bus.environment, "PYTHONPATH": str(machine.checkout)}
        self._python = str(machine.checkout / Path(sys.executable).relative_to(CHECKOUT))
        self._walk = str(machine.checkout / "tools/lab/hashes.py")
        self.member, self.stranger = machine.people.member, machine.people.stranger

    async def _run(self, who: Person, *argv: str) -> subprocess.CompletedProcess[bytes]:
        run = subprocess.run
        return await asyncio.to_thread(
            run, who.command(self._python, *argv), capture_output=True, check=False, env=self._environment
        )

    async def types(self, who: Person, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """``sendense-restore ARGUMENTS``."""
        return await self._run(who, "-m", "sendense_restored.cli", *arguments)

    async def asks(self, who: Person, *arguments: str) -> Any:  # noqa: ANN401 - a document
        """The same with ``--json``; it has to succeed."""
        done = await self.types(who, *arguments, "--json")
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    async def reads_everything(self, who: Person, mount: str) -> dict[str, list[Any]]:
        """Path -> [size, mode, SHA-256] of all regular files, each read through a descriptor of its own."""
        done = await self._run(who, self._walk, mount)
        assert done.returncode == 0, done.stderr.decode()
        found: dict[str, list[Any]] = json.loads(done.stdout)
        return found


@pytest.fixture
def users(machine: Machine) -> Users:
    return Users(machine)


@pytest.fixture
def daemon(machine: Machine, tmp_path: Path) -> Iterator[Service]:
    with service(machine.bus, tmp_path) as running:
        yield running


@pytest.fixture
async def root(machine: Machine, daemon: Service) -> AsyncIterator[Client]:
    """A client of uid 0, for whom polkit is not asked."""
    del daemon
    async with await Client.connect(machine.bus.address) as client:
        yield client


@pytest.fixture
async def backups(root: Client, chain: Chain) -> list[str]:
    """The ids of the chain's backups, oldest first."""
    await root.scan(await root.add_repository("lab", str(chain.backups[0].image.parent.parent)))
    ids = {backup.parent_backup_id: backup.backup_id async for backup in root.backups()}
    found = [ids.pop("")]
    while found[-1] in ids:
        found.append(ids.pop(found[-1]))
    assert len(found) == len(chain.backups)
    return found


def held_by(service: Service) -> leftovers.Census:
    """What the daemon has made of the kernel: mounts in its namespace, children, loop devices."""
    return leftovers.of_the_machine() | leftovers.mounts_of(service.pid) | leftovers.children_of(service.pid)


@contextlib.asynccontextmanager
async def bystander(root: Client, backup: str) -> AsyncIterator[str]:
    """Another mount, which must not notice anything."""
    mount = await root.mount(backup, journal="as-crashed")
    yield mount
    descriptor, _ = await root.open_file(mount, f"{ETC}/hostname")
    with open(descriptor, "rb") as file:  # noqa: PTH123, ASYNC230 - a descriptor
        assert file.read() == b"web01\n"
    await root.unmount(mount)


# --- the way of a restore -------------------------------------------------------------------------------------------


async def test_a_member_of_the_group_reads_every_file_of_every_backup(
    users: Users, daemon: Service, backups: list[str], chain: Chain
) -> None:
    before = held_by(daemon)
    for backup_id, backup in zip(backups, chain.backups, strict=True):
        mount = await users.asks(users.member, "mount", backup_id)
        assert {volume["view"] for volume in mount["volumes"]} == {"replayed"}
        wanted = {
            names.format_path((volume.encode(), *path.split(b"/")[1:])): [file.size, file.mode, file.sha256]
            for volume, files in backup.files.items()
            for path, file in files.items()
        }
        assert await users.reads_everything(users.member, mount["mount_id"]) == wanted
        await users.asks(users.member, "unmount", mount["mount_id"])
        assert leftovers.added(before, held_by(daemon)) == []
    assert chain.unchanged()


async def test_as_crashed_shows_the_disk_without_its_journals(
    root: Client, daemon: Service, backups: list[str], chain: Chain
) -> None:
    before = held_by(daemon)
    mount = await root.mount(backups[-1], journal="as-crashed")
    info = await root.mount_info(mount)
    assert {volume.view for volume in info.volumes} == {"as-crashed"}
    for volume in info.volumes:
        with pytest.raises(errors.PathNotFound):
            await root.file_info(mount, f"/{volume.name}{chain.backups[-1].journal_only.decode()}")
    await root.unmount(mount)
    assert leftovers.added(before, held_by(daemon)) == []


async def test_a_descriptor_is_read_only_regular_and_of_the_guest(root: Client, backups: list[str]) -> None:
    mount = await root.mount(backups[0])
    descriptor, info = await root.open_file(mount, f"{ETC}/secret.key")
    status = os.fstat(descriptor)
    assert stat.S_ISREG(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == info.mode == 0o600
    assert os.read(descriptor, 100) == b"only root may read this\n"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(descriptor, b"x")
    with pytest.raises(OSError, match="Read-only file system"):
        os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    os.close(descriptor)
    await root.unmount(mount)


async def test_no_other_user_reaches_the_files_through_a_process_of_the_service(
    root: Client, users: Users, daemon: Service, backups: list[str]
) -> None:
    """The tools' uids can name ``/proc/PID/root`` of their own kind; what lies there must be closed to them."""
    mount = await root.mount(backups[0])
    info = await root.mount_info(mount)
    file = f"/proc/{daemon.pid}/root{info.mount_path}/partition-1/etc/hostname"
    assert Path(file).read_bytes() == b"web01\n"
    for uid in (60900, 60998, 65534, users.member.uid):
        inside = ["nsenter", f"--target={daemon.pid}", "--mount", f"--root=/proc/{daemon.pid}/root"]
        argv = [*inside, "setpriv", f"--reuid={uid}", "--clear-groups"]
        done = subprocess.run(  # noqa: ASYNC221 - nothing else to do
            [*argv, "--inh-caps=-all", "cat", f"{info.mount_path}/partition-1/etc/hostname"],
            check=False,
            capture_output=True,
        )
        assert b"Permission denied" in done.stderr, uid
    await root.unmount(mount)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/partition-1/links/outside", errors.PathNotFound),
        ("/partition-1/links/dangling", errors.PathNotFound),
        ("/partition-1/links/loop", errors.PathNotFound),
        ("/partition-1/tmp/fifo", errors.NotAFile),
        ("/partition-1/tmp/socket", errors.NotAFile),
        ("/partition-1/dev/disk", errors.NotAFile),
        ("/partition-1/dev/null", errors.NotAFile),
        ("/partition-1/etc", errors.NotAFile),
        ("/partition-1", errors.NotAFile),
        ("/", errors.NotAFile),
        ("/partition-9/etc", errors.PathNotFound),
        ("/partition-1/etc/hostname/x", errors.PathNotFound),
        ("/partition-1/../partition-2", errors.InvalidPath),
        ("/partition-1/" + "x" * 1021, errors.InvalidPath),
        ("/partition-1" + "/d" * 10_000, errors.InvalidPath),
        ("/partition-1/" + "n" * 300, errors.InvalidPath),
        ("/partition-1/\uef41", errors.PathNotFound),
        ("/partition-1/\uefc3\uefa9", errors.InvalidPath),
        ("partition-1/etc", errors.InvalidPath),
    ],
)
async def test_no_path_leads_to_anything_else(
    root: Client, backups: list[str], path: str, error: type[errors.RestoreError]
) -> None:
    mount = await root.mount(backups[0])
    with pytest.raises(error):
        await root.open_file(mount, path)
    await root.unmount(mount)


async def test_links_are_followed_inside_the_volume_and_odd_names_lead_to_their_files(
    root: Client, backups: list[str]
) -> None:
    mount = await root.mount(backups[0])
    odd = names.format_path((b"partition-1", b"tmp", b"caf\xe9.txt"))
    for path, content in (
        ("/partition-1/links/absolute", b"web01\n"),
        ("/partition-1/links/relative", b"web01\n"),
        ("/partition-2/données/été.txt", "déjà vu\n".encode()),
        (odd, b"a name in Latin-1\n"),
    ):
        descriptor, _ = await root.open_file(mount, path)
        assert os.read(descriptor, 100) == content
        os.close(descriptor)
    await root.unmount(mount)


async def test_two_callers_of_the_same_backup_share_one_mount_and_each_holds_it(
    root: Client, users: Users, daemon: Service, backups: list[str]
) -> None:
    before = held_by(daemon)
    first, second = await asyncio.gather(root.mount(backups[0]), root.mount(backups[0]))
    theirs = await users.asks(users.member, "mount", backups[0])
    assert first == second == theirs["mount_id"]
    assert {claim.uid for claim in (await root.mount_info(first)).claims} == {0, users.member.uid}
    await root.unmount(first)
    assert [entry["name"] for entry in await users.asks(users.member, "ls", first, ETC)] == [
        "empty",
        "hostname",
        "secret.key",
    ]
    await users.asks(users.member, "unmount", first)
    assert leftovers.added(before, held_by(daemon)) == []
    with pytest.raises(errors.Expired, match=f"unmounted by uid {users.member.uid}"):
        await root.mount_info(first)


async def test_all_disks_of_a_backup_are_named_by_their_index(
    root: Client, daemon: Service, chain: Chain, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The two disks are copies of each other, so every file system is there twice with the same UUID."""
    repository = tmp_path_factory.mktemp("twins")
    (repository / "vm").mkdir()
    for index in (0, 1):
        disk = repository / f"vm/full-disk{index}.qcow2"
        convert = ["qemu-img", "convert", "-O", "qcow2", "-c", str(chain.backups[0].image), str(disk)]
        subprocess.run(convert, check=True)  # noqa: ASYNC221 - the test has nothing else to do
    await root.scan(await root.add_repository("twins", str(repository)))
    ((backup,), _) = await root.list_backups()
    before = held_by(daemon)
    mount = await root.mount(backup.backup_id, all_disks=True)
    info = await root.mount_info(mount)
    assert {volume.state for volume in info.volumes} == {"mounted"}, info
    assert [volume.name for volume in info.volumes] == [f"disk-{d}-partition-{p}" for d in (0, 1) for p in (1, 2, 3)]
    assert len(info.devices) == 6
    await root.unmount(mount)
    assert leftovers.added(before, held_by(daemon)) == []


# --- who may --------------------------------------------------------------------------------------------------------


async def test_a_stranger_gets_nothing(root: Client, users: Users, backups: list[str]) -> None:
    mount = await root.mount(backups[0])
    refused = errors.NotAuthorized.exit_code
    for arguments in (
        ("backups",),
        ("mount", backups[0]),
        ("volumes", mount),
        ("ls", mount, ETC),
        ("stat", mount, ETC),
        ("cat", mount, f"{ETC}/hostname"),
        ("unmount", mount),
        ("unmount", "--force", mount),
        ("catalog", "add-repository", "mine", "/tmp"),
    ):
        done = await users.types(users.stranger, *arguments)
        assert done.returncode == refused, (arguments, done.stderr.decode())
        assert done.stdout == b""
    assert json.loads((await users.types(users.stranger, "mounts", "--json")).stdout) == []
    await root.unmount(mount)


async def test_a_member_may_not_touch_the_mounts_of_others(root: Client, users: Users, backups: list[str]) -> None:
    mount = await root.mount(backups[0])
    for arguments in (("ls", mount, ETC), ("unmount", mount), ("unmount", "--force", mount)):
        done = await users.types(users.member, *arguments)
        assert done.returncode == errors.NotAuthorized.exit_code, done.stderr.decode()
    await root.unmount(mount)


# --- the end of a mount ---------------------------------------------------------------------------------------------


async def test_a_mount_that_somebody_reads_is_busy_and_goes_on(
    root: Client, daemon: Service, backups: list[str]
) -> None:
    before = held_by(daemon)
    mount = await root.mount(backups[0])
    descriptor, _ = await root.open_file(mount, "/partition-2/srv/large.bin")
    with pytest.raises(errors.Busy):
        await root.unmount(mount)
    info = await root.mount_info(mount)
    assert (info.state, info.busy) == ("mounted", True)
    assert {volume.state for volume in info.volumes} == {"mounted"}
    for volume in info.volumes:
        second, _ = await root.open_file(mount, f"/{volume.name}/etc/hostname")
        assert os.read(second, 100) == b"web01\n"
        os.close(second)
    os.close(descriptor)
    await root.unmount(mount)
    assert leftovers.added(before, held_by(daemon)) == []


async def test_force_ends_a_mount_under_its_readers(root: Client, daemon: Service, backups: list[str]) -> None:
    before = held_by(daemon)
    async with bystander(root, backups[0]):
        mount = await root.mount(backups[1])
        descriptor, info = await root.open_file(mount, "/partition-3/srv/large.bin")
        await root.unmount(mount, force=True)
        with pytest.raises(errors.Expired, match="by force"):
            await root.mount_info(mount)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(descriptor, info.size, 0)
        os.close(descriptor)
    assert left_in_time(before, daemon) == []


def left_in_time(before: leftovers.Census, daemon: Service) -> list[str]:
    """What is still held when the kernel has had time to notice that the last descriptor abroad was closed."""
    leftovers.left_on_the_machine(before)  # waits
    return leftovers.added(before, held_by(daemon))


def child(daemon: Service, before: leftovers.Census, program: str) -> int:
    """The pid of the one child that runs ``program`` and was not there before."""
    pids = [int(key.split()[-1]) for key in leftovers.children_of(daemon.pid).keys() - before.keys()]
    (pid,) = [pid for pid in pids if program in Path(f"/proc/{pid}/exe").readlink().name]
    return pid


@pytest.mark.parametrize("victim", ["qemu-storage-daemon", "python"])
async def test_a_mount_whose_server_or_reader_dies_has_failed_and_says_so(
    root: Client, daemon: Service, backups: list[str], victim: str
) -> None:
    before = held_by(daemon)
    async with bystander(root, backups[0]):
        already = leftovers.children_of(daemon.pid)
        mount = await root.mount(backups[1])
        os.kill(child(daemon, already, victim), signal.SIGKILL)
        async with asyncio.timeout(60):
            while (info := await root.mount_info(mount)).state != "failed":
                continue  # each question is a round trip over the bus
        assert "ended" in info.error
        with pytest.raises(errors.Unavailable):
            await root.list_files(mount, ETC)
        await root.unmount(mount)
    assert left_in_time(before, daemon) == []


async def test_a_hung_server_stops_only_its_own_mount(root: Client, daemon: Service, backups: list[str]) -> None:
    before = held_by(daemon)
    async with bystander(root, backups[0]):
        already = leftovers.children_of(daemon.pid)
        mount = await root.mount(backups[1])
        os.kill(child(daemon, already, "qemu"), signal.SIGSTOP)
        await root.unmount(mount, force=True)
    assert left_in_time(before, daemon) == []


# --- the end of the daemon ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_daemon_that_ends_leaves_nothing_even_if_it_is_killed(
    machine: Machine, chain: Chain, tmp_path: Path, number: signal.Signals
) -> None:
    before = leftovers.of_the_machine()
    with service(machine.bus, tmp_path) as daemon:
        async with await Client.connect(machine.bus.address) as client:
            await client.scan(await client.add_repository("lab", str(chain.backups[0].image.parent.parent)))
            mount = await client.mount((await client.list_backups())[0][0].backup_id)
            descriptor, info = await client.open_file(mount, "/partition-1/srv/large.bin")
            children = [int(key.split()[-1]) for key in leftovers.children_of(daemon.pid)]
            assert len(children) == 3  # image server, reader, keeper
            os.kill(daemon.pid, number)
            ended = os.pidfd_open(daemon.pid)
            await asyncio.to_thread(wait_readable, ended)
            os.close(ended)
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    pidfd = os.pidfd_open(child)
                    await asyncio.to_thread(wait_readable, pidfd)
                    os.close(pidfd)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(descriptor, info.size, 0)
        os.close(descriptor)
    assert leftovers.left_on_the_machine(before) == []
    with contextlib.closing(sqlite3.connect(daemon.database)) as database:
        # It is still wished for; test_resume_live has what comes of that.
        assert database.execute("SELECT id, status FROM restore_mounts").fetchall() == [(mount, "mounted")]
        assert database.execute("SELECT count(*) FROM restore_claims").fetchone() == (1,)
        assert database.execute("SELECT count(*) FROM backup_jobs").fetchone() == (3,)
    assert chain.unchanged()


def as_backup(raw: Path) -> None:
    """Put a disk into a repository, which is the directory that it lies in."""
    (raw.parent / "vm").mkdir()
    windows.run("qemu-img", "convert", "-O", "qcow2", raw, raw.parent / "vm/disk.qcow2")


async def test_ntfs_through_the_whole_service(machine: Machine, tmp_path: Path) -> None:
    raw = windows.make(tmp_path / "raw")
    with windows.written(raw) as inside:
        (inside / "Users").mkdir()
        windows.write(inside / "Users/report", b"content", **{"Zone.Identifier": b"[ZoneTransfer]"})
        windows.junction(inside / "Documents and Settings", "C:\\Users")
        windows.encrypt(windows.write(inside / "secret", windows.PADDED))
        windows.reparse(windows.write(inside / "compressed"), 0x80000017, bytes(16))
    as_backup(raw)
    with service(machine.bus, tmp_path):
        async with await Client.connect(machine.bus.address) as client:
            await client.scan(await client.add_repository("ntfs", str(tmp_path)))
            mount = await client.mount((await client.list_backups())[0][0].backup_id)
            report = "/disk/Documents and Settings/report"
            assert (await client.file_info(mount, "/disk/Documents and Settings")).target == "/Users"
            assert (await client.file_info(mount, report)).streams == ("Zone.Identifier",)
            for stream, content in ((None, b"content"), ("Zone.Identifier", b"[ZoneTransfer]")):
                descriptor, info = await client.open_file(mount, report, stream=stream)
                assert (os.pread(descriptor, 100, 0), info.size) == (content, len(content))
                os.close(descriptor)
            entries, _ = await client.list_files(mount, "/disk")
            unreadable = {entry.name: entry.kind for entry in entries if "unreadable" in entry.extras}
            assert unreadable == {"secret": "file", "compressed": "file"}
            for name in unreadable:
                with pytest.raises(errors.Unreadable):
                    await client.open_file(mount, f"/disk/{name}")
            await client.unmount(mount)


async def test_a_killed_daemon_takes_ntfs_3g_along(machine: Machine, tmp_path: Path) -> None:
    """Its mount is one that the kernel asks the server to end (fuseblk): it must not be the last in the namespace."""
    before = leftovers.of_the_machine()
    as_backup(windows.make(tmp_path / "raw"))
    with service(machine.bus, tmp_path) as daemon:
        async with await Client.connect(machine.bus.address) as client:
            await client.scan(await client.add_repository("ntfs", str(tmp_path)))
            mount = await client.mount((await client.list_backups())[0][0].backup_id)
            ((volume,), _) = await client.list_files(mount, "/")
            assert "unreadable" not in volume.extras, volume
            children = [int(key.split()[-1]) for key in leftovers.children_of(daemon.pid)]
            assert len(children) == 4  # ntfs-3g as well
            waiting = [os.pidfd_open(pid) for pid in (daemon.pid, *children)]
            os.kill(daemon.pid, signal.SIGKILL)
            for pidfd in waiting:
                await asyncio.to_thread(wait_readable, pidfd)
                os.close(pidfd)
    assert leftovers.left_on_the_machine(before) == []


def wait_readable(pidfd: int) -> None:
    """Return when the process behind ``pidfd`` has ended (pidfd_open(2))."""
    import select  # noqa: PLC0415 - for this one call

    assert select.select([pidfd], [], [], 20)[0]


async def test_a_second_daemon_does_not_start_and_leaves_the_first_one_alone(
    machine: Machine, root: Client, daemon: Service, backups: list[str], tmp_path: Path
) -> None:
    mount = await root.mount(backups[0])
    argv = [sys.executable, "-m", "sendense_restored.daemon", "--config", str(tmp_path / "restored.toml")]
    environment = {**os.environ, **machine.bus.environment, "PYTHONPATH": str(CHECKOUT)}
    second = subprocess.run(argv, capture_output=True, check=False, env=environment, timeout=60)  # noqa: ASYNC221
    assert second.returncode == 1
    assert b"another one runs already" in second.stderr
    database = sqlite3.connect(daemon.database)
    assert database.execute("SELECT id FROM restore_mounts").fetchall() == [(mount,)]
    database.close()
    await root.unmount(mount)


# --- bad input ------------------------------------------------------------------------------------------------------


async def test_what_cannot_be_mounted_is_refused_with_its_reason_and_leaves_nothing(
    root: Client, daemon: Service, tmp_path_factory: pytest.TempPathFactory
) -> None:
    repository = tmp_path_factory.mktemp("bad")
    (repository / "vm").mkdir()
    images = {
        "shadow": ["-b", "/etc/shadow", "-F", "raw"],
        "nobody-there": ["-b", "missing.qcow2", "-F", "qcow2"],
        "self": ["-b", "self.qcow2", "-F", "qcow2"],
        "empty": [],
    }
    for name, backing in images.items():
        image = repository / f"vm/{name}.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", str(image), "4M"]
        subprocess.run(create, check=True)  # noqa: ASYNC221 - the test has nothing else to do
        if backing:
            subprocess.run(["qemu-img", "rebase", "-u", *backing, str(image)], check=True)  # noqa: ASYNC221
    (repository / "vm/text.qcow2").write_text("this is no image")
    identity = await root.add_repository("bad", str(repository))
    before = held_by(daemon)
    database = sqlite3.connect(daemon.database)

    async def added(name: str) -> str:
        database.execute(
            "INSERT INTO backup_jobs (id, vm_name, repository_id, backup_type, status, repository_path,"
            " total_bytes, bytes_transferred, created_at) VALUES (?, 'vm', ?, 'full', ?, '', 0, 0, '2026-01-01')",
            (name, identity, "running" if name == "running" else "completed"),
        )
        database.execute(
            "INSERT INTO backup_disks (backup_job_id, disk_index, qcow2_path, size_gb, status)"
            " VALUES (?, 0, ?, 1, 'completed')",
            (name, f"vm/{name}.qcow2"),
        )
        database.commit()
        return name

    for name, error in (
        ("shadow", errors.ImageRefused),
        ("nobody-there", errors.ImageRefused),
        ("self", errors.ImageRefused),
        ("text", errors.ImageRefused),
        ("not-there", errors.BackupNotFound),
        ("running", errors.BackupNotReady),
        ("empty", errors.NoMountableVolume),
    ):
        with pytest.raises(error) as refused:
            await root.mount(await added(name))
        assert str(repository) not in refused.value.message
        assert leftovers.added(before, held_by(daemon)) == [], name
    with pytest.raises(errors.BackupNotFound):
        await root.mount("no-such-backup")
    database.close()
    failed = [await root.mount_info(mount) for mount in await root.list_mounts()]
    assert [info.state for info in failed] == ["failed"] * 6  # to tell why, for a while; "running" was not begun
    assert all(info.error for info in failed)
    for info in failed:
        await root.unmount(info.id)


async def test_one_damaged_volume_does_not_keep_the_others_from_being_read(
    root: Client, chain: Chain, tmp_path_factory: pytest.TempPathFactory
) -> None:
    repository = tmp_path_factory.mktemp("damaged")
    (repository / "vm").mkdir()
    image = repository / "vm/damaged.qcow2"
    convert = ["qemu-img", "convert", "-O", "qcow2", str(chain.backups[0].image), str(image)]
    subprocess.run(convert, check=True)  # noqa: ASYNC221
    zero = f"write -z {1 << 20} 256k"  # the first partition's superblock
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", zero, str(image)], check=True, capture_output=True)  # noqa: ASYNC221
    await root.scan(await root.add_repository("damaged", str(repository)))
    mount = await root.mount((await root.list_backups())[0][0].backup_id)
    states = {volume.name: volume.state for volume in (await root.mount_info(mount)).volumes}
    assert states.pop("partition-1") == "empty"
    assert set(states.values()) == {"mounted"}
    with pytest.raises(errors.VolumeUnavailable, match="superblock"):
        await root.list_files(mount, "/partition-1")
    assert len((await root.list_files(mount, "/partition-2/etc"))[0]) == 3
    await root.unmount(mount)


async def test_the_limit_of_mounts_is_kept(machine: Machine, chain: Chain, tmp_path: Path) -> None:
    with service(machine.bus, tmp_path, "[mounts]\nmax = 2\n"):
        async with await Client.connect(machine.bus.address) as client:
            await client.scan(await client.add_repository("lab", str(chain.backups[0].image.parent.parent)))
            ids = [backup.backup_id async for backup in client.backups()]
            mounts = [await client.mount(backup) for backup in ids[:2]]
            with pytest.raises(errors.LimitReached):
                await client.mount(ids[2])
            assert await client.mount(ids[0]) == mounts[0]
            await client.unmount(mounts[1])
            mounts[1] = await client.mount(ids[2])
            for mount in mounts:
                await client.unmount(mount)
