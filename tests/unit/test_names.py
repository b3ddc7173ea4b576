"""One file has exactly one text, and no text can do harm."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sendense_restored import names
from sendense_restored.errors import InvalidOption, InvalidPath

# Bytes as file systems have them, and more often than by chance those that look like our own escapes.
near_escapes = st.lists(
    st.sampled_from(
        [b"\xee", b"\xbe", b"\x80", b"\xbf", b"\xee\xbe\x80", b"\xee\xbf\xbf", b"\xed\xa0\x80", b"a", b"\\"]
    )
).map(b"".join)
some_bytes = st.binary(max_size=64) | near_escapes | st.text(max_size=16).map(str.encode)
any_text = st.text(st.characters(codec=None), max_size=32)
escapes = st.characters(min_codepoint=0xEF00, max_codepoint=0xEFFF)
component = some_bytes.map(lambda name: name.translate(None, b"\0/")).filter(
    lambda name: name not in {b"", b".", b".."}
)


@given(some_bytes)
@example(b"caf\xe9")
@example("\uef80".encode())
@example(b"\xed\xb2\x80")  # a surrogate, as WTF-8 has it
def test_every_name_comes_back_from_its_text(name: bytes) -> None:
    assert names.to_bytes(names.to_text(name)) == name


@given(some_bytes)
def test_a_text_can_be_sent_anywhere(name: bytes) -> None:
    text = names.to_text(name)
    assert text.encode().decode() == text  # no surrogates
    assert ("\0" in text) == (b"\0" in name)


@given(any_text | st.text(escapes, max_size=8))
def test_a_text_is_refused_or_is_the_only_one_of_its_name(text: str) -> None:
    try:
        name = names.to_bytes(text)
    except InvalidPath:
        return
    assert names.to_text(name) == text


@given(some_bytes, some_bytes)
def test_two_names_have_two_texts(one: bytes, other: bytes) -> None:
    assert (names.to_text(one) == names.to_text(other)) == (one == other)


@given(st.text(max_size=32).filter(lambda text: not any("\uef80" <= character <= "\uefff" for character in text)))
def test_ordinary_names_are_their_own_text(text: str) -> None:
    assert names.to_text(text.encode()) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"plain", "plain"),
        (b"back\\slash", "back\\slash"),
        (b"caf\xe9", "caf\uefe9"),
        ("\uef80".encode(), "\uefee\uefbe\uef80"),
        (b"\x80\xff", "\uef80\uefff"),
        ("\uef7f\uf000".encode(), "\uef7f\uf000"),  # the neighbours of the range are ordinary
    ],
)
def test_the_contracts_examples(name: bytes, text: str) -> None:
    assert (names.to_text(name), names.to_bytes(text)) == (text, name)


@pytest.mark.parametrize(
    "text",
    [
        "\uefc3\uefa9",  # é byte by byte, though it is valid UTF-8
        "a\ud800",  # half a surrogate pair
        "\udcff",  # what Python makes of a stray byte in an argument
    ],
)
def test_a_text_of_no_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidPath):
        names.to_bytes(text)


# Paths


@given(st.lists(component, max_size=8))
def test_a_path_comes_back_from_its_components(components: list[bytes]) -> None:
    assert names.parse_path(names.format_path(components)) == tuple(components)


@given(any_text | st.text("/.a\0\uefc3\uefa9\ud800", max_size=16))
def test_a_path_is_refused_or_has_harmless_components(text: str) -> None:
    try:
        components = names.parse_path("/" + text)
    except InvalidPath:
        return
    for name in components:
        assert name not in {b"", b".", b".."}
        assert not set(name) & set(b"/\0")
    canonical = names.format_path(components)
    assert names.format_path(names.parse_path(canonical)) == canonical


@pytest.mark.parametrize(
    ("path", "components"),
    [
        ("/", ()),
        ("//", ()),
        ("/./", ()),
        ("/partition-1//etc/./fstab/", (b"partition-1", b"etc", b"fstab")),
        ("/partition-1/...", (b"partition-1", b"...")),
        ("/partition-1/..a/a..", (b"partition-1", b"..a", b"a..")),
        ("/partition-1/caf\uefe9", (b"partition-1", b"caf\xe9")),
        ("/partition-1/a\nb\\c", (b"partition-1", b"a\nb\\c")),
        ("/" + "a" * 1020, (b"a" * 1020,)),
        ("/a" * 2047, (b"a",) * 2047),
        ("/" + "é" * 510 + "/b", ("é".encode() * 510, b"b")),
    ],
)
def test_paths_that_name_something(path: str, components: tuple[bytes, ...]) -> None:
    assert names.parse_path(path) == components


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("", "starts with"),
        ("partition-1", "starts with"),
        ("./a", "starts with"),
        ("/..", r"\.\."),
        ("/partition-1/../../etc", r"\.\."),
        ("/a/..", r"\.\."),
        ("/a\0", "NUL"),
        ("/" + "a" * 1021, "name in the path is longer"),
        ("/" + "é" * 511, "name in the path is longer"),
        ("/" + "\uefe9" * 1021, "name in the path is longer"),
        ("/" + "a" * 4096, "longer than 4095"),
        ("/a" * 10_000, "longer than 4095"),
        ("/" + "/".join(["é" * 500] * 5), "longer than 4095"),  # few characters, many bytes
        ("/" * 100_000, "longer than 4095"),
        ("/\uefc3\uefa9", "canonical"),
        ("/x\ud800", "surrogate"),
    ],
    ids=lambda value: value[:20],
)
def test_paths_that_are_refused(path: str, complaint: str) -> None:
    with pytest.raises(InvalidPath, match=complaint):
        names.parse_path(path)


@given(any_text | st.text("ab:/\0\uefc3\uefa9\ud800", max_size=8) | st.text("é", min_size=500, max_size=520))
def test_a_stream_is_refused_or_has_one_name_that_leads_nowhere_else(text: str) -> None:
    try:
        name = names.parse_stream(text)
    except InvalidOption:
        return
    assert names.to_text(name) == text
    assert 0 < len(name) <= names.MAX_NAME
    assert not {*b"/:\0"} & {*name}


def test_an_escaped_dot_dot_is_no_way_up() -> None:
    # U+EF2E would be the dot if ASCII could be escaped; it cannot, so this is an ordinary name.
    assert names.parse_path("/\uef2e\uef2e") == ("\uef2e\uef2e".encode(),)


# What is shown


def _unsafe(character: str) -> bool:
    return unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} or unicodedata.bidirectional(character) in {
        "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI",
    }  # fmt: skip


@given(any_text)
def test_what_is_shown_cannot_move_the_cursor_or_turn_the_line_around(text: str) -> None:
    shown = names.displayable(text)
    assert not any(map(_unsafe, shown))
    assert shown.isprintable() or not text.isprintable()


def test_every_unsafe_character_is_escaped() -> None:
    unsafe = [character for character in map(chr, range(0x110000)) if _unsafe(character)]
    assert [character for character in unsafe if names.displayable(character) == character] == []


@pytest.mark.parametrize("text", ["plain", "café", "日本語", "back\\slash", "caf\uefe9", "שלום", "👩"])
def test_what_is_harmless_is_shown_as_it_is(text: str) -> None:
    assert names.displayable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb", "a\\nb"),
        ("\x9b", "\\x9b"),
        ("\u202etxt", "\\u202etxt"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_is_not_is_escaped(text: str, shown: str) -> None:
    assert names.displayable(text) == shown
