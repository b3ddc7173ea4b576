"""The results as a table in a terminal and as ``docs/performance.md``; text in, text out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .figures import Measured, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .figures import Finding, Growth, Spread

_INTRODUCTION = """\
# Performance

Written by `tools/bench --write`; `tools/bench` prints the same numbers for the machine that it runs on.

Times of a machine that others use as well say little. So the service is measured against the bare tools in the same
run, in pairs whose order alternates, and what is judged is the ratio: its median, and the middle half of all ratios
as the spread. 1 MB is 1,000,000 bytes.
"""

_HEADINGS = ("what", "beside", "median", "middle half", "n", "goal", "verdict")


@dataclass(frozen=True)
class Outcome:
    """What became of one benchmark."""

    name: str
    measured: Measured = field(default_factory=Measured)
    failure: str = ""
    """Why there is nothing measured, if so."""


def number(value: float) -> str:
    """Three digits that count; whole numbers as they are, and from 100 on."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    for bound, places in ((10.0, 1), (1.0, 2), (0.1, 3), (0.01, 4)):
        if abs(value) >= bound:
            return f"{value:.{places}f}"
    return f"{value:.2g}"


def rows(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """The lines of the table of findings, as ``_HEADINGS`` has them; what could not be measured has one too."""
    found = []
    for outcome in outcomes:
        found += [_row(finding) for finding in outcome.measured.findings]
        if outcome.failure:
            found.append((outcome.name, "", "", "", "", "", f"not measured: {outcome.failure}"))
    return found


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many goals hold, in one line."""
    verdicts = [finding.verdict for outcome in outcomes for finding in outcome.measured.findings]
    failed = sum(bool(outcome.failure) for outcome in outcomes)
    counts = [f"{verdicts.count(Verdict.HOLDS)} hold", f"{verdicts.count(Verdict.SHORT)} fall short"]
    if failed:
        counts.append(f"{failed} not measured")
    return "Goals: " + ", ".join(counts)


def terminal(outcomes: Sequence[Outcome]) -> str:
    """Everything, for people with a fixed-width font."""
    parts = [_columns((_HEADINGS, *rows(outcomes)))]
    if orientation := _orientation(outcomes):
        parts.append("For orientation, times on this machine:\n" + _columns((_HEADINGS, *orientation)))
    parts += [f"{growth.title}\n{_columns(_values(growth))}" for growth in _growths(outcomes)]
    parts.append(summary(outcomes))
    return "\n\n".join(parts)


def page(outcomes: Sequence[Outcome], machine: Sequence[tuple[str, str]]) -> str:
    """The text of ``docs/performance.md``; its plots are ``performance/SLUG.svg``."""
    parts = [_INTRODUCTION, _markdown((("Measured on", ""), *machine))]
    parts += ["## Against the goals\n", _markdown((_HEADINGS, *rows(outcomes))), f"{summary(outcomes)}.\n"]
    short = [finding for outcome in outcomes for finding in outcome.measured.findings]
    short = [finding for finding in short if finding.verdict is Verdict.SHORT]
    if short:
        named = [f"- {finding.what}: {_value(finding.spread.median, finding.unit)}" for finding in short]
        parts.append("What falls short:\n\n" + "\n".join(named) + "\n")
    parts += ["## What was done\n"]
    parts += [f"{outcome.measured.remark}\n" for outcome in outcomes if outcome.measured.remark]
    parts += ["## For orientation\n", "Absolute times, on this machine and this day.\n"]
    parts.append(_markdown((_HEADINGS, *_orientation(outcomes))))
    parts.append("## Growth\n")
    for growth in _growths(outcomes):
        parts.append(f"### {growth.title}\n\n![{growth.title}](performance/{growth.slug}.svg)\n")
        parts.append(_markdown(_values(growth)))
    return "\n".join(parts)


def _orientation(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    return [_row(finding) for outcome in outcomes for finding in outcome.measured.orientation]


def _growths(outcomes: Sequence[Outcome]) -> Iterator[Growth]:
    for outcome in outcomes:
        yield from outcome.measured.growths


def _row(finding: Finding) -> tuple[str, ...]:
    goal = "" if finding.goal is None else f"≤ {_value(finding.goal, finding.unit)}"
    return (
        finding.what,
        finding.beside,
        _value(finding.spread.median, finding.unit),
        _half(finding.spread),
        str(finding.spread.count),
        goal,
        str(finding.verdict),
    )


def _value(value: float, unit: str) -> str:
    return f"{number(value)} {unit}".strip()


def _half(spread: Spread) -> str:
    return "" if spread.count == 1 else f"{number(spread.low)} to {number(spread.high)}"


def _values(growth: Growth) -> list[tuple[str, ...]]:
    """A curve's points as a table: x in the first column, each series in one of its own."""
    measured = [dict(series.points) for series in growth.series]
    found: list[tuple[str, ...]] = [(growth.x, *(f"{series.name} ({growth.y})" for series in growth.series))]
    for x in sorted({x for points in measured for x in points}):
        values = [number(points[x].median) if x in points else "" for points in measured]
        found += [(f"{x:,}", *values)]
    return found


def _columns(table: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in table), strict=True)]
    lines = ("  ".join([*map(str.ljust, row[:-1], widths), row[-1]]).rstrip() for row in table)
    return "\n".join(lines)


def _markdown(table: Sequence[tuple[str, ...]]) -> str:
    head, *body = (" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in table)
    rule = " | ".join("---" for _ in table[0])
    return "\n".join(f"| {line} |" for line in (head, rule, *body)) + "\n"
