"""Redirects: each hop is planned anew, validators are the final URL's, and not every target will do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.crawl import Crawl, assert_sound, assert_stored, kept, run_crawl
from support.origin import Answer, Origin, cut

BODY = bytes(range(256)) * 2400
HALF = 300_000
TAG = '"v1"'
#: Only 127.0.0.1 is public in these crawls.
GUARDED = {
    "STREAMING_ALLOW_PRIVATE_ADDRESSES": False,
    "EXTENSIONS": {"support.components.LoopbackIsPublic": 1},
    "MEDIA_ALLOW_REDIRECTS": True,
    "RETRY_ENABLED": False,
}


@pytest.fixture
def inside() -> Iterator[Origin]:
    """A server that is not to be reached from the outside."""
    origin = Origin("127.0.0.2")
    yield origin
    origin.close()


def moved(location: str) -> Answer:
    return Answer(302, {"Location": location})


def redirected(urls: list[str], store: Path, **settings: object) -> Crawl:
    return run_crawl(urls, store, settings={"MEDIA_ALLOW_REDIRECTS": True, "RETRY_ENABLED": False} | settings)


def test_a_part_is_resumed_at_the_url_it_came_from(origin: Origin, store: Path) -> None:
    """R60: the first URL is asked plainly, the target with Range."""
    url = origin.put("/first", b"", default=moved("/target"))
    origin.put("/target", BODY, cut(HALF, "close"), etag=TAG)
    assert redirected([url], store).files == {}
    origin.forget()
    crawl = redirected([url], store)
    assert_stored(store, crawl.files[url], BODY)
    assert crawl.files[url]["resumed_from"] == HALF
    assert "range" not in origin.asked("/first")[0].fields
    (asked,) = origin.asked("/target")
    assert (asked.fields["range"], asked.fields["if-range"]) == (f"bytes={HALF}-", TAG)


def test_a_tag_says_nothing_at_another_origin(origin: Origin, inside: Origin, store: Path) -> None:
    """R60: the same tag names other bytes there (RFC 9110 §8.8.1)."""
    other = bytes(len(BODY))
    url = origin.put("/first", b"", moved("/target"), default=moved(inside.url("/target")))
    origin.put("/target", BODY, cut(HALF, "close"), etag=TAG)
    inside.put("/target", other, etag=TAG)
    redirected([url], store)
    assert kept(store) == HALF
    crawl = redirected([url], store)
    assert_stored(store, crawl.files[url], other)
    (asked,) = inside.asked("/target")
    assert not {"range", "if-range", "if-none-match"} & set(asked.fields)


def test_a_redirect_is_not_followed_unless_allowed(origin: Origin, store: Path) -> None:
    """MEDIA_ALLOW_REDIRECTS, as FilesPipeline has it."""
    url = origin.put("/first", b"", default=moved("/target"))
    origin.put("/target", BODY)
    crawl = run_crawl([url], store)
    assert crawl.files == {}
    assert crawl.stat("streaming/failed/bad-status-302") == 1
    assert origin.asked("/target") == []


def test_a_loop_ends(origin: Origin, store: Path) -> None:
    url = origin.put("/round", b"", default=moved("/round"))
    crawl = redirected([url], store, REDIRECT_MAX_TIMES=3)
    assert crawl.files == {}
    assert len(origin.asked("/round")) <= 4


@pytest.mark.parametrize("scheme", ["file", "data", "ftp"])
def test_a_redirect_cannot_leave_http(origin: Origin, store: Path, tmp_path: Path, scheme: str) -> None:
    """E3: what a server names is never read from this machine."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    target = {"file": secret.as_uri(), "data": "data:,secret", "ftp": f"ftp://127.0.0.1{secret}"}[scheme]
    url = origin.put("/first", b"", default=moved(target))
    crawl = redirected([url], store)
    assert crawl.files == {}
    assert_sound(store, [])


@pytest.mark.parametrize("streams", [True, False])
def test_a_private_address_is_refused_at_each_hop(
    origin: Origin, inside: Origin, store: Path, streams: bool
) -> None:
    """E3: by the address that was connected to, before the request is sent."""
    good = origin.put("/good", BODY)
    direct = inside.put("/direct", BODY)
    hop = origin.put("/hop", b"", default=moved(inside.url("/target")))
    inside.put("/target", BODY)
    settings = GUARDED | {"STREAMING_IO_ENABLED": streams}
    crawl = run_crawl([good, direct, hop], store, settings=settings)
    assert_stored(store, crawl.files[good], BODY)
    assert set(crawl.files) == {good}
    assert crawl.stat("streaming/failed/private-address") == 2
    assert "STREAMING_ALLOW_PRIVATE_ADDRESSES" in crawl.log
    if streams:
        assert inside.requests == []


def test_a_connection_that_another_request_opened_is_checked_too(inside: Origin, store: Path) -> None:
    """E3: pages of the spider's may share a connection with files."""
    page = inside.put("/page", b"<html>")
    url = inside.put("/file", BODY)
    crawl = run_crawl([url], store, settings=GUARDED, spider="pages", job={"pages": [page]})
    assert crawl.files == {}
    assert [asked.path for asked in inside.requests] == ["/page"]
