"""The D-Bus manual, from the interface file: a section for each interface, a part for each member.

The text is that of the comments: the one before a member begins with its name; what begins with a word such as
``Options:`` or ``Errors:`` becomes a paragraph of its own.
"""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SOURCE = "dbus/com.sendense.Restore1.xml"
_PARTS = ("Options:", "Each:", "Each ", "The result:", "The cursor ", "Authorization:", "Errors:")


_WRAP = textwrap.TextWrapper(118, break_long_words=False, break_on_hyphens=False)
_ITEM = textwrap.TextWrapper(118, break_long_words=False, break_on_hyphens=False, subsequent_indent="  ")


def pages(root: Path) -> dict[str, str]:
    """``docs/dbus.md``."""
    text = (root / SOURCE).read_text(encoding="utf-8")
    tree = ET.fromstring(text, ET.XMLParser(target=ET.TreeBuilder(insert_comments=True)))  # noqa: S314 - our own file
    introduction = re.search(r"<!--(.*?)-->", text, re.DOTALL)
    assert introduction is not None, "the file begins with a comment"
    lines = [f"<!-- Made from {SOURCE} by tools/docs; change it there. -->", "", "# The D-Bus interface", ""]
    lines += _paragraphs(introduction[1])
    for interface, comment in _commented(tree):
        lines += [f"## {interface.attrib['name']}", "", *_paragraphs(comment)]
        for member, explanation in _commented(interface):
            name = member.attrib["name"]
            lines += [f"### {name}", "", f"`{_form(member)}`", ""]
            lines += _paragraphs(explanation.strip().removeprefix(f"{name}:"))
    return {"docs/dbus.md": "\n".join(lines).rstrip() + "\n"}


def _commented(parent: ET.Element) -> Iterator[tuple[ET.Element, str]]:
    """The children of ``parent``, each with the comment before it."""
    comment = ""
    for child in parent:
        if child.tag is ET.Comment:  # type: ignore[comparison-overlap]  # its own tag is a function
            comment = child.text or ""
        elif "name" in child.attrib:
            yield child, comment
            comment = ""


def _form(member: ET.Element) -> str:
    name = member.attrib["name"]
    if member.tag == "property":
        silent = any(each.attrib["value"] == "false" for each in member.iter("annotation"))
        return f"property {name}: {member.attrib['type']}" + (", changes silently" if silent else "")
    given = {"in": [], "out": []}  # type: dict[str, list[str]]
    for argument in member.iter("arg"):
        direction = argument.attrib.get("direction", "out" if member.tag == "signal" else "in")
        given[direction].append(f"{argument.attrib['name']}: {argument.attrib['type']}")
    if member.tag == "signal":
        return f"signal {name}({', '.join(given['out'])})"
    return f"{name}({', '.join(given['in'])})" + (f" -> {', '.join(given['out'])}" if given["out"] else "")


def _paragraphs(comment: str) -> list[str]:
    """A comment as Markdown, an empty line after each paragraph."""
    paragraphs: list[str] = []
    begin = True
    for raw in re.sub(r"(?<=\. )(Errors:|Each:|The cursor )", r"\n\1", comment).splitlines():
        line = raw.strip()
        if not line:
            begin = True
            continue
        # A line that follows "Conventions" is an item of its list, or goes on with one.
        if begin or line.startswith(("- ", *_PARTS)):
            paragraphs.append(line)
        else:
            paragraphs[-1] += f" {line}"
        begin = False
    lines: list[str] = []
    for number, paragraph in enumerate(paragraphs):
        is_item = paragraph.startswith("- ")
        lines.append(_WRAP.fill(_marked(paragraph)) if not is_item else _ITEM.fill(_marked(paragraph)))
        if not (is_item and number + 1 < len(paragraphs) and paragraphs[number + 1].startswith("- ")):
            lines.append("")
    return lines


def _marked(text: str) -> str:
    text = re.sub(r"([*<])", r"\\\1", text)
    text = re.sub(r'"([a-z_]+(?:[.-][a-z_]+)*)"(?= \()', r"`\1`", text)
    return re.sub(rf"^({'|'.join(re.escape(part.strip()) for part in _PARTS if ':' in part)})", r"**\1**", text)
