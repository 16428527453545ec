"""The port of the download handlers: one answer, from its head to its last byte.

What may live here: what any handler needs, whatever its library. A handler translates its library's answer
into ``judge(head)``, ``begin``, ``write(bytes)`` and ``finish(end)``, and gives its response to ``result``.
This module and those below it decide and store; no handler sees a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from urllib.parse import urldefrag

from scrapy import Request, signals
from scrapy.exceptions import DownloadCancelledError, ResponseDataLossError, StopDownload
from scrapy.http import Response
from scrapy.utils.httpobj import urlparse_cached
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from scrapy_streaming.context import DownloadContext
from scrapy_streaming.exceptions import AnswerRefused, DecodedTooLarge, StreamingError, Undecodable
from scrapy_streaming.protocol.answers import Append, Outcome, PassOn, Replace, ResponseHead
from scrapy_streaming.protocol.judging import end_is_open, judge_response, met_another
from scrapy_streaming.protocol.parts import BodyEnd
from scrapy_streaming.protocol.planning import Fetch
from scrapy_streaming.response import StreamedResponse
from scrapy_streaming.runtime.body_writer import BodyRefused, BodyWriter, Task, too_large
from scrapy_streaming.runtime.crawl import Runtime
from scrapy_streaming.storage.complete_part import CompletePart, promised_of, small_part


class Download:
    """One request of a streamed file at a download handler.

    ``judged``: a head came. Where ``begin`` returns true the handler gives the body to ``write``. The
    library keeps the body of an answer that ``judge`` passes on; any other is not read.
    """

    def __init__(self, runtime: Runtime, request: Request, context: DownloadContext) -> None:
        self.judged = False
        self._runtime = runtime
        self._request = request
        self._context = context
        self._lease = context.lease  # a later claim has another, under which this body is not written
        self._outcome: Outcome = PassOn()
        self._body: BodyWriter | None = None
        self._error: StreamingError | None = None

    def judge(self, status: int, fields: Mapping[str, Sequence[str]], length: int | None) -> Outcome:
        """Return what the head of an answer means; *length* is its Content-Length in bytes.

        With ``PassOn`` the body is the library's; else it is ``begin``'s.
        """
        self.judged = True
        head = ResponseHead.from_fields(status, urldefrag(self._request.url)[0], fields, length)
        plan = self._context.plan
        if plan is not None:
            outcome = judge_response(plan, head, self._context.judged_by(self._request))
            self._outcome = self._context.allowed(outcome)
            self._note_head()
        if not isinstance(self._outcome, PassOn):
            self._runtime.stats.decision(self._outcome.reason, self._request.url, self._lease, status=status)
        return self._outcome

    def _note_head(self) -> None:
        """Note at once what a head means for later requests: the body may break off."""
        attempt, plan = self._context.attempt, self._context.plan
        if not end_is_open(self._outcome):
            attempt = attempt.end_marked()
        if plan is not None and met_another(plan, self._outcome):
            attempt = attempt.met_another()
        self._context.attempt = attempt

    def begin(self, abort: Callable[[], object]) -> bool:
        """Return whether the body is wanted; *abort* closes its source at once, whenever that is called."""
        outcome, context = self._outcome, self._context
        if not isinstance(outcome, Append | Replace) or self._error is not None:
            return False
        runtime, lease, url = self._runtime, self._lease, self._request.url
        task = Task(
            url=url,
            outcome=outcome,
            open_part=lambda: runtime.parts.open_for(context, outcome, lease.fence),
            after_failure=lambda: runtime.storage.parts.keep_longest(context.key, lease.fence),
            is_valid=lambda: runtime.jobs.leases.is_valid(lease),
            ensure_lease=lambda: runtime.jobs.renewals.ensure(lease),
            expected=context.expected is not None or promised_of(outcome.state) is not None,
            unmarked=context.attempt.unmarked,
            max_size=0 if context.sent is None else context.sent.max_size,
            wait=partial(runtime.rates.wait, urlparse_cached(self._request).hostname or ""),
        )
        self._body = BodyWriter(task, abort, runtime.settings, runtime.budget)
        if task.max_size and task.due is not None and task.due > task.max_size:
            self._body.break_off(DownloadCancelledError(too_large(url, task.max_size)))
        elif no_room := runtime.room.refusal(url, self._body.left):
            self._body.break_off(no_room)
        runtime.bodies.add(self._body)
        return True

    def write(self, data: bytes) -> Deferred[None] | None:
        """Give bytes of the body to the ``bytes_received`` handlers and to the part.

        Returns ``None`` if more may be read at once, else what fires when the source may go on;
        ``BodyWriter.write`` has the details.
        """
        crawler = self._runtime.crawler
        results = crawler.signals.send_catch_log(
            signal=signals.bytes_received, request=self._request, spider=crawler.spider, data=data
        )
        if self._body is None:
            return None
        ready = self._body.write(data)
        for _, result in results:
            if isinstance(result, Failure) and isinstance(result.value, StopDownload):
                self._body.break_off(result.value)
        return ready

    def finish(self, end: BodyEnd) -> None:
        """Take note that no more bytes come, and how the source ended."""
        if self._body is not None:
            self._body.ended(end)

    def fail(self, error: StreamingError) -> bool:
        """Stop receiving; return whether a body had begun, so that ``result`` raises *error*."""
        self._error = error
        if self._body is not None:
            self._body.break_off(error)
        return self._body is not None

    async def result(self, response: Response) -> Response:
        """Return *response*, which has the head, together with the received part.

        Raises what ``BodyWriter.finished`` raises, ``StopDownload`` as Scrapy's handlers do, and
        ``ResponseDataLossError`` for a body that the library buffered, unless a plain GET asked for it.
        """
        if not self.judged and not isinstance(self._context.plan, Fetch):
            msg = f"the answer to a range or conditional request was buffered: {self._request.url}"
            raise ResponseDataLossError(msg)
        if isinstance(self._outcome, PassOn) or "download_stopped" in response.flags:
            return response
        if not isinstance(self._outcome, Append | Replace):
            return StreamedResponse.around(response, self._outcome)
        if self._body is None and self._error is not None:
            raise self._error
        if self._body is None:  # a body of no bytes is never delivered
            empty = small_part(self._outcome.state, b"")
            return await StreamedResponse.received(response, self._outcome, empty)
        try:
            part = await self._decoded(await self._body.finished())
        except StopDownload as stop:
            response.flags.append("download_stopped")
            if stop.fail:
                stop.response = response
                raise
            return response
        finally:
            self._runtime.bodies.discard(self._body)
            self._runtime.stats.count("bytes_received", self._body.received)
            self._runtime.stats.count("io_operations", self._body.operations)
        kept = self._outcome.state.length if isinstance(self._outcome, Append) else 0
        return await StreamedResponse.received(response, self._outcome, part, resumed_from=kept)

    async def _decoded(self, part: CompletePart) -> CompletePart:
        """Return the part without codings that were not asked for, before any middleware sees it (R34)."""
        try:
            return await self._runtime.parts.decoded(part, self._context)
        except Undecodable as error:
            raise BodyRefused(f"{error}: {self._request.url}", reason=error.reason) from error
        except DecodedTooLarge as error:
            raise AnswerRefused(str(error), reason=error.reason) from error
