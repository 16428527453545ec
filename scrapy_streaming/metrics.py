"""``.streaming/metrics.json``: what a crawl did, in numbers, written when it ends; and two of them compared.

What may live here: the file's contents, how they are read, and what differs between two. ``FORMAT``
grows when a name changes its meaning.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from scrapy import signals
from scrapy.crawler import Crawler

from scrapy_streaming import __version__
from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.settings import SETTINGS, StreamingSettings
from scrapy_streaming.statistics import PREFIX, STATISTICS, full_name
from scrapy_streaming.storage.durable import read_text, replace_file

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

FORMAT: Final = 1
NAME: Final = "metrics.json"
#: Statistics that every crawl has, be they 0; and those that the file repeats under ``streaming``.
ALWAYS: Final = tuple(name for name, each in STATISTICS.items() if each.always)
SUMMARY: Final = tuple(name for name, each in STATISTICS.items() if each.summary)
#: What of the settings is noted: what is on and off. Others may name machines and users.
_TOGGLES: Final = tuple(name for name in SETTINGS if name.endswith("_ENABLED") or name == "STREAMING_FSYNC")
_STATS: Final = (PREFIX, "file_count", "file_status_count/")


class Metrics:
    """Watches a crawl from its start and writes the file at its end."""

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
        """Write the file over that of an earlier crawl, atomically. Blocks.

        A file that cannot be written is said in one line: the crawl is over, and its files are stored.
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
        """Return what the file says; *now* in seconds since the epoch."""
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
    """Return the statistics of files that are numbers, in the order of their names."""
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


# -- two of them ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """A name whose value differs; ``None`` for one that a file has not.

    ``ratio`` is the second by the first, ``None`` unless both are numbers and the first is not 0.
    """

    name: str
    before: Any
    after: Any
    ratio: float | None


def load(path: Path) -> dict[str, Any]:
    """Return what a metrics file says.

    Raises ``StoreError``: ``metrics-missing``, ``metrics-unreadable``, ``metrics-format`` (a newer
    release wrote it).
    """
    try:
        document = json.loads(read_text(path))
    except FileNotFoundError as error:
        msg = f"there is no file {path}"
        raise StoreError(msg, reason="metrics-missing") from error
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{path} cannot be read as metrics: {error}"
        raise StoreError(msg, reason="metrics-unreadable") from error
    found: dict[str, Any] = document if isinstance(document, dict) else {}
    number = found.get("format")
    if not isinstance(number, int) or not isinstance(found.get("stats"), dict):
        msg = f"{path} is no metrics file: it has no format and stats"
        raise StoreError(msg, reason="metrics-unreadable")
    if number > FORMAT:
        msg = f"{path} has format {number}, this release reads up to {FORMAT}: upgrade scrapy-streaming"
        raise StoreError(msg, reason="metrics-format")
    return found


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Return what differs between two documents, but for their times and workers; settings first.

    A statistic that one of them has not counts as 0.
    """
    changes = []
    old, new = _flat(before), _flat(after)
    for name in [*old, *(name for name in new if name not in old)]:
        default = 0 if name in before["stats"] or name in after["stats"] else None
        one, other = old.get(name, default), new.get(name, default)
        if one != other:
            changes.append(Change(name, one, other, _ratio(one, other)))
    return changes


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by one name each; the numbers under ``streaming`` are among ``stats``."""
    found: dict[str, Any] = {
        name: document.get(name) for name in ("spider", "finish_reason", "elapsed_seconds")
    }
    versions, settings = document.get("versions"), document.get("settings")
    if isinstance(versions, Mapping):
        found |= {f"version of {name}": value for name, value in versions.items()}
    if isinstance(settings, Mapping):
        found |= settings
    found |= document["stats"]
    return found


def _ratio(before: Any, after: Any) -> float | None:
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (before, after))
    return round(after / before, 3) if numeric and before else None
