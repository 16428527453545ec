"""For any stored part and any answer: no splice, no short file, no forbidden field."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_kit import (
    Answer,
    answers,
    exchanges,
    judged,
    many_exchanges,
    plans,
    request_violations,
    resume,
    violations,
)

from scrapy_streaming.protocol.answers import (
    AlreadyWhole,
    Append,
    PassOn,
    Refuse,
    Replace,
    ResponseHead,
    SentRequest,
    Unchanged,
)
from scrapy_streaming.protocol.judging import judge_response
from scrapy_streaming.protocol.planning import Resume
from scrapy_streaming.protocol.reasons import REFUSALS, Reason

LATIN = st.text(st.characters(max_codepoint=0xFF), max_size=40)
NAMES = st.sampled_from(
    [
        "etag",
        "last-modified",
        "date",
        "content-range",
        "content-encoding",
        "content-type",
        "content-length",
        "transfer-encoding",
        "vary",
        "repr-digest",
        "accept-ranges",
    ]
)
ANY_FIELDS = st.dictionaries(NAMES, st.lists(LATIN, max_size=3))


@pytest.mark.slow
@settings(max_examples=500)
@given(exchanges)
def test_no_answer_is_taken_for_what_it_is_not(exchange):
    plan, got = exchange
    assert violations(plan, got, judged(plan, got)) == []


@pytest.mark.slow
@settings(max_examples=500)
@given(answers)
def test_no_answer_to_a_range_is_joined_wrongly(got):
    plan = resume()
    assert violations(plan, got, judged(plan, got)) == []


@pytest.mark.slow
@settings(max_examples=500)
@given(
    plans,
    st.integers(100, 599) | st.sampled_from([200, 206, 304, 416]),
    ANY_FIELDS,
    st.none() | st.integers(0),
)
def test_judging_never_raises(plan, status, fields, length):
    got = Answer(status, fields, length)
    outcome = judged(plan, got)
    assert isinstance(outcome.reason, Reason)
    assert not isinstance(outcome, Refuse) or outcome.reason in REFUSALS
    assert violations(plan, got, outcome) == []


@given(st.integers(100, 599), st.text(), ANY_FIELDS)
def test_any_head_can_be_read(status, url, fields):
    head = ResponseHead.from_fields(status, url, fields, None)
    sent = [
        *head.validators.conditional_fields().values(),
        head.validators.if_range() or "-",
        head.media_type or "-",
    ]
    assert all(" " <= c <= "~" for value in sent for c in value)


@pytest.mark.slow
@settings(max_examples=500)
@given(plans)
def test_a_resume_is_exactly_range_and_one_condition(plan):
    assert request_violations(plan) == []
    if isinstance(plan, Resume):
        condition = set(plan.fields()) - {"Range"}
        assert condition in ({"If-Range"}, {"If-Unmodified-Since"}) or (plan.probe and not condition)
        assert plan.part.length > 0
        assert not plan.part.whole


@pytest.mark.slow
def test_nothing_is_wrong_in_many_exchanges():
    wrong = [(plan, got) for plan, got in many_exchanges() if violations(plan, got, judged(plan, got))]
    assert wrong == []


# the properties say little unless every outcome is really reached
@pytest.mark.slow
def test_every_outcome_and_every_reason_is_reached():
    outcomes = [judged(*exchange) for exchange in many_exchanges()]
    assert {type(outcome) for outcome in outcomes} == {
        Append,
        Replace,
        Unchanged,
        AlreadyWhole,
        PassOn,
        Refuse,
    }
    used = {
        Reason.RESUMED,
        Reason.RESUMED_UNTAGGED,
        Reason.RESUMED_SHORT,
        Reason.RANGE_IGNORED,
        Reason.WHOLE_IN_206,
    }
    # found by the store, not in a head; and a matter of the URL that was asked
    elsewhere = {
        Reason.BLOB_MISSING, Reason.DIGEST_MISMATCH, Reason.EXPIRED_TARGET,
        Reason.UNDECODABLE, Reason.RANGE_CONTRADICTED, Reason.CLOSE_DELIMITED,
    }  # fmt: skip
    assert (used | set(REFUSALS)) - {outcome.reason for outcome in outcomes} == elsewhere


def test_judging_is_a_function_of_its_arguments():
    got = Answer(206, {"etag": ['"v1"'], "content-range": ["bytes 100-999/1000"]}, 900)
    assert judge_response(resume(), got.head, SentRequest({})) == judge_response(
        resume(), got.head, SentRequest({})
    )
