"""Retry-After: the two forms of RFC 9110 §10.2.3, and texts that have neither."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scrapy_streaming.protocol.fields import MAX_DELAY, MAX_FIELD, retry_after

NOW = 784_111_777.0  # Sun, 06 Nov 1994 08:49:37 GMT, the RFC's own example


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        pytest.param(["120"], 120.0, id="digits"),
        pytest.param(["0"], 0.0, id="at-once"),
        pytest.param(["007"], 7.0, id="leading-zeros"),
        pytest.param([" \t5 "], 5.0, id="white-space-around"),
        pytest.param(["9" * 300], float(MAX_DELAY), id="longer-than-anybody-lives"),
        pytest.param(["Sun, 06 Nov 1994 08:50:37 GMT"], 60.0, id="date"),
        pytest.param(["Sun, 06 Nov 1994 08:49:37 GMT"], 0.0, id="date-now"),
        pytest.param(["Sun, 06 Nov 1994 08:49:36 GMT"], 0.0, id="date-past"),
        pytest.param([], None, id="absent"),
        pytest.param([""], None, id="empty"),
        pytest.param(["120", "120"], None, id="two-values"),
        pytest.param(["120, 60"], None, id="list"),
        pytest.param(["-1"], None, id="sign"),
        pytest.param(["+1"], None, id="plus"),
        pytest.param(["1.5"], None, id="fraction"),
        pytest.param(["1e3"], None, id="exponent"),
        pytest.param(["٣"], None, id="other-digits"),
        pytest.param(["5 s"], None, id="unit"),
        pytest.param(["soon"], None, id="word"),
        pytest.param(["1\n"], None, id="line-feed"),
        pytest.param(["Sunday, 06-Nov-94 08:50:37 GMT"], None, id="obsolete-date"),
        pytest.param(["Sun, 31 Feb 1994 08:50:37 GMT"], None, id="no-such-day"),
        pytest.param(["9" * (MAX_FIELD + 1)], None, id="too-long"),
    ],
)
def test_seconds_to_wait(values: list[str], seconds: float | None) -> None:
    assert retry_after(values, NOW) == seconds


@given(st.lists(st.text() | st.integers().map(str), max_size=2), st.floats(0, 2**33))
def test_whatever_is_sent_gives_a_time_not_past_or_none(values: list[str], now: float) -> None:
    said = retry_after(values, now)
    assert said is None or 0 <= said <= max(MAX_DELAY, 253_402_300_800)
