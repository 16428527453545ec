"""HTTP field values as values: parse and print, by the grammar of RFC 9110 and RFC 9530.

A parser returns ``None`` for what the grammar does not allow; it never guesses. Values longer
than ``MAX_FIELD`` characters count as absent (E6).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import http_sf

from scrapy_streaming.protocol.digests import Digest

MAX_FIELD: Final = 1024

# RFC 9110 §8.8.3: etagc = %x21 / %x23-7E / obs-text
_ENTITY_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
# RFC 9110 §14.4
_CONTENT_RANGE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (?:(\d+)-(\d+)|(\*))/(\d+|\*)", re.ASCII)
# RFC 9110 §5.6.7: IMF-fixdate, the one form a sender may use today
_IMF_FIXDATE = re.compile(
    r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d "
    r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) \d{4} \d\d:\d\d:\d\d GMT",
    re.ASCII,
)
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class EntityTag:
    """An entity-tag (RFC 9110 §8.8.3). ``str()`` gives the octets it was parsed from."""

    opaque: str
    weak: bool = False

    @classmethod
    def parse(cls, value: str) -> EntityTag | None:
        """Return the tag, or ``None`` for unquoted, lower-case ``w/``, too long or odd ones."""
        if len(value) > MAX_FIELD or (match := _ENTITY_TAG.fullmatch(value)) is None:
            return None
        return cls(match[2], weak=match[1] is not None)

    def __str__(self) -> str:
        return f'{"W/" if self.weak else ""}"{self.opaque}"'

    def strong_equals(self, other: EntityTag) -> bool:
        """Compare as If-Range and If-Match do (RFC 9110 §8.8.3.2)."""
        return not self.weak and not other.weak and self.opaque == other.opaque

    def weak_equals(self, other: EntityTag) -> bool:
        """Compare as If-None-Match does (RFC 9110 §8.8.3.2)."""
        return self.opaque == other.opaque


@dataclass(frozen=True, slots=True)
class ContentRange:
    """A byte Content-Range (RFC 9110 §14.4): inclusive ``first`` and ``last``, in bytes.

    ``first`` and ``last`` are ``None`` for the unsatisfied form ``bytes */N``; ``total`` is
    ``None`` for ``/*``.
    """

    first: int | None
    last: int | None
    total: int | None

    @classmethod
    def parse(cls, value: str) -> ContentRange | None:
        """Return the range, or ``None`` for another unit or anything invalid.

        Invalid: last < first, total ≤ last, ``*/*``, numbers of more than 4,300 digits.
        """
        if len(value) > MAX_FIELD or (match := _CONTENT_RANGE.fullmatch(value)) is None:
            return None
        unit, first, last, unsatisfied, total = match.groups()
        if unit.lower() != "bytes":
            return None
        if unsatisfied:
            return None if total == "*" else cls(None, None, int(total))
        parsed = cls(int(first), int(last), None if total == "*" else int(total))
        return parsed if parsed._valid() else None

    def _valid(self) -> bool:
        if self.first is None or self.last is None:
            return self.total is not None
        return self.first <= self.last and (self.total is None or self.last < self.total)

    def __str__(self) -> str:
        span = "*" if self.first is None else f"{self.first}-{self.last}"
        return f"bytes {span}/{'*' if self.total is None else self.total}"


def parse_http_date(value: str) -> int | None:
    """Return seconds since the epoch, or ``None`` for anything but an IMF-fixdate.

    RFC 9110 §5.6.7 has recipients accept two obsolete forms too. A Last-Modified in one of
    them is still echoed byte for byte; it only is never taken for strong.
    """
    if _IMF_FIXDATE.fullmatch(value) is None:
        return None
    clock = [int(part) for part in value[17:25].split(":")]
    try:
        moment = datetime(
            int(value[12:16]), _MONTHS.index(value[8:11]) + 1, int(value[5:7]), *clock, tzinfo=UTC
        )
    except ValueError:  # 31 February, 25:00:00 …
        return None
    return int(moment.timestamp())


def parse_repr_digest(values: tuple[str, ...]) -> Digest | None:
    """Return the SHA-256 of the whole representation that Repr-Digest gives (RFC 9530 §3).

    ``None`` when the field is absent, malformed, or names other algorithms only.
    """
    text = ", ".join(values)
    if not text or len(text) > MAX_FIELD:
        return None
    try:
        member = http_sf.parse(text.encode("ascii"), tltype="dictionary").get("sha-256")
    except (http_sf.StructuredFieldError, UnicodeEncodeError):
        return None
    value = member[0] if isinstance(member, tuple) else None
    if not isinstance(value, bytes) or len(value) != Digest.SIZE:
        return None
    return Digest(value.hex())


def parse_vary(values: tuple[str, ...]) -> tuple[str, ...]:
    """Return the field names of Vary, lower case, sorted, once each (RFC 9110 §12.5.5).

    ``("*",)`` stands for ``Vary: *`` and for anything the grammar does not allow: both mean
    that no later request can be known to select the same representation.
    """
    names = {name.strip().lower() for value in values for name in value.split(",")} - {""}
    if any(_TOKEN.fullmatch(name) is None for name in names) or "*" in names:
        return ("*",)
    return tuple(sorted(names))
