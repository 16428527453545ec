"""The jobs that other workers hold, and the downloads that wait for them.

What may live here: waiting, and asking the ledger which jobs are free. Claiming them is ``jobs``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from typing import Final, Protocol

from scrapy.utils.asyncio import create_looping_call
from scrapy.utils.defer import deferred_from_coro, maybe_deferred_to_future
from twisted.internet.defer import Deferred

from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.runtime.ledger_calls import LedgerCalls

#: Seconds between two questions which of the jobs are free, at most.
POLL: Final = 0.25


class FreeJobs(Protocol):
    """What this needs of the ledger."""

    def free(self, keys: Collection[str]) -> Future[frozenset[str]]:
        """Give those of *keys* that may be claimed."""


class HeldJobs:
    """Waits for jobs to become free: one question to the ledger for all of them."""

    def __init__(self, ledger: FreeJobs, calls: LedgerCalls) -> None:
        self._ledger = ledger
        self._calls = calls
        self._waiting: defaultdict[str, list[Deferred[None]]] = defaultdict(list)
        self._asking = False
        self._poll = create_looping_call(self._poll_waiting)

    async def freed(self, key: str) -> None:
        """Return when the job may be claimed; raise what the ledger raises, or ``break_off`` gives."""
        freed: Deferred[None] = Deferred()
        self._waiting[key].append(freed)
        if not self._poll.running:
            self._poll.start(POLL, now=False)
        await maybe_deferred_to_future(freed)

    def resume(self, keys: Iterable[str]) -> None:
        """Let the downloads go on that wait for *keys*."""
        for waiting in self._take(keys):
            waiting.callback(None)

    def break_off(self, error: Callable[[], StreamingError]) -> None:
        """End every wait, each with an *error* of its own."""
        for waiting in self._take(list(self._waiting)):
            waiting.errback(error())

    def end(self) -> None:
        """Ask no more."""
        if self._poll.running:
            self._poll.stop()

    def _take(self, keys: Iterable[str]) -> list[Deferred[None]]:
        return [waiting for key in keys for waiting in self._waiting.pop(key, ())]

    def _poll_waiting(self) -> None:
        if not self._waiting:
            self._poll.stop()
        elif not self._asking:
            deferred_from_coro(self._resume_waiting())

    async def _resume_waiting(self) -> None:
        """Ask which of the jobs are free, and let the downloads go on that wait for those."""
        self._asking = True
        keys = list(self._waiting)
        try:
            free = await self._calls.result(self._ledger.free(keys))
        except StreamingError as error:
            for waiting in self._take(keys):
                waiting.errback(error)
        else:
            self.resume(free)
        finally:
            self._asking = False
