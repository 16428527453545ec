"""One request of ``download`` and what follows from its response: plan, request, judge, receive.

What may live here: one try, from its plan to its result, which is the whole representation, or the
``Attempt`` from which the next try starts. The loop over the tries is in ``downloading``.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Final

from scrapy_streaming.exceptions import (
    AddressRefused,
    AnswerRefused,
    BodyIncomplete,
    EndUnmarked,
    PartCorrupt,
    RequestFailed,
    StreamingError,
)
from scrapy_streaming.integration.answers import Answer
from scrapy_streaming.integration.claims import Claims
from scrapy_streaming.integration.clients import Client
from scrapy_streaming.integration.planning import is_fresh, plan_part
from scrapy_streaming.integration.receiving import Progress, Reception, terms_of
from scrapy_streaming.protocol.addresses import is_public
from scrapy_streaming.protocol.answers import (
    PERMANENT,
    AlreadyWhole,
    Append,
    PassOn,
    Refuse,
    Replace,
    SentRequest,
    Unchanged,
)
from scrapy_streaming.protocol.attempts import Attempt
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.fields import retry_after
from scrapy_streaming.protocol.jobs import Lease, StoredRepresentation
from scrapy_streaming.protocol.judging import end_is_open, judge_response, met_another
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
from scrapy_streaming.protocol.reasons import Proof, Reason, Recovery
from scrapy_streaming.protocol.selecting import ALWAYS, selecting_key
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.complete_part import CompletePart
from scrapy_streaming.storage.decoding import decodable
from scrapy_streaming.storage.job_request import JobRequest
from scrapy_streaming.storage.part_writer import PartWriter
from scrapy_streaming.storage.store import Storage

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: Bytes that are read from the connection at a time.
CHUNK: Final = 256 << 10
#: The longest ``Retry-After`` that is waited for, in seconds.
LONGEST_ASKED: Final = 60.0
#: Statuses after which the same request may succeed later (R59).
PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 522, 524})

#: Reasons for which a body is dropped, although the next one may be right.
_OF_THIS_ANSWER: Final = (Reason.RANGE_CONTRADICTED, Reason.SLICE_DIGEST_MISMATCH, Reason.OVERLAP_MISMATCH)


@dataclass(frozen=True, slots=True)
class FileRequest:
    """The file to download: ``url``, requested by ``client``, stored under ``path`` below the store."""

    url: str
    key: str
    job: JobRequest
    path: str
    expected: Digest | None
    client: Client
    progress: Progress | None


@dataclass(frozen=True, slots=True)
class Received:
    """A whole representation: a part, or the stored one that a 304 confirmed. ``resumed_from`` in bytes."""

    known: StoredRepresentation | None
    part: CompletePart | None
    reason: Reason
    resumed_from: int = 0


class BadStatus(AnswerRefused):
    """The status says that the response is no file; ``wait`` is its ``Retry-After``, in seconds."""

    def __init__(self, url: str, status: int, wait: float | None) -> None:
        super().__init__(f"{url}: the server responded with status {status}", reason=f"bad-status-{status}")
        self.permanent = status in PERMANENT
        self.wait = wait


def restarted(attempt: Attempt, then: Recovery, url: str, reason: Reason, *, limit: int) -> Attempt:
    """Return the attempt after a refused response; raise ``AnswerRefused`` if none may follow."""
    if then is Recovery.FAIL or attempt.restarts >= limit:
        why = "no other request would help" if then is Recovery.FAIL else "STREAMING_RESTARTS is used up"
        msg = f"{url}: the response was refused and {why}"
        raise AnswerRefused(msg, reason=str(reason))
    return attempt.after_refusal(then)


class Try:
    """One request and the processing of its response."""

    def __init__(
        self, file: FileRequest, storage: Storage, settings: StreamingSettings, claims: Claims, lease: Lease
    ) -> None:
        self._file = file
        self._storage = storage
        self._settings = settings
        self._claims = claims
        self._lease = lease
        self._writer: PartWriter | None = None

    def run(self, attempt: Attempt, known: StoredRepresentation | None) -> Received | Attempt:
        """Return the whole representation, or the attempt for the next try; raise if no try would help."""
        self._claims.assure(self._lease)
        plan, whole = self._plan(attempt.unstable().recovery, known)
        if whole is not None:
            return Received(None, whole, plan.reason, whole.length)
        attempt = attempt.planned(plan.part.length if isinstance(plan, Resume | ConfirmWhole) else 0)
        try:
            answer = self._file.client.get(
                self._file.url, {**ALWAYS, **plan.fields()}, self._settings.stall_timeout
            )
            try:
                return self._judged(attempt, plan, answer)
            finally:
                answer.close()
        except RequestFailed as error:
            return self._stuck(attempt, error)
        finally:
            if self._writer is not None:
                self._writer.close()

    def _plan(
        self, recovery: Recovery, known: StoredRepresentation | None
    ) -> tuple[Plan, CompletePart | None]:
        """Return the plan, and the whole part if there is one; open and verify a part that is resumed."""
        if recovery.is_conditional and not self._settings.resume_enabled:
            return Fetch(Reason.RESUME_OFF), None
        parts, fence = self._storage.parts, self._lease.fence
        for stored in parts.find(self._file.key):
            if stored.name.fence > fence:
                continue
            fresh = self._file.expected is not None or is_fresh(self._settings, stored.written_at)
            plan = plan_part(stored.state, self._planned(stored.state.url), known, recovery, fresh=fresh)
            try:
                match plan:
                    case PublishPart():
                        return plan, parts.complete_part(stored)
                    case Resume() | ConfirmWhole():
                        self._writer = parts.reopen(stored, fence)
                        return plan, None
                    case _:
                        return _with_known(plan, known), None
            except PartCorrupt as error:
                logger.warning("%s", error)
                parts.remove(stored.name)
        return self._plan_without(known, recovery), None

    def _planned(self, url: str) -> PlannedRequest:
        """Return the request as far as it is known: its selecting fields are compared with the response."""
        verifies = self._settings.unvalidated_resume == "verify" and self._file.expected is not None
        return PlannedRequest(url, {}, self._settings.weak_validators == "accept", verifies)

    def _plan_without(self, known: StoredRepresentation | None, recovery: Recovery) -> Plan:
        """Return the plan if there is no part."""
        if known is None:
            return plan_request(None, None, self._planned(""), recovery)
        foreseen = replace(known, vary=(), selecting=selecting_key((), {}))
        return _with_known(plan_request(None, foreseen, self._planned(known.final_url), recovery), known)

    def _judged(self, attempt: Attempt, plan: Plan, answer: Answer) -> Received | Attempt:
        if not self._settings.allow_private_addresses:
            peer = answer.peer()
            if peer is None or not is_public(peer):
                raise AddressRefused(peer or "a server whose address is not known", answer.url)
        asked = SentRequest(answer.asked or {}, self._file.url, decodable=decodable())
        outcome = judge_response(plan, answer.head, asked)
        logger.debug(
            "streaming_resume_decision reason=%s url=%s job=%s fence=%d status=%d",
            outcome.reason, answer.url, self._file.key[:12], self._lease.fence, answer.status,
        )  # fmt: skip
        if not end_is_open(outcome):
            attempt = attempt.end_marked()
        if met_another(plan, outcome):
            attempt = attempt.met_another()
        match outcome:
            case Append() | Replace():
                return self._receive(attempt, answer, outcome)
            case Unchanged(known, reason):
                return Received(known, None, reason)
            case AlreadyWhole():
                return self._whole(attempt, outcome)
            case PassOn():
                return self._bad_status(attempt, answer)
            case Refuse(reason, then):
                return self._refused(attempt, answer.url, reason, then)

    def _receive(self, attempt: Attempt, answer: Answer, outcome: Append | Replace) -> Received | Attempt:
        writer = self._open_part(outcome)
        folders = (self._storage.parts.directory, *self._storage.blobs.folders)
        terms = replace(
            terms_of(self._settings, CHUNK, *folders),
            expected=self._file.expected is not None,
            unmarked=attempt.unmarked,
            progress=self._file.progress,
            assure=lambda: self._claims.assure(self._lease),
        )
        reception = Reception(answer, outcome, writer, terms)
        resumed = outcome.state.length if isinstance(outcome, Append) else 0
        try:
            return Received(None, reception.run(), outcome.reason, resumed)
        except BodyIncomplete as error:
            self._storage.parts.keep_longest(self._file.key, self._lease.fence)
            if error.kept > attempt.kept:
                logger.info("interrupted with %d bytes kept, resuming: %s", error.kept, error)
                return attempt.made_progress(error.kept)
            return self._stuck(attempt, error)
        except EndUnmarked as error:
            following = self._refused(attempt, answer.url, Reason.CLOSE_DELIMITED, Recovery.PROBE)
            return following.unmarked_body(error.sha256)
        except AnswerRefused as error:
            return self._after_refused_body(attempt, error)

    def _after_refused_body(self, attempt: Attempt, error: AnswerRefused) -> Attempt:
        """Return the attempt after a body that contradicted its head (R64, R74)."""
        if error.reason not in _OF_THIS_ANSWER:
            raise error
        if error.reason == Reason.SLICE_DIGEST_MISMATCH and not attempt.odd_pieces:
            return attempt.odd_piece()
        return self._refused(attempt, self._file.url, Reason(error.reason), Recovery.REFETCH)

    def _open_part(self, outcome: Append | Replace) -> PartWriter:
        writer, self._writer = self._writer, None
        if isinstance(outcome, Replace):
            if writer is not None:
                writer.close()
            return self._storage.parts.create(self._file.key, self._lease.fence, outcome.state)
        assert writer is not None
        return writer

    def _whole(self, attempt: Attempt, outcome: AlreadyWhole) -> Received | Attempt:
        """Return the part that a 304 (R7, R49, R50) or a 416 (R33) confirmed to be whole."""
        writer, self._writer = self._writer, None
        if writer is None:
            return self._refused(attempt, self._file.url, Reason.CORRUPT_PART, Recovery.REFETCH)
        state = outcome.state
        if outcome.reason is Reason.PROBED_WHOLE:
            state = replace(state, proof=Proof.LENGTH)
        writer.describe(state)
        part = writer.finish()
        return Received(None, part, outcome.reason, part.length)

    # -- the next attempt ------------------------------------------------------------------

    def _stuck(self, attempt: Attempt, error: StreamingError) -> Attempt:
        """Return the attempt for the same request, later; raise *error* after ``STREAMING_MAX_ATTEMPTS``."""
        if attempt.stuck + 1 >= self._settings.max_attempts:
            raise error
        logger.info("received nothing more, trying again (%d): %s", attempt.stuck + 1, error)
        return attempt.made_none()

    def _bad_status(self, attempt: Attempt, answer: Answer) -> Attempt:
        wait = retry_after(answer.fields.get("retry-after", ()), time.time())
        error = BadStatus(answer.url, answer.status, wait)
        if answer.status not in PASSING or (wait is not None and wait > LONGEST_ASKED):
            raise error
        following = self._stuck(attempt, error)
        if wait is not None:
            time.sleep(wait)
        return following

    def _refused(self, attempt: Attempt, url: str, reason: Reason, then: Recovery) -> Attempt:
        """Return the attempt after a refused response, within ``STREAMING_RESTARTS``."""
        following = restarted(attempt, then, url, reason, limit=self._settings.restarts)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if then is Recovery.DISCARD:
            self._storage.parts.discard(self._file.key, self._lease.fence)
        logger.info("response refused (%s), requesting again (%s): %s", reason, then, url)
        return following


def _with_known(plan: Plan, known: StoredRepresentation | None) -> Plan:
    """Return the plan with *known* unchanged: its selecting fields are compared with the response."""
    return replace(plan, known=known) if isinstance(plan, Revalidate) and known is not None else plan
