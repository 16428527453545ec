"""Parts on disk: their state, how much of one may be kept, and what the end of a body proves.

What may live here: values and rules about bytes that are stored already. RFC 9112 §8 is behind the
ends of bodies.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from scrapy_streaming.protocol import codings
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.reasons import Proof, Reason
from scrapy_streaming.protocol.validators import Validators


@dataclass(frozen=True, slots=True)
class PartState:
    """The content of a part's sidecar: bytes [0, ``length``) are durable and hash to ``prefix_sha256``.

    ``total`` is the complete length in bytes if known; ``url`` is the final URL, to which the
    validators belong; ``content_encoding`` is ``""`` for none. ``coding_is_content``: the file itself is in
    that coding, so it is never decoded.
    """

    url: str
    validators: Validators
    length: int = 0
    prefix_sha256: str = ""
    total: int | None = None
    content_encoding: str = ""
    vary: tuple[str, ...] = ()
    selecting: str = ""
    repr_digest: Digest | None = None
    ranges_refused: bool = False
    media_type: str | None = None
    coding_is_content: bool = False
    proof: Proof = Proof.LENGTH

    @property
    def to_decode(self) -> tuple[str, ...]:
        """The codings to decode before the bytes are published, in the order they were applied."""
        return () if self.coding_is_content else codings.codings(self.content_encoding)

    @property
    def end_unmarked(self) -> bool:
        """Whether only the closed connection marked the end of the bytes (R33)."""
        return self.total is None and self.proof is Proof.UNPROVEN

    @property
    def whole(self) -> bool:
        """Whether the part has all bytes of the representation (state **Pc**)."""
        return self.total is not None and self.length == self.total


@dataclass(frozen=True, slots=True)
class Keep:
    """The first ``length`` bytes of the file are kept, the ``cut`` bytes behind them are not (R2)."""

    length: int
    cut: int


def judge_part(state: PartState, file_length: int) -> Keep | Reason:
    """Return how much of a part's file may be kept, before its prefix is hashed (R2, R3).

    The sidecar's length counts, never the file's: a file may be preallocated or have a torn
    tail. A shorter file is corrupt.
    """
    if file_length < state.length:
        return Reason.CORRUPT_PART
    return Keep(state.length, file_length - state.length)


class BodyEnd(enum.StrEnum):
    """How a body ended, by its transport (RFC 9112 §8)."""

    FRAMED = "framed"  # Content-Length reached, or the last chunk seen
    CLOSED = "closed"  # the connection closed, and nothing else marks the end
    LOST = "lost"  # the connection broke before the framing's end


def unproven(state: PartState) -> PartState:
    """Return the state without validators, for bytes whose end nothing proves (R33)."""
    return replace(state, validators=Validators(), proof=Proof.UNPROVEN)


def judge_end(end: BodyEnd, length: int, due: int | None, *, expected: bool) -> Reason:
    """Return ``COMPLETE``, ``INCOMPLETE`` or ``CLOSE_DELIMITED`` for a body that ended.

    *length* is the part's length now and *due* the length it should have, in bytes. *expected*: a digest is
    known that the bytes will be compared with, and decides instead of the framing.
    Rows R31 to R33, R61; RFC 9112 §8.
    """
    if end is BodyEnd.LOST or (due is not None and length != due):
        return Reason.INCOMPLETE
    if end is BodyEnd.CLOSED and due is None and not expected:
        return Reason.CLOSE_DELIMITED
    return Reason.COMPLETE
