"""Answers of the ledger on the event loop, and what follows when it cannot be used any more.

What may live here: waiting for an answer, and which errors end the use of the ledger. No verb of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from scrapy.utils.defer import maybe_deferred_to_future
from twisted.internet.defer import Deferred

from scrapy_streaming.exceptions import LeaseLost, LedgerError
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.runtime.event_loop import caller_from_threads
from scrapy_streaming.runtime.shutdown import CrawlStopping

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

T = TypeVar("T")

#: Reasons why a ledger that was open cannot be used for the rest of the crawl.
UNUSABLE: Final = frozenset({"ledger-corrupt", "ledger-missing", "ledger-foreign", "ledger-newer"})
#: Why a file is not stored whose job's record in the ledger is damaged; all others are.
DAMAGED_RECORD: Final = "ledger-row"


class LedgerCalls:
    """Waits for the ledger's answers; *on_unusable* is called with the first error that ends its use."""

    def __init__(self, on_unusable: Callable[[LedgerError], object]) -> None:
        self._on_unusable = on_unusable
        self._unusable = False
        self._waiting: set[Deferred[Any]] = set()

    async def result(self, future: Future[T]) -> T:
        """Return the ledger's answer; waiting for it holds no thread.

        Raises ``CrawlStopping`` if the ledger cannot be used any more, or does not answer while the
        crawl stops.
        """
        deferred: Deferred[T] = Deferred()
        call = caller_from_threads()

        def fire(done: Future[T]) -> None:
            if deferred.called:  # the wait was given up
                return
            error = done.exception()
            deferred.errback(error) if error is not None else deferred.callback(done.result())

        future.add_done_callback(lambda done: call(fire, done))
        self._waiting.add(deferred)
        try:
            return await maybe_deferred_to_future(deferred)
        except LedgerError as error:
            if self.ends_use(error):
                raise CrawlStopping from error
            raise
        finally:
            self._waiting.discard(deferred)

    def ends_use(self, error: BaseException) -> bool:
        """Whether *error* ends the use of the ledger; the first such error is reported."""
        if not isinstance(error, LedgerError) or error.reason not in UNUSABLE:
            return False
        if not self._unusable:
            self._unusable = True
            self._on_unusable(error)
        return True

    def give_up(self) -> None:
        """Wait no longer for a ledger that does not answer."""
        for deferred in list(self._waiting):
            if not deferred.called:
                deferred.errback(CrawlStopping())


def log_not_recorded(done: Future[Any]) -> None:
    """Log that the ledger did not record something that no caller waits for."""
    if not done.cancelled() and (error := done.exception()) is not None:
        reported = isinstance(error, LeaseLost) or getattr(error, "reason", None) in UNUSABLE
        level = logging.DEBUG if reported else logging.INFO
        logger.log(level, "the ledger did not record what became of a job: %s", error)
