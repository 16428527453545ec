"""What a job asks for, as the ledger records it; credentials are removed from its URL here.

What may live here: the values that identify a job, and what is needed to finish it later.
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
    """What a later plain GET needs to finish a job that its own crawl left (C4).

    ``plain`` says whether such a GET would be the same request; if not, nothing else is recorded.
    ``url`` is the requested URL, without its userinfo; its fragment may be the digest that the caller
    expects. ``name`` is the path of the file below the store's root: ``""`` for the one that
    ``FilesPipeline`` makes of ``url``, ``None`` if it depends on a response.
    """

    plain: bool
    url: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.url is not None:
            object.__setattr__(self, "url", url_without_userinfo(self.url))


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a job asks for.

    ``url`` is the canonical URL, without its userinfo. ``request_hash`` stands for method, selecting
    fields and body: one key with two of them is a conflict (I18). ``repeat`` is what a later crawl
    needs to finish the job, ``None`` if that is unknown. Raises ``UnusableId`` for an
    id that no database can store.
    """

    work_id: str
    artifact_id: str
    url: str
    request_hash: str
    repeat: Repeat | None = None

    @classmethod
    def by_key(cls, key: str) -> Self:
        """Return the request of a job that is known by its key alone: the key stands for its URL, too."""
        return cls("", key, "", request_hash("GET", ""))

    def __post_init__(self) -> None:
        for name in ("work_id", "artifact_id"):
            if _UNSTORABLE.search(value := getattr(self, name)):
                msg = f"{name}={value!r} cannot be stored: it holds NUL or half a surrogate pair"
                raise UnusableId(msg)
        object.__setattr__(self, "url", url_without_userinfo(self.url))

    @classmethod
    def plain(cls, work_id: str, url: str) -> JobRequest:
        """Return the request for a plain GET of a canonical URL, which most are."""
        url = url_without_userinfo(url)
        return cls(work_id, "", url, request_hash("GET", url))

    @property
    def url_key(self) -> str:
        """The key of the stored representation: SHA-256 of URL and artifact id, 64 hex digits.

        Two artifacts may share a URL and nothing else: a 304 for one says nothing about the other.
        """
        text = f"{self.url}\n{self.artifact_id}" if self.artifact_id else self.url
        return hashlib.sha256(text.encode("utf-8")).hexdigest()
