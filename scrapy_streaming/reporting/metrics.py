"""``.streaming/metrics.json``: the statistics of a crawl, written when it ends.

What may live here: the contents of the file. Increase ``FORMAT`` when a name changes its meaning.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from scrapy import signals
from scrapy.crawler import Crawler

from scrapy_streaming import __version__
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.settings import SETTINGS, StreamingSettings
from scrapy_streaming.statistics import PREFIX, STATISTICS, full_name
from scrapy_streaming.storage.durable import replace_file

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

FORMAT: Final = 1
NAME: Final = "metrics.json"
#: Statistics that every crawl has, also if they are 0; and those that the file repeats under ``streaming``.
ALWAYS: Final = tuple(name for name, each in STATISTICS.items() if each.always)
SUMMARY: Final = tuple(name for name, each in STATISTICS.items() if each.summary)
#: Settings that the file includes. Others may name machines and users.
_TOGGLES: Final = tuple(name for name in SETTINGS if name.endswith("_ENABLED") or name == "STREAMING_FSYNC")
_STATS: Final = (PREFIX, "file_count", "file_status_count/")


class Metrics:
    """Collects the metrics of a crawl from its start, and writes the file at its end."""

    def __init__(self, crawler: Crawler, settings: StreamingSettings) -> None:
        self._crawler = crawler
        self._settings = settings
        self._started = time.time()
        self._reason: str | None = None
        if crawler.stats is not None:
            for name in ALWAYS:
                crawler.stats.inc_value(full_name(name), 0)
        crawler.signals.connect(self._closed, signals.spider_closed)

    def _closed(self, reason: str) -> None:
        self._reason = reason

    def write(self, worker_id: str) -> None:
        """Replace the file of an earlier crawl, atomically. Blocks.

        Log one line if the file cannot be written: the crawl has ended, and its files are stored.
        """
        directory = self._settings.directory
        if directory is None:
            return
        text = json.dumps(self.document(worker_id, time.time()), indent=2) + "\n"
        try:
            replace_file(directory / NAME, text, fsync=self._settings.fsync)
        except OSError as error:
            logger.warning("%s could not be written (metrics-unwritten): %s", directory / NAME, error)

    def document(self, worker_id: str, now: float) -> dict[str, Any]:
        """Return the contents of the file; *now* in seconds since the epoch."""
        crawler, stats = self._crawler, {}
        if crawler.stats is not None:
            stats = numbers(crawler.stats.get_stats())
        return {
            "format": FORMAT,
            "versions": _versions(),
            "spider": None if crawler.spider is None else crawler.spider.name,
            "worker": worker_id,
            "started": _iso(self._started),
            "finished": _iso(now),
            "elapsed_seconds": round(now - self._started, 3),
            "finish_reason": self._reason,
            "settings": {name: _value(self._settings, name) for name in _TOGGLES},
            "streaming": {name: stats.get(full_name(name), 0) for name in SUMMARY},
            "stats": stats,
        }


def numbers(stats: Mapping[str, Any]) -> dict[str, float]:
    """Return the numeric statistics of files, sorted by name."""
    return {
        name: value
        for name, value in sorted(stats.items())
        if name.startswith(_STATS) and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _versions() -> dict[str, str]:
    found = {"scrapy-streaming": __version__, "Python": platform.python_version()}
    for name in ("Scrapy", "Twisted", "SQLAlchemy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _value(settings: StreamingSettings, name: str) -> bool:
    return bool(asdict(settings)[name.removeprefix("STREAMING_").lower()])


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
