"""From dictionaries of the bus, and of listings, to the fields of frozen dataclasses.

They arrive with their variants already taken off. A key that is not known here is ignored and a missing one leaves
its default, so that a client and a service of neighbouring versions understand each other; a value of another type,
or a number that no type of the bus holds, is a fault of the service and raises ``Failed``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from sendense_restored import errors

Answer = Mapping[str, Any]


def typed(key: str, value: object, kind: type[Any]) -> Any:  # noqa: ANN401 - it is a ``kind``
    """``value``, which is a ``kind``."""
    # bool is an int to Python, and two different types on the bus.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong(key)
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:  # JSON knows no end
        raise wrong(key)
    return value


def wrong(key: str) -> errors.Failed:
    """The error for an answer whose ``key`` makes no sense."""
    return errors.Failed(f"the restore service's answer has a wrong {key}; are its version and this one's the same?")


def scalars(cls: type[Any], answer: Answer) -> dict[str, Any]:
    """The text, number and truth fields of ``cls`` that ``answer`` has; the default tells the type."""
    return {key: typed(key, answer[key], kind) for key, kind in _kinds(cls).items() if key in answer}  # type: ignore[arg-type]  # a class is hashable


@cache
def _kinds(cls: type[Any]) -> dict[str, type[Any]]:
    kinds = {entry.name: type(entry.default) for entry in fields(cls) if entry.default is not MISSING}
    return {name: kind for name, kind in kinds.items() if kind in {str, int, bool}}


def items(answer: Answer, key: str, kind: type[Any]) -> tuple[Any, ...]:
    """The list ``key`` of ``answer``, each of its items a ``kind``."""
    return tuple(typed(key, item, kind) for item in typed(key, answer.get(key, []), list))


def dicts(answer: Answer, key: str) -> tuple[Answer, ...]:
    """The list of dictionaries ``key`` of ``answer``."""
    return items(answer, key, dict)
