"""A volume's root, as the reader has it, that is a directory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    volume = tmp_path / "volume"
    volume.mkdir()
    return volume


@pytest.fixture
def root(volume: Path) -> Iterator[int]:
    descriptor = os.open(volume, os.O_PATH)
    yield descriptor
    os.close(descriptor)
