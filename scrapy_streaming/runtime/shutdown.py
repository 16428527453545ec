"""What a stop by the user (Ctrl-C, SIGTERM) does to a crawl.

What may live here: noticing a stop and publishing it; each subscriber breaks off its own work. All
reliance on private names of Scrapy's engine is here: its ``scraper`` has a ``slot`` whose ``closing`` is
the deferred that a stop waits for; its own ``_slot`` closes once no request is in ``inprogress``, and
after that no file can be fetched any more; its ``downloader`` has ``slots``, each with a ``queue`` of
requests that wait for their turn and the deferreds of their answers. Where a name is missing a stop does
what Scrapy alone would do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterable
from typing import Any, Final, Protocol

from scrapy import Request
from scrapy.crawler import Crawler
from scrapy.exceptions import IgnoreRequest
from scrapy.settings import BaseSettings
from scrapy.utils.asyncio import call_later
from scrapy.utils.defer import deferred_from_coro
from scrapy.utils.misc import load_object
from scrapy.utils.reactor import is_reactor_installed
from twisted.internet.defer import Deferred

from scrapy_streaming.context import context_of
from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.runtime.bodies import Body
from scrapy_streaming.runtime.event_loop import sleep
from scrapy_streaming.runtime.items import ItemsInWork

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: Seconds that what is asked of the ledger, and the parts in flight, may take once the crawl stops.
STOP_GRACE: Final = 2.0
#: Seconds between two checks of the parts that a second Ctrl-C closes.
_CLOSING_PAUSE: Final = 0.05


class CrawlStopping(StreamingError, IgnoreRequest):
    """The user stops the crawl: the download goes on in the next one.

    Scrapy makes no error of an ``IgnoreRequest`` and does not try it again.
    """

    reason = "crawl-stopping"

    def __init__(self, message: str = "the crawl stops, the next one goes on with this") -> None:
        super().__init__(message)


class BreakOff(Protocol):
    """A subscriber of ``Shutdown``: breaks off the downloads or waits that it has."""

    def __call__(self, error: Callable[[], StreamingError]) -> int | None:
        """Break off what is in work, each with an *error* of its own; return the number of downloads."""


class Shutdown:
    """Notices that the user stops the crawl, and publishes it to its subscribers.

    *finishes*: what is in work is brought to its end, else it is left to the next crawl.
    *bodies* are those in flight, *buffering* the schemes whose bodies Scrapy buffers. ``kept_bytes``
    counts the bytes in the parts of downloads that the stop broke off. *at_once* is awaited when a
    second Ctrl-C ends the process.
    """

    def __init__(
        self,
        crawler: Crawler,
        items: ItemsInWork,
        *,
        finishes: bool,
        bodies: Iterable[Body],
        buffering: Collection[str],
        at_once: Callable[[], Coroutine[Any, Any, object]],
    ) -> None:
        self.kept_bytes = 0
        self.ended_at_once = False
        self._crawler = crawler
        self._items = items
        self._finishes = finishes
        self._bodies = bodies
        self._buffering = buffering
        self._at_once = at_once
        self._subscribers: list[BreakOff] = []
        self._at_stop: list[Callable[[], object]] = []
        self._give_up: list[Callable[[], object]] = []
        self._crawls = False
        self._stopped = self._broken_off = False
        self._left = 0
        self._undo: Callable[[], object] = lambda: None

    def subscribe(self, break_off: BreakOff) -> None:
        """Have *break_off* called when the crawl stops, and again while it does: new waits may begin."""
        self._subscribers.append(break_off)

    def at_stop(self, call: Callable[[], object]) -> None:
        """Have *call* called once when the user stops the crawl, whatever follows."""
        self._at_stop.append(call)

    def after_grace(self, call: Callable[[], object]) -> None:
        """Have *call* called ``STOP_GRACE`` seconds after the first break-off."""
        self._give_up.append(call)

    def start(self) -> None:
        """Take note that the crawl has begun."""
        self._crawls = self._crawler.crawling
        self._undo = before_end(self._end_at_once)

    def end(self) -> None:
        """Report what the stop left; the process may end now."""
        if not self.ended_at_once:
            self._undo()
        if self._left:
            logger.info(
                "stopped with %d downloads broken off, %d bytes of them kept: the next crawl goes on there",
                self._left, self.kept_bytes,
            )  # fmt: skip

    @property
    def by_user(self) -> bool:
        """Whether the user stops the crawl (Ctrl-C).

        A crawl that ends by itself or by ``CloseSpider`` is ``crawling`` up to its last download, and
        Scrapy's shell never is. Scrapy gives no other sign before it waits for every download.
        """
        return self._crawls and not self._crawler.crawling

    @property
    def stopping(self) -> bool:
        """Whether a stop by the user leaves to the next crawl what is in work."""
        return self.by_user and not self._finishes

    def refuse(self) -> None:
        """Raise ``CrawlStopping`` if what would begin now is left to the next crawl."""
        if self.stopping:
            raise CrawlStopping

    def finish_nothing(self) -> None:
        """Leave to the next crawl what is in work: it cannot be finished."""
        self._finishes = False

    def check(self) -> None:
        """Act on a stop by the user; called at short intervals."""
        if not self.by_user:
            return
        if not self._stopped:
            self._stopped = True
            _call_all(self._at_stop)
            self._log_stop()
        if not self._finishes:
            refuse_queued(self._crawler)
            self._break_off()

    def _log_stop(self) -> None:
        """Log what the stop finishes, or waits for."""
        if not self._finishes:
            if self._buffering:
                logger.info(
                    "the crawl stops: downloads in flight whose bodies Scrapy buffers (%s) are waited for",
                    ", ".join(sorted(self._buffering)),
                )
            return
        due = [body.left for body in self._bodies if not body.concluded]
        logger.info(
            "the crawl stops: finishing %d items and %d downloads in flight, %d bytes left%s, because the "
            "scheduler will not ask for their pages again (STREAMING_STOP); Ctrl-C once more keeps their "
            "parts and ends at once",
            self._items.count, len(due), sum(filter(None, due)), " at least" if None in due else "",
        )  # fmt: skip

    def _break_off(self) -> None:
        """Break off every download and every wait; the bytes that came are kept."""
        if not self._broken_off:
            self._broken_off = True
            call_later(STOP_GRACE, _call_all, self._give_up)
        for break_off in self._subscribers:
            self._left += break_off(CrawlStopping) or 0

    def _end_at_once(self) -> Deferred[None]:
        """Keep the parts of the downloads in flight: a second Ctrl-C ends the process."""
        self.ended_at_once = True
        self._finishes = False
        return deferred_from_coro(self._keep_parts())

    async def _keep_parts(self) -> None:
        bodies, items = [body for body in self._bodies if not body.concluded], self._items.count
        self._break_off()
        ends = time.monotonic() + STOP_GRACE
        while not all(body.concluded for body in bodies) and time.monotonic() < ends:
            await sleep(_CLOSING_PAUSE)
        await self._at_once()
        for body in bodies:
            logger.warning("left unfinished, %d bytes came: %s", body.received, body.url)
        if bodies or items:
            logger.warning(
                "ended at once with %d items in work; `scrapy streaming ls --state ready` names their files, "
                "`scrapy streaming resume` finishes them", items,
            )  # fmt: skip


def finishes(wanted: str, settings: BaseSettings) -> bool:
    """Return whether a stop brings what is in work to its end; else it is left to the next crawl.

    *wanted* is STREAMING_STOP. With ``auto`` the scheduler decides: one that keeps its
    requests for the next crawl (JOBDIR, or another class than Scrapy's own) will not ask again for a
    page that it gave out, so an item of that page that is dropped now is lost.
    """
    if wanted != "auto":
        return wanted == "finish"
    scheduler = load_object(settings["SCHEDULER"])
    return bool(settings.get("JOBDIR")) or scheduler.__module__.partition(".")[0] != "scrapy"


def before_end(call: Callable[[], object]) -> Callable[[], object]:
    """Have *call* called before the reactor stops, which waits for its deferred; return what undoes that.

    Without a reactor nothing is called: parts are kept up to their last checkpoint.
    """
    if not is_reactor_installed():
        return lambda: None
    from twisted.internet import reactor

    core: Any = reactor
    trigger = core.addSystemEventTrigger("before", "shutdown", call)
    return lambda: core.removeSystemEventTrigger(trigger)


def closes(crawler: Crawler) -> bool:
    """Return whether the engine is closing its slot, for whatever reason."""
    slot = getattr(crawler.engine, "_slot", None)
    return getattr(slot, "closing", None) is not None


def let_scraper_close(crawler: Crawler) -> bool:
    """Complete the scraper's stop if it has no item in work; return whether it has none.

    Scrapy does not check after an item of ``start()``: without this a stop waits for ever when the last
    item came from there (2.15 to 2.19).
    """
    slot = getattr(getattr(crawler.engine, "scraper", None), "slot", None)
    if slot is None or not slot.is_idle():
        return False
    closing = getattr(slot, "closing", None)
    if closing is not None and not closing.called:
        closing.callback(crawler.spider)
    return True


class OpenSlot:
    """Keeps the engine from closing its slot while items of ``start()`` are in work.

    Scrapy counts the items of a page as work of the page's request; these have none.
    """

    def __init__(self, crawler: Crawler) -> None:
        self._crawler = crawler
        self._work = Request("data:,items-of-start")
        self._slot: Any = None

    def keep(self) -> None:
        """Count the items as work, until ``end``."""
        slot: Any = getattr(self._crawler.engine, "_slot", None)
        if self._slot is None and hasattr(slot, "add_request"):
            slot.add_request(self._work)
            self._slot = slot

    def end(self) -> None:
        """Count them no more."""
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.remove_request(self._work)


def refuse_queued(crawler: Crawler) -> None:
    """Refuse the streamed requests that wait for their turn: with a download delay that takes long."""
    slots: dict[str, Any] = getattr(getattr(crawler.engine, "downloader", None), "slots", {})
    for slot in slots.values():
        for entry in list(slot.queue):
            request, answer = entry
            if context_of(request) is not None:
                slot.queue.remove(entry)
                answer.errback(CrawlStopping())


def _call_all(calls: Iterable[Callable[[], object]]) -> None:
    for call in calls:
        call()
