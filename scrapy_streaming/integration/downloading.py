"""One file from a URL to a store, without a crawler: the twelve steps, one after the other.

claim → plan → request → judge → receive → publish → name → complete; after a break the steps from the
plan on are done again, with what is kept.
"""

from __future__ import annotations

import logging
import math
import mimetypes
import os
import random
import time
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import sha1
from pathlib import Path
from typing import Any, Final
from urllib.parse import urldefrag, urlsplit

from w3lib.url import canonicalize_url, safe_url_string

from scrapy_streaming.exceptions import (
    AddressRefused,
    AnswerRefused,
    BlobGoing,
    BodyIncomplete,
    EndUnmarked,
    IntegrityError,
    LeaseLost,
    NotAdopted,
    PartCorrupt,
    RequestFailed,
    StreamingError,
    Undecodable,
    WriteFailed,
)
from scrapy_streaming.integration.answers import Answer
from scrapy_streaming.integration.claims import Claims, lease_lost
from scrapy_streaming.integration.clients import Client, client_of
from scrapy_streaming.integration.receiving import Progress, Reception, terms_of
from scrapy_streaming.integration.steps import (
    FRESH_DAYS,
    checked_callback,
    checked_digest,
    checked_name,
    checked_path,
    plan_part,
)
from scrapy_streaming.integration.switches import is_off, settings, why_no_streaming
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
from scrapy_streaming.protocol.attempts import UNSTABLE_AFTER
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.fields import retry_after
from scrapy_streaming.protocol.jobs import (
    Completion,
    Done,
    Granted,
    Lease,
    RecordedName,
    StoredRepresentation,
    is_recent,
    job_key,
    request_hash,
)
from scrapy_streaming.protocol.judging import end_is_open, judge_response, met_another
from scrapy_streaming.protocol.planning import (
    ConfirmWhole,
    Fetch,
    Plan,
    PlannedRequest,
    PublishPart,
    Resume,
    plan_request,
)
from scrapy_streaming.protocol.reasons import Proof, Reason, Recovery
from scrapy_streaming.protocol.selecting import ALWAYS, selecting_key
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.redaction import clean_record, url_without_userinfo
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.blob_state import BlobState
from scrapy_streaming.storage.complete_part import CompletePart, broken_promise, known_of
from scrapy_streaming.storage.decoding import coded_twice, decodable
from scrapy_streaming.storage.job_request import JobRequest
from scrapy_streaming.storage.part_writer import PartWriter
from scrapy_streaming.storage.store import Storage

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: Bytes read from the connection at a time.
CHUNK: Final = 256 << 10
#: Seconds between two tries that gained nothing: the first, the most, and what a server may ask for.
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_ASKED = 0.5, 30.0, 60.0
#: Statuses after which the same request may be answered well later (R59).
PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 522, 524})
#: Seconds between two tries to publish what ``gc`` is just collecting, and how many there are.
GOING_PAUSE, GOING_TRIES = 0.05, 600

#: Why nothing of a body is kept, and another may be right.
_OF_THIS_ANSWER: Final = (Reason.RANGE_CONTRADICTED, Reason.SLICE_DIGEST_MISMATCH, Reason.OVERLAP_MISMATCH)


@dataclass(frozen=True, slots=True)
class Wish:
    """What is wanted: the bytes of ``url`` under ``path``, a name below the store, made by ``client``."""

    url: str
    key: str
    job: JobRequest
    path: str
    expected: Digest | None
    client: Client
    progress: Progress | None


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What one try leaves to the next: how free its plan is, and what was spent.

    ``stuck`` counts tries in a row that gained no byte, ``changes`` resumptions that met another
    representation (R62), ``odd_pieces`` those with a wrong Content-Digest (R64). ``unmarked``: see ``Terms``.
    """

    mode: Recovery = Recovery.NONE
    restarts: int = 0
    stuck: int = 0
    changes: int = 0
    odd_pieces: int = 0
    unmarked: str | None = None
    kept: int = 0


@dataclass(frozen=True, slots=True)
class _Received:
    """A whole representation: a part, or what a 304 confirmed. ``resumed_from`` in bytes."""

    known: StoredRepresentation | None
    part: CompletePart | None
    reason: Reason
    resumed_from: int = 0


def download(
    url: str,
    *,
    store: str | os.PathLike[str],
    client: Any = None,
    expected: Any = None,
    name: str | None = None,
    progress_callback: Progress | None = None,
) -> dict[str, Any] | None:
    """Return the entry that a crawl would put into ``item["files"]``, with the file in *store*.

    *store* is a folder, as ``FILES_STORE``; a crawl may share it. *client* makes the requests: ``None``
    for urllib, an ``httpx.Client``, or a ``requests.Session``, with whatever credentials, proxies and
    time-outs it has. *expected* is the digest that the bytes must have (``sha256:<hex>``, hex, or
    ``{"sha256": hex}``), *name* a path below *store*, else the one that ``FilesPipeline`` would give.
    *progress_callback* gets the bytes that are there so far, and how many there will be, or ``None``.
    A transfer that breaks is resumed, as is one of a process that was killed; a file that is stored is
    asked for again when it is older than 90 days (``STREAMING_REVALIDATE``), conditionally. Another
    worker's job is waited for (``STREAMING_HELD``). ``None`` if ``STREAMING_ENABLED`` or
    ``STREAMING_IO_ENABLED`` is off.

    Raises ``TypeError`` for a wrong argument; ``AnswerRefused`` (``bad-status-404`` …), ``RequestFailed``
    and ``BodyIncomplete`` when trying again did not help, ``IntegrityError``, ``JobUnavailable``,
    ``StoreError``, ``LedgerError``, ``WriteFailed``.
    """
    root, wanted = checked_path("store", store), _checked_url(url)
    digest, given = checked_digest(expected, wanted), checked_name(name)
    makes, progress = client_of(client), checked_callback(progress_callback)
    if is_off(why_no_streaming("io")):
        return None
    loaded = settings(root)
    work_id = loaded.work_id or ""
    canonical = canonicalize_url(url_without_userinfo(wanted))
    job = JobRequest(work_id, "", canonical, request_hash("GET", canonical))
    path = given or default_path(wanted)
    wish = Wish(urldefrag(wanted)[0], job_key(work_id, "", canonical), job, path, digest, makes, progress)
    with closing(Storage.open(loaded)) as storage:
        path = storage.blobs.check_name(path)  # or refused before anything is asked
        wish = replace(wish, path=path)
        renew = storage.ledger.renew if loaded.why_no_ledger is None else None
        with Claims(loaded.lease_seconds, renew, waits=loaded.held == "wait") as claims:
            return _Download(wish, storage, loaded, claims).run()


def _checked_url(url: Any) -> str:
    if not isinstance(url, str):
        msg = f"url must be str, got {type(url).__name__}"
        raise TypeError(msg)
    if urlsplit(url).scheme.lower() not in ("http", "https"):
        msg = f"url must be http://… or https://…, got {url!r}"
        raise TypeError(msg)
    return str(safe_url_string(url))


def default_path(url: str) -> str:
    """Return the name that ``FilesPipeline`` of Scrapy 2.19 gives to the file of *url*, below the store."""
    extension = Path(urlsplit(url).path).suffix
    if extension not in mimetypes.types_map:
        extension = Path(url).suffix  # "?file=a.pdf"
    if extension not in mimetypes.types_map:
        extension = ""
        kind = mimetypes.guess_type(url)[0]
        if kind:
            extension = mimetypes.guess_extension(kind) or ""
    return f"full/{sha1(url.encode(), usedforsecurity=False).hexdigest()}{extension}"


class _Download:
    """One wish on its way."""

    def __init__(self, wish: Wish, storage: Storage, settings: StreamingSettings, claims: Claims) -> None:
        self._wish = wish
        self._storage = storage
        self._settings = settings
        self._claims = claims

    def run(self) -> dict[str, Any]:
        """Return the entry; a job whose lease is lost is claimed again."""
        refresh = self._refresh_before()
        for left in reversed(range(self._settings.max_attempts)):
            claim = self._claim(refresh)
            if isinstance(claim, Done):
                entry = self._replay(claim.completion)
                if entry is not None:
                    return entry
                refresh = math.inf  # recorded, and its bytes are gone, or others are wanted
                continue
            try:
                return self._fetch_and_store(claim)
            except LeaseLost:
                if not left:
                    raise
                refresh = None  # another worker's result is fresh enough
        msg = f"{self._wish.url}: the job was not to be had in {self._settings.max_attempts} tries"
        raise LeaseLost(msg)

    def _refresh_before(self) -> float | None:
        match self._settings.revalidate:
            case "always":
                return math.inf
            case "never":
                return None
            case _:
                return time.time() - FRESH_DAYS * 86400

    def _claim(self, refresh_before: float | None) -> Granted | Done:
        wish, kept = self._wish, self._storage.kept.get(self._wish.key, 0)
        return self._claims.claim(
            lambda: self._storage.jobs.claim(wish.key, wish.job, refresh_before=refresh_before, kept=kept)
        )

    # -- what is there already -------------------------------------------------------------

    def _replay(self, completion: Completion) -> dict[str, Any] | None:
        """Return the entry of recorded bytes, their name made anew if need be; ``None`` without them."""
        known, blobs = completion.known, self._storage.blobs
        if self._wish.expected not in (None, Digest.parse(known.digest)):
            return None
        if blobs.was_replaced(known, self._wish.path):  # by what may be newer: the server is asked
            return None
        present = self._present(known)
        if present is None:
            return None
        named = blobs.name(
            Digest.parse(known.digest), self._wish.path, stamp=present.stamp, recorded=known.name
        )
        if named.own_stamp is not None:
            self._storage.jobs.note_name(completion, RecordedName(named.path, named.own_stamp))
        return self._entry(named.path, "uptodate", Reason.STORED, completion)

    def _present(self, known: StoredRepresentation) -> StoredRepresentation | None:
        """Return *known* with the stamp of its blob; ``None`` if its bytes are not there (R44, R77)."""
        look = self._storage.blobs.inspect(known)
        if look.tampered is not None:
            state = BlobState.MISSING if look.found is None else BlobState.QUARANTINED
            self._storage.jobs.set_blob_state(known.digest, state, [BlobState.PRESENT]).result()
            if look.found is not None:
                self._storage.blobs.set_aside(look.found)
            logger.warning("%s: fetched again: %s", look.tampered, known.final_url)
        if look.stamp is None:
            return None
        if look.stamp != known.stamp:
            self._storage.jobs.note_blob(known.digest, look.stamp)
        return replace(known, stamp=look.stamp)

    def _adopted(self, granted: Granted) -> dict[str, Any] | None:
        """Return the entry of a fresh file of which no completion tells (I16); ``None`` if there is none."""
        wish, blobs = self._wish, self._storage.blobs
        before = self._refresh_before()
        known_part = wish.key in self._storage.kept
        if granted.known is not None or granted.lease.generation != 1 or known_part or before == math.inf:
            return None
        path, jobs = wish.path, self._storage.jobs
        written_at = blobs.written_at(path) if blobs.is_taken(path) else None
        if written_at is None or not is_recent(written_at, before, time.time()):
            return None
        try:
            found = blobs.adopt(path, noted=jobs.noted_files([path]).result().get(path))
        except (NotAdopted, WriteFailed) as refusal:
            logger.info("%s: not adopted, the server is asked: %s", path, refusal)
            return None
        digest = str(found.digest)
        if wish.expected not in (None, found.digest) or not jobs.adoptable(digest, path).result():
            return None
        name = RecordedName(found.path, found.own_stamp)
        known = StoredRepresentation(
            digest, found.size, Validators(), wish.job.url,
            stamp=found.stamp, name=name, stored_at=found.stored_at,
        )  # fmt: skip
        self._claims.end(granted.lease)
        completion = self._storage.jobs.complete(granted.lease, known, path=wish.path).result()
        return self._entry(wish.path, "uptodate", Reason.ADOPTED, completion)

    # -- the way of the bytes --------------------------------------------------------------

    def _fetch_and_store(self, granted: Granted) -> dict[str, Any]:
        lease = granted.lease
        try:
            entry = self._adopted(granted)
            if entry is not None:
                return entry
            known = None if granted.known is None else self._present(granted.known)
            received = self._received(lease, known)
            return self._store(lease, granted, received)
        except LeaseLost:
            self._claims.end(lease)
            raise
        except StreamingError as error:
            self._fail(lease, error)
            raise
        except BaseException:  # raised again: also at Ctrl-C the job is free at once
            self._claims.end(lease)
            self._storage.jobs.release(lease)
            raise

    def _fail(self, lease: Lease, error: StreamingError) -> None:
        self._claims.end(lease)
        permanent = isinstance(error, _BadStatus) and error.permanent
        wait = error.wait if isinstance(error, _BadStatus) else None
        future = self._storage.jobs.fail(
            lease, error.reason, str(error), permanent=permanent, retry_after=wait
        )
        if (failed := future.exception()) is not None:
            logger.info("what became of a job was not noted: %s", failed)

    def _received(self, lease: Lease, known: StoredRepresentation | None) -> _Received:
        """Return the whole representation, from as many tries as it takes and the settings allow."""
        attempt = _Attempt()
        while True:
            if attempt.stuck:
                time.sleep(_pause(attempt.stuck))
            result = _Try(self._wish, self._storage, self._settings, self._claims, lease).run(attempt, known)
            if isinstance(result, _Received):
                checked = self._checked(lease, result, attempt)
                if isinstance(checked, _Received):
                    return checked
                result = checked
            attempt = result

    def _checked(self, lease: Lease, received: _Received, attempt: _Attempt) -> _Received | _Attempt:
        """Return what was received, decoded, its digest compared; or the next try (R34, R63)."""
        if received.part is None:
            if received.known is None or self._present(received.known) is None:
                return self._again(attempt, Reason.BLOB_MISSING, Recovery.REFETCH_NO_CACHE, lease)
            return received
        try:
            part = self._decoded(received.part, lease)
        except Undecodable:
            if received.resumed_from and attempt.restarts < self._settings.restarts:
                return self._again(attempt, Reason.UNDECODABLE, Recovery.DISCARD, lease)
            self._storage.parts.discard(self._wish.key, lease.fence)
            raise
        wrong = broken_promise(part, self._wish.expected)
        if wrong is None:
            return replace(received, part=part)
        self._storage.blobs.quarantine(part)
        if received.resumed_from and attempt.restarts < self._settings.restarts:
            return self._again(attempt, Reason.DIGEST_MISMATCH, Recovery.DISCARD, lease)
        self._storage.parts.discard(self._wish.key, lease.fence)
        msg = f"{part.state.url}: the bytes hash to {part.digest}, expected was {wrong}"
        raise IntegrityError(msg)

    def _again(self, attempt: _Attempt, reason: Reason, then: Recovery, lease: Lease) -> _Attempt:
        if attempt.restarts >= self._settings.restarts:
            msg = f"{self._wish.url}: the answer was refused and STREAMING_RESTARTS is spent"
            raise AnswerRefused(msg, reason=str(reason))
        if then is Recovery.DISCARD:
            self._storage.parts.discard(self._wish.key, lease.fence)
        return replace(
            attempt, mode=Recovery.NONE if then is Recovery.ORIGINAL else then, restarts=attempt.restarts + 1
        )

    def _decoded(self, part: CompletePart, lease: Lease) -> CompletePart:
        """Return the part without the codings that nobody asked for (R34)."""
        state = part.state
        if not state.content_encoding or self._wish.expected == part.digest:
            return part
        if state.coding_is_content and coded_twice(part.chunks(), state.content_encoding):
            part = replace(part, state=replace(state, coding_is_content=False))
        if not part.state.to_decode:
            return part
        return self._storage.parts.decode(part, self._wish.key, lease.fence, self._settings.max_size)

    # -- publish, name, complete -----------------------------------------------------------

    def _store(self, lease: Lease, granted: Granted, received: _Received) -> dict[str, Any]:
        blobs, part = self._storage.blobs, received.part
        previous, reason = granted.known, received.reason
        if part is None:
            assert received.known is not None
            known, stamp = received.known, received.known.stamp
        else:
            known, stamp = known_of(part, self._wish.expected), blobs.publish(part).stamp
        if previous is not None and previous.digest == known.digest:
            known = replace(known, name=previous.name)
            reason = reason if part is None else Reason.UNCHANGED_CONTENT
        self._claims.assure(lease)
        digest = Digest.parse(known.digest)
        named = blobs.name(digest, self._wish.path, stamp=stamp, recorded=known.name, part=part)
        known = replace(known, stamp=named.stamp, name=RecordedName(named.path, named.own_stamp))
        completion = self._complete(lease, known, received, named.path)
        self._storage.parts.discard(self._wish.key, lease.fence)
        if known.stamp is not None:
            now = blobs.renew_stamp(digest, known.stamp)  # unlinking the part changed it
            if now is not None and now != known.stamp:
                self._storage.jobs.note_blob(known.digest, now)
        status = "uptodate" if part is None else "downloaded"
        return self._entry(named.path, status, reason, completion, received.resumed_from)

    def _complete(
        self, lease: Lease, known: StoredRepresentation, received: _Received, path: str
    ) -> Completion:
        """Return the recorded completion; what ``gc`` is just collecting is published again."""
        self._claims.end(lease)
        for left in reversed(range(GOING_TRIES)):
            try:
                return self._storage.jobs.complete(
                    lease, known, resumed_from=received.resumed_from, path=path
                ).result()
            except BlobGoing:
                if received.part is None or not left:
                    raise
            time.sleep(GOING_PAUSE)
            self._storage.blobs.publish(received.part)
        raise lease_lost(lease)

    def _entry(
        self, path: str, status: str, reason: Reason, completion: Completion, resumed_from: int = 0
    ) -> dict[str, Any]:
        known = completion.known
        etag = known.validators.etag
        return {
            "url": self._wish.url,
            "path": path,
            "checksum": known.digest.removeprefix("sha256:"),
            "status": status,
            "digest": known.digest,
            "size": known.size,
            "resumed_from": resumed_from,
            "reason": str(reason),
            "media_type": known.media_type,
            "etag": None if etag is None else str(etag),
            "last_modified": known.validators.last_modified,
            "proof": str(known.proof) or None,
            "completion_id": completion.completion_id,
        }


class _BadStatus(AnswerRefused):
    """The server says that there is no file; ``wait`` is when it wants to be asked again, in seconds."""

    def __init__(self, url: str, status: int, wait: float | None) -> None:
        super().__init__(f"{url}: the server answers with status {status}", reason=f"bad-status-{status}")
        self.permanent = status in PERMANENT
        self.wait = wait


def _pause(stuck: int) -> float:
    """Return how long to wait after so many tries that gained nothing: with jitter, doubled each time."""
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (stuck - 1))
    return longest / 2 + random.uniform(0, longest / 2)  # noqa: S311 - jitter is no secret


class _Try:
    """One request and what becomes of its answer."""

    def __init__(
        self, wish: Wish, storage: Storage, settings: StreamingSettings, claims: Claims, lease: Lease
    ) -> None:
        self._wish = wish
        self._storage = storage
        self._settings = settings
        self._claims = claims
        self._lease = lease
        self._writer: PartWriter | None = None

    def run(self, attempt: _Attempt, known: StoredRepresentation | None) -> _Received | _Attempt:
        """Return the whole representation, or what the next try builds on; raise what no try would mend."""
        self._claims.assure(self._lease)
        plan, whole = self._plan(attempt, known)
        if whole is not None:
            return _Received(None, whole, plan.reason, whole.length)
        kept = plan.part.length if isinstance(plan, Resume | ConfirmWhole) else 0
        attempt = replace(attempt, kept=kept)
        try:
            answer = self._wish.client.get(
                self._wish.url, {**ALWAYS, **plan.fields()}, self._settings.stall_timeout
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
        self, attempt: _Attempt, known: StoredRepresentation | None
    ) -> tuple[Plan, CompletePart | None]:
        """Return what to ask for, with the part opened and verified, and the whole part if there is one."""
        mode = attempt.mode
        if mode is Recovery.NONE and attempt.changes >= UNSTABLE_AFTER:
            mode = Recovery.SINGLE_SHOT
        if mode in (Recovery.NONE, Recovery.CONFIRM, Recovery.PROBE) and not self._settings.resume_enabled:
            return Fetch(Reason.RESUME_OFF), None
        parts, fence = self._storage.parts, self._lease.fence
        for stored in parts.find(self._wish.key):
            if stored.name.fence > fence:
                continue
            fresh = self._wish.expected is not None or self._is_fresh(stored.written_at)
            plan = plan_part(stored.state, self._asking(stored.state.url), known, mode, fresh=fresh)
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
        return self._plan_without(known, mode), None

    def _asking(self, url: str) -> PlannedRequest:
        """Return what is asked, as far as it is known: what selects is judged with the answer."""
        verifies = self._settings.unvalidated_resume == "verify" and self._wish.expected is not None
        return PlannedRequest(url, {}, self._settings.weak_validators == "accept", verifies)

    def _plan_without(self, known: StoredRepresentation | None, mode: Recovery) -> Plan:
        """Return the plan where no part is."""
        if known is None:
            return plan_request(None, None, self._asking(""), mode)
        foreseen = replace(known, vary=(), selecting=selecting_key((), {}))
        return _with_known(plan_request(None, foreseen, self._asking(known.final_url), mode), known)

    def _is_fresh(self, written_at: float) -> bool:
        now = time.time()
        before = {"always": math.inf, "never": None}.get(self._settings.revalidate, now - FRESH_DAYS * 86400)
        return is_recent(written_at, before, now)

    def _judged(self, attempt: _Attempt, plan: Plan, answer: Answer) -> _Received | _Attempt:
        if not self._settings.allow_private_addresses:
            peer = answer.peer()
            if peer is None or not is_public(peer):
                raise AddressRefused(peer or "a server whose address is not known", answer.url)
        asked = SentRequest(answer.asked or {}, self._wish.url, decodable=decodable())
        outcome = judge_response(plan, answer.head, asked)
        logger.debug(
            "streaming_resume_decision reason=%s url=%s job=%s fence=%d status=%d",
            outcome.reason, answer.url, self._wish.key[:12], self._lease.fence, answer.status,
        )  # fmt: skip
        if attempt.unmarked is not None and not end_is_open(outcome):
            attempt = replace(attempt, unmarked=None)
        if met_another(plan, outcome):
            attempt = replace(attempt, changes=attempt.changes + 1)
        match outcome:
            case Append() | Replace():
                return self._receive(attempt, answer, outcome)
            case Unchanged(known, reason):
                return _Received(known, None, reason)
            case AlreadyWhole():
                return self._whole(attempt, outcome)
            case PassOn():
                return self._bad_status(attempt, answer)
            case Refuse(reason, then):
                return self._refused(attempt, answer.url, reason, then)

    def _receive(self, attempt: _Attempt, answer: Answer, outcome: Append | Replace) -> _Received | _Attempt:
        writer = self._open_part(outcome)
        folders = (self._storage.parts.directory, *self._storage.blobs.folders)
        terms = replace(
            terms_of(self._settings, CHUNK, *folders),
            expected=self._wish.expected is not None,
            unmarked=attempt.unmarked,
            progress=self._wish.progress,
            assure=lambda: self._claims.assure(self._lease),
        )
        reception = Reception(answer, outcome, writer, terms)
        resumed = outcome.state.length if isinstance(outcome, Append) else 0
        try:
            return _Received(None, reception.run(), outcome.reason, resumed)
        except BodyIncomplete as error:
            self._storage.parts.keep_longest(self._wish.key, self._lease.fence)
            if error.kept > attempt.kept:
                logger.info("broke off with %d bytes kept, going on: %s", error.kept, error)
                return replace(attempt, mode=Recovery.NONE, stuck=0)
            return self._stuck(attempt, error)
        except EndUnmarked as error:
            following = self._refused(attempt, answer.url, Reason.CLOSE_DELIMITED, Recovery.PROBE)
            return replace(following, unmarked=error.sha256)
        except AnswerRefused as error:
            return self._after_refused_body(attempt, error)

    def _after_refused_body(self, attempt: _Attempt, error: AnswerRefused) -> _Attempt:
        """Return the next try after a body that is not what its head said (R64, R74)."""
        if error.reason not in _OF_THIS_ANSWER:
            raise error
        if error.reason == Reason.SLICE_DIGEST_MISMATCH and not attempt.odd_pieces:
            return replace(attempt, odd_pieces=1, mode=Recovery.NONE)
        return self._refused(attempt, self._wish.url, Reason(error.reason), Recovery.REFETCH)

    def _open_part(self, outcome: Append | Replace) -> PartWriter:
        writer, self._writer = self._writer, None
        if isinstance(outcome, Replace):
            if writer is not None:
                writer.close()
            return self._storage.parts.create(self._wish.key, self._lease.fence, outcome.state)
        assert writer is not None
        return writer

    def _whole(self, attempt: _Attempt, outcome: AlreadyWhole) -> _Received | _Attempt:
        """Take up the part that a 304 (R7, R49, R50) or a 416 (R33) confirmed to be whole."""
        writer, self._writer = self._writer, None
        if writer is None:
            return self._refused(attempt, self._wish.url, Reason.CORRUPT_PART, Recovery.REFETCH)
        state = outcome.state
        if outcome.reason is Reason.PROBED_WHOLE:
            state = replace(state, proof=Proof.LENGTH)
        writer.describe(state)
        part = writer.finish()
        return _Received(None, part, outcome.reason, part.length)

    # -- what follows ----------------------------------------------------------------------

    def _stuck(self, attempt: _Attempt, error: StreamingError) -> _Attempt:
        """Return the same try again, later; raise *error* if that was done often enough."""
        if attempt.stuck + 1 >= self._settings.max_attempts:
            raise error
        logger.info("gained nothing, trying again (%d): %s", attempt.stuck + 1, error)
        return replace(attempt, stuck=attempt.stuck + 1, mode=Recovery.NONE)

    def _bad_status(self, attempt: _Attempt, answer: Answer) -> _Attempt:
        wait = retry_after(answer.fields.get("retry-after", ()), time.time())
        error = _BadStatus(answer.url, answer.status, wait)
        if answer.status not in PASSING or (wait is not None and wait > LONGEST_ASKED):
            raise error
        following = self._stuck(attempt, error)
        if wait is not None:
            time.sleep(wait)
        return following

    def _refused(self, attempt: _Attempt, url: str, reason: Reason, then: Recovery) -> _Attempt:
        """Return the try that follows a refused answer, within the restart budget."""
        if then is Recovery.FAIL or attempt.restarts >= self._settings.restarts:
            why = "no other request would help" if then is Recovery.FAIL else "STREAMING_RESTARTS is spent"
            msg = f"{url}: the answer was refused and {why}"
            raise AnswerRefused(msg, reason=str(reason))
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if then is Recovery.DISCARD:
            self._storage.parts.discard(self._wish.key, self._lease.fence)
        logger.info("refused (%s), asking again (%s): %s", reason, then, url)
        return replace(
            attempt, mode=Recovery.NONE if then is Recovery.ORIGINAL else then, restarts=attempt.restarts + 1
        )


def _with_known(plan: Plan, known: StoredRepresentation | None) -> Plan:
    """Return the plan with what is known as it is: what selects it is judged with the answer."""
    match plan:
        case Resume() | ConfirmWhole() | PublishPart() | Fetch():
            return plan
        case _:
            return plan if known is None else replace(plan, known=known)
