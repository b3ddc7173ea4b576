"""For the tests that run in a virtual machine: real systemd, message bus, polkit, udev and NBD.

The same files are collected twice. Out here ``tools/lab/vm/outside`` hands the tests to a machine and reports what
comes back; in there ``tools/lab/vm/inside`` runs them, as root, with the packages that were built from this checkout.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.vm.appliance import Appliance, census, mounts, set_up, unmount
from tests.vm.watching import assert_at_rest, let_go
from tools.lab import leftovers
from tools.lab.vm.image import SUITES

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("tools.lab.vm.inside"):
        from tools.lab.vm.outside import Outside  # noqa: PLC0415 - nothing of it is wanted in the machine

        config.pluginmanager.register(Outside(Path(__file__).parent))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test for each release; `tools/test vm` chooses Debian 13 where its caller chooses none."""
    chosen = metafunc.config.getoption("--debian") or ",".join(SUITES)
    releases = chosen.split(",")
    if unknown := set(releases) - set(SUITES):
        raise pytest.UsageError(f"--debian: not {', '.join(sorted(unknown))}, but some of {', '.join(SUITES)}")
    metafunc.fixturenames.insert(0, "debian")
    metafunc.parametrize("debian", releases, ids=[f"debian{release}" for release in releases], scope="session")


@pytest.fixture(scope="session")
def appliance() -> Appliance:
    return set_up()


@pytest.fixture(autouse=True)
def nothing_left_on_the_machine(debian: str) -> Iterator[None]:  # noqa: ARG001 - after it
    """No test leaves a mount of the service's, or a device that is attached."""
    before = census()
    yield
    for mount in mounts():
        unmount(mount)
    if left := leftovers.left_in_time(before, census):
        pytest.fail("left on the machine: " + ", ".join(left))


@pytest.fixture
def at_rest(nothing_left_on_the_machine: None) -> Iterator[None]:
    """The test takes its mounts down itself, and nothing of them is left when it ends."""
    del nothing_left_on_the_machine
    yield
    assert_at_rest()


@pytest.fixture
def held(nothing_left_on_the_machine: None) -> Iterator[list[int]]:
    """Descriptors of guest files that a test holds, at most to its end: a device drains as long as one is open."""
    del nothing_left_on_the_machine
    descriptors: list[int] = []
    yield descriptors
    let_go(descriptors)
