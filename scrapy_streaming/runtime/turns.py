"""Turns to claim a job: so many leases at a time, and no host keeps the others out.

What may live here: the count and the queue. A lease is held from when a download is about to begin,
not from when an item was seen: 20,000 items must not be 20,000 leases.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from scrapy.settings import BaseSettings
from scrapy.utils.defer import maybe_deferred_to_future
from twisted.internet.defer import Deferred


class Turns:
    """At most *total* turns at a time, *each* of one host; the host with the fewest comes next."""

    def __init__(self, total: int, each: int) -> None:
        self.total = total
        self._each = each
        self._taken: Counter[str] = Counter()
        self._count = 0
        self._waiting: dict[str, deque[Deferred[None]]] = {}

    @classmethod
    def of(cls, settings: BaseSettings) -> Turns:
        """Return the turns of a crawl: two for each concurrent request, for one host half of them and more.

        So a host whose requests wait for their delay leaves room for the others, and one host alone
        can use all of Scrapy's concurrency.
        """
        concurrent = settings.getint("CONCURRENT_REQUESTS") or settings.getint("CONCURRENT_ITEMS")
        return cls(2 * concurrent, concurrent + max(1, concurrent // 2))

    async def take(self, host: str) -> None:
        """Return when it is the turn of a job on *host*; raise what ``break_off`` is given."""
        if self._count < self.total and self._taken[host] < self._each and host not in self._waiting:
            self._give(host)
            return
        turn: Deferred[None] = Deferred()
        self._waiting.setdefault(host, deque()).append(turn)
        await maybe_deferred_to_future(turn)

    def end(self, host: str) -> None:
        """Take a turn back and give it to the job that waits with the fewest turns on its host."""
        self._count -= 1
        self._taken[host] -= 1
        if not self._taken[host]:
            del self._taken[host]
        while self._count < self.total and (following := self._next()) is not None:
            self._give(following)
            turn = self._waiting[following].popleft()
            if not self._waiting[following]:
                del self._waiting[following]
            turn.callback(None)

    def break_off(self, error: Callable[[], Exception]) -> None:
        """End every wait, each with an *error* of its own."""
        waiting, self._waiting = self._waiting, {}
        for turns in waiting.values():
            for turn in turns:
                turn.errback(error())

    def _give(self, host: str) -> None:
        self._count += 1
        self._taken[host] += 1

    def _next(self) -> str | None:
        hosts = (host for host in self._waiting if self._taken[host] < self._each)
        return min(hosts, key=self._taken.__getitem__, default=None)
