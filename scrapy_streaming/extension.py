"""The extension: opens the storage of a crawl, builds its runtime, connects its signals.

What may live here: the start and the end of a crawl, and what it logs then. Other components find the
extension by ``crawler.get_extension(StreamingExtension)``, and the work in its ``runtime``.
"""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from typing import Any, Self

from itemadapter import ItemAdapter, is_item
from scrapy import signals
from scrapy.crawler import Crawler
from scrapy.exceptions import NotConfigured
from scrapy.utils.asyncio import run_in_thread

from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.reporting.metrics import Metrics
from scrapy_streaming.runtime.crawl import Runtime
from scrapy_streaming.settings import StreamingSettings, unknown_settings
from scrapy_streaming.storage.store import Storage

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)


class StreamingExtension:
    """Opens the storage when it is made and closes it when the engine stops; ``runtime`` works in between."""

    def __init__(self, crawler: Crawler, settings: StreamingSettings) -> None:
        self.settings = settings
        self.storage = Storage.open(settings)
        write_metrics = partial(Metrics(crawler, settings).write, self.storage.worker_id)
        self.runtime = Runtime(crawler, settings, self.storage, write_metrics)
        self._crawler = crawler
        self._result_field = crawler.settings.get("FILES_RESULT_FIELD") or "files"

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Self:
        """Return the extension; raise ``NotConfigured`` when streaming is off or cannot be.

        Raises ``SettingError``, ``StoreError``, ``LedgerError`` or ``OSError`` (a full disk) when the
        crawl must not start, after one line in the log.
        """
        settings = StreamingSettings.load(crawler.settings, os.environ)
        if not settings.enabled:
            raise NotConfigured  # as the user wants it: nothing to log
        if settings.why_off:
            raise NotConfigured(settings.why_off)
        try:
            extension = cls(crawler, settings)
        except (StreamingError, OSError) as error:
            logger.critical("the crawl does not start: %s", " ".join(str(error).split()))
            _silence_task()
            raise
        crawler.signals.connect(extension.engine_started, signals.engine_started)
        crawler.signals.connect(extension.engine_stopped, signals.engine_stopped)
        crawler.signals.connect(extension.item_scraped, signals.item_scraped)
        return extension

    async def engine_started(self) -> None:
        """Log what is on and what the user should know; start the runtime."""
        self._log_parts()
        for note in self.storage.notes:
            logger.warning("%s", note)
        for name, near in unknown_settings(self._crawler.settings):
            hint = f"; did you mean {near}?" if near else ""
            logger.warning("%s is no setting of scrapy-streaming%s", name, hint)
        if not self._crawler.settings.getbool("DOWNLOAD_FAIL_ON_DATALOSS"):
            logger.info(
                "DOWNLOAD_FAIL_ON_DATALOSS=False holds for pages only: no file is stored that may be cut, "
                "it is resumed instead, or fails; with STREAMING_ENABLED=False it is stored"
            )
        self.runtime.start()

    def _log_parts(self) -> None:
        """Log which parts of the package are on, and what the others mean."""
        settings = self.settings
        why = settings.why_no_ledger
        logger.info(
            "Streaming architecture integrations: streaming=%s idempotency=%s schema=%s",
            True, why is None, settings.why_no_database is None,
        )  # fmt: skip
        if why is not None:
            logger.info(
                "no job is recorded (%s): a file that stands under its name is up to date until "
                "FILES_EXPIRES, and workers know nothing of each other", why,
            )  # fmt: skip
        if not settings.finalization_enabled:
            ignored = "; STREAMING_LINK_MODE=none is off with it" if settings.link_mode == "none" else ""
            logger.info(
                "files are stored under their names and nowhere else "
                "(STREAMING_FINALIZATION_ENABLED is off)%s", ignored,
            )  # fmt: skip

    async def engine_stopped(self) -> None:
        """Keep what is open and close the storage."""
        await self.runtime.end()
        await run_in_thread(self.storage.close)

    def item_scraped(self, item: Any) -> None:
        """Note that an item with files was delivered; the ledger records it some time later."""
        files = ItemAdapter(item).get(self._result_field) if is_item(item) else None
        files = files if isinstance(files, list | tuple) else []
        self.runtime.jobs.deliver(str(file.get("completion_id")) for file in files if isinstance(file, dict))


def runtime_of(crawler: Crawler) -> Runtime:
    """Return the runtime of a crawl; raise ``NotConfigured`` if the extension is off.

    The error says why if a component was named without the extension, and nothing if it was switched off.
    """
    extension = crawler.get_extension(StreamingExtension)
    if extension is None:
        raise NotConfigured(*why_without(crawler))
    return extension.runtime


def why_without(crawler: Crawler) -> tuple[str, ...]:
    """Return why a component without the extension does nothing; nothing if it was switched off."""
    if StreamingSettings.load(crawler.settings, os.environ).why_off:
        return ()
    return ("scrapy_streaming.extension.StreamingExtension is not in EXTENSIONS",)


def _silence_task() -> None:
    """Have asyncio not log the error that ends the crawl's task, which has its line in the log.

    Scrapy exits with 1. A caller that awaits the crawl gets the error all the same.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs: the crawl is a Deferred, and Twisted logs what becomes of it
        return
    if task is not None:
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
