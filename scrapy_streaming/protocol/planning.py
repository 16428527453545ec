"""The first decision: what to ask for, given what is stored.

What may live here: plans, and ``plan_request``, which is pure and total. RFC 9110 §13 and §14 are
behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias, assert_never

from scrapy_streaming.protocol.jobs import StoredRepresentation
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.reasons import Proof, Reason, Recovery
from scrapy_streaming.protocol.selecting import selected_again
from scrapy_streaming.protocol.validators import Validators

#: Bytes at the end of a part that are asked for again and compared (R19).
OVERLAP: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request before it is planned: its URL without fragment, its fields by lower-case name.

    Without ``takes_weak`` a 304 to a weak entity-tag confirms nothing: equivalent is not equal (R47).
    ``unvalidated``: a part without a strong validator may be resumed if its end and the length agree,
    because the digest of the whole is known and will be compared (R6).
    """

    url: str
    fields: Mapping[str, str]
    takes_weak: bool = True
    unvalidated: bool = False


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask for the whole representation. ``no_range``: the server answers Range with errors."""

    reason: Reason
    no_cache: bool = False
    no_range: bool = False

    def fields(self) -> dict[str, str]:
        """Return the request fields of this plan."""
        return {"Cache-Control": "no-cache"} if self.no_cache else {}


@dataclass(frozen=True, slots=True)
class Resume:
    """Ask for the bytes from ``part.length`` on, if the representation is still the same.

    ``probe``: the part may be whole, and the request asks whether any byte follows (R33). The last
    ``overlap`` bytes of the part are asked for again and compared, where no validator is strong (R19).
    """

    part: PartState
    reason: Reason
    probe: bool = False
    overlap: int = 0

    @property
    def first(self) -> int:
        """The offset of the first byte that is asked for."""
        return self.part.length - self.overlap

    def fields(self) -> dict[str, str]:
        """Return Range, with the one condition that the part's validators allow.

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
    """Ask whether a whole part is the current representation (R7); or one that a 416 calls whole (R50)."""

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
    request: PlannedRequest,
    recovery: Recovery = Recovery.NONE,
    *,
    fresh: bool = True,
) -> Plan:
    """Return what to ask for, given the verified *part* and the stored representation *known*.

    Rows R4 to R7, R71 and R72. A part that can be resumed comes before a revalidation: the two
    cannot be combined, for a 304 would win over the 206 (RFC 9110 §13.2.2). *fresh*: a whole part is
    young enough to be published with no request, or its digest is known (R7). Raises
    ``ValueError`` for ``Recovery.FAIL``, after which no request is made.
    """
    match recovery:
        case Recovery.REFETCH | Recovery.DISCARD:
            return Fetch(Reason.BARE)
        case Recovery.WITHOUT_RANGE:
            return Fetch(Reason.BARE, no_range=True)
        case Recovery.SINGLE_SHOT:
            return Fetch(Reason.UNSTABLE_VALIDATOR)
        case Recovery.REFETCH_NO_CACHE:
            return Fetch(Reason.BARE, no_cache=True)
        case Recovery.PROBE if part is None:
            return Fetch(Reason.BARE)
        case Recovery.NONE | Recovery.ORIGINAL | Recovery.CONFIRM | Recovery.PROBE:
            return _plan_conditional(part, known, request, recovery, fresh=fresh)
        case Recovery.FAIL:
            msg = "no request follows a refusal that says `fail`"
            raise ValueError(msg)
        case _:  # pragma: no cover
            assert_never(recovery)


def _plan_conditional(
    part: PartState | None,
    known: StoredRepresentation | None,
    request: PlannedRequest,
    recovery: Recovery,
    *,
    fresh: bool,
) -> Plan:
    """Return a plan that builds on the part, else on the stored representation, if it can."""
    plan = Fetch(Reason.NOTHING_STORED) if part is None else _plan_part(part, request, recovery, fresh)
    if isinstance(plan, Fetch) and known is not None and _may_revalidate(known, request):
        return Fetch(Reason.WEAK_VALIDATOR) if _too_weak(known.validators, request) else Revalidate(known)
    return plan


def _plan_part(part: PartState, request: PlannedRequest, recovery: Recovery, fresh: bool) -> Plan:
    if part.url != request.url or not selected_again(part.vary, part.selecting, request.fields):
        return Fetch(Reason.FOREIGN_PART)
    if part.whole:
        return _plan_whole(part, request, fresh)
    if part.length == 0:  # Range from offset 0 would save nothing (R26)
        return Fetch(Reason.NOTHING_STORED)
    if part.ranges_refused:
        return Fetch(Reason.RANGE_REFUSED_BEFORE)
    if recovery is Recovery.PROBE:
        return Resume(part, Reason.PROBE_END, probe=True)
    plan = _plan_short(part, recovery)
    if isinstance(plan, Fetch) and request.unvalidated and _may_overlap(part):
        return Resume(part, Reason.TAIL_OVERLAP, overlap=min(OVERLAP, part.length))
    return plan


def _may_overlap(part: PartState) -> bool:
    """Whether comparing the end of a part can show that it is of another representation (R6)."""
    return part.total is not None and not part.content_encoding


def _plan_short(part: PartState, recovery: Recovery) -> Plan:
    """Return how to resume a part, by the validators that it has (R5, R6, R10, R12, R72)."""
    validators = part.validators
    if validators.if_range() is not None and recovery is Recovery.CONFIRM and part.total is None:
        return ConfirmWhole(part)  # R50; a part that is known to be short is never confirmed
    if validators.strong_etag is not None:
        return Resume(part, Reason.STRONG_VALIDATOR)
    if validators.if_range() is not None:
        return Resume(part, Reason.STRONG_DATE)
    # without a complete length a piece could not be joined
    if validators.unmodified_since() is not None and part.total is not None:
        return Resume(part, Reason.UNMODIFIED_SINCE)
    return Fetch(Reason.NO_VALIDATOR if validators.etag is None else Reason.WEAK_VALIDATOR)


def _plan_whole(part: PartState, request: PlannedRequest, fresh: bool) -> Plan:
    """Return how a part that is whole and was not published becomes so (R7)."""
    if fresh:
        return PublishPart(part)
    if _too_weak(part.validators, request):
        return Fetch(Reason.WEAK_VALIDATOR)
    if part.validators.conditional_fields() and not part.content_encoding:
        return ConfirmWhole(part)
    return Fetch(Reason.NO_VALIDATOR)


def _too_weak(validators: Validators, request: PlannedRequest) -> bool:
    """Whether a 304 could be about other bytes (R47)."""
    return not request.takes_weak and validators.etag is not None and validators.etag.weak


def _may_revalidate(known: StoredRepresentation, request: PlannedRequest) -> bool:
    return (
        known.final_url == request.url
        and bool(known.validators.conditional_fields())
        and known.proof not in ("", Proof.UNPROVEN)  # "": recorded by an older release, which checked less
        and selected_again(known.vary, known.selecting, request.fields)
    )
