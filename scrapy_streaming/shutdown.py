"""What a stop by the user (Ctrl-C, SIGTERM) does to a crawl.

All reliance on private names of Scrapy's engine is here: its ``scraper`` has a ``slot`` whose
``closing`` is the deferred that a stop waits for; its own ``_slot`` closes once no request is in
``inprogress``, and after that no file can be fetched any more; its ``downloader`` has ``slots``, each
with a ``queue`` of requests that wait for their turn and the deferreds of their answers. Where a name
is missing a stop does what Scrapy alone would do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scrapy import Request
from scrapy.crawler import Crawler
from scrapy.exceptions import IgnoreRequest
from scrapy.settings import BaseSettings
from scrapy.utils.misc import load_object
from scrapy.utils.reactor import is_reactor_installed

from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.exchange import ticket_of


class CrawlStopping(StreamingError, IgnoreRequest):
    """The user stops the crawl: the download goes on in the next one.

    Scrapy makes no error of an ``IgnoreRequest`` and does not try it again.
    """

    reason = "crawl-stopping"

    def __init__(self, message: str = "the crawl stops, the next one goes on with this") -> None:
        super().__init__(message)


def finishes(wanted: str, settings: BaseSettings) -> bool:
    """Return whether a stop brings what is in work to its end; else it is left to the next crawl.

    *wanted* is STREAMING_STOP. With ``auto`` it is the scheduler that counts: one that keeps its
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
    """Have Scrapy see that no item is in work any more, if so: it does not look after one of ``start()``.

    Without this a stop waits for ever when the last item came from there (2.15 to 2.19). Returns
    whether none is.
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
    """Refuse requests of ours that wait for their turn: with a download delay that takes long."""
    slots: dict[str, Any] = getattr(getattr(crawler.engine, "downloader", None), "slots", {})
    for slot in slots.values():
        for entry in list(slot.queue):
            request, answer = entry
            if ticket_of(request) is not None:
                slot.queue.remove(entry)
                answer.errback(CrawlStopping())
