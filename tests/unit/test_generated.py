"""The pages that are made from the sources are up to date and complete, and please the tools that read them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from sendense_restored import errors
from tools.pages import completions, dbus, man, roff
from tools.pages.__main__ import MAKERS
from tools.pages.commands import tree, usage

ROOT = Path(__file__).parents[2]
PAGES = {path: text for maker in MAKERS.values() for path, text in maker(ROOT).items()}
MAN = [path for path in PAGES if path.startswith("man/")]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_as_it_would_be_made_now(path: str) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == PAGES[path], "run tools/docs"


def test_nothing_else_lies_where_pages_are_made() -> None:
    lying = {f"{folder}/{page.name}" for folder in ("man", "completions") for page in (ROOT / folder).iterdir()}
    assert lying == {path for path in PAGES if not path.startswith("docs/")}


def test_every_command_and_option_is_in_the_man_page() -> None:
    page = PAGES["man/sendense-restore.1"].replace("\\-", "-")
    for command in tree().walk():
        if command.commands:
            continue
        assert f'.SS "{usage(command)}"' in page
        for option in command.options:
            for name in option.names:
                assert name in page
    for error in errors.BY_NAME:
        assert f"\\fB{error}\\fR" in page


def test_every_command_and_option_is_explained() -> None:
    for command in tree().walk():
        assert command.help
        texts = [each.help for each in command.options] + [each.help for each in command.arguments]
        for text in texts:
            assert text.endswith("."), f"{command.path}: {text}"


def test_every_member_of_the_bus_is_in_its_manual() -> None:
    page = PAGES["docs/dbus.md"]
    members = [
        each.attrib["name"] for each in ET.parse(ROOT / dbus.SOURCE).iter() if each.tag in {"method", "property"}
    ]
    assert len(members) > 40
    for name in members:
        assert f"### {name}\n" in page
    assert "Authorization:** list-backups" in page
    assert not re.search(r"[^.\n] \*\*Errors", page)


def test_every_command_can_be_completed() -> None:
    for path, text in PAGES.items():
        if path.startswith("completions/"):
            for command in tree().walk():
                for word in command.path:
                    assert word in text
            assert not re.search("@[A-Z]+@", text), "nothing is left to be filled in"


@pytest.mark.parametrize("path", MAN)
def test_groff_has_nothing_to_say(path: str) -> None:
    if not shutil.which("groff"):
        pytest.skip("groff is not installed")
    result = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-z", ROOT / path], capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == ("", "")


@pytest.mark.parametrize("path", MAN)
def test_mandoc_has_nothing_to_say(path: str) -> None:
    if not shutil.which("mandoc"):
        pytest.skip("mandoc is not installed")
    result = subprocess.run(["mandoc", "-Tlint", ROOT / path], capture_output=True, text=True, check=False)
    # A page has the date of the release that it is part of; before the first there is none.
    complaints = [line for line in result.stdout.splitlines() if "missing date" not in line]
    assert (complaints, result.stderr) == ([], "")


def test_a_page_has_the_date_of_the_newest_release() -> None:
    log = "# Changelog\n\n## Unreleased\n\n## 1.1.0 - 2027-02-03\n\n## [1.0.0] - 2026-12-01\n"
    assert man.released(log) == "2027-02-03"
    assert man.released("## Unreleased\n") == ""


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (".leads", "\\&.leads"),
        ("a-b \\ 'c'", "a\\-b \\e \\(aqc\\(aq"),
        ("`-x` and **so**", "\\fB\\-x\\fR and \\fBso\\fR"),
        ("`.x`", "\\fB.x\\fR"),
    ],
)
def test_nothing_in_prose_is_a_request_of_roff(words: str, written: str) -> None:
    assert roff.inline(words) == written


def test_a_wrapped_line_is_no_request_either() -> None:
    lines = roff.filled("word " * 15 + "... .so /etc/passwd 'em all").splitlines()
    assert len(lines) > 1
    assert not any(line.startswith((".", "'")) for line in lines)


def test_no_option_is_a_switch_here_and_takes_a_value_there() -> None:
    assert "--journal" in completions.value_options(tree())
    assert "--json" not in completions.value_options(tree())
