"""A streaming crawl warns of nothing that stock does not: warnings of today are errors of tomorrow (C16).

Each runs in a process of its own in which every warning is an error.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

from support.beside import beside
from support.crawl import Crawl, assert_stored, run_crawl, wait_until
from support.origin import Answer, Asked, Origin, Resource, cut, honest

ERRORS = {"PYTHONWARNINGS": "error"}
BODY = bytes(range(256)) * 2000
SETTINGS = {
    "DOWNLOADER_MIDDLEWARES": {"support.hooks.Above": 500, "support.hooks.Below": 700},
    "MEDIA_ALLOW_REDIRECTS": True,
    "AUTOTHROTTLE_ENABLED": True,
    "AUTOTHROTTLE_START_DELAY": 0,
    "RETRY_TIMES": 3,
}


def moved(asked: Asked, resource: Resource) -> Answer:
    return Answer(302, {"Location": "/look/a.bin"})


def warned(crawl: Crawl) -> set[str]:
    """Return the warnings anywhere in a log, as errors or as lines."""
    return set(re.findall(r"\w*Warning: .*", crawl.log))


def test_a_crawl_with_warnings_as_errors_is_as_stocks(origin: Origin, tmp_path: Path) -> None:
    """C16: own hooks and middlewares, redirects, retries, bodies that break off; then 304s and Ctrl-C."""
    busy = Answer(503)
    urls = [
        origin.put("/look/a.bin", BODY),
        origin.put("/look/page.html", b"<html><title>page</title>"),
        origin.put("/disposition/a.pdf", BODY),
        origin.put("/hook/replace.bin", BODY),
        origin.put("/moved", b"", default=moved),
        origin.put("/busy", BODY, busy, honest, busy, honest),
        origin.put("/cut", BODY, cut(300_000, "close"), honest, cut(300_000, "close"), honest),
        origin.url("/missing"),
    ]
    pipelines = {
        name: {"ITEM_PIPELINES": {f"support.hooks.{name}": 1}} for name in ("OverStock", "OverStreaming")
    }
    stock = {"ADDONS": {}, **pipelines["OverStock"]}
    found = beside(
        tmp_path, urls, settings=SETTINGS, stock=stock, streaming=pipelines["OverStreaming"],
        env=ERRORS,
    )  # fmt: skip
    # a streaming crawl logs how many bytes were kept, and one line of the file that failed (C18)
    found.assert_same("Got data loss", "/missing>", "[scrapy.pipelines.media] ERROR")
    assert warned(found.streaming) == warned(found.stock)
    assert found.streaming.stat("streaming/bytes_kept") == 300_000
    assert found.streaming.stat("retry/count") == found.stock.stat("retry/count") == 2
    never = Answer(200, Resource(BODY).fields(), BODY, cut=50_000, end="stall")
    slow = origin.put("/slow.bin", BODY, never)

    def stop(process: Any) -> None:
        wait_until(lambda: [asked for asked in origin.asked("/slow.bin") if asked.sent])
        wait_until(lambda: [asked.status for asked in origin.requests].count(304) >= 5)
        process.send_signal(signal.SIGINT)

    settings = SETTINGS | pipelines["OverStreaming"] | {"STREAMING_REVALIDATE": "always"}
    again = run_crawl([*urls, slow], found.store, settings=settings, env=ERRORS, meanwhile=stop)
    assert again.stat("streaming/decision/not-modified") >= 4
    assert slow not in again.files
    assert "'finish_reason': 'shutdown'" in again.log
    assert warned(again) == warned(found.stock)
    assert_stored(found.store, again.files.get(urls[0]), BODY)
