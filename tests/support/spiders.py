"""The spiders of the crawls: what they do is in ``job.json``; what happened goes to files beside it.

What may live here: spiders that ``support.crawl`` runs by name, and how they report.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import attrs
import scrapy
from itemadapter import ItemAdapter, is_item
from scrapy import signals
from scrapy.exceptions import StopDownload

BASE = Path(os.environ["CRAWL_BASE"])
JOB = json.loads((BASE / "job.json").read_text())

if "mutant" in JOB:  # takes something out, to show that the tests notice
    importlib.import_module("support.mutants").apply(JOB["mutant"])


def write(file: str, document: dict) -> None:
    with (BASE / file).open("a") as stream:
        stream.write(json.dumps(document, default=str) + "\n")


class Spider(scrapy.Spider):
    """Writes items, statistics and notes; ends a crawl as soon as its items are done."""

    @classmethod
    def from_crawler(cls, crawler, *args, **kwargs):
        spider = super().from_crawler(crawler, *args, **kwargs)
        crawler.signals.connect(spider.item_done, signals.item_scraped)
        crawler.signals.connect(spider.save_stats, signals.engine_stopped)
        crawler.signals.connect(spider.headers_received, signals.headers_received)
        crawler.signals.connect(spider.bytes_received, signals.bytes_received)
        spider.signals, spider.done = {}, 0
        return spider

    def item_done(self, item):
        self.done += 1
        write("items.jsonl", dict(ItemAdapter(item)) if is_item(item) else {"item": repr(item)})

    def headers_received(self, headers, body_length, request):
        if request.url.startswith("http"):
            self.signals.setdefault(request.url, {"heads": 0, "length": 0, "bytes": 0})
            self.signals[request.url]["heads"] += 1
            self.signals[request.url]["length"] = body_length
        self.stop(request, "headers")

    def bytes_received(self, data, request):
        if request.url in self.signals:
            self.signals[request.url]["bytes"] += len(data)
        self.stop(request, "bytes")

    def stop(self, request, when):
        wanted = JOB.get("stop", {}).get(request.url)
        if wanted is not None and wanted["on"] == when:
            raise StopDownload(fail=wanted["fail"])

    async def save_stats(self):
        for url, counted in self.signals.items():
            write("notes.jsonl", {"signals": url, **counted})
        scale = 1 if sys.platform == "darwin" else 1024
        stats = dict(self.crawler.stats.get_stats())
        stats["test/maxrss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
        (BASE / "stats.json").write_text(json.dumps(stats, default=str))


class Requests(Spider):
    """The spider's own requests: ``{"url", "meta", "publish", …}`` each."""

    name = "requests"

    async def start(self):
        for wanted in JOB["urls"]:
            kwargs = {"method": wanted.get("method", "GET"), "headers": wanted.get("headers")}
            yield scrapy.Request(
                wanted["url"], meta=wanted.get("meta", {}), cb_kwargs={"publish": wanted.get("publish", 0)},
                dont_filter=True, errback=self.failed, **kwargs,
            )  # fmt: skip

    def failed(self, failure):
        error, response = failure.value, getattr(failure.value, "response", None)
        note = {"failed": failure.request.url, "error": type(error).__name__, "said": str(error)}
        write("notes.jsonl", note | {"kind": response and type(response).__name__})

    async def parse(self, response, publish):
        note = {
            "url": response.url,
            "kind": type(response).__name__,
            "status": response.status,
            "body": response.body.hex(),
            "flags": response.flags,
            "ip": str(response.ip_address),
            "latency": response.meta.get("download_latency"),
            "protocol": response.protocol,
            "meta": sorted(response.meta),
            "coding": response.headers.get("Content-Encoding"),
        }
        part = getattr(response, "part", None)
        if part is not None:
            note["part"] = {"length": part.length, "digest": str(part.digest), "path": part.path}
            note["part"]["read"] = part.path.read_bytes().hex()
        for _ in range(publish):
            published = await response.publish()
            note.setdefault("published", []).append(
                [str(published.digest), published.size, published.deduplicated]
            )
        if part is not None:
            note["part"]["read_again"] = part.path.read_bytes().hex()
        write("notes.jsonl", note)
        for url in JOB.get("follow", []):  # as careless spiders do: with the answer's whole meta
            yield scrapy.Request(url, meta=response.meta, cb_kwargs={"publish": 1})


class Files(Spider):
    """One item for each URL of the job."""

    name = "files"

    async def start(self):
        yield scrapy.Request("data:,", callback=self.parse, dont_filter=True)

    def parse(self, response):
        for url in JOB["urls"]:
            yield dict(url) if isinstance(url, dict) else {"file_urls": [url]}


class Own(Files):
    """Fetches the job's ``own`` URLs as parts of its own, looks at their files, then the same items."""

    name = "own"

    async def start(self):
        for url in JOB["own"]:
            yield scrapy.Request(url, meta={"streaming": True}, callback=self.parse_own)

    def parse_own(self, response):
        write("notes.jsonl", {"own": response.url, "size": response.part.path.stat().st_size})
        yield from self.parse(response)


@dataclass
class Data:
    title: str
    files: str = "a field of its own"


@attrs.define
class Attrs:
    title: str
    file_urls: list[str] | None = None


class Bare(scrapy.Item):
    title = scrapy.Field()


class Odd:
    def __repr__(self):
        return "an odd item"


class Kinds(Files):
    """Items of every kind, none of which names a file."""

    name = "kinds"

    def parse(self, response):
        yield {"title": "a dict"}
        yield {"title": "with a field", "files": "of its own"}
        yield {"title": "without any", "file_urls": None}
        yield Data("a dataclass")
        yield Attrs("of attrs")
        yield Bare(title="an item")
        yield Odd()
        for becomes in ("none", "text", "number", "bad"):
            yield {"title": becomes, "becomes": becomes}


@dataclass
class WithFailures:
    file_urls: list[str]
    files: list | None = None
    failures: list | None = None


@dataclass
class WithoutFailures:
    file_urls: list[str]
    files: list | None = None


class FilesItem(scrapy.Item):
    file_urls = scrapy.Field()
    files = scrapy.Field()


class Typed(Files):
    """Items of several kinds, each with all URLs of the job."""

    name = "typed"

    def parse(self, response):
        for kind in (WithFailures, WithoutFailures, FilesItem):
            yield kind(file_urls=JOB["urls"])


class Pages(Files):
    """Fetches the job's pages, then the same items."""

    name = "pages"

    async def start(self):
        for page in JOB["pages"]:
            yield scrapy.Request(page)


class OwnHandlers(Pages):
    """Brings the job's download handlers in its own settings."""

    name = "own-handlers"
    custom_settings: ClassVar[dict] = {"DOWNLOAD_HANDLERS": JOB.get("handlers", {})}


class FromStart(Spider):
    """The same items, from ``start()`` itself."""

    name = "from-start"

    async def start(self):
        for number, url in enumerate(JOB["urls"], 1):
            if number % 10 == 0:
                write("notes.jsonl", {"inside": number - self.done})
            yield {"file_urls": [url]}
