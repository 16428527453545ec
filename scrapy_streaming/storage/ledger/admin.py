"""The verbs of maintenance and of the command line that write; ``queries`` has those that read.

What may live here: verbs that no download needs, so SQLAlchemy runs them. None removes a row of a blob:
the database would search every table for references to it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    inspect,
    literal,
    or_,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import Insert  # SQLite understands it too
from sqlalchemy.exc import SQLAlchemyError

from scrapy_streaming.protocol.jobs import SKEW, JobEvent, JobState, NotedFile
from scrapy_streaming.protocol.portable import Entered, Record
from scrapy_streaming.storage.blob_state import BlobState
from scrapy_streaming.storage.ledger import arrivals, carrying
from scrapy_streaming.storage.ledger.commands import verb
from scrapy_streaming.storage.ledger.database import Database
from scrapy_streaming.storage.ledger.prepared import Session
from scrapy_streaming.storage.ledger.queries import Queries, recorded_blobs, referred, refuse_unread
from scrapy_streaming.storage.ledger.recording import portions
from scrapy_streaming.storage.ledger.records import Standing
from scrapy_streaming.storage.ledger.schema import (
    blob,
    completion,
    event,
    job,
    meta,
    representation,
    worker,
    worker_number,
)
from scrapy_streaming.storage.ledger.statements import WorkerIdentity
from scrapy_streaming.storage.ledger.transitions import changed, in_state, may


class Admin(Queries):
    """Each verb returns a future, as those of ``Jobs``, and takes at most ``AT_ONCE`` digests."""

    # -- jobs --------------------------------------------------------------------------------

    def requeue(self, *keys: str) -> Future[int]:
        """Make failed and dead jobs ready, with no attempts counted; return how many there were (I19)."""
        return self._requeue(frozenset(keys))

    def requeue_all(self) -> Future[int]:
        """Make every failed and every dead job ready; return how many there were."""
        return self._requeue(None)

    @verb
    def _requeue(self, session: Session, keys: Collection[str] | None) -> int:
        number, ended = self._context.worker.number, may(JobEvent.REQUEUE)
        values = changed(JobEvent.REQUEUE) | {
            "attempts": 0,
            "not_before": None,
            "not_before_by": None,
            "not_before_server": False,
            "finished_at": None,
            "taken_from": job.c.state,
            "updated_at": self._context.worker.now,
        }
        wanted = (job.c.id, job.c.fence, job.c.taken_from, job.c.updated_at)
        which = [ended] if keys is None else [and_(job.c.job_key.in_(some), ended) for some in portions(keys)]
        rows: list[Any] = []
        for condition in which:
            rows += session.connection.execute(update(job).where(condition).values(values).returning(*wanted))
        if self._context.events and rows:
            about = {"claim_id": None, "worker": number, "to_state": JobState.READY.value}
            session.connection.execute(
                insert(event),
                [
                    about | {"job_id": r.id, "fence": r.fence, "from_state": r.taken_from, "at": r.updated_at}
                    for r in rows
                ],
            )
        return len(rows)

    @verb
    def end_worker_leases(self, session: Session, worker_id: str) -> int:
        """End the leases of a worker that is known to have ended; return how many.

        Safe even if it still runs: it keeps the jobs that no other worker claims, and for the others its
        fence is refused.
        """
        number, now = worker_number(worker_id), self._context.worker.now
        session.connection.execute(
            update(worker).where(worker.c.id == number, worker.c.ended_at.is_(None)).values(ended_at=now)
        )
        return session.connection.execute(
            update(job).where(job.c.worker == number, in_state(JobState.LEASED)).values(lease_until=now)
        ).rowcount

    @verb
    def enter(self, session: Session, record: Record) -> Entered:
        """Record a completion from another ledger or a feed, whose bytes are stored; return the outcome.

        The job is created if it is missing, and becomes done if it is ready or ended before; a newer
        completion, or this one, stays unchanged. The completion in *record* has the stamps of the blob and of
        the name's own file.
        """
        return carrying.enter(session, self._context, record)

    # -- an older copy of the ledger ---------------------------------------------------------

    def raise_epoch(self, seen: int, *, unread: bool = False) -> Future[Standing]:
        """Raise the epoch above *seen*, the store's, and above the ledger's own; return the new standing.

        If the ledger's epoch is below *seen*, the ledger is an older copy, and that is recorded. *unread*:
        record in any case that the store has to be read. A copy that was taken before has a lower epoch from
        now on.
        """
        self.epoch = max(self.epoch, seen)
        raised = self._raise_epoch(self.epoch, unread)
        raised.add_done_callback(self._note_epoch)
        return raised

    def _note_epoch(self, done: Future[Standing]) -> None:
        if not done.cancelled() and done.exception() is None:
            self.epoch = max(self.epoch, done.result().epoch)

    @verb
    def _raise_epoch(self, session: Session, seen: int, unread: bool) -> Standing:
        clock = self._context.worker
        older = meta.c.epoch < bindparam("seen", seen, BigInteger())
        ahead = meta.c.put_back_at > clock.later(SKEW)  # recorded by a clock that was wrong (I14)
        change = update(meta).values(
            epoch=case((older, bindparam("seen", seen, BigInteger())), else_=meta.c.epoch) + 1,
            put_back_at=case((or_(older, ahead), clock.now), else_=meta.c.put_back_at),
            unread=case((or_(older, literal(unread)), true()), else_=meta.c.unread),
        )
        returned = change.returning(meta.c.epoch, meta.c.put_back_at, meta.c.unread)
        row = session.connection.execute(returned).one()
        return Standing(row.epoch, row.put_back_at, row.unread)

    @verb
    def mark_read(self, session: Session, before: Standing) -> bool:
        """Record that all blobs of the store are recorded; *before* is ``standing`` before they were read.

        Returns whether it was: not if an older copy of the ledger was put back meanwhile.
        """
        same = (meta.c.epoch >= self.epoch, meta.c.put_back_at.is_not_distinct_from(before.put_back_at))
        return session.connection.execute(update(meta).where(*same).values(unread=False)).rowcount == 1

    # -- blobs -------------------------------------------------------------------------------

    @verb
    def mark_verified(self, session: Session, digests: Collection[str]) -> None:
        """Record that the bytes of these blobs were read just now and are right."""
        right = update(blob).where(blob.c.digest.in_(digests), blob.c.state == BlobState.PRESENT.value)
        session.connection.execute(right.values(verified_at=self._context.worker.now))

    @verb
    def adopt_blobs(self, session: Session, found: Mapping[str, int]) -> frozenset[str]:
        """Record blobs whose bytes are right (sizes by digest) as present; return which are so now.

        Left out are those recorded with another size, and those whose deletion has begun.
        """
        now = self._context.worker.now
        fresh = Insert(blob).values(
            digest=bindparam("new_digest"),
            size=bindparam("new_size"),
            state=BlobState.PRESENT.value,
            stored_at=now,
            verified_at=now,
            found_at=now,
        )
        back = fresh.on_conflict_do_update(
            index_elements=[blob.c.digest],
            set_={"state": BlobState.PRESENT.value, "verified_at": now},
            where=and_(blob.c.size == fresh.excluded.size, blob.c.state != BlobState.DELETING.value),
        )
        rows = [{"new_digest": digest, "new_size": size} for digest, size in sorted(found.items())]
        session.connection.execute(back, rows)
        known = recorded_blobs(session, found)
        return frozenset(
            d for d, row in known.items() if (row.state, row.size) == (BlobState.PRESENT, found[d])
        )

    @verb
    def note_files(self, session: Session, found: Mapping[str, tuple[NotedFile, bytes]]) -> frozenset[str]:
        """Record the digests of files by name, each with the stamp of its blob; return the recorded names.

        The blobs, which are stored, are recorded as present. Left out are files whose blob is recorded with
        another size, or whose deletion has begun.
        """
        return arrivals.note(session, self._context.worker, found)

    # -- collecting --------------------------------------------------------------------------

    @verb
    def orphans(self, session: Session, found: Collection[str]) -> frozenset[str]:
        """Return those of the digests that nothing refers to and that are not recorded as present."""
        return _orphans(session, found)

    @verb
    def mark_orphans_deleting(self, session: Session, found: Mapping[str, int]) -> frozenset[str]:
        """Mark those of the blobs (size by digest) that are ``orphans`` as ``deleting``; return which.

        While a blob is ``deleting``, no job completes with it, and no claim is offered it. The future raises
        ``LedgerError`` (``ledger-put-back``) while ``standing`` is ``unread``.
        """
        refuse_unread(session, self.epoch)
        now = self._context.worker.now
        gone = _orphans(session, found)  # locked: a completion with one of them waits, and is refused then
        if not gone:
            return gone
        fresh = Insert(blob).values(
            digest=bindparam("new_digest"),
            size=bindparam("new_size"),
            state=BlobState.DELETING.value,
            stored_at=now,
        )
        again = fresh.on_conflict_do_update(
            index_elements=[blob.c.digest],
            set_={"state": BlobState.DELETING.value, "stored_at": now},
            # not one that was recorded meanwhile (spelled out: IN does not work with many rows)
            where=or_(blob.c.state == BlobState.MISSING.value, blob.c.state == BlobState.DELETING.value),
        )
        rows = [{"new_digest": digest, "new_size": found[digest]} for digest in sorted(gone)]
        session.connection.execute(again, rows)
        there = _locked_states(session, gone)
        return frozenset(digest for digest, state in there.items() if state == BlobState.DELETING)

    @verb
    def superseded(
        self, session: Session, age: float, *, after: str | None = None, limit: int = 1000
    ) -> list[tuple[str, int]]:
        """Return blobs (digest, size) that only old generations of jobs name, for at least *age* seconds.

        In the order of digests, behind *after*, *limit* at most. Left out are those that a current claim may
        have been offered.
        """
        wanted = select(blob.c.digest, blob.c.size).where(*_superseded(self._context.worker, age))
        if after is not None:
            wanted = wanted.where(blob.c.digest > after)
        found = session.connection.execute(wanted.order_by(blob.c.digest).limit(limit))
        return [(row.digest, row.size) for row in found]

    @verb
    def mark_superseded_deleting(
        self, session: Session, digests: Collection[str], age: float
    ) -> frozenset[str]:
        """Mark those of *digests* that are still ``superseded`` as ``deleting``; return which.

        The completions that name them are removed. The future raises as ``mark_orphans_deleting``.
        """
        refuse_unread(session, self.epoch)
        run, clock = session.connection.execute, self._context.worker
        _locked_states(session, digests)
        still = select(blob.c.digest).where(blob.c.digest.in_(digests), *_superseded(clock, age))
        gone = frozenset(run(still).scalars())
        # first: a recorded completion always names a stored blob
        run(delete(completion).where(completion.c.digest.in_(gone)))
        run(
            update(blob)
            .where(blob.c.digest.in_(gone))
            .values(state=BlobState.DELETING.value, stored_at=clock.now)
        )
        return gone

    @verb
    def finish_deletion(self, session: Session, digests: Collection[str] | None) -> frozenset[str]:
        """Mark those of *digests* that are still ``deleting`` as ``missing``; return which.

        ``None``: all that are ``deleting``, by any process.
        """
        change = update(blob).where(blob.c.state == BlobState.DELETING.value)
        if digests is not None:
            change = change.where(blob.c.digest.in_(digests))
        rows = session.connection.execute(
            change.values(state=BlobState.MISSING.value).returning(blob.c.digest)
        )
        return frozenset(rows.scalars())

    # -- history -----------------------------------------------------------------------------

    @verb
    def trim_events(self, session: Session, age: float, limit: int = 5000) -> int:
        """Remove at most *limit* events that are older than *age* seconds; return how many.

        Also those dated as far in the future: recorded by a clock that was wrong, they would stay for years
        (I14).
        """
        clock = self._context.worker
        past = or_(event.c.at < clock.later(-age), event.c.at > clock.later(age + SKEW))
        old = select(event.c.id).where(past).order_by(event.c.id).limit(limit)
        return session.connection.execute(delete(event).where(event.c.id.in_(old))).rowcount


def _orphans(session: Session, found: Collection[str]) -> frozenset[str]:
    there = _locked_states(session, found)
    bare = {digest for digest, state in there.items() if state in (BlobState.MISSING, BlobState.DELETING)}
    unknown = frozenset(found) - there.keys()
    return unknown | (bare - referred(session, bare))


def _locked_states(session: Session, digests: Collection[str]) -> dict[str, str]:
    """Return the blobs' states; their rows are locked until the transaction ends, in one order."""
    wanted = select(blob.c.digest, blob.c.state).where(blob.c.digest.in_(digests))
    rows = session.connection.execute(wanted.order_by(blob.c.digest).with_for_update())
    return {row.digest: row.state for row in rows}


def _superseded(worker: WorkerIdentity, age: float) -> tuple[ColumnElement[bool], ...]:
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
        blob.c.state == BlobState.PRESENT.value,
        blob.c.digest.in_(named),
        blob.c.digest.not_in(select(job.c.digest).where(job.c.digest.is_not(None))),
        blob.c.digest.not_in(select(representation.c.digest)),
        blob.c.digest.not_in(current),
        # a current claim may have been offered these bytes before others replaced them
        blob.c.digest.not_in(on_same_url.where(other.c.state == JobState.LEASED.value)),
        blob.c.digest.not_in(stands.where(representation.c.fetched_at > worker.later(-age))),
    )


def recorded_identity(database: Database) -> tuple[str, str, int] | None:
    """Return the store's id, the ledger's id and the epoch in a database, ``None`` without a ledger.

    By a connection that may write, since a log that a killed process left has to be replayed first. Raises
    ``LedgerError``.
    """
    row = _meta_row(database, meta.c.store_id, meta.c.ledger_id, meta.c.epoch)
    return None if row is None else (row.store_id, row.ledger_id, row.epoch)


def _meta_row(database: Database, *columns: Column[Any]) -> Any:
    """Return the row of ``ss_meta``, ``None`` if the database has none."""
    connection = database.connect(False)
    try:
        with database.transaction(connection, lambda: False):
            if not inspect(connection).has_table(meta.name):
                return None
            return connection.execute(select(*columns)).one_or_none()
    except SQLAlchemyError as error:
        raise database.translate(error) from error
    finally:
        database.discard_connection(connection)
