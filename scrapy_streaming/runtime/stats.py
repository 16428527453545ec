"""The statistics ``streaming/…`` of a crawl, and the log line of a decision.

What may live here: counting. The names are declared in ``statistics``.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol

from scrapy_streaming.protocol.jobs import Lease
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.statistics import full_name

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)


class Collector(Protocol):
    """The part of Scrapy's ``StatsCollector`` that is used."""

    def inc_value(self, key: str, count: int = 1) -> Any:
        """Add *count* to a statistic."""

    def set_value(self, key: str, value: Any) -> Any:
        """Set a statistic."""


class Stats:
    """Counts what happens; without a *collector* (a crawl that never began) it counts nothing."""

    def __init__(self, collector: Collector | None) -> None:
        self._collector = collector
        self._timed = 0
        self._total_ms = 0.0

    def count(self, name: str, number: int = 1) -> None:
        """Add *number* to the statistic ``streaming/<name>``; raise ``LookupError`` for an undeclared one."""
        if self._collector is not None:
            self._collector.inc_value(full_name(name), number)

    def time(self, started: float) -> None:
        """Include the time since *started* (monotonic seconds) in the average latency."""
        self._timed += 1
        self._total_ms += (time.monotonic() - started) * 1000
        if self._collector is not None:
            self._collector.set_value(full_name("average_latency_ms"), self._total_ms / self._timed)

    def decision(self, reason: str, url: str, lease: Lease, **facts: object) -> None:
        """Count a decision about the request for *url* and log it, with *facts*, in one line."""
        self.count("resume_decisions_made")
        self.count(f"decision/{reason}")
        details = "".join(f" {name}={value}" for name, value in facts.items() if value not in (None, ""))
        logger.debug(
            "streaming_resume_decision reason=%s url=%s job=%s fence=%d%s",
            reason, url, lease.job_key[:12], lease.fence, details,
        )  # fmt: skip
