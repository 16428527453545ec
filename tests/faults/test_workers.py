"""Many workers over one ledger and store, and the faults that may strike them or their database.

``support.ledger_checker.violations`` has what is checked: the events of each job must form one history, in
which nothing happens under a stale fence or claim; completions, blobs and acknowledgements must agree with
it.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.backups import Backup
from support.cutting_proxy import CuttingProxy
from support.ledger_checker import bound, claims, states
from support.postgres import PostgresServer
from support.worker import STORE_ID, Plan, key_of, request_of
from support.workers import Chaos, Workers, report

from scrapy_streaming.protocol.jobs import Dead
from scrapy_streaming.storage.ledger import Ledger

#: Seconds that work may take to go on once the database is back.
RECOVERY = 10.0

Make = Callable[..., Workers]


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.sqlite3'}"


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Give what makes workers; none of them outlives the test."""
    made: list[Workers] = []

    def workers(url: str, **plan: Any) -> Workers:
        made.append(Workers(Plan(url, str(tmp_path), **plan)))
        return made[-1]

    yield workers
    for each in made:
        each.__exit__()


def all_done(workers: Workers, **how: Any) -> int:
    """Check that all went well and print the figures; return how many claims there were."""
    found = workers.violations(**how)
    granted = len(workers.lines("granted"))
    print(f"{workers.figures()}; {len(found)} violations ({bound(granted)} of a claim)")
    assert found == []
    assert states(workers.plan.url) == {"done": workers.plan.keys}
    return granted


# -- kill -9 and SIGSTOP at random -----------------------------------------------------------


def _chaos(workers: Workers, count: int, faults: int, seconds: float) -> None:
    run = Chaos(workers, count, faults)
    run.run(seconds)
    found = workers.violations()
    print(report(run, found))
    assert found == []
    assert states(workers.plan.url) == {"done": workers.plan.keys}
    assert run.kills + run.stops >= faults // 2


@pytest.mark.proves("F2", "I1", "I2", "I3", "I4", "I5", "I6", "I7", "I11", "I17")
@pytest.mark.long_on_postgres
def test_workers_killed_and_stopped_at_random_break_nothing(make: Make, url: str) -> None:
    _chaos(make(url, keys=150), count=4, faults=24, seconds=120)


@pytest.mark.soak
@pytest.mark.proves("F2", "I1", "I2", "I3", "I4", "I5", "I6", "I7", "I11", "I17")
def test_eight_workers_killed_and_stopped_at_random_break_nothing(make: Make, url: str) -> None:
    _chaos(make(url, keys=600), count=8, faults=150, seconds=600)


@pytest.mark.proves("F2", "I3")
@pytest.mark.long_on_postgres
def test_without_the_guard_a_worker_that_woke_up_late_is_noticed(make: Make, url: str) -> None:
    """Mutant: what is checked above is broken within a minute when the guard is taken out."""
    workers = make(url, keys=400, lease=0.5, work=0.3, mutant="guard")
    began, found = time.monotonic(), []
    run = Chaos(workers, 4, 1000, share_of_stops=1.0)
    while not found and time.monotonic() - began < 60:
        with pytest.raises(TimeoutError):
            run.run(4)
        found = workers.violations()
    print(f"red after {time.monotonic() - began:.0f} s and {run.stops} stops: {found[:1]}")
    assert any(line.startswith("I3") for line in found)


# -- the same keys, no deaths --------------------------------------------------------------


def _same_keys(workers: Workers, count: int) -> None:
    gate = Path(workers.plan.folder) / "gate"
    workers.start(count, gate=str(gate))
    workers.until(lambda: len(workers.lines("started")) == count)
    gate.touch()
    workers.wait(300)
    granted = all_done(workers)
    assert granted == workers.plan.keys, "two workers worked at one key"


@pytest.mark.proves("F14", "I4")
@pytest.mark.long_on_postgres
def test_four_workers_over_the_same_keys_do_each_once(make: Make, url: str) -> None:
    _same_keys(make(url, keys=300, lease=60, work=0.02, batch=10, window=40), 4)


@pytest.mark.soak
@pytest.mark.parametrize("count", [2, 4, 8, 16])
@pytest.mark.proves("F14", "I4")
def test_up_to_sixteen_workers_over_the_same_keys_do_each_once(make: Make, url: str, count: int) -> None:
    _same_keys(make(url, keys=1000, lease=60, work=0.02, batch=10, window=10 * count), count)


@pytest.mark.proves("F14", "I7")
@pytest.mark.long_on_postgres
def test_each_kill_costs_one_more_claim_of_a_key_at_most(make: Make, url: str) -> None:
    workers = make(url, keys=120, lease=30, work=0.2)
    running = workers.start(4)
    for kills in range(1, 4):
        workers.until(lambda kills=kills: workers.done() >= 25 * kills)
        running[kills].kill()
        workers.start(presumed_dead=(running[kills].plan.name,))
    workers.wait()
    all_done(workers)
    most = max(claims(url).values())
    print(f"3 kills, at most {most} claims of a key")
    assert most <= 1 + 3


# -- a job that kills its worker -------------------------------------------------------------


@pytest.mark.proves("F25", "I13")
@pytest.mark.long_on_postgres
def test_a_job_that_kills_its_worker_is_dead_after_its_attempts(make: Make, url: str) -> None:
    """Its claims are three, and so are the workers it takes along; all others are done."""
    poisoned, attempts = 7, 3
    workers = make(url, keys=30, batch=1, work=0.1, max_attempts=attempts, poison=(poisoned,))
    workers.start(2)
    deadline = time.monotonic() + 60
    replaced: set[str] = set()
    while any(process.alive for process in workers.all):
        for process in list(workers.all):
            if process.popen.poll() == 7 and process.plan.name not in replaced:
                replaced.add(process.plan.name)
                workers.start()
        assert time.monotonic() < deadline, workers.figures()
        time.sleep(0.02)
    found = workers.violations(most_attempts=attempts)
    print(f"{workers.figures()}; {len(replaced)} workers died of it; {len(found)} violations")
    assert found == []
    assert len(replaced) == attempts
    assert [process.popen.returncode for process in workers.all].count(0) == len(workers.all) - attempts
    assert states(url) == {"done": 29, "dead": 1}
    with Ledger.open(url, store_id=STORE_ID, worker_id="looker") as ledger:
        assert isinstance(ledger.claim(key_of(poisoned), request_of(poisoned)).result(), Dead)


# -- the database is locked, down, or lost in the middle of a COMMIT -------------------------


def _interrupted(workers: Workers, away: Callable[[], Any], back: Callable[[], Any], seconds: float) -> None:
    """Take the database away in the middle of the work; nothing is acknowledged until it is back."""
    workers.until(lambda: workers.done() >= 5)  # fewer than one that stops itself gets done before
    away()
    before = -1
    while before != (before := workers.done()):
        time.sleep(0.5)  # what was committed before may still be written down
    time.sleep(seconds)
    assert workers.done() == before, "it was not away"
    assert before < workers.plan.keys, "nothing was left to do"
    back()
    returned = time.monotonic()
    workers.until(lambda: workers.done() > before)
    took = time.monotonic() - returned
    workers.wait()
    print(f"away for {seconds} s, work went on {took:.2f} s after")
    assert took <= RECOVERY
    all_done(workers)


HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE ss_meta SET epoch = epoch + 1")
print("locked", flush=True)
sys.stdin.read()
connection.execute(sys.argv[2])
connection.close()
"""


def _locked_by_another_program(workers: Workers, end: str, seconds: float) -> None:
    holder: list[subprocess.Popen[str]] = []

    def lock() -> None:
        path = workers.plan.url.removeprefix("sqlite:///")
        command = [sys.executable, "-c", HOLDER, path, end]
        holder.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert holder[0].stdout is not None
        assert holder[0].stdout.readline() == "locked\n"
        holder[0].send_signal(signal.SIGSTOP)

    def unlock() -> None:
        if end == "kill":
            holder[0].kill()
        holder[0].send_signal(signal.SIGCONT)
        holder[0].communicate()

    workers.start(3)
    _interrupted(workers, lock, unlock, seconds)


@pytest.mark.parametrize("end", [pytest.param("COMMIT", marks=pytest.mark.soak), "kill"])
@pytest.mark.proves("F11", "I4", "I7")
def test_a_ledger_locked_by_a_program_that_was_stopped_is_waited_for(
    make: Make, sqlite_url: str, end: str
) -> None:
    _locked_by_another_program(make(sqlite_url, keys=120), end, 4)


@pytest.mark.soak
@pytest.mark.proves("F11", "I4", "I7")
def test_a_ledger_locked_for_a_minute_is_waited_for(make: Make, sqlite_url: str) -> None:
    _locked_by_another_program(make(sqlite_url, keys=400), "COMMIT", 60)


@pytest.mark.parametrize("end", ["go on", pytest.param("kill", marks=pytest.mark.soak)])
@pytest.mark.proves("F11", "I3", "I4", "I7")
def test_a_worker_stopped_inside_its_transaction_holds_up_the_others_only(
    make: Make, sqlite_url: str, end: str
) -> None:
    """Of its transaction all is there in the end, or nothing."""
    workers = make(sqlite_url, keys=120)
    frozen = workers.start(freeze_inside=12)[0]

    def stopped() -> bool:
        return Path(f"/proc/{frozen.popen.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    workers.start(3)
    _interrupted(workers, lambda: workers.until(stopped), frozen.kill if end == "kill" else frozen.resume, 3)


def _down(workers: Workers, server: PostgresServer, how: str, seconds: float) -> None:
    workers.start(3)
    # one that cannot open its ledger says so and ends
    workers.until(lambda: len({line["worker"] for line in workers.lines("granted")}) == 3)
    _interrupted(workers, server.kill if how == "kill" else server.stop, server.start, seconds)


@pytest.mark.parametrize("how", [pytest.param("immediate stop", marks=pytest.mark.soak), "kill"])
@pytest.mark.proves("F11", "I4", "I6", "I7")
def test_a_database_server_that_goes_down_is_waited_for(
    make: Make, postgres_server: PostgresServer, postgres_url: str, how: str
) -> None:
    _down(make(postgres_url, keys=120), postgres_server, how, 4)


@pytest.mark.soak
@pytest.mark.parametrize("how", ["immediate stop", "kill"])
@pytest.mark.proves("F11", "I4", "I6", "I7")
def test_a_database_server_that_is_down_for_long_is_waited_for(
    make: Make, postgres_server: PostgresServer, postgres_url: str, how: str
) -> None:
    _down(make(postgres_url, keys=400), postgres_server, how, 30)


@pytest.mark.soak
@pytest.mark.proves("F11", "I6")
def test_a_server_killed_and_started_again_and_again_loses_nothing(
    make: Make, postgres_server: PostgresServer, postgres_url: str
) -> None:
    workers = make(postgres_url, keys=150)
    workers.start(3)
    workers.until(lambda: len({line["worker"] for line in workers.lines("granted")}) == 3)
    for nth in range(1, 4):
        workers.until(lambda nth=nth: workers.done() >= 30 * nth)
        postgres_server.kill()
        postgres_server.start()
    workers.wait()
    all_done(workers)


def _cut(workers: Workers, proxy: CuttingProxy, rng: random.Random, *, answers_only: bool = False) -> None:
    kinds, within = ["cut_before_commit", "cut_after_commit"], 12
    if answers_only:
        kinds, within = kinds[1:], 8
    workers.start(4)
    # a crawl that cannot open its ledger says so and ends: cut when all have
    workers.until(lambda: len({line["worker"] for line in workers.lines("granted")}) == 4)
    while any(process.alive for process in workers.all):
        workers.check_ends()
        if not (proxy.cut_before_commit or proxy.cut_after_commit):
            setattr(proxy, rng.choice(kinds), rng.randrange(1, within))
        time.sleep(0.02)
    proxy.close()
    workers.check_ends()


def _cut_commits(
    make: Make, server: PostgresServer, url: str, keys: int, *, mutant: str = "", answers_only: bool = False
) -> tuple[int, list[str]]:
    with closing(CuttingProxy(server.port)) as proxy:
        through = server.url(url.rpartition("/")[2], port=proxy.port)
        workers = make(through, keys=keys, mutant=mutant)
        _cut(workers, proxy, random.Random(), answers_only=answers_only)
    found = workers.violations(url=url)  # the proxy is gone
    print(f"{proxy.cuts} connections cut in {proxy.commits} commits; {workers.figures()}; {found[:1]}")
    assert states(url) == {"done": keys}
    return proxy.cuts, found


@pytest.mark.proves("F11", "I3", "I4", "I6")
def test_connections_lost_during_commit_complete_nothing_twice(
    make: Make, postgres_server: PostgresServer, postgres_url: str
) -> None:
    cuts, found = _cut_commits(make, postgres_server, postgres_url, keys=80)
    print(bound(cuts))
    assert found == []
    assert cuts >= 3


@pytest.mark.proves("F11")
def test_a_completion_whose_lost_answer_is_not_looked_up_is_noticed(
    make: Make, postgres_server: PostgresServer, postgres_url: str
) -> None:
    """Mutant: rule 4 taken out. Only answers are lost, so that some are those of completions."""
    _, found = _cut_commits(
        make, postgres_server, postgres_url, keys=80, mutant="not-looked-for", answers_only=True
    )
    assert any(line.startswith("rule 4") for line in found)


@pytest.mark.soak
@pytest.mark.proves("F11", "I3", "I4", "I6")
def test_connections_lost_during_many_commits_complete_nothing_twice(
    make: Make, postgres_server: PostgresServer, postgres_url: str
) -> None:
    cuts, found = _cut_commits(make, postgres_server, postgres_url, keys=1500)
    print(bound(cuts))
    assert found == []
    assert cuts >= 100


# -- the database put back to an older copy --------------------------------------------------


@pytest.fixture(params=["sqlite online", pytest.param("sqlite swapped", marks=pytest.mark.soak), "postgres"])
def backup(request: pytest.FixtureRequest, tmp_path: Path) -> Backup:
    kind = request.param.split()[0]
    url = request.getfixturevalue(f"{kind}_url")
    server = request.getfixturevalue("postgres_server") if kind == "postgres" else None
    made = Backup(url, tmp_path, server, swap="swapped" in request.param)
    made.url = url
    return made


def _restored(workers: Workers, backup: Backup) -> None:
    """The work goes on from what the copy knew; the store stays sound; all is done in the end."""
    keys, gate = workers.plan.keys, Path(workers.plan.folder) / "gate"
    zombies = workers.start(2, freeze_before=1, gate=str(gate))
    workers.until(lambda: len(workers.lines("started")) == 2)
    workers.start(4)
    workers.until(lambda: workers.done() >= keys // 5)
    copied_at = time.time()
    backup.take()
    gate.touch()  # what these hold, no copy knows of
    workers.until(lambda: len(workers.lines("frozen")) == 2 and workers.done() >= keys // 2)
    backup.put_back()
    restored_at = time.time()
    time.sleep(0.5)
    for zombie in zombies:
        zombie.resume()
    workers.wait()
    before = workers.done()
    workers.start()  # the next crawl finds what the others took for done
    workers.wait()
    lost = [line for line in workers.lines("done") if copied_at <= line["completed"] <= restored_at]
    print(f"put back from {before} done, {len(lost)} of them not in the copy")
    all_done(workers, forgotten=(copied_at, restored_at))


@pytest.mark.proves("F12", "I3", "I5", "I16")
@pytest.mark.long_on_postgres
def test_a_ledger_put_back_while_workers_run_takes_nothing_stale(make: Make, backup: Backup) -> None:
    _restored(make(backup.url, keys=120), backup)


@pytest.mark.soak
@pytest.mark.parametrize("turn", range(5))
@pytest.mark.proves("F12", "I3", "I5", "I16")
def test_a_ledger_put_back_again_and_again_takes_nothing_stale(make: Make, backup: Backup, turn: int) -> None:
    _restored(make(backup.url, keys=300), backup)


def _same_fence_again(workers: Workers, backup: Backup) -> None:
    """Let three jobs be claimed, put the ledger back to before, have them claimed again by another worker,
    and let the first one wake up: both hold fence 1."""
    Ledger.open(backup.url, store_id=STORE_ID, worker_id="maker").close()
    backup.take()
    first = workers.start(freeze_before=1)[0]
    workers.until(lambda: len(workers.lines("frozen")) == 1)
    backup.put_back()
    second = workers.start(freeze_before=1)[0]
    workers.until(lambda: len(workers.lines("frozen")) == 2)
    assert {line["fence"] for line in workers.lines("granted")} == {1}
    first.resume()
    workers.until(lambda: len(workers.lines("done", "lost")) >= 3)
    second.resume()
    workers.wait()


@pytest.mark.proves("F12", "I3")
def test_a_claim_that_the_ledger_forgot_is_refused_though_its_fence_is_right(
    make: Make, backup: Backup
) -> None:
    """Only the claim id distinguishes the two (rule 2)."""
    workers = make(backup.url, keys=3)
    _same_fence_again(workers, backup)
    assert len(workers.lines("lost")) == 3
    all_done(workers)


@pytest.mark.proves("F12", "I3")
@pytest.mark.long_on_postgres
def test_without_the_claim_id_a_claim_that_the_ledger_forgot_is_noticed(make: Make, backup: Backup) -> None:
    """Mutant: guarded by the fence alone."""
    workers = make(backup.url, keys=3, mutant="claim-id")
    _same_fence_again(workers, backup)
    found = workers.violations()
    print(f"red: {found[:1]}")
    assert any(line.startswith("I3") for line in found)


# -- the first start -------------------------------------------------------------------------


def _first_start(workers: Workers, count: int, killed: int) -> None:
    first, gate = (Path(workers.plan.folder) / name for name in ("first", "gate"))
    dying = workers.start(killed, mode="first-start", gate=str(first), kill_in_migration=True)
    workers.start(count, mode="first-start", gate=str(gate))
    workers.until(lambda: len(workers.lines("started")) == count + killed)
    first.touch()
    if killed:
        workers.until(lambda: any(not process.alive for process in dying))
    gate.touch()
    for process in workers.all:
        process.wait(60)
    died = sum(process.popen.returncode == -signal.SIGKILL for process in dying)
    found = workers.violations()
    print(f"{count + killed} at once, {died} killed while they made the tables; {len(found)} violations")
    assert found == []
    # one of the dying comes too late to make tables, and is no other than the rest
    assert [process.popen.returncode for process in workers.all].count(0) == count + killed - died
    said = workers.lines("done")
    assert len(said) == count + killed - died
    assert len({(line["ledger"], line["store"]) for line in said}) == 1
    assert states(workers.plan.url) == {"done": len(said)}
    assert not killed or died


@pytest.mark.proves("F27", "I20")
@pytest.mark.long_on_postgres
def test_sixteen_crawls_that_start_at_once_make_one_ledger(make: Make, url: str) -> None:
    _first_start(make(url, keys=16), 16, 0)


@pytest.mark.proves("F27", "I20")
@pytest.mark.long_on_postgres
def test_a_crawl_killed_while_it_makes_the_ledger_leaves_it_to_the_others(make: Make, url: str) -> None:
    _first_start(make(url, keys=16), 11, 5)


@pytest.mark.soak
@pytest.mark.parametrize("turn", range(10))
@pytest.mark.proves("F27", "I20")
def test_first_starts_killed_at_random_make_one_ledger(make: Make, url: str, turn: int) -> None:
    _first_start(make(url, keys=16), 8, 8)
