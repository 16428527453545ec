"""File work in threads: the event loop never waits for a disk.

What may live here: the call and its count; the functions that block are the callers'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from scrapy.utils.asyncio import run_in_thread

from scrapy_streaming.runtime.stats import Stats

T = TypeVar("T")
P = ParamSpec("P")


class Threads:
    """Calls functions in Scrapy's pool of threads; each call counts as one I/O operation."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what *function* returns, called in a thread."""
        self._stats.count("io_operations")
        return await run_in_thread(function, *args, **kwargs)
