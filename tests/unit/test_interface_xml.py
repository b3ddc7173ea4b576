"""The reference in dbus/ says what the code exports, member by member, and explains each."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from sendense_restored import errors
from sendense_restored.daemon.exported import NO_USER_INTERACTION, Interface, describe
from sendense_restored.daemon.interface import MountObject, Root

XML = Path(__file__).parents[2] / "dbus/com.sendense.Restore1.xml"
EXPORTED = describe([Root, MountObject])


def _documented() -> dict[str, ET.Element]:
    tree = ET.parse(XML, ET.XMLParser(target=ET.TreeBuilder(insert_comments=True)))
    return {element.attrib["name"]: element for element in tree.getroot() if element.tag == "interface"}


DOCUMENTED = _documented()


def _comment(interface: ET.Element, member: ET.Element) -> str:
    """The comment right before a member."""
    children = list(interface)
    before = children[children.index(member) - 1]
    return (before.text or "") if before.tag is ET.Comment else ""  # type: ignore[comparison-overlap]


def _above(interface: ET.Element) -> str:
    """The comment right before an interface."""
    tree = ET.parse(XML, ET.XMLParser(target=ET.TreeBuilder(insert_comments=True)))
    children = list(tree.getroot())
    index = next(i for i, each in enumerate(children) if each.attrib == interface.attrib)
    return children[index - 1].text or ""


def _members() -> list[tuple[str, str]]:
    return [
        (interface.name, member)
        for interface in EXPORTED.values()
        for member in (*interface.methods, *interface.properties, *interface.signals)
    ]


def test_the_same_interfaces_are_documented_and_exported() -> None:
    assert set(DOCUMENTED) == set(EXPORTED)


@pytest.mark.parametrize("interface", EXPORTED.values(), ids=lambda each: each.name.rpartition(".")[2])
def test_methods_have_the_arguments_of_the_reference(interface: Interface) -> None:
    documented = {
        method.attrib["name"]: [(arg.attrib["name"], arg.attrib["type"], arg.attrib["direction"]) for arg in method]
        for method in DOCUMENTED[interface.name].iter("method")
    }
    exported = {}
    for method in interface.methods.values():
        both = (("in", method.arguments, method.signature), ("out", method.results, method.result))
        exported[method.name] = [
            (name, type_, direction)
            for direction, names, signature in both
            for name, type_ in zip(names, _types(signature), strict=True)
        ]
    assert documented == exported


@pytest.mark.parametrize("interface", EXPORTED.values(), ids=lambda each: each.name.rpartition(".")[2])
def test_properties_have_the_types_of_the_reference(interface: Interface) -> None:
    documented = {
        each.attrib["name"]: (each.attrib["type"], [note.attrib["value"] for note in each.iter("annotation")])
        for each in DOCUMENTED[interface.name].iter("property")
    }
    silent = ["false"]  # EmitsChangedSignal; true is what the specification takes for granted
    assert documented == {
        each.name: (each.signature, [] if each.broadcast else silent) for each in interface.properties.values()
    }


@pytest.mark.parametrize(("interface", "name"), _members())
def test_every_member_is_explained(interface: str, name: str) -> None:
    element = DOCUMENTED[interface]
    member = next(each for each in element if each.attrib.get("name") == name)
    comment = _comment(element, member)
    assert comment.strip().startswith(f"{name}:"), "the comment before a member begins with its name"
    if member.tag != "method":
        return
    method = EXPORTED[interface].methods[name]
    text = " ".join(comment.split())
    assert f"Authorization: {method.action}" in text
    above = " ".join(_above(element).split())
    for option in method.options.keys() - {NO_USER_INTERACTION}:
        if f'option "{option}" ({method.options[option]}) of every method' in above:
            continue
        assert f'"{option}" ({method.options[option]}' in text, f"option {option} is not explained"


@pytest.mark.parametrize(("interface", "name"), _members())
def test_errors_that_the_reference_names_are_of_the_list(interface: str, name: str) -> None:
    element = DOCUMENTED[interface]
    member = next(each for each in element if each.attrib.get("name") == name)
    _, found, listed = " ".join(_comment(element, member).split()).partition("Errors: ")
    for part in listed.split(",") if found else []:
        word = part.strip().split()[0].rstrip(".")
        if word[0].isupper():
            assert word in errors.BY_NAME


def _types(signature: str) -> tuple[str, ...]:
    """Complete types of a signature; written out here so that the test does not trust the code that it tests."""
    types, depth, start = [], 0, 0
    for index, character in enumerate(signature):
        depth += character in "({"
        depth -= character in ")}"
        if depth == 0 and character != "a":
            types.append(signature[start : index + 1])
            start = index + 1
    return tuple(types)
