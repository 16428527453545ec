"""Times in the future, written by a clock that was wrong once: they count for nothing (I14, F16)."""

from __future__ import annotations

import pytest
from ledger_kit import KEY, URL, Clock, Database, Opener, digest_of, grant, known, view

from scrapy_streaming.context import DownloadContext
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import SKEW, Done, Granted, Lease, is_recent
from scrapy_streaming.storage.ledger import JobRequest, Ledger

YEAR = 365 * 86400.0
REQUEST = JobRequest("work", "artifact", URL, "ab" * 32)


@pytest.mark.proves("I14", "F16")
@pytest.mark.parametrize("fresh_for", [None, 90 * 86400.0], ids=["never", "expired"])
def test_a_completion_in_the_future_is_not_fresh(
    ledger: Ledger, clock: Clock, fresh_for: float | None
) -> None:
    """Asked of the server again, with what is known of it; then it is done by the clock that is right."""
    lease = grant(ledger, KEY, REQUEST)
    clock.now += YEAR
    ledger.complete(lease, known()).result()
    clock.now -= YEAR
    before = None if fresh_for is None else clock.now - fresh_for
    again = ledger.claim(KEY, REQUEST, refresh_before=before).result()
    assert isinstance(again, Granted)
    assert again.known is not None
    assert again.known.digest == digest_of("bytes")
    ledger.complete(again.lease, known()).result()
    assert isinstance(ledger.claim(KEY, REQUEST, refresh_before=before).result(), Done)


@pytest.mark.proves("I14")
def test_clocks_that_differ_a_little_ask_nothing_twice(ledger: Ledger, clock: Clock) -> None:
    lease = grant(ledger, KEY, REQUEST)
    clock.now += SKEW
    ledger.complete(lease, known()).result()
    clock.now -= SKEW
    assert isinstance(ledger.claim(KEY, REQUEST).result(), Done)


@pytest.mark.proves("I14", "I7")
def test_a_lease_longer_than_any_is_not_waited_for(opened: Opener, database: Database, clock: Clock) -> None:
    """A damaged number, or the clock of another machine."""
    lease = grant(opened("dead"), KEY, REQUEST)
    database.rows("UPDATE ss_job SET lease_until = ?", clock.now + YEAR)
    assert grant(opened("alive"), KEY, REQUEST).fence == lease.fence + 1


@pytest.mark.proves("I14", "I16")
def test_a_copy_put_back_in_the_future_is_asked_about_once(
    ledger: Ledger, database: Database, clock: Clock
) -> None:
    """Else all that is done until then would be asked again by each crawl."""
    database.rows("UPDATE ss_meta SET put_back_at = ?", clock.now + YEAR)
    standing = ledger.raise_epoch(1).result()
    assert standing.put_back_at == pytest.approx(clock.now)
    clock.now += 1
    ledger.complete(grant(ledger, KEY, REQUEST), known()).result()
    assert isinstance(ledger.claim(KEY, REQUEST).result(), Done)


@pytest.mark.proves("I14")
def test_a_deletion_begun_in_the_future_is_abandoned(
    ledger: Ledger, database: Database, clock: Clock
) -> None:
    ledger.complete(grant(ledger, KEY, REQUEST), known()).result()
    database.rows("UPDATE ss_blob SET state = 'deleting', stored_at = ?", clock.now + YEAR)
    again = grant(ledger, KEY, REQUEST)
    ledger.complete(again, known()).result()
    assert database.rows("SELECT state FROM ss_blob") == [("present",)]


@pytest.mark.proves("I14")
def test_events_of_the_future_are_trimmed(ledger: Ledger, database: Database, clock: Clock) -> None:
    ledger.release(grant(ledger, KEY, REQUEST)).result()
    grant(ledger, KEY, REQUEST)
    [(first,)] = database.rows("SELECT min(id) FROM ss_event")
    database.rows("UPDATE ss_event SET at = ? WHERE id = ?", clock.now + YEAR, first)
    assert ledger.trim_events(30 * 86400.0).result() == 1
    assert len(ledger.details(view(ledger).id).result().history) == 2


@pytest.mark.proves("I14")
@pytest.mark.parametrize(
    ("at", "since", "recent"),
    [
        (100.0, None, True),
        (100.0, 100.0, True),
        (99.0, 100.0, False),
        (100.0 + SKEW, None, True),
        (101.0 + SKEW, None, False),
        (101.0 + SKEW, 0.0, False),
        (float("inf"), None, False),
        (100.0, float("inf"), False),
    ],
)
def test_what_is_recent(at: float, since: float | None, recent: bool) -> None:
    """Now is 100."""
    assert is_recent(at, since, 100.0) is recent


@pytest.mark.proves("I14")
def test_a_whole_part_of_the_future_is_asked_about() -> None:
    """But for one whose digest the caller gave."""
    lease = Lease(1, KEY, 1, "ab" * 16, 0.0, 1)
    assert not DownloadContext(KEY, REQUEST, lease).may_publish(YEAR, now=0.0)
    assert DownloadContext(KEY, REQUEST, lease).may_publish(0.0, now=0.0)
    assert DownloadContext(KEY, REQUEST, lease, expected=Digest("0" * 64)).may_publish(YEAR, now=0.0)
