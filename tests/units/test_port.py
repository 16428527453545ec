"""The port of the handlers, driven by a script: judged, written, finished (R10, R27, R31, I12)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from scrapy import Request
from scrapy.exceptions import DownloadCancelledError, ResponseDataLossError
from support.reactor import on_reactor
from units.crawl import KEY, URL, Crawl, crawl
from units.fakes import FakeLedger
from units.scripted import Script, ScriptedHandler

from scrapy_streaming.context import DownloadContext, RequestInFlight
from scrapy_streaming.exceptions import LeaseLost
from scrapy_streaming.protocol.parts import BodyEnd
from scrapy_streaming.protocol.planning import Fetch, PlannedRequest, plan_request
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.response import StreamedResponse
from scrapy_streaming.storage.parts import PartStore

TAG = {"ETag": '"a"'}
MIB = 1 << 20


@pytest.fixture
def parts(tmp_path: Path):
    store = PartStore(tmp_path, fsync=False)
    yield store
    store.close()


def on_disk(one: Crawl, parts: PartStore) -> Crawl:
    one.runtime.storage.parts = parts
    one.runtime.parts._parts = parts
    one.runtime.room._space._folders = (parts.directory,)
    return one


async def planned(one: Crawl, request: Request, *, max_size: int = 0) -> DownloadContext:
    """Claim the job of *request* and plan it as the middleware does."""
    context = await one.context(request)
    found = one.runtime.storage.parts.find(KEY)
    plan = plan_request(found[0].state if found else None, None, PlannedRequest(URL, {}))
    if found:
        one.runtime.parts.put(KEY, one.runtime.storage.parts.reopen(found[0], context.lease.fence))
    for name, value in plan.fields().items():
        request.headers[name] = value
    context.sent = RequestInFlight(plan, tuple(plan.fields()), streams=True, max_size=max_size)
    return context


@on_reactor
async def test_a_small_body_stays_in_memory(ledger: FakeLedger, parts: PartStore) -> None:
    """R27."""
    one, request = on_disk(crawl(ledger), parts), Request(URL)
    await planned(one, request)
    handler = ScriptedHandler(one.runtime, Script(fields=TAG | {"Content-Length": "3"}, pieces=[b"a", b"bc"]))
    response = await handler.download_request(request)
    assert isinstance(response, StreamedResponse)
    assert (response.body, response.outcome.reason) == (b"abc", Reason.FETCHED)
    assert (parts.find(KEY), one.stat("bytes_received")) == ([], 3)


@on_reactor
async def test_a_source_that_is_faster_than_the_disk_waits(ledger: FakeLedger, parts: PartStore) -> None:
    """I12: the source awaits what ``write`` gives."""
    one, request = on_disk(crawl(ledger, settings={"STREAMING_BUFFER_BYTES": MIB}), parts), Request(URL)
    await planned(one, request)
    pieces = [bytes([number]) * (256 << 10) for number in range(12)]
    handler = ScriptedHandler(one.runtime, Script(fields=TAG, pieces=pieces))
    response = await handler.download_request(request)
    assert handler.waits >= 1
    assert response.part.digest.hex == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert one.runtime.budget.used == 0


@on_reactor
async def test_a_body_that_breaks_off_is_resumed_by_the_next_request(
    ledger: FakeLedger, parts: PartStore
) -> None:
    """R31, R10: the bytes that came are kept, and the rest is put behind them."""
    one, request = on_disk(crawl(ledger), parts), Request(URL)
    context = await planned(one, request)
    whole = b"0123456789" * 100_000
    half = Script(
        fields=TAG | {"Content-Length": str(len(whole))}, pieces=[whole[:600_000]], end=BodyEnd.LOST
    )
    with pytest.raises(ResponseDataLossError):
        await ScriptedHandler(one.runtime, half).download_request(request)
    one.runtime.jobs.release(context.lease)
    request = Request(URL)
    await planned(one, request)
    assert request.headers[b"Range"] == b"bytes=600000-"
    said = TAG | {"Content-Range": f"bytes 600000-999999/{len(whole)}", "Content-Length": "400000"}
    rest = Script(206, said, [whole[600_000:]])
    response = await ScriptedHandler(one.runtime, rest).download_request(request)
    assert (response.status, response.resumed_from) == (200, 600_000)
    assert response.part.path.read_bytes() == whole


@on_reactor
async def test_a_body_beyond_the_limit_is_not_read(ledger: FakeLedger, parts: PartStore) -> None:
    """Its head says so; the source is closed before a byte is taken."""
    one, request = on_disk(crawl(ledger), parts), Request(URL)
    await planned(one, request, max_size=10)
    handler = ScriptedHandler(one.runtime, Script(fields={"Content-Length": "11"}, pieces=[b"x" * 11]))
    with pytest.raises(DownloadCancelledError):
        await handler.download_request(request)
    assert (handler.aborted, one.stat("bytes_received")) == (1, 0)


@on_reactor
async def test_a_handler_that_fails_has_its_error_raised(ledger: FakeLedger, parts: PartStore) -> None:
    one, request = on_disk(crawl(ledger), parts), Request(URL)
    await planned(one, request)
    script = Script(fields=TAG, pieces=[b"x" * MIB], fails=LeaseLost("gone"))
    with pytest.raises(LeaseLost, match="gone"):
        await ScriptedHandler(one.runtime, script).download_request(request)


@on_reactor
async def test_an_answer_that_is_no_representation_is_passed_on(ledger: FakeLedger, parts: PartStore) -> None:
    """R58: Scrapy's own middlewares see it as it is."""
    one, request = on_disk(crawl(ledger), parts), Request(URL)
    context = await planned(one, request)
    assert isinstance(context.plan, Fetch)
    response = await ScriptedHandler(one.runtime, Script(503, {}, [b"busy"])).download_request(request)
    assert not isinstance(response, StreamedResponse)
    assert (response.status, response.body) == (503, b"busy")
