"""A spider's own streamed requests: claimed, handed over, given up (E9)."""

from __future__ import annotations

import asyncio
import pickle

import pytest
from scrapy import Request
from scrapy.http import Response
from support.memory_store import MemoryStore
from support.reactor import on_reactor
from units.crawl import URL, Crawl, crawl, turn
from units.fakes import FakeLedger

from scrapy_streaming.context import context_of
from scrapy_streaming.exceptions import LeaseLost, WriteFailed
from scrapy_streaming.middleware import ResumeMiddleware
from scrapy_streaming.protocol.answers import Replace
from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.response import StreamedResponse
from scrapy_streaming.storage.complete_part import small_part


def streamed(fragment: str = "") -> Request:
    return Request(URL + fragment, callback=lambda _: None, meta={"streaming": True})


async def handed_over(one: Crawl) -> StreamedResponse:
    """Return the response that a spider's callback gets, whose job it has now."""
    middleware = ResumeMiddleware(one.crawler, one.runtime)  # type: ignore[arg-type]
    middleware._streams = {"https": True}
    request, state = streamed(), PartState(URL, Validators(), total=3)
    asked = asyncio.ensure_future(middleware.process_request(request))
    await turn()
    assert asked.done(), "the job is not waited for"
    answer = Response(URL, request=request)
    response = StreamedResponse.around(answer, Replace(state, Reason.FETCHED), small_part(state, b"abc"))
    middleware.note_answer(response, request)
    given = await middleware.process_response(request, response)
    assert isinstance(given, StreamedResponse)
    return given


@on_reactor
async def test_a_job_is_not_claimed_for_a_digest_that_cannot_be_read(ledger: FakeLedger) -> None:
    """Its lease would be renewed up to the end of the crawl: other workers would wait for it."""
    one = crawl(ledger)
    middleware = ResumeMiddleware(one.crawler, one.runtime)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hex digits"):
        await middleware.process_request(streamed("#sha256=short"))
    assert not ledger.records.jobs
    assert not one.runtime.jobs.leases


@on_reactor
async def test_a_request_that_is_given_up_carries_no_context(ledger: FakeLedger) -> None:
    """A retry claims the job again."""
    one, request = crawl(ledger), streamed()
    middleware = ResumeMiddleware(one.crawler, one.runtime)  # type: ignore[arg-type]
    middleware._streams = {"https": True}
    await middleware.process_request(request)
    [job] = ledger.records.jobs.values()
    assert (job.state, context_of(request).lease.fence) == (JobState.LEASED, 1)
    assert await middleware.process_exception(request, OSError("no route")) is None
    assert (job.state, context_of(request)) == (JobState.READY, None)


@on_reactor
async def test_a_redirected_request_can_wait_on_disk(ledger: FakeLedger) -> None:
    """JOBDIR: the scheduler keeps a request with its meta, and the context in it."""
    one, request = crawl(ledger), streamed()
    middleware = ResumeMiddleware(one.crawler, one.runtime)  # type: ignore[arg-type]
    middleware._streams = {"https": True}
    await middleware.process_request(request)
    context, kept = context_of(request), pickle.loads(pickle.dumps(context_of(request)))
    assert (kept.lease, kept.attempt, kept.sent) == (context.lease, context.attempt, context.sent)


@on_reactor
async def test_a_job_that_a_spider_cannot_publish_goes_to_the_next_request(
    ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else that waits for this very crawl, for ever."""
    one = crawl(ledger, store := MemoryStore())
    first = await handed_over(one)

    def full(_part: object) -> None:
        raise WriteFailed("the disk has a fault")

    with monkeypatch.context() as patch:
        patch.setattr(store, "publish", full)
        with pytest.raises(WriteFailed):
            await first.publish()
    second = await handed_over(one)
    published = await second.publish()
    [job] = ledger.records.jobs.values()
    assert (job.state, job.digest) == (JobState.DONE, str(published.digest))


@on_reactor
async def test_a_spider_may_publish_again_after_an_error(
    ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = crawl(ledger, store := MemoryStore())
    response, publish = await handed_over(one), store.publish
    calls: list[object] = []

    def once_full(part: object) -> object:
        calls.append(part)
        if len(calls) == 1:
            raise WriteFailed("the disk has a fault")
        return publish(part)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "publish", once_full)
    with pytest.raises(WriteFailed):
        await response.publish()
    assert (await response.publish()).digest == response.part.digest
    assert not one.runtime.jobs.leases


@on_reactor
async def test_a_spider_that_publishes_too_late_takes_no_later_job(ledger: FakeLedger) -> None:
    """The second response's job can still be claimed."""
    one = crawl(ledger, MemoryStore())
    first = await handed_over(one)
    await handed_over(one)
    with pytest.raises(LeaseLost):
        await first.publish()
    await handed_over(one)
