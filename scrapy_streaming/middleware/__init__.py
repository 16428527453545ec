"""The downloader middleware: plans every streamed request, acts on refused answers.

What may live here: the three methods that Scrapy calls, and their steps. Rules are in ``protocol``. It
stands at 595, behind HttpCompression (590) on the way out, so that its fields are the last word, and
before it on the way back, so that no decoder sees a streamed body.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from typing import Self
from urllib.parse import urldefrag

from scrapy import Request, signals
from scrapy.crawler import Crawler
from scrapy.http import Response
from scrapy.utils.httpobj import urlparse_cached

from scrapy_streaming import schemes
from scrapy_streaming.context import UNMARKED, Answer, DownloadContext, RequestInFlight, context_of
from scrapy_streaming.exceptions import (
    AddressRefused,
    AnswerRefused,
    DecodedTooLarge,
    EndUnmarked,
    LeaseLost,
    Undecodable,
    WriteFailed,
)
from scrapy_streaming.extension import runtime_of
from scrapy_streaming.middleware.buffered_answers import (
    came_from_here,
    despite_change,
    end_unmarked,
    judge_buffered,
    was_changed,
)
from scrapy_streaming.middleware.followups import FollowUps
from scrapy_streaming.middleware.planning_parts import Prepared, prepare
from scrapy_streaming.middleware.spider_requests import SpiderRequests
from scrapy_streaming.protocol.addresses import is_public
from scrapy_streaming.protocol.answers import AlreadyWhole, Outcome, PassOn, Refuse, Replace, Unchanged
from scrapy_streaming.protocol.attempts import Attempt
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.parts import PartState, unproven
from scrapy_streaming.protocol.planning import Fetch, Plan, PlannedRequest, plan_request
from scrapy_streaming.protocol.reasons import Reason, Recovery
from scrapy_streaming.protocol.selecting import ALWAYS, PLAN_FIELDS
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.request_fields import fields_of
from scrapy_streaming.response import ReceivedPart, StreamedResponse
from scrapy_streaming.runtime.body_writer import BodyRefused
from scrapy_streaming.runtime.crawl import Runtime
from scrapy_streaming.runtime.shutdown import CrawlStopping
from scrapy_streaming.runtime.space import is_no_space
from scrapy_streaming.storage.complete_part import CompletePart, broken_promise, small_part

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)


class ResumeMiddleware:
    """Sets conditional and Range fields by the resume decision, and clears them again."""

    def __init__(self, crawler: Crawler, runtime: Runtime) -> None:
        self._crawler = crawler
        self._runtime = runtime
        self._settings = runtime.settings
        self._stats = runtime.stats
        self._jobs = runtime.jobs
        self._parts = runtime.parts
        self._files = runtime.files
        self._publication = runtime.publication
        self._spiders = SpiderRequests(crawler, runtime)
        self._follow_ups = FollowUps(runtime, self._spiders)
        self._streams: dict[str, bool] = {}
        self._logged_identity = False

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Self:
        """Return the middleware; raise ``NotConfigured`` when the extension is off."""
        runtime = runtime_of(crawler)
        runtime.plans = True
        middleware = cls(crawler, runtime)
        crawler.signals.connect(middleware.note_answer, signals.response_downloaded)
        return middleware

    # -- on the way out --------------------------------------------------------------------

    async def process_request(self, request: Request) -> Request | Response | None:
        """Plan a streamed request anew, whatever an earlier pass left in it."""
        context = context_of(request)
        if context is None and request.meta.get("streaming") is True and _is_plannable(request):
            context = await self._spiders.claim(request)
        if context is None:
            return None
        await self._jobs.check(context)
        await self._parts.close(context.key)
        for name in context.planned_fields:
            request.headers.pop(name, None)
        context.sent = None
        if context.has_whole_answer:  # another middleware refused it: the file is fetched anew
            await self._publication.discard_parts(context)
            context.attempt = context.attempt.rejected()
        context.answer = None
        response = await self._plan(request, context) if _is_plannable(request) else None
        if response is None:
            await self._jobs.check(context)  # hashing a long part took its time
        return response

    async def _plan(self, request: Request, context: DownloadContext) -> Response | None:
        offline = self._runtime.requests.offline
        streams = not offline and self._handler_streams(request)
        if urlparse_cached(request).scheme in self._runtime.buffering:
            self._stats.count("fallbacks_to_existing")
        attempt = context.attempt.unstable()
        prepared = await self._prepared(request, context, attempt, streams=streams)
        if prepared.corrupt:
            self._stats.count(f"decision/{Reason.CORRUPT_PART}", prepared.corrupt)
        if context.only_resumes and not prepared.kept:
            msg = f"no part with validators is left that another request could go on with: {request.url}"
            raise AnswerRefused(msg, reason="own-request")
        self._stats.decision(prepared.plan.reason, request.url, context.lease, kept=prepared.kept)
        if prepared.writer is not None:
            self._parts.put(context.key, prepared.writer)
        self._set_fields(request, context, prepared.plan, streams=streams)
        request.meta["dont_cache"] = not offline
        context.attempt = attempt.planned(prepared.kept)
        context.tries.begin(prepared.kept)
        if not streams or prepared.whole is not None:  # else the handler does, when it is the request's turn
            unlike = self._runtime.requests.is_unlike(request, context)
            self._jobs.begin_work(context.lease, unlike=unlike)
        if prepared.whole is not None:
            return await self._answer_with(request, prepared.whole)
        return None

    async def _prepared(
        self, request: Request, context: DownloadContext, attempt: Attempt, *, streams: bool
    ) -> Prepared:
        """Return the plan for a request, and the part it builds on."""
        planned = PlannedRequest(
            urldefrag(request.url)[0],
            fields_of(request.headers),
            takes_weak=self._settings.weak_validators == "accept",
            unvalidated=self._settings.unvalidated_resume == "verify" and context.expected is not None,
        )
        if self._runtime.requests.offline:
            return Prepared(Fetch(Reason.OFFLINE))
        if attempt.recovery.is_conditional and not self._settings.resume_enabled:
            return Prepared(Fetch(Reason.RESUME_OFF))
        parts = self._runtime.storage.parts
        if streams and parts.may_have(context.key, context.lease.fence):
            return await self._runtime.threads.run(prepare, parts, context, attempt, planned)
        return Prepared(plan_request(None, context.stored, planned, attempt.recovery))

    def _set_fields(self, request: Request, context: DownloadContext, plan: Plan, *, streams: bool) -> None:
        """Set the fields of a plan; note the request as the one in flight."""
        fields = {**ALWAYS, **plan.fields(), **self._own_codings(context, plan)}
        if not context.original_url:
            context.original_url = request.url
            context.original_fields = tuple((name, tuple(values)) for name, values in request.headers.items())
        for name, value in fields.items():
            request.headers[name] = value
        context.sent = RequestInFlight(
            plan,
            tuple(fields),
            streams,
            max_size=request.meta.get("download_maxsize", self._settings.max_size),
            redirected_again=context.last_url == request.url != context.original_url,
        )
        context.last_url = request.url

    def _own_codings(self, context: DownloadContext, plan: Plan) -> dict[str, str]:
        """Return the request's own Accept-Encoding, which a plain GET keeps (R78)."""
        if context.accepts_codings is None:
            return {}
        if isinstance(plan, Fetch):
            return {"Accept-Encoding": context.accepts_codings}
        if not self._logged_identity:
            self._logged_identity = True
            logger.info("Accept-Encoding of requests is `identity` where a file is resumed or asked about")
        return {}

    async def _answer_with(self, request: Request, part: CompletePart) -> Response:
        """Answer a request whose part is whole already, with no network (R7)."""
        fields = {"Content-Type": part.state.media_type} if part.state.media_type else {}
        response = Response(part.state.url, status=200, request=request, headers=fields)
        outcome = AlreadyWhole(part.state)
        whole = await StreamedResponse.received(response, outcome, part, resumed_from=part.length)
        self.note_answer(whole, request)
        return whole

    def _handler_streams(self, request: Request) -> bool:
        """Whether the scheme's download handler takes bodies itself."""
        scheme = urlparse_cached(request).scheme
        if scheme not in self._streams:
            handler = schemes.handler_of(self._crawler.settings, scheme)
            self._streams[scheme] = self._settings.io_enabled and handler is not None and not handler.remedy
            if handler is not None and handler.remedy:
                self._runtime.buffering.note(handler)
        return self._streams[scheme] and scheme not in self._runtime.buffering

    # -- on the way back -------------------------------------------------------------------

    def note_answer(self, response: Response, request: Request) -> None:
        """Note what the handler gave: middlewares on both sides of this one may change it."""
        context = context_of(request)
        if context is None:
            return
        if not isinstance(response, StreamedResponse):
            context.tries.answered(response.status, None)
            if not came_from_here(response):
                self._stats.count("bytes_received", len(response.body))
            context.answer = Answer(PassOn(), body=response.body)
            return
        part = response.part.finished if response.part else None
        context.tries.answered(response.status, part)
        context.answer = Answer(response.outcome, part, response.resumed_from)
        self._make_readable(request, response)

    def _make_readable(self, request: Request, response: StreamedResponse) -> None:
        """Let hooks read what was stored before, after a 304; warn them of what is large."""
        outcome = response.outcome
        if isinstance(outcome, Unchanged) and response.confirmed is None:
            digest, name = Digest.parse(outcome.known.digest), outcome.known.name
            path = self._runtime.storage.blobs.local_file(digest, name.path if name else None)
            state = PartState(outcome.known.final_url, outcome.known.validators)
            response.confirmed = ReceivedPart(CompletePart(state, outcome.known.size, digest, path))
        if response.content is not None:
            default = self._crawler.settings.getint("DOWNLOAD_WARNSIZE")
            response.content.warn_size = request.meta.get("download_warnsize", default)

    async def process_response(self, request: Request, response: Response) -> Request | Response:
        """Act on what the answer was judged to be."""
        context = context_of(request)
        if context is None or context.plan is None:
            return response
        if not context.streams and response.body:
            self._refuse_private(request, response, context)
            if end_unmarked(response):
                sha256 = hashlib.sha256(response.body).hexdigest()
                if context.expected is None and sha256 != context.attempt.unmarked:
                    context.attempt = context.attempt.unmarked_body(sha256)
                    return await self._ask_for_its_end(request, response, context)
                response = response.replace(flags=[flag for flag in response.flags if flag != UNMARKED])
        answer = context.answer
        if answer is not None and was_changed(answer, response):
            outcome = despite_change(answer)
        else:
            outcome, response = self._judged(request, response, context)
        match outcome:
            case Refuse(reason, then):
                return await self._follow_ups.follow(request, context, reason, then)
            case Unchanged():
                return await self._unchanged(request, response, context, outcome)
            case AlreadyWhole() if not _has_part(response):
                return await self._confirmed(request, response, context, outcome)
            case PassOn() if context.attempt.recovery is Recovery.WITHOUT_RANGE:
                context.attempt = context.attempt.ordinary()  # an error without Range, too: not its fault
                return await self._received(request, response, context)
            case _:
                return await self._received(request, response, context)

    def _refuse_private(self, request: Request, response: Response, context: DownloadContext) -> None:
        """Raise ``AddressRefused`` for a buffered body from a private address (E3).

        A streamed request is refused before it is sent.

        What stands in the URL itself, or in the HTTP cache, came from no server.
        """
        allowed = self._settings.allow_private_addresses or came_from_here(response)
        if allowed or is_public(str(response.ip_address)):
            return
        self._spiders.let_go(request, context)
        host = response.ip_address or f"a server whose address {urlparse_cached(request).scheme}: hides"
        raise AddressRefused(str(host), request.url)

    async def _ask_for_its_end(
        self, request: Request, response: Response, context: DownloadContext
    ) -> Request | Response:
        """Return the request once more for a buffered body whose end nothing marks (R33)."""
        if not self._follow_ups.may_restart(context):
            return await self._received(request, response, context)
        self._stats.decision(Reason.CLOSE_DELIMITED, request.url, context.lease)
        return await self._follow_ups.follow(request, context, Reason.CLOSE_DELIMITED, Recovery.REFETCH)

    def _judged(
        self, request: Request, response: Response, context: DownloadContext
    ) -> tuple[Outcome, Response]:
        """Return what an answer was judged to be; a whole body that Scrapy buffered becomes a part."""
        if isinstance(response, StreamedResponse):
            return response.outcome, response
        if context.streams:  # no representation, or another middleware made it of one (R76)
            return PassOn(), response
        outcome = judge_buffered(context, request, response)
        if not isinstance(outcome, PassOn):
            self._stats.decision(outcome.reason, request.url, context.lease, status=response.status)
        if isinstance(outcome, Replace):
            answer = context.answer
            if answer is not None and answer.body != response.body:  # another middleware changed it (R76)
                return PassOn(), response
            if context.attempt.unmarked is not None and context.expected is None:  # the same twice (R33)
                outcome = replace(outcome, state=unproven(outcome.state))
            response = StreamedResponse.around(response, outcome, small_part(outcome.state, response.body))
            self.note_answer(response, request)
        return outcome, response

    async def _unchanged(
        self, request: Request, response: Response, context: DownloadContext, outcome: Unchanged
    ) -> Request | Response:
        """Hand on a 304 if the blob it speaks of is really there, its bytes untouched (R43, R44, R77)."""
        if await self._files.confirm(outcome.known) is None:
            reason = Reason.BLOB_MISSING
            self._stats.decision(reason, request.url, context.lease)
            return await self._follow_ups.follow(request, context, reason, Recovery.REFETCH_NO_CACHE)
        self._stats.count("bytes_saved", outcome.known.size)
        if not isinstance(response, StreamedResponse):
            response = StreamedResponse.around(response, outcome)
        self._make_readable(request, response)
        return response

    async def _confirmed(
        self, request: Request, response: Response, context: DownloadContext, outcome: AlreadyWhole
    ) -> Request | Response:
        """Take up the part that a 304 (R7, R49, R50) or a 416 (R33) confirmed to be whole."""
        writer = self._parts.take(context.key)
        if writer is None:
            return await self._follow_ups.follow(request, context, Reason.CORRUPT_PART, Recovery.REFETCH)
        part = await self._runtime.threads.run(writer.finish)
        outcome = replace(outcome, state=part.state)
        whole = await StreamedResponse.received(response, outcome, part, resumed_from=part.length)
        self.note_answer(whole, request)
        return await self._received(request, whole, context)

    async def _received(
        self, request: Request, response: Response, context: DownloadContext
    ) -> Request | Response:
        """Hand on a body that is there; one with wrong bytes is fetched again once (R63)."""
        if not isinstance(response, StreamedResponse) or response.part is None:
            self._spiders.let_go(request, context)
            return response
        resumed_from = response.resumed_from
        try:
            part = await self._parts.decoded(response.part.finished, context)
        except (Undecodable, DecodedTooLarge) as error:
            return await self._follow_ups.after_undecodable(
                request, context, error, resumed=bool(resumed_from)
            )
        if part is not response.part.finished:
            response = await StreamedResponse.received(response, response.outcome, part, resumed_from)
            self.note_answer(response, request)
        wrong = broken_promise(part, context.expected) is not None
        if wrong and resumed_from and self._follow_ups.may_restart(context):
            await self._files.quarantine(part)
            self._stats.decision(Reason.DIGEST_MISMATCH, request.url, context.lease)
            return await self._follow_ups.follow(request, context, Reason.DIGEST_MISMATCH, Recovery.DISCARD)
        self._stats.count("bytes_kept", resumed_from)
        if request.meta.get("streaming") is True:
            response.publisher = self._spiders.publisher(context)
        self._spiders.hand_over(request, context)
        return response

    async def process_exception(self, request: Request, exception: Exception) -> Request | Response | None:
        """Do not let RetryMiddleware count an attempt that left more bytes than it found.

        A download whose lease was lost goes on under a new one, or gets what another worker has
        stored meanwhile. A body whose end nothing marks is fetched once more: the same bytes again are
        taken for the whole (R33). One that the disk has no room for waits for it (C21). Raises
        ``LeaseLost`` if a lost lease cannot be claimed again, ``CrawlStopping`` at a stop.
        """
        context = context_of(request)
        if context is None:
            return None
        await self._parts.close(context.key)
        parts = await self._runtime.threads.run(self._runtime.storage.parts.find, context.key)
        context.tries.kept = kept = parts[0].state.length if parts else 0
        if isinstance(exception, CrawlStopping):
            self._runtime.shutdown.kept_bytes += kept
        elif isinstance(exception, LeaseLost):
            return await self._go_on(request, context, exception)
        elif isinstance(exception, EndUnmarked) and self._follow_ups.may_restart(context):
            self._stats.decision(Reason.CLOSE_DELIMITED, request.url, context.lease)
            context.attempt = context.attempt.unmarked_body(exception.sha256)
            return await self._follow_ups.follow(request, context, Reason.CLOSE_DELIMITED, Recovery.PROBE)
        elif isinstance(exception, AnswerRefused) and exception.reason == DecodedTooLarge.reason:
            await self._publication.discard_parts(context)
            context.tries.kept = 0
        elif isinstance(exception, BodyRefused):
            return await self._follow_ups.after_refused_body(request, context, Reason(exception.reason))
        elif isinstance(exception, WriteFailed) and is_no_space(exception):
            return await self._follow_ups.when_room(request, context, kept, exception)
        elif kept > context.attempt.kept:
            request.meta["retry_times"] = -1  # RetryMiddleware makes it 0: this attempt does not count
            context.attempt = context.attempt.made_progress(kept)
            logger.info("broke off with %d bytes kept (%s): %s", kept, exception, request.url)
        self._spiders.let_go(request, context)
        return None

    async def _go_on(self, request: Request, context: DownloadContext, lost: LeaseLost) -> Request | Response:
        """Return the request under a new lease, or another worker's result as an answer to it."""
        following = await self._follow_ups.after_lost_lease(request, context, lost)
        if isinstance(following, Request):
            return following
        context.sent = None  # no answer to judge: the ledger has the result
        response = Response(request.url, status=200, request=request)
        stored = StreamedResponse.around(response, Unchanged(following.completion.known, Reason.STORED))
        self._make_readable(request, stored)
        return stored


def _is_plannable(request: Request) -> bool:
    """Whether a request is a plain GET with no conditional field of the user's own (R73)."""
    context = context_of(request)
    planned = () if context is None else context.planned_fields
    own = [name for name in PLAN_FIELDS if name in request.headers and name not in planned]
    return request.method == "GET" and not request.body and not own


def _has_part(response: Response) -> bool:
    return isinstance(response, StreamedResponse) and response.part is not None
