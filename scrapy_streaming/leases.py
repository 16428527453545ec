"""The leases of this worker, by its own clock (ledger rules 7 and 8).

What may live here: which leases there are, until when this worker may write under each, who is to
be told when one is lost, and the thread that renews them. ``valid`` may be asked from any thread.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.protocol.jobs import Lease

#: The share of a lease that is not used: for the way to the disk, and clocks that run apart.
MARGIN: Final = 1 / 8

Cancel = Callable[[StreamingError], object]
Renew = Callable[[Callable[[], object]], "Future[frozenset[str]]"]
Report = Callable[[list[Lease], StreamingError | None], object]


@dataclass(slots=True)
class _Hold:
    """``until`` by the monotonic clock, in seconds."""

    lease: Lease
    until: float


class Leases:
    """The leases from their claim to the moment their end is asked of the ledger.

    A lease is valid until *seconds*, less ``MARGIN``, after its claim was submitted or its last
    renewal began: the ledger can only have counted from later on. One whose time is over is held
    all the same, and valid again once a renewal finds it: nobody took the job over. Times are those
    of *clock*, in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lasts = seconds * (1 - MARGIN)
        self._clock = clock
        self._lock = threading.Lock()
        self._holds: dict[str, _Hold] = {}
        self._watchers: dict[str, Cancel] = {}
        self._heirs: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self._holds)

    def hold(self, lease: Lease, asked_at: float) -> None:
        """Take note of a lease whose claim was submitted at *asked_at*; some have no end."""
        until = lease.until if lease.until == math.inf else asked_at + self._lasts
        with self._lock:
            self._holds[lease.claim_id] = _Hold(lease, until)

    def end(self, lease: Lease) -> bool:
        """Take note that the lease is being given up, missed by no renewal; return whether it was held."""
        with self._lock:
            return self._holds.pop(lease.claim_id, None) is not None

    def held(self, lease: Lease) -> bool:
        """Whether nothing is known of the loss of *lease*."""
        return lease.claim_id in self._holds

    def valid(self, lease: Lease) -> bool:
        """Whether this worker may write under *lease* now."""
        hold = self._holds.get(lease.claim_id)
        return hold is not None and self._clock() < hold.until

    # -- renewal ---------------------------------------------------------------------------

    def snapshot(self) -> frozenset[str]:
        """Return the claim ids to compare a renewal's answer with; taken when it is submitted."""
        with self._lock:
            return frozenset(self._holds)

    def renewed(self, snapshot: Collection[str], began_at: float, still: Collection[str]) -> list[Lease]:
        """Prolong the leases that a renewal found, *still*; return those it did not, once each.

        *began_at* is when the ledger began with it. Leases claimed or ended since the *snapshot* are
        left alone.
        """
        lost = []
        with self._lock:
            for claim_id in self._holds.keys() & set(snapshot):
                if claim_id in still:
                    self._holds[claim_id].until = began_at + self._lasts
                else:
                    lost.append(self._holds.pop(claim_id).lease)
        return lost

    # -- who is told -----------------------------------------------------------------------

    @contextmanager
    def watching(self, lease: Lease, cancel: Cancel) -> Iterator[None]:
        """Have *cancel* called, once at most, if the download inside must be broken off."""
        self._watchers[lease.claim_id] = cancel
        try:
            yield
        finally:
            self._watchers.pop(lease.claim_id, None)

    def cancel(self, lease: Lease, error: StreamingError) -> None:
        """Break off the download under *lease*, if one is in flight, with *error*."""
        cancel = self._watchers.pop(lease.claim_id, None)
        if cancel is not None:
            cancel(error)

    def cancel_all(self, error: Callable[[], StreamingError]) -> int:
        """Break off every download in flight, each with an *error* of its own; return how many."""
        cancels = list(self._watchers.values())
        self._watchers.clear()
        for cancel in cancels:
            cancel(error())
        return len(cancels)

    # -- a job claimed again ---------------------------------------------------------------

    def succeed(self, lost: Lease, heir: Lease) -> None:
        """Take note that the download under *lost* goes on under *heir*."""
        self._heirs[lost.claim_id] = heir

    def latest(self, lease: Lease) -> Lease:
        """Return the lease that the download begun under *lease* has now."""
        while lease.claim_id in self._heirs:
            lease = self._heirs[lease.claim_id]
        return lease


class Heartbeat:
    """Renews all leases every quarter of their time, from a thread: a busy event loop loses none.

    *renew* asks the ledger; *report* is called in the thread after each renewal with the leases that
    were lost, and the error if it failed.
    """

    def __init__(self, leases: Leases, seconds: float, renew: Renew, report: Report) -> None:
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
        """Renew no more; a renewal that waits for its answer is left to the ledger's end."""
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
            still = self._renew(lambda: began_at.append(time.monotonic())).result()
            lost = self._leases.renewed(snapshot, began_at[-1], still)
        except StreamingError as failed:
            error = failed
        self._asked_at = None
        if not self._ended:
            self._report(lost, error)
