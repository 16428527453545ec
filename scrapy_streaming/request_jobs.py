"""Which job a request asks for, which digest its bytes must have, and how long stored bytes are fresh.

What may live here: reading a request, the settings and the spider of its crawl. No input or output.
"""

from __future__ import annotations

import time
from functools import cached_property

from scrapy import Request
from scrapy.crawler import Crawler
from scrapy.utils.misc import load_object
from w3lib.url import canonicalize_url

from scrapy_streaming import results
from scrapy_streaming.context import DownloadContext
from scrapy_streaming.protocol.digests import Digest, expected_digest
from scrapy_streaming.protocol.jobs import StoredRepresentation, job_key, request_hash
from scrapy_streaming.redaction import url_without_userinfo
from scrapy_streaming.repeating import UNLIKE, Repeats
from scrapy_streaming.request_fields import fields_to_send
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.job_request import JobRequest, Repeat


class RequestJobs:
    """Reads what the requests of one crawl ask for."""

    def __init__(self, crawler: Crawler, settings: StreamingSettings) -> None:
        self._crawler = crawler
        self._settings = settings
        self._repeats = Repeats(crawler)

    def job(
        self, request: Request, item_work_id: str | None = None, url: str | None = None
    ) -> tuple[str, JobRequest]:
        """Return the job that *request* asks for: its key and what the ledger keeps of it.

        *url* names it, the request's own if not given. ``meta["streaming"]`` may give ``work_id`` and
        ``artifact_id``. A request that is no plain GET gets its own hash as artifact id: it is
        another job than the URL's (R73); one whose fingerprint differs from that of a bare
        request of its URL gets the fingerprint (ledger rule 6).
        """
        if url is not None and url != request.url:
            request = request.replace(url=url)
        given = request.meta.get("streaming")
        given = given if isinstance(given, dict) else {}
        plain = request.method == "GET" and not request.body
        work_id = given.get("work_id") or item_work_id or self._settings.work_id or self._spider_name()
        url = canonicalize_url(url_without_userinfo(request.url))  # credentials are stored nowhere (E7)
        hashed = request_hash(request.method, url, request.body)
        artifact_id = given.get("artifact_id") or ".".join(
            filter(None, ("" if plain else hashed, self.own_fingerprint(request)))
        )
        return job_key(work_id, artifact_id, url), JobRequest(work_id, artifact_id, url, hashed)

    def own_fingerprint(self, request: Request) -> str:
        """Return the request's fingerprint (hex) if a bare request has another one, else ``""``."""
        parts = (request.headers, request.meta, request.cookies, request.cb_kwargs, request.flags)
        if type(request) is Request and not any(parts):  # it is bare itself, as most are
            return ""
        fingerprinter = self._crawler.request_fingerprinter
        bare = Request(request.url, method=request.method, body=request.body)
        fingerprint = fingerprinter.fingerprint(request)
        return "" if fingerprint == fingerprinter.fingerprint(bare) else fingerprint.hex()

    def repeat(self, request: Request, expected: Digest | None, path: str, *, by_url: bool) -> Repeat:
        """Return what a later plain GET needs to finish what *request* asks for (C4).

        *path* is what ``file_path()`` gave; *by_url*: that is stock's own method.
        """
        if self.own_fingerprint(request):
            return UNLIKE
        if self._settings.link_mode == "none":
            return self._repeats.of(request, expected, None, by_url=True)
        return self._repeats.of(request, expected, path, by_url=by_url)

    def is_unlike(self, request: Request, context: DownloadContext) -> bool:
        """Whether a request that was plain when its job was claimed is sent with what no plain GET has."""
        return self._repeats.is_unlike(request, context)

    def fields_to_send(self, request: Request) -> dict[str, str]:
        """Return the fields that a request which is still to be sent will have, by lower-case name."""
        return fields_to_send(request, self._crawler.settings, self._crawler.spider)

    def answers(self, stored: StoredRepresentation, expected: Digest | None, request: Request) -> bool:
        """Whether what is stored may be given for *request* without asking the server (E9, R40)."""
        foreseen = bool(stored.vary) and not self._foreign_middlewares
        fields = self.fields_to_send(request) if foreseen else None
        return results.answers(stored, expected, fields)

    def refresh_before(self, expires: float) -> float | None:
        """Return since when bytes must be stored to be fresh; see ``results.refresh_before`` (R7)."""
        return results.refresh_before(self._settings.revalidate, expires, time.time())

    @cached_property
    def offline(self) -> bool:
        """Whether no request may leave, only what the HTTP cache holds may be used."""
        settings = self._crawler.settings
        return settings.getbool("HTTPCACHE_ENABLED") and settings.getbool("HTTPCACHE_IGNORE_MISSING")

    @cached_property
    def _foreign_middlewares(self) -> bool:
        """Whether a downloader middleware of another package is on: it may set any field."""
        wanted = self._crawler.settings.getwithbase("DOWNLOADER_MIDDLEWARES").items()
        classes = [load_object(path) for path, order in wanted if order is not None]
        return any(cls.__module__.partition(".")[0] not in ("scrapy", "scrapy_streaming") for cls in classes)

    def _spider_name(self) -> str:
        return self._crawler.spider.name if self._crawler.spider is not None else ""


def expected_of(request: Request) -> Digest | None:
    """Return the digest that the request's meta or its URL's fragment expects.

    Raises ``ValueError`` if it cannot be read, or two of them disagree.
    """
    given = request.meta.get("streaming")
    digest = given.get("digest") if isinstance(given, dict) else None
    return expected_digest(digest, request.meta.get("expected_checksum"), request.url.partition("#")[2])
