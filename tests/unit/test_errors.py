"""The table of errors is whole: the contract's names, statuses and exit codes, and somebody who raises each."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sendense_restored
from sendense_restored import errors

# The contract's table: name -> (HTTP status, exit code). Clients rely on every line.
CONTRACT = {
    "Failed": (500, 1),
    "InvalidOption": (400, 2),
    "InvalidPath": (422, 2),
    "Unauthenticated": (401, 3),
    "NotAuthorized": (403, 3),
    "NotAuthorizedCanObtain": (403, 3),
    "BackupNotFound": (404, 4),
    "MountNotFound": (404, 4),
    "PathNotFound": (404, 4),
    "JobNotFound": (404, 4),
    "NotAFile": (409, 5),
    "NotADirectory": (409, 5),
    "BackupNotReady": (409, 6),
    "ImageRefused": (422, 7),
    "NoMountableVolume": (422, 7),
    "VolumeUnavailable": (409, 8),
    "Unreadable": (409, 8),
    "Busy": (409, 11),
    "LimitReached": (429, 12),
    "NoDevice": (503, 12),
    "NoSpace": (507, 12),
    "Expired": (410, 13),
    "Timeout": (504, 14),
    "CatalogUnavailable": (503, 15),
    "Unavailable": (503, 15),
    "Cancelled": (499, 16),
    "TooLarge": (413, 17),
    "WrongSecret": (403, 18),
}

# Nobody raises these yet: there is no gateway, no job and no unlocking. Strike a name off when somebody does.
RAISED_BY_NOBODY_YET = {"Unauthenticated", "JobNotFound", "WrongSecret"}


def _subclasses(cls: type[errors.RestoreError]) -> set[type[errors.RestoreError]]:
    return {found for direct in cls.__subclasses__() for found in {direct, *_subclasses(direct)}}


def test_the_list_is_the_contracts_and_closed() -> None:
    assert {name: (cls.http_status, cls.exit_code) for name, cls in errors.BY_NAME.items()} == CONTRACT
    assert _subclasses(errors.RestoreError) == set(errors.BY_NAME.values())


@pytest.mark.parametrize("cls", errors.BY_NAME.values())
def test_each_error_is_usable_on_every_side(cls: type[errors.RestoreError]) -> None:
    assert cls.dbus_name() == f"com.sendense.Restore1.Error.{cls.__name__}"
    assert 400 <= cls.http_status < 600
    assert 0 < cls.exit_code < 126  # what is beyond means other things to a shell
    assert cls.__doc__
    error = cls("do this next")
    assert (error.message, str(error)) == ("do this next", "do this next")


@pytest.mark.parametrize("cls", errors.BY_NAME.values())
def test_each_error_survives_the_bus(cls: type[errors.RestoreError]) -> None:
    error = errors.from_dbus(cls.dbus_name(), "do this next")
    assert (type(error), error.message) == (cls, "do this next")


@pytest.mark.parametrize(
    "name",
    [
        "org.freedesktop.DBus.Error.ServiceUnknown",
        "org.freedesktop.DBus.Error.NameHasNoOwner",
        "org.freedesktop.DBus.Error.NoReply",
        "org.freedesktop.DBus.Error.Disconnected",
        "org.freedesktop.DBus.Error.Spawn.ServiceNotFound",
        "org.freedesktop.DBus.Error.Spawn.ChildExited",
        "org.freedesktop.systemd1.UnitMasked",
    ],
)
def test_a_service_that_cannot_be_reached_is_unavailable(name: str) -> None:
    assert type(errors.from_dbus(name, "x")) is errors.Unavailable


def test_what_the_bus_daemon_refuses_has_its_counterpart_in_the_list() -> None:
    assert type(errors.from_dbus("org.freedesktop.DBus.Error.AccessDenied", "x")) is errors.NotAuthorized
    assert type(errors.from_dbus("org.freedesktop.DBus.Error.LimitsExceeded", "x")) is errors.LimitReached


@pytest.mark.parametrize(
    "name",
    [
        "com.example.Error",
        "com.sendense.Restore1.Error.Nonsense",
        "com.sendense.Restore1.Error.RestoreError",
        "com.sendense.Restore1.Error.",
        "",
    ],
)
def test_a_name_outside_the_list_is_a_failure(name: str) -> None:
    error = errors.from_dbus(name, "what it said")
    assert type(error) is errors.Failed
    assert "what it said" in error.message


def _made(tree: ast.AST) -> set[str]:
    """The errors that a module makes: ``errors.Busy(...)`` and ``Busy(...)``, or ``errors.Busy`` in a table."""
    caught = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type
        for part in ast.walk(node.type)
    }
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="errors"), attr=name) if id(node) not in caught:
                found.add(name)
            case ast.Call(func=ast.Name(id=name)):
                found.add(name)
    return found & set(errors.BY_NAME)


def test_what_counts_as_making_an_error() -> None:
    source = """
try:
    raise errors.Busy("x")
except (errors.Expired, errors.Timeout):
    raise NoDevice("y") from None
table = {1: errors.NoSpace}
"""
    assert _made(ast.parse(source)) == {"Busy", "NoDevice", "NoSpace"}


def test_the_service_raises_each_error() -> None:
    root = Path(sendense_restored.__file__).parent
    modules = [root / "names.py", *(root / "daemon").rglob("*.py"), *(root / "reader").rglob("*.py")]
    made = set().union(*(_made(ast.parse(path.read_text(encoding="utf-8"))) for path in modules))
    assert set(errors.BY_NAME) - made == RAISED_BY_NOBODY_YET
