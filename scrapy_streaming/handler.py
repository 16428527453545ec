"""The download handler: bodies of ours go to a receiver, everything else stays Scrapy's.

All reliance on private names of Scrapy and Twisted is in this module:

- Scrapy's HTTP/1.1 handler has its connection pool in ``_pool``; the pool is asked for each
  connection by ``getConnection(key, endpoint)``, in the task of the request it is for;
- a Twisted response has ``_transport``, and ``deliverBody`` takes a protocol.

The pool is put behind a proxy. For a request of ours the response's ``deliverBody`` is replaced:
Scrapy's own body reader is told of the connection (so certificate and address are its) and then
that the body has ended, so Scrapy's deadline is over once the head is there, and the body is ours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Self
from urllib.parse import urldefrag

from scrapy import Request, signals
from scrapy.crawler import Crawler
from scrapy.exceptions import DownloadCancelledError, NotConfigured, NotSupported, StopDownload
from scrapy.http import Response
from scrapy.settings import BaseSettings
from scrapy.utils.httpobj import urlparse_cached
from scrapy.utils.misc import build_from_crawler, load_object
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import UNKNOWN_LENGTH

from scrapy_streaming.exchange import Ticket, request_fields, ticket_of
from scrapy_streaming.extension import StreamingExtension
from scrapy_streaming.protocol.resume import (
    Append,
    BodyEnd,
    Outcome,
    PassOn,
    Replace,
    ResponseHead,
    judge_response,
)
from scrapy_streaming.receiver import Flow, Receiver, Task, too_large
from scrapy_streaming.response import StreamedResponse
from scrapy_streaming.storage.finished import small_part
from scrapy_streaming.storage.parts import PartWriter

logger = logging.getLogger(__name__)

_MISSING = object()
_SIZE_KEYS = ("download_maxsize", "download_warnsize")


class StreamingDownloadHandler:
    """Wraps the handler that Scrapy, or the user, has for a scheme."""

    lazy = True

    def __init__(self, crawler: Crawler) -> None:
        self._crawler = crawler
        self._extension = crawler.get_extension(StreamingExtension)
        self._inner: dict[str, Any] = {}

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Self:
        """Return the handler."""
        return cls(crawler)

    @staticmethod
    def can_stream(settings: BaseSettings, scheme: str) -> bool:
        """Whether bodies of *scheme* can be taken from the wrapped handler."""
        from scrapy.core.downloader.handlers.http11 import HTTP11DownloadHandler

        wrapped = load_object(_wrapped_path(settings, scheme))
        return isinstance(wrapped, type) and issubclass(wrapped, HTTP11DownloadHandler)

    async def download_request(self, request: Request) -> Response:
        """Return the response; one whose body was streamed is a ``StreamedResponse``."""
        inner = self._handler(urlparse_cached(request).scheme)
        ticket = ticket_of(request)
        tap = None
        if ticket is not None and ticket.streams and ticket.plan is not None and self._extension is not None:
            tap = _Tap(self._crawler, self._extension, request, ticket)
        token = _TAP.set(tap)
        try:
            response: Response = await inner.download_request(request)
        finally:
            _TAP.reset(token)
            if tap is not None:
                tap.restore_sizes()
        return response if tap is None else await tap.result(response)

    async def close(self) -> None:
        """Close the wrapped handlers."""
        for inner in self._inner.values():
            await inner.close()

    def _handler(self, scheme: str) -> Any:
        if scheme not in self._inner:
            path = _wrapped_path(self._crawler.settings, scheme)
            try:
                inner = build_from_crawler(load_object(path), self._crawler)
            except NotConfigured as error:
                msg = f"Unsupported URL scheme '{scheme}': {error}"
                raise NotSupported(msg) from error
            pool = getattr(inner, "_pool", None)
            if hasattr(pool, "getConnection"):
                inner._pool = _TappedPool(pool)
            elif self.can_stream(self._crawler.settings, scheme):
                msg = f"{type(inner).__name__} has no connection pool to tap: set STREAMING_IO_ENABLED=False"
                raise NotSupported(msg)
            self._inner[scheme] = inner
        return self._inner[scheme]


def _wrapped_path(settings: BaseSettings, scheme: str) -> Any:
    """Return the handler that the user, else Scrapy, has for *scheme*."""
    from scrapy.settings import default_settings

    kept: Mapping[str, Any] = settings.getdict("STREAMING_FALLBACK_DOWNLOAD_HANDLERS")
    return kept.get(scheme) or default_settings.DOWNLOAD_HANDLERS_BASE[scheme]


class _TappedPool:
    """Hands out connections; those for a request of ours tell its tap of the response."""

    def __init__(self, pool: Any) -> None:
        self._wrapped = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def getConnection(self, key: Any, endpoint: Any) -> Any:
        tap = _TAP.get()
        connection = self._wrapped.getConnection(key, endpoint)
        return connection if tap is None else connection.addCallback(_TappedConnection, tap)


class _TappedConnection:
    def __init__(self, connection: Any, tap: _Tap) -> None:
        self._wrapped = connection
        self._tap = tap

    def request(self, request: Any) -> Any:
        return self._wrapped.request(request).addCallback(self._tap.head_received, self._wrapped)


class _Tap:
    """One request on its way: judges the head, then gives the body to a receiver."""

    def __init__(
        self, crawler: Crawler, extension: StreamingExtension, request: Request, ticket: Ticket
    ) -> None:
        self.receiver: Receiver | None = None
        self.stopped: StopDownload | None = None
        self._crawler = crawler
        self._extension = extension
        self._request = request
        self._ticket = ticket
        self._outcome: Outcome = PassOn()
        self._connection: Any = None
        self._sizes: dict[str, Any] | None = None

    def head_received(self, response: Any, connection: Any) -> Any:
        """Judge a Twisted response before the first byte of its body is delivered."""
        fields = {
            name.decode("latin-1").lower(): [value.decode("latin-1") for value in values]
            for name, values in response.headers.getAllRawHeaders()
        }
        length = None if response.length is UNKNOWN_LENGTH else response.length
        head = ResponseHead.from_fields(response.code, urldefrag(self._request.url)[0], fields, length)
        if self._ticket.plan is not None:
            self._outcome = judge_response(self._ticket.plan, head, request_fields(self._request))
        if isinstance(self._outcome, PassOn):
            return response
        self._connection = connection
        self._lift_sizes()
        deliver = response.deliverBody
        response.deliverBody = lambda reader: self._deliver(deliver, reader)
        return response

    def _lift_sizes(self) -> None:
        """Scrapy's size limits are for bodies in memory; ours is enforced while streaming."""
        meta = self._request.meta
        self._sizes = {key: meta.get(key, _MISSING) for key in _SIZE_KEYS}
        meta.update(dict.fromkeys(_SIZE_KEYS, 0))

    def restore_sizes(self) -> None:
        """Put the request's own size limits back."""
        for key, value in (self._sizes or {}).items():
            if value is _MISSING:
                self._request.meta.pop(key, None)
            else:
                self._request.meta[key] = value
        self._sizes = None

    def _deliver(self, deliver: Any, reader: Any) -> None:
        body = _Body(self, reader)
        if isinstance(self._outcome, Append | Replace):
            self.receiver = self._receiver(self._outcome, body)
        self._connection.transport.bufferSize = 1 << 18
        deliver(body)
        if self.receiver is None:
            self.abort()

    def _receiver(self, outcome: Append | Replace, body: _Body) -> Receiver:
        extension, ticket = self._extension, self._ticket
        parts, key, fence = extension.storage.parts, ticket.key, ticket.lease.fence

        def open_part() -> PartWriter:
            writer = extension.writers.pop(key, None)
            if isinstance(outcome, Append) and writer is not None:
                writer.describe(outcome.state)
                writer.limit = outcome.until
                return writer
            if writer is not None:
                writer.close()
            return parts.create(key, fence, outcome.state)

        expected = ticket.expected is not None or outcome.state.repr_digest is not None
        task = Task(
            self._request.url, outcome, open_part, lambda: parts.keep_longest(key, fence), expected,
            ticket.max_size,
        )  # fmt: skip
        flow = Flow(body.pause, body.resume, self.abort)
        receiver = Receiver(task, flow, extension.settings, extension.budget)
        due = task.due
        if ticket.max_size and due is not None and due > ticket.max_size:
            receiver.break_off(DownloadCancelledError(too_large(self._request.url, ticket.max_size)))
        return receiver

    def abort(self) -> None:
        """Close the connection at once: what it would still bring is not wanted."""
        if self._connection is not None:
            self._connection.abort()

    def data_received(self, data: bytes) -> None:
        """Tell ``bytes_received`` handlers, then take the bytes."""
        results = self._crawler.signals.send_catch_log(
            signal=signals.bytes_received, request=self._request, spider=self._crawler.spider, data=data
        )
        if self.receiver is None:
            return
        self.receiver.write(data)
        for _, result in results:
            if isinstance(result, Failure) and isinstance(result.value, StopDownload):
                self.stopped = result.value
                self.receiver.break_off(result.value)

    async def result(self, response: Response) -> Response:
        """Return what Scrapy made of the head, together with the received part."""
        if isinstance(self._outcome, PassOn) or "download_stopped" in response.flags:
            return response
        if not isinstance(self._outcome, Append | Replace):
            return StreamedResponse.around(response, self._outcome)
        if self.receiver is None:  # Content-Length: 0 is never delivered
            return StreamedResponse.around(response, self._outcome, small_part(self._outcome.state, b""))
        try:
            part = await self.receiver.finished()
        except StopDownload as stop:
            response.flags.append("download_stopped")
            if stop.fail:
                stop.response = response
                raise
            return response
        finally:
            self._extension.count("bytes_received", self.receiver.received)
        kept = self._outcome.state.length if isinstance(self._outcome, Append) else 0
        return StreamedResponse.around(response, self._outcome, part, resumed_from=kept)


class _Body(Protocol):
    """The protocol Twisted delivers the body to."""

    def __init__(self, tap: _Tap, reader: Any) -> None:
        self._tap = tap
        self._reader = reader

    def makeConnection(self, transport: Any) -> None:
        self.transport = transport
        self._reader.makeConnection(transport)
        self._reader.connectionLost(Failure(ResponseDone("the body is streamed")))

    def pause(self) -> None:
        if self.transport is not None:
            self.transport.pauseProducing()

    def resume(self) -> None:
        if self.transport is not None:
            self.transport.resumeProducing()

    def dataReceived(self, data: bytes) -> None:
        self._tap.data_received(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._tap.receiver is None:
            return
        if reason.check(ResponseDone):
            self._tap.receiver.ended(BodyEnd.FRAMED)
        elif reason.check(PotentialDataLoss):
            self._tap.receiver.ended(BodyEnd.CLOSED)
        else:
            self._tap.receiver.ended(BodyEnd.LOST)


_TAP: ContextVar[_Tap | None] = ContextVar("scrapy_streaming_tap", default=None)
