"""The downloader middleware: plans every request of ours, acts on refused answers.

It stands at 595, behind HttpCompression (590) on the way out, so that its fields are the last
word, and before it on the way back, so that no decoder sees a streamed body.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self
from urllib.parse import urldefrag

from scrapy import Request
from scrapy.crawler import Crawler
from scrapy.exceptions import NotConfigured
from scrapy.http import Response
from scrapy.http.request import NO_CALLBACK
from scrapy.utils.httpobj import urlparse_cached
from scrapy.utils.misc import load_object

from scrapy_streaming.exceptions import AddressRefused, AnswerRefused, EndUnmarked, LeaseLost, PartCorrupt
from scrapy_streaming.exchange import TICKET, Ticket, request_fields, response_fields, ticket_of
from scrapy_streaming.extension import CrawlStopping, StreamingExtension, expected_of, known_of, promised
from scrapy_streaming.protocol.addresses import is_public
from scrapy_streaming.protocol.jobs import Done, Granted
from scrapy_streaming.protocol.resume import (
    ALWAYS,
    PLAN_FIELDS,
    UNSTABLE_AFTER,
    AlreadyWhole,
    Append,
    Asking,
    ConfirmWhole,
    Fetch,
    Mode,
    Outcome,
    PassOn,
    Plan,
    PublishPart,
    Reason,
    Refuse,
    Replace,
    ResponseHead,
    Resume,
    Then,
    Unchanged,
    judge_response,
    plan_request,
)
from scrapy_streaming.response import StreamedResponse
from scrapy_streaming.storage import Storage
from scrapy_streaming.storage.blobs import Published
from scrapy_streaming.storage.finished import FinishedPart
from scrapy_streaming.storage.parts import PartWriter

logger = logging.getLogger(__name__)

#: What follows a refused answer → how the next request is planned.
_NEXT_MODE: Mapping[Then, Mode] = {
    Then.REFETCH: Mode.BARE,
    Then.DISCARD: Mode.BARE,
    Then.REFETCH_NO_CACHE: Mode.NO_CACHE,
    Then.CONFIRM: Mode.CONFIRM,
    Then.WITHOUT_RANGE: Mode.WITHOUT_RANGE,
    Then.ORIGINAL: Mode.NORMAL,
}

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

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Self:
        """Return the middleware; raise ``NotConfigured`` when the extension is off."""
        extension = crawler.get_extension(StreamingExtension)
        if extension is None:
            reason = "scrapy_streaming.extension.StreamingExtension is off"
            raise NotConfigured(reason)
        return cls(crawler, extension)

    # -- on the way out --------------------------------------------------------------------

    async def process_request(self, request: Request) -> Request | Response | None:
        """Plan a request of ours anew, whatever an earlier pass left in it."""
        ticket = ticket_of(request)
        if ticket is None and request.meta.get("streaming") is True and _plannable(request):
            ticket = await self._claim_for_spider(request)
        if ticket is None:
            return None
        self._extension.check(ticket)
        await self._extension.close_writer(ticket.key)
        for name in ticket.ours:
            request.headers.pop(name, None)
        ticket = replace(ticket, ours=(), plan=None)
        request.meta[TICKET] = ticket
        answer = await self._plan(request, ticket) if _plannable(request) else None
        if answer is None:
            self._extension.check(ticket)  # behind the hashing of a long part
        return answer

    async def _plan(self, request: Request, ticket: Ticket) -> Response | None:
        streams = self._handler_streams(request)
        asking = Asking(urldefrag(request.url)[0], request_fields(request))
        if ticket.mode is Mode.NORMAL and ticket.changes >= UNSTABLE_AFTER:
            ticket = replace(ticket, mode=Mode.SINGLE_SHOT)
        mode = ticket.mode
        if not self._extension.settings.resume_enabled and mode is Mode.NORMAL:
            prepared = _Prepared(Fetch(Reason.RESUME_OFF))
        elif streams:
            prepared = await self._extension.run(_prepare, self._extension.storage, ticket, asking)
        else:
            prepared = _Prepared(plan_request(None, ticket.known, asking, mode))
        if prepared.corrupt:
            self._extension.count(f"decision/{Reason.CORRUPT_PART}", prepared.corrupt)
        plan = prepared.plan
        self._extension.decided(request, ticket, plan.reason, kept=_kept(plan))
        if prepared.writer is not None:
            self._extension.writers[ticket.key] = prepared.writer
        fields = {**ALWAYS, **plan.fields()}
        first = ticket.first or request.url
        for name, value in fields.items():
            request.headers[name] = value
        request.meta["dont_cache"] = True
        request.meta[TICKET] = replace(
            ticket,
            plan=plan,
            mode=Mode.NORMAL if mode is Mode.CONFIRM else mode,  # asked once, never again by a retry
            ours=tuple(fields),
            kept=max(ticket.kept, _kept(plan)),
            streams=streams,
            first=first,
            asked=request.url,
            stale=ticket.asked == request.url != first,
            max_size=request.meta.get("download_maxsize", self._extension.settings.max_size),
        )
        if not streams or prepared.whole is not None:  # else the handler says so, when it is its turn
            self._extension.begin_work(ticket)
        if prepared.whole is not None:
            return self._whole_already(request, prepared.whole)
        return None

    def _whole_already(self, request: Request, part: FinishedPart) -> Response:
        """Answer a request whose part is whole already, with no network (R7)."""
        response = Response(part.state.url, status=200, request=request)
        return StreamedResponse.around(response, AlreadyWhole(part.state), part, resumed_from=part.length)

    def _handler_streams(self, request: Request) -> bool:
        """Whether the scheme's download handler takes bodies itself."""
        scheme = urlparse_cached(request).scheme
        if scheme not in self._streams:
            path = self._crawler.settings.getwithbase("DOWNLOAD_HANDLERS").get(scheme)
            can_stream = getattr(load_object(path), "can_stream", None) if path else None
            self._streams[scheme] = (
                self._extension.settings.io_enabled
                and can_stream is not None
                and can_stream(self._crawler.settings, scheme)
            )
        return self._streams[scheme] and scheme not in self._extension.untapped

    async def _claim_for_spider(self, request: Request) -> Ticket | None:
        """Return the ticket for a spider's own ``meta={"streaming": True}`` request."""
        key, job = self._extension.job(request)
        claim = await self._extension.claim(key, job, force=True)
        if isinstance(claim, Granted):
            return Ticket(key, job, claim.lease, expected=expected_of(request))
        logger.warning(
            "not streamed, the job is not to be had (%s): %s", type(claim).__name__.lower(), request
        )
        return None

    # -- on the way back -------------------------------------------------------------------

    async def process_response(self, request: Request, response: Response) -> Request | Response:
        """Act on what the answer was judged to be."""
        ticket = ticket_of(request)
        if ticket is None or ticket.plan is None:
            return response
        if not ticket.streams and response.body and not self._allowed(response):
            self._let_go(request, ticket)
            raise AddressRefused(str(response.ip_address), request.url)
        if isinstance(response, StreamedResponse):
            outcome = response.outcome
        else:
            outcome = _judge(ticket, request, response)
            if not isinstance(outcome, PassOn):
                self._extension.decided(request, ticket, outcome.reason, status=response.status)
        match outcome:
            case Refuse(reason, then):
                return await self._follow(request, ticket, reason, then)
            case Unchanged():
                return await self._unchanged(request, response, ticket, outcome)
            case AlreadyWhole() if not _has_part(response):
                return await self._confirmed(request, response, ticket)
            case PassOn() if ticket.mode is Mode.WITHOUT_RANGE:  # an error without Range too: not its fault
                ticket = replace(ticket, mode=Mode.NORMAL)
                request.meta[TICKET] = ticket
                return await self._received(request, response, ticket)
            case _:
                return await self._received(request, response, ticket)

    def _allowed(self, response: Response) -> bool:
        """Whether a body that Scrapy buffered may be used: our handler looks before it asks (E3)."""
        return self._extension.settings.allow_private_addresses or is_public(str(response.ip_address))

    async def _follow(self, request: Request, ticket: Ticket, reason: Reason, then: Then) -> Request:
        """Return the request that follows a refused answer, within the restart budget."""
        if then is Then.FAIL or ticket.restarts >= self._extension.settings.restarts:
            why = "no other request would help" if then is Then.FAIL else "STREAMING_RESTARTS is spent"
            msg = f"the answer was refused ({reason}) and {why}: {request.url}"
            self._let_go(request, ticket)
            raise AnswerRefused(msg, reason=reason)
        if then is Then.DISCARD:
            await self._extension.discard_parts(ticket)
        following = request.replace(dont_filter=True)
        if then is Then.ORIGINAL:
            following = following.replace(url=ticket.first)
            for name in _REDIRECTED:
                following.meta.pop(name, None)
        following.meta[TICKET] = replace(ticket, mode=_NEXT_MODE[then], restarts=ticket.restarts + 1, kept=0)
        logger.info("refused (%s), asking again (%s): %s", reason, then, request.url)
        return following

    async def _unchanged(
        self, request: Request, response: Response, ticket: Ticket, outcome: Unchanged
    ) -> Request | Response:
        """Hand on a 304 if the blob it speaks of is really there, its bytes untouched (R43, R44, R77)."""
        if await self._extension.stored(outcome.known) is None:
            self._extension.decided(request, ticket, Reason.BLOB_MISSING)
            return await self._follow(request, ticket, Reason.BLOB_MISSING, Then.REFETCH_NO_CACHE)
        self._extension.count("bytes_saved", outcome.known.size)
        if isinstance(response, StreamedResponse):
            return response
        return StreamedResponse.around(response, outcome)

    async def _confirmed(self, request: Request, response: Response, ticket: Ticket) -> Request | Response:
        """Take up the part that a 304 confirmed to be whole (R49, R50)."""
        writer = self._extension.writers.pop(ticket.key, None)
        if writer is None:
            return await self._follow(request, ticket, Reason.CORRUPT_PART, Then.REFETCH)
        part = await self._extension.run(writer.finish)
        return await self._received(
            request,
            StreamedResponse.around(response, AlreadyWhole(part.state), part, resumed_from=part.length),
            ticket,
        )

    async def _received(self, request: Request, response: Response, ticket: Ticket) -> Request | Response:
        """Hand on a body that is there; one with wrong bytes is fetched again once (R63)."""
        if not isinstance(response, StreamedResponse) or response.part is None:
            self._let_go(request, ticket)
            return response
        part = response.part
        wrong = any(digest != part.digest for digest in promised(part.state, ticket.expected))
        if wrong and response.resumed_from and ticket.restarts < self._extension.settings.restarts:
            await self._extension.run(self._extension.storage.blobs.quarantine, part)
            self._extension.decided(request, ticket, Reason.DIGEST_MISMATCH)
            return await self._follow(request, ticket, Reason.DIGEST_MISMATCH, Then.DISCARD)
        self._extension.count("bytes_kept", response.resumed_from)
        if request.meta.get("streaming") is True:
            response.publisher = self._publisher(ticket)
        if _spiders_own(request):
            del request.meta[TICKET]
            self._extension.lend(ticket)
        return response

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
                published = await self._extension.publish(response.part, ticket.expected)
                known = replace(known_of(response.part), stamp=published.stamp)
                await self._extension.complete(ticket.lease, known, response.resumed_from, part=response.part)
                await self._extension.discard_parts(ticket, known)
                done.append(published)
            return done[0]

        return publish

    async def process_exception(self, request: Request, exception: Exception) -> Request | Response | None:
        """Do not let RetryMiddleware count an attempt that left more bytes than it found.

        A download whose lease was lost goes on under a new one, or gets what another worker has
        stored meanwhile. A body whose end nothing marks is fetched once more: the same bytes again are
        taken for the whole (R33). Raises ``LeaseLost`` if it can do neither.
        """
        ticket = ticket_of(request)
        if ticket is None:
            return None
        await self._extension.close_writer(ticket.key)
        stored = await self._extension.run(self._extension.storage.parts.find, ticket.key)
        kept = stored[0].state.length if stored else 0
        if isinstance(exception, CrawlStopping):
            self._extension.left_kept += kept
        elif isinstance(exception, LeaseLost):
            return await self._go_on(request, ticket, exception)
        elif isinstance(exception, EndUnmarked) and ticket.restarts < self._extension.settings.restarts:
            self._extension.decided(request, ticket, Reason.CLOSE_DELIMITED)
            ticket = replace(ticket, unmarked=exception.sha256)
            return await self._follow(request, ticket, Reason.CLOSE_DELIMITED, Then.REFETCH)
        elif kept > ticket.kept:
            request.meta["retry_times"] = -1  # RetryMiddleware makes it 0: this attempt does not count
            request.meta[TICKET] = replace(ticket, kept=kept, mode=Mode.NORMAL)
            logger.info("broke off with %d bytes kept (%s): %s", kept, exception, request.url)
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
                    ticket, lease=claim.lease, mode=Mode.NORMAL, reclaims=ticket.reclaims + 1
                )
                logger.info("claimed again, going on: %s", request.url)
                return following
            if isinstance(claim, Done) and not _spiders_own(request):
                request.meta[TICKET] = replace(ticket, plan=None)  # no answer to judge: taken from the ledger
                answer = Response(request.url, status=200, request=request)
                return StreamedResponse.around(answer, Unchanged(claim.completion.known, Reason.STORED))
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


def _has_part(response: Response) -> bool:
    return isinstance(response, StreamedResponse) and response.part is not None


def _judge(ticket: Ticket, request: Request, response: Response) -> Outcome:
    """Judge an answer whose body Scrapy buffered."""
    if ticket.plan is None:
        return PassOn()
    fields = response_fields(response.headers.items())
    head = ResponseHead.from_fields(response.status, urldefrag(response.url)[0], fields, None)
    outcome = judge_response(ticket.plan, head, request_fields(request), stale=ticket.stale)
    return PassOn() if isinstance(outcome, Append | Replace) else outcome


def _prepare(storage: Storage, ticket: Ticket, asking: Asking) -> _Prepared:
    """Return the plan for a request and the verified part it builds on (blocks: in a thread).

    The longest part comes first; one that disagrees with its sidecar is thrown away (R3).
    """
    corrupt = 0
    for stored in storage.parts.find(ticket.key):
        if stored.name.fence > ticket.lease.fence:
            continue
        plan = plan_request(stored.state, ticket.known, asking, ticket.mode)
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
