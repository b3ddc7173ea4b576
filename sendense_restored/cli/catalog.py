"""Commands about the embedded catalogue, for hosts without an appliance's own."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from . import output
from .frame import JSON, call, host_path, required

if TYPE_CHECKING:
    from sendense_restored.client import Client, Scanned

app = typer.Typer(help="Fill the embedded catalogue of backups.", no_args_is_help=True)

_REPOSITORY = required(metavar="REPOSITORY", help="The repository's id, as 'add-repository' printed it.")
_IMAGES = required(metavar="IMAGE...", help="The topmost image of each disk, in order, relative to the repository.")


@app.command("add-repository")
def add_repository(
    *,
    name: str = required(metavar="NAME", help="What to call it."),
    path: str = required(metavar="PATH", help="The directory of the images."),
    as_json: bool = JSON,
) -> None:
    """Add a directory of images; prints the repository's id. 'catalog scan' then finds the backups in it."""
    directory = host_path(path)

    async def work(client: Client) -> str:
        return await client.add_repository(name, directory)

    repository_id = call(work)
    if as_json:
        output.document({"repository_id": repository_id})
    else:
        output.line(repository_id)


@app.command()
def scan(*, repository: str = _REPOSITORY, as_json: bool = JSON) -> None:
    """Look for new backups in a repository."""

    async def work(client: Client) -> Scanned:
        return await client.scan(repository)

    result = call(work)
    if as_json:
        output.document(asdict(result))
        return
    for what in ("added", "updated", "gone", "kept"):
        for backup_id in getattr(result, what):
            output.line(f"{what} {backup_id}")
    for image in result.skipped:
        output.line(f"skipped {image.path}: {image.reason}")
    output.line(f"{result.unchanged} unchanged")


@app.command()
def add(
    *,
    repository: str = _REPOSITORY,
    vm: str = required(metavar="VM", help="The virtual machine's name."),
    images: list[str] = _IMAGES,
    parent: str = typer.Option("", "--parent", metavar="BACKUP", help="The backup that it builds on."),
    as_json: bool = JSON,
) -> None:
    """Add a backup by hand; prints its id."""

    async def work(client: Client) -> str:
        given = {"repository_id": repository, "vm_name": vm, "parent_backup_id": parent}
        return await client.add_backup(
            {"disks": ("as", list(images))} | {name: ("s", text) for name, text in given.items() if text}
        )

    backup_id = call(work)
    if as_json:
        output.document({"backup_id": backup_id})
    else:
        output.line(backup_id)


@app.command("remove-repository")
def remove_repository(*, repository: str = _REPOSITORY, as_json: bool = JSON) -> None:
    """Forget a repository and its backups; no image is touched."""

    async def work(client: Client) -> None:
        await client.remove_repository(repository)

    call(work)
    if as_json:
        output.document({"repository_id": repository})
    else:
        output.line(f"removed {repository}")


@app.command("remove-backup")
def remove_backup(
    *,
    backup: str = required(metavar="BACKUP", help="The backup's id."),
    as_json: bool = JSON,
) -> None:
    """Forget a backup; no image is touched."""

    async def work(client: Client) -> None:
        await client.remove_backup(backup)

    call(work)
    if as_json:
        output.document({"backup_id": backup})
    else:
        output.line(f"removed {backup}")
