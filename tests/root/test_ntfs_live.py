"""NTFS for real: ntfs-3g on images made here, mounted as the daemon does it, read by a reader in its jail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import config, errors
from sendense_restored.daemon.host import filesystem
from sendense_restored.daemon.host.process import Tools
from sendense_restored.daemon.host.readers import Readers
from sendense_restored.reader.protocol import Filters, Start
from tests.root import windows
from tests.root.test_filesystem_live import Loop, volume

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sendense_restored.daemon.host.reader import Reader
    from sendense_restored.reader.protocol import Entry, FileInfo

EFS = "encrypted by Windows (EFS)"
CLOUD = "kept by a cloud service"
TAGS = {
    "dedup": (0x80000013, "deduplicated by Windows"),
    "wof": (0x80000017, "compressed by Windows"),
    "cloud": (0x9000001A, CLOUD),
    "onedrive": (0x9000601A, CLOUD),
    "hsm": (0xC0000004, "moved to other storage"),
    "hsm2": (0x80000006, "moved to other storage"),
    "alias": (0x8000001B, "an alias of an app"),
    "unknown": (0x80001234, "(0x80001234)"),
}
"""Files that are reparse points, and what is said of them."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = windows.make(tmp_path_factory.mktemp("ntfs") / "image")
    with windows.written(image) as inside:
        windows.write(
            inside / "plain", b"x" * 5000, one=b"stream one", **{"T w o": b"22", "Zone.Identifier": b"zone"}
        )
        (inside / "dir").mkdir()
        windows.write(inside / "dir/inner", b"inner")
        Path(f"{inside}/dir:ofdir").write_bytes(b"of dir")
        Path(f"{inside}/:ofroot").write_bytes(b"of root")
        for name, (tag, _) in TAGS.items():
            windows.write(inside / name, b"lost", kept=b"in a stream")
            windows.reparse(inside / name, tag, bytes(32))
        (inside / "OneDrive").mkdir()
        windows.reparse(inside / "OneDrive", 0x9000701A, bytes(32))
        windows.junction(inside / "junction", "C:\\dir")
        windows.junction(inside / "elsewhere", "D:\\nothing")
        windows.junction(inside / "odd", "UNC\\host")
        windows.link(inside / "relative", "dir\\inner", relative=True)
        windows.link(inside / "absolute", "C:\\dir\\inner")
        windows.link(inside / "todir", "dir", relative=True, directory=True)
        windows.link(inside / "lost", "nothing", relative=True)
        (inside / "tostream").symlink_to("plain:one")
        (inside / "toalias").symlink_to("plain:")
        (inside / "around").symlink_to("around2")
        (inside / "around2").symlink_to("around")
        (inside / "todedup").symlink_to("dedup")
        windows.encrypt(windows.write(inside / "efs", windows.PADDED, secret=windows.PADDED))
        windows.write(inside / "like", b"y" * 514)
        windows.encrypt(windows.write(inside / "none", b""))
        mixed = windows.write(inside / "mixed", b"m" * 510).stat().st_ino
        recalled = windows.write(inside / "recalled", b"r" * 100).stat().st_ino
        extended = windows.write(inside / "extended", b"e" * 100).stat().st_ino
        offline = windows.write(inside / "offline", b"o" * 100).stat().st_ino
        # What the sentence of a reparse point leads to: a file that must never come in its place.
        for tag, _ in TAGS.values():
            windows.write(inside / f"unsupported reparse tag 0x{tag:08x}", b"not this")
    windows.add_flags(image, recalled, windows.RECALL_ON_DATA_ACCESS)
    windows.add_flags(image, extended, windows.EXTENDED)
    windows.add_flags(image, offline, windows.OFFLINE)
    windows.add_flags(image, mixed, windows.ENCRYPTED)
    return image


@asynccontextmanager
async def a_reader(image: Path, directory: Path) -> AsyncIterator[Reader]:
    """A reader with the image as its volume ``v``."""
    for name in ("run", "mounts", "mounts/mount"):
        (directory / name).mkdir()
    settings = config.Config(
        paths=config.Paths(runtime=directory / "run"), mounts=config.Mounts(directory=directory / "mounts")
    )
    tools = Tools.find(filesystem.REQUIRED_TOOLS, filesystem.OPTIONAL_TOOLS)
    attached = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)  # noqa: ASYNC221 - short
    loop = Loop(Path(attached.stdout.strip()), read_only=False)
    place = directory / "mounts/mount"
    try:
        mounted = await filesystem.mount(tools, settings, volume("ntfs", image), loop, place / "v", journal="replay")
        try:
            reader = await Readers(Tools.find({}), settings).start("mount")
            try:
                await reader.give({"v": mounted.root}, ntfs=["v"], directory=str(place))
                yield reader
                assert not reader.lost.done()
            finally:
                await reader.close()
        finally:
            await mounted.unmount()
    finally:
        subprocess.run(["losetup", "--detach", loop.path], check=True)  # noqa: ASYNC221 - short


@pytest.fixture
async def reader(image: Path, tmp_path: Path) -> AsyncIterator[Reader]:
    async with a_reader(image, tmp_path) as reader:
        yield reader


async def content(reader: Reader, *path: str, stream: str = "") -> tuple[bytes, FileInfo]:
    descriptor, info = await reader.open("v", tuple(map(os.fsencode, path)), stream=stream.encode())
    with open(descriptor, "rb") as file:  # noqa: ASYNC230, PTH123 - a descriptor of a small file
        return file.read(), info


async def listed(reader: Reader, *path: str) -> dict[str, Entry]:
    page = await reader.list("v", tuple(map(os.fsencode, path)), limit=10_000, cursor="")
    return {entry.name: entry for entry in page.entries}


async def streamed(reader: Reader, filters: Filters) -> dict[str, dict[str, object]]:
    """The entries of a listing stream of the whole volume by path below it."""
    reading, writing = os.pipe()
    try:
        stream = await reader.stream([Start("v", ())], filters, writing, stall=60)
    finally:
        os.close(writing)
    with open(reading, "rb") as pipe:  # noqa: ASYNC230, PTH123 - a pipe
        *entries, summary = map(json.loads, await asyncio.to_thread(pipe.readlines))
    assert (await stream.end).complete
    assert summary["summary"]["errors"] == 0, entries
    return {entry.pop("path").removeprefix("/v/"): entry for entry in entries}


# --- streams


async def test_streams_are_told_and_opened(reader: Reader) -> None:
    info = await reader.stat("v", (b"plain",))
    assert sorted(info.streams) == ["T w o", "Zone.Identifier", "one"]
    assert (info.size, info.unreadable) == (5000, "")
    for name, data in {"one": b"stream one", "T w o": b"22", "Zone.Identifier": b"zone"}.items():
        got, about = await content(reader, "plain", stream=name)
        assert (got, about.kind, about.size) == (data, "file", len(data))
    got, about = await content(reader, "plain")
    assert (len(got), about.size) == (5000, 5000)


async def test_what_ntfs_3g_says_of_another_file_does_not_matter(reader: Reader) -> None:
    """It keeps the number of an error, and has given it as the answer to listxattr(2)."""
    for path in ((b"plain",), (b"dir",), tuple[bytes]()):
        with contextlib.suppress(errors.RestoreError):
            os.close((await reader.open("v", (b"dedup",), stream=b"none"))[0])
        with contextlib.suppress(errors.RestoreError):
            os.close((await reader.open("v", (b"plain",), stream=b"\xff"))[0])
        info = await reader.stat("v", path)
        assert (info.unreadable, info.xattrs, len(info.streams) > 0) == ("", [], True)


async def test_directories_and_the_root_have_streams(reader: Reader) -> None:
    assert (await reader.stat("v", (b"dir",))).streams == ["ofdir"]
    assert (await reader.stat("v", ())).streams == ["ofroot"]
    assert (await content(reader, "dir", stream="ofdir"))[0] == b"of dir"
    assert (await content(reader, stream="ofroot"))[0] == b"of root"


async def test_streams_of_what_a_link_leads_to(reader: Reader) -> None:
    assert (await content(reader, "junction", stream="ofdir"))[0] == b"of dir"
    with pytest.raises(errors.PathNotFound, match="'/relative' has no stream 'one'"):
        await content(reader, "relative", stream="one")


@pytest.mark.parametrize("stream", ["none", "ONE", "$DATA", "$I30", "one ", "n" * 900])
async def test_a_stream_that_is_not_there(reader: Reader, stream: str) -> None:
    with pytest.raises((errors.PathNotFound, errors.InvalidPath)):
        await content(reader, "plain", stream=stream)


@pytest.mark.parametrize(
    "path",
    [
        *("plain:one", "plain:", "plain::$DATA", "plain:$DATA", ":ofroot", "dir:ofdir", "dir:/inner", "plain:one/x"),
        *("tostream", "toalias", "dedup:kept", "efs:secret"),
    ],
)
async def test_no_path_is_a_back_door_to_a_stream(reader: Reader, path: str) -> None:
    parts = tuple(path.encode().split(b"/"))
    with pytest.raises(errors.PathNotFound):
        await reader.open("v", parts)
    with pytest.raises(errors.PathNotFound):
        await reader.list("v", parts, limit=10, cursor="")
    if ":" in path:  # else it is a link, which may be described
        with pytest.raises(errors.PathNotFound, match="option 'stream'"):
            await reader.stat("v", parts)


async def test_a_stream_larger_than_wanted_is_refused_and_not_for_the_files_size(reader: Reader) -> None:
    descriptor, _ = await reader.open("v", (b"plain",), stream=b"one", most=10)
    os.close(descriptor)
    for stream, most in ((b"one", 9), (b"", 4999)):
        with pytest.raises(errors.TooLarge):
            await reader.open("v", (b"plain",), stream=stream, most=most)


# --- links


@pytest.mark.parametrize(
    ("name", "target"),
    [("junction", "/dir"), ("relative", "dir/inner"), ("absolute", "/dir/inner"), ("todir", "dir")],
)
async def test_links_of_windows_are_links_within_the_volume(reader: Reader, name: str, target: str) -> None:
    info = await reader.stat("v", (name.encode(),))
    entry = (await listed(reader))[name]
    line = (await streamed(reader, Filters(kind="symlink", name=name)))[name]
    assert (info.kind, info.target, info.unreadable) == ("symlink", target, "")
    assert (entry.kind, entry.target, entry.extras) == ("symlink", target, {})
    assert (line["kind"], line["target"], line.get("unreadable")) == ("symlink", target, None)
    assert info.size == entry.size == line["size"] == len(target)


async def test_links_of_windows_lead_to_what_they_mean(reader: Reader) -> None:
    for path in (("junction", "inner"), ("relative",), ("absolute",), ("todir", "inner")):
        assert (await content(reader, *path))[0] == b"inner"
    assert set(await listed(reader, "junction")) == {"inner"}
    assert (await reader.stat("v", (b"junction", b"inner"))).size == 5


@pytest.mark.parametrize("name", ["elsewhere", "odd", "lost", "around"])
async def test_a_link_to_another_disk_or_to_nothing_stays_a_link(reader: Reader, name: str) -> None:
    assert (await reader.stat("v", (name.encode(),))).kind == (await listed(reader))[name].kind == "symlink"
    assert (await listed(reader))[name].target != f"unsupported reparse tag 0x{windows.SYMLINK:08x}"
    with pytest.raises(errors.PathNotFound):
        await content(reader, name)


# --- what cannot be read faithfully


@pytest.mark.parametrize(("name", "reason"), [(name, reason) for name, (_, reason) in TAGS.items()])
async def test_a_reparse_point_is_a_file_that_cannot_be_read(reader: Reader, name: str, reason: str) -> None:
    entry = (await listed(reader))[name]
    info = await reader.stat("v", (name.encode(),))
    line = (await streamed(reader, Filters(kind="file", name=name)))[name]
    assert (entry.kind, entry.size, entry.mode, entry.target) == ("file", 0, 0o444, "")
    assert (info.kind, info.size, info.mode, info.target, info.streams) == ("file", 0, 0o444, "", [])
    assert (line["kind"], line["size"], line["mode"]) == ("file", 0, 0o444)
    assert "target" not in line
    assert reason in info.unreadable
    assert entry.extras["unreadable"] == line["unreadable"] == info.unreadable
    for stream in ("", "kept"):
        with pytest.raises(errors.Unreadable) as refusal:
            await content(reader, name, stream=stream)
        assert refusal.value.message == f"'/{name}' is {info.unreadable}"
    assert name not in await streamed(reader, Filters(kind="symlink"))


async def test_what_lies_behind_a_reparse_point_is_not_missing_but_unreadable(reader: Reader) -> None:
    assert CLOUD in (await reader.stat("v", (b"OneDrive",))).unreadable
    for act in (
        content(reader, "OneDrive", "file"),
        content(reader, "todedup"),
        listed(reader, "OneDrive"),
        reader.stat("v", (b"OneDrive", b"file")),
        listed(reader, "dedup"),
    ):
        with pytest.raises(errors.Unreadable):
            await act


async def test_encrypted_files_are_found_in_listings_and_never_leave(reader: Reader) -> None:
    entries = await listed(reader)
    info = await reader.stat("v", (b"efs",))
    lines = await streamed(reader, Filters(recursive=True))
    assert entries["efs"].size == info.size == lines["efs"]["size"] == len(windows.SECTORS)
    assert EFS in info.unreadable
    assert entries["efs"].extras["unreadable"] == lines["efs"]["unreadable"] == info.unreadable
    for stream in ("", "secret"):
        with pytest.raises(errors.Unreadable, match="EFS"):
            await content(reader, "efs", stream=stream)


@pytest.mark.parametrize(
    ("name", "size"), [("like", 514), ("none", 0), ("extended", 100), ("offline", 100), ("plain", 5000)]
)
async def test_what_only_looks_unusual_is_readable(reader: Reader, name: str, size: int) -> None:
    """A size as those of encrypted files; an encrypted file without content; other attributes; streams."""
    entry = (await listed(reader))[name]
    assert (entry.kind, entry.size, entry.extras) == ("file", size, {})
    assert (await reader.stat("v", (name.encode(),))).unreadable == ""
    data, info = await content(reader, name)
    assert len(data) == info.size == size


async def test_a_file_that_is_half_encrypted_is_refused(reader: Reader) -> None:
    """The file has the flag and its data has not, or the other way round: ntfs-3g itself does not open it."""
    info = await reader.stat("v", (b"mixed",))
    assert "damaged" in info.unreadable
    assert (await listed(reader))["mixed"].extras.keys() == {"unreadable"}
    with pytest.raises(errors.Unreadable):
        await content(reader, "mixed")


async def test_a_placeholder_that_looks_like_a_file_is_refused(reader: Reader) -> None:
    """As with a plug-in that serves what is there of it."""
    assert CLOUD in (await reader.stat("v", (b"recalled",))).unreadable
    with pytest.raises(errors.Unreadable, match=CLOUD):
        await content(reader, "recalled")


async def test_streams_and_listings_agree_on_everything(reader: Reader) -> None:
    lines = await streamed(reader, Filters())
    for name, entry in (await listed(reader)).items():
        line = lines.pop(name)
        told = (entry.kind, entry.size, entry.mode, entry.mtime_ns, entry.extras.get("unreadable"))
        assert told == tuple(line.get(key) for key in ("kind", "size", "mode", "mtime_ns", "unreadable"))
        assert entry.target == line.get("target", "")
    assert not lines
