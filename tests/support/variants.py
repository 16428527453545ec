"""One URL that stands for several representations: an origin that negotiates, projects that select.

What may live here: such an origin's answers, and the components of a project that sends selecting fields.
"""

from __future__ import annotations

from dataclasses import replace

from scrapy import Request
from scrapy.utils.request import fingerprint

from scrapy_streaming import StreamingFilesPipeline
from support.origin import Answer, Asked, Resource, Script, honest


def text_in(language: str) -> bytes:
    return f"what it says in {language or 'no language'}. ".encode() * 500


def by_language(vary: str = "", etag: str | None = None) -> Script:
    """Serve the first language asked for; both have one date, and each a tag unless *etag* is ""."""

    def answer(asked: Asked, _: Resource) -> Answer:
        language = asked.fields.get("accept-language", "").partition(",")[0]
        given = honest(asked, Resource(text_in(language), etag))
        return replace(given, fields=dict(given.pairs()) | ({"Vary": vary} if vary else {}))

    return answer


class CountsLanguage:
    """Scrapy's fingerprint, and the language with it."""

    def fingerprint(self, request):
        return fingerprint(request, include_headers=["Accept-Language"])


class InLanguage(StreamingFilesPipeline):
    """Asks for an item's files in its language, and keeps them apart."""

    def get_media_requests(self, item, info):
        for url in item["file_urls"]:
            yield Request(url, headers={"Accept-Language": item["language"]} if item["language"] else None)

    def file_path(self, request, response=None, info=None, *, item=None):
        return f"{item['language'] or 'plain'}/{request.url.rpartition('/')[2]}"


class WithToken(StreamingFilesPipeline):
    """Of URLs with a one-time token: the token names nothing."""

    def job_url(self, request, item=None):
        return request.url.partition("?")[0]
