"""The first step: decide what to request, given the part or the file that is here.

What may live here: ``try_streaming_resume_decision``, reading what it is given, and comparing the end of a
part with the server's bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urldefrag

from scrapy_streaming.exceptions import PartCorrupt, RequestFailed
from scrapy_streaming.integration.arguments import checked_number, checked_path, checked_validators
from scrapy_streaming.integration.clients import Client, client_of
from scrapy_streaming.integration.planning import is_fresh, plan_part
from scrapy_streaming.integration.switches import is_off, or_fall_back, settings, why_no_streaming
from scrapy_streaming.integration.values import FinalizedArtifact, ResumeDecision
from scrapy_streaming.protocol.jobs import StoredRepresentation
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.planning import (
    ConfirmWhole,
    Fetch,
    Plan,
    PlannedRequest,
    PublishPart,
    Resume,
    Revalidate,
    plan_request,
)
from scrapy_streaming.protocol.ranges import ContentRange
from scrapy_streaming.protocol.reasons import Proof, Reason
from scrapy_streaming.protocol.selecting import ALWAYS, selecting_key
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.part_files import PartFile

#: Reasons for which a part is not continued, unless its last bytes are compared.
_UNVALIDATED: Final = (Reason.NO_VALIDATOR, Reason.WEAK_VALIDATOR)


def try_streaming_resume_decision(  # noqa: PLR0913 - the contract of docs/adapter.md; all but two by keyword
    validators: Any,
    part_state: Any,
    *,
    prefix_check_bytes: int = 65536,
    allow_without_validators: bool = False,
    client: Any = None,
    url: Any = None,
    fallback: bool = False,
) -> ResumeDecision | None:
    """Return what to request; ``None`` if ``STREAMING_RESUME_ENABLED`` is off.

    *part_state* is what is here: ``None``, the path of a part (its bytes are compared with its sidecar), a
    ``PartState``, a mapping with ``length`` and other fields of ``PartState``, or a ``FinalizedArtifact`` to
    which *validators* belong. *validators* are the last that the server sent (a mapping with ``ETag``,
    ``Last-Modified``, ``Date``, or ``Validators``): a part with others belongs to another representation and
    is not resumed. *url*, if given, must be the part's, after redirects. A part without a strong validator
    is resumed only if *allow_without_validators* is on and *client* (of httpx or requests, or ``"urllib"``)
    finds its last *prefix_check_bytes* bytes, and its length, on the server again. Raises ``TypeError`` for a
    wrong argument, ``StoreError`` (``part-busy``), ``RequestFailed``.
    """
    checked_number("prefix_check_bytes", prefix_check_bytes, 1)
    if url is not None and not isinstance(url, str):
        msg = f"url must be str, got {type(url).__name__}"
        raise TypeError(msg)
    if client is not None and url is None:
        msg = "url must be given with client, which requests it"
        raise TypeError(msg)
    last_sent = checked_validators("validators", validators)
    requester = None if client is None else client_of(client)
    here = _here(part_state, last_sent, url)
    if is_off(why_no_streaming("resume")):
        return None

    def decide() -> ResumeDecision:
        found = here() if callable(here) else here
        if isinstance(found.state, StoredRepresentation):
            return _decision(plan_request(None, found.state, PlannedRequest(found.state.final_url, {})))
        check = None
        if allow_without_validators and requester is not None and found.path is not None:
            check = _TailCheck(requester, url or "", found.path, prefix_check_bytes)
        return _decide(found, last_sent, url, check)

    return or_fall_back(fallback, decide)


@dataclass(frozen=True, slots=True)
class _Here:
    """What is here, since when (epoch seconds), and where if it is a part on disk."""

    state: PartState | StoredRepresentation | None
    written_at: float
    path: Path | None = None


def _here(given: Any, last_sent: Validators | None, url: str | None) -> _Here | Callable[[], _Here]:
    """Return what *part_state* stands for, or a function that reads it; raise ``TypeError`` naming it."""
    now = time.time()
    match given:
        case None | PartState():
            return _Here(given, now)
        case FinalizedArtifact(digest=digest, size=size):
            own, final_url = last_sent or Validators(), urldefrag(url or "")[0]
            known = StoredRepresentation(
                digest, size, own, final_url, selecting=selecting_key((), {}), proof=Proof.LENGTH
            )
            return _Here(known, now)
        case str() | os.PathLike():
            path = checked_path("part_state", given)
            return lambda: _read_part(path)
        case Mapping():
            return _Here(_state_of(given, last_sent, url), now)
    msg = f"part_state must be None, a path, a PartState or a mapping with length, got {type(given).__name__}"
    raise TypeError(msg)


def _state_of(given: Mapping[str, Any], last_sent: Validators | None, url: str | None) -> PartState:
    length, total = given.get("length"), given.get("total")
    if not isinstance(length, int) or length < 0 or not isinstance(total, int | None):
        msg = (
            f"part_state['length'] and ['total'] must be whole numbers of bytes, got {length!r} and {total!r}"
        )
        raise TypeError(msg)
    own = checked_validators("part_state", given)
    if own is None or own == Validators():
        own = last_sent or Validators()
    return PartState(
        url=urldefrag(str(given.get("url", url or "")))[0],
        validators=own,
        length=length,
        total=total,
        selecting=selecting_key((), {}),
    )


def _read_part(path: Path) -> _Here:
    """Return the state of the part at *path*, if its bytes match its sidecar (R2, R3); no file is made."""
    if not path.parent.is_dir():
        return _Here(None, 0.0)
    part = PartFile(path)
    try:
        stored = part.current()
        if stored is None:
            return _Here(None, 0.0)
        if stored.state.whole:
            part.complete_part(stored)
        else:
            part.reopen(stored, 0).close()
    except PartCorrupt:
        part.remove_files()
        return _Here(None, 0.0)
    finally:
        part.close()
    return _Here(stored.state, stored.written_at, path)


@dataclass(frozen=True, slots=True)
class _TailCheck:
    """What is needed to compare the end of a part without validators with the server's bytes (R19)."""

    client: Client
    url: str
    path: Path
    size: int


def _decide(
    found: _Here, last_sent: Validators | None, url: str | None, check: _TailCheck | None
) -> ResumeDecision:
    state = found.state
    if not isinstance(state, PartState):
        return _decision(Fetch(Reason.NOTHING_STORED))
    if last_sent is not None and _differ(state.validators, last_sent):
        return _decision(Fetch(Reason.CHANGED))
    target = urldefrag(url)[0] if url else state.url
    planned = PlannedRequest(target, {}, settings().weak_validators == "accept")
    plan = plan_part(state, planned, fresh=is_fresh(settings(), found.written_at))
    if check is None or not isinstance(plan, Fetch) or plan.reason not in _UNVALIDATED:
        return _decision(plan)
    at = _offset_behind_tail(check, state)
    if at is None:
        return _decision(plan)
    return _decision(Resume(state, Reason.TAIL_OVERLAP, overlap=state.length - at))


def _offset_behind_tail(check: _TailCheck, state: PartState) -> int | None:
    """Return the offset of the part's last bytes if the server has the same ones, and the same length (R6).

    ``None`` if not. The request that resumes asks for these bytes again, so that the bytes compared and the
    bytes appended come from one response.
    """
    size = min(check.size, state.length)
    at = state.length - size
    if state.total is None or not size:
        return None
    fields = {**ALWAYS, "Range": f"bytes={at}-{state.length - 1}"}
    answer = check.client.get(check.url, fields, settings().stall_timeout)
    try:
        head = answer.head
        span = ContentRange.parse(head.content_ranges[0]) if len(head.content_ranges) == 1 else None
        wanted = ContentRange(at, state.length - 1, state.total)
        if head.status != 206 or span != wanted or head.content_encoding != state.content_encoding:
            return None
        received = b""
        for chunk in answer.chunks(size):
            received += chunk
            if len(received) > size:
                return None
    except answer.broken as error:
        msg = f"{check.url}: the bytes to compare were not received: {error}"
        raise RequestFailed(msg) from error
    finally:
        answer.close()
    part = PartFile(check.path)
    try:
        return at if received == part.tail(state.length, size) else None
    finally:
        part.close()


def _differ(stored: Validators, sent: Validators) -> bool:
    """Whether two sets of validators belong to different representations."""
    if stored.etag is not None and sent.etag is not None and not stored.etag.weak_equals(sent.etag):
        return True
    dates = (stored.last_modified, sent.last_modified)
    return None not in dates and dates[0] != dates[1]


def _decision(plan: Plan) -> ResumeDecision:
    headers, reason = {**ALWAYS, **plan.fields()}, str(plan.reason)
    match plan:
        case Resume():
            return ResumeDecision("resume", plan.first, headers, reason, plan)
        case PublishPart(part):
            return ResumeDecision("cached", part.length, {}, reason, plan)
        case ConfirmWhole(part):
            return ResumeDecision("cached", part.length, headers, reason, plan)
        case Revalidate(known):
            return ResumeDecision("cached", known.size, headers, reason, plan)
        case Fetch():
            return ResumeDecision("fresh", 0, headers, reason, plan)
