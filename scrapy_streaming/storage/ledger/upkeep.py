"""What people and ``maintenance`` ask of the ledger: looking, counting, marking blobs.

Commands for the writer, like those in ``verbs``. None of them is on the way of a download, so
SQLAlchemy runs them. No row of a blob is ever removed: whether one is still referred to would be
looked for in every table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    and_,
    bindparam,
    delete,
    func,
    inspect,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import Insert  # SQLite understands it too
from sqlalchemy.exc import SQLAlchemyError

from scrapy_streaming.protocol.jobs import SKEW, JobState
from scrapy_streaming.storage.ledger.database import Database
from scrapy_streaming.storage.ledger.prepared import Session
from scrapy_streaming.storage.ledger.queries import recorded_blobs, referred, refuse_unread
from scrapy_streaming.storage.ledger.schema import (
    blob,
    completion,
    event,
    job,
    meta,
    representation,
)
from scrapy_streaming.storage.ledger.statements import WorkerIdentity

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
    known = recorded_blobs(session, found)
    return frozenset(d for d, row in known.items() if (row.state, row.size) == ("present", found[d]))


# -- collecting -----------------------------------------------------------------------------


def orphans(session: Session, found: Collection[str]) -> frozenset[str]:
    """Return those of the blobs that nothing refers to and that are not recorded as present."""
    there = _states(session, found)
    bare = {digest for digest, state in there.items() if state in ("missing", "deleting")}
    unknown = frozenset(found) - there.keys()
    return unknown | (bare - referred(session, bare))


def condemn_orphans(
    session: Session, asker: WorkerIdentity, seen: int, found: Mapping[str, int]
) -> frozenset[str]:
    """Mark as ``deleting`` those of the blobs, given with their sizes, that are orphans.

    While a row is ``deleting`` nobody completes with it, and nobody is told to build on it. Raises
    as ``verbs.refuse_older``.
    """
    refuse_unread(session, seen)
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
    refuse_unread(session, seen)
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
