"""The head of an answer as a value, and what it can turn out to mean.

What may live here: ``ResponseHead``, the outcomes, and what ``judge_response`` gets beside the plan.
The rules are in ``judging``.
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

#: Statuses after which asking again would give the same.
PERMANENT: Final = frozenset({400, 401, 402, 403, 404, 405, 406, 410, 414, 451, 501})


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The head of an answer. ``length`` is its Content-Length in bytes, ``None`` if not said.

    ``content_ranges`` are all values of Content-Range; ``odd_etag`` says that there was an ETag
    field but no usable tag (R39), ``odd_length`` the same of Content-Length (R38).
    ``asks_to_wait`` says that there was a Retry-After. ``content_digest`` is what Content-Digest says
    of this message's own content (R64).
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
        """Return the head that *fields* (by lower-case name, all their values) make up.

        *length* is what the client makes of the framing, in bytes. Transfer-Encoding overrides
        Content-Length (RFC 9112 §6.3). The bytes of a 203 were changed on the way (RFC 9110
        §15.3.4): what its fields say of the origin's is not taken for theirs (R41).
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
    """Return what of a server's *text* may go into a record or an item (E6, E11)."""
    return "".join(char for char in text if char.isascii() and char.isprintable())[:MAX_FIELD]


@dataclass(frozen=True, slots=True)
class Append:
    """Write the body from ``state.length`` on; it must end at ``until`` (bytes, exclusive).

    ``content_digest`` is that of the piece. Until its end was seen to be right nothing of a piece
    that is ``provisional`` counts as the part's: no Content-Length agrees with its Content-Range
    (R74), or it has a digest of its own (R64). Its first ``overlap`` bytes are those that the part
    ends with, or it is another's (R19).
    """

    state: PartState
    until: int
    reason: Reason
    content_digest: Digest | None = None
    provisional: bool = False
    overlap: int = 0


@dataclass(frozen=True, slots=True)
class Replace:
    """Write the body into a new part; ``state.total`` is its length in bytes, if said.

    ``ranged``: a Content-Range said so, which the body must not contradict (R74).
    """

    state: PartState
    reason: Reason
    ranged: bool = False


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The stored representation is current; ``known`` has the freshened validators."""

    known: StoredRepresentation
    reason: Reason = Reason.NOT_MODIFIED


@dataclass(frozen=True, slots=True)
class AlreadyWhole:
    """The part is the whole, current representation."""

    state: PartState
    reason: Reason = Reason.CONFIRMED_WHOLE


@dataclass(frozen=True, slots=True)
class PassOn:
    """Not a representation: Scrapy's other components deal with it; nothing is written."""

    reason: Reason = Reason.PASS_ON


@dataclass(frozen=True, slots=True)
class Refuse:
    """The body must not be used; ``then`` says what follows."""

    reason: Reason
    then: Recovery


Outcome: TypeAlias = Append | Replace | Unchanged | AlreadyWhole | PassOn | Refuse


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked beside the plan: the request's ``fields`` by lower-case name.

    With the answer's Vary they make the selecting key that a later resume must match. ``first`` is the
    URL before any redirect. ``stale`` says that a redirect of some time ago led to the URL that was
    asked, not one of just now: signed targets expire (R57). ``decodable`` are the codings that can be
    taken off here (R34).
    """

    fields: Mapping[str, str]
    first: str = ""
    stale: bool = False
    decodable: frozenset[str] = codings.KNOWN
