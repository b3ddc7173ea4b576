"""The socket of an image server that speaks NBD: it has no name, so that nobody but its own client can reach it."""

from __future__ import annotations

import asyncio
import os
import socket

_GREETING = b"NBDMAGICIHAVEOPT"  # docs/interop/nbd, doc/proto.md of NBD: newstyle


def listen(directory: int, name: str) -> tuple[socket.socket, int]:
    """A listening socket without a name, and the descriptor (O_PATH) that one connects through who has it."""
    path = f"/proc/self/fd/{directory}/{name}"  # short, wherever the directory lies: sun_path has 108 bytes
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(path)
        door = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.unlink(path)  # noqa: PTH108 - as the line that opened it
            # Whoever has the descriptor may connect, whatever the uid: the daemon itself does, and root that may not
            # override permissions (the unit's capabilities) is one user among others.
            os.chmod(f"/proc/self/fd/{door}", 0o666)  # noqa: PTH101, S103
            listening.listen(2)
        except BaseException:
            os.close(door)
            raise
    except BaseException:
        listening.close()
        raise
    return listening, door


async def greets(door: int) -> bool:
    """Whether QEMU greets, which it does when it has opened everything; False if it has ended instead."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connection:
        try:
            await loop.sock_connect(connection, f"/proc/self/fd/{door}")
            received = b""
            while len(received) < len(_GREETING):
                chunk = await loop.sock_recv(connection, len(_GREETING) - len(received))
                if not chunk:
                    return False
                received += chunk
        except ConnectionError:
            return False
    return received == _GREETING
