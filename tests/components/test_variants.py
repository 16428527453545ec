"""Two requests are one job only if the project says so, and one variant is never given for another (R40)."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from scrapy import Request, Spider, version_info
from scrapy.crawler import Crawler
from scrapy.downloadermiddlewares.defaultheaders import DefaultHeadersMiddleware
from scrapy.downloadermiddlewares.httpauth import HttpAuthMiddleware
from scrapy.downloadermiddlewares.useragent import UserAgentMiddleware
from scrapy.utils.test import get_crawler
from support.crawl import assert_stored, run_crawl, sha256, wait_until
from support.origin import Origin
from support.stores import open_store
from support.variants import by_language, text_in

from scrapy_streaming.context import DownloadContext
from scrapy_streaming.extension import StreamingExtension
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Lease, StoredRepresentation, job_key
from scrapy_streaming.protocol.selecting import selecting_key
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.request_fields import fields_of, fields_to_send
from scrapy_streaming.storage.ledger import JobRequest

APART = {
    "REQUEST_FINGERPRINTER_CLASS": "support.variants.CountsLanguage",
    "ITEM_PIPELINES": {"support.variants.InLanguage": 1},
}
LANGUAGES = ("en", "de", "")


def test_requests_with_different_fingerprints_are_separate_jobs(origin: Origin, store: Path) -> None:
    """R40: each language its own bytes, whatever the server says of Vary, also when it is asked again."""
    urls = [
        origin.put("/varied", b"", default=by_language("Accept-Language")),
        origin.put("/plain", b"", default=by_language()),
        origin.put("/dated", b"", default=by_language(etag="")),
    ]
    items = [{"file_urls": [url], "language": language} for url in urls for language in LANGUAGES]

    def crawl(**settings: Any) -> tuple[list[dict[str, Any]], int]:
        origin.requests.clear()
        crawled = run_crawl(items, store, settings=APART | {"DEFAULT_REQUEST_HEADERS": {}} | settings)
        assert len(crawled.items) == len(items)
        for item in crawled.items:
            assert_stored(store, item["files"][0], text_in(item["language"]))
        return [item["files"][0] for item in crawled.items], len(origin.requests)

    first, asked = crawl()
    assert ({entry["status"] for entry in first}, asked) == ({"downloaded"}, 9)
    opened = open_store(store)
    jobs = opened.ledger.jobs().result()
    opened.close()
    assert len({job.key for job in jobs}) == 9
    # without a field of its own a request is the URL's job, as ever
    assert {job_key("files", "", url) for url in urls} <= {job.key for job in jobs}
    second, asked = crawl()
    assert ({entry["status"] for entry in second}, asked) == ({"uptodate"}, 0)
    third, asked = crawl(STREAMING_REVALIDATE="always")
    assert ({entry["reason"] for entry in third}, asked) == ({"not-modified"}, 9)


def test_what_other_fields_selected_is_asked_of_the_server(origin: Origin, store: Path) -> None:
    """R40: a recorded result is given again only if the request's fields select it again."""
    varies = {
        "language": "Accept-Language, Accept-Encoding", "encoding": "Accept-Encoding", "none": "",
        "agent": "User-Agent", "cookie": "Cookie", "star": "*",
    }  # fmt: skip
    urls = [origin.put(f"/{name}", b"", default=by_language(vary)) for name, vary in varies.items()]

    def crawl(language: str, agent: str, **settings: Any) -> dict[str, str]:
        """Return how each was asked for: ``""`` for a request that is not conditional."""
        origin.requests.clear()
        fields = {"DEFAULT_REQUEST_HEADERS": {"Accept-Language": language}, "USER_AGENT": agent}
        crawled = run_crawl(urls, store, settings=fields | settings)
        assert len(crawled.files) == len(urls)
        asked = {one.path[1:]: one.fields.get("if-none-match", "") for one in origin.requests}
        for name, url in zip(varies, urls, strict=True):
            expected = "en" if name in ("none", "encoding") else language
            assert_stored(store, crawled.files[url], text_in(expected))
        return asked

    everything = dict.fromkeys(varies, "")
    assert crawl("en", "one") == everything
    unknowable = {"cookie": "", "star": ""}
    assert crawl("en", "one") == unknowable
    assert crawl("de", "two") == unknowable | {"language": "", "agent": ""}
    assert crawl("de", "two") == unknowable
    assert crawl("de", "two", STREAMING_REVALIDATE="never") == unknowable


def test_a_worker_that_waited_for_another_variant_asks_for_its_own(origin: Origin, store: Path) -> None:
    """R40, with two workers: the second has other fields."""
    speak, gate = by_language("Accept-Language"), threading.Event()

    def held(asked: Any, resource: Any) -> Any:
        assert gate.wait(60)
        return speak(asked, resource)

    url = origin.put("/a", b"", held, default=speak)
    found = {}

    def crawl(language: str, **how: Any) -> None:
        fields = {"DEFAULT_REQUEST_HEADERS": {"Accept-Language": language}}
        found[language] = run_crawl([url], store, settings=fields, **how).files[url]["checksum"]

    def meanwhile(_: object) -> None:
        wait_until(lambda: origin.requests, 60)
        other.start()
        wait_until(lambda: len(list((store / ".streaming" / "workers").glob("[!.]*"))) == 2, 60)
        gate.set()

    other = threading.Thread(target=crawl, args=("de",))
    crawl("en", meanwhile=meanwhile)
    other.join(90)
    assert found == {language: sha256(text_in(language)) for language in ("en", "de")}


def test_a_one_time_token_names_no_job(origin: Origin, store: Path) -> None:
    """``job_url``: the request is sent to its own URL, once."""
    origin.put("/file", text_in("en"))
    settings = {"ITEM_PIPELINES": {"support.variants.WithToken": 1}}
    for run in range(2):
        urls = [origin.url(f"/file?token={run}{number}") for number in range(2)]
        crawled = run_crawl(urls, store, settings=settings)
        for url in urls:
            assert_stored(store, crawled.files.get(url), text_in("en"))
        assert [one.target.partition("=")[0] for one in origin.requests] == ["/file?token"]
    opened = open_store(store)
    [job] = opened.ledger.jobs().result()
    opened.close()
    assert (job.url, job.key) == (origin.url("/file"), job_key("files", "", origin.url("/file")))


def test_what_another_worker_stored_is_taken_only_if_it_is_what_was_asked_for() -> None:
    """R40: also by a download that lost its lease to it."""
    fields = {"accept-language": "de"}
    known = StoredRepresentation(
        "sha256:" + "ab" * 32, 1, Validators(), URL, vary=("accept-language",),
        selecting=selecting_key(["accept-language"], fields),
    )  # fmt: skip

    def context(**facts) -> DownloadContext:
        lease = Lease(1, "ab" * 32, 1, "", 0.0, 1)
        return DownloadContext("ab" * 32, JobRequest("", "", URL, ""), lease, **facts)

    assert context().accepts(known)  # the fields were not compared
    assert context(request_fields=fields).accepts(known)
    assert not context(request_fields={"accept-language": "en"}).accepts(known)
    assert not context(request_fields=fields, expected=Digest("cd" * 32)).accepts(known)


# -- keys ------------------------------------------------------------------------------------


@pytest.fixture
def extension(store: Path) -> Iterator[StreamingExtension]:
    made = StreamingExtension.from_crawler(get_crawler(Spider, {"FILES_STORE": str(store)}))
    yield made
    made.storage.close()


URL = "https://example.org/a.bin?b=2&a=1"
CANONICAL = "https://example.org/a.bin?a=1&b=2"
POSTED = hashlib.sha256(b"\n".join((b"POST", CANONICAL.encode(), hashlib.sha256(b"x").digest()))).hexdigest()


@pytest.mark.parametrize(
    ("how", "artifact_id"),
    [
        ({}, ""),
        ({"url": "https://user:word@example.org/a.bin?b=2&a=1#sha256=ab"}, ""),
        ({"headers": {"Accept-Language": "de", "Cookie": "a=b"}, "cookies": {"c": "d"}}, ""),
        ({"meta": {"streaming": {"digest": f"sha256:{'ab' * 32}"}, "download_slot": "x"}}, ""),
        ({"meta": {"streaming": {"artifact_id": "mine"}}}, "mine"),
        ({"method": "POST", "body": b"x"}, POSTED),
    ],
)
def test_by_scrapys_own_fingerprint_keys_are_what_they_were(
    extension: StreamingExtension, how: Mapping[str, Any], artifact_id: str
) -> None:
    """Rule 6: known answers."""
    key, job = extension.runtime.requests.job(Request(**{"url": URL} | how), "W1")
    assert (key, job.artifact_id, job.url) == (job_key("W1", artifact_id, CANONICAL), artifact_id, CANONICAL)
    assert job_key("W1", "A1", "https://example.org/a.pdf").startswith("f8946140d22c8112de1cd51d")


def test_a_fingerprint_of_the_project_is_part_of_the_key(store: Path) -> None:
    """Rule 6: unless the job was given a name."""
    crawler = get_crawler(Spider, {"FILES_STORE": str(store)} | APART)
    extension = StreamingExtension.from_crawler(crawler)
    german = {"headers": {"Accept-Language": "de"}}
    requests = {
        "plain": Request(URL),
        "de": Request(URL, **german),
        "en": Request(URL, headers={"Accept-Language": "en"}),
        "other": Request(URL + "&c=3", **german),
        "post": Request(URL, method="POST", body=b"x"),
        "post-de": Request(URL, method="POST", body=b"x", **german),
    }
    jobs = {name: extension.runtime.requests.job(request)[1] for name, request in requests.items()}
    assert (jobs["plain"].artifact_id, jobs["post"].artifact_id) == ("", POSTED)
    assert jobs["post-de"].artifact_id.startswith(f"{POSTED}.")
    assert len({job.artifact_id for job in jobs.values()}) == len(jobs)
    assert len({job.url_key for job in jobs.values()}) == len(jobs)
    named = Request(URL, meta={"streaming": {"artifact_id": "mine"}}, **german)
    assert extension.runtime.requests.job(named)[1].artifact_id == "mine"
    tokens = [extension.runtime.requests.job(Request(f"{URL}&t={n}", **german), url=URL) for n in range(2)]
    assert tokens[0] == tokens[1] == extension.runtime.requests.job(requests["de"])
    extension.storage.close()


# -- the fields a request will have ------------------------------------------------------------


class Agent(Spider):
    name = "agent"
    user_agent = "spider's own"


class Authorized(Spider):
    name = "authorized"
    http_user, http_pass, http_auth_domain = "spider", "word", "example.org"


NEW = pytest.mark.skipif(version_info < (2, 19), reason="this Scrapy knows spiders' credentials alone")
SENT = [
    (Spider, {}, {}),
    (Spider, {"USER_AGENT": "mine/1", "DEFAULT_REQUEST_HEADERS": {"Accept-Language": "de", "X": None}}, {}),
    (Spider, {"USER_AGENT": ""}, {"headers": {"User-Agent": "own", "accept-language": ["a", "b"]}}),
    (Agent, {}, {}),
    (Authorized, {}, {}),
    (Authorized, {}, {"url": "https://elsewhere.org/"}),
    (Authorized, {}, {"headers": {"Authorization": "own"}}),
    pytest.param(Authorized, {}, {"meta": {"http_user": "meta"}}, marks=NEW),
    pytest.param(
        Spider, {"HTTPAUTH_USER": "u", "HTTPAUTH_PASS": "p", "HTTPAUTH_DOMAIN": None}, {}, marks=NEW
    ),
]


@pytest.mark.filterwarnings("ignore::scrapy.exceptions.ScrapyDeprecationWarning")
@pytest.mark.parametrize(("spider", "settings", "how"), SENT)
def test_the_fields_to_send_are_those_that_scrapys_middlewares_set(
    spider: type[Spider], settings: dict[str, Any], how: dict[str, Any]
) -> None:
    """R40."""
    crawler: Crawler = get_crawler(spider, settings)
    crawler.spider = spider.from_crawler(crawler, name="spider")
    request = Request(**{"url": "https://example.org/a.bin"} | how)
    foreseen = fields_to_send(request, crawler.settings, crawler.spider)
    assert "Authorization" not in request.headers or "headers" in how
    for kind in (HttpAuthMiddleware, DefaultHeadersMiddleware, UserAgentMiddleware):
        middleware = kind.from_crawler(crawler)
        if hasattr(middleware, "spider_opened"):
            middleware.spider_opened(crawler.spider)
        middleware.process_request(request)
    assert foreseen == fields_of(request.headers)
