"""What several verbs write, or raise, in the same way.

Parts of verbs only: each runs inside the transaction of the verb that calls it.
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

#: Keys in one statement: PostgreSQL takes 65,535 values at most.
KEYS_AT_ONCE: Final = 10_000


def lease_lost(lease: Lease) -> LeaseLost:
    """Return the error of a claim that is not the current one any more."""
    return LeaseLost(f"job {lease.job_key}: the claim with fence {lease.fence} no longer holds it")


def portions(keys: Collection[str]) -> Iterator[list[str]]:
    """Return *keys* in portions that a statement takes."""
    ordered = list(keys)
    return (ordered[start : start + KEYS_AT_ONCE] for start in range(0, len(ordered), KEYS_AT_ONCE))


def dated_back(session: Session, lease: Lease, stored_at: float, done_at: float) -> float:
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


def blob_refused(session: Session, run: Statements, known: StoredRepresentation) -> Exception:
    """Return why a blob cannot be recorded: ``IntegrityError`` or ``BlobGoing``."""
    row = session.run(run.blob, new_digest=known.digest)
    if row.size != known.size:
        msg = f"blob {known.digest} is recorded with {row.size} bytes, not with {known.size}"
        return IntegrityError(msg, reason="length-mismatch")
    msg = f"blob {known.digest} is just being collected; publish it again"
    return BlobGoing(msg)


def record_representation(session: Session, run: Statements, row: Any, known: StoredRepresentation) -> None:
    """Record the bytes as what the URL represents now."""
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
    """Return whether this claim ended in *to* by a COMMIT whose answer was lost (ledger rule 4).

    A fence is one claim's, so a job that has it and is not leased was ended by that claim; the
    next claim records the state that it found.
    """
    if not session.again:
        return False
    row = session.connection.execute(
        select(job.c.state, job.c.taken_from, job.c.fence).where(job.c.id == lease.job_id)
    ).one_or_none()
    if row is None:
        return False
    return (row.fence, row.state) == (lease.fence, to) or (row.fence, row.taken_from) == (lease.fence + 1, to)
