"""Validators: what a response says about its representation, and what may be sent back.

What may live here: rules of RFC 9110 §8.8 and §13.1, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from scrapy_streaming.protocol.fields import MAX_FIELD, EntityTag, parse_http_date

#: Seconds that Date must lie after Last-Modified before the date counts as strong. The RFC
#: asks for one (§8.8.2.2); browsers demand a minute, and so does this package.
STRONG_DATE_AGE: Final = 60
#: Seconds after Last-Modified within which a server may change a file and keep its tag (R75): tags made
#: of the date count whole seconds. git calls such an entry of its index racy.
RACY: Final = 2

_RUNS = re.compile(r"[0-9a-z]{6,64}", re.ASCII)
_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
_BASES: Final = {base: frozenset(_DIGITS[:base]) for base in (10, 16, 36)}
#: Digits of nanoseconds in decimal.
_LONGEST: Final = 19


def _echoable(value: str) -> bool:
    """Whether *value* may be sent back in a request field (E6, F22)."""
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
        """Return the validators that the fields of one response make up.

        R39: two different ETag fields, or one that is no entity-tag, leave no tag, and no
        strong date either: a client that got a tag must not fall back to the date in If-Range (§13.1.5).
        Last-Modified can still be sent in If-Modified-Since.
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
        """The entity-tag, if it is strong."""
        return self.etag if self.etag is not None and not self.etag.weak else None

    @property
    def strong_date(self) -> bool:
        """Whether Last-Modified may serve as a strong validator (R72, RFC 9110 §8.8.2.2)."""
        if self.last_modified is None or self.date is None:
            return False
        modified, date = parse_http_date(self.last_modified), parse_http_date(self.date)
        return modified is not None and date is not None and date - modified >= STRONG_DATE_AGE

    @property
    def just_modified(self) -> bool:
        """Whether the next change of the representation may leave its validators as they are (R75).

        It was modified less than ``RACY`` seconds before it was sent, or without a Date, and its only
        validator is the date, or a tag made of the date.
        """
        modified = None if self.last_modified is None else parse_http_date(self.last_modified)
        date = None if self.date is None else parse_http_date(self.date)
        if modified is None or (date is not None and date - modified >= RACY):
            return False
        return date is not None if self.etag is None else made_of_date(self.etag, modified)

    def if_range(self) -> str | None:
        """Return the value for If-Range, or ``None`` if there is none.

        A strong tag; without any tag a strong date (§13.1.5).
        """
        if self.strong_etag is not None:
            return str(self.strong_etag)
        if self.etag is None and self.strong_date:
            return self.last_modified
        return None

    def unmodified_since(self) -> str | None:
        """Return the date for If-Unmodified-Since beside Range, or ``None`` (R5, RFC 9110 §13.1.4).

        Only for a weak tag with a strong date: with a strong tag, or with none, If-Range is better.
        """
        weak = self.etag is not None and self.etag.weak
        return self.last_modified if weak and self.strong_date else None

    def conditional_fields(self) -> dict[str, str]:
        """Return the fields of a conditional GET for the whole representation (§13.1.2, §13.1.3)."""
        fields = {}
        if self.etag is not None:
            fields["If-None-Match"] = str(self.etag)
        if self.last_modified is not None:
            fields["If-Modified-Since"] = self.last_modified
        return fields


def made_of_date(tag: EntityTag, modified: int) -> bool:
    """Return whether *tag* contains the time *modified* (seconds since the epoch).

    nginx writes the seconds in hexadecimal, Apache the microseconds, Caddy the nanoseconds to base 36
    with the size behind them, others decimal numbers, or milliseconds.
    """
    runs = _RUNS.findall(tag.opaque.lower())
    pieces = (run[at:end] for run in runs for at in range(len(run)) for end in range(at + 6, len(run) + 1))
    return any(_stands_for(piece, modified) for piece in pieces if len(piece) <= _LONGEST)


def _stands_for(piece: str, modified: int) -> bool:
    """Return whether *piece* is a time within that second, in any base and unit that tags are written in."""
    return any(
        int(piece, base) // unit == modified
        for base, digits in _BASES.items()
        if digits.issuperset(piece)
        for unit in (1, 10**3, 10**6, 10**9)
    )
