"""The verbs that only read, for commands, maintenance and exports.

What may live here: verbs that run in one transaction and write nothing, so that a read-only ledger has all
of them. ``jobs`` has what a download reads.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from sqlalchemy import (
    Column,
    ColumnElement,
    Select,
    Table,
    and_,
    exists,
    func,
    not_,
    or_,
    select,
    union_all,
)

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.protocol.portable import Record
from scrapy_streaming.storage.blob_state import BlobState
from scrapy_streaming.storage.ledger import carrying
from scrapy_streaming.storage.ledger import statements as sql
from scrapy_streaming.storage.ledger.commands import Verbs, verb
from scrapy_streaming.storage.ledger.database import Database
from scrapy_streaming.storage.ledger.invariants import INVARIANTS
from scrapy_streaming.storage.ledger.prepared import Session
from scrapy_streaming.storage.ledger.records import (
    BlobRow,
    CompletionRow,
    EventRow,
    FailedJob,
    JobDetails,
    JobView,
    NameRow,
    OperationRow,
    Standing,
)
from scrapy_streaming.storage.ledger.row_checks import unsound
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
from scrapy_streaming.storage.ledger.transitions import in_state

#: Values in one statement at most; databases accept more (SQLite 32,766).
AT_ONCE: Final = 5000
#: Rows of one kind that ``invariant_violations`` names, and URLs of a blob.
NAMED: Final = 10
#: The reason of a failed job whose older release recorded none.
UNNOTED: Final = "unknown"

_JOBS: Final[Select[Any]] = select(job, worker.c.name.label("worker_name")).join(
    worker, worker.c.id == job.c.worker, isouter=True
)
#: Fields of ``JobView`` that are not columns of the same name and meaning.
_DERIVED: Final = ("key", "state", "worker_id", "plain", "asked_url", "asked_name", "named_by_url")


class Queries(Verbs):
    """Each verb returns a future, which may raise ``LedgerError`` beside what the verb documents.

    A verb for several keys, digests or names accepts at most ``AT_ONCE``.
    """

    _database: Database

    # -- jobs --------------------------------------------------------------------------------

    @verb
    def job(self, session: Session, key: str) -> JobView | None:
        """Return one job, ``None`` if there is none with this key."""
        row = session.connection.execute(sql.JOB, {"job_key": key}).one_or_none()
        return None if row is None else _job_view(row)

    @verb
    def jobs(
        self, session: Session, state: JobState | None = None, *, after: int = 0, limit: int = 1000
    ) -> list[JobView]:
        """Return the jobs with an id above *after*, in the order of ids, *limit* at most."""
        wanted = _JOBS.where(job.c.id > after).order_by(job.c.id).limit(limit)
        if state is not None:
            wanted = wanted.where(in_state(state))
        return [_job_view(row) for row in session.connection.execute(wanted)]

    @verb
    def find(
        self, session: Session, *, url: str | None = None, prefix: str | None = None, limit: int = 100
    ) -> list[JobView]:
        """Return at most *limit* jobs on *url*, or whose key or digest begins with *prefix* (hex digits)."""
        if prefix is not None:
            referring = select(completion.c.job_id).where(_begins(completion.c.digest, prefix))
            which = or_(
                _begins(job.c.job_key, prefix), _begins(job.c.digest, prefix), job.c.id.in_(referring)
            )
        else:
            which = job.c.url == url
        wanted = _JOBS.where(which).order_by(job.c.id).limit(limit)
        return [_job_view(row) for row in session.connection.execute(wanted)]

    @verb
    def keys(self, session: Session, prefix: str) -> list[str]:
        """Return the keys that begin with *prefix* (hex digits), two at most."""
        wanted = select(job.c.job_key).where(_begins(job.c.job_key, prefix)).limit(2)
        return list(session.connection.execute(wanted).scalars())

    @verb
    def details(self, session: Session, job_id: int, *, limit: int = 100) -> JobDetails:
        """Return the completions, operations and latest *limit* events of a job, in the order of time."""
        run = session.connection.execute
        done = select(completion).where(completion.c.job_id == job_id).order_by(completion.c.generation)
        operations = select(operation).where(operation.c.job_id == job_id).order_by(operation.c.updated_at)
        history = (
            select(event, worker.c.name.label("worker_name"))
            .join(worker, worker.c.id == event.c.worker, isouter=True)
            .where(event.c.job_id == job_id)
            .order_by(event.c.id.desc())
            .limit(limit)
        )
        return JobDetails(
            tuple(_as(CompletionRow, row) for row in run(done)),
            tuple(_as(OperationRow, row) for row in run(operations)),
            tuple(_as(EventRow, row) for row in reversed(run(history).all())),
        )

    @verb
    def states_of(self, session: Session, keys: Collection[str]) -> dict[str, JobState]:
        """Return the states of those of *keys* that are recorded."""
        found = select(job.c.job_key, job.c.state).where(job.c.job_key.in_(keys))
        return {row.job_key: JobState(row.state) for row in session.connection.execute(found)}

    @verb
    def failed(self, session: Session, *, after: int = 0, limit: int = 1000) -> list[FailedJob]:
        """Return the jobs with an id above *after* whose last attempt failed, in the order of ids."""
        ended = or_(in_state(JobState.FAILED), in_state(JobState.DEAD))
        again = and_(in_state(JobState.READY), job.c.error_code.is_not(None))
        columns: tuple[Any, ...] = (job.c.id, job.c.job_key, job.c.url, job.c.state, job.c.error_code)
        wanted = select(*columns).where(job.c.id > after, or_(ended, again)).order_by(job.c.id).limit(limit)
        return [
            FailedJob(row.id, row.job_key, row.url, JobState(row.state), row.error_code or UNNOTED)
            for row in session.connection.execute(wanted)
        ]

    @verb
    def job_counts(self, session: Session, work_id: str | None = None) -> dict[JobState, int]:
        """Return how many jobs are in each state, those of one work id or all."""
        wanted = _by_state()
        if work_id is not None:
            wanted = wanted.where(job.c.work_id == work_id)
        found = dict.fromkeys(JobState, 0)
        for state, number in session.connection.execute(wanted):
            found[JobState(state)] = number
        return found

    @verb
    def counts(self, session: Session) -> dict[str, int]:
        """Return how many jobs are in each state, and ``blobs`` and ``blob_bytes`` that are present."""
        stored = session.connection.execute(
            select(func.count(), func.coalesce(func.sum(blob.c.size), 0)).where(
                blob.c.state == BlobState.PRESENT.value
            )
        ).one()
        found = {state.value: 0 for state in JobState}
        found |= {row[0]: row[1] for row in session.connection.execute(_by_state())}
        return found | {"blobs": int(stored[0]), "blob_bytes": int(stored[1])}

    @verb
    def records(self, session: Session, after: int = 0, limit: int = 1000) -> list[tuple[int, Record]]:
        """Return the last completion of each job with an id above *after*, with that id, in their order.

        Those whose bytes are not present are left out.
        """
        return carrying.records(session, after, limit)

    # -- blobs and names ---------------------------------------------------------------------

    @verb
    def blob_rows(self, session: Session, after: str | None = None, limit: int = 1000) -> list[BlobRow]:
        """Return the blobs behind the digest *after*, in the order of digests."""
        wanted = _blobs().order_by(blob.c.digest).limit(limit)
        if after is not None:
            wanted = wanted.where(blob.c.digest > after)
        return [_as(BlobRow, row) for row in session.connection.execute(wanted)]

    @verb
    def blobs_of(self, session: Session, digests: Collection[str]) -> dict[str, BlobRow]:
        """Return those of *digests* that are recorded."""
        return recorded_blobs(session, digests)

    @verb
    def names(self, session: Session, after: int = 0, limit: int = 1000) -> list[NameRow]:
        """Return the names of bytes that are present, one for each job with an id above *after*."""
        later = completion.alias("later")
        newer = exists().where(
            later.c.job_id == completion.c.job_id, later.c.generation > completion.c.generation
        )
        wanted = (
            select(completion.c.job_id, completion.c.path, completion.c.digest, completion.c.size)
            .join(blob, blob.c.digest == completion.c.digest)
            .where(
                completion.c.job_id > after,
                completion.c.path.is_not(None),
                blob.c.state == BlobState.PRESENT.value,
            )
            .where(not_(newer))
            .order_by(completion.c.job_id)
            .limit(limit)
        )
        return [_as(NameRow, row) for row in session.connection.execute(wanted)]

    @verb
    def blobs_like(self, session: Session, prefix: str, limit: int = 100) -> list[BlobRow]:
        """Return the blobs whose digest begins with *prefix* (hex digits)."""
        wanted = _blobs().where(_begins(blob.c.digest, prefix)).order_by(blob.c.digest).limit(limit)
        return [_as(BlobRow, row) for row in session.connection.execute(wanted)]

    @verb
    def urls_of(self, session: Session, digest: str) -> list[str]:
        """Return the URLs, ``NAMED`` at most, that the blob represents now, by the jobs on them."""
        same = (job.c.url_key == representation.c.url_key, representation.c.digest == digest)
        wanted = select(job.c.url).distinct().where(and_(*same)).order_by(job.c.url).limit(NAMED)
        return list(session.connection.execute(wanted).scalars())

    # -- an older copy of the ledger ---------------------------------------------------------

    @verb
    def standing(self, session: Session) -> Standing:
        """Return the ledger's standing; ``unread`` also if its epoch is below the store's."""
        return _standing(session, self.epoch)

    @verb
    def refuse_older(self, session: Session) -> None:
        """Raise ``LedgerError`` (``ledger-put-back``) in the future if ``standing`` is ``unread``."""
        refuse_unread(session, self.epoch)

    # -- health ------------------------------------------------------------------------------

    def check(self) -> list[str]:
        """Return what is damaged in the database's files or in a row of any table, in words.

        Blocks in the caller's thread, on its own connection, so that no command waits. Raises
        ``LedgerError`` if nothing can be read.
        """
        return unsound(self._database)

    @verb
    def invariant_violations(self, session: Session) -> list[str]:
        """Return the violated invariants with rows that break them, in words; nothing is repaired."""
        found: list[str] = []
        for what, rows in INVARIANTS:
            named = [str(row[0]) for row in session.connection.execute(rows.limit(NAMED + 1))]
            if named:
                more = " …" if len(named) > NAMED else ""
                found.append(f"{what}: {', '.join(named[:NAMED])}{more}")
        return found

    @verb
    def degraded_counts(self, session: Session) -> dict[str, int]:
        """Count what is degraded, and repaired when a crawl next needs it.

        ``missing`` and ``quarantined``: blobs in that state that are referred to. ``left``: jobs leased to
        workers that have ended.
        """
        run = session.connection.execute
        lacking = run(
            _blobs().where(blob.c.state.in_((BlobState.MISSING.value, BlobState.QUARANTINED.value)))
        ).all()
        found = {"missing": 0, "quarantined": 0}
        states = {row.digest: row.state for row in lacking}
        digests = sorted(states)
        for start in range(0, len(digests), AT_ONCE):
            for digest in referred(session, digests[start : start + AT_ONCE]):
                found[states[digest]] += 1
        left = select(func.count()).select_from(job.join(worker, worker.c.id == job.c.worker))
        left = left.where(in_state(JobState.LEASED), worker.c.ended_at.is_not(None))
        return found | {"left": int(run(left).scalar_one())}

    @verb
    def table_rows(self, session: Session) -> dict[str, int]:
        """Return how many rows each table has."""
        count: Any = session.connection.execute
        return {table.name: int(count(_count(table)).scalar_one()) for table in metadata.sorted_tables}

    @verb
    def schema_version(self, session: Session) -> int:
        """Return the version of the tables."""
        return int(session.connection.execute(select(meta.c.schema_version)).scalar_one())


# -- parts of queries, also for verbs that write ---------------------------------------------


def recorded_blobs(session: Session, digests: Collection[str]) -> dict[str, BlobRow]:
    """Return those of *digests* that are recorded."""
    found = session.connection.execute(_blobs().where(blob.c.digest.in_(digests)))
    return {row.digest: _as(BlobRow, row) for row in found}


def referred(session: Session, digests: Collection[str]) -> frozenset[str]:
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


def refuse_unread(session: Session, seen: int) -> None:
    """Raise ``LedgerError`` (``ledger-put-back``) if there may be blobs that the ledger does not have."""
    if _standing(session, seen).unread:
        msg = (
            "the store may hold blobs that its ledger does not know: an older copy of the ledger was put "
            "back, a crawl ran without it, or a rebuild was interrupted"
        )
        raise LedgerError(msg, reason="ledger-put-back")


def _standing(session: Session, seen: int) -> Standing:
    row = session.connection.execute(select(meta.c.epoch, meta.c.put_back_at, meta.c.unread)).one()
    return Standing(row.epoch, row.put_back_at, row.unread or row.epoch < seen)


def _by_state() -> Select[Any]:
    return select(job.c.state, func.count()).group_by(job.c.state)


def _job_view(row: Any) -> JobView:
    same = {name: getattr(row, name) for name in JobView.__slots__ if name not in _DERIVED}
    return JobView(
        key=row.job_key,
        state=JobState(row.state),
        worker_id=row.worker_name,
        plain=None if row.plain is None else bool(row.plain),
        asked_url=row.asked_url or (row.url if row.plain else None),
        asked_name=row.asked_name or None,
        named_by_url=row.asked_name == "",
        **same,
    )


def _begins(column: ColumnElement[Any], prefix: str) -> ColumnElement[bool]:
    """Return the condition that a key begins with *prefix*, in a form that an index can serve."""
    return column.between(prefix.ljust(64, "0"), prefix.ljust(64, "f"))


def _as(kind: type[Any], row: Any) -> Any:
    """Return *row* as a record whose fields have the names of its columns."""
    return kind(**{name: getattr(row, name) for name in kind.__slots__})


def _blobs() -> Select[Any]:
    wanted: tuple[Column[Any], ...] = (
        *(blob.c.digest, blob.c.size, blob.c.state),
        *(blob.c.stored_at, blob.c.verified_at),
    )
    return select(*wanted, blob.c.stamp.is_not(None).label("has_file"))


def _count(table: Table) -> Select[Any]:
    return select(func.count()).select_from(table)
