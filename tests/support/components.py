"""What a project might bring: add-ons, handlers, middlewares, pipelines and fingerprinters.

What may live here: components that crawls in processes of their own load by path; no helpers of tests.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import urllib.request
from contextlib import closing
from io import BytesIO
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from scrapy import Request
from scrapy.core.downloader.handlers.http11 import HTTP11DownloadHandler
from scrapy.exceptions import NotConfigured
from scrapy.http import Headers, Response
from scrapy.pipelines.files import FilesPipeline
from scrapy.responsetypes import responsetypes
from scrapy.utils.asyncio import run_in_thread
from scrapy.utils.defer import deferred_from_coro
from scrapy.utils.misc import build_from_crawler, load_object
from scrapy.utils.request import fingerprint

from scrapy_streaming import StreamingFilesPipeline, middleware
from scrapy_streaming.exceptions import WriteFailed
from scrapy_streaming.handlers import twisted_tap
from scrapy_streaming.runtime import event_loop, upkeep
from support.crawl import wait_until


class MyHandler(HTTP11DownloadHandler):
    """A user's subclass of Scrapy's handler."""

    async def download_request(self, request):
        self._crawler.stats.inc_value("test/my_handler")
        return await super().download_request(request)


class ForeignHandler:
    """A handler of another kind: urllib in a thread."""

    lazy = True

    @classmethod
    def from_crawler(cls, crawler):
        return cls()

    async def download_request(self, request):
        return await run_in_thread(self._fetch, request)

    def _fetch(self, request):
        fields = {k.decode(): b", ".join(v).decode() for k, v in request.headers.items()}
        wanted = urllib.request.Request(request.url, headers=fields, method=request.method)
        try:
            answer = urllib.request.urlopen(wanted)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            body = answer.read()
            headers = Headers(answer.headers.items())
            kind = responsetypes.from_args(headers=headers, url=request.url, body=body)
            return kind(request.url, status=answer.status, headers=headers, body=body)

    async def close(self):
        pass


class OldHandler:
    """One as before Scrapy 2.13: answers by a Deferred, is given the spider, and closes at once."""

    def __init__(self, settings, crawler=None):
        self._inner = ForeignHandler()

    @classmethod
    def from_crawler(cls, crawler):
        return cls(crawler.settings, crawler)

    def download_request(self, request, spider):
        spider.crawler.stats.inc_value("test/old_handler")
        return deferred_from_coro(self._inner.download_request(request))

    def close(self):
        return None


class NoHandler(ForeignHandler):
    """One that lacks what it needs."""

    lazy = False

    @classmethod
    def from_crawler(cls, crawler):
        crawler.stats.inc_value("test/no_handler")
        raise NotConfigured("its library is missing")


class Unconfigured(HTTP11DownloadHandler):
    """A user's subclass of Scrapy's handler that lacks what it needs."""

    lazy = True

    def __init__(self, crawler):
        crawler.stats.inc_value("test/no_handler")
        raise NotConfigured("its library is missing")


class Broken(HTTP11DownloadHandler):
    """One with a mistake."""

    lazy = True

    def __init__(self, crawler):
        crawler.stats.inc_value("test/no_handler")
        raise RuntimeError("its library is broken")


class LateHandlers:
    """Another project's add-on, whose handler wraps the one that is there."""

    def update_settings(self, settings):
        handlers = settings["DOWNLOAD_HANDLERS"]
        settings.set("TEST_INNER", settings.getwithbase("DOWNLOAD_HANDLERS")["http"], "addon")
        handlers.set("http", "support.components.Around", 100)


class Around:
    """Counts what goes through it to the handler that was there."""

    lazy = False

    def __init__(self, crawler):
        self.crawler = crawler
        self.inner = build_from_crawler(load_object(crawler.settings["TEST_INNER"]), crawler)

    @classmethod
    def from_crawler(cls, crawler):
        return cls(crawler)

    async def download_request(self, request):
        self.crawler.stats.inc_value("test/around")
        return await self.inner.download_request(request)

    async def close(self):
        await self.inner.close()


class LoopbackIsPublic:
    """Takes 127.0.0.1, and no other loopback address, for one of the public Internet."""

    def __init__(self):
        for module in (twisted_tap, middleware):
            module.is_public = "127.0.0.1".__eq__


class WithoutPsycopg:
    """A machine without the database's driver."""

    def __init__(self):
        sys.modules["psycopg"] = None


class RaisesTheEpoch:
    """Has a crawl raise the epoch at each heartbeat."""

    def __init__(self):
        upkeep.EPOCH_LASTS = 0.0


class Robbed(StreamingFilesPipeline):
    """Loses its lease once, between the look at a name and the completion."""

    robbed = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        blobs = self._runtime.storage.blobs
        self._adopt, blobs.adopt = blobs.adopt, self._rob_and_adopt

    def _rob_and_adopt(self, path, *, noted):
        if not self.robbed:
            self.robbed = True
            ledger = Path(self._runtime.settings.directory, "ledger.sqlite3")
            with closing(sqlite3.connect(ledger, timeout=10)) as connection, connection:
                connection.execute(
                    "UPDATE ss_job SET fence = fence + 1, lease_until = 1 WHERE state = 'leased'"
                )
        return self._adopt(path, noted=noted)


def own_path(request):
    return "mine/" + unquote(PurePosixPath(urlsplit(request.url).path).as_posix()).strip("/")


class OwnPath(StreamingFilesPipeline):
    def file_path(self, request, response=None, info=None, *, item=None):
        return own_path(request)


class CountsEditions:
    """A project's fingerprinter, by which an edition or a session is another file under the same URL."""

    def fingerprint(self, request):
        return fingerprint(request) + repr([request.meta.get(k) for k in ("edition", "cookiejar")]).encode()


class LogsIn:
    """A downloader middleware that sets a field of its own."""

    def process_request(self, request, spider=None):
        request.headers["Authorization"] = "Token of-the-project"


class Titled(StreamingFilesPipeline):
    """Names files by their item, and asks with what the item's ``ask`` says."""

    def get_media_requests(self, item, info):
        return [Request(url, **item.get("ask", {})) for url in item["file_urls"]]

    def file_path(self, request, response=None, info=None, *, item=None):
        return f"{item['title']}/{item['name']}"


class Disposed(StreamingFilesPipeline):
    """Names files by what the server calls them, where it has said that."""

    def file_path(self, request, response=None, info=None, *, item=None):
        if response is None:
            return "unnamed/" + request.url.rpartition("/")[2]
        return "named/" + response.headers["Content-Disposition"].decode()


class _Listed:
    """A ``file_path()`` that gives what the setting ``TEST_PATHS`` has for the last part of a URL."""

    def file_path(self, request, response=None, info=None, *, item=None):
        path = json.loads(self.crawler.settings["TEST_PATHS"])[request.url.rpartition("/")[2]]
        return PurePosixPath(path[5:]) if path.startswith("PATH:") else path


class OddPath(_Listed, StreamingFilesPipeline):
    pass


class StockOddPath(_Listed, FilesPipeline):
    pass


class SaysStreaming(StreamingFilesPipeline):
    def get_media_requests(self, item, info):
        for request in super().get_media_requests(item, info):
            request.meta["streaming"] = True
            yield request


class StockOwnPath(FilesPipeline):
    def file_path(self, request, response=None, info=None, *, item=None):
        return own_path(request)


class Dawdling(StreamingFilesPipeline):
    """Takes its time between the last byte and the publication: until ``go-on`` stands in the store.

    ``named`` there lists the digests that are given a name.
    """

    async def file_downloaded(self, response, request, info, *, item=None):
        store, blobs = Path(self.crawler.settings["FILES_STORE"]), self._runtime.storage.blobs
        name = blobs.name

        def note(digest, path, **how):
            with (store / "named").open("a") as stream:
                stream.write(f"{digest.hex}\n")
            return name(digest, path, **how)

        blobs.name = note
        (store / "dawdling").touch()
        await run_in_thread(wait_until, (store / "go-on").exists)
        return await super().file_downloaded(response, request, info, item=item)


class Private(StreamingFilesPipeline):
    """Asks for files with the user's own credentials."""

    def get_media_requests(self, item, info):
        fields = {"Authorization": "Bearer mine", "Cookie": "own=1", "X-Own": "yes"}
        return [Request(url, headers=fields) for url in item["file_urls"]]


class PrivateLogin(Private):
    """Asks so for one file."""

    def get_media_requests(self, item, info):
        private = super().get_media_requests(item, info)
        return [each if "login" in each.url else Request(each.url) for each in private]


class Posting(StreamingFilesPipeline):
    """Asks by POST for items that say so."""

    def get_media_requests(self, item, info):
        if "url" in item:
            return [Request(item["url"], method="POST", body=b"which")]
        return super().get_media_requests(item, info)


class Second(StreamingFilesPipeline):
    """A second pipeline over the same items."""


class KeepsItems:
    """A spider middleware nearer to the engine than this package's that keeps items of ``start()``."""

    def __init__(self, every):
        self.every = every

    @classmethod
    def from_crawler(cls, crawler):
        return cls(1 if crawler.settings["KEEPS"] == "all" else 2)

    async def process_start(self, start):
        number = 0
        async for each in start:
            number += 1
            if number % self.every:
                yield each


class Late:
    """An item pipeline before that of files. It takes two seconds; ``late`` in the store marks its begin."""

    def __init__(self, store):
        self.store = store

    @classmethod
    def from_crawler(cls, crawler):
        return cls(Path(crawler.settings["FILES_STORE"]))

    async def process_item(self, item):
        self.store.mkdir(exist_ok=True)
        (self.store / "late").touch()
        await event_loop.sleep(2)
        return item


class Crashing(StreamingFilesPipeline):
    """Fails after a body is whole on disk, before it is published."""

    async def file_downloaded(self, response, request, info, *, item=None):
        raise WriteFailed("the power is gone")


class OwnEncoding(StreamingFilesPipeline):
    """Asks in a coding of the user's own choice."""

    def get_media_requests(self, item, info):
        for request in super().get_media_requests(item, info):
            request.headers["Accept-Encoding"] = "gzip;q=0.5"
            yield request


class Rewrapping:
    """A downloader middleware that makes responses anew, as many do; of ``changed`` with other bytes."""

    def process_response(self, request, response):
        if "data:" in request.url:
            return response
        end = b"!" if "changed" in request.url else b""
        return Response(response.url, headers=response.headers, body=response.body + end, request=request)


class Persisting(StreamingFilesPipeline):
    """Stores by ``self.store``, as ``FilesPipeline``'s own hook does: other bytes for ``own``."""

    def file_downloaded(self, response, request, info, *, item=None):
        body = b"mine: " + response.body if "own" in request.url else response.body
        self.store.persist_file(self.file_path(request, response, info, item=item), BytesIO(body), info)
        return "of the hook"


class Picky(StreamingFilesPipeline):
    """Refuses a login page by any error that comes to mind."""

    def file_downloaded(self, response, request, info, *, item=None):
        if response.body.startswith(b"<h1>Log in"):
            raise ValueError("a login page")
        return super().file_downloaded(response, request, info, item=item)


class Heads(StreamingFilesPipeline):
    """Asks for heads where it should ask for files."""

    def get_media_requests(self, item, info):
        return [request.replace(method="HEAD") for request in super().get_media_requests(item, info)]


class Decrypting:
    """A downloader middleware whose new response has no field of the old one."""

    def process_response(self, request, response):
        return response if "data:" in request.url else Response(response.url, body=response.body[::-1])


class OwnMedia(StreamingFilesPipeline):
    """Hooks of the project's own that call none of the class's."""

    def media_failed(self, failure, request, info):
        raise failure.value

    async def media_downloaded(self, response, request, info, *, item=None):
        if request.url.endswith("own"):
            return {"url": request.url, "path": "own", "checksum": "", "status": "own"}
        return await super().media_downloaded(response, request, info, item=item)


class BadDisk(StreamingFilesPipeline):
    """Cannot look at what is stored."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._recorded.adopt = self._fail

    async def _fail(self, *_):
        raise OSError("Input/output error")
