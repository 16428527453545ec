"""What a crawl does for its store beside the downloads: leavings of earlier crawls, the ledger's epoch.

What may live here: when that is done and what is logged of it. The work itself is ``storage.maintenance``.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import Final

from scrapy.utils.asyncio import run_in_thread
from scrapy.utils.defer import deferred_from_coro, maybe_deferred_to_future
from twisted.internet.defer import Deferred

from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.results import SECONDS_A_DAY
from scrapy_streaming.runtime.ledger_calls import LedgerCalls
from scrapy_streaming.storage.maintenance import Reconciled, reconcile
from scrapy_streaming.storage.store import PUT_BACK, Storage

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: Seconds after which a copy that was taken of the ledger is recognized as an older one at the latest.
EPOCH_LASTS: Final = 600.0


class Upkeep:
    """Removes what earlier crawls left behind, once; raises the epoch at intervals.

    ``start`` is not called where no ledger records the jobs.
    """

    def __init__(self, storage: Storage, calls: LedgerCalls, history_days: float) -> None:
        self._storage = storage
        self._calls = calls
        self._history_seconds = history_days * SECONDS_A_DAY
        self._tidying: Deferred[None] | None = None
        self._stop = threading.Event()
        self._epoch_ends = time.monotonic() + EPOCH_LASTS
        self._put_back = PUT_BACK in storage.notes

    def start(self) -> None:
        """Begin, in a thread beside the crawl."""
        self._tidying = deferred_from_coro(self._tidy())

    def stop(self) -> None:
        """Have the thread stop at the next file."""
        self._stop.set()

    async def end(self) -> None:
        """Return when the thread has ended."""
        if self._tidying is not None:
            await maybe_deferred_to_future(self._tidying)

    def check_epoch(self) -> None:
        """Raise the epoch if it is time."""
        if self._tidying is not None and time.monotonic() >= self._epoch_ends:
            self._epoch_ends = time.monotonic() + EPOCH_LASTS
            deferred_from_coro(self._raise_epoch())

    async def _tidy(self) -> None:
        """Remove what earlier crawls left behind."""
        try:
            done = await run_in_thread(
                reconcile, self._storage, history_seconds=self._history_seconds, stop=self._stop
            )
        except (StreamingError, OSError) as error:
            if not self._calls.ends_use(error):
                logger.warning("what earlier crawls left behind could not be removed: %s", error)
            return
        if done.read is not None:
            logger.info(
                "the store has been read: %d blobs recorded that the ledger did not know, %d bad",
                done.read.adopted, len(done.read.bad),
            )  # fmt: skip
        if replace(done, read=None) != Reconciled():
            logger.info(
                "of earlier crawls: removed %d parts, %d temporary files, %d events; put back %d blobs",
                done.parts, done.temporary, done.events, done.restored,
            )  # fmt: skip

    async def _raise_epoch(self) -> None:
        """Set the ledger apart from copies of it; read the store if one was put back under this crawl."""
        try:
            standing = await run_in_thread(self._storage.raise_epoch)
        except StreamingError as error:
            if not self._calls.ends_use(error):
                logger.info("the ledger's epoch was not raised: %s", error)
            return
        if not standing.unread or self._tidying is None or not self._tidying.called:
            return
        if not self._put_back:
            self._put_back = True
            logger.warning("%s", PUT_BACK)
        self.start()
