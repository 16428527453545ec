"""The smallest spider that stores one file."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import scrapy
from scrapy import signals


class OneFile(scrapy.Spider):
    """Yields one item with one file; none without a URL.

    The moment the item is done goes to the file *stamp*: a crawl's process itself ends on a
    five-second beat of Scrapy's.
    """

    name = "one-file"
    url = ""
    stamp = ""
    custom_settings: ClassVar[dict[str, Any]] = {"ADDONS": {"scrapy_streaming.Addon": 300}}

    async def start(self) -> AsyncIterator[Any]:
        """Yield the item."""
        if self.url:
            self.crawler.signals.connect(self.item_done, signals.item_scraped)
            yield {"file_urls": [self.url]}

    def item_done(self) -> None:
        """Write down when the item was done."""
        Path(self.stamp).write_text(str(time.monotonic()))
