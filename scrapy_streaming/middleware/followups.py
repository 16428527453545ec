"""The requests that follow an answer or an error of a download: asked again, asked otherwise, given up.

What may live here: what the middleware returns to Scrapy in place of a response or an error.
"""

from __future__ import annotations

import logging
from typing import Final

from scrapy import Request

from scrapy_streaming.context import DownloadContext
from scrapy_streaming.exceptions import AnswerRefused, LeaseLost, StreamingError, Undecodable, WriteFailed
from scrapy_streaming.middleware.spider_requests import SpiderRequests, is_spiders_own
from scrapy_streaming.protocol.jobs import Done, Granted
from scrapy_streaming.protocol.reasons import Reason, Recovery
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.runtime.crawl import Runtime
from scrapy_streaming.runtime.shutdown import CrawlStopping

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: What Scrapy's RedirectMiddleware notes in a request's meta.
_REDIRECTED: Final = ("redirect_times", "redirect_ttl", "redirect_urls", "redirect_reasons")


class FollowUps:
    """Makes the request that follows, or gives the job up."""

    def __init__(self, runtime: Runtime, spiders: SpiderRequests) -> None:
        self._runtime = runtime
        self._spiders = spiders
        self._jobs = runtime.jobs
        self._restarts = runtime.settings.restarts

    def may_restart(self, context: DownloadContext) -> bool:
        """Whether STREAMING_RESTARTS allows another request for the file."""
        return context.attempt.restarts < self._restarts

    async def follow(
        self, request: Request, context: DownloadContext, reason: Reason, recovery: Recovery
    ) -> Request:
        """Return the request that follows a refused answer; raise ``AnswerRefused`` if none does."""
        final = recovery is Recovery.FAIL or context.only_resumes
        if final or not self.may_restart(context):
            why = "no other request would help" if final else "STREAMING_RESTARTS is spent"
            msg = f"the answer was refused ({reason}) and {why}: {request.url}"
            self._spiders.let_go(request, context)
            raise AnswerRefused(msg, reason=reason)
        if recovery is Recovery.DISCARD:
            await self._runtime.publication.discard_parts(context)
        following = request.replace(dont_filter=True)
        if recovery is Recovery.ORIGINAL:
            # with what the user gave it: Scrapy took credentials off on the way to another origin
            following = following.replace(url=context.original_url, headers=context.original_fields)
            for name in _REDIRECTED:
                following.meta.pop(name, None)
        context.attempt = context.attempt.after_refusal(recovery)
        context.answer = None
        logger.info("refused (%s), asking again (%s): %s", reason, recovery, request.url)
        return following

    async def after_undecodable(
        self, request: Request, context: DownloadContext, error: StreamingError, *, resumed: bool
    ) -> Request:
        """Return the request after a body that could not be decoded, once if it came in pieces (R34, R63)."""
        await self._runtime.publication.discard_parts(context)
        if isinstance(error, Undecodable):
            self._runtime.stats.decision(Reason.UNDECODABLE, request.url, context.lease)
            if resumed and self.may_restart(context):
                return await self.follow(request, context, Reason.UNDECODABLE, Recovery.DISCARD)
        self._spiders.let_go(request, context)
        raise AnswerRefused(f"{error}: {request.url}", reason=error.reason) from error

    async def after_refused_body(
        self, request: Request, context: DownloadContext, reason: Reason
    ) -> Request | None:
        """Return a plain GET after a body that was not what its head announced (R64, R74).

        The first piece that does not match its Content-Digest is left to RetryMiddleware, which asks
        for it once more.
        """
        self._runtime.stats.decision(reason, request.url, context.lease)
        if reason is Reason.UNDECODABLE:
            await self._runtime.publication.discard_parts(context)  # RetryMiddleware asks anew
        elif reason is Reason.SLICE_DIGEST_MISMATCH and not context.attempt.odd_pieces:
            context.attempt = context.attempt.odd_piece()
        elif self.may_restart(context):
            return await self.follow(request, context, reason, Recovery.REFETCH)
        self._spiders.let_go(request, context)
        return None

    async def when_room(
        self, request: Request, context: DownloadContext, kept: int, error: WriteFailed
    ) -> Request | None:
        """Return the request again once there is room on the disk, ``None`` if none came (C21)."""
        try:
            found = await self._runtime.room.found(error)
        except CrawlStopping:
            self._spiders.let_go(request, context)
            raise
        if not found:
            self._spiders.let_go(request, context)
            return None
        context.attempt = context.attempt.made_progress(kept)
        return request.replace(dont_filter=True)

    async def after_lost_lease(
        self, request: Request, context: DownloadContext, lost: LeaseLost
    ) -> Request | Done:
        """Return the request under a new lease, or what another worker has stored meanwhile.

        Raises ``LeaseLost`` if the job cannot be claimed again.
        """
        obstacle = "STREAMING_MAX_ATTEMPTS is spent"
        if context.attempt.reclaims < self._runtime.settings.max_attempts:
            claim = await self._jobs.claim_again(context)
            if isinstance(claim, Granted):
                context.attempt = context.attempt.claimed_again()
                following = request.copy()
                following.dont_filter = True
                logger.info("claimed again, going on: %s", request.url)
                return following
            if isinstance(claim, Done) and not is_spiders_own(request):
                return claim
            obstacle = type(claim).__name__.lower()
        self._spiders.let_go(request, context)
        msg = f"{lost}; the job cannot be claimed again ({obstacle}): {request.url}"
        raise LeaseLost(msg) from lost
