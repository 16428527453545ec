"""Job keys with their known answers, and the one table of transitions."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scrapy_streaming.protocol.jobs import (
    SKEW,
    TRANSITIONS,
    Change,
    JobEvent,
    JobState,
    is_recent,
    job_key,
    operation_key,
    request_hash,
    transition,
)

ZEROS = "0" * 64

# -- keys: these answers are promised to users; none of them may ever change -----------------


@pytest.mark.parametrize(
    ("work_id", "artifact_id", "url", "key"),
    [
        (
            "W1",
            "A1",
            "https://example.org/a.pdf",
            "f8946140d22c8112de1cd51d3065fbea0b1d4d52b6592a3e0c42e73086dc9714",
        ),
        (
            "",
            "é",
            "https://example.org/%C3%A9?a=1&b=2",
            "4cbdc7b431681fbf8202e9fba488178f650e7efedc7f04cba5af05eccf2ad14b",
        ),
    ],
)
def test_job_key_known_answers(work_id, artifact_id, url, key):
    assert job_key(work_id, artifact_id, url) == key


def test_operation_key_known_answers():
    stream = operation_key("STREAM", ZEROS, url="https://example.org/a.pdf", range_start=1048576)
    assert stream == "a427d1f7d90f2ea00051f53512e41ad4a44a59ec2103f582f269a31d52cabb5b"
    assert (
        operation_key("FINALIZE", ZEROS) == "2b8f14ab8a1993226959781d27f142794b35bf66f3741d1109837f435448fb55"
    )


TEXTS = st.tuples(st.text(), st.text(), st.text())


@given(TEXTS, TEXTS)
def test_different_wishes_have_different_keys(one, other):
    assert (job_key(*one) == job_key(*other)) == (one == other)
    assert re.fullmatch(r"[0-9a-f]{64}", job_key(*one))


def test_context_order_does_not_matter():
    assert operation_key("K", "j", a=1, b=[2]) == operation_key("K", "j", b=[2], a=1)


def test_operation_is_no_job_and_each_argument_counts():
    keys = {
        operation_key("K", "j"),
        operation_key("L", "j"),
        operation_key("K", "k"),
        operation_key("K", "j", a=None),
    }
    assert len(keys) == 4


@pytest.mark.parametrize("arguments", [(None, "a", "u"), ("w", 1, "u"), ("w", "a", b"u")])
def test_job_key_wants_text(arguments):
    with pytest.raises(TypeError, match="must be str"):
        job_key(*arguments)


@pytest.mark.parametrize("arguments", [(None, "j"), ("K", 1)])
def test_operation_key_wants_text(arguments):
    with pytest.raises(TypeError, match="must be str"):
        operation_key(*arguments)


@pytest.mark.parametrize("value", [{1}, b"octets", object(), float("nan"), float("inf"), {"a": {1j: 2}}])
def test_what_json_has_no_form_for_makes_no_key(value):
    with pytest.raises(TypeError):
        operation_key("K", "j", value=value)


def test_a_circle_makes_no_key():
    circle: list[object] = []
    circle.append(circle)
    with pytest.raises(TypeError, match="key cannot be made"):
        operation_key("K", "j", value=circle)


def test_context_may_not_name_what_the_key_itself_uses():
    with pytest.raises(TypeError, match="may not name v"):
        operation_key("K", "j", v=2)


# -- states ----------------------------------------------------------------------------------

# ledger.md, States: written out again here on purpose
EXPECTED = {
    ("ready", "claim"): Change(JobState.LEASED, fence=1, attempts=1),
    ("leased", "claim"): Change(JobState.LEASED, fence=1, attempts=1),
    ("leased", "complete"): Change(JobState.DONE, guarded=True),
    ("leased", "release"): Change(JobState.READY, attempts=-1, guarded=True),
    ("leased", "fail-transient"): Change(JobState.READY, guarded=True),
    ("leased", "fail-permanent"): Change(JobState.FAILED, guarded=True),
    ("leased", "exhaust"): Change(JobState.DEAD),
    ("done", "refresh"): Change(JobState.READY, fence=1, generation=1),
    ("failed", "refresh"): Change(JobState.READY, fence=1),
    ("failed", "requeue"): Change(JobState.READY, fence=1),
    ("dead", "requeue"): Change(JobState.READY, fence=1),
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(JobState, JobEvent)), ids=str)
def test_transition(state, event):
    if (state, event) in EXPECTED:
        assert transition(state, event) == EXPECTED[state, event]
    else:
        with pytest.raises(KeyError):
            transition(state, event)


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        TRANSITIONS[JobState.READY, JobEvent.COMPLETE] = Change(JobState.DONE)


def test_fences_never_decrease_and_every_claim_has_its_own():
    assert all(change.fence >= 0 and change.generation >= 0 for change in TRANSITIONS.values())
    assert all(change.fence == 1 for (_, event), change in TRANSITIONS.items() if event is JobEvent.CLAIM)


def test_terminal_states_are_left_by_refresh_or_requeue_only_with_a_new_fence():
    assert {state for state in JobState if state.terminal} == {JobState.DONE, JobState.FAILED, JobState.DEAD}
    out = {(event, change.fence) for (state, event), change in TRANSITIONS.items() if state.terminal}
    assert out == {(JobEvent.REFRESH, 1), (JobEvent.REQUEUE, 1)}


def test_what_a_holder_does_is_guarded_and_what_others_do_is_not():
    guarded = {event for (_, event), change in TRANSITIONS.items() if change.guarded}
    assert guarded == {JobEvent.COMPLETE, JobEvent.RELEASE, JobEvent.FAIL_TRANSIENT, JobEvent.FAIL_PERMANENT}
    assert all(state is JobState.LEASED for (state, _), change in TRANSITIONS.items() if change.guarded)


def test_every_state_can_be_reached_and_left():
    reached = {JobState.READY} | {change.to for change in TRANSITIONS.values()}
    assert reached == {state for state, _ in TRANSITIONS} == set(JobState)


def test_a_request_is_told_from_others_by_method_url_and_body() -> None:
    hashes = {
        request_hash("GET", "http://h/a"),
        request_hash("POST", "http://h/a"),
        request_hash("GET", "http://h/b"),
        request_hash("GET", "http://h/a", b"body"),
    }
    assert len(hashes) == 4
    assert request_hash("GET", "http://h/a") == request_hash("GET", "http://h/a", b"")
    assert all(len(each) == 64 for each in hashes)


@pytest.mark.parametrize(
    ("at", "since", "recent"),
    [
        (100.0, None, True),
        (100.0, 100.0, True),
        (99.9, 100.0, False),
        (1000.0 + SKEW, 100.0, True),
        (1000.1 + SKEW, None, False),
    ],
)
def test_what_is_dated_in_the_future_is_not_recent(
    at: float, since: float | None, recent: bool
) -> None:  # I14
    assert is_recent(at, since, 1000.0) is recent
