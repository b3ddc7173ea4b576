"""Our marshaller says byte for byte what dbus-next's says, and refuses what the bus would not forgive."""

# mypy: allow-untyped-calls
# The library's marshaller has no annotations.

from __future__ import annotations

import sys
from typing import Any

import pytest
from dbus_next._private.marshaller import Marshaller
from dbus_next.signature import Variant
from hypothesis import example, given
from hypothesis import strategies as st

from sendense_restored.wire import MessageType, WireError, check, encode, variant
from sendense_restored.wire.marshal import ROWS, UNENCODABLE, Rows, marshal

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
BASIC: dict[str, st.SearchStrategy[Any]] = {
    "y": st.integers(0, 2**8 - 1),
    "b": st.booleans(),
    "n": st.integers(-(2**15), 2**15 - 1),
    "q": st.integers(0, 2**16 - 1),
    "i": st.integers(-(2**31), 2**31 - 1),
    "u": st.integers(0, 2**32 - 1),
    "x": st.integers(-(2**63), 2**63 - 1),
    "t": st.integers(0, 2**64 - 1),
    "d": st.floats(),
    "h": st.integers(0, 15),
    "s": TEXT,
    "o": st.sampled_from(["/", "/com/example", "/a/b_c/D1"]),
    "g": st.sampled_from(["", "s", "a{sv}", "(ii)as"]),
}


@st.composite
def typed(draw: st.DrawFn, depth: int = 3) -> tuple[str, Any]:
    """A complete type, and a value of it."""
    kind = draw(st.sampled_from(["basic", "array", "struct", "dict", "variant"] if depth else ["basic"]))
    if kind == "basic":
        signature = draw(st.sampled_from(sorted(BASIC)))
        return signature, draw(BASIC[signature])
    if kind == "variant":
        signature, value = draw(typed(depth - 1))
        return "v", Variant(signature, value)
    if kind == "struct":
        parts = draw(st.lists(typed(depth - 1), min_size=1, max_size=4))
        return f"({''.join(signature for signature, _ in parts)})", [value for _, value in parts]
    signature, value = draw(typed(depth - 1))
    times = draw(st.integers(0, 3))
    if kind == "dict":
        keys = draw(st.lists(TEXT, max_size=times, unique=True))
        return f"a{{s{signature}}}", dict.fromkeys(keys, value)
    return ("ay", bytes([value] * times)) if signature == "y" else (f"a{signature}", [value] * times)


@given(st.lists(typed(), max_size=5))
def test_it_says_what_the_library_says(arguments: list[tuple[str, Any]]) -> None:
    signature, body = "".join(kind for kind, _ in arguments), [value for _, value in arguments]
    assert marshal(signature, body) == Marshaller(signature, body).marshall()


EXTRAS = st.dictionaries(
    TEXT,
    st.sampled_from("sbuxd").flatmap(lambda kind: BASIC[kind].map(lambda value: Variant(kind, value))),
    max_size=3,
)
ROW = st.tuples(TEXT, TEXT, BASIC["t"], BASIC["u"], BASIC["x"], TEXT, EXTRAS).map(list)


@given(TEXT, st.lists(ROW, max_size=8), TEXT)
@example("", [["a" * length, "file", 1, 2, 3, "b" * (length // 3), {}] for length in range(260)], "c")
@example("", [["a", "k" * length, 1, 2, 3, "", {"nlink": Variant("u", 2)}] for length in range(20)], "c")
def test_the_rows_of_a_listing_are_as_the_library_has_them(before: str, rows: list[list[Any]], after: str) -> None:
    signature, body = f"s{ROWS}s", [before, rows, after]
    expected = Marshaller(signature, body).marshall()
    assert marshal(signature, body) == expected
    in_parts = Rows()
    for part in (rows[:3], [], rows[3:]):
        in_parts.add(part)
    assert marshal(signature, [before, in_parts, after]) == expected


GOOD_ROW = ["name", "file", 1, 0o644, 5, "", {}]


@pytest.mark.parametrize(
    ("signature", "value"),
    [
        ("s", "a\0b"),
        ("s", "\ud800"),
        ("s", b"bytes"),
        ("s", None),
        ("o", "no/path"),
        ("o", "/ends/"),
        ("g", "a"),
        ("b", 1),
        ("y", 256),
        ("y", -1),
        ("u", -1),
        ("u", 2**32),
        ("u", "5"),
        ("u", 1.0),
        ("t", 2**64),
        ("x", 2**63),
        ("as", "abc"),
        ("as", ["a", 1]),
        ("as", {"a": 1}),
        ("ay", "abc"),
        ("a{sv}", [("a", Variant("s", "b"))]),
        ("a{sv}", {"a": "no variant"}),
        ("(su)", ["a"]),
        ("(su)", ["a", 1, 2]),
        ("(su)", "ab"),
        ("v", "no variant"),
        ("", 1),
        ("ss", "only one"),
        ("{sv}", {}),
        ("Z", 1),
        (ROWS, "text"),
        (ROWS, [GOOD_ROW[:-1]]),
        (ROWS, [["a\0", *GOOD_ROW[1:]]]),
        (ROWS, [["\ud800", *GOOD_ROW[1:]]]),
        (ROWS, [[["a"], *GOOD_ROW[1:]]]),
        (ROWS, [[*GOOD_ROW[:2], -1, *GOOD_ROW[3:]]]),
        (ROWS, [[*GOOD_ROW[:3], 2**32, *GOOD_ROW[4:]]]),
        (ROWS, [[*GOOD_ROW[:4], 2**63, *GOOD_ROW[5:]]]),
        (ROWS, [[*GOOD_ROW[:5], "\0", {}]]),
        (ROWS, [[*GOOD_ROW[:6], {"a": "no variant"}]]),
        (ROWS, [[*GOOD_ROW[:6], {"a\0": Variant("u", 1)}]]),
        (ROWS, [[*GOOD_ROW[:6], 7]]),
    ],
)
def test_what_no_message_can_carry_is_refused(signature: str, value: object) -> None:
    with pytest.raises(UNENCODABLE):
        marshal(signature, [value])
    with pytest.raises(WireError):
        encode(MessageType.METHOD_RETURN, 1, {"reply_serial": 1}, signature=signature, body=[value])


def test_a_value_is_looked_at_when_it_is_encoded_and_by_check_at_once() -> None:
    late = variant("u", "no number")
    with pytest.raises(UNENCODABLE):
        marshal("v", [late])
    with pytest.raises(WireError):
        check("u", "no number")
    assert check("u", 5) == variant("u", 5) == Variant("u", 5)


@pytest.mark.parametrize("signature", ["", "ss", "a", "(", "Z"])
def test_a_variant_has_one_complete_type(signature: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the library's own
        variant(signature, "a")
    with pytest.raises(WireError):
        check(signature, "a")


def test_signatures_of_strangers_are_not_kept_for_ever() -> None:
    for number in range(2000):
        marshal("v", [variant(f"({number:b})".replace("0", "s").replace("1", "u"), list_of(f"{number:b}"))])
    module = sys.modules[marshal.__module__]
    assert len(module._kept_variants) < 1000


def list_of(bits: str) -> list[object]:
    return ["" if bit == "0" else 1 for bit in bits]
