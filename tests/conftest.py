"""For all tiers: no test leaves a task, a child process or a descriptor behind; and the option --long."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import warnings
from typing import TYPE_CHECKING

import pytest

from sendense_restored.wire import closing
from tools.lab import leftovers

with warnings.catch_warnings():
    # Importing the D-Bus library warns: of GLib, which it takes in wherever there is one, and on Python 3.13 of
    # typing.no_type_check_decorator. In tests warnings are errors, so it is imported here, before all of them.
    warnings.simplefilter("ignore")
    import dbus_next  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--debian", help="releases for the tests in virtual machines: 13, 12, or 13,12 (the default)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: minutes, or in a machine what another one has asked; with --long only")
    # A shell without job control has what it starts in the background ignore this signal, and that is inherited; the
    # programs that are tested are a user's at a terminal.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: --long"))


def _close_spare_loop() -> None:
    """Close the event loop that older versions of pytest-asyncio put in the place of a test's own.

    Those are what virtual machines have: Debian's.
    """
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
        warnings.simplefilter("ignore")  # where there is none, asking for it is deprecated
        spare = asyncio.get_event_loop_policy().get_event_loop()
        if not spare.is_running():
            spare.close()
            asyncio.set_event_loop(None)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """The first fixture of a test and so the last to end: whatever the others made is gone by then."""
    before = leftovers.of_this_process()
    yield
    closing.settle()
    if request.config.pluginmanager.hasplugin("tools.lab.vm.inside"):
        _close_spare_loop()
    if left := leftovers.left_by_this_process(before):
        pytest.fail("left behind: " + ", ".join(left))


@pytest.fixture(autouse=True)
def no_task_left(request: pytest.FixtureRequest, nothing_left: None) -> None:  # noqa: ARG001 - for the order
    """The same for tasks, which only live in a test that has an event loop; needs ``nothing_left`` around it."""
    if request.node.get_closest_marker("asyncio"):
        request.getfixturevalue("tasks_counted")


@pytest.fixture
async def tasks_counted() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    own = asyncio.current_task()
    left = [task for task in asyncio.all_tasks() - before if task is not own]
    if left:
        pytest.fail("tasks left behind: " + ", ".join(repr(task) for task in left))
