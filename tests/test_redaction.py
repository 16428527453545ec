"""What is taken out of a text before it is stored or shown (E7, E11)."""

from __future__ import annotations

import importlib
import io
import logging
import pkgutil
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import scrapy_streaming
from scrapy_streaming.redaction import (
    clean,
    clean_record,
    escaped,
    url_without_userinfo,
    without_credentials,
    write_lines,
)

WITH = {
    "invalid hostname: me:S3CRET@host": "invalid hostname: …@host",
    "invalid hostname: S3CRET@host": "invalid hostname: …@host",
    "invalid hostname: me:S3CRET@[::1": "invalid hostname: …@[::1",
    "invalid hostname: S3CRET:@127.0.0.1": "invalid hostname: …@127.0.0.1",
    "invalid hostname: me%40:%53S3CRET@h": "invalid hostname: …@h",
    "no results for hostname lookup: me:S3CRET@h": "no results for hostname lookup: …@h",
    "<GET http://me:S3CRET@h/a?b=c@d>": "<GET http://…@h/a?b=c@d>",
    "<GET https://S3CRET@h/a>": "<GET https://…@h/a>",
    "http://me:S3C@RET@h/": "http://…@h/",
    "http://me:S3CRET@[::1]:80/x": "http://…@[::1]:80/x",
    "http://me:S3CRET/w@h/z": "http://…@h/z",
    "http://me:a#S3CRET@h/z": "http://…@h/z",
    "x://a:S3CRET@h and y://b:S3CRET@i": "x://…@h and y://…@i",
    "['http://me:S3CRET@h/a', 'http://h/b']": "['http://…@h/a', 'http://h/b']",
    "//me:S3CRET@h/": "//…@h/",
    "http://h/?to=http%3A%2F%2Fme%3AS3CRET%40i%2F": "http://h/?to=http%3A%2F%2F…%40i%2F",
    "http%253A%252F%252Fme%253AS3CRET%2540i": "http%253A%252F%252F…%2540i",
    "host me%3AS3CRET%40i": "host …%40i",
    "postgresql://me:S3/C@RET@h/d": "postgresql://…@h/d",
    "postgresql+psycopg://me:12/S3CRET@h/d": "postgresql+psycopg://…@h/d",
    "postgresql://h/d?user=me&password=S3CRET&x=1": "postgresql://h/d?user=me&password=…&x=1",
    "Port could not be cast to integer value as 'S3CRET'": "Port could not be cast to integer value as …",
    "Proxy-Authorization: Basic bWU6S3CRET==": "Proxy-Authorization: …",
    "{b'Authorization': [b'Bearer S3CRET']}": "{b'Authorization': …']}",
    "sent Basic S3CRETbWU=": "sent Basic …",
}
WITHOUT = [
    "http://h/@user/img@2x.png?mail=a@b.example",
    "http://h:8080/@user",
    "http://[::1]:8080/a@b",
    "https://h/a:b/c",
    "img@2x.png",
    "file_path() gave 'full/img@2x.png'",
    "200 KB/s @ 3 MiB; sha256:00ff at 12:30:00",
    "streaming_resume_decision reason=fetched url=http://h/a@b job=00 fence=1",
    "the expected digest mismatched the digest that came",
    "sqlite:////var/lib/crawl@home/ledger.sqlite3",
]


@pytest.mark.parametrize("text", WITH)
def test_a_text_loses_its_credentials(text: str) -> None:
    assert without_credentials(text) == WITH[text]
    assert without_credentials(WITH[text]) == WITH[text]


@pytest.mark.parametrize("text", WITHOUT)
def test_a_text_without_credentials_stays_as_it_is(text: str) -> None:
    assert without_credentials(text) == text


_WORD = st.text(
    st.characters(blacklist_characters="/?#\\", blacklist_categories=["Z", "C"]), min_size=6, max_size=20
)


@given(_WORD, _WORD, st.sampled_from(["h", "h.example:8080", "[::1]", "127.0.0.1"]), st.booleans())
def test_no_userinfo_of_any_url_stays(user: str, password: str, host: str, scheme: bool) -> None:
    url = f"cannot get <http://{user}:{password}@{host}/x>: refused"
    kept = without_credentials(url if scheme else f"invalid hostname: me:{password}@{host}")
    assert password not in kept


def test_a_url_stays_the_same_but_for_its_userinfo() -> None:
    assert url_without_userinfo("http://me:pw@h/x@y?u=http://a:b@c") == "http://h/x@y?u=http://a:b@c"


@given(st.text(st.characters()))
def test_nothing_in_an_escaped_text_acts(text: str) -> None:
    acting = {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), *map(chr, range(0xD800, 0xE000))}
    acting |= set("\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert not acting & set(escaped(text))
    assert escaped(escaped(text)) == escaped(text)
    if not acting & set(text):
        assert escaped(text) == text


def test_a_line_is_written_as_one() -> None:
    stream = io.StringIO()
    write_lines(stream, "a\tb\x1b[31m\u202e\x9b\ud800\r\nnext")
    assert stream.getvalue() == "a\tb\\x1b[31m\\u202e\\x9b\\ud800\\x0d\nnext\n"


def test_every_logger_of_the_package_cleans_its_lines(caplog: pytest.LogCaptureFixture) -> None:
    names = [module.name for module in pkgutil.walk_packages(scrapy_streaming.__path__, "scrapy_streaming.")]
    modules = [importlib.import_module(name) for name in names]
    loggers = {module.logger for module in modules if isinstance(vars(module).get("logger"), logging.Logger)}
    assert len(loggers) > 5
    caplog.set_level("DEBUG", "scrapy_streaming")
    for logger in loggers:
        assert clean_record in logger.filters, logger.name
        caplog.clear()
        logger.warning("%s %d %s", "http://me:S3CRET@h/\x1b[31m", 3, ValueError("me:S3CRET@h \u2028"))
        assert caplog.messages == ["http://…@h/\\x1b[31m 3 …@h \\u2028"]
        caplog.clear()
        logger.warning("%(a)s", {"a": "x\ny"})
        assert caplog.messages == ["x\\x0ay"]


def test_what_is_shown_is_clean_of_both() -> None:
    assert clean(ValueError("me:S3CRET@h\n\x9b")) == "…@h\\x0a\\x9b"


def test_a_long_text_is_cut_where_no_password_is_left() -> None:
    """And none takes long, however it is made."""
    text = "GET http://me:S3CRET@h/ and then http://" + "a" * 4030 + ":S3CRET-TOO" + "b" * 90_000 + "@h"
    assert without_credentials(text) == "GET http://…@h/ and then …"
    assert len(without_credentials("me:S3CRET@h failed " + "x" * 9000)) == 4096 - len("me:S3CRET") + 1
    for piece in (",a:", "lookup'", "%3A", "//a:", "postgres://", "%2F%2Fa"):
        began = time.process_time()
        without_credentials("@" + piece * 100_000 + "%40")
        assert time.process_time() - began < 1, piece
