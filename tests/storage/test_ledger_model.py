"""The ledger against a model: any order of verbs by two workers, under a clock that also jumps.

On both databases. Every change of a job's row is recorded by a trigger and held against the table of
transitions, and against the ledger's own history. The same oracle has to fail once a safeguard is taken out
(``support.mutants``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ledger_kit import DATABASES, Database, digest_of, hex_of
from support import mutants

from scrapy_streaming.exceptions import KeyConflict, LeaseLost
from scrapy_streaming.protocol.jobs import (
    TRANSITIONS,
    Dead,
    Done,
    Granted,
    Held,
    JobEvent,
    JobState,
    Lease,
    Recover,
    Replay,
    Run,
    StoredRepresentation,
    Waiting,
)
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.ledger import JobRequest, Ledger, transitions
from scrapy_streaming.storage.ledger.statements import BACKOFF_MAX

LEASE = 60.0
ATTEMPTS = 2
WORKERS = ("a", "b")
KEYS = (hex_of("k0"), hex_of("k1"))
OPS = (hex_of("e0"), hex_of("e1"))
DIGESTS = (digest_of("x"), digest_of("y"))
RESULTS = ("", '{"sent": 1}', "ä\u2028\U0001f600\r\n ", " " * 16384)

TRAIL = """
CREATE TABLE trail (n INTEGER PRIMARY KEY, job_id, was, now, fence, generation);
CREATE TRIGGER trailing AFTER UPDATE ON ss_job BEGIN
  INSERT INTO trail (job_id, was, now, fence, generation)
  VALUES (OLD.id, OLD.state, NEW.state, NEW.fence - OLD.fence, NEW.generation - OLD.generation);
END;
"""
POSTGRES_TRAIL = """
CREATE TABLE trail (
  n BIGSERIAL PRIMARY KEY, job_id BIGINT, was TEXT, now TEXT, fence BIGINT, generation BIGINT
);
CREATE FUNCTION trail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO trail (job_id, was, now, fence, generation)
  VALUES (OLD.id, OLD.state, NEW.state, NEW.fence - OLD.fence, NEW.generation - OLD.generation);
  RETURN NULL;
END $$;
CREATE TRIGGER trail_of_jobs AFTER UPDATE ON ss_job FOR EACH ROW EXECUTE FUNCTION trail();
"""
TABLES = "trail, ss_event, ss_operation, ss_completion, ss_representation, ss_job, ss_blob, ss_worker"


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
    claim: str = ""
    taken_over: bool = False


@dataclass
class Effect:
    """What the model holds of one effect."""

    state: str
    key: str
    fence: int
    attempt: int
    result: str | None = None


@dataclass
class LostClaim:
    """A claim whose answer never came: the writer will run the same command again."""

    worker: str
    key: str
    claim_id: str


def lawful_edges() -> set[tuple[str, str, int, int]]:
    """Return (was, now, fence, generation) of each row of the table, and of a renewal."""
    edges = set()
    for (was, event), change in TRANSITIONS.items():
        # a terminal job that is asked for again is refreshed and claimed at once: one step of the fence
        to = JobState.LEASED if event is JobEvent.REFRESH else change.to
        edges.add((was.value, to.value, change.fence, change.generation))
    edges.add((JobState.LEASED.value, JobState.LEASED.value, 0, 0))
    return edges


def request(key: str, method: str = "GET") -> JobRequest:
    return JobRequest("w", key, f"https://h/{key}", hex_of(method))


class LedgerMachine(RuleBasedStateMachine):
    """Two workers, each with its own ledger, writer thread and connection, on one database."""

    postgres: ClassVar[str | None] = None  # the URL of an empty database, or a file for each example

    @initialize()
    def start(self) -> None:
        self.now = 1_000_000.0
        self.folder = tempfile.TemporaryDirectory()
        self.database = Database(self.postgres or f"sqlite:///{Path(self.folder.name) / 'ledger.sqlite3'}")
        if not self.postgres:
            self.open("nobody").close()
        self.connection = self.database.connect()
        if not self.postgres:
            self.connection.executescript(TRAIL)
        else:
            self.prepare()
        self.ledgers = {worker: self.open(worker) for worker in WORKERS}
        self.jobs: dict[str, Job] = {}
        self.leases: list[tuple[str, Lease]] = []
        self.completed: dict[tuple[str, int], str] = {}
        self.missing: set[str] = set()
        self.stored: set[str] = set()
        self.effects: dict[str, Effect] = {}
        self.lost: list[LostClaim] = []
        self.unheard = 0

    def prepare(self) -> None:
        """Empty the database: a new one for each example would take longer than the example."""
        if self.query("SELECT to_regclass('trail')") == [(None,)]:
            self.open("nobody").close()
            self.connection.execute(POSTGRES_TRAIL)
        self.connection.execute(f"TRUNCATE {TABLES} CASCADE")

    def open(self, worker: str) -> Ledger:
        return Ledger.open(
            self.database.url,
            store_id="s",
            worker_id=worker,
            lease_seconds=LEASE,
            max_attempts=ATTEMPTS,
            fsync=False,
            patience=10,
            clock=lambda: self.now,
        )

    def teardown(self) -> None:
        for ledger in getattr(self, "ledgers", {}).values():
            ledger.close()
        if hasattr(self, "connection"):
            self.connection.close()
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def query(self, statement: str) -> list[Any]:
        return self.database.ask(self.connection, statement)

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

    def any_lease(self, data: st.DataObject) -> tuple[str, Lease]:
        """Return a lease ever granted, more often one of the last."""
        return data.draw(st.sampled_from(self.leases[-2:]) | st.sampled_from(self.leases))

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
        how = {} if refresh == "no" else {"refresh_before": before}
        answer = self.ledgers[worker].claim(key, request(key), **how).result(60)
        if (lease := self.answered(worker, key, answer, before)) is not None:
            self.leases.append((worker, lease))

    def answered(self, worker: str, key: str, answer: object, before: float = -1.0) -> Lease | None:
        """Hold the answer to a claim against the model, and take note of it."""
        job = self.jobs.get(key)
        if job is not None and not self.claimable(job, worker, before):
            self.refused(job, answer)
            return None
        assert isinstance(answer, Granted), (job, answer)
        assert answer.taken_over is (job is not None and job.state is JobState.LEASED)
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
        job.claim, job.taken_over = lease.claim_id, answer.taken_over
        assert (lease.fence, lease.generation, lease.until) == (job.fence, job.generation, job.until)
        assert answer.known is None or answer.known.digest not in self.missing
        return lease

    @rule(worker=st.sampled_from(WORKERS), key=st.sampled_from(KEYS))
    def claim_unheard(self, worker: str, key: str) -> None:
        """F11: the COMMIT took effect, its answer was lost."""
        lost = LostClaim(worker, key, hex_of(f"lost {self.unheard}")[:32])
        self.unheard += 1
        # what was lost is not a lease that anybody could use
        self.answered(worker, key, self.claimed_again(lost))
        self.lost.append(lost)

    def claimed_again(self, lost: LostClaim) -> object:
        ledger = self.ledgers[lost.worker]
        terms = {"refresh_before": None, "kept": 0, "begun": True, "epoch": 0}
        return ledger.submit(
            lambda s: ledger._claimed(s, lost.key, request(lost.key), lost.claim_id, terms)
        ).result(60)

    @precondition(lambda self: self.lost)
    @rule(data=st.data())
    def claim_run_again(self, data: st.DataObject) -> None:
        """F11: whatever happened meanwhile, the writer runs the command once more, and hears."""
        lost = self.lost.pop(data.draw(st.integers(0, len(self.lost) - 1)))
        answer = self.claimed_again(lost)
        job = self.jobs[lost.key]
        mine = job.state is JobState.LEASED and job.claim == lost.claim_id
        if mine and not self.claimable(job, lost.worker, -1.0):
            assert isinstance(answer, Granted)
            assert (answer.lease.fence, answer.lease.until) == (job.fence, job.until)
            assert answer.taken_over is job.taken_over
            self.leases.append((lost.worker, answer.lease))
        elif (lease := self.answered(lost.worker, lost.key, answer)) is not None:
            self.leases.append((lost.worker, lease))

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
                self.ledgers[worker].claim(key, request(key, "POST")).result()

    # -- the ends of a claim: any lease ever granted, by any worker's connection ---------------

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), digest=st.sampled_from(DIGESTS))
    def complete(self, data: st.DataObject, digest: str) -> None:
        worker, lease = self.any_lease(data)
        answer = self.ledgers[worker].complete(
            lease, StoredRepresentation(digest, 1, Validators(), "https://h/")
        )
        job = self.current(lease)
        if job is None and (lease.claim_id, lease.generation) in self.completed:
            assert answer.result().completion_id == self.completed[lease.claim_id, lease.generation]
        elif job is None:
            with pytest.raises(LeaseLost):
                answer.result()
        else:
            recorded = answer.result()
            job.state, job.digest, job.finished = JobState.DONE, digest, self.now
            job.completion = self.completed[lease.claim_id, lease.generation] = recorded.completion_id
            self.stored.add(digest)
            self.missing.discard(digest)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        worker, lease = self.any_lease(data)
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
        worker, lease = self.any_lease(data)
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

    @precondition(lambda self: self.leases)
    @rule(
        data=st.data(),
        wrong=st.sampled_from(("fence", "claim_id")),
        verb=st.sampled_from(("complete", "release", "fail", "begin", "succeed")),
    )
    def write_under_half_a_lease(self, data: st.DataObject, wrong: str, verb: str) -> None:
        """F12, rule 2: a ledger that was restored gives the same fence again, but not the claim id.

        And a claim that is run again after its lease ran out has two fences.
        """
        worker, lease = self.any_lease(data)
        other = lease.fence - 1 if wrong == "fence" else hex_of("of the time before")[:32]
        lease, ledger = replace(lease, generation=0, **{wrong: other}), self.ledgers[worker]
        answer: Future[Any] = {
            "complete": lambda: ledger.complete(
                lease, StoredRepresentation(DIGESTS[0], 1, Validators(), "https://h/")
            ),
            "release": lambda: ledger.release(lease),
            "fail": lambda: ledger.fail(lease, "e", "error", permanent=True),
            "begin": lambda: ledger.begin(lease, OPS[0], "kind"),
            "succeed": lambda: ledger.succeed(lease, OPS[0], RESULTS[1]),
        }[verb]()
        with pytest.raises(LeaseLost):
            answer.result()

    # -- effects: under any lease ever granted ---------------------------------------------------

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), op=st.sampled_from(OPS))
    def begin(self, data: st.DataObject, op: str) -> None:
        """I8, I9: only a result is replayed, equal to the byte; what is not known is looked for."""
        worker, lease = self.any_lease(data)
        answer = self.ledgers[worker].begin(lease, op, "kind")
        if self.current(lease) is None:
            with pytest.raises(LeaseLost):
                answer.result()
            return
        was = self.effects.get(op)
        attempt = 1 if was is None else was.attempt + 1
        if was is not None and was.state == "ok":
            assert was.result is not None
            assert answer.result() == Replay(was.result)
            return
        if was is not None and was.state == "started":
            assert answer.result() == Recover(attempt, was.fence)
        else:
            assert answer.result() == Run(attempt)
        self.effects[op] = Effect("started", lease.job_key, lease.fence, attempt)

    def end(self, lease: Lease, op: str, state: str, result: str | None) -> bool:
        """Return whether this lease may end the effect, or has so ended it; take note of it."""
        effect = self.effects.get(op)
        if effect is None or (effect.key, effect.fence) != (lease.job_key, lease.fence):
            return False
        if (effect.state, effect.result) == (state, result):
            return True
        if effect.state != "started" or self.current(lease) is None:
            return False
        effect.state, effect.result = state, result
        return True

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), op=st.sampled_from(OPS), result=st.sampled_from(RESULTS))
    def succeed(self, data: st.DataObject, op: str, result: str) -> None:
        worker, lease = self.any_lease(data)
        answer = self.ledgers[worker].succeed(lease, op, result)
        if self.end(lease, op, "ok", result):
            answer.result()
        else:
            with pytest.raises(LeaseLost):
                answer.result()

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), op=st.sampled_from(OPS))
    def give_up(self, data: st.DataObject, op: str) -> None:
        worker, lease = self.any_lease(data)
        answer = self.ledgers[worker].give_up(lease, op, "failed")
        if self.end(lease, op, "failed", None):
            answer.result()
        else:
            with pytest.raises(LeaseLost):
                answer.result()

    # -- workers, clocks, blobs ---------------------------------------------------------------

    @rule(worker=st.sampled_from(WORKERS))
    def renew(self, worker: str) -> None:
        mine = [job for job in self.jobs.values() if job.state is JobState.LEASED and job.worker == worker]
        answer = self.ledgers[worker].renew().result()
        assert answer == {job.claim for job in mine}
        for job in mine:
            job.until, job.touched = self.now + LEASE, self.now

    @rule(worker=st.sampled_from(WORKERS), dead=st.sampled_from(WORKERS))
    def forget(self, worker: str, dead: str) -> None:
        theirs = [job for job in self.jobs.values() if job.state is JobState.LEASED and job.worker == dead]
        assert self.ledgers[worker].end_worker_leases(dead).result() == len(theirs)
        for job in theirs:
            job.until = self.now

    @rule(seconds=st.sampled_from((1.0, 20.0, 61.0, 4000.0, -20.0, -61.0, -9000.0)))
    def move_clock(self, seconds: float) -> None:
        self.now += seconds

    @rule(digest=st.sampled_from(DIGESTS))
    def lose_blob(self, digest: str) -> None:
        marked = self.ledgers["a"].set_blob_state(digest, "missing", ["present", "missing"])
        assert marked.result() is (digest in self.stored)
        if digest in self.stored:
            self.missing.add(digest)

    @rule(key=st.sampled_from(KEYS))
    def requeue(self, key: str) -> None:
        job = self.jobs.get(key)
        wanted = job is not None and job.state in (JobState.FAILED, JobState.DEAD)
        assert self.ledgers["b"].requeue(key).result() == int(wanted)
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
        assert [(bytes(key).hex(), *rest) for key, *rest in got] == [
            (key, job.state.value, job.fence, job.generation, job.attempts)
            for key, job in sorted(self.jobs.items())
        ]

    @invariant()
    def completions_are_as_acknowledged(self) -> None:
        """I4, I5 (the rows), I6."""
        got = self.query("SELECT claim_id, generation, digest FROM ss_completion")
        claims = sorted((bytes(claim).hex(), generation) for claim, generation, _ in got)
        assert claims == sorted(self.completed)
        assert self.query("SELECT 1 FROM ss_completion GROUP BY job_id, generation HAVING count(*) > 1") == []
        assert {f"sha256:{bytes(digest).hex()}" for *_, digest in got} <= self.stored
        blobs = self.query("SELECT digest FROM ss_blob")
        assert {f"sha256:{bytes(digest).hex()}" for (digest,) in blobs} == self.stored

    @invariant()
    def effects_are_as_modelled(self) -> None:
        """I8, I9: nothing but what was acknowledged, to the byte."""
        got = self.query("SELECT op_key, state, fence, attempt, result FROM ss_operation")
        assert {bytes(key).hex(): tuple(rest) for key, *rest in got} == {
            key: (effect.state, effect.fence, effect.attempt, effect.result)
            for key, effect in self.effects.items()
        }

    @invariant()
    def changes_are_in_the_table(self) -> None:
        """I2, I19: what is not in ``TRANSITIONS`` does not happen."""
        edges = set(self.query("SELECT DISTINCT was, now, fence, generation FROM trail"))
        assert edges <= lawful_edges()

    @invariant()
    def history_is_a_chain(self) -> None:
        """I2, I19: each event begins where the one before it ended; fences never decrease."""
        told: dict[int, list[tuple[str | None, str, int]]] = {}
        for number, *event in self.query(
            "SELECT job_id, from_state, to_state, fence, claim_id, at FROM ss_event ORDER BY id"
        ):
            told.setdefault(number, []).append(tuple(event[:3]))
        jobs = self.query("SELECT id, state, fence FROM ss_job")
        assert told.keys() == {number for number, *_ in jobs}
        for number, state, fence in jobs:
            was, last = None, 0
            for origin, to, at in told[number]:
                assert origin == was
                assert at == last + (to == origin or (to in ("leased", "ready") and origin != "leased"))
                was, last = to, at
            assert (was, last) == (state, fence)
        # but for heartbeats, the trail of the rows says the same
        trail = self.query(
            "SELECT was, now FROM trail WHERE NOT (was = now AND fence = 0) ORDER BY job_id, n"
        )
        assert trail == [
            (origin, to)
            for _, events in sorted(told.items())
            for origin, to, _ in events
            if origin is not None
        ]


def searching(examples: int, **how: Any) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=40,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        **how,
    )


def search(machine: type[LedgerMachine], url: str | None, how: settings) -> None:
    """Run the machine on PostgreSQL at *url*, or on files."""
    run_state_machine_as_test(type("Machine", (machine,), {"postgres": url}), settings=how)


def place(kind: str, request: pytest.FixtureRequest) -> str | None:
    return request.getfixturevalue("postgres_url") if kind == "postgres" else None


ROWS = ("I1", "I2", "I3", "I4", "I7", "I8", "I9", "I13", "I14", "I18", "I19", "F11")


@pytest.mark.proves(*ROWS)
@pytest.mark.parametrize("kind", DATABASES)
def test_nothing_the_model_forbids_happens(kind: str, request: pytest.FixtureRequest) -> None:
    search(LedgerMachine, place(kind, request), searching(6 if kind == "postgres" else 15))


@pytest.mark.soak
@pytest.mark.proves(*ROWS)
@pytest.mark.parametrize("kind", DATABASES)
def test_nothing_the_model_forbids_happens_however_long(kind: str, request: pytest.FixtureRequest) -> None:
    search(LedgerMachine, place(kind, request), searching(2000))


# -- the mutants --------------------------------------------------------------------------------


class Chosen:
    """Stands in for Hypothesis where a rule draws: gives what was chosen."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def draw(self, _strategy: object) -> Any:
        return self.value


class Story(LedgerMachine):
    """A fixed order of the model's rules, which comes by every safeguard; all invariants after each."""

    def tell(self) -> None:
        k0, k1 = KEYS
        op, other = OPS
        self.start()
        self.then(self.claim, "a", k0, "no")
        self.then(self.claim_with_another_request, "b", k0)
        self.then(self.claim, "b", k0, "no")
        self.then(self.begin, self.lease(), op)
        self.then(self.give_up, self.lease(), op)
        self.then(self.begin, self.lease(), op)
        self.then(self.begin, self.lease(), op)
        for wrong in ("fence", "claim_id"):
            for verb in ("complete", "release", "fail", "begin", "succeed"):
                self.then(self.write_under_half_a_lease, self.lease(), wrong, verb)
        self.then(self.claim_later, "b", k0)
        self.then(self.begin, self.lease(-2), op)
        self.then(self.begin, self.lease(), op)
        self.then(self.succeed, self.lease(-2), op, RESULTS[0])
        self.then(self.succeed, self.lease(), op, RESULTS[3])
        self.then(self.begin, self.lease(), op)
        self.then(self.begin, self.lease(), other)
        self.then(self.complete, self.lease(-2), DIGESTS[1])
        self.then(self.complete, self.lease(), DIGESTS[0])
        self.then(self.complete, self.lease(), DIGESTS[1])
        self.then(self.claim, "a", k0, "no")
        self.then(self.claim, "a", k0, "force")
        self.then(self.begin, self.lease(), other)
        self.then(self.renew, "a")
        self.then(self.claim_later, "b", k0)
        self.then(self.claim_later, "b", k0)
        self.then(self.claim, "a", k0, "force")
        self.then(self.requeue, k0)
        self.then(self.claim, "a", k0, "no")
        self.then(self.move_clock, -9000.0)
        self.then(self.claim, "b", k0, "no")
        self.then(self.claim_unheard, "a", k1)
        self.then(self.claim_run_again, Chosen(0))
        self.then(self.move_clock, 61.0)
        self.then(self.claim_unheard, "b", k1)
        self.then(self.claim_run_again, Chosen(0))
        self.then(self.release, self.lease())

    def lease(self, which: int = -1) -> Chosen:
        return Chosen(self.leases[which])

    def then(self, step: Any, *arguments: object) -> None:
        step(*arguments)
        self.rows_are_as_modelled()
        self.completions_are_as_acknowledged()
        self.effects_are_as_modelled()
        self.changes_are_in_the_table()
        self.history_is_a_chain()


@pytest.fixture(params=DATABASES)
def story(request: pytest.FixtureRequest) -> Iterator[Story]:
    told = Story()
    told.postgres = place(request.param, request)
    yield told
    told.teardown()


def test_the_story_is_true(story: Story) -> None:
    """Its end comes by what is left of the table: SQL makes each transition in it, and no other."""
    story.tell()
    for permanent in (False, True, True):
        story.then(story.move_clock, 3600.0)
        story.then(story.claim, "a", KEYS[1], "no")
        story.then(story.fail, story.lease(), permanent, False, None)
    story.then(story.requeue, KEYS[1])
    assert set(story.query("SELECT DISTINCT was, now, fence, generation FROM trail")) == lawful_edges()


@pytest.mark.parametrize("event", [*JobEvent], ids=str)
def test_the_table_says_in_which_states_an_event_is_possible(event: JobEvent) -> None:
    """Each condition and each change in SQL is that of the table, for every state."""
    states = {state for state, what in TRANSITIONS if what is event}
    condition = str(transitions.may(event))
    assert {state for state in JobState if f"'{state.value}'" in condition} == states
    changes = {TRANSITIONS[state, event] for state in states}
    if len(changes) == 1:
        [change] = changes
        values = transitions.changed(event)
        assert values["state"] == change.to
        assert ("fence" in values, "generation" in values) == (change.fence > 0, change.generation > 0)
    else:
        with pytest.raises(ValueError, match="unpack"):
            transitions.changed(event)


@pytest.mark.proves("I2", "I3", "I4", "I7", "I8", "I9", "I13", "I14", "I18", "I19", "F2", "F11")
@pytest.mark.slow
@pytest.mark.parametrize("name", mutants.LEDGER)
def test_a_safeguard_that_is_missing_is_noticed(
    story: Story, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutants.apply(name, monkeypatch.setattr)
    with pytest.raises((AssertionError, LeaseLost, pytest.fail.Exception)):
        story.tell()


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.parametrize("name", mutants.LEDGER)
def test_the_search_finds_the_safeguard_that_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without being told where."""
    mutants.apply(name, monkeypatch.setattr)
    how = searching(3000, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises((AssertionError, LeaseLost, pytest.fail.Exception)):
        search(LedgerMachine, None, how)
