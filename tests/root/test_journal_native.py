"""The log of a service as the journal gets it: the daemon's own set-up, systemd's library, and a journal's socket."""

from __future__ import annotations

import array
import contextlib
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("systemd.journal")

if TYPE_CHECKING:
    from collections.abc import Iterator

SOCKET = Path("/run/systemd/journal/socket")
SECONDS = 60.0

PROGRAM = """
import logging, sys
from sendense_restored.daemon import journal
journal.set_up(debug=True)
log = logging.getLogger("sendense_restored.daemon.test")
exec(sys.argv[1])
"""


@pytest.fixture
def journald() -> Iterator[socket.socket]:
    """A journal's socket, where a service looks for it."""
    assert not SOCKET.exists()
    SOCKET.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(SOCKET))
        listening.settimeout(SECONDS)
        yield listening
    shutil.rmtree(SOCKET.parents[1])


def run(code: str, *, service: bool = True) -> str:
    """Run ``code`` in a process that has its standard error from a service manager, or not; what came out there."""
    reading, writing = os.pipe()
    status = os.fstat(writing)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])}
    if service:
        environment["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
    with open(reading, "rb") as output:  # noqa: PTH123
        try:
            subprocess.run(
                [sys.executable, "-c", PROGRAM, code], stderr=writing, env=environment, check=True, timeout=SECONDS
            )
        finally:
            os.close(writing)
        return output.read().decode()


def receive(journald: socket.socket) -> tuple[dict[str, bytes], bool]:
    """One entry, and whether it came as a file in memory, as a large one does (the native journal protocol)."""
    size = array.array("i").itemsize
    data, ancillary, _, _ = journald.recvmsg(32 << 20, socket.CMSG_SPACE(size))
    for _, _, packed in ancillary:
        (descriptor,) = struct.unpack("i", packed[:size])
        with open(descriptor, "rb") as file:  # noqa: PTH123
            file.seek(0)
            data = file.read()
    return parse(data), bool(ancillary)


def parse(data: bytes) -> dict[str, bytes]:
    """``NAME=value`` and a newline; or, for any value at all, the name alone on a line, its length and the value."""
    fields = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", rest[:8])
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest.startswith(b"\n")
            rest = rest[1:]
        assert name.decode() not in fields
        fields[name.decode()] = value
        data = rest
    return fields


def test_a_record_is_an_entry_with_its_parts(journald: socket.socket) -> None:
    fields = {"mount_id": "m1", "caller_uid": "1000", "path": "/disk/a b=c"}
    assert run(f"log.warning('not %s', 'opened', extra={{'fields': {fields!r}}})") == ""
    entry, _ = receive(journald)
    assert {name: value.decode() for name, value in entry.items() if not name.startswith("CODE_")} == {
        "MESSAGE": "not opened",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "sendense-restored",
        "LOGGER": "sendense_restored.daemon.test",
        "SENDENSE_MOUNT_ID": "m1",
        "SENDENSE_CALLER_UID": "1000",
        "SENDENSE_PATH": "/disk/a b=c",
    }
    assert (entry["CODE_FILE"], entry["CODE_LINE"], entry["CODE_FUNC"]) == (b"<string>", b"1", b"<module>")


def test_a_value_of_several_lines_is_one_value(journald: socket.socket) -> None:
    """Nobody writes a field of their own choice by a line break in theirs."""
    forged = "x\nSENDENSE_CALLER_UID=0\nPRIORITY=0"
    run(f"log.info({forged!r}, extra={{'fields': {{'detail': {forged!r}, 'caller_uid': '1000'}}}})")
    entry, _ = receive(journald)
    assert entry["MESSAGE"] == entry["SENDENSE_DETAIL"] == forged.encode()
    assert (entry["SENDENSE_CALLER_UID"], entry["PRIORITY"]) == (b"1000", b"6")


@pytest.mark.parametrize(("lines", "as_file"), [(500_000, False), (5_000_000, True)])
def test_a_value_of_any_size_arrives_whole(journald: socket.socket, lines: int, as_file: bool) -> None:
    run(f"log.info('large', extra={{'fields': {{'detail': 'ä\\n' * {lines}}}}})")
    entry, is_file = receive(journald)
    assert is_file == as_file
    assert entry["SENDENSE_DETAIL"] == "ä\n".encode() * lines


def test_a_traceback_belongs_to_its_message(journald: socket.socket) -> None:
    run("try:\n    1 / 0\nexcept ZeroDivisionError:\n    log.exception('a bug')")
    entry, _ = receive(journald)
    assert entry["PRIORITY"] == b"3"
    assert entry["MESSAGE"].startswith(b"a bug\nTraceback")
    assert entry["MESSAGE"].endswith(b"ZeroDivisionError: division by zero")


def test_a_program_whose_output_goes_elsewhere_writes_lines(journald: socket.socket) -> None:
    assert run("log.info('hello'); log.debug('more')", service=False).splitlines() == [
        "INFO sendense_restored.daemon.test: hello",
        "DEBUG sendense_restored.daemon.test: more",
    ]
    journald.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        pytest.fail(f"the journal got {journald.recv(1000)!r}")


def test_a_service_without_a_journals_socket_writes_lines() -> None:
    assert run("log.info('hello')") == "INFO sendense_restored.daemon.test: hello\n"


def test_a_journal_that_has_gone_away_meanwhile_loses_no_record_unseen(journald: socket.socket) -> None:
    """Its socket stays while it starts again; with nobody behind it the record is a line."""
    code = f"""
import os, socket
os.unlink({str(SOCKET)!r})
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as gone:
    gone.bind({str(SOCKET)!r})
log.info('hello')
"""
    output = run(code)
    assert output == "INFO sendense_restored.daemon.test: hello\n"
    assert journald
