"""The file that a response brought to the pipeline: its part, or why it is refused.

What may live here: what middlewares and hooks may have made of a response (R76), and whether it is a whole
representation.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path

from scrapy import Request
from scrapy.http import Response

from scrapy_streaming.context import DOUBTFUL, Answer, DownloadContext, context_of
from scrapy_streaming.exceptions import IntegrityError
from scrapy_streaming.failures import FileRefused
from scrapy_streaming.protocol.answers import PERMANENT, Append, PassOn, Replace, ResponseHead, Unchanged
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.fields import retry_after
from scrapy_streaming.protocol.jobs import StoredRepresentation
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.protocol.selecting import selecting_key
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.request_fields import fields_of, response_fields
from scrapy_streaming.response import StreamedResponse
from scrapy_streaming.runtime.stored_files import StoredFiles
from scrapy_streaming.storage.complete_part import CompletePart, broken_promise, representation_of, small_part


async def received_file(response: Response, request: Request, files: StoredFiles) -> StreamedResponse:
    """Return the response with its part; refuse what is no whole representation.

    What a middleware or a hook made of a response is stored as ``transformed`` (R76). Raises
    ``FileRefused``, and ``IntegrityError`` if it was made of wrong bytes.
    """
    asked = response.request or request
    answer = answer_to(response, request)
    outcome = response.outcome if isinstance(response, StreamedResponse) else PassOn()
    unchanged = next((o for o in (outcome, answer and answer.outcome) if isinstance(o, Unchanged)), None)
    if response.status not in (200, 203) and not (unchanged and response.status == 304):
        raise _bad_status(response)
    if isinstance(response, StreamedResponse) and not isinstance(outcome, PassOn):
        return response
    for flag in DOUBTFUL:
        if flag in response.flags:
            reason = f"incomplete-{flag.replace('_', '-')}"
            raise FileRefused(reason)
    part = _part_of(response, asked)
    if unchanged is not None and unchanged.known.digest == str(part.digest):
        return StreamedResponse.around(response, unchanged)
    if answer is not None and answer.part is not None and answer.part.digest == part.digest:
        return StreamedResponse.around(response, answer.outcome, answer.part, answer.resumed_from)
    if answer is not None and answer.part is None and not unchanged and answer.body == response.body:
        if not part.length and asked.method != "GET":  # HEAD has no body, others are answered without
            raise _empty()
        reason = Reason.FETCHED if response.status == 200 else Reason.TRANSFORMED
        return StreamedResponse.around(response, PassOn(reason), part)
    return await _transformed(response, answer, part, files)


async def _transformed(
    response: Response, answer: Answer | None, part: CompletePart, files: StoredFiles
) -> StreamedResponse:
    """Return the response that a middleware or a hook made; no validator belongs to its bytes (R76)."""
    if not part.length:
        raise _empty()
    source = None if answer is None else answer.part
    if source is not None and broken_promise(source, None) is not None:
        await files.quarantine(source)
        msg = f"{source.state.url}: the bytes hash to {source.digest}, and the server said otherwise"
        raise IntegrityError(msg)
    state = replace(part.state, validators=Validators())
    made_of = None if answer is None else answer.outcome
    if isinstance(made_of, Append | Replace):  # what selected it does not change with its bytes (R40)
        state = replace(state, vary=made_of.state.vary, selecting=made_of.state.selecting)
    part = replace(part, state=state)
    return StreamedResponse.around(response, PassOn(Reason.TRANSFORMED), part)


def answer_to(response: Response, request: Request) -> Answer | None:
    """Return what the handler gave for the last request that led to *response*."""
    context = context_of(response.request or request)
    return None if context is None else context.answer


def resulting_representation(
    received: StreamedResponse, context: DownloadContext
) -> tuple[StoredRepresentation, Reason]:
    """Return what is now known of the representation, and the word for how that came."""
    if isinstance(received.outcome, Unchanged):
        return received.outcome.known, received.outcome.reason
    if received.part is None:
        raise FileRefused(str(received.outcome.reason))
    stored = representation_of(received.part.finished, context.expected)
    if context.stored is not None and context.stored.digest == stored.digest:
        return replace(stored, name=context.stored.name), Reason.UNCHANGED_CONTENT
    return stored, received.outcome.reason


def written_by_hook(file: Path, part: CompletePart) -> CompletePart | None:
    """Return the part that a hook wrote to *file*; ``None`` if its bytes are those received (blocks)."""
    with file.open("rb") as stream:
        digest = Digest(hashlib.file_digest(stream, "sha256").hexdigest())
        length = os.fstat(stream.fileno()).st_size
    if digest == part.digest:
        return None
    return CompletePart(replace(part.state, validators=Validators()), length, digest, file)


def _part_of(response: Response, request: Request) -> CompletePart:
    state = _state_of(response, request)
    if isinstance(response, StreamedResponse) and response.part is not None:
        return replace(response.part.finished, state=state)
    return small_part(state, response.body)


def _state_of(response: Response, request: Request) -> PartState:
    """Return what the head of a buffered response announces of its body."""
    fields = response_fields(response.headers.items())
    head = ResponseHead.from_fields(response.status, response.url, fields, None)
    return PartState(
        url=head.url,
        validators=head.validators,
        vary=head.vary,
        selecting=selecting_key(head.vary, fields_of(request.headers)),
        media_type=head.media_type,
    )


def _empty() -> FileRefused:
    """Return the refusal of a body of no bytes that is not the origin's own file."""
    return FileRefused("empty-content")


def _bad_status(response: Response) -> FileRefused:
    """Return the refusal of a response that is an error."""
    fields = [value.decode("latin-1") for value in response.headers.getlist("Retry-After")]
    return FileRefused(
        f"bad-status-{response.status}",
        permanent=response.status in PERMANENT,
        retry_after=retry_after(fields, time.time()),
    )
