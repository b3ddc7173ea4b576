"""The roots of the mount's volumes, which the daemon lends to the reader and asks back before it unmounts.

A root is an O_PATH descriptor. ``Roots`` owns those it was given until they are asked back; it closes them when the
last request that uses one is done, and only then says so. From that moment nothing here keeps a volume busy.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sendense_restored import errors

from . import protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class Roots:
    """Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._roots: dict[str, int] = {}
        self._users = 0
        self._asked_back: list[Callable[[], None]] = []

    def give(self, roots: Mapping[str, int]) -> None:
        """Take over descriptors, by name of volume. Raises Unavailable, and closes them, if they cannot be kept."""
        with self._lock:
            if not self._asked_back and not roots.keys() & self._roots.keys():
                self._roots.update(roots)
                return
        protocol.close_all(list(roots.values()))
        raise errors.Unavailable("the mount is being closed, or its volumes are open already; try again in a moment")

    @contextmanager
    def use(self, volume: str) -> Iterator[int]:
        """The root of a volume, for the duration of one request. Raises Unavailable or PathNotFound."""
        with self._lock:
            self._check()
            if volume not in self._roots:
                raise errors.PathNotFound("there is no such volume; list '/' to see the volumes")
            root = self._roots[volume]
            self._users += 1
        try:
            yield root
        finally:
            with self._lock:
                self._users -= 1
                returned = self._close_if_unused()
            for tell in returned:
                tell()

    def check(self) -> None:
        """Raises Unavailable when the roots were asked back: a long request ends early then."""
        with self._lock:
            self._check()

    def take_back(self, returned: Callable[[], None]) -> None:
        """Close all roots, now or when their last user is done, and call ``returned``; refuse new users at once."""
        with self._lock:
            self._asked_back.append(returned)
            now = self._close_if_unused()
        for tell in now:
            tell()

    def _check(self) -> None:
        if self._asked_back or not self._roots:
            raise errors.Unavailable("the mount is being closed or not open yet; try again in a moment")

    def _close_if_unused(self) -> list[Callable[[], None]]:
        """Close what was asked back, if nobody uses it; answers who is to be told, outside of the lock."""
        if not self._asked_back or self._users:
            return []
        protocol.close_all(list(self._roots.values()))
        self._roots.clear()
        asked_back, self._asked_back = self._asked_back, []
        return asked_back
