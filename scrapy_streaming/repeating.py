"""Which requests a plain GET of another crawl repeats, and what it needs for that (C4).

What may live here: reading a request, the settings and the spider of its crawl, and the crawl's cookies.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Final
from urllib.parse import urldefrag

from scrapy import Request
from scrapy.crawler import Crawler
from scrapy.downloadermiddlewares.cookies import CookiesMiddleware
from scrapy.settings import SETTINGS_PRIORITIES

from scrapy_streaming.context import DownloadContext
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.redaction import url_without_userinfo
from scrapy_streaming.request_fields import fields_to_send
from scrapy_streaming.storage.job_request import Repeat

#: Of a request that a plain GET does not repeat nothing else is recorded.
UNLIKE: Final = Repeat(plain=False)
#: What a spider may have of its own that all its requests are sent with.
_OF_SPIDERS: Final = ("http_user", "http_pass", "user_agent")
_SETTINGS: Final = (
    "DEFAULT_REQUEST_HEADERS",
    "USER_AGENT",
    "HTTPAUTH_USER",
    "HTTPAUTH_PASS",
    "DOWNLOADER_MIDDLEWARES",
)
#: What a request's meta may have that another crawl's would not be sent with.
_OF_META: Final = ("proxy", "ftp_user", "ftp_password")
#: What HttpAuth reads of a request's meta.
_AUTH_META: Final = ("http_user", "http_pass")


class Repeats:
    """Finds the requests of a crawl that are plain: a GET with no body, and no field or cookie of its own.

    Those that all requests of a crawl are sent with do not count, unless they come from the spider: the
    crawl of ``scrapy streaming resume`` has the project's settings and another spider.
    """

    def __init__(self, crawler: Crawler) -> None:
        self._crawler = crawler

    def of(self, request: Request, expected: Digest | None, path: str | None, *, by_url: bool) -> Repeat:
        """Return what a later plain GET needs to repeat *request*, which is still to be sent.

        *expected* is the digest that its bytes are to have; it goes into the URL's fragment if it does
        not stand there. *path* is what ``file_path()`` gave; *by_url*: stock makes it of the URL, or, with
        no path, nothing is named.
        """
        if not self._is_plain(request):
            return UNLIKE
        url = _asked_url(request.url, expected)
        if by_url and (url == request.url or not path):
            return Repeat(plain=True, url=url, name="")
        return Repeat(plain=True, url=url, name=os.fspath(path) if path else None)

    def _is_plain(self, request: Request) -> bool:
        if request.method != "GET" or request.body or request.cookies or self._of_spider:
            return False
        if url_without_userinfo(request.url) != request.url or self._cookies_of(request):
            return False
        meta = request.meta
        if any(meta.get(name) for name in _OF_META):
            return False
        if not request.headers and not any(meta.get(name) for name in _AUTH_META):
            return True
        return self._fields(request) == self._fields(Request(request.url))

    def _fields(self, request: Request) -> dict[str, str]:
        return fields_to_send(request, self._crawler.settings, self._crawler.spider)

    @cached_property
    def _of_spider(self) -> bool:
        """Whether the spider, by attributes or ``custom_settings``, has fields or middlewares of its own."""
        settings, spider = self._crawler.settings, self._crawler.spider
        own = SETTINGS_PRIORITIES["spider"]
        return any(settings.getpriority(name) == own for name in _SETTINGS) or any(
            getattr(spider, name, None) for name in _OF_SPIDERS
        )

    @cached_property
    def _cookies(self) -> CookiesMiddleware | None:
        return self._crawler.get_downloader_middleware(CookiesMiddleware)

    def _cookies_of(self, request: Request) -> bool:
        """Whether the crawl has cookies that *request* will be sent with."""
        if self._cookies is None or request.meta.get("dont_merge_cookies"):
            return False
        jar = self._cookies.jars.get(request.meta.get("cookiejar"))
        if jar is None or not any(True for _ in jar):
            return False
        probe = Request(request.url)
        jar.add_cookie_header(probe)
        return "Cookie" in probe.headers

    def is_unlike(self, request: Request, context: DownloadContext) -> bool:
        """Whether a request that was plain when its job was claimed is sent with what no plain GET has.

        That is a cookie that came meanwhile, or what a middleware set. What a redirect's own answer set
        another GET gets, too.
        """
        repeat = context.job.repeat
        if repeat is None or not repeat.plain or context.original_url not in ("", request.url):
            return False
        if "Cookie" in request.headers or self._cookies_of(request):
            return True
        given = request.headers.get("Authorization")
        return given is not None and given.decode("latin-1") != self._fields(Request(request.url)).get(
            "authorization"
        )


def _asked_url(url: str, expected: Digest | None) -> str:
    """Return *url* with the expected digest in its fragment."""
    if expected is None or url.partition("#")[2].lower() == f"sha256={expected.hex}":
        return url
    return f"{urldefrag(url)[0]}#sha256={expected.hex}"
