"""Where a database is, and that a password stays where it was written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sendense_restored import config, database_url
from sendense_restored.database_url import MysqlUrl, SqliteUrl

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("sqlite:////var/lib/x.db", SqliteUrl(Path("/var/lib/x.db"))),
        ("sqlite:////var/lib/a%20b?c.db", SqliteUrl(Path("/var/lib/a%20b?c.db"))),
        ("mysql://u@h/n", MysqlUrl("u", "", "h", 3306, "", "n")),
        ("mysql://u:p@h:3307/n", MysqlUrl("u", "p", "h", 3307, "", "n")),
        ("mysql://u:p@[::1]/n", MysqlUrl("u", "p", "::1", 3306, "", "n")),
        ("mysql://%75:p%40s%3As%2F%C3%A9@h/n%2Dm", MysqlUrl("u", "p@s:s/é", "h", 3306, "", "n-m")),
        ("mysql://u:p:q@h/n", MysqlUrl("u", "p:q", "h", 3306, "", "n")),
        ("mysql://u:p@/n?unix_socket=/run/m.sock", MysqlUrl("u", "p", "", 3306, "/run/m.sock", "n")),
        ("mysql://u@localhost/n?unix_socket=%2Frun%2Fm", MysqlUrl("u", "", "localhost", 3306, "/run/m", "n")),
    ],
)
def test_a_url_is_taken_apart(text: str, wanted: database_url.DatabaseUrl) -> None:
    assert database_url.parse(text) == wanted


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        *(
            (text, "must be 'sqlite")
            for text in ("", "sqlite://", "sqlite:///x", "/x", "mariadb://u@h/n", "mysql:u@h/n")
        ),
        *((f"mysql://{text}", "must name a user") for text in ("h/n", ":hunter2@h/n", "u@/n", "u:hunter2@/n")),
        *((f"mysql://u:hunter2@h{text}", "one database") for text in ("", "/", "/a/b", "/a%2Fb", "/" + "x" * 65)),
        *((f"mysql://u:hunter2@h:{text}/n", "no URL") for text in ("port", "99999", "-1")),
        ("mysql://u:hunter2/more@h/n", "no URL"),
        ("mysql://u:hunter2?@h/n", "no URL"),
        ("mysql://u:hunter2#more@h/n", "must name|percent"),
        ("mysql://u:%ff@h/n", "no URL"),
        ("mysql://u:hunter2@[h/n", "no URL"),
        ("mysql://u:hunter2@h/n?ssl=1", "options"),
        ("mysql://u:hunter2@h/n?unix_socket", "no URL|absolute"),
        ("mysql://u:hunter2@h/n?unix_socket=run/x", "absolute"),
        ("mysql://u:hunter2@h/n#x", "percent form"),
    ],
)
def test_another_text_is_refused_and_not_repeated(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        database_url.parse(text)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    for key in ("url", "catalog_url"):
        with pytest.raises(config.ConfigError, match=f"database.{key} ") as refused:
            config.parse({"database": {key: text}})
        assert SECRET not in str(refused.value)


@given(st.text())
def test_any_text_is_a_url_or_a_refusal(text: str) -> None:
    for prefix in ("", "sqlite:///", "mysql://", "mysql://u:p@h/"):
        try:
            database_url.parse(prefix + text)
        except ValueError as error:
            assert "must" in str(error) or "percent form" in str(error)  # noqa: PT017  # either is well


def test_no_text_form_shows_a_password() -> None:
    text = f"mysql://u:{SECRET}@h/n"
    settings = config.parse({"database": {"url": text, "catalog_url": text}})
    parsed = database_url.parse(text)
    assert SECRET not in f"{settings!r} {settings} {parsed!r} {parsed}"
    assert str(parsed) == "MySQL database n at h:3306"


def test_the_catalogue_is_in_the_same_place_by_default() -> None:
    assert config.Config().database.catalog_url is None
    assert "database.catalog_url" not in config.RELOADABLE
