"""The daemon's configuration: frozen, strict, read at start and again on a reload.

The file is TOML (``/etc/sendense/restored.toml``); a missing file means the defaults, an unknown key or a value out
of range refuses to start. Durations are a number of seconds or text such as ``90s``, ``15min``, ``1h``; sizes a
number of bytes or text such as ``1GiB``, or ``unlimited`` where there need be no limit.

A reload takes over the keys in ``RELOADABLE``; what the rest says shapes things that stand already, and waits for the
next start.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import database_url

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from .database_url import DatabaseUrl

DEFAULT_FILE = Path("/etc/sendense/restored.toml")


SHORTEST_IDLE_TIMEOUT = 60.0
"""Seconds; a claim with a shorter one would expire between two clicks of its user."""


class ConfigError(Exception):
    """The configuration cannot be used; the message names file, key and remedy."""


@dataclass(frozen=True)
class Mounts:
    """Section ``[mounts]``."""

    directory: Path = Path("/mnt/sendense/restore")
    max: int = 8
    """How many mounts may exist at once."""
    max_per_holder: int = 0
    """How many of them one holder may have a claim on, see ``lease``; 0 for no limit of its own."""
    idle_timeout: float = 3600.0
    """Seconds without use after which a claim expires, for those who do not ask for another time."""
    max_idle_timeout: float = 86400.0
    """The longest such time that anybody may ask for."""
    max_lifetime: float = 86400.0
    """Seconds after which a mount is closed whoever uses it."""
    sweep_interval: float = 900.0
    """Seconds between two comparisons of what should be with what is."""
    evict_after: float = 300.0
    """Seconds without use after which a mount makes room for another one."""


@dataclass(frozen=True)
class Attach:
    """Section ``[attach]``: from an image chain to a block device."""

    backend: Literal["auto", "nbd", "fuse"] = "auto"
    """``auto``: NBD where there is a device for each disk of a mount, else FUSE; ``nbd``: or not at all."""
    timeout: float = 30.0
    """Seconds that one step of attaching a disk or mounting a volume may take."""
    overlay_size: int = 1 << 30
    """Bytes of a mount's tmpfs, which takes what journal replay writes; of each overlay in ``overlay_dir``."""
    overlay_dir: Path | None = None
    """A directory on a disk that takes it instead, if memory is short."""
    uids: range = range(60900, 60964)
    """The uids of programs that serve images over NBD and of those that connect them; two for each device."""
    probe_uid: int = 60998
    """The uid of tools that read partition tables and superblocks."""
    nbd_devices: range = range(8)
    """The numbers of the NBD devices that are ours to use."""


@dataclass(frozen=True)
class Limits:
    """Section ``[limits]``: how much one mount gives at a time."""

    open_files: int = 256
    """Files that callers may have open."""
    listings: int = 8
    """Listing streams that may run."""
    file_bytes: int | None = None
    """The largest file that is opened; None for no limit."""


@dataclass(frozen=True)
class Events:
    """Section ``[events]``: the history in ``restore_events``."""

    keep: int = 100_000
    """The most events that are kept."""
    max_age: float = 90 * 86400.0
    """Seconds for which an event is kept."""


@dataclass(frozen=True)
class Image:
    """Section ``[image]``."""

    chain_depth: int = 128
    """Most layers of a chain, base included."""
    repositories: tuple[Path, ...] | None = None
    """Directories that repositories lie in; None for any but the host's own."""


@dataclass(frozen=True)
class Database:
    """Section ``[database]``; see ``database_url``."""

    url: DatabaseUrl = field(default=database_url.SqliteUrl(Path("/var/lib/sendense-restore/restore.db")))
    """Where our own records are."""
    catalog_url: DatabaseUrl | None = None
    """Where the backups' tables are; None for the same database."""


@dataclass(frozen=True)
class Readers:
    """Section ``[readers]``: the processes that touch guest files."""

    uids: range = range(61000, 61064)
    """Each running reader has one of these to itself; numeric, no passwd entry is needed."""
    timeout: float = 30.0
    """Seconds after which a request to a reader is given up."""


@dataclass(frozen=True)
class Paths:
    """Section ``[paths]``."""

    runtime: Path = Path("/run/sendense-restore")
    """Sockets, overlays and probe nodes live below it, in the daemon's own mount namespace."""


@dataclass(frozen=True)
class Config:
    """The whole configuration."""

    mounts: Mounts = field(default_factory=Mounts)
    limits: Limits = field(default_factory=Limits)
    attach: Attach = field(default_factory=Attach)
    image: Image = field(default_factory=Image)
    database: Database = field(default_factory=Database)
    events: Events = field(default_factory=Events)
    readers: Readers = field(default_factory=Readers)
    paths: Paths = field(default_factory=Paths)


def load(path: Path) -> Config:
    """Read ``path``; a missing file gives the defaults.

    Raises ConfigError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Config()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        return parse(tomllib.loads(text))
    except (ConfigError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(document: Mapping[str, Any]) -> Config:
    """The configuration that a parsed TOML document describes. Raises ConfigError."""
    sections: dict[str, Any] = {}
    for section, values in document.items():
        if section not in _SECTIONS:
            raise ConfigError(f"unknown section [{section}]; known are {', '.join(_SECTIONS)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{section} is a section, not a value; write [{section}]")
        cls = _SECTIONS[section]
        known = [entry.name for entry in fields(cls)]
        parsed = {}
        for key, value in values.items():
            name = f"{section}.{key}"
            if key not in known:
                raise ConfigError(f"unknown key {name}; known are {', '.join(known)}")
            parsed[key] = _PARSERS[name](name, value)
        sections[section] = cls(**parsed)
    return _checked(Config(**sections))


def differences(old: Config, new: Config) -> frozenset[str]:
    """The keys, such as ``mounts.max``, whose values differ."""
    return frozenset(
        f"{section.name}.{key.name}"
        for section in fields(Config)
        for key in fields(getattr(old, section.name))
        if getattr(getattr(old, section.name), key.name) != getattr(getattr(new, section.name), key.name)
    )


def taken_over(old: Config, new: Config, keys: Collection[str]) -> Config:
    """``old`` with the values that ``keys`` have in ``new``. Raises ConfigError if they do not go together."""
    sections = {}
    for section in fields(Config):
        before, after = getattr(old, section.name), getattr(new, section.name)
        values = {
            key.name: getattr(after, key.name) for key in fields(before) if f"{section.name}.{key.name}" in keys
        }
        sections[section.name] = replace(before, **values)
    return _checked(Config(**sections))


def _checked(config: Config) -> Config:
    uids = [config.attach.probe_uid, *config.attach.uids, *config.readers.uids]
    if len(set(uids)) != len(uids):
        raise ConfigError("attach.uids, attach.probe_uid and readers.uids must not overlap")
    if len(config.attach.uids) < 2 * len(config.attach.nbd_devices):
        raise ConfigError(
            f"attach.uids has {len(config.attach.uids)} uids, attach.nbd_devices needs"
            f" {2 * len(config.attach.nbd_devices)}, two for each device; widen the range"
        )
    if len(config.readers.uids) < config.mounts.max:
        raise ConfigError(
            f"readers.uids has {len(config.readers.uids)} uids, mounts.max needs {config.mounts.max}; widen the range"
        )
    if not SHORTEST_IDLE_TIMEOUT <= config.mounts.idle_timeout <= config.mounts.max_idle_timeout:
        raise ConfigError(
            f"mounts.idle_timeout must be from {SHORTEST_IDLE_TIMEOUT:g} s to mounts.max_idle_timeout"
            f" ({config.mounts.max_idle_timeout:g} s)"
        )
    return config


_DURATION_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def _with_unit(name: str, value: object, units: Mapping[str, float], example: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", value) if isinstance(value, str) else None
    if match is None or match[2] not in units:
        raise ConfigError(f"{name} must be a number or text like {example!r} (units {', '.join(units)})")
    return float(match[1]) * units[match[2]]


def _duration(name: str, value: object) -> float:
    seconds = float(_with_unit(name, value, _DURATION_UNITS, "30s"))
    if not 0 < seconds <= 366 * 86400:
        raise ConfigError(f"{name} must be more than 0 and at most 366d")
    return seconds


def _size(name: str, value: object) -> int:
    size = _with_unit(name, value, _SIZE_UNITS, "1GiB")
    if not 1 << 20 <= size < 1 << 63:  # which not-a-number and infinity are not either
        raise ConfigError(f"{name} must be at least 1MiB")
    return int(size)


def _limit(name: str, value: object) -> int | None:
    if value == "unlimited":
        return None
    try:
        return _size(name, value)
    except ConfigError as error:
        raise ConfigError(f"{error}, or 'unlimited'") from None


def _count(low: int, high: int) -> Callable[[str, object], int]:
    def parse_count(name: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(f"{name} must be a whole number from {low} to {high}")
        return value

    return parse_count


def _path(name: str, value: object) -> Path:
    if not isinstance(value, str) or "\0" in value or not value.startswith("/") or ".." in Path(value).parts:
        raise ConfigError(f"{name} must be an absolute path without '..'")
    return Path(value)


def _paths(name: str, value: object) -> tuple[Path, ...] | None:
    if not isinstance(value, list):
        raise ConfigError(f"{name} must be a list of absolute paths such as ['/srv/backups']")
    return tuple(_path(f"each path of {name}", path) for path in value) or None


def _uid_range(name: str, value: object) -> range:
    match = re.fullmatch(r"(\d+)-(\d+)", value) if isinstance(value, str) else None
    if match is None or not 0 < int(match[1]) <= int(match[2]) < 2**32 - 1:
        raise ConfigError(f"{name} must be a range such as '61000-61063'")
    return range(int(match[1]), int(match[2]) + 1)


def _device_range(name: str, value: object) -> range:
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", value, re.ASCII) if isinstance(value, str) else None
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise ConfigError(f"{name} must be a range such as '0-7', or a single number such as '3'")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _backend(name: str, value: object) -> str:
    if value not in ("auto", "nbd", "fuse"):  # a tuple: the value may be unhashable
        raise ConfigError(f"{name} must be 'auto', 'nbd' or 'fuse'")
    return str(value)


def _database_url(name: str, value: object) -> DatabaseUrl:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be text such as 'sqlite:////var/lib/sendense-restore/restore.db'")
    try:
        return database_url.parse(value)
    except ValueError as error:
        raise ConfigError(f"{name} {error}") from None


_uid = _count(1, 2**32 - 2)
_SECTIONS: dict[str, type[Any]] = {
    "mounts": Mounts,
    "limits": Limits,
    "attach": Attach,
    "image": Image,
    "database": Database,
    "events": Events,
    "readers": Readers,
    "paths": Paths,
}
_PARSERS: dict[str, Callable[[str, Any], Any]] = {
    "mounts.directory": _path,
    "mounts.max": _count(1, 1024),
    "mounts.max_per_holder": _count(0, 1024),
    "mounts.idle_timeout": _duration,
    "mounts.max_idle_timeout": _duration,
    "mounts.max_lifetime": _duration,
    "mounts.sweep_interval": _duration,
    "mounts.evict_after": _duration,
    "limits.open_files": _count(1, 65536),
    "limits.listings": _count(1, 64),
    "limits.file_bytes": _limit,
    "attach.backend": _backend,
    "attach.nbd_devices": _device_range,
    "attach.timeout": _duration,
    "attach.overlay_size": _size,
    "attach.overlay_dir": _path,
    "attach.uids": _uid_range,
    "attach.probe_uid": _uid,
    "image.chain_depth": _count(1, 512),  # QEMU gets the chain as one argument, which may have 128 KiB
    "image.repositories": _paths,
    "database.url": _database_url,
    "database.catalog_url": _database_url,
    "events.keep": _count(100, 10_000_000),
    "events.max_age": _duration,
    "readers.uids": _uid_range,
    "readers.timeout": _duration,
    "paths.runtime": _path,
}

RELOADABLE = frozenset(name for name in _PARSERS if name.partition(".")[0] in {"limits", "events"}) | {
    "mounts.max",
    "mounts.max_per_holder",
    "mounts.idle_timeout",
    "mounts.max_idle_timeout",
    "mounts.max_lifetime",
    "mounts.sweep_interval",
    "mounts.evict_after",
}
"""The keys that a running service takes over."""
