"""What Scrapy's settings and requests say of downloads holds for files, beside stock (C13, C14, C20)."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any

from support.beside import beside, loud
from support.crawl import assert_stored, run_crawl
from support.origin import Answer, Asked, Origin, Resource, cut, honest

BODY = bytes(range(256)) * 1500


def test_offline_no_request_leaves(origin: Origin, tmp_path: Path) -> None:
    """C13: what the HTTP cache has of stock's crawls is given, the rest is missing as in stock."""
    known, page = origin.put("/known.bin", BODY), origin.put("/page", b"<html>")
    pages = {"spider": "pages", "job": {"pages": [page]}}
    cache = {"HTTPCACHE_ENABLED": True, "HTTPCACHE_DIR": str(tmp_path / "cache"), "LOG_LEVEL": "DEBUG"}
    stock = {"ADDONS": {}, "ITEM_PIPELINES": {"scrapy.pipelines.files.FilesPipeline": 1}}
    run_crawl([known], tmp_path / "filled", settings=cache | stock, **pages)
    origin.forget()
    offline = cache | {"HTTPCACHE_IGNORE_MISSING": True}
    new = origin.put("/new.bin", BODY)
    guarded = {"STREAMING_ALLOW_PRIVATE_ADDRESSES": False}
    found = beside(tmp_path, [known, new], settings=offline, streaming=guarded, **pages)
    found.assert_same("[Failure instance")  # what Scrapy 2.15 says of the missing one; we have one line (C18)
    assert origin.requests == []
    assert {url: entry["status"] for url, entry in found.streaming.files.items()} == {known: "cached"}
    assert_stored(found.store, found.streaming.files[known], BODY)


def test_what_requests_say_of_themselves_holds(origin: Origin, tmp_path: Path) -> None:
    """C14: priorities, cookies, slots, codings, long URLs."""

    def welcome(asked: Asked, resource: Resource) -> Answer:
        return Answer(200, {"Set-Cookie": "session=7", "Content-Type": "text/html"}, b"<html>")

    page = origin.put("/page", b"", default=welcome)
    asked_for = ["?", "?priority=5", "?cookie=mine", "?coding=gzip;q=0.5", "?slot=other", "?priority=-3"]
    for number in range(len(asked_for)):
        origin.put(f"/{number}", BODY[number:])
    urls = [origin.url(f"/{number}{query}") for number, query in enumerate(asked_for)]
    long = origin.url(f"/0?{'x' * 5000}")
    items = [{"file_urls": urls}, {"file_urls": [long]}, {"file_urls": urls[::-1]}]
    sent: list[Any] = []

    def meanwhile(_: object) -> None:
        sent.append(list(origin.requests))
        origin.forget()

    settings = {"CONCURRENT_REQUESTS": 1, "COOKIES_ENABLED": True, "http_proxy": None}
    found = beside(
        tmp_path, items, settings=settings, spider="pages", job={"pages": [page]}, meanwhile=meanwhile,
        stock={"ADDONS": {}, "ITEM_PIPELINES": {"support.hooks.AskingStock": 1}},
        streaming={"ITEM_PIPELINES": {"support.hooks.AskingStreaming": 1}},
    )  # fmt: skip
    sent.append(list(origin.requests))
    found.assert_same("Public Suffix List")  # cookies ask for it, and there may be no network
    stock, streaming = [
        sorted((a.target, str(a.fields.get("cookie"))) for a in requests) for requests in sent[1:]
    ]
    assert streaming == stock
    assert len(streaming) == 1 + len(urls) + 1
    codings = {a.target: a.fields.get("accept-encoding") for a in sent[2]}
    assert codings["/3?coding=gzip;q=0.5"] == "gzip;q=0.5"
    assert not [line for line in loud(found.streaming) if len(line) > 1000], "long URLs are shortened"


def test_urls_of_other_schemes_with_the_address_guard_on(tmp_path: Path) -> None:
    """C14: bytes in the URL itself come from no address; a file of this machine is refused in one line."""
    (tmp_path / "local.txt").write_bytes(b"local")
    data, local = "data:text/plain,hello", (tmp_path / "local.txt").as_uri()
    store = tmp_path / "store"
    crawl = run_crawl([data, local], store, settings={"STREAMING_ALLOW_PRIVATE_ADDRESSES": False})
    assert_stored(store, crawl.files.get(data), b"hello")
    assert set(crawl.files) == {data}
    [line] = [
        line for line in loud(crawl) if "STREAMING_ALLOW_PRIVATE_ADDRESSES" in line and "WARNING" in line
    ]
    assert f"File (private-address): Error downloading file from <GET {local}>" in line
    assert "a server whose address file: hides is not public" in line
    said = re.findall(
        r"INFO: falling back to buffered bodies for (\w+): .*; to stream them, (.*);", crawl.log
    )
    assert said == [("file", "serve them by http or https")]


def test_a_file_that_may_be_cut_is_never_stored_and_one_line_says_so(origin: Origin, tmp_path: Path) -> None:
    """C14: with DOWNLOAD_FAIL_ON_DATALOSS=False; pages are as stock's."""
    page = origin.put("/page", BODY, default=cut(1000, "close"))
    urls = [origin.put("/once.bin", BODY, cut(200_000, "close"), honest, cut(200_000, "close"))]
    settings = {"DOWNLOAD_FAIL_ON_DATALOSS": False, "RETRY_TIMES": 1}
    found = beside(tmp_path, urls, settings=settings, spider="pages", job={"pages": [page]})
    assert len(found.streaming.items) == len(found.stock.items) == 1, "the page is taken as it came"
    assert_stored(found.store, found.streaming.files.get(urls[0]), BODY)
    assert found.streaming.log.count("DOWNLOAD_FAIL_ON_DATALOSS=False holds for pages only") == 1


def test_items_of_any_kind_where_a_files_pipeline_stands(tmp_path: Path) -> None:
    """C20: also an item's own field of the same name, and a last pipeline that returns anything."""
    pipelines = {"scrapy.pipelines.files.FilesPipeline": 1, "support.hooks.Last": 900}
    found = beside(tmp_path, [], settings={"ITEM_PIPELINES": pipelines}, spider="kinds", check=False)
    found.assert_same()
    assert not [line for line in loud(found.streaming) if "scrapy_streaming" in line]


def test_bodies_come_no_faster_than_they_may(origin: Origin, store: Path) -> None:
    """STREAMING_MAX_RATE: all together, and pages are not held back."""
    urls = [origin.put(f"/{name}.bin", name.encode() * 1_000_000) for name in "abc"]
    crawl = run_crawl(urls, store, settings={"STREAMING_MAX_RATE": "1500000"})
    assert len(crawl.files) == 3
    began = datetime.fromisoformat(crawl.stats["start_time"])
    took = datetime.fromisoformat(crawl.stats["finish_time"]) - began
    assert took.total_seconds() > 1.5
