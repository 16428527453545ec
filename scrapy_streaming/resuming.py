"""The crawl of ``scrapy streaming resume``: finishes jobs that nobody will ask for again (C4).

Plain GETs under the recorded URLs, through the project's own settings, middlewares and files pipeline;
no other item pipeline sees them, and no feed.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Self

from scrapy import Request, Spider, signals
from scrapy.crawler import AsyncCrawlerProcess, Crawler, CrawlerProcess
from scrapy.settings import Settings
from scrapy.utils.misc import load_object

from scrapy_streaming import console
from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.extension import StreamingExtension
from scrapy_streaming.pipeline import StreamingFilesPipeline
from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.ledger import JobView

#: Jobs that are asked of the ledger at once.
PAGE: Final = 1000
#: An artifact id that a request's own fields or body made, or its fingerprint: no plain GET is that job.
_OF_A_REQUEST = re.compile(r"[0-9a-f]{16,}(\.[0-9a-f]+)?", re.ASCII)

#: Called for each job with what became of it: the entry of ``files``, an error, or a refusal's text.
Report = Callable[[JobView, Any], object]


class ResumeSpider(Spider):
    """Gives one item for each job that is ready, or whose worker has gone."""

    name = "scrapy-streaming-resume"

    def __init__(self, report: Report, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.report = report

    @classmethod
    def from_crawler(cls, crawler: Crawler, *args: Any, **kwargs: Any) -> Self:
        """Return the spider; it reports what a stop leaves, too."""
        spider = super().from_crawler(crawler, *args, **kwargs)
        crawler.signals.connect(spider.left, signals.item_dropped)
        return spider

    def left(self, item: dict[str, Any], exception: Exception) -> None:
        """Report a job that a stop left."""
        self.report(item["job"], exception)

    async def start(self) -> AsyncIterator[Any]:
        """Yield the items."""
        extension = self.crawler.get_extension(StreamingExtension)
        if extension is None:
            return
        for state in (JobState.LEASED, JobState.READY):
            after = 0
            while page := await extension.settle(
                extension.storage.ledger.jobs(state, after=after, limit=PAGE)
            ):
                after = page[-1].id
                for job in page:
                    if _OF_A_REQUEST.fullmatch(job.artifact_id):
                        self.report(job, "not a plain GET: only its own spider can ask for it (own-request)")
                    else:
                        yield {"job": job, "report": self.report}


def resume(settings: Settings, loaded: StreamingSettings, *, as_json: bool) -> int:
    """Finish the jobs, print a line for each as it ends; 0 if all were, 3 if some are left, 1 for none.

    Raises ``StoreError`` if there is no store.
    """
    if not loaded.enabled or loaded.store is None:
        msg = "nothing to resume: STREAMING_ENABLED is off, or FILES_STORE names no local directory"
        raise StoreError(msg, reason="store-missing")
    left = 0

    def report(job: JobView, result: Any) -> None:
        nonlocal left
        done = isinstance(result, dict)
        left += not done
        more = result if done else {"error": console.said_of(result)}
        if as_json:
            document = {"key": job.key, "url": job.url, "done": done, **more}
            console.out(json.dumps(document))
        else:
            console.line(job.key, "done" if done else "left", job.url, more.get("path") or more["error"])

    if not _crawl(settings, report):
        return 1
    return 3 if left else 0


def _crawl(settings: Settings, report: Report) -> bool:
    """Run the crawl; return whether it could begin."""
    for name, value in _overrides(settings).items():
        settings.set(name, value, "cmdline")
    modern = settings["TWISTED_REACTOR"] == "twisted.internet.asyncioreactor.AsyncioSelectorReactor"
    if (modern and not settings.getbool("FORCE_CRAWLER_PROCESS")) or not settings.getbool(
        "TWISTED_REACTOR_ENABLED", True
    ):
        process: Any = AsyncCrawlerProcess(settings)
    else:
        process = CrawlerProcess(settings)
    process.crawl(ResumeSpider, report=report)
    process.start()
    return not process.bootstrap_failed


def _overrides(settings: Settings) -> dict[str, Any]:
    """Return what is different from a crawl of the project's."""
    addons = settings.getdict("ADDONS")
    ours = "scrapy_streaming.Addon"
    if not any(load_object(path).__module__ == "scrapy_streaming.addon" for path in addons):
        addons = {**addons, ours: 300}
    return {
        "ADDONS": addons,
        "ITEM_PIPELINES": {_pipeline(settings): 1},
        "FEEDS": {},
        "JOBDIR": None,
        "LOG_ENABLED": True,
        "STREAMING_HELD": "skip",  # whoever lives finishes its own
        "STREAMING_STOP": "checkpoint",
    }


def _pipeline(settings: Settings) -> type[StreamingFilesPipeline]:
    """Return the project's pipeline, its hooks and all, that asks for jobs."""
    classes = [load_object(path) for path in settings.getdict("ITEM_PIPELINES")]
    ours = (each for each in classes if issubclass(each, StreamingFilesPipeline))
    base: type[StreamingFilesPipeline] = next(ours, StreamingFilesPipeline)
    return type(base.__name__, (_Resuming, base), {})  # settings by the class's name hold


class _Resuming(StreamingFilesPipeline):
    """Takes the jobs that ``ResumeSpider`` gives for its items."""

    def get_media_requests(self, item: Any, info: Any) -> list[Request]:
        """Return the one request of a job."""
        job: JobView = item["job"]
        given = {"work_id": job.work_id, "artifact_id": job.artifact_id}
        return [Request(job.url, meta={"streaming": given})]

    def item_completed(self, results: list[Any], item: Any, info: Any) -> Any:
        """Report what became of the job."""
        [(ok, result)] = results
        item["report"](item["job"], result if ok else result.value)
        return item
