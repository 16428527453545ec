"""Answers whose bodies Scrapy buffered, or that another middleware changed: what they mean.

What may live here: judging a Scrapy response; no input or output.
"""

from __future__ import annotations

from urllib.parse import urldefrag

from scrapy import Request
from scrapy.http import Response

from scrapy_streaming.context import DOUBTFUL, UNMARKED, Answer, DownloadContext
from scrapy_streaming.protocol.answers import AlreadyWhole, Outcome, PassOn, Refuse, ResponseHead
from scrapy_streaming.protocol.judging import judge_response
from scrapy_streaming.protocol.reasons import Reason, Recovery
from scrapy_streaming.request_fields import response_fields
from scrapy_streaming.response import StreamedResponse


def judge_buffered(context: DownloadContext, request: Request, response: Response) -> Outcome:
    """Judge an answer whose body Scrapy buffered; one that may not be whole is passed on."""
    if context.plan is None or any(flag in response.flags for flag in DOUBTFUL):
        return PassOn()
    fields = response_fields(response.headers.items())
    head = ResponseHead.from_fields(response.status, urldefrag(response.url)[0], fields, len(response.body))
    return context.allowed(judge_response(context.plan, head, context.judged_by(request)))


def came_from_here(response: Response) -> bool:
    """Whether a body came from the HTTP cache or stood in the URL itself, from no server."""
    return "cached" in response.flags or response.url.startswith("data:")


def was_changed(answer: Answer, response: Response) -> bool:
    """Whether a middleware made something else of a response that was judged already (R76)."""
    same = isinstance(response, StreamedResponse) and response.outcome == answer.outcome
    return not isinstance(answer.outcome, PassOn) and not same


def despite_change(answer: Answer) -> Outcome:
    """Return what follows a response that a middleware changed: what was refused stays refused.

    What was made of a bodiless "the part is whole" is made of nothing, so the body is asked for.
    """
    match answer.outcome:
        case Refuse():
            return answer.outcome
        case AlreadyWhole() if answer.part is None:
            return Refuse(Reason.TRANSFORMED, Recovery.REFETCH)
        case _:
            return PassOn()


def end_unmarked(response: Response) -> bool:
    """Whether nothing but the closed connection marks the end of a buffered body (R33)."""
    doubts = [flag for flag in response.flags if flag in DOUBTFUL]
    return response.status == 200 and doubts == [UNMARKED]
