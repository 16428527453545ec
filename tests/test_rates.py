"""Limits on how fast bodies may come, as values."""

from __future__ import annotations

import pytest

from scrapy_streaming.runtime.rates import BURST, Rates, rate_for
from scrapy_streaming.setting_kinds import RateRule

ALL_DAY = RateRule("", 0, 0, 2000)
NIGHT = RateRule("", 22 * 60, 6 * 60, 0)
OFFICE = RateRule("h", 9 * 60, 17 * 60, 50)


@pytest.mark.parametrize(
    ("host", "minute", "rate"),
    [
        pytest.param("", 0, 0, id="midnight-is-night"),
        pytest.param("", 6 * 60 - 1, 0, id="last-minute-of-the-night"),
        pytest.param("", 6 * 60, 2000, id="first-of-the-day"),
        pytest.param("", 22 * 60, 0, id="first-of-the-night"),
        pytest.param("h", 9 * 60, 50, id="a-host-in-its-time"),
        pytest.param("h", 17 * 60, 0, id="a-host-out-of-it"),
        pytest.param("other", 9 * 60, 0, id="another-host"),
    ],
)
def test_which_limit_holds(host: str, minute: int, rate: int) -> None:
    assert rate_for([ALL_DAY, NIGHT, OFFICE], host, minute) == rate


def test_bytes_are_let_through_at_the_rate() -> None:
    now = [100.0]
    rates = Rates([RateRule("", 0, 0, 1000), RateRule("h", 0, 0, 100)], lambda: now[0], lambda: 0)
    assert rates.wait("other", 500) == pytest.approx(0.5 - BURST)
    assert rates.wait("other", 500) == pytest.approx(1.0 - BURST), "all hosts share the first"
    assert rates.wait("h", 100) == pytest.approx(1.1 - BURST), "the slower of both counts"
    assert rates.wait("h", 100) == pytest.approx(2.0 - BURST)
    now[0] += 100
    assert rates.wait("h", 10) == 0.0, "what was not used for long is no credit beyond the burst"
    assert rates.wait("h", 100) > 0.5


def test_without_rules_nothing_waits() -> None:
    assert Rates([]).wait("h", 1 << 40) == 0.0
