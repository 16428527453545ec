"""The pipeline's way from a claim to a completion, without a network or a disk (C6, I8, R44, E9)."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from scrapy import Request
from scrapy.http import Response
from scrapy.pipelines.media import MediaPipeline
from support.memory_store import MemoryStore
from support.reactor import on_reactor
from twisted.python.failure import Failure
from units.crawl import Crawl, crawl
from units.fakes import FakeLedger

from scrapy_streaming.context import context_of
from scrapy_streaming.exceptions import IntegrityError, LeaseLost
from scrapy_streaming.failures import FileRefused
from scrapy_streaming.pipeline import StreamingFilesPipeline
from scrapy_streaming.protocol.answers import Replace
from scrapy_streaming.protocol.jobs import JobState, StoredRepresentation
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.response import StreamedResponse
from scrapy_streaming.storage.complete_part import small_part

URL = "https://h.example/a.pdf"
BODY = b"bytes of a file"
SHA256 = hashlib.sha256(BODY).hexdigest()


class Rig:
    """A pipeline over a ledger and a store in memory."""

    def __init__(self, ledger: FakeLedger, **settings: Any) -> None:
        self.ledger = ledger
        self.blobs = MemoryStore()
        self.one: Crawl = crawl(ledger, self.blobs, {"STREAMING_REVALIDATE": "never"} | settings)
        self.pipeline = StreamingFilesPipeline("/nowhere", crawler=self.one.crawler)  # type: ignore[arg-type]
        self.pipeline.inc_stats = lambda status: None  # type: ignore[method-assign]
        self.info = MediaPipeline.SpiderInfo(self.one.crawler.spider)

    async def ask(self, request: Request) -> Any:
        return await self.pipeline._recorded_or_claimed(request, self.info, {})

    def answer(self, request: Request, body: bytes = BODY, status: int = 200) -> Response:
        """Return the answer that the handler streamed for *request*."""
        response = Response(URL, status=status, request=request)
        if status != 200:
            return response
        state = PartState(URL, Validators(), total=len(body))
        return StreamedResponse.around(response, Replace(state, Reason.FETCHED), small_part(state, body))

    async def store(self, request: Request, body: bytes = BODY) -> Any:
        return await self.pipeline.media_downloaded(self.answer(request, body), request, self.info, item={})

    def job(self) -> Any:
        [job] = self.ledger.records.jobs.values()
        return job


@on_reactor
async def test_a_download_is_published_named_and_completed(ledger: FakeLedger) -> None:
    rig, request = Rig(ledger), Request(URL)
    assert await rig.ask(request) is None, "it is to be downloaded"
    entry = await rig.store(request)
    assert (entry["checksum"], entry["size"], entry["status"]) == (SHA256, len(BODY), "downloaded")
    with rig.blobs.open(context_of(request).published.digest) as stream:
        assert stream.read() == BODY
    assert rig.blobs.is_taken(entry["path"])
    assert (rig.job().state, rig.job().digest) == (JobState.DONE, f"sha256:{SHA256}")
    assert rig.one.runtime.turns._count == 0


@on_reactor
async def test_what_is_recorded_needs_no_request(ledger: FakeLedger) -> None:
    rig, request = Rig(ledger), Request(URL)
    await rig.ask(request)
    first = await rig.store(request)
    again = await rig.ask(Request(URL))
    assert (again["status"], again["reason"], again["path"]) == ("uptodate", "stored", first["path"])
    assert rig.one.stat("bytes_saved") == len(BODY)


@on_reactor
async def test_what_is_recorded_and_gone_is_fetched_again(ledger: FakeLedger) -> None:
    """R44."""
    rig, request = Rig(ledger), Request(URL)
    await rig.ask(request)
    await rig.store(request)
    digest = context_of(request).published.digest
    rig.blobs.set_aside(rig.blobs.find(digest))
    request = Request(URL)
    assert await rig.ask(request) is None
    assert context_of(request).stored is None, "nothing that a 304 could confirm"


@on_reactor
async def test_bytes_that_are_not_those_expected_are_not_stored(ledger: FakeLedger) -> None:
    """E9: the job is given back, the bytes go to quarantine."""
    rig, request = Rig(ledger), Request(URL, meta={"streaming": {"digest": "sha256:" + "ab" * 32}})
    await rig.ask(request)
    with pytest.raises(IntegrityError) as wrong:
        await rig.store(request)
    assert not list(rig.blobs.blobs())
    with pytest.raises(FileRefused, match=wrong.value.reason):
        rig.pipeline._failed(Failure(wrong.value), request, rig.info)
    assert rig.job().state is JobState.READY


@on_reactor
async def test_a_name_comes_before_the_record(ledger: FakeLedger) -> None:
    """Effect first, record second: a crash in between costs an orphan, never a record without its bytes."""
    rig, request = Rig(ledger), Request(URL)
    await rig.ask(request)
    named: list[bool] = []
    complete = ledger.complete

    def completed(*args: Any, **facts: Any) -> Any:
        named.append(rig.blobs.is_taken(facts["path"]))
        return complete(*args, **facts)

    ledger.complete = completed  # type: ignore[method-assign]
    await rig.store(request)
    assert named == [True]


@on_reactor
async def test_a_lease_lost_at_the_end_is_claimed_again(ledger: FakeLedger) -> None:
    rig, request = Rig(ledger), Request(URL)
    await rig.ask(request)
    first = context_of(request).lease
    ledger.fail_next("complete", LeaseLost("lost"))
    ledger.clock.advance(1000)
    entry = await rig.store(request)
    assert entry["checksum"] == SHA256
    assert context_of(request).lease.fence > first.fence
    assert rig.job().state is JobState.DONE


@on_reactor
async def test_the_result_of_the_worker_that_took_the_job_over_is_taken(ledger: FakeLedger) -> None:
    """I8: one result a job."""
    rig, request = Rig(ledger), Request(URL)
    await rig.ask(request)
    ledger.clock.advance(1000)
    lease = ledger.for_worker("b").claim(rig.job().key, rig.job().request).result().lease
    part = small_part(PartState(URL, Validators()), b"theirs")
    digest = rig.blobs.publish(part).digest
    stored = StoredRepresentation(str(digest), 6, Validators(), URL)
    ledger.for_worker("b").complete(lease, stored, path="full/theirs.pdf")
    ledger.fail_next("complete", LeaseLost("lost"))
    entry = await rig.store(request)
    assert entry["digest"] == str(digest)


@on_reactor
@pytest.mark.parametrize(("status", "state"), [(404, JobState.FAILED), (503, JobState.READY)])
async def test_a_bad_status_ends_the_job_as_failed(ledger: FakeLedger, status: int, state: JobState) -> None:
    """Permanent ones are not tried again by this crawl."""
    rig, request = Rig(ledger), Request(URL)
    await rig.ask(request)
    with pytest.raises(FileRefused) as refused:
        await rig.pipeline.media_downloaded(rig.answer(request, status=status), request, rig.info, item={})
    with pytest.raises(FileRefused):
        rig.pipeline._failed(Failure(refused.value), request, rig.info)
    assert (rig.job().state, rig.job().error_code) == (state, f"bad-status-{status}")
    assert rig.one.stat(f"failed/bad-status-{status}") == 1


@on_reactor
async def test_a_subclass_may_set_its_own_expiry(ledger: FakeLedger) -> None:
    """R7: also after the constructor of ``FilesPipeline``, which reads FILES_EXPIRES."""
    rig, request = Rig(ledger, STREAMING_REVALIDATE="expired", FILES_EXPIRES=10**6), Request(URL)
    await rig.ask(request)
    await rig.store(request)
    assert (await rig.ask(Request(URL)))["status"] == "uptodate"
    rig.pipeline.expires = 0
    assert await rig.ask(Request(URL)) is None, "the server is asked"


@on_reactor
async def test_a_refusal_without_a_reason_is_a_hooks(ledger: FakeLedger) -> None:
    """A statistic has a name, and the job is given back whatever a hook raises."""
    rig, request = Rig(ledger), Request(URL)
    await rig.ask(request)
    with pytest.raises(FileRefused):
        rig.pipeline._failed(Failure(FileRefused("")), request, rig.info)
    assert rig.one.stat("failed/refused-by-hook") == 1
    assert rig.job().state is JobState.READY
    assert rig.one.runtime.turns._count == 0
