"""The chain walker against QEMU itself: images that it made, locks that it holds, and data that it reads back.

Every QEMU here ends with its test; those that hold an image open are told to by a command and answer it, so nothing
waits for time to pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from sendense_restored import errors
from sendense_restored.daemon.host import qcow2
from sendense_restored.daemon.host.image import Image, blockdev, changed, open_chain

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


def describe(fd: int) -> qcow2.Header:
    return qcow2.read_header(fd, os.fstat(fd).st_size)


KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB
SERVER_UID = 60900
AS_SERVER = (
    *("setpriv", f"--reuid={SERVER_UID}", f"--regid={SERVER_UID}", "--clear-groups", "--no-new-privs"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
    *("--bounding-set=-all,+dac_read_search", "--"),
)


def run(*argv: str | Path, fds: Sequence[int] = ()) -> str:
    done = subprocess.run(
        [*map(str, argv)], capture_output=True, text=True, check=False, timeout=60, pass_fds=tuple(fds)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def create(
    path: Path,
    size: int = SIZE,
    *,
    base: Path | None = None,
    base_format: str = "qcow2",
    options: Mapping[str, str] | None = None,
) -> Path:
    arguments: list[str] = []
    if base is not None:
        # Unsafe (-u): QEMU need not open the base to make an increment, and a deep chain is quick.
        arguments += ["-u", "-F", base_format, "-b", os.path.relpath(base, path.parent)]
    for name, value in (options or {}).items():
        arguments += ["-o", f"{name}={value}"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *arguments, path, str(size))
    return path


def io(path: Path, *commands: str) -> None:
    out = run("qemu-io", "-f", "qcow2", path, *(word for command in commands for word in ("-c", command)))
    assert "failed" not in out, out


def content(image: Image, where: Path, *, size: int = SIZE, prefix: Sequence[str] = ()) -> bytes:
    """What QEMU reads from the chain that ``blockdev`` spells out."""
    node = json.dumps(blockdev(image))
    where.write_bytes(b"")
    where.chmod(0o666)
    fds = [layer.fd for layer in image.layers]
    run(
        *prefix,
        "qemu-img",
        "dd",
        "-O",
        "raw",
        "bs=1M",
        f"count={size // MIB}",
        f"if=json:{node}",
        f"of={where}",
        fds=fds,
    )
    return where.read_bytes()


@contextlib.contextmanager
def held_by_qemu(path: Path, *options: str, command: str = "length", answer: str = "MiB") -> Iterator[None]:
    """A QEMU that has ``path`` open with the rights of ``options``, and has done ``command``; killed at the end."""
    with subprocess.Popen(
        ["qemu-io", *options, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
    ) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        try:
            qemu.stdin.write(command + "\n")
            assert answer in qemu.stdout.readline()
            yield
        finally:
            qemu.kill()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    root.mkdir()
    return root


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.raw"


def make_chain(repository: Path, options: Mapping[str, str] | None = None) -> tuple[Path, bytes]:
    """A raw base, a full image and two increments, and what the disk then holds."""
    disk = bytearray(random.Random(7).randbytes(SIZE))
    (repository / "base.raw").write_bytes(disk)
    layers = [
        create(repository / "full.qcow2", base=repository / "base.raw", base_format="raw", options=options),
        create(repository / "inc1.qcow2", base=repository / "full.qcow2", options=options),
        create(repository / "inc2.qcow2", base=repository / "inc1.qcow2", options=options),
    ]
    for number, path in enumerate(layers):
        at, pattern = number * MIB // 2 + 128 * KIB, 0x11 * (number + 1)
        io(path, f"write -q -P {pattern:#x} {at} {MIB}", f"write -q -z {at + MIB} {128 * KIB}")
        disk[at : at + MIB] = bytes([pattern]) * MIB
        disk[at + MIB : at + MIB + 128 * KIB] = bytes(128 * KIB)
    return layers[-1], bytes(disk)


KINDS: list[dict[str, str]] = [
    {},
    {"compat": "0.10"},
    {"cluster_size": "512"},
    {"cluster_size": "2M"},
    {"extended_l2": "on", "cluster_size": "128k"},
    {"compression_type": "zstd"},
    {"lazy_refcounts": "on"},
    {"refcount_bits": "1"},
    {"refcount_bits": "64"},
    {"preallocation": "metadata"},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_chain_reads_back_as_it_was_written(repository: Path, out: Path, options: dict[str, str]) -> None:
    if "preallocation" in options:  # which QEMU refuses above a base
        path = create(repository / "inc2.qcow2", options=options)
        io(path, f"write -q -P 0x77 {MIB} {MIB}")
        expected = bytes(MIB) + b"\x77" * MIB + bytes(2 * MIB)
    else:
        path, expected = make_chain(repository, options)
    with open_chain(repository, str(path), depth=8) as image:
        assert image.virtual_size == SIZE
        assert content(image, out) == expected
        assert not changed(image)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed_clusters_read_back(repository: Path, out: Path, compression: str) -> None:
    expected = bytes(i % 251 for i in range(MIB)) * (SIZE // MIB)
    source = repository / "source.raw"
    source.write_bytes(expected)
    path = repository / "full.qcow2"
    run(
        "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={compression}", source, path
    )
    assert path.stat().st_size < MIB
    increment = create(repository / "inc.qcow2", base=path, options={"compression_type": compression})
    io(increment, f"write -q -c -P 0x5a 0 {64 * KIB}")
    with open_chain(repository, "inc.qcow2", depth=2) as image:
        assert content(image, out) == b"\x5a" * 64 * KIB + expected[64 * KIB :]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_header_is_read_as_qemu_reads_it(repository: Path, options: dict[str, str]) -> None:
    base = create(repository / "base")
    backing = None if "preallocation" in options else base
    path = create(repository / "image", 3 * MIB + 512, base=backing, options=options)
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    with path.open("rb") as file:
        header = describe(file.fileno())
    assert header.format == info["format"]
    assert header.virtual_size == info["virtual-size"]
    assert header.backing == info.get("backing-filename")
    assert header.backing_format == info.get("backing-filename-format")
    assert header.cluster_size == info["cluster-size"]
    details = info["format-specific"]["data"]
    assert header.version == (2 if details["compat"] == "0.10" else 3)
    assert header.compression == details.get("compression-type", "zlib")


@pytest.mark.parametrize("base_size", [MIB, 8 * MIB], ids=["smaller", "larger"])
def test_a_base_of_another_size_is_cut_or_filled_with_zeros(repository: Path, out: Path, base_size: int) -> None:
    (repository / "base.raw").write_bytes(b"\x42" * base_size)
    create(repository / "top", base=repository / "base.raw", base_format="raw")
    with open_chain(repository, "top", depth=2) as image:
        assert image.virtual_size == SIZE
        assert content(image, out) == (b"\x42" * base_size).ljust(SIZE, b"\0")[:SIZE]


def test_snapshots_and_bitmaps_are_no_hindrance(repository: Path, out: Path) -> None:
    path = create(repository / "top")
    io(path, f"write -q -P 0x21 0 {MIB}")
    run("qemu-img", "snapshot", "-c", "before", path)
    run("qemu-img", "bitmap", "--add", path, "changes")
    io(path, f"write -q -P 0x22 0 {MIB}")
    with open_chain(repository, "top", depth=1) as image:
        assert content(image, out)[:MIB] == b"\x22" * MIB


def test_an_image_whose_writer_was_killed_is_readable(repository: Path, out: Path) -> None:
    path = create(repository / "top", options={"lazy_refcounts": "on"})
    written = {"command": f"write -P 0x33 0 {MIB}", "answer": f"wrote {MIB}/{MIB} bytes"}
    with held_by_qemu(path, "-f", "qcow2", "-t", "writethrough", **written):
        pass
    with path.open("rb") as file:
        assert describe(file.fileno()).incompatible.name == "DIRTY"
    with open_chain(repository, "top", depth=1) as image:
        assert content(image, out)[:MIB] == b"\x33" * MIB


def test_an_image_that_was_made_a_base_is_one(repository: Path) -> None:
    base = create(repository / "base")
    path = create(repository / "top", base=base)
    run("qemu-img", "rebase", "-u", "-b", "", path)
    with open_chain(repository, "top", depth=1) as image:
        assert len(image.layers) == 1


# What a header may not do


def hostile(repository: Path, secret: Path) -> Path:
    path = create(repository / "base")
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", secret, path)
    return path


def test_a_header_that_names_a_file_of_the_host_is_refused_by_us_and_followed_by_qemu(
    repository: Path, tmp_path: Path, out: Path
) -> None:
    secret = tmp_path / "shadow"
    secret.write_bytes(b"root:secret!".ljust(SIZE, b"\n"))
    path = hostile(repository, secret)
    create(repository / "top", base=path)
    with pytest.raises(errors.ImageRefused, match=r"layer 2 .* has a backing file outside the repository"):
        open_chain(repository, "top", depth=8)
    run("qemu-img", "dd", "-f", "qcow2", "-O", "raw", "bs=1M", "count=1", f"if={path}", f"of={out}")
    assert out.read_bytes().startswith(b"root:secret!")  # this is what is at stake


def test_qemu_does_not_follow_a_header_when_the_chain_is_spelled_out(
    repository: Path, tmp_path: Path, out: Path
) -> None:
    """Were the walker ever wrong, the spelled-out chain would still end where it says."""
    secret = tmp_path / "shadow"
    secret.write_bytes(b"root:secret!".ljust(SIZE, b"\n"))
    path = create(repository / "base")
    create(repository / "top", base=path)
    with open_chain(repository, "top", depth=8) as image:
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", secret, path)
        assert changed(image)
        assert content(image, out) == bytes(SIZE)


def test_files_swapped_after_the_check_are_not_read(repository: Path, tmp_path: Path, out: Path) -> None:
    path, expected = make_chain(repository)
    secret = tmp_path / "secret"
    secret.write_bytes(b"\xee" * SIZE)
    with open_chain(repository, str(path), depth=8) as image:
        (repository / "base.raw").rename(tmp_path / "base.raw")
        (repository / "base.raw").symlink_to(secret)
        (repository / "full.qcow2").unlink()
        create(repository / "full.qcow2", base=secret, base_format="raw")
        assert content(image, out) == expected


def test_an_external_data_file_is_refused(repository: Path) -> None:
    create(repository / "top", options={"data_file": str(repository / "data")})
    with pytest.raises(errors.ImageRefused, match="keeps its data in another file"):
        open_chain(repository, "top", depth=1)


def test_an_encrypted_image_is_refused(repository: Path) -> None:
    path = create(repository / "top")
    with path.open("r+b") as file:  # as qemu-img writes it, which it cannot always: it measures the processor first
        file.seek(32)
        file.write(struct.pack(">I", 2))  # crypt_method: LUKS
    assert subprocess.run(["qemu-img", "check", path], capture_output=True, check=False).returncode != 0
    with pytest.raises(errors.ImageRefused, match="is encrypted"):
        open_chain(repository, "top", depth=1)


def test_an_image_that_qemu_marked_corrupt_is_refused(repository: Path) -> None:
    path = create(repository / "top")
    io(path, "write -q 0 64k")
    with path.open("r+b") as file:  # point the mapping into the header; QEMU notices on the next write
        file.seek(struct.unpack(">Q", file.read(48)[40:])[0])
        l2 = struct.unpack(">Q", file.read(8))[0] & ~(1 << 63)
        file.seek(l2)
        file.write(struct.pack(">Q", 1 << 63))
        file.seek(l2 + 8)
        file.write(struct.pack(">Q", 1 << 63 | 0x10000))
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 64k 64k", str(path)], capture_output=True, check=False)
    with pytest.raises(errors.ImageRefused, match="marked as corrupt"):
        open_chain(repository, "top", depth=1)


def test_a_copy_that_broke_off_is_refused_where_qemu_would_show_zeros(repository: Path, out: Path) -> None:
    path = create(repository / "top", SIZE)
    io(path, f"write -q -P 0x44 0 {SIZE}")
    with path.open("rb") as file:
        header = describe(file.fileno())
    os.truncate(path, header.l1_offset + 8 * header.l1_entries)
    run("qemu-img", "dd", "-f", "qcow2", "-O", "raw", "bs=1M", "count=4", f"if={path}", f"of={out}")
    assert out.read_bytes() == bytes(SIZE)
    with pytest.raises(errors.ImageRefused, match="cut off before the end of its mapping"):
        open_chain(repository, "top", depth=1)


# Other programs at the same images


@pytest.mark.parametrize("written", ["top", "base", "raw"])
def test_a_layer_that_qemu_writes_to_is_not_ready_until_it_is_done(repository: Path, written: str) -> None:
    (repository / "raw").write_bytes(bytes(SIZE))
    create(repository / "base", base=repository / "raw", base_format="raw")
    create(repository / "top", base=repository / "base")
    sentence = rf"\({written}\) is being written by another program"
    writer = held_by_qemu(repository / written, "-f", "raw" if written == "raw" else "qcow2")
    with writer, pytest.raises(errors.BackupNotReady, match=sentence):
        open_chain(repository, "top", depth=3)
    open_chain(repository, "top", depth=3).close()


def test_a_qemu_that_reads_is_no_hindrance(repository: Path) -> None:
    path, _ = make_chain(repository)
    with held_by_qemu(path, "-r", "-f", "qcow2"):
        open_chain(repository, str(path), depth=8).close()


def test_the_next_increment_can_be_written_above_a_chain_that_is_held(repository: Path, out: Path) -> None:
    path, expected = make_chain(repository)
    above = create(repository / "inc3", base=path)
    with open_chain(repository, str(path), depth=8) as image, held_by_qemu(above, "-f", "qcow2"):
        open_chain(repository, str(path), depth=8).close()
        assert content(image, out) == expected


def test_descriptors_alone_keep_no_writer_out(repository: Path) -> None:
    path, _ = make_chain(repository)
    with open_chain(repository, str(path), depth=8) as image:
        io(path, "write -q -P 0x99 0 64k")
        assert changed(image)


# As the daemon uses it


def test_a_server_without_privilege_reopens_the_descriptors_of_files_that_only_root_may_read(
    repository: Path, out: Path
) -> None:
    path, expected = make_chain(repository)
    for file in repository.iterdir():
        file.chmod(0o600)
    repository.chmod(0o700)
    with open_chain(repository, str(path), depth=8) as image:
        assert content(image, out, prefix=AS_SERVER) == expected


def test_what_an_overlay_takes_leaves_the_chain_as_it_was(repository: Path, tmp_path: Path) -> None:
    path, expected = make_chain(repository)
    before = {file.name: hashlib.sha256(file.read_bytes()).digest() for file in repository.iterdir()}
    overlay = create(tmp_path / "overlay", options={"extended_l2": "on", "cluster_size": "128k"})
    with open_chain(repository, str(path), depth=8) as image, overlay.open("r+b") as file:
        node = {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": f"/proc/self/fd/{file.fileno()}"},
            "backing": blockdev(image),
        }
        out = run(
            *("qemu-io", "-c", "write -P 0xab 0 4k", "-c", "read -P 0xab 0 4k"),
            *("-c", f"read -P {expected[256 * KIB]:#x} 256k 4k", f"json:{json.dumps(node)}"),
            fds=(file.fileno(), *(layer.fd for layer in image.layers)),
        )
        assert "failed" not in out, out
        assert not changed(image)
    assert {file.name: hashlib.sha256(file.read_bytes()).digest() for file in repository.iterdir()} == before


def test_the_deepest_chain_of_the_largest_disks_fits_in_the_servers_memory(repository: Path) -> None:
    """128 layers of 3 TiB: with QEMU's own cache sizes this needs more than 4 GiB of address space."""
    size, depth = 3 << 40, 128
    template = create(repository / "0", size)
    io(template, "write -q -P 0x66 1T 64k")
    above = create(repository / "1", size, base=template).read_bytes()
    for number in range(2, depth + 2):  # what qemu-img would write: only the name differs
        name_at = struct.unpack(">Q", above[8:16])[0]
        name = str(number - 1).encode()
        (repository / str(number)).write_bytes(
            above[:16] + struct.pack(">I", len(name)) + above[20:name_at] + name + above[name_at + len(name) :]
        )
    with pytest.raises(errors.ImageRefused, match="more than 128 layers"):
        open_chain(repository, str(depth + 1), depth=depth)
    with open_chain(repository, str(depth - 1), depth=depth) as image:
        assert len(image.layers) == depth
        out = run(
            *("prlimit", f"--data={2 << 30}", "--", "qemu-io", "-r", "-c", "read -P 0x66 1T 64k"),
            f"json:{json.dumps(blockdev(image))}",
            fds=[layer.fd for layer in image.layers],
        )
        assert "failed" not in out, out


def test_a_device_is_refused_without_being_opened(repository: Path) -> None:
    node = repository / "base"
    os.mknod(node, 0o600 | 0o020000, os.makedev(240, 77))  # no driver: opening it would give ENXIO
    create(repository / "top", base=node, base_format="raw")
    with pytest.raises(errors.ImageRefused, match=r"layer 2 .* is not a regular file"):
        open_chain(repository, "top", depth=2)
