"""The socket of an image server that speaks NBD: it has no name, so that nobody but its own client can reach it.

The protocol is that of doc/proto.md in the NBD project ("fixed newstyle"); numbers are big-endian.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct

_HELLO = 18  # bytes: two magic numbers and flags
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_EXPORT_NAME = 1
_EXPORT = 10  # bytes: its size and what may be done with it, of no interest here


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
            listening.listen(2)  # the daemon's connection and the client's
        except BaseException:
            os.close(door)
            raise
    except BaseException:
        listening.close()
        raise
    return listening, door


async def connect(door: int, export: str) -> socket.socket | None:
    """A connection that asks for nothing; None if the server closes it, which means that it ended.

    QEMU greets when it has opened everything, and ends when the last of its connections does that has gone through
    the handshake. That takes ten seconds at most, or it is dropped (QEMU 9.1).
    """
    loop = asyncio.get_running_loop()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await loop.sock_connect(connection, f"/proc/self/fd/{door}")
        await _receive(connection, _HELLO)
        name = export.encode()
        option = struct.pack(">I8sII", _FIXED_NEWSTYLE | _NO_ZEROES, b"IHAVEOPT", _OPT_EXPORT_NAME, len(name))
        await loop.sock_sendall(connection, option + name)
        await _receive(connection, _EXPORT)
    except ConnectionError:
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


async def _receive(connection: socket.socket, size: int) -> bytes:
    """Exactly so many bytes. Raises ConnectionError if there are fewer."""
    received = b""
    while len(received) < size:
        chunk = await asyncio.get_running_loop().sock_recv(connection, size - len(received))
        if not chunk:
            raise ConnectionResetError
        received += chunk
    return received
