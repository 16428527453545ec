"""What a job asks for, as it goes into the ledger. Credentials never do: its URL loses its userinfo here."""

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

    ``plain`` says whether such a GET would be the same request; of one that would not, nothing else is
    recorded. ``url`` is the one that was asked for, its userinfo taken out at once; its fragment may be
    the digest that the caller expects. ``name`` is the path below the store's root that the file is to
    have: ``""`` for the one that ``FilesPipeline`` makes of ``url``, ``None`` if it is not known
    without a response.
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

    ``url`` is the canonical URL; its userinfo is taken out at once. ``request_hash`` stands for
    method, selecting fields and body: a key asked for with two of them is a conflict (I18). ``repeat``
    is what a later crawl needs to finish it, ``None`` if nobody looked. Raises ``UnusableId`` for an
    id that no database can store.
    """

    work_id: str
    artifact_id: str
    url: str
    request_hash: str
    repeat: Repeat | None = None

    @classmethod
    def by_key(cls, key: str) -> Self:
        """Return what is recorded of a job of which its key alone is known: it names itself."""
        return cls("", key, "", request_hash("GET", ""))

    def __post_init__(self) -> None:
        for name in ("work_id", "artifact_id"):
            if _UNSTORABLE.search(value := getattr(self, name)):
                msg = f"{name}={value!r} cannot be stored: it holds NUL or half a surrogate pair"
                raise UnusableId(msg)
        object.__setattr__(self, "url", url_without_userinfo(self.url))

    @classmethod
    def plain(cls, work_id: str, url: str) -> JobRequest:
        """Return what a plain GET of a canonical URL asks for, as most requests are."""
        url = url_without_userinfo(url)
        return cls(work_id, "", url, request_hash("GET", url))

    @property
    def url_key(self) -> str:
        """The name of what is stored of this URL: SHA-256 of it and the artifact's id, 64 hex digits.

        Two artifacts share a URL and nothing else: a 304 to the one says nothing of the other.
        """
        text = f"{self.url}\n{self.artifact_id}" if self.artifact_id else self.url
        return hashlib.sha256(text.encode("utf-8")).hexdigest()
