"""The items that are in the files pipelines of a crawl.

What may live here: their number, and the calls when it is 0. Knows no item.
"""

from __future__ import annotations

from collections.abc import Callable


class ItemsInWork:
    """Counts items; calls its subscribers when the last one leaves, and when a closing crawl has none."""

    def __init__(self) -> None:
        self.count = 0
        self._at_none: list[Callable[[], object]] = []
        self._at_idle: list[Callable[[], object]] = []

    def subscribe(self, *, at_none: Callable[[], object], at_idle: Callable[[], object]) -> None:
        """Have *at_none* called each time the last item leaves, *at_idle* while Scrapy closes with none."""
        self._at_none.append(at_none)
        self._at_idle.append(at_idle)

    def enter(self) -> None:
        """Count an item that a pipeline begins with."""
        self.count += 1

    def leave(self) -> None:
        """Count an item less."""
        self.count -= 1
        if not self.count:
            for call in self._at_none:
                call()

    def report_idle(self) -> None:
        """Call the subscribers: the crawl closes and has no item in work."""
        for call in self._at_idle:
            call()
