"""Where the log goes: to systemd's journal with its parts as fields, or as lines to standard error.

The journal is used where standard error already leads to it: JOURNAL_STREAM names the device and inode of what
systemd put there (systemd.exec(5)), and no other than standard error of this very process may match. Then each record
is one entry of the native protocol, which takes any text, over several lines too, and of any size. Everywhere else,
and where the system lacks systemd's binding or the journal's socket, a record is a line, as ``basicConfig`` has it.

What a record brings besides its message:

    fields             a dict, given as ``extra={"fields": {...}}``: each entry becomes SENDENSE_<KEY>, so that
                       "mount_id" can be asked for as ``journalctl SENDENSE_MOUNT_ID=...``
    uid, sender,       attributes of calls over the bus: SENDENSE_CALLER_UID, SENDENSE_SENDER, SENDENSE_OBJECT
    object

Keys are constants of this program, and never anybody's input.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

try:
    from systemd import journal as systemd_journal
except ImportError:  # a package of its own, which not every distribution has
    systemd_journal = None

IDENTIFIER = "sendense-restored"
_SOCKET = Path("/run/systemd/journal/socket")
_PREFIX = "SENDENSE_"
_ATTRIBUTES = {"uid": "CALLER_UID", "sender": "SENDER", "object": "OBJECT"}
# syslog(3) has one more step than logging: notice, between warning and info, is for nobody here.
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7


def set_up(*, debug: bool) -> None:
    """Send the log where it belongs, from level info on; with ``debug`` ours whole. Once, at start."""
    line = logging.StreamHandler()
    line.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    handler = JournalHandler(line) if stderr_is_the_journal() else line
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    if debug:
        logging.getLogger("sendense_restored").setLevel(logging.DEBUG)


def stderr_is_the_journal() -> bool:
    """Whether this process' standard error leads to a journal that can be reached."""
    try:
        status = os.fstat(sys.__stderr__.fileno() if sys.__stderr__ else 2)
    except (OSError, ValueError):
        return False
    named = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    # systemd's library says nothing of entries that it cannot deliver because there is no socket.
    return named and systemd_journal is not None and _SOCKET.is_socket()


def entry(record: logging.LogRecord, message: str) -> list[bytes]:
    """The fields of a record's entry, each as name, equals sign and value; ``message`` is its text."""
    fields = {
        "MESSAGE": message,
        "PRIORITY": next((number for level, number in _PRIORITIES if record.levelno >= level), _DEBUG),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": record.lineno,
        "CODE_FUNC": record.funcName,
    }
    for attribute, name in _ATTRIBUTES.items():
        if hasattr(record, attribute):
            fields[_PREFIX + name] = getattr(record, attribute)
    parts = getattr(record, "fields", {})
    fields |= {_PREFIX + key.upper(): value for key, value in parts.items()}
    return [f"{name}={value}".encode(errors="backslashreplace") for name, value in fields.items()]


class JournalHandler(logging.Handler):
    """Writes entries of the journal; one that the journal does not take goes to ``otherwise``."""

    def __init__(self, otherwise: logging.Handler) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))  # the rest of a line are fields
        self._otherwise = otherwise

    def emit(self, record: logging.LogRecord) -> None:
        """Write one entry; with its traceback, if there is one, as part of the message."""
        try:
            systemd_journal.sendv(*entry(record, self.format(record)))
        except OSError:
            self._otherwise.handle(record)
