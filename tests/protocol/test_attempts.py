"""How one file is asked for, request after request (R33, R57, R62, R64)."""

from __future__ import annotations

import pytest

from scrapy_streaming.protocol.attempts import UNSTABLE_AFTER, Attempt
from scrapy_streaming.protocol.reasons import REFUSALS, Recovery

SHA = "ab" * 32
#: An attempt with a value of its own in every field.
BUSY = Attempt(
    Recovery.WITHOUT_RANGE, restarts=1, kept=100, changes=2, unmarked=SHA, odd_pieces=1, reclaims=3, stuck=4
)


def _changed(attempt: Attempt) -> dict[str, object]:
    """Return the fields in which *attempt* differs from ``BUSY``."""
    return {
        name: value for name in Attempt.__slots__ if (value := getattr(attempt, name)) != getattr(BUSY, name)
    }


@pytest.mark.parametrize(
    ("following", "changes"),
    [
        pytest.param(
            BUSY.after_refusal(Recovery.DISCARD),
            {"recovery": Recovery.DISCARD, "restarts": 2, "kept": 0},
            id="a-refusal-says-what-follows",
        ),
        pytest.param(
            BUSY.after_refusal(Recovery.ORIGINAL),
            {"recovery": Recovery.NONE, "restarts": 2, "kept": 0},
            id="R57-the-original-url-gets-an-ordinary-request",
        ),
        pytest.param(BUSY.planned(300), {"kept": 300}, id="planned-with-more-bytes"),
        pytest.param(BUSY.planned(50), {}, id="planned-with-fewer-bytes"),
        pytest.param(
            BUSY.made_progress(70),
            {"recovery": Recovery.NONE, "kept": 70, "stuck": 0},
            id="a-body-that-broke-off-longer",
        ),
        pytest.param(
            BUSY.made_none(), {"recovery": Recovery.NONE, "stuck": 5}, id="a-request-that-added-no-byte"
        ),
        pytest.param(BUSY.ordinary(), {"recovery": Recovery.NONE}, id="R55-range-was-not-the-cause"),
        pytest.param(BUSY.met_another(), {"changes": 3}, id="R62-another-representation"),
        pytest.param(BUSY.end_marked(), {"unmarked": None}, id="R33-the-end-is-marked"),
        pytest.param(BUSY.unmarked_body("cd" * 32), {"unmarked": "cd" * 32}, id="R33-the-end-is-not-marked"),
        pytest.param(
            BUSY.odd_piece(), {"recovery": Recovery.NONE}, id="R64-an-odd-piece-asked-for-once-more"
        ),
        pytest.param(
            BUSY.claimed_again(),
            {"recovery": Recovery.NONE, "reclaims": 4},
            id="a-lease-lost-and-claimed-again",
        ),
        pytest.param(BUSY.rejected(), {"recovery": Recovery.REFETCH}, id="R76-a-middleware-refused-the-file"),
    ],
)
def test_each_step_changes_what_it_says_and_nothing_else(following, changes):
    assert _changed(following) == changes


def test_the_first_odd_piece_is_counted():  # R64
    assert Attempt().odd_piece() == Attempt(odd_pieces=1)


@pytest.mark.parametrize("recovery", list(Recovery))
def test_a_retry_asks_once_what_is_asked_once(recovery):
    once = recovery in (Recovery.CONFIRM, Recovery.PROBE, Recovery.ORIGINAL)
    assert Attempt(recovery).planned(0).recovery is (Recovery.NONE if once else recovery)


@pytest.mark.parametrize(
    ("attempt", "recovery"),
    [
        pytest.param(Attempt(changes=UNSTABLE_AFTER - 1), Recovery.NONE, id="R62-not-yet"),
        pytest.param(Attempt(changes=UNSTABLE_AFTER), Recovery.SINGLE_SHOT, id="R62-too-often"),
        pytest.param(Attempt(changes=UNSTABLE_AFTER + 1), Recovery.SINGLE_SHOT, id="R62-more-often"),
        pytest.param(
            Attempt(Recovery.CONFIRM, changes=UNSTABLE_AFTER),
            Recovery.CONFIRM,
            id="R62-only-ordinary-requests",
        ),
    ],
)
def test_an_unstable_server_gets_plain_requests(attempt, recovery):
    assert attempt.unstable().recovery is recovery


def test_every_refusal_in_the_table_has_an_attempt_that_follows():
    for then in REFUSALS.values():
        assert Attempt().after_refusal(then).restarts == 1


def test_nothing_follows_a_refusal_that_no_request_would_help():
    with pytest.raises(ValueError, match="fail"):
        Attempt().after_refusal(Recovery.FAIL)
