"""The parts of the runtime, put together for one crawl, and their timers.

What may live here: which part is handed which others, and the order in which they start and end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final
from weakref import WeakSet

from scrapy.crawler import Crawler
from scrapy.utils.asyncio import create_looping_call, run_in_thread
from scrapy.utils.defer import deferred_from_coro

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.request_jobs import RequestJobs
from scrapy_streaming.runtime.body_writer import BodyWriter, Budget
from scrapy_streaming.runtime.items import ItemsInWork
from scrapy_streaming.runtime.jobs import Jobs
from scrapy_streaming.runtime.ledger_calls import LedgerCalls
from scrapy_streaming.runtime.open_parts import OpenParts
from scrapy_streaming.runtime.rates import Rates
from scrapy_streaming.runtime.room import Room
from scrapy_streaming.runtime.shutdown import Shutdown, closes, finishes, let_scraper_close
from scrapy_streaming.runtime.space import Space
from scrapy_streaming.runtime.stats import Stats
from scrapy_streaming.runtime.stored_files import Publication, StoredFiles
from scrapy_streaming.runtime.threads import Threads
from scrapy_streaming.runtime.turns import Turns
from scrapy_streaming.runtime.upkeep import Upkeep
from scrapy_streaming.schemes import BufferingSchemes
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.store import Storage

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: Seconds between two checks whether the crawl stops, at most.
CHECK_PAUSE: Final = 0.25


class Runtime:
    """What the components of one crawl share.

    ``bodies`` are being received. ``plans``: the middleware is on, which plans requests. *write_metrics*
    is called in a thread when the crawl ends.
    """

    def __init__(
        self,
        crawler: Crawler,
        settings: StreamingSettings,
        storage: Storage,
        write_metrics: Callable[[], object],
    ) -> None:
        self.crawler = crawler
        self.settings = settings
        self.storage = storage
        self.plans = False
        self._write_metrics = write_metrics
        self.stats = Stats(crawler.stats)
        self.threads = Threads(self.stats)
        self.buffering = BufferingSchemes(warns=settings.io_enabled)
        self.items = ItemsInWork()
        self.bodies: WeakSet[BodyWriter] = WeakSet()
        self.budget = Budget()
        self.rates = Rates(settings.max_rate or ())
        self.turns = Turns.of(crawler.settings)
        self.requests = RequestJobs(crawler, settings)
        self.shutdown = Shutdown(
            crawler,
            self.items,
            finishes=finishes(settings.stop, crawler.settings),
            bodies=self.bodies,
            buffering=self.buffering,
            at_once=self._report,
        )
        self.calls = LedgerCalls(self._stop_without_ledger)
        self.jobs = Jobs(storage, settings, self.calls, self.shutdown, self.stats, self.turns)
        space = Space((storage.parts.directory, *storage.blobs.folders), settings.min_free_bytes)
        self.room = Room(space, self.bodies, settings.patience, self.stats, self.threads)
        self.parts = OpenParts(storage.parts, self.threads, crawler.settings.getint("DOWNLOAD_MAXSIZE"))
        self.files = StoredFiles(
            storage, self.calls, self.threads, self.room, self.stats, offline=self.requests.offline
        )
        self.publication = Publication(storage, self.files, self.jobs, self.parts, self.room, self.threads)
        self.upkeep = Upkeep(storage, self.calls, settings.history_days)
        self.shutdown.subscribe(self.room.break_off)
        self.shutdown.at_stop(self.upkeep.stop)
        self.shutdown.after_grace(self.calls.give_up)
        self._chores = create_looping_call(self._do_chores)
        self._checks = create_looping_call(self._check)

    def start(self) -> None:
        """Renew leases, tidy the store, and check for a stop from now on."""
        if self.settings.why_no_ledger is None:
            self.upkeep.start()
            self.jobs.renewals.start(self.storage.ledger.renew)
        self.shutdown.start()
        self._chores.start(self.settings.lease_seconds / 4, now=False)
        self._checks.start(min(CHECK_PAUSE, self.settings.lease_seconds / 16), now=False)

    async def end(self) -> None:
        """Close what is open, record what is still to be recorded; the storage may be closed then."""
        for loop in (self._chores, self._checks):
            if loop.running:
                loop.stop()
        self.jobs.end()
        self.shutdown.end()
        await self.parts.end()
        await self.upkeep.end()
        await self._report()

    def _do_chores(self) -> None:
        self.jobs.record_delivered()
        self.upkeep.check_epoch()
        self.jobs.renewals.check()

    def _check(self) -> None:
        self.room.keep_reserve()
        if not self.items.count and closes(self.crawler) and let_scraper_close(self.crawler):
            self.items.report_idle()
        self.shutdown.check()

    async def _report(self) -> None:
        await run_in_thread(self._write_metrics)

    def _stop_without_ledger(self, error: LedgerError) -> Any:
        """Stop the crawl: nothing that is in work can be finished."""
        self.shutdown.finish_nothing()
        logger.critical("the crawl stops, its ledger cannot be used any more: %s", error)
        deferred_from_coro(self.crawler.stop_async())
