"""The extension: owns the storage of a crawl, keeps its leases, counts what happens.

Every other component finds it by ``crawler.get_extension(StreamingExtension)``.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, ParamSpec, Self, TypeVar

from scrapy import Request, signals
from scrapy.crawler import Crawler
from scrapy.exceptions import NotConfigured
from scrapy.utils.asyncio import create_looping_call, is_asyncio_available, run_in_thread
from scrapy.utils.defer import maybe_deferred_to_future
from twisted.internet.defer import Deferred
from w3lib.url import canonicalize_url

from scrapy_streaming.exceptions import IntegrityError, LeaseLost
from scrapy_streaming.exchange import Ticket
from scrapy_streaming.protocol.digests import Digest, expected_digest
from scrapy_streaming.protocol.jobs import Claim, Completion, Held, Known, Lease, job_key
from scrapy_streaming.protocol.resume import Reason
from scrapy_streaming.receiver import Budget
from scrapy_streaming.settings import StreamingSettings, unknown_settings
from scrapy_streaming.storage import Storage
from scrapy_streaming.storage.blobs import Published
from scrapy_streaming.storage.finished import FinishedPart
from scrapy_streaming.storage.ledger import JobRequest
from scrapy_streaming.storage.parts import PartWriter

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

#: Seconds between two looks at a job that another worker holds.
HELD_POLL = 0.5


class StreamingExtension:
    """Opens the storage at start, closes it at the end, renews the leases in between.

    ``writers`` are parts opened and verified by the middleware, waiting for the handler to take
    them, by job key. ``lent`` are the leases of parts that spiders were given and have not
    published: the next who asks for the job gets it. ``untapped`` are the schemes whose handler
    turned out not to let bodies be taken.
    """

    def __init__(self, crawler: Crawler, settings: StreamingSettings) -> None:
        self.crawler = crawler
        self.settings = settings
        self.storage = Storage.open(settings)
        self.budget = Budget()
        self.writers: dict[str, PartWriter] = {}
        self.untapped: set[str] = set()
        self.lent: dict[str, Lease] = {}
        self._latencies = 0
        self._latency_ms = 0.0
        self._heartbeat = create_looping_call(self._renew)

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Self:
        """Return the extension; raise ``NotConfigured`` when streaming is off or cannot be.

        Raises ``SettingError``, ``StoreError`` or ``LedgerError`` when the crawl must not start.
        """
        settings = StreamingSettings.load(crawler.settings, os.environ)
        if not settings.enabled:
            reason = "STREAMING_ENABLED is off"
            raise NotConfigured(reason)
        if settings.store is None:
            reason = "FILES_STORE names no local directory"
            raise NotConfigured(reason)
        extension = cls(crawler, settings)
        crawler.signals.connect(extension.engine_started, signals.engine_started)
        crawler.signals.connect(extension.engine_stopped, signals.engine_stopped)
        return extension

    async def engine_started(self) -> None:
        """Say once what is on and what the user should know; start the heartbeat."""
        logger.info(
            "Streaming architecture integrations: streaming=%s idempotency=%s schema=%s", True, True, True
        )
        for note in self.storage.notes:
            logger.warning("%s", note)
        for name, near in unknown_settings(self.crawler.settings):
            hint = f"; did you mean {near}?" if near else ""
            logger.warning("%s is no setting of scrapy-streaming%s", name, hint)
        self._heartbeat.start(self.settings.lease_seconds / 4, now=False)

    async def engine_stopped(self) -> None:
        """Keep what is open and close the storage."""
        if self._heartbeat.running:
            self._heartbeat.stop()
        for key in list(self.writers):
            await self.close_writer(key)
        await run_in_thread(self.storage.close)

    # -- bridges ---------------------------------------------------------------------------

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what *function* returns, called in a thread; counted as one I/O operation."""
        self.count("io_operations")
        return await run_in_thread(function, *args, **kwargs)

    async def settle(self, future: Future[T]) -> T:
        """Return the ledger's answer; waiting for it holds no thread."""
        if is_asyncio_available():
            return await asyncio.wrap_future(future)
        from twisted.internet import reactor

        deferred: Deferred[T] = Deferred()

        def fire(done: Future[T]) -> None:
            error = done.exception()
            deferred.errback(error) if error is not None else deferred.callback(done.result())

        future.add_done_callback(lambda done: reactor.callFromThread(fire, done))
        return await maybe_deferred_to_future(deferred)

    def _renew(self) -> None:
        self.storage.ledger.renew().add_done_callback(_log_failed_renewal)

    # -- statistics ------------------------------------------------------------------------

    def count(self, name: str, number: int = 1) -> None:
        """Add *number* to the statistic ``streaming/<name>``."""
        stats = self.crawler.stats
        if stats is not None:
            stats.inc_value(f"streaming/{name}", number)

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

    def job(self, request: Request, item_work_id: str | None = None) -> tuple[str, JobRequest]:
        """Return the job that *request* asks for: its key and what the ledger keeps of it.

        ``meta["streaming"]`` may give ``work_id`` and ``artifact_id``. A request that is no
        plain GET gets its own hash as artifact id: it is another job than the URL's (R73).
        """
        given = request.meta.get("streaming")
        given = given if isinstance(given, dict) else {}
        plain = request.method == "GET" and not request.body
        work_id = given.get("work_id") or item_work_id or self.settings.work_id or self._spider_name()
        url = canonicalize_url(without_userinfo(request.url))
        request_hash = hashlib.sha256(
            b"\n".join((request.method.encode(), url.encode(), hashlib.sha256(request.body).digest()))
        ).hexdigest()
        artifact_id = given.get("artifact_id") or ("" if plain else request_hash)
        return job_key(work_id, artifact_id, url), JobRequest(work_id, artifact_id, url, request_hash)

    def _spider_name(self) -> str:
        return self.crawler.spider.name if self.crawler.spider is not None else ""

    async def claim(
        self, key: str, job: JobRequest, *, refresh_before: float | None = None, force: bool = False
    ) -> Claim:
        """Return the claim on a job, waiting for another worker to end if it has it.

        Waiting holds no thread. With ``STREAMING_HELD=skip`` a ``Held`` is returned at once.
        """
        while True:
            claim = await self.settle(
                self.storage.ledger.claim(
                    key, job, refresh_before=refresh_before, force=force, kept=self.storage.kept.get(key, 0)
                )
            )
            if isinstance(claim, Held) and (lease := self.lent.pop(key, None)) is not None:
                with suppress(LeaseLost):
                    await self.settle(self.storage.ledger.release(lease))
                continue
            if not isinstance(claim, Held) or self.settings.held == "skip":
                return claim
            force, refresh_before = False, None  # the other worker's result is fresh enough
            await _sleep(HELD_POLL)

    async def complete(self, lease: Lease, known: Known, resumed_from: int) -> Completion:
        """Return the recorded completion; raise ``LeaseLost`` if the job is another's by now."""
        try:
            return await self.settle(self.storage.ledger.complete(lease, known, resumed_from=resumed_from))
        except LeaseLost:
            self.count("leases_lost")
            raise

    def fail(self, lease: Lease, code: str, error: str, *, permanent: bool) -> None:
        """Give the job back as failed; nobody waits for it, a lost lease is only logged."""
        future = self.storage.ledger.fail(lease, code, error, permanent=permanent)
        future.add_done_callback(_log_failed_release)

    # -- parts -----------------------------------------------------------------------------

    async def close_writer(self, key: str) -> None:
        """Close a part that was opened for a request which never reached the handler."""
        writer = self.writers.pop(key, None)
        if writer is not None:
            await run_in_thread(writer.close)

    async def publish(self, part: FinishedPart, expected: Digest | None) -> Published:
        """Return the published blob; the part's bytes are checked against *expected* first.

        Raises ``IntegrityError`` (the part goes to quarantine) or ``WriteFailed``.
        """
        started = time.monotonic()
        published = await self.run(self._publish, part, expected)
        self.timed(started)
        self.count("deduplicated" if published.deduplicated else "blobs_published")
        return published

    def _publish(self, part: FinishedPart, expected: Digest | None) -> Published:
        wanted = [d for d in (expected, part.state.repr_digest) if d is not None]
        if part.state.content_encoding and expected is None:
            wanted = []  # Repr-Digest speaks of the coded bytes too, but what it spoke of is not settled here
        for digest in wanted:
            if digest != part.digest:
                self.storage.blobs.quarantine(part)
                msg = f"{part.state.url}: the bytes hash to {part.digest}, expected was {digest}"
                raise IntegrityError(msg)
        return self.storage.blobs.publish(part)

    async def discard_parts(self, ticket: Ticket) -> None:
        """Remove the job's parts, as far as they are not a later claim's."""
        await self.close_writer(ticket.key)
        await run_in_thread(self.storage.parts.discard, ticket.key, ticket.lease.fence)


def known_of(part: FinishedPart) -> Known:
    """Return what the ledger should know of a representation that was published."""
    state = part.state
    return Known(
        digest=str(part.digest),
        size=part.length,
        validators=state.validators,
        final_url=state.url,
        media_type=state.media_type,
        vary=state.vary,
        selecting=state.selecting,
    )


def expected_of(request: Request) -> Digest | None:
    """Return the digest that the request's meta or its URL's fragment expects.

    Raises ``ValueError`` if it cannot be read, or two of them disagree.
    """
    given = request.meta.get("streaming")
    digest = given.get("digest") if isinstance(given, dict) else None
    return expected_digest(digest, request.meta.get("expected_checksum"), request.url.partition("#")[2])


def without_userinfo(url: str) -> str:
    """Return *url* without user and password: credentials are stored nowhere (E7)."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def _log_failed_renewal(done: Future[Any]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.warning("the leases could not be renewed: %s", error)


def _log_failed_release(done: Future[Any]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.info("a failed job was not given back: %s", error)


async def _sleep(seconds: float) -> None:
    """Sleep on the event loop (``scrapy.utils.asyncio.sleep`` exists from Scrapy 2.18 on)."""
    if is_asyncio_available():
        await asyncio.sleep(seconds)
        return
    from twisted.internet import reactor
    from twisted.internet.task import deferLater

    await maybe_deferred_to_future(deferLater(reactor, seconds))
