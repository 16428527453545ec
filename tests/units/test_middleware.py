"""The middleware's plan and what follows an answer, without a network (R5, R10, R43, R55, R73)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from scrapy import Request
from scrapy.http import Response
from scrapy.http.request import NO_CALLBACK
from support.reactor import on_reactor
from units.crawl import URL, Crawl, crawl
from units.fakes import FakeLedger

from scrapy_streaming.context import Answer, DownloadContext
from scrapy_streaming.exceptions import AnswerRefused
from scrapy_streaming.middleware import ResumeMiddleware
from scrapy_streaming.protocol.answers import AlreadyWhole, PassOn, Refuse
from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.jobs import StoredRepresentation
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.reasons import Reason, Recovery
from scrapy_streaming.protocol.selecting import selecting_key
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.response import StreamedResponse
from scrapy_streaming.storage.complete_part import small_part

STORED = StoredRepresentation(
    "sha256:" + "ef" * 32, 3, Validators(EntityTag.parse('"a"')), URL, proof="strong"
)


class Rig:
    """A middleware and one request of a job that the crawl holds."""

    def __init__(self, one: Crawl, request: Request, context: DownloadContext) -> None:
        self.one, self.request, self.context = one, request, context
        self.middleware = ResumeMiddleware(one.crawler, one.runtime)  # type: ignore[arg-type]
        self.middleware._streams = {"https": True}

    @classmethod
    async def of(cls, ledger: FakeLedger, settings: dict[str, Any] | None = None, **how: Any) -> Rig:
        one, request = crawl(ledger, settings=settings), Request(URL, callback=NO_CALLBACK, **how)
        return cls(one, request, await one.context(request))

    async def plan(self) -> dict[str, str]:
        """Plan the request; return the fields that it is sent with."""
        assert await self.middleware.process_request(self.request) is None
        return {name.decode(): values[0].decode() for name, values in self.request.headers.items()}

    async def answer(self, outcome, status: int = 200) -> Request | Response:
        """Have the handler's answer judged as *outcome*; return what Scrapy gets."""
        response = StreamedResponse.around(Response(URL, status=status, request=self.request), outcome)
        self.middleware.note_answer(response, self.request)
        return await self.middleware.process_response(self.request, response)


PLAIN = {"Accept-Encoding": "identity", "Want-Repr-Digest": "sha-256=10"}


@on_reactor
async def test_what_is_not_stored_is_asked_for_whole(ledger: FakeLedger) -> None:
    rig = await Rig.of(ledger)
    assert await rig.plan() == PLAIN
    assert (rig.context.original_url, rig.context.streams) == (URL, True)
    assert rig.context.tries.sent == 1


@on_reactor
async def test_what_is_stored_is_asked_about(ledger: FakeLedger) -> None:
    """R5, R43."""
    rig = await Rig.of(ledger)
    rig.context.stored = replace(STORED, selecting=selecting_key((), {}))
    fields = await rig.plan()
    assert fields == PLAIN | {"If-None-Match": '"a"'}


@on_reactor
async def test_fields_of_an_earlier_pass_are_cleared(ledger: FakeLedger) -> None:
    rig = await Rig.of(ledger)
    rig.request.headers["X-Own"] = "stays"
    await rig.plan()
    rig.context.stored = None
    rig.request.headers["If-None-Match"] = '"a"'
    rig.context.sent = replace(rig.context.sent, fields=("If-None-Match", "Accept-Encoding"))
    assert await rig.plan() == PLAIN | {"X-Own": "stays"}


@on_reactor
@pytest.mark.parametrize("how", [{"headers": {"Range": "bytes=0-1"}}, {"method": "POST", "body": b"x"}])
async def test_a_request_with_a_condition_of_its_own_is_not_planned(
    ledger: FakeLedger, how: dict[str, Any]
) -> None:
    """R73."""
    rig = await Rig.of(ledger, **how)
    await rig.plan()
    assert rig.context.plan is None
    assert b"Want-Repr-Digest" not in rig.request.headers


@on_reactor
async def test_a_refused_answer_is_followed_by_a_plain_get(ledger: FakeLedger) -> None:
    rig = await Rig.of(ledger)
    await rig.plan()
    following = await rig.answer(Refuse(Reason.CHANGED_206, Recovery.REFETCH), 206)
    assert isinstance(following, Request)
    assert following.dont_filter
    assert (rig.context.attempt.recovery, rig.context.attempt.restarts) == (Recovery.REFETCH, 1)
    assert rig.context.answer is None


@on_reactor
async def test_restarts_come_to_an_end(ledger: FakeLedger) -> None:
    rig = await Rig.of(ledger, {"STREAMING_RESTARTS": 1})
    for _ in range(1):
        await rig.plan()
        await rig.answer(Refuse(Reason.CHANGED_206, Recovery.REFETCH), 206)
    await rig.plan()
    with pytest.raises(AnswerRefused, match="STREAMING_RESTARTS is spent"):
        await rig.answer(Refuse(Reason.CHANGED_206, Recovery.REFETCH), 206)


@on_reactor
async def test_the_target_of_an_expired_redirect_is_asked_for_anew(ledger: FakeLedger) -> None:
    """R57: with the fields that the user gave the first request."""
    rig = await Rig.of(ledger, headers={"Authorization": "Bearer mine"})
    await rig.plan()
    rig.request = rig.request.replace(url=URL + "?signed", headers={})
    rig.request.meta["redirect_times"] = 1
    await rig.plan()
    following = await rig.answer(Refuse(Reason.EXPIRED_TARGET, Recovery.ORIGINAL), 403)
    assert (following.url, following.headers["Authorization"]) == (URL, b"Bearer mine")
    assert "redirect_times" not in following.meta


@on_reactor
async def test_an_error_without_range_leaves_ranges_allowed(ledger: FakeLedger) -> None:
    """R55: Range was not its cause."""
    rig = await Rig.of(ledger)
    rig.context.attempt = replace(rig.context.attempt, recovery=Recovery.WITHOUT_RANGE)
    await rig.plan()
    response = Response(URL, status=500, request=rig.request)
    rig.middleware.note_answer(response, rig.request)
    assert await rig.middleware.process_response(rig.request, response) is response
    assert rig.context.attempt.recovery is Recovery.NONE


@on_reactor
async def test_a_whole_file_that_a_middleware_refused_is_fetched_anew(ledger: FakeLedger) -> None:
    rig = await Rig.of(ledger)
    await rig.plan()
    state = PartState(URL, Validators())
    rig.context.answer = Answer(AlreadyWhole(state), small_part(state, b"abc"))
    assert await rig.plan() == PLAIN
    assert (rig.context.attempt.recovery, rig.context.answer) == (Recovery.REFETCH, None)


@on_reactor
async def test_what_another_middleware_made_of_an_answer_is_passed_on(ledger: FakeLedger) -> None:
    """R76."""
    rig = await Rig.of(ledger)
    await rig.plan()
    rig.context.answer = Answer(Refuse(Reason.CHANGED_206, Recovery.REFETCH))
    other = Response(URL, status=200, body=b"page", request=rig.request)
    following = await rig.middleware.process_response(rig.request, other)
    assert isinstance(following, Request), "what was refused stays refused"
    rig.context.answer = Answer(PassOn(), body=b"page")
    await rig.plan()
    assert await rig.middleware.process_response(rig.request, other) is other
