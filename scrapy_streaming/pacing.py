"""The spider middleware: reads ``start()`` as fast as its items are done, no faster.

What may live here: counting the items of ``start()`` and waiting for room among them. Scrapy takes what
``start()`` gives as fast as it comes: a list of 20,000 items is 20,000 items in memory, all in the item
pipelines at once. Requests are not held up; the scheduler keeps those.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any, Self

from scrapy import Request, signals
from scrapy.crawler import Crawler
from scrapy.utils.defer import maybe_deferred_to_future
from twisted.internet.defer import Deferred

from scrapy_streaming.extension import runtime_of
from scrapy_streaming.runtime.crawl import Runtime
from scrapy_streaming.runtime.shutdown import OpenSlot


class StartPacing:
    """Lets at most CONCURRENT_ITEMS items of ``start()`` be in the item pipelines at once.

    More, if the jobs that may be claimed at once are more.
    """

    def __init__(self, runtime: Runtime, limit: int) -> None:
        self._items = runtime.items
        self._slot = OpenSlot(runtime.crawler)
        self._limit = limit
        self._inside = 0
        self._room: Deferred[None] | None = None

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Self:
        """Return the middleware; raise ``NotConfigured`` when the extension is off."""
        runtime = runtime_of(crawler)
        middleware = cls(runtime, max(crawler.settings.getint("CONCURRENT_ITEMS"), runtime.turns.total))
        for signal in (signals.item_scraped, signals.item_dropped, signals.item_error):
            crawler.signals.connect(middleware.item_done, signal)
        crawler.signals.connect(middleware.none_inside, signals.spider_idle)
        runtime.items.subscribe(at_none=middleware.make_room, at_idle=middleware.none_inside)
        return middleware

    async def process_start(self, start: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Give what *start* gives; after an item the next one waits for room."""
        async for each in start:
            if not isinstance(each, Request):
                self._inside += 1
                self._slot.keep()
            yield each
            if self._inside >= self._limit and self._items.count:
                self._room = Deferred()
                await maybe_deferred_to_future(self._room)

    def process_start_requests(self, start: Iterable[Any], *_: Any) -> Iterable[Any]:
        """Return *start*: Scrapy 2.15 calls this where another middleware knows nothing newer."""
        return start

    def item_done(self, response: Any) -> None:
        """Make room: an item that came from no response came from ``start()``."""
        if response is None:
            self._leave(1)

    def none_inside(self) -> None:
        """Count none, unless some are in the files pipelines (Scrapy 2.15 is idle with them).

        Another middleware may have kept items that were counted here.
        """
        if not self._items.count:
            self._leave(self._inside)

    def _leave(self, items: int) -> None:
        self._inside = max(0, self._inside - items)
        if not self._inside:
            self._slot.end()
        self.make_room()

    def make_room(self) -> None:
        """Let the next item come if there is room, or if none has come as far as a files pipeline."""
        if self._room is not None and (self._inside < self._limit or not self._items.count):
            room, self._room = self._room, None
            room.callback(None)
