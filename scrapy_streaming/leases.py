"""The leases of this worker, by its own clock (ledger rules 7 and 8).

What may live here: which leases there are, until when this worker may write under each, and who is
to be told when one is lost. No input, no output; ``valid`` may be asked from any thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.protocol.jobs import Lease

#: The share of a lease that is not used: for the way to the disk, and clocks that run apart.
MARGIN: Final = 1 / 8

Cancel = Callable[[StreamingError], object]


@dataclass(slots=True)
class _Hold:
    """``until`` by the monotonic clock, in seconds; ``told``: its loss has been reported."""

    lease: Lease
    until: float
    told: bool = False


class Leases:
    """The leases from their claim to the moment their end is asked of the ledger.

    A lease is valid until *seconds*, less ``MARGIN``, after its claim or last renewal was
    submitted: the ledger can only have counted from later on. One whose time is over becomes
    valid again if a renewal still finds it. Times are those of *clock*, in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lasts = seconds * (1 - MARGIN)
        self._clock = clock
        self._holds: dict[str, _Hold] = {}
        self._watchers: dict[str, Cancel] = {}
        self._heirs: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self._holds)

    def hold(self, lease: Lease, asked_at: float) -> None:
        """Take note of a lease whose claim was submitted at *asked_at*."""
        self._holds[lease.claim_id] = _Hold(lease, asked_at + self._lasts)

    def end(self, lease: Lease) -> None:
        """Take note that the lease is being given up: it is missed by no renewal from now on."""
        self._holds.pop(lease.claim_id, None)

    def valid(self, lease: Lease) -> bool:
        """Whether this worker may still write under *lease*."""
        hold = self._holds.get(lease.claim_id)
        return hold is not None and self._clock() < hold.until

    # -- renewal ---------------------------------------------------------------------------

    def snapshot(self) -> frozenset[str]:
        """Return the claim ids to compare a renewal's answer with; taken when it is submitted."""
        return frozenset(self._holds)

    def renewed(self, snapshot: Collection[str], asked_at: float, still: Collection[str]) -> list[Lease]:
        """Prolong the leases that a renewal found, *still*; return those it did not, once each.

        *asked_at* is when it was submitted. Leases claimed or ended since the *snapshot* are
        left alone.
        """
        lost = []
        for claim_id in snapshot:
            hold = self._holds.get(claim_id)
            if hold is None:
                continue
            if claim_id in still:
                hold.until, hold.told = asked_at + self._lasts, False
                continue
            del self._holds[claim_id]
            if not hold.told:
                lost.append(hold.lease)
        return lost

    def overdue(self) -> list[Lease]:
        """Return the leases of downloads in flight whose time is over, once each (rule 7)."""
        held = [hold.lease for claim_id, hold in self._holds.items() if claim_id in self._watchers]
        return [lease for lease in held if not self.valid(lease) and self.lose(lease)]

    def lose(self, lease: Lease) -> bool:
        """Take note that the loss of *lease* is known; return whether that is news."""
        hold = self._holds.get(lease.claim_id)
        if hold is None or hold.told:
            return False
        hold.told = True
        return True

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
