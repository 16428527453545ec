"""A 206: joined to the part only when everything fits."""

from __future__ import annotations

import pytest
from protocol_kit import (
    ASKING,
    DATE,
    DATED,
    DIGEST,
    ELSEWHERE,
    MODIFIED,
    NOTHING,
    OLDER,
    SHA_0,
    SHA_1,
    SOON,
    a_known,
    a_part,
    answer,
    judged,
    resume,
    validators,
    violations,
)

from scrapy_streaming.protocol.answers import Append, Refuse, Replace
from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.planning import ConfirmWhole, Fetch, Resume, Revalidate, plan_request
from scrapy_streaming.protocol.reasons import Proof, Reason, Recovery
from scrapy_streaming.protocol.validators import Validators

GET = Fetch(Reason.NOTHING_STORED)
PS, PD = resume(), resume(a_part(DATED))
HASHED = resume(a_part(repr_digest=DIGEST))
OPEN = resume(a_part(total=None))
TAGGED_ONLY = resume(a_part(validators('"v1"')))
REST = "bytes 100-999/1000"
V1 = {"etag": '"v1"', "content_range": REST}
D1 = {"last_modified": MODIFIED, "date": DATE, "content_range": REST}


@pytest.mark.parametrize(
    ("plan", "got", "reason", "until", "total"),
    [
        pytest.param(PS, answer(206, 900, **V1), Reason.RESUMED, 1000, 1000, id="R10-resumed"),
        pytest.param(PS, answer(206, **V1), Reason.RESUMED, 1000, 1000, id="R10-chunked"),
        pytest.param(OPEN, answer(206, 900, **V1), Reason.RESUMED, 1000, 1000, id="R10-total-learnt"),
        pytest.param(
            resume(a_part(content_encoding="gzip")),
            answer(206, 900, **V1, content_encoding="GZIP"),
            Reason.RESUMED,
            1000,
            1000,
            id="R10-same-coding",
        ),
        pytest.param(
            PS,
            answer(206, 900, **V1, content_encoding="identity"),
            Reason.RESUMED,
            1000,
            1000,
            id="R10-identity",
        ),
        pytest.param(
            HASHED, answer(206, 900, **V1, repr_digest=SHA_0), Reason.RESUMED, 1000, 1000, id="R10-digest"
        ),
        pytest.param(
            PS, answer(206, 900, **D1), Reason.RESUMED_UNTAGGED, 1000, 1000, id="R11-same-total-and-date"
        ),
        pytest.param(
            HASHED,
            answer(206, 900, content_range=REST, repr_digest=SHA_0),
            Reason.RESUMED_UNTAGGED,
            1000,
            1000,
            id="R11-same-total-and-digest",
        ),
        pytest.param(PD, answer(206, 900, **D1), Reason.RESUMED, 1000, 1000, id="R12-same-date-and-total"),
        pytest.param(
            PS,
            answer(206, 400, etag='"v1"', content_range="bytes 100-499/1000"),
            Reason.RESUMED_SHORT,
            500,
            1000,
            id="R17-less-than-asked",
        ),
        pytest.param(
            PS,
            answer(206, 900, etag='"v1"', content_range="bytes 100-999/*"),
            Reason.RESUMED,
            1000,
            1000,
            id="R18-known-total-reached",
        ),
        pytest.param(
            HASHED,
            answer(206, 900, ELSEWHERE, **V1, repr_digest=SHA_0),
            Reason.RESUMED,
            1000,
            1000,
            id="R60-redirected-but-same-digest-and-total",
        ),
    ],
)
def test_206_is_joined(plan, got, reason, until, total):
    outcome = judged(plan, got)
    assert isinstance(outcome, Append), outcome
    assert (outcome.reason, outcome.until, outcome.state.total) == (reason, until, total)
    assert (outcome.state.length, outcome.state.prefix_sha256) == (100, "ab" * 32)
    assert violations(plan, got, outcome) == []


@pytest.mark.parametrize(
    ("plan", "got", "reason", "then"),
    [
        # R11, R12: nothing proves it the same
        pytest.param(
            PS,
            answer(206, 900, content_range=REST),
            Reason.UNPROVEN_206,
            Recovery.REFETCH,
            id="R11-neither-date-nor-digest",
        ),
        pytest.param(
            TAGGED_ONLY,
            answer(206, 900, **D1),
            Reason.UNPROVEN_206,
            Recovery.REFETCH,
            id="R11-no-date-to-compare",
        ),
        pytest.param(
            OPEN, answer(206, 900, **D1), Reason.UNPROVEN_206, Recovery.REFETCH, id="R11-total-was-unknown"
        ),
        pytest.param(
            PS,
            answer(206, 900, **{**D1, "content_range": "bytes 100-999/*"}),
            Reason.UNPROVEN_206,
            Recovery.REFETCH,
            id="R11-total-is-not-said",
        ),
        pytest.param(
            PS,
            answer(206, 900, etag=['"v1"', '"v2"'], **D1),
            Reason.UNPROVEN_206,
            Recovery.REFETCH,
            id="R39-two-tags",
        ),
        pytest.param(
            PS, answer(206, 900, etag="v1", **D1), Reason.UNPROVEN_206, Recovery.REFETCH, id="R39-unquoted"
        ),
        pytest.param(
            PD, answer(206, 900, etag="v1", **D1), Reason.UNPROVEN_206, Recovery.REFETCH, id="R39-dated-part"
        ),
        pytest.param(
            PD, answer(206, 900, content_range=REST), Reason.UNPROVEN_206, Recovery.REFETCH, id="R12-no-date"
        ),
        pytest.param(
            PD,
            answer(206, 900, etag='"v1"', content_range=REST),
            Reason.UNPROVEN_206,
            Recovery.REFETCH,
            id="R12-tag-only",
        ),
        pytest.param(
            resume(a_part(DATED, total=None)),
            answer(206, 900, **D1),
            Reason.UNPROVEN_206,
            Recovery.REFETCH,
            id="R12-total-was-unknown",
        ),
        pytest.param(
            PS,
            answer(206, 900, ELSEWHERE, **V1, last_modified=MODIFIED),
            Reason.UNPROVEN_206,
            Recovery.REFETCH,
            id="R60-same-tag-at-another-url",
        ),
        pytest.param(
            resume(a_part(total=None, repr_digest=DIGEST)),
            answer(206, 900, ELSEWHERE, **V1, repr_digest=SHA_0),
            Reason.UNPROVEN_206,
            Recovery.REFETCH,
            id="R60-another-url-total-was-unknown",
        ),
        # R13, R14: it is another one
        pytest.param(
            PS,
            answer(206, 900, etag='"v2"', content_range=REST),
            Reason.CHANGED_206,
            Recovery.DISCARD,
            id="R13-other-tag",
        ),
        pytest.param(
            PS,
            answer(206, 900, etag='W/"v2"', content_range=REST),
            Reason.CHANGED_206,
            Recovery.DISCARD,
            id="R13-other-weak-tag",
        ),
        pytest.param(
            PD,
            answer(206, 900, **{**D1, "last_modified": OLDER}),
            Reason.CHANGED_206,
            Recovery.DISCARD,
            id="R13-other-date",
        ),
        pytest.param(
            PS,
            answer(206, 900, **{**D1, "last_modified": OLDER}),
            Reason.CHANGED_206,
            Recovery.DISCARD,
            id="R13-untagged-and-other-date",
        ),
        pytest.param(
            HASHED,
            answer(206, 900, **V1, repr_digest=SHA_1),
            Reason.CHANGED_206,
            Recovery.DISCARD,
            id="R13-other-digest",
        ),
        pytest.param(
            PS,
            answer(206, 900, etag='W/"v1"', content_range=REST),
            Reason.WEAKENED_206,
            Recovery.REFETCH,
            id="R14-weakened",
        ),
        pytest.param(
            PS,
            answer(206, 900, etag='"v1-gzip"', content_range=REST),
            Reason.CHANGED_206,
            Recovery.DISCARD,
            id="R14-suffixed",
        ),
        # R15: another place
        pytest.param(
            PS,
            answer(206, 901, etag='"v1"', content_range="bytes 99-999/1000"),
            Reason.RANGE_START,
            Recovery.REFETCH,
            id="R15-overlap",
        ),
        pytest.param(
            PS,
            answer(206, 899, etag='"v1"', content_range="bytes 101-999/1000"),
            Reason.RANGE_START,
            Recovery.REFETCH,
            id="R15-gap",
        ),
        pytest.param(
            PS,
            answer(206, 100, etag='"v1"', content_range="bytes 0-99/1000"),
            Reason.RANGE_START,
            Recovery.REFETCH,
            id="R15-the-beginning",
        ),
        # R18: where does it end?
        pytest.param(
            PS,
            answer(206, 400, etag='"v1"', content_range="bytes 100-499/*"),
            Reason.UNKNOWN_TOTAL,
            Recovery.REFETCH,
            id="R18-short-of-the-known-total",
        ),
        pytest.param(
            PS,
            answer(206, 901, etag='"v1"', content_range="bytes 100-1000/*"),
            Reason.UNKNOWN_TOTAL,
            Recovery.REFETCH,
            id="R18-beyond-the-known-total",
        ),
        pytest.param(
            OPEN,
            answer(206, 900, etag='"v1"', content_range="bytes 100-999/*"),
            Reason.UNKNOWN_TOTAL,
            Recovery.REFETCH,
            id="R18-total-never-known",
        ),
        # R20
        pytest.param(
            PS,
            answer(206, 901, etag='"v1"', content_range="bytes 100-1000/1001"),
            Reason.TOTAL_CHANGED,
            Recovery.DISCARD,
            id="R20-grown",
        ),
        pytest.param(
            PD,
            answer(206, 800, **{**D1, "content_range": "bytes 100-899/900"}),
            Reason.TOTAL_CHANGED,
            Recovery.DISCARD,
            id="R20-shrunk",
        ),
        # R24
        pytest.param(
            PS,
            answer(206, 900, **V1, content_encoding="gzip"),
            Reason.RECODED_206,
            Recovery.REFETCH,
            id="R24-coded-slice",
        ),
        pytest.param(
            resume(a_part(content_encoding="gzip")),
            answer(206, 900, **V1),
            Reason.RECODED_206,
            Recovery.REFETCH,
            id="R24-decoded-slice",
        ),
        pytest.param(
            PS,
            answer(206, 900, **V1, content_encoding=["gzip", "br"]),
            Reason.RECODED_206,
            Recovery.REFETCH,
            id="R24-two-codings-in-two-fields",
        ),
        pytest.param(
            PS,
            answer(206, 900, **V1, content_encoding="identity\x0b"),
            Reason.RECODED_206,
            Recovery.REFETCH,
            id="R24-control-character",
        ),
    ],
)
def test_206_is_refused(plan, got, reason, then):
    outcome = judged(plan, got)
    assert outcome == Refuse(reason, then)
    assert violations(plan, got, outcome) == []


@pytest.mark.parametrize(
    ("ranges", "length"),
    [
        pytest.param([], 900, id="R21-missing-is-not-consent"),
        pytest.param(["junk"], 900, id="R21-unreadable"),
        pytest.param(["items 100-999/1000"], 900, id="R21-other-unit"),
        pytest.param(["bytes 999-100/1000"], None, id="R21-last-before-first"),
        pytest.param(["bytes 100-999/999"], 900, id="R21-total-not-above-last"),
        pytest.param([REST], 899, id="R21-content-length-disagrees"),
        pytest.param([REST], 373, id="R24-content-length-of-a-coded-slice"),
        pytest.param([REST, REST], 900, id="R21-twice-the-same"),
        pytest.param([REST, "bytes 0-999/1000"], 900, id="R21-two-different"),
        pytest.param([f"{REST}, {REST}"], 900, id="R21-list-in-one-field"),
        pytest.param([f"bytes 100-999/{'9' * 5000}"], 900, id="R21-more-than-4300-digits"),
        pytest.param([f"bytes {'9' * 5000}-{'9' * 5000}/*"], None, id="R21-all-of-5000-digits"),
        pytest.param(["bytes */1000"], 900, id="R21-unsatisfied-form"),
        pytest.param([REST + "\x1c"], 900, id="R21-control-character-behind"),
    ],
)
@pytest.mark.parametrize("plan", [PS, PD, OPEN, HASHED])
def test_bad_content_range_is_never_joined(plan, ranges, length):
    got = answer(206, length, etag='"v1"', last_modified=MODIFIED, content_range=ranges, repr_digest=SHA_0)
    assert judged(plan, got) == Refuse(Reason.BAD_CONTENT_RANGE, Recovery.REFETCH)


@pytest.mark.parametrize(
    ("media_type", "ranges"),
    [
        pytest.param("multipart/byteranges; boundary=x", [], id="R22-multipart"),
        pytest.param("Multipart/ByteRanges;boundary=x", [REST], id="R22-with-content-range"),
        pytest.param(" multipart/byteranges", ["bytes 0-999/1000"], id="R22-with-whole-content-range"),
        pytest.param("multi\x00part/byteranges", [REST], id="R22-hidden-by-a-control-character"),
    ],
)
@pytest.mark.parametrize(
    ("plan", "then"), [(PS, Recovery.REFETCH), (PD, Recovery.REFETCH), (GET, Recovery.FAIL)]
)
def test_multipart_is_never_joined(plan, then, media_type, ranges):
    got = answer(206, etag='"v1"', last_modified=MODIFIED, content_type=media_type, content_range=ranges)
    assert judged(plan, got) == Refuse(Reason.MULTIPART_206, then)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(PS, id="R16-whole-object-wearing-206"),
        pytest.param(PD, id="R16-for-a-dated-part"),
        pytest.param(GET, id="R25-unsolicited-but-whole"),
        pytest.param(Revalidate(a_known()), id="R25-to-a-revalidation"),
    ],
)
@pytest.mark.parametrize("length", [1000, None])
@pytest.mark.parametrize("tag", ['"v1"', '"v2"', 'W/"v1"', "v1"])
def test_whole_206_is_a_200(plan, length, tag):
    got = answer(206, length, etag=tag, content_range="bytes 0-999/1000")
    outcome = judged(plan, got)
    assert isinstance(outcome, Replace)
    assert (outcome.reason, outcome.state.total, outcome.state.length) == (Reason.WHOLE_IN_206, 1000, 0)
    assert violations(plan, got, outcome) == []


@pytest.mark.parametrize(
    ("plan", "then"),
    [
        pytest.param(GET, Recovery.FAIL, id="R25-plain-get"),
        pytest.param(Fetch(Reason.BARE, no_cache=True), Recovery.FAIL, id="R25-no-cache-get"),
        pytest.param(Revalidate(a_known()), Recovery.REFETCH, id="R25-revalidation"),
        pytest.param(ConfirmWhole(a_part(total=None)), Recovery.REFETCH, id="R25-confirmation"),
    ],
)
@pytest.mark.parametrize("span", [REST, "bytes 0-99/1000", "bytes 0-999/*", "bytes 0-999/1001", "junk", []])
def test_unsolicited_206_is_never_the_whole(plan, then, span):
    got = answer(206, content_range=span, etag='"v1"')
    assert judged(plan, got) == Refuse(Reason.UNSOLICITED_206, then)


def test_whole_content_range_with_another_length_is_not_whole():  # R16, R21
    got = answer(206, 373, etag='"v1"', content_range="bytes 0-999/1000", content_encoding="gzip")
    assert judged(PS, got) == Refuse(Reason.BAD_CONTENT_RANGE, Recovery.REFETCH)
    assert judged(GET, got) == Refuse(Reason.UNSOLICITED_206, Recovery.FAIL)


@pytest.mark.parametrize(
    "told",
    [
        pytest.param(validators('W/"v1"', MODIFIED, SOON), id="R5-weak-tag-and-weak-date"),
        pytest.param(validators(None, MODIFIED, SOON), id="R72-weak-date"),
        pytest.param(NOTHING, id="R6-untold-part"),
    ],
)
def test_a_probe_of_a_part_without_strong_validator_is_never_joined(told):  # R33
    plan = Resume(a_part(told), Reason.PROBE_END, probe=True)
    for tag in ('"v1"', 'W/"v1"'):
        assert isinstance(
            judged(plan, answer(206, 900, etag=tag, last_modified=MODIFIED, content_range=REST)), Refuse
        )


@pytest.mark.parametrize(
    ("got", "provisional"),
    [
        pytest.param(answer(206, 900, **V1), False, id="R10-length-agrees"),
        pytest.param(answer(206, **V1), True, id="R74-no-content-length"),
        pytest.param(answer(206, 900, **V1, content_digest=SHA_0), True, id="R64-digest-of-its-own"),
    ],
)
def test_a_piece_counts_at_once_only_if_nothing_about_it_is_open(got, provisional):
    outcome = judged(PS, got)
    assert isinstance(outcome, Append)
    assert outcome.provisional is provisional
    assert (outcome.content_digest == DIGEST) == ("content-digest" in got.fields)
    assert outcome.state.proof is Proof.STRONG


# -- what is known afterwards (RFC 9111 §3.4) ------------------------------------------------


@pytest.mark.parametrize(
    ("part", "got", "after"),
    [
        pytest.param(a_part(), answer(206, 900, **D1), '"v1"', id="R11-own-tag-stays"),
        pytest.param(
            a_part(DATED),
            answer(206, 400, **{**D1, "content_range": "bytes 100-499/1000"}),
            MODIFIED,
            id="R12-own-date-stays",
        ),
    ],
)
def test_validators_after_joining(part, got, after):
    outcome = judged(resume(part), got)
    assert isinstance(outcome, Append)
    assert outcome.state.validators.if_range() == after
    following = plan_request(outcome.state, None, ASKING, Recovery.NONE)
    assert isinstance(following, Resume)


def test_later_date_does_not_make_a_date_stronger():  # R72
    part = a_part(Validators(EntityTag("v1"), MODIFIED, MODIFIED))
    outcome = judged(resume(part), answer(206, 900, **V1, last_modified=MODIFIED, date=DATE))
    assert not outcome.state.validators.strong_date


def test_digest_of_a_later_answer_is_kept():  # R13
    outcome = judged(PS, answer(206, 900, **V1, repr_digest=SHA_0))
    assert outcome.state.repr_digest == DIGEST
    assert judged(HASHED, answer(206, 900, **V1)).state.repr_digest == DIGEST


UNTOLD = Resume(a_part(NOTHING), Reason.TAIL_OVERLAP, overlap=40)
WITH_OVERLAP = "bytes 60-999/1000"


def test_the_rest_of_an_untold_part_is_joined_behind_its_end():  # R19
    got = judged(UNTOLD, answer(206, 940, content_range=WITH_OVERLAP))
    assert isinstance(got, Append)
    assert (got.overlap, got.until, got.reason) == (40, 1000, Reason.RESUMED_UNVALIDATED)
    assert got.state.proof is Proof.LENGTH, "its end alone proves nothing"


@pytest.mark.parametrize(
    ("length", "fields", "reason"),
    [
        pytest.param(900, {"content_range": REST}, Reason.RANGE_START, id="R19-without-the-end"),
        pytest.param(940, {"content_range": "bytes 60-999/*"}, Reason.UNPROVEN_206, id="R19-untold-total"),
        pytest.param(941, {"content_range": "bytes 60-1000/1001"}, Reason.TOTAL_CHANGED, id="R19-longer"),
        pytest.param(40, {"content_range": "bytes 60-99/1000"}, Reason.UNPROVEN_206, id="R19-the-end-alone"),
        pytest.param(
            940,
            {"content_range": WITH_OVERLAP, "content_encoding": "gzip"},
            Reason.RECODED_206,
            id="R19-coded",
        ),
    ],
)
def test_what_cannot_be_the_rest_of_an_untold_part_is_refused(length, fields, reason):
    got = judged(UNTOLD, answer(206, length, **fields))
    assert isinstance(got, Refuse)
    assert got.reason is reason


def test_another_tag_speaks_against_the_end_of_a_part_with_a_weak_one():  # R13, R19
    plan = Resume(a_part(validators('W/"v1"')), Reason.TAIL_OVERLAP, overlap=40)
    got = judged(plan, answer(206, 940, etag='W/"v2"', content_range=WITH_OVERLAP))
    assert isinstance(got, Refuse)
    assert got.reason is Reason.CHANGED_206
