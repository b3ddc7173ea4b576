"""What the lines of a stream say of an entry that is no ordinary file, and of what cannot be told."""

from __future__ import annotations

import errno
import os
import stat as stat_module
from json.encoder import encode_basestring as quoted
from typing import TYPE_CHECKING

from . import tree
from .protocol import I64, U32

if TYPE_CHECKING:
    from .ntfs import Look


def unusual(directory: int, name: bytes, kind: str, status: os.stat_result, look: Look | None) -> str:
    """The rest of a line of anything but an ordinary file, from its size on."""
    mtime = max(-I64 - 1, min(status.st_mtime_ns, I64))
    size, mode = status.st_size, stat_module.S_IMODE(status.st_mode)
    if look is not None:
        size, mode = look.size, look.mode
    rest = f',"size":{max(size, 0)},"mode":{mode},"mtime_ns":{mtime}'
    if look is not None:
        if kind == "symlink":
            rest += f',"target":{quoted(look.target)}'
        if look.unreadable:
            rest += f',"unreadable":{quoted(look.unreadable)}'
    elif kind == "symlink":
        try:
            rest += f',"target":{quoted(tree.link_target(name, directory))}'
        except OSError as failure:
            rest += f',"unreadable":{quoted(message(failure))}'
    if kind == "file" and status.st_nlink > 1:
        rest += f',"nlink":{min(status.st_nlink, U32)}'
    if mtime != status.st_mtime_ns:
        rest += ',"time_clamped":true'
    if not kind:
        rest += f',"unreadable":{quoted(message(OSError(errno.EUCLEAN, "")))}'
    return rest + "}\n"


def message(failure: OSError) -> str:
    """Why something in a directory cannot be told; the path stands beside it."""
    number = failure.errno
    if number in tree.NO_RESOURCES:
        return "the mount's reader is short of memory or descriptors; try again in a moment"
    if number in tree.DAMAGED or number in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
        # It was listed a moment ago, in a file system that does not change.
        return "the file system is damaged here, or its storage failed; try an older backup"
    return f"the file system did not give it ({os.strerror(number) if number else 'unknown error'})"
