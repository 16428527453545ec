"""The smallest spider that asks for many pages and stores nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import scrapy


class Pages(scrapy.Spider):
    """Asks for ``count`` pages; writes down when the last was there, what is imported and what is open."""

    name = "pages"
    base = ""
    count = "0"
    said = ""

    async def start(self) -> AsyncIterator[Any]:
        """Ask for the pages."""
        self.pages = 0
        for number in range(int(self.count)):
            yield scrapy.Request(f"{self.base}/{number}.html")

    def parse(self, response: Any) -> None:
        """Count a page."""
        self.pages += bool(response.css("title::text").get())

    def closed(self, reason: str) -> None:
        """Write down what was seen."""
        files = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        seen = {
            "at": time.monotonic(),
            "pages": self.pages,
            "reason": reason,
            "modules": sorted(sys.modules),
            "files": sorted({name for name in files if name.startswith("/")}),
        }
        Path(self.said).write_text(json.dumps(seen))
