"""HTTP fields: their values parsed and printed, by the grammar of RFC 9110 and RFC 9530.

What may live here: parsers of one field each. A parser returns ``None`` for what the grammar does not
allow; it never guesses. Values longer than ``MAX_FIELD`` characters are not used (E6).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, cast

import http_sf

from scrapy_streaming.protocol.digests import Digest

MAX_FIELD: Final = 1024
#: A longer delay counts as this one, in seconds (RFC 9111 §1.2.2).
MAX_DELAY: Final = 2**31

#: The white space around a field value (RFC 9110 §5.6.3); ``str.strip`` also removes control characters.
OWS: Final = " \t"

# RFC 9110 §8.8.3: etagc = %x21 / %x23-7E / obs-text. Without obs-text: a tag that not every
# client can send back octet for octet is no validator (E6, F22).
_ENTITY_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e]*)"')
# RFC 9110 §5.6.7: IMF-fixdate, the one form a sender may use today
_IMF_FIXDATE = re.compile(
    r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d "
    r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) \d{4} \d\d:\d\d:\d\d GMT",
    re.ASCII,
)
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DIGITS = re.compile(r"\d+", re.ASCII)
# RFC 3230 §4.3.2: one member of Digest; the algorithm's name has no case
_SHA256_MEMBER = re.compile(r"(?:^|[,\t ])sha-256=([A-Za-z0-9+/=]+)", re.ASCII | re.IGNORECASE)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class EntityTag:
    """An entity-tag (RFC 9110 §8.8.3). ``str()`` gives the text it was parsed from."""

    opaque: str
    weak: bool = False

    @classmethod
    def parse(cls, value: str) -> EntityTag | None:
        """Return the tag, or ``None`` for unquoted, lower-case ``w/``, non-ASCII or too long ones."""
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


def parse_http_date(value: str) -> int | None:
    """Return seconds since the epoch, or ``None`` for anything but an IMF-fixdate.

    RFC 9110 §5.6.7 has recipients accept two obsolete forms too. A Last-Modified in one of them is
    sent back byte for byte all the same, but never counts as strong.
    """
    if _IMF_FIXDATE.fullmatch(value) is None:
        return None
    day, month, year = int(value[5:7]), _MONTHS.index(value[8:11]) + 1, int(value[12:16])
    hour, minute, second = int(value[17:19]), int(value[20:22]), int(value[23:25])
    try:
        moment = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:  # 31 February, 25:00:00 …
        return None
    return int(moment.timestamp())


def parse_content_length(values: tuple[str, ...]) -> int | None:
    """Return the one length, in bytes, that all values of Content-Length give (RFC 9112 §6.3).

    ``42, 42`` gives 42. ``None`` for no value, for anything that is no number, and for different
    numbers: the body's framing is unknown then (R38).
    """
    numbers = [number.strip(OWS) for value in values for number in value.split(",")]
    if any(len(number) > MAX_FIELD or _DIGITS.fullmatch(number) is None for number in numbers):
        return None
    lengths = {int(number) for number in numbers}
    return lengths.pop() if len(lengths) == 1 else None


def retry_after(values: Sequence[str], now: float) -> float | None:
    """Return the seconds from *now* on that Retry-After asks to wait (RFC 9110 §10.2.3).

    *now* in seconds since the epoch. A date in the past gives 0; ``None`` for no value, more
    than one, or one that is neither digits nor an IMF-fixdate.
    """
    if len(values) != 1 or len(values[0]) > MAX_FIELD:
        return None
    value = values[0].strip(OWS)
    if _DIGITS.fullmatch(value) is not None:
        return float(min(int(value), MAX_DELAY))
    moment = parse_http_date(value)
    return None if moment is None else max(0.0, moment - now)


def parse_digest(fields: Mapping[str, Sequence[str]], *, whole: bool) -> Digest | None:
    """Return the SHA-256 of the whole representation that an answer's *fields* give.

    *fields* by lower-case name. Repr-Digest (RFC 9530 §3) and Digest (RFC 3230 §4.3.2) are always
    of the whole representation. Content-Digest (RFC 9530 §2) is of this message's content, and the checksum
    that S3 sends with a piece may be the piece's: both count only if the content is *whole*. The first
    usable one counts. ``None`` without such a field, and for other algorithms: those prove less than the
    framing does (R65).
    """
    for name, parse, applies in (
        ("repr-digest", _parse_digest_field, True),
        ("digest", _parse_instance_digest, True),
        ("content-digest", _parse_digest_field, whole),
        ("x-amz-checksum-sha256", _parse_s3_checksum, whole and _of_full_object(fields)),
    ):
        text = ", ".join(fields.get(name, ()))
        digest = parse(text) if applies and 0 < len(text) <= MAX_FIELD else None
        if digest is not None:
            return digest
    return None


def parse_content_digest(fields: Mapping[str, Sequence[str]]) -> Digest | None:
    """Return the SHA-256 of this message's content that Content-Digest gives (RFC 9530 §2, R64)."""
    text = ", ".join(fields.get("content-digest", ()))
    return _parse_digest_field(text) if 0 < len(text) <= MAX_FIELD else None


def _parse_digest_field(text: str) -> Digest | None:
    """Return the SHA-256 in a dictionary of RFC 9530."""
    try:
        parsed = http_sf.parse(text.encode("ascii"), tltype="dictionary")
    except (http_sf.StructuredFieldError, UnicodeEncodeError):
        return None
    members = cast("Mapping[str, tuple[object, object]]", parsed)  # a value, or a list, and parameters
    value = members["sha-256"][0] if "sha-256" in members else None
    return _digest_of(value) if isinstance(value, bytes) else None


def _parse_instance_digest(text: str) -> Digest | None:
    """Return the one SHA-256 among the members of a Digest field (RFC 3230)."""
    members = set(_SHA256_MEMBER.findall(text))
    return _from_base64(members.pop()) if len(members) == 1 else None


def _parse_s3_checksum(text: str) -> Digest | None:
    """Return the digest of ``x-amz-checksum-sha256``; ``None`` for ``…-N``, a checksum of N checksums."""
    return _from_base64(text.strip(OWS))


def _of_full_object(fields: Mapping[str, Sequence[str]]) -> bool:
    kinds = [kind.strip(OWS).upper() for kind in fields.get("x-amz-checksum-type", ())]
    return all(kind == "FULL_OBJECT" for kind in kinds)


def _from_base64(text: str) -> Digest | None:
    try:
        return _digest_of(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return None


def _digest_of(octets: bytes) -> Digest | None:
    return Digest(octets.hex()) if len(octets) == Digest.SIZE else None


def parse_vary(values: tuple[str, ...]) -> tuple[str, ...]:
    """Return the field names of Vary, lower case, sorted, once each (RFC 9110 §12.5.5).

    ``("*",)`` stands for ``Vary: *`` and for anything too long or not allowed by the grammar: no
    later request is known to select the same representation then.
    """
    if sum(map(len, values)) > MAX_FIELD:
        return ("*",)
    names = {name.strip(OWS).lower() for value in values for name in value.split(",")} - {""}
    if any(_TOKEN.fullmatch(name) is None for name in names) or "*" in names:
        return ("*",)
    return tuple(sorted(names))
