"""Jobs of a crawl: claimed in turn, waited for, completed, given back (I1, I5, C12)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.reactor import on_reactor
from units.crawl import JOB, KEY, URL, crawl, turn
from units.fakes import FakeLedger

from scrapy_streaming.exceptions import BlobGoing, LeaseLost
from scrapy_streaming.protocol.jobs import Done, Granted, Held, JobState, StoredRepresentation
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.runtime import held_jobs
from scrapy_streaming.runtime.shutdown import CrawlStopping

STORED = StoredRepresentation("sha256:" + "ef" * 32, 3, Validators(), URL)


@pytest.fixture(autouse=True)
def polls_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_jobs, "POLL", 0.001)


@on_reactor
async def test_a_granted_job_is_in_the_table_until_it_is_completed(ledger: FakeLedger) -> None:
    one = crawl(ledger)
    claim = await one.runtime.jobs.claim(KEY, JOB, host="h")
    assert isinstance(claim, Granted)
    assert one.runtime.jobs.leases.is_valid(claim.lease)
    completion = await one.runtime.jobs.complete(claim.lease, STORED, 0, path="a.bin")
    assert not one.runtime.jobs.leases.has(claim.lease)
    assert (completion.known.digest, completion.path) == (STORED.digest, "a.bin")
    assert ledger.row(KEY).state is JobState.DONE


@on_reactor
async def test_a_turn_lasts_as_long_as_the_lease(ledger: FakeLedger) -> None:
    """One concurrent request: two turns in all, two for one host."""
    one = crawl(ledger, settings={"CONCURRENT_REQUESTS": 1})
    jobs = one.runtime.jobs
    claims = [await jobs.claim(f"{number:064}", JOB, host="h") for number in range(2)]
    third = asyncio.ensure_future(jobs.claim("3" * 64, JOB, host="h"))
    await turn()
    assert not third.done()
    jobs.release(claims[0].lease)
    await turn()
    assert third.done()
    assert isinstance(third.result(), Granted)


@on_reactor
async def test_another_workers_job_is_waited_for_and_its_result_taken(ledger: FakeLedger) -> None:
    """C12: also a result older than what was asked for is fresh enough then."""
    other = ledger.for_worker("b")
    lease = other.claim(KEY, JOB).result().lease
    one = crawl(ledger)
    waiting = asyncio.ensure_future(one.runtime.jobs.claim(KEY, JOB, refresh_before=float("inf"), host="h"))
    await turn()
    assert not waiting.done()
    assert one.runtime.turns._count == 0, "a job that waits has no turn"
    other.complete(lease, STORED)
    claim = await waiting
    assert isinstance(claim, Done)
    assert claim.completion.known.digest == STORED.digest


@on_reactor
async def test_with_skip_another_workers_job_is_not_waited_for(ledger: FakeLedger) -> None:
    ledger.for_worker("host-1-b").claim(KEY, JOB)
    one = crawl(ledger, settings={"STREAMING_HELD": "skip"})
    assert isinstance(await one.runtime.jobs.claim(KEY, JOB), Held)


@on_reactor
async def test_a_job_that_is_granted_while_the_crawl_stops_is_given_back(ledger: FakeLedger) -> None:
    one = crawl(ledger)
    one.runtime.shutdown.start()
    ledger.pause()
    waiting = asyncio.ensure_future(one.runtime.jobs.claim(KEY, JOB, host="h"))
    await turn()
    one.crawler.crawling = False
    ledger.resume()
    with pytest.raises(CrawlStopping):
        await waiting
    assert ledger.row(KEY).state is JobState.READY
    assert one.runtime.turns._count == 0


@on_reactor
async def test_a_download_goes_on_under_the_lease_that_it_claimed_again(ledger: FakeLedger) -> None:
    one = crawl(ledger)
    context = await one.context()
    first = context.lease
    ledger.clock.advance(1000)
    stolen = ledger.for_worker("b").claim(KEY, JOB).result()
    ledger.for_worker("b").release(stolen.lease)
    claim = await one.runtime.jobs.claim_again(context)
    assert isinstance(claim, Granted)
    assert context.lease == claim.lease != first
    assert one.stat("recovered") == 1


@on_reactor
async def test_a_blob_that_gc_is_collecting_is_published_again(ledger: FakeLedger) -> None:
    one = crawl(ledger)
    context = await one.context()
    ledger.fail_next("complete", BlobGoing("going"), times=2)
    published: list[Any] = []

    async def republish() -> None:
        published.append(None)

    done = await one.runtime.jobs.complete(context.lease, STORED, 0, republish=republish)
    assert (len(published), done.known.digest) == (2, STORED.digest)


@on_reactor
async def test_a_lease_that_was_lost_is_counted_once(ledger: FakeLedger) -> None:
    one = crawl(ledger)
    context = await one.context()
    for _ in range(2):
        ledger.fail_next("complete", LeaseLost("lost"))
        with pytest.raises(LeaseLost):
            await one.runtime.jobs.complete(context.lease, STORED, 0)
    assert one.stat("leases_lost") == 1


@on_reactor
async def test_a_job_that_a_spider_was_handed_goes_to_the_next_request(ledger: FakeLedger) -> None:
    one = crawl(ledger)
    context = await one.context()
    one.runtime.jobs.hand_to_spider(context)
    claim = await one.runtime.jobs.claim(KEY, JOB)
    assert isinstance(claim, Granted)
    assert claim.lease.fence > context.lease.fence


@on_reactor
async def test_a_failed_job_waits_as_long_as_the_server_asked(ledger: FakeLedger) -> None:
    one = crawl(ledger)
    context = await one.context()
    one.runtime.jobs.fail(context.lease, "bad-status-503", "busy", permanent=False, retry_after=30.0)
    row = ledger.row(KEY)
    assert (row.state, row.error_code) == (JobState.READY, "bad-status-503")
    assert row.not_before == ledger.clock.now + 30.0


@on_reactor
async def test_what_raises_behind_a_claim_gives_the_job_back(ledger: FakeLedger) -> None:
    one = crawl(ledger)
    claim = await one.runtime.jobs.claim(KEY, JOB, host="h")
    with pytest.raises(ZeroDivisionError), one.runtime.jobs.released_on_error(claim.lease):
        raise ZeroDivisionError
    assert ledger.row(KEY).state is JobState.READY
    assert one.runtime.turns._count == 0


@on_reactor
async def test_only_completions_of_delivered_items_are_recorded_as_such(ledger: FakeLedger) -> None:
    one = crawl(ledger)
    context = await one.context()
    completion = await one.runtime.jobs.complete(context.lease, STORED, 0)
    one.runtime.jobs.remember(completion)
    one.runtime.jobs.deliver(["none of them"])
    one.runtime.jobs.record_delivered()
    assert "delivered" not in ledger.calls
    one.runtime.jobs.deliver([completion.completion_id])
    one.runtime.jobs.record_delivered()
    assert ledger.calls.count("delivered") == 1


@on_reactor
async def test_an_item_that_names_a_file_twice_is_delivered_once(ledger: FakeLedger) -> None:
    """Scrapy gives the entry of a URL twice where an item names it twice."""
    one = crawl(ledger)
    context = await one.context()
    completion = await one.runtime.jobs.complete(context.lease, STORED, 0)
    one.runtime.jobs.remember(completion)
    one.runtime.jobs.deliver([completion.completion_id, completion.completion_id])
    one.runtime.jobs.record_delivered()
    assert ledger.calls.count("delivered") == 1
