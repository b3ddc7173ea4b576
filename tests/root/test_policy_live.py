"""The shipped policy files as the real polkitd and the real bus understand them."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.lab.people import Person

    from .conftest import Machine

YES, CHALLENGE = 0, 2  # exit codes of pkcheck(1)

# action: (a member of the group, somebody else), neither of them in a session, so "any" applies
ANSWERS = {
    "list-backups": (YES, CHALLENGE),
    "mount": (YES, CHALLENGE),
    "read": (YES, YES),
    "read-others": (CHALLENGE, CHALLENGE),
    "unmount": (YES, YES),
    "unmount-others": (CHALLENGE, CHALLENGE),
    "force-unmount": (CHALLENGE, CHALLENGE),
    "manage": (CHALLENGE, CHALLENGE),
}

# Connects, does what the first line of stdin says and tells how that went; ends with stdin.
CALLER = """\
import asyncio, sys, warnings
warnings.simplefilter("ignore")
from dbus_next import BusType, Message, MessageType
from dbus_next.aio import MessageBus

async def main():
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    print(bus.unique_name, flush=True)
    while line := sys.stdin.readline().split():
        if line[0] == "own":
            call = Message("org.freedesktop.DBus", "/", "org.freedesktop.DBus", "RequestName", signature="su",
                           body=["com.sendense.Restore1", 4])
            print((await bus.call(call)).error_name, flush=True)
        else:  # a signal, addressed to whom the line names or to everybody, then a call to be sure that it went out
            signal = Message(line[1] if len(line) > 1 else None, "/x", "com.example", "Sent", MessageType.SIGNAL)
            refused = asyncio.get_running_loop().create_future()
            bus.add_message_handler(lambda m: m.reply_serial == signal.serial and refused.set_result(m.error_name))
            await bus.send(signal)
            await bus.call(Message("org.freedesktop.DBus", "/", "org.freedesktop.DBus", "GetId"))
            print(refused.result() if refused.done() else None, flush=True)

asyncio.run(main())
"""


class Caller:
    """A process of some user with a connection to the bus."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.name = self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, *words: str) -> str:
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)
        return self._read()


@contextmanager
def calling(machine: Machine, person: Person | None) -> Iterator[Caller]:
    argv = ["/usr/bin/python3", "-c", CALLER]
    with subprocess.Popen(
        argv if person is None else person.command(*argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | machine.bus.environment,
    ) as process:
        yield Caller(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("action", ANSWERS)
def test_polkit_answers_as_the_contract_says(machine: Machine, action: str) -> None:
    answers = []
    for person in (machine.people.member, machine.people.stranger):
        with calling(machine, person) as caller:
            argv = ["pkcheck", "--action-id", f"com.sendense.restore1.{action}", "--system-bus-name", caller.name]
            done = subprocess.run(argv, check=False, capture_output=True, env=os.environ | machine.bus.environment)
            answers.append(done.returncode)
    assert tuple(answers) == ANSWERS[action]


def test_only_root_can_own_the_services_name(machine: Machine) -> None:
    with calling(machine, machine.people.member) as caller:
        assert caller.ask("own") == "org.freedesktop.DBus.Error.AccessDenied"
    with calling(machine, None) as root:
        assert root.ask("own") == "None"


def test_a_signal_reaches_the_service_only_if_it_is_for_everybody(machine: Machine) -> None:
    with calling(machine, None) as service, calling(machine, machine.people.stranger) as stranger:
        service.ask("own")
        for address in ("com.sendense.Restore1", service.name):
            assert stranger.ask("signal", address) == "org.freedesktop.DBus.Error.AccessDenied"
        assert stranger.ask("signal", "org.freedesktop.PolicyKit1") == "None", "others are none of our business"
        assert stranger.ask("signal") == "None"
