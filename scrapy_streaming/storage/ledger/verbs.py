"""What each verb of the ledger does: commands for the writer, each within its transaction.

They decide and assemble; the SQL that every download runs is in ``statements``. The rules cited
are those of the ledger's design.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Connection,
    and_,
    bindparam,
    case,
    exists,
    func,
    insert,
    literal,
    not_,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import Insert  # SQLite understands it too

from scrapy_streaming.exceptions import BlobGoing, IntegrityError, KeyConflict, LeaseLost
from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.jobs import (
    SKEW,
    Claim,
    Completion,
    Dead,
    Done,
    Granted,
    Held,
    JobEvent,
    JobState,
    Lease,
    RecordedName,
    StoredRepresentation,
    Waiting,
)
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.redaction import url_without_userinfo
from scrapy_streaming.storage.job_request import JobRequest
from scrapy_streaming.storage.ledger import statements as sql
from scrapy_streaming.storage.ledger.prepared import Session
from scrapy_streaming.storage.ledger.records import (
    Standing,
    damaged_row,
    safe_error,
)
from scrapy_streaming.storage.ledger.schema import completion, event, job, meta, worker, worker_number
from scrapy_streaming.storage.ledger.statements import Statements, WorkerIdentity

#: Seconds of the first back-off at most.
BACKOFF_FIRST: Final = 5.0

#: ``Dead.error`` of a job none of whose claims was ended by its worker.
NO_WORD: Final = "every claim of this job ended without a word from its worker"


def backoff(attempts: int, rng: random.Random) -> float:
    """Return the seconds to wait after *attempts* claims: exponential, with full jitter.

    Between 0 and ``BACKOFF_FIRST`` doubled for each attempt, at most ``BACKOFF_MAX`` (M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog).
    """
    doublings = min(max(attempts - 1, 0), 30)
    return rng.uniform(0.0, min(sql.BACKOFF_MAX, BACKOFF_FIRST * 2**doublings))


@dataclass(frozen=True, slots=True)
class LedgerContext:
    """What the verbs work with: who asks, the compiled statements, whether events are recorded."""

    asker: WorkerIdentity
    run: Statements
    events: bool

    def record(self, session: Session, lease: Lease, origin: str | None, to: JobState, at: float) -> None:
        """Append to the history of a job what its claim did to it."""
        if self.events:
            session.run(
                self.run.put_event,
                job_id=lease.job_id,
                fence=lease.fence,
                claim_id=lease.claim_id,
                worker=self.asker.number,
                from_state=origin,
                to_state=to.value,
                at=at,
            )


# -- claim ----------------------------------------------------------------------------------


def claim(
    session: Session,
    tools: LedgerContext,
    key: str,
    request: JobRequest,
    claim_id: str,
    terms: Mapping[str, Any],
) -> Claim:
    """Return what asking for the job on *terms* gives; see ``Ledger.claim``."""
    row = session.run(
        tools.run.claim,
        job_key=key,
        request_hash=request.request_hash,
        work_id=request.work_id,
        artifact_id=request.artifact_id,
        url=request.url,
        url_key=request.url_key,
        claim_id=claim_id,
        **_repeat_columns(request),
        **terms,
    )
    if row is None:
        return _refused(session, tools, key, request, claim_id)
    _check_row(row, key, request)
    lease = Lease(row.id, key, row.fence, claim_id, row.lease_until, row.generation)
    tools.record(session, lease, row.taken_from, JobState.LEASED, row.updated_at)
    return _grant(session, tools, lease, request, row)


def _repeat_columns(request: JobRequest) -> dict[str, Any]:
    """Return what is stored of how to repeat a request, no more than there is need for."""
    repeat = request.repeat
    if repeat is None:
        return {"plain": None, "asked_url": None, "asked_name": None}
    url = None if repeat.url == request.url else repeat.url
    return {"plain": repeat.plain, "asked_url": url, "asked_name": repeat.name}


def _check_row(row: Any, key: str, request: JobRequest) -> None:
    """Raise ``LedgerError`` (``ledger-row``) unless a job's row is what it is asked for by.

    The key is made of the other three, so a row that was found by it says the same.
    """
    asked = (key, *(text.replace("\0", "\ufffd") for text in _asked_texts(request)))
    for name, wanted in zip(sql.ASKED_FOR, asked, strict=True):
        if getattr(row, name) != wanted:
            raise damaged_row(key, f"its {name} is another")


def _asked_texts(request: JobRequest) -> tuple[str, str, str]:
    return request.work_id, request.artifact_id, request.url


@contextmanager
def reading_job(key: str) -> Iterator[None]:
    """Raise ``LedgerError`` (``ledger-row``) for what cannot be read in the rows of a job."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise damaged_row(key, error) from error


def _grant(session: Session, tools: LedgerContext, lease: Lease, request: JobRequest, row: Any) -> Granted:
    """Return the grant with what is known of the URL, and what the job was completed with before."""
    previous = None
    with reading_job(lease.job_key):
        if lease.generation > 1:
            previous = session.run(tools.run.completion, job_id=lease.job_id, generation=lease.generation - 1)
        return Granted(
            lease,
            _known_of(session, tools, request, row),
            row.taken_from == JobState.LEASED,
            None if previous is None else as_completion(previous),
        )


def _refused(session: Session, tools: LedgerContext, key: str, request: JobRequest, claim_id: str) -> Claim:
    """Say why the job cannot be taken; bury it if its last attempt ran out (I13)."""
    with reading_job(key):
        row = session.run(tools.run.job, job_key=key)
        if row is None:
            raise damaged_row(key, "its row is not found under its key")
        state = JobState(row.state)
    if row.request_hash != request.request_hash:
        if not request.artifact_id:  # a plain GET of its URL: there is no other request for it
            raise damaged_row(key, "its request_hash is another")
        msg = f"job {key} is taken by another request for {row.url}; give this one its own artifact id"
        raise KeyConflict(msg)
    _check_row(row, key, request)
    match state:
        case JobState.LEASED if row.claim_id == claim_id:  # granted by a COMMIT whose answer was lost
            lease = Lease(row.id, key, row.fence, claim_id, row.lease_until, row.generation)
            return _grant(session, tools, lease, request, row)
        case JobState.LEASED:
            exhausted = row.attempts >= tools.asker.max_attempts
            dead = _exhaust(session, tools, row) if exhausted else None
            return dead or Held(row.worker_name or str(row.worker), row.lease_until)
        case JobState.READY | JobState.FAILED:
            # failed is always claimable: where writers run side by side it may fail just now
            return Waiting(row.not_before or 0.0, row.error or "")
        case JobState.DONE:
            with reading_job(key):
                done = session.run(tools.run.completion, job_id=row.id, generation=row.generation)
                if done is None:
                    raise damaged_row(key, "it is done, and its completion or its blob is not recorded")
                return Done(as_completion(done))
        case JobState.DEAD:
            return Dead(row.attempts, row.error or "")


def _exhaust(session: Session, tools: LedgerContext, row: Any) -> Dead | None:
    """Return ``Dead`` if the lease in *row* is over; ``None`` if its holder may still write."""
    asker = tools.asker
    dead = session.connection.execute(
        update(job)
        .where(
            job.c.id == row.id,
            sql.in_state(JobState.LEASED),
            job.c.fence == row.fence,
            job.c.begun,  # else it may be taken: its lease has run out since the claim looked
            sql.expired(asker),
        )
        .values(
            sql.changed(JobEvent.EXHAUST)
            | {
                "error_code": "attempts-exhausted",
                "error": func.coalesce(job.c.error, NO_WORD),
                "finished_at": asker.now,
                "updated_at": asker.now,
            }
        )
        .returning(job.c.attempts, job.c.error, job.c.updated_at)
    ).one_or_none()
    if dead is None:
        return None
    lost = Lease(row.id, row.job_key, row.fence, row.claim_id, row.lease_until, row.generation)
    tools.record(session, lost, JobState.LEASED, JobState.DEAD, dead.updated_at)
    return Dead(dead.attempts, dead.error)


def free(session: Session, asker: WorkerIdentity, keys: Collection[str]) -> frozenset[str]:
    """Return those of *keys* whose job nobody holds by a lease that still runs."""
    held: set[str] = set()
    for some in _portions(keys):
        statement = select(job.c.job_key).where(
            job.c.job_key.in_(some), sql.in_state(JobState.LEASED), not_(sql.expired(asker))
        )
        held.update(session.connection.execute(statement).scalars())
    return frozenset(keys) - held


def _portions(keys: Collection[str], size: int = 10_000) -> Iterator[list[str]]:
    """Return *keys* in portions that a statement takes: PostgreSQL's have 65,535 values at most."""
    ordered = list(keys)
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


# -- what is known --------------------------------------------------------------------------


def _known_of(
    session: Session, tools: LedgerContext, request: JobRequest, job_row: Any
) -> StoredRepresentation | None:
    """Return the stored representation of a URL, if its blob is there, and the job's name for it."""
    last = job_row.generation - 1  # the generation before that of the claim
    row = session.run(tools.run.known, url_key=request.url_key, job_id=job_row.id, generation=last)
    return None if row is None else _known(row, row.final_url or request.url, row.fetched_at)


def _known(row: Any, final_url: str, fetched_at: float) -> StoredRepresentation:
    _check_size(row)
    return StoredRepresentation(
        digest=row.digest,
        size=row.size,
        validators=Validators(
            EntityTag.parse(row.etag) if row.etag is not None else None, row.last_modified, row.date
        ),
        final_url=final_url,
        media_type=row.media_type,
        vary=tuple(json.loads(row.vary)),
        selecting=row.selecting,
        fetched_at=fetched_at,
        proof=row.proof,
        stamp=row.stamp,
        name=_name(row),
    )


def _check_size(row: Any) -> None:
    """Raise ``ValueError`` if a record of bytes and that of their blob disagree about their number."""
    if row.size != row.blob_size:
        msg = f"{row.size} bytes here, {row.blob_size} in the record of blob {row.digest}"
        raise ValueError(msg)


def _name(row: Any) -> RecordedName | None:
    return None if row.path is None else RecordedName(row.path, row.name_stamp)


def as_completion(row: Any) -> Completion:
    """Return a completion: digest and size are its own, the rest is the representation's.

    If that has since become another one, nothing is said about validators, and of the selecting
    fields only which they are: what was selected is not known any more (R40).
    """
    _check_size(row)
    if row.represents != row.digest:
        known = StoredRepresentation(
            row.digest,
            row.size,
            Validators(),
            row.url,
            vary=tuple(json.loads(row.vary or "[]")),
            fetched_at=row.completed_at,
            stamp=row.stamp,
            name=_name(row),
        )
    else:
        known = _known(row, row.final_url or row.url, row.completed_at)
    return Completion(
        row.claim_id, known, row.completed_at, row.job_id, row.generation, row.path, row.by_response
    )


# -- complete -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stored:
    """How a blob came to be and what it is called; see ``Ledger.complete``."""

    resumed_from: int
    path: str | None
    by_response: bool


def complete(
    session: Session, tools: LedgerContext, lease: Lease, known: StoredRepresentation, stored: Stored
) -> Completion:
    """Record that the job is done, all of it or nothing (ledger rule 3); see ``Ledger.complete``."""
    put = session.run(tools.run.put_blob, new_digest=known.digest, new_size=known.size, new_stamp=known.stamp)
    row = session.run(tools.run.complete, new_digest=known.digest, new_size=known.size, **sql.held(lease))
    if row is None:
        session.undo()  # the blob: nothing changes under a stale claim, nor by asking again
        return _recorded(session, tools, lease)
    if put is None:
        refuse_blob(session, tools, known)
    at = row.finished_at
    if known.stored_at is not None:
        at = _dated_back(session, lease, known.stored_at, at)
    final_url = url_without_userinfo(known.final_url)
    name_stamp = None if known.name is None else known.name.stamp
    name = None if stored.path is None else RecordedName(stored.path, name_stamp)
    known = replace(known, final_url=final_url, fetched_at=at, name=name)
    _record_representation(session, tools, row, known)
    session.run(
        tools.run.put_completion,
        job_id=lease.job_id,
        generation=row.generation,
        fence=lease.fence,
        claim_id=lease.claim_id,
        worker=tools.asker.number,
        digest=known.digest,
        size=known.size,
        resumed_from=stored.resumed_from,
        path=stored.path,
        completed_at=at,
        stamp=None if name is None else name.stamp,
        by_response=stored.by_response,
    )
    tools.record(session, lease, JobState.LEASED, JobState.DONE, at)
    return Completion(
        lease.claim_id, known, at, lease.job_id, row.generation, stored.path, stored.by_response
    )


def _dated_back(session: Session, lease: Lease, stored_at: float, done_at: float) -> float:
    """Have a job count as done when another program stored its file; return that time.

    The time at which it was really done, *done_at*, counts for a file of the future (I14), and for the
    job in a ledger that was put back since: what it calls done before is asked of the server again (I16).
    """
    if stored_at >= done_at:
        return done_at
    put_back = exists().where(meta.c.put_back_at >= stored_at)
    earlier = update(job).where(job.c.id == lease.job_id, not_(put_back)).values(finished_at=stored_at)
    session.connection.execute(earlier)
    return stored_at


def _recorded(session: Session, tools: LedgerContext, lease: Lease) -> Completion:
    """Return what this very claim recorded before: its answer may have been lost (ledger rule 4)."""
    with reading_job(lease.job_key):
        row = session.run(tools.run.completion, job_id=lease.job_id, generation=lease.generation)
        if row is None or row.claim_id != lease.claim_id:
            raise lost(lease)
        return as_completion(row)


def refuse_blob(session: Session, tools: LedgerContext, known: StoredRepresentation) -> None:
    """Raise why a blob cannot be recorded."""
    row = session.run(tools.run.blob, new_digest=known.digest)
    if row.size != known.size:
        msg = f"blob {known.digest} is recorded with {row.size} bytes, not with {known.size}"
        raise IntegrityError(msg, reason="length-mismatch")
    msg = f"blob {known.digest} is just being collected; publish it again"
    raise BlobGoing(msg)


def _record_representation(
    session: Session, tools: LedgerContext, row: Any, known: StoredRepresentation
) -> None:
    """Record the bytes as what the URL stands for now."""
    validators = known.validators
    session.run(
        tools.run.put_representation,
        url_key=row.url_key,
        final_url=None if known.final_url == row.url else known.final_url,
        digest=known.digest,
        size=known.size,
        etag=None if validators.etag is None else str(validators.etag),
        last_modified=validators.last_modified,
        date=validators.date,
        media_type=known.media_type,
        vary=json.dumps(known.vary),
        selecting=known.selecting,
        fetched_at=known.fetched_at,
        proof=known.proof,
    )


def begin_work(session: Session, tools: LedgerContext, lease: Lease, *, unlike: bool) -> None:
    """Note that the claim's work began: from here on it counts as an attempt.

    *unlike*: the request is sent with what a plain GET would not have.
    """
    statement = tools.run.begin_unlike if unlike else tools.run.begin
    if session.run(statement, **sql.held(lease)) is None:
        raise lost(lease)


def note_blob(session: Session, tools: LedgerContext, digest: str, stamp: bytes) -> None:
    """Note the stamp of a blob's file, unless the blob is not present any more (R77)."""
    session.run(tools.run.note_blob, of_digest=digest, new_stamp=stamp)


def note_name(session: Session, tools: LedgerContext, place: tuple[int, int], name: RecordedName) -> None:
    """Note the name that the bytes of a completion (job, generation) have now."""
    job_id, generation = place
    values = {"new_path": name.path, "new_stamp": name.stamp}
    session.run(tools.run.note_name, of_job=job_id, of=generation, **values)


# -- the other ends of a claim --------------------------------------------------------------


def lost(lease: Lease) -> LeaseLost:
    """Return the error of a claim that is not the current one any more."""
    return LeaseLost(f"job {lease.job_key}: the claim with fence {lease.fence} no longer holds it")


def _ended_by(session: Session, lease: Lease, *ways: JobState) -> bool:
    """Whether this claim ended in one of *ways*: by a COMMIT whose answer was lost (ledger rule 4).

    A fence is one claim's, so a job that has it and is not leased was ended by that claim; the
    next claim notes what it found.
    """
    if not session.again:
        return False
    row = session.connection.execute(
        select(job.c.state, job.c.taken_from, job.c.fence).where(job.c.id == lease.job_id)
    ).one_or_none()
    if row is None:
        return False
    return (row.fence, row.state) in {(lease.fence, way) for way in ways} or (
        (row.fence, row.taken_from) in {(lease.fence + 1, way) for way in ways}
    )


def release(session: Session, tools: LedgerContext, lease: Lease) -> None:
    """Give the job back as if it had not been claimed, but for the fence."""
    row = session.run(tools.run.release, **sql.held(lease))
    if row is None:
        if _ended_by(session, lease, JobState.READY):
            return
        raise lost(lease)
    tools.record(session, lease, JobState.LEASED, JobState.READY, row.updated_at)


@dataclass(frozen=True, slots=True)
class Failure:
    """How a claim failed: ``retry_after`` in seconds, from the server; see ``Ledger.fail``."""

    error_code: str
    error: str
    permanent: bool
    retry_after: float | None
    progress: bool


def fail(session: Session, tools: LedgerContext, lease: Lease, failure: Failure, rng: random.Random) -> None:
    """Record a failure: for good, or until a back-off is over (ledger rule 9)."""
    asker = tools.asker
    alive = session.run(tools.run.alive, **sql.held(lease))
    if alive is None:
        if _ended_by(session, lease, JobState.FAILED if failure.permanent else JobState.READY):
            return
        raise lost(lease)
    values: dict[str, Any] = {
        "error_code": failure.error_code,
        "error": safe_error(failure.error),
        "updated_at": asker.now,
    }
    if failure.progress:
        values["attempts"] = 0
    if failure.permanent:
        values |= sql.changed(JobEvent.FAIL_PERMANENT) | {"finished_at": asker.now}
    else:
        delay = _delay(alive.attempts, failure, rng)
        values |= sql.changed(JobEvent.FAIL_TRANSIENT) | {
            "not_before": asker.now + delay,
            "not_before_by": asker.number,
            "not_before_server": failure.retry_after is not None,
        }
    statement = update(job).where(sql.guard()).values(values).returning(job.c.updated_at)
    at = session.connection.execute(statement, sql.held(lease)).scalar_one()
    tools.record(session, lease, JobState.LEASED, JobState(values["state"]), at)


def _delay(attempts: int, failure: Failure, rng: random.Random) -> float:
    if failure.retry_after is not None:
        return min(max(0.0, failure.retry_after), sql.BACKOFF_MAX)
    return backoff(0 if failure.progress else attempts, rng)


# -- leases of a worker ---------------------------------------------------------------------


def renew(session: Session, tools: LedgerContext) -> frozenset[str]:
    """Prolong every lease of this worker; return the claims that it still holds (ledger rule 8)."""
    return frozenset(row.claim_id for row in session.all(tools.run.renew, {}))


def forget_worker(session: Session, asker: WorkerIdentity, name: str) -> int:
    """End the leases of a dead worker now; return how many."""
    number = worker_number(name)
    session.connection.execute(
        update(worker).where(worker.c.id == number, worker.c.ended_at.is_(None)).values(ended_at=asker.now)
    )
    return session.connection.execute(
        update(job).where(job.c.worker == number, sql.in_state(JobState.LEASED)).values(lease_until=asker.now)
    ).rowcount


def register(connection: Connection, asker: WorkerIdentity) -> None:
    """Note that this worker runs."""
    fresh = Insert(worker).values(id=asker.number, name=asker.name, started_at=asker.now)
    connection.execute(fresh.on_conflict_do_nothing(index_elements=[worker.c.id]))


# -- a ledger that is older than its store --------------------------------------------------


def raise_epoch(session: Session, asker: WorkerIdentity, seen: int, unread: bool) -> Standing:
    """Raise the epoch above *seen* and above the ledger's own; return how the ledger stands then.

    A ledger below what its store has *seen* is an older copy, and that is noted. *unread*: note in
    any case that the store is to be read.
    """
    older = meta.c.epoch < bindparam("seen", seen, BigInteger())
    ahead = meta.c.put_back_at > asker.later(SKEW)  # noted by a clock that was wrong (I14)
    change = update(meta).values(
        epoch=case((older, bindparam("seen", seen, BigInteger())), else_=meta.c.epoch) + 1,
        put_back_at=case((or_(older, ahead), asker.now), else_=meta.c.put_back_at),
        unread=case((or_(older, literal(unread)), true()), else_=meta.c.unread),
    )
    row = session.connection.execute(change.returning(meta.c.epoch, meta.c.put_back_at, meta.c.unread)).one()
    return Standing(row.epoch, row.put_back_at, row.unread)


def mark_read(session: Session, seen: int, before: Standing) -> bool:
    """Note that the store has been read; return whether it counts.

    It does not if another copy was put back since *before*, when the reading began.
    """
    same = (meta.c.epoch >= seen, meta.c.put_back_at.is_not_distinct_from(before.put_back_at))
    return session.connection.execute(update(meta).where(*same).values(unread=False)).rowcount == 1


# -- by hand, and to look at ----------------------------------------------------------------


def requeue(session: Session, tools: LedgerContext, keys: Collection[str] | None) -> int:
    """Make failed and dead jobs ready with all their attempts; return how many there were."""
    asker = tools.asker
    ended = or_(sql.in_state(JobState.FAILED), sql.in_state(JobState.DEAD))
    which = [ended] if keys is None else [and_(job.c.job_key.in_(some), ended) for some in _portions(keys)]
    values = sql.changed(JobEvent.REQUEUE, JobState.DEAD) | {
        "attempts": 0,
        "not_before": None,
        "not_before_by": None,
        "not_before_server": False,
        "finished_at": None,
        "taken_from": job.c.state,
        "updated_at": asker.now,
    }
    wanted = (job.c.id, job.c.fence, job.c.taken_from, job.c.updated_at)
    rows: list[Any] = []
    for condition in which:
        rows += session.connection.execute(update(job).where(condition).values(values).returning(*wanted))
    if tools.events and rows:
        about = {"claim_id": None, "worker": asker.number, "to_state": JobState.READY.value}
        session.connection.execute(
            insert(event),
            [
                about | {"job_id": r.id, "fence": r.fence, "from_state": r.taken_from, "at": r.updated_at}
                for r in rows
            ],
        )
    return len(rows)


def delivered(session: Session, asker: WorkerIdentity, completions: Collection[tuple[int, int]]) -> None:
    """Note when the items of completions (job, generation) were first handed on."""
    session.connection.execute(
        update(completion)
        .where(
            completion.c.job_id == bindparam("job"),
            completion.c.generation == bindparam("of"),
            completion.c.delivered_at.is_(None),
        )
        .values(delivered_at=asker.now),
        [{"job": job_id, "of": generation} for job_id, generation in sorted(completions)],
    )
