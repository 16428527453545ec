"""A spider whose ``start()`` is a list of files."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import scrapy
from scrapy import signals


class ListOfFiles(scrapy.Spider):
    """Yields *count* items with one file each.

    How many are done goes to the file *said*, ten times a second at most, with the times (monotonic
    seconds) and the memory.
    """

    name = "list-of-files"
    base = ""
    count = "0"
    said = ""
    custom_settings: ClassVar[dict[str, Any]] = {
        "ADDONS": {"scrapy_streaming.Addon": 300},
        "ITEM_PIPELINES": {"scrapy.pipelines.files.FilesPipeline": 1},
    }

    async def start(self) -> AsyncIterator[Any]:
        """Yield the items."""
        self.began, self.wrote, self.files, self.first = time.monotonic(), 0.0, 0, 0.0
        self.crawler.signals.connect(self.item_done, signals.item_scraped)
        for number in range(int(self.count)):
            yield {"file_urls": [f"{self.base}/{number}.bin"]}

    def item_done(self, item: dict[str, Any]) -> None:
        """Count the files of an item."""
        now = time.monotonic()
        self.first = self.first or now - self.began
        self.files += len(item["files"])
        if now - self.wrote < 0.1:
            return
        self.wrote = now
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seen = {
            "began": self.began, "at": now, "files": self.files, "first": self.first, "rss_mib": peak,
        }  # fmt: skip
        said = Path(self.said)
        said.with_suffix(".tmp").write_text(json.dumps(seen))
        said.with_suffix(".tmp").replace(said)
