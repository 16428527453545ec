"""The statistics that unit tests are given answer as Scrapy's do."""

from __future__ import annotations

from typing import Any

from scrapy.statscollectors import MemoryStatsCollector
from scrapy.utils.test import get_crawler
from units.fakes import FakeStats


def _used(stats: Any) -> list[Any]:
    stats.set_value("set", 3)
    stats.inc_value("counted")
    stats.inc_value("counted", 4)
    stats.inc_value("from", start=10)
    for value in (5, 9, 7):
        stats.max_value("most", value)
        stats.min_value("least", value)
    named = [stats.get_value(name) for name in ("set", "counted", "from", "most", "least", "none")]
    return [*named, stats.get_value("none", 0), dict(stats.get_stats())]


def test_the_stand_in_of_the_statistics_counts_as_scrapy_does() -> None:
    assert _used(FakeStats()) == _used(MemoryStatsCollector(get_crawler()))
