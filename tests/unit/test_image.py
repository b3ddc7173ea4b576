"""The chain walker against images whose bytes are written here, one refusal after the other. Needs no privilege."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import random
import re
import signal
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sendense_restored import errors, names
from sendense_restored.daemon.host import qcow2
from sendense_restored.daemon.host.image import Image, blockdev, changed, open_chain

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
BACKING_FORMAT = 0xE2792ACA
CLUSTER_BITS = 12
CLUSTER = 1 << CLUSTER_BITS
HEADER = ">4sIQIIQIIQQIIQ"
VERSION_3 = ">QQQII"


def describe(fd: int) -> qcow2.Header:
    return qcow2.read_header(fd, os.fstat(fd).st_size)


def qcow2_bytes(
    *,
    magic: bytes = b"QFI\xfb",
    version: int = 3,
    backing: bytes | None = None,
    backing_length: int | None = None,
    backing_at: int | None = None,
    backing_format: bytes | None = b"qcow2",
    extensions: bytes = b"",
    cluster_bits: int = CLUSTER_BITS,
    size: int = MIB,
    encryption: int = 0,
    l1_entries: int | None = None,
    l1_at: int | None = None,
    l1: bytes = b"",
    refcounts_at: int | None = None,
    refcount_clusters: int = 1,
    snapshots: int = 0,
    snapshots_at: int = 0,
    incompatible: int = 0,
    compatible: int = 0,
    autoclear: int = 0,
    refcount_order: int = 4,
    header_length: int = 112,
    compression: int = 0,
) -> bytes:
    """A QCOW2 image without data: header, refcount table, first-level table, one cluster each."""
    cluster = 1 << min(cluster_bits, 21)
    entry = 16 if incompatible & 16 else 8
    needed = -(-size // (cluster * (cluster // entry)))
    if backing is not None and backing_format is not None:
        padding = bytes(-len(backing_format) % 8)
        extensions += struct.pack(">II", BACKING_FORMAT, len(backing_format)) + backing_format + padding
    fields = struct.Struct(VERSION_3).pack(incompatible, compatible, autoclear, refcount_order, header_length)
    fields = (fields + bytes([compression])).ljust(header_length - 72, b"\0") if version >= 3 else b""
    name_at = 72 + len(fields) + len(extensions) + 8
    common = struct.pack(
        HEADER,
        magic,
        version,
        (name_at if backing_at is None else backing_at) if backing is not None else 0,
        len(backing or b"") if backing_length is None else backing_length,
        cluster_bits,
        size,
        encryption,
        needed if l1_entries is None else l1_entries,
        2 * cluster if l1_at is None else l1_at,
        cluster if refcounts_at is None else refcounts_at,
        refcount_clusters,
        snapshots,
        snapshots_at,
    )
    first = (common + fields + extensions + bytes(8) + (backing or b"")).ljust(cluster, b"\0")[:cluster]
    return first + bytes(cluster) + (l1 or bytes(needed * 8)).ljust(cluster, b"\0")


def open_descriptors() -> dict[str, str]:
    """Number and target of each; the one that the listing itself needs is gone before its target is asked for."""
    targets = {}
    for entry in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):
            targets[entry.name] = str(entry.readlink())
    return targets


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "vm1").mkdir(parents=True)
    return root


def put(repository: Path, name: str, **fields: Any) -> Path:  # noqa: ANN401 - those of qcow2_bytes
    path = repository / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(qcow2_bytes(**fields))
    return path


def refusal(
    repository: Path, top: str = "vm1/top", *, depth: int = 8, kind: type[errors.RestoreError] = errors.ImageRefused
) -> str:
    """The sentence with which a chain is refused; also checks what holds for every refusal."""
    with pytest.raises(errors.RestoreError) as caught:
        open_chain(repository, top, depth=depth)
    assert type(caught.value) is kind, caught.value
    sentence = caught.value.message
    assert str(repository.parent) not in sentence
    assert names.displayable(sentence) == sentence
    assert caught.value.__cause__ is None
    return sentence


# What is accepted


def test_a_chain_is_opened_top_first_base_last(repository: Path) -> None:
    put(repository, "vm1/full", size=MIB)
    put(repository, "vm1/inc1", size=2 * MIB, backing=b"full")
    put(repository, "vm1/inc2", size=4 * MIB, backing=b"inc1")
    with open_chain(repository, "vm1/inc2", depth=3) as chain:
        assert [Path(f"/proc/self/fd/{layer.fd}").readlink() for layer in chain.layers] == [
            repository / "vm1" / name for name in ("inc2", "inc1", "full")
        ]
        assert [layer.format for layer in chain.layers] == ["qcow2"] * 3
        assert chain.virtual_size == 4 * MIB
        assert not changed(chain)


@pytest.mark.parametrize("size", [MIB, 16 * MIB])
def test_the_size_of_the_disk_is_the_tops_whether_the_base_is_larger_or_smaller(repository: Path, size: int) -> None:
    put(repository, "vm1/full", size=size)
    put(repository, "vm1/top", size=4 * MIB, backing=b"full")
    with open_chain(repository, "vm1/top", depth=8) as chain:
        assert chain.virtual_size == 4 * MIB


def test_a_part_of_a_sector_at_the_end_is_no_part_of_the_disk(repository: Path) -> None:
    put(repository, "vm1/top", size=MIB + 511)
    with open_chain(repository, "vm1/top", depth=8) as chain:
        assert chain.virtual_size == MIB


def test_a_raw_base_is_taken_as_raw_even_if_it_looks_like_an_image(repository: Path) -> None:
    put(repository, "vm1/base", backing=b"/etc/shadow", backing_format=b"raw")
    put(repository, "vm1/top", backing=b"base", backing_format=b"raw")
    with open_chain(repository, "vm1/top", depth=2) as chain:
        assert [layer.format for layer in chain.layers] == ["qcow2", "raw"]


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 2, "backing_format": None},
        {"header_length": 104},
        {"incompatible": 1},  # dirty: reference counts are a writer's business
        {"incompatible": 8, "compression": 1},
        {"incompatible": 16, "cluster_bits": 14},
        {"compatible": 0xFFFF},
        {"autoclear": 1 << 40},
        {"cluster_bits": 9},
        {"cluster_bits": 21},
        {"refcount_order": 6},
        {"extensions": struct.pack(">II8s", 0x12345678, 5, b"unknown")},
        {"snapshots": 1, "snapshots_at": 2 * CLUSTER},
    ],
    ids=str,
)
def test_every_valid_kind_of_image_is_accepted(repository: Path, fields: dict[str, Any]) -> None:
    put(repository, "vm1/top", **fields)
    with open_chain(repository, "vm1/top", depth=1) as chain:
        assert chain.virtual_size == MIB


@pytest.mark.parametrize(
    ("top", "backing"),
    [
        ("{root}/day-2/disk", "{root}/day-1/disk"),
        ("//{root}/day-2/disk", "/{root}//./day-1/disk"),
        ("day-2/disk", "../day-1/disk"),
        ("day-2/../day-2/disk", "../day-2/./../day-1//disk"),
        ("day-2/disk", "link-to-day-1"),
        ("link", "day-1/disk"),
    ],
)
def test_names_that_stay_in_the_repository_are_followed(repository: Path, top: str, backing: str) -> None:
    base = put(repository, "day-1/disk")
    put(repository, "day-2/disk", backing=backing.format(root=repository).encode())
    (repository / "day-2/link-to-day-1").symlink_to("../day-1/disk")
    (repository / "link").symlink_to("day-2/disk")
    with open_chain(repository, top.format(root=repository), depth=2) as chain:
        assert chain.layers[1].identity[:2] == (base.stat().st_dev, base.stat().st_ino)


def test_an_absolute_name_may_spell_the_repository_as_configured_or_with_its_links_resolved(tmp_path: Path) -> None:
    real = tmp_path / "storage"
    put(real, "full")
    alias = tmp_path / "alias"
    alias.symlink_to(real)
    put(real, "inc1", backing=os.fsencode(real / "full"))
    put(real, "inc2", backing=os.fsencode(alias / "inc1"))
    with open_chain(alias, str(alias / "inc2"), depth=3) as chain:
        assert len(chain.layers) == 3


def test_parent_directories_in_names_do_not_add_up_along_a_chain(repository: Path) -> None:
    count = 100
    directories = [f"{'d' * 60}-{number}" for number in range(count)]
    put(repository, f"{directories[0]}/disk")
    for below, above in itertools.pairwise(directories):
        put(repository, f"{above}/disk", backing=f"../{below}/disk".encode())
    with open_chain(repository, f"{directories[-1]}/disk", depth=count) as chain:
        assert len(chain.layers) == count


def test_parent_directories_behind_a_link_are_resolved_as_the_kernel_does(repository: Path) -> None:
    base = put(repository, "far/away/base")
    (repository / "vm1/link").symlink_to("../far/away/deep")
    (repository / "far/away/deep").mkdir()
    put(repository, "vm1/top", backing=b"link/../middle")
    put(repository, "far/away/middle", backing=b"base")
    put(repository, "vm1/middle", backing=b"the one that a lexical reading would find")
    with open_chain(repository, "vm1/top", depth=3) as chain:
        assert chain.layers[-1].identity.inode == base.stat().st_ino


def test_a_name_that_is_not_utf8_is_a_name_like_any_other(repository: Path) -> None:
    Path(os.fsdecode(os.fsencode(repository / "vm1") + b"/b\xe4se")).write_bytes(qcow2_bytes())
    put(repository, "vm1/top", backing=b"b\xe4se")
    with open_chain(repository, "vm1/top", depth=2) as chain:
        assert len(chain.layers) == 2


def test_descriptors_are_close_on_exec_and_read_only(repository: Path) -> None:
    put(repository, "vm1/top")
    with open_chain(repository, "vm1/top", depth=1) as chain:
        fd = chain.layers[0].fd
        assert not os.get_inheritable(fd)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def test_closing_twice_closes_nothing_that_was_opened_in_between(repository: Path) -> None:
    put(repository, "vm1/top")
    chain = open_chain(repository, "vm1/top", depth=1)
    (layer,) = chain.layers
    chain.close()
    with (repository / "vm1/top").open("rb") as file:
        reused = os.dup2(file.fileno(), layer.fd)
    try:
        chain.close()
        os.fstat(reused)
    finally:
        os.close(reused)
    assert chain.layers == ()


# What the header says


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"magic": b"QFI\xfa"}, "is not a QCOW2 image"),
        ({"version": 1}, "version 1"),
        ({"version": 4}, "version 4"),
        ({"cluster_bits": 8}, "clusters cannot have 2^8 bytes"),
        ({"cluster_bits": 22}, "clusters cannot have 2^22 bytes"),
        ({"header_length": 96}, "header cannot have 96 bytes"),
        ({"header_length": 108}, "header cannot have 108 bytes"),
        ({"header_length": CLUSTER + 8}, f"header cannot have {CLUSTER + 8} bytes"),
        ({"refcount_order": 7}, "reference counts cannot have 2^7 bits"),
        ({"incompatible": 2}, "marked as corrupt"),
        ({"incompatible": 4}, "keeps its data in another file"),
        ({"autoclear": 2}, "keeps its data in another file"),
        ({"incompatible": 1 << 5}, "bits 0x20"),
        ({"incompatible": 1 << 63}, "bits 0x8000000000000000"),
        ({"encryption": 1}, "encrypted by QCOW2"),
        ({"encryption": 2}, "encrypted by QCOW2"),
        ({"incompatible": 8, "compression": 2}, "compression type 2"),
        ({"incompatible": 8, "compression": 0}, "compression type 0"),
        ({"incompatible": 0, "compression": 1}, "compression type 1"),
        ({"incompatible": 8, "header_length": 104}, "compression type 0"),
        ({"incompatible": 16, "cluster_bits": 13}, "cannot have extended entries"),
        ({"l1_entries": 0}, "first-level table is too short"),
        ({"size": 2**64 - 1, "l1_entries": 1, "l1": bytes(8)}, "first-level table is too short"),
        ({"l1_at": 1000 * CLUSTER}, "cut off before the end of its first-level table"),
        ({"l1_at": 2 * CLUSTER + 8}, "first-level table is too large or at an impossible place"),
        ({"l1_entries": 2**32 - 1}, "first-level table is too large"),
        ({"l1_at": 2**63 - CLUSTER}, "cut off before the end of its first-level table"),
        ({"l1_at": 2**64 - CLUSTER}, "first-level table is too large or at an impossible place"),
        ({"snapshots_at": 2**63}, "snapshot table is too large or at an impossible place"),
        ({"incompatible": 16, "cluster_bits": 14, "size": 32 * MIB, "l1_entries": 1}, "table is too short"),
        ({"refcount_clusters": 0}, "has no reference counts"),
        ({"refcounts_at": 1000 * CLUSTER}, "cut off before the end of its reference count table"),
        ({"refcounts_at": 1}, "reference count table is too large or at an impossible place"),
        ({"refcount_clusters": 2**32 - 1}, "reference count table is too large"),
        ({"snapshots": 2**32 - 1}, "snapshot table is too large"),
        ({"snapshots": 1000}, "cut off before the end of its snapshot table"),
        ({"l1": struct.pack(">Q", 1 << 63 | 1000 * CLUSTER)}, "cut off before the end of its mapping"),
        ({"l1": struct.pack(">Q", 3 * CLUSTER)}, "cut off before the end of its mapping"),
        ({"l1": struct.pack(">Q", 1 << 63 | 512)}, "second-level table is not at the start of a cluster"),
        ({"size": 0}, "disk of zero bytes"),
        ({"size": 511}, "disk of zero bytes"),
        ({"extensions": struct.pack(">II", 1, CLUSTER)}, "header extensions run into"),
        ({"extensions": struct.pack(">II", 1, 2**32 - 1)}, "header extensions run into"),
        ({"backing": b"x", "backing_at": 113}, "header extensions run into"),
        ({"backing": b"x", "backing_format": b"q" * 16}, "no format has a name as long"),
        ({"backing": b""}, "name is empty"),
        ({"backing": b"x" * 1024}, "longer than 1023 bytes"),
        ({"backing": b"x", "backing_length": 2**32 - 1}, "longer than 1023 bytes"),
        ({"backing": b"x", "backing_at": CLUSTER - 1, "backing_length": 2}, "not in its first cluster"),
        ({"backing": b"x", "backing_at": 2**64 - 1}, "not in its first cluster"),
        ({"backing": b"base\0/../../etc/shadow"}, "NUL"),
    ],
    ids=str,
)
def test_a_header_that_is_damaged_or_not_supported_is_refused(
    repository: Path, fields: dict[str, Any], expected: str
) -> None:
    top = put(repository, "vm1/top", **fields)
    sentence = refusal(repository)
    assert sentence.startswith("layer 1 of the chain (vm1/top) ")
    assert expected in sentence
    if "zero bytes" not in expected and "mapping" not in expected and "second-level" not in expected:
        with top.open("rb") as file, pytest.raises(qcow2.Qcow2Error, match=re.escape(expected)):
            describe(file.fileno())


@pytest.mark.parametrize("length", [0, 3, 4, 71, 72, 100, CLUSTER - 1])
def test_a_file_that_ends_in_its_header_is_refused(repository: Path, length: int) -> None:
    top = put(repository, "vm1/top")
    os.truncate(top, length)
    assert ("is not a QCOW2" if length < 4 else "cut off inside its header") in refusal(repository)


def test_the_name_of_a_format_that_is_not_read_is_shown_without_its_control_characters(repository: Path) -> None:
    put(repository, "vm1/base")
    put(repository, "vm1/top", backing=b"base", backing_format=b"vm\x1b[31mdk\xff")
    assert "of format 'vm\\x1b[31mdk\\xff'" in refusal(repository)


def test_a_backing_file_without_a_stated_format_is_refused(repository: Path) -> None:
    put(repository, "vm1/base")
    put(repository, "vm1/top", backing=b"base", backing_format=None)
    assert "does not say which format" in refusal(repository)


# Where a name leads


@pytest.mark.parametrize(
    "name", ["nbd://host/x", "nbd:host:10809", "json:{}", "file:base", "vvfat:/", "a b:c", ":base", "fat:rw:/etc"]
)
def test_a_backing_file_behind_a_protocol_is_refused(repository: Path, name: str) -> None:
    put(repository, "vm1/" + name.replace("/", "_"))
    put(repository, "vm1/top", backing=name.encode())
    assert "through a protocol" in refusal(repository)


@pytest.mark.parametrize(
    "name", ["/etc/shadow", "//etc/shadow", "{root}-other/base", "{root}/../outside", "../../outside", "/proc/1/mem"]
)
def test_a_backing_file_outside_the_repository_is_refused_and_not_named(repository: Path, name: str) -> None:
    put(repository.parent, "outside")
    put(Path(f"{repository}-other"), "base")
    put(repository, "vm1/top", backing=name.format(root=repository).encode(), backing_format=b"raw")
    sentence = refusal(repository)
    assert sentence.startswith("layer 1 of the chain (vm1/top) has a backing file outside the repository")
    assert "etc" not in sentence


@pytest.mark.parametrize("top", ["", "/etc/shadow", "vm1/top\0x", "{root}-other/base"])
def test_a_top_that_is_plainly_elsewhere_is_refused(repository: Path, top: str) -> None:
    put(repository, "vm1/top")
    assert "not inside its repository" in refusal(repository, top.format(root=repository))


@pytest.mark.parametrize("top", ["../outside", "{root}/../outside", "vm1/../../outside", "link-out", "absolute-link"])
def test_a_top_that_leads_out_is_refused(repository: Path, top: str) -> None:
    put(repository.parent, "outside")
    (repository / "link-out").symlink_to("../outside")
    (repository / "absolute-link").symlink_to(repository.parent / "outside")
    assert "leads out of its repository" in refusal(repository, top.format(root=repository))


@pytest.mark.parametrize("target", ["../../outside", "/etc/shadow", "{root}/vm1/inside", "/proc/self/fd/0"])
def test_a_link_out_of_the_repository_is_refused(repository: Path, target: str) -> None:
    """An absolute link is refused wherever it leads: the kernel cannot tell, and nothing needs one."""
    put(repository.parent, "outside")
    put(repository, "vm1/inside")
    (repository / "vm1/base").symlink_to(target.format(root=repository))
    put(repository, "vm1/top", backing=b"base")
    assert "behind a link that leads out" in refusal(repository)


def test_a_directory_that_is_a_link_out_is_refused(repository: Path) -> None:
    put(repository.parent, "elsewhere/base")
    (repository / "vm1/elsewhere").symlink_to("../../elsewhere")
    put(repository, "vm1/top", backing=b"elsewhere/base")
    assert "behind a link that leads out" in refusal(repository)


def test_links_in_a_circle_are_refused(repository: Path) -> None:
    (repository / "vm1/base").symlink_to("base")
    put(repository, "vm1/top", backing=b"base")
    assert "layer 2 of the chain (vm1/base) lies behind symbolic links" in refusal(repository)


def test_a_path_beyond_the_kernels_limit_is_refused(repository: Path) -> None:
    put(repository, "vm1/top", backing=b"x" * 1023)
    assert "too long" in refusal(repository)


def test_a_fifo_is_refused_at_once_and_gets_no_reader(repository: Path) -> None:
    os.mkfifo(repository / "vm1/base")
    put(repository, "vm1/top", backing=b"base", backing_format=b"raw")
    assert "layer 2 of the chain (vm1/base) is not a regular file" in refusal(repository)


def test_a_socket_is_refused(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository / "vm1")  # socket names are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("base")
        put(repository, "vm1/top", backing=b"base", backing_format=b"raw")
        assert "is not a regular file" in refusal(repository)


def test_a_directory_is_refused(repository: Path) -> None:
    put(repository, "vm1/top", backing=b"../vm1", backing_format=b"raw")
    assert "layer 2 of the chain (vm1) is not a regular file" in refusal(repository)


def test_a_chain_that_comes_back_to_itself_is_refused(repository: Path) -> None:
    put(repository, "vm1/a", backing=b"b")
    put(repository, "vm1/top", backing=b"a")
    os.link(repository / "vm1/top", repository / "vm1/b")  # under another name
    assert "layer 3 of the chain (vm1/b) is its own backing file" in refusal(repository)


def test_a_chain_may_be_as_deep_as_configured_and_no_deeper(repository: Path) -> None:
    put(repository, "vm1/0")
    for number in range(1, 4):
        put(repository, f"vm1/{number}", backing=str(number - 1).encode())
    open_chain(repository, "vm1/3", depth=4).close()
    assert "more than 3 layers" in refusal(repository, "vm1/3", depth=3)


def test_a_missing_top_means_that_the_repository_has_not_what_the_catalogue_has(repository: Path) -> None:
    put(repository, "vm1/other")
    sentence = refusal(repository, str(repository / "vm1/top"), kind=errors.BackupNotFound)
    assert "(vm1/top) is not in the repository any more" in sentence


@pytest.mark.parametrize("name", ["gone", "top/gone", "gone/../base"])
def test_a_missing_backing_file_breaks_the_chain(repository: Path, name: str) -> None:
    put(repository, "vm1/top", backing=name.encode())
    assert f"layer 2 of the chain (vm1/{name}) is missing" in refusal(repository)


def test_names_in_errors_are_escaped(repository: Path) -> None:
    put(repository, "vm1/top", backing=b"\x1b]0;evil\x07\xe2\x80\xae\xff")
    assert "layer 2 of the chain (vm1/\\x1b]0;evil\\x07\\u202e" in refusal(repository)


def test_an_empty_repository_is_taken_for_storage_that_is_not_mounted(tmp_path: Path) -> None:
    assert "is empty; check that its storage is mounted" in refusal(tmp_path, kind=errors.Unavailable)


def test_a_repository_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    assert "cannot be reached" in refusal(tmp_path / "gone", kind=errors.Unavailable)


def test_storage_that_fails_is_unavailable_and_not_the_images_fault(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(repository, "vm1/top")

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    assert "check the repository's storage" in refusal(repository, kind=errors.Unavailable)


# Somebody else at the same files


@contextlib.contextmanager
def locked(path: Path, kind: int, start: int, length: int = 1) -> Iterator[None]:
    """An open-file-description lock as QEMU takes it; such locks conflict within one process as well."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("@hhqqi0q", kind, os.SEEK_SET, start, length, 0))
        yield
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", ["vm1/top", "vm1/base"])
@pytest.mark.parametrize(
    ("kind", "byte"),
    [
        (fcntl.F_RDLCK, 101),  # writes
        (fcntl.F_RDLCK, 103),  # may resize
        (fcntl.F_RDLCK, 200),  # lets nobody read
        (fcntl.F_WRLCK, 0),  # some other program's exclusive lock
        (fcntl.F_WRLCK, 100_000),
    ],
)
def test_a_layer_that_is_being_written_is_not_ready(repository: Path, name: str, kind: int, byte: int) -> None:
    put(repository, "vm1/base")
    put(repository, "vm1/top", backing=b"base")
    with locked(repository / name, kind, byte):
        assert f"({name}) is being written by another program" in refusal(repository, kind=errors.BackupNotReady)
    open_chain(repository, "vm1/top", depth=2).close()


@pytest.mark.parametrize("byte", [0, 100, 102, 201, 203])
def test_readers_keep_nobody_out(repository: Path, byte: int) -> None:
    put(repository, "vm1/top")
    with locked(repository / "vm1/top", fcntl.F_RDLCK, byte):
        open_chain(repository, "vm1/top", depth=1).close()


def test_our_own_chain_does_not_keep_a_writer_out(repository: Path) -> None:
    put(repository, "vm1/top")
    with open_chain(repository, "vm1/top", depth=1), locked(repository / "vm1/top", fcntl.F_WRLCK, 0, 0):
        pass


def test_a_lease_on_an_image_means_not_ready(repository: Path) -> None:
    put(repository, "vm1/top")
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # how the kernel asks for the lease back
    fd = os.open(repository / "vm1/top", os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        assert "is held by another program" in refusal(repository, kind=errors.BackupNotReady)
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, before)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_on_the_file_system_qemu_is_told_not_to_take_any(
    repository: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    put(repository, "vm1/top")
    real = fcntl.fcntl

    def no_locks(fd: int, command: int, argument: int | bytes = 0) -> int | bytes:
        if command == fcntl.F_OFD_GETLK:
            raise OSError(number, os.strerror(number))
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    with open_chain(repository, "vm1/top", depth=1) as chain:
        assert chain.locking == "off"
        assert '"locking": "off"' in json.dumps(blockdev(chain))
        assert '"locking": "auto"' in json.dumps(blockdev(chain, locking="auto"))


def test_the_first_few_descriptors_are_no_layer_s(repository: Path) -> None:
    """Programs that inherit them take 3 for a socket (sd_listen_fds(3))."""
    put(repository, "vm1/top")
    with open_chain(repository, "vm1/top", depth=1) as chain:
        assert chain.layers[0].fd >= 10
        assert not os.get_inheritable(chain.layers[0].fd)


def test_a_file_swapped_after_the_check_does_not_matter(repository: Path) -> None:
    put(repository, "vm1/base", l1=bytes(7) + b"\0")
    put(repository, "vm1/top", backing=b"base")
    with open_chain(repository, "vm1/top", depth=2) as chain:
        checked = (repository / "vm1/base").read_bytes()
        (repository / "vm1/base").unlink()
        (repository / "vm1/base").symlink_to("/etc/shadow")
        assert os.pread(chain.layers[1].fd, len(checked), 0) == checked
        assert Path(f"/proc/self/fd/{chain.layers[1].fd}").read_bytes() == checked
        assert not changed(chain)


@pytest.mark.parametrize("name", ["vm1/top", "vm1/base"])
def test_a_layer_that_is_written_to_is_noticed(repository: Path, name: str) -> None:
    put(repository, "vm1/base")
    put(repository, "vm1/top", backing=b"base")
    with open_chain(repository, "vm1/top", depth=2) as chain:
        status = (repository / name).stat()
        (repository / name).write_bytes((repository / name).read_bytes())
        os.utime(repository / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert changed(chain)


def test_a_layer_that_grows_is_noticed(repository: Path) -> None:
    top = put(repository, "vm1/top")
    with open_chain(repository, "vm1/top", depth=1) as chain:
        status = top.stat()
        os.truncate(top, status.st_size + 1)
        os.utime(top, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert changed(chain)


# For the catalogue and for QEMU


def test_one_header_is_described_without_following_it(repository: Path) -> None:
    unknown = struct.pack(">II8s", 0x12345678, 5, b"other")
    path = put(
        *(repository, "x"),
        size=5 * MIB,
        backing=b"json:{\xff",
        backing_format=b"raw",
        incompatible=1,
        extensions=unknown,
    )
    with path.open("rb") as file:
        header = describe(file.fileno())
    assert (header.format, header.version, header.virtual_size) == ("qcow2", 3, 5 * MIB)
    assert header.backing is not None
    assert os.fsencode(header.backing) == b"json:{\xff"
    assert header.backing_format == "raw"
    assert header.incompatible == qcow2.Incompatible.DIRTY
    assert header.compression == "zlib"


def test_the_whole_chain_is_spelled_out_for_qemu(repository: Path) -> None:
    (repository / "vm1/base").write_bytes(b"")
    put(repository, "vm1/middle", backing=b"base", backing_format=b"raw")
    put(repository, "vm1/top", backing=b"middle")
    with open_chain(repository, "vm1/top", depth=3) as chain:

        def file(number: int) -> dict[str, object]:
            filename = f"/proc/self/fd/{chain.layers[number].fd}"
            return {"driver": "file", "filename": filename, "read-only": True, "locking": "auto"}

        base = {"driver": "raw", "read-only": True, "file": file(2)}
        middle = {"driver": "qcow2", "read-only": True, "file": file(1), "backing": base}
        assert blockdev(chain) == {"driver": "qcow2", "read-only": True, "file": file(0), "backing": middle}


def test_a_base_is_told_to_have_no_backing_file(repository: Path) -> None:
    put(repository, "vm1/top")
    with open_chain(repository, "vm1/top", depth=1) as chain:
        assert blockdev(chain)["backing"] is None


def test_long_chains_share_the_cache_of_thirty_two_layers(repository: Path) -> None:
    put(repository, "0")
    for number in range(1, 64):
        put(repository, str(number), backing=str(number - 1).encode())
    with open_chain(repository, "63", depth=64) as long, open_chain(repository, "31", depth=64) as short:
        assert blockdev(long)["l2-cache-size"] == 16 << 20
        assert "l2-cache-size" not in blockdev(short)


def test_a_closed_image_has_no_node(repository: Path) -> None:
    put(repository, "vm1/top")
    chain = open_chain(repository, "vm1/top", depth=1)
    chain.close()
    with pytest.raises(ValueError, match="closed"):
        blockdev(chain)


# Whatever the bytes are


def _opens_or_refuses(repository: Path) -> None:
    before = open_descriptors()
    with contextlib.suppress(errors.RestoreError):
        chain = open_chain(repository, "top", depth=4)
        assert isinstance(chain, Image)
        assert chain.layers
        assert chain.virtual_size > 0
        json.dumps(blockdev(chain))
        chain.close()
    assert open_descriptors() == before


_NUMBERS = st.one_of(
    st.integers(0, 2**64 - 1), st.integers(0, 64), st.sampled_from([2**31, 2**32 - 1, 2**63, 2**64 - 1, CLUSTER])
)
_WORDS = st.tuples(st.integers(0, 60), st.sampled_from([1, 4, 8]), _NUMBERS)


@settings(max_examples=300, deadline=None, database=None)
@given(writes=st.lists(_WORDS, min_size=1, max_size=6), seed=st.integers(0, 2**32))
def test_any_damage_to_a_header_ends_in_an_image_or_in_an_error_of_the_list(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, int, int]], seed: int
) -> None:
    repository = tmp_path_factory.getbasetemp() / "mutated"
    put(repository, "base")
    put(repository, "middle", backing=b"base")
    content = bytearray(qcow2_bytes(backing=b"middle", extensions=struct.pack(">II8s", 7, 5, b"unknown")))
    for word, width, value in writes:
        content[4 * word : 4 * word + width] = (value % (1 << 8 * width)).to_bytes(width, "big")
    noise = random.Random(seed)
    if seed % 3 == 0:
        content = content[: noise.randrange(len(content))]
    (repository / "top").write_bytes(content)
    _opens_or_refuses(repository)


@settings(max_examples=200, deadline=None, database=None)
@given(name=st.binary(max_size=40) | st.text("./ab:\0\n\u202e", max_size=20).map(str.encode))
def test_any_backing_name_ends_in_an_image_or_in_an_error_of_the_list(
    tmp_path_factory: pytest.TempPathFactory, name: bytes
) -> None:
    repository = tmp_path_factory.getbasetemp() / "named"
    put(repository, "a/b")
    put(repository, "b")
    put(repository, "top", backing=name)
    _opens_or_refuses(repository)
