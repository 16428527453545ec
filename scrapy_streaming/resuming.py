"""The crawl of ``scrapy streaming resume``: finishes downloads that nobody will ask for again (C4).

Through the project's own settings, middlewares and files pipeline; no other item pipeline sees them, and
no feed. The request that began a download is not known any more: its cookies, its other fields, its item.
So only what validators prove to be the rest of the same representation is taken, and only where the name
comes from the URL alone.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Self

from scrapy import Request, Spider, signals
from scrapy.crawler import AsyncCrawlerProcess, Crawler, CrawlerProcess
from scrapy.pipelines.files import FilesPipeline
from scrapy.settings import Settings
from scrapy.utils.misc import load_object
from w3lib.url import canonicalize_url

from scrapy_streaming import console
from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.extension import StreamingExtension
from scrapy_streaming.pipeline import StreamingFilesPipeline
from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import Storage, Use
from scrapy_streaming.storage.ledger import JobView

#: Jobs that are asked of the ledger at once.
PAGE: Final = 1000
#: Why a job is left to its own spider.
NO_PART: Final = "nothing of it has come that would prove what another request brings (own-request)"
ELSEWHERE: Final = "its download went to another URL than the one that is recorded (own-request)"
OWN_NAME: Final = "file_path() is the project's own and may need the item (own-name)"

#: Called for each job with what became of it: the entry of ``files``, an error, or a refusal's text.
Report = Callable[[JobView, Any], object]


class ResumeSpider(Spider):
    """Gives one item for each job that is ready, or whose worker has gone."""

    name = "scrapy-streaming-resume"

    def __init__(self, report: Report, *, named_by_url: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.report = report
        self.named_by_url = named_by_url

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
                    url, why = await self._url_of(extension, job)
                    if why:
                        self.report(job, f"{why}: run its spider")
                    else:
                        yield {"job": job, "url": url, "report": self.report}

    async def _url_of(self, extension: StreamingExtension, job: JobView) -> tuple[str, str]:
        """Return the URL that was asked for a job's part, or why it cannot be asked for again."""
        if not self.named_by_url:
            return "", OWN_NAME
        found = await extension.run(extension.storage.parts.find, job.key)
        if not found:
            return "", NO_PART
        url = found[0].state.url
        return (url, "") if canonicalize_url(url) == job.url else ("", ELSEWHERE)


def resume(settings: Settings, loaded: StreamingSettings, *, as_json: bool) -> int:
    """Finish the jobs, print a line for each as it ends; 0 if all were, 3 if some are left, 1 for none.

    Raises ``StoreError`` if there is no store.
    """
    if not loaded.enabled or loaded.store is None:
        msg = "nothing to resume: STREAMING_ENABLED is off, or FILES_STORE names no local directory"
        raise StoreError(msg, reason="store-missing")
    Storage.open(loaded, Use.LOOK).close()  # there is a store, with a ledger that can be used
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
    pipeline = _pipeline(settings)
    for name, value in _overrides(settings, pipeline).items():
        settings.set(name, value, "cmdline")
    modern = settings["TWISTED_REACTOR"] == "twisted.internet.asyncioreactor.AsyncioSelectorReactor"
    if (modern and not settings.getbool("FORCE_CRAWLER_PROCESS")) or not settings.getbool(
        "TWISTED_REACTOR_ENABLED", True
    ):
        process: Any = AsyncCrawlerProcess(settings)
    else:
        process = CrawlerProcess(settings)
    named_by_url = pipeline.file_path is FilesPipeline.file_path
    process.crawl(ResumeSpider, report=report, named_by_url=named_by_url)
    process.start()
    return not process.bootstrap_failed


def _overrides(settings: Settings, pipeline: type[StreamingFilesPipeline]) -> dict[str, Any]:
    """Return what is different from a crawl of the project's."""
    addons = settings.getdict("ADDONS")
    ours = "scrapy_streaming.Addon"
    if not any(load_object(path).__module__ == "scrapy_streaming.addon" for path in addons):
        addons = {**addons, ours: 300}
    return {
        "ADDONS": addons,
        "ITEM_PIPELINES": {pipeline: 1},
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

    _only_resumes = True

    def get_media_requests(self, item: Any, info: Any) -> list[Request]:
        """Return the one request of a job."""
        job: JobView = item["job"]
        given = {"work_id": job.work_id, "artifact_id": job.artifact_id}
        return [Request(item["url"], meta={"streaming": given})]

    def item_completed(self, results: list[Any], item: Any, info: Any) -> Any:
        """Report what became of the job."""
        [(ok, result)] = results
        item["report"](item["job"], result if ok else result.value)
        return item
