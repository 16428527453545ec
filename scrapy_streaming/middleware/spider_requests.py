"""A spider's own streamed requests, ``meta={"streaming": True}``: claimed, handed to the callback, published.

What may live here: what such a request needs beside one of the pipeline, which ends its own jobs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace

from scrapy import Request
from scrapy.crawler import Crawler
from scrapy.http.request import NO_CALLBACK

from scrapy_streaming.context import CONTEXT, DownloadContext
from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.protocol.jobs import Granted
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.request_jobs import expected_of
from scrapy_streaming.response import ReceivedPart, StreamedResponse
from scrapy_streaming.runtime.crawl import Runtime
from scrapy_streaming.runtime.ledger_calls import DAMAGED_RECORD
from scrapy_streaming.storage.blobs import Published
from scrapy_streaming.storage.complete_part import representation_of

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)


class SpiderRequests:
    """Claims and ends the jobs of requests whose parts a spider takes in its callback."""

    def __init__(self, crawler: Crawler, runtime: Runtime) -> None:
        self._crawler = crawler
        self._runtime = runtime
        self._jobs = runtime.jobs

    async def claim(self, request: Request) -> DownloadContext | None:
        """Return the context of the download, ``None`` if its job cannot be claimed: it is not streamed.

        Raises ``ValueError`` for an expected digest that cannot be read, before the job is claimed.
        """
        expected = expected_of(request)
        key, job = self._runtime.requests.job(request)
        try:
            claim = await self._jobs.claim(key, job, refresh_before=math.inf)
        except LedgerError as error:
            if error.reason != DAMAGED_RECORD:
                raise
            self._runtime.stats.count("fallbacks_to_existing")
            logger.warning("not streamed (%s): %s: %s", error.reason, request, error)
            return None
        if not isinstance(claim, Granted):
            self._runtime.stats.count("fallbacks_to_existing")
            word = type(claim).__name__.lower()
            logger.warning("not streamed, the job cannot be claimed (%s): %s", word, request)
            return None
        expires = self._crawler.settings.getint("FILES_EXPIRES", 90)
        context = DownloadContext(
            key,
            job,
            claim.lease,
            expected=expected,
            refresh_before=self._runtime.requests.refresh_before(expires),
        )
        request.meta[CONTEXT] = context
        return context

    def hand_over(self, request: Request, context: DownloadContext) -> None:
        """Leave the job to the spider, whose callback gets the response next."""
        if is_spiders_own(request):
            del request.meta[CONTEXT]
            self._jobs.hand_to_spider(context)

    def let_go(self, request: Request, context: DownloadContext) -> None:
        """Give up the job of a spider's own request; a retry claims it again.

        The context goes with it: a request that the spider makes with this meta is another job.
        """
        if is_spiders_own(request):
            del request.meta[CONTEXT]
            self._jobs.release(context.lease)

    def publisher(self, context: DownloadContext) -> Callable[[StreamedResponse], Awaitable[Published]]:
        """Return what publishes the part of a response by its content, once.

        After an error the job is the spider's again: the next request for it gets it, and does not wait.
        """
        done: list[Published] = []

        async def publish(response: StreamedResponse) -> Published:
            if response.part is None:
                msg = f"{response} has no part to publish"
                raise ValueError(msg)
            if not done:
                taken = self._jobs.take_from_spider(context)
                try:
                    done.append(await self._publish(response, response.part, context))
                except BaseException:  # raised again: also after a cancelled task the job can be claimed
                    if taken and self._jobs.leases.has(context.lease):
                        self._jobs.hand_to_spider(context)
                    raise
            return done[0]

        return publish

    async def _publish(
        self, response: StreamedResponse, received: ReceivedPart, context: DownloadContext
    ) -> Published:
        part = received.finished
        place = self._runtime.storage.blobs.local_file(part.digest, None)
        published = await self._runtime.files.publish(part, context.expected)
        stored = replace(representation_of(part, context.expected), stamp=published.stamp)
        publication = self._runtime.publication
        await publication.complete(context.lease, stored, response.resumed_from, part=part)
        received.stored = place
        await publication.discard_parts(context, stored)
        return published


def is_spiders_own(request: Request) -> bool:
    """Whether a spider asked for the part itself, in its callback."""
    return request.meta.get("streaming") is True and request.callback is not NO_CALLBACK
