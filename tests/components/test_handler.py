"""Scrapy's own handlers work as before: under this package's handler, and for requests that store no file."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from support.crawl import assert_sound, assert_stored, kept, run_crawl, sha256
from support.origin import Answer, Asked, Origin, Resource, cut, honest
from support.servers import Proxy, WebServer

PAGE = b"<html><body>a page</body></html>"
BODY = os.urandom(700_000)
TINY = b"tiny body"


def notes(crawl) -> dict[str, dict]:
    return {note["url"]: note for note in crawl.notes if "url" in note}


def signals_of(crawl) -> dict[str, dict]:
    return {note["signals"]: note for note in crawl.notes if "signals" in note}


# -- requests of the spider's own --------------------------------------------------------------


def test_a_request_for_a_page_behaves_as_without_the_package(origin: Origin, store: Path) -> None:
    packed = Answer(200, {"Content-Type": "text/html", "Content-Encoding": "gzip"}, gzip.compress(PAGE))
    odd = Answer(206, {"Content-Range": "bytes 0-4/9"}, PAGE[:5])
    post = {"url": origin.put("/post", PAGE, media_type="text/html"), "method": "POST"}
    urls = [
        {"url": origin.put("/page", PAGE, media_type="text/html")},
        {"url": origin.put("/packed", PAGE, packed, packed)},
        {"url": origin.put("/odd", PAGE, odd, odd)},
        {"url": origin.put("/range", PAGE), "headers": {"Range": "bytes=3-7"}},
        {"url": origin.put("/closing", PAGE, *[Answer(200, {}, PAGE, end="close", length=None)] * 2)},
        post,
    ]  # fmt: skip
    streaming = run_crawl(urls, store, spider="requests")
    asked = [
        (a.method, a.target, a.fields.get("accept-encoding"), a.fields.get("range")) for a in origin.requests
    ]
    origin.forget()
    plain = run_crawl(urls, store, spider="requests", settings={"ADDONS": {}})
    plainly = [
        (a.method, a.target, a.fields.get("accept-encoding"), a.fields.get("range")) for a in origin.requests
    ]
    own, stock = notes(streaming), notes(plain)
    for note in (*own.values(), *stock.values()):
        assert note.pop("latency") > 0
    assert own == stock
    assert len(own) == len(urls)
    assert sorted(map(str, asked)) == sorted(map(str, plainly))
    assert streaming.stat("streaming/resume_decisions_made") == 0


def test_a_spider_gets_a_streamed_response_and_may_publish_it(origin: Origin, store: Path) -> None:
    """``meta={"streaming": True}``: part with its file, and the body; publish() records; twice is once."""
    meta = {"streaming": True}
    big, tiny = origin.put("/big", BODY, cut(300_000, "close")), origin.put("/tiny", TINY)
    left = origin.put("/left", BODY)
    urls = [
        {"url": big, "meta": meta, "publish": 2},
        {"url": tiny, "meta": meta, "publish": 1},
        {"url": left, "meta": meta},
    ]
    crawl = run_crawl(urls, store, spider="requests")
    for url, body in ((big, BODY), (tiny, TINY), (left, BODY)):
        note = notes(crawl)[url]
        assert note["kind"] == ("StreamedTextResponse" if url == tiny else "StreamedResponse")
        assert note["body"] == body.hex()
        assert note["part"]["read"] == note["part"]["read_again"] == body.hex()
        assert note["part"]["length"] == len(body)
        assert note["part"]["digest"] == f"sha256:{sha256(body)}"
        assert note["ip"] == "127.0.0.1"
        assert note["latency"] > 0
        assert note["protocol"] == "HTTP/1.1"
        assert "streamed" in note["flags"]
    assert [p[:2] for p in notes(crawl)[big]["published"]] == [[f"sha256:{sha256(BODY)}", len(BODY)]] * 2
    assert_sound(store, [BODY, TINY])
    origin.forget()
    # the completion is recorded: the pipeline has nothing to ask for
    files = run_crawl([big, tiny], store, settings={"STREAMING_WORK_ID": "requests"})
    assert_stored(store, files.files.get(big), BODY)
    assert_stored(store, files.files.get(tiny), TINY)
    assert origin.requests == []


def test_meta_handed_on_to_another_request_does_not_carry_the_job(origin: Origin, store: Path) -> None:
    """The next URL's bytes are never recorded as the first one's."""
    first, second = origin.put("/first", BODY), origin.put("/second", TINY)
    urls = [{"url": first, "meta": {"streaming": True}}]
    crawl = run_crawl(urls, store, spider="requests", job={"follow": [second]})
    assert notes(crawl)[second]["published"][0][0] == f"sha256:{sha256(TINY)}"
    files = run_crawl([first, second], store, settings={"STREAMING_WORK_ID": "requests"})
    assert_stored(store, files.files.get(first), BODY)
    assert_stored(store, files.files.get(second), TINY)
    assert files.files[second]["status"] == "uptodate"
    assert files.elapsed < 50, "a job that the spider left is free when its crawl ends"


def test_a_job_that_a_spider_left_unpublished_or_failed_does_not_hold_up_the_next(
    origin: Origin, store: Path
) -> None:
    """The same URL again in one crawl: the next request gets the job, and waits for no lease."""
    left, gone = origin.put("/left", BODY), origin.url("/gone")
    meta = {"streaming": True, "handle_httpstatus_all": True}
    urls = [{"url": url, "meta": dict(meta)} for url in (left, gone)] * 3
    crawl = run_crawl(urls, store, spider="requests", settings={"CONCURRENT_REQUESTS": 1}, timeout=40)
    kinds = [(note["url"], note["kind"]) for note in crawl.notes if "url" in note]
    assert kinds.count((left, "StreamedResponse")) == 3
    assert len([url for url, _ in kinds if url == gone]) == 3


def test_a_pipelines_requests_may_ask_for_streaming_too(origin: Origin, store: Path) -> None:
    """``meta={"streaming": True}`` from get_media_requests() changes nothing."""
    url = origin.put("/said", BODY)
    crawl = run_crawl([url], store, settings={"ITEM_PIPELINES": {"support.components.SaysStreaming": 1}})
    assert_stored(store, crawl.files.get(url), BODY)


def test_a_spiders_streamed_request_survives_a_job_directory(
    origin: Origin, store: Path, tmp_path: Path
) -> None:
    """Its retry goes through the scheduler's disk queue."""
    url = origin.put("/big", BODY, cut(300_000, "close"))
    urls = [{"url": url, "meta": {"streaming": True}, "publish": 1}]
    crawl = run_crawl(urls, store, spider="requests", settings={"JOBDIR": str(tmp_path / "job")})
    assert notes(crawl)[url]["published"][0][0] == f"sha256:{sha256(BODY)}"
    assert crawl.stat("scheduler/enqueued/disk") == 2
    assert crawl.stat("streaming/bytes_kept") == 300_000


# -- features of the handler -------------------------------------------------------------------


def test_signals_are_sent_for_streamed_bodies_as_for_others(origin: Origin, store: Path) -> None:
    """headers_received once, bytes_received to the last byte."""
    url, tiny = origin.put("/big", BODY), origin.put("/tiny", TINY)
    empty = origin.put("/empty", b"")
    crawl = run_crawl([url, tiny, empty], store)
    assert signals_of(crawl)[url] == {"signals": url, "heads": 1, "length": len(BODY), "bytes": len(BODY)}
    assert signals_of(crawl)[tiny] == {"signals": tiny, "heads": 1, "length": len(TINY), "bytes": len(TINY)}
    assert signals_of(crawl)[empty]["bytes"] == 0
    assert len(crawl.files) == 3


@pytest.mark.parametrize("fail", [True, False])
def test_stop_download_stops_and_publishes_nothing_short(origin: Origin, store: Path, fail: bool) -> None:
    stops = {
        origin.put("/bytes", BODY): {"on": "bytes", "fail": fail},
        origin.put("/heads", BODY): {"on": "headers", "fail": fail},
        origin.put("/small", TINY): {"on": "bytes", "fail": fail},
    }
    other = origin.put("/other", BODY)
    crawl = run_crawl([*stops, other], store, job={"stop": stops}, settings={"RETRY_ENABLED": False})
    assert set(crawl.files) == {other}
    assert signals_of(crawl)[next(iter(stops))]["bytes"] < len(BODY)
    assert_sound(store, [BODY])
    # the spider's own request sees what it always saw
    own = [{"url": url, "meta": {"streaming": True}} for url in stops]
    crawl = run_crawl(own, store, spider="requests", job={"stop": stops}, settings={"RETRY_ENABLED": False})
    if fail:
        assert {n["failed"] for n in crawl.notes if "failed" in n} == set(stops)
        assert {n["error"] for n in crawl.notes if "failed" in n} == {"StopDownload"}
    else:
        assert {url for url, n in notes(crawl).items() if "download_stopped" in n["flags"]} == set(stops)


def test_size_limits(origin: Origin, store: Path) -> None:
    """DOWNLOAD_MAXSIZE and _WARNSIZE are for bodies in memory; STREAMING_MAX_SIZE counts while streaming."""
    big = origin.put("/big", BODY)
    crawl = run_crawl([big], store, settings={"DOWNLOAD_MAXSIZE": 1000, "DOWNLOAD_WARNSIZE": 500})
    assert_stored(store, crawl.files.get(big), BODY)
    assert "larger than download" not in crawl.log
    said = origin.put("/said", BODY)
    unsaid = origin.put("/unsaid", BODY, default=lambda a, r: honest(a, r, chunked=True))
    fits = origin.put("/fits", BODY[:100_000])
    crawl = run_crawl([said, unsaid, fits], store, settings={"STREAMING_MAX_SIZE": 100_000})
    assert set(crawl.files) == {fits}
    assert crawl.log.count("larger than STREAMING_MAX_SIZE=100000 bytes") >= 2
    for path in ("/said", "/unsaid"):
        assert len(origin.asked(path)) == 1, "a body that is too large is not tried again"
    assert_sound(store, [BODY, BODY[:100_000]])


def test_a_body_that_is_announced_as_too_large_is_not_read(origin: Origin, store: Path) -> None:
    """Its connection is closed: it does not come in the background, to be dropped."""

    def endless(_asked: Asked, _resource: Resource) -> Answer:
        return Answer(200, {}, bytes(64 << 20))

    def slow(_asked: Asked, _resource: Resource) -> Answer:
        return Answer(200, {}, TINY, pace=0.2, piece=max(1, len(TINY) // 10))

    large, other = origin.put("/large", b"", default=endless), origin.put("/slow", TINY, default=slow)
    crawl = run_crawl([large, other], store, settings={"STREAMING_MAX_SIZE": 100_000})
    assert set(crawl.files) == {other}
    [asked] = origin.asked("/large")
    assert asked.sent < 16 << 20, "what the buffers of both sides take, and no more"


def test_a_coded_body_is_resumed_in_its_coding_and_published_without(origin: Origin, store: Path) -> None:
    """R34: gzip though identity was asked; no other decoder sees it; a resume needs the same coding."""
    packed, tiny_packed = gzip.compress(BODY, mtime=0), gzip.compress(TINY, mtime=0)

    def coded(asked: Asked, resource: Resource) -> Answer:
        assert asked.fields["accept-encoding"] == "identity"
        answer = honest(asked, resource)
        return Answer(answer.status, {**answer.fields, "Content-Encoding": "gzip"}, answer.body)

    def half(asked: Asked, resource: Resource) -> Answer:
        return Answer(
            200, {**resource.fields(), "Content-Encoding": "gzip"}, packed, cut=300_000, end="close"
        )

    whole = origin.put("/whole.bin", packed, default=coded)
    again = origin.put("/again.bin", packed, half, default=coded)
    tiny = origin.put("/tiny.bin", tiny_packed, default=coded)
    crawl = run_crawl([whole, again, tiny], store)
    assert_stored(store, crawl.files.get(whole), BODY)
    assert_stored(store, crawl.files.get(again), BODY)
    assert_stored(store, crawl.files.get(tiny), TINY)
    assert crawl.files[again]["resumed_from"] == 300_000


def test_proxies_are_used(origin: Origin, proxy: Proxy, store: Path) -> None:
    url = origin.put("/big.bin", BODY, cut(300_000, "close"))
    crawl = run_crawl([url], store, env={"http_proxy": proxy.url})
    assert_stored(store, crawl.files.get(url), BODY)
    assert crawl.files[url]["resumed_from"] == 300_000
    assert proxy.targets == [url, url]


def test_redirects_are_followed_only_if_asked_for(web: WebServer, origin: Origin, store: Path) -> None:
    """R60: the target's own validators; a resume goes through the original URL."""
    web.put("target.bin", BODY)
    moved = web.url("moved/target.bin")
    there = origin.put("/there", BODY, cut(300_000, "close"))
    here = origin.put("/here", b"", default=Answer(302, {"Location": "/there", "ETag": '"no"'}, b"moved"))
    refused = run_crawl([moved], store)
    assert refused.files == {}
    crawl = run_crawl([moved, here], store, settings={"MEDIA_ALLOW_REDIRECTS": True})
    assert_stored(store, crawl.files.get(moved), BODY)
    assert_stored(store, crawl.files.get(here), BODY)
    assert crawl.files[here]["resumed_from"] == 300_000
    assert "range" not in origin.asked("/here")[0].fields
    assert [a.fields.get("range") for a in origin.asked("/there")] == [None, "bytes=300000-"]
    assert there not in crawl.files
    again = run_crawl(
        [moved, here], store, settings={"MEDIA_ALLOW_REDIRECTS": True, "STREAMING_REVALIDATE": "always"}
    )
    assert_stored(store, again.files.get(here), BODY)
    assert_sound(store, [BODY])


def test_error_pages_are_never_stored(origin: Origin, store: Path) -> None:
    """R42, R54, R58, R59: the part of an earlier crawl stays."""
    url = origin.put("/x.bin", BODY, cut(300_000, "close"))
    run_crawl([url], store, settings={"RETRY_ENABLED": False})
    for status in (404, 403, 500, 503, 204, 202):
        origin.put(
            f"/{status}", BODY, default=Answer(status, {}, b"" if status == 204 else b"<h1>sorry</h1>")
        )
    origin.script("/x.bin", *[Answer(503, {}, b"<h1>busy</h1>")] * 3)
    urls = [origin.url(f"/{status}") for status in (404, 403, 500, 503, 204, 202)]
    crawl = run_crawl([*urls, url], store)
    assert crawl.files == {}
    assert_sound(store, [])
    assert len(origin.asked("/503")) == 3
    assert len(origin.asked("/404")) == 1
    assert kept(store) == 300_000
    crawl = run_crawl([url], store)
    assert crawl.files[url]["resumed_from"] == 300_000


@pytest.mark.parametrize("streaming", [True, False])
def test_what_a_proxy_changed_is_stored_without_the_origins_validators(
    origin: Origin, store: Path, streaming: bool
) -> None:
    """R41."""
    url = origin.put("/x.bin", b"", default=Answer(203, {"ETag": '"v1"', "Content-Type": "a/b"}, BODY))
    crawl = run_crawl([url], store, settings={"STREAMING_IO_ENABLED": streaming})
    assert_stored(store, crawl.files.get(url), BODY)
    entry = crawl.files[url]
    assert (entry["reason"], entry["etag"], entry["media_type"]) == ("transformed", None, "a/b")


# -- other handlers ----------------------------------------------------------------------------


def test_a_users_subclass_of_scrapys_handler_is_wrapped(origin: Origin, store: Path) -> None:
    url = origin.put("/big.bin", BODY, cut(300_000, "close"))
    handlers = {"DOWNLOAD_HANDLERS": {"http": "support.components.MyHandler"}}
    crawl = run_crawl([url], store, settings=handlers)
    assert_stored(store, crawl.files.get(url), BODY)
    assert crawl.files[url]["resumed_from"] == 300_000
    assert crawl.stat("test/my_handler") == 2
    assert crawl.stat("streaming/bytes_received") == len(BODY)


def test_a_foreign_handler_is_left_alone_and_its_bodies_are_stored(web: WebServer, store: Path) -> None:
    """Buffered mode, said once."""
    sizes = [300_000, 300_001, 300_002]
    bodies = {web.put(f"foreign/{size}.bin", body): body for size in sizes for body in [os.urandom(size)]}
    handlers = {"DOWNLOAD_HANDLERS": {"http": "support.components.ForeignHandler"}}
    crawl = run_crawl(list(bodies), store, settings=handlers)
    for url, body in bodies.items():
        assert_stored(store, crawl.files.get(url), body)
    again = run_crawl(list(bodies), store, settings=handlers | {"STREAMING_REVALIDATE": "always"})
    assert again.stat("file_status_count/uptodate") == len(bodies)
    assert [line.status for line in web.served()] == [200] * 3 + [304] * 3
    assert crawl.log.count("falling back to buffered bodies for http: ") == 1


def test_the_http_cache_does_not_stand_in_the_way(origin: Origin, store: Path, tmp_path: Path) -> None:
    url = origin.put("/big.bin", BODY, cut(300_000, "close"))
    cache = {
        "HTTPCACHE_ENABLED": True,
        "HTTPCACHE_DIR": str(tmp_path / "cache"),
        "STREAMING_REVALIDATE": "always",
    }
    for _ in range(2):
        crawl = run_crawl([url], store, settings=cache)
        assert_stored(store, crawl.files.get(url), BODY)
    held = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("response_body"))
    assert held < 1000


@pytest.mark.parametrize("reactor", ["selectreactor.SelectReactor", "epollreactor.EPollReactor"])
def test_a_reactor_without_asyncio_works(origin: Origin, store: Path, reactor: str) -> None:
    url, tiny = origin.put("/big.bin", BODY, cut(300_000, "close")), origin.put("/tiny", TINY)
    crawl = run_crawl([url, tiny], store, settings={"TWISTED_REACTOR": f"twisted.internet.{reactor}"})
    assert_stored(store, crawl.files.get(url), BODY)
    assert_stored(store, crawl.files.get(tiny), TINY)
    assert crawl.files[url]["resumed_from"] == 300_000
    assert reactor.rpartition(".")[2] in crawl.log


def test_parts_work_alone_by_their_paths(origin: Origin, store: Path) -> None:
    """Without the add-on, each component named in the settings."""
    url = origin.put("/big.bin", BODY, cut(300_000, "close"))
    settings = {
        "ADDONS": {},
        "EXTENSIONS": {"scrapy_streaming.extension.StreamingExtension": 0},
        "DOWNLOADER_MIDDLEWARES": {"scrapy_streaming.middleware.ResumeMiddleware": 595},
        "DOWNLOAD_HANDLERS": {"http": "scrapy_streaming.handlers.StreamingDownloadHandler"},
        "ITEM_PIPELINES": {"scrapy_streaming.pipeline.StreamingFilesPipeline": 1},
    }
    crawl = run_crawl([url], store, settings=settings)
    assert_stored(store, crawl.files.get(url), BODY)
    assert crawl.files[url]["resumed_from"] == 300_000
    origin.put("/two.bin", BODY)
    del settings["DOWNLOAD_HANDLERS"]
    crawl = run_crawl([origin.url("/two.bin")], store, settings=settings)
    assert_stored(store, crawl.files.get(origin.url("/two.bin")), BODY)
