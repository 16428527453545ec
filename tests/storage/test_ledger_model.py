"""The ledger against a model: any order of verbs by two workers, under a clock that also jumps.

Every change of a job's row is recorded by a trigger and held against the table of transitions.
"""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scrapy_streaming.exceptions import KeyConflict, LeaseLost
from scrapy_streaming.protocol.jobs import (
    TRANSITIONS,
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
from scrapy_streaming.storage.ledger import JobRequest, Ledger
from scrapy_streaming.storage.ledger.statements import BACKOFF_MAX

LEASE = 60.0
ATTEMPTS = 2
WORKERS = ("a", "b")
KEYS = ("k0", "k1")
DIGESTS = tuple("sha256:" + hashlib.sha256(name).hexdigest() for name in (b"x", b"y"))

TRAIL = """
CREATE TABLE trail (n INTEGER PRIMARY KEY, key, was, now, fence, generation, was_attempts, attempts);
CREATE TRIGGER trailing AFTER UPDATE ON ss_job BEGIN
  INSERT INTO trail (key, was, now, fence, generation, was_attempts, attempts)
  VALUES (OLD.job_key, OLD.state, NEW.state, NEW.fence - OLD.fence, NEW.generation - OLD.generation,
          OLD.attempts, NEW.attempts);
END;
"""


@dataclass
class Job:
    """What the model holds of one job."""

    state: JobState = JobState.LEASED
    fence: int = 1
    generation: int = 1
    attempts: int = 1
    worker: str = ""
    until: float = 0.0
    touched: float = 0.0
    not_before: float | None = None
    bound: str | None = None
    finished: float = 0.0
    digest: str = ""
    completion: str = ""


def lawful_edges() -> set[tuple[str, str, int, int]]:
    """Return (was, now, fence, generation) of each row of the table, and of the two-step claims."""
    edges = {
        (was.value, change.to.value, change.fence, change.generation)
        for (was, _), change in TRANSITIONS.items()
    }
    # a terminal job asked for again is refreshed and claimed at once: one step of the fence
    for was in (JobState.DONE, JobState.FAILED):
        change = TRANSITIONS[(was, JobEvent.REFRESH)]
        edges.add((was.value, JobState.LEASED.value, change.fence, change.generation))
    # renewal
    edges.add((JobState.LEASED.value, JobState.LEASED.value, 0, 0))
    return edges


class LedgerMachine(RuleBasedStateMachine):
    """Two workers, each with its own ledger, writer thread and connection, on one file."""

    @initialize()
    def start(self) -> None:
        self.now = 1_000_000.0
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.sqlite3"
        self.ledgers = {worker: self.open(worker) for worker in WORKERS}
        with closing(sqlite3.connect(self.path)) as connection:
            connection.executescript(TRAIL)
        self.jobs: dict[str, Job] = {}
        self.leases: list[tuple[str, Lease]] = []
        self.completed: dict[str, str] = {}
        self.missing: set[str] = set()
        self.stored: set[str] = set()

    def open(self, worker: str) -> Ledger:
        return Ledger.open(
            self.path,
            store_id="s",
            worker_id=worker,
            lease_seconds=LEASE,
            max_attempts=ATTEMPTS,
            fsync=False,
            clock=lambda: self.now,
        )

    def teardown(self) -> None:
        for ledger in self.ledgers.values():
            ledger.close()
        self.folder.cleanup()

    def query(self, statement: str) -> list[Any]:
        with closing(sqlite3.connect(self.path)) as connection:
            return connection.execute(statement).fetchall()

    # -- the model's rules ------------------------------------------------------------------

    def expired(self, job: Job) -> bool:
        return job.until <= self.now or job.touched > self.now + LEASE

    def waits(self, job: Job, worker: str) -> bool:
        return (
            job.not_before is not None
            and self.now < job.not_before <= self.now + BACKOFF_MAX
            and job.bound in (None, worker)
        )

    def claimable(self, job: Job, worker: str, before: float) -> bool:
        match job.state:
            case JobState.READY:
                return not self.waits(job, worker)
            case JobState.LEASED:
                return self.expired(job) and job.attempts < ATTEMPTS
            case JobState.DONE:
                return job.finished < before or job.digest in self.missing
            case JobState.FAILED:
                return True
            case JobState.DEAD:
                return False

    def current(self, lease: Lease) -> Job | None:
        job = self.jobs[lease.job_key]
        return job if job.state is JobState.LEASED and job.fence == lease.fence else None

    # -- claims -----------------------------------------------------------------------------

    @rule(
        worker=st.sampled_from(WORKERS),
        key=st.sampled_from(KEYS),
        refresh=st.sampled_from(("no", "old", "force")),
    )
    def claim(self, worker: str, key: str, refresh: str) -> None:
        before = {"no": -1.0, "old": self.now - 30, "force": float("inf")}[refresh]
        how: dict[str, Any] = {"force": True} if refresh == "force" else {}
        if refresh == "old":
            how = {"refresh_before": before}
        request = JobRequest("w", key, f"https://h/{key}", "GET")
        answer = self.ledgers[worker].claim(key, request, **how).result()
        job = self.jobs.get(key)
        if job is not None and not self.claimable(job, worker, before):
            self.refused(job, answer)
            return
        assert isinstance(answer, Granted), (job, answer)
        if job is None:
            job = self.jobs[key] = Job()
        else:
            fresh = job.state in (JobState.DONE, JobState.FAILED)
            job.generation += job.state is JobState.DONE
            job.attempts = 1 if fresh else job.attempts + 1
            job.fence += 1
        job.state, job.worker = JobState.LEASED, worker
        job.until, job.touched, job.not_before = self.now + LEASE, self.now, None
        lease = answer.lease
        assert (lease.fence, lease.generation, lease.until) == (job.fence, job.generation, job.until)
        assert answer.known is None or answer.known.digest not in self.missing
        self.leases.append((worker, lease))

    def refused(self, job: Job, answer: object) -> None:
        match job.state:
            case JobState.LEASED if self.expired(job):
                job.state = JobState.DEAD
                assert isinstance(answer, Dead)
            case JobState.LEASED:
                assert answer == Held(job.worker, job.until)
            case JobState.READY:
                assert isinstance(answer, Waiting)
                assert answer.not_before == job.not_before
            case JobState.DONE:
                assert isinstance(answer, Done)
                assert answer.completion.completion_id == job.completion
                assert answer.completion.known.digest == job.digest
            case _:
                assert isinstance(answer, Dead)

    @rule(worker=st.sampled_from(WORKERS), key=st.sampled_from(KEYS))
    def claim_later(self, worker: str, key: str) -> None:
        """I13: whoever has the job went silent."""
        self.now += LEASE
        self.claim(worker, key, "no")

    @rule(worker=st.sampled_from(WORKERS), key=st.sampled_from(KEYS))
    def claim_with_another_request(self, worker: str, key: str) -> None:
        """I18."""
        if key in self.jobs:
            with pytest.raises(KeyConflict):
                self.ledgers[worker].claim(key, JobRequest("w", key, f"https://h/{key}", "POST")).result()

    # -- the ends of a claim: any lease ever granted, by any worker's connection ---------------

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), digest=st.sampled_from(DIGESTS))
    def complete(self, data: st.DataObject, digest: str) -> None:
        worker, lease = data.draw(st.sampled_from(self.leases))
        answer = self.ledgers[worker].complete(lease, Known(digest, 1, Validators(), "https://h/"))
        job = self.current(lease)
        if job is None and lease.claim_id in self.completed:
            assert answer.result().completion_id == self.completed[lease.claim_id]
        elif job is None:
            with pytest.raises(LeaseLost):
                answer.result()
        else:
            recorded = answer.result()
            job.state, job.digest, job.finished = JobState.DONE, digest, self.now
            job.completion = self.completed[lease.claim_id] = recorded.completion_id
            self.stored.add(digest)
            self.missing.discard(digest)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        worker, lease = data.draw(st.sampled_from(self.leases))
        answer = self.ledgers[worker].release(lease)
        if (job := self.current(lease)) is None:
            with pytest.raises(LeaseLost):
                answer.result()
            return
        answer.result()
        job.state, job.attempts = JobState.READY, max(0, job.attempts - 1)

    @precondition(lambda self: self.leases)
    @rule(
        data=st.data(),
        permanent=st.booleans(),
        progress=st.booleans(),
        retry_after=st.sampled_from((None, 0.0, 50.0, 1e6)),
    )
    def fail(self, data: st.DataObject, permanent: bool, progress: bool, retry_after: float | None) -> None:
        worker, lease = data.draw(st.sampled_from(self.leases))
        ledger = self.ledgers[worker]
        answer = ledger.fail(
            lease, "e", "error", permanent=permanent, progress=progress, retry_after=retry_after
        )
        if (job := self.current(lease)) is None:
            with pytest.raises(LeaseLost):
                answer.result()
            return
        answer.result()
        job.attempts = 0 if progress else job.attempts
        if permanent:
            job.state = JobState.FAILED
            return
        job.state, job.bound = JobState.READY, worker if retry_after is None else None
        seen = ledger.job(lease.job_key).result()
        assert seen is not None
        job.not_before = seen.not_before
        assert job.not_before is not None
        assert self.now <= job.not_before <= self.now + BACKOFF_MAX

    # -- workers, clocks, blobs ---------------------------------------------------------------

    @rule(worker=st.sampled_from(WORKERS))
    def renew(self, worker: str) -> None:
        mine = [job for job in self.jobs.values() if job.state is JobState.LEASED and job.worker == worker]
        answer = self.ledgers[worker].renew().result()
        assert answer == {lease.claim_id for _, lease in self.leases if self.current(lease) in mine}
        for job in mine:
            job.until, job.touched = self.now + LEASE, self.now

    @rule(worker=st.sampled_from(WORKERS), dead=st.sampled_from(WORKERS))
    def forget(self, worker: str, dead: str) -> None:
        theirs = [job for job in self.jobs.values() if job.state is JobState.LEASED and job.worker == dead]
        assert self.ledgers[worker].forget_worker(dead).result() == len(theirs)
        for job in theirs:
            job.until = self.now

    @rule(seconds=st.sampled_from((1.0, 20.0, 61.0, 4000.0, -20.0, -61.0, -9000.0)))
    def move_clock(self, seconds: float) -> None:
        self.now += seconds

    @rule(digest=st.sampled_from(DIGESTS))
    def lose_blob(self, digest: str) -> None:
        assert self.ledgers["a"].mark_missing(digest).result() is (digest in self.stored)
        if digest in self.stored:
            self.missing.add(digest)

    @rule(key=st.sampled_from(KEYS))
    def requeue(self, key: str) -> None:
        job = self.jobs.get(key)
        wanted = job is not None and job.state in (JobState.FAILED, JobState.DEAD)
        assert self.ledgers["b"].requeue(key).result() is wanted
        if job is not None and wanted:
            job.state, job.attempts, job.not_before = JobState.READY, 0, None
            job.fence += 1

    @rule(worker=st.sampled_from(WORKERS))
    def reopen(self, worker: str) -> None:
        self.ledgers[worker].close()
        self.ledgers[worker] = self.open(worker)

    # -- what always holds ----------------------------------------------------------------------

    @invariant()
    def rows_are_as_modelled(self) -> None:
        """I1, I2, I19: one row a key, and each as the model says."""
        got = self.query("SELECT job_key, state, fence, generation, attempts FROM ss_job ORDER BY job_key")
        assert got == [
            (key, job.state.value, job.fence, job.generation, job.attempts)
            for key, job in sorted(self.jobs.items())
        ]

    @invariant()
    def completions_are_as_acknowledged(self) -> None:
        """I4, I5 (the rows), I6."""
        got = self.query("SELECT claim_id, completion_id FROM ss_completion")
        assert dict(got) == self.completed
        assert len(got) == len(self.completed)
        assert self.query("SELECT 1 FROM ss_completion GROUP BY job_id, generation HAVING count(*) > 1") == []
        assert self.query("PRAGMA foreign_key_check") == []

    @invariant()
    def changes_are_in_the_table(self) -> None:
        """I2, I19: what is not in ``TRANSITIONS`` does not happen."""
        edges = {tuple(row) for row in self.query("SELECT DISTINCT was, now, fence, generation FROM trail")}
        assert edges <= lawful_edges()


LedgerMachine.TestCase.settings = settings(
    max_examples=50,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLedgerMachine = LedgerMachine.TestCase
