"""Export of completions from a ledger, and import into another.

What may live here: the bodies of the verbs for both.
"""

from __future__ import annotations

import json
from typing import Any, Final

from sqlalchemy import Select, exists, not_, select, update
from sqlalchemy.dialects.postgresql import Insert  # SQLite understands it too
from sqlalchemy.sql.dml import Update

from scrapy_streaming.exceptions import BlobGoing, IntegrityError
from scrapy_streaming.protocol.jobs import JobState, Lease, job_key
from scrapy_streaming.protocol.portable import Entered, Record
from scrapy_streaming.redaction import url_without_userinfo
from scrapy_streaming.storage.blob_state import BlobState
from scrapy_streaming.storage.job_request import JobRequest
from scrapy_streaming.storage.ledger.commands import LedgerContext
from scrapy_streaming.storage.ledger.prepared import Session
from scrapy_streaming.storage.ledger.recording import blob_refused
from scrapy_streaming.storage.ledger.rows import as_completion, reading_job
from scrapy_streaming.storage.ledger.schema import blob, completion, job, meta, representation

# -- export ---------------------------------------------------------------------------------


def _latest() -> Select[Any]:
    """Return the last completion of each job whose bytes are present, with the job's request."""
    later = completion.alias("later")
    newer = exists().where(
        later.c.job_id == completion.c.job_id, later.c.generation > completion.c.generation
    )
    return (
        select(
            completion,
            completion.c.stamp.label("name_stamp"),
            blob.c.size.label("blob_size"),
            job.c.job_key,
            job.c.work_id,
            job.c.artifact_id,
            job.c.request_hash,
            job.c.url,
            representation.c.digest.label("represents"),
            *(column for column in representation.c if column.name not in ("digest", "size")),
        )
        .join(job, job.c.id == completion.c.job_id)
        .join(blob, blob.c.digest == completion.c.digest)
        .join(representation, representation.c.url_key == job.c.url_key, isouter=True)
        .where(blob.c.state == BlobState.PRESENT.value, not_(newer))
        .order_by(completion.c.job_id)
    )


_LATEST: Final = _latest()


def records(session: Session, after: int, limit: int) -> list[tuple[int, Record]]:
    """Carry out ``Queries.records``."""
    rows = session.connection.execute(_LATEST.where(completion.c.job_id > after).limit(limit))
    return [(row.job_id, _record(row)) for row in rows]


def _record(row: Any) -> Record:
    with reading_job(row.job_key):
        done = as_completion(row)
    represents = row.represents == row.digest
    return Record(
        row.work_id,
        row.artifact_id,
        row.url,
        row.request_hash,
        done,
        row.resumed_from,
        represents,
        row.fetched_at if represents else 0.0,
    )


# -- import ---------------------------------------------------------------------------------


def enter(session: Session, context: LedgerContext, record: Record) -> Entered:
    """Carry out ``Admin.enter``."""
    request = JobRequest(record.work_id, record.artifact_id, record.url, record.request_hash)
    key = job_key(request.work_id, request.artifact_id, request.url)
    there = session.connection.execute(
        select(job).where(job.c.job_key == key).with_for_update()
    ).one_or_none()
    if there is not None:
        refused = _why_not(session, there, record)
        if refused is not None:
            return refused
    try:
        _put_blob(session, context, record)
    except BlobGoing:
        return Entered.BLOB_GOING
    except IntegrityError:
        return Entered.BLOB_SIZE
    lease = _put_job(session, context, key, request, record, there)
    if lease is None:  # another process made it just now
        session.undo()
        return Entered.HELD
    _put_completion(session, context, lease, record)
    if record.represents:
        _put_representation(session, request, record)
    origin = None if there is None else there.state
    context.record(session, lease, origin, JobState.DONE, record.completion.completed_at)
    return Entered.IMPORTED


def _why_not(session: Session, there: Any, record: Record) -> Entered | None:
    """Return why *record* is not imported into the job *there*; ``None`` if it may be."""
    done = record.completion
    if there.request_hash != record.request_hash:
        return Entered.CONFLICT
    if there.state == JobState.LEASED:
        return Entered.HELD
    latest = session.connection.execute(
        select(completion.c.completed_at, completion.c.claim_id)
        .where(completion.c.job_id == there.id)
        .order_by(completion.c.generation.desc())
        .limit(1)
    ).one_or_none()
    if session.again and latest is not None and latest.claim_id == done.completion_id:
        return Entered.IMPORTED  # by a COMMIT whose answer was lost
    ended = (there.finished_at, latest and latest.completed_at)
    newer = [at for at in ended if at is not None and at >= done.completed_at]
    return Entered.KNOWN if newer else None


def _put_blob(session: Session, context: LedgerContext, record: Record) -> None:
    known = record.completion.known
    put = session.run(
        context.statements.put_blob, new_digest=known.digest, new_size=known.size, new_stamp=known.stamp
    )
    if put is None:
        raise blob_refused(session, context.statements, known)


def _put_job(
    session: Session, context: LedgerContext, key: str, request: JobRequest, record: Record, there: Any
) -> Lease | None:
    """Create a done job, or make the job *there* done; return the claim that represents this in its history.

    ``None`` if another process has just created the job.
    """
    done, now = record.completion, context.worker.now
    # what an older copy records as done is requested again (I16); what is imported now must not be
    put_back = select(meta.c.id).where(meta.c.put_back_at >= done.completed_at)
    late = session.connection.execute(put_back).one_or_none() is not None
    values = {
        "state": JobState.DONE.value,
        "digest": done.known.digest,
        "size": done.known.size,
        "finished_at": now if late else done.completed_at,
        "updated_at": now,
        "worker": context.worker.number,
        "attempts": 0,
    }
    if there is None:
        change: Any = _new_job(context, key, request).values(**values, generation=done.generation)
    else:
        change = _done_again(there).values(**values)
    row = session.connection.execute(change.returning(job.c.id, job.c.fence, job.c.generation)).one_or_none()
    if row is None:
        return None
    return Lease(row.id, key, row.fence, done.completion_id, 0.0, row.generation)


def _new_job(context: LedgerContext, key: str, request: JobRequest) -> Insert:
    """Return the INSERT of a job; it returns no row if another process has just created it."""
    fresh = Insert(job).values(
        job_key=key,
        request_hash=request.request_hash,
        work_id=request.work_id,
        artifact_id=request.artifact_id,
        url=request.url,
        url_key=request.url_key,
        fence=1,
        max_attempts=context.worker.max_attempts,
        kept=0,
        begun=True,
        created_at=context.worker.now,
    )
    return fresh.on_conflict_do_nothing(index_elements=[job.c.job_key])


def _done_again(there: Any) -> Update:
    """Return the UPDATE to a job's next fence, and to its next generation if it was done."""
    return (
        update(job)
        .where(job.c.id == there.id)
        .values(
            generation=there.generation + (there.state == JobState.DONE),
            fence=there.fence + 1,
            taken_from=there.state,
            not_before=None,
            not_before_by=None,
            not_before_server=False,
            error_code=None,
            error=None,
        )
    )


def _put_completion(session: Session, context: LedgerContext, lease: Lease, record: Record) -> None:
    done = record.completion
    session.run(
        context.statements.put_completion,
        job_id=lease.job_id,
        generation=lease.generation,
        fence=lease.fence,
        claim_id=lease.claim_id,
        worker=context.worker.number,
        digest=done.known.digest,
        size=done.known.size,
        resumed_from=record.resumed_from,
        path=done.path,
        completed_at=done.completed_at,
        stamp=None if done.known.name is None else done.known.name.stamp,
        by_response=done.by_response,
    )


def _put_representation(session: Session, request: JobRequest, record: Record) -> None:
    """Record the bytes as the URL's representation, unless a newer one is recorded."""
    known = record.completion.known
    final_url, tag = url_without_userinfo(known.final_url), known.validators.etag
    fresh = Insert(representation).values(
        url_key=request.url_key,
        final_url=None if final_url == request.url else final_url,
        digest=known.digest,
        size=known.size,
        etag=None if tag is None else str(tag),
        last_modified=known.validators.last_modified,
        date=known.validators.date,
        media_type=known.media_type,
        vary=json.dumps(known.vary),
        selecting=known.selecting,
        fetched_at=record.fetched_at,
        proof=known.proof,
    )
    newer = {column.name: column for column in fresh.excluded if column.name != "url_key"}
    session.connection.execute(
        fresh.on_conflict_do_update(
            index_elements=[representation.c.url_key],
            set_=newer,
            where=representation.c.fetched_at < fresh.excluded.fetched_at,
        )
    )
