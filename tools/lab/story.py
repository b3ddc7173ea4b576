"""What the demo shows, in the order in which it happens; see ``demo.py``.

Every step is checked: the first thing that is not as it should be ends the demo with a sentence and status 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sendense_restored import errors, names

from . import bus, guest, leftovers, namespace
from .people import GROUP, People, Person, people
from .service import BUS_NAME, service

_PYTHON = "/usr/bin/python3"
_LAB = Path("/run/demo")
_STATE = _LAB / "state"
_REPOSITORY = Path("/mnt/repository")
_PACKAGE = _LAB / "python"
_ROOT = Person("root", 0)
_NOT_AUTHORIZED = errors.NotAuthorized.exit_code
_NOT_FOUND = errors.PathNotFound.exit_code


class DemoError(Exception):
    """Something is not as it should be; the message says what."""


@dataclass(frozen=True)
class Stage:
    """What the steps work with."""

    chain: guest.Chain
    people: People
    bus: bus.PrivateBus
    daemon: int
    """The daemon's pid."""


def main() -> None:
    """Tell it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that everything is taken down
    namespace.enter()
    try:
        _tell()
    except (DemoError, subprocess.CalledProcessError, RuntimeError, TimeoutError) as error:
        print(f"\nFAILED: {error}", *getattr(error, "__notes__", []), sep="\n  ")
        if log := _log():
            print("\nThe daemon's log:", *log, sep="\n  ")
        sys.exit(1)


def _tell() -> None:
    _LAB.mkdir(mode=0o755)
    _STATE.mkdir(mode=0o700)
    (_LAB / "guest").mkdir()
    _REPOSITORY.mkdir()
    # The clone may lie where only root can go, so the unprivileged callers get a copy of the client.
    shutil.copytree(bus.CHECKOUT / "sendense_restored", _PACKAGE / "sendense_restored")
    shutil.copy(bus.CHECKOUT / "tools/lab/hashes.py", _PACKAGE)

    _step("A guest with ext4, xfs and btrfs runs, and is backed up three times while it runs")
    chain = guest.make_chain(_REPOSITORY, _LAB / "guest")
    for backup in chain.backups:
        count = sum(len(files) for files in backup.files.values())
        print(f"  {backup.image.name}: {backup.image.stat().st_blocks // 2048} MiB, {count} files in the guest")
    print("  Each was taken as if the power had gone: file systems mounted, journals dirty.")

    with contextlib.ExitStack() as stack:
        _step("A system bus, polkit and two users of its own")
        users = stack.enter_context(people(_LAB))
        system_bus = stack.enter_context(bus.private_bus(_LAB))
        stack.enter_context(bus.polkit(system_bus, _LAB))
        print(f"  {users.member.name} is in the group {GROUP}, {users.stranger.name} is not.")

        _step("The daemon starts, as root")
        daemon = stack.enter_context(service(system_bus, _STATE, '[attach]\nbackend = "fuse"\n', python=_PYTHON))
        print(f"  {BUS_NAME} is on the bus, process {daemon.pid}.")
        stage = Stage(chain, users, system_bus, daemon.pid)
        ids = _catalogue(stage)
        _refusal(stage, ids[-1])
        _restore(stage, ids)
        _all_files(stage, ids)
        _as_crashed(stage, ids[-1])

        _step("The daemon stops, and has nothing to complain of")
    if complaints := [line for line in _log() if line.startswith(("ERROR", "CRITICAL", "Traceback"))]:
        raise DemoError(f"its log has: {complaints[0]}")
    print(f"  {len(_log())} lines of log, no error among them")

    _step("The backups are what they were")
    if not chain.unchanged():
        raise DemoError("an image has other bytes than before")
    for backup in chain.backups:
        print(f"  {backup.sha256[:16]}…  {backup.image.name}")
    print("  Journals were replayed, into a throw-away layer: no byte in the repository has changed.")


# The steps.


def _catalogue(stage: Stage) -> list[str]:
    """Fill the catalogue; the ids of the backups, oldest first."""
    _step("Root tells the service where backups lie")
    repository = _json(stage, _ROOT, "catalog", "add-repository", "demo", str(_REPOSITORY))["repository_id"]
    found = _json(stage, _ROOT, "catalog", "scan", repository)
    print(f"  found {found['added']}")
    _show(stage, stage.people.member, "backups")
    backups = {backup["parent_backup_id"]: backup for backup in _json(stage, stage.people.member, "backups")}
    ids: list[str] = []
    while (below := ids[-1] if ids else "") in backups:
        ids.append(backups[below]["backup_id"])
    if len(ids) != len(stage.chain.backups):
        raise DemoError(f"the catalogue has a chain of {len(ids)} backups instead of {len(stage.chain.backups)}")
    return ids


def _refusal(stage: Stage, backup: str) -> None:
    _step("Who is not in the group gets nothing")
    for command in (("backups",), ("mount", backup)):
        refused = _run(stage, stage.people.stranger, *command)
        if refused.returncode != _NOT_AUTHORIZED:
            raise DemoError(f"{command[0]} ended with {refused.returncode}: {refused.stderr.decode()}")
        print(f"  {refused.stderr.decode().strip()}")


def _restore(stage: Stage, ids: list[str]) -> None:
    """The newest backup, as a person would go about it."""
    member = stage.people.member
    before = _of_the_daemon(stage)
    _step("A member of the group mounts the newest backup: three layers, three file systems")
    started = time.monotonic()
    mount = _json(stage, member, "mount", ids[-1])
    print(f"  mounted in {time.monotonic() - started:.2f} s, on {', '.join(mount['devices'])}")
    _show(stage, member, "volumes", mount["mount_id"])
    for volume in mount["volumes"]:
        if (volume["state"], volume["view"]) != ("mounted", "replayed"):
            raise DemoError(f"{volume['name']} is {volume['state']}, its view {volume['view']}: {volume['reason']}")

    _step("…and looks around in it")
    for directory in ("/partition-1/etc", "/partition-1/links"):
        _show(stage, member, "ls", "-l", mount["mount_id"], directory)
    for link in ("relative", "absolute"):
        path = f"/partition-1/links/{link}"
        if _cat(stage, member, mount["mount_id"], path) != b"web01\n":
            raise DemoError(f"{path} does not lead to the guest's /etc/hostname")
    outside = _run(stage, member, "cat", mount["mount_id"], "/partition-1/links/outside")
    if outside.returncode != _NOT_FOUND:
        raise DemoError(f"{outside.stderr.decode()}: a link of the guest led out of it")
    print(f"  links/outside, which climbs to /etc/passwd: {outside.stderr.decode().strip()}")

    _step("A file that only root could read in the guest, through a descriptor of it")
    secret = b"/etc/secret.key"
    _compare(stage, secret, _cat(stage, member, mount["mount_id"], _guest_path(secret)))
    print(f"  owner root, mode 0600, read by {member.name}: as it was written")

    _step("A name that is not UTF-8, and a file of 3 MiB, saved to this machine")
    home = _LAB / "home"
    home.mkdir()
    os.chown(home, member.uid, member.uid)
    for wanted, saved in ((b"/tmp/caf\xe9.txt", home / "café.txt"), (b"/srv/large.bin", home / "large.bin")):
        _show(stage, member, "get", mount["mount_id"], _guest_path(wanted), str(saved))
        _compare(stage, wanted, saved.read_bytes())
        if saved.stat().st_uid != member.uid:
            raise DemoError(f"{saved} does not belong to {member.name}")
    print("  SHA-256 is that of what the guest wrote")
    _unmount(stage, mount["mount_id"], before)


def _all_files(stage: Stage, ids: list[str]) -> None:
    _step("Every file of every backup, through its descriptor, against what the guest wrote")
    for backup_id, backup in zip(ids, stage.chain.backups, strict=True):
        before = _of_the_daemon(stage)
        mount = _json(stage, stage.people.member, "mount", backup_id)["mount_id"]
        started = time.monotonic()
        found = _hashes(stage, mount)
        wanted = {
            _guest_path(path, volume): [file.size, file.mode, file.sha256]
            for volume, files in backup.files.items()
            for path, file in files.items()
        }
        for path in sorted(found.keys() | wanted.keys()):
            if found.get(path) != wanted.get(path):
                shown = names.displayable(path)
                raise DemoError(f"{shown} is {found.get(path)} and should be {wanted.get(path)}")
        print(f"  {backup.image.name}: {len(found)} files are as written ({time.monotonic() - started:.1f} s)")
        _unmount(stage, mount, before)


def _as_crashed(stage: Stage, backup_id: str) -> None:
    """The same disk with its journals left alone."""
    _step("The same backup as it lay on the disk, journals not replayed")
    before = _of_the_daemon(stage)
    member, late = stage.people.member, stage.chain.backups[-1].journal_only
    mount = _json(stage, member, "mount", backup_id, "--journal", "as-crashed")["mount_id"]
    for index, partition in enumerate(stage.chain.partitions, start=1):
        path = _guest_path(late, f"partition-{index}")
        if _run(stage, member, "stat", mount, path).returncode != _NOT_FOUND:
            raise DemoError(f"{path} is in the journal only, and yet the service does not say that it is not there")
        print(f"  {partition.filesystem}: {path} was in the journal only, and is not there")
    _unmount(stage, mount, before)


def _unmount(stage: Stage, mount: str, before: leftovers.Census) -> None:
    """Give the mount back and look for what it left in the daemon's own namespace and among its children."""
    _json(stage, stage.people.member, "unmount", mount)
    if left := leftovers.left_in_time(before, lambda: _of_the_daemon(stage), stage.daemon):
        raise DemoError("the unmounted backup left behind " + ", ".join(left))
    print(f"  unmounted {mount}: no mount, no loop device, no process of it is left")


# What the steps are made of.


def _step(text: str) -> None:
    print(f"\n{text}", flush=True)


def _log() -> list[str]:
    """What the daemon has logged so far."""
    log = _STATE / "daemon.log"
    return log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []


def _of_the_daemon(stage: Stage) -> leftovers.Census:
    """What mounts cost: mounts in the daemon's namespace, its children, loop devices."""
    daemon = leftovers.mounts_of(stage.daemon) | leftovers.children_of(stage.daemon)
    return leftovers.of_the_machine() | daemon


def _python(stage: Stage, person: Person, *argv: str) -> subprocess.CompletedProcess[bytes]:
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "PYTHONPATH": str(_PACKAGE)}
    return subprocess.run(
        person.command(_PYTHON, *argv),
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        cwd="/",
        env=environment | stage.bus.environment,
    )


def _run(stage: Stage, person: Person, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """A command line as that person would type it; printed, and run."""
    print(f"  {person.name}$ {names.displayable(shlex.join(['sendense-restore', *arguments]))}", flush=True)
    return _python(stage, person, "-m", "sendense_restored.cli", *arguments)


def _successful(stage: Stage, person: Person, *arguments: str) -> bytes:
    done = _run(stage, person, *arguments)
    if done.returncode:
        raise DemoError(
            f"{arguments[0]} ended with {done.returncode}: {done.stderr.decode(errors='replace').strip()}"
        )
    return done.stdout


def _json(stage: Stage, person: Person, *arguments: str) -> Any:  # noqa: ANN401 - a document
    return json.loads(_successful(stage, person, *arguments, "--json"))


def _show(stage: Stage, person: Person, *arguments: str) -> None:
    for line in _successful(stage, person, *arguments).decode().split("\n")[:-1]:
        print(f"    {names.displayable(line)}")


def _cat(stage: Stage, person: Person, mount: str, path: str) -> bytes:
    return _successful(stage, person, "cat", mount, path)


def _hashes(stage: Stage, mount: str) -> dict[str, list[Any]]:
    done = _python(stage, stage.people.member, str(_PACKAGE / "hashes.py"), mount)
    if done.returncode:
        raise DemoError(f"reading all files failed: {done.stderr.decode(errors='replace')}")
    found: dict[str, list[Any]] = json.loads(done.stdout)
    return found


def _compare(stage: Stage, path: bytes, content: bytes) -> None:
    """Check what was restored of the newest backup's first partition."""
    written = stage.chain.backups[-1].files["partition-1"][path]
    if hashlib.sha256(content).hexdigest() != written.sha256:
        raise DemoError(f"{_guest_path(path)} is not what the guest wrote")


def _guest_path(path: bytes, volume: str = "partition-1") -> str:
    return names.format_path((volume.encode(), *path.split(b"/")[1:]))


if __name__ == "__main__":
    main()
