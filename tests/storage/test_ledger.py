"""The ledger's promises, one by one, on SQLite; rows are those of the design (I…, F…, rule …)."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text, true, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

import scrapy_streaming
from scrapy_streaming.exceptions import IntegrityError, KeyConflict, LeaseLost, LedgerError, WriteFailed
from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.jobs import (
    Completion,
    Dead,
    Done,
    Granted,
    Held,
    JobState,
    Known,
    Lease,
    Waiting,
)
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.ledger import (
    SCHEMA_VERSION,
    JobRequest,
    Ledger,
    schema,
    sqlite,
    statements,
    verbs,
)

ROOT = Path(scrapy_streaming.__file__).parents[1]
URL = "https://example.org/a.bin"
KEY = "k1"
REQUEST = JobRequest("work", "artifact", URL, "GET")
TAGGED = Validators(EntityTag("v1"), "Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT")
LEASE = 60.0
ATTEMPTS = 3


class Clock:
    """Time that only a test moves; read by SQL in the writer's thread."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def digest_of(name: str) -> str:
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


def known(name: str = "bytes", url: str = URL) -> Known:
    return Known(digest_of(name), len(name), TAGGED, url, "text/plain", ("accept",), "sel")


Opener = Callable[..., Ledger]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
def opened(path: Path, clock: Clock) -> Iterator[Opener]:
    ledgers: list[Ledger] = []

    def make(worker: str = "a", *, store_id: str = "store", max_attempts: int = ATTEMPTS) -> Ledger:
        ledgers.append(
            Ledger.open(
                path,
                store_id=store_id,
                worker_id=worker,
                lease_seconds=LEASE,
                max_attempts=max_attempts,
                fsync=False,
                clock=clock,
            )
        )
        return ledgers[-1]

    yield make
    for ledger in ledgers:
        ledger.close()


@pytest.fixture
def ledger(opened: Opener) -> Ledger:
    return opened()


def grant(ledger: Ledger, key: str = KEY, request: JobRequest = REQUEST, **how: Any) -> Lease:
    answer = ledger.claim(key, request, **how).result()
    assert isinstance(answer, Granted), answer
    return answer.lease


def rows(path: Path, statement: str, *values: object) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement, values).fetchall()


def raw(ledger: Ledger, command: Callable[[sqlite3.Connection], Any]) -> Any:
    return ledger._writer.submit(lambda c: command(sqlite.raw_connection(c))).result()


# -- claim, complete, and what is replayed --------------------------------------------------


def test_one_row_per_key_and_fences_grow_in_claim_order(ledger: Ledger, path: Path, clock: Clock) -> None:
    """I1, I2."""
    fences, claims = [], set()
    for _ in range(ATTEMPTS):
        lease = grant(ledger)
        fences.append(lease.fence)
        claims.add(lease.claim_id)
        clock.now += LEASE
    assert fences == [1, 2, 3]
    assert len(claims) == ATTEMPTS
    assert rows(path, "SELECT count(*) FROM ss_job") == [(1,)]


def test_a_held_job_names_its_holder_and_the_end_of_the_lease(opened: Opener, clock: Clock) -> None:
    """Rule 5."""
    lease = grant(opened("a"))
    assert lease.until == clock.now + LEASE
    assert opened("b").claim(KEY, REQUEST).result() == Held("a", lease.until)


def test_completion_is_replayed_with_all_that_was_known(ledger: Ledger, clock: Clock) -> None:
    lease = grant(ledger)
    clock.now += 5
    recorded = ledger.complete(lease, known(), resumed_from=2).result()
    assert recorded.completed_at == clock.now == recorded.known.fetched_at
    assert recorded.known.validators == TAGGED
    assert ledger.claim(KEY, REQUEST).result() == Done(recorded)


def test_completion_keeps_its_digest_when_the_representation_became_another(ledger: Ledger) -> None:
    """A replay never carries the validators of other bytes."""
    recorded = ledger.complete(grant(ledger), known("old")).result()
    ledger.complete(grant(ledger, "k2"), known("newer")).result()
    replayed = ledger.claim(KEY, REQUEST).result()
    assert isinstance(replayed, Done)
    assert replayed.completion.completion_id == recorded.completion_id
    assert (replayed.completion.known.digest, replayed.completion.known.size) == (digest_of("old"), 3)
    assert replayed.completion.known.validators == Validators()


def test_another_job_on_the_url_builds_on_what_is_known_until_it_is_missing(ledger: Ledger) -> None:
    recorded = ledger.complete(grant(ledger), known()).result()
    first = ledger.claim("k2", REQUEST).result()
    assert isinstance(first, Granted)
    assert first.known == recorded.known
    assert ledger.mark_missing(known().digest).result() is True
    assert ledger.mark_missing(digest_of("unheard of")).result() is False
    third = ledger.claim("k3", REQUEST).result()
    assert isinstance(third, Granted)
    assert third.known is None
    ledger.complete(first.lease, known()).result()
    fourth = ledger.claim("k4", REQUEST).result()
    assert isinstance(fourth, Granted)
    assert fourth.known is not None


def test_done_with_missing_bytes_is_fetched_again(ledger: Ledger) -> None:
    """I5: Done never names a blob known to be gone."""
    ledger.complete(grant(ledger), known()).result()
    ledger.mark_missing(known().digest).result()
    lease = grant(ledger)
    assert (lease.generation, lease.fence) == (2, 2)


def test_complete_by_the_same_claim_gives_the_first_answer_again(ledger: Ledger, path: Path) -> None:
    """Rule 4: the answer to a COMMIT may be lost."""
    lease = grant(ledger)
    first = ledger.complete(lease, known()).result()
    assert ledger.complete(lease, known()).result() == first
    assert ledger.complete(lease, known("other bytes")).result() == first
    assert rows(path, "SELECT count(*) FROM ss_completion") == [(1,)]
    assert rows(path, "SELECT digest FROM ss_blob") == [(first.known.digest,)]


def test_complete_after_a_refresh_still_finds_its_own_generation(ledger: Ledger) -> None:
    """Rule 4, I4: each generation has its own completion."""
    lease = grant(ledger)
    first = ledger.complete(lease, known()).result()
    second = ledger.complete(grant(ledger, force=True), known()).result()
    assert second.completion_id != first.completion_id
    assert ledger.complete(lease, known()).result().completion_id == first.completion_id


def test_at_most_one_completion_per_generation(ledger: Ledger) -> None:
    """I4: the table itself refuses a second one."""
    ledger.complete(grant(ledger), known()).result()
    again = (
        "INSERT INTO ss_completion SELECT 'x', job_id, generation, fence, claim_id, worker_id, digest, size, "
        "resumed_from, completed_at, NULL FROM ss_completion"
    )
    with pytest.raises(LedgerError, match="UNIQUE"):
        raw(ledger, lambda connection: connection.execute(again))


def test_blob_size_that_disagrees_is_refused_and_nothing_is_recorded(ledger: Ledger) -> None:
    ledger.complete(grant(ledger), known()).result()
    lease = grant(ledger, "k2")
    wrong = Known(known().digest, 999, Validators(), URL)
    with pytest.raises(IntegrityError) as caught:
        ledger.complete(lease, wrong).result()
    assert caught.value.reason == "length-mismatch"
    assert view(ledger, "k2").state is JobState.LEASED
    with pytest.raises(ValueError, match="sha256"):
        ledger.complete(lease, Known("md5:0", 0, Validators(), URL))


def view(ledger: Ledger, key: str = KEY) -> Any:
    seen = ledger.job(key).result()
    assert seen is not None
    return seen


# -- the guard ------------------------------------------------------------------------------

END: dict[str, Callable[[Ledger, Lease], Future[Any]]] = {
    "complete": lambda ledger, lease: ledger.complete(lease, known("stale")),
    "release": lambda ledger, lease: ledger.release(lease),
    "fail": lambda ledger, lease: ledger.fail(lease, "e", "stale", permanent=False),
    "fail-after": lambda ledger, lease: ledger.fail(lease, "e", "stale", permanent=False, retry_after=9),
    "fail-permanent": lambda ledger, lease: ledger.fail(lease, "e", "stale", permanent=True),
}


@pytest.mark.parametrize("verb", END)
@pytest.mark.parametrize("stale", ["fence", "claim_id", "both", "job"])
def test_nothing_changes_under_a_stale_lease(
    opened: Opener, path: Path, clock: Clock, verb: str, stale: str
) -> None:
    """I3: a stale fence alone and a stale claim_id alone are each enough to be refused."""
    old = grant(opened("a"))
    clock.now += LEASE
    new = grant(opened("b"))
    lease = {
        "fence": Lease(new.job_id, KEY, old.fence, new.claim_id, new.until, 1),
        "claim_id": Lease(new.job_id, KEY, new.fence, old.claim_id, new.until, 1),
        "both": old,
        "job": Lease(new.job_id + 1, KEY, new.fence, new.claim_id, new.until, 1),
    }[stale]
    tables = [f"SELECT * FROM {name}" for name in ("ss_job", "ss_blob", "ss_representation", "ss_completion")]
    before = [rows(path, table) for table in tables]
    with pytest.raises(LeaseLost):
        END[verb](opened("a"), lease).result()
    assert [rows(path, table) for table in tables] == before
    assert isinstance(opened("b").complete(new, known()).result(), Completion)


def test_without_the_fence_in_the_guard_a_stale_completion_would_get_through(
    opened: Opener, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I3, the mutant: what the test above asks is decided by the guard and nothing else."""
    monkeypatch.setattr(statements, "guard", lambda: statements.in_state(JobState.LEASED) & true())
    mutant = opened("a")
    old = grant(mutant)
    clock.now += LEASE
    grant(opened("b"))
    assert mutant.complete(old, known("stale")).result().known.digest == digest_of("stale")


def test_the_completion_of_a_later_claim_is_not_given_to_an_earlier_one(opened: Opener, clock: Clock) -> None:
    """I3, rule 4: the same generation, but not this claim's completion."""
    a, b = opened("a"), opened("b")
    old = grant(a)
    clock.now += LEASE
    b.complete(grant(b), known()).result()
    with pytest.raises(LeaseLost):
        a.complete(old, known()).result()


def test_an_expired_lease_that_nobody_took_may_still_complete(ledger: Ledger, clock: Clock) -> None:
    """Rule 1."""
    lease = grant(ledger)
    clock.now += 10 * LEASE
    assert isinstance(ledger.complete(lease, known()).result(), Completion)


@pytest.mark.parametrize("verb", ["release", "fail", "fail-after", "fail-permanent"])
def test_a_lease_ends_once(ledger: Ledger, verb: str) -> None:
    """I3: after its end a claim can do nothing more, complete included."""
    lease = grant(ledger)
    END[verb](ledger, lease).result()
    for again in END.values():
        with pytest.raises(LeaseLost):
            again(ledger, lease).result()


# -- release, fail, back-off ----------------------------------------------------------------


def test_release_gives_the_attempt_back_but_not_the_fence(ledger: Ledger) -> None:
    for fence in range(1, 6):
        lease = grant(ledger)
        assert lease.fence == fence
        ledger.release(lease).result()
    assert (view(ledger).attempts, view(ledger).state) == (0, JobState.READY)


def test_back_off_binds_only_the_run_that_set_it(opened: Opener, clock: Clock) -> None:
    """Rule 9."""
    a = opened("a")
    a.fail(grant(a), "timeout", "no answer", permanent=False).result()
    seen = view(a)
    assert seen.not_before is not None
    assert clock.now <= seen.not_before <= clock.now + verbs.BACKOFF_FIRST
    assert a.claim(KEY, REQUEST).result() == Waiting(seen.not_before, "no answer")
    assert grant(opened("b")).fence == 2


def test_retry_after_binds_every_run_up_to_its_cap(opened: Opener, clock: Clock) -> None:
    """Rule 9."""
    a, b = opened("a"), opened("b")
    a.fail(grant(a), "busy", "503", permanent=False, retry_after=1e9).result()
    assert b.claim(KEY, REQUEST).result() == Waiting(clock.now + statements.BACKOFF_MAX, "503")
    clock.now += statements.BACKOFF_MAX
    b.fail(grant(b), "busy", "503", permanent=False, retry_after=float("nan")).result()
    assert grant(a).fence == 3


def test_progress_counts_attempts_anew(ledger: Ledger, clock: Clock) -> None:
    """Rule 9."""
    for _ in range(2 * ATTEMPTS):
        ledger.fail(grant(ledger), "cut", "cut", permanent=False, progress=True).result()
        assert view(ledger).attempts == 0
        clock.now += verbs.BACKOFF_FIRST


def test_a_failed_job_is_tried_again_when_asked_for(ledger: Ledger) -> None:
    """I19, rule 9: by refresh, with a new fence and its attempts counted anew."""
    ledger.fail(grant(ledger), "gone", "404", permanent=True).result()
    seen = view(ledger)
    assert (seen.state, seen.error_code, seen.error) == (JobState.FAILED, "gone", "404")
    assert seen.finished_at is not None
    assert grant(ledger).fence == 2
    assert (view(ledger).attempts, view(ledger).generation) == (1, 1)


def test_back_off_grows_and_stays_within_its_bounds() -> None:
    class Highest(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return b

    assert [verbs.backoff(n, Highest()) for n in (0, 1, 2, 3)] == [5.0, 5.0, 10.0, 20.0]
    assert verbs.backoff(10**6, Highest()) == statements.BACKOFF_MAX
    assert min(verbs.backoff(9, random.Random(seed)) for seed in range(100)) < 60


# -- terminal states ------------------------------------------------------------------------


def test_a_job_that_kills_its_worker_is_claimed_max_attempts_times(ledger: Ledger, clock: Clock) -> None:
    """I13, I19: then it is dead, says so, and waits for requeue."""
    for _ in range(ATTEMPTS):
        grant(ledger)
        clock.now += LEASE
    dead = Dead(ATTEMPTS, verbs.NO_WORD)
    assert [ledger.claim(KEY, REQUEST, force=True).result() for _ in range(2)] == [dead, dead]
    fence = view(ledger).fence
    assert ledger.requeue(KEY).result() is True
    assert ledger.requeue(KEY).result() is False
    assert grant(ledger).fence > fence + 1
    assert view(ledger).attempts == 1


def test_the_last_attempt_is_not_buried_while_its_lease_runs(opened: Opener, clock: Clock) -> None:
    """I13: and its worker is heard if nobody asked in between."""
    a = opened("a", max_attempts=1)
    lease = grant(a)
    assert opened("b", max_attempts=1).claim(KEY, REQUEST).result() == Held("a", lease.until)
    clock.now += LEASE
    assert isinstance(a.complete(lease, known()).result(), Completion)


def test_a_buried_claim_can_write_nothing(ledger: Ledger, opened: Opener, clock: Clock) -> None:
    """I3, I19."""
    one = opened("one", max_attempts=1)
    lease = grant(one)
    clock.now += LEASE
    assert isinstance(one.claim(KEY, REQUEST).result(), Dead)
    with pytest.raises(LeaseLost):
        one.complete(lease, known()).result()


def test_done_changes_only_by_refresh(ledger: Ledger, clock: Clock) -> None:
    """I19, I2."""
    ledger.complete(grant(ledger), known()).result()
    at = clock.now
    clock.now += 100
    assert isinstance(ledger.claim(KEY, REQUEST).result(), Done)
    assert isinstance(ledger.claim(KEY, REQUEST, refresh_before=at).result(), Done)
    assert ledger.requeue(KEY).result() is False
    lease = grant(ledger, refresh_before=at + 1)
    assert (lease.generation, lease.fence) == (2, 2)
    ledger.complete(lease, known("newer")).result()
    assert grant(ledger, force=True).generation == 3


def test_same_key_with_another_request_conflicts(ledger: Ledger) -> None:
    """I18, in every state, and nothing changes."""
    other = JobRequest("work", "artifact", URL, "POST")
    lease = grant(ledger)
    for state in (JobState.LEASED, JobState.DONE):
        for force in (False, True):
            with pytest.raises(KeyConflict):
                ledger.claim(KEY, other, force=force).result()
        assert view(ledger).state is state
        ledger.complete(lease, known()).result()


# -- leases and clocks ----------------------------------------------------------------------


def test_renewal_keeps_what_is_held_and_tells_what_is_lost(opened: Opener, clock: Clock) -> None:
    """Rule 8."""
    a, b = opened("a"), opened("b")
    kept, lost = grant(a, "k1"), grant(a, "k2")
    clock.now += LEASE
    grant(b, "k2")
    assert a.renew().result() == {kept.claim_id}
    assert lost.claim_id not in a.renew().result()
    clock.now += LEASE - 1
    assert isinstance(b.claim("k1", REQUEST).result(), Held)


def test_leases_of_a_worker_known_to_be_dead_end_now(opened: Opener) -> None:
    a, b = opened("a"), opened("b")
    lease, done = grant(a, "k1"), grant(a, "k2")
    a.complete(done, known()).result()
    assert b.forget_worker("a").result() == 1
    assert b.forget_worker("nobody").result() == 0
    assert grant(b, "k1").fence == lease.fence + 1


@pytest.mark.parametrize("jump", [1e9, -1e9])
def test_clock_jumps_cost_duplicate_work_only(opened: Opener, path: Path, clock: Clock, jump: float) -> None:
    """I14, I7: whichever way it jumps the job can be had, and one of the two completes."""
    a, b = opened("a"), opened("b")
    first = grant(a)
    clock.now += jump
    second = grant(b)
    with pytest.raises(LeaseLost):
        a.complete(first, known()).result()
    b.complete(second, known()).result()
    assert rows(path, "SELECT count(*) FROM ss_completion") == [(1,)]


def test_no_back_off_outlives_a_clock_set_back(ledger: Ledger, clock: Clock) -> None:
    """I14, I7."""
    ledger.fail(grant(ledger), "busy", "503", permanent=False, retry_after=60).result()
    clock.now -= 1e6
    assert grant(ledger).fence == 2


def test_time_is_the_databases(path: Path) -> None:
    """Rule 7."""
    with Ledger.open(path, store_id="s", worker_id="w", lease_seconds=60, max_attempts=3) as ledger:
        assert abs(grant(ledger).until - 60 - time.time()) < 5


# -- what is stored, and how ----------------------------------------------------------------


def test_credentials_never_enter(path: Path, ledger: Ledger) -> None:
    request = JobRequest("w", "a", "https://user:s3cret@example.org/p//x@y?q=@#@", "h")
    assert request.url == "https://example.org/p//x@y?q=@#@"
    lease = grant(ledger, KEY, request)
    ledger.fail(lease, "e", "GET https://user:s3cret@h/ failed \udc80" + "x" * 9999, permanent=True).result()
    assert view(ledger).error[:21] == "GET https://h/ failed"
    assert len(view(ledger).error) == 2000
    ledger.complete(grant(ledger, KEY, request), known(url="https://user:s3cret@cdn.example.org/f")).result()
    ledger.close()
    assert b"s3cret" not in path.read_bytes()
    assert b"cdn.example.org/f" in path.read_bytes()


def test_files_are_for_the_owner_only(path: Path, ledger: Ledger) -> None:
    for name in ("", "-wal", "-shm"):
        assert stat.S_IMODE(path.with_name(path.name + name).stat().st_mode) == 0o600


def pragma(name: str) -> Callable[[sqlite3.Connection], Any]:
    return lambda connection: connection.execute(f"PRAGMA {name}").fetchone()[0]


def test_pragmas_are_in_force(tmp_path: Path) -> None:
    wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}
    for fsync, level in ((True, 2), (False, 1)):
        with Ledger.open(
            tmp_path / f"{fsync}", store_id="s", worker_id="w", lease_seconds=1, max_attempts=1, fsync=fsync
        ) as ledger:
            got = {name: raw(ledger, pragma(name)) for name in wanted}
        assert got == wanted | {"synchronous": level}


def test_heartbeat_reads_the_partial_index(ledger: Ledger) -> None:
    plan: list[Any] = raw(
        ledger,
        lambda c: c.execute(
            "EXPLAIN QUERY PLAN UPDATE ss_job SET lease_until = 1 WHERE worker_id = 'a' AND state = 'leased'"
        ).fetchall(),
    )
    assert "ss_job_leased" in str(plan)
    traced: list[str] = []
    raw(ledger, lambda c: c.set_trace_callback(traced.append))
    ledger.renew().result()
    raw(ledger, lambda c: c.set_trace_callback(None))
    assert any(line.startswith("UPDATE") and "state = 'leased'" in line for line in traced)


@pytest.mark.parametrize(
    "wrong",
    [
        "state = 'unheard-of'",
        "claim_id = NULL",
        "lease_until = NULL",
        "state = 'ready'",
        "state = 'ready', claim_id = NULL",
        "state = 'done', claim_id = NULL, lease_until = NULL, finished_at = 1",
        "state = 'failed', claim_id = NULL, lease_until = NULL",
        "finished_at = 1",
        "size = 1",
        "fence = 0",
    ],
)
def test_tables_tie_a_state_to_its_fields(ledger: Ledger, wrong: str) -> None:
    grant(ledger)
    with pytest.raises(LedgerError, match="CHECK"):
        raw(ledger, lambda connection: connection.execute(f"UPDATE ss_job SET {wrong}"))


def test_counts_jobs_and_blobs(ledger: Ledger) -> None:
    assert set(ledger.counts().result().values()) == {0}
    ledger.complete(grant(ledger, "k1"), known()).result()
    ledger.complete(grant(ledger, "k2"), known("other")).result()
    grant(ledger, "k3")
    ledger.mark_missing(known("other").digest).result()
    got = ledger.counts().result()
    assert got == {"ready": 0, "leased": 1, "done": 2, "failed": 0, "dead": 0, "blobs": 1, "blob_bytes": 5}
    assert ledger.job("unheard of").result() is None


def test_tables_are_ones_that_postgresql_takes_too() -> None:
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    ddl = [str(CreateTable(table).compile(dialect=dialect)) for table in schema.metadata.sorted_tables]
    indexes = [
        str(CreateIndex(index).compile(dialect=dialect))
        for table in schema.metadata.sorted_tables
        for index in table.indexes
    ]
    assert "id BIGSERIAL NOT NULL" in "".join(ddl)
    assert len(indexes) == 2
    assert all("WHERE state = '" in index and "lease_until" not in index for index in indexes)


# -- opening --------------------------------------------------------------------------------


def refused(opened: Opener, **how: Any) -> LedgerError:
    with pytest.raises(LedgerError) as caught:
        opened(**how)
    return caught.value


def test_a_newer_schema_is_refused(opened: Opener, path: Path) -> None:
    """I20."""
    opened().close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE ss_meta SET schema_version = schema_version + 1")
    error = refused(opened)
    assert error.reason == "ledger-newer"
    assert "upgrade" in str(error)
    assert rows(path, "SELECT schema_version FROM ss_meta") == [(SCHEMA_VERSION + 1,)]


def test_an_older_schema_is_brought_forward_once(
    opened: Opener, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I20: numbered steps, in order, each once."""
    opened().close()

    def second(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE ss_second (x INTEGER)"))

    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, second))
    monkeypatch.setattr(schema, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    for _ in range(2):
        opened().close()
    assert rows(path, "SELECT schema_version FROM ss_meta") == [(SCHEMA_VERSION + 1,)]


def test_the_ledger_of_another_store_is_refused(opened: Opener) -> None:
    opened().close()
    error = refused(opened, store_id="other")
    assert error.reason == "ledger-foreign"
    assert "rebuild" in str(error)


def test_a_ledger_without_its_version_row_is_refused(opened: Opener, path: Path) -> None:
    opened().close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM ss_meta")
    assert refused(opened).reason == "ledger-corrupt"


def full(opened: Opener, path: Path) -> bytes:
    ledger = opened()
    for number in range(50):
        grant(ledger, f"k{number}")
    ledger.close()
    return path.read_bytes()


@pytest.mark.parametrize("damage", ["garbage", "truncated", "short"])
def test_a_file_that_is_no_sound_ledger_is_refused_and_left_as_it_is(
    opened: Opener, path: Path, damage: str
) -> None:
    """F13."""
    if damage == "garbage":
        path.write_bytes(os.urandom(9000))
    else:
        content = full(opened, path)
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content[:50])
    before = path.read_bytes()
    error = refused(opened)
    assert error.reason == "ledger-corrupt"
    assert "scrapy streaming rebuild" in str(error)
    assert path.read_bytes() == before


def test_after_an_unclean_end_the_file_is_checked(opened: Opener, path: Path) -> None:
    """F13: a page of zeros in the middle, and a log that nobody folded in."""
    ledger = opened()
    for number in range(50):
        grant(ledger, f"k{number}")
    log = path.with_name(path.name + "-wal")
    left = log.read_bytes()
    ledger.close()
    content = bytearray(path.read_bytes())
    content[-4096:] = bytes(4096)
    path.write_bytes(content)
    log.write_bytes(left[:10])
    assert refused(opened).reason == "ledger-corrupt"


def test_a_link_or_a_directory_is_no_ledger(opened: Opener, path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    assert refused(opened).reason == "ledger-unreadable"
    assert not (tmp_path / "elsewhere").exists()
    path.unlink()
    path.mkdir()
    assert refused(opened).reason == "ledger-unreadable"
    path.rmdir()


def test_a_missing_directory_is_named(clock: Clock, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no/where") as caught:
        Ledger.open(tmp_path / "no/where", store_id="s", worker_id="w", lease_seconds=1, max_attempts=1)
    assert caught.value.reason == "ledger-unreadable"


@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        (sqlite3.SQLITE_CORRUPT, LedgerError, "ledger-corrupt"),
        (sqlite3.SQLITE_IOERR_FSYNC, LedgerError, "ledger-unreadable"),
        (sqlite3.SQLITE_READONLY, LedgerError, "ledger-unreadable"),
        (sqlite3.SQLITE_FULL, WriteFailed, "no-space"),
        (sqlite3.SQLITE_BUSY, LedgerError, "ledger-unusable"),
    ],
)
def test_errors_are_told_apart_by_code(path: Path, code: int, kind: type[Exception], reason: str) -> None:
    error = sqlite3.OperationalError("any text at all")
    error.sqlite_errorcode = code
    told = sqlite.translate(error, path)
    assert isinstance(told, kind)
    assert getattr(told, "reason", None) == reason


START = """
import sys
from pathlib import Path
from scrapy_streaming.storage.ledger import JobRequest, Ledger
path, me, when = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
import time; time.sleep(max(0, when - time.time()))
with Ledger.open(path, store_id="s", worker_id=me, lease_seconds=60, max_attempts=3) as ledger:
    print(type(ledger.claim("k", JobRequest("w", "a", "https://h/", "GET")).result()).__name__)
"""


def process(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_start_at_once_create_the_ledger_once(path: Path) -> None:
    """I20, I2: and one of them gets the job."""
    when = time.time() + 2.5
    started = [process(START, path, f"w{number}", when) for number in range(8)]
    said = [one.communicate(timeout=60) for one in started]
    assert [error for _, error in said] == [""] * 8
    assert sorted(answer.strip() for answer, _ in said) == ["Granted"] + ["Held"] * 7
    assert rows(path, "SELECT count(*), max(schema_version) FROM ss_meta") == [(1, SCHEMA_VERSION)]


# -- the writer -----------------------------------------------------------------------------

CRASH = """
import hashlib, sys
from collections import deque
from pathlib import Path
from scrapy_streaming.protocol.jobs import Known
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.ledger import JobRequest, Ledger
ledger = Ledger.open(Path(sys.argv[1]), store_id="s", worker_id="w", lease_seconds=60, max_attempts=3)
number = 0
while True:
    keys = [f"k{number + n}" for n in range(16)]
    number += 16
    grants = [ledger.claim(key, JobRequest("w", "a", "https://h/" + key, "GET")) for key in keys]
    waiting = []
    for key, grant in zip(keys, grants):
        digest = "sha256:" + hashlib.sha256(key.encode()).hexdigest()
        waiting.append(ledger.complete(grant.result().lease, Known(digest, 1, Validators(), "https://h/")))
    for key, answer in zip(keys, waiting):
        print(key, answer.result().completion_id, flush=True)
"""


def test_an_acknowledged_completion_survives_kill_9(path: Path) -> None:
    """I6, I4: short of a power cut, which needs another machine."""
    with process(CRASH, path) as victim:
        assert victim.stdout is not None
        assert victim.stderr is not None
        first = [victim.stdout.readline() for _ in range(200)]
        victim.send_signal(signal.SIGKILL)
        # not `communicate`: it would not see what `readline` has read ahead
        lines = (*first, *victim.stdout)
        error = victim.stderr.read()
    assert victim.returncode == -signal.SIGKILL
    said = dict(line.split() for line in lines if line.endswith("\n"))
    assert error == ""
    assert len(said) >= 200
    with Ledger.open(path, store_id="s", worker_id="v", lease_seconds=60, max_attempts=3) as ledger:
        for key, completion_id in said.items():
            answer = ledger.claim(key, JobRequest("w", "a", "https://h/" + key, "GET")).result()
            assert isinstance(answer, Done)
            assert answer.completion.completion_id == completion_id
    assert rows(path, "SELECT count(*) FROM ss_completion GROUP BY job_id HAVING count(*) > 1") == []


def block(ledger: Ledger) -> threading.Event:
    """Keep the writer within a transaction until the event is set."""
    entered, leave = threading.Event(), threading.Event()

    def wait(_: Connection) -> None:
        entered.set()
        assert leave.wait(30)

    ledger._writer.submit(wait)
    assert entered.wait(30)
    return leave


def test_commands_that_wait_share_one_commit(ledger: Ledger) -> None:
    traced: list[str] = []
    raw(ledger, lambda connection: connection.set_trace_callback(traced.append))
    leave = block(ledger)
    waiting = [ledger.claim(f"k{number}", REQUEST) for number in range(64)]
    assert not any(answer.done() for answer in waiting)
    leave.set()
    assert all(isinstance(answer.result(), Granted) for answer in waiting)
    raw(ledger, lambda connection: connection.set_trace_callback(None))
    # that of the command that set the trace, the blocker's, and one for all 64
    assert traced.count("COMMIT") == 3
    assert {line for line in traced if line.startswith("BEGIN")} == {"BEGIN IMMEDIATE"}


def test_one_commands_error_does_not_disturb_its_neighbours(opened: Opener, clock: Clock) -> None:
    a = opened("a")
    stale = grant(a, "k0")
    a.release(stale).result()
    good = [grant(a, f"k{number}") for number in (1, 2)]
    leave = block(a)
    before = a.complete(good[0], known("one"))
    bad = a.complete(stale, known("stale"))
    odd = a._writer.submit(lambda c: c.execute(update(schema.job).values(state="unheard-of")))
    after = a.complete(good[1], known("two"))
    leave.set()
    assert isinstance(before.result(), Completion)
    assert isinstance(after.result(), Completion)
    with pytest.raises(LeaseLost):
        bad.result()
    with pytest.raises(LedgerError):
        odd.result()
    assert a.counts().result()["done"] == 2
    assert a.counts().result()["blobs"] == 2


def test_when_the_database_ends_the_transaction_the_whole_batch_is_told(ledger: Ledger) -> None:
    """I6: nothing is acknowledged that was rolled back, and the writer goes on."""
    grant(ledger)
    leave = block(ledger)
    before = ledger.claim("k2", REQUEST)
    broken = ledger._writer.submit(
        lambda c: c.exec_driver_sql(
            "INSERT OR ROLLBACK INTO ss_job SELECT * FROM ss_job WHERE job_key = 'k1'"
        )
    )
    after = ledger.claim("k3", REQUEST)
    leave.set()
    for answer in (before, broken, after):
        with pytest.raises(LedgerError, match="UNIQUE"):
            answer.result()
    assert ledger.job("k2").result() is None
    assert grant(ledger, "k2").fence == 1


def test_a_commit_that_fails_fails_all_its_commands(ledger: Ledger) -> None:
    """I6: a deferred foreign key is only looked at by COMMIT."""
    leave = block(ledger)
    before = ledger.claim("k2", REQUEST)
    broken = ledger._writer.submit(
        lambda c: (
            c.exec_driver_sql(
                "UPDATE ss_job SET state = 'done', claim_id = NULL, lease_until = NULL, digest = 'x', "
                "size = 1, finished_at = 1"
            ).rowcount
        )
    )
    leave.set()
    for answer in (before, broken):
        with pytest.raises(LedgerError, match="FOREIGN KEY"):
            answer.result()
    assert ledger.job("k2").result() is None
    assert grant(ledger, "k2").fence == 1


def test_a_locked_ledger_is_an_error_and_then_no_longer(ledger: Ledger, path: Path) -> None:
    raw(ledger, lambda connection: connection.execute("PRAGMA busy_timeout = 20"))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="locked"):
            ledger.claim(KEY, REQUEST).result()
        other.execute("ROLLBACK")
    assert grant(ledger).fence == 1


def test_a_cancelled_command_is_not_run(ledger: Ledger) -> None:
    leave = block(ledger)
    answer = ledger.claim(KEY, REQUEST)
    assert answer.cancel()
    leave.set()
    assert ledger.job(KEY).result() is None


def test_close_answers_what_is_queued_and_then_refuses(ledger: Ledger) -> None:
    leave = block(ledger)
    waiting = [ledger.claim(f"k{number}", REQUEST) for number in range(300)]
    closer = threading.Thread(target=ledger.close)
    closer.start()
    leave.set()
    closer.join(30)
    assert all(answer.done() and isinstance(answer.result(), Granted) for answer in waiting)
    with pytest.raises(LedgerError) as caught:
        ledger.renew()
    assert caught.value.reason == "ledger-closed"
    ledger.close()


def test_rule9_a_claim_that_left_more_bytes_begins_its_attempts_anew(opened: Opener, clock: Clock) -> None:
    """A download that is killed again and again, but grows, never becomes a dead job."""
    ledger = opened(max_attempts=2)
    for kept in (0, 10, 20, 30, 40, 40):
        assert isinstance(ledger.claim(KEY, REQUEST, kept=kept).result(), Granted)
        clock.now += 2 * LEASE
    assert isinstance(ledger.claim(KEY, REQUEST, kept=40).result(), Dead)


def test_i5_one_missing_blob_makes_only_its_own_job_claimable(opened: Opener) -> None:
    """Found by the model: the condition once looked at any done job instead of the one asked for."""
    ledger = opened()
    digests = [f"sha256:{number:064x}" for number in (1, 2)]
    for key, digest in zip(("k1", "k2"), digests, strict=True):
        request = JobRequest("work", key, f"{URL}/{key}", "GET")
        granted = ledger.claim(key, request).result()
        assert isinstance(granted, Granted)
        ledger.complete(granted.lease, Known(digest, 1, TAGGED, request.url)).result()
    ledger.mark_missing(digests[0]).result()
    assert isinstance(ledger.claim("k2", JobRequest("work", "k2", f"{URL}/k2", "GET")).result(), Done)
    assert isinstance(ledger.claim("k1", JobRequest("work", "k1", f"{URL}/k1", "GET")).result(), Granted)
