"""What a user might bring: handlers, pipelines."""

from __future__ import annotations

import urllib.request
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from scrapy.core.downloader.handlers.http11 import HTTP11DownloadHandler
from scrapy.http import Headers
from scrapy.pipelines.files import FilesPipeline
from scrapy.responsetypes import responsetypes
from scrapy.utils.asyncio import run_in_thread

from scrapy_streaming import StreamingFilesPipeline


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


def own_path(request):
    return "mine/" + unquote(PurePosixPath(urlsplit(request.url).path).as_posix()).strip("/")


class OwnPath(StreamingFilesPipeline):
    def file_path(self, request, response=None, info=None, *, item=None):
        return own_path(request)


class SaysStreaming(StreamingFilesPipeline):
    def get_media_requests(self, item, info):
        for request in super().get_media_requests(item, info):
            request.meta["streaming"] = True
            yield request


class StockOwnPath(FilesPipeline):
    def file_path(self, request, response=None, info=None, *, item=None):
        return own_path(request)


class Crashing(StreamingFilesPipeline):
    """Fails after a body is whole on disk, before it is published."""

    async def file_downloaded(self, response, request, info, *, item=None):
        raise RuntimeError("the power is gone")
