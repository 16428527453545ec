"""The leases of one process, each from its claim to its end, for code without an event loop.

What may live here: claiming, waiting for another worker, renewing. With a ledger a thread renews the leases;
without one there is nothing to renew, and all else is the same.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from scrapy_streaming.exceptions import JobUnavailable, StreamingError
from scrapy_streaming.protocol.jobs import Claim, Dead, Done, Granted, Held, Lease, Waiting
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.runtime.heartbeat import Heartbeat, Renew
from scrapy_streaming.runtime.lease_table import LeaseTable, lease_lost

if TYPE_CHECKING:
    from concurrent.futures import Future

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: Seconds between two claims of a job that another worker holds.
HELD_POLL: Final = 0.25

Ask = Callable[[], "Future[Claim]"]


class Claims:
    """The leases that this process holds in one ledger, renewed while the context is open.

    *renew* asks the ledger to renew them, ``None`` where leases have no end. *waits*: a claim waits for a
    job that another worker holds (``STREAMING_HELD``).
    """

    def __init__(self, seconds: float, renew: Renew | None, *, waits: bool) -> None:
        self._leases = LeaseTable(seconds)
        self._held: dict[str, Lease] = {}
        self._waits = waits
        self._renewed = threading.Condition()
        self._heartbeat = None if renew is None else Heartbeat(self._leases, seconds, renew, self._report)

    def __enter__(self) -> Self:
        if self._heartbeat is not None:
            self._heartbeat.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._heartbeat is not None:
            self._heartbeat.end()

    def _report(self, lost: list[Lease], error: StreamingError | None) -> None:
        for lease in lost:
            logger.warning("lease-lost: job=%s fence=%d", lease.job_key[:12], lease.fence)
        if error is not None:
            logger.warning("lease renewal failed, retrying: %s", error)
        with self._renewed:
            self._renewed.notify_all()

    def claim(self, ask: Ask) -> Granted | Done:
        """Return the grant of the job, or its result; wait while another worker has it.

        Raises ``JobUnavailable`` (``held``, ``waiting``, ``dead``).
        """
        while True:
            asked_at = time.monotonic()
            claim = ask().result()
            match claim:
                case Granted(lease):
                    self._leases.add(lease, asked_at)
                    self._held[lease.claim_id] = lease
                    return claim
                case Done():
                    return claim
                case Held(worker_id) if not self._waits:
                    msg = f"worker {worker_id} has the job (STREAMING_HELD=skip)"
                    raise JobUnavailable(msg, reason="held")
                case Held():
                    time.sleep(HELD_POLL)
                case Waiting(not_before, error):
                    seconds = max(0.0, not_before - time.time())
                    msg = f"the job backs off for {seconds:.0f} s more, as the server asked: {error}"
                    raise JobUnavailable(msg, reason="waiting")
                case Dead(attempts, error):
                    msg = f"the job spent {attempts} attempts ({error}); `scrapy streaming requeue` frees it"
                    raise JobUnavailable(msg, reason="dead")

    def assure(self, lease: Lease) -> None:
        """Return when this process may write under *lease*: at once, or after a late renewal.

        Raises ``LeaseLost`` if another worker has the job now.
        """
        while not self._leases.is_valid(lease):
            if not self._leases.has(lease) or self._heartbeat is None:
                raise lease_lost(lease)
            with self._renewed:
                self._heartbeat.renew_now()
                self._renewed.wait(HELD_POLL)

    def end(self, lease: Lease) -> None:
        """Stop renewing *lease*, before the ledger is asked to end it."""
        self._leases.remove(lease)
        self._held.pop(lease.claim_id, None)

    def left(self) -> list[Lease]:
        """Return the leases that were not ended."""
        return list(self._held.values())
