"""The leases that this worker holds, by its own clock (ledger rules 7 and 8).

What may live here: which leases there are, until when this worker may write under each, and how the
download under each is broken off. No input or output. ``is_valid`` may be called in any thread.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from scrapy_streaming.exceptions import LeaseLost, StreamingError
from scrapy_streaming.protocol.jobs import Lease

#: The share of a lease that is not used: for the way to the disk, and clocks that drift apart.
MARGIN: Final = 1 / 8

Cancel = Callable[[StreamingError], object]


@dataclass(slots=True)
class _Entry:
    """``until`` by the monotonic clock, in seconds."""

    lease: Lease
    until: float


def lease_lost(lease: Lease) -> LeaseLost:
    """Return the error of a download whose lease another worker replaced."""
    return LeaseLost(f"lease-lost: job={lease.job_key[:12]} fence={lease.fence}")


class LeaseTable:
    """The leases from their claim to the moment when the ledger is asked to end them.

    A lease is valid until *seconds*, less ``MARGIN``, after its claim was submitted or its last
    renewal began: the ledger can only have counted from later on. A lease whose time is over stays
    in the table, and is valid again once a renewal finds it: no other worker took the job over. Times
    are those of *clock*, in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lasts = seconds * (1 - MARGIN)
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._cancels: dict[str, Cancel] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, lease: Lease, asked_at: float) -> None:
        """Add a lease whose claim was submitted at *asked_at*; some leases have no end."""
        until = lease.until if lease.until == math.inf else asked_at + self._lasts
        with self._lock:
            self._entries[lease.claim_id] = _Entry(lease, until)

    def remove(self, lease: Lease) -> bool:
        """Remove a lease that is being ended, so that no renewal misses it; return whether it was there."""
        with self._lock:
            return self._entries.pop(lease.claim_id, None) is not None

    def has(self, lease: Lease) -> bool:
        """Whether *lease* is in the table: it was neither ended nor lost, as far as is known."""
        return lease.claim_id in self._entries

    def is_valid(self, lease: Lease) -> bool:
        """Whether this worker may write under *lease* now."""
        entry = self._entries.get(lease.claim_id)
        return entry is not None and self._clock() < entry.until

    # -- renewal ---------------------------------------------------------------------------

    def snapshot(self) -> frozenset[str]:
        """Return the claim ids to compare a renewal's answer with; taken when it is submitted."""
        with self._lock:
            return frozenset(self._entries)

    def renew(self, snapshot: Collection[str], began_at: float, renewed: Collection[str]) -> list[Lease]:
        """Prolong the leases that a renewal found; remove and return those it did not find.

        *began_at* is when the ledger began with the renewal. Leases that were claimed or ended since
        the *snapshot* stay as they are.
        """
        lost = []
        with self._lock:
            for claim_id in self._entries.keys() & set(snapshot):
                if claim_id in renewed:
                    self._entries[claim_id].until = began_at + self._lasts
                else:
                    lost.append(self._entries.pop(claim_id).lease)
        return lost

    # -- downloads under a lease -----------------------------------------------------------

    @contextmanager
    def cancellable(self, lease: Lease, cancel: Cancel) -> Iterator[None]:
        """Keep *cancel* while the download inside runs; the caller that takes it out breaks that off."""
        self._cancels[lease.claim_id] = cancel
        try:
            yield
        finally:
            self._cancels.pop(lease.claim_id, None)

    def take_cancel(self, lease: Lease) -> Cancel | None:
        """Take out and return what breaks off the download under *lease*, ``None`` if none runs."""
        return self._cancels.pop(lease.claim_id, None)

    def take_cancels(self) -> list[Cancel]:
        """Take out and return what breaks off every download that runs."""
        cancels = list(self._cancels.values())
        self._cancels.clear()
        return cancels
