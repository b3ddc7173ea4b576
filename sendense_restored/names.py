"""The one text form of a guest file name, and guest paths made of such names.

Guest names are bytes, while D-Bus, JSON and terminals want Unicode. A name that is valid UTF-8 is its own text.
Each byte that belongs to no valid UTF-8 sequence becomes the character U+EF00 + byte (U+EF80..U+EFFF, private
use); a name that really holds such a character has each byte of that character written the same way. The form is
reversible, and a text that is not the form of its own bytes is refused: one file has exactly one text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .errors import InvalidOption, InvalidPath

if TYPE_CHECKING:
    from collections.abc import Iterable

_ESCAPE_BASE = 0xEF00
_TO_ESCAPE = re.compile("[\udc80-\udcff\uef80-\uefff]")
_ESCAPED = re.compile("([\uef80-\uefff]+)")
# What can move the cursor, reorder the line or end it when it is shown: C0, DEL, C1, line and paragraph separators,
# bidi marks, embeddings and isolates, zero-width characters, and lone surrogates.
_UNSAFE_TO_SHOW = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")

MAX_PATH = 4095
"""Longest path in bytes: Linux' PATH_MAX without the final NUL (path_resolution(7))."""

MAX_NAME = 1020
"""Longest name in bytes: 255 UTF-16 units of NTFS are at most 765, 255 characters elsewhere at most 1020."""


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    if "\udc80" <= character <= "\udcff":  # one undecodable byte, by surrogateescape
        return chr(_ESCAPE_BASE + ord(character) - 0xDC00)
    return "".join(chr(_ESCAPE_BASE + byte) for byte in character.encode())


def to_text(name: bytes) -> str:
    """The text form of ``name``."""
    if name.isascii():  # nearly all are, and there are many
        return name.decode("ascii")
    return _TO_ESCAPE.sub(_escape, name.decode("utf-8", "surrogateescape"))


def to_bytes(text: str) -> bytes:
    """The name whose text form is ``text``.

    Raises InvalidPath if ``text`` is no name's text form.
    """
    try:
        name = b"".join(
            bytes(ord(character) - _ESCAPE_BASE for character in part) if index % 2 else part.encode()
            for index, part in enumerate(_ESCAPED.split(text))
        )
    except UnicodeEncodeError:
        raise InvalidPath("the name holds half a surrogate pair, which no file name has") from None
    if to_text(name) != text:
        raise InvalidPath("the name is not written in its canonical text form")
    return name


def parse_path(path: str) -> tuple[bytes, ...]:
    """The components of an absolute guest path; ``()`` for ``/``.

    Repeated and trailing slashes and ``.`` mean nothing and are dropped. Raises InvalidPath for everything that
    cannot name a guest file.
    """
    if not path.startswith("/"):
        raise InvalidPath("a path starts with '/'")
    if len(path) > MAX_PATH:  # characters; bytes are counted below, after this cheap bound
        raise InvalidPath(f"the path is longer than {MAX_PATH} bytes")
    components = tuple(to_bytes(part) for part in path.split("/") if part not in {"", "."})
    for component in components:
        if component == b"..":
            raise InvalidPath("'..' is not allowed in a path")
        if b"\0" in component:
            raise InvalidPath("a path cannot hold a NUL character")
        if len(component) > MAX_NAME:
            raise InvalidPath(f"a name in the path is longer than {MAX_NAME} bytes")
    if sum(map(len, components)) + len(components) > MAX_PATH:
        raise InvalidPath(f"the path is longer than {MAX_PATH} bytes")
    return components


def parse_stream(stream: str) -> bytes:
    """The name of an alternate stream of an NTFS file, from its text form. Raises InvalidOption."""
    try:
        if len(stream) > MAX_NAME:
            raise InvalidPath("the name is too long")
        name = to_bytes(stream)
    except InvalidPath as error:
        raise InvalidOption(f"stream: {error.message}") from None
    if not 0 < len(name) <= MAX_NAME or any(byte in name for byte in b"/:\0"):
        raise InvalidOption(
            f"stream must be the name of a stream: 1 to {MAX_NAME} bytes, without '/', ':' and NUL; "
            "GetFileInfo tells those of a file"
        )
    return name


def format_path(components: Iterable[bytes]) -> str:
    """The canonical text of a path, the inverse of ``parse_path``."""
    return "/" + "/".join(to_text(component) for component in components)


def displayable(text: str) -> str:
    """``text`` as it may be shown on a terminal or written to a log: control and bidi characters escaped."""
    return _UNSAFE_TO_SHOW.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode(), text)
