"""The spider ``documents``: walks listings and pages of one host and stores the files they link to."""

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import scrapy
from scrapy import signals
from scrapy.crawler import Crawler
from scrapy.http import HtmlResponse, Request, Response

from documents.origin import FIRST_PORT

PROJECT = Path(__file__).resolve().parents[2]
PAGES = {"html", "htm", "xhtml"}
SORT_KEYS = {
    "C",
    "F",
    "N",
    "O",
    "P",
    "V",
    "dir",
    "layout",
    "order",
    "sort",
}  # Apache, nginx fancyindex, Caddy


class DocumentsSpider(scrapy.Spider):
    """Stores every document a host links to, and prints what it did.

    Without arguments it starts a small origin of its own. ``-a url=URL`` crawls that site or directory
    listing, staying on its host; ``-a extensions=pdf,zip`` stores only such files (default: all but HTML).
    """

    name = "documents"

    def __init__(self, url: str | None = None, extensions: str | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.url = url
        self.extensions = {word.strip().lstrip(".").lower() for word in (extensions or "").split(",")} - {""}
        self.host = ""  # that of the first answer: the URL given may redirect
        self.origin: Origin | None = None
        self.seen: set[str] = set()
        self.files: list[dict[str, Any]] = []
        self.failures: list[str] = []

    @classmethod
    def from_crawler(cls, crawler: Crawler, *args: Any, **kwargs: Any) -> Self:
        """Return the spider, listening to what becomes of its items; end with one line about a wrong URL."""
        if not re.match(r"https?://[\w\[]", kwargs.get("url", "http://own"), re.IGNORECASE):
            raise SystemExit(f"url={kwargs['url']}: give an address that starts with http:// or https://")
        spider = super().from_crawler(crawler, *args, **kwargs)
        crawler.signals.connect(spider.note, signals.item_scraped)
        return spider

    # -- walking ----------------------------------------------------------------------------

    async def start(self) -> AsyncIterator[Request]:
        """Yield the request for the first page."""
        if self.url is None:
            self.origin = Origin(PROJECT / ".origin")
            self.url = self.origin.url
            if self.origin.moved:
                self.logger.warning(
                    "The last run's port is taken: the documents are at %s now and will be fetched again",
                    self.url,
                )
        print(f"Storing what {self.url} links to …", flush=True)
        yield Request(self.url, self.parse, errback=self.no_page)

    def parse(self, response: Response) -> Iterator[Any]:
        """Yield an item for each file the page links to, and a request for each further page."""
        self.host = self.host or urlsplit(response.url).netloc
        if not isinstance(response, HtmlResponse):
            yield from self.file(response.url)
            return
        for url in self.links(response):
            extension = extension_of(url)
            if extension and extension not in PAGES:
                yield from self.file(url)
            elif extension or urlsplit(url).path.endswith("/"):
                yield Request(url, self.parse, errback=self.no_page)
                if extension in self.extensions:
                    yield from self.file(url)
            else:  # README or a folder without its slash: the head tells
                yield Request(url, self.parse_head, method="HEAD", errback=self.no_head)

    def parse_head(self, response: Response) -> Iterator[Any]:
        """Yield what stands behind a URL without an extension: a page, or a file."""
        if b"html" in (response.headers.get("Content-Type") or b"").lower():
            yield Request(response.url, self.parse, errback=self.no_page)
        else:
            yield from self.file(response.url)

    def no_head(self, failure: Any) -> Iterator[Any]:
        """Yield the file whose head could not be had; if it cannot be had either, its item says why."""
        yield from self.file(failure.request.url)

    def no_page(self, failure: Any) -> None:
        """Remember a page that could not be had."""
        response = getattr(failure.value, "response", None)
        reason = f"status {response.status}" if response is not None else failure.getErrorMessage()
        self.failures.append(f"{reason.rstrip('.')}: {failure.request.url}")

    def file(self, url: str) -> Iterator[dict[str, list[Any]]]:
        """Yield the item of a file, if it is on this host and of a wanted kind."""
        wanted = not self.extensions or extension_of(url) in self.extensions
        if wanted and urlsplit(url).netloc == self.host:
            yield {"file_urls": [url], "files": []}

    def links(self, page: HtmlResponse) -> Iterator[str]:
        """Yield each URL the page links to that is to be looked at and was not seen before."""
        for href in page.css("a::attr(href)").getall():
            try:
                url = page.urljoin(href.strip()).partition("#")[0]
                inside = self.is_inside(url, page.url)
            except ValueError:  # what stands there is no URL
                continue
            if inside and url not in self.seen:
                self.seen.add(url)
                yield url

    def is_inside(self, url: str, page: str) -> bool:
        """Tell whether a link stays on its page's host and leads neither upwards nor to another sorting."""
        link, here = urlsplit(url), urlsplit(page)
        if link.scheme not in {"http", "https"} or {link.netloc, here.netloc} != {self.host}:
            return False
        if link.path == here.path and link.query:
            return not {part.partition("=")[0] for part in re.split("[&;]", link.query)} <= SORT_KEYS
        return not (link.path.endswith("/") and here.path.startswith(link.path))

    # -- telling ----------------------------------------------------------------------------

    def note(self, item: dict[str, Any]) -> None:
        """Remember what became of an item's files."""
        self.files += item["files"]
        stored = {entry["url"] for entry in item["files"]}
        field = self.settings.get("STREAMING_FAILURES_FIELD")
        told = {entry["url"]: str(entry["reason"]) for entry in item.get(field, [])}
        self.failures += [
            f"{told.get(url, 'the log says why')}: {url}" for url in item["file_urls"] if url not in stored
        ]

    def closed(self, reason: str) -> None:
        """Stop the origin and print the table."""
        if self.origin is not None:
            self.origin.stop()
        rows = self.table()
        width = max(len(name) for name, _ in rows)
        print(*(f"{name:<{width}}  {value}" for name, value in rows), sep="\n")
        for line in self.failures[:5]:
            print(f"{'':<{width}}  {line}")
        if len(self.failures) > 5:
            print(f"{'':<{width}}  and {len(self.failures) - 5} more")
        if reason != "finished":
            print(f"stopped early ({reason}): run it again to go on")

    def table(self) -> list[tuple[str, str]]:
        """Return the rows of the table: from the crawl's statistics and the entries of the items."""
        stats = self.crawler.stats
        assert stats is not None
        received = stats.get_value("streaming/bytes_received")
        streamed = received is not None or not any(file["status"] == "downloaded" for file in self.files)
        resumed = [file["resumed_from"] for file in self.files if file.get("resumed_from")]
        store = self.settings.get("FILES_STORE") or ""
        return [
            ("files", f"{len(self.files)} ({in_words(sum(file.get('size', 0) for file in self.files))})"),
            ("transferred", in_words(received or 0) if streamed else "not counted: streaming is off"),
            ("resumed", f"{len(resumed)} ({in_words(sum(resumed))} kept)"),
            ("unchanged", str(sum(file["status"] != "downloaded" for file in self.files))),
            ("deduplicated", str(stats.get_value("streaming/deduplicated", 0))),
            ("failed", str(len(self.failures))),
            ("stored in", store if "://" in store else str(Path(store).resolve())),
        ]


class Origin:
    """The example's own origin: a child process that ends when this one does, however that happens."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        port = folder / "port"
        last = port.read_text().strip() if port.exists() else ""
        wanted = last if last.isdecimal() else str(FIRST_PORT)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "documents.origin", str(folder / "documents"), "--port", wanted],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            self.stop()
            raise RuntimeError("the example's origin did not start; what it printed above says why")
        now = str(urlsplit(self.url).port)
        self.moved = bool(last) and now != last
        port.write_text(now)

    def stop(self) -> None:
        """End the child: it reads its standard input and leaves when that is closed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def extension_of(url: str) -> str:
    """Return what follows the last dot of the URL's last segment, lower case; empty if nothing does."""
    path = unquote(urlsplit(url).path)
    return "" if path.endswith("/") else PurePosixPath(path).suffix[1:].lower()


def in_words(size: int) -> str:
    """Return a number of bytes as people say it."""
    if size < 1000:
        return f"{size} B"
    value = float(size)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 1000:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"
