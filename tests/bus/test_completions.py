"""The completions, driven by real shells: somebody types, presses Tab and Enter, and the service hears of it.

bash is always there; zsh and fish are tried where they are installed.
"""

from __future__ import annotations

import asyncio
import os
import pty
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sendense_restored import errors
from tests.bus.fake import MOUNT_ID, Answer, FakeService, entry, object_of, only_properties, variants
from tests.bus.peer import MessageFlag

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from tests.bus.peer import Message

    Typist = Callable[[str], Coroutine[Any, Any, str]]

ROOT = Path(__file__).parents[2]
LISTING = "a(sstuxsa{sv})s"
NAME = "note $x; `a`: b@c='d' \"e\" \\f.txt"
HOSTILE = ["\x1b]0;owned\x07not", "not\nowned", "\x9b2Jnot"]
GUEST = {
    "/": [entry("partition-1", "volume"), entry("disk-2", "volume")],
    "/partition-1": [entry("My Docs", "directory"), entry("Other", "directory"), *map(entry, HOSTILE)],
    "/partition-1/My Docs": [entry(NAME), entry("photo.jpg"), *map(entry, HOSTILE)],
    "/disk-2": [entry("caf\uefe9 é.txt")],
}
SHELLS = {
    "bash": ["--noprofile", "--rcfile", "{home}/rc", "-i"],
    "zsh": ["-d", "-i"],
    "fish": ["--no-config", "--interactive", "--init-command", "source {root}/completions/sendense-restore.fish"],
}


@pytest.fixture
def service(service: FakeService) -> FakeService:
    """One that has mounts, backups and guest files."""

    def files(message: Message) -> object:
        found = GUEST.get(message.body[0])
        return errors.PathNotFound("no such directory") if found is None else Answer(LISTING, found, "")

    service.answers |= {
        "GetAll": only_properties,
        "ListMounts": Answer("ao", [object_of(MOUNT_ID), object_of("aaaa" + MOUNT_ID[4:])]),
        "ListBackups": Answer("aa{sv}s", [variants(backup_id="backup-1"), variants(backup_id="nightly-7")], ""),
        "ListRepositories": Answer("aa{sv}", [variants(repository_id="repo-1", name="nas")]),
        "ListFiles": files,
        "GetFileInfo": Answer("a{sv}", variants(kind="file")),
        "Mount": Answer("o", object_of(MOUNT_ID)),
        "Scan": Answer("a{sv}", {}),
        "OpenListing": service.stream({"summary": {"entries": 0, "errors": 0, "truncated": False}}),
    }
    return service


# What zsh makes of keys that arrive while it works depends on the load of the machine, and fish is slow to start: so
# only bash is asked each time.
@pytest.fixture(params=["bash", *(pytest.param(name, marks=pytest.mark.long) for name in ("zsh", "fish"))])
def shell(request: pytest.FixtureRequest, bus_address: str, tmp_path: Path) -> Typist:
    """Types a line into an interactive shell and leaves it; gives what the terminal showed."""
    name: str = request.param
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed")
    command = tmp_path / "bin/sendense-restore"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m sendense_restored.cli "$@"\n')
    command.chmod(0o755)
    (tmp_path / "rc").write_text(f"PS1='$ '\nsource {ROOT}/completions/sendense-restore.bash\n")
    (tmp_path / ".zshrc").write_text(
        f"PS1='$ '\nfpath=({ROOT}/completions $fpath)\nautoload -Uz compinit\ncompinit -u -d {tmp_path}/dump\n"
        # Its own guard against pasted text, which we look like.
        "zstyle ':completion:*' insert-tab false\n"
    )
    environment = {
        **{key: value for key, value in os.environ.items() if key.startswith(("LANG", "LC_"))},
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "ZDOTDIR": str(tmp_path),
        "TERM": "xterm",
        "LC_ALL": "C.UTF-8",
        "DBUS_SYSTEM_BUS_ADDRESS": bus_address,
        "HISTFILE": "",
    }
    arguments = [each.format(home=tmp_path, root=ROOT) for each in SHELLS[name]]

    async def types(line: str) -> str:
        ours, theirs = pty.openpty()
        # Shells want a terminal of their own, and are its session's leader.
        process = await asyncio.create_subprocess_exec(
            *("setsid", "--ctty", program),
            *arguments,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            cwd=tmp_path,
        )
        os.close(theirs)
        os.write(ours, f"{line}\rexit\r".encode())
        shown = asyncio.create_task(asyncio.to_thread(_all, ours))
        try:
            async with asyncio.timeout(120):
                await process.wait()
                return await shown
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            await shown
            os.close(ours)

    return types


def _all(terminal: int) -> str:
    parts = []
    try:
        while part := os.read(terminal, 65536):
            parts.append(part)
    except OSError:  # EIO: the last program has closed it
        pass
    return b"".join(parts).decode(errors="replace")


def called(service: FakeService, member: str) -> list[Any]:
    return service.called_with(member) if any(call.member == member for call in service.calls) else []


async def test_commands_and_mounts(service: FakeService, shell: Typist) -> None:
    shown = await shell("sendense-restore vol\t3f2b\t")
    assert "partition-2" in shown
    assert service.calls[-1].path == object_of(MOUNT_ID)
    # A whole id is not looked up; so the only one who did was the completion.
    assert [bool(call.flags) for call in service.calls if call.member == "ListMounts"] == [False]


async def test_guest_paths_of_every_kind_of_name(service: FakeService, shell: Typist) -> None:
    shown = await shell("sendense-restore stat 3f2b\t/par\tMy\tnote\t")
    assert called(service, "GetFileInfo")[:1] == [f"/partition-1/My Docs/{NAME}"], shown
    assert "\x9b2J" not in shown
    assert "\x1b]0;owned" not in shown


async def test_guest_names_that_are_not_ascii(service: FakeService, shell: Typist) -> None:
    shown = await shell(f"sendense-restore stat {MOUNT_ID} /d\tc\t")
    assert called(service, "GetFileInfo")[:1] == ["/disk-2/caf\uefe9 é.txt"], shown


@pytest.mark.parametrize("typed", ['"/partition-1/My D\tphoto\t', "'/partition-1/My D\tphoto\t"])
async def test_guest_paths_in_quotes(service: FakeService, shell: Typist, typed: str) -> None:
    shown = await shell(f"sendense-restore stat {MOUNT_ID} {typed}")
    assert called(service, "GetFileInfo")[:1] == ["/partition-1/My Docs/photo.jpg"], shown


async def test_options_and_their_choices(service: FakeService, shell: Typist) -> None:
    shown = await shell("sendense-restore mount --jou\tas\tnight\t")
    assert called(service, "Mount") == ["nightly-7", {"journal": "as-crashed"}], shown


async def test_a_choice_after_an_equals_sign(service: FakeService, shell: Typist) -> None:
    shown = await shell("sendense-restore mount nightly-7 --journal=as\t")
    assert called(service, "Mount") == ["nightly-7", {"journal": "as-crashed"}], shown


async def test_a_value_of_an_option_is_no_argument(service: FakeService, shell: Typist) -> None:
    shown = await shell(f"sendense-restore find --limit 5 {MOUNT_ID} --name x /par\t")
    assert called(service, "OpenListing")[:1] in (["/partition-1/"], ["/partition-1"]), shown


async def test_commands_of_commands(service: FakeService, shell: Typist) -> None:
    shown = await shell("sendense-restore catalog sc\trepo\t")
    assert called(service, "Scan")[:1] == ["repo-1"], shown


async def test_without_the_service_tab_is_silent(service: FakeService, shell: Typist) -> None:
    service.answers["ListFiles"] = errors.Expired("it was idle")
    service.answers["ListMounts"] = errors.NotAuthorized("no")
    shown = await shell(f"sendense-restore stat 3f\t{MOUNT_ID[2:]} /par\tx")
    assert called(service, "GetFileInfo")[:1] == ["/parx"], shown
    assert "sendense-restore: " not in shown


async def test_tab_never_asks_for_a_password(service: FakeService, shell: Typist) -> None:
    await shell("sendense-restore stat 3f2b\t/par\tMy\tphoto\t")
    asked = [call for call in service.calls if call.member in {"ListMounts", "ListFiles", "GetAll"}]
    assert len(asked) > 3
    assert not any(call.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION for call in asked)
