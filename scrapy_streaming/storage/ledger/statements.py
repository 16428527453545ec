"""The SQL of the ledger: conditions, and the statements that every download runs.

What may live here: SQLAlchemy Core that both SQLite and PostgreSQL understand. States and their changes come
from ``transitions``. The rules cited are those of ``docs/ledger.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Dialect,
    Double,
    Select,
    Table,
    and_,
    bindparam,
    case,
    exists,
    func,
    insert,
    literal_column,
    not_,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import Insert  # SQLite understands it too
from sqlalchemy.sql.dml import ReturningInsert, ReturningUpdate, Update

from scrapy_streaming.protocol.jobs import SKEW, JobEvent, JobState, Lease, OperationState
from scrapy_streaming.storage.blob_state import BlobState
from scrapy_streaming.storage.ledger.prepared import Prepared
from scrapy_streaming.storage.ledger.schema import (
    blob,
    completion,
    event,
    job,
    meta,
    operation,
    representation,
    worker,
    worker_number,
)
from scrapy_streaming.storage.ledger.transitions import (
    TAKING,
    changed,
    claim_step,
    in_state,
    may,
    origins,
)

#: Seconds of the longest back-off, also by a server's ``Retry-After``.
BACKOFF_MAX: Final = 3600.0
#: Seconds of the longest lease by default: one that lasts longer was damaged, or a clock jumped.
LEASE_MAX: Final = 86400.0
#: Seconds after which a deletion that has begun counts as abandoned (see ``maintenance``).
DELETION_LASTS: Final = 300.0


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """The worker that claims: its name, the length of its leases, the attempts per job, the clock.

    ``lease_seconds`` in seconds; ``now`` is the SQL expression for the database's time. ``number`` is the
    worker's id in the tables.
    """

    name: str
    lease_seconds: float
    max_attempts: int
    now: ColumnElement[float]
    number: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", worker_number(self.name))

    def later(self, seconds: float) -> ColumnElement[float]:
        """Return the time in *seconds* from now (a literal: older SQLAlchemy confuses the bound name)."""
        return self.now + literal_column(repr(float(seconds)), Double())

    @property
    def lease_end(self) -> ColumnElement[float]:
        """When a lease given now ends."""
        return self.later(self.lease_seconds)


def guard() -> ColumnElement[bool]:
    """Return the condition under which a lease may still write (ledger rule 1); values by ``held``.

    The lease need not be unexpired: if no other worker took the job over, writing is safe.
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


def named_insert(table: Table, **own: Any) -> Insert:
    """Return an INSERT into *table* with values bound by column name, except *own* ones."""
    return Insert(table).values(_bound(table) | own)


# -- claim ----------------------------------------------------------------------------------


_REPEAT: Final = ("plain", "asked_url", "asked_name")
_GIVEN: Final = (
    "job_key",
    "request_hash",
    "work_id",
    "artifact_id",
    "url",
    "url_key",
    "claim_id",
    "kept",
    "begun",
    *_REPEAT,
)
_TAKEN_OVER: Final = (
    *("url_key", "claim_id", "worker", "lease_until", "max_attempts", "updated_at", "kept", "begun"),
    *_REPEAT,
)
#: The columns in which a job's row must equal the request that has its key.
ASKED_FOR: Final = ("job_key", "work_id", "artifact_id", "url")
_CLEARED: Final = ("not_before", "not_before_by", "digest", "size", "finished_at")


def claim_statement(identity: WorkerIdentity) -> ReturningInsert[Any]:
    """Return the one statement that creates a job, or claims it if that is possible (ledger rule 10)."""
    now, until = identity.now, identity.lease_end
    fresh = Insert(job).values(
        state=JobState.LEASED.value,
        generation=1,
        fence=1,
        attempts=1,
        worker=identity.number,
        max_attempts=identity.max_attempts,
        lease_until=until,
        created_at=now,
        updated_at=now,
        **{name: bindparam(name) for name in _GIVEN},
    )
    wanted = fresh.excluded
    progress = wanted.kept > job.c.kept  # the last claim left more bytes than it found (ledger rule 9)
    again = or_(may(JobEvent.REFRESH), progress)
    taken = {
        "state": JobState.LEASED.value,
        "taken_from": job.c.state,
        "fence": job.c.fence + claim_step("fence"),
        "generation": job.c.generation + claim_step("generation"),
        # a claim whose work never began cannot be why its worker died
        "attempts": case((again, 1), (_never_begun(), job.c.attempts), else_=job.c.attempts + 1),
        **{name: wanted[name] for name in _TAKEN_OVER},
        **dict.fromkeys(_CLEARED),
        "not_before_server": False,
    }
    return fresh.on_conflict_do_update(
        index_elements=[job.c.job_key],
        set_=taken,
        where=and_(job.c.request_hash == wanted.request_hash, _claimable(identity, progress)),
    ).returning(
        *(job.c.id, job.c.fence, job.c.lease_until, job.c.generation, job.c.taken_from, job.c.updated_at),
        *(job.c[name] for name in ASKED_FOR),
    )


def _claimable(identity: WorkerIdentity, progress: ColumnElement[bool]) -> ColumnElement[bool]:
    """Return the condition that an existing job can be claimed; binds ``refresh_before`` and ``epoch``."""
    waits = and_(
        job.c.not_before > identity.now,
        # a longer back-off was set before the clock went back (I14)
        job.c.not_before <= identity.later(BACKOFF_MAX),
        or_(job.c.not_before_server, job.c.not_before_by == identity.number),
    )
    # a done job whose bytes are recorded as missing or bad is fetched again (I5)
    # (a literal: SQLAlchemy would add a FROM for a column of the row in conflict)
    digest: ColumnElement[str] = literal_column("ss_job.digest")
    gone = exists().where(blob.c.digest == digest, blob.c.state != BlobState.PRESENT.value)
    # what an older copy of the ledger records as done may be out of date, however recent (I16)
    finished_at: ColumnElement[float] = literal_column("ss_job.finished_at", Double())
    older = exists().where(
        or_(meta.c.put_back_at >= finished_at, meta.c.epoch < bindparam("epoch", type_=BigInteger()))
    )
    stale = or_(
        job.c.finished_at < bindparam("refresh_before", type_=job.c.finished_at.type),
        job.c.finished_at > identity.later(SKEW),  # by a clock that was wrong: the age is not known (I14)
        older,
    )
    if_also: dict[JobState, ColumnElement[bool]] = {
        JobState.READY: or_(job.c.not_before.is_(None), not_(waits)),
        JobState.LEASED: and_(
            expired(identity), or_(job.c.attempts < identity.max_attempts, progress, _never_begun())
        ),
        JobState.FAILED: true(),
        JobState.DONE: or_(stale, gone),
    }
    return or_(*(and_(in_state(state), if_also[state]) for state in origins(*TAKING)))


def _never_begun() -> ColumnElement[bool]:
    return and_(in_state(JobState.LEASED), not_(job.c.begun))


def expired(identity: WorkerIdentity) -> ColumnElement[bool]:
    """Return the condition that a lease has expired.

    Also if it was written in the future (the clock went back, and its holder may have died), or lasts
    longer than a lease can. To take the job from a running worker only costs duplicate work (I14).
    """
    longest: ColumnElement[float] = literal_column(repr(max(LEASE_MAX, identity.lease_seconds)), Double())
    return or_(
        job.c.lease_until <= identity.now,
        job.c.updated_at > identity.lease_end,
        job.c.lease_until > job.c.updated_at + longest,
    )


#: One job, with the name of the worker that has it or had it last.
JOB: Final[Select[Any]] = (
    select(job, worker.c.name.label("worker_name"))
    .join(worker, worker.c.id == job.c.worker, isouter=True)
    .where(job.c.job_key == bindparam("job_key"))
)

#: The stored representation of a URL, with the name of these bytes in a job's completion.
KNOWN: Final[Select[Any]] = (
    select(
        representation,
        blob.c.stamp,
        blob.c.size.label("blob_size"),
        completion.c.path,
        completion.c.stamp.label("name_stamp"),
    )
    .join(blob, blob.c.digest == representation.c.digest)
    .join(
        completion,
        and_(
            completion.c.job_id == bindparam("job_id"),
            completion.c.generation == bindparam("generation"),
            completion.c.digest == representation.c.digest,
        ),
        isouter=True,
    )
    .where(representation.c.url_key == bindparam("url_key"), blob.c.state == BlobState.PRESENT.value)
)


# -- complete -------------------------------------------------------------------------------


def complete_statement(identity: WorkerIdentity) -> ReturningUpdate[Any]:
    """Return the guarded UPDATE that makes a job done."""
    values = changed(JobEvent.COMPLETE) | {
        "digest": bindparam("new_digest"),
        "size": bindparam("new_size"),
        "error_code": None,
        "error": None,
        "finished_at": identity.now,
        "updated_at": identity.now,
    }
    statement = update(job).where(guard()).values(values)
    return statement.returning(job.c.job_key, job.c.url, job.c.url_key, job.c.generation, job.c.finished_at)


def put_blob(identity: WorkerIdentity) -> ReturningInsert[Any]:
    """Return the INSERT of a blob as present.

    It returns no row for a blob of another size, nor for one whose deletion has begun and is not abandoned.
    """
    fresh = Insert(blob).values(
        digest=bindparam("new_digest"),
        size=bindparam("new_size"),
        state=BlobState.PRESENT.value,
        stored_at=identity.now,
        stamp=bindparam("new_stamp"),
    )
    # begun long ago, or by a clock that was wrong (I14)
    abandoned = or_(
        blob.c.stored_at < identity.later(-DELETION_LASTS), blob.c.stored_at > identity.later(SKEW)
    )
    return fresh.on_conflict_do_update(
        index_elements=[blob.c.digest],
        set_={"state": BlobState.PRESENT.value, "stamp": func.coalesce(fresh.excluded.stamp, blob.c.stamp)},
        where=and_(
            blob.c.size == fresh.excluded.size, or_(blob.c.state != BlobState.DELETING.value, abandoned)
        ),
    ).returning(blob.c.digest)


def _put_representation() -> Insert:
    fresh = named_insert(representation)
    newer = {column.name: column for column in fresh.excluded if column.name != "url_key"}
    return fresh.on_conflict_do_update(index_elements=[representation.c.url_key], set_=newer)


#: One completion with its URL's representation, which may have other bytes by now (``represents``).
COMPLETION: Final[Select[Any]] = (
    select(
        completion.c.job_id,
        completion.c.generation,
        completion.c.claim_id,
        completion.c.completed_at,
        completion.c.digest,
        completion.c.size,
        completion.c.path,
        completion.c.by_response,
        completion.c.stamp.label("name_stamp"),
        blob.c.stamp,
        blob.c.size.label("blob_size"),
        job.c.url,
        representation.c.digest.label("represents"),
        *(column for column in representation.c if column.name not in ("digest", "size")),
    )
    .join(job, job.c.id == completion.c.job_id)
    .join(blob, blob.c.digest == completion.c.digest)
    .join(representation, representation.c.url_key == job.c.url_key, isouter=True)
    .where(
        completion.c.job_id == bindparam("job_id"),
        completion.c.generation == bindparam("generation"),
    )
)


# -- the other ends of a claim ----------------------------------------------------------------


def release_statement(identity: WorkerIdentity) -> ReturningUpdate[Any]:
    """Return the guarded UPDATE that makes a job ready again."""
    values = changed(JobEvent.RELEASE) | {"updated_at": identity.now}
    return update(job).where(guard()).values(values).returning(job.c.updated_at)


def renewal(identity: WorkerIdentity) -> ReturningUpdate[Any]:
    """Return the one heartbeat statement (ledger rule 8)."""
    return (
        update(job)
        .where(job.c.worker == identity.number, in_state(JobState.LEASED))
        .values(lease_until=identity.lease_end, updated_at=identity.now)
        .returning(job.c.claim_id)
    )


# -- operations -------------------------------------------------------------------------------


def _put_operation(identity: WorkerIdentity) -> Insert:
    """Return the INSERT of an operation that begins; it changes no recorded result.

    On PostgreSQL another worker may have recorded one just now.
    """
    fresh = named_insert(operation, updated_at=identity.now)
    newer = {column.name: column for column in fresh.excluded if column.name != "op_key"}
    return fresh.on_conflict_do_update(
        index_elements=[operation.c.op_key],
        set_=newer,
        where=operation.c.state != OperationState.OK.value,
    )


def ended_operation(identity: WorkerIdentity) -> Update:
    """Return the UPDATE that ends an operation which this claim began."""
    return (
        update(operation)
        .where(
            operation.c.op_key == bindparam("op"),
            operation.c.state == OperationState.STARTED.value,
            operation.c.job_id == bindparam("held_job"),
            operation.c.fence == bindparam("held_fence"),
        )
        .values(
            state=bindparam("new_state"),
            result=bindparam("new_result"),
            error=bindparam("new_error"),
            updated_at=identity.now,
        )
    )


class Statements:
    """The statements of every download, compiled for one dialect and one worker."""

    def __init__(self, identity: WorkerIdentity, dialect: Dialect) -> None:
        def made(statement: Any) -> Prepared:
            return Prepared(statement, dialect)

        #: FOR UPDATE: on PostgreSQL no other worker takes the job over before this transaction ends
        alive = select(job.c.id, job.c.job_key, job.c.attempts).where(guard()).with_for_update()
        self.claim = made(claim_statement(identity))
        self.job = made(JOB)
        self.known = made(KNOWN)
        self.alive = made(alive)
        self.put_blob = made(put_blob(identity))
        self.blob = made(select(blob).where(blob.c.digest == bindparam("new_digest")))
        self.complete = made(complete_statement(identity))
        self.put_representation = made(_put_representation())
        self.put_completion = made(insert(completion).values(_bound(completion, "delivered_at")))
        self.completion = made(COMPLETION)
        self.put_event = made(insert(event).values(_bound(event, "id")))
        self.begin = made(update(job).where(guard()).values(begun=True).returning(job.c.id))
        unlike = {"begun": True, "plain": False, "asked_url": None, "asked_name": None}
        self.begin_unlike = made(update(job).where(guard()).values(unlike).returning(job.c.id))
        self.release = made(release_statement(identity))
        self.renew = made(renewal(identity))
        self.note_blob = made(
            update(blob)
            .where(blob.c.digest == bindparam("of_digest"), blob.c.state == BlobState.PRESENT.value)
            .values(stamp=bindparam("new_stamp"))
        )
        self.note_name = made(
            update(completion)
            .where(completion.c.job_id == bindparam("of_job"), completion.c.generation == bindparam("of"))
            .values(path=bindparam("new_path"), stamp=bindparam("new_stamp"))
        )
        self.operation = made(select(operation).where(operation.c.op_key == bindparam("op")))
        self.put_operation = made(_put_operation(identity))
        self.end_operation = made(ended_operation(identity))


def _bound(table: Table, *without: str) -> dict[str, Any]:
    return {column.name: bindparam(column.name) for column in table.c if column.name not in without}
