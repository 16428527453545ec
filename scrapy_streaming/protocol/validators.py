"""Validators: what a response said about its representation, and what may be sent back.

RFC 9110 §8.8 and §13.1. The rules that are easy to get wrong stand here alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from scrapy_streaming.protocol.fields import MAX_FIELD, EntityTag, parse_http_date

#: Seconds that Date must lie after Last-Modified before the date counts as strong. The RFC
#: asks for one (§8.8.2.2); browsers demand a minute, and so do we.
STRONG_DATE_AGE: Final = 60


def _echoable(value: str) -> bool:
    """Whether *value* may ever be sent back in a request field (E6, F22)."""
    return 0 < len(value) <= MAX_FIELD and value.isascii() and value.isprintable()


@dataclass(frozen=True, slots=True)
class Validators:
    """The validators of one response.

    ``last_modified`` and ``date`` are kept byte for byte: If-Range compares dates exactly
    (RFC 9110 §13.1.5) and some servers compare If-Modified-Since exactly too.
    """

    etag: EntityTag | None = None
    last_modified: str | None = None
    date: str | None = None

    @classmethod
    def from_fields(
        cls, etags: Sequence[str], last_modified: Sequence[str], date: Sequence[str]
    ) -> Validators:
        """Return what the fields of one response allow to be used.

        R39: two different ETag fields, or one that is no entity-tag, leave no tag, and then
        no strong date either: a client that was given a tag must not fall back to the date in
        If-Range (§13.1.5). Last-Modified stays good for If-Modified-Since.
        """
        tags = {EntityTag.parse(value) for value in etags}
        tag = tags.pop() if len(tags) == 1 else None
        modified = last_modified[0] if len(set(last_modified)) == 1 else None
        moment = date[0] if len(set(date)) == 1 else None
        if etags and tag is None:
            moment = None
        return cls(
            tag,
            modified if modified is not None and _echoable(modified) else None,
            moment if moment is not None and _echoable(moment) else None,
        )

    @property
    def strong_etag(self) -> EntityTag | None:
        """The entity-tag, if it is a strong one."""
        return self.etag if self.etag is not None and not self.etag.weak else None

    @property
    def strong_date(self) -> bool:
        """Whether Last-Modified may serve as a strong validator (R72, RFC 9110 §8.8.2.2)."""
        if self.last_modified is None or self.date is None:
            return False
        modified, date = parse_http_date(self.last_modified), parse_http_date(self.date)
        return modified is not None and date is not None and date - modified >= STRONG_DATE_AGE

    def if_range(self) -> str | None:
        """Return the value If-Range may carry, or ``None`` if there is none.

        A strong tag; else, only when there is no tag at all, a strong date (§13.1.5).
        """
        if self.strong_etag is not None:
            return str(self.strong_etag)
        if self.etag is None and self.strong_date:
            return self.last_modified
        return None

    def conditional_fields(self) -> dict[str, str]:
        """Return the fields of a conditional GET for the whole representation (§13.1.2, §13.1.3)."""
        fields = {}
        if self.etag is not None:
            fields["If-None-Match"] = str(self.etag)
        if self.last_modified is not None:
            fields["If-Modified-Since"] = self.last_modified
        return fields
