"""What the files pipeline does around the hooks of ``MediaPipeline``: items counted, failures reported.

What may live here: what holds whatever a subclass makes of the hooks; they need not call ``super()``.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from functools import partial
from typing import Any, ClassVar

from scrapy import Request, Spider, signals
from scrapy.crawler import Crawler
from scrapy.downloadermiddlewares.retry import RetryMiddleware
from scrapy.exceptions import DontCloseSpider, DropItem
from scrapy.http import Response
from scrapy.pipelines.files import FilesPipeline
from scrapy.pipelines.media import MediaPipeline
from scrapy.utils.defer import ensure_awaitable, maybe_deferred_to_future
from scrapy.utils.python import global_object_name
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from scrapy_streaming.context import DownloadContext, Tries, context_of
from scrapy_streaming.exceptions import LeaseLost, LedgerError, StoreError, WriteFailed
from scrapy_streaming.extension import StreamingExtension, why_without
from scrapy_streaming.failures import (
    FailedFile,
    FailuresField,
    FileRefused,
    failed_file,
    is_stop,
    log_failed,
    mark,
    mark_raised,
    not_of_a_file,
    not_said_before,
    stopped,
)
from scrapy_streaming.pipeline.files_store import AtomicFilesStore, stock_schemes
from scrapy_streaming.pipeline.recorded_files import RecordedFiles
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.request_jobs import expected_of
from scrapy_streaming.runtime.shutdown import CrawlStopping

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: Errors of the machine, which prove nothing against a part: it stays.
KEEPING = (WriteFailed, LedgerError, LeaseLost, StoreError)

#: Results kept in memory; older ones are asked of the ledger again.
RESULT_CACHE = 10_000


class AroundHooks(FilesPipeline):
    """A ``FilesPipeline`` whose hooks are called between what counts, reports and ends jobs.

    ``_off``: there is no extension, and everything is stock.
    """

    STORE_SCHEMES: ClassVar[dict[str, Any]] = {
        **FilesPipeline.STORE_SCHEMES,
        "": AtomicFilesStore,
        "file": AtomicFilesStore,
    }

    def __init__(self, store_uri: Any, *args: Any, crawler: Crawler, **kwargs: Any) -> None:
        extension = crawler.get_extension(StreamingExtension)
        self._off = extension is None
        if self._off:
            self.__dict__["STORE_SCHEMES"] = stock_schemes(self.STORE_SCHEMES)  # FilesPipeline reads self's
        super().__init__(store_uri, *args, crawler=crawler, **kwargs)
        if extension is None:
            for reason in why_without(crawler):
                logger.warning("%s works as FilesPipeline does: %s", global_object_name(type(self)), reason)
            return
        self._runtime = runtime = extension.runtime
        self._jobs, self._stats, self._publication = runtime.jobs, runtime.stats, runtime.publication
        self._recorded = RecordedFiles(runtime, lambda: self.expires)
        self._fingerprinter = _ByExpectation(self._fingerprinter)
        self._items = 0
        self._items_done: Deferred[None] | None = None
        self._failures_field = FailuresField(extension.settings.failures_field)
        self._wrap_hooks()
        crawler.signals.connect(self._keep_open, signals.spider_idle)

    def _wrap_hooks(self) -> None:
        """Act around the hooks of ``MediaPipeline``: a subclass's need not call those of this class."""
        self._completed_hook, self._downloaded_hook, self._failed_hook, self._asked_hook = (
            self.item_completed,
            self.media_downloaded,
            self.media_failed,
            self.media_to_download,
        )
        self.__dict__.update(
            item_completed=self._completed_or_left,
            media_to_download=self._asked,
            media_downloaded=self._downloaded,
            media_failed=self._failed,
        )

    def open_spider(self, spider: Spider | None = None) -> None:
        """Start with an empty cache of results, of bounded size."""
        if self._off:
            super().open_spider()
            return
        if self.crawler.spider is None:
            msg = "open_spider() before the crawl has a spider"
            raise RuntimeError(msg)
        self.spiderinfo = self.SpiderInfo(self.crawler.spider)
        self.spiderinfo.downloaded = _Bounded()
        if not self._runtime.plans:
            logger.warning(
                "files are stored, but not resumed, nor asked about by conditional requests: "
                "scrapy_streaming.middleware.ResumeMiddleware is not in DOWNLOADER_MIDDLEWARES"
            )
        logging.getLogger(MediaPipeline.__module__).addFilter(not_said_before)
        logging.getLogger(RetryMiddleware.__module__).addFilter(not_of_a_file)

    # -- items -----------------------------------------------------------------------------

    async def process_item(self, item: Any, spider: Spider | None = None) -> Any:
        """Return the item with its files.

        The crawl is kept open meanwhile: Scrapy 2.15 does not count an item of ``start()`` as work.
        """
        if self._off:
            return await super().process_item(item)
        self._items += 1
        self._runtime.items.enter()
        try:
            return await super().process_item(item)
        finally:
            self._items -= 1
            self._runtime.items.leave()
            if not self._items and self._items_done is not None:
                self._items_done.callback(None)

    def _completed_or_left(self, results: list[Any], item: Any, info: MediaPipeline.SpiderInfo) -> Any:
        """Call the hook ``item_completed``, unless a stop broke files of the item off.

        Raises ``DropItem`` then: the next crawl comes to the whole item again (C2).
        """
        left = sum(1 for ok, value in results if not ok and is_stop(getattr(value, "value", None)))
        if left:
            msg = f"{CrawlStopping.reason}: {left} of its {len(results)} files are left to the next crawl"
            raise DropItem(msg)
        self._failures_field.fill(item, results)
        return self._completed_hook(results, item, info)

    def _keep_open(self) -> None:
        if self._items:
            raise DontCloseSpider

    async def close_spider(self) -> None:
        """Wait for the items in work."""
        if not self._off and self._items:
            self._items_done = Deferred()
            await maybe_deferred_to_future(self._items_done)

    # -- around the hooks --------------------------------------------------------------------

    async def _asked(self, request: Request, info: MediaPipeline.SpiderInfo, *, item: Any = None) -> Any:
        """Call the hook ``media_to_download``; report a file that it refuses, before any request."""
        try:
            return await ensure_awaitable(self._asked_hook(request, info, item=item))
        except Exception as error:
            if not is_stop(error):
                mark(error, self._report(request, error, Tries(), keeps=True))
            raise

    async def _downloaded(
        self, response: Response, request: Request, info: MediaPipeline.SpiderInfo, *, item: Any = None
    ) -> Any:
        """Call the hook ``media_downloaded``; a job that it did not complete is given back."""
        result = await ensure_awaitable(self._downloaded_hook(response, request, info, item=item))
        context = context_of(request)
        if context is not None:
            self._jobs.release_unless_ended(context.lease)
        return result

    def _failed(self, failure: Failure, request: Request, info: MediaPipeline.SpiderInfo) -> Any:
        """Report the failure, give the job back, then call the hook ``media_failed``."""
        context, error = context_of(request), error_of(failure)
        if context is None:
            failed = self._report(request, error, Tries(), keeps=True)
        elif isinstance(error, CrawlStopping):
            self._stats.count(f"failed/{error.reason}")
            self._jobs.release(context.lease)
            raise stopped(request) from error
        else:
            if not self._runtime.plans:  # no middleware counted
                context.tries.sent = 1
            failed = self._report(request, error, context.tries, keeps=isinstance(error, KEEPING))
            self._give_back(context, failed.reason, error)
        mark(error, failed)
        try:
            return self._failed_hook(failure, request, info)
        except Exception as raised:
            mark_raised(raised, error, failed)
            raise

    def _report(self, request: Request, error: Exception, tries: Tries, *, keeps: bool) -> FailedFile:
        """Count and log a file that is not stored; return what is known of that."""
        failed = failed_file(request, error, tries, keeps=keeps)
        self._stats.count(f"failed/{failed.reason}")
        log_failed(request, error, failed, tries, self.crawler.spider)
        return failed

    def _give_back(self, context: DownloadContext, code: str, error: Exception) -> None:
        """End the job as failed; a whole part that was refused goes first: the next file is another."""
        fail = partial(
            self._jobs.fail,
            context.lease,
            code,
            str(error),
            permanent=isinstance(error, FileRefused) and error.permanent,
            retry_after=error.retry_after if isinstance(error, FileRefused) else None,
        )
        if context.tries.whole and not isinstance(error, KEEPING):
            self._runtime.parts.discard_whole(context, fail)
        else:
            fail()


class _ByExpectation:
    """Separates requests by the digest they expect, too: the result of one is no answer to the other."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def fingerprint(self, request: Request) -> bytes:
        """Return the project's fingerprint, with the expected digest if there is one."""
        fingerprint: bytes = self._inner.fingerprint(request)
        try:
            expected = expected_of(request)
        except ValueError:  # refused when the job is asked for
            return fingerprint
        return fingerprint if expected is None else fingerprint + bytes.fromhex(expected.hex)


class _Bounded(OrderedDict[bytes, Any]):
    """A dictionary that drops its oldest entry beyond ``RESULT_CACHE``."""

    def __setitem__(self, key: bytes, value: Any) -> None:
        super().__setitem__(key, value)
        if len(self) > RESULT_CACHE:
            self.popitem(last=False)


def error_of(failure: Failure) -> Exception:
    """Return the error of a failed file: the pipeline catches no other kind."""
    error = failure.value
    assert isinstance(error, Exception)
    return error
