"""The request of a job, as the ledger records it, without credentials in its URL.

What may live here: the values that identify a job, and those needed to finish it in a later crawl.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final, Self

from scrapy_streaming.exceptions import UnusableId
from scrapy_streaming.protocol.jobs import request_hash
from scrapy_streaming.redaction import url_without_userinfo

_UNSTORABLE: Final = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Repeat:
    """What a later crawl needs to finish an unfinished job by a plain GET (C4).

    ``plain``: whether a plain GET is the same request; if not, the other fields are ``None``. ``url`` is
    the requested URL without userinfo; its fragment may be the digest that the caller expects. ``name`` is
    the path of the file below the store's root: ``""`` for the one that ``FilesPipeline`` derives from
    ``url``, ``None`` if it depends on the response.
    """

    plain: bool
    url: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.url is not None:
            object.__setattr__(self, "url", url_without_userinfo(self.url))


@dataclass(frozen=True, slots=True)
class JobRequest:
    """The request of a job.

    ``url`` is the canonical URL without userinfo. ``request_hash`` is a hash of method, selecting fields
    and body: two of them under one key are a conflict (I18). ``repeat`` is what a later crawl needs to
    finish the job, ``None`` if that is not known. Raises ``UnusableId`` for an id that no database can
    store.
    """

    work_id: str
    artifact_id: str
    url: str
    request_hash: str
    repeat: Repeat | None = None

    @classmethod
    def by_key(cls, key: str) -> Self:
        """Return the request of a job that has a key and no URL; the key also serves as the artifact id."""
        return cls("", key, "", request_hash("GET", ""))

    def __post_init__(self) -> None:
        for name in ("work_id", "artifact_id"):
            if _UNSTORABLE.search(value := getattr(self, name)):
                msg = f"{name}={value!r} cannot be stored: it contains NUL or half a surrogate pair"
                raise UnusableId(msg)
        object.__setattr__(self, "url", url_without_userinfo(self.url))

    @classmethod
    def plain(cls, work_id: str, url: str) -> JobRequest:
        """Return the request of a job that is a plain GET of the canonical *url*."""
        url = url_without_userinfo(url)
        return cls(work_id, "", url, request_hash("GET", url))

    @property
    def url_key(self) -> str:
        """The key of the stored representation: SHA-256 of URL and artifact id, 64 hex digits.

        Two artifacts may share a URL and nothing else: a 304 for one says nothing about the other.
        """
        text = f"{self.url}\n{self.artifact_id}" if self.artifact_id else self.url
        return hashlib.sha256(text.encode("utf-8")).hexdigest()
