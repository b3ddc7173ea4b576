"""What an object on the bus is made of: methods, properties and signals, declared where they are written.

An interface is a subclass of ``Exported`` that names it (``class Manager(Exported, interface="...")``); an object
with several interfaces is a class with several such bases. A method states its polkit action: one without a check
cannot be written by forgetting. Signatures, argument names and options stand in the declaration and are checked when
the class is made. ``describe`` gives all of it as data, for the introspection and for the test that compares it with
the reference in ``dbus/``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from xml.etree import ElementTree as ET

from sendense_restored import errors
from sendense_restored.wire import Variant, types_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from .calls import Call

NO_USER_INTERACTION = "auth.no_user_interaction"
"""The option that every method knows: do not ask the caller to authenticate, whatever the message's flag says."""

_MARK = "_dbus_member"
_WORDS = {
    "b": "true or false",
    "s": "text",
    "u": "a number from 0 to 4294967295",
    "t": "a number from 0 to 18446744073709551615",
    "x": "a number, negative or not",
}

F = TypeVar("F", bound="Callable[..., Any]")


@dataclass(frozen=True)
class Fd:
    """A descriptor in the result of a method (type ``h``); it belongs to the bus once the method has returned."""

    number: int


@dataclass(frozen=True)
class Method:
    """A method: input and output signature with a name for each complete type, options with their signatures."""

    name: str
    signature: str
    result: str
    action: str
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    options: Mapping[str, str]
    attribute: str = field(compare=False)


@dataclass(frozen=True)
class Property:
    """A read-only property; if ``broadcast``, everybody gets it in signals, else those who may see the object."""

    name: str
    signature: str
    broadcast: bool
    attribute: str = field(compare=False)


@dataclass(frozen=True)
class Signal:
    """A signal, declared as a class attribute and sent by ``Exports.emit``."""

    name: str
    signature: str
    arguments: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(types_of(self.signature)) != len(self.arguments):
            raise TypeError(f"signal {self.name}: {self.signature!r} and {self.arguments} do not match")


@dataclass(frozen=True)
class Interface:
    """An interface: its members by name, in the order of their declaration."""

    name: str
    methods: dict[str, Method] = field(default_factory=dict)
    properties: dict[str, Property] = field(default_factory=dict)
    signals: dict[str, Signal] = field(default_factory=dict)

    def add(self, member: Method | Property | Signal) -> None:
        """Take a member in."""
        if isinstance(member, Method):
            self.methods[member.name] = member
        elif isinstance(member, Property):
            self.properties[member.name] = member
        else:
            self.signals[member.name] = member


def unpack(given: Mapping[str, Variant], known: Mapping[str, str], what: str = "option") -> dict[str, Any]:
    """The plain values of an ``a{sv}`` whose keys and signatures are ``known``. Raises InvalidOption."""
    for name, variant in given.items():
        wanted = known.get(name)
        if wanted is None:
            raise errors.InvalidOption(f"there is no {what} '{name[:100]}'; known are {', '.join(sorted(known))}")
        if variant.signature != wanted:
            word = f" ({_WORDS[wanted]})" if wanted in _WORDS else ""
            raise errors.InvalidOption(
                f"{what} '{name}' was given with type {variant.signature}; it takes {wanted}{word}"
            )
    return {name: variant.value for name, variant in given.items()}


def method(
    name: str,
    signature: str,
    result: str = "",
    *,
    action: str,
    arguments: tuple[str, ...],
    results: tuple[str, ...] = (),
    options: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[F], F]:
    """Declare an ``async def`` as D-Bus method ``name``, which polkit action ``action`` guards.

    It is called with the ``Call`` and one value per argument; the last is the dictionary of those options that were
    given, as plain values. It returns nothing, one value, or a tuple, as ``result`` has it. Before it runs,
    ``authorize`` has not raised.
    """
    if types_of(signature)[-1:] != ("a{sv}",) or arguments[-1:] != ("options",):
        raise TypeError(f"method {name} must end in 'options a{{sv}}'")
    if len(types_of(signature)) != len(arguments) or len(types_of(result)) != len(results):
        raise TypeError(f"method {name}: signatures and names do not match")
    if not action:
        raise TypeError(f"method {name} has no action")

    def mark(function: F) -> F:
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"method {name} must be an 'async def'")
        known = MappingProxyType({**options, NO_USER_INTERACTION: "b"})
        member = Method(name, signature, result, action, arguments, results, known, function.__name__)
        vars(function)[_MARK] = member
        return function

    return mark


def prop(name: str, signature: str, *, broadcast: bool = False) -> Callable[[F], F]:
    """Declare a method without arguments as the getter of property ``name``.

    It returns a value that is at hand: it never waits and never gives None.
    """
    if len(types_of(signature)) != 1:
        raise TypeError(f"property {name} must have one complete type")

    def mark(function: F) -> F:
        vars(function)[_MARK] = Property(name, signature, broadcast, function.__name__)
        return function

    return mark


class Exported(ABC):
    """An object on the bus, from ``Exports.add`` to ``Exports.remove``."""

    INTERFACES: ClassVar[Mapping[str, Interface]] = MappingProxyType({})
    """What the class and its bases declare, by interface name."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __init_subclass__(cls, *, interface: str = "", **arguments: object) -> None:
        """Collect what the class itself declares; it belongs to ``interface``."""
        super().__init_subclass__(**arguments)
        interfaces: dict[str, Interface] = {}
        for base in reversed(cls.__mro__[1:]):
            interfaces |= getattr(base, "INTERFACES", {})
        own = Interface(interface)
        for value in vars(cls).values():
            member = value if isinstance(value, Signal) else getattr(value, _MARK, None)
            if isinstance(member, Method | Property | Signal):
                if not interface:
                    raise TypeError(f"{cls.__name__} declares {member.name}, but names no interface for it")
                own.add(member)
        if interface:
            interfaces[interface] = own
        cls.INTERFACES = MappingProxyType(interfaces)

    @abstractmethod
    async def authorize(self, call: Call, action: str, arguments: Mapping[str, Any]) -> None:
        """Return if the caller may do this. ``arguments`` are by name, ``options`` among them as plain values.

        Raises NotAuthorized or NotAuthorizedCanObtain.
        """

    @abstractmethod
    async def visible_to(self, call: Call) -> bool:
        """Whether the caller may see this object's properties. It is asked without leave to prompt."""


def describe(classes: Iterable[type[Exported]]) -> dict[str, Interface]:
    """All interfaces of ``classes`` by name."""
    return {name: interface for cls in classes for name, interface in cls.INTERFACES.items()}


def introspection(interfaces: Iterable[Interface], children: Iterable[str], *, standard: Iterable[str]) -> str:
    """The introspection XML of an object: its interfaces, the ``standard`` ones named, and child nodes."""
    node = ET.Element("node")
    for interface in interfaces:
        node.append(_interface_xml(interface))
    for name in standard:
        node.append(ET.fromstring(_STANDARD[name]))  # noqa: S314 - the text stands below
    for child in sorted(children):
        ET.SubElement(node, "node", name=child)
    ET.indent(node)
    return _DOCTYPE + ET.tostring(node, encoding="unicode") + "\n"


def _interface_xml(interface: Interface) -> ET.Element:
    element = ET.Element("interface", name=interface.name)
    for each in interface.methods.values():
        member = ET.SubElement(element, "method", name=each.name)
        for direction, names, signature in (
            ("in", each.arguments, each.signature),
            ("out", each.results, each.result),
        ):
            for name, type_ in zip(names, types_of(signature), strict=True):
                ET.SubElement(member, "arg", name=name, type=type_, direction=direction)
    for signal in interface.signals.values():
        member = ET.SubElement(element, "signal", name=signal.name)
        for name, type_ in zip(signal.arguments, types_of(signal.signature), strict=True):
            ET.SubElement(member, "arg", name=name, type=type_)
    for each_property in interface.properties.values():
        member = ET.SubElement(
            element, "property", name=each_property.name, type=each_property.signature, access="read"
        )
        value = "true" if each_property.broadcast else "false"
        ET.SubElement(member, "annotation", name="org.freedesktop.DBus.Property.EmitsChangedSignal", value=value)
    return element


_DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)
_STANDARD = {
    "org.freedesktop.DBus.Introspectable": """
      <interface name="org.freedesktop.DBus.Introspectable">
        <method name="Introspect"><arg name="xml_data" type="s" direction="out"/></method>
      </interface>""",
    "org.freedesktop.DBus.Peer": """
      <interface name="org.freedesktop.DBus.Peer">
        <method name="Ping"/>
        <method name="GetMachineId"><arg name="machine_uuid" type="s" direction="out"/></method>
      </interface>""",
    "org.freedesktop.DBus.Properties": """
      <interface name="org.freedesktop.DBus.Properties">
        <method name="Get">
          <arg name="interface_name" type="s" direction="in"/>
          <arg name="property_name" type="s" direction="in"/>
          <arg name="value" type="v" direction="out"/>
        </method>
        <method name="GetAll">
          <arg name="interface_name" type="s" direction="in"/>
          <arg name="props" type="a{sv}" direction="out"/>
        </method>
        <method name="Set">
          <arg name="interface_name" type="s" direction="in"/>
          <arg name="property_name" type="s" direction="in"/>
          <arg name="value" type="v" direction="in"/>
        </method>
        <signal name="PropertiesChanged">
          <arg name="interface_name" type="s"/>
          <arg name="changed_properties" type="a{sv}"/>
          <arg name="invalidated_properties" type="as"/>
        </signal>
      </interface>""",
    "org.freedesktop.DBus.ObjectManager": """
      <interface name="org.freedesktop.DBus.ObjectManager">
        <method name="GetManagedObjects">
          <arg name="objects" type="a{oa{sa{sv}}}" direction="out"/>
        </method>
        <signal name="InterfacesAdded">
          <arg name="object" type="o"/>
          <arg name="interfaces" type="a{sa{sv}}"/>
        </signal>
        <signal name="InterfacesRemoved">
          <arg name="object" type="o"/>
          <arg name="interfaces" type="as"/>
        </signal>
      </interface>""",
}
