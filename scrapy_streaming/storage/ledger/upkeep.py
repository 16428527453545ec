"""What people and ``maintenance`` ask of the ledger: looking, counting, marking blobs.

Commands for the writer, like those in ``verbs``. None of them is on the way of a download, so
SQLAlchemy runs them. No row of a blob is ever removed: whether one is still referred to would be
looked for in every table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from sqlalchemy import (
    Column,
    ColumnElement,
    Select,
    Table,
    and_,
    bindparam,
    delete,
    exists,
    func,
    inspect,
    literal_column,
    not_,
    or_,
    select,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import Insert  # SQLite understands it too
from sqlalchemy.exc import SQLAlchemyError

from scrapy_streaming.protocol.jobs import SKEW, JobState
from scrapy_streaming.storage.ledger import statements as sql
from scrapy_streaming.storage.ledger.database import Database
from scrapy_streaming.storage.ledger.prepared import Session
from scrapy_streaming.storage.ledger.records import (
    BlobRow,
    CompletionRow,
    EventRow,
    JobDetails,
    JobView,
    NameRow,
    OperationRow,
)
from scrapy_streaming.storage.ledger.schema import (
    blob,
    completion,
    event,
    job,
    meta,
    metadata,
    operation,
    representation,
    worker,
)
from scrapy_streaming.storage.ledger.statements import WorkerIdentity
from scrapy_streaming.storage.ledger.verbs import as_view, refuse_older

#: Values in one statement at most; databases take some more (SQLite 32,766).
AT_ONCE: Final = 5000
#: Lines of one kind that ``problems`` names.
NAMED: Final = 10

_JOBS: Final[Select[Any]] = select(job, worker.c.name.label("worker_name")).join(
    worker, worker.c.id == job.c.worker, isouter=True
)


# -- to look at -----------------------------------------------------------------------------


def jobs(session: Session, state: JobState | None, after: int, limit: int) -> list[JobView]:
    """Return jobs with an id above *after*, in the order of ids."""
    wanted = _JOBS.where(job.c.id > after).order_by(job.c.id).limit(limit)
    if state is not None:
        wanted = wanted.where(sql.in_state(state))
    return [as_view(row) for row in session.connection.execute(wanted)]


def find(session: Session, url: str | None, prefix: str | None, limit: int) -> list[JobView]:
    """Return the jobs on *url*, or those whose key or digest begins with *prefix* (hex digits)."""
    if prefix is not None:
        referring = select(completion.c.job_id).where(_begins(completion.c.digest, prefix))
        which = or_(_begins(job.c.job_key, prefix), _begins(job.c.digest, prefix), job.c.id.in_(referring))
    else:
        which = job.c.url == url
    wanted = _JOBS.where(which).order_by(job.c.id).limit(limit)
    return [as_view(row) for row in session.connection.execute(wanted)]


def keys(session: Session, prefix: str) -> list[str]:
    """Return the keys, two at most, that begin with *prefix* (hex digits)."""
    wanted = select(job.c.job_key).where(_begins(job.c.job_key, prefix)).limit(2)
    return list(session.connection.execute(wanted).scalars())


def _begins(column: ColumnElement[Any], prefix: str) -> ColumnElement[bool]:
    """Return the condition that a key begins so: an index answers it."""
    return column.between(prefix.ljust(64, "0"), prefix.ljust(64, "f"))


def details(session: Session, job_id: int, limit: int) -> JobDetails:
    """Return what was recorded of a job beside itself, the latest *limit* events of it."""
    run = session.connection.execute
    done = select(completion).where(completion.c.job_id == job_id).order_by(completion.c.generation)
    effects = select(operation).where(operation.c.job_id == job_id).order_by(operation.c.updated_at)
    history = (
        select(event, worker.c.name.label("worker_name"))
        .join(worker, worker.c.id == event.c.worker, isouter=True)
        .where(event.c.job_id == job_id)
        .order_by(event.c.id.desc())
        .limit(limit)
    )
    return JobDetails(
        tuple(_as(CompletionRow, row) for row in run(done)),
        tuple(_as(OperationRow, row) for row in run(effects)),
        tuple(_as(EventRow, row) for row in reversed(run(history).all())),
    )


def _as(kind: type[Any], row: Any) -> Any:
    """Return the record whose fields are named as the columns are."""
    return kind(**{name: getattr(row, name) for name in kind.__slots__})


def states_of(session: Session, wanted: Collection[str]) -> dict[str, JobState]:
    """Return the state of each of the jobs that there are."""
    found = select(job.c.job_key, job.c.state).where(job.c.job_key.in_(wanted))
    return {row.job_key: JobState(row.state) for row in session.connection.execute(found)}


def blob_rows(session: Session, after: str | None, limit: int) -> list[BlobRow]:
    """Return blobs behind the digest *after*, in the order of digests."""
    wanted = _blobs().order_by(blob.c.digest).limit(limit)
    if after is not None:
        wanted = wanted.where(blob.c.digest > after)
    return [_as(BlobRow, row) for row in session.connection.execute(wanted)]


def blobs_of(session: Session, digests: Collection[str]) -> dict[str, BlobRow]:
    """Return those of the blobs that are recorded."""
    found = session.connection.execute(_blobs().where(blob.c.digest.in_(digests)))
    return {row.digest: _as(BlobRow, row) for row in found}


def names(session: Session, after: int, limit: int) -> list[NameRow]:
    """Return the names of bytes that are present, by the jobs' last completions, behind the job *after*."""
    later = completion.alias("later")
    newer = exists().where(
        later.c.job_id == completion.c.job_id, later.c.generation > completion.c.generation
    )
    wanted = (
        select(completion.c.job_id, completion.c.path, completion.c.digest, completion.c.size)
        .join(blob, blob.c.digest == completion.c.digest)
        .where(completion.c.job_id > after, completion.c.path.is_not(None), blob.c.state == "present")
        .where(not_(newer))
        .order_by(completion.c.job_id)
        .limit(limit)
    )
    return [_as(NameRow, row) for row in session.connection.execute(wanted)]


def blobs_like(session: Session, prefix: str, limit: int) -> list[BlobRow]:
    """Return the blobs whose digest begins with *prefix* (hex digits)."""
    wanted = _blobs().where(_begins(blob.c.digest, prefix)).order_by(blob.c.digest).limit(limit)
    return [_as(BlobRow, row) for row in session.connection.execute(wanted)]


def urls_of(session: Session, digest: str) -> list[str]:
    """Return the URLs, ten at most, that stand for a blob now, by the jobs on them."""
    same = (job.c.url_key == representation.c.url_key, representation.c.digest == digest)
    wanted = select(job.c.url).distinct().where(and_(*same)).order_by(job.c.url).limit(NAMED)
    return list(session.connection.execute(wanted).scalars())


def _blobs() -> Select[Any]:
    wanted = (blob.c.digest, blob.c.size, blob.c.state, blob.c.stored_at, blob.c.verified_at)
    return select(*wanted, blob.c.stamp.is_not(None).label("has_file"))


# -- blobs ----------------------------------------------------------------------------------


def mark_verified(session: Session, asker: WorkerIdentity, digests: Collection[str]) -> None:
    """Note that the bytes of blobs were just found to be right."""
    right = update(blob).where(blob.c.digest.in_(digests), blob.c.state == "present")
    session.connection.execute(right.values(verified_at=asker.now))


def set_blob_state(session: Session, digest: str, to: str, origins: Collection[str]) -> bool:
    """Change the state of a blob that is in one of *origins*; return whether it was."""
    change = update(blob).where(blob.c.digest == digest, blob.c.state.in_(origins)).values(state=to)
    return session.connection.execute(change).rowcount == 1


def adopt_blobs(session: Session, asker: WorkerIdentity, found: Mapping[str, int]) -> frozenset[str]:
    """Record files whose bytes were just found to be right, with their sizes; return those that now are.

    Not those that ``gc`` is about to remove.
    """
    fresh = Insert(blob).values(
        digest=bindparam("new_digest"),
        size=bindparam("new_size"),
        state="present",
        stored_at=asker.now,
        verified_at=asker.now,
        found_at=asker.now,
    )
    back = fresh.on_conflict_do_update(
        index_elements=[blob.c.digest],
        set_={"state": "present", "verified_at": asker.now},
        where=and_(blob.c.size == fresh.excluded.size, blob.c.state != "deleting"),
    )
    rows = [{"new_digest": digest, "new_size": size} for digest, size in sorted(found.items())]
    session.connection.execute(back, rows)
    known = blobs_of(session, found)
    return frozenset(d for d, row in known.items() if (row.state, row.size) == ("present", found[d]))


# -- collecting -----------------------------------------------------------------------------


def orphans(session: Session, found: Collection[str]) -> frozenset[str]:
    """Return those of the blobs that nothing refers to and that are not recorded as present."""
    there = _states(session, found)
    bare = {digest for digest, state in there.items() if state in ("missing", "deleting")}
    unknown = frozenset(found) - there.keys()
    return unknown | (bare - _referred(session, bare))


def condemn_orphans(
    session: Session, asker: WorkerIdentity, seen: int, found: Mapping[str, int]
) -> frozenset[str]:
    """Mark as ``deleting`` those of the blobs, given with their sizes, that are orphans.

    While a row is ``deleting`` nobody completes with it, and nobody is told to build on it. Raises
    as ``verbs.refuse_older``.
    """
    refuse_older(session, seen)
    # locked: who records one of them now waits, and is refused then
    gone = orphans(session, found)
    if not gone:
        return gone
    fresh = Insert(blob).values(
        digest=bindparam("new_digest"), size=bindparam("new_size"), state="deleting", stored_at=asker.now
    )
    again = fresh.on_conflict_do_update(
        index_elements=[blob.c.digest],
        set_={"state": "deleting", "stored_at": asker.now},
        # not one that was recorded just now (spelled out: IN cannot go with many rows)
        where=or_(blob.c.state == "missing", blob.c.state == "deleting"),
    )
    rows = [{"new_digest": digest, "new_size": found[digest]} for digest in sorted(gone)]
    session.connection.execute(again, rows)
    there = _states(session, gone)
    return frozenset(digest for digest, state in there.items() if state == "deleting")


def superseded(
    session: Session, asker: WorkerIdentity, age: float, after: str | None, limit: int
) -> list[tuple[str, int]]:
    """Return blobs, with their sizes, that only completions of old generations name.

    *age*: seconds since another blob came to stand for the URL. Not those that a claim which
    still runs may have been told to build on.
    """
    wanted = select(blob.c.digest, blob.c.size).where(*_superseded(asker, age))
    if after is not None:
        wanted = wanted.where(blob.c.digest > after)
    found = session.connection.execute(wanted.order_by(blob.c.digest).limit(limit))
    return [(row.digest, row.size) for row in found]


def condemn_superseded(
    session: Session, asker: WorkerIdentity, seen: int, digests: Collection[str], age: float
) -> frozenset[str]:
    """Mark as ``deleting`` those of *digests* that still are ``superseded``; forget who named them.

    Raises as ``verbs.refuse_older``.
    """
    refuse_older(session, seen)
    run = session.connection.execute
    _states(session, digests)  # locked
    still = select(blob.c.digest).where(blob.c.digest.in_(digests), *_superseded(asker, age))
    gone = frozenset(run(still).scalars())
    # first: a recorded completion always names a stored blob
    run(delete(completion).where(completion.c.digest.in_(gone)))
    run(update(blob).where(blob.c.digest.in_(gone)).values(state="deleting", stored_at=asker.now))
    return gone


def _states(session: Session, digests: Collection[str]) -> dict[str, str]:
    """Return the blobs' states; their rows are locked until the transaction ends, in one order."""
    wanted = select(blob.c.digest, blob.c.state).where(blob.c.digest.in_(digests))
    rows = session.connection.execute(wanted.order_by(blob.c.digest).with_for_update())
    return {row.digest: row.state for row in rows}


def _superseded(asker: WorkerIdentity, age: float) -> tuple[ColumnElement[bool], ...]:
    latest = (
        select(completion.c.job_id, func.max(completion.c.generation)).group_by(completion.c.job_id)
    ).subquery()
    other = job.alias("other")
    named = select(completion.c.digest)
    of_job = named.join(job, job.c.id == completion.c.job_id)
    on_same_url = of_job.join(other, other.c.url_key == job.c.url_key)
    stands = of_job.join(representation, representation.c.url_key == job.c.url_key)
    current = named.where(tuple_(completion.c.job_id, completion.c.generation).in_(select(*latest.columns)))
    return (
        blob.c.state == "present",
        blob.c.digest.in_(named),
        blob.c.digest.not_in(select(job.c.digest).where(job.c.digest.is_not(None))),
        blob.c.digest.not_in(select(representation.c.digest)),
        blob.c.digest.not_in(current),
        # told before another took its place, it may yet complete with what it was told
        blob.c.digest.not_in(on_same_url.where(other.c.state == JobState.LEASED.value)),
        blob.c.digest.not_in(stands.where(representation.c.fetched_at > asker.later(-age))),
    )


def _referred(session: Session, digests: Collection[str]) -> frozenset[str]:
    """Return those of *digests* that a job, a representation or a completion names."""
    if not digests:
        return frozenset()
    naming = union_all(
        *(
            select(table.c.digest).where(table.c.digest.in_(digests))
            for table in (job, representation, completion)
        )
    )
    return frozenset(session.connection.execute(naming).scalars())


def bury(session: Session, digests: Collection[str] | None) -> frozenset[str]:
    """Mark as ``missing`` those of *digests* (or of all) that still are ``deleting``; return them."""
    change = update(blob).where(blob.c.state == "deleting")
    if digests is not None:
        change = change.where(blob.c.digest.in_(digests))
    rows = session.connection.execute(change.values(state="missing").returning(blob.c.digest))
    return frozenset(rows.scalars())


# -- history --------------------------------------------------------------------------------


def trim_events(session: Session, asker: WorkerIdentity, age: float, limit: int) -> int:
    """Remove events older than *age* seconds, *limit* at most; return how many.

    Those dated as far ahead, too: by a clock that was wrong they would stay for years (I14).
    """
    past = or_(event.c.at < asker.later(-age), event.c.at > asker.later(age + SKEW))
    old = select(event.c.id).where(past).order_by(event.c.id).limit(limit)
    return session.connection.execute(delete(event).where(event.c.id.in_(old))).rowcount


# -- health ---------------------------------------------------------------------------------


def table_rows(session: Session) -> dict[str, int]:
    """Return how many rows each table has."""
    count: Any = session.connection.execute
    return {table.name: int(count(_count(table)).scalar_one()) for table in metadata.sorted_tables}


def _count(table: Table) -> Select[Any]:
    return select(func.count()).select_from(table)


def found_version(database: Database) -> int:
    """Return the version of the tables in a database that is not opened yet, 0 if it has none.

    Raises ``LedgerError`` as ``Database.connect`` does; nothing is changed.
    """
    row = _meta_row(database, meta.c.schema_version)
    return 0 if row is None else int(row.schema_version)


def recorded_identity(database: Database) -> tuple[str, str, int] | None:
    """Return the store's id, the ledger's and the epoch that a database says, ``None`` without a ledger.

    Raises as ``found_version``.
    """
    row = _meta_row(database, meta.c.store_id, meta.c.ledger_id, meta.c.epoch)
    return None if row is None else (row.store_id, row.ledger_id, row.epoch)


def _meta_row(database: Database, *columns: Column[Any]) -> Any:
    """Return the one row that says which ledger it is, ``None`` if the database has none."""
    connection = database.connect(False)
    try:
        with database.transaction(connection, lambda: False):
            if not inspect(connection).has_table(meta.name):
                return None
            return connection.execute(select(*columns)).one_or_none()
    except SQLAlchemyError as error:
        raise database.translate(error) from error
    finally:
        database.forget(connection)


def schema_version(session: Session) -> int:
    """Return the version of the tables."""
    return int(session.connection.execute(select(meta.c.schema_version)).scalar_one())


def troubles(session: Session) -> dict[str, int]:
    """Count what is not as it should be and mends itself when it is next asked for.

    ``missing`` and ``quarantined``: blobs in that state that something refers to. ``left``: jobs
    leased to workers that ended.
    """
    run = session.connection.execute
    lacking = run(_blobs().where(blob.c.state.in_(("missing", "quarantined")))).all()
    found = {"missing": 0, "quarantined": 0}
    states = {row.digest: row.state for row in lacking}
    for some in _pieces(sorted(states)):
        for digest in _referred(session, some):
            found[states[digest]] += 1
    left = select(func.count()).select_from(job.join(worker, worker.c.id == job.c.worker))
    left = left.where(sql.in_state(JobState.LEASED), worker.c.ended_at.is_not(None))
    return found | {"left": int(run(left).scalar_one())}


def _pieces(values: list[str]) -> list[list[str]]:
    return [values[at : at + AT_ONCE] for at in range(0, len(values), AT_ONCE)]


def problems(session: Session) -> list[str]:
    """Return, in words, what breaks an invariant of the ledger; nothing of it can come to be by itself."""
    found: list[str] = []
    for what, rows in _broken():
        named = [str(row[0]) for row in session.connection.execute(rows.limit(NAMED + 1))]
        if named:
            more = " …" if len(named) > NAMED else ""
            found.append(f"{what}: {', '.join(named[:NAMED])}{more}")
    return found


def _broken() -> list[tuple[str, Select[Any]]]:
    """Return what must not be, each with the query that finds it; the first column names the row."""
    of_generation = and_(completion.c.job_id == job.c.id, completion.c.generation == job.c.generation)
    leased, done = sql.in_state(JobState.LEASED), sql.in_state(JobState.DONE)
    of_blob = blob.c.digest == job.c.digest
    many: ColumnElement[int] = literal_column("1")
    return [
        (
            "I1: jobs with one key",
            select(job.c.job_key).group_by(job.c.job_key).having(func.count() > many),
        ),
        (
            "I2: jobs with one current claim",
            select(job.c.claim_id).where(leased).group_by(job.c.claim_id).having(func.count() > many),
        ),
        (
            "leased without a claim",
            select(job.c.job_key).where(leased, or_(job.c.claim_id.is_(None), job.c.lease_until.is_(None))),
        ),
        (
            "I4: generations completed twice",
            select(completion.c.job_id)
            .group_by(completion.c.job_id, completion.c.generation)
            .having(func.count() > many),
        ),
        (
            "I4: claims that completed twice",
            select(completion.c.claim_id).group_by(completion.c.claim_id).having(func.count() > many),
        ),
        (
            "I4: done without a completion of these bytes",
            select(job.c.job_key).where(
                done, not_(exists().where(of_generation, completion.c.digest == job.c.digest))
            ),
        ),
        (
            "I5: done without a blob",
            select(job.c.job_key).where(
                done, not_(exists().where(of_blob, blob.c.size == job.c.size, blob.c.state != "deleting"))
            ),
        ),
        (
            "I5: completions without a blob",
            select(job.c.job_key)
            .join(completion, completion.c.job_id == job.c.id)
            .where(not_(exists().where(blob.c.digest == completion.c.digest))),
        ),
        (
            "representations without a blob",
            select(representation.c.digest).where(
                not_(exists().where(blob.c.digest == representation.c.digest))
            ),
        ),
        (
            "completions of another size than their blob",
            select(job.c.job_key)
            .join(completion, completion.c.job_id == job.c.id)
            .join(blob, blob.c.digest == completion.c.digest)
            .where(completion.c.size != blob.c.size),
        ),
        (
            "representations of another size than their blob",
            select(representation.c.digest)
            .join(blob, blob.c.digest == representation.c.digest)
            .where(representation.c.size != blob.c.size),
        ),
        (
            "completions ahead of their job",
            select(job.c.job_key)
            .join(completion, completion.c.job_id == job.c.id)
            .where(or_(completion.c.generation > job.c.generation, completion.c.fence > job.c.fence)),
        ),
    ]
