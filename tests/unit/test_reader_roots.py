"""Roots are lent, used, asked back, and closed when the last user is done."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.reader.roots import Roots

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def descriptor(tmp_path: Path) -> int:
    """A root that the test gives away; the check for leftovers sees whether it was closed."""
    return os.open(tmp_path, os.O_PATH)


@pytest.fixture
def roots() -> Iterator[Roots]:
    roots = Roots()
    yield roots
    roots.take_back(lambda: None)


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_nothing_can_be_used_before_it_is_given(roots: Roots) -> None:
    with pytest.raises(errors.Unavailable), roots.use("v"):
        pass


def test_an_unknown_volume_is_not_found(roots: Roots, descriptor: int) -> None:
    roots.give({"v": descriptor})
    with pytest.raises(errors.PathNotFound), roots.use("w"):
        pass


def test_unused_roots_are_closed_at_once(roots: Roots, descriptor: int) -> None:
    told: list[bool] = []
    roots.give({"v": descriptor})
    roots.take_back(lambda: told.append(is_open(descriptor)))
    assert told == [False]


def test_used_roots_are_closed_with_their_last_use_and_refused_meanwhile(roots: Roots, descriptor: int) -> None:
    told: list[bool] = []
    roots.give({"v": descriptor})
    with roots.use("v"):
        with roots.use("v"):
            roots.take_back(lambda: told.append(is_open(descriptor)))
            with pytest.raises(errors.Unavailable):
                roots.check()
            with pytest.raises(errors.Unavailable), roots.use("v"):
                pass
        assert is_open(descriptor)
        assert told == []
    assert told == [False]


def test_all_who_asked_for_them_back_are_told(roots: Roots, descriptor: int) -> None:
    told: list[str] = []
    roots.give({"v": descriptor})
    with roots.use("v"):
        roots.take_back(lambda: told.append("first, given up by now"))
        roots.take_back(lambda: told.append("second"))
    assert told == ["first, given up by now", "second"]


def test_roots_can_be_given_again(roots: Roots, descriptor: int, tmp_path: Path) -> None:
    roots.give({"v": descriptor})
    roots.take_back(lambda: None)
    again = os.open(tmp_path, os.O_PATH)
    roots.give({"v": again})
    with roots.use("v") as root:
        assert root == again


def test_a_second_root_of_the_same_name_is_refused_and_closed(roots: Roots, descriptor: int, tmp_path: Path) -> None:
    roots.give({"v": descriptor})
    second = os.open(tmp_path, os.O_PATH)
    with pytest.raises(errors.Unavailable):
        roots.give({"v": second})
    assert not is_open(second)
    assert is_open(descriptor)


def test_a_use_that_fails_is_over(roots: Roots, descriptor: int) -> None:
    roots.give({"v": descriptor})
    with pytest.raises(errors.NotAFile), roots.use("v"):
        raise errors.NotAFile("it is a directory")
    roots.take_back(lambda: None)
    assert not is_open(descriptor)
