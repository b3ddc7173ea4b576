"""What the lines of a stream say of an entry that is no ordinary file."""

from __future__ import annotations

import errno
import stat as stat_module
from json.encoder import encode_basestring as quoted
from typing import TYPE_CHECKING

from . import tree
from .protocol import U32

if TYPE_CHECKING:
    import os

    from .ntfs import Look


def unusual(directory: int, name: bytes, kind: str, status: os.stat_result, look: Look | None) -> str:
    """The rest of a line of anything but an ordinary file, from its size on."""
    mtime = tree.clamped(status.st_mtime_ns)
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
            rest += f',"unreadable":{quoted(tree.problem(failure))}'
    if kind == "file" and status.st_nlink > 1:
        rest += f',"nlink":{min(status.st_nlink, U32)}'
    if mtime != status.st_mtime_ns:
        rest += ',"time_clamped":true'
    if not kind:
        rest += f',"unreadable":{quoted(tree.problem(OSError(errno.EUCLEAN, "")))}'
    return rest + "}\n"
