"""The thread that renews leases: a busy event loop loses none.

What may live here: when the ledger is asked. What follows its answer is the caller's. Knows no event loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.protocol.jobs import Lease
from scrapy_streaming.runtime.lease_table import LeaseTable

#: Asks the ledger to renew this worker's leases; gives the claim ids of those that were. What it is given is
#: called when the ledger begins.
Renew = Callable[[Callable[[], object]], "Future[frozenset[str]]"]
Report = Callable[[list[Lease], StreamingError | None], object]


class Heartbeat:
    """Renews all leases every quarter of their time, from a thread: a busy event loop loses none.

    *report* is called in the thread after each renewal with the leases that were lost, and the error
    if it failed.
    """

    def __init__(self, leases: LeaseTable, seconds: float, renew: Renew, report: Report) -> None:
        self._leases = leases
        self._pause = seconds / 4
        self._renew = renew
        self._report = report
        self._asked_at: float | None = None
        self._wanted = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._main, name="ss-heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self) -> None:
        """Renew no more; closing the ledger ends a renewal that waits for its answer."""
        self._ended = True
        self._wanted.set()

    @property
    def overdue(self) -> bool:
        """Whether the ledger has not answered for as long as there is between two renewals."""
        asked_at = self._asked_at
        return asked_at is not None and time.monotonic() - asked_at > self._pause

    def renew_now(self) -> None:
        """Have the leases renewed without waiting for the quarter to be over."""
        self._wanted.set()

    def _main(self) -> None:
        while not self._ended:
            self._wanted.wait(self._pause)
            self._wanted.clear()
            if self._leases and not self._ended:
                self._renew_all()

    def _renew_all(self) -> None:
        snapshot, began_at, error = self._leases.snapshot(), [time.monotonic()], None
        lost: list[Lease] = []
        self._asked_at = began_at[0]
        try:
            renewed = self._renew(lambda: began_at.append(time.monotonic())).result()
            lost = self._leases.renew(snapshot, began_at[-1], renewed)
        except StreamingError as failed:
            error = failed
        self._asked_at = None
        if not self._ended:
            self._report(lost, error)
