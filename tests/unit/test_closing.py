"""Descriptors of strangers are closed without waiting for whoever they lead to."""

from __future__ import annotations

import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

from sendense_restored.wire import closing
from sendense_restored.wire.closing import close_foreign, settle

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_pipes_are_closed_at_once() -> None:
    pipe = os.pipe()
    close_foreign(pipe)
    assert not any(map(is_open, pipe))


def test_everything_else_is_closed_by_threads(tmp_path: Path) -> None:
    files = [os.open(tmp_path, os.O_RDONLY) for _ in range(100)]
    close_foreign(files)
    settle()
    assert not any(map(is_open, files))


def test_a_socket_that_lingers_holds_up_nobody() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    ours = socket.create_connection(listening.getsockname())
    theirs, _ = listening.accept()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
    ours.setblocking(False)
    try:
        while True:
            ours.send(bytes(1 << 20))
    except BlockingIOError:
        pass
    ours.setblocking(True)
    close_foreign([ours.detach()])  # its close waits until all is taken, or ten minutes
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()  # resets the connection, which ends the waiting
    listening.close()
    settle()


def test_when_all_threads_hang_what_comes_stays_open(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    gate = threading.Event()
    close = os.close

    def hang(descriptor: int) -> None:
        gate.wait(60)
        close(descriptor)

    monkeypatch.setattr(closing.os, "close", hang)  # type: ignore[attr-defined]
    files = [os.open(tmp_path, os.O_RDONLY) for _ in range(closing.MOST_THREADS + 3)]
    close_foreign(files)
    assert all(map(is_open, files))
    assert "some stay open" in caplog.text
    gate.set()
    settle()  # the threads take what waits, once they can
    assert not any(map(is_open, files))
