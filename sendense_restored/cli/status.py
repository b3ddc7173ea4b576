"""The commands ``status`` and ``events``: what the service has, does and did."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from . import output
from .frame import JSON, at_most, call, find_mount, flag

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sendense_restored.client import Client, Event, HeldFile, Resources


def status(
    *,
    in_use: bool = flag("--in-use", text="List the image files that are held open instead."),
    as_json: bool = JSON,
) -> None:
    """Show what the service uses and has left."""
    if in_use:
        _show_held(as_json=as_json)
        return

    async def work(client: Client) -> Resources:
        return await client.resources()

    found = call(work)
    if as_json:
        output.document(asdict(found) | {"next_sweep": output.rfc3339(found.next_sweep)})
        return
    lines = {
        "mounts": f"{found.active_mounts} of {found.max_mounts}, {found.available_slots} free",
        "expired": f"{found.expired_mounts}, whose time is up and which somebody still reads",
        "queue": f"{found.queued} waiting for room",
        "overlays": f"{output.size(found.overlay_used)} of {output.size(found.overlay_limit)}",
        "memory": output.size(found.memory),
        "open files": str(found.open_fds),
        "idle timeout": output.duration(found.idle_timeout),
        "next sweep": f"{output.local_time(found.next_sweep)}, every {output.duration(found.sweep_interval)}",
        "backend": found.backend,
    }
    for name, text in lines.items():
        output.line(f"{name + ':':<14}{text}")
    if found.devices:
        output.line()
        output.table(("DEVICE", "STATE", "MOUNT"), [(each.path, each.state, each.mount) for each in found.devices])


def _show_held(*, as_json: bool) -> None:
    async def work(client: Client) -> list[HeldFile]:
        return await client.in_use()

    found = call(work)
    if as_json:
        output.document([asdict(file) for file in found])
    else:
        output.table(("REPOSITORY", "FILE", "MOUNT"), [(file.repository, file.file, file.mount) for file in found])


def events(
    *,
    mount: str = typer.Option(
        "", "--mount", metavar="MOUNT", show_default=False, help="Only what concerns this mount."
    ),
    limit: int = typer.Option(100, "--limit", min=0, max=2**31, metavar="N", help="At most N of them; 0 for all."),
    as_json: bool = JSON,
) -> None:
    """Show what has happened, newest first: who asked for what, and how it ended."""

    async def work(client: Client) -> None:
        about = await find_mount(client, mount) if mount else ""
        found: AsyncIterator[Event] = at_most(limit, client.events(mount=about, page=min(limit, 1000)))
        if as_json:
            await output.listing(found, output.event_json)
            return
        rows = [
            (
                output.local_time(event.at // 10**6, form="%Y-%m-%d %H:%M:%S"),
                event.what,
                event.outcome,
                _who(event),
                event.mount_id or event.backup_id,
                event.path,
                _moved(event),
                event.detail,
            )
            async for event in found
        ]
        output.table(("WHEN", "WHAT", "OUTCOME", "WHO", "ABOUT", "PATH", "SIZE", "DETAIL"), rows, right=(6,))

    call(work)


def _moved(event: Event) -> str:
    count = event.size if event.bytes is None else event.bytes
    return "" if count is None else output.size(count)


def _who(event: Event) -> str:
    who = "" if event.uid is None else f"uid {event.uid}"
    if event.unit:
        who += f" ({event.unit})"
    if event.on_behalf_of:
        who += f" for {event.on_behalf_of}"
    return who.strip()
