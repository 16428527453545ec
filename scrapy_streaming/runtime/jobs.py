"""The jobs of a crawl: claimed, completed, given back.

What may live here: what follows a claim and its end in this process; which of them other workers hold,
and which lease goes with which turn. The ledger decides which worker has a job.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Final, Protocol

from scrapy_streaming.context import DownloadContext
from scrapy_streaming.exceptions import BlobGoing, LeaseLost, StreamingError
from scrapy_streaming.protocol.jobs import (
    Claim,
    Completion,
    Done,
    Granted,
    Held,
    Lease,
    StoredRepresentation,
)
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.runtime.event_loop import sleep
from scrapy_streaming.runtime.held_jobs import HeldJobs
from scrapy_streaming.runtime.lease_table import LeaseTable
from scrapy_streaming.runtime.ledger_calls import LedgerCalls, log_not_recorded
from scrapy_streaming.runtime.renewal import Renewals
from scrapy_streaming.runtime.shutdown import CrawlStopping, Shutdown
from scrapy_streaming.runtime.stats import Stats
from scrapy_streaming.runtime.turns import Turns
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.job_request import JobRequest
from scrapy_streaming.storage.workers import same_process

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: Completions that are remembered until their items are delivered, at most.
UNDELIVERED: Final = 10_000
#: Seconds between two tries to complete with a blob that ``gc`` is just collecting, and for how long.
GOING_PAUSE: Final = 0.05
GOING_LASTS: Final = 30.0


class WorkLedger(Protocol):
    """What a worker does with jobs: the ledger's verbs, or those of jobs without a ledger."""

    def claim(self, key: str, request: JobRequest, **terms: Any) -> Future[Claim]:
        """Give the claim on a job."""

    def begin_work(self, lease: Lease, *, unlike: bool = False) -> Future[None]:
        """Record that the download begins."""

    def complete(self, lease: Lease, known: StoredRepresentation, **facts: Any) -> Future[Completion]:
        """Record that the job is done."""

    def fail(self, lease: Lease, code: str, error: str, **facts: Any) -> Future[Any]:
        """Record that the job failed."""

    def release(self, lease: Lease) -> Future[Any]:
        """Give the job back unharmed."""

    def free(self, keys: Collection[str]) -> Future[frozenset[str]]:
        """Give those of *keys* that may be claimed."""

    def delivered(self, completions: Collection[Completion]) -> Future[Any]:
        """Record that the items of completions were delivered."""


class JobStore(Protocol):
    """What this needs of the storage."""

    @property
    def kept(self) -> Mapping[str, int]:
        """The bytes that parts hold, by job key."""

    @property
    def worker_id(self) -> str:
        """This worker's id."""

    @property
    def jobs(self) -> Any:
        """The ``WorkLedger``."""


class Jobs:
    """Claims jobs and ends them; all leases of this crawl are in ``leases``.

    A job that was handed to a spider is claimed again by the next request for it: the spider may never
    publish its part.
    """

    def __init__(
        self,
        store: JobStore,
        settings: StreamingSettings,
        calls: LedgerCalls,
        shutdown: Shutdown,
        stats: Stats,
        turns: Turns,
    ) -> None:
        self.leases = LeaseTable(settings.lease_seconds)
        self.renewals = Renewals(self.leases, settings.lease_seconds, stats)
        self._store = store
        self._settings = settings
        self._calls = calls
        self._shutdown = shutdown
        self._stats = stats
        self._turns = turns
        self._held = HeldJobs(store.jobs, calls)
        self._handed_to_spiders: dict[str, Lease] = {}
        self._hosts: dict[str, str] = {}  # the host whose turn a claim has, by claim id
        self._completed: dict[str, Completion] = {}
        self._delivered: list[Completion] = []
        for break_off in (
            self._cancel_downloads,
            turns.break_off,
            self._held.break_off,
            self.renewals.break_off,
        ):
            shutdown.subscribe(break_off)

    @property
    def _ledger(self) -> WorkLedger:
        ledger: WorkLedger = self._store.jobs
        return ledger

    def end(self) -> None:
        """End renewal and polling, and record what was delivered."""
        self.renewals.end()
        self._held.end()
        self.record_delivered()

    # -- before the download ---------------------------------------------------------------

    async def check(self, context: DownloadContext) -> None:
        """Raise ``CrawlStopping`` or ``LeaseLost`` if a download must not begin."""
        self._shutdown.refuse()
        await self.renewals.ensure(context.lease)
        self._shutdown.refuse()

    async def claim(
        self, key: str, job: JobRequest, *, refresh_before: float | None = None, host: str | None = None
    ) -> Claim:
        """Return the claim on a job, waiting for another worker to end if it has it.

        A job that was done before *refresh_before* is done again. With a *host* the claim waits for
        its turn, which lasts as long as the lease; a job that waits for another worker has none. With
        ``STREAMING_HELD=skip`` another worker's ``Held`` is returned at once. Raises
        ``CrawlStopping`` at a stop.
        """
        while True:
            if host is None:
                claim = await self._claim_once(key, job, refresh_before)
            else:
                claim = await self._claim_in_turn(key, job, refresh_before, host)
            if not self._waits(claim):
                return claim
            refresh_before = None  # the other worker's result is fresh enough
            await self._held.freed(key)

    async def _claim_in_turn(
        self, key: str, job: JobRequest, refresh_before: float | None, host: str
    ) -> Claim:
        self._shutdown.refuse()
        await self._turns.take(host)
        claim: Claim | None = None
        try:
            claim = await self._claim_once(key, job, refresh_before)
        finally:
            if isinstance(claim, Granted):
                self._hosts[claim.lease.claim_id] = host
            else:
                self._turns.end(host)
        return claim

    async def _claim_once(self, key: str, job: JobRequest, refresh_before: float | None) -> Claim:
        self._shutdown.refuse()
        asked_at = time.monotonic()
        kept = self._store.kept.get(key, 0)
        claim = await self._calls.result(
            self._ledger.claim(key, job, refresh_before=refresh_before, kept=kept, work_started=False)
        )
        if isinstance(claim, Held) and (lease := self._handed_to_spiders.pop(key, None)) is not None:
            self.release(lease)
            return await self._claim_once(key, job, refresh_before)
        if isinstance(claim, Granted):
            self.leases.add(claim.lease, asked_at)
            if self._shutdown.stopping:
                self.release(claim.lease)
                raise CrawlStopping
            if claim.taken_over:
                self._stats.count("recovered")
        return claim

    def _waits(self, claim: Claim) -> bool:
        """Whether to wait for the job: for one that a crawl of this very process has, always (C12)."""
        if not isinstance(claim, Held):
            return False
        return self._settings.held == "wait" or same_process(claim.worker_id, self._store.worker_id)

    async def claim_again(self, context: DownloadContext) -> Claim:
        """Return the claim on a job whose lease was lost; the context gets the lease that is granted.

        A turn that went with the lost lease goes with the new one.
        """
        lost = context.lease
        claim = await self.claim(context.key, context.job)
        while isinstance(claim, Done) and not context.accepts(claim.completion.known):
            claim = await self.claim(context.key, context.job, refresh_before=math.inf)
        if isinstance(claim, Granted):
            context.lease = claim.lease
            if lost.claim_id in self._hosts:
                self._hosts[claim.lease.claim_id] = self._hosts.pop(lost.claim_id)
            if not claim.taken_over:
                self._stats.count("recovered")
        return claim

    def begin_work(self, lease: Lease, *, unlike: bool) -> None:
        """Record that a download begins: Scrapy has items wait for their turn whose jobs are claimed.

        If the process dies, only started jobs lose an attempt. *unlike*: the request has what no plain
        GET has.
        """
        self._ledger.begin_work(lease, unlike=unlike).add_done_callback(log_not_recorded)

    # -- after it --------------------------------------------------------------------------

    async def complete(
        self,
        lease: Lease,
        stored: StoredRepresentation,
        resumed_from: int,
        *,
        path: str | None = None,
        by_response: bool = False,
        republish: Callable[[], Awaitable[object]] | None = None,
    ) -> Completion:
        """Return the recorded completion; *path* is the name that the blob was given.

        *by_response*: the name depends on the response, so it cannot be made without one.
        *republish* publishes the blob again: ``gc`` may just be collecting an older copy of it, which
        no job referred to. Raises ``LeaseLost`` if the job is another worker's by now.
        """
        had_lease = self._end(lease)
        ends = time.monotonic() + GOING_LASTS
        while True:
            try:
                return await self._calls.result(
                    self._ledger.complete(
                        lease, stored, resumed_from=resumed_from, path=path, by_response=by_response
                    )
                )
            except LeaseLost:
                self.renewals.report_lost([lease] if had_lease else [])
                raise
            except BlobGoing:
                if republish is None or time.monotonic() > ends:
                    raise
            await sleep(GOING_PAUSE)
            await republish()

    def fail(
        self, lease: Lease, code: str, error: str, *, permanent: bool, retry_after: float | None = None
    ) -> None:
        """Give the job back as failed; no caller waits for it, a lost lease is only logged.

        *retry_after* in seconds, as the server asked.
        """
        self._end(lease)
        future = self._ledger.fail(lease, code, error, permanent=permanent, retry_after=retry_after)
        future.add_done_callback(log_not_recorded)

    def release(self, lease: Lease) -> None:
        """Give the job back unharmed; no caller waits for it, a lost lease is only logged."""
        self._end(lease)
        self._ledger.release(lease).add_done_callback(log_not_recorded)

    def release_unless_ended(self, lease: Lease) -> None:
        """Give back a job that was not completed, and the turn that goes with it."""
        if self.leases.has(lease) or lease.claim_id in self._hosts:
            self.release(lease)

    @contextmanager
    def released_on_error(self, lease: Lease) -> Iterator[None]:
        """Give the job back if what is done inside raises, whatever that is."""
        try:
            yield
        except BaseException:  # raised again: also a cancelled task gives its turn back
            self.release_unless_ended(lease)
            raise

    def hand_to_spider(self, context: DownloadContext) -> None:
        """Leave the job to the spider that was given its part, until another request asks for it."""
        self._handed_to_spiders[context.key] = context.lease
        self._held.resume([context.key])

    def take_from_spider(self, context: DownloadContext) -> bool:
        """Take the job back from the spider, which publishes the part; return whether the spider had it.

        By now another request may have got the job, and have handed it over under its own lease.
        """
        if self._handed_to_spiders.get(context.key) != context.lease:
            return False
        del self._handed_to_spiders[context.key]
        return True

    def _end(self, lease: Lease) -> bool:
        """End a lease here and the turn that goes with it; return whether the lease was still held."""
        host = self._hosts.pop(lease.claim_id, None)
        if host is not None:
            self._turns.end(host)
        return self.leases.remove(lease)

    def _cancel_downloads(self, error: Callable[[], StreamingError]) -> int:
        cancels = self.leases.take_cancels()
        for cancel in cancels:
            cancel(error())
        return len(cancels)

    # -- items -----------------------------------------------------------------------------

    def remember(self, completion: Completion) -> None:
        """Keep a completion until its item is delivered; of very many the oldest are dropped."""
        self._completed[completion.completion_id] = completion
        if len(self._completed) > UNDELIVERED:
            del self._completed[next(iter(self._completed))]

    def deliver(self, completion_ids: Iterable[str]) -> None:
        """Take note that an item with these completions was delivered."""
        for each in dict.fromkeys(completion_ids):  # an item may name one file twice
            if each in self._completed:
                self._delivered.append(self._completed.pop(each))

    def record_delivered(self) -> None:
        """Record in the ledger what was delivered since the last time."""
        completions, self._delivered = self._delivered, []
        if completions:
            self._ledger.delivered(completions).add_done_callback(log_not_recorded)
