"""One project crawled twice on one site: without this package, and with it.

What may live here: running the two crawls, and the comparison of what came of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.crawl import Crawl, Urls, run_crawl

#: What an entry in ``item["files"]`` has of stock's; the checksum is MD5 there.
ENTRY = ("url", "path", "status")
FILES = {"ITEM_PIPELINES": {"scrapy.pipelines.files.FilesPipeline": 1}}
LOUD = ("WARNING", "ERROR", "CRITICAL")


@dataclass
class Beside:
    """Two crawls of the same items, each into a store of its own."""

    stock: Crawl
    streaming: Crawl
    stock_store: Path
    store: Path

    def assert_same(self, *more: str) -> None:
        """Exit code, items, files and loud log lines are stock's, but for lines with one of *more*."""
        assert self.streaming.code == self.stock.code, self.streaming.log[-3000:]
        assert essence(self.streaming) == essence(self.stock), self._logs()
        assert files_in(self.store) == files_in(self.stock_store)
        assert levels(self.streaming, *more) == levels(self.stock, *more), (
            loud(self.streaming),
            loud(self.stock),
        )

    def _logs(self) -> str:
        return f"--- stock\n{self.stock.log[-4000:]}\n--- streaming\n{self.streaming.log[-4000:]}"


def beside(
    base: Path,
    urls: Urls,
    *,
    settings: Mapping[str, Any] | None = None,
    stock: Mapping[str, Any] | None = None,
    streaming: Mapping[str, Any] | None = None,
    **how: Any,
) -> Beside:
    """Crawl without the add-on by *settings* and *stock*, then with it by *settings* and *streaming*."""
    crawls, stores = [], []
    for name, own in (("stock", {"ADDONS": {}} | dict(stock or {})), ("streaming", dict(streaming or {}))):
        (base / name).mkdir(parents=True)
        stores.append(base / name / "store")
        crawls.append(run_crawl(urls, stores[-1], settings={**FILES, **(settings or {}), **own}, **how))
    return Beside(*crawls, *stores)


def essence(crawl: Crawl) -> list[Any]:
    """Return the items, of each file what stock says of it, too; in no order."""

    def plain(item: dict[str, Any]) -> dict[str, Any]:
        files = item.get("files")
        if not isinstance(files, list):
            return item
        return item | {"files": [{name: entry.get(name) for name in ENTRY} for entry in files]}

    return sorted((plain(item) for item in crawl.items), key=repr)


def files_in(store: Path) -> dict[str, bytes]:
    """Return what a store holds, by its path, without what this package alone stores."""
    found = {path.relative_to(store).as_posix(): path for path in store.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if not name.startswith((".streaming/", "blobs/sha256/"))
    }


def loud(crawl: Crawl) -> list[str]:
    """Return the log's lines of warnings and worse."""
    return [line for line in crawl.log.splitlines() if any(f"] {level}: " in line for level in LOUD)]


def levels(crawl: Crawl, *without: str) -> Counter[str]:
    """Return how many lines of each level from WARNING on, leaving out those with one of *without*."""
    said = [line for line in loud(crawl) if not any(text in line for text in without)]
    return Counter(next(level for level in LOUD if f"] {level}: " in line) for line in said)
