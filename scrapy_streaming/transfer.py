"""One request of ours between head and last byte: judged, received, turned into a response.

What may live here: what a download handler does with an answer, whatever library brings it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from urllib.parse import urldefrag

from scrapy import Request, signals
from scrapy.crawler import Crawler
from scrapy.exceptions import DownloadCancelledError, ResponseDataLossError, StopDownload
from scrapy.http import Response
from scrapy.utils.httpobj import urlparse_cached
from twisted.python.failure import Failure

from scrapy_streaming.exceptions import (
    AnswerRefused,
    DecodedTooLarge,
    PartCorrupt,
    StreamingError,
    Undecodable,
)
from scrapy_streaming.exchange import TICKET, Ticket, asked_by, resumed_or_refused
from scrapy_streaming.extension import StreamingExtension
from scrapy_streaming.protocol.answers import Append, Outcome, PassOn, Replace, ResponseHead
from scrapy_streaming.protocol.judging import end_is_open, judge_response, met_another
from scrapy_streaming.protocol.planning import Fetch
from scrapy_streaming.receiver import BodyRefused, Flow, Receiver, Task, too_large
from scrapy_streaming.response import StreamedResponse
from scrapy_streaming.storage.finished import FinishedPart, promised_of, small_part
from scrapy_streaming.storage.parts import PartWriter


class Transfer:
    """Takes the head, then the body, then gives the response. ``judged`` says that a head came."""

    def __init__(
        self, crawler: Crawler, extension: StreamingExtension, request: Request, ticket: Ticket
    ) -> None:
        self.judged = False
        self.receiver: Receiver | None = None
        self._crawler = crawler
        self._extension = extension
        self._request = request
        self._ticket = ticket
        self._outcome: Outcome = PassOn()
        self._broken: StreamingError | None = None

    def judge(self, status: int, fields: Mapping[str, Sequence[str]], length: int | None) -> Outcome:
        """Return what the head of an answer means; *length* is its Content-Length in bytes."""
        self.judged = True
        head = ResponseHead.from_fields(status, urldefrag(self._request.url)[0], fields, length)
        if self._ticket.plan is not None:
            outcome = judge_response(self._ticket.plan, head, asked_by(self._request, self._ticket))
            self._outcome = resumed_or_refused(self._ticket, outcome)
            self._note()
        if not isinstance(self._outcome, PassOn):
            self._extension.decided(self._request, self._ticket, self._outcome.reason, status=status)
        return self._outcome

    def _note(self) -> None:
        """Note in the request at once what a head tells later ones: the body may break off."""
        if self._ticket.unmarked is not None and not end_is_open(self._outcome):
            self._ticket = replace(self._ticket, unmarked=None)
            self._request.meta[TICKET] = self._ticket
        if self._ticket.plan is not None and met_another(self._ticket.plan, self._outcome):
            self._request.meta[TICKET] = replace(self._ticket, changes=self._ticket.changes + 1)

    def receive(self, flow: Flow) -> Receiver | None:
        """Return what takes the body, ``None`` if nobody wants it."""
        outcome, ticket = self._outcome, self._ticket
        if not isinstance(outcome, Append | Replace) or self._broken is not None:
            return None
        key, fence = ticket.key, ticket.lease.fence
        task = Task(
            url=self._request.url,
            outcome=outcome,
            open_part=lambda: self._open_part(outcome),
            settle=lambda: self._extension.storage.parts.keep_longest(key, fence),
            valid=lambda: self._extension.leases.valid(ticket.lease),
            assure=lambda: self._extension.assure(ticket.lease),
            expected=ticket.expected is not None or promised_of(outcome.state) is not None,
            unmarked=ticket.unmarked,
            max_size=ticket.max_size,
            wait=partial(self._extension.rates.wait, urlparse_cached(self._request).hostname or ""),
        )
        self.receiver = Receiver(task, flow, self._extension.settings, self._extension.budget)
        if ticket.max_size and task.due is not None and task.due > ticket.max_size:
            self.receiver.break_off(DownloadCancelledError(too_large(self._request.url, ticket.max_size)))
        elif no_room := self._extension.space.refusal(
            self._request.url, self.receiver.left, self._extension.bodies
        ):
            self.receiver.break_off(no_room)
        self._extension.bodies.add(self.receiver)
        return self.receiver

    def _open_part(self, outcome: Append | Replace) -> PartWriter:
        """Return the verified part that waits for this body, or a new one (thread)."""
        parts, key = self._extension.storage.parts, self._ticket.key
        writer = self._extension.writers.pop(key, None)
        if isinstance(outcome, Replace):
            if writer is not None:
                writer.close()
            return parts.create(key, self._ticket.lease.fence, outcome.state)
        if writer is None or writer.length != outcome.state.length:
            msg = f"the part to append to is not there any more: {self._request.url}"
            raise PartCorrupt(msg)
        writer.describe(outcome.state)
        writer.limit = outcome.until
        writer.provisional = outcome.provisional
        return writer

    def data_received(self, data: bytes) -> None:
        """Tell the ``bytes_received`` handlers, then take the bytes."""
        results = self._crawler.signals.send_catch_log(
            signal=signals.bytes_received, request=self._request, spider=self._crawler.spider, data=data
        )
        if self.receiver is None:
            return
        self.receiver.write(data)
        for _, result in results:
            if isinstance(result, Failure) and isinstance(result.value, StopDownload):
                self.receiver.break_off(result.value)

    def break_off(self, error: StreamingError) -> bool:
        """Stop receiving; return whether a body had begun, so that ``result`` raises *error*."""
        self._broken = error
        if self.receiver is not None:
            self.receiver.break_off(error)
        return self.receiver is not None

    async def _decoded(self, part: FinishedPart) -> FinishedPart:
        """Return the part without the codings that nobody asked for, before any middleware sees it (R34)."""
        try:
            return await self._extension.decode(part, self._ticket)
        except Undecodable as error:
            raise BodyRefused(f"{error}: {self._request.url}", reason=error.reason) from error
        except DecodedTooLarge as error:
            raise AnswerRefused(str(error), reason=error.reason) from error

    async def result(self, response: Response) -> Response:
        """Return *response*, which has the head, together with the received part.

        Raises what ``Receiver.finished`` raises, ``StopDownload`` as Scrapy's handlers do, and
        ``ResponseDataLossError`` for a body that came past us, unless a plain GET asked for it.
        """
        if not self.judged and not isinstance(self._ticket.plan, Fetch):
            msg = f"the answer to a range or conditional request was buffered: {self._request.url}"
            raise ResponseDataLossError(msg)
        if isinstance(self._outcome, PassOn) or "download_stopped" in response.flags:
            return response
        if not isinstance(self._outcome, Append | Replace):
            return StreamedResponse.around(response, self._outcome)
        if self.receiver is None and self._broken is not None:
            raise self._broken
        if self.receiver is None:  # a body of no bytes is never delivered
            return await StreamedResponse.received(
                response, self._outcome, small_part(self._outcome.state, b"")
            )
        try:
            part = await self._decoded(await self.receiver.finished())
        except StopDownload as stop:
            response.flags.append("download_stopped")
            if stop.fail:
                stop.response = response
                raise
            return response
        finally:
            self._extension.bodies.discard(self.receiver)
            self._extension.count("bytes_received", self.receiver.received)
            self._extension.count("io_operations", self.receiver.operations)
        kept = self._outcome.state.length if isinstance(self._outcome, Append) else 0
        return await StreamedResponse.received(response, self._outcome, part, resumed_from=kept)
