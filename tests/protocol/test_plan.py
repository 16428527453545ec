"""The first decision: what is asked for, and with which fields."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from protocol_kit import (
    ASKING,
    DATED,
    ELSEWHERE,
    MODIFIED,
    NOTHING,
    SENT,
    STRONG,
    URL,
    WEAK,
    Answer,
    a_known,
    a_part,
    answer,
    judged,
    plans,
    request_violations,
    resume,
    validators,
)

from scrapy_streaming.protocol.judging import met_another
from scrapy_streaming.protocol.planning import (
    OVERLAP,
    ConfirmWhole,
    Fetch,
    PlannedRequest,
    PublishPart,
    Resume,
    Revalidate,
    plan_request,
)
from scrapy_streaming.protocol.reasons import Reason, Recovery
from scrapy_streaming.protocol.selecting import selecting_key

RANGE = {"Range": "bytes=100-", "If-Range": '"v1"'}
DATED_RANGE = {"Range": "bytes=100-", "If-Range": MODIFIED}
BOTH = {"If-None-Match": '"v1"', "If-Modified-Since": MODIFIED}
SINCE = {"Range": "bytes=100-", "If-Unmodified-Since": MODIFIED}
SIGNED_IN = PlannedRequest(URL, {"authorization": "Basic b25l"})
ODD_TAG = validators("v1", MODIFIED)


@pytest.mark.parametrize(
    ("part", "reason", "fields"),
    [
        pytest.param(None, Reason.NOTHING_STORED, {}, id="R27-nothing-stored"),
        pytest.param(a_part(), Reason.STRONG_VALIDATOR, RANGE, id="R10-strong-tag"),
        pytest.param(a_part(total=None), Reason.STRONG_VALIDATOR, RANGE, id="R10-strong-tag-unknown-total"),
        pytest.param(a_part(DATED), Reason.STRONG_DATE, DATED_RANGE, id="R12-strong-date"),
        pytest.param(a_part(url=ELSEWHERE), Reason.FOREIGN_PART, {}, id="R4-other-url"),
        pytest.param(a_part(selecting="0" * 64), Reason.FOREIGN_PART, {}, id="R4-other-selecting-fields"),
        pytest.param(a_part(selecting=""), Reason.FOREIGN_PART, {}, id="R4-no-selecting-key"),
        pytest.param(a_part(vary=("*",)), Reason.FOREIGN_PART, {}, id="R40-vary-star"),
        pytest.param(a_part(vary=("cookie",)), Reason.FOREIGN_PART, {}, id="R40-vary-cookie"),
        pytest.param(
            a_part(vary=("accept-encoding",)), Reason.STRONG_VALIDATOR, RANGE, id="R10-vary-accept-encoding"
        ),
        pytest.param(a_part(vary=("*",), length=1000), Reason.FOREIGN_PART, {}, id="R4-whole-but-foreign"),
        pytest.param(a_part(WEAK), Reason.UNMODIFIED_SINCE, SINCE, id="R5-weak-tag-and-strong-date"),
        pytest.param(a_part(WEAK, total=None), Reason.WEAK_VALIDATOR, {}, id="R5-length-is-not-known"),
        pytest.param(
            a_part(validators('W/"v1"', MODIFIED, MODIFIED)), Reason.WEAK_VALIDATOR, {}, id="R5-weak-date"
        ),
        pytest.param(a_part(validators('W/"v1"')), Reason.WEAK_VALIDATOR, {}, id="R5-weak-tag"),
        pytest.param(a_part(NOTHING), Reason.NO_VALIDATOR, {}, id="R6-no-validator"),
        pytest.param(a_part(ODD_TAG), Reason.NO_VALIDATOR, {}, id="R39-odd-tag-and-date"),
        pytest.param(a_part(validators(None, MODIFIED, None)), Reason.NO_VALIDATOR, {}, id="R72-no-date"),
        pytest.param(
            a_part(validators(None, MODIFIED, MODIFIED)), Reason.NO_VALIDATOR, {}, id="R72-same-second"
        ),
        pytest.param(
            a_part(ranges_refused=True), Reason.RANGE_REFUSED_BEFORE, {}, id="R71-accept-ranges-none"
        ),
        pytest.param(a_part(length=0), Reason.NOTHING_STORED, {}, id="R26-nothing-at-offset-0"),
    ],
)
def test_plan_for_a_part(part, reason, fields):
    plan = plan_request(part, None, ASKING)
    assert isinstance(plan, Resume if "Range" in fields else Fetch)
    assert (plan.reason, plan.fields()) == (reason, fields)


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(a_part(length=1000), id="R7-whole"),
        pytest.param(a_part(NOTHING, length=1000), id="R7-whole-without-validators"),
        pytest.param(a_part(length=1000, ranges_refused=True), id="R7-whole-and-ranges-refused"),
        pytest.param(a_part(length=0, total=0), id="R7-whole-and-empty"),
    ],
)
def test_whole_part_is_published_without_a_request(part):
    assert plan_request(part, a_known(), ASKING) == PublishPart(part)
    assert PublishPart(part).fields() == {}


@pytest.mark.parametrize(
    ("part", "kind", "fields"),
    [
        pytest.param(a_part(length=1000), ConfirmWhole, BOTH, id="R7-strong-tag"),
        pytest.param(
            a_part(WEAK, length=1000), ConfirmWhole, {**BOTH, "If-None-Match": 'W/"v1"'}, id="R7-weak-tag"
        ),
        pytest.param(a_part(NOTHING, length=1000), Fetch, {}, id="R7-without-validators"),
        pytest.param(a_part(length=1000, content_encoding="gzip"), Fetch, {}, id="R7-coded"),
    ],
)
def test_a_whole_part_that_is_not_fresh_is_asked_about(part, kind, fields):
    plan = plan_request(part, None, ASKING, fresh=False)
    assert (type(plan), plan.fields()) == (kind, fields)


@pytest.mark.parametrize(
    ("part", "known", "fields"),
    [
        pytest.param(None, a_known(), BOTH, id="R43-tag-and-date"),
        pytest.param(None, a_known(WEAK), {**BOTH, "If-None-Match": 'W/"v1"'}, id="R47-weak-tag"),
        pytest.param(None, a_known(DATED), {"If-Modified-Since": MODIFIED}, id="R43-date"),
        pytest.param(None, a_known(ODD_TAG), {"If-Modified-Since": MODIFIED}, id="R39-date-beside-odd-tag"),
        pytest.param(a_part(validators('W/"v1"')), a_known(), BOTH, id="R5-stored-beside-weak-part"),
        pytest.param(a_part(url=ELSEWHERE), a_known(), BOTH, id="R4-stored-beside-foreign-part"),
    ],
)
def test_what_is_stored_is_revalidated(part, known, fields):
    plan = plan_request(part, known, ASKING)
    assert isinstance(plan, Revalidate)
    assert (plan.reason, plan.fields()) == (Reason.STORED, fields)


@pytest.mark.parametrize(
    "known",
    [
        pytest.param(a_known(NOTHING), id="R43-no-validator"),
        pytest.param(a_known(proof=""), id="R33-by-a-release-that-proved-less"),
        pytest.param(a_known(proof="unproven"), id="R33-unproven"),
        pytest.param(a_known(final_url=ELSEWHERE), id="R60-of-another-url"),
        pytest.param(a_known(vary=("*",)), id="R40-stored-vary-star"),
        pytest.param(a_known(selecting="0" * 64), id="R40-stored-for-other-fields"),
    ],
)
def test_what_cannot_be_revalidated_is_fetched(known):
    assert plan_request(None, known, ASKING) == Fetch(Reason.NOTHING_STORED)


def test_a_resumable_part_comes_before_a_revalidation():
    assert isinstance(plan_request(a_part(), a_known(), ASKING), Resume)


# -- selecting fields ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vary", "then", "now", "same"),
    [
        pytest.param((), {"accept": "a/b"}, {"accept": "c/d"}, True, id="R4-field-that-does-not-select"),
        pytest.param(("accept",), {"accept": "a/b"}, {"accept": "a/b"}, True, id="R4-same-selecting-field"),
        pytest.param(("accept",), {"accept": "a/b"}, {"accept": "c/d"}, False, id="R4-other-selecting-field"),
        pytest.param(("accept",), {"accept": "a/b"}, {}, False, id="R4-selecting-field-is-gone"),
        pytest.param(
            ("accept-encoding",),
            {"accept-encoding": "identity"},
            {"accept-encoding": "gzip"},
            True,
            id="R4-accept-encoding-is-ours",
        ),
        pytest.param(("range",), {"range": "bytes=5-"}, {}, True, id="R4-range-is-ours"),
        pytest.param(
            (), {"authorization": "one"}, {"authorization": "two"}, False, id="R73-other-credentials"
        ),
        pytest.param((), {"authorization": "one"}, {}, False, id="R73-credentials-are-gone"),
        pytest.param((), {"authorization": "one"}, {"authorization": "one"}, True, id="R73-same-credentials"),
    ],
)
def test_selecting_key(vary, then, now, same):
    assert (selecting_key(vary, then) == selecting_key(vary, now)) == same


@pytest.mark.parametrize(
    ("part", "known"),
    [
        pytest.param(a_part(), None, id="R73-part"),
        pytest.param(a_part(length=1000), None, id="R73-whole-part"),
        pytest.param(None, a_known(), id="R73-stored"),
    ],
)
def test_nothing_is_shared_across_credentials(part, known):
    assert isinstance(plan_request(part, known, SIGNED_IN), Fetch)


def test_credentials_are_not_in_the_key():
    assert "b25l" not in selecting_key(("authorization",), SIGNED_IN.fields)


# -- recoveries ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recovery", "fields"),
    [
        pytest.param(Recovery.REFETCH, {}, id="R21-bare"),
        pytest.param(Recovery.DISCARD, {}, id="R13-part-of-another-representation"),
        pytest.param(Recovery.SINGLE_SHOT, {}, id="R62-unstable-validator"),
        pytest.param(Recovery.WITHOUT_RANGE, {}, id="R55-without-range"),
        pytest.param(Recovery.REFETCH_NO_CACHE, {"Cache-Control": "no-cache"}, id="R46-past-every-cache"),
        pytest.param(Recovery.REFETCH_NO_CACHE, {"Cache-Control": "no-cache"}, id="R44-blob-missing"),
        pytest.param(Recovery.REFETCH_NO_CACHE, {"Cache-Control": "no-cache"}, id="R45-foreign-304"),
    ],
)
def test_refetch_ignores_all_that_is_stored(recovery, fields):
    plan = plan_request(a_part(), a_known(), ASKING, recovery)
    assert isinstance(plan, Fetch)
    assert plan.fields() == fields


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        pytest.param(a_part(total=None), ConfirmWhole, id="R50-strong-tag"),
        pytest.param(a_part(DATED, total=None), ConfirmWhole, id="R50-strong-date"),
        pytest.param(a_part(), Resume, id="R50-short-part-is-not-asked-about"),
        pytest.param(a_part(length=1000), PublishPart, id="R50-whole-part-needs-no-asking"),
        pytest.param(a_part(total=None, url=ELSEWHERE), Fetch, id="R50-foreign-part"),
        pytest.param(a_part(total=None, vary=("cookie",)), Fetch, id="R50-other-selecting-fields"),
        pytest.param(a_part(WEAK, total=None), Fetch, id="R50-weak-tag"),
        pytest.param(a_part(total=None, length=0), Fetch, id="R50-empty-part"),
        pytest.param(None, Fetch, id="R50-no-part"),
    ],
)
def test_confirming_a_part(part, kind):
    plan = plan_request(part, None, ASKING, Recovery.CONFIRM)
    assert type(plan) is kind
    if kind is ConfirmWhole:
        assert plan.fields() == part.validators.conditional_fields() != {}


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        pytest.param(a_part(total=None), RANGE, id="R33-strong-tag"),
        pytest.param(a_part(DATED, total=None), DATED_RANGE, id="R33-strong-date"),
        pytest.param(a_part(WEAK, total=None), SINCE, id="R33-weak-tag"),
        pytest.param(a_part(NOTHING, total=None), {"Range": "bytes=100-"}, id="R33-no-validator"),
        pytest.param(a_part(total=None, ranges_refused=True), {}, id="R33-ranges-refused-before"),
        pytest.param(a_part(total=None, length=0), {}, id="R33-nothing-came"),
        pytest.param(None, {}, id="R33-no-part"),
    ],
)
def test_probing_a_part(part, fields):
    plan = plan_request(part, None, ASKING, Recovery.PROBE)
    assert plan.fields() == fields
    assert isinstance(plan, Resume if fields else Fetch)
    assert request_violations(plan) == []


def test_a_probe_without_a_part_asks_plainly_whatever_is_stored():  # R33
    assert plan_request(None, a_known(), ASKING, Recovery.PROBE) == Fetch(Reason.BARE)


def test_the_original_url_is_asked_as_for_the_first_time():  # R57
    part = a_part()
    assert plan_request(part, None, ASKING, Recovery.ORIGINAL) == plan_request(part, None, ASKING)


def test_no_request_is_planned_after_a_refusal_that_no_request_would_help():
    with pytest.raises(ValueError, match="fail"):
        plan_request(a_part(), None, ASKING, Recovery.FAIL)


@pytest.mark.parametrize("recovery", [recovery for recovery in Recovery if recovery is not Recovery.FAIL])
def test_only_a_conditional_request_builds_on_what_is_stored(recovery):
    plan = plan_request(a_part(total=None), a_known(), ASKING, recovery)
    assert isinstance(plan, Fetch) is not recovery.is_conditional


def test_redirect_is_planned_anew_for_its_target():  # R60
    part = a_part(url=ELSEWHERE)
    assert isinstance(plan_request(part, a_known(), PlannedRequest(URL, SENT)), Revalidate)
    assert isinstance(plan_request(part, a_known(), PlannedRequest(ELSEWHERE, SENT)), Resume)


# -- whatever is stored ----------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=500)
@given(plans)
def test_no_plan_ever_sends_what_it_must_not(plan):
    assert request_violations(plan) == []


def test_strong_validators_are_what_the_kit_says():
    assert STRONG.strong_etag is not None
    assert DATED.strong_date
    assert WEAK.if_range() is None


def rest(etag: str) -> Answer:
    """What an answer to ``resume()`` brings: the bytes that were asked for, of a representation."""
    return answer(206, 900, etag=etag, content_range="bytes 100-999/1000")


@pytest.mark.parametrize(
    ("plan", "got", "another"),
    [
        pytest.param(resume(), answer(200, 9, etag='"v2"'), True, id="R62-changed"),
        pytest.param(resume(), rest('"v2"'), True, id="R62-condition-ignored"),
        pytest.param(resume(), rest('W/"v1"'), True, id="R62-weakened"),
        pytest.param(resume(), answer(200, 1000, etag='"v1"'), False, id="R62-range-ignored"),
        pytest.param(resume(), rest('"v1"'), False, id="R62-resumed"),
        pytest.param(Revalidate(a_known()), answer(200, 9, etag='"v2"'), False, id="R62-stored-one-changed"),
    ],
)
def test_whether_a_part_met_another_representation(plan, got, another):
    assert met_another(plan, judged(plan, got)) is another


@pytest.mark.parametrize(
    ("part", "known", "expected"),
    [
        pytest.param(None, a_known(WEAK), Fetch(Reason.WEAK_VALIDATOR), id="R47-refetch"),
        pytest.param(None, a_known(), Revalidate(a_known()), id="R47-a-strong-tag-is-asked-about"),
        pytest.param(None, a_known(DATED), Revalidate(a_known(DATED)), id="R47-a-date-alone-is-asked-about"),
        pytest.param(
            a_part(WEAK, length=1000), None, Fetch(Reason.WEAK_VALIDATOR), id="R47-a-whole-part-is-fetched"
        ),
    ],
)
def test_where_a_weak_tag_confirms_nothing_it_is_not_asked_about(part, known, expected) -> None:
    wary = PlannedRequest(ASKING.url, ASKING.fields, takes_weak=False)
    assert plan_request(part, known, wary, fresh=False) == expected


LONG = 1 << 20


@pytest.mark.parametrize(
    ("part", "plan"),
    [
        pytest.param(a_part(NOTHING, length=LONG, total=2 * LONG), OVERLAP, id="R6-untold-part"),
        pytest.param(a_part(validators('W/"v1"'), length=LONG, total=2 * LONG), OVERLAP, id="R6-weak-tag"),
        pytest.param(a_part(NOTHING, length=100), 100, id="R6-a-short-part-is-compared-whole"),
        pytest.param(a_part(NOTHING, total=None), Fetch(Reason.NO_VALIDATOR), id="R6-unknown-length"),
        pytest.param(
            a_part(NOTHING, content_encoding="gzip"), Fetch(Reason.NO_VALIDATOR), id="R6-coded-part"
        ),
        pytest.param(a_part(NOTHING, url=ELSEWHERE), Fetch(Reason.FOREIGN_PART), id="R6-foreign-part"),
        pytest.param(a_part(NOTHING, length=0), Fetch(Reason.NOTHING_STORED), id="R6-empty-part"),
    ],
)
def test_where_a_digest_decides_the_end_of_an_untold_part_is_asked_for_again(part, plan) -> None:
    daring = PlannedRequest(ASKING.url, ASKING.fields, unvalidated=True)
    wanted = Resume(part, Reason.TAIL_OVERLAP, overlap=plan) if isinstance(plan, int) else plan
    found = plan_request(part, None, daring)
    assert found == wanted
    if isinstance(found, Resume):
        assert found.fields() == {"Range": f"bytes={part.length - found.overlap}-"}
    assert isinstance(plan_request(part, None, ASKING), Fetch), "without the setting, or a digest"


def test_a_part_with_a_strong_validator_is_resumed_by_it_all_the_same() -> None:
    daring = PlannedRequest(ASKING.url, ASKING.fields, unvalidated=True)
    assert plan_request(a_part(), None, daring) == Resume(a_part(), Reason.STRONG_VALIDATOR)
