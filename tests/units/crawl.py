"""A crawl without a network, a disk or a reactor: the runtime on stand-ins.

What may live here: what puts stand-ins together for the units of one crawl. Needs a running event loop.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from scrapy import Request, Spider
from scrapy.settings import Settings
from scrapy.signalmanager import SignalManager
from scrapy.utils.request import RequestFingerprinter
from units.fakes import FakeLedger, FakeStats

from scrapy_streaming.context import CONTEXT, DownloadContext
from scrapy_streaming.protocol.jobs import Granted
from scrapy_streaming.runtime.crawl import Runtime
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.job_request import JobRequest

URL = "https://h.example/a.bin"
KEY = "ab" * 32
JOB = JobRequest("w", "", URL, "cd" * 32)


async def turn(times: int = 10) -> None:
    """Let everything on the event loop have its turn."""
    for _ in range(times):
        await asyncio.sleep(0)


class FakeCrawler:
    """A crawl that has begun; a test ends ``crawling`` to stop it."""

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        self.settings = Settings(settings or {})
        self.stats = FakeStats()
        self.signals = SignalManager(self)
        self.spider = Spider("unit")
        self.crawling = True
        self.engine = None
        self.stopped = False
        self.extension: Any = None
        self.request_fingerprinter = RequestFingerprinter(self)

    def get_extension(self, _kind: type) -> Any:
        return self.extension

    def get_downloader_middleware(self, _kind: type) -> None:
        return None

    async def stop_async(self) -> None:
        self.crawling = False
        self.stopped = True


@dataclass
class FakeParts:
    """A store with no part in it; ``discarded`` are the keys whose parts were to go."""

    directory: str = "/nowhere"
    discarded: list[str] = field(default_factory=list)

    def may_have(self, _key: str, _fence: int) -> bool:
        return False

    def find(self, _key: str) -> list[Any]:
        return []

    def discard_whole(self, key: str, _fence: int) -> None:
        self.discarded.append(key)


@dataclass
class Crawl:
    """One crawl on stand-ins; ``stat`` reads a statistic without its prefix."""

    crawler: FakeCrawler
    ledger: FakeLedger
    runtime: Runtime

    def stat(self, name: str) -> int:
        found: int = self.crawler.stats.values.get(f"streaming/{name}", 0)
        return found

    async def context(self, request: Request | None = None) -> DownloadContext:
        """Return the context of a job that this crawl claims; *request* carries it."""
        claim = await self.runtime.jobs.claim(KEY, JOB)
        assert isinstance(claim, Granted)
        context = DownloadContext(KEY, JOB, claim.lease)
        if request is not None:
            request.meta[CONTEXT] = context
        return context


def crawl(ledger: FakeLedger, blobs: Any = None, settings: dict[str, Any] | None = None) -> Crawl:
    """Return a crawl over *ledger* and *blobs*."""
    loaded = {"FILES_STORE": "/nowhere", "STREAMING_LEASE_SECONDS": 60, **(settings or {})}
    crawler = FakeCrawler(loaded)
    storage: Any = SimpleNamespace(
        jobs=ledger,
        ledger=ledger,
        parts=FakeParts(),
        blobs=blobs or SimpleNamespace(folders=()),
        kept={},
        worker_id=ledger.worker_id,
        notes=(),
    )
    streaming = StreamingSettings.load(crawler.settings, {})
    runtime = Runtime(crawler, streaming, storage, lambda: None)  # type: ignore[arg-type]
    crawler.extension = SimpleNamespace(runtime=runtime, settings=streaming, storage=storage)
    return Crawl(crawler, ledger, runtime)
