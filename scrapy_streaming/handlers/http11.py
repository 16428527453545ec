"""The download handler for http and https: streams the bodies of Scrapy's HTTP/1.1 handler.

What may live here: what Scrapy asks of a handler. Twisted's names are ``twisted_tap``'s. Requests that are
not streamed pass through untouched.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Self

from scrapy import Request
from scrapy.crawler import Crawler
from scrapy.exceptions import NotConfigured, NotSupported
from scrapy.http import Response
from scrapy.utils.defer import deferred_from_coro, maybe_deferred_to_future
from scrapy.utils.httpobj import urlparse_cached
from scrapy.utils.misc import build_from_crawler, load_object
from scrapy.utils.python import global_object_name

from scrapy_streaming import schemes
from scrapy_streaming.context import DownloadContext, context_of
from scrapy_streaming.download import Download
from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.extension import StreamingExtension
from scrapy_streaming.handlers.twisted_tap import HeadLimit, Tap, attached, wrap_pool
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.runtime.crawl import Runtime

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)


class StreamingDownloadHandler:
    """Wraps the handler that Scrapy, or the user, has for a scheme."""

    lazy = True

    def __init__(self, crawler: Crawler) -> None:
        self._crawler = crawler
        extension = crawler.get_extension(StreamingExtension)
        self._runtime = None if extension is None else extension.runtime
        self._inner: dict[str, Any] = {}
        self._unusable: dict[str, str] = {}  # why there is no handler for a scheme
        self._reported_unbounded = False

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Self:
        """Return the handler."""
        return cls(crawler)

    async def download_request(self, request: Request) -> Response:
        """Return the response; one whose body was streamed is a ``StreamedResponse``.

        Raises ``LeaseLost`` and ``CrawlStopping`` for a streamed request, whenever that comes.
        """
        scheme = urlparse_cached(request).scheme
        inner, runtime, context = self._handler(scheme), self._runtime, context_of(request)
        if runtime is None or context is None:
            response: Response = await inner.download_request(request)
            return response
        await runtime.jobs.check(context)
        runtime.jobs.begin_work(context.lease, unlike=runtime.requests.is_unlike(request, context))
        tap = None
        if context.streams:
            if scheme in runtime.buffering:
                runtime.stats.count("fallbacks_to_existing")
                _ask_plainly(request, context)
            else:
                download = Download(runtime, request, context)
                tap = Tap(download, request, guarded=not runtime.settings.allow_private_addresses)
        return await self._cancellable(inner, request, context, tap, runtime)

    async def _cancellable(
        self, inner: Any, request: Request, context: DownloadContext, tap: Tap | None, runtime: Runtime
    ) -> Response:
        """Return the response to a streamed request, or raise the error it is broken off with."""
        broken: list[StreamingError] = []
        with attached(tap, HeadLimit(request.url, broken.append, self._report_unbounded)):
            head = deferred_from_coro(inner.download_request(request))

        def break_off(error: StreamingError) -> None:
            broken.append(error)
            if tap is None or not tap.download.fail(error):
                head.cancel()

        with runtime.jobs.leases.cancellable(context.lease, break_off):
            try:
                response: Response = await maybe_deferred_to_future(head)
                if tap is None:
                    return response
                if not tap.download.judged:
                    runtime.stats.count("fallbacks_to_existing")
                    self._note_buffering(urlparse_cached(request).scheme, inner)
                return await tap.download.result(response)
            except (Exception, asyncio.CancelledError) as error:
                if broken and error is not broken[0]:
                    raise broken[0] from error
                raise
            finally:
                if tap is not None:
                    tap.restore_sizes()

    async def close(self) -> None:
        """Close the wrapped handlers."""
        for inner in self._inner.values():
            await inner.close()

    def _handler(self, scheme: str) -> Any:
        """Return the wrapped handler; raise ``NotSupported`` where Scrapy would."""
        if scheme not in self._inner and scheme not in self._unusable:
            self._build(scheme)
        if scheme in self._unusable:
            msg = f"Unsupported URL scheme '{scheme}': {self._unusable[scheme]}"
            raise NotSupported(msg)
        return self._inner[scheme]

    def _build(self, scheme: str) -> None:
        """Make the wrapped handler once; keep the reason, and log what Scrapy logs, if that fails."""
        path = schemes.wrapped(self._crawler.settings, scheme)
        try:
            inner = build_from_crawler(load_object(path), self._crawler)
        except NotConfigured as error:
            self._unusable[scheme] = str(error)
            return
        except Exception as error:  # a user's handler may raise anything
            self._unusable[scheme] = str(error)
            logger.exception('Loading "%s" for scheme "%s"', path, scheme)
            return
        if not wrap_pool(inner) and schemes.can_wrap(path):
            self._note_buffering(scheme, inner)
        self._inner[scheme] = inner

    def _report_unbounded(self, what: object) -> None:
        """Log once that the heads of answers have no bound."""
        if not self._reported_unbounded:
            self._reported_unbounded = True
            name = f"{type(what).__module__}.{type(what).__qualname__}"
            logger.warning("heads of answers are read without a bound: %s cannot be watched", name)

    def _note_buffering(self, scheme: str, inner: Any) -> None:
        """Note that bodies of *scheme* are buffered."""
        if self._runtime is not None:
            handler = schemes.SchemeHandler(scheme, global_object_name(type(inner)), schemes.UNKNOWN_NAMES)
            self._runtime.buffering.note(handler)


def _ask_plainly(request: Request, context: DownloadContext) -> None:
    """Turn a planned request into a plain GET whose body Scrapy buffers."""
    if context.sent is None:
        return
    for name in context.planned_fields:
        if name != "Accept-Encoding":
            request.headers.pop(name, None)
    context.sent = context.sent.plain()
