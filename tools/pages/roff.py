"""Markdown, as far as our pages use it, as roff(7) with the man(7) macros.

Paragraphs, ``#`` headings, ``- `` items, blocks indented by four, tables, `` `code` `` and ``**strong**``. Anything
else would come out as it is written. Literal text is bold, as man pages have it.
"""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# What man(1) would otherwise turn into a hyphen, a quotation mark or an accent that nobody can paste.
_SPECIAL = str.maketrans({"\\": "\\e", "-": "\\-", "'": "\\(aq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti"})


def text(words: str) -> str:
    """``words`` for roff, safe at the beginning of a line as well."""
    escaped = words.translate(_SPECIAL)
    return "\\&" + escaped if escaped.startswith(".") else escaped


def quoted(words: str) -> str:
    """One argument of a macro."""
    return '"' + words.translate(_SPECIAL).replace('"', "\\(dq") + '"'


def inline(words: str) -> str:
    """A paragraph's text with its code and its emphasis."""
    parts = re.split(r"(`[^`]+`|\*\*[^*]+\*\*)", words)
    marked = "".join(
        f"\\fB{part.strip('`*').translate(_SPECIAL)}\\fR" if number % 2 else part.translate(_SPECIAL)
        for number, part in enumerate(parts)
    )
    return "\\&" + marked if marked.startswith(".") else marked


def filled(words: str) -> str:
    """``inline`` in lines that a diff can be read by."""
    lines = textwrap.wrap(inline(words), 78, break_long_words=False, break_on_hyphens=False)
    return "\n".join("\\&" + line if line.startswith(".") else line for line in lines)


def title(name: str, section: int, date: str, source: str, manual: str) -> list[str]:
    """The first lines of a page."""
    return [f".TH {quoted(name.upper())} {section} {quoted(date)} {quoted(source)} {quoted(manual)}"]


def blocks(markdown: str) -> Iterator[list[str]]:
    """The lines of each block; blocks are parted by empty lines."""
    block: list[str] = []
    for line in markdown.splitlines():
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []
    if block:
        yield block


def body(markdown: str) -> list[str]:
    """All blocks but headings, which are the caller's business."""
    lines: list[str] = []
    for block in blocks(markdown):
        if block[0].startswith("    "):
            lines += [".PP", ".RS 4", ".EX", *(text(line[4:]) for line in block), ".EE", ".RE"]
        elif block[0].startswith("|"):
            lines += table(block)
        elif block[0].startswith("- "):
            for item in _items(block):
                lines += [".IP \\(bu 2", filled(item)]
        else:
            lines += [".PP", filled(" ".join(line.strip() for line in block))]
    return lines


def _items(block: Iterable[str]) -> list[str]:
    items: list[str] = []
    for line in block:
        if line.startswith("- "):
            items.append(line[2:])
        else:
            items[-1] += f" {line.strip()}"
    return items


def table(block: list[str]) -> list[str]:
    """A table as a list: the first column, what stands between, in brackets, and below it the last column."""
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in block)
    lines: list[str] = []
    for first, *between, last in rows:
        notes = ", ".join(
            f"{name.strip()} {cell}" for name, cell in zip(header[1:-1], between, strict=True) if cell != "`(none)`"
        )
        lines += [".TP", inline(first.strip()) + (f" ({inline(notes)})" if notes else ""), filled(last.strip())]
    return lines


def sections(markdown: str) -> dict[str, str]:
    """What stands below each ``#`` heading."""
    parts = re.split(r"^# (.+)$", markdown, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
