"""The arithmetic of measurements, and what they are measured by; nothing in here touches the machine."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_T = TypeVar("_T")


class MeasurementError(Exception):
    """Something could not be measured; the message says why."""


class Verdict(StrEnum):
    """What a goal makes of a measurement."""

    HOLDS = "holds"
    SHORT = "falls short"
    NO_GOAL = "no goal"


@dataclass(frozen=True)
class Spread:
    """The middle of some values and how far they lie apart: between ``low`` and ``high`` is the middle half."""

    median: float
    low: float
    """The first quartile."""
    high: float
    """The third quartile."""
    count: int


@dataclass(frozen=True)
class Finding:
    """One number with its goal."""

    what: str
    beside: str
    """What it is measured against; empty for a number that stands for itself."""
    spread: Spread
    unit: str
    """``x`` for a ratio."""
    goal: float | None = None
    """The most that the median may be."""

    @property
    def verdict(self) -> Verdict:
        """Whether the median keeps to the goal."""
        if self.goal is None:
            return Verdict.NO_GOAL
        return Verdict.HOLDS if self.spread.median <= self.goal else Verdict.SHORT


@dataclass(frozen=True)
class Series:
    """One line of a plot: ``(x, values measured there)``."""

    name: str
    points: tuple[tuple[int, Spread], ...]


@dataclass(frozen=True)
class Growth:
    """How something grows with something else."""

    slug: str
    """The name of the plot's file, without its ending."""
    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    logarithmic: bool
    """Both axes; otherwise neither is."""


@dataclass(frozen=True)
class Measured:
    """What one benchmark found."""

    findings: tuple[Finding, ...] = ()
    orientation: tuple[Finding, ...] = ()
    """Absolute numbers, true for one machine and one moment."""
    growths: tuple[Growth, ...] = ()
    remark: str = ""
    """What both sides did, for the reader of the numbers."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    pairs: int
    quick: bool
    """Small sizes and short times: shows that the benchmarks work, and little else."""


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (those of ``statistics.quantiles``, inclusive). Raises ValueError without values."""
    if not values:
        raise ValueError("nothing was measured")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def ratios(pairs: Sequence[tuple[float, float]]) -> Spread:
    """Of the first of each pair to its second. Raises ValueError for a second that is not more than 0."""
    if any(bare <= 0 for _, bare in pairs):
        raise ValueError("the bare side of a pair took no time, so there is no ratio to it")
    return spread([ours / bare for ours, bare in pairs])


def paired(ours: Callable[[], _T], bare: Callable[[], _T], count: int) -> list[tuple[_T, _T]]:
    """Measure both sides ``count`` times, in the order ABBAABBA…; one pair before that warms up and is dropped."""
    if count < 1:
        raise ValueError("at least one pair has to be measured")
    found = []
    for number in range(-1, count):
        if number % 2:
            theirs = bare()
            pair = (ours(), theirs)
        else:
            mine = ours()
            pair = (mine, bare())
        if number >= 0:
            found.append(pair)
    return found


def compared(what: str, beside: str, pairs: Sequence[tuple[float, float]], goal: float | None = None) -> Finding:
    """The finding that pairs of times make."""
    return Finding(what, beside, ratios(pairs), "x", goal)


def amount(what: str, values: Sequence[float], unit: str, goal: float | None = None) -> Finding:
    """The finding that values without a counterpart make."""
    return Finding(what, "", spread(values), unit, goal)
