"""Receiving: the octets of an answer are written to a part, in the caller's thread.

What may live here: what happens between ``judge_response``, whose outcome is given, and ``judge_end``. The
rules are those of a crawl: bytes that were received before a break are kept, and the sidecar counts them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

from scrapy_streaming.exceptions import AnswerRefused, BodyIncomplete, EndUnmarked
from scrapy_streaming.integration.answers import Answer
from scrapy_streaming.protocol.answers import Append, Replace
from scrapy_streaming.protocol.parts import BodyEnd, PartState, judge_end, unproven
from scrapy_streaming.protocol.reasons import Proof, Reason
from scrapy_streaming.runtime.rates import Rates
from scrapy_streaming.runtime.space import Space
from scrapy_streaming.setting_kinds import RateRule
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.complete_part import CompletePart, promised_of
from scrapy_streaming.storage.part_writer import PartWriter

T = TypeVar("T")
Progress = Callable[[int, int | None], object]

#: The reason of a body that is larger than the settings allow.
TOO_LARGE: Final = "too-large"


@dataclass(frozen=True, slots=True)
class Terms:
    """How a body is received. Sizes in bytes, times in seconds.

    ``expected``: the caller has a digest that will be compared. ``unmarked`` is the SHA-256 (hex) of an
    earlier body whose end nothing marked (R33). ``space`` keeps the reserve on the disk, ``rates`` limit the
    speed. ``assure`` is called before each write and raises if this process may not write.
    """

    chunk_bytes: int
    checkpoint_bytes: int
    checkpoint_seconds: float
    max_size: int = 0
    expected: bool = False
    unmarked: str | None = None
    space: Space | None = None
    rates: Rates | None = None
    progress: Progress | None = None
    assure: Callable[[], object] = lambda: None


def terms_of(settings: StreamingSettings, chunk_bytes: int, *folders: Path) -> Terms:
    """Return how a body is received into *folders*, by the settings."""
    return Terms(
        chunk_bytes,
        settings.checkpoint_bytes,
        settings.checkpoint_seconds,
        settings.max_size,
        space=Space(folders, settings.min_free_bytes),
        rates=None if settings.max_rate is None else _rates(settings.max_rate),
    )


@cache
def _rates(rules: tuple[RateRule, ...]) -> Rates:
    """Return the limits of speed, which all bodies of this process share."""
    return Rates(rules)


class Reception:
    """Receives one body into one part.

    ``received`` counts the bytes of this body, ``fsync_seconds`` the time that checkpoints took.
    """

    def __init__(self, answer: Answer, outcome: Append | Replace, writer: PartWriter, terms: Terms) -> None:
        self.received = 0
        self.fsync_seconds = 0.0
        self._answer = answer
        self._outcome = outcome
        self._state: PartState = outcome.state
        self._writer = writer
        self._terms = terms
        self._start = outcome.state.length if isinstance(outcome, Append) else 0
        self._due = outcome.until if isinstance(outcome, Append) else outcome.state.total
        self._ranged = isinstance(outcome, Append) or outcome.ranged
        self._piece = None
        self._cause: BaseException | None = None
        self._checked_at = time.monotonic()
        self._open = True
        if isinstance(outcome, Append):
            writer.describe(outcome.state)
            writer.provisional = outcome.provisional
            self._piece = None if outcome.content_digest is None else hashlib.sha256()
        writer.limit = self._due

    def run(self) -> CompletePart:
        """Return the whole part, closed.

        Raises ``BodyIncomplete`` or ``EndUnmarked`` (the received bytes are kept), ``AnswerRefused`` for a
        body that contradicts its head (nothing of it is kept), and ``WriteFailed``.
        """
        try:
            self._check_room()
            end = self._read()
            return self._conclude(end)
        finally:
            if self._open:  # also at Ctrl-C: the received bytes are kept
                self._keep()

    @property
    def _length(self) -> int:
        return self._start + self.received

    def _read(self) -> BodyEnd:
        overlap = self._outcome.overlap if isinstance(self._outcome, Append) else 0
        came, due = 0, self._answer.length
        for chunk in self._chunks():
            came += len(chunk)
            again = chunk[:overlap]
            if again and self._writer.read(self._start - overlap, len(again)) != again:
                raise self._refused(
                    Reason.OVERLAP_MISMATCH, "begins with other bytes than the part ends with"
                )
            overlap -= len(again)
            self._take(chunk[len(again) :])
        if self._cause is not None:
            return BodyEnd.LOST
        if due is not None:
            return BodyEnd.FRAMED if came == due else BodyEnd.LOST
        return BodyEnd.FRAMED if self._answer.framed else BodyEnd.CLOSED

    def _chunks(self) -> Iterator[bytes]:
        """Yield the chunks; an error of the library ends the body, an error of the consumer is raised."""
        chunks = self._answer.chunks(self._terms.chunk_bytes)
        while True:
            try:
                chunk = next(chunks, None)
            except self._answer.broken as error:
                self._cause = error
                return
            if chunk is None:
                return
            yield chunk

    def _take(self, chunk: bytes) -> None:
        if not chunk:
            return
        if self._due is not None and self._length + len(chunk) > self._due:
            raise self._drop(self._contradicted())
        if self._terms.max_size and self._length + len(chunk) > self._terms.max_size:
            msg = f"{self._state.url}: larger than STREAMING_MAX_SIZE={self._terms.max_size} bytes"
            raise AnswerRefused(msg, reason=TOO_LARGE)
        self._terms.assure()
        self._writer.write(chunk)
        self.received += len(chunk)
        if self._terms.rates is not None:
            time.sleep(self._terms.rates.wait(urlsplit(self._state.url).hostname or "", len(chunk)))
        if self._piece is not None:
            self._piece.update(chunk)
        self._checkpoint_if_due()
        if self._terms.progress is not None:
            self._terms.progress(self._length, self._state.total)

    def _checkpoint_if_due(self) -> None:
        behind = self._writer.length - self._writer.state.length
        late = time.monotonic() - self._checked_at >= self._terms.checkpoint_seconds
        if not self._writer.provisional and (behind >= self._terms.checkpoint_bytes or late):
            self._timed(self._writer.checkpoint)
            self._checked_at = time.monotonic()
            self._check_room()

    def _check_room(self) -> None:
        """Raise ``NoSpace`` if the rest of the body does not fit beside the reserve (R9)."""
        if self._terms.space is not None:
            need = None if self._due is None else self._due - self._length
            refusal = self._terms.space.refusal(self._state.url, need, ())
            if refusal is not None:
                raise refusal

    def _timed(self, call: Callable[[], T]) -> T:
        started = time.monotonic()
        try:
            return call()
        finally:
            self.fsync_seconds += time.monotonic() - started

    # -- the end ---------------------------------------------------------------------------

    def _conclude(self, end: BodyEnd) -> CompletePart:
        promised = self._terms.expected or promised_of(self._state) is not None
        verdict = judge_end(end, self._length, self._due, expected=promised)
        if verdict is Reason.INCOMPLETE and end is BodyEnd.FRAMED and self._ranged:
            raise self._drop(self._contradicted())
        if verdict is Reason.COMPLETE:
            self._judge_piece()
            if self._state.total in (None, self._length):
                return self._finish(self._state)
        elif verdict is Reason.CLOSE_DELIMITED:
            return self._end_unmarked()
        kept = self._keep()
        of = "an unknown number" if self._state.total is None else self._state.total
        msg = f"{self._state.url}: the body ended after {self._length} bytes of {of}; {kept} are kept"
        if self._cause is not None:
            msg += f": {self._cause}"
        raise BodyIncomplete(msg, kept) from self._cause

    def _judge_piece(self) -> None:
        """Accept a piece that ended where it should, or refuse it for its own digest (R64)."""
        if not isinstance(self._outcome, Append):
            return
        wanted = self._outcome.content_digest
        if self._piece is not None and wanted is not None and self._piece.hexdigest() != wanted.hex:
            raise self._refused(Reason.SLICE_DIGEST_MISMATCH, f"does not match its Content-Digest, {wanted}")
        self._writer.provisional = False

    def _end_unmarked(self) -> CompletePart:
        """Finish the part if the same bytes came twice (R33); else keep them as unproven."""
        digest = self._writer.hexdigest()
        if self.received and digest == self._terms.unmarked:
            return self._finish(unproven(self._state))
        self._writer.describe(replace(self._state, proof=Proof.UNPROVEN))
        self._timed(self._writer.checkpoint)
        self._keep()
        msg = f"{self._state.url}: nothing says where the body ends, so it may be cut; ask again"
        raise EndUnmarked(msg, digest)

    def _finish(self, state: PartState) -> CompletePart:
        self._terms.assure()
        self._writer.describe(state)
        self._open = False
        return self._timed(self._writer.finish)

    def _keep(self) -> int:
        """Close the part; return how many bytes of it are durable."""
        self._open = False
        started = time.monotonic()
        kept = self._writer.close()
        self.fsync_seconds += time.monotonic() - started
        return kept

    def _contradicted(self) -> AnswerRefused:
        what = f"is not the bytes up to {self._due} that its head announced"
        return AnswerRefused(f"{self._state.url}: the body {what}", reason=str(Reason.RANGE_CONTRADICTED))

    def _refused(self, reason: Reason, what: str) -> AnswerRefused:
        return self._drop(AnswerRefused(f"{self._state.url}: the body {what}", reason=str(reason)))

    def _drop(self, error: AnswerRefused) -> AnswerRefused:
        """Drop all bytes of this body; an earlier part stays as it was."""
        self._open = False
        if isinstance(self._outcome, Append):
            self._writer.provisional = True
            self._writer.close()
        else:
            self._writer.abandon()
        return error
