"""Uids that are lent to helpers, so that no two that may have been taken over by a guest can reach each other."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class Uids:
    """A range of uids, each in the hands of one helper at a time."""

    def __init__(self, uids: Iterable[int]) -> None:
        # In turns, so that a uid rests as long as possible between two helpers.
        self._free = deque(uids)

    @property
    def free(self) -> int:
        """How many more can be lent."""
        return len(self._free)

    def take(self) -> int:
        """The one that has rested longest. Raises IndexError if none is free."""
        return self._free.popleft()

    def give_back(self, uid: int) -> None:
        """Once the helper that had it has ended."""
        self._free.append(uid)
