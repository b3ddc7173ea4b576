"""A terminal that a test sits at: it types, and waits for what is shown."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import termios
from typing import Self

_SECONDS = 20.0


class Terminal:
    """``fd`` is the side that programs get. ``text`` is all that they have shown so far."""

    def __init__(self, rows: int = 24, columns: int = 200) -> None:
        self._keyboard, self.fd = os.openpty()
        os.set_blocking(self._keyboard, False)
        self.resize(rows, columns)
        self.text = ""
        self._position = 0
        self._more = asyncio.Event()
        self._open = True

    def __enter__(self) -> Self:
        self.look()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def look(self) -> None:
        """Take what programs show; they wait while nobody looks."""
        asyncio.get_running_loop().add_reader(self._keyboard, self._read)

    def look_away(self) -> None:
        asyncio.get_running_loop().remove_reader(self._keyboard)

    def close(self) -> None:
        """Hang it up, as when the user's window is closed. May be called again."""
        if self._open:
            self._open = False
            self.look_away()
            os.close(self._keyboard)
            os.close(self.fd)

    def _read(self) -> None:
        try:
            self.text += os.read(self._keyboard, 65536).decode(errors="replace")
        except BlockingIOError:
            return
        self._more.set()

    def types(self, text: str) -> None:
        self.types_bytes(text.encode())

    def types_bytes(self, data: bytes) -> None:
        assert os.write(self._keyboard, data) == len(data)

    async def pastes(self, data: bytes) -> None:
        """More than a terminal takes at once."""
        loop = asyncio.get_running_loop()
        while data:
            room = asyncio.Event()
            loop.add_writer(self._keyboard, room.set)
            try:
                await room.wait()
            finally:
                loop.remove_writer(self._keyboard)
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(self._keyboard, data) :]

    async def shows(self, pattern: str) -> re.Match[str]:
        """Wait until there is text that matches, after what was waited for before."""
        try:
            async with asyncio.timeout(_SECONDS):
                while not (found := re.compile(pattern).search(self.text, self._position)):
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError(f"no {pattern!r} in {self.text[self._position :]!r}") from None
        self._position = found.end()
        return found

    @property
    def modes(self) -> list[object]:
        """As tcgetattr(3) has them."""
        return list(termios.tcgetattr(self.fd))

    def resize(self, rows: int, columns: int) -> None:
        termios.tcsetwinsize(self._keyboard, (rows, columns))
