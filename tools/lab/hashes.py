"""Reads every file of a mount through its descriptor, as any client may: ``python3 hashes.py MOUNT``.

Prints a JSON object, path -> [size, permission bits, SHA-256], for all regular files of all open volumes. It needs
nothing but the client library and runs as an unprivileged user.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys

from sendense_restored.client import Client


async def hashes(mount: str) -> dict[str, tuple[int, int, str]]:
    """Walk the whole mount."""
    found = {}
    async with await Client.connect() as client:
        directories = [f"/{volume.name}" for volume in (await client.mount_info(mount)).volumes]
        while directories:
            directory = directories.pop()
            async for entry in client.files(mount, directory):
                path = f"{directory}/{entry.name}"
                if entry.kind == "directory":
                    directories.append(path)
                elif entry.kind == "file":
                    descriptor, info = await client.open_file(mount, path)
                    with os.fdopen(descriptor, "rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                    found[path] = (info.size, info.mode, digest)
    return found


if __name__ == "__main__":
    json.dump(asyncio.run(hashes(sys.argv[1])), sys.stdout)
