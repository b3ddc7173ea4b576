"""Commands about guest files."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from sendense_restored import errors, names

from . import download, output
from .frame import GUEST_PATH, JSON, LONG, MOUNT, NUL, as_text, call, find_mount, flag, guest_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sendense_restored.client import Client, Entry, FileInfo


STREAM = typer.Option(
    None,
    "--stream",
    metavar="NAME",
    show_default=False,
    help="That alternate stream of the file or directory (NTFS), such as Zone.Identifier; 'stat' shows those it has.",
)


def ls(
    *,
    mount: str = MOUNT,
    path: str = typer.Argument("/", metavar="[PATH]", help="A directory of the guest; / has the volumes."),
    long: bool = LONG,
    mark: bool = flag("-p", "--mark", text="Append a / to directories."),
    null: bool = NUL,
    as_json: bool = JSON,
) -> None:
    """List a guest directory."""
    path = guest_path(path)

    async def work(client: Client) -> None:
        found = client.files(await find_mount(client, mount), path)
        if as_json:
            await output.listing(found, lambda entry: output.entry_json(entry, path))
            return
        async for entry in found:
            slash = "/" if mark and output.is_directory(entry.kind) else ""
            output.line(_long(entry, slash) if long else entry.name + slash, end="\0" if null else "\n")

    call(work)


def _long(entry: Entry, slash: str) -> str:
    # What a service of another version puts here need not be text.
    notes = [str(entry.extras.get(key, "")) for key in ("display_name", "unreadable")]
    return output.long_line(
        entry.kind, entry.mode, entry.size, entry.mtime_ns, entry.name + slash, entry.target, *notes
    )


def stat(*, mount: str = MOUNT, path: str = GUEST_PATH, as_json: bool = JSON) -> None:
    """Show what is known of one guest file."""
    path = guest_path(path)

    async def work(client: Client) -> FileInfo:
        return await client.file_info(await find_mount(client, mount), path)

    info = call(work)
    if as_json:
        output.document(output.info_json(info, path))
        return
    lines = {
        "path": path + (f" -> {info.target}" if info.kind == "symlink" else ""),
        "kind": info.kind,
        "size": f"{info.size} ({output.size(info.size)}, {output.size(info.allocated)} on disk)",
        "mode": f"{info.mode:04o} ({output.mode(info.kind, info.mode)})",
        "owner": f"uid {info.uid}, gid {info.gid}",
        "links": str(info.nlink),
        "modified": output.local_time(info.mtime_ns // 10**9),
        "changed": output.local_time(info.ctime_ns // 10**9),
        "accessed": output.local_time(info.atime_ns // 10**9),
        "xattrs": " ".join(info.xattrs),
        "unreadable": info.unreadable,
    }
    for name, text in lines.items():
        if text:
            output.line(f"{name + ':':<12}{text}")
    for stream in info.streams:  # a line for each, as their names may have blanks
        output.line(f"{'stream:':<12}{stream}")


def cat(
    *,
    mount: str = MOUNT,
    path: str = GUEST_PATH,
    stream: Optional[str] = STREAM,  # noqa: UP045 - typer 0.7 does not know str | None
    as_json: bool = JSON,  # noqa: ARG001 - errors only
) -> None:
    """Write a guest file to standard output, byte for byte."""
    with _opened(mount, guest_path(path), stream) as (source, _):
        sys.stdout.flush()
        download.write_out(source, sys.stdout.fileno())


def get(
    *,
    mount: str = MOUNT,
    path: str = GUEST_PATH,
    destination: str = typer.Argument(".", metavar="[DEST]", help="A new file, or a directory to put it in."),
    stream: Optional[str] = STREAM,  # noqa: UP045 - as above
    force: bool = flag("--force", text="Replace the file that is there."),
    as_json: bool = JSON,
) -> None:
    """Restore a guest file to this host.

    The new file is yours and has the guest's permissions (less your umask and set-id), modification time and holes.
    """
    path = guest_path(path)
    target = _target(path, destination, stream)
    told = names.to_text(os.fsencode(target))  # like a guest name: it may hold one that is not UTF-8
    if not force and os.path.lexists(target):  # before the file is transferred; `save` makes sure again
        raise errors.InvalidOption(f"{told} exists; give --force to replace it")
    with _opened(mount, path, stream) as (source, info):
        try:
            with _progress(told, info.size, hidden=as_json) as copied:
                download.save(
                    source,
                    target,
                    size=info.size,
                    mode=info.mode,
                    mtime_ns=info.mtime_ns,
                    force=force,
                    copied=copied,
                )
        except FileExistsError:
            raise errors.InvalidOption(f"{told} exists; give --force to replace it") from None
        except OSError as error:
            raise errors.Failed(f"{told} cannot be written: {error.strerror}") from None
    if as_json:
        output.document({"path": path, "destination": told, "size": info.size})
    else:
        output.line(f"saved {told} ({output.size(info.size)})")


def _target(path: str, destination: str, stream: str | None) -> Path:
    components = names.parse_path(path)
    if len(components) < (2 if stream is None else 1):
        raise errors.NotAFile("this is a volume, not a file; give the path of a file in it")
    name = components[-1]
    if stream is not None:
        name += b":" + names.parse_stream(as_text(stream))  # as Windows writes it
    target = Path(destination)
    if target.is_dir():
        return target / os.fsdecode(name)
    if destination.endswith("/") or not target.parent.is_dir():
        raise errors.InvalidOption(f"there is no directory for {destination}; make it first")
    return target


@contextmanager
def _opened(mount: str, path: str, stream: str | None) -> Iterator[tuple[int, FileInfo]]:
    """A guest file's descriptor; it alone keeps the mount, the connection is not needed while bytes flow."""

    async def work(client: Client) -> tuple[int, FileInfo]:
        name = None if stream is None else as_text(stream)
        return await client.open_file(await find_mount(client, mount), path, stream=name)

    source, info = call(work)
    try:
        yield source, info
    finally:
        os.close(source)


@contextmanager
def _progress(name: str, size: int, *, hidden: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal and somebody wants to look at it."""
    if hidden or not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(names.displayable(name), total=size)
        yield lambda done: progress.update(task, completed=done)
