"""Which directories root opens as repositories, whoever names them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.daemon.catalog import Catalog
from sendense_restored.daemon.host.image import open_chain
from sendense_restored.daemon.store import scan
from tests import simulator as sim

if TYPE_CHECKING:
    from collections.abc import Sequence

KEY = r"key image\.repositories"


def refused(path: Path, allowed: Sequence[Path] | None = None) -> None:
    with pytest.raises(errors.ImageRefused, match=KEY):
        open_chain(path, "disk", depth=1, allowed=allowed)
    with pytest.raises(errors.ImageRefused, match=KEY):
        scan(path, allowed)


def opened(path: Path, allowed: Sequence[Path] | None = None) -> None:
    with pytest.raises((errors.BackupNotFound, errors.Unavailable), match=r"is not in the repository|is empty"):
        open_chain(path, "disk", depth=1, allowed=allowed)
    scan(path, allowed)


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/etc", "/etc/ssl", "/proc/self", "/proc/self/root", "/proc/self/cwd", "/usr/lib", "/var", "/var/lib"),
        *("//", "/.", "/./etc", "/home/anna", "/dev/shm", "/lib64", "/run/lock", "/var/lib/sendense-restore/x"),
    ],
)
def test_the_hosts_own_directories_are_none(path: str) -> None:
    refused(Path(path))


@pytest.mark.parametrize("target", ["/", "/etc", "/proc/self/root"])
def test_links_are_judged_by_where_they_lead(tmp_path: Path, target: str) -> None:
    (tmp_path / "link").symlink_to(target)
    if target.startswith("/proc"):  # no link of the kernel's is followed at all
        with pytest.raises(errors.Unavailable):
            scan(tmp_path / "link")
    else:
        refused(tmp_path / "link")


def test_without_a_list_other_directories_are_allowed(tmp_path: Path) -> None:
    opened(tmp_path)


def test_with_a_list_only_those_below_it_are(tmp_path: Path) -> None:
    inside, outside = tmp_path / "allowed/day", tmp_path / "allowed-not"
    inside.mkdir(parents=True)
    outside.mkdir()
    (tmp_path / "allowed/out").symlink_to(outside)
    (tmp_path / "by-link").symlink_to(tmp_path / "allowed")
    for allowed in (tmp_path / "allowed", tmp_path / "by-link"):
        opened(inside, [tmp_path / "elsewhere", allowed])
        opened(tmp_path / "by-link/day", [allowed])
        opened(tmp_path / "allowed", [allowed])
        for path in (outside, tmp_path / "allowed/out", tmp_path, Path("/"), Path("/etc")):
            refused(path, [allowed])
    scan(Path("/etc/alternatives"), [Path("/etc/alternatives")])  # whoever names it means it


async def test_a_repository_is_refused_when_it_is_added(tmp_path: Path) -> None:
    async with sim.house(tmp_path) as (simulator, store):
        catalog = Catalog(store, simulator.machine, [tmp_path / "a"])
        for path in ("a", "b"):
            (tmp_path / path).mkdir()
        await catalog.add_repository("one", str(tmp_path / "a"))
        for path in (str(tmp_path / "b"), "/"):
            with pytest.raises(errors.InvalidOption, match=KEY):
                await catalog.add_repository("two", path)
        for path in (str(tmp_path / "a/missing"), "a", "a\0b", "/\ud800"):
            with pytest.raises(errors.InvalidOption):
                await catalog.add_repository("two", path)
