"""The downloader middleware: plans every request of ours, acts on refused answers.

It stands at 595, behind HttpCompression (590) on the way out, so that its fields are the last
word, and before it on the way back, so that no decoder sees a streamed body.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from dataclasses import dataclass, replace
from typing import Any, Self
from urllib.parse import urldefrag

from scrapy import Request, signals
from scrapy.crawler import Crawler
from scrapy.exceptions import NotConfigured
from scrapy.http import Response
from scrapy.http.request import NO_CALLBACK
from scrapy.utils.httpobj import urlparse_cached

from scrapy_streaming import schemes
from scrapy_streaming.exceptions import (
    AddressRefused,
    AnswerRefused,
    DecodedTooLarge,
    EndUnmarked,
    LeaseLost,
    LedgerError,
    PartCorrupt,
    StreamingError,
    Undecodable,
    WriteFailed,
)
from scrapy_streaming.exchange import (
    DOUBTFUL,
    TICKET,
    UNMARKED,
    Answer,
    Ticket,
    asked_by,
    request_fields,
    response_fields,
    resumed_or_refused,
    ticket_of,
)
from scrapy_streaming.extension import (
    LEDGER_ROW,
    StreamingExtension,
    expected_of,
    why_without,
)
from scrapy_streaming.protocol.addresses import is_public
from scrapy_streaming.protocol.answers import (
    AlreadyWhole,
    Outcome,
    PassOn,
    Refuse,
    Replace,
    ResponseHead,
    Unchanged,
)
from scrapy_streaming.protocol.attempts import UNSTABLE_AFTER
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Done, Granted
from scrapy_streaming.protocol.judging import judge_response
from scrapy_streaming.protocol.parts import PartState, unproven
from scrapy_streaming.protocol.planning import (
    ConfirmWhole,
    Fetch,
    Plan,
    PlannedRequest,
    PublishPart,
    Resume,
    plan_request,
)
from scrapy_streaming.protocol.reasons import Reason, Recovery
from scrapy_streaming.protocol.selecting import ALWAYS, PLAN_FIELDS
from scrapy_streaming.receiver import BodyRefused
from scrapy_streaming.response import ReceivedPart, StreamedResponse
from scrapy_streaming.shutdown import CrawlStopping
from scrapy_streaming.space import is_no_space
from scrapy_streaming.storage import Storage
from scrapy_streaming.storage.blobs import Published
from scrapy_streaming.storage.finished import FinishedPart, broken_promise, known_of, small_part
from scrapy_streaming.storage.parts import PartWriter
from scrapy_streaming.texts import clean_record

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: What Scrapy's RedirectMiddleware notes in a request's meta.
_REDIRECTED = ("redirect_times", "redirect_ttl", "redirect_urls", "redirect_reasons")


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A plan with what it builds on: an open, verified part, or a whole one."""

    plan: Plan
    writer: PartWriter | None = None
    whole: FinishedPart | None = None
    corrupt: int = 0


class ResumeMiddleware:
    """Sets conditional and Range fields by the resume decision, and clears them again."""

    def __init__(self, crawler: Crawler, extension: StreamingExtension) -> None:
        self._crawler = crawler
        self._extension = extension
        self._streams: dict[str, bool] = {}
        self._said_identity = False

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Self:
        """Return the middleware; raise ``NotConfigured`` when the extension is off."""
        extension = crawler.get_extension(StreamingExtension)
        if extension is None:
            raise NotConfigured(*why_without(crawler))
        extension.plans = True
        middleware = cls(crawler, extension)
        crawler.signals.connect(middleware.answered, signals.response_downloaded)
        return middleware

    # -- on the way out --------------------------------------------------------------------

    async def process_request(self, request: Request) -> Request | Response | None:
        """Plan a request of ours anew, whatever an earlier pass left in it."""
        ticket = ticket_of(request)
        if ticket is None and request.meta.get("streaming") is True and _plannable(request):
            ticket = await self._claim_for_spider(request)
        if ticket is None:
            return None
        await self._extension.check(ticket)
        await self._extension.close_writer(ticket.key)
        for name in ticket.ours:
            request.headers.pop(name, None)
        ticket = replace(await self._rejected(ticket), ours=(), plan=None, answer=None)
        request.meta[TICKET] = ticket
        answer = await self._plan(request, ticket) if _plannable(request) else None
        if answer is None:
            await self._extension.check(ticket)  # behind the hashing of a long part
        return answer

    async def _rejected(self, ticket: Ticket) -> Ticket:
        """Have a request that was answered with a whole file fetch another: a middleware wants it anew."""
        if ticket.answer is None or not (ticket.answer.part or isinstance(ticket.answer.outcome, Unchanged)):
            return ticket
        await self._extension.discard_parts(ticket)
        return replace(ticket, mode=Recovery.REFETCH)

    async def _prepared(self, request: Request, ticket: Ticket, *, streams: bool) -> _Prepared:
        """Return the plan for a request, and the part it builds on."""
        settings = self._extension.settings
        asking = PlannedRequest(
            urldefrag(request.url)[0],
            request_fields(request),
            takes_weak=settings.weak_validators == "accept",
            unvalidated=settings.unvalidated_resume == "verify" and ticket.expected is not None,
        )
        if self._extension.offline:
            return _Prepared(Fetch(Reason.OFFLINE))
        conditional = ticket.mode in (Recovery.NONE, Recovery.CONFIRM, Recovery.PROBE)
        if conditional and not self._extension.settings.resume_enabled:
            return _Prepared(Fetch(Reason.RESUME_OFF))
        if streams and self._extension.storage.parts.may_have(ticket.key, ticket.lease.fence):
            return await self._extension.run(_prepare, self._extension.storage, ticket, asking)
        return _Prepared(plan_request(None, ticket.known, asking, ticket.mode))

    async def _plan(self, request: Request, ticket: Ticket) -> Response | None:
        offline = self._extension.offline
        streams = not offline and self._handler_streams(request)
        if urlparse_cached(request).scheme in self._extension.untapped:
            self._extension.count("fallbacks_to_existing")
        if ticket.mode is Recovery.NONE and ticket.changes >= UNSTABLE_AFTER:
            ticket = replace(ticket, mode=Recovery.SINGLE_SHOT)
        mode = ticket.mode
        prepared = await self._prepared(request, ticket, streams=streams)
        if prepared.corrupt:
            self._extension.count(f"decision/{Reason.CORRUPT_PART}", prepared.corrupt)
        plan = prepared.plan
        if ticket.only_resumes and not _kept(plan):
            msg = f"no part with validators is left that another request could go on with: {request.url}"
            raise AnswerRefused(msg, reason="own-request")
        self._extension.decided(request, ticket, plan.reason, kept=_kept(plan))
        if prepared.writer is not None:
            self._extension.writers[ticket.key] = prepared.writer
        fields = {**ALWAYS, **plan.fields(), **self._own_codings(ticket, plan)}
        if not ticket.first:
            own = tuple((name, tuple(values)) for name, values in request.headers.items())
            ticket = replace(ticket, first=request.url, first_fields=own)
        for name, value in fields.items():
            request.headers[name] = value
        request.meta["dont_cache"] = not offline
        request.meta[TICKET] = replace(
            ticket,
            plan=plan,
            # asked once, never again by a retry
            mode=Recovery.NONE if mode in (Recovery.CONFIRM, Recovery.PROBE) else mode,
            ours=tuple(fields),
            kept=max(ticket.kept, _kept(plan)),
            streams=streams,
            asked=request.url,
            stale=ticket.asked == request.url != ticket.first,
            max_size=request.meta.get("download_maxsize", self._extension.settings.max_size),
        )
        ticket.tries.begin(_kept(plan))
        if not streams or prepared.whole is not None:  # else the handler says so, when it is its turn
            self._extension.begin_work(request, ticket)
        if prepared.whole is not None:
            return await self._whole_already(request, prepared.whole)
        return None

    def _own_codings(self, ticket: Ticket, plan: Plan) -> dict[str, str]:
        """Return the request's own Accept-Encoding, which a plain GET keeps (R78)."""
        if ticket.accepts_codings is None:
            return {}
        if isinstance(plan, Fetch):
            return {"Accept-Encoding": ticket.accepts_codings}
        if not self._said_identity:
            self._said_identity = True
            logger.info("Accept-Encoding of requests is `identity` where a file is resumed or asked about")
        return {}

    async def _whole_already(self, request: Request, part: FinishedPart) -> Response:
        """Answer a request whose part is whole already, with no network (R7)."""
        fields = {"Content-Type": part.state.media_type} if part.state.media_type else {}
        response = Response(part.state.url, status=200, request=request, headers=fields)
        outcome = AlreadyWhole(part.state)
        whole = await StreamedResponse.received(response, outcome, part, resumed_from=part.length)
        self.answered(whole, request)
        return whole

    def _handler_streams(self, request: Request) -> bool:
        """Whether the scheme's download handler takes bodies itself."""
        scheme = urlparse_cached(request).scheme
        if scheme not in self._streams:
            handler = schemes.handler_of(self._crawler.settings, scheme)
            self._streams[scheme] = (
                self._extension.settings.io_enabled and handler is not None and not handler.remedy
            )
            if handler is not None and handler.remedy:
                self._extension.note_buffering(handler)
        return self._streams[scheme] and scheme not in self._extension.untapped

    async def _claim_for_spider(self, request: Request) -> Ticket | None:
        """Return the ticket for a spider's own ``meta={"streaming": True}`` request."""
        key, job = self._extension.job(request)
        try:
            claim = await self._extension.claim(key, job, refresh_before=math.inf)
        except LedgerError as error:
            if error.reason != LEDGER_ROW:
                raise
            self._extension.count("fallbacks_to_existing")
            logger.warning("not streamed (%s): %s: %s", error.reason, request, error)
            return None
        if isinstance(claim, Granted):
            fresh = self._extension.refresh_before(self._crawler.settings.getint("FILES_EXPIRES", 90))
            return Ticket(key, job, claim.lease, expected=expected_of(request), refresh_before=fresh)
        self._extension.count("fallbacks_to_existing")
        logger.warning(
            "not streamed, the job is not to be had (%s): %s", type(claim).__name__.lower(), request
        )
        return None

    # -- on the way back -------------------------------------------------------------------

    def answered(self, response: Response, request: Request) -> None:
        """Note what the handler gave: middlewares on both sides of this one may change it."""
        ticket = ticket_of(request)
        if ticket is None:
            return
        if not isinstance(response, StreamedResponse):
            ticket.tries.answered(response.status, None)
            if not _came_from_here(response):
                self._extension.count("bytes_received", len(response.body))
            request.meta[TICKET] = replace(ticket, answer=Answer(PassOn(), body=response.body))
            return
        part = response.part.finished if response.part else None
        ticket.tries.answered(response.status, part)
        request.meta[TICKET] = replace(ticket, answer=Answer(response.outcome, part, response.resumed_from))
        self._readable(request, response)

    def _readable(self, request: Request, response: StreamedResponse) -> None:
        """Let hooks read what was stored before, after a 304; warn them of what is large."""
        outcome = response.outcome
        if isinstance(outcome, Unchanged) and response.confirmed is None:
            digest, name = Digest.parse(outcome.known.digest), outcome.known.name
            path = self._extension.storage.blobs.place(digest, name.path if name else None)
            state = PartState(outcome.known.final_url, outcome.known.validators)
            response.confirmed = ReceivedPart(FinishedPart(state, outcome.known.size, digest, path))
        if response.content is not None:
            default = self._crawler.settings.getint("DOWNLOAD_WARNSIZE")
            response.content.warn_size = request.meta.get("download_warnsize", default)

    async def process_response(self, request: Request, response: Response) -> Request | Response:
        """Act on what the answer was judged to be."""
        ticket = ticket_of(request)
        if ticket is None or ticket.plan is None:
            return response
        answer, ticket = ticket.answer, replace(ticket, answer=None)  # a request that follows has none yet
        if not ticket.streams and response.body and not self._allowed(response):
            self._let_go(request, ticket)
            host = response.ip_address or f"a server whose address {urlparse_cached(request).scheme}: hides"
            raise AddressRefused(str(host), request.url)
        if not ticket.streams and response.body and _end_unmarked(response):
            sha256 = hashlib.sha256(response.body).hexdigest()
            if ticket.expected is None and sha256 != ticket.unmarked:
                return await self._again_for_its_end(request, response, replace(ticket, unmarked=sha256))
            response = response.replace(flags=[flag for flag in response.flags if flag != UNMARKED])
        if answer is not None and _changed(answer, response):
            outcome = _despite_change(answer)
        else:
            outcome, response = self._judged(request, response, ticket, answer)
        match outcome:
            case Refuse(reason, then):
                return await self._follow(request, ticket, reason, then)
            case Unchanged():
                return await self._unchanged(request, response, ticket, outcome)
            case AlreadyWhole() if not _has_part(response):
                return await self._confirmed(request, response, ticket, outcome)
            case PassOn() if ticket.mode is Recovery.WITHOUT_RANGE:
                # an error without Range too: Range was not the cause
                request.meta[TICKET] = replace(ticket, mode=Recovery.NONE, answer=answer)
                return await self._received(request, response, ticket)
            case _:
                return await self._received(request, response, ticket)

    async def _again_for_its_end(
        self, request: Request, response: Response, ticket: Ticket
    ) -> Request | Response:
        """Return the request once more for a buffered body whose end nothing marks (R33)."""
        if ticket.restarts >= self._extension.settings.restarts:
            return await self._received(request, response, ticket)
        self._extension.decided(request, ticket, Reason.CLOSE_DELIMITED)
        return await self._follow(request, ticket, Reason.CLOSE_DELIMITED, Recovery.REFETCH)

    def _judged(
        self, request: Request, response: Response, ticket: Ticket, answer: Answer | None
    ) -> tuple[Outcome, Response]:
        """Return what an answer was judged to be; a whole body that Scrapy buffered becomes a part."""
        if isinstance(response, StreamedResponse):
            return response.outcome, response
        if ticket.streams:  # no representation, or another middleware made it of one (R76)
            return PassOn(), response
        outcome = judge_buffered(ticket, request, response)
        if not isinstance(outcome, PassOn):
            self._extension.decided(request, ticket, outcome.reason, status=response.status)
        if isinstance(outcome, Replace):
            if answer is not None and answer.body != response.body:  # another middleware changed it (R76)
                return PassOn(), response
            if ticket.unmarked is not None and ticket.expected is None:  # the same bytes twice (R33)
                outcome = replace(outcome, state=unproven(outcome.state))
            response = StreamedResponse.around(response, outcome, small_part(outcome.state, response.body))
            self.answered(response, request)
        return outcome, response

    def _allowed(self, response: Response) -> bool:
        """Whether a body that Scrapy buffered may be used: our handler looks before it asks (E3).

        What stands in the URL itself, or in the HTTP cache, came from no server.
        """
        if self._extension.settings.allow_private_addresses or _came_from_here(response):
            return True
        return is_public(str(response.ip_address))

    async def _follow(self, request: Request, ticket: Ticket, reason: Reason, then: Recovery) -> Request:
        """Return the request that follows a refused answer, within the restart budget."""
        final = then is Recovery.FAIL or ticket.only_resumes
        if final or ticket.restarts >= self._extension.settings.restarts:
            why = "no other request would help" if final else "STREAMING_RESTARTS is spent"
            msg = f"the answer was refused ({reason}) and {why}: {request.url}"
            self._let_go(request, ticket)
            raise AnswerRefused(msg, reason=reason)
        if then is Recovery.DISCARD:
            await self._extension.discard_parts(ticket)
        following = request.replace(dont_filter=True)
        if then is Recovery.ORIGINAL:
            # with what the user gave it: Scrapy took credentials off on the way to another origin
            following = following.replace(url=ticket.first, headers=ticket.first_fields)
            for name in _REDIRECTED:
                following.meta.pop(name, None)
        following.meta[TICKET] = replace(
            ticket,
            mode=Recovery.NONE if then is Recovery.ORIGINAL else then,
            restarts=ticket.restarts + 1,
            kept=0,
        )
        logger.info("refused (%s), asking again (%s): %s", reason, then, request.url)
        return following

    async def _unchanged(
        self, request: Request, response: Response, ticket: Ticket, outcome: Unchanged
    ) -> Request | Response:
        """Hand on a 304 if the blob it speaks of is really there, its bytes untouched (R43, R44, R77)."""
        if await self._extension.stored(outcome.known) is None:
            self._extension.decided(request, ticket, Reason.BLOB_MISSING)
            return await self._follow(request, ticket, Reason.BLOB_MISSING, Recovery.REFETCH_NO_CACHE)
        self._extension.count("bytes_saved", outcome.known.size)
        if not isinstance(response, StreamedResponse):
            response = StreamedResponse.around(response, outcome)
        self._readable(request, response)
        return response

    async def _confirmed(
        self, request: Request, response: Response, ticket: Ticket, outcome: AlreadyWhole
    ) -> Request | Response:
        """Take up the part that a 304 (R7, R49, R50) or a 416 (R33) confirmed to be whole."""
        writer = self._extension.writers.pop(ticket.key, None)
        if writer is None:
            return await self._follow(request, ticket, Reason.CORRUPT_PART, Recovery.REFETCH)
        part = await self._extension.run(writer.finish)
        outcome = replace(outcome, state=part.state)
        whole = await StreamedResponse.received(response, outcome, part, resumed_from=part.length)
        self.answered(whole, request)
        return await self._received(request, whole, ticket)

    async def _received(self, request: Request, response: Response, ticket: Ticket) -> Request | Response:
        """Hand on a body that is there; one with wrong bytes is fetched again once (R63)."""
        if not isinstance(response, StreamedResponse) or response.part is None:
            self._let_go(request, ticket)
            return response
        try:
            part = await self._extension.decode(response.part.finished, ticket)
        except (Undecodable, DecodedTooLarge) as error:
            return await self._refuse_coded(request, response, ticket, error)
        if part is not response.part.finished:
            outcome, kept = response.outcome, response.resumed_from
            response = await StreamedResponse.received(response, outcome, part, resumed_from=kept)
            self.answered(response, request)
        wrong = broken_promise(part, ticket.expected) is not None
        if wrong and response.resumed_from and ticket.restarts < self._extension.settings.restarts:
            await self._extension.run(self._extension.storage.blobs.quarantine, part)
            self._extension.decided(request, ticket, Reason.DIGEST_MISMATCH)
            return await self._follow(request, ticket, Reason.DIGEST_MISMATCH, Recovery.DISCARD)
        self._extension.count("bytes_kept", response.resumed_from)
        if request.meta.get("streaming") is True:
            response.publisher = self._publisher(ticket)
        if _spiders_own(request):
            del request.meta[TICKET]
            self._extension.lend(ticket)
        return response

    async def _refuse_coded(
        self, request: Request, response: StreamedResponse, ticket: Ticket, error: StreamingError
    ) -> Request:
        """Return the request after a body that could not be decoded, once if it came in pieces (R34, R63)."""
        await self._extension.discard_parts(ticket)
        if isinstance(error, Undecodable):
            self._extension.decided(request, ticket, Reason.UNDECODABLE)
            if response.resumed_from and ticket.restarts < self._extension.settings.restarts:
                return await self._follow(request, ticket, Reason.UNDECODABLE, Recovery.DISCARD)
        self._let_go(request, ticket)
        raise AnswerRefused(f"{error}: {request.url}", reason=error.reason) from error

    def _let_go(self, request: Request, ticket: Ticket) -> None:
        """Give up the job of a spider's own request; a retry claims it again.

        The ticket goes with it: a follow-up request made with this meta is another job. The
        pipeline looks after its own jobs.
        """
        if _spiders_own(request):
            del request.meta[TICKET]
            self._extension.release(ticket.lease)

    def _publisher(self, ticket: Ticket) -> Any:
        done: list[Published] = []

        async def publish(response: StreamedResponse) -> Published:
            if response.part is None:
                msg = f"{response} has no part to publish"
                raise ValueError(msg)
            if not done:
                self._extension.lent.pop(ticket.key, None)
                part = response.part.finished
                place = self._extension.storage.blobs.place(part.digest, None)
                published = await self._extension.publish(part, ticket.expected)
                known = replace(known_of(part, ticket.expected), stamp=published.stamp)
                await self._extension.complete(ticket.lease, known, response.resumed_from, part=part)
                response.part.stored = place
                await self._extension.discard_parts(ticket, known)
                done.append(published)
            return done[0]

        return publish

    async def process_exception(self, request: Request, exception: Exception) -> Request | Response | None:
        """Do not let RetryMiddleware count an attempt that left more bytes than it found.

        A download whose lease was lost goes on under a new one, or gets what another worker has
        stored meanwhile. A body whose end nothing marks is fetched once more: the same bytes again are
        taken for the whole (R33). One that the disk has no room for waits for it (C21). Raises
        ``LeaseLost`` if a lost lease is not to be had again, ``CrawlStopping`` at a stop.
        """
        ticket = ticket_of(request)
        if ticket is None:
            return None
        await self._extension.close_writer(ticket.key)
        stored = await self._extension.run(self._extension.storage.parts.find, ticket.key)
        ticket.tries.kept = kept = stored[0].state.length if stored else 0
        if isinstance(exception, CrawlStopping):
            self._extension.left_kept += kept
        elif isinstance(exception, LeaseLost):
            return await self._go_on(request, ticket, exception)
        elif isinstance(exception, EndUnmarked) and ticket.restarts < self._extension.settings.restarts:
            self._extension.decided(request, ticket, Reason.CLOSE_DELIMITED)
            ticket = replace(ticket, unmarked=exception.sha256)
            return await self._follow(request, ticket, Reason.CLOSE_DELIMITED, Recovery.PROBE)
        elif isinstance(exception, AnswerRefused) and exception.reason == DecodedTooLarge.reason:
            await self._extension.discard_parts(ticket)
            ticket.tries.kept = 0
        elif isinstance(exception, BodyRefused):
            return await self._after_refused_body(request, ticket, Reason(exception.reason))
        elif isinstance(exception, WriteFailed) and is_no_space(exception):
            return await self._when_room(request, replace(ticket, kept=kept), exception)
        elif kept > ticket.kept:
            request.meta["retry_times"] = -1  # RetryMiddleware makes it 0: this attempt does not count
            request.meta[TICKET] = replace(ticket, kept=kept, mode=Recovery.NONE)
            logger.info("broke off with %d bytes kept (%s): %s", kept, exception, request.url)
        self._let_go(request, ticket)
        return None

    async def _when_room(self, request: Request, ticket: Ticket, error: WriteFailed) -> Request | None:
        """Return the request again once there is room on the disk, ``None`` if none came (C21)."""
        try:
            found = await self._extension.found_room(error)
        except CrawlStopping:
            self._let_go(request, ticket)
            raise
        if not found:
            self._let_go(request, ticket)
            return None
        following = request.replace(dont_filter=True)
        following.meta[TICKET] = replace(ticket, mode=Recovery.NONE)
        return following

    async def _after_refused_body(self, request: Request, ticket: Ticket, reason: Reason) -> Request | None:
        """Return a plain GET after a body that was not what its head said (R64, R74).

        The first piece that does not match its Content-Digest is left to RetryMiddleware, which asks
        for it once more.
        """
        self._extension.decided(request, ticket, reason)
        if reason is Reason.UNDECODABLE:
            await self._extension.discard_parts(ticket)  # RetryMiddleware asks anew
        elif reason is Reason.SLICE_DIGEST_MISMATCH and not ticket.odd_pieces:
            request.meta[TICKET] = replace(ticket, odd_pieces=1, mode=Recovery.NONE)
        elif ticket.restarts < self._extension.settings.restarts:
            return await self._follow(request, ticket, reason, Recovery.REFETCH)
        self._let_go(request, ticket)
        return None

    async def _go_on(self, request: Request, ticket: Ticket, lost: LeaseLost) -> Request | Response:
        """Return the request under a new lease, or another worker's result as an answer to it."""
        obstacle = "STREAMING_MAX_ATTEMPTS is spent"
        if ticket.reclaims < self._extension.settings.max_attempts:
            claim = await self._extension.claim_again(ticket)
            obstacle = type(claim).__name__.lower()
            if isinstance(claim, Granted):
                following = request.copy()
                following.dont_filter = True
                following.meta[TICKET] = replace(
                    ticket, lease=claim.lease, mode=Recovery.NONE, reclaims=ticket.reclaims + 1
                )
                logger.info("claimed again, going on: %s", request.url)
                return following
            if isinstance(claim, Done) and not _spiders_own(request):
                request.meta[TICKET] = replace(ticket, plan=None)  # no answer to judge: taken from the ledger
                answer = Response(request.url, status=200, request=request)
                stored = StreamedResponse.around(answer, Unchanged(claim.completion.known, Reason.STORED))
                self._readable(request, stored)
                return stored
        self._let_go(request, ticket)
        msg = f"{lost}; the job is not to be had again ({obstacle}): {request.url}"
        raise LeaseLost(msg) from lost


def _plannable(request: Request) -> bool:
    """Whether a request is a plain GET with no conditional field of the user's own (R73)."""
    ticket = ticket_of(request)
    theirs = [n for n in PLAN_FIELDS if n in request.headers and (ticket is None or n not in ticket.ours)]
    return request.method == "GET" and not request.body and not theirs


def _spiders_own(request: Request) -> bool:
    """Whether a spider asked for the part itself, in its callback."""
    return request.meta.get("streaming") is True and request.callback is not NO_CALLBACK


def _kept(plan: Plan) -> int:
    return plan.part.length if isinstance(plan, Resume | ConfirmWhole | PublishPart) else 0


def _came_from_here(response: Response) -> bool:
    """Whether a body came from the HTTP cache or stood in the URL itself, from no server."""
    return "cached" in response.flags or response.url.startswith("data:")


def _changed(answer: Answer, response: Response) -> bool:
    """Whether a middleware made something else of a response that was judged already (R76)."""
    same = isinstance(response, StreamedResponse) and response.outcome == answer.outcome
    return not isinstance(answer.outcome, PassOn) and not same


def _despite_change(answer: Answer) -> Outcome:
    """Return what follows a response that a middleware changed: what was refused stays refused.

    What was made of a bodiless "the part is whole" is made of nothing, so the body is asked for.
    """
    match answer.outcome:
        case Refuse():
            return answer.outcome
        case AlreadyWhole() if answer.part is None:
            return Refuse(Reason.TRANSFORMED, Recovery.REFETCH)
        case _:
            return PassOn()


def _has_part(response: Response) -> bool:
    return isinstance(response, StreamedResponse) and response.part is not None


def _end_unmarked(response: Response) -> bool:
    """Whether nothing but the closed connection marks the end of a buffered body (R33)."""
    doubts = [flag for flag in response.flags if flag in DOUBTFUL]
    return response.status == 200 and doubts == [UNMARKED]


def judge_buffered(ticket: Ticket, request: Request, response: Response) -> Outcome:
    """Judge an answer whose body Scrapy buffered; one that may not be whole is passed on."""
    if ticket.plan is None or any(flag in response.flags for flag in DOUBTFUL):
        return PassOn()
    fields = response_fields(response.headers.items())
    head = ResponseHead.from_fields(response.status, urldefrag(response.url)[0], fields, len(response.body))
    return resumed_or_refused(ticket, judge_response(ticket.plan, head, asked_by(request, ticket)))


def _prepare(storage: Storage, ticket: Ticket, asking: PlannedRequest) -> _Prepared:
    """Return the plan for a request and the verified part it builds on (blocks: in a thread).

    The longest part comes first; one that disagrees with its sidecar is thrown away (R3).
    """
    corrupt = 0
    for stored in storage.parts.find(ticket.key):
        if stored.name.fence > ticket.lease.fence:
            continue
        if ticket.mode is Recovery.PROBE and stored.state.prefix_sha256 != ticket.unmarked:
            continue  # not the body whose end is in question
        fresh = ticket.publishes(stored.written_at, time.time())
        plan = plan_request(stored.state, ticket.known, asking, ticket.mode, fresh=fresh)
        try:
            match plan:
                case PublishPart():
                    return _Prepared(plan, whole=storage.parts.finished(stored), corrupt=corrupt)
                case Resume() | ConfirmWhole():
                    writer = storage.parts.reopen(stored, ticket.lease.fence)
                    return _Prepared(plan, writer=writer, corrupt=corrupt)
                case _:
                    return _Prepared(plan, corrupt=corrupt)
        except PartCorrupt as error:
            logger.warning("%s", error)
            storage.parts.remove(stored.name)
            corrupt += 1
    return _Prepared(plan_request(None, ticket.known, asking, ticket.mode), corrupt=corrupt)
