"""What follows the renewals of leases on the event loop: lost leases are reported, waiting writers go on.

What may live here: what a renewal means for downloads. When the ledger is asked is ``heartbeat``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from scrapy.utils.defer import maybe_deferred_to_future
from twisted.internet.defer import Deferred

from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.protocol.jobs import Lease
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.runtime.event_loop import caller_from_threads
from scrapy_streaming.runtime.heartbeat import Heartbeat, Renew
from scrapy_streaming.runtime.lease_table import LeaseTable, lease_lost
from scrapy_streaming.runtime.stats import Stats

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)


class Renewals:
    """What follows a renewal: lost leases break their downloads off, late ones let writers go on.

    ``start`` is not called for jobs that no ledger records: their leases have no end.
    """

    def __init__(self, leases: LeaseTable, seconds: float, stats: Stats) -> None:
        self._leases = leases
        self._seconds = seconds
        self._stats = stats
        self._heartbeat: Heartbeat | None = None
        self._waiting: list[Deferred[None]] = []
        self._failing = False

    def start(self, renew: Renew) -> None:
        """Renew the leases by the ledger's verb *renew* from now on."""
        call = caller_from_threads()
        self._heartbeat = Heartbeat(
            self._leases, self._seconds, renew, lambda lost, error: call(self._note_renewal, lost, error)
        )
        self._heartbeat.start()

    def end(self) -> None:
        """Renew no more."""
        if self._heartbeat is not None:
            self._heartbeat.end()

    async def ensure(self, lease: Lease) -> None:
        """Return when this worker may write under *lease*: at once, or when a late renewal found it.

        Raises ``LeaseLost`` if the job is another worker's by now, and what ``break_off`` is given.
        """
        while not self._leases.is_valid(lease):
            if self._heartbeat is None or not self._leases.has(lease):
                raise lease_lost(lease)
            renewed: Deferred[None] = Deferred()
            self._waiting.append(renewed)
            self._heartbeat.renew_now()
            await maybe_deferred_to_future(renewed)

    def report_lost(self, leases: Iterable[Lease]) -> None:
        """Count and log leases that were lost; break off the downloads under them."""
        for lease in leases:
            error = lease_lost(lease)
            self._stats.count("leases_lost")
            logger.warning("%s", error)
            cancel = self._leases.take_cancel(lease)
            if cancel is not None:
                cancel(error)

    def check(self) -> None:
        """Log once that the ledger is late with its answer."""
        if self._heartbeat is not None and self._heartbeat.overdue:
            self._report_failing("no answer yet")

    def break_off(self, error: Callable[[], StreamingError]) -> None:
        """End every wait for a renewal, each with an *error* of its own."""
        self._waiting, waiting = [], self._waiting
        for renewed in waiting:
            renewed.errback(error())

    def _note_renewal(self, lost: list[Lease], error: StreamingError | None) -> None:
        """Report leases that another worker has by now (ledger rule 8); let the waiting writers go on."""
        self._report_failing(error)
        if error is not None:
            return
        self.report_lost(lost)
        self._waiting, waiting = [], self._waiting
        for renewed in waiting:
            renewed.callback(None)

    def _report_failing(self, failure: object) -> None:
        """Log once that renewal fails, and once that it works again."""
        if failure is not None and not self._failing:
            logger.warning("lease renewal failed, retrying: %s", failure)
        elif failure is None and self._failing:
            logger.info("the ledger answers again, the leases are renewed")
        self._failing = failure is not None
