"""A spider's own streamed requests: claimed, handed over, given up (E9)."""

from __future__ import annotations

import pickle

import pytest
from scrapy import Request
from support.reactor import on_reactor
from units.crawl import URL, crawl
from units.fakes import FakeLedger

from scrapy_streaming.context import context_of
from scrapy_streaming.middleware import ResumeMiddleware
from scrapy_streaming.protocol.jobs import JobState


def streamed(fragment: str = "") -> Request:
    return Request(URL + fragment, callback=lambda _: None, meta={"streaming": True})


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
