"""What is on a block device, and why something cannot be opened.

``sfdisk`` reads the partition table and ``blkid`` the signatures, both as children with a uid of their own and
nothing else; the daemon parses only what they print, and does not trust that either. Nothing here changes anything
or holds a resource beyond its call: the node belongs to the caller, the children end within it.

A disk can look like several things at once; what counts is decided so:

- The two tools disagree on boot sectors: those of FAT, exFAT and NTFS end in the same two bytes as an MBR, and sfdisk
  then shows boot code as partitions. blkid knows better: where it finds a file system, a RAID member or an encrypted
  container and no table, the whole disk is that one volume, named ``disk``.
- Where it finds both, the table counts if anything is found in it (the other is what an earlier use left behind),
  except with an optical file system: the table of a hybrid image describes parts of that very file system.
- A disk whose signatures contradict each other (blkid calls it ambivalent) is opened by its table, if it has one.

Every entry of a table is listed, with a reason if it cannot be opened, except those that only frame others: extended
partitions of an MBR, and the whole-disk entries of BSD, SGI and Sun labels.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from .process import Jail, ToolError, internal
from .signatures import RESTORE_DISK, Signature, VolumeState, classify, parse_signature

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sendense_restored.config import Config

    from .process import Tools

__all__ = ["Volume", "VolumeState", "discover"]

log = logging.getLogger(__name__)

REQUIRED_TOOLS: Final = {"sfdisk": "fdisk", "blkid": "util-linux"}
MOST_VOLUMES = 256
"""Volumes of one disk beyond this number are left out; Windows and sfdisk write at most 128 entries."""

_PARALLEL = 4
_MEMORY = 64 << 20
# A GPT may claim sectors up to 2**64 - 1; beyond this, the answer would fit into no 64-bit number of bytes.
_MOST_BYTES = 2**63 - 1


@dataclass(frozen=True)
class Volume:
    """One volume of a disk."""

    name: str
    """Its name in guest paths: ``partition-N``, ``disk``, ``disk-D-partition-N`` or ``disk-D``."""
    number: int
    """Its number in the partition table; 0 is the whole disk."""
    start: int
    """Where it begins on the disk, in bytes."""
    size: int
    """Bytes, as the partition table has it."""
    filesystem: str
    """What blkid calls it; empty if it found nothing."""
    label: str
    uuid: str
    state: VolumeState
    reason: str
    """A sentence an operator can act on; empty if the volume is mountable or mounted."""


# Entries that frame others, by label: extended partitions; volume header and volume of SGI; whole disk of Sun; raw
# slices of BSD.
_FRAMES = {"dos": {"5", "f", "85"}, "sgi": {"0", "6"}, "sun": {"5"}, "bsd": {"0"}}
_LABELS_THAT_OVERLAP = frozenset({"sgi", "sun", "bsd"})
_OPTICAL = frozenset({"iso9660", "udf"})


# --- what the tools said --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Partition:
    """One entry of a partition table, in bytes; ``type`` is a GUID in capitals (GPT) or lower-case hex digits."""

    number: int
    start: int
    size: int
    type: str

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class _Table:
    label: str = ""
    """``gpt``, ``dos``, ``bsd``, ``sgi``, ``sun``, or empty: none."""
    partitions: tuple[_Partition, ...] = field(default=())


def parse_table(output: bytes, node: str) -> _Table:
    """Read the output of ``sfdisk --json NODE``.

    Raises ValueError if it is not what sfdisk writes.
    """
    try:
        # The names in a GPT are the guest's; nothing here uses them.
        table = json.loads(output.decode(errors="replace"), strict=False)["partitiontable"]
        sector, label = _natural(table["sectorsize"]), str(table["label"])
        partitions = tuple(
            _Partition(
                number=_number(str(entry["node"]), node),
                start=min(_natural(entry["start"]) * sector, _MOST_BYTES),
                size=min(_natural(entry["size"]) * sector, _MOST_BYTES),
                type=str(entry["type"]),
            )
            for entry in table.get("partitions", ())
        )
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a partition table: {error!r}") from error
    if len({partition.number for partition in partitions}) != len(partitions):
        raise ValueError("a partition number occurs twice")
    return _Table(label, tuple(sorted(partitions, key=lambda partition: partition.number)))


def _natural(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"{value!r} is no sector number")


def _number(partition: str, disk: str) -> int:
    # libfdisk forms the name of a partition from that of its disk: /dev/sda1, /dev/loop0p1, /dev/disk/by-id/x-part1.
    match = re.fullmatch(r"(?:p|-part)?([1-9]\d{0,4})", partition.removeprefix(disk))
    if match is None:
        raise ValueError(f"{partition!r} is no partition of {disk!r}")
    return int(match[1])


# --- running them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prober:
    """Runs the two tools on one node."""

    tools: Tools
    node: Path
    uid: int
    seconds: float
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_PARALLEL))

    def _jail(self) -> Jail:
        return Jail(uid=self.uid, memory=_MEMORY, cpu=10, files=64)

    async def table(self) -> _Table:
        """The partition table. Raises errors.Failed if the device cannot be read."""
        try:
            done = await self.tools.run(self._jail(), "sfdisk", "--json", str(self.node), seconds=self.seconds)
            return parse_table(done.stdout, str(self.node))
        except ToolError as error:
            if error.returncode == 1 and "does not contain a recognized partition table" in error.stderr:
                return _Table()
            raise internal("reading the partition table", error) from error
        except ValueError as error:
            raise internal("reading the partition table", error) from error

    async def signature(self, start: int, size: int) -> Signature:
        """What lies in ``size`` bytes from ``start``. Never raises: one bad volume does not hide the others."""
        where = ("-O", str(start), "-S", str(size))
        async with self._slots:
            try:
                # 2: nothing found, or not readable; 8: several things found.
                done = await self.tools.run(
                    self._jail(),
                    "blkid", "-p", "-o", "udev", *where, str(self.node),
                    seconds=self.seconds,
                    accept=(0, 2, 8),
                )  # fmt: skip
            except ToolError as error:
                log.warning("not examining bytes %d+%d: %s", start, size, error)
                if error.returncode is None:
                    return Signature(failure=f"it could not be examined in time; {RESTORE_DISK}")
                return Signature(failure=f"the program that examines it failed on its content; {RESTORE_DISK}")
        if done.returncode == 2 and done.stderr:
            log.warning("not examining bytes %d+%d: %s", start, size, done.stderr)
            return Signature(failure="it could not be read; check that the backup is complete")
        return parse_signature(done.stdout)


async def discover(tools: Tools, config: Config, node: Path, size: int, *, prefix: str) -> tuple[Volume, ...]:
    """The volumes of the disk ``node`` of ``size`` bytes, in the order of its table; at least one.

    ``node`` is a block special file (or an image file) that ``config.attach.probe_uid`` may read. Their names begin
    with ``prefix`` (``disk-D``) if that is not empty. Raises errors.Failed if the device cannot be read.
    """
    prober = _Prober(tools, node, config.attach.probe_uid, config.attach.timeout)
    # gather waits for both even if one fails: the caller takes the node away next.
    table, whole = await asyncio.gather(prober.table(), prober.signature(0, size), return_exceptions=True)
    if isinstance(table, BaseException):
        raise table
    if isinstance(whole, BaseException):
        raise whole
    if not _table_counts(table, whole):
        return (_whole_disk(whole, table, size, prefix),)
    partitions = [entry for entry in table.partitions if entry.type not in _FRAMES.get(table.label, ())]
    if len(partitions) > MOST_VOLUMES:
        log.warning("%d partitions; only the first %d are examined", len(partitions), MOST_VOLUMES)
        partitions = partitions[:MOST_VOLUMES]
    async with asyncio.TaskGroup() as group:
        examined = [
            group.create_task(_examine(prober, entry, _misplaced(entry, partitions, table.label, size), prefix))
            for entry in partitions
        ]
    volumes = tuple(task.result() for task in examined)
    if whole.type and not any(volume.filesystem for volume in volumes):
        return (_whole_disk(whole, table, size, prefix),)
    return volumes


def _table_counts(table: _Table, whole: Signature) -> bool:
    frames = _FRAMES.get(table.label, set())
    if not any(entry.type not in frames for entry in table.partitions):
        return False
    if not whole.type:
        return True
    return bool(whole.table) and whole.type not in _OPTICAL


def _whole_disk(whole: Signature, table: _Table, size: int, prefix: str) -> Volume:
    volume = Volume(
        name=prefix or "disk",
        number=0,
        start=0,
        size=size,
        filesystem=whole.type,
        label=whole.label,
        uuid=whole.uuid,
        state=VolumeState.EMPTY,
        reason="",
    )
    if not whole.type and not whole.ambivalent and not whole.failure and (label := table.label or whole.table):
        if table.label:
            return replace(volume, reason=f"a partition table ({label}) without partitions: the disk holds no files")
        reason = f"a partition table of type {label}, which this version does not read; {RESTORE_DISK}"
        return replace(volume, state=VolumeState.UNSUPPORTED, reason=reason)
    state, reason = classify(whole, "")
    return replace(volume, state=state, reason=reason)


def _misplaced(entry: _Partition, others: Sequence[_Partition], label: str, disk: int) -> str:
    """Why the place that the table gives to ``entry`` cannot be right; empty if it can."""
    if entry.size == 0:
        return "the partition table gives it no size; the table is damaged"
    if entry.end > disk:
        return (
            f"it ends {entry.end - disk} bytes beyond the end of the disk: the disk was cut short or its partition "
            "table is damaged"
        )
    if label not in _LABELS_THAT_OVERLAP:
        for other in others:
            if other is not entry and other.start < entry.end and entry.start < other.end:
                return f"it overlaps partition {other.number}, so the partition table is damaged; {RESTORE_DISK}"
    return ""


async def _examine(prober: _Prober, entry: _Partition, misplaced: str, prefix: str) -> Volume:
    signature = Signature(failure=misplaced) if misplaced else await prober.signature(entry.start, entry.size)
    state, reason = classify(signature, entry.type)
    return Volume(
        name=f"{prefix}-partition-{entry.number}" if prefix else f"partition-{entry.number}",
        number=entry.number,
        start=entry.start,
        size=entry.size,
        filesystem=signature.type,
        label=signature.label,
        uuid=signature.uuid,
        state=state,
        reason=reason,
    )
