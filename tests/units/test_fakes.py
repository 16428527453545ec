"""What a test may order of the ledger in memory; ``tests/storage/test_fake_ledger.py`` has its contract."""

from __future__ import annotations

import subprocess
import sys

import pytest
from units.fakes import FakeClock, FakeLedger

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.protocol.jobs import Granted, Held
from scrapy_streaming.storage.job_request import JobRequest

KEY, OTHER = "1" * 64, "2" * 64
REQUEST = JobRequest.plain("work", "https://example.org/a.bin")


def test_an_ordered_failure_answers_one_call_and_changes_nothing(ledger: FakeLedger) -> None:
    broken = LedgerError("disk", reason="ledger-corrupt")
    ledger.fail_next("claim", broken)
    assert ledger.claim(KEY, REQUEST).exception() is broken
    assert ledger.job(KEY).result() is None
    assert isinstance(ledger.claim(KEY, REQUEST).result(), Granted)


def test_failures_are_ordered_by_verb_and_number(ledger: FakeLedger) -> None:
    ledger.fail_next("renew", LedgerError("away", reason="ledger-unreachable"), times=2)
    assert ledger.free([KEY]).result() == {KEY}
    assert [ledger.renew().exception() is None for _ in range(3)] == [False, False, True]
    with pytest.raises(ValueError, match="renwe"):
        ledger.fail_next("renwe", LedgerError("away"))


def test_a_paused_ledger_answers_nothing_until_it_resumes_and_renewals_first(
    ledger: FakeLedger, clock: FakeClock
) -> None:
    granted = ledger.claim(KEY, REQUEST).result()
    assert isinstance(granted, Granted)
    ledger.pause()
    claimed, renewed = ledger.claim(OTHER, REQUEST), ledger.renew()
    clock.advance(30)
    assert not claimed.done()
    assert not renewed.done()
    assert ledger.pending == ["claim", "renew"]
    assert OTHER not in ledger.records.jobs
    assert ledger.resume() == 2
    assert renewed.result() == {granted.lease.claim_id}
    assert ledger.row(KEY).lease_until == clock.now + 60
    assert isinstance(claimed.result(), Granted)
    assert ledger.calls == ["claim", "claim", "renew"]


def test_a_call_that_was_cancelled_in_a_pause_is_not_carried_out(ledger: FakeLedger) -> None:
    ledger.pause()
    claimed = ledger.claim(KEY, REQUEST)
    assert claimed.cancel()
    ledger.resume()
    assert KEY not in ledger.records.jobs


def test_workers_share_the_records_and_nothing_else(ledger: FakeLedger) -> None:
    other = ledger.for_worker("b")
    ledger.claim(KEY, REQUEST)
    ledger.pause()
    assert isinstance(other.claim(KEY, REQUEST).result(), Held)
    assert other.calls == ["claim"]


def test_a_closed_ledger_refuses_and_answers_what_waited(ledger: FakeLedger) -> None:
    ledger.pause()
    waiting = ledger.claim(KEY, REQUEST)
    ledger.close()
    ledger.close()
    error = waiting.exception(timeout=0)
    assert isinstance(error, LedgerError)
    assert error.reason == "ledger-unreachable"
    with pytest.raises(LedgerError, match="closed") as refused:
        ledger.renew()
    assert refused.value.reason == "ledger-closed"


@pytest.mark.slow
def test_the_stand_ins_load_no_database_and_no_framework() -> None:
    """The unit tests stay fast: what a stand-in loads, all of them load."""
    code = (
        "import sys, units.fakes; print(*{'scrapy', 'twisted', 'sqlalchemy', 'psycopg'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.split() == []
