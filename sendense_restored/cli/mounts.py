"""Commands about backups and mounts."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Optional

import typer

from sendense_restored import errors

from . import output, values
from .frame import JSON, MOUNT, MOUNT_HELP, ON_BEHALF_OF, at_most, call, find_mount, flag, required

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from sendense_restored.client import Client, MountInfo, Volume


_DISK = typer.Option(
    None, "--disk", min=0, max=2**32 - 1, metavar="N", show_default=False, help="The disk's index; 0 if not given."
)


class Journal(StrEnum):
    """How a file system is shown that was not unmounted cleanly."""

    REPLAY = "replay"
    AS_CRASHED = "as-crashed"


_IDLE_TIMEOUT = typer.Option(
    "",
    "--idle-timeout",
    metavar="DURATION",
    show_default=False,
    help="How long you keep it without using it, such as 30min or 2h.",
)
_JOURNAL = typer.Option(Journal.REPLAY, "--journal", help="Replay journals, or show what was on disk.")


def backups(
    *,
    vm: str = typer.Option("", "--vm", metavar="NAME", help="Only backups of this virtual machine."),
    status: str = typer.Option("", "--status", metavar="STATUS", help="Only backups in this state."),
    repository: str = typer.Option("", "--repository", metavar="REPOSITORY", help="Only backups in this repository."),
    limit: int = typer.Option(100, "--limit", min=0, max=2**31, metavar="N", help="At most N of them; 0 for all."),
    as_json: bool = JSON,
) -> None:
    """List the backups of the catalogue, newest first."""

    async def work(client: Client) -> None:
        found = at_most(
            limit, client.backups(vm_name=vm, status=status, repository_id=repository, page=min(limit, 1000))
        )
        if as_json:
            await output.listing(found, output.backup_json)
            return
        output.table(
            ("BACKUP", "VM", "CREATED", "TYPE", "STATUS", "DISKS", "SIZE"),
            [
                (
                    backup.backup_id,
                    backup.vm_name,
                    output.local_time(backup.created_at),
                    backup.backup_type,
                    backup.status,
                    str(len(backup.disks)),
                    output.size(sum(disk.size for disk in backup.disks)),
                )
                async for backup in found
            ],
            right=(5, 6),
        )

    call(work)


def mount(
    *,
    backup: str = required(metavar="BACKUP", help="The backup's id, as 'backups' shows it."),
    disk: Optional[int] = _DISK,  # noqa: UP045 - typer 0.7 does not know int | None
    all_disks: bool = flag("--all-disks", text="Mount all disks of the backup together."),
    journal: Journal = _JOURNAL,
    idle_timeout: str = _IDLE_TIMEOUT,
    wait: bool = flag("--wait", text="Where there is no room, wait for it instead of giving up."),
    on_behalf_of: str = ON_BEHALF_OF,
    as_json: bool = JSON,
) -> None:
    """Mount a backup read-only, or join those who have it mounted; prints the mount's id."""
    if all_disks and disk is not None:
        raise errors.InvalidOption("--disk and --all-disks exclude each other; give one of them")
    seconds = values.seconds("--idle-timeout", idle_timeout) if idle_timeout else 0

    async def work(client: Client) -> MountInfo:
        mount_id = await client.mount(
            backup,
            disk_index=disk or 0,
            all_disks=all_disks,
            journal=journal.value,
            idle_timeout=seconds,
            wait=wait,
            on_behalf_of=on_behalf_of,
        )
        return await client.mount_info(mount_id)

    info = call(work)
    if as_json:
        output.document(output.mount_json(info))
        return
    output.line(info.id)
    if sys.stdout.isatty():
        _print_volumes(info.volumes)


def mounts(*, as_json: bool = JSON) -> None:
    """List your mounts. Root, and whoever may read those of others, sees all of them."""

    async def existing(client: Client) -> AsyncIterator[MountInfo]:
        for mount_id in await client.list_mounts():
            try:
                yield await client.mount_info(mount_id)
            except (errors.MountNotFound, errors.Expired):
                continue  # it ended since it was listed

    async def work(client: Client) -> None:
        if as_json:
            await output.listing(existing(client), output.mount_json)
            return
        rows = [
            (
                info.id,
                info.backup_id,
                info.vm_name,
                f"{info.state}: {info.error}" if info.error else info.state,
                str(sum(volume.state == "mounted" for volume in info.volumes)),
                output.local_time(info.last_accessed_at),
                output.local_time(info.expires_at),
                "yes" if info.busy else "no",
            )
            async for info in existing(client)
        ]
        output.table(("MOUNT", "BACKUP", "VM", "STATE", "VOLUMES", "LAST USED", "EXPIRES", "BUSY"), rows, right=(4,))

    call(work)


def volumes(*, mount: str = MOUNT, as_json: bool = JSON) -> None:
    """List a mount's volumes, and why those that are not open are not."""

    async def work(client: Client) -> MountInfo:
        return await client.mount_info(await find_mount(client, mount))

    info = call(work)
    if as_json:
        output.document([output.volume_json(volume) for volume in info.volumes])
    else:
        _print_volumes(info.volumes)


def _print_volumes(found: Iterable[Volume]) -> None:
    output.table(
        ("VOLUME", "STATE", "FILESYSTEM", "LABEL", "SIZE", "USED", "VIEW"),
        [
            (
                volume.name,
                volume.state,
                volume.filesystem,
                volume.label,
                output.size(volume.size),
                output.size(volume.used) if volume.state == "mounted" else "",
                volume.view,
            )
            for volume in found
        ],
        right=(4, 5),
    )
    for volume in found:
        if volume.reason:
            output.line(f"{volume.name}: {volume.reason}")


def unmount(
    *,
    mount: str = typer.Argument("", metavar="[MOUNT]", show_default=False, help=MOUNT_HELP),
    force: bool = flag("--force", text="Close it for everybody, also while files of it are read."),
    expired: bool = flag("--expired", text="Instead of one: end all whose time is up or whose backup is gone."),
    on_behalf_of: str = ON_BEHALF_OF,
    as_json: bool = JSON,
) -> None:
    """Give a mount back; it is closed when nobody else holds it."""
    if bool(mount) == expired:
        raise errors.InvalidOption(
            "give either a mount's id or --expired; 'sendense-restore mounts' lists the mounts"
        )
    if expired:
        if force or on_behalf_of:
            raise errors.InvalidOption("--expired goes with neither --force nor --on-behalf-of; leave them out")
        _end_expired(as_json=as_json)
        return

    async def work(client: Client) -> str:
        mount_id = await find_mount(client, mount)
        await client.unmount(mount_id, force=force, on_behalf_of=on_behalf_of)
        return mount_id

    mount_id = call(work)
    if as_json:
        output.document({"mount_id": mount_id})
    else:
        output.line(f"closed {mount_id}" if force else f"gave back {mount_id}")


def _end_expired(*, as_json: bool) -> None:
    async def work(client: Client) -> int:
        return await client.cleanup_now()

    ended = call(work)
    if as_json:
        output.document({"ended": ended})
    else:
        output.line(f"ended {ended} mounts")
