"""The SQL of the ledger: conditions, and the statements that every download runs.

Those are built once, with named values: building one costs as much as running it. SQLAlchemy
Core only, and only what SQLite and PostgreSQL both do. The rules cited are those of the ledger's
design: the guard (1), the fence (2), the database's clock (7), the claim as one statement (10).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Select,
    Table,
    and_,
    bindparam,
    case,
    exists,
    insert,
    literal_column,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import Insert  # PostgreSQL's has the same methods
from sqlalchemy.sql.dml import ReturningInsert, ReturningUpdate

from scrapy_streaming.protocol.jobs import JobEvent, JobState, Lease, transition
from scrapy_streaming.storage.ledger.schema import blob, completion, job, representation

#: Seconds that any back-off lasts at most, the server's ``Retry-After`` included.
BACKOFF_MAX: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Asker:
    """Who claims, for how many seconds, how often at most, and the clock that counts."""

    worker_id: str
    lease_seconds: float
    max_attempts: int
    now: ColumnElement[float]


def guard() -> ColumnElement[bool]:
    """Return the condition under which a lease may still write (rule 1); values by ``held``.

    The lease need not be unexpired: if nobody took the job over, writing is safe.
    """
    return and_(
        job.c.id == bindparam("held_job"),
        in_state(JobState.LEASED),
        job.c.fence == bindparam("held_fence"),
        job.c.claim_id == bindparam("held_claim"),
    )


def held(lease: Lease) -> dict[str, Any]:
    """Return the values that ``guard`` compares with."""
    return {"held_job": lease.job_id, "held_fence": lease.fence, "held_claim": lease.claim_id}


def in_state(state: JobState) -> ColumnElement[bool]:
    """Return ``state = '…'``, spelled out: a bound value would not match the partial indexes."""
    return job.c.state == literal_column(f"'{state.value}'")


def changed(event: JobEvent, origin: JobState = JobState.LEASED) -> dict[str, Any]:
    """Return the columns that *event* sets on a job in *origin*, by the table of transitions."""
    change = transition(origin, event)
    values: dict[str, Any] = {"state": change.to.value, "claim_id": None, "lease_until": None}
    for name in ("fence", "generation"):
        if step := getattr(change, name):
            values[name] = job.c[name] + step
    if change.attempts:
        values["attempts"] = case(
            (job.c.attempts + change.attempts < 0, 0), else_=job.c.attempts + change.attempts
        )
    return values


def named_insert(table: Table, *without: str) -> Insert:
    """Return an INSERT of *table* that takes each column's value by the column's name."""
    names = [column.name for column in table.c if column.name not in without]
    return Insert(table).values({name: bindparam(name) for name in names})


# -- claim ----------------------------------------------------------------------------------


_GIVEN: Final = ("job_key", "request_hash", "work_id", "artifact_id", "url", "url_key", "claim_id", "kept")
_TAKEN_OVER: Final = ("claim_id", "worker_id", "lease_until", "max_attempts", "updated_at", "kept")
_CLEARED: Final = ("not_before", "not_before_by", "digest", "size", "finished_at")


def claim_statement(asker: Asker) -> ReturningInsert[Any]:
    """Return the one statement that creates a job or takes it if it may be taken (rule 10)."""
    now, until = asker.now, asker.now + asker.lease_seconds
    fresh = Insert(job).values(
        state=JobState.LEASED.value,
        generation=1,
        fence=1,
        attempts=1,
        worker_id=asker.worker_id,
        max_attempts=asker.max_attempts,
        lease_until=until,
        created_at=now,
        updated_at=now,
        **{name: bindparam(name) for name in _GIVEN},
    )
    wanted = fresh.excluded
    progress = wanted.kept > job.c.kept  # the last claim left more bytes than it found (rule 9)
    again = or_(in_state(JobState.DONE), in_state(JobState.FAILED), progress)
    taken = {
        "state": JobState.LEASED.value,
        "fence": job.c.fence + transition(JobState.READY, JobEvent.CLAIM).fence,
        "generation": job.c.generation + case((in_state(JobState.DONE), 1), else_=0),
        "attempts": case((again, 1), else_=job.c.attempts + 1),
        **{name: wanted[name] for name in _TAKEN_OVER},
        **dict.fromkeys(_CLEARED),
        "not_before_server": False,
    }
    return fresh.on_conflict_do_update(
        index_elements=[job.c.job_key],
        set_=taken,
        where=and_(job.c.request_hash == wanted.request_hash, _claimable(asker, progress)),
    ).returning(job.c.id, job.c.fence, job.c.lease_until, job.c.generation)


def _claimable(asker: Asker, progress: ColumnElement[bool]) -> ColumnElement[bool]:
    """Return when a job that exists may be taken; binds ``refresh_before``."""
    waits = and_(
        job.c.not_before > asker.now,
        # no back-off is longer: the clock went back since it was set (I14)
        job.c.not_before <= asker.now + BACKOFF_MAX,
        or_(job.c.not_before_server, job.c.not_before_by == asker.worker_id),
    )
    # a done job whose bytes are known to be gone is fetched again (I5)
    # (spelled out: of a column of the row in conflict SQLAlchemy would make another FROM)
    digest: ColumnElement[str] = literal_column("ss_job.digest")
    gone = exists().where(blob.c.digest == digest, blob.c.state != "present")
    stale = job.c.finished_at < bindparam("refresh_before", type_=job.c.finished_at.type)
    return or_(
        and_(in_state(JobState.READY), or_(job.c.not_before.is_(None), not_(waits))),
        and_(in_state(JobState.LEASED), expired(asker), or_(job.c.attempts < asker.max_attempts, progress)),
        in_state(JobState.FAILED),
        and_(in_state(JobState.DONE), or_(stale, gone)),
    )


def expired(asker: Asker) -> ColumnElement[bool]:
    """Return when a lease is over.

    Also when it was written in what is now the future: the clock went back, and its holder may
    be dead. Taking it from a live one costs duplicate work only (I14).
    """
    return or_(job.c.lease_until <= asker.now, job.c.updated_at > asker.now + asker.lease_seconds)


JOB: Final[Select[Any]] = select(job).where(job.c.job_key == bindparam("key"))

KNOWN: Final[Select[Any]] = (
    select(representation)
    .join(blob, blob.c.digest == representation.c.digest)
    .where(representation.c.url_key == bindparam("url_key"), blob.c.state == "present")
)


# -- complete -------------------------------------------------------------------------------


def complete_statement(asker: Asker) -> ReturningUpdate[Any]:
    """Return the guarded UPDATE that makes a job done."""
    values = changed(JobEvent.COMPLETE) | {
        "digest": bindparam("new_digest"),
        "size": bindparam("new_size"),
        "error_code": None,
        "error": None,
        "finished_at": asker.now,
        "updated_at": asker.now,
    }
    statement = update(job).where(guard()).values(values)
    return statement.returning(job.c.url_key, job.c.generation, job.c.finished_at)


def _put_blob() -> ReturningInsert[Any]:
    fresh = named_insert(blob, "verified_at")
    return fresh.on_conflict_do_update(
        index_elements=[blob.c.digest],
        set_={"state": fresh.excluded.state},
        where=blob.c.size == fresh.excluded.size,
    ).returning(blob.c.digest)


def _put_representation() -> Insert:
    fresh = named_insert(representation)
    newer = {column.name: column for column in fresh.excluded if column.name != "url_key"}
    return fresh.on_conflict_do_update(index_elements=[representation.c.url_key], set_=newer)


#: Gives no row if the blob is recorded with another size.
PUT_BLOB: Final = _put_blob()
PUT_REPRESENTATION: Final = _put_representation()
PUT_COMPLETION: Final = insert(completion)

#: One completion with what the representation adds, if that still has the same bytes.
COMPLETION: Final[Select[Any]] = (
    select(
        completion.c.completion_id,
        completion.c.claim_id,
        completion.c.completed_at,
        completion.c.digest,
        completion.c.size,
        job.c.url,
        *(column for column in representation.c if column.name not in ("digest", "size")),
    )
    .join(job, job.c.id == completion.c.job_id)
    .join(
        representation,
        and_(
            representation.c.url_key == job.c.url_key,
            representation.c.digest == completion.c.digest,
        ),
        isouter=True,
    )
    .where(
        completion.c.job_id == bindparam("job_id"),
        completion.c.generation == bindparam("generation"),
    )
)
