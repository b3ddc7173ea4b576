"""Commands about the catalogue; those that change it are about the embedded one, for hosts without an appliance."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from . import output
from .frame import JSON, call, host_path, required

if TYPE_CHECKING:
    from sendense_restored.client import Client, Repository, Scanned

app = typer.Typer(help="Show the catalogue of backups, and fill the embedded one.", no_args_is_help=True)

_REPOSITORY = required(metavar="REPOSITORY", help="The repository's id, as 'add-repository' printed it.")
_IMAGES = required(metavar="IMAGE...", help="The topmost image of each disk, in order, relative to the repository.")


@app.command()
def vms(*, as_json: bool = JSON) -> None:
    """List the virtual machines that have backups."""

    async def work(client: Client) -> None:
        if as_json:
            await output.listing(client.vms(), output.vm_json)
            return
        rows = [
            (vm.vm_name, vm.context_id, str(vm.backups), output.local_time(vm.newest), vm.repository_id)
            async for vm in client.vms()
        ]
        output.table(("VM", "CONTEXT", "BACKUPS", "NEWEST", "REPOSITORY"), rows, right=(2,))

    call(work)


@app.command()
def repositories(*, as_json: bool = JSON) -> None:
    """List the repositories of backups."""

    async def work(client: Client) -> list[Repository]:
        return await client.list_repositories()

    found = call(work)
    if as_json:
        output.document([asdict(repository) for repository in found])
        return
    rows = [
        (
            repository.repository_id,
            repository.name,
            repository.type,
            repository.path,
            "yes" if repository.enabled else "no",
            "yes" if repository.immutable else "no",
        )
        for repository in found
    ]
    output.table(("REPOSITORY", "NAME", "TYPE", "PATH", "ENABLED", "IMMUTABLE"), rows)


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
