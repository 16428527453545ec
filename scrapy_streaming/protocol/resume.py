"""The two decisions: what to ask for, and what an answer means for the part on disk.

``plan_request`` and ``judge_response`` are pure and total. Every outcome carries a ``Reason``;
its value is the statistic's name, the log's word and the test's id. The rows (R2 …) are those
of the decision table in the documentation; RFC 9110 §13 to §15 and RFC 9111 §4.3.4 are behind
them.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, TypeAlias, assert_never

from scrapy_streaming.protocol import codings
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.fields import (
    MAX_FIELD,
    OWS,
    ContentRange,
    parse_content_digest,
    parse_content_length,
    parse_digest,
    parse_vary,
)
from scrapy_streaming.protocol.jobs import StoredRepresentation
from scrapy_streaming.protocol.validators import Validators

#: Request fields that a plan may set. A request that brings one of its own is not ours.
PLAN_FIELDS: Final = (
    "Range",
    "If-Range",
    "If-None-Match",
    "If-Modified-Since",
    "If-Match",
    "If-Unmodified-Since",
)

#: Resumptions in a row that met another validator, after which the part is not offered any more (R62).
UNSTABLE_AFTER: Final = 3
#: Statuses after which asking again would give the same.
PERMANENT: Final = frozenset({400, 401, 402, 403, 404, 405, 406, 410, 414, 451, 501})
#: Bytes of a part without a strong validator that are asked for again and compared (R19).
OVERLAP: Final = 64 << 10

#: Selecting fields whose value is not known when a request is planned.
_UNKNOWABLE: Final = frozenset({"*", "cookie"})

#: Fields that every request of ours carries: offsets count octets of the encoded representation
#: (RFC 9110 §14.1.2), so none may be encoded; a digest of all of it is asked for (RFC 9530 §4).
ALWAYS: Final[Mapping[str, str]] = MappingProxyType(
    {"Accept-Encoding": "identity", "Want-Repr-Digest": "sha-256=10"}
)

#: Errors that some servers give to a Range field they would not need to understand (R55). What
#: says that the server is busy or its back end away (502 to 504) is not among them: R59.
_RANGE_ONLY: Final = frozenset({400, 403, 404, 405, 500, 501, 505})

#: Selecting fields that every request of ours sets or clears itself, so that a request about to be
#: planned and the same request on its way count as the same (nginx: ``Vary: Accept-Encoding``).
_PLANNED: Final[Mapping[str, str]] = MappingProxyType(
    {name.lower(): value for name, value in ALWAYS.items()} | {name.lower(): "" for name in PLAN_FIELDS}
)


class Reason(enum.StrEnum):
    """Why: one stable word for each outcome."""

    # plans
    NOTHING_STORED = "nothing-stored"
    STRONG_VALIDATOR = "strong-validator"  # Ps
    STRONG_DATE = "strong-date"  # Pd
    WHOLE_PART = "whole-part"  # R7
    UNMODIFIED_SINCE = "unmodified-since"  # R5
    WEAK_VALIDATOR = "weak-validator"  # R5
    NO_VALIDATOR = "no-validator"  # R6, R72
    TAIL_OVERLAP = "tail-overlap"  # R6, R19
    FOREIGN_PART = "foreign-part"  # R4
    CORRUPT_PART = "corrupt-part"  # R3
    RANGE_REFUSED_BEFORE = "accept-ranges-none"  # R71
    STORED = "stored"  # B
    ADOPTED = "adopted"  # in the store, and the ledger has forgotten whence (I16)
    CONFIRM_WHOLE = "confirm-whole"  # R7, R50
    PROBE_END = "probe-end"  # R33
    UNSTABLE_VALIDATOR = "unstable-validator"  # R62
    RESUME_OFF = "resume-off"
    OFFLINE = "offline"
    BARE = "bare-retry"
    # answers that are used
    FETCHED = "fetched"  # R27
    TRANSFORMED = "transformed"  # R41, R76
    JUST_MODIFIED = "just-modified"  # R75
    CHANGED = "changed"  # R28
    RANGE_IGNORED = "range-ignored"  # R29
    WHOLE_IN_206 = "whole-in-206"  # R16
    RESUMED = "resumed"  # R10, R12
    RESUMED_UNTAGGED = "resumed-untagged"  # R11
    RESUMED_SHORT = "resumed-short"  # R17
    RESUMED_UNVALIDATED = "resumed-unvalidated"  # R19
    NOT_MODIFIED = "not-modified"  # R43
    CONFIRMED_WHOLE = "confirmed-whole"  # R7, R49, R50
    PROBED_WHOLE = "probed-whole"  # R33
    UNCHANGED_CONTENT = "unchanged-content"  # R48
    PASS_ON = "pass-on"  # R58 to R60
    # answers that are refused
    CHANGED_206 = "changed-206"  # R13
    WEAKENED_206 = "weakened-206"  # R14
    UNPROVEN_206 = "unproven-206"  # R11, R12
    RANGE_START = "range-start"  # R15
    UNKNOWN_TOTAL = "unknown-total"  # R18
    TOTAL_CHANGED = "total-changed"  # R20
    BAD_CONTENT_RANGE = "bad-content-range"  # R21
    BAD_CONTENT_LENGTH = "bad-content-length"  # R38
    MULTIPART_206 = "multipart-206"  # R22
    CONTENT_RANGE_ON_200 = "content-range-on-200"  # R23
    RECODED_206 = "recoded-206"  # R24
    UNSOLICITED_206 = "unsolicited-206"  # R25
    CODING_UNSUPPORTED = "coding-unsupported"  # R34
    FOREIGN_304 = "foreign-304"  # R45
    UNASKED_304 = "unasked-304"  # R46
    MAYBE_WHOLE_416 = "maybe-whole-416"  # R50
    SHRUNK = "shrunk"  # R51
    CONTRADICTORY_416 = "contradictory-416"  # R52
    BARE_416 = "bare-416"  # R53
    PRECONDITION_FAILED = "precondition-failed"  # R56
    RANGE_ERROR = "range-error"  # R55
    EXPIRED_TARGET = "expired-target"  # R57
    BLOB_MISSING = "blob-missing"  # R44
    DIGEST_MISMATCH = "digest-mismatch"  # R63
    UNDECODABLE = "undecodable"  # R34
    RANGE_CONTRADICTED = "range-contradicted"  # R74
    # ends of bodies
    COMPLETE = "complete"  # R27, R32
    INCOMPLETE = "incomplete"  # R31, R32, R61
    CLOSE_DELIMITED = "close-delimited"  # R33
    SLICE_DIGEST_MISMATCH = "slice-digest-mismatch"  # R64
    OVERLAP_MISMATCH = "overlap-mismatch"  # R19


class Proof(enum.StrEnum):
    """What it rests on that published bytes are right, the best first."""

    DIGEST = "digest"  # they hash to what the caller, or the server, said
    STRONG = "strong"  # pieces joined under a strong validator
    LENGTH = "length"  # one answer, whole by its framing
    UNPROVEN = "unproven"  # nothing but the closed connection marked the end


class Then(enum.StrEnum):
    """What follows a refused answer."""

    REFETCH = "refetch"  # plain GET; the part stays until a longer one is there
    DISCARD = "discard"  # the part is of another representation; plain GET
    REFETCH_NO_CACHE = "refetch-no-cache"  # plain GET past every cache
    CONFIRM = "confirm"  # conditional GET with the part's own validators
    PROBE = "probe"  # ask whether there are bytes behind the part's
    WITHOUT_RANGE = "without-range"  # plain GET; what it brings is never resumed
    ORIGINAL = "original"  # the URL that redirected here is asked for its target again
    FAIL = "fail"  # no other request would help


#: Refusal → what follows, in one table. A plain GET that is refused again always fails.
REFUSALS: Final[Mapping[Reason, Then]] = MappingProxyType(
    {
        Reason.CHANGED_206: Then.DISCARD,
        Reason.WEAKENED_206: Then.REFETCH,
        Reason.UNPROVEN_206: Then.REFETCH,
        Reason.RANGE_START: Then.REFETCH,
        Reason.UNKNOWN_TOTAL: Then.REFETCH,
        Reason.TOTAL_CHANGED: Then.DISCARD,
        Reason.BAD_CONTENT_RANGE: Then.REFETCH,
        Reason.BAD_CONTENT_LENGTH: Then.REFETCH,
        Reason.MULTIPART_206: Then.REFETCH,
        Reason.CONTENT_RANGE_ON_200: Then.REFETCH,
        Reason.RECODED_206: Then.REFETCH,
        Reason.UNSOLICITED_206: Then.REFETCH,
        Reason.FOREIGN_304: Then.REFETCH_NO_CACHE,
        Reason.UNASKED_304: Then.REFETCH_NO_CACHE,
        Reason.BLOB_MISSING: Then.REFETCH_NO_CACHE,
        Reason.DIGEST_MISMATCH: Then.DISCARD,
        Reason.UNDECODABLE: Then.DISCARD,
        Reason.CODING_UNSUPPORTED: Then.REFETCH,
        Reason.RANGE_CONTRADICTED: Then.REFETCH,
        Reason.CLOSE_DELIMITED: Then.PROBE,
        Reason.MAYBE_WHOLE_416: Then.CONFIRM,
        Reason.SHRUNK: Then.DISCARD,
        Reason.CONTRADICTORY_416: Then.REFETCH,
        Reason.BARE_416: Then.REFETCH,
        Reason.PRECONDITION_FAILED: Then.DISCARD,
        Reason.RANGE_ERROR: Then.WITHOUT_RANGE,
        Reason.EXPIRED_TARGET: Then.ORIGINAL,
    }
)


# -- what is known ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PartState:
    """What a part's sidecar says: bytes [0, ``length``) are durable and hash to ``prefix_sha256``.

    ``total`` is the complete length in bytes if known; ``url`` is the final URL, to which the
    validators belong; ``content_encoding`` is ``""`` for none, and ``coding_is_content`` says that the
    file itself is in that coding, so that it is never decoded.
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
        """The codings that must come off before the bytes are published, in the order they were applied."""
        return () if self.coding_is_content else codings.codings(self.content_encoding)

    @property
    def whole(self) -> bool:
        """Whether all bytes of the representation are there (state **Pc**)."""
        return self.total is not None and self.length == self.total


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request about to be planned: its URL without fragment, its fields by lower-case name.

    Without ``takes_weak`` a 304 to a weak entity-tag confirms nothing: equivalent is not equal (R47).
    ``unvalidated``: a part without a strong validator may be gone on with where its end and the
    length agree, because the digest of the whole is known and will be compared (R6).
    """

    url: str
    fields: Mapping[str, str]
    takes_weak: bool = True
    unvalidated: bool = False


class Mode(enum.StrEnum):
    """How free the plan is: what an earlier refused answer asked for."""

    NORMAL = "normal"
    BARE = "bare"
    WITHOUT_RANGE = "without-range"
    SINGLE_SHOT = "single-shot"
    NO_CACHE = "no-cache"
    CONFIRM = "confirm"
    PROBE = "probe"


#: What follows a refused answer → how the next request is planned; after ``FAIL`` there is none.
NEXT_MODE: Final[Mapping[Then, Mode]] = MappingProxyType(
    {
        Then.REFETCH: Mode.BARE,
        Then.DISCARD: Mode.BARE,
        Then.REFETCH_NO_CACHE: Mode.NO_CACHE,
        Then.CONFIRM: Mode.CONFIRM,
        Then.WITHOUT_RANGE: Mode.WITHOUT_RANGE,
        Then.ORIGINAL: Mode.NORMAL,
        Then.PROBE: Mode.PROBE,
    }
)


def selecting_key(vary: Sequence[str], fields: Mapping[str, str]) -> str:
    """Return 64 hex digits that stand for the values of the fields *vary* names (R4, E7).

    Authorization counts whether Vary names it or not: a part is never shared between
    credentials (R73). Only the hash is ever stored, so credentials do not reach the disk.
    """
    names = sorted({*vary, "authorization"})
    chosen = [[name, _PLANNED.get(name, fields.get(name, ""))] for name in names]
    return hashlib.sha256(json.dumps(chosen, separators=(",", ":")).encode()).hexdigest()


def _selected_again(vary: tuple[str, ...], selecting: str, asking: PlannedRequest) -> bool:
    """Whether *asking* is sure to select the same representation (RFC 9110 §12.5.5)."""
    return not _UNKNOWABLE.intersection(vary) and selecting == selecting_key(vary, asking.fields)


def selects_again(known: StoredRepresentation, fields: Mapping[str, str]) -> bool:
    """Whether a request with *fields* (by lower-case name) may be answered with *known*, unasked (R40).

    Where no selecting field is named but those that every request of ours sets, any request may.
    """
    if _PLANNED.keys() >= set(known.vary):
        return True
    return _selected_again(known.vary, known.selecting, PlannedRequest(known.final_url, fields))


# -- plans -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask for the whole representation; ``no_range`` says that Range has only brought errors."""

    reason: Reason
    no_cache: bool = False
    no_range: bool = False

    def fields(self) -> dict[str, str]:
        """Return the request fields of this plan."""
        return {"Cache-Control": "no-cache"} if self.no_cache else {}


@dataclass(frozen=True, slots=True)
class Resume:
    """Ask for the bytes from ``part.length`` on, if the representation is still the same.

    ``probe``: the part may be whole, and the question is whether anything lies behind it (R33).
    ``overlap`` bytes of the part are asked for again, to be compared: there is no validator (R19).
    """

    part: PartState
    reason: Reason
    probe: bool = False
    overlap: int = 0

    @property
    def first(self) -> int:
        """The first byte that is asked for."""
        return self.part.length - self.overlap

    def fields(self) -> dict[str, str]:
        """Return Range with the one condition that the part's validators allow.

        If-Range with a strong validator; If-Unmodified-Since with a weak tag that has a strong date
        (R5); never another conditional beside them (§13.2.2). A probe may have none.
        """
        fields = {"Range": f"bytes={self.first}-"}
        if self.overlap:
            return fields
        if_range, since = self.part.validators.if_range(), self.part.validators.unmodified_since()
        if if_range is not None:
            fields["If-Range"] = if_range
        elif since is not None:
            fields["If-Unmodified-Since"] = since
        return fields


@dataclass(frozen=True, slots=True)
class Revalidate:
    """Ask whether the stored representation is still the current one."""

    known: StoredRepresentation
    reason: Reason = Reason.STORED

    def fields(self) -> dict[str, str]:
        """Return If-None-Match and If-Modified-Since, as far as there are validators."""
        return self.known.validators.conditional_fields()


@dataclass(frozen=True, slots=True)
class ConfirmWhole:
    """Ask whether a whole part (R7), or one that a 416 calls whole (R50), is the current representation."""

    part: PartState
    reason: Reason = Reason.CONFIRM_WHOLE

    def fields(self) -> dict[str, str]:
        """Return the conditional fields of the part's own validators."""
        return self.part.validators.conditional_fields()


@dataclass(frozen=True, slots=True)
class PublishPart:
    """Ask nothing: the part is the whole representation, and fresh (R7)."""

    part: PartState
    reason: Reason = Reason.WHOLE_PART

    def fields(self) -> dict[str, str]:
        """Return nothing: no request is made."""
        return {}


Plan: TypeAlias = Fetch | Resume | Revalidate | ConfirmWhole | PublishPart


def plan_request(
    part: PartState | None,
    known: StoredRepresentation | None,
    asking: PlannedRequest,
    mode: Mode = Mode.NORMAL,
    *,
    fresh: bool = True,
) -> Plan:
    """Return what to ask for, given the verified *part* and the stored representation *known*.

    Rows R4 to R7, R71 and R72. A part that can be resumed comes before a revalidation: the two
    may never be mixed, for a 304 would win over the 206 (RFC 9110 §13.2.2). *fresh*: a whole part is
    young enough, or its digest is known, so that it may be published with no request (R7).
    """
    match mode:
        case Mode.BARE:
            return Fetch(Reason.BARE)
        case Mode.WITHOUT_RANGE:
            return Fetch(Reason.BARE, no_range=True)
        case Mode.SINGLE_SHOT:
            return Fetch(Reason.UNSTABLE_VALIDATOR)
        case Mode.NO_CACHE:
            return Fetch(Reason.BARE, no_cache=True)
        case Mode.PROBE if part is None:
            return Fetch(Reason.BARE)
        case Mode.NORMAL | Mode.CONFIRM | Mode.PROBE:
            plan = Fetch(Reason.NOTHING_STORED) if part is None else _plan_part(part, asking, mode, fresh)
        case _:  # pragma: no cover
            assert_never(mode)
    if isinstance(plan, Fetch) and known is not None and _may_revalidate(known, asking):
        return Fetch(Reason.WEAK_VALIDATOR) if _too_weak(known.validators, asking) else Revalidate(known)
    return plan


def _plan_part(part: PartState, asking: PlannedRequest, mode: Mode, fresh: bool) -> Plan:
    if part.url != asking.url or not _selected_again(part.vary, part.selecting, asking):
        return Fetch(Reason.FOREIGN_PART)
    if part.whole:
        return _plan_whole(part, asking, fresh)
    if part.length == 0:  # Range at offset 0 is never sent: nothing would be saved (R26)
        return Fetch(Reason.NOTHING_STORED)
    if part.ranges_refused:
        return Fetch(Reason.RANGE_REFUSED_BEFORE)
    if mode is Mode.PROBE:
        return Resume(part, Reason.PROBE_END, probe=True)
    plan = _plan_short(part, mode)
    if isinstance(plan, Fetch) and asking.unvalidated and _may_overlap(part):
        return Resume(part, Reason.TAIL_OVERLAP, overlap=min(OVERLAP, part.length))
    return plan


def _may_overlap(part: PartState) -> bool:
    """Whether a part without a strong validator can be told from another representation's (R6)."""
    return part.total is not None and not part.content_encoding


def _plan_short(part: PartState, mode: Mode) -> Plan:
    """Return how to go on with a part by what validators it has (R5, R6, R10, R12, R72)."""
    told = part.validators
    if told.if_range() is not None and mode is Mode.CONFIRM and part.total is None:
        return ConfirmWhole(part)  # R50; a part that is known to be short is never asked about so
    if told.strong_etag is not None:
        return Resume(part, Reason.STRONG_VALIDATOR)
    if told.if_range() is not None:
        return Resume(part, Reason.STRONG_DATE)
    if told.unmodified_since() is not None and part.total is not None:  # without, nothing could be joined
        return Resume(part, Reason.UNMODIFIED_SINCE)
    return Fetch(Reason.NO_VALIDATOR if told.etag is None else Reason.WEAK_VALIDATOR)


def _plan_whole(part: PartState, asking: PlannedRequest, fresh: bool) -> Plan:
    """Return what to do with a part that is whole and was not published (R7)."""
    if fresh:
        return PublishPart(part)
    if _too_weak(part.validators, asking):
        return Fetch(Reason.WEAK_VALIDATOR)
    if part.validators.conditional_fields() and not part.content_encoding:
        return ConfirmWhole(part)
    return Fetch(Reason.NO_VALIDATOR)


def _too_weak(validators: Validators, asking: PlannedRequest) -> bool:
    """Whether a 304 would speak of bytes that may be others (R47)."""
    return not asking.takes_weak and validators.etag is not None and validators.etag.weak


def _may_revalidate(known: StoredRepresentation, asking: PlannedRequest) -> bool:
    return (
        known.final_url == asking.url
        and bool(known.validators.conditional_fields())
        and known.proof not in ("", Proof.UNPROVEN)  # "": by an older release, which proved less
        and _selected_again(known.vary, known.selecting, asking)
    )


# -- answers ---------------------------------------------------------------------------------


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
    then: Then


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


def judge_response(plan: Plan, head: ResponseHead, asked: Asked) -> Outcome:
    """Return what the answer *head* to *plan* means, before the first byte of its body."""
    outcome = _judge(plan, head, asked)
    coded = outcome.state.to_decode if isinstance(outcome, Append | Replace) else ()
    return outcome if codings.decodable(coded, asked.decodable) else _refuse(plan, Reason.CODING_UNSUPPORTED)


def _judge(plan: Plan, head: ResponseHead, asked: Asked) -> Outcome:
    match head.status:
        case 206 | 304 | 416 if not _asked_alike(plan, asked):
            # other middlewares changed what selects it behind the plan (R40)
            return _refuse(plan, Reason.FOREIGN_304 if head.status == 304 else Reason.UNPROVEN_206)
        case 200 | 203 | 206 if head.odd_length:
            return _refuse(plan, Reason.BAD_CONTENT_LENGTH)
        case 200 | 203:
            return _judge_200(plan, head, asked)
        case 206:
            return _judge_206(plan, head, asked)
        case 304:
            return _judge_304(plan, head)
        case 416 if isinstance(plan, Resume):
            return _judge_416(plan, head)
        case 412 if isinstance(plan, Resume):
            return _refuse(plan, Reason.PRECONDITION_FAILED)
        case 401 | 403 if asked.stale:
            return _refuse(plan, Reason.EXPIRED_TARGET)
        case status if isinstance(plan, Resume) and status in _RANGE_ONLY and not head.asks_to_wait:
            return _refuse(plan, Reason.RANGE_ERROR)
        case _:
            return PassOn()


def _asked_alike(plan: Plan, asked: Asked) -> bool:
    """Whether the request as it was sent selects what the plan builds on (RFC 9110 §12.5.5)."""
    match plan:
        case Resume(part) | ConfirmWhole(part):
            return part.selecting == selecting_key(part.vary, asked.fields)
        case Revalidate(known):
            return known.selecting == selecting_key(known.vary, asked.fields)
        case _:
            return True


def end_is_open(outcome: Outcome) -> bool:
    """Whether an answer leaves it open where a body ends that nothing marked (R33).

    A 200 without a length does, and an error or a bare 416 to the range. All others speak of bytes
    behind it: then the same bytes twice prove nothing.
    """
    match outcome:
        case Replace(state):
            return state.total is None
        case PassOn():
            return True
        case _:
            return outcome.reason in (Reason.RANGE_ERROR, Reason.BARE_416)


def met_another(plan: Plan, outcome: Outcome) -> bool:
    """Whether a part was offered, and the answer is of another representation (R62).

    Archives made for each request and servers behind one name that each make their own tags change
    the validator every time: resuming then never saves a byte.
    """
    other = (Reason.CHANGED, Reason.JUST_MODIFIED, Reason.CHANGED_206, Reason.WEAKENED_206)
    return isinstance(plan, Resume) and outcome.reason in other


def _refuse(plan: Plan, reason: Reason) -> Refuse:
    """Refuse; a plain GET has nothing plainer to fall back to, a no-cache GET even less."""
    then = REFUSALS[reason]
    if isinstance(plan, Fetch) and (plan.no_cache or then is not Then.REFETCH_NO_CACHE):
        then = then if then is Then.ORIGINAL else Then.FAIL
    return Refuse(reason, then)


def _state(head: ResponseHead, total: int | None, asked: Asked) -> PartState:
    """Return the state of a new part; validators that the next change may not move are left out (R75)."""
    urls = (asked.first, head.url)
    return PartState(
        url=head.url,
        validators=Validators() if head.validators.just_modified else head.validators,
        total=total,
        content_encoding=head.content_encoding,
        vary=head.vary,
        selecting=selecting_key(head.vary, asked.fields),
        repr_digest=head.repr_digest,
        ranges_refused=head.ranges_refused,
        media_type=head.media_type,
        coding_is_content=codings.is_content(head.content_encoding, head.media_type, urls),
    )


def _differ(ours: object, theirs: object) -> bool:
    """Whether both are known, and are not the same."""
    return ours is not None and theirs is not None and ours != theirs


def _judge_200(plan: Plan, head: ResponseHead, asked: Asked) -> Outcome:
    span = _slice(head)
    if span is not None:  # it has no meaning on a 200, and yet is true (R23)
        return _judge_slice(plan, head, span)
    total, reason = head.length, Reason.FETCHED
    match plan:
        case Resume(part) | ConfirmWhole(part) if _same_representation(part, head, total):
            reason = Reason.RANGE_IGNORED if isinstance(plan, Resume) else Reason.FETCHED
            total = part.total if total is None else total  # R37
        case _ if head.status == 203:
            reason = Reason.TRANSFORMED
        case _ if head.validators.just_modified:
            reason = Reason.JUST_MODIFIED
        case Resume() | ConfirmWhole() | Revalidate():
            reason = Reason.CHANGED
        case _:
            pass
    state = _state(head, total, asked)
    if isinstance(plan, Fetch) and plan.no_range:
        state = replace(state, ranges_refused=True)
    return Replace(state, reason)


def _slice(head: ResponseHead) -> ContentRange | None:
    """Return the Content-Range of a 200 if the body must be taken for that piece (R23).

    Not if it spans everything, nor if Content-Length says that the body is something else. Without a
    Content-Length nobody can tell before the body ends: then it may be the piece.
    """
    span = _one_range(head)
    return None if span is None or (span.first == 0 and span.total in (None, _end(span))) else span


def _judge_slice(plan: Plan, head: ResponseHead, span: ContentRange) -> Outcome:
    """Join a piece that calls itself whole if everything is proven; some object servers resume so."""
    if isinstance(plan, Resume) and head.length is not None:
        mine, theirs = plan.part.validators.etag, head.validators.etag
        tagged = mine is not None and theirs is not None and mine.strong_equals(theirs)
        same_total = span.total is not None and span.total == plan.part.total
        if tagged and same_total and _why_not_combine(plan, head, span) is None:
            return _append(plan, head, span)
    return _refuse(plan, Reason.CONTENT_RANGE_ON_200)


def _same_representation(part: PartState, head: ResponseHead, total: int | None) -> bool:
    """Whether a 200 says that it is what the part is of: by all validators that both have.

    By a strong tag, or a strong date with no tag or a weak one.
    """
    ours, theirs = part.validators, head.validators
    if head.url != part.url or head.content_encoding != part.content_encoding or head.odd_etag:
        return False
    if _differ(part.total, total) or _differ(part.repr_digest, head.repr_digest):
        return False
    if _validator_verdict(ours, theirs) is not None or (ours.etag is None) != (theirs.etag is None):
        return False
    by_date = ours.strong_date and ours.last_modified == theirs.last_modified
    return ours.strong_etag is not None or by_date


def _one_range(head: ResponseHead) -> ContentRange | None:
    """Return the one valid, satisfied Content-Range that agrees with Content-Length (R21)."""
    if len(head.content_ranges) != 1:
        return None
    span = ContentRange.parse(head.content_ranges[0])
    if span is None or span.first is None:
        return None
    return None if _differ(head.length, _end(span) - span.first) else span


def _end(span: ContentRange) -> int:
    """Return the offset behind a satisfied range's last byte."""
    assert span.last is not None
    return span.last + 1


def _whole_total(head: ResponseHead) -> int | None:
    """Return the complete length if the one Content-Range spans the whole representation (R16)."""
    span = _one_range(head)
    return span.total if span is not None and span.first == 0 and span.total == _end(span) else None


def _judge_206(plan: Plan, head: ResponseHead, asked: Asked) -> Outcome:
    if (head.media_type or "").lower().startswith("multipart/byteranges"):
        return _refuse(plan, Reason.MULTIPART_206)
    total = _whole_total(head)
    if total is not None:
        state = _state(head, total, asked)
        return Replace(
            replace(state, repr_digest=head.repr_digest or head.content_digest),
            Reason.JUST_MODIFIED if head.validators.just_modified else Reason.WHOLE_IN_206,
            ranged=True,
        )
    if not isinstance(plan, Resume):
        return _refuse(plan, Reason.UNSOLICITED_206)
    span = _one_range(head)
    if span is None:
        return _refuse(plan, Reason.BAD_CONTENT_RANGE)
    refusal = _why_not_combine(plan, head, span)
    if refusal is not None:
        return _refuse(plan, refusal)
    return _append(plan, head, span)


def _why_not_combine(plan: Resume, head: ResponseHead, span: ContentRange) -> Reason | None:
    """Return why *head* must not be joined to the part, or ``None`` if it may (RFC 9110 §15.3.7.3)."""
    part = plan.part
    if head.content_encoding != part.content_encoding:
        return Reason.RECODED_206
    if _differ(part.repr_digest, head.repr_digest):
        return Reason.CHANGED_206
    verdict = _validator_verdict(part.validators, head.validators)
    if verdict is not None:
        return verdict
    if _differ(part.total, span.total):
        return Reason.TOTAL_CHANGED
    if span.first != plan.first:
        return Reason.RANGE_START
    if span.total is None and (part.total is None or span.last != part.total - 1):
        return Reason.UNKNOWN_TOTAL
    if plan.overlap:  # its bytes will say the rest, and at the end the digest
        alike = head.url == part.url and span.total == part.total and _end(span) > part.length
        return None if alike else Reason.UNPROVEN_206
    if head.odd_etag or not _proven(part, head, span):
        return Reason.UNPROVEN_206
    return None


def _validator_verdict(ours: Validators, theirs: Validators) -> Reason | None:
    """Return what the validators say against joining: all that both sides have must agree (R13, R14)."""
    if ours.etag is not None and theirs.etag is not None:
        same = ours.etag.weak_equals(theirs.etag)
        if not same or (theirs.etag.weak and not ours.etag.weak):
            return Reason.WEAKENED_206 if same else Reason.CHANGED_206
    return Reason.CHANGED_206 if _differ(ours.last_modified, theirs.last_modified) else None


def _proven(part: PartState, head: ResponseHead, span: ContentRange) -> bool:
    """Whether the 206 proves to be of the part's representation (R10; else R5, R11, R12)."""
    ours, theirs = part.validators, head.validators
    same_total = part.total is not None and span.total == part.total
    same_digest = part.repr_digest is not None and head.repr_digest == part.repr_digest
    same_date = ours.last_modified is not None and theirs.last_modified == ours.last_modified
    if head.url != part.url:  # equal tags may name different bytes elsewhere (§8.8.1)
        return same_total and same_digest
    if ours.strong_etag is not None:
        return theirs.etag is not None or (same_total and (same_date or same_digest))
    if ours.etag is None and theirs.etag is not None:  # a tag that the part never had
        return False
    return same_total and same_date and ours.strong_date


def _append(plan: Resume, head: ResponseHead, span: ContentRange) -> Append:
    part = plan.part
    total = part.total if span.total is None else span.total
    until = _end(span)
    reason = Reason.RESUMED
    if total is not None and until < total:
        reason = Reason.RESUMED_SHORT
    elif plan.overlap:
        reason = Reason.RESUMED_UNVALIDATED
    elif head.validators.etag is None and part.validators.etag is not None:
        reason = Reason.RESUMED_UNTAGGED
    state = replace(
        part,
        total=total,
        validators=_freshened(part.validators, head.validators),
        repr_digest=head.repr_digest or part.repr_digest,
        proof=Proof.LENGTH if plan.overlap else Proof.STRONG,
    )
    provisional = head.length is None or head.content_digest is not None
    return Append(state, until, reason, head.content_digest, provisional, plan.overlap)


def _judge_304(plan: Plan, head: ResponseHead) -> Outcome:
    match plan:
        case Revalidate(known):
            ours = known.validators
            if head.url != known.final_url or not _speaks_of(ours, head):
                return _refuse(plan, Reason.FOREIGN_304)
            return Unchanged(replace(known, validators=_freshened(ours, head.validators)))
        case ConfirmWhole(part) if part.total in (None, part.length):
            strongly = part.total is None  # nothing but this answer says that it is whole
            if head.url != part.url or head.odd_etag:
                return _refuse(plan, Reason.FOREIGN_304)
            if not _speaks_of(part.validators, head, strongly=strongly):
                return _refuse(plan, Reason.FOREIGN_304)
            return AlreadyWhole(replace(part, total=part.length))
        case _:
            return _refuse(plan, Reason.UNASKED_304)


def _speaks_of(ours: Validators, head: ResponseHead, *, strongly: bool = False) -> bool:
    """Whether a 304's validators, if it has any, are those of what is stored (RFC 9111 §4.3.4).

    A strong tag must be ours strongly: it says which bytes are current, and a weak one of ours
    does not say that it has those. A weak tag needs to be ours weakly only, unless *strongly*.
    Whatever the tag, a date that is not ours speaks of something else: some servers keep the tag of a
    file that changed (R13).
    """
    mine, theirs = ours.etag, head.validators.etag
    if _differ(ours.last_modified, head.validators.last_modified):
        return False
    if mine is not None and theirs is not None:
        return mine.strong_equals(theirs) or (theirs.weak and not strongly and mine.weak_equals(theirs))
    return theirs is None and not (mine is not None and head.odd_etag)


def _freshened(old: Validators, new: Validators) -> Validators:
    """Return the validators after a 304 or 206: its fields replace ours (RFC 9111 §3.2, §3.4).

    Last-Modified and Date stay a pair: a date is strong by the Date of the response that our
    bytes came with (RFC 9110 §8.8.2.2), so a later Date must not make the same date stronger.
    """
    dated = old if new.last_modified in (None, old.last_modified) else new
    return Validators(new.etag or old.etag, dated.last_modified, dated.date)


def _judge_416(plan: Resume, head: ResponseHead) -> Outcome:
    span = ContentRange.parse(head.content_ranges[0]) if len(head.content_ranges) == 1 else None
    if span is None or span.total is None or span.first is not None:
        return _refuse(plan, Reason.BARE_416)
    if span.total < plan.part.length:
        return _refuse(plan, Reason.SHRUNK)
    if span.total > plan.part.length or plan.part.total not in (None, span.total):
        return _refuse(plan, Reason.CONTRADICTORY_416)
    if _validator_verdict(plan.part.validators, head.validators) is not None:
        return _refuse(plan, Reason.CONTRADICTORY_416)  # of another representation that is as long
    if plan.probe:  # the end that only the closed connection marked was the end (R33)
        return AlreadyWhole(replace(plan.part, total=plan.part.length), Reason.PROBED_WHOLE)
    return _refuse(plan, Reason.MAYBE_WHOLE_416)


# -- parts and ends --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Keep:
    """The first ``length`` bytes are good; ``cut`` bytes behind them are to be cut off (R2)."""

    length: int
    cut: int


def judge_part(state: PartState, file_length: int) -> Keep | Reason:
    """Return what of a part's file may be kept, before its prefix is hashed (R2, R3).

    The sidecar's length counts, never the file's: a file may be preallocated or have a torn
    tail. A shorter file is corrupt.
    """
    if file_length < state.length:
        return Reason.CORRUPT_PART
    return Keep(state.length, file_length - state.length)


class BodyEnd(enum.StrEnum):
    """How the transport said that a body ended (RFC 9112 §8)."""

    FRAMED = "framed"  # Content-Length reached, or the last chunk seen
    CLOSED = "closed"  # the connection closed, and nothing else marks the end
    LOST = "lost"  # the connection broke before the framing's end


def unproven(state: PartState) -> PartState:
    """Return the state of bytes whose end nothing proves: no validator may ever confirm them (R33)."""
    return replace(state, validators=Validators(), proof=Proof.UNPROVEN)


def judge_end(end: BodyEnd, length: int, due: int | None, *, expected: bool) -> Reason:
    """Return ``COMPLETE``, ``INCOMPLETE`` or ``CLOSE_DELIMITED`` for a body that ended.

    *length* is what the part now holds and *due* what it should, in bytes. *expected* says that
    a digest is known that the bytes will be compared with: then it decides, not the framing.
    Rows R31 to R33, R61; RFC 9112 §8.
    """
    if end is BodyEnd.LOST or (due is not None and length != due):
        return Reason.INCOMPLETE
    if end is BodyEnd.CLOSED and due is None and not expected:
        return Reason.CLOSE_DELIMITED
    return Reason.COMPLETE
