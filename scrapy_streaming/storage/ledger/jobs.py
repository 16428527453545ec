"""The verbs of a worker: claim, renew, complete, fail and release jobs, and read what a download needs.

What may live here: verbs that every download uses, so their SQL is compiled once (``statements``).
``effects`` has those for effects, ``admin`` those for maintenance.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import bindparam, func, not_, select, update

from scrapy_streaming.exceptions import KeyConflict
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import (
    Claim,
    Completion,
    Dead,
    Done,
    Granted,
    Held,
    JobEvent,
    JobState,
    Lease,
    NotedFile,
    RecordedName,
    StoredRepresentation,
    Waiting,
)
from scrapy_streaming.redaction import url_without_userinfo
from scrapy_streaming.storage.job_request import JobRequest
from scrapy_streaming.storage.ledger import arrivals
from scrapy_streaming.storage.ledger import statements as sql
from scrapy_streaming.storage.ledger.commands import Verbs, verb
from scrapy_streaming.storage.ledger.prepared import Session
from scrapy_streaming.storage.ledger.recording import (
    blob_refused,
    dated_back,
    ended_before,
    lease_lost,
    portions,
    record_representation,
)
from scrapy_streaming.storage.ledger.records import damaged_row, safe_error
from scrapy_streaming.storage.ledger.rows import as_completion, as_representation, check_row, reading_job
from scrapy_streaming.storage.ledger.schema import blob, completion, job
from scrapy_streaming.storage.ledger.transitions import changed, in_state, may

#: Seconds of the longest first back-off.
BACKOFF_FIRST: Final = 5.0
#: ``Dead.error`` of a job for which no worker recorded an error.
NO_ERROR: Final = "no worker that claimed this job recorded an end or an error: each was killed or stopped"


def backoff(attempts: int, rng: random.Random) -> float:
    """Return the seconds to wait after *attempts* claims: exponential, with full jitter.

    Between 0 and ``BACKOFF_FIRST`` doubled for each attempt, at most ``BACKOFF_MAX`` (M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog).
    """
    doublings = min(max(attempts - 1, 0), 30)
    return rng.uniform(0.0, min(sql.BACKOFF_MAX, BACKOFF_FIRST * 2**doublings))


@dataclass(frozen=True, slots=True)
class _Stored:
    """How a blob was made and named; see ``Jobs.complete``."""

    resumed_from: int
    path: str | None
    by_response: bool


@dataclass(frozen=True, slots=True)
class _Failure:
    """How a claim failed: ``retry_after`` in seconds, from the server; see ``Jobs.fail``."""

    error_code: str
    error: str
    permanent: bool
    retry_after: float | None
    progress: bool


class Jobs(Verbs):
    """Each verb returns a future at once, which is done when its transaction is committed.

    Callbacks run in the writer's thread and must be short. While the database is unreachable, locked or
    full, futures wait. Beside what a verb documents, a future may raise ``LedgerError``, and
    ``WriteFailed`` if the disk stays full; nothing was changed then. Every verb raises ``LedgerError``
    (``ledger-closed``) after ``Ledger.close``.
    """

    _random: random.Random

    # -- claim -------------------------------------------------------------------------------

    def claim(
        self,
        key: str,
        request: JobRequest,
        *,
        refresh_before: float | None = None,
        kept: int = 0,
        work_started: bool = True,
    ) -> Future[Claim]:
        """Claim the job *key*, which is created if it is missing.

        Returns ``Granted`` if the job is new, ready, failed, or its lease has expired. Also if it is done
        and its bytes are missing, or it was done before *refresh_before* (seconds since the epoch; ``inf``
        for always), in the future, or before an older copy of the ledger was put back. Otherwise ``Held``,
        ``Waiting``, ``Done`` or ``Dead``. *kept* is how many bytes earlier claims left: more than at the
        last claim is progress, and resets the attempts (ledger rule 9). Without *work_started* the claim
        counts as an attempt only after ``begin_work``. The future raises ``KeyConflict`` if another request
        has the key (I18).
        """
        terms = {"refresh_before": refresh_before, "kept": kept, "begun": work_started, "epoch": self.epoch}
        claim_id = secrets.token_hex(16)  # made here, so that a batch that runs again finds its own claim
        return self.submit(lambda session: self._claimed(session, key, request, claim_id, terms), key)

    def _claimed(
        self, session: Session, key: str, request: JobRequest, claim_id: str, terms: Mapping[str, Any]
    ) -> Claim:
        row = session.run(
            self._context.statements.claim,
            job_key=key,
            request_hash=request.request_hash,
            work_id=request.work_id,
            artifact_id=request.artifact_id,
            url=request.url,
            url_key=request.url_key,
            claim_id=claim_id,
            **_repeat_columns(request),
            **terms,
        )
        if row is None:
            return self._refused(session, key, request, claim_id)
        check_row(row, key, request)
        lease = Lease(row.id, key, row.fence, claim_id, row.lease_until, row.generation)
        self._context.record(session, lease, row.taken_from, JobState.LEASED, row.updated_at)
        return self._granted(session, lease, request, row)

    def _granted(self, session: Session, lease: Lease, request: JobRequest, row: Any) -> Granted:
        """Return the grant, with the URL's stored representation and the job's last completion."""
        run, last, previous = self._context.statements, lease.generation - 1, None
        with reading_job(lease.job_key):
            if last:
                found = session.run(run.completion, job_id=lease.job_id, generation=last)
                previous = None if found is None else as_completion(found)
            known = session.run(run.known, url_key=request.url_key, job_id=lease.job_id, generation=last)
            return Granted(
                lease,
                None
                if known is None
                else as_representation(known, known.final_url or request.url, known.fetched_at),
                row.taken_from == JobState.LEASED,
                previous,
            )

    def _refused(self, session: Session, key: str, request: JobRequest, claim_id: str) -> Claim:
        """Return why the job is not granted; mark it dead if its last attempt has expired (I13)."""
        with reading_job(key):
            row = session.run(self._context.statements.job, job_key=key)
            if row is None:
                raise damaged_row(key, "its row is not found under its key")
            state = JobState(row.state)
        if row.request_hash != request.request_hash:
            if not request.artifact_id:  # only a plain GET of the URL has this key
                raise damaged_row(key, "its request_hash does not match its URL")
            msg = f"job {key} belongs to another request for {row.url}; give this one an artifact id"
            raise KeyConflict(msg)
        check_row(row, key, request)
        match state:
            case JobState.LEASED if row.claim_id == claim_id:  # by a COMMIT whose answer did not arrive
                lease = Lease(row.id, key, row.fence, claim_id, row.lease_until, row.generation)
                return self._granted(session, lease, request, row)
            case JobState.LEASED:
                exhausted = row.attempts >= self._context.worker.max_attempts
                dead = self._exhausted(session, row) if exhausted else None
                return dead or Held(row.worker_name or str(row.worker), row.lease_until)
            case JobState.READY | JobState.FAILED:
                # a failed job is always claimable, but on PostgreSQL it may have failed just now
                return Waiting(row.not_before or 0.0, row.error or "")
            case JobState.DONE:
                with reading_job(key):
                    run = self._context.statements
                    done = session.run(run.completion, job_id=row.id, generation=row.generation)
                    if done is None:
                        raise damaged_row(key, "it is done, and its completion or its blob is not recorded")
                    return Done(as_completion(done))
            case JobState.DEAD:
                return Dead(row.attempts, row.error or "")

    def _exhausted(self, session: Session, row: Any) -> Dead | None:
        """Mark the job dead if the lease in *row* has expired; ``None`` if its holder may still write."""
        worker = self._context.worker
        values = changed(JobEvent.EXHAUST) | {
            "error_code": "attempts-exhausted",
            "error": func.coalesce(job.c.error, NO_ERROR),
            "finished_at": worker.now,
            "updated_at": worker.now,
        }
        dead = session.connection.execute(
            update(job)
            .where(
                job.c.id == row.id,
                may(JobEvent.EXHAUST),
                job.c.fence == row.fence,
                job.c.begun,  # else it can be claimed: its lease has expired since the claim was refused
                sql.expired(worker),
            )
            .values(values)
            .returning(job.c.attempts, job.c.error, job.c.updated_at)
        ).one_or_none()
        if dead is None:
            return None
        ended = Lease(row.id, row.job_key, row.fence, row.claim_id, row.lease_until, row.generation)
        self._context.record(session, ended, JobState.LEASED, JobState.DEAD, dead.updated_at)
        return Dead(dead.attempts, dead.error)

    @verb
    def free(self, session: Session, keys: Collection[str]) -> frozenset[str]:
        """Return those of *keys* for which there is no current lease."""
        held: set[str] = set()
        for some in portions(keys):
            statement = select(job.c.job_key).where(
                job.c.job_key.in_(some),
                in_state(JobState.LEASED),
                not_(sql.expired(self._context.worker)),
            )
            held.update(session.connection.execute(statement).scalars())
        return frozenset(keys) - held

    @verb
    def begin_work(self, session: Session, lease: Lease, *, unlike: bool = False) -> None:
        """Record that the work on a claim begins, which counts as an attempt; may raise ``LeaseLost``.

        *unlike*: its request differs from a plain GET, whatever ``Repeat`` recorded at the claim.
        """
        run = self._context.statements
        if session.run(run.begin_unlike if unlike else run.begin, **sql.held(lease)) is None:
            raise lease_lost(lease)

    def renew(self, begins: Callable[[], object] = lambda: None) -> Future[frozenset[str]]:
        """Renew every lease of this worker; return the ids of its current claims (ledger rule 8).

        Runs before all queued commands. *begins* is called in the writer's thread just before the database
        reads the time from which the new leases count.
        """

        def command(session: Session) -> frozenset[str]:
            begins()
            return frozenset(row.claim_id for row in session.all(self._context.statements.renew, {}))

        return self.submit(command, urgent=True)

    # -- complete ----------------------------------------------------------------------------

    def complete(
        self,
        lease: Lease,
        known: StoredRepresentation,
        *,
        resumed_from: int = 0,
        path: str | None = None,
        by_response: bool = False,
    ) -> Future[Completion]:
        """Record that the job is done and its blob stored, in one transaction (ledger rule 3).

        *path* is the name that was given to the blob, below the store's root, and ``known.name.stamp`` the
        stamp of its file; *by_response*: the name depends on the response. ``known.stamp`` is the blob's,
        recorded if there is one. ``known.fetched_at`` is ignored: the database's time counts, or
        ``known.stored_at`` if that is earlier. Userinfo in ``known.final_url`` is not recorded.
        *resumed_from* is the length in bytes of the part that the download continued. A repeated call for
        the same claim returns the first completion (ledger rule 4). The future raises ``LeaseLost``,
        ``IntegrityError`` if the blob is recorded with another size, or ``BlobGoing`` while ``gc`` deletes
        it. Raises ``ValueError`` if ``known.digest`` is not a digest.
        """
        known = replace(known, digest=str(Digest.parse(known.digest)))
        stored = _Stored(resumed_from, path, by_response)
        return self.submit(lambda session: self._completed(session, lease, known, stored), lease.job_key)

    def _completed(
        self, session: Session, lease: Lease, known: StoredRepresentation, stored: _Stored
    ) -> Completion:
        run, bytes_ = self._context.statements, {"new_digest": known.digest, "new_size": known.size}
        put = session.run(run.put_blob, new_stamp=known.stamp, **bytes_)
        row = session.run(run.complete, **bytes_, **sql.held(lease))
        if row is None:
            session.undo()  # the blob: neither a stale claim nor a repeated call changes anything
            return self._recorded(session, lease)
        if put is None:
            raise blob_refused(session, run, known)
        at = row.finished_at
        if known.stored_at is not None:
            at = dated_back(session, lease, known.stored_at, at)
        name_stamp = None if known.name is None else known.name.stamp
        name = None if stored.path is None else RecordedName(stored.path, name_stamp)
        known = replace(known, final_url=url_without_userinfo(known.final_url), fetched_at=at, name=name)
        record_representation(session, run, row, known)
        session.run(
            run.put_completion,
            job_id=lease.job_id,
            generation=row.generation,
            fence=lease.fence,
            claim_id=lease.claim_id,
            worker=self._context.worker.number,
            digest=known.digest,
            size=known.size,
            resumed_from=stored.resumed_from,
            path=stored.path,
            completed_at=at,
            stamp=None if name is None else name.stamp,
            by_response=stored.by_response,
        )
        self._context.record(session, lease, JobState.LEASED, JobState.DONE, at)
        return Completion(
            lease.claim_id, known, at, lease.job_id, row.generation, stored.path, stored.by_response
        )

    def _recorded(self, session: Session, lease: Lease) -> Completion:
        """Return what this claim recorded before, in case the answer did not arrive (ledger rule 4)."""
        with reading_job(lease.job_key):
            run = self._context.statements
            row = session.run(run.completion, job_id=lease.job_id, generation=lease.generation)
            if row is None or row.claim_id != lease.claim_id:
                raise lease_lost(lease)
            return as_completion(row)

    # -- the other ends of a claim -----------------------------------------------------------

    @verb
    def release(self, session: Session, lease: Lease) -> None:
        """Make the job ready again; the attempt does not count. May raise ``LeaseLost``."""
        row = session.run(self._context.statements.release, **sql.held(lease))
        if row is not None:
            self._context.record(session, lease, JobState.LEASED, JobState.READY, row.updated_at)
        elif not ended_before(session, lease, JobState.READY):
            raise lease_lost(lease)

    def fail(
        self,
        lease: Lease,
        error_code: str,
        error: str,
        *,
        permanent: bool,
        retry_after: float | None = None,
        progress: bool = False,
    ) -> Future[None]:
        """End the claim with an error; the future may raise ``LeaseLost`` (ledger rule 9).

        *permanent*: the job is failed until the next claim. Otherwise it is ready after a back-off, which
        binds this run only, or after the server's *retry_after* (seconds, an hour at most), which binds
        every run. *progress*: the claim gained bytes, which resets the attempts.
        """
        failure = _Failure(error_code, error, permanent, retry_after, progress)
        return self.submit(lambda session: self._failed(session, lease, failure), lease.job_key)

    def _failed(self, session: Session, lease: Lease, failure: _Failure) -> None:
        worker = self._context.worker
        alive = session.run(self._context.statements.alive, **sql.held(lease))
        values = changed(JobEvent.FAIL_PERMANENT if failure.permanent else JobEvent.FAIL_TRANSIENT)
        to = JobState(values["state"])
        if alive is None:
            if ended_before(session, lease, to):
                return
            raise lease_lost(lease)
        values |= {
            "error_code": failure.error_code,
            "error": safe_error(failure.error),
            "updated_at": worker.now,
        }
        if failure.progress:
            values["attempts"] = 0
        if failure.permanent:
            values["finished_at"] = worker.now
        else:
            values["not_before"] = worker.now + self._delay(alive.attempts, failure)
            values["not_before_by"] = worker.number
            values["not_before_server"] = failure.retry_after is not None
        statement = update(job).where(sql.guard()).values(values).returning(job.c.updated_at)
        at = session.connection.execute(statement, sql.held(lease)).scalar_one()
        self._context.record(session, lease, JobState.LEASED, to, at)

    def _delay(self, attempts: int, failure: _Failure) -> float:
        if failure.retry_after is not None:
            return min(max(0.0, failure.retry_after), sql.BACKOFF_MAX)
        return backoff(0 if failure.progress else attempts, self._random)

    # -- beside a claim ----------------------------------------------------------------------

    @verb
    def note_blob(self, session: Session, digest: str, stamp: bytes) -> None:
        """Record the stamp of a blob whose bytes are right, if it is recorded as present (R77)."""
        session.run(self._context.statements.note_blob, of_digest=digest, new_stamp=stamp)

    @verb
    def note_name(self, session: Session, done: Completion, name: RecordedName) -> None:
        """Record the current name of a completion's bytes."""
        values = {"new_path": name.path, "new_stamp": name.stamp}
        session.run(self._context.statements.note_name, of_job=done.job_id, of=done.generation, **values)

    @verb
    def delivered(self, session: Session, completions: Collection[Completion]) -> None:
        """Record that the items of these completions were passed on, unless that is recorded."""
        places = sorted({(done.job_id, done.generation) for done in completions})
        session.connection.execute(
            update(completion)
            .where(
                completion.c.job_id == bindparam("job"),
                completion.c.generation == bindparam("of"),
                completion.c.delivered_at.is_(None),
            )
            .values(delivered_at=self._context.worker.now),
            [{"job": job_id, "of": generation} for job_id, generation in places],
        )

    @verb
    def set_blob_state(self, session: Session, digest: str, to: str, origins: Collection[str]) -> bool:
        """Change a blob's state if it is one of *origins*; return whether it was.

        A blob that is not ``present`` is offered to no claim, and a job done with it is granted again.
        """
        change = update(blob).where(blob.c.digest == digest, blob.c.state.in_(origins)).values(state=to)
        return session.connection.execute(change).rowcount == 1

    @verb
    def adoptable(self, session: Session, digest: str, path: str) -> bool:
        """Return whether an adopted file may be the result of a job that was never done (C6, C11)."""
        return arrivals.is_adoptable(session, digest, path)

    @verb
    def noted_files(self, session: Session, paths: Collection[str]) -> dict[str, NotedFile]:
        """Return what ``Admin.note_files`` recorded of *paths*, ``AT_ONCE`` at most, by path."""
        return arrivals.noted(session, paths)


def _repeat_columns(request: JobRequest) -> dict[str, Any]:
    """Return the columns for ``request.repeat``; its URL only if it differs from the job's."""
    repeat = request.repeat
    if repeat is None:
        return {"plain": None, "asked_url": None, "asked_name": None}
    url = None if repeat.url == request.url else repeat.url
    return {"plain": repeat.plain, "asked_url": url, "asked_name": repeat.name}
