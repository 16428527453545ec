"""The second decision: what an answer means for the part on disk.

What may live here: ``judge_response``, which is pure and total, and its rules. RFC 9110 §13 to §15
and RFC 9111 §4.3.4 are behind them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from scrapy_streaming.protocol import codings, ranges
from scrapy_streaming.protocol.answers import (
    AlreadyWhole,
    Append,
    Outcome,
    PassOn,
    Refuse,
    Replace,
    ResponseHead,
    SentRequest,
    Unchanged,
)
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.planning import ConfirmWhole, Fetch, Plan, Resume, Revalidate
from scrapy_streaming.protocol.ranges import ContentRange
from scrapy_streaming.protocol.reasons import REFUSALS, Proof, Reason, Recovery
from scrapy_streaming.protocol.selecting import selecting_key
from scrapy_streaming.protocol.validators import Validators

#: Errors with which some servers answer a Range field that they do not support (R55). Those of a busy
#: server or of a missing back end (502 to 504) are not among them: R59.
_RANGE_ONLY: Final = frozenset({400, 403, 404, 405, 500, 501, 505})


def judge_response(plan: Plan, head: ResponseHead, sent: SentRequest) -> Outcome:
    """Return what the answer *head* to *plan* means, before the first byte of its body."""
    outcome = _judge(plan, head, sent)
    coded = outcome.state.to_decode if isinstance(outcome, Append | Replace) else ()
    return outcome if codings.decodable(coded, sent.decodable) else _refuse(plan, Reason.CODING_UNSUPPORTED)


def _judge(plan: Plan, head: ResponseHead, sent: SentRequest) -> Outcome:
    match head.status:
        case 206 | 304 | 416 if not _selects_the_same(plan, sent):
            # another middleware changed the selecting fields after the plan was made (R40)
            return _refuse(plan, Reason.FOREIGN_304 if head.status == 304 else Reason.UNPROVEN_206)
        case 200 | 203 | 206 if head.odd_length:
            return _refuse(plan, Reason.BAD_CONTENT_LENGTH)
        case 200 | 203:
            return _judge_200(plan, head, sent)
        case 206:
            return _judge_206(plan, head, sent)
        case 304:
            return _judge_304(plan, head)
        case 416 if isinstance(plan, Resume):
            return _judge_416(plan, head)
        case 412 if isinstance(plan, Resume):
            return _refuse(plan, Reason.PRECONDITION_FAILED)
        case 401 | 403 if sent.old_target:
            return _refuse(plan, Reason.EXPIRED_TARGET)
        case status if isinstance(plan, Resume) and status in _RANGE_ONLY and not head.asks_to_wait:
            return _refuse(plan, Reason.RANGE_ERROR)
        case _:
            return PassOn()


def _selects_the_same(plan: Plan, sent: SentRequest) -> bool:
    """Whether the request, as it was sent, selects the representation of the plan (RFC 9110 §12.5.5)."""
    match plan:
        case Resume(part) | ConfirmWhole(part):
            return part.selecting == selecting_key(part.vary, sent.fields)
        case Revalidate(known):
            return known.selecting == selecting_key(known.vary, sent.fields)
        case _:
            return True


def end_is_open(outcome: Outcome) -> bool:
    """Whether an answer does not say where an earlier body with an unmarked end should have ended (R33).

    A 200 without a length does not say it, nor an error or a bare 416 to the range. All other answers prove
    that bytes follow: then the same bytes twice prove nothing.
    """
    match outcome:
        case Replace(state):
            return state.total is None
        case PassOn():
            return True
        case _:
            return outcome.reason in (Reason.RANGE_ERROR, Reason.BARE_416)


def met_another(plan: Plan, outcome: Outcome) -> bool:
    """Whether a part was to be resumed, and the answer is of another representation (R62).

    An archive that is made anew for each request has another validator each time, and so has a file behind
    several servers that make their own tags: resuming it never saves a byte.
    """
    other = (Reason.CHANGED, Reason.JUST_MODIFIED, Reason.CHANGED_206, Reason.WEAKENED_206)
    return isinstance(plan, Resume) and outcome.reason in other


def _refuse(plan: Plan, reason: Reason) -> Refuse:
    """Return the refusal, with ``FAIL`` after a plain GET: no plainer request is left.

    Except two: a GET past every cache after a 304, and one for the URL that redirected to a closed one.
    """
    then = REFUSALS[reason]
    if isinstance(plan, Fetch) and (plan.no_cache or then is not Recovery.REFETCH_NO_CACHE):
        then = then if then is Recovery.ORIGINAL else Recovery.FAIL
    return Refuse(reason, then)


def _state(head: ResponseHead, total: int | None, sent: SentRequest) -> PartState:
    """Return the state of a new part, without validators that the next change may leave as they are (R75)."""
    urls = (sent.original_url, head.url)
    return PartState(
        url=head.url,
        validators=Validators() if head.validators.just_modified else head.validators,
        total=total,
        content_encoding=head.content_encoding,
        vary=head.vary,
        selecting=selecting_key(head.vary, sent.fields),
        repr_digest=head.repr_digest,
        ranges_refused=head.ranges_refused,
        media_type=head.media_type,
        coding_is_content=codings.is_content(head.content_encoding, head.media_type, urls),
    )


def _differ(stored: object, received: object) -> bool:
    """Whether both values are known and differ."""
    return stored is not None and received is not None and stored != received


def _judge_200(plan: Plan, head: ResponseHead, sent: SentRequest) -> Outcome:
    span = ranges.piece(head.content_ranges, head.length)
    if span is not None:  # a 200 should have none, yet its body is that piece (R23)
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
    state = _state(head, total, sent)
    if isinstance(plan, Fetch) and plan.no_range:
        state = replace(state, ranges_refused=True)
    return Replace(state, reason)


def _judge_slice(plan: Plan, head: ResponseHead, span: ContentRange) -> Outcome:
    """Join a piece with status 200 if everything is proven: some object servers resume this way."""
    if isinstance(plan, Resume) and head.length is not None:
        stored_tag, tag = plan.part.validators.etag, head.validators.etag
        tagged = stored_tag is not None and tag is not None and stored_tag.strong_equals(tag)
        same_total = span.total is not None and span.total == plan.part.total
        if tagged and same_total and _why_not_combine(plan, head, span) is None:
            return _append(plan, head, span)
    return _refuse(plan, Reason.CONTENT_RANGE_ON_200)


def _same_representation(part: PartState, head: ResponseHead, total: int | None) -> bool:
    """Whether a 200 is of the part's representation, by all validators that both have.

    A strong tag proves it, or a strong date where both have no tag or a weak one.
    """
    stored, received = part.validators, head.validators
    if head.url != part.url or head.content_encoding != part.content_encoding or head.odd_etag:
        return False
    if _differ(part.total, total) or _differ(part.repr_digest, head.repr_digest):
        return False
    if _validator_verdict(stored, received) is not None or (stored.etag is None) != (received.etag is None):
        return False
    by_date = stored.strong_date and stored.last_modified == received.last_modified
    return stored.strong_etag is not None or by_date


def _judge_206(plan: Plan, head: ResponseHead, sent: SentRequest) -> Outcome:
    if (head.media_type or "").lower().startswith("multipart/byteranges"):
        return _refuse(plan, Reason.MULTIPART_206)
    total = ranges.complete_length(head.content_ranges, head.length)
    if total is not None:
        state = _state(head, total, sent)
        return Replace(
            replace(state, repr_digest=head.repr_digest or head.content_digest),
            Reason.JUST_MODIFIED if head.validators.just_modified else Reason.WHOLE_IN_206,
            ranged=True,
        )
    if not isinstance(plan, Resume):
        return _refuse(plan, Reason.UNSOLICITED_206)
    span = ranges.satisfied(head.content_ranges, head.length)
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
    if plan.overlap:  # its first bytes are compared, and at the end the digest
        alike = head.url == part.url and span.total == part.total and span.end > part.length
        return None if alike else Reason.UNPROVEN_206
    if head.odd_etag or not _proven(part, head, span):
        return Reason.UNPROVEN_206
    return None


def _validator_verdict(stored: Validators, received: Validators) -> Reason | None:
    """Return why the validators forbid joining: all that both sides have must agree (R13, R14)."""
    if stored.etag is not None and received.etag is not None:
        same = stored.etag.weak_equals(received.etag)
        if not same or (received.etag.weak and not stored.etag.weak):
            return Reason.WEAKENED_206 if same else Reason.CHANGED_206
    return Reason.CHANGED_206 if _differ(stored.last_modified, received.last_modified) else None


def _proven(part: PartState, head: ResponseHead, span: ContentRange) -> bool:
    """Whether the 206 is proven to be of the part's representation (R10; else R5, R11, R12)."""
    stored, received = part.validators, head.validators
    same_total = part.total is not None and span.total == part.total
    same_digest = part.repr_digest is not None and head.repr_digest == part.repr_digest
    same_date = stored.last_modified is not None and received.last_modified == stored.last_modified
    if head.url != part.url:  # equal tags may name different bytes elsewhere (§8.8.1)
        return same_total and same_digest
    if stored.strong_etag is not None:
        return received.etag is not None or (same_total and (same_date or same_digest))
    if stored.etag is None and received.etag is not None:  # a tag that the part never had
        return False
    return same_total and same_date and stored.strong_date


def _append(plan: Resume, head: ResponseHead, span: ContentRange) -> Append:
    part = plan.part
    total = part.total if span.total is None else span.total
    until = span.end
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
        validators=_updated(part.validators, head.validators),
        repr_digest=head.repr_digest or part.repr_digest,
        proof=Proof.LENGTH if plan.overlap else Proof.STRONG,
    )
    provisional = head.length is None or head.content_digest is not None
    return Append(state, until, reason, head.content_digest, provisional, plan.overlap)


def _judge_304(plan: Plan, head: ResponseHead) -> Outcome:
    match plan:
        case Revalidate(known):
            stored = known.validators
            if head.url != known.final_url or not _agrees(stored, head):
                return _refuse(plan, Reason.FOREIGN_304)
            return Unchanged(replace(known, validators=_updated(stored, head.validators)))
        case ConfirmWhole(part) if part.total in (None, part.length):
            strongly = part.total is None  # only this answer says that the part is whole
            if head.url != part.url or head.odd_etag:
                return _refuse(plan, Reason.FOREIGN_304)
            if not _agrees(part.validators, head, strongly=strongly):
                return _refuse(plan, Reason.FOREIGN_304)
            return AlreadyWhole(replace(part, total=part.length))
        case _:
            return _refuse(plan, Reason.UNASKED_304)


def _agrees(stored: Validators, head: ResponseHead, *, strongly: bool = False) -> bool:
    """Whether a 304's validators, if it has any, are those of what is stored (RFC 9111 §4.3.4).

    A strong tag must equal the stored one strongly: it says which bytes are current, and a stored weak tag
    does not prove that they are here. A weak tag must equal it weakly, unless *strongly*. Another date
    always means another representation: some servers keep the tag of a file that changed (R13).
    """
    stored_tag, tag = stored.etag, head.validators.etag
    if _differ(stored.last_modified, head.validators.last_modified):
        return False
    if stored_tag is not None and tag is not None:
        return stored_tag.strong_equals(tag) or (tag.weak and not strongly and stored_tag.weak_equals(tag))
    return tag is None and not (stored_tag is not None and head.odd_etag)


def _updated(old: Validators, new: Validators) -> Validators:
    """Return the validators after a 304 or 206: its fields replace the stored ones (RFC 9111 §3.2, §3.4).

    Last-Modified and Date stay a pair: whether a date is strong depends on the Date of the response that
    the bytes came with (RFC 9110 §8.8.2.2), so a later Date must not make the same date stronger.
    """
    dated = old if new.last_modified in (None, old.last_modified) else new
    return Validators(new.etag or old.etag, dated.last_modified, dated.date)


def _judge_416(plan: Resume, head: ResponseHead) -> Outcome:
    length = ranges.unsatisfied_length(head.content_ranges)
    if length is None:
        return _refuse(plan, Reason.BARE_416)
    if length < plan.part.length:
        return _refuse(plan, Reason.SHRUNK)
    if length > plan.part.length or plan.part.total not in (None, length):
        return _refuse(plan, Reason.CONTRADICTORY_416)
    if _validator_verdict(plan.part.validators, head.validators) is not None:
        return _refuse(plan, Reason.CONTRADICTORY_416)  # of another representation that is as long
    if plan.probe:  # the end that only the closed connection marked was the end (R33)
        return AlreadyWhole(replace(plan.part, total=plan.part.length), Reason.PROBED_WHOLE)
    return _refuse(plan, Reason.MAYBE_WHOLE_416)
