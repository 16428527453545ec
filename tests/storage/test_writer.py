"""The writer: who shares a commit, who waits for a database that is away, what is answered when it is back.

Rows are those of the ledger's design (I…) and of the faults (F…).
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from ledger_kit import (
    KEY,
    LEASE,
    REQUEST,
    Clock,
    Database,
    Opener,
    block,
    digest_of,
    grant,
    hex_of,
    known,
    postgres_only,
    process,
    raw,
    sqlite_only,
    view,
)
from sqlalchemy import event, update
from support.cutting_proxy import CuttingProxy
from support.postgres import PostgresServer

from scrapy_streaming.exceptions import LeaseLost, LedgerError, WriteFailed
from scrapy_streaming.protocol.jobs import Completion, Done, Granted, Held, JobState, Recover, Replay
from scrapy_streaming.storage.ledger import Ledger, postgres, schema, sqlite

K2, K3 = hex_of("k2"), hex_of("k3")
OP = hex_of("an effect")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# -- one commit for many ----------------------------------------------------------------------


@contextmanager
def commits(ledger: Ledger) -> Iterator[list[object]]:
    """Count the commits of a ledger's own connection."""
    connection = ledger._writer._connection
    assert connection is not None
    seen: list[object] = []

    def see(connection: object) -> None:
        seen.append(connection)

    event.listen(connection.engine, "commit", see)
    yield seen
    event.remove(connection.engine, "commit", see)


def test_commands_that_wait_share_one_commit(ledger: Ledger) -> None:
    with commits(ledger) as seen:
        leave = block(ledger)
        waiting = [ledger.claim(hex_of(str(number)), REQUEST) for number in range(64)]
        assert not any(answer.done() for answer in waiting)
        leave.set()
        assert all(isinstance(answer.result(), Granted) for answer in waiting)
    assert len(seen) == 2  # the blocker's, and one for all 64


def test_one_commands_error_does_not_disturb_its_neighbours(opened: Opener) -> None:
    a = opened("a")
    stale = grant(a, hex_of("k0"))
    a.release(stale).result()
    good = [grant(a, key) for key in (KEY, K2)]
    with commits(a) as seen:
        leave = block(a)
        before = a.complete(good[0], known("one"))
        bad = a.complete(stale, known("stale"))
        odd = a._writer.submit(lambda s: s.connection.execute(update(schema.job).values(state="unheard-of")))
        after = a.complete(good[1], known("two"))
        leave.set()
        assert isinstance(before.result(), Completion)
        assert isinstance(after.result(), Completion)
    assert len(seen) == 2
    with pytest.raises(LeaseLost):
        bad.result()
    with pytest.raises(LedgerError):
        odd.result()
    assert a.counts().result()["done"] == 2
    assert a.counts().result()["blobs"] == 2


@sqlite_only
@pytest.mark.proves("I6")
def test_when_the_database_ends_the_transaction_the_whole_batch_is_told(ledger: Ledger) -> None:
    """I6: nothing is acknowledged that was rolled back, and the writer goes on."""
    grant(ledger)
    leave = block(ledger)
    before = ledger.claim(K2, REQUEST)
    broken = ledger._writer.submit(lambda s: s.plain("INSERT OR ROLLBACK INTO ss_job SELECT * FROM ss_job"))
    after = ledger.claim(K3, REQUEST)
    leave.set()
    for answer in (before, broken, after):
        with pytest.raises(LedgerError, match="UNIQUE"):
            answer.result()
    assert ledger.job(K2).result() is None
    assert grant(ledger, K2).fence == 1


ONLY_AT_COMMIT = """
CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'only at commit'; END $$;
CREATE CONSTRAINT TRIGGER later AFTER UPDATE ON ss_meta
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION no();
"""


@pytest.mark.proves("I6")
def test_a_commit_that_fails_fails_all_its_commands(ledger: Ledger, database: Database) -> None:
    """I6: what is looked at by COMMIT only."""

    def broken(session: Any) -> None:
        if not database.postgres:
            session.plain("PRAGMA defer_foreign_keys = ON")
            session.plain(
                "UPDATE ss_job SET digest = zeroblob(32), size = 1, state = 'done', claim_id = NULL, "
                "lease_until = NULL, finished_at = 1"
            )
        session.plain("UPDATE ss_meta SET epoch = 2")

    if database.postgres:
        database.rows(ONLY_AT_COMMIT)
    grant(ledger)
    leave = block(ledger)
    answers: list[Future[Any]] = [ledger.claim(K2, REQUEST), ledger._writer.submit(broken)]
    leave.set()
    for answer in answers:
        with pytest.raises(LedgerError, match=r"only at commit|FOREIGN KEY"):
            answer.result()
    assert ledger.job(K2).result() is None
    assert grant(ledger, K2).fence == 1


def test_a_cancelled_command_is_not_run(ledger: Ledger) -> None:
    leave = block(ledger)
    answer, after = ledger.claim(KEY, REQUEST), ledger.claim(K2, REQUEST)
    assert answer.cancel()
    leave.set()
    assert isinstance(after.result(), Granted)
    assert ledger.job(KEY).result() is None


# -- closing -----------------------------------------------------------------------------------


def test_close_answers_what_is_queued_and_then_refuses(ledger: Ledger) -> None:
    leave = block(ledger)
    waiting = [ledger.claim(hex_of(str(number)), REQUEST) for number in range(600)]
    closer = threading.Thread(target=ledger.close)
    closer.start()
    leave.set()
    closer.join(30)
    assert all(answer.done() and isinstance(answer.result(), Granted) for answer in waiting)
    with pytest.raises(LedgerError) as caught:
        ledger.renew()
    assert caught.value.reason == "ledger-closed"
    ledger.close()


def test_close_waits_for_a_batch_that_goes_on(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow is not stuck: what the server is working on is not cut off."""
    slow = ledger._writer.submit(lambda s: time.sleep(1.5))
    more = ledger.claim(KEY, REQUEST)
    ledger.close()
    assert slow.result() is None
    assert isinstance(more.result(), Granted)


def closed_within(ledger: Ledger, seconds: float) -> list[LedgerError]:
    """Close a ledger that has work and no database; return the errors of that work."""
    waiting = [ledger.claim(hex_of(str(number)), REQUEST) for number in range(3)]
    began = time.monotonic()
    ledger.close()
    assert time.monotonic() - began < seconds
    errors = [answer.exception(timeout=0) for answer in waiting]
    assert all(isinstance(error, LedgerError) for error in errors), errors
    return errors


@sqlite_only
@pytest.mark.proves("F11")
@pytest.mark.parametrize("how", ["transaction", "turn"])
def test_close_is_bounded_while_somebody_keeps_the_file_locked(ledger: Ledger, path: Path, how: str) -> None:
    with locked(path, how):
        waiting = ledger.claim(KEY, REQUEST)
        time.sleep(0.3)
        assert {error.reason for error in closed_within(ledger, 4.5)} == {"ledger-locked"}
        assert isinstance(waiting.exception(0), LedgerError)


@postgres_only
@pytest.mark.proves("F11")
@pytest.mark.parametrize("how", ["pause", "kill"])
def test_close_is_bounded_while_the_server_is_away(
    ledger: Ledger, postgres_server: PostgresServer, how: str
) -> None:
    """Also when it keeps the connection and says nothing."""
    getattr(postgres_server, how)()
    assert {error.reason for error in closed_within(ledger, 4.5)} == {"ledger-unreachable"}


@contextmanager
def locked(path: Path, how: str) -> Iterator[None]:
    """Hold a transaction as a program does that knows no turns, or the turn of one that does nothing."""
    if how == "turn":
        with path.with_name(path.name + "-turn").open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield
        return
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


# -- SQLite: locked, stopped, full, swapped -------------------------------------------------------

HOLDER = """
import os, signal, sys, time
from scrapy_streaming.storage.ledger import Ledger
with Ledger.open(sys.argv[1], store_id="store", worker_id="holder") as ledger:
    def hold(session):
        session.plain("UPDATE ss_meta SET epoch = epoch + 1")
        print("holds", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    ledger._writer.submit(hold).result()
"""
FOREIGN = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1].removeprefix("sqlite:///"), isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("holds", flush=True)
sys.stdin.readline()
"""


@sqlite_only
@pytest.mark.proves("F11", "I7")
@pytest.mark.parametrize("holder", [HOLDER, FOREIGN], ids=["stopped-worker", "another-program"])
def test_a_locked_ledger_is_waited_for(
    ledger: Ledger,
    url: str,
    holder: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Answered late, with one warning; and the holder's transaction is whole, too."""
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.3)
    caplog.set_level(logging.INFO, logger="scrapy_streaming")
    with process(holder, url) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "holds\n", other.communicate()[1]
        began = time.monotonic()
        waiting = [ledger.claim(KEY, REQUEST), ledger.claim(K2, REQUEST)]
        time.sleep(3)
        assert not any(answer.done() for answer in waiting)
        other.send_signal(signal.SIGCONT)
        other.communicate("go\n", timeout=30)
        assert all(isinstance(answer.result(10), Granted) for answer in waiting)
        assert 3 <= time.monotonic() - began < 10
    [told] = warnings(caplog)
    assert "locked" in told
    [answered] = [record for record in caplog.records if "answers again" in record.getMessage()]
    assert answered.levelno == logging.INFO
    assert other.returncode == 0


@sqlite_only
@pytest.mark.proves("F11")
def test_patience_ends(
    opened: Opener, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With an error that says why; nothing was changed, and the writer goes on afterwards."""
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.1)
    ledger = opened(patience=0.5)
    with locked(path, "turn"), pytest.raises(LedgerError) as caught:
        ledger.claim(KEY, REQUEST).result(10)
    assert caught.value.reason == "ledger-locked"
    assert ledger.job(KEY).result() is None
    assert grant(ledger).fence == 1


@sqlite_only
@pytest.mark.proves("F8")
def test_a_full_ledger_is_told_when_patience_ends(opened: Opener) -> None:
    ledger = opened(patience=0.5)

    def limit(connection: sqlite3.Connection) -> None:
        [[pages]] = connection.execute("PRAGMA page_count").fetchall()
        connection.execute(f"PRAGMA max_page_count = {pages}")

    raw(ledger, limit)
    big = [f"{number:064x}" for number in range(100)]
    leave = block(ledger)  # one transaction for all: a few claims by themselves might fit into the last page
    answers = [ledger.claim(key, REQUEST) for key in big]
    leave.set()
    with pytest.raises(WriteFailed) as caught:
        answers[-1].result(10)
    assert caught.value.reason == "no-space"
    raw(ledger, lambda connection: connection.execute("PRAGMA max_page_count = 100000"))
    granted = [isinstance(ledger.claim(key, REQUEST).result(), Granted | Held) for key in big]
    assert all(granted)


def fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1 << 16))


@sqlite_only
@pytest.mark.proves("F8", "I6")
@pytest.mark.skipif(
    os.geteuid() != 0,
    reason="a disk is made full by mounting a small tmpfs, which needs root; CI runs as root",
)
def test_a_full_disk_is_waited_for(opened: Opener, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here, so no disk can be made full: {mounted.stderr!r}")
    try:
        ledger = opened(url=f"sqlite:///{disk}/ledger.sqlite3")
        kept = ledger.complete(grant(ledger), known()).result()
        with pytest.raises(OSError, match="No space left"):
            fill(disk / "ballast")
        keys = [hex_of(str(number)) for number in range(200)]
        waiting = [ledger.claim(key, REQUEST) for key in keys]
        time.sleep(2)
        assert not waiting[-1].done()
        (disk / "ballast").unlink()
        assert all(isinstance(answer.result(10), Granted) for answer in waiting)
        assert ledger.claim(KEY, REQUEST).result() == Done(kept)
        [told] = warnings(caplog)
        assert "no space" in told
        assert raw(ledger, lambda c: c.execute("PRAGMA quick_check").fetchall()) == [("ok",)]
        ledger.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@sqlite_only
@pytest.mark.proves("I6")
def test_a_log_that_cannot_be_copied_back_is_nobodys_answer(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit before it stands."""

    def refuse(_action: int, name: str | None, *_: object) -> int:
        return sqlite3.SQLITE_DENY if name == "wal_checkpoint" else sqlite3.SQLITE_OK

    raw(ledger, lambda connection: connection.set_authorizer(refuse))
    monkeypatch.setattr(sqlite, "CHECKPOINT_PAGES", 0)
    lease = grant(ledger)
    ledger.release(lease).result()
    assert view(ledger).state is JobState.READY


def put_back(path: Path, copy: Path) -> None:
    """Restore a file as recovery.md says: without the log of the other."""
    for name in ("-wal", "-shm"):
        path.with_name(path.name + name).unlink(missing_ok=True)
    copy.replace(path)


@sqlite_only
@pytest.mark.proves("I16", "F12")
def test_an_older_file_in_its_place_is_noticed(
    opened: Opener, path: Path, tmp_path: Path, clock: Clock, database: Database
) -> None:
    a, b = opened("a"), opened("b")
    first = grant(a)
    copy = tmp_path / "older"
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    clock.now += LEASE
    second = grant(b)
    grant(b, K3)
    put_back(path, copy)
    assert grant(a, K2).fence == 1
    assert database.rows("SELECT count(*) FROM ss_job") == [(2,)]
    with pytest.raises(LeaseLost):
        b.complete(second, known()).result()
    third = grant(a)
    assert (third.fence, third.job_id) == (second.fence, second.job_id)
    with pytest.raises(LeaseLost):  # the same fence, but of the time that is undone
        b.complete(second, known()).result()
    with pytest.raises(LeaseLost):
        a.complete(first, known()).result()
    assert isinstance(a.complete(third, known()).result(), Completion)
    assert database.rows("SELECT count(*) FROM ss_completion") == [(1,)]


@sqlite_only
@pytest.mark.proves("I16", "F13")
def test_a_file_that_is_gone_is_not_begun_anew(opened: Opener, path: Path, tmp_path: Path) -> None:
    ledger = opened()
    grant(ledger)
    path.rename(tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(LedgerError) as caught:
            ledger.claim(KEY, REQUEST).result(10)
        assert caught.value.reason == "ledger-missing"
    assert not path.exists()
    (tmp_path / "elsewhere").rename(path)  # its log is still where it was
    assert isinstance(ledger.claim(KEY, REQUEST).result(10), Granted | Held)


@sqlite_only
@pytest.mark.proves("I16")
def test_another_ledgers_file_in_its_place_is_refused(opened: Opener, path: Path, tmp_path: Path) -> None:
    ledger = opened()
    opened("x", url=f"sqlite:///{tmp_path}/other").close()
    put_back(path, tmp_path / "other")
    with pytest.raises(LedgerError) as caught:
        ledger.claim(KEY, REQUEST).result(10)
    assert caught.value.reason == "ledger-foreign"


# -- PostgreSQL: answers lost, server gone, deadlocks ------------------------------------------------


@pytest.fixture
def through(
    opened: Opener, cutting: CuttingProxy, postgres_server: PostgresServer, postgres_url: str
) -> Opener:
    """Opens ledgers by way of the proxy."""
    url = postgres_server.url(postgres_url.rpartition("/")[2], port=cutting.port)
    return lambda worker="a", **how: opened(worker, **({"url": url} | how))


CUTS = pytest.mark.parametrize("cut", ["cut_before_commit", "cut_after_commit"])


@postgres_only
@CUTS
@pytest.mark.proves("F11", "I2", "I4", "I6")
def test_a_lost_answer_to_a_commit_is_found_out(
    through: Opener, cutting: CuttingProxy, database: Database, cut: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Claim, complete, complete anew: the same answer as if nothing had happened, once in the tables."""
    ledger = through()

    def cutting_once(answer: Callable[[], Future[Any]]) -> Any:
        cuts = cutting.cuts
        setattr(cutting, cut, 1)
        result = answer().result(30)
        assert cutting.cuts == cuts + 1
        return result

    granted = cutting_once(lambda: ledger.claim(KEY, REQUEST))
    assert isinstance(granted, Granted)
    assert (granted.lease.fence, granted.taken_over) == (1, False)
    done = cutting_once(lambda: ledger.complete(granted.lease, known()))
    assert isinstance(done, Completion)
    assert ledger.claim(KEY, REQUEST).result() == Done(done)
    again = cutting_once(lambda: ledger.claim(KEY, REQUEST, refresh_before=math.inf))
    assert (again.lease.generation, again.lease.fence) == (2, 2)
    assert database.rows("SELECT generation, fence FROM ss_completion") == [(1, 1)]
    assert database.rows("SELECT to_state, fence FROM ss_event ORDER BY id") == [
        ("leased", 1),
        ("done", 1),
        ("leased", 2),
    ]


ENDS: dict[str, tuple[Callable[[Ledger, Any], Future[Any]], str]] = {
    "release": (lambda ledger, lease: ledger.release(lease), "ready"),
    "fail": (lambda ledger, lease: ledger.fail(lease, "e", "e", permanent=False, retry_after=9), "ready"),
    "fail-permanent": (lambda ledger, lease: ledger.fail(lease, "e", "e", permanent=True), "failed"),
}


@postgres_only
@CUTS
@pytest.mark.proves("F11")
@pytest.mark.parametrize("end", ENDS)
def test_an_end_whose_answer_was_lost_is_known_for_our_own(
    through: Opener, cutting: CuttingProxy, database: Database, cut: str, end: str
) -> None:
    ledger = through()
    verb, state = ENDS[end]
    lease = grant(ledger)
    setattr(cutting, cut, 1)
    assert verb(ledger, lease).result(30) is None
    assert view(ledger).state == state
    assert database.rows("SELECT count(*) FROM ss_event") == [(2,)]
    with pytest.raises(LeaseLost):  # what was answered is not answered again
        verb(ledger, lease).result(30)


@postgres_only
@pytest.mark.proves("F11", "I3")
def test_an_end_that_was_not_ours_is_none(through: Opener, cutting: CuttingProxy, clock: Clock) -> None:
    """Neither the burial of a claim nor what later claims did is taken for its own end."""
    a, b = through("a", max_attempts=1), through("b", max_attempts=9)
    dead, taken = grant(a), grant(a, K2)
    clock.now += LEASE
    a.claim(KEY, REQUEST).result()
    b.release(grant(b, K2)).result()
    for lease in (dead, taken):
        for verb, _ in ENDS.values():
            cutting.cut_after_commit = 1
            with pytest.raises(LeaseLost):
                verb(a, lease).result(30)
            assert cutting.cut_after_commit == 0


@postgres_only
@CUTS
@pytest.mark.proves("F11", "I8", "I9")
def test_an_effect_whose_commit_was_lost_is_never_run_blindly(
    through: Opener, cutting: CuttingProxy, database: Database, cut: str
) -> None:
    ledger = through()
    lease = grant(ledger)
    setattr(cutting, cut, 1)
    begun = ledger.begin(lease, OP, "kind").result(30)
    if cut == "cut_after_commit":  # it was begun: whether it was by this very call nobody knows
        assert begun == Recover(2, lease.fence)
    setattr(cutting, cut, 1)
    assert ledger.succeed(lease, OP, "so").result(30) is None
    setattr(cutting, cut, 1)
    assert ledger.begin(lease, OP, "kind").result(30) == Replay("so")
    assert cutting.cuts == 3
    assert database.rows("SELECT state, result FROM ss_operation") == [("ok", "so")]


@postgres_only
@pytest.mark.proves("F11")
def test_an_effect_recorded_in_the_batch_that_ended_its_claim_is_known(
    through: Opener, cutting: CuttingProxy
) -> None:
    ledger = through()
    lease = grant(ledger)
    ledger.begin(lease, OP, "kind").result()
    leave = block(ledger)
    cutting.cut_after_commit = 2  # the blocker's, then this
    answers: list[Future[Any]] = [ledger.succeed(lease, OP, "so"), ledger.complete(lease, known())]
    leave.set()
    assert answers[0].result(30) is None
    assert isinstance(answers[1].result(30), Completion)
    assert cutting.cuts == 1


@postgres_only
@pytest.mark.proves("F11", "I4", "I6")
@pytest.mark.parametrize("how", ["kill", "stop", "terminate_sessions"])
def test_nothing_is_lost_when_the_server_goes_in_the_middle(
    opened: Opener, postgres_server: PostgresServer, database: Database, how: str
) -> None:
    ledger = opened(patience=60, fsync=True)
    done: dict[str, str] = {}
    stop = threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set() or number < 30:
            number += 1
            key = hex_of(str(number))
            lease = grant(ledger, key)
            done[key] = ledger.complete(lease, known(key)).result(60).completion_id

    worker = threading.Thread(target=work)
    worker.start()
    for _ in range(2 if how == "kill" else 1):
        time.sleep(0.3)
        getattr(postgres_server, how)()
        time.sleep(0.2)
        postgres_server.start()
        back = time.monotonic()
        before = len(done)
        while len(done) < before + 5:
            assert time.monotonic() - back < 10, "not recovered 10 s after it was back"
            time.sleep(0.01)
    stop.set()
    worker.join(60)
    assert not worker.is_alive()
    stored = database.rows(
        "SELECT j.job_key, c.claim_id FROM ss_completion c JOIN ss_job j ON j.id = c.job_id"
    )
    assert {bytes(key).hex(): bytes(claim).hex() for key, claim in stored} == done
    assert len(stored) == len(done) >= 30


@postgres_only
@pytest.mark.proves("F11", "I7")
def test_a_server_that_is_away_is_waited_for(
    opened: Opener, postgres_server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = opened(fsync=True)
    lease = grant(ledger)
    postgres_server.kill()
    waiting = ledger.complete(lease, known())
    time.sleep(1.8)
    assert not waiting.done()
    postgres_server.start()
    assert isinstance(waiting.result(10), Completion)
    [told] = warnings(caplog)
    assert "claiming pauses" in told


@postgres_only
def test_a_server_that_is_down_at_the_start_is_told_at_once(opened: Opener, cutting: CuttingProxy) -> None:
    cutting.down = True
    began = time.monotonic()
    with pytest.raises(LedgerError) as caught:
        opened(url=f"postgresql+psycopg://postgres:s3cret@127.0.0.1:{cutting.port}/x")
    assert caught.value.reason == "ledger-unreachable"
    assert time.monotonic() - began < 15
    assert_no_password(caught.value)


@postgres_only
def test_a_server_that_says_nothing_at_the_start_is_not_waited_for_long(
    opened: Opener, url: str, postgres_server: PostgresServer
) -> None:
    """10 s, or what the URL says."""
    postgres_server.pause()
    began = time.monotonic()
    with pytest.raises(LedgerError) as caught:
        opened(url=f"{url}?connect_timeout=2")
    assert caught.value.reason == "ledger-unreachable"
    assert time.monotonic() - began < 5
    assert postgres._CONNECT["connect_timeout"] < 15


def assert_no_password(error: BaseException | None) -> None:
    while error is not None:
        assert "s3cret" not in str(error), str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@postgres_only
def test_a_wrong_password_user_or_database_is_told_without_the_password(
    opened: Opener, postgres_server: PostgresServer, database: Database
) -> None:
    rules = postgres_server.data / "pg_hba.conf"
    kept = rules.read_text()
    postgres_server.query("postgres", "DROP ROLE IF EXISTS locked")
    postgres_server.query("postgres", "CREATE ROLE locked LOGIN PASSWORD 'right'")
    rules.write_text("host all locked 127.0.0.1/32 scram-sha-256\n" + kept)
    try:
        postgres_server.query("postgres", "SELECT pg_reload_conf()")
        time.sleep(0.3)
        where = f"127.0.0.1:{postgres_server.port}"
        name = database.url.rpartition("/")[2]
        for url in (
            f"postgresql+psycopg://locked:s3cret@{where}/{name}",
            f"postgresql+psycopg://locked@{where}/{name}?password=s3cret",
            f"postgresql+psycopg://postgres:s3cret@{where}/unheard_of",
            f"postgresql+psycopg://nobody_we_know:s3cret@{where}/{name}",
        ):
            with pytest.raises(LedgerError) as caught:
                opened(url=url)
            assert "user, password and database" in str(caught.value)
            assert_no_password(caught.value)
        with pytest.raises(LedgerError) as caught:  # may connect, and make nothing
            opened(url=f"postgresql+psycopg://locked:right@{where}/{name}")
        assert caught.value.reason == "ledger-unreadable"
    finally:
        rules.write_text(kept)
        postgres_server.query("postgres", "SELECT pg_reload_conf()")


@postgres_only
def test_without_the_driver_the_extra_is_named(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(LedgerError) as caught:
        opened(url="postgresql+psycopg://me:s3cret@h/d")
    assert caught.value.reason == "driver-missing"
    assert "scrapy-streaming[postgres]" in str(caught.value)
    assert_no_password(caught.value)


@postgres_only
@pytest.mark.proves("F14", "I1")
def test_two_batches_that_lock_in_opposite_orders_are_both_answered(
    opened: Opener, postgres_server: PostgresServer, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """40P01: whichever is the victim runs again, a command at a time, and says nothing of it."""
    a, b = opened("a"), opened("b")
    for key in (KEY, K2):
        a.release(grant(a, key)).result()
    meeting = threading.Barrier(2, timeout=20)
    runs = {"a": 0, "b": 0}

    def meet(name: str) -> Callable[[object], None]:
        def wait(_: object) -> None:
            runs[name] += 1
            if runs[name] == 1:
                meeting.wait()

        return wait

    def touch(key: str) -> Callable[[Any], int]:
        statement = update(schema.job).where(schema.job.c.job_key == key).values(kept=schema.job.c.kept + 1)
        return lambda session: session.connection.execute(statement).rowcount

    answers: list[Future[Any]] = []
    for name, ledger, keys in (("a", a, (KEY, K2)), ("b", b, (K2, KEY))):
        leave = block(ledger)
        commands = (touch(keys[0]), meet(name), touch(keys[1]))
        answers += [ledger._writer.submit(command, str(n)) for n, command in enumerate(commands)]
        leave.set()
    assert [answer.result(30) for answer in answers] == [1, None, 1] * 2
    assert database.rows("SELECT kept FROM ss_job") == [(2,), (2,)]
    assert sorted(runs.values()) == [1, 2], "they did not collide"
    assert "deadlock detected" in postgres_server.log.read_text()
    assert warnings(caplog) == []


@postgres_only
@pytest.mark.proves("F14")
def test_claims_in_opposite_orders_do_not_wait_for_a_deadlock(
    opened: Opener, postgres_server: PostgresServer
) -> None:
    """In one transaction jobs are locked in the order of their keys."""
    a, b = opened("a"), opened("b")
    keys = [hex_of(str(number)) for number in range(50)]
    for key in keys:
        a.release(grant(a, key)).result()
    before = postgres_server.log.read_text().count("deadlock detected")
    for _ in range(5):
        leaves = [block(a), block(b)]
        answers = [(a, a.claim(key, REQUEST)) for key in keys]
        answers += [(b, b.claim(key, REQUEST)) for key in reversed(keys)]
        for leave in leaves:
            leave.set()
        granted = [(who, got.lease) for who, answer in answers if isinstance(got := answer.result(), Granted)]
        assert len(granted) == len(keys)
        for who, lease in granted:
            who.release(lease).result()
    assert postgres_server.log.read_text().count("deadlock detected") == before


@postgres_only
@pytest.mark.proves("I16", "F12")
def test_an_older_database_in_its_place_takes_no_stale_completion(
    opened: Opener, postgres_server: PostgresServer, tmp_path: Path, clock: Clock, database: Database
) -> None:
    a, b = opened("a"), opened("b")
    first = grant(a)
    postgres_server.dump(database.url, tmp_path / "older")
    clock.now += LEASE
    second = grant(b)
    postgres_server.restore(database.url, tmp_path / "older")
    with pytest.raises(LeaseLost):
        b.complete(second, known()).result(30)
    third = grant(a)
    assert (third.fence, third.job_id) == (second.fence, second.job_id)
    for ledger, stale in ((b, second), (a, first)):
        with pytest.raises(LeaseLost):
            ledger.complete(stale, known()).result(30)
    assert isinstance(a.complete(third, known()).result(30), Completion)


@postgres_only
@pytest.mark.proves("I6")
def test_with_fsync_every_commit_is_awaited(opened: Opener) -> None:
    shown = raw(opened(fsync=True), lambda c: c.execute("SHOW synchronous_commit").fetchone()[0])
    assert shown == "on"


@postgres_only
def test_a_connection_that_broke_unnoticed_is_replaced(ledger: Ledger) -> None:
    """Found here: one whose end was noticed between two batches was used for ever."""
    raw(ledger, lambda connection: None)
    assert ledger._writer._connection is not None
    ledger._writer._connection.connection.dbapi_connection.close()
    assert grant(ledger).fence == 1


def test_verbs_name_no_digest_that_is_none(ledger: Ledger) -> None:
    """A value that cannot be bound is the command's own error, at once."""
    answer = ledger.set_blob_state("sha256:zz", "missing", ["present"])
    with pytest.raises(Exception, match="hex"):
        answer.result(10)
    assert ledger.set_blob_state(digest_of("x"), "missing", ["present"]).result() is False
