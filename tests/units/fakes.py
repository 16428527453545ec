"""Stand-ins for what the runtime is given: a ledger in memory, statistics, a clock.

What may live here: implementations of a port of the runtime that need no file, thread, database or
event loop, so that a test of the runtime takes milliseconds. Each keeps to the contract of the real
thing, which ``tests/storage/test_fake_ledger.py`` and ``tests/components/test_fake_stats.py`` check by
running both; what a test may order beside that (a failure, a pause) is named so.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from scrapy_streaming.exceptions import BlobGoing, IntegrityError, KeyConflict, LeaseLost, LedgerError
from scrapy_streaming.protocol.jobs import (
    SKEW,
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
    transition,
)
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.redaction import url_without_userinfo

if TYPE_CHECKING:  # its package loads the parts and the blobs, which no fake needs
    from scrapy_streaming.storage.job_request import JobRequest

#: Seconds of the first back-off, and of any. The real one draws between 0 and this; here it is this.
BACKOFF_FIRST, BACKOFF_MAX = 5.0, 3600.0
#: The real ledger's words for a job that no worker ended; seconds that a lease lasts at most.
NO_ERROR: Final = "no worker that claimed this job recorded an end or an error: each was killed or stopped"
LEASE_MAX: Final = 86400.0
#: Seconds after which a blob's deletion that was begun counts as abandoned.
DELETION_LASTS: Final = 300.0


class FakeClock:
    """A clock that only a test moves; seconds."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> float:
        """Move the clock on (or back); return the new time."""
        self.now += seconds
        return self.now


class FakeStats:
    """The statistics of a crawl, as Scrapy's collector has them; ``values`` is all of them."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def get_value(self, key: str, default: Any = None, spider: object = None) -> Any:
        return self.values.get(key, default)

    def get_stats(self, spider: object = None) -> dict[str, Any]:
        return self.values

    def set_value(self, key: str, value: Any, spider: object = None) -> None:
        self.values[key] = value

    def inc_value(self, key: str, count: int = 1, start: int = 0, spider: object = None) -> None:
        self.values[key] = self.values.setdefault(key, start) + count

    def max_value(self, key: str, value: Any, spider: object = None) -> None:
        self.values[key] = max(self.values.setdefault(key, value), value)

    def min_value(self, key: str, value: Any, spider: object = None) -> None:
        self.values[key] = min(self.values.setdefault(key, value), value)


@dataclass
class FakeJob:
    """One job's record; the fields that ``JobView`` has too mean the same."""

    id: int
    key: str
    request: JobRequest
    state: JobState = JobState.READY
    generation: int = 1
    fence: int = 0
    attempts: int = 0
    max_attempts: int = 0
    claim_id: str = ""
    worker_id: str = ""
    lease_until: float | None = None
    updated_at: float = 0.0
    finished_at: float | None = None
    kept: int = 0
    begun: bool = True
    unlike: bool = False
    not_before: float | None = None
    not_before_by: str | None = None
    not_before_server: bool = False
    digest: str | None = None
    error_code: str | None = None
    error: str | None = None

    @property
    def never_begun(self) -> bool:
        return self.state is JobState.LEASED and not self.begun

    def change(self, event: JobEvent, now: float, origin: JobState | None = None) -> None:
        """Do to the record what the table of transitions says of *event*."""
        step = transition(origin or self.state, event)
        self.state, self.updated_at = step.to, now
        self.fence += step.fence
        self.generation += step.generation
        self.attempts = max(0, self.attempts + step.attempts)
        self.claim_id, self.lease_until = "", None


@dataclass
class FakeBlob:
    """One blob's record. ``found``: its bytes were there before any completion named them."""

    size: int
    state: str = "present"
    stamp: bytes | None = None
    stored_at: float = 0.0
    found: bool = False


@dataclass
class _Records:
    """What the ledgers of several workers share: their database, so to speak."""

    jobs: dict[str, FakeJob] = field(default_factory=dict)
    blobs: dict[str, FakeBlob] = field(default_factory=dict)
    representations: dict[str, StoredRepresentation] = field(default_factory=dict)
    completions: dict[tuple[int, int], Completion] = field(default_factory=dict)
    delivered: dict[tuple[int, int], float] = field(default_factory=dict)
    noted: dict[str, NotedFile] = field(default_factory=dict)
    claims: int = 0


@dataclass(frozen=True, slots=True)
class _Asked:
    """A verb that was called and has no answer yet."""

    verb: str
    command: Callable[[], Any]
    answer: Future[Any]


class FakeLedger:
    """The verbs of ``Ledger`` that a crawl uses, over records in memory.

    A verb is answered before it returns, in the caller's thread, unless the ledger is paused: then its
    future stays open, and nothing changes, until ``resume``. ``calls`` names the verbs in the order of
    their calls. ``records`` are shared with the ledgers of other workers, made by ``for_worker``; times
    are those of *clock*, in seconds. After ``close`` every verb raises ``LedgerError`` (``ledger-closed``).
    """

    def __init__(
        self,
        worker_id: str = "a",
        *,
        clock: Callable[[], float] | None = None,
        lease_seconds: float = 60.0,
        max_attempts: int = 5,
        records: _Records | None = None,
    ) -> None:
        self.worker_id = worker_id
        self.clock = clock or FakeClock()
        self.lease_seconds = lease_seconds
        self.max_attempts = max_attempts
        self.records = records or _Records()
        self.calls: list[str] = []
        self.paused = False
        self._queue: deque[_Asked] = deque()
        self._failures: dict[str, deque[BaseException]] = {}
        self._closed = False

    # -- what a test orders ------------------------------------------------------------------

    def for_worker(self, worker_id: str) -> FakeLedger:
        """Return the ledger of another worker on the same records, with the same clock and limits."""
        return FakeLedger(
            worker_id,
            clock=self.clock,
            lease_seconds=self.lease_seconds,
            max_attempts=self.max_attempts,
            records=self.records,
        )

    def fail_next(self, verb: str, error: BaseException, times: int = 1) -> None:
        """Answer the next *times* calls of *verb* with *error*; they change nothing."""
        if not hasattr(type(self), verb):
            msg = f"FakeLedger has no verb {verb}"
            raise ValueError(msg)
        self._failures.setdefault(verb, deque()).extend([error] * times)

    def pause(self) -> None:
        """Answer no call from now on, as a database does that is away, locked or full."""
        self.paused = True

    def resume(self) -> int:
        """Answer the calls that wait, renewals first as the real writer does; return how many there were."""
        self.paused = False
        asked = sorted(self._queue, key=lambda one: one.verb != "renew")
        self._queue.clear()
        for one in asked:
            self._answer(one)
        return len(asked)

    @property
    def pending(self) -> list[str]:
        """The verbs that wait for ``resume``, in the order of their calls."""
        return [one.verb for one in self._queue]

    def row(self, key: str) -> FakeJob:
        """Return the record of a job, read without a call; raise ``KeyError`` if there is none."""
        return self.records.jobs[key]

    # -- answers -----------------------------------------------------------------------------

    def _submit(self, verb: str, command: Callable[[], Any]) -> Future[Any]:
        if self._closed:
            msg = "the ledger is closed; open it again to use it"
            raise LedgerError(msg, reason="ledger-closed")
        self.calls.append(verb)
        asked = _Asked(verb, command, Future())
        if self.paused:
            self._queue.append(asked)
        else:
            self._answer(asked)
        return asked.answer

    def _answer(self, asked: _Asked) -> None:
        if not asked.answer.set_running_or_notify_cancel():
            return
        ordered = self._failures.get(asked.verb)
        try:
            if ordered:
                raise ordered.popleft()
            result = asked.command()
        except Exception as error:  # noqa: BLE001 - given to the future, as the writer does
            asked.answer.set_exception(error)
        else:
            asked.answer.set_result(result)

    def close(self) -> None:
        """Answer what is queued: with ``ledger-unreachable`` while paused. May be called twice."""
        if self.paused:
            while self._queue:
                asked = self._queue.popleft()
                if asked.answer.set_running_or_notify_cancel():
                    msg = "the ledger did not answer before it was closed"
                    asked.answer.set_exception(LedgerError(msg, reason="ledger-unreachable"))
        self._closed = True

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
        """Give ``Granted``, ``Held``, ``Waiting``, ``Done`` or ``Dead``; see ``Ledger.claim``."""

        def command() -> Claim:
            job = self.records.jobs.get(key)
            if job is None:
                job = FakeJob(len(self.records.jobs) + 1, key, request)
                self.records.jobs[key] = job
                return self._take(job, request, kept, work_started=work_started, origin=None)
            if job.request.request_hash == request.request_hash and self._claimable(
                job, refresh_before, kept
            ):
                return self._take(job, request, kept, work_started=work_started, origin=job.state)
            return self._refused(job, request)

        return self._submit("claim", command)

    def _claimable(self, job: FakeJob, refresh_before: float | None, kept: int) -> bool:
        now = self.clock()
        match job.state:
            case JobState.READY:
                waits = job.not_before is not None and now < job.not_before <= now + BACKOFF_MAX
                binds = job.not_before_server or job.not_before_by == self.worker_id
                return not (waits and binds)
            case JobState.LEASED:
                left = job.attempts < self.max_attempts or kept > job.kept or job.never_begun
                return left and self._expired(job)
            case JobState.FAILED:
                return True
            case JobState.DONE:
                blob = self.records.blobs.get(job.digest or "")
                gone = blob is not None and blob.state != "present"
                at = math.nan if job.finished_at is None else job.finished_at
                stale = refresh_before is not None and at < refresh_before
                return stale or at > now + SKEW or gone
            case JobState.DEAD:
                return False

    def _expired(self, job: FakeJob) -> bool:
        """Whether a lease is over; also one of the future, and one that lasts longer than any (I14)."""
        now, until = self.clock(), job.lease_until
        assert until is not None
        longest = max(LEASE_MAX, self.lease_seconds)
        return until <= now or job.updated_at > now + self.lease_seconds or until > job.updated_at + longest

    def _take(
        self, job: FakeJob, request: JobRequest, kept: int, *, work_started: bool, origin: JobState | None
    ) -> Granted:
        now = self.clock()
        if origin in (JobState.DONE, JobState.FAILED) or kept > job.kept or origin is None:
            job.attempts = 1
        elif not job.never_begun:
            job.attempts += 1
        if origin is JobState.DONE:
            job.generation += 1
        self.records.claims += 1
        job.request, job.state, job.claim_id = request, JobState.LEASED, f"{self.records.claims:032x}"
        job.fence += transition(JobState.READY, JobEvent.CLAIM).fence
        job.worker_id, job.max_attempts = self.worker_id, self.max_attempts
        job.lease_until, job.updated_at = now + self.lease_seconds, now
        job.kept, job.begun, job.unlike = kept, work_started, False
        job.not_before = job.not_before_by = job.digest = job.finished_at = None
        job.not_before_server = False
        lease = Lease(job.id, job.key, job.fence, job.claim_id, job.lease_until, job.generation)
        place = (job.id, job.generation - 1)
        previous = self._completion(job, place) if place in self.records.completions else None
        known = self._known(job, place)
        return Granted(lease, known, origin is JobState.LEASED, previous)

    def _known(self, job: FakeJob, place: tuple[int, int]) -> StoredRepresentation | None:
        """Return what is stored of the job's URL, with the name that the job gave these bytes at *place*."""
        known = self.records.representations.get(job.request.url_key)
        blob = None if known is None else self.records.blobs[known.digest]
        if known is None or blob is None or blob.state != "present":
            return None
        named = self.records.completions.get(place)
        name = named.known.name if named is not None and named.known.digest == known.digest else None
        return replace(known, stamp=blob.stamp, name=name)

    def _completion(self, job: FakeJob, place: tuple[int, int]) -> Completion:
        """Return a recorded completion; one of bytes that the URL no longer has comes without validators."""
        recorded = self.records.completions[place]
        known, now = recorded.known, self.records.representations.get(job.request.url_key)
        stamp = self.records.blobs[known.digest].stamp
        if now is None or now.digest != known.digest:
            bare = StoredRepresentation(
                known.digest, known.size, Validators(), job.request.url, vary=() if now is None else now.vary
            )
        else:
            bare = now
        known = replace(bare, fetched_at=recorded.completed_at, stamp=stamp, name=known.name)
        return replace(recorded, known=known)

    def _refused(self, job: FakeJob, request: JobRequest) -> Claim:
        if job.request.request_hash != request.request_hash:
            if not request.artifact_id:  # a plain GET of its URL: there is no other request for it
                msg = f"the record of job {job.key} is damaged: its request_hash does not match its URL"
                raise LedgerError(msg, reason="ledger-row")
            msg = f"job {job.key} belongs to another request for {job.request.url}"
            raise KeyConflict(msg)
        match job.state:
            case JobState.LEASED:
                if job.attempts >= self.max_attempts and job.begun and self._expired(job):
                    now = self.clock()
                    job.change(JobEvent.EXHAUST, now)
                    job.error_code, job.error = "attempts-exhausted", job.error or NO_ERROR
                    job.finished_at = now
                    return Dead(job.attempts, job.error)
                assert job.lease_until is not None
                return Held(job.worker_id, job.lease_until)
            case JobState.READY | JobState.FAILED:
                return Waiting(job.not_before or 0.0, job.error or "")
            case JobState.DONE:
                return Done(self._completion(job, (job.id, job.generation)))
            case JobState.DEAD:
                return Dead(job.attempts, job.error or "")

    def free(self, keys: Collection[str]) -> Future[frozenset[str]]:
        """Give those of *keys* that no lease holds which still runs."""

        def command() -> frozenset[str]:
            jobs = (self.records.jobs[key] for key in keys if key in self.records.jobs)
            held = {job.key for job in jobs if job.state is JobState.LEASED and not self._expired(job)}
            return frozenset(keys) - held

        return self._submit("free", command)

    # -- what a lease may write --------------------------------------------------------------

    def _guarded(self, lease: Lease) -> FakeJob:
        """Return the job that *lease* may write about; raise ``LeaseLost`` (ledger rule 1)."""
        job = self.records.jobs.get(lease.job_key)
        if job is None or (job.state, job.fence, job.claim_id) != (
            JobState.LEASED,
            lease.fence,
            lease.claim_id,
        ):
            msg = f"job {lease.job_key}: the claim with fence {lease.fence} is no longer current"
            raise LeaseLost(msg)
        return job

    def begin_work(self, lease: Lease, *, unlike: bool = False) -> Future[None]:
        """Note that the claim counts as an attempt from now on."""

        def command() -> None:
            job = self._guarded(lease)
            job.begun, job.unlike = True, job.unlike or unlike

        return self._submit("begin_work", command)

    def complete(
        self,
        lease: Lease,
        known: StoredRepresentation,
        *,
        resumed_from: int = 0,
        path: str | None = None,
        by_response: bool = False,
    ) -> Future[Completion]:
        """Record that the job is done; asked again by the same claim, give the first answer again."""

        def command() -> Completion:
            place = (lease.job_id, lease.generation)
            try:
                job = self._guarded(lease)
            except LeaseLost:
                recorded = self.records.completions.get(place)
                if recorded is None or recorded.completion_id != lease.claim_id:
                    raise
                return self._completion(self.records.jobs[lease.job_key], place)
            self._put_blob(known)
            return self._done(job, lease, known, path, by_response=by_response)

        return self._submit("complete", command)

    def _put_blob(self, known: StoredRepresentation) -> None:
        """Record the blob as present; raise ``IntegrityError`` or ``BlobGoing`` if it cannot be."""
        blob = self.records.blobs.get(known.digest)
        if blob is None:
            self.records.blobs[known.digest] = FakeBlob(known.size, stamp=known.stamp, stored_at=self.clock())
            return
        if blob.size != known.size:
            msg = f"blob {known.digest} is recorded with {blob.size} bytes, not with {known.size}"
            raise IntegrityError(msg, reason="length-mismatch")
        now = self.clock()
        abandoned = blob.stored_at < now - DELETION_LASTS or blob.stored_at > now + SKEW
        if blob.state == "deleting" and not abandoned:
            msg = f"blob {known.digest} is being deleted by gc; publish it again"
            raise BlobGoing(msg)
        blob.state, blob.stamp = "present", known.stamp or blob.stamp

    def _done(
        self, job: FakeJob, lease: Lease, known: StoredRepresentation, path: str | None, *, by_response: bool
    ) -> Completion:
        now = self.clock()
        job.change(JobEvent.COMPLETE, now)
        at = now if known.stored_at is None else min(now, known.stored_at)
        job.digest, job.error_code, job.error, job.finished_at = known.digest, None, None, at
        stamp = None if known.name is None else known.name.stamp
        name = None if path is None else RecordedName(path, stamp)
        known = replace(known, final_url=url_without_userinfo(known.final_url), fetched_at=at, name=name)
        done = Completion(lease.claim_id, known, at, job.id, job.generation, path, by_response)
        self.records.representations[job.request.url_key] = replace(known, name=None, stored_at=None)
        self.records.completions[(job.id, job.generation)] = done
        return done

    def release(self, lease: Lease) -> Future[None]:
        """Give the job back; the attempt does not count."""

        def command() -> None:
            self._guarded(lease).change(JobEvent.RELEASE, self.clock())

        return self._submit("release", command)

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
        """End the claim with an error, for good or until a back-off is over; see ``Ledger.fail``."""

        def command() -> None:
            job, now = self._guarded(lease), self.clock()
            attempts = job.attempts
            job.error_code, job.error = error_code, error
            job.change(JobEvent.FAIL_PERMANENT if permanent else JobEvent.FAIL_TRANSIENT, now)
            if progress:
                job.attempts = attempts = 0
            if permanent:
                job.finished_at = now
                return
            delay = min(BACKOFF_MAX, BACKOFF_FIRST * 2 ** min(max(attempts - 1, 0), 30))
            if retry_after is not None:
                delay = min(max(0.0, retry_after), BACKOFF_MAX)
            job.not_before, job.not_before_by = now + delay, self.worker_id
            job.not_before_server = retry_after is not None

        return self._submit("fail", command)

    # -- the leases of a worker --------------------------------------------------------------

    def renew(self, begins: Callable[[], object] = lambda: None) -> Future[frozenset[str]]:
        """Prolong every lease of this worker; give the claim ids that are still its own."""

        def command() -> frozenset[str]:
            begins()
            now, still = self.clock(), set()
            for job in self.records.jobs.values():
                if job.state is JobState.LEASED and job.worker_id == self.worker_id:
                    job.lease_until, job.updated_at = now + self.lease_seconds, now
                    still.add(job.claim_id)
            return frozenset(still)

        return self._submit("renew", command)

    def end_worker_leases(self, worker_id: str) -> Future[int]:
        """End the leases of a worker; give how many."""

        def command() -> int:
            held = [
                job
                for job in self.records.jobs.values()
                if job.state is JobState.LEASED and job.worker_id == worker_id
            ]
            for job in held:
                job.lease_until = self.clock()
            return len(held)

        return self._submit("end_worker_leases", command)

    def requeue(self, *keys: str) -> Future[int]:
        """Make failed and dead jobs ready, their attempts given back; give how many there were."""

        def command() -> int:
            jobs = [self.records.jobs[key] for key in dict.fromkeys(keys) if key in self.records.jobs]
            ended = [job for job in jobs if job.state in (JobState.FAILED, JobState.DEAD)]
            for job in ended:
                job.change(JobEvent.REQUEUE, self.clock(), JobState.DEAD)
                job.attempts, job.finished_at = 0, None
                job.not_before, job.not_before_by, job.not_before_server = None, None, False
            return len(ended)

        return self._submit("requeue", command)

    def job(self, key: str) -> Future[FakeJob | None]:
        """Give a copy of a job's record, ``None`` if there is none."""

        def command() -> FakeJob | None:
            job = self.records.jobs.get(key)
            return None if job is None else replace(job)

        return self._submit("job", command)

    # -- notes -------------------------------------------------------------------------------

    def note_blob(self, digest: str, stamp: bytes) -> Future[None]:
        """Note the stamp of a blob that is present."""

        def command() -> None:
            blob = self.records.blobs.get(digest)
            if blob is not None and blob.state == "present":
                blob.stamp = stamp

        return self._submit("note_blob", command)

    def note_name(self, completion: Completion, name: RecordedName) -> Future[None]:
        """Note the name that a completion's bytes have now."""

        def command() -> None:
            place = (completion.job_id, completion.generation)
            recorded = self.records.completions.get(place)
            if recorded is not None:
                known = replace(recorded.known, name=name)
                self.records.completions[place] = replace(recorded, path=name.path, known=known)

        return self._submit("note_name", command)

    def delivered(self, completions: Collection[Completion]) -> Future[None]:
        """Note when the items of completions were first handed on; ``records.delivered`` has the times."""

        def command() -> None:
            for one in completions:
                self.records.delivered.setdefault((one.job_id, one.generation), self.clock())

        return self._submit("delivered", command)

    def set_blob_state(self, digest: str, to: str, origins: Collection[str]) -> Future[bool]:
        """Change a blob's state if it is one of *origins*; give whether it was."""

        def command() -> bool:
            blob = self.records.blobs.get(digest)
            changed = blob is not None and blob.state in origins
            if blob is not None and changed:
                blob.state = to
            return changed

        return self._submit("set_blob_state", command)

    # -- files of other programs -------------------------------------------------------------

    def note_files(self, found: Mapping[str, tuple[NotedFile, bytes]]) -> Future[frozenset[str]]:
        """Note what files hash to, by name, each with the stamp of its blob; give the names noted."""

        def command() -> frozenset[str]:
            names = set()
            for path, (noted, stamp) in found.items():
                digest = f"sha256:{noted.hexadecimal}"
                blob = self.records.blobs.setdefault(
                    digest, FakeBlob(noted.size, stored_at=self.clock(), found=True)
                )
                if blob.size == noted.size and blob.state != "deleting":
                    blob.state, blob.stamp = "present", stamp
                    self.records.noted[path] = noted
                    names.add(path)
            return frozenset(names)

        return self._submit("note_files", command)

    def noted_files(self, paths: Collection[str]) -> Future[dict[str, NotedFile]]:
        """Give what ``note_files`` noted of the names."""

        def command() -> dict[str, NotedFile]:
            return {path: self.records.noted[path] for path in paths if path in self.records.noted}

        return self._submit("noted_files", command)

    def adoptable(self, digest: str, path: str) -> Future[bool]:
        """Give whether the file at a name may be given for a job never done; see ``Ledger.adoptable``."""

        def command() -> bool:
            blob = self.records.blobs.get(digest)
            if blob is None or (blob.state == "present" and blob.found):
                return True
            if blob.state != "present":
                return False
            artifacts = {job.id for job in self.records.jobs.values() if job.request.artifact_id}
            return not any(
                job_id in artifacts and one.path == path and one.known.digest == digest
                for (job_id, _), one in self.records.completions.items()
            )

        return self._submit("adoptable", command)
