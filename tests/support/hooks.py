"""Middlewares and pipelines of users, for crawls with this package and without it.

Each acts on the URLs that name it only, so that one crawl has all of them. What may live here: such
components, the same for both crawls of a comparison (``support.beside``).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath
from typing import ClassVar
from urllib.parse import parse_qsl, urlsplit

from itemadapter import ItemAdapter, is_item
from scrapy.exceptions import IgnoreRequest
from scrapy.http import Response, TextResponse
from scrapy.pipelines.files import FilesPipeline

from scrapy_streaming import StreamingFilesPipeline

try:  # where it is since Scrapy 2.17
    from scrapy.pipelines.media import FileException
except ImportError:
    from scrapy.pipelines.files import FileException


def changed(body: bytes) -> bytes:
    """What the middlewares make of a body, in the way that decryption or a watermark does."""
    return b"made of " + body[::-1]


def note(**facts: object) -> None:
    """Write a note beside the crawl's."""
    from support.spiders import write  # there only within a crawl

    write("notes.jsonl", facts)


def look(place: str, response: Response) -> None:
    """Note all that is to be seen of a response."""
    text = isinstance(response, TextResponse)
    note(
        looked=place,
        url=response.url,
        status=response.status,
        length=len(response.body),
        sha1=hashlib.sha1(response.body).hexdigest(),
        kind=type(response).__name__.replace("Streamed", ""),
        text=response.text[:40] if text else None,
        encoding=response.encoding if text else None,
        title=response.css("title::text").get() if response.url.endswith("html") else None,
        fields=sorted({"Content-Length", "Content-Range", "Content-Type"} & set(_names(response))),
    )


def _names(response: Response) -> list[str]:
    return [name.decode() for name in response.headers]


class Middleware:
    """Acts on URLs that name its place, on one side or the other of what plans the requests."""

    place = ""

    def __init__(self, *, late):
        self.late = late

    @classmethod
    def from_crawler(cls, crawler):
        return cls(late=crawler.settings.getbool("LATE"))

    def process_response(self, request, response):
        path = urlsplit(response.url).path
        if "/look" in path:
            look(self.place, response)
        if f"/{self.place}/late" in path:  # a project that begins to change what it has stored already
            return act("replace" if self.late else "nothing", request, response)
        place, _, name = path.strip("/").partition("/")
        return act(re.match("[a-z]+", name).group(), request, response) if place == self.place else response


def act(what, request, response):
    """Return what a middleware makes of a response: another, the same, or another request."""
    match what:
        case "replace":
            return response.replace(body=changed(response.body))
        case "new":
            return Response(response.url, body=changed(response.body))
        case "emptied":
            return response.replace(body=b"")
        case "failed":
            return response.replace(status=503)
        case "same":
            response = response.copy().replace(headers={"X-Other": "1"}, flags=["other"])
            return response.replace(cls=TextResponse, encoding="latin-1")
        case "nothing":
            return response
        case "rewrapped":
            return Response(response.url, body=response.body, headers=response.headers)
    if response.body and b"please log in" not in response.body:
        return response
    times = request.meta.get("times", 0) + 1
    if times > 3:
        raise IgnoreRequest
    return request.replace(dont_filter=True, meta={**request.meta, "times": times})


class Above(Middleware):
    place = "above"


class Below(Middleware):
    place = "below"


class Hooks:
    """A user's pipeline, whatever its base."""

    def file_path(self, request, response=None, info=None, *, item=None):
        path, name = urlsplit(request.url).path, PurePosixPath(urlsplit(request.url).path).name
        if "/disposition" in path:
            field = b"" if response is None else response.headers.get("Content-Disposition", b"")
            named = re.search(rb'filename="(.+)"', field)
            return f"named/{named.group(1).decode()}" if named else f"unnamed/{name}"
        if "/content" in path:
            return f"content/{hashlib.sha1(response.body).hexdigest() if response else 'none'}"
        if "/folder" in path:
            return f"{item['folder']}/{name}"
        return super().file_path(request, response=response, info=info, item=item)

    async def media_downloaded(self, response, request, info, *, item=None):
        if "/media/replace" in request.url:
            response = response.replace(body=changed(response.body))
        entry = await super().media_downloaded(response, request, info, item=item)
        if "/look" in request.url:
            look("media_downloaded", response)
        return entry

    def file_downloaded(self, response, request, info, *, item=None):
        if "/look" in request.url:
            look("file_downloaded", response)
        if "/hook/refused" in request.url and b"please log in" in response.body:
            msg = "a login page"
            raise FileException(msg)
        if "/hook/replace" in request.url:
            response = response.replace(body=changed(response.body))
        return super().file_downloaded(response, request, info, item=item)

    def item_completed(self, results, item, info):
        item = super().item_completed(results, item, info)
        note(completed=ItemAdapter(item).get("file_urls"), ok=[ok for ok, _ in results])
        return item


class OverStock(Hooks, FilesPipeline):
    pass


class OverStreaming(Hooks, StreamingFilesPipeline):
    pass


class PlannedRequest:
    """Asks for files in many ways: what each URL's query says."""

    META: ClassVar = {"slot": "download_slot", "cookie": "cookiejar"}

    def get_media_requests(self, item, info):
        for request in super().get_media_requests(item, info):
            given = dict(parse_qsl(urlsplit(request.url).query))
            yield request.replace(
                priority=int(given.get("priority", 0)),
                cookies={"own": given["cookie"]} if "cookie" in given else None,
                headers={"Accept-Encoding": given["coding"]} if "coding" in given else None,
                meta={key: given[name] for name, key in self.META.items() if name in given},
            )


class AskingStock(PlannedRequest, FilesPipeline):
    pass


class AskingStreaming(PlannedRequest, StreamingFilesPipeline):
    pass


class Last:
    """The last pipeline: returns what the job says instead of some items."""

    def process_item(self, item):
        adapter = ItemAdapter(item) if is_item(item) else {}
        returned = {"none": None, "text": "a text", "number": 7, "bad": {"files": 3}}
        return returned.get(adapter.get("becomes"), item)


class CountsHashing:
    """Counts the files that are adopted by reading them."""

    def __init__(self, crawler):
        from scrapy_streaming.storage.blobs.adoption import ForeignFile

        true = ForeignFile.hash

        def hashed(*given):
            crawler.stats.inc_value("test/hashed")
            return true(*given)

        ForeignFile.hash = hashed

    @classmethod
    def from_crawler(cls, crawler):
        return cls(crawler)


class ByPath(StreamingFilesPipeline):
    """Names files by the path of their URL: the token in its query changes each time."""

    def file_path(self, request, response=None, info=None, *, item=None):
        return f"full{urlsplit(request.url).path}"


class Failing:
    """Hooks with a mistake, a refusal and a name outside the store, by the URL."""

    def file_path(self, request, response=None, info=None, *, item=None):
        if request.url.endswith("leaves"):
            return "../../leaves"
        return super().file_path(request, response=response, info=info, item=item)

    def file_downloaded(self, response, request, info, *, item=None):
        if request.url.endswith("mistake"):
            return {}["no such key"]
        if request.url.endswith("timeout"):
            msg = "the hook's own"
            raise TimeoutError(msg)
        if request.url.endswith("refused"):
            msg = "a login page"
            raise FileException(msg)
        return super().file_downloaded(response, request, info, item=item)

    def item_completed(self, results, item, info):
        item = super().item_completed(results, item, info)
        note(completed=ItemAdapter(item).get("failures"))
        return item


class FailingStock(Failing, FilesPipeline):
    pass


class FailingStreaming(Failing, StreamingFilesPipeline):
    pass
