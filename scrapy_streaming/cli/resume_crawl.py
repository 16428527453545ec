"""The crawl of ``scrapy streaming resume``: finishes downloads that no spider will request again (C4).

What may live here: its spider, its pipeline and its settings. It uses the project's own settings,
middlewares and files pipeline, but no other item pipeline and no feed. A job whose request was a plain GET is
requested again, and its file gets the name that was recorded with the claim. The cookies, fields and item of
any other job are no longer known: only bytes that validators prove to be the rest of the same representation
are accepted, and only where the name depends on the URL alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Self

from scrapy import Request, Spider, signals
from scrapy.crawler import AsyncCrawlerProcess, Crawler, CrawlerProcess
from scrapy.downloadermiddlewares.cookies import CookiesMiddleware
from scrapy.pipelines.files import FilesPipeline
from scrapy.settings import Settings
from scrapy.utils.defer import maybe_deferred_to_future
from scrapy.utils.misc import load_object
from twisted.internet.defer import Deferred
from w3lib.url import canonicalize_url

from scrapy_streaming.extension import StreamingExtension
from scrapy_streaming.pipeline import StreamingFilesPipeline
from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.runtime.crawl import Runtime
from scrapy_streaming.storage.job_request import Repeat
from scrapy_streaming.storage.ledger import JobView

#: Jobs read from the ledger at a time.
PAGE: Final = 1000
#: The key of a request's meta under which its job stands.
JOB: Final = "_streaming_job"
#: Why a job is left to its own spider: the texts of the report.
NO_PART: Final = "no byte of it was received that would prove what another request returns (own-request)"
ELSEWHERE: Final = "its download was redirected to another URL than the recorded one (own-request)"
NOT_PLAIN: Final = "its request was more than a plain GET of the project (own-request)"
ANOTHER_JOB: Final = "another request for its URL is another job here (own-request)"
OWN_NAME: Final = "file_path() is the project's own and may need the item (own-name)"

#: Called for each job with its result: the entry of ``files``, an error, or the text of a refusal.
Report = Callable[[JobView, Any], object]


class ResumeSpider(Spider):
    """Yields one item for each job that is ready, or whose worker no longer runs."""

    name = "scrapy-streaming-resume"

    def __init__(self, report: Report, *, named_by_url: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.report = report
        self.named_by_url = named_by_url
        self._in_work = 0
        self._all_done: Deferred[None] | None = None

    @classmethod
    def from_crawler(cls, crawler: Crawler, *args: Any, **kwargs: Any) -> Self:
        """Return the spider; it also reports the jobs that a stop leaves unfinished."""
        spider = super().from_crawler(crawler, *args, **kwargs)
        crawler.signals.connect(spider.item_left, signals.item_dropped)
        for signal in (signals.item_scraped, signals.item_dropped, signals.item_error):
            crawler.signals.connect(spider.item_done, signal)
        return spider

    def item_done(self) -> None:
        """Count a job that ended."""
        self._in_work -= 1
        if not self._in_work and self._all_done is not None:
            self._all_done.callback(None)
            self._all_done = None

    def item_left(self, item: dict[str, Any], exception: Exception) -> None:
        """Report a job that a stop left unfinished."""
        self.report(item["job"], exception)

    async def start(self) -> AsyncIterator[Any]:
        """Yield the items; return when all are done, because Scrapy checks an idle spider only every 5 s."""
        async for item in self._items():
            self._in_work += 1
            yield item
        if self._in_work:
            self._all_done = Deferred()
            await maybe_deferred_to_future(self._all_done)

    async def _items(self) -> AsyncIterator[dict[str, Any]]:
        extension = self.crawler.get_extension(StreamingExtension)
        if extension is None:
            return
        runtime = extension.runtime
        leased: set[int] = set()  # a job that fails becomes ready, and must not be yielded twice
        for state in (JobState.LEASED, JobState.READY):
            after = 0
            while page := await runtime.calls.result(
                runtime.storage.ledger.jobs(state, after=after, limit=PAGE)
            ):
                after = page[-1].id
                for job in page:
                    if job.id in leased:
                        continue
                    if state is JobState.LEASED:
                        leased.add(job.id)
                    request, why = await self._request_for(runtime, job)
                    if request is None:
                        self.report(job, f"{why}: run its spider")
                    else:
                        yield {"job": job, "request": request, "report": self.report}

    async def _request_for(self, runtime: Runtime, job: JobView) -> tuple[Request | None, str]:
        """Return the request that finishes a job, or why there is none."""
        url, why = (job.asked_url, "") if _is_plain(job) else await self._url_of_part(runtime, job)
        if url is None:
            return None, why
        # a cookie jar of its own: no cookies, also none that another job's response set
        given = {"work_id": job.work_id, "artifact_id": job.artifact_id}
        request = Request(url, meta={"streaming": given, "cookiejar": job.key, JOB: job})
        key, _ = runtime.requests.job(request, url=job.url)
        return (request, "") if key == job.key else (None, ANOTHER_JOB)

    async def _url_of_part(self, runtime: Runtime, job: JobView) -> tuple[str | None, str]:
        """Return the URL that a job's part was requested from, or why it cannot be requested again."""
        if not self.named_by_url:
            return None, NOT_PLAIN if job.plain is False else OWN_NAME
        found = await runtime.threads.run(runtime.storage.parts.find, job.key)
        if not found:
            return None, NO_PART
        url = found[0].state.url
        return (url, "") if canonicalize_url(url) == job.url else (None, ELSEWHERE)


def run_crawl(settings: Settings, report: Report) -> bool:
    """Run the crawl; return whether it could start."""
    base = _base(settings)
    # of the same name, so that settings by the class's name apply
    pipeline = type(base.__name__, (_Resuming, base), {})
    for name, value in _overrides(settings, pipeline).items():
        settings.set(name, value, "cmdline")
    modern = settings["TWISTED_REACTOR"] == "twisted.internet.asyncioreactor.AsyncioSelectorReactor"
    if (modern and not settings.getbool("FORCE_CRAWLER_PROCESS")) or not settings.getbool(
        "TWISTED_REACTOR_ENABLED", True
    ):
        process: Any = AsyncCrawlerProcess(settings)
    else:
        process = CrawlerProcess(settings)
    named_by_url = base.file_path is FilesPipeline.file_path
    process.crawl(ResumeSpider, report=report, named_by_url=named_by_url)
    process.start()
    return not process.bootstrap_failed


def _overrides(settings: Settings, pipeline: type[StreamingFilesPipeline]) -> dict[str, Any]:
    """Return the settings that differ from those of the project's crawls."""
    addons = settings.getdict("ADDONS")
    if not any(load_object(path).__module__ == "scrapy_streaming.addon" for path in addons):
        addons = {**addons, "scrapy_streaming.Addon": 300}
    return {
        "ADDONS": addons,
        "ITEM_PIPELINES": {pipeline: 1},
        "FEEDS": {},
        "JOBDIR": None,
        "LOG_ENABLED": True,
        "STREAMING_HELD": "skip",  # a running worker finishes its own jobs
        "STREAMING_STOP": "checkpoint",
    }


def _base(settings: Settings) -> type[StreamingFilesPipeline]:
    """Return the project's pipeline class, with its hooks."""
    classes = [load_object(path) for path in settings.getdict("ITEM_PIPELINES")]
    streaming = (each for each in classes if issubclass(each, StreamingFilesPipeline))
    base: type[StreamingFilesPipeline] = next(streaming, StreamingFilesPipeline)
    return base


def _is_plain(job: JobView) -> bool:
    """Whether a plain GET repeats the job's request, and the name of its file is known."""
    return job.plain is True and (job.named_by_url or job.asked_name is not None)


def _job_of(request: Request) -> JobView:
    job: JobView = request.meta[JOB]
    return job


class _ByJob:
    """Fingerprints requests by their jobs: two jobs may have one URL."""

    def fingerprint(self, request: Request) -> bytes:
        """Return the job's key."""
        return bytes.fromhex(_job_of(request).key)


class _Resuming(StreamingFilesPipeline):
    """Processes the items of ``ResumeSpider``, one job each."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fingerprinter = _ByJob()

    def get_media_requests(self, item: Any, info: Any) -> list[Request]:
        """Return the one request of a job."""
        return [item["request"]]

    def job_url(self, request: Request, item: Any = None) -> str:
        """Return the job's own URL, which a project's override may have derived from the request."""
        return _job_of(request).url

    def _repeat(self, request: Request, path: str, expected: Any) -> Repeat | None:
        """Return what was recorded with the claim: this request is not the job's own."""
        job = _job_of(request)
        if job.plain is None:
            return None
        return Repeat(job.plain, job.asked_url, "" if job.named_by_url else job.asked_name)

    def _takes_only_the_rest(self, item: Any) -> bool:
        return not _is_plain(item["job"])

    def file_path(self, request: Request, response: Any = None, info: Any = None, *, item: Any = None) -> str:
        """Return the recorded name, or the hook's if it depends on the response and needs no item."""
        job = _job_of(request)
        if not _is_plain(job):
            return super().file_path(request, response=response, info=info)
        if job.asked_name is None:
            return FilesPipeline.file_path(self, request, response=response, info=info)
        if response is None:
            return job.asked_name
        try:
            if super().file_path(request, info=info) == job.asked_name:
                return super().file_path(request, response=response, info=info)
        except Exception:  # noqa: BLE001 - a hook that needs the item may raise anything without it
            return job.asked_name
        return job.asked_name

    def item_completed(self, results: list[Any], item: Any, info: Any) -> Any:
        """Report the result of the job."""
        self._drop_cookies(item["job"])
        [(ok, result)] = results
        item["report"](item["job"], result if ok else result.value)
        return item

    def _drop_cookies(self, job: JobView) -> None:
        cookies = self.crawler.get_downloader_middleware(CookiesMiddleware)
        if cookies is not None:
            cookies.jars.pop(job.key, None)
