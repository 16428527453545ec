"""A 200, and answers without a representation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from protocol_kit import (
    ASKING,
    DATE,
    DATED,
    DIGEST,
    ELSEWHERE,
    JUST,
    MODIFIED,
    NOTHING,
    OLDER,
    SENT,
    SHA_0,
    SHA_1,
    SOON,
    STRONG,
    URL,
    WEAK,
    a_known,
    a_part,
    answer,
    judged,
    resume,
    validators,
    violations,
)

from scrapy_streaming.protocol.answers import Append, PassOn, Refuse, Replace, SentRequest
from scrapy_streaming.protocol.fields import MAX_FIELD
from scrapy_streaming.protocol.judging import end_is_open, judge_response
from scrapy_streaming.protocol.planning import (
    ConfirmWhole,
    Fetch,
    PublishPart,
    Resume,
    Revalidate,
    plan_request,
)
from scrapy_streaming.protocol.reasons import Reason, Recovery
from scrapy_streaming.protocol.selecting import selecting_key
from scrapy_streaming.protocol.validators import Validators

GET = Fetch(Reason.NOTHING_STORED)
BARE = Fetch(Reason.BARE)
PS, PD = resume(), resume(a_part(DATED))
B = Revalidate(a_known())
SURE = ConfirmWhole(a_part(total=None))
V1 = {"etag": '"v1"', "last_modified": MODIFIED, "date": DATE}
GZIP = resume(a_part(content_encoding="gzip"))
HASHED = resume(a_part(repr_digest=DIGEST))


@pytest.mark.parametrize(
    ("plan", "got", "reason", "total"),
    [
        pytest.param(GET, answer(200, 1000, **V1), Reason.FETCHED, 1000, id="R27-full"),
        pytest.param(BARE, answer(200, 1000, **V1), Reason.FETCHED, 1000, id="R27-after-a-refusal"),
        pytest.param(GET, answer(200), Reason.FETCHED, None, id="R32-chunked"),
        pytest.param(GET, answer(200, 0), Reason.FETCHED, 0, id="R36-empty"),
        pytest.param(
            GET,
            answer(200, 1000, content_range="bytes 0-999/1000"),
            Reason.FETCHED,
            1000,
            id="R23-whole-content-range",
        ),
        pytest.param(
            GET,
            answer(200, content_range="bytes 0-999/1000"),
            Reason.FETCHED,
            None,
            id="R23-whole-and-chunked",
        ),
        pytest.param(PS, answer(200, 1200, etag='"v2"'), Reason.CHANGED, 1200, id="R28-other-tag"),
        pytest.param(PS, answer(200, 1000, etag='W/"v1"'), Reason.CHANGED, 1000, id="R28-weakened-tag"),
        pytest.param(PS, answer(200, 1000, etag='"v1-gzip"'), Reason.CHANGED, 1000, id="R28-suffixed-tag"),
        pytest.param(PS, answer(200, 1000), Reason.CHANGED, 1000, id="R28-no-tag"),
        pytest.param(PS, answer(200, 1000, etag=['"v1"', '"v2"']), Reason.CHANGED, 1000, id="R39-two-tags"),
        pytest.param(PS, answer(200, 999, **V1), Reason.CHANGED, 999, id="R28-same-tag-other-length"),
        pytest.param(
            PS,
            answer(200, 1000, **V1, content_encoding="gzip"),
            Reason.CHANGED,
            1000,
            id="R28-same-tag-other-coding",
        ),
        pytest.param(
            PS, answer(200, 1000, ELSEWHERE, **V1), Reason.CHANGED, 1000, id="R28-same-tag-other-url"
        ),
        pytest.param(
            HASHED,
            answer(200, 1000, **V1, repr_digest=SHA_1),
            Reason.CHANGED,
            1000,
            id="R28-same-tag-other-digest",
        ),
        pytest.param(
            PD, answer(200, 1000, last_modified=OLDER, date=DATE), Reason.CHANGED, 1000, id="R28-other-date"
        ),
        pytest.param(PD, answer(200, 1000, **V1), Reason.CHANGED, 1000, id="R28-tag-where-none-was"),
        pytest.param(PS, answer(200, 1000, **V1), Reason.RANGE_IGNORED, 1000, id="R29-same-tag"),
        pytest.param(
            PS,
            answer(200, 1000, **V1, accept_ranges="bytes"),
            Reason.RANGE_IGNORED,
            1000,
            id="R29-though-advertised",
        ),
        pytest.param(
            HASHED,
            answer(200, 1000, **V1, repr_digest=SHA_0),
            Reason.RANGE_IGNORED,
            1000,
            id="R29-same-digest",
        ),
        pytest.param(
            PD, answer(200, 1000, last_modified=MODIFIED), Reason.RANGE_IGNORED, 1000, id="R29-same-date"
        ),
        pytest.param(PS, answer(200, **V1), Reason.RANGE_IGNORED, 1000, id="R37-total-kept-by-strong-tag"),
        pytest.param(
            PD, answer(200, last_modified=MODIFIED), Reason.RANGE_IGNORED, 1000, id="R37-total-kept-by-date"
        ),
        pytest.param(
            PS, answer(200, etag='"v2"'), Reason.CHANGED, None, id="R37-total-forgotten-with-the-tag"
        ),
        pytest.param(PS, answer(200), Reason.CHANGED, None, id="R37-total-forgotten-without-tag"),
        pytest.param(
            PS, answer(200, etag='W/"v1"'), Reason.CHANGED, None, id="R37-total-forgotten-with-weak-tag"
        ),
        pytest.param(B, answer(200, 7, etag='"v2"'), Reason.CHANGED, 7, id="R28-stored-and-changed"),
        pytest.param(B, answer(200, 1000, **V1), Reason.CHANGED, 1000, id="R48-stored-and-sent-again"),
        pytest.param(SURE, answer(200, 100, **V1), Reason.FETCHED, 100, id="R50-condition-ignored"),
        pytest.param(SURE, answer(200, 7, etag='"v2"'), Reason.CHANGED, 7, id="R50-changed"),
        pytest.param(GZIP, answer(200, 7, etag='"v1"'), Reason.CHANGED, 7, id="R34-was-coded-and-is-not"),
        pytest.param(
            PublishPart(a_part(length=1000)), answer(200, 5), Reason.FETCHED, 5, id="R7-asked-all-the-same"
        ),
    ],
)
def test_200_begins_a_new_part(plan, got, reason, total):
    outcome = judged(plan, got)
    assert isinstance(outcome, Replace)
    assert (outcome.reason, outcome.state.total, outcome.state.length) == (reason, total, 0)
    assert violations(plan, got, outcome) == []


def test_new_part_is_described_by_its_own_head():  # R27, R48
    got = answer(
        200,
        1000,
        ELSEWHERE,
        etag=' "v2"\t',
        last_modified=MODIFIED,
        date=DATE,
        content_encoding="gzip , br",
        content_type="text/csv; charset=utf-8",
        vary="Accept, Accept-Encoding",
        repr_digest=SHA_0,
        accept_ranges="None",
    )
    state = judge_response(B, got.head, SentRequest({**SENT, "accept": "text/csv"})).state
    assert (state.url, state.media_type, state.content_encoding) == (
        ELSEWHERE,
        "text/csv; charset=utf-8",
        "gzip, br",
    )
    assert state.validators == validators('"v2"', MODIFIED)
    assert (state.repr_digest, state.ranges_refused) == (DIGEST, True)
    assert state.vary == ("accept", "accept-encoding")
    assert state.selecting == selecting_key(state.vary, {"accept": "text/csv"})


@pytest.mark.parametrize(
    ("field", "value", "read"),
    [
        pytest.param("etag", ["v1"], (None, True), id="R39-unquoted"),
        pytest.param("etag", ['w/"v1"'], (None, True), id="R39-lower-case-w"),
        pytest.param("etag", ['"v1"', '"v2"'], (None, True), id="R39-two-fields"),
        pytest.param("etag", ['"v\xe9"'], (None, True), id="R39-obs-text"),
        pytest.param("etag", ['\x0b"v1"'], (None, True), id="R39-control-character-before"),
        pytest.param("etag", ['"v1"\xa0'], (None, True), id="R39-no-break-space-behind"),
        pytest.param("etag", [""], (None, True), id="R39-empty"),
        pytest.param("etag", ['"v1"', ' "v1"'], ('"v1"', False), id="R39-same-tag-twice-is-one"),
        pytest.param("server", ["x"], (None, False), id="R39-no-tag-is-not-odd"),
    ],
)
def test_odd_entity_tags(field, value, read):
    head = answer(200, **{field: value}).head
    assert (None if head.validators.etag is None else str(head.validators.etag), head.odd_etag) == read
    state = judged(GET, answer(200, 5, **{field: value}, last_modified=MODIFIED, date=DATE)).state
    assert state.validators.if_range() == (MODIFIED if field == "server" else read[0])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        pytest.param("text/html", "text/html", id="plain"),
        pytest.param("text/\x00html\x1b[31m\xe9", "text/html[31m", id="E11-control-characters-are-left-out"),
        pytest.param("a" * 5000, "a" * MAX_FIELD, id="E6-cut"),
        pytest.param("", None, id="empty"),
    ],
)
def test_media_type_is_fit_for_records(given, kept):
    assert answer(200, content_type=given).head.media_type == kept
    assert answer(200).head.media_type is None


@pytest.mark.parametrize(
    "span",
    [
        pytest.param("bytes 100-999/1000", id="R23-the-slice-asked-for"),
        pytest.param("bytes 0-99/1000", id="R23-the-beginning"),
        pytest.param("bytes 100-999/*", id="R23-total-unknown"),
    ],
)
@pytest.mark.parametrize(
    ("plan", "then"),
    [(PS, Recovery.REFETCH), (PD, Recovery.REFETCH), (B, Recovery.REFETCH), (GET, Recovery.FAIL)],
)
def test_200_with_content_range_is_a_slice(plan, then, span):
    assert judged(plan, answer(200, content_range=span, etag='"v1"')) == Refuse(
        Reason.CONTENT_RANGE_ON_200, then
    )


@pytest.mark.parametrize(
    "span",
    [
        pytest.param("junk", id="R23-unreadable"),
        pytest.param("bytes */1000", id="R23-unsatisfied"),
        pytest.param("bytes 0-1000/1000", id="R23-off-by-one"),
        pytest.param("bytes 0-999/1000", id="R23-whole"),
        pytest.param("bytes 0-999/*", id="R23-whole-as-far-as-it-says"),
        pytest.param("bytes 100-999/1000", id="R23-length-is-not-the-slice's"),
        pytest.param("items 0-9/10", id="R23-other-unit"),
        pytest.param(["bytes 0-9/1000"] * 2, id="R23-twice"),
    ],
)
@pytest.mark.parametrize("plan", [PS, PD, B, GET])
def test_a_content_range_on_200_that_means_nothing_is_ignored(plan, span):
    got = answer(200, 1000, content_range=span, etag='"v2"')
    outcome = judged(plan, got)
    assert isinstance(outcome, Replace)
    assert (outcome.state.total, outcome.ranged) == (1000, False)
    assert violations(plan, got, outcome) == []


def test_a_slice_that_calls_itself_whole_is_joined_when_all_is_proven():  # R23
    got = answer(200, 900, content_range="bytes 100-999/1000", **V1)
    outcome = judged(PS, got)
    assert isinstance(outcome, Append)
    assert (outcome.reason, outcome.until) == (Reason.RESUMED, 1000)
    assert violations(PS, got, outcome) == []
    for plan, other in (
        (PS, answer(200, 900, content_range="bytes 100-999/1000", last_modified=MODIFIED, date=DATE)),
        (PS, answer(200, 900, content_range="bytes 100-999/1000", **{**V1, "etag": 'W/"v1"'})),
        (PS, answer(200, 901, content_range="bytes 100-1000/1001", **V1)),
        (PS, answer(200, 901, content_range="bytes 99-999/1000", **V1)),
        (PS, answer(200, content_range="bytes 100-999/1000", **V1)),
        (PD, answer(200, 900, content_range="bytes 100-999/1000", last_modified=MODIFIED, date=DATE)),
        (resume(a_part(total=None)), got),
    ):
        assert judged(plan, other) == Refuse(Reason.CONTENT_RANGE_ON_200, Recovery.REFETCH), other


NGINX = '"65920080-3e8"'  # the seconds of MODIFIED, and 1000, in hexadecimal


@pytest.mark.parametrize(
    ("tag", "date", "racy"),
    [
        pytest.param(None, MODIFIED, True, id="R75-only-the-date"),
        pytest.param(None, JUST, True, id="R75-only-the-date-a-second-later"),
        pytest.param(None, OLDER, True, id="R75-sent-before-it-was-modified"),
        pytest.param(None, SOON, False, id="R75-a-minute-later"),
        pytest.param(NGINX, MODIFIED, True, id="R75-seconds-in-hexadecimal"),
        pytest.param(NGINX, DATE, False, id="R75-seconds-in-hexadecimal-long-ago"),
        pytest.param('"1704067200"', MODIFIED, True, id="R75-seconds-in-decimal"),
        pytest.param('"3e8-60dd710212000"', MODIFIED, True, id="R75-microseconds-in-hexadecimal"),
        pytest.param('W/"3e8-18cc251f400"', MODIFIED, True, id="R75-milliseconds-in-hexadecimal"),
        pytest.param('"1704067200123456789"', MODIFIED, True, id="R75-nanoseconds-in-decimal"),
        pytest.param('"5d41402abc4b2a76b9719d911017c592"', MODIFIED, False, id="R75-tag-of-the-content"),
        pytest.param('"v1"', MODIFIED, False, id="R75-tag-of-something-else"),
        pytest.param('"cy2xeoje86j9rs"', MODIFIED, True, id="R75-nanoseconds-to-base-36-and-the-size"),
        pytest.param('"659200803e8"', MODIFIED, True, id="R75-seconds-and-size-without-a-mark-between"),
        pytest.param(NGINX, None, True, id="R75-nobody-says-when-it-was-sent"),
        pytest.param(None, None, False, id="R75-only-the-date-and-nobody-says-when"),
    ],
)
def test_a_body_that_was_just_modified_has_no_validators(tag, date, racy):
    fields = {"last_modified": MODIFIED, "date": date, "etag": tag}
    fields = {name: value for name, value in fields.items() if value}
    for got in (answer(200, 1000, **fields), answer(206, 1000, content_range="bytes 0-999/1000", **fields)):
        outcome = judged(GET, got)
        assert isinstance(outcome, Replace)
        assert (outcome.reason is Reason.JUST_MODIFIED) == racy
        assert (outcome.state.validators == Validators()) == racy
        assert violations(GET, got, outcome) == []


@pytest.mark.parametrize(
    ("coding", "media_type", "first", "last", "decoded"),
    [
        pytest.param("gzip", "text/plain", URL, URL, ("gzip",), id="R34-page"),
        pytest.param("x-gzip", "text/plain", URL, URL, ("gzip",), id="R34-old-name"),
        pytest.param("gzip", "application/gzip", URL, URL, (), id="R34-media-type"),
        pytest.param("gzip", "application/x-tar", URL + ".tar.gz", URL, (), id="R34-name-that-was-asked"),
        pytest.param("gzip", "application/x-tar", URL, URL + ".TGZ?x=1", (), id="R34-name-that-answered"),
        pytest.param("br", None, URL + ".gz", URL, ("br",), id="R34-another-coding-than-the-name-says"),
        pytest.param("gzip, br", None, URL + ".gz", URL, ("gzip", "br"), id="R34-coded-twice"),
        pytest.param("zstd", None, URL + ".zst", URL, (), id="R34-zst"),
        pytest.param("gzip", None, "https://h/.gz", URL, ("gzip",), id="R34-a-name-that-is-no-extension"),
        pytest.param("gzip", None, "https://h/a.b/gz", URL, ("gzip",), id="R34-a-dot-in-a-folder"),
        pytest.param("gzip", None, "https://h/a%2Egz", URL, (), id="R34-percent-encoded"),
        pytest.param("", None, URL + ".gz", URL, (), id="R34-no-coding"),
    ],
)
def test_which_codings_come_off(coding, media_type, first, last, decoded):
    fields = {"content_encoding": coding} | ({"content_type": media_type} if media_type else {})
    outcome = judge_response(GET, answer(200, 10, last, **fields).head, SentRequest(SENT, original_url=first))
    assert isinstance(outcome, Replace)
    assert outcome.state.to_decode == decoded


@pytest.mark.parametrize(
    ("plan", "got"),
    [
        pytest.param(PS, answer(206, 900, **V1, content_range="bytes 100-999/1000"), id="R40-piece"),
        pytest.param(PS, answer(416, content_range="bytes */100"), id="R40-416"),
        pytest.param(B, answer(304, etag='"v1"'), id="R40-304"),
        pytest.param(ConfirmWhole(a_part(length=1000)), answer(304, etag='"v1"'), id="R40-304-to-a-part"),
    ],
)
def test_a_request_that_was_changed_behind_the_plan_is_answered_for_something_else(plan, got):
    changed = SentRequest({**SENT, "authorization": "Basic eDp5"})
    refused = {Reason.UNPROVEN_206, Reason.FOREIGN_304}
    assert judged(plan, got).reason not in refused
    assert judge_response(plan, got.head, changed).reason in refused


@pytest.mark.parametrize(
    ("got", "open_"),
    [
        pytest.param(answer(200), True, id="R33-no-length"),
        pytest.param(answer(200, 1000), False, id="R33-length"),
        pytest.param(answer(206, 900, content_range="bytes 100-999/1000"), False, id="R33-unproven-piece"),
        pytest.param(
            answer(206, 900, content_range="bytes 100-999/*", etag='"v1"'), False, id="R33-no-total"
        ),
        pytest.param(answer(416, content_range="bytes */999"), False, id="R33-longer"),
        pytest.param(answer(416), True, id="R33-bare-416"),
        pytest.param(answer(400), True, id="R33-range-error"),
        pytest.param(answer(503), True, id="R33-busy"),
    ],
)
def test_what_leaves_open_where_a_body_ends(got, open_):
    plan = Resume(a_part(total=None), Reason.PROBE_END, probe=True)
    assert end_is_open(judged(plan, got)) is open_


@pytest.mark.parametrize(
    ("coding", "url", "refused"),
    [
        pytest.param("compress", URL, True, id="R34-unknown-coding"),
        pytest.param("br", URL, True, id="R34-library-is-missing"),
        pytest.param("gzip, br", URL, True, id="R34-one-of-two"),
        pytest.param("br", URL + ".br", False, id="R34-nothing-to-decode"),
        pytest.param("gzip", URL, False, id="R34-known"),
        pytest.param("gzip, gzip, gzip, gzip, gzip", URL, True, id="R34-too-many"),
        pytest.param("aws-chunked", URL, False, id="R34-no-coding"),
    ],
)
def test_a_coding_that_cannot_be_decoded_is_refused(coding, url, refused):
    head = answer(200, 10, url, content_encoding=coding).head
    for plan, then in ((GET, Recovery.FAIL), (B, Recovery.REFETCH)):
        outcome = judge_response(plan, head, SentRequest(SENT, decodable=frozenset({"gzip"})))
        assert (outcome == Refuse(Reason.CODING_UNSUPPORTED, then)) == refused


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(["10", "11"], id="R38-conflict"),
        pytest.param(["10, 11"], id="R38-conflict-in-one-field"),
        pytest.param(["ten"], id="R38-garbage"),
        pytest.param(["-10"], id="R38-negative"),
        pytest.param([""], id="R38-empty"),
        pytest.param(["9" * 5000], id="R38-beyond-reading"),
    ],
)
@pytest.mark.parametrize("status", [200, 206])
@pytest.mark.parametrize(("plan", "then"), [(PS, Recovery.REFETCH), (GET, Recovery.FAIL)])
def test_body_whose_length_nobody_knows_is_refused(plan, then, status, lengths):
    got = answer(status, content_length=lengths, content_range="bytes 0-999/1000")
    assert judged(plan, got) == Refuse(Reason.BAD_CONTENT_LENGTH, then)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"content_length": ["3", "3"]}, id="R38-same-twice-is-one"),
        pytest.param({"content_length": "3, 3"}, id="R38-same-twice-in-one-field"),
        pytest.param(
            {"content_length": ["3", "4"], "transfer_encoding": "chunked"}, id="R38-chunked-overrides"
        ),
    ],
)
def test_lengths_that_do_not_disagree_are_fine(fields):
    assert isinstance(judged(GET, answer(200, 3, **fields)), Replace)


@pytest.mark.parametrize(
    "status",
    [
        pytest.param(100, id="R42-informational"),
        pytest.param(201, id="R42-created"),
        pytest.param(204, id="R42-no-content"),
        pytest.param(226, id="R42-instance-manipulated"),
        pytest.param(301, id="R60-moved"),
        pytest.param(302, id="R60-found"),
        pytest.param(307, id="R60-temporary"),
        pytest.param(308, id="R60-permanent"),
        pytest.param(401, id="R57-unauthorized"),
        pytest.param(410, id="R58-gone"),
        pytest.param(429, id="R59-too-many"),
        pytest.param(503, id="R59-unavailable"),
    ],
)
@pytest.mark.parametrize("plan", [GET, PS, PD, B, SURE])
def test_what_is_no_representation_is_passed_on(plan, status):
    got = answer(status, 5, etag='"v1"', content_range="bytes 100-104/1000", last_modified=MODIFIED)
    assert judged(plan, got) == PassOn()


ERRORS = [400, 403, 404, 405, 500, 501, 505]


@pytest.mark.parametrize("status", [pytest.param(s, id=f"R55-{s}") for s in ERRORS])
def test_an_error_to_a_range_is_asked_again_without_one(status):
    for plan in (PS, PD):
        assert judged(plan, answer(status, 5)) == Refuse(Reason.RANGE_ERROR, Recovery.WITHOUT_RANGE)
        assert judged(plan, answer(status, 5, retry_after="3")) == PassOn()  # R59: it says when
    for plan in (GET, B, SURE):
        assert judged(plan, answer(status, 5)) == PassOn()


@pytest.mark.parametrize("status", [408, 425, 429, 502, 503, 504, 507])
def test_r59_a_busy_server_is_not_suspected_of_range_errors(status):
    assert judged(PS, answer(status, 5)) == PassOn()


def test_r55_what_comes_without_a_range_is_not_resumed():
    plan = plan_request(a_part(), None, ASKING, Recovery.WITHOUT_RANGE)
    assert plan == Fetch(Reason.BARE, no_range=True)
    outcome = judged(plan, answer(200, 1000, **V1))
    assert isinstance(outcome, Replace)
    again = plan_request(replace(outcome.state, length=10), None, ASKING)
    assert again == Fetch(Reason.RANGE_REFUSED_BEFORE)


@pytest.mark.parametrize(
    ("status", "stale", "outcome"),
    [
        pytest.param(401, True, Refuse(Reason.EXPIRED_TARGET, Recovery.ORIGINAL), id="R57-unauthorized"),
        pytest.param(403, True, Refuse(Reason.EXPIRED_TARGET, Recovery.ORIGINAL), id="R57-forbidden"),
        pytest.param(404, True, PassOn(), id="R57-not-found-is-not-expired"),
        pytest.param(403, False, PassOn(), id="R57-fresh-target"),
        pytest.param(401, False, PassOn(), id="R57-fresh-target-unauthorized"),
    ],
)
@pytest.mark.parametrize("plan", [GET, B, SURE])
def test_a_stale_redirect_target_sends_back_to_the_original(plan, status, stale, outcome):
    assert judge_response(plan, answer(status, 5).head, SentRequest(SENT, old_target=stale)) == outcome


@pytest.mark.parametrize("plan", [PS, PD])
def test_r57_comes_before_r55(plan):
    assert (
        judge_response(plan, answer(403, 5).head, SentRequest(SENT, old_target=True)).reason
        is Reason.EXPIRED_TARGET
    )


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(GET, id="R41-get"),
        pytest.param(PS, id="R41-part"),
        pytest.param(PD, id="R41-dated-part"),
        pytest.param(B, id="R41-stored"),
        pytest.param(SURE, id="R41-confirm"),
    ],
)
def test_a_transformed_body_replaces_and_has_no_validators(plan):
    """A proxy changed the bytes: what is said of the origin's is not said of these."""
    got = answer(203, 1000, **V1, repr_digest=SHA_0)
    outcome = judged(plan, got)
    assert isinstance(outcome, Replace)
    assert outcome.reason is Reason.TRANSFORMED
    assert outcome.state.validators == Validators()
    assert outcome.state.repr_digest is None
    assert outcome.state.total == 1000


def test_a_transformed_slice_is_refused():  # R41, R23
    got = answer(203, 10, content_range="bytes 100-109/1000")
    assert judged(GET, got) == Refuse(Reason.CONTENT_RANGE_ON_200, Recovery.FAIL)


@pytest.mark.parametrize("part", [a_part(WEAK), a_part(NOTHING), a_part(STRONG)])
def test_same_bytes_after_a_revalidation_bring_their_new_validators(part):  # R48
    got = answer(200, 1000, etag='"v3"', last_modified=OLDER, date=DATE)
    outcome = judged(Revalidate(a_known(part.validators)), got)
    assert outcome.state.validators == validators('"v3"', OLDER)
    assert outcome.state.url == URL
