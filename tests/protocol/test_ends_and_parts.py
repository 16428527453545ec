"""How bodies end, and how much of a part's file may be kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocol_kit import a_part

from scrapy_streaming.protocol.parts import BodyEnd, Keep, judge_end, judge_part, unproven
from scrapy_streaming.protocol.reasons import Proof, Reason
from scrapy_streaming.protocol.validators import Validators

FRAMED, CLOSED, LOST = BodyEnd.FRAMED, BodyEnd.CLOSED, BodyEnd.LOST


@pytest.mark.parametrize(
    ("end", "length", "due", "expected", "reason"),
    [
        pytest.param(FRAMED, 1000, 1000, False, Reason.COMPLETE, id="R27-full-length"),
        pytest.param(FRAMED, 0, 0, False, Reason.COMPLETE, id="R36-empty"),
        pytest.param(LOST, 999, 1000, False, Reason.INCOMPLETE, id="R31-short-of-content-length"),
        pytest.param(FRAMED, 999, 1000, False, Reason.INCOMPLETE, id="R31-framed-and-short"),
        pytest.param(CLOSED, 999, 1000, False, Reason.INCOMPLETE, id="R31-closed-and-short"),
        pytest.param(CLOSED, 1000, 1000, False, Reason.COMPLETE, id="R31-closed-at-the-length-due"),
        pytest.param(FRAMED, 1000, None, False, Reason.COMPLETE, id="R32-last-chunk-seen"),
        pytest.param(LOST, 1000, None, False, Reason.INCOMPLETE, id="R32-last-chunk-not-seen"),
        pytest.param(LOST, 1000, None, True, Reason.INCOMPLETE, id="R32-a-digest-does-not-help"),
        pytest.param(CLOSED, 1000, None, False, Reason.CLOSE_DELIMITED, id="R33-nothing-says-where-it-ends"),
        pytest.param(CLOSED, 1000, None, True, Reason.COMPLETE, id="R33-the-digest-will-decide"),
        pytest.param(CLOSED, 999, 1000, True, Reason.INCOMPLETE, id="R33-short-whatever-is-expected"),
        pytest.param(FRAMED, 1001, 1000, False, Reason.INCOMPLETE, id="R35-longer-than-due"),
        pytest.param(FRAMED, 999, 1000, True, Reason.INCOMPLETE, id="R37-kept-total-still-counts"),
        pytest.param(LOST, 500, 1000, False, Reason.INCOMPLETE, id="R61-reset-or-timeout"),
        pytest.param(LOST, 500, 1000, True, Reason.INCOMPLETE, id="R61-reset-with-digest"),
        pytest.param(LOST, 1000, 1000, False, Reason.INCOMPLETE, id="R61-lost-at-the-last-byte"),
    ],
)
def test_end_of_body(end, length, due, expected, reason):
    assert judge_end(end, length, due, expected=expected) is reason


@given(st.sampled_from(BodyEnd), st.integers(0, 50), st.none() | st.integers(0, 50), st.booleans())
def test_only_a_body_that_something_vouches_for_is_complete(end, length, due, expected):
    complete = judge_end(end, length, due, expected=expected) is Reason.COMPLETE
    assert not complete or (
        end is not LOST and due in (None, length) and (end is FRAMED or due == length or expected)
    )


def test_bytes_whose_end_nothing_proves_have_no_validators():  # R33
    state = unproven(a_part())
    assert (state.validators, state.proof) == (Validators(), Proof.UNPROVEN)
    assert state.validators.conditional_fields() == {}
    assert unproven(a_part(total=None)).end_unmarked
    assert not a_part(total=None).end_unmarked
    assert not unproven(a_part(total=1000)).end_unmarked


@pytest.mark.parametrize(
    ("file_length", "verdict"),
    [
        pytest.param(100, Keep(100, 0), id="R2-as-long-as-journaled"),
        pytest.param(101, Keep(100, 1), id="R2-torn-tail"),
        pytest.param(1000, Keep(100, 900), id="R2-preallocated"),
        pytest.param(99, Reason.CORRUPT_PART, id="R3-shorter"),
        pytest.param(0, Reason.CORRUPT_PART, id="R3-emptied"),
    ],
)
def test_what_of_a_file_is_kept(file_length, verdict):
    assert judge_part(a_part(), file_length) == verdict


@given(st.integers(0, 2000), st.integers(0, 2000))
def test_never_more_is_kept_than_the_sidecar_vouches_for(length, file_length):
    verdict = judge_part(a_part(length=length), file_length)
    if isinstance(verdict, Keep):
        assert verdict.length == length == file_length - verdict.cut
        assert verdict.cut >= 0
    else:
        assert file_length < length
