"""The extension: owns the storage of a crawl, keeps its leases, notices a stop, counts what happens.

Every other component finds it by ``crawler.get_extension(StreamingExtension)``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar
from weakref import WeakSet

from itemadapter import ItemAdapter, is_item
from scrapy import Request, signals
from scrapy.crawler import Crawler
from scrapy.exceptions import NotConfigured
from scrapy.utils.asyncio import call_later, create_looping_call, is_asyncio_available, run_in_thread
from scrapy.utils.defer import deferred_from_coro, maybe_deferred_to_future
from scrapy.utils.misc import load_object
from twisted.internet.defer import Deferred
from w3lib.url import canonicalize_url

from scrapy_streaming.exceptions import (
    BlobGoing,
    IntegrityError,
    LeaseLost,
    LedgerError,
    StreamingError,
    WriteFailed,
)
from scrapy_streaming.exchange import SECONDS_A_DAY, Ticket, fields_to_send
from scrapy_streaming.leases import Heartbeat, Leases
from scrapy_streaming.metrics import Metrics
from scrapy_streaming.protocol import codings
from scrapy_streaming.protocol.digests import Digest, expected_digest
from scrapy_streaming.protocol.jobs import (
    Claim,
    Completion,
    Done,
    Granted,
    Held,
    Lease,
    RecordedName,
    StoredRepresentation,
    job_key,
    request_hash,
)
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.rates import Rates
from scrapy_streaming.receiver import Budget, Receiver
from scrapy_streaming.repeating import Repeats
from scrapy_streaming.schemes import SCHEMES, SchemeHandler
from scrapy_streaming.settings import StreamingSettings, unknown_settings
from scrapy_streaming.shutdown import (
    CrawlStopping,
    before_end,
    closes,
    finishes,
    let_scraper_close,
    refuse_queued,
)
from scrapy_streaming.space import UNKNOWN_NEED, NoSpace, Space, is_no_space, pause
from scrapy_streaming.storage import PUT_BACK, Storage, same_process
from scrapy_streaming.storage.blobs import Look, Named, Published, Tampered
from scrapy_streaming.storage.decoding import coded_twice
from scrapy_streaming.storage.finished import FinishedPart, broken_promise
from scrapy_streaming.storage.job_request import JobRequest
from scrapy_streaming.storage.maintenance import Reconciled, reconcile
from scrapy_streaming.storage.named import NamedFiles
from scrapy_streaming.storage.parts import PartWriter
from scrapy_streaming.texts import clean_record, url_without_userinfo
from scrapy_streaming.turns import Turns

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

T = TypeVar("T")
P = ParamSpec("P")

#: Reasons why a ledger that was open is of no use for the rest of the crawl.
USELESS = frozenset({"ledger-corrupt", "ledger-missing", "ledger-foreign", "ledger-newer"})
#: Why a file is not stored whose job's record in the ledger is damaged; all others are.
LEDGER_ROW = "ledger-row"
#: Seconds between two looks at the jobs that other workers hold, at most.
HELD_POLL = 0.25
#: Seconds between two looks at the leases and at whether the crawl stops, at most.
TICK = 0.25
#: Seconds after which a copy taken of the ledger is known for an older one at the latest.
EPOCH_LASTS = 600.0
#: Completions that are remembered until their items are handed on, at most.
UNDELIVERED = 10_000
#: Seconds between two tries to publish what ``gc`` is just collecting, and for how long.
GOING_PAUSE = 0.05
GOING_LASTS = 30.0
#: Seconds that what is asked of the ledger may take once the crawl stops.
STOP_GRACE = 2.0


class StreamingExtension:
    """Opens the storage at start, closes it at the end, renews the leases in between.

    ``leases`` are those that this crawl holds. ``writers`` are parts opened and verified by the
    middleware, waiting for the handler to take them, by job key. ``lent`` are the leases of parts
    that spiders were given and have not published: the next who asks for the job gets it.
    ``plans`` says that the middleware is on, which plans requests. ``untapped`` are the schemes whose
    handler does not let bodies be taken. ``repeats`` tells which requests a plain GET of a later crawl
    repeats. ``turns`` says who may claim; ``items`` counts those in the
    pipelines, and ``at_no_items`` is called when the last leaves, ``at_idle`` while a stop finds Scrapy
    with no item at all. ``bodies`` are being received. ``left_kept`` counts the bytes in the parts of
    downloads that a stop broke off.
    """

    def __init__(self, crawler: Crawler, settings: StreamingSettings) -> None:
        self.crawler = crawler
        self.settings = settings
        self.storage = Storage.open(settings)
        self.metrics = Metrics(crawler, settings)
        self.budget = Budget()
        self.rates = Rates(settings.max_rate or ())
        self.writers: dict[str, PartWriter] = {}
        self.untapped: set[str] = set()
        self.plans = False
        self.lent: dict[str, Lease] = {}
        self.leases = Leases(settings.lease_seconds)
        self._completed: dict[str, Completion] = {}
        self._delivered: list[Completion] = []
        self._result_field = crawler.settings.get("FILES_RESULT_FIELD") or "files"
        self.repeats = Repeats(crawler)
        self.turns = Turns.of(crawler.settings)
        self.items = 0
        self.at_no_items: list[Callable[[], object]] = []
        self.at_idle: list[Callable[[], object]] = []
        self.bodies: WeakSet[Receiver] = WeakSet()
        folders = (self.storage.parts.directory, self.storage.blobs.root)
        self.space = Space(folders, settings.min_free_bytes)
        self._waits_for_room: set[Deferred[None]] = set()
        self.left_kept = 0
        self._hosts: dict[str, str] = {}  # whose turn the claims with these ids have
        self._finishes = finishes(settings.stop, crawler.settings)
        self._left = 0
        self._tidying: Deferred[None] | None = None
        self._stop_tidying = threading.Event()
        self._epoch_ends = time.monotonic() + EPOCH_LASTS
        self._put_back = PUT_BACK in self.storage.notes
        self._crawls = False
        self._stopped = self._broken_off = self._ends_at_once = False
        self._at_end: Callable[[], object] = lambda: None
        self._silent = False
        self._useless = False
        self._looking = False
        self._waiting: defaultdict[str, list[Deferred[None]]] = defaultdict(list)
        self._unsettled: set[Deferred[Any]] = set()
        self._removals: set[Deferred[None]] = set()
        self._latencies = 0
        self._latency_ms = 0.0
        self._renewed: list[Deferred[None]] = []
        self._heartbeat: Heartbeat | None = None
        self._chores = create_looping_call(self._do_chores)
        self._ticker = create_looping_call(self._tick)
        self._poll = create_looping_call(self._look)

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Self:
        """Return the extension; raise ``NotConfigured`` when streaming is off or cannot be.

        Raises ``SettingError``, ``StoreError``, ``LedgerError`` or ``OSError`` (a full disk) when the
        crawl must not start; it is said in one line.
        """
        settings = StreamingSettings.load(crawler.settings, os.environ)
        if not settings.enabled:
            raise NotConfigured  # as the user wants it: nothing to say
        if settings.why_off:
            raise NotConfigured(settings.why_off)
        try:
            extension = cls(crawler, settings)
        except (StreamingError, OSError) as error:
            logger.critical("the crawl does not start: %s", " ".join(str(error).split()))
            _say_no_more()
            raise
        crawler.signals.connect(extension.engine_started, signals.engine_started)
        crawler.signals.connect(extension.engine_stopped, signals.engine_stopped)
        crawler.signals.connect(extension.handed_on, signals.item_scraped)
        return extension

    async def engine_started(self) -> None:
        """Say once what is on and what the user should know; start the heartbeat."""
        self._say_what_is_on()
        for note in self.storage.notes:
            logger.warning("%s", note)
        for name, near in unknown_settings(self.crawler.settings):
            hint = f"; did you mean {near}?" if near else ""
            logger.warning("%s is no setting of scrapy-streaming%s", name, hint)
        if not self.crawler.settings.getbool("DOWNLOAD_FAIL_ON_DATALOSS"):
            logger.info(
                "DOWNLOAD_FAIL_ON_DATALOSS=False holds for pages only: no file is stored that may be cut, "
                "it is resumed instead, or fails; with STREAMING_ENABLED=False it is stored"
            )
        self._crawls = self.crawler.crawling
        if self.settings.why_no_ledger is None:
            self._tidying = deferred_from_coro(self._tidy())
            self._start_heartbeat()
        self._at_end = before_end(self._end_at_once)
        self._chores.start(self.settings.lease_seconds / 4, now=False)
        self._ticker.start(min(TICK, self.settings.lease_seconds / 16), now=False)

    def _say_what_is_on(self) -> None:
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

    def _start_heartbeat(self) -> None:
        call = _caller()
        self._heartbeat = Heartbeat(
            self.leases,
            self.settings.lease_seconds,
            self.storage.ledger.renew,
            lambda lost, error: call(self._note_renewal, lost, error),
        )
        self._heartbeat.start()

    async def engine_stopped(self) -> None:
        """Keep what is open and close the storage."""
        for loop in (self._chores, self._ticker, self._poll):
            if loop.running:
                loop.stop()
        if self._heartbeat is not None:
            self._heartbeat.end()
        if not self._ends_at_once:
            self._at_end()
        if self._left:
            logger.info(
                "stopped with %d downloads broken off, %d bytes of them kept: the next crawl goes on there",
                self._left, self.left_kept,
            )  # fmt: skip
        for key in list(self.writers):
            await self.close_writer(key)
        self._flush_delivered()
        for removal in list(self._removals):
            await maybe_deferred_to_future(removal)
        if self._tidying is not None:
            await maybe_deferred_to_future(self._tidying)
        await run_in_thread(self.metrics.write, self.storage.worker_id)
        await run_in_thread(self.storage.close)

    async def _tidy(self) -> None:
        """Remove, beside the crawl, what earlier ones left behind."""
        days = self.settings.history_days
        try:
            done = await run_in_thread(
                reconcile, self.storage, history_seconds=days * 86400, stop=self._stop_tidying
            )
        except (StreamingError, OSError) as error:
            if not self._stops_for(error):
                logger.warning("what earlier crawls left behind could not be removed: %s", error)
            return
        if done.read is not None:
            logger.info(
                "the store has been read: %d blobs recorded that the ledger did not know, %d bad",
                done.read.adopted, len(done.read.bad),
            )  # fmt: skip
        if replace(done, read=None) != Reconciled():
            logger.info(
                "of earlier crawls: removed %d parts, %d temporary files, %d events; put back %d blobs",
                done.parts, done.temporary, done.events, done.restored,
            )  # fmt: skip

    # -- a stop ----------------------------------------------------------------------------

    @property
    def _stopped_by_user(self) -> bool:
        """Whether the user stops the crawl (Ctrl-C).

        That is all Scrapy says of it before it waits for every download. A crawl that ends by
        itself or by ``CloseSpider`` is ``crawling`` up to its last download; Scrapy's shell never is.
        """
        return self._crawls and not self.crawler.crawling

    @property
    def stopping(self) -> bool:
        """Whether a stop by the user leaves to the next crawl what is in work."""
        return self._stopped_by_user and not self._finishes

    async def check(self, ticket: Ticket) -> None:
        """Raise ``CrawlStopping`` or ``LeaseLost`` if a download must not begin."""
        self._refuse_at_stop()
        await self.assure(ticket.lease)
        self._refuse_at_stop()

    def _refuse_at_stop(self) -> None:
        if self.stopping:
            raise CrawlStopping

    def _tick(self) -> None:
        self._keep_reserve()
        if not self.items and closes(self.crawler) and let_scraper_close(self.crawler):
            _call_all(self.at_idle)
        if not self._stopped_by_user:
            return
        if not self._stopped:
            self._stopped = True
            self._stop_tidying.set()
            if self._finishes:
                self._say_unfinished()
            elif self.untapped:
                logger.info(
                    "the crawl stops: downloads in flight whose bodies Scrapy buffers (%s) are waited for",
                    ", ".join(sorted(self.untapped)),
                )
        if self._finishes:
            return
        refuse_queued(self.crawler)
        self._break_off()

    def _say_unfinished(self) -> None:
        """Say how much a stop that finishes what is in work has before it."""
        due = [body.left for body in self.bodies if not body.concluded]
        logger.info(
            "the crawl stops: finishing %d items and %d downloads in flight, %d bytes left%s, because the "
            "scheduler will not ask for their pages again (STREAMING_STOP); Ctrl-C once more keeps their "
            "parts and ends at once",
            self.items, len(due), sum(filter(None, due)), " at least" if None in due else "",
        )  # fmt: skip

    def _end_at_once(self) -> Deferred[None]:
        """Keep the parts of what is in flight: the process ends, a second Ctrl-C came."""
        self._ends_at_once = True
        self._finishes = False
        return deferred_from_coro(self._keep_parts())

    async def _keep_parts(self) -> None:
        bodies, items = [body for body in self.bodies if not body.concluded], self.items
        self._break_off()
        ends = time.monotonic() + STOP_GRACE
        while not all(body.concluded for body in bodies) and time.monotonic() < ends:
            await _pause(TICK / 5)
        await run_in_thread(self.metrics.write, self.storage.worker_id)
        for body in bodies:
            logger.warning("left unfinished, %d bytes came: %s", body.received, body.url)
        if not bodies and not items:
            return
        logger.warning(
            "ended at once with %d items in work; `scrapy streaming ls --state ready` names their files, "
            "`scrapy streaming resume` finishes them", items,
        )  # fmt: skip

    def _break_off(self) -> None:
        """Break off every download and every wait; what came is kept."""
        if not self._broken_off:
            self._broken_off = True
            call_later(STOP_GRACE, self._give_up)
        self._left += self.leases.cancel_all(CrawlStopping)
        self.turns.refuse_all(CrawlStopping)
        self._renewed, renewed = [], self._renewed
        self._waits_for_room, for_room = set(), self._waits_for_room
        for waiting in [*self._pop_waiting(list(self._waiting)), *renewed, *for_room]:
            waiting.errback(CrawlStopping())

    def _give_up(self) -> None:
        """Wait no longer for a ledger that does not answer."""
        for deferred in list(self._unsettled):
            if not deferred.called:
                deferred.errback(CrawlStopping())

    def item_left(self) -> None:
        """Count an item of a pipeline less."""
        self.items -= 1
        if not self.items:
            _call_all(self.at_no_items)

    # -- bridges ---------------------------------------------------------------------------

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what *function* returns, called in a thread; counted as one I/O operation."""
        self.count("io_operations")
        return await run_in_thread(function, *args, **kwargs)

    async def settle(self, future: Future[T]) -> T:
        """Return the ledger's answer; waiting for it holds no thread.

        Raises ``CrawlStopping`` if the ledger does not answer while the crawl stops.
        """
        deferred: Deferred[T] = Deferred()
        call = _caller()

        def fire(done: Future[T]) -> None:
            if deferred.called:  # nobody waits any more
                return
            error = done.exception()
            deferred.errback(error) if error is not None else deferred.callback(done.result())

        future.add_done_callback(lambda done: call(fire, done))
        self._unsettled.add(deferred)
        try:
            return await maybe_deferred_to_future(deferred)
        except LedgerError as error:
            if self._stops_for(error):
                raise CrawlStopping from error
            raise
        finally:
            self._unsettled.discard(deferred)

    def _stops_for(self, error: BaseException) -> bool:
        """Whether the ledger is of no use any more; the first such error stops the crawl, in one line."""
        if not isinstance(error, LedgerError) or error.reason not in USELESS:
            return False
        if not self._useless:
            self._useless = True
            self._finishes = False  # nothing that is in work can be finished
            logger.critical("the crawl stops, its ledger cannot be used any more: %s", error)
            deferred_from_coro(self.crawler.stop_async())
        return True

    # -- leases ----------------------------------------------------------------------------

    def _do_chores(self) -> None:
        self._flush_delivered()
        if self._tidying is not None and time.monotonic() >= self._epoch_ends:
            self._epoch_ends = time.monotonic() + EPOCH_LASTS
            deferred_from_coro(self._raise_epoch())
        if self._heartbeat is not None and self._heartbeat.overdue:
            self._say_silent("no answer yet")

    def _note_renewal(self, lost: list[Lease], error: StreamingError | None) -> None:
        """Break off the downloads under leases that are another's (ledger rule 8); let the others go on."""
        self._say_silent(error)
        if error is not None:
            return
        self._say_lost(lost)
        self._renewed, renewed = [], self._renewed
        for waiting in renewed:
            waiting.callback(None)

    async def assure(self, lease: Lease) -> None:
        """Return when this worker may write under *lease*: at once, or when a late renewal found it.

        Raises ``LeaseLost`` if the job is another worker's by now, ``CrawlStopping`` at a stop.
        """
        while not self.leases.valid(lease):
            if not self.leases.held(lease) or self._heartbeat is None:
                raise lease_lost(lease)
            renewed: Deferred[None] = Deferred()
            self._renewed.append(renewed)
            self._heartbeat.renew_now()
            await maybe_deferred_to_future(renewed)

    async def _raise_epoch(self) -> None:
        """Set the ledger apart from copies of it; read the store if one was put back under this crawl."""
        try:
            standing = await run_in_thread(self.storage.raise_epoch)
        except StreamingError as error:
            if not self._stops_for(error):
                logger.info("the ledger's epoch was not raised: %s", error)
            return
        if not standing.unread or self._tidying is None or not self._tidying.called:
            return
        if not self._put_back:
            self._put_back = True
            logger.warning("%s", PUT_BACK)
        self._tidying = deferred_from_coro(self._tidy())

    def _say_silent(self, silence: object) -> None:
        """Say once that the ledger does not answer, and once that it does again."""
        if silence is not None and not self._silent:
            logger.warning("lease renewal failed, retrying: %s", silence)
        elif silence is None and self._silent:
            logger.info("the ledger answers again, the leases are renewed")
        self._silent = silence is not None

    def _say_lost(self, leases: Iterable[Lease]) -> None:
        """Count and log leases that were lost; break off the downloads under them."""
        for lease in leases:
            error = lease_lost(lease)
            self.count("leases_lost")
            logger.warning("%s", error)
            self.leases.cancel(lease, error)

    # -- statistics ------------------------------------------------------------------------

    def count(self, name: str, number: int = 1) -> None:
        """Add *number* to the statistic ``streaming/<name>``."""
        stats = self.crawler.stats
        if stats is not None:
            stats.inc_value(f"streaming/{name}", number)

    def note_buffering(self, handler: SchemeHandler) -> None:
        """Say once for a scheme that its bodies are buffered, unless the user has asked for that.

        A file of another scheme than HTTP's is buffered by Scrapy alone, too: that is no warning.
        """
        if handler.scheme in self.untapped or not self.settings.io_enabled or handler.scheme == "data":
            return
        self.untapped.add(handler.scheme)
        logger.log(logging.WARNING if handler.scheme in SCHEMES else logging.INFO, "%s", handler.buffers())

    def decided(self, request: Request, ticket: Ticket, reason: Reason, **facts: object) -> None:
        """Count a decision and log it in one line."""
        self.count("resume_decisions_made")
        self.count(f"decision/{reason}")
        said = "".join(f" {name}={value}" for name, value in facts.items() if value not in (None, ""))
        logger.debug(
            "streaming_resume_decision reason=%s url=%s job=%s fence=%d%s",
            reason, request.url, ticket.key[:12], ticket.lease.fence, said,
        )  # fmt: skip

    def timed(self, started: float) -> None:
        """Take the time since *started* (monotonic seconds) into the average latency."""
        self._latencies += 1
        self._latency_ms += (time.monotonic() - started) * 1000
        if self.crawler.stats is not None:
            self.crawler.stats.set_value("streaming/average_latency_ms", self._latency_ms / self._latencies)

    # -- jobs ------------------------------------------------------------------------------

    def job(
        self, request: Request, item_work_id: str | None = None, url: str | None = None
    ) -> tuple[str, JobRequest]:
        """Return the job that *request* asks for: its key and what the ledger keeps of it.

        *url* names it, the request's own if not given. ``meta["streaming"]`` may give ``work_id`` and
        ``artifact_id``. A request that is no plain GET gets its own hash as artifact id: it is
        another job than the URL's (R73); one that the project's fingerprinter tells from a bare
        request of its URL gets the fingerprint (ledger rule 6).
        """
        if url is not None and url != request.url:
            request = request.replace(url=url)
        given = request.meta.get("streaming")
        given = given if isinstance(given, dict) else {}
        plain = request.method == "GET" and not request.body
        work_id = given.get("work_id") or item_work_id or self.settings.work_id or self._spider_name()
        url = canonicalize_url(url_without_userinfo(request.url))  # credentials are stored nowhere (E7)
        hashed = request_hash(request.method, url, request.body)
        artifact_id = given.get("artifact_id") or ".".join(
            filter(None, ("" if plain else hashed, self.told_apart(request)))
        )
        return job_key(work_id, artifact_id, url), JobRequest(work_id, artifact_id, url, hashed)

    def told_apart(self, request: Request) -> str:
        """Return the request's fingerprint (hex) if a bare request has another one, else ``""``."""
        parts = (request.headers, request.meta, request.cookies, request.cb_kwargs, request.flags)
        if type(request) is Request and not any(parts):  # it is bare itself, as most are
            return ""
        fingerprinter = self.crawler.request_fingerprinter
        bare = Request(request.url, method=request.method, body=request.body)
        fingerprint = fingerprinter.fingerprint(request)
        return "" if fingerprint == fingerprinter.fingerprint(bare) else fingerprint.hex()

    @cached_property
    def offline(self) -> bool:
        """Whether no request may leave, only what the HTTP cache holds may be used."""
        settings = self.crawler.settings
        return settings.getbool("HTTPCACHE_ENABLED") and settings.getbool("HTTPCACHE_IGNORE_MISSING")

    @cached_property
    def foreign_middlewares(self) -> bool:
        """Whether a downloader middleware is on that is neither Scrapy's nor ours: it may set any field."""
        wanted = self.crawler.settings.getwithbase("DOWNLOADER_MIDDLEWARES").items()
        classes = [load_object(path) for path, order in wanted if order is not None]
        return any(cls.__module__.partition(".")[0] not in ("scrapy", "scrapy_streaming") for cls in classes)

    def fields_to_send(self, request: Request) -> dict[str, str]:
        """Return the fields that a request which is still to be sent will have, by lower-case name."""
        return fields_to_send(request, self.crawler.settings, self.crawler.spider)

    def _spider_name(self) -> str:
        return self.crawler.spider.name if self.crawler.spider is not None else ""

    def refresh_before(self, expires: float) -> float | None:
        """Return since when bytes must be stored to be fresh, in seconds since the epoch (R7).

        ``inf`` if nothing is, ``None`` if everything is, else *expires* days ago.
        """
        match self.settings.revalidate:
            case "always":
                return math.inf
            case "never":
                return None
            case _:
                return time.time() - expires * SECONDS_A_DAY

    async def claim_in_turn(
        self, key: str, job: JobRequest, host: str, *, refresh_before: float | None = None
    ) -> Claim:
        """Return what ``claim`` does, once it is the turn of a job on *host*.

        The turn lasts as long as the lease; who waits for another worker's job has none.
        """
        while True:
            self._refuse_at_stop()
            await self.turns.take(host)
            claim: Claim | None = None
            try:
                claim = await self._claim_once(key, job, refresh_before)
            finally:
                if isinstance(claim, Granted):
                    self._hosts[claim.lease.claim_id] = host
                else:
                    self.turns.end(host)
            if not self._waits(claim):
                return claim
            refresh_before = None  # the other worker's result is fresh enough
            await self._freed(key)

    async def claim(self, key: str, job: JobRequest, *, refresh_before: float | None = None) -> Claim:
        """Return the claim on a job, waiting for another worker to end if it has it.

        A job that was done before *refresh_before* is to be done again. Waiting holds no thread.
        With ``STREAMING_HELD=skip`` another worker's ``Held`` is returned at once. Raises
        ``CrawlStopping`` at a stop.
        """
        while True:
            claim = await self._claim_once(key, job, refresh_before)
            if not self._waits(claim):
                return claim
            refresh_before = None
            await self._freed(key)

    def _waits(self, claim: Claim) -> bool:
        """Whether to wait for the job: for one that a crawl of this very process has, always (C12)."""
        if not isinstance(claim, Held):
            return False
        return self.settings.held == "wait" or same_process(claim.worker_id, self.storage.worker_id)

    async def _claim_once(self, key: str, job: JobRequest, refresh_before: float | None) -> Claim:
        self._refuse_at_stop()
        asked_at = time.monotonic()
        kept = self.storage.kept.get(key, 0)
        claim = await self.settle(
            self.storage.jobs.claim(key, job, refresh_before=refresh_before, kept=kept, begun=False)
        )
        if isinstance(claim, Held) and (lease := self.lent.pop(key, None)) is not None:
            self.release(lease)
            return await self._claim_once(key, job, refresh_before)
        if isinstance(claim, Granted):
            self.leases.hold(claim.lease, asked_at)
            if self.stopping:
                self.release(claim.lease)
                raise CrawlStopping
            if claim.taken_over:
                self.count("recovered")
        return claim

    def _end(self, lease: Lease) -> bool:
        """End a lease here and the turn that goes with it; return whether it was held."""
        host = self._hosts.pop(lease.claim_id, None)
        if host is not None:
            self.turns.end(host)
        return self.leases.end(lease)

    def begin_work(self, request: Request, ticket: Ticket) -> None:
        """Tell the ledger that a download begins: Scrapy has items wait for their turn, jobs claimed.

        If the process dies, only jobs that began lose an attempt. What *request* is sent with is known
        by now.
        """
        lease, unlike = self.leases.latest(ticket.lease), self.repeats.is_unlike(request, ticket)
        self.storage.jobs.begin_work(lease, unlike=unlike).add_done_callback(_log_not_noted)

    async def claim_again(self, ticket: Ticket) -> Claim:
        """Return the claim on a job whose lease was lost, as ``claim`` does.

        ``leases.latest`` knows the new lease as that of the old one's download.
        """
        lost = self.leases.latest(ticket.lease)
        claim = await self.claim(ticket.key, ticket.job)
        while isinstance(claim, Done) and not ticket.accepts(claim.completion.known):
            claim = await self.claim(ticket.key, ticket.job, refresh_before=math.inf)
        if isinstance(claim, Granted):
            self.leases.succeed(lost, claim.lease)
            if lost.claim_id in self._hosts:
                self._hosts[claim.lease.claim_id] = self._hosts.pop(lost.claim_id)
            if not claim.taken_over:
                self.count("recovered")
        return claim

    async def complete(
        self,
        lease: Lease,
        known: StoredRepresentation,
        resumed_from: int,
        path: str | None = None,
        part: FinishedPart | None = None,
        *,
        by_response: bool = False,
    ) -> Completion:
        """Return the recorded completion; *path* is the name that the blob was given.

        *by_response*: the name depends on the response, so it cannot be made without one.
        *part* is what the blob was made of: ``gc`` may just be collecting an older copy of it, which
        nobody referred to, and then it is published again. Raises ``LeaseLost`` if the job is
        another's by now.
        """
        held = self._end(lease)
        ends = time.monotonic() + GOING_LASTS
        while True:
            try:
                return await self.settle(
                    self.storage.jobs.complete(
                        lease, known, resumed_from=resumed_from, path=path, by_response=by_response
                    )
                )
            except LeaseLost:
                self._say_lost([lease] if held else [])
                raise
            except BlobGoing:
                if part is None or time.monotonic() > ends:
                    raise
            await _pause(GOING_PAUSE)
            await self.run_with_room(self.storage.blobs.publish, part)

    def remember(self, completion: Completion) -> None:
        """Keep a completion until its item is handed on; of very many the oldest are forgotten."""
        self._completed[completion.completion_id] = completion
        if len(self._completed) > UNDELIVERED:
            del self._completed[next(iter(self._completed))]

    def handed_on(self, item: Any) -> None:
        """Note in the ledger, some time later, that an item with files was handed on."""
        files = ItemAdapter(item).get(self._result_field) if is_item(item) else None
        files = files if isinstance(files, list | tuple) else []
        ids = [str(file.get("completion_id")) for file in files if isinstance(file, dict)]
        self._delivered += [self._completed.pop(each) for each in ids if each in self._completed]

    def _flush_delivered(self) -> None:
        completions, self._delivered = self._delivered, []
        if completions:
            self.storage.jobs.delivered(completions).add_done_callback(_log_not_noted)

    def fail(
        self, lease: Lease, code: str, error: str, *, permanent: bool, retry_after: float | None = None
    ) -> None:
        """Give the job back as failed; nobody waits for it, a lost lease is only logged.

        *retry_after* in seconds, as the server asked.
        """
        self._end(lease)
        future = self.storage.jobs.fail(lease, code, error, permanent=permanent, retry_after=retry_after)
        future.add_done_callback(_log_not_noted)

    def release(self, lease: Lease) -> None:
        """Give the job back unharmed; nobody waits for it, a lost lease is only logged."""
        self._end(lease)
        self.storage.jobs.release(lease).add_done_callback(_log_not_noted)

    @contextmanager
    def released_on_error(self, lease: Lease) -> Iterator[None]:
        """Give the job back if what is done inside raises, whatever that is."""
        try:
            yield
        except BaseException:  # raised again: also a cancelled task gives its turn back
            self.release_unless_ended(lease)
            raise

    def release_unless_ended(self, lease: Lease) -> None:
        """Give a job back that nobody completed, and the turn that goes with it."""
        if self.leases.held(lease) or lease.claim_id in self._hosts:
            self.release(lease)

    def lend(self, ticket: Ticket) -> None:
        """Leave the job to the spider that was given its part, until somebody else asks for it."""
        self.lent[ticket.key] = ticket.lease
        for waiting in self._pop_waiting([ticket.key]):
            waiting.callback(None)

    # -- jobs that others hold -------------------------------------------------------------

    async def _freed(self, key: str) -> None:
        """Return when the job may be claimed; raise ``CrawlStopping``, or what the ledger raises."""
        freed: Deferred[None] = Deferred()
        self._waiting[key].append(freed)
        if not self._poll.running:
            self._poll.start(HELD_POLL, now=False)
        await maybe_deferred_to_future(freed)

    def _pop_waiting(self, keys: Iterable[str]) -> list[Deferred[None]]:
        return [waiting for key in keys for waiting in self._waiting.pop(key, ())]

    def _look(self) -> None:
        if not self._waiting:
            self._poll.stop()
        elif not self._looking:
            deferred_from_coro(self._wake())

    async def _wake(self) -> None:
        """Ask once for all jobs that somebody waits for, and wake those whose job is free."""
        self._looking = True
        keys = list(self._waiting)
        try:
            free = await self.settle(self.storage.jobs.free(keys))
        except StreamingError as error:
            for waiting in self._pop_waiting(keys):
                waiting.errback(error)
        else:
            for waiting in self._pop_waiting(free):
                waiting.callback(None)
        finally:
            self._looking = False

    # -- parts -----------------------------------------------------------------------------

    async def close_writer(self, key: str) -> None:
        """Close a part that was opened for a request which never reached the handler."""
        writer = self.writers.pop(key, None)
        if writer is not None:
            await self.run(writer.close)

    async def publish(self, part: FinishedPart, expected: Digest | None) -> Published:
        """Return the published blob; the part's bytes are checked against *expected* first.

        Raises ``IntegrityError`` (the part goes to quarantine) or ``WriteFailed``.
        """
        started = time.monotonic()
        published = await self.run_with_room(self._publish, part, expected)
        self.timed(started)
        self.count_published(published, part)
        return published

    def count_published(self, published: Published, part: FinishedPart) -> None:
        """Count a blob that is new, or the bytes that needed no second place."""
        self.count("deduplicated" if published.deduplicated else "blobs_published")
        self.count("bytes_saved", part.length if published.deduplicated else 0)

    def _publish(self, part: FinishedPart, expected: Digest | None) -> Published:
        wrong = broken_promise(part, expected)
        if wrong is not None:
            self.storage.blobs.quarantine(part)
            msg = f"{part.state.url}: the bytes hash to {part.digest}, expected was {wrong}"
            raise IntegrityError(msg)
        return self.storage.blobs.publish(part)

    async def decode(self, part: FinishedPart, ticket: Ticket) -> FinishedPart:
        """Return *part* with the codings taken off that nobody asked for (R34).

        As it is if it has none, or if the file is meant to be in it: by its name or media type, or
        because the expected digest is that of the coded octets. At most STREAMING_MAX_SIZE bytes, or
        DOWNLOAD_MAXSIZE where that is not set. Raises ``Undecodable``, ``DecodedTooLarge``,
        ``WriteFailed``.
        """
        if not part.state.content_encoding or part.coded is not None or ticket.expected == part.digest:
            return part
        if part.state.coding_is_content and await self.run(_coded_twice, part):
            part = replace(part, state=replace(part.state, coding_is_content=False))
        if not part.state.to_decode:
            return part
        limit = ticket.max_size or self.crawler.settings.getint("DOWNLOAD_MAXSIZE")
        fence = self.leases.latest(ticket.lease).fence
        return await self.run(self.storage.parts.decode, part, ticket.key, fence, limit)

    async def discard_parts(self, ticket: Ticket, stored: StoredRepresentation | None = None) -> None:
        """Remove the job's parts, as far as they are not a later claim's.

        A blob that was linked from one, *stored*, has another time of change then: that is noted.
        """
        await self.close_writer(ticket.key)
        fence = self.leases.latest(ticket.lease).fence
        if not self.storage.parts.may_have(ticket.key, fence):
            return
        stamp = await self.run(self._discard, ticket.key, fence, stored)
        if stored is not None:
            self._note_blob(stored, stamp)

    def discard_whole(self, ticket: Ticket, then: Callable[[], object]) -> None:
        """Remove the job's whole parts in a thread, then call *then*; the end of the crawl waits for both."""
        removal = deferred_from_coro(self._discard_whole(ticket, then))
        self._removals.add(removal)
        removal.addBoth(lambda _: self._removals.discard(removal))

    async def _discard_whole(self, ticket: Ticket, then: Callable[[], object]) -> None:
        fence = self.leases.latest(ticket.lease).fence
        try:
            await self.run(self.storage.parts.discard_whole, ticket.key, fence)
        except (StreamingError, OSError) as error:
            logger.warning("the refused part of a job could not be removed: %s", error)
        then()

    def _discard(self, key: str, fence: int, stored: StoredRepresentation | None) -> bytes | None:
        self.storage.parts.discard(key, fence)
        if stored is None or stored.stamp is None:
            return None
        return self.storage.blobs.restamp(Digest.parse(stored.digest), stored.stamp)

    # -- room on the disk ------------------------------------------------------------------

    def _keep_reserve(self) -> None:
        """Break off bodies of unknown length when the reserve is reached (R9); others were promised room."""
        open_ended = [body for body in self.bodies if body.left is None and not body.concluded]
        if open_ended and self.space.free() < 0:
            for body in open_ended:
                body.break_off(self.space.refusal(body.url, None, ()) or NoSpace(body.url, UNKNOWN_NEED))

    async def found_room(self, error: StreamingError) -> bool:
        """Wait for room after *error*, a ``no-space``; return whether there is some (C21).

        Not once somebody has waited STREAMING_PATIENCE seconds in vain, as long as there is none.
        Raises ``CrawlStopping`` at a stop.
        """
        need = error.need if isinstance(error, NoSpace) else UNKNOWN_NEED
        patience = self.settings.patience
        ends, tried = time.monotonic() + patience, 0
        if not self.space.exhausted:
            self.count("waits_for_space")
            if not self._waits_for_room:
                logger.warning(
                    "%s; what does not fit waits for room, up to STREAMING_PATIENCE=%g seconds",
                    error,
                    patience,
                )
        while not self.space.exhausted and time.monotonic() < ends:
            await self._pause_for_room(min(pause(tried), max(0.0, ends - time.monotonic())))
            tried += 1
            if self.space.free(self.bodies) >= need:
                return True
        if self.space.free(self.bodies) >= need:
            self.space.exhausted = False
            return True
        if not self.space.exhausted:
            self.space.exhausted = True
            logger.warning(
                "no-space: no room came for %g seconds (STREAMING_PATIENCE): what does not fit fails now, "
                "its part is kept", patience,
            )  # fmt: skip
        return False

    async def _pause_for_room(self, seconds: float) -> None:
        over: Deferred[None] = Deferred()
        self._waits_for_room.add(over)
        call_later(seconds, lambda: None if over.called else over.callback(None))
        try:
            await maybe_deferred_to_future(over)
        finally:
            self._waits_for_room.discard(over)

    async def run_with_room(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what ``run`` does; a disk that is full is waited for."""
        while True:
            try:
                return await self.run(function, *args, **kwargs)
            except WriteFailed as error:
                if not is_no_space(error) or not await self.found_room(error):
                    raise

    # -- what is stored --------------------------------------------------------------------

    async def stored(self, known: StoredRepresentation) -> StoredRepresentation | None:
        """Return *known*, its stamp that of the blob now; ``None`` if its bytes are not there (R44, R77)."""
        look = await self.run(self.storage.blobs.look_at, known)
        if look.stamp is None:
            await self._tampered(known, look)
            return None
        self._count_look(look, known)
        self._note_blob(known, look.stamp)
        return replace(known, stamp=look.stamp)

    async def named_again(self, completion: Completion, path: str, *, ask: bool = False) -> str | None:
        """Return the name of recorded bytes, made anew if need be; ``None`` if they are not there (R77).

        Also, with *ask*, if other bytes have the name: they may be newer, so the server is to be asked.
        """
        known = completion.known
        look, named = await self.run(self._look_and_name, known, path, ask=ask and not self.offline)
        if named is None:
            await self._tampered(known, look)
            return None
        self._count_look(look, known)
        now = self.named(known, named)
        self._note_blob(known, named.stamp)
        if named.own is not None and now.name is not None and now.name != known.name:
            self.storage.jobs.note_name(completion, now.name).add_done_callback(_log_not_noted)
        return named.path

    def _look_and_name(
        self, known: StoredRepresentation, path: str, *, ask: bool
    ) -> tuple[Look, Named | None]:
        digest, blobs = Digest.parse(known.digest), self.storage.blobs
        look = blobs.look_at(known)
        if look.stamp is None or (ask and blobs.was_replaced(known, path)):
            return look, None
        return look, blobs.name(digest, path, stamp=look.stamp, recorded=known.name)

    def named(self, known: StoredRepresentation, named: Named) -> StoredRepresentation:
        """Return *known* with its name and its stamp as they are now; say what had become of the name."""
        self._count_hashed(named.hashed)
        if named.tampered is not None:
            self._say_tampered(named.tampered, named.path, named.kept, "made again from its blob")
        return replace(known, stamp=named.stamp, name=RecordedName(named.path, named.own))

    async def _tampered(self, known: StoredRepresentation, look: Look) -> None:
        """Have bytes fetched again that are gone or changed, and set them aside.

        The one who marks it says so, once.
        """
        self._count_hashed(look.hashed)
        if look.tampered is None:
            return
        if isinstance(self.storage.blobs, NamedFiles):
            kept = await self.run(self.storage.blobs.keep, known)
            path = known.digest if known.name is None else known.name.path
            self._say_tampered(look.tampered, path, kept, f"fetched again: {known.final_url}")
            return
        bad = look.tampered is Tampered.BAD_BLOB
        state = "quarantined" if bad else "missing"
        marked = await self.settle(self.storage.jobs.set_blob_state(known.digest, state, ["present"]))
        if look.found is not None:  # if it is another's by now, he keeps the bad bytes
            await self.run(self.storage.blobs.set_aside, look.found)
        if marked:
            self.count(f"tampered/{look.tampered}")
            where = self.storage.blobs.quarantine_folder
            what = f"was changed from outside, its bytes are kept in {where}" if bad else "is gone"
            place = self.storage.blobs.path(Digest.parse(known.digest))
            logger.warning("%s: %s %s; fetched again: %s", look.tampered, place, what, known.final_url)

    def _say_tampered(self, tampered: Tampered, path: str, kept: Path | None, then: str) -> None:
        """Count and say what had become of a name, and what follows."""
        self.count(f"tampered/{tampered}")
        what = "was gone" if tampered is Tampered.NAME_MISSING else "was changed from outside"
        aside = f", its bytes are kept as {kept}" if kept is not None else ""
        logger.warning("%s: %s %s%s; %s", tampered, path, what, aside, then)

    def _count_look(self, look: Look, known: StoredRepresentation) -> None:
        """Count what it took to know that bytes are right."""
        self._count_hashed(look.hashed)
        if not look.restored:
            return
        path = self.storage.blobs.path(Digest.parse(known.digest))
        if known.stamp is None:  # there never was one: publishing by content was switched off
            logger.info("%s is made of the file that has its name", path)
        else:
            self.count(f"tampered/{Tampered.BLOB_MISSING}")
            logger.warning("%s: %s is gone; made again from its name", Tampered.BLOB_MISSING, path)

    def _count_hashed(self, hashed: bool) -> None:
        """Count a file that was read because its stamp did not tell."""
        if hashed:
            self.count("files_hashed")

    def _note_blob(self, known: StoredRepresentation, stamp: bytes | None) -> None:
        """Note the stamp of a blob if it is another than before; nobody waits for it."""
        if stamp is not None and stamp != known.stamp:
            self.storage.jobs.note_blob(known.digest, stamp).add_done_callback(_log_not_noted)


def _say_no_more() -> None:
    """Have asyncio not log the error that ends the crawl's task, whose line has been logged.

    Scrapy exits with 1. Whoever awaits the crawl gets the error all the same.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs: the crawl is a Deferred, and Twisted logs what becomes of it
        return
    if task is not None:
        task.add_done_callback(lambda done: done.cancelled() or done.exception())


def why_without(crawler: Crawler) -> tuple[str, ...]:
    """Return what to say of a part that was named without the extension; nothing if it was switched off."""
    if StreamingSettings.load(crawler.settings, os.environ).why_off:
        return ()
    return ("scrapy_streaming.extension.StreamingExtension is not in EXTENSIONS",)


def _coded_twice(part: FinishedPart) -> bool:
    """Whether a file that is meant to be in its coding came in it once more."""
    return coded_twice(part.chunks(), codings.codings(part.state.content_encoding)[0])


def expected_of(request: Request) -> Digest | None:
    """Return the digest that the request's meta or its URL's fragment expects.

    Raises ``ValueError`` if it cannot be read, or two of them disagree.
    """
    given = request.meta.get("streaming")
    digest = given.get("digest") if isinstance(given, dict) else None
    return expected_digest(digest, request.meta.get("expected_checksum"), request.url.partition("#")[2])


def lease_lost(lease: Lease) -> LeaseLost:
    """Return the error that says so."""
    return LeaseLost(f"lease-lost: job={lease.job_key[:12]} fence={lease.fence}")


def _log_not_noted(done: Future[Any]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        said = isinstance(error, LeaseLost) or getattr(error, "reason", None) in USELESS
        level = logging.DEBUG if said else logging.INFO
        logger.log(level, "what became of a job was not noted: %s", error)


def _call_all(calls: Iterable[Callable[[], object]]) -> None:
    for call in calls:
        call()


async def _pause(seconds: float) -> None:
    """Sleep on the event loop (``scrapy.utils.asyncio.sleep`` exists from Scrapy 2.18 on)."""
    over: Deferred[None] = Deferred()
    call_later(seconds, over.callback, None)
    await maybe_deferred_to_future(over)


def _caller() -> Callable[..., object]:
    """Return what has a function called on the event loop, from another thread."""
    if is_asyncio_available():
        return asyncio.get_event_loop().call_soon_threadsafe
    from twisted.internet import reactor

    from_thread: Callable[..., object] = reactor.callFromThread
    return from_thread
