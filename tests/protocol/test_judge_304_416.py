"""304, 412 and 416: what they prove about what is stored, and what they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from protocol_kit import (
    ASKING,
    DATE,
    DATED,
    ELSEWHERE,
    MODIFIED,
    NOTHING,
    OLDER,
    SOON,
    STRONG,
    WEAK,
    a_known,
    a_part,
    answer,
    judged,
    resume,
    validators,
    violations,
)

from scrapy_streaming.protocol.answers import (
    AlreadyWhole,
    Append,
    PassOn,
    Refuse,
    Replace,
    SentRequest,
    Unchanged,
)
from scrapy_streaming.protocol.judging import judge_response
from scrapy_streaming.protocol.planning import (
    ConfirmWhole,
    Fetch,
    PublishPart,
    Resume,
    Revalidate,
    plan_request,
)
from scrapy_streaming.protocol.reasons import REFUSALS, Reason, Recovery
from scrapy_streaming.protocol.validators import Validators

GET = Fetch(Reason.NOTHING_STORED)
NO_CACHE = Fetch(Reason.BARE, no_cache=True)
PS, PD = resume(), resume(a_part(DATED))
OPEN = resume(a_part(total=None))
ODD = validators("v1", MODIFIED)


@pytest.mark.parametrize(
    ("known", "fields", "after"),
    [
        pytest.param(validators('"v1"', MODIFIED), {}, validators('"v1"', MODIFIED), id="R43-bare"),
        pytest.param(
            validators('"v1"', MODIFIED), {"etag": '"v1"'}, validators('"v1"', MODIFIED), id="R43-same-tag"
        ),
        pytest.param(
            validators('"v1"', MODIFIED),
            {"last_modified": MODIFIED},
            validators('"v1"', MODIFIED),
            id="R43-same-date",
        ),
        pytest.param(
            validators('"v1"', MODIFIED),
            {"etag": 'W/"v1"'},
            validators('W/"v1"', MODIFIED),
            id="R43-weakened-tag",
        ),
        pytest.param(WEAK, {"etag": 'W/"v1"'}, WEAK, id="R47-same-weak-tag"),
        pytest.param(WEAK, {}, WEAK, id="R47-weak-tag-not-repeated"),
        pytest.param(DATED, {"last_modified": MODIFIED, "date": DATE}, DATED, id="R43-by-date"),
        pytest.param(DATED, {}, DATED, id="R43-by-date-not-repeated"),
        pytest.param(
            validators('"v1"'),
            {"last_modified": MODIFIED},
            validators('"v1"', MODIFIED, None),
            id="R43-learnt",
        ),
        pytest.param(ODD, {"etag": "v1", "last_modified": MODIFIED}, ODD, id="R39-unquoted-tag-again"),
        pytest.param(
            Validators(None, MODIFIED, SOON),
            {"last_modified": MODIFIED, "date": DATE},
            Validators(None, MODIFIED, SOON),
            id="R72-later-date-does-not-make-it-stronger",
        ),
    ],
)
def test_304_keeps_what_is_stored(known, fields, after):
    plan = Revalidate(a_known(known))
    got = answer(304, 0, **fields)
    outcome = judged(plan, got)
    assert isinstance(outcome, Unchanged), outcome
    assert outcome.reason is Reason.NOT_MODIFIED
    assert outcome.known == a_known(after)
    assert violations(plan, got, outcome) == []


@pytest.mark.parametrize(
    ("known", "got"),
    [
        pytest.param(validators('"v1"', MODIFIED), answer(304, etag='"v2"'), id="R45-other-strong-tag"),
        pytest.param(validators('"v1"', MODIFIED), answer(304, etag='W/"v2"'), id="R45-other-weak-tag"),
        pytest.param(WEAK, answer(304, etag='"v1"'), id="R45-strong-tag-where-ours-is-weak"),
        pytest.param(
            DATED, answer(304, etag='"v1"', last_modified=MODIFIED), id="R45-tag-where-ours-is-a-date"
        ),
        pytest.param(DATED, answer(304, last_modified=OLDER), id="R45-other-date"),
        pytest.param(
            validators('"v1"', MODIFIED),
            answer(304, etag='"v1"', last_modified=OLDER),
            id="R13-our-tag-and-another-date",
        ),
        pytest.param(
            validators('"v1"', MODIFIED), answer(304, last_modified=OLDER), id="R45-untagged-other-date"
        ),
        pytest.param(ODD, answer(304, etag="v1", last_modified=OLDER), id="R45-odd-tag-other-date"),
        pytest.param(validators('"v1"', MODIFIED), answer(304, etag="v1"), id="R45-our-tag-unquoted"),
        pytest.param(
            validators('"v1"', MODIFIED), answer(304, etag=['"v1"', '"v2"']), id="R45-our-tag-and-another"
        ),
        pytest.param(
            validators('"v1"', MODIFIED), answer(304, 0, ELSEWHERE, etag='"v1"'), id="R45-another-url"
        ),
    ],
)
def test_304_of_something_else_is_refused(known, got):
    plan = Revalidate(a_known(known))
    assert judged(plan, got) == Refuse(Reason.FOREIGN_304, Recovery.REFETCH_NO_CACHE)


@pytest.mark.parametrize(
    ("plan", "then"),
    [
        pytest.param(GET, Recovery.REFETCH_NO_CACHE, id="R46-plain-get"),
        pytest.param(Fetch(Reason.BARE), Recovery.REFETCH_NO_CACHE, id="R46-bare-retry"),
        pytest.param(PS, Recovery.REFETCH_NO_CACHE, id="R46-range-request"),
        pytest.param(PD, Recovery.REFETCH_NO_CACHE, id="R46-dated-range-request"),
        pytest.param(PublishPart(a_part(length=1000)), Recovery.REFETCH_NO_CACHE, id="R46-nothing-asked"),
        pytest.param(NO_CACHE, Recovery.FAIL, id="R46-second-time"),
    ],
)
def test_304_that_nobody_asked_for(plan, then):
    assert judged(plan, answer(304, etag='"v1"')) == Refuse(Reason.UNASKED_304, then)


@pytest.mark.parametrize("reason", [pytest.param(Reason.BLOB_MISSING, id="R44-blob-missing")])
def test_304_without_its_blob_leads_past_every_cache(reason):
    assert REFUSALS[reason] is Recovery.REFETCH_NO_CACHE
    plan = plan_request(None, a_known(), ASKING, Recovery.REFETCH_NO_CACHE)
    assert plan.fields() == {"Cache-Control": "no-cache"}


# -- is the part whole? ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "fields"),
    [
        pytest.param(validators('"v1"', MODIFIED), {}, id="R49-bare"),
        pytest.param(validators('"v1"', MODIFIED), {"etag": '"v1"'}, id="R50-same-tag"),
        pytest.param(validators('"v1"', MODIFIED), {"last_modified": MODIFIED}, id="R50-same-date"),
        pytest.param(DATED, {"last_modified": MODIFIED}, id="R50-by-date"),
    ],
)
def test_304_confirms_a_whole_part(told, fields):
    plan = ConfirmWhole(a_part(told, total=None))
    got = answer(304, **fields)
    outcome = judged(plan, got)
    assert outcome == AlreadyWhole(a_part(told, total=100))
    assert outcome.reason is Reason.CONFIRMED_WHOLE
    assert violations(plan, got, outcome) == []


@pytest.mark.parametrize(
    ("part", "got", "reason"),
    [
        pytest.param(a_part(total=None), answer(304, etag='"v2"'), Reason.FOREIGN_304, id="R45-other-tag"),
        pytest.param(
            a_part(total=None), answer(304, etag='W/"v1"'), Reason.FOREIGN_304, id="R50-weakened-tag"
        ),
        pytest.param(a_part(total=None), answer(304, etag="v1"), Reason.FOREIGN_304, id="R50-odd-tag"),
        pytest.param(
            a_part(DATED, total=None), answer(304, etag="v1"), Reason.FOREIGN_304, id="R50-odd-tag-by-date"
        ),
        pytest.param(
            a_part(DATED, total=None), answer(304, etag='"v1"'), Reason.FOREIGN_304, id="R50-tag-by-date"
        ),
        pytest.param(
            a_part(total=None), answer(304, last_modified=OLDER), Reason.FOREIGN_304, id="R50-other-date"
        ),
        pytest.param(a_part(total=None), answer(304, 0, ELSEWHERE), Reason.FOREIGN_304, id="R50-another-url"),
        pytest.param(a_part(total=1000), answer(304, etag='"v1"'), Reason.UNASKED_304, id="R50-short-part"),
    ],
)
def test_304_that_confirms_nothing(part, got, reason):
    assert judged(ConfirmWhole(part), got) == Refuse(reason, Recovery.REFETCH_NO_CACHE)


# -- 416 and 412 -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "ranges", "reason", "then"),
    [
        pytest.param(
            OPEN, ["bytes */100"], Reason.MAYBE_WHOLE_416, Recovery.CONFIRM, id="R50-as-long-as-the-part"
        ),
        pytest.param(
            resume(a_part(DATED, total=None)),
            ["bytes */100"],
            Reason.MAYBE_WHOLE_416,
            Recovery.CONFIRM,
            id="R50-dated-part",
        ),
        pytest.param(
            PS, ["bytes */100"], Reason.CONTRADICTORY_416, Recovery.REFETCH, id="R50-but-the-total-is-another"
        ),
        pytest.param(PS, ["bytes */99"], Reason.SHRUNK, Recovery.DISCARD, id="R51-shrunk"),
        pytest.param(OPEN, ["bytes */0"], Reason.SHRUNK, Recovery.DISCARD, id="R51-emptied"),
        pytest.param(
            PS, ["bytes */1000"], Reason.CONTRADICTORY_416, Recovery.REFETCH, id="R52-longer-than-the-part"
        ),
        pytest.param(
            OPEN, ["bytes */101"], Reason.CONTRADICTORY_416, Recovery.REFETCH, id="R52-total-unknown"
        ),
        pytest.param(PS, [], Reason.BARE_416, Recovery.REFETCH, id="R53-no-content-range"),
        pytest.param(OPEN, [], Reason.BARE_416, Recovery.REFETCH, id="R53-never-assumed-whole"),
        pytest.param(OPEN, ["bytes */*"], Reason.BARE_416, Recovery.REFETCH, id="R53-nothing-known"),
        pytest.param(OPEN, ["bytes 0-99/100"], Reason.BARE_416, Recovery.REFETCH, id="R53-satisfied-form"),
        pytest.param(OPEN, ["bytes */100", "bytes */100"], Reason.BARE_416, Recovery.REFETCH, id="R53-twice"),
        pytest.param(
            OPEN, [f"bytes */{'9' * 5000}"], Reason.BARE_416, Recovery.REFETCH, id="R53-beyond-reading"
        ),
        pytest.param(OPEN, ["100"], Reason.BARE_416, Recovery.REFETCH, id="R53-unreadable"),
    ],
)
def test_416(plan, ranges, reason, then):
    got = answer(416, 100, content_range=ranges, etag='"v1"')
    outcome = judged(plan, got)
    assert outcome == Refuse(reason, then)
    assert violations(plan, got, outcome) == []


@pytest.mark.parametrize(
    "told", [pytest.param(STRONG, id="strong-tag"), pytest.param(NOTHING, id="no-validator")]
)
def test_a_416_to_a_probe_says_that_the_unmarked_end_was_the_end(told):
    plan = Resume(a_part(told, total=None), Reason.PROBE_END, probe=True)
    got = answer(416, content_range="bytes */100")
    outcome = judged(plan, got)
    assert outcome == AlreadyWhole(replace(plan.part, total=100), Reason.PROBED_WHOLE)
    assert violations(plan, got, outcome) == []


@pytest.mark.parametrize("probe", [True, False])
def test_a_416_with_another_validator_speaks_of_another_representation(probe):  # R13, R33
    plan = Resume(a_part(total=None), Reason.PROBE_END, probe=probe)
    for fields in ({"etag": '"v2"'}, {"etag": '"v1"', "last_modified": OLDER}):
        got = answer(416, content_range="bytes */100", **fields)
        assert judged(plan, got) == Refuse(Reason.CONTRADICTORY_416, Recovery.REFETCH)


@pytest.mark.parametrize("ranges", [[], ["bytes */100"], ["bytes 100-999/1000"], ["bytes 0-999/1000"]])
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(PS, id="R54-resume"),
        pytest.param(OPEN, id="R54-resume-of-unknown-total"),
        pytest.param(GET, id="R54-plain-get"),
        pytest.param(Revalidate(a_known()), id="R54-revalidation"),
        pytest.param(ConfirmWhole(a_part(total=None)), id="R54-confirmation"),
    ],
)
def test_body_of_a_416_is_never_written(plan, ranges):
    outcome = judged(plan, answer(416, 1000, content_range=ranges, etag='"v1"'))
    assert isinstance(outcome, Refuse | PassOn)
    assert not isinstance(outcome, Append | Replace)


@pytest.mark.parametrize(
    ("plan", "outcome"),
    [
        pytest.param(PS, Refuse(Reason.PRECONDITION_FAILED, Recovery.DISCARD), id="R56-changed"),
        pytest.param(PD, Refuse(Reason.PRECONDITION_FAILED, Recovery.DISCARD), id="R56-changed-by-date"),
        pytest.param(GET, PassOn(), id="R56-nothing-was-conditional"),
        pytest.param(Revalidate(a_known()), PassOn(), id="R56-not-by-any-condition-of-ours"),
    ],
)
def test_412(plan, outcome):
    assert judge_response(plan, answer(412, etag='"v1"').head, SentRequest({})) == outcome


# -- the table of refusals -------------------------------------------------------------------


def test_what_follows_a_refusal_can_always_be_planned_and_ends():
    # after ORIGINAL another URL is asked, as if for the first time
    kinds = {Recovery.CONFIRM: ConfirmWhole, Recovery.PROBE: Resume, Recovery.ORIGINAL: Resume}
    for reason, then in REFUSALS.items():
        assert then is not Recovery.FAIL, reason
        plan = plan_request(a_part(total=None), a_known(), ASKING, then)
        assert isinstance(plan, kinds.get(then, Fetch))
