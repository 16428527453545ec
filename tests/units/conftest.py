"""Fixtures of the unit tests: each test has a clock, statistics and a ledger in memory of its own.

What may live here: stand-ins, ready made. No fixture here opens a file, starts a thread or an event loop.
"""

from __future__ import annotations

import pytest
from units.fakes import FakeClock, FakeLedger, FakeStats


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def stats() -> FakeStats:
    return FakeStats()


@pytest.fixture
def ledger(clock: FakeClock) -> FakeLedger:
    """The ledger of worker "a": leases of 60 seconds, five attempts."""
    return FakeLedger("a", clock=clock)


@pytest.fixture(autouse=True)
def outlives_the_reactor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no crawl of a test act on the end of the reactor that all tests share."""
    monkeypatch.setattr("scrapy_streaming.runtime.shutdown.before_end", lambda _: lambda: None)
