"""Writes and errors that several verbs have in common.

What may live here: parts of verbs; each runs inside the transaction of the verb that calls it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any, Final

from sqlalchemy import exists, not_, select, update

from scrapy_streaming.exceptions import BlobGoing, IntegrityError, LeaseLost
from scrapy_streaming.protocol.jobs import JobState, Lease, StoredRepresentation
from scrapy_streaming.storage.ledger.prepared import Session
from scrapy_streaming.storage.ledger.schema import job, meta
from scrapy_streaming.storage.ledger.statements import Statements

#: Keys in one statement; PostgreSQL accepts 65,535 values at most.
KEYS_AT_ONCE: Final = 10_000


def lease_lost(lease: Lease) -> LeaseLost:
    """Return the error for a claim that is not the job's current one."""
    return LeaseLost(f"job {lease.job_key}: the claim with fence {lease.fence} is no longer current")


def portions(keys: Collection[str]) -> Iterator[list[str]]:
    """Yield *keys* in lists of at most ``KEYS_AT_ONCE``."""
    ordered = list(keys)
    return (ordered[start : start + KEYS_AT_ONCE] for start in range(0, len(ordered), KEYS_AT_ONCE))


def dated_back(session: Session, lease: Lease, stored_at: float, done_at: float) -> float:
    """Record *stored_at*, when another program stored the file, as the time the job was done; return it.

    For a time in the future *done_at* stays, and is returned (I14). It stays in the job's own row, too, if an
    older copy of the ledger was put back after *stored_at*: what is older is requested again (I16).
    """
    if stored_at >= done_at:
        return done_at
    put_back = exists().where(meta.c.put_back_at >= stored_at)
    earlier = update(job).where(job.c.id == lease.job_id, not_(put_back)).values(finished_at=stored_at)
    session.connection.execute(earlier)
    return stored_at


def blob_refused(session: Session, run: Statements, known: StoredRepresentation) -> Exception:
    """Return why a blob cannot be recorded: ``IntegrityError`` or ``BlobGoing``."""
    row = session.run(run.blob, new_digest=known.digest)
    if row.size != known.size:
        msg = f"blob {known.digest} is recorded with {row.size} bytes, not with {known.size}"
        return IntegrityError(msg, reason="length-mismatch")
    msg = f"blob {known.digest} is being deleted by gc; publish it again"
    return BlobGoing(msg)


def record_representation(session: Session, run: Statements, row: Any, known: StoredRepresentation) -> None:
    """Record the bytes as the URL's representation."""
    validators = known.validators
    session.run(
        run.put_representation,
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


def ended_before(session: Session, lease: Lease, to: JobState) -> bool:
    """Return whether this claim ended in *to* by a COMMIT whose answer did not arrive (ledger rule 4).

    A fence belongs to one claim: if the job has it and is in *to*, that claim ended it. The next claim has
    the next fence, and records in ``taken_from`` the state that it found.
    """
    if not session.again:
        return False
    row = session.connection.execute(
        select(job.c.state, job.c.taken_from, job.c.fence).where(job.c.id == lease.job_id)
    ).one_or_none()
    if row is None:
        return False
    return (row.fence, row.state) == (lease.fence, to) or (row.fence, row.taken_from) == (lease.fence + 1, to)
