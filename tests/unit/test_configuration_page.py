"""docs/configuration.md lists the keys that there are, with their defaults."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from sendense_restored import config

PAGE = (Path(__file__).parents[2] / "docs/configuration.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([a-z_.]+)` \| `([^`]+)` \| (reload|start) \|", PAGE, re.MULTILINE)
LISTED = {name: default for name, default, _ in ROWS}
DEFAULTS = {
    f"{section.name}.{key.name}": getattr(getattr(config.Config(), section.name), key.name)
    for section in fields(config.Config)
    for key in fields(getattr(config.Config(), section.name))
}


def test_the_same_keys_are_listed_and_known() -> None:
    assert LISTED.keys() == DEFAULTS.keys()


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_default_that_is_listed_is_the_default(name: str) -> None:
    section, key = name.split(".")
    text = LISTED[name]
    if text == "(none)":
        assert DEFAULTS[name] is None
        return
    value = int(text) if text.isdigit() else text
    parsed = config.parse({section: {key: value}})
    assert getattr(getattr(parsed, section), key) == DEFAULTS[name]


def test_each_key_is_listed_with_the_moment_at_which_it_is_read() -> None:
    assert {name for name, _, read_at in ROWS if read_at == "reload"} == config.RELOADABLE
