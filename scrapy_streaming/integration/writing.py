"""The second step: write the body of a response to a part, after judging its head.

What may live here: ``try_streaming_io``, and what follows for the part. ``receiving`` writes the bytes.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from scrapy_streaming.exceptions import AnswerRefused, IntegrityError, PartCorrupt
from scrapy_streaming.integration.answers import Answer, answer_of
from scrapy_streaming.integration.arguments import checked_callback, checked_number, checked_path
from scrapy_streaming.integration.receiving import Progress, Reception, terms_of
from scrapy_streaming.integration.switches import is_off, or_fall_back, settings, why_no_streaming
from scrapy_streaming.integration.values import StreamMetrics
from scrapy_streaming.protocol.answers import AlreadyWhole, Append, Outcome, Refuse, Replace, SentRequest
from scrapy_streaming.protocol.judging import judge_response
from scrapy_streaming.protocol.parts import PartState, unproven
from scrapy_streaming.protocol.planning import ConfirmWhole, Fetch, Plan, Resume
from scrapy_streaming.protocol.ranges import ContentRange
from scrapy_streaming.protocol.reasons import Proof, Reason, Recovery
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.complete_part import CompletePart, broken_promise
from scrapy_streaming.storage.decoding import decodable
from scrapy_streaming.storage.part_files import KEY, PartFile
from scrapy_streaming.storage.part_writer import PartWriter
from scrapy_streaming.storage.sidecar import StoredPart

_RANGE: Final = re.compile(r"bytes=(\d{1,18})-", re.ASCII)


def try_streaming_io(  # noqa: PLR0913 - the contract of docs/adapter.md; all but two by keyword
    response: Any,
    part_path: str | os.PathLike[str],
    *,
    chunk_bytes: int = 65536,
    fsync: bool = True,
    progress_callback: Progress | None = None,
    request_headers: Any = None,
    fallback: bool = False,
) -> StreamMetrics | None:
    """Write the body of *response* to the part; ``None`` if ``STREAMING_IO_ENABLED`` is off.

    *response* is one of httpx (``client.stream()``), requests (``stream=True``), urllib3
    (``preload_content=False``), urllib or Scrapy, with nothing read of its body; it is closed at the end. A
    206 is appended only on proof that it belongs to the part, a 200 replaces the part, a 304 confirms that it
    is whole. Octets are written as received: a content coding that was not requested is removed when the part
    is published. *request_headers* are those that were sent, for libraries that do not keep them (urllib).
    *progress_callback* gets the bytes of the part so far and their total, or ``None``. Raises ``TypeError``
    for a wrong argument; ``AnswerRefused``, ``BodyConsumed``, ``BodyIncomplete`` and ``EndUnmarked`` (decide
    again and request again: received bytes are kept), ``IntegrityError``, ``StoreError`` (``part-busy``),
    ``WriteFailed``.
    """
    path = checked_path("part_path", part_path)
    size = checked_number("chunk_bytes", chunk_bytes, 1)
    progress = checked_callback(progress_callback)
    if request_headers is not None and not isinstance(request_headers, Mapping):
        msg = f"request_headers must be a mapping, got {type(request_headers).__name__}"
        raise TypeError(msg)
    if is_off(why_no_streaming("io")):
        return None

    def write() -> StreamMetrics:
        answer = answer_of(response)
        if request_headers is not None:
            asked = {str(name).lower(): str(value) for name, value in request_headers.items()}
            answer = replace(answer, asked=asked)
        try:
            part = PartFile(path, fsync=fsync and settings().fsync)
            try:
                return _PartStep(part, answer, size, progress).run()
            finally:
                part.close()
        finally:
            answer.close()

    return or_fall_back(fallback, write)


class _PartStep:
    """One response and the part to which it belongs."""

    def __init__(self, part: PartFile, answer: Answer, chunk_bytes: int, progress: Progress | None) -> None:
        self._part = part
        self._answer = answer
        self._chunk_bytes = chunk_bytes
        self._progress = progress
        self._started = time.monotonic()
        self._fsync_seconds = 0.0

    def run(self) -> StreamMetrics:
        stored = self._part.current()
        if self._answer.stored is not None:
            return self._take_stored(self._answer.stored)
        self._check_url(stored)
        plan = _plan_of(self._answer, stored)
        asked = self._answer.asked or {}
        outcome = judge_response(plan, self._answer.head, SentRequest(asked, decodable=decodable()))
        match outcome:
            case Append() | Replace():
                return self._receive(stored, outcome)
            case AlreadyWhole(state, reason) if stored is not None:
                return self._confirm(stored, state, reason)
            case _:
                raise self._refused(stored, outcome)

    def _check_url(self, stored: StoredPart | None) -> None:
        """Refuse a response of another URL than the part's: the caller passed the wrong path."""
        if stored is None or self._answer.redirected or self._answer.status not in (200, 203, 206):
            return
        if self._answer.url != stored.state.url:
            msg = (
                f"the part {self._part.path} belongs to {stored.state.url}, and the response to "
                f"{self._answer.url}: give each URL a part of its own, or remove this one"
            )
            raise AnswerRefused(msg, reason=str(Reason.FOREIGN_PART))

    def _refused(self, stored: StoredPart | None, outcome: Outcome) -> AnswerRefused:
        status, url = self._answer.status, self._answer.url
        if isinstance(outcome, Refuse):
            self._after_refusal(stored, outcome.then)
            msg = f"{url}: the answer ({status}) was refused; {_NEXT[outcome.then]}"
            return AnswerRefused(msg, reason=str(outcome.reason))
        return AnswerRefused(
            f"{url}: an answer with status {status} is no file", reason=f"bad-status-{status}"
        )

    def _after_refusal(self, stored: StoredPart | None, then: Recovery) -> None:
        """Change the part so that the next decision does not lead to the same response."""
        if stored is None or then is Recovery.FAIL:
            return
        if then is Recovery.DISCARD:
            self._part.remove_files()
        elif not stored.state.whole:
            self._part.write_state(replace(stored.state, ranges_refused=True))
        else:
            self._part.write_state(replace(stored.state, validators=Validators()))

    def _receive(self, stored: StoredPart | None, outcome: Append | Replace) -> StreamMetrics:
        self._answer.check_unread()
        kept = outcome.state.length if isinstance(outcome, Append) else 0
        writer = self._open(stored, outcome)
        terms = replace(
            terms_of(settings(), self._chunk_bytes, self._part.directory),
            unmarked=stored.state.prefix_sha256 if stored and stored.state.end_unmarked else None,
            progress=self._progress,
        )
        reception = Reception(self._answer, self._without_unseen(outcome), writer, terms)
        try:
            finished = self._part.whole(reception.run())
        except AnswerRefused:
            if isinstance(outcome, Append):  # the body contradicts its head: no range is requested again
                self._after_refusal(self._part.current(), Recovery.REFETCH)
            raise
        finally:
            self._part.keep_longer()
            self._fsync_seconds += reception.fsync_seconds
        wrong = broken_promise(finished, None)
        if wrong is not None:
            self._part.remove_files()
            msg = f"{finished.state.url}: the bytes hash to {finished.digest}, and the server sent {wrong}"
            raise IntegrityError(msg)
        return self._metrics(reception.received, finished.digest.hex, kept)

    def _without_unseen(self, outcome: Append | Replace) -> Append | Replace:
        """Mark the part so that it is not resumed if the request that selected it is not known (R40).

        Bytes that were appended without a validator are never confirmed (R19).
        """
        if isinstance(outcome, Append) and outcome.overlap:
            outcome = replace(outcome, state=unproven(outcome.state))
        state = outcome.state
        seen = self._answer.asked is not None or not set(state.vary) - {"accept-encoding"}
        return outcome if seen else replace(outcome, state=replace(state, selecting="unknown"))

    def _open(self, stored: StoredPart | None, outcome: Append | Replace) -> PartWriter:
        if isinstance(outcome, Replace) or stored is None:
            return self._part.create(KEY, 0, outcome.state)
        try:
            return self._part.reopen(stored, 0)
        except PartCorrupt:
            self._part.remove_files()
            raise

    def _confirm(self, stored: StoredPart, state: PartState, reason: Reason) -> StreamMetrics:
        """Record that the part is whole; no body was received."""
        if reason is Reason.PROBED_WHOLE:
            state = replace(state, proof=Proof.LENGTH)
        whole = StoredPart(stored.name, state, stored.written_at)
        digest = self._part.complete_part(whole).digest
        self._part.write_state(state)
        return self._metrics(0, digest.hex, state.length)

    def _take_stored(self, part: CompletePart) -> StreamMetrics:
        """Copy a body that this package's download handler received."""
        state = replace(part.state, total=part.length)
        self._answer = replace(self._answer, length=part.length)
        return self._receive(None, Replace(state, Reason.FETCHED))

    def _metrics(self, written: int, sha256: str, kept: int) -> StreamMetrics:
        elapsed = time.monotonic() - self._started
        writing = max(elapsed - self._fsync_seconds, 1e-9)
        return StreamMetrics(
            bytes_written=written,
            sha256_hex=sha256,
            elapsed_ms=elapsed * 1000,
            fsync_ms=self._fsync_seconds * 1000,
            avg_write_mibps=written / (1 << 20) / writing,
            resumed_from_bytes=kept,
        )


#: What the caller can do after a refusal.
_NEXT: Final[Mapping[Recovery, str]] = {
    Recovery.FAIL: "no other request would help",
    Recovery.DISCARD: "the part belonged to another representation and is removed: decide and request again",
    Recovery.REFETCH: "the next decision requests the whole file",
    Recovery.REFETCH_NO_CACHE: "the next decision requests the whole file",
    Recovery.WITHOUT_RANGE: "the next decision requests the whole file",
    Recovery.CONFIRM: "the next decision requests the whole file",
    Recovery.PROBE: "decide and request again",
    Recovery.ORIGINAL: "request the URL that redirected here again",
}


def _plan_of(answer: Answer, stored: StoredPart | None) -> Plan:
    """Return the plan that led to a response: by the request's fields, or inferred from the response."""
    if stored is None:
        return Fetch(Reason.NOTHING_STORED)
    state, asked = stored.state, answer.asked
    if asked is None:
        ranged = answer.status != 304 and not state.whole
        conditional = answer.status == 304
    else:
        ranged = "range" in asked
        conditional = "if-none-match" in asked or "if-modified-since" in asked
    if ranged and state.length and not state.whole:
        if overlap := _overlap_of(answer, state):
            return Resume(state, Reason.TAIL_OVERLAP, overlap=overlap)
        reason = Reason.PROBE_END if state.end_unmarked else Reason.STRONG_VALIDATOR
        return Resume(state, reason, probe=state.end_unmarked)
    return ConfirmWhole(state) if conditional else Fetch(Reason.BARE)


def _overlap_of(answer: Answer, state: PartState) -> int:
    """Return how many of the part's bytes were requested again, to be compared (R19)."""
    if answer.asked is not None:
        match = _RANGE.fullmatch(answer.asked["range"])
        first = None if match is None or "if-range" in answer.asked else int(match[1])
    else:  # only a decision of this package requests a range inside a part without a validator
        span = ContentRange.parse("".join(answer.head.content_ranges))
        first = None if span is None or state.validators.if_range() is not None else span.first
    return 0 if first is None else max(0, state.length - first)
