"""Which leases a worker may write under, by its own clock (ledger rules 1, 7 and 8)."""

from __future__ import annotations

import pytest
from units.fakes import FakeClock

from scrapy_streaming.exceptions import LeaseLost
from scrapy_streaming.protocol.jobs import Lease
from scrapy_streaming.runtime.lease_table import LeaseTable


def lease(name: str, fence: int = 1) -> Lease:
    return Lease(1, "ab" * 32, fence, name, 0.0, 1)


ONE, TWO, THREE = lease("one"), lease("two"), lease("three", 2)


@pytest.fixture
def leases(clock: FakeClock) -> LeaseTable:
    """Of 80 seconds: valid for 70."""
    return LeaseTable(80, clock)


@pytest.mark.parametrize(
    ("later", "valid"), [(0, True), (69.9, True), (70, False), (75, False), (1e6, False), (-1e3, True)]
)
def test_a_lease_is_valid_up_to_its_margin_from_when_it_was_asked_for(
    leases: LeaseTable, clock: FakeClock, later: float, valid: bool
) -> None:
    """Rule 7."""
    leases.add(ONE, clock.now)
    clock.now += later
    assert leases.is_valid(ONE) is valid


def test_the_time_counts_from_the_call_not_from_the_answer(leases: LeaseTable, clock: FakeClock) -> None:
    asked_at = clock.now
    clock.now += 60
    leases.add(ONE, asked_at)
    assert leases.is_valid(ONE)
    clock.now += 10
    assert not leases.is_valid(ONE)


def test_a_lease_that_was_never_held_or_has_ended_is_not_valid(leases: LeaseTable, clock: FakeClock) -> None:
    assert not leases.is_valid(ONE)
    leases.add(ONE, clock.now)
    leases.remove(ONE)
    leases.remove(ONE)
    assert not leases.is_valid(ONE)
    assert len(leases) == 0


@pytest.mark.parametrize(
    ("still", "lost"),
    [
        pytest.param({"one", "two"}, [], id="all-there"),
        pytest.param({"one"}, [TWO], id="one-missing"),
        pytest.param(set(), [ONE, TWO], id="none-there"),
        pytest.param({"one", "two", "of-another-run"}, [], id="one-that-is-unknown"),
    ],
)
def test_what_a_renewal_does_not_find_is_lost(
    leases: LeaseTable, clock: FakeClock, still: set[str], lost: list[Lease]
) -> None:
    """Rule 8."""
    leases.add(ONE, clock.now)
    leases.add(TWO, clock.now)
    snapshot, asked_at = leases.snapshot(), clock.now + 20
    clock.now += 25
    assert sorted(leases.renew(snapshot, asked_at, still), key=lambda x: x.claim_id) == lost
    assert leases.renew(snapshot, asked_at, still) == [], "reported once"
    assert [leases.is_valid(x) for x in (ONE, TWO)] == [x not in lost for x in (ONE, TWO)]
    clock.now = asked_at + 69
    assert leases.is_valid(ONE) is (ONE not in lost)
    clock.now = asked_at + 70
    assert not leases.is_valid(ONE)


def test_a_renewal_changes_no_lease_that_was_claimed_or_ended_meanwhile(
    leases: LeaseTable, clock: FakeClock
) -> None:
    leases.add(ONE, clock.now)
    leases.add(TWO, clock.now)
    snapshot = leases.snapshot()
    leases.remove(ONE)
    leases.add(THREE, clock.now)
    assert leases.renew(snapshot, clock.now, {"two"}) == []
    assert [leases.is_valid(x) for x in (ONE, TWO, THREE)] == [False, True, True]


def test_a_lease_whose_time_is_over_is_held_until_a_renewal_does_not_find_it(
    leases: LeaseTable, clock: FakeClock
) -> None:
    """Rule 1: no worker took the job over, so it is renewed late and not lost."""
    leases.add(ONE, clock.now)
    leases.add(TWO, clock.now)
    clock.now += 100
    assert [(leases.is_valid(x), leases.has(x)) for x in (ONE, TWO)] == [(False, True)] * 2
    assert leases.renew(leases.snapshot(), clock.now, {"two"}) == [ONE]
    assert [(leases.is_valid(x), leases.has(x)) for x in (ONE, TWO)] == [(False, False), (True, True)]
    assert (leases.remove(ONE), leases.remove(TWO), leases.remove(TWO)) == (False, True, False)


def test_a_download_is_cancelled_once_and_only_while_it_is_in_flight(
    leases: LeaseTable, clock: FakeClock
) -> None:
    cancelled: list[tuple[str, BaseException]] = []
    error = LeaseLost("gone")
    with leases.cancellable(ONE, lambda e: cancelled.append(("one", e))):
        assert leases.take_cancel(TWO) is None
        assert cancelled == []
        leases.take_cancel(ONE)(error)
        assert leases.take_cancel(ONE) is None
        assert cancelled == [("one", error)]
    with leases.cancellable(ONE, lambda e: cancelled.append(("one again", e))):
        with leases.cancellable(TWO, lambda e: cancelled.append(("two", e))):
            pass
        [cancel] = leases.take_cancels()
        cancel(LeaseLost("all"))
        assert leases.take_cancels() == []
    assert [name for name, _ in cancelled] == ["one", "one again"]
    assert leases.take_cancel(ONE) is None
    assert len(cancelled) == 2
