"""Writes one body to its part: takes bytes on the event loop, and never blocks it.

What may live here: queues, pauses, deadlines, and what becomes of a body at its end. Batches go to a
thread that writes and hashes; a writer that has too much waiting asks its source to pause. A body that
fits one batch never touches a part.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from scrapy.exceptions import DownloadCancelledError, DownloadTimeoutError, ResponseDataLossError
from scrapy.utils.asyncio import call_later, create_looping_call, run_in_thread
from scrapy.utils.defer import deferred_from_coro, maybe_deferred_to_future
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from scrapy_streaming.exceptions import EndUnmarked, StreamingError
from scrapy_streaming.protocol.answers import Append, Replace
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.parts import BodyEnd, PartState, judge_end, unproven
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.complete_part import CompletePart, small_part
from scrapy_streaming.storage.part_writer import PartWriter

#: Bytes that go to the thread in one piece, and the most a body may have to stay in memory.
BATCH: Final = 256 << 10
#: Bytes of a body that are hashed on the event loop, at most: some 0.04 ms.
SMALL_BODY: Final = 64 << 10
#: Pieces smaller than this are joined: a million tiny chunks must not be a million objects.
SMALL: Final = 4096
#: Seconds that are not worth a pause: the next bytes count all the same.
SHORTEST_WAIT: Final = 0.01
#: Bytes waiting in all bodies together before their sources are paused.
TOTAL_BUFFER: Final = 64 << 20


T = TypeVar("T")


class BodyTimeout(StreamingError, DownloadTimeoutError):
    """A body came too slowly or not at all; what came is kept, and a retry resumes.

    Reasons: ``stalled`` (STREAMING_STALL_TIMEOUT), ``too-slow`` (STREAMING_MIN_RATE).
    """

    reason = "stalled"


class BodyRefused(StreamingError, ResponseDataLossError):
    """A body is not what its head announced: nothing of it is kept.

    Reasons: ``range-contradicted`` (it is longer or shorter than its Content-Range, R74),
    ``slice-digest-mismatch`` (a piece that its own Content-Digest does not match, R64),
    ``overlap-mismatch`` (it does not begin with the end of a part without a validator, R19),
    ``undecodable`` (R34).
    """

    reason = str(Reason.RANGE_CONTRADICTED)


class Budget:
    """The bytes that wait in all bodies together, and the bodies that wait for them to become fewer."""

    def __init__(self, limit: int = TOTAL_BUFFER) -> None:
        self.limit = limit
        self.used = 0
        self.waiting: set[BodyWriter] = set()

    @property
    def full(self) -> bool:
        """Whether no more should be read from any source."""
        return self.used > self.limit

    def take(self, size: int) -> None:
        """Count *size* more bytes."""
        self.used += size

    def give(self, size: int) -> None:
        """Count *size* bytes less; bodies that wait go on if they may."""
        self.used -= size
        for body in tuple(self.waiting):
            body.resume_if_possible()


def _no_wait(_size: int) -> float:
    return 0.0


@dataclass(frozen=True, slots=True)
class Task:
    """One body to receive: what it was judged to be, and where it goes.

    ``open_part`` is called once, in a thread, when bytes have to go to disk; ``after_failure`` is
    called in a thread after a broken body's part was closed. ``is_valid``, called in any thread: whether
    this worker may write now; ``ensure_lease`` returns when it may, or raises ``LeaseLost``.
    ``unmarked`` is the SHA-256 (hex) of an earlier body whose end nothing marked. ``max_size`` in
    bytes, 0 for none. ``wait`` gives for how many seconds to read no more after so many bytes.
    """

    url: str
    outcome: Append | Replace
    open_part: Callable[[], PartWriter]
    after_failure: Callable[[], None]
    is_valid: Callable[[], bool]
    ensure_lease: Callable[[], Coroutine[Any, Any, None]]
    expected: bool
    unmarked: str | None
    max_size: int
    wait: Callable[[int], float] = _no_wait

    @property
    def state(self) -> PartState:
        """What the part is of."""
        return self.outcome.state

    @property
    def start(self) -> int:
        """Where in the representation the body begins, in bytes."""
        return self.outcome.state.length - self.overlap if isinstance(self.outcome, Append) else 0

    @property
    def overlap(self) -> int:
        """How many of its first bytes the part has already."""
        return self.outcome.overlap if isinstance(self.outcome, Append) else 0

    @property
    def due(self) -> int | None:
        """Where it must end."""
        return self.outcome.until if isinstance(self.outcome, Append) else self.outcome.state.total

    @property
    def ranged(self) -> bool:
        """Whether a Content-Range states where it must end."""
        return isinstance(self.outcome, Append) or self.outcome.ranged

    @property
    def content_digest(self) -> Digest | None:
        """The digest that these bytes alone must have (R64)."""
        return self.outcome.content_digest if isinstance(self.outcome, Append) else None


class BodyWriter:
    """Takes one body and gives one ``CompletePart``, or the error that a retry can act on.

    *abort* closes the source of the body at once. ``operations`` counts what was given to a thread.
    """

    def __init__(
        self, task: Task, abort: Callable[[], object], settings: StreamingSettings, budget: Budget
    ) -> None:
        self.received = 0
        self.operations = 0
        self._task = task
        self._abort = abort
        self._settings = settings
        self._budget = budget
        self._written = 0
        self._queue: deque[bytes | bytearray] = deque()
        self._tail = bytearray()
        self._writer: PartWriter | None = None
        self._gap = False  # a chunk was lost: nothing may follow it into the part
        self._busy = False
        self._ready: Deferred[None] | None = None  # fires when a source that was paused may go on
        self._held_back = False
        self._end: BodyEnd | None = None
        self._error: Exception | None = None
        self._sha256 = ""  # of a body whose end nothing marked
        self._overlap = task.overlap  # bytes that are still to be compared
        self._piece = None if task.content_digest is None else hashlib.sha256()
        self._result: Deferred[CompletePart] = Deferred()
        self._byte_at = self._flushed_at = self._rated_at = time.monotonic()
        self._rated = 0  # bytes received until then
        self._ticker = create_looping_call(self._tick)
        self._ticker.start(min(1.0, settings.stall_timeout / 10), now=False)

    async def finished(self) -> CompletePart:
        """Return the whole part once the body has ended well.

        Raises ``ResponseDataLossError`` or ``BodyTimeout`` (a retry resumes),
        ``DownloadCancelledError`` beyond the size limit, ``EndUnmarked`` for a body whose end
        nothing marks, ``WriteFailed`` when the disk does not take it, ``LeaseLost`` when
        this worker may not write any more.
        """
        return await maybe_deferred_to_future(self._result)

    def write(self, data: bytes) -> Deferred[None] | None:
        """Take bytes of the body; return ``None`` if the source may go on at once.

        Else it pauses until the ``Deferred`` fires, which is given once for each pause. It fires, too,
        when the body is broken off. Bytes that come in a pause are taken all the same.
        """
        if self._end is not None:
            return None
        before = self._ready
        self._take(data)
        return None if self._ready is before else self._ready

    def _take(self, data: bytes) -> None:
        self._byte_at = time.monotonic()
        self.received += len(data)
        self._budget.take(len(data))
        if len(data) < SMALL:
            self._tail += data
        else:
            self._queue_tail()
            self._queue.append(data)
        limit, due = self._task.max_size, self._task.due
        if due is not None and self._task.start + self.received > due:
            self.break_off(self._contradicted())
        elif limit and self._task.start + self.received > limit:
            self.break_off(DownloadCancelledError(too_large(self._task.url, limit)))
        elif self._pending >= BATCH:
            self._drain()
            if self._pending > self._settings.buffer_bytes or self._budget.full:
                self._pause()
        wait = self._task.wait(len(data))
        if wait > SHORTEST_WAIT and self._end is None:
            self._hold_back(wait)

    @property
    def _pending(self) -> int:
        """Bytes received and not yet written."""
        return self.received - self._written

    def _queue_tail(self) -> None:
        """Put the small pieces, joined, behind the large ones that came before."""
        if self._tail:
            self._queue.append(self._tail)
            self._tail = bytearray()

    def ended(self, end: BodyEnd) -> None:
        """Take note that no more bytes come, and how the source ended."""
        if self._end is None:
            self._end = end
            self._drain()

    def break_off(self, error: Exception) -> None:
        """Stop reading; what came so far is kept, and *error* is what ``finished`` raises."""
        if self._end is None:
            self._error = error
            self.ended(BodyEnd.LOST)
            self._abort()
            self._fire_ready()

    @property
    def url(self) -> str:
        """The URL it comes from."""
        return self._task.url

    @property
    def concluded(self) -> bool:
        """Whether the part is closed."""
        return bool(self._result.called)

    @property
    def left(self) -> int | None:
        """How many bytes are still to come, ``None`` where that is not known."""
        return None if self._task.due is None else self._task.due - self._task.start - self.received

    # -- flow ------------------------------------------------------------------------------

    def _pause(self) -> None:
        if self._ready is None:
            self._ready = Deferred()
            self._budget.waiting.add(self)

    def _fire_ready(self) -> None:
        self._budget.waiting.discard(self)
        ready, self._ready = self._ready, None
        if ready is not None:
            ready.callback(None)

    def _hold_back(self, seconds: float) -> None:
        """Read no more for so long: bytes come faster than STREAMING_MAX_RATE."""
        if not self._held_back:
            self._held_back = True
            self._pause()
            call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._held_back = False
        self.resume_if_possible()

    def resume_if_possible(self) -> None:
        """Read on if little enough is waiting, here and in all, and the rate allows it."""
        paused = self._ready is not None
        if paused and not self._held_back and self._little_left() and not self._budget.full:
            self._byte_at = self._rated_at = time.monotonic()
            self._rated = self.received  # the server did not cause this wait
            self._fire_ready()

    def _little_left(self) -> bool:
        return self._pending <= self._settings.buffer_bytes // 4

    def _tick(self) -> None:
        now = time.monotonic()
        stall = self._settings.stall_timeout
        if self._end is not None:
            return
        if self._ready is None and now - self._byte_at > stall:
            self.break_off(BodyTimeout(f"{self._task.url}: no byte for {stall:g} seconds"))
        elif self._ready is None and self._too_slow(now):
            slow = f"under STREAMING_MIN_RATE={self._settings.min_rate} bytes a second for {stall:g} seconds"
            self.break_off(BodyTimeout(f"{self._task.url}: {slow}", reason="too-slow"))
        elif self._pending and now - self._flushed_at > self._settings.checkpoint_seconds:
            self._drain(flush=True)

    def _too_slow(self, now: float) -> bool:
        """Whether too few bytes came in the window that ends now; windows follow one another."""
        window = now - self._rated_at
        if window < self._settings.stall_timeout:
            return False
        came, self._rated, self._rated_at = self.received - self._rated, self.received, now
        return came < self._settings.min_rate * window

    # -- the thread's side -----------------------------------------------------------------

    def _drain(self, *, flush: bool = False) -> None:
        if not self._busy:
            self._busy = True
            deferred_from_coro(self._work(flush=flush)).addErrback(self._failed)

    def _failed(self, failure: Failure) -> None:
        if self._ticker.running:
            self._ticker.stop()
        self._end = self._end or BodyEnd.LOST
        self._abort()
        self._fire_ready()
        self._drop_pending()
        self._result.errback(failure)

    async def _work(self, *, flush: bool) -> None:
        try:
            while self._end is None and (flush or self._pending >= BATCH):
                flush = False
                await self._hand_over()
                if not self._task.is_valid():
                    await self._task.ensure_lease()
        except StreamingError as error:
            self.break_off(error)
        finally:
            self._busy = False
        if self._end is not None:
            self._busy = True
            await self._conclude()

    async def _hand_over(self) -> None:
        self._queue_tail()
        self._flushed_at = time.monotonic()
        before = self._written
        try:
            await self._in_thread(self._store)
        finally:
            self._budget.give(self._written - before)
            self.resume_if_possible()

    async def _in_thread(self, function: Callable[[], T]) -> T:
        self.operations += 1
        return await run_in_thread(function)

    def _drop_pending(self) -> None:
        self._budget.give(self._pending)
        self._written = self.received

    async def _conclude(self) -> None:
        self._ticker.stop()
        self._budget.waiting.discard(self)
        self._queue_tail()
        before = self._written
        await self._write_rest()
        try:
            result = self._close() if self._is_small else await self._in_thread(self._close)
        except StreamingError as error:
            if self._error is None:
                raise
            raise self._error from error
        finally:
            self._budget.give(self.received - before)
            self._written = self.received
        if isinstance(result, CompletePart):
            self._result.callback(result)
        else:
            self._result.errback(self._error or self._why(result))

    async def _write_rest(self) -> None:
        """Write what is queued, under a lease that holds; a body with no part so far stays in memory."""
        try:
            while self._error is None and self._queue and (self._writer is not None or self._appends):
                await self._task.ensure_lease()
                await self._in_thread(self._store)
        except StreamingError as error:
            self._error = self._error or error

    @property
    def _is_small(self) -> bool:
        """Whether a whole body is in memory, and hashed faster than a thread is woken."""
        whole = self._end is BodyEnd.FRAMED and self._error is None and not self._appends
        fits = self._writer is None and self.received <= SMALL_BODY
        return whole and fits and self._task.due in (None, self.received)

    @property
    def _appends(self) -> bool:
        return isinstance(self._task.outcome, Append)

    def _contradicted(self) -> BodyRefused:
        msg = f"{self._task.url}: the body is not the bytes up to {self._task.due} that its head announced"
        return BodyRefused(msg)

    def _why(self, reason: Reason) -> Exception:
        if reason is Reason.CLOSE_DELIMITED:
            msg = f"{self._task.url}: nothing says where the body ends, so it may be cut ({reason})"
            return EndUnmarked(msg, self._sha256)
        due = self._task.due
        got = self._task.start + self.received
        return ResponseDataLossError(f"{self._task.url}: {got} bytes of {due or 'an unknown number'}")

    def _store(self) -> None:
        """Write and hash what is queued; stop early where reading can go on meanwhile (thread).

        Nothing is written under a lease that was lost: a process may be suspended here for long.
        """
        if self._writer is None and self._task.is_valid():
            self._writer = self._task.open_part()
        while self._queue and self._writer is not None and self._task.is_valid():
            chunk = self._queue.popleft()
            if self._piece is not None:
                self._piece.update(chunk)
            try:
                self._writer.write(self._beyond_overlap(self._writer, chunk))
            except StreamingError:
                self._gap = True
                raise
            self._written += len(chunk)
            if self._ready is not None and self._little_left() and self._end is None:
                return

    def _beyond_overlap(self, writer: PartWriter, chunk: bytes | bytearray) -> bytes | bytearray | memoryview:
        """Return what of *chunk* is new; raise ``BodyRefused`` unless the rest is what the part has (R19)."""
        if not self._overlap:
            return chunk
        again = memoryview(chunk)[: self._overlap]
        if writer.read(self._task.state.length - self._overlap, len(again)) != again:
            msg = f"{self._task.url}: the end of the part is not what the server has there"
            raise BodyRefused(msg, reason=str(Reason.OVERLAP_MISMATCH))
        self._overlap -= len(again)
        return memoryview(chunk)[len(again) :]

    def _close(self) -> CompletePart | Reason:
        """Finish the part, or keep what there is of it (thread)."""
        end, state = self._end or BodyEnd.LOST, self._task.state
        length = self._task.start + self.received
        verdict = judge_end(end, length, self._task.due, expected=self._task.expected)
        if verdict is Reason.INCOMPLETE and end is BodyEnd.FRAMED and self._task.ranged:
            self._error = self._error or self._contradicted()
        elif verdict is Reason.COMPLETE and self._error is None:
            self._error = self._judge_piece()
        if isinstance(self._error, BodyRefused):
            self._drop()
            return verdict
        if verdict is Reason.COMPLETE and state.total not in (None, length):
            verdict = Reason.INCOMPLETE  # a 206 that gave less than was asked for (R17)
        if verdict is Reason.CLOSE_DELIMITED:
            self._sha256 = self._hash()
            if self.received and self._sha256 == self._task.unmarked:  # the same bytes twice (R33)
                verdict, state = Reason.COMPLETE, unproven(state)
        if verdict is Reason.COMPLETE and self._error is None:
            part = self._finish(state, length)
            if part is not None:
                return part
            verdict = Reason.INCOMPLETE
        self._keep(probe=verdict is Reason.CLOSE_DELIMITED and self.received > 0)
        return verdict

    def _judge_piece(self) -> BodyRefused | None:
        """Return why a piece does not match its own digest (R64), or accept it; it ended where it should."""
        if not isinstance(self._task.outcome, Append):
            return None
        self._store()
        wanted = self._task.content_digest
        if self._queue or self._writer is None:  # the lease was lost
            return None
        if self._piece is not None and wanted is not None and self._piece.hexdigest() != wanted.hex:
            msg = f"{self._task.url}: a piece does not match its Content-Digest, {wanted}"
            return BodyRefused(msg, reason=str(Reason.SLICE_DIGEST_MISMATCH))
        self._writer.provisional = False
        return None

    def _finish(self, state: PartState, length: int) -> CompletePart | None:
        """Return the whole part; ``None`` if not all of it could be written."""
        if self._writer is None and isinstance(self._task.outcome, Replace):
            return small_part(state, b"".join(self._queue))
        self._store()
        if self._writer is None or self._writer.length != length:
            return None
        self._writer.describe(state)
        return self._writer.finish()

    def _drop(self) -> None:
        """Keep nothing of this body; a part that was there before it stays as it was (thread)."""
        self._queue.clear()
        if self._writer is None:
            return
        if isinstance(self._task.outcome, Append):
            self._writer.provisional = True
            self._writer.close()
        else:
            self._writer.abandon()

    def _hash(self) -> str:
        """Return the SHA-256 of all that came, 64 hex digits (thread)."""
        if self._writer is None:
            return hashlib.sha256(b"".join(self._queue)).hexdigest()
        self._store()
        return self._writer.hexdigest()

    def _keep(self, *, probe: bool) -> None:
        """Keep a broken body's bytes if a later request can build on them (R31, R33, R61)."""
        validators = self._task.state.validators
        resumable = validators.if_range() is not None or validators.unmodified_since() is not None
        try:
            worthwhile = self._writer is not None or resumable or probe
            if self._queue and worthwhile and not self._gap:
                self._store()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._task.after_failure()


def too_large(url: str, limit: int) -> str:
    """Return the message for a body beyond the size limit."""
    return f"{url}: larger than STREAMING_MAX_SIZE={limit} bytes"
