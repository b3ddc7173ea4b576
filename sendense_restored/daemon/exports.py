"""The tree of objects on the bus, and the one way of a method call through it.

``Exports`` owns the paths: an object is on the bus from ``add`` to ``remove``, which also send the manager's signals,
each once and from the manager's path. A method call is unpacked, its options are checked, ``authorize`` is asked, the
method runs, its result is packed; nothing else does any of this. What a caller may not see is left out of every
answer, and signals, which everybody can hear, carry only properties declared as broadcast.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sendense_restored import errors, names
from sendense_restored.wire import check, close_all, types_of

from .bus import BadCallError, Call, Reply, Variant, WireError
from .exported import NO_USER_INTERACTION, Exported, Fd, Interface, Method, introspection, unpack

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from .bus import Bus

log = logging.getLogger(__name__)

_INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
_OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
_PEER = "org.freedesktop.DBus.Peer"
_PROPERTIES = "org.freedesktop.DBus.Properties"
_STANDARD = {_INTROSPECTABLE, _OBJECT_MANAGER, _PEER, _PROPERTIES}
_MACHINE_IDS = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))


def _no_matter(_call: Call, _action: str, _message: str) -> None:
    return


async def _no_idea(_call: Call) -> errors.RestoreError | None:
    return None


class Exports:
    """The objects at and below ``root_path``, where the object manager is.

    ``handle`` is the bus' handler. ``unknown_object`` may know a better error for a path where nothing is (any more).
    ``refused`` hears of calls that were not authorized: the call, the action, the message.
    """

    def __init__(
        self,
        bus: Bus,
        root_path: str,
        *,
        unknown_object: Callable[[Call], Awaitable[errors.RestoreError | None]] = _no_idea,
        refused: Callable[[Call, str, str], None] = _no_matter,
    ) -> None:
        self._bus = bus
        self._root_path = root_path
        self._unknown_object = unknown_object
        self._refused = refused
        self._objects: dict[str, Exported] = {}
        self._announced: dict[str, dict[str, dict[str, Variant]]] = {}  # path, interface, property: as last sent
        bus.accepts_fds = self.accepts_fds

    def add(self, exported: Exported) -> None:
        """Put an object on the bus and say so."""
        path = exported.path
        if path in self._objects:
            raise ValueError(f"there is an object at {path} already")
        if path != self._root_path and not path.startswith(self._root_path + "/"):
            raise ValueError(f"{path} is not below {self._root_path}")
        self._objects[path] = exported
        announced = {
            interface.name: self._values(exported, interface, broadcast_only=True)
            for interface in exported.INTERFACES.values()
        }
        self._announced[path] = announced
        if path != self._root_path:
            self._bus.emit(self._root_path, _OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", [path, announced])

    def remove(self, exported: Exported) -> None:
        """Take an object off the bus and say so. May be called again."""
        path = exported.path
        if self._objects.get(path) is not exported:
            return
        del self._objects[path], self._announced[path]
        if path != self._root_path:
            self._bus.emit(
                self._root_path, _OBJECT_MANAGER, "InterfacesRemoved", "oas", [path, list(exported.INTERFACES)]
            )

    def changed(self, exported: Exported, property_names: Iterable[str]) -> None:
        """Tell everybody about those of the properties that are broadcast and differ from what was last told."""
        if self._objects.get(exported.path) is not exported:
            return
        wanted = set(property_names)
        for interface in exported.INTERFACES.values():
            last = self._announced[exported.path][interface.name]
            new = self._values(exported, interface, broadcast_only=True, only=wanted)
            new = {name: value for name, value in new.items() if last.get(name) != value}
            if new:
                last.update(new)
                self._bus.emit(exported.path, _PROPERTIES, "PropertiesChanged", "sa{sv}as", [interface.name, new, []])

    def emit(self, exported: Exported, signal: str, *arguments: object, destination: str | None = None) -> None:
        """Send a declared signal of an object, to everybody or to one connection."""
        for interface in exported.INTERFACES.values():
            if declared := interface.signals.get(signal):
                self._bus.emit(
                    exported.path, interface.name, signal, declared.signature, arguments, destination=destination
                )
                return
        raise ValueError(f"{type(exported).__name__} declares no signal {signal}")

    def accepts_fds(self, path: str, interface: str, member: str) -> bool:
        """Whether the method at hand takes descriptors."""
        declared = self._method(path, interface, member)
        return declared is not None and "h" in types_of(declared.signature)

    async def handle(self, call: Call) -> Reply:
        """Answer a call. Raises BadCallError and errors of the list."""
        if call.interface == _PEER:  # the specification has it answered at any path
            return await self._peer(call)
        exported = self._objects.get(call.path)
        if call.interface == _INTROSPECTABLE and (exported or self._below(call.path)):
            return await self._introspect(call, exported)
        if exported is None:
            raise await self._unknown_object(call) or BadCallError(
                "UnknownObject", f"there is no object at {call.path}; GetManagedObjects lists those there are"
            )
        if call.interface == _PROPERTIES:
            return await self._properties(call, exported)
        if call.interface == _OBJECT_MANAGER and call.path == self._root_path:
            _expect(call, {"GetManagedObjects": ""})
            return await self._managed_objects(call)
        if call.interface not in exported.INTERFACES:
            raise BadCallError("UnknownInterface", f"{call.path} has no interface '{call.interface}'")
        declared = self._method(call.path, call.interface, call.member)
        if declared is None:
            raise BadCallError("UnknownMethod", f"{call.interface} has no method {call.member}")
        try:
            return await _run(exported, declared, call)
        except (errors.NotAuthorized, errors.NotAuthorizedCanObtain) as error:
            self._refused(call, declared.action, error.message)
            raise

    def _method(self, path: str, interface: str, member: str) -> Method | None:
        exported = self._objects.get(path)
        described = exported.INTERFACES.get(interface) if exported else None
        return described.methods.get(member) if described else None

    def _below(self, path: str) -> list[Exported]:
        prefix = path.rstrip("/") + "/"
        return [each for each in self._objects.values() if each.path.startswith(prefix)]

    async def _introspect(self, call: Call, exported: Exported | None) -> Reply:
        _expect(call, {"Introspect": ""})
        start = len(call.path.rstrip("/")) + 1
        quiet = dataclasses.replace(call, interactive=False)
        children: set[str] = set()
        for each in self._below(call.path):
            child = each.path[start:].split("/", 1)[0]
            if child not in children and await each.visible_to(quiet):
                children.add(child)
        standard = [_INTROSPECTABLE, _PEER]
        if exported:
            standard.append(_PROPERTIES)
        if call.path == self._root_path:
            standard.append(_OBJECT_MANAGER)
        interfaces = exported.INTERFACES.values() if exported else ()
        return Reply("s", [introspection(interfaces, children, standard=standard)])

    async def _managed_objects(self, call: Call) -> Reply:
        quiet = dataclasses.replace(call, interactive=False)
        found = {}
        for exported in self._below(self._root_path):
            # Asking takes time, in which the object may have gone.
            if await exported.visible_to(quiet) and self._objects.get(exported.path) is exported:
                found[exported.path] = {
                    interface.name: self._values(exported, interface) for interface in exported.INTERFACES.values()
                }
        return Reply("a{oa{sa{sv}}}", [found])

    async def _properties(self, call: Call, exported: Exported) -> Reply:
        _expect(call, {"Get": "ss", "GetAll": "s", "Set": "ssv"})
        wanted, *rest = call.body
        interface = exported.INTERFACES.get(wanted)
        if interface is None and wanted not in _STANDARD:
            raise BadCallError("UnknownInterface", f"{call.path} has no interface '{wanted}'")
        if rest and (interface is None or rest[0] not in interface.properties):
            raise BadCallError("UnknownProperty", f"{wanted} has no property '{rest[0]}'")
        if call.member == "Set":
            raise BadCallError("PropertyReadOnly", f"property {rest[0]} cannot be set, only read")
        if interface is None:
            return Reply("a{sv}", [{}])
        if not await exported.visible_to(dataclasses.replace(call, interactive=False)):
            raise errors.NotAuthorized(
                f"the properties of {call.path} are not yours to see; mount the backup yourself"
            )
        if call.member == "GetAll":
            return Reply("a{sv}", [self._values(exported, interface)])
        declared = interface.properties[rest[0]]
        return Reply("v", [check(declared.signature, getattr(exported, declared.attribute)())])

    @staticmethod
    def _values(
        exported: Exported, interface: Interface, *, broadcast_only: bool = False, only: set[str] | None = None
    ) -> dict[str, Variant]:
        """Property values by name. One that cannot be had is left out, so that it spoils no other object's."""
        values = {}
        for each in interface.properties.values():
            if (broadcast_only and not each.broadcast) or (only is not None and each.name not in only):
                continue
            try:
                values[each.name] = check(each.signature, getattr(exported, each.attribute)())
            except Exception:
                log.exception("leaving out property %s of %s", each.name, exported.path)
        return values

    async def _peer(self, call: Call) -> Reply:
        _expect(call, {"Ping": "", "GetMachineId": ""})
        if call.member == "Ping":
            return Reply()
        return Reply("s", [await asyncio.to_thread(_machine_id)])


def _machine_id() -> str:
    for path in _MACHINE_IDS:
        try:
            return path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            continue
    raise errors.Unavailable("this machine has no machine id; systemd-machine-id-setup makes one")


def _expect(call: Call, members: dict[str, str]) -> None:
    """Check member and signature of a call of a standard interface."""
    if call.member not in members:
        raise BadCallError("UnknownMethod", f"{call.interface} has no method {call.member}")
    _check_signature(call, members[call.member])


def _check_signature(call: Call, signature: str) -> None:
    if call.signature != signature:
        raise BadCallError(
            "InvalidArgs", f"{call.member} takes arguments of type '{signature}', not '{call.signature}'"
        )


async def _run(exported: Exported, declared: Method, call: Call) -> Reply:
    """The way of every method call."""
    _check_signature(call, declared.signature)
    values: list[Any] = [
        _descriptor(call, value) if type_ == "h" else value
        for type_, value in zip(types_of(declared.signature), call.body, strict=True)
    ]
    what = f"{call.interface.rpartition('.')[2]}.{call.member}"
    fields = {"sender": call.sender, "uid": call.uid, "object": call.path}
    started = time.monotonic()
    try:
        options = unpack(values[-1], declared.options)
        if options.pop(NO_USER_INTERACTION, False):
            call = dataclasses.replace(call, interactive=False)
        values[-1] = options
        await exported.authorize(call, declared.action, dict(zip(declared.arguments, values, strict=True)))
        reply = _pack(declared, await getattr(exported, declared.attribute)(call, *values))
    except errors.RestoreError as error:
        # A refusal has its line in the history, where many of them become few.
        denied = isinstance(error, errors.NotAuthorized | errors.NotAuthorizedCanObtain)
        level = logging.DEBUG if denied else logging.INFO
        reason = names.displayable(f"{type(error).__name__}: {error.message}")
        log.log(level, "not answering %s for uid %d (%s): %s", what, call.uid, call.sender, reason, extra=fields)
        raise
    log.debug(
        "answered %s for uid %d (%s) in %.3f s", what, call.uid, call.sender, time.monotonic() - started, extra=fields
    )
    return reply


def _descriptor(call: Call, index: int) -> int:
    if index >= len(call.fds):
        raise BadCallError("InvalidArgs", f"{call.member} needs a file descriptor, and the message brought none")
    return call.fds[index]


def _pack(declared: Method, result: object) -> Reply:
    """The reply that a method's result stands for; its descriptors belong to the reply."""
    values = result if isinstance(result, tuple) else () if result is None else (result,)
    fds = tuple(value.number for value in values if isinstance(value, Fd))
    kinds = ["h" if isinstance(value, Fd) else "" for value in values]
    if kinds != ["h" if type_ == "h" else "" for type_ in types_of(declared.result)]:
        close_all(fds)
        raise WireError(f"{declared.name} returned {result!r}, which is no {declared.result!r}")
    indexes = iter(range(len(fds)))
    return Reply(declared.result, [next(indexes) if isinstance(value, Fd) else value for value in values], fds)
