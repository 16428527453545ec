"""How fast bodies may come: in all, from one host, by time of day (STREAMING_MAX_RATE).

What may live here: which limit holds when, and how long to wait for the next bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from scrapy_streaming.setting_kinds import RateRule

#: Seconds of its rate that a pause may let come at once.
BURST = 0.25


def rate_for(rules: Sequence[RateRule], host: str, minute: int) -> int:
    """Return the bytes a second that hold for *host* (``""``: for all together), 0 for no limit.

    *minute* is that of the local day. Of several rules that hold the last counts.
    """
    return next((rule.rate for rule in reversed(rules) if rule.host == host and rule.holds(minute)), 0)


@dataclass(slots=True)
class _Bucket:
    """Bytes that were let through; ``free_at`` is when their rate is paid off, in seconds of the clock."""

    free_at: float = 0.0

    def take(self, size: int, rate: int, now: float) -> float:
        """Return how many seconds to wait after *size* bytes at *rate* bytes a second."""
        self.free_at = max(self.free_at, now - BURST) + size / rate
        return max(0.0, self.free_at - now)


def minute_of_day() -> int:
    """Return the minute of the local day."""
    now = time.localtime()
    return now.tm_hour * 60 + now.tm_min


@dataclass(slots=True)
class Rates:
    """The limits of one crawl."""

    rules: Sequence[RateRule]
    clock: Callable[[], float] = time.monotonic
    minute: Callable[[], int] = minute_of_day
    _buckets: dict[str, _Bucket] = field(default_factory=dict)

    def wait(self, host: str, size: int) -> float:
        """Take *size* bytes that came from *host*; return how many seconds to read no more from it."""
        if not self.rules:
            return 0.0
        now, minute, wait = self.clock(), self.minute(), 0.0
        for name in ("", host):
            rate = rate_for(self.rules, name, minute)
            if rate:
                wait = max(wait, self._buckets.setdefault(name, _Bucket()).take(size, rate, now))
        return wait
