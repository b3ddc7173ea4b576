"""The configuration file: what it may say, and that a mistake in it is told and not guessed around."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sendense_restored import config
from sendense_restored.config import Config, ConfigError
from sendense_restored.database_url import MysqlUrl, SqliteUrl


def parsed(text: str, tmp_path: Path) -> Config:
    path = tmp_path / "restored.toml"
    path.write_text(text, encoding="utf-8")
    return config.load(path)


def test_without_a_file_there_are_the_defaults(tmp_path: Path) -> None:
    assert config.load(tmp_path / "nothing") == Config()


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert parsed("", tmp_path) == Config()


def test_the_defaults_are_the_contracts() -> None:
    defaults = Config()
    assert str(defaults.mounts.directory) == "/mnt/sendense/restore"
    assert defaults.mounts.max == 8
    assert defaults.attach.overlay_size == 1 << 30
    assert (defaults.attach.uids, defaults.readers.uids) == (range(60900, 60964), range(61000, 61064))
    assert defaults.image.chain_depth == 128
    assert defaults.database.url == SqliteUrl(Path("/var/lib/sendense-restore/restore.db"))


def test_every_key_can_be_set(tmp_path: Path) -> None:
    found = parsed(
        """
        [mounts]
        directory = "/mnt/x"
        max = 2
        max_per_holder = 1
        idle_timeout = "2min"
        max_idle_timeout = "3h"
        max_lifetime = "2d"
        sweep_interval = "5min"
        evict_after = 30
        [limits]
        open_files = 5
        listings = 2
        file_bytes = "3GiB"
        [attach]
        backend = "fuse"
        timeout = "1.5min"
        overlay_size = "2GiB"
        overlay_dir = "/var/tmp/x"
        uids = "70100-70200"
        probe_uid = 70001
        [image]
        chain_depth = 3
        repositories = ["/srv/backups", "/mnt/nas"]
        [database]
        url = "sqlite:////tmp/x.db"
        [events]
        keep = 500
        max_age = "1d"
        [readers]
        uids = "80000-80001"
        timeout = 5
        [paths]
        runtime = "/run/x"
        """,
        tmp_path,
    )
    assert found == Config(
        mounts=config.Mounts(Path("/mnt/x"), 2, 1, 120.0, 10800.0, 172800.0, 300.0, 30.0),
        limits=config.Limits(5, 2, 3 << 30),
        attach=config.Attach("fuse", 90.0, 2 << 30, Path("/var/tmp/x"), range(70100, 70201), 70001),
        image=config.Image(3, (Path("/srv/backups"), Path("/mnt/nas"))),
        database=config.Database(SqliteUrl(Path("/tmp/x.db"))),
        events=config.Events(500, 86400.0),
        readers=config.Readers(range(80000, 80002), 5.0),
        paths=config.Paths(Path("/run/x")),
    )


@pytest.mark.parametrize("text", ['"/srv"', '["srv"]', '["/srv/../etc"]', "[5]", "true"])
def test_repositories_lie_in_a_list_of_directories(tmp_path: Path, text: str) -> None:
    assert parsed("[image]\nrepositories = []", tmp_path).image.repositories is None
    with pytest.raises(ConfigError, match=r"image\.repositories"):
        parsed(f"[image]\nrepositories = {text}", tmp_path)


@pytest.mark.parametrize("seconds", ["59", '"25h"'])
def test_an_idle_timeout_is_not_shorter_than_a_minute_nor_longer_than_the_longest(
    tmp_path: Path, seconds: str
) -> None:
    with pytest.raises(ConfigError, match=r"mounts\.idle_timeout must be from 60 s to mounts\.max_idle_timeout"):
        parsed(f"[mounts]\nidle_timeout = {seconds}", tmp_path)


@pytest.mark.parametrize("text", ["0", '"0"', '"none"', "-1", "true", '"1KiB"', "1048575"])
def test_a_limit_is_a_size_or_says_that_it_is_none(tmp_path: Path, text: str) -> None:
    assert parsed('[limits]\nfile_bytes = "unlimited"', tmp_path).limits.file_bytes is None
    assert parsed("[limits]\nfile_bytes = 1048576", tmp_path).limits.file_bytes == 1 << 20
    with pytest.raises(ConfigError, match=r"limits\.file_bytes"):
        parsed(f"[limits]\nfile_bytes = {text}", tmp_path)


def test_every_field_has_a_parser_and_the_other_way_round() -> None:
    known = {
        f"{section.name}.{key.name}"
        for section in dataclasses.fields(Config)
        for key in dataclasses.fields(getattr(Config(), section.name))
    }
    assert known == set(config._PARSERS)


def test_it_cannot_be_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().mounts.max = 9  # type: ignore[misc]  # the point of the test


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("0.5", 0.5), ('"90s"', 90), ('"15min"', 900), ('"1h"', 3600), ('"1.5 h"', 5400), ('"2d"', 172800)],
)
def test_durations(tmp_path: Path, text: str, seconds: float) -> None:
    assert parsed(f"[attach]\ntimeout = {text}", tmp_path).attach.timeout == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("1048576", 1 << 20), ('"64MiB"', 64 << 20), ('"1.5GiB"', 3 << 29), ('"1TiB"', 1 << 40)]
)
def test_sizes(tmp_path: Path, text: str, size: int) -> None:
    assert parsed(f"[attach]\noverlay_size = {text}", tmp_path).attach.overlay_size == size


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[nonsense]", r"unknown section \[nonsense\]"),
        ("[mounts]\nmaximum = 1", r"unknown key mounts\.maximum; known are directory, max"),
        ("mounts = 1", "is a section"),
        ("[[mounts]]\nmax = 1", "is a section"),
        ("[mounts]\nmax = 0", "from 1 to 1024"),
        ("[mounts]\nmax = 1025", "from 1 to 1024"),
        ("[mounts]\nmax = true", "whole number"),
        ("[mounts]\nmax = 1.0", "whole number"),
        ('[mounts]\nmax = "8"', "whole number"),
        ('[mounts]\ndirectory = "relative"', "absolute path"),
        ('[mounts]\ndirectory = "/a/../b"', "absolute path"),
        ('[mounts]\ndirectory = "/a\\u0000b"', "absolute path"),
        ("[mounts]\ndirectory = 7", "absolute path"),
        ("[attach]\ntimeout = 0", "more than 0"),
        ("[attach]\ntimeout = -1", "more than 0"),
        ("[attach]\ntimeout = nan", "more than 0"),
        ("[attach]\ntimeout = inf", "at most 366d"),
        ("[attach]\ntimeout = true", "units s, min, h, d"),
        ('[attach]\ntimeout = "30"', "units s, min, h, d"),
        ('[attach]\ntimeout = "30 parsecs"', "units s, min, h, d"),
        ('[attach]\ntimeout = "-5s"', "units s, min, h, d"),
        ('[attach]\noverlay_size = "1GB"', "units B, KiB"),
        ('[attach]\noverlay_size = "1KiB"', "at least 1MiB"),
        ("[attach]\noverlay_size = []", "units B, KiB"),
        ("[attach]\noverlay_size = nan", "at least 1MiB"),
        ("[attach]\noverlay_size = inf", "at least 1MiB"),
        ('[attach]\nbackend = "magic"', "'auto', 'nbd' or 'fuse'"),
        ("[attach]\nbackend = []", "'auto', 'nbd' or 'fuse'"),
        ('[attach]\nnbd_devices = "7-0"', "a range such as '0-7'"),
        ('[attach]\nnbd_devices = "0-"', "a range such as '0-7'"),
        ('[attach]\nnbd_devices = "0-77777"', "a range such as '0-7'"),
        ("[attach]\nnbd_devices = 3", "a single number such as '3'"),
        ("[attach]\nprobe_uid = 0", "from 1"),
        ("[attach]\nprobe_uid = 4294967295", "from 1"),
        ("[attach]\nprobe_uid = 60963", "must not overlap"),
        ('[attach]\nuids = "60990-61000"', "must not overlap"),
        ('[attach]\nuids = "60900-60914"', "needs 16, two for each device"),
        ('[readers]\nuids = "61000"', "a range"),
        ('[readers]\nuids = "0-100"', "a range"),
        ('[readers]\nuids = "200-100"', "a range"),
        ("[readers]\nuids = 61000", "a range"),
        ('[readers]\nuids = "1000-1003"', "mounts.max needs 8"),
        ('[database]\nurl = "mysql://x"', "must name a user"),
        ('[database]\nurl = ""', r"database\.url must be 'sqlite:///'"),
        ('[database]\ncatalog_url = "/var/lib/x.db"', r"database\.catalog_url must be 'sqlite:///'"),
        ('[database]\nurl = "sqlite:///relative.db"', "sqlite:///"),
        ("[mounts", "restored.toml"),
    ],
)
def test_a_mistake_refuses_to_start_and_names_the_file(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        parsed(text, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/restored.toml: ")


def test_a_password_is_not_in_the_text_form_of_the_configuration() -> None:
    found = config.parse({"database": {"url": "mysql://u:hidden@h/n", "catalog_url": "mysql://u:hidden@h/m"}})
    assert isinstance(found.database.url, MysqlUrl)
    assert found.database.url.password == "hidden"  # of nobody
    assert "hidden" not in repr(found) + str(found)
    other = config.parse({"database": {"url": "mysql://u:other@h/n", "catalog_url": "mysql://u:hidden@h/m"}})
    assert config.differences(found, other) == {"database.url"}


def test_a_file_that_cannot_be_read_is_no_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "binary")


def test_a_reload_takes_over_what_it_may_and_leaves_the_rest() -> None:
    old = Config()
    new = config.parse({"mounts": {"max": 3, "directory": "/mnt/x"}, "events": {"keep": 500}})
    assert config.differences(old, new) == {"mounts.max", "mounts.directory", "events.keep"}
    merged = config.taken_over(old, new, config.RELOADABLE)
    assert (merged.mounts.max, merged.events.keep) == (3, 500)
    assert config.differences(merged, new) == {"mounts.directory"}
    assert config.differences(old, old) == set()


def test_what_is_taken_over_must_go_with_what_stays() -> None:
    new = config.parse({"mounts": {"max": 100}, "readers": {"uids": "61000-61200"}})
    with pytest.raises(ConfigError, match="has 64 uids, mounts"):
        config.taken_over(Config(), new, config.RELOADABLE)
