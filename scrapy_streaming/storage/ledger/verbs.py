"""What each verb of the ledger does: commands for the writer, each within its transaction.

They decide and assemble; the SQL that every download runs is in ``statements``. The rules cited
are those of the ledger's design.
"""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import Connection, Row, func, or_, select, update
from sqlalchemy.sql.dml import ReturningInsert, ReturningUpdate

from scrapy_streaming.exceptions import IntegrityError, KeyConflict, LeaseLost
from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.jobs import (
    Claim,
    Completion,
    Dead,
    Done,
    Granted,
    Held,
    JobEvent,
    JobState,
    Known,
    Lease,
    Waiting,
)
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.ledger import statements as sql
from scrapy_streaming.storage.ledger.records import (
    JobRequest,
    JobView,
    safe_error,
    url_without_userinfo,
)
from scrapy_streaming.storage.ledger.schema import blob, job
from scrapy_streaming.storage.ledger.statements import Asker

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


# -- claim ----------------------------------------------------------------------------------


def claim(
    connection: Connection,
    statement: ReturningInsert[Any],
    asker: Asker,
    key: str,
    request: JobRequest,
    terms: Mapping[str, float | None],
) -> Claim:
    """Return what asking for the job on *terms* gives; see ``Ledger.claim``."""
    claim_id = secrets.token_hex(16)
    row = connection.execute(
        statement,
        {
            "job_key": key,
            "request_hash": request.request_hash,
            "work_id": request.work_id,
            "artifact_id": request.artifact_id,
            "url": request.url,
            "url_key": request.url_key,
            "claim_id": claim_id,
            **terms,
        },
    ).one_or_none()
    if row is None:
        return _refused(connection, asker, key, request)
    lease = Lease(row.id, key, row.fence, claim_id, row.lease_until, row.generation)
    return Granted(lease, _known_of(connection, request.url_key))


def _refused(connection: Connection, asker: Asker, key: str, request: JobRequest) -> Claim:
    """Say why the job cannot be taken; bury it if its last attempt ran out (I13)."""
    row = connection.execute(sql.JOB, {"key": key}).one()
    if row.request_hash != request.request_hash:
        msg = f"job {key} is taken by another request for {row.url}; give this one its own artifact id"
        raise KeyConflict(msg)
    match JobState(row.state):
        case JobState.LEASED:
            dead = _exhaust(connection, asker, row) if row.attempts >= asker.max_attempts else None
            return dead or Held(row.worker_id, row.lease_until)
        case JobState.READY | JobState.FAILED:
            # failed is always claimable: where writers run side by side it may fail just now
            return Waiting(row.not_before or 0.0, row.error or "")
        case JobState.DONE:
            which = {"job_id": row.id, "generation": row.generation}
            return Done(_completion(connection.execute(sql.COMPLETION, which).one()))
        case JobState.DEAD:
            return Dead(row.attempts, row.error or "")


def _exhaust(connection: Connection, asker: Asker, row: Row[Any]) -> Dead | None:
    """Return ``Dead`` if the lease in *row* is over; ``None`` if its holder may still write."""
    dead = connection.execute(
        update(job)
        .where(
            job.c.id == row.id,
            sql.in_state(JobState.LEASED),
            job.c.fence == row.fence,
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
        .returning(job.c.attempts, job.c.error)
    ).one_or_none()
    return None if dead is None else Dead(dead.attempts, dead.error)


# -- what is known --------------------------------------------------------------------------


def _known_of(connection: Connection, url_key: str) -> Known | None:
    """Return the stored representation of a URL, if its blob is there."""
    row = connection.execute(sql.KNOWN, {"url_key": url_key}).one_or_none()
    return None if row is None else _known(row, row.fetched_at)


def _known(row: Row[Any], fetched_at: float) -> Known:
    return Known(
        digest=row.digest,
        size=row.size,
        validators=Validators(
            EntityTag.parse(row.etag) if row.etag is not None else None, row.last_modified, row.date
        ),
        final_url=row.final_url,
        media_type=row.media_type,
        vary=tuple(json.loads(row.vary)),
        selecting=row.selecting,
        fetched_at=fetched_at,
    )


def _completion(row: Row[Any]) -> Completion:
    """Return a completion: digest and size are its own, the rest is the representation's.

    If that has since become another one, nothing is said about validators.
    """
    if row.url_key is None:
        known = Known(row.digest, row.size, Validators(), row.url, fetched_at=row.completed_at)
    else:
        known = _known(row, row.completed_at)
    return Completion(row.completion_id, known, row.completed_at)


# -- complete -------------------------------------------------------------------------------


def complete(
    connection: Connection,
    statement: ReturningUpdate[Any],
    asker: Asker,
    lease: Lease,
    known: Known,
    resumed_from: int,
) -> Completion:
    """Record that the job is done, all of it or nothing (rule 3); see ``Ledger.complete``."""
    new = {"new_digest": known.digest, "new_size": known.size}
    row = connection.execute(statement, sql.held(lease) | new).one_or_none()
    if row is None:
        return _recorded(connection, lease)
    known = replace(known, final_url=url_without_userinfo(known.final_url), fetched_at=row.finished_at)
    _record_bytes(connection, row.url_key, known)
    recorded = Completion(secrets.token_hex(16), known, row.finished_at)
    connection.execute(
        sql.PUT_COMPLETION,
        {
            "completion_id": recorded.completion_id,
            "job_id": lease.job_id,
            "generation": row.generation,
            "fence": lease.fence,
            "claim_id": lease.claim_id,
            "worker_id": asker.worker_id,
            "digest": known.digest,
            "size": known.size,
            "resumed_from": resumed_from,
            "completed_at": row.finished_at,
        },
    )
    return recorded


def _recorded(connection: Connection, lease: Lease) -> Completion:
    """Return what this very claim recorded before: its answer may have been lost (rule 4)."""
    which = {"job_id": lease.job_id, "generation": lease.generation}
    row = connection.execute(sql.COMPLETION, which).one_or_none()
    if row is None or row.claim_id != lease.claim_id:
        raise _lost(lease)
    return _completion(row)


def _record_bytes(connection: Connection, url_key: str, known: Known) -> None:
    """Record the blob as present, and as what the URL stands for now."""
    stored = {"digest": known.digest, "size": known.size}
    added = {"state": "present", "stored_at": known.fetched_at}
    if connection.execute(sql.PUT_BLOB, stored | added).one_or_none() is None:
        msg = f"blob {known.digest} is recorded with another size than {known.size} bytes"
        raise IntegrityError(msg, reason="length-mismatch")
    validators = known.validators
    about = {
        "url_key": url_key,
        "final_url": known.final_url,
        "etag": None if validators.etag is None else str(validators.etag),
        "last_modified": validators.last_modified,
        "date": validators.date,
        "media_type": known.media_type,
        "vary": json.dumps(known.vary),
        "selecting": known.selecting,
        "fetched_at": known.fetched_at,
    }
    connection.execute(sql.PUT_REPRESENTATION, stored | about)


# -- the other ends of a claim --------------------------------------------------------------


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(f"job {lease.job_key}: the claim with fence {lease.fence} no longer holds it")


def _end(connection: Connection, lease: Lease, values: dict[str, Any]) -> None:
    """Set *values* under the guard; raise ``LeaseLost`` if the claim is no longer the current one."""
    statement = update(job).where(sql.guard()).values(values)
    if connection.execute(statement, sql.held(lease)).rowcount != 1:
        raise _lost(lease)


def release(connection: Connection, asker: Asker, lease: Lease) -> None:
    """Give the job back as if it had not been claimed, but for the fence."""
    _end(connection, lease, sql.changed(JobEvent.RELEASE) | {"updated_at": asker.now})


@dataclass(frozen=True, slots=True)
class Failure:
    """How a claim failed: ``retry_after`` in seconds, from the server; see ``Ledger.fail``."""

    error_code: str
    error: str
    permanent: bool
    retry_after: float | None
    progress: bool


def fail(connection: Connection, asker: Asker, lease: Lease, failure: Failure, rng: random.Random) -> None:
    """Record a failure: for good, or until a back-off is over (rule 9)."""
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
        delay = _delay(connection, lease, failure, rng)
        values |= sql.changed(JobEvent.FAIL_TRANSIENT) | {
            "not_before": asker.now + delay,
            "not_before_by": asker.worker_id,
            "not_before_server": failure.retry_after is not None,
        }
    _end(connection, lease, values)


def _delay(connection: Connection, lease: Lease, failure: Failure, rng: random.Random) -> float:
    if failure.retry_after is not None:
        return min(max(0.0, failure.retry_after), sql.BACKOFF_MAX)
    statement = select(job.c.attempts).where(sql.guard())
    attempts = connection.execute(statement, sql.held(lease)).scalar_one_or_none()
    if attempts is None:
        raise _lost(lease)
    return backoff(0 if failure.progress else attempts, rng)


# -- leases of a worker ---------------------------------------------------------------------


def renew(connection: Connection, asker: Asker) -> frozenset[str]:
    """Prolong every lease of this worker; return the claims that it still holds (rule 8)."""
    rows = connection.execute(
        update(job)
        .where(job.c.worker_id == asker.worker_id, sql.in_state(JobState.LEASED))
        .values(lease_until=asker.now + asker.lease_seconds, updated_at=asker.now)
        .returning(job.c.claim_id)
    )
    return frozenset(rows.scalars())


def forget_worker(connection: Connection, asker: Asker, worker_id: str) -> int:
    """End the leases of a dead worker now; return how many."""
    return connection.execute(
        update(job)
        .where(job.c.worker_id == worker_id, sql.in_state(JobState.LEASED))
        .values(lease_until=asker.now)
    ).rowcount


# -- by hand, and to look at ----------------------------------------------------------------


def requeue(connection: Connection, asker: Asker, key: str) -> bool:
    """Make a failed or dead job ready with all its attempts; return whether it was one."""
    ended = or_(sql.in_state(JobState.FAILED), sql.in_state(JobState.DEAD))
    values = sql.changed(JobEvent.REQUEUE, JobState.DEAD) | {
        "attempts": 0,
        "not_before": None,
        "not_before_by": None,
        "not_before_server": False,
        "finished_at": None,
        "updated_at": asker.now,
    }
    return connection.execute(update(job).where(job.c.job_key == key, ended).values(values)).rowcount == 1


def mark_missing(connection: Connection, digest: str) -> bool:
    """Note that the bytes of a blob are gone; return whether the blob was known."""
    statement = update(blob).where(blob.c.digest == digest).values(state="missing")
    return connection.execute(statement).rowcount == 1


def view(connection: Connection, key: str) -> JobView | None:
    """Return the job as people see it."""
    row = connection.execute(sql.JOB, {"key": key}).one_or_none()
    if row is None:
        return None
    names = (name for name in JobView.__slots__ if name not in ("key", "state"))
    return JobView(key=row.job_key, state=JobState(row.state), **{name: getattr(row, name) for name in names})


def counts(connection: Connection) -> dict[str, int]:
    """Return jobs by state, blobs that are present, and their bytes."""
    found = {state.value: 0 for state in JobState}
    for row in connection.execute(select(job.c.state, func.count()).group_by(job.c.state)):
        found[row[0]] = row[1]
    stored = connection.execute(
        select(func.count(), func.coalesce(func.sum(blob.c.size), 0)).where(blob.c.state == "present")
    ).one()
    return found | {"blobs": int(stored[0]), "blob_bytes": int(stored[1])}
