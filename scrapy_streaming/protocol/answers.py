"""The head of an answer as a value, and the outcomes that it can have.

What may live here: values, namely the arguments and results of ``judge_response``. Its rules are in
``judging``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from scrapy_streaming.protocol import codings
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.fields import (
    MAX_FIELD,
    OWS,
    parse_content_digest,
    parse_content_length,
    parse_digest,
    parse_vary,
)
from scrapy_streaming.protocol.jobs import StoredRepresentation
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.reasons import Reason, Recovery
from scrapy_streaming.protocol.validators import Validators

#: Statuses that the same request would get again.
PERMANENT: Final = frozenset({400, 401, 402, 403, 404, 405, 406, 410, 414, 451, 501})


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The head of an answer. ``length`` is its Content-Length in bytes, ``None`` if it is unknown.

    ``content_ranges`` are all values of Content-Range. ``odd_etag``: there was an ETag field, but no
    usable tag (R39); ``odd_length``: the same of Content-Length (R38). ``asks_to_wait``: there was a
    Retry-After. ``content_digest`` is the digest of this message's own content, from Content-Digest (R64).
    """

    status: int
    url: str
    validators: Validators
    length: int | None = None
    content_ranges: tuple[str, ...] = ()
    content_encoding: str = ""
    media_type: str | None = None
    vary: tuple[str, ...] = ()
    repr_digest: Digest | None = None
    ranges_refused: bool = False
    odd_etag: bool = False
    odd_length: bool = False
    asks_to_wait: bool = False
    content_digest: Digest | None = None

    @classmethod
    def from_fields(
        cls, status: int, url: str, fields: Mapping[str, Sequence[str]], length: int | None
    ) -> ResponseHead:
        """Return the head of an answer with *fields* (by lower-case name, all their values).

        *length* is the length of the body in bytes by its framing, ``None`` if the client knows none.
        Transfer-Encoding overrides Content-Length (RFC 9112 §6.3). The bytes of a 203 were changed on the
        way (RFC 9110 §15.3.4), so the origin's validators and digest do not apply to them (R41).
        """

        def values(name: str) -> tuple[str, ...]:
            return tuple(value.strip(OWS) for value in fields.get(name, ()))

        validators, digest = Validators(), None
        if status != 203:
            validators = Validators.from_fields(values("etag"), values("last-modified"), values("date"))
            digest = parse_digest(fields, whole=status == 200 and not values("content-range"))
        coded = codings.codings(",".join(values("content-encoding")).lower())
        lengths = () if any(values("transfer-encoding")) else values("content-length")
        return cls(
            status=status,
            url=url,
            validators=validators,
            length=length,
            content_ranges=values("content-range"),
            content_encoding=", ".join(coded),
            media_type=_printable(next(iter(values("content-type")), "")) or None,
            vary=parse_vary(values("vary")),
            repr_digest=digest,
            ranges_refused="none" in (v.lower() for v in values("accept-ranges")),
            odd_etag=bool(values("etag")) and validators.etag is None,
            odd_length=bool(lengths) and parse_content_length(lengths) is None,
            asks_to_wait=bool(values("retry-after")),
            content_digest=parse_content_digest(fields),
        )


def _printable(text: str) -> str:
    """Return the printable ASCII characters of a server's *text*, for a record or an item (E6, E11)."""
    return "".join(char for char in text if char.isascii() and char.isprintable())[:MAX_FIELD]


@dataclass(frozen=True, slots=True)
class Append:
    """Write the body from ``state.length`` on; it must end at ``until`` (bytes, exclusive).

    ``content_digest`` is the digest of the piece. A ``provisional`` piece does not count as the part's
    until its end was checked: no Content-Length confirms its Content-Range (R74), or it has a digest of its
    own (R64). Its first ``overlap`` bytes repeat the part's last ones; if they differ, the piece is of
    another representation (R19).
    """

    state: PartState
    until: int
    reason: Reason
    content_digest: Digest | None = None
    provisional: bool = False
    overlap: int = 0


@dataclass(frozen=True, slots=True)
class Replace:
    """Write the body into a new part; ``state.total`` is its length in bytes, if known.

    ``ranged``: the length comes from a Content-Range, which the body must not contradict (R74).
    """

    state: PartState
    reason: Reason
    ranged: bool = False


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The stored representation is current; ``known`` has the updated validators."""

    known: StoredRepresentation
    reason: Reason = Reason.NOT_MODIFIED


@dataclass(frozen=True, slots=True)
class AlreadyWhole:
    """The part is the whole, current representation."""

    state: PartState
    reason: Reason = Reason.CONFIRMED_WHOLE


@dataclass(frozen=True, slots=True)
class PassOn:
    """The answer has no representation: Scrapy's other components handle it, and nothing is written."""

    reason: Reason = Reason.PASS_ON


@dataclass(frozen=True, slots=True)
class Refuse:
    """The body must not be used; ``then`` says how the next request differs."""

    reason: Reason
    then: Recovery


Outcome: TypeAlias = Append | Replace | Unchanged | AlreadyWhole | PassOn | Refuse


@dataclass(frozen=True, slots=True)
class SentRequest:
    """The request that was answered: its ``fields`` by lower-case name, as they were sent.

    With the answer's Vary they make the selecting key that a later resume must match. ``original_url`` is
    the URL before any redirect. ``old_target``: an earlier redirect led to the requested URL, not one of
    this request; signed targets expire (R57). ``decodable`` are the codings that can be decoded here (R34).
    """

    fields: Mapping[str, str]
    original_url: str = ""
    old_target: bool = False
    decodable: frozenset[str] = codings.KNOWN
