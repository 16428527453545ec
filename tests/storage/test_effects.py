"""Effects: done, recorded and replayed; a failure is no result, and what may have happened is looked for.

Rows are those of the ledger's design (I8, I9, rules 11 and 12).
"""

from __future__ import annotations

import errno
import math
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
from ledger_kit import (
    KEY,
    LEASE,
    REQUEST,
    Clock,
    Database,
    Opener,
    grant,
    hex_of,
    known,
    postgres_only,
    process,
)
from support import mutants

from scrapy_streaming.exceptions import LeaseLost, ResultTooLarge
from scrapy_streaming.protocol.jobs import Recover, Replay, Run
from scrapy_streaming.storage.ledger import Ledger, run_effect
from scrapy_streaming.storage.ledger.effects import MAX_RESULT

OP = hex_of("an effect")
ODD = '{"sent": "ä\u2028\U0001f600\\u0000"}\r\n\t '


class World:
    """What an effect does to the world: counts, and gives or raises what it was told to."""

    def __init__(self, *gives: str | Exception) -> None:
        self.gives = list(gives)
        self.done = 0
        self.asked = 0

    def effect(self) -> str:
        self.done += 1
        given = self.gives.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    def recover(self) -> str | None:
        self.asked += 1
        return f"done {self.done} times" if self.done else None


def states(database: Database) -> list[tuple[object, ...]]:
    return database.rows("SELECT state, attempt, result, error FROM ss_operation")


@pytest.mark.proves("I8", "I9")
def test_an_effect_is_run_once_and_replayed_to_the_byte(opened: Opener, clock: Clock) -> None:
    a, b = opened("a"), opened("b")
    world = World(ODD)
    assert run_effect(a, grant(a), OP, world.effect) == ODD
    clock.now += LEASE
    lease = grant(b)
    assert [run_effect(b, lease, OP, world.effect, recover=world.recover) for _ in range(3)] == [ODD] * 3
    assert (world.done, world.asked) == (1, 0)


@pytest.mark.proves("I8", "I9")
def test_a_result_is_replayed_in_later_generations_and_to_other_jobs(ledger: Ledger) -> None:
    world = World("once")
    lease = grant(ledger)
    run_effect(ledger, lease, OP, world.effect)
    ledger.complete(lease, known()).result()
    assert run_effect(ledger, grant(ledger, refresh_before=math.inf), OP, world.effect) == "once"
    assert run_effect(ledger, grant(ledger, hex_of("k2")), OP, world.effect) == "once"
    assert world.done == 1


@pytest.mark.proves("I8")
def test_an_exception_is_recorded_and_never_replayed(ledger: Ledger, database: Database) -> None:
    world = World(OSError("https://u:s3cret@h/ is away"), ValueError("no"), "at last")
    lease = grant(ledger)
    with pytest.raises(OSError, match="away"):
        run_effect(ledger, lease, OP, world.effect, recover=world.recover)
    assert states(database) == [("failed", 1, None, "OSError: https://…@h/ is away")]
    with pytest.raises(ValueError, match="no"):
        run_effect(ledger, lease, OP, world.effect, recover=world.recover)
    assert run_effect(ledger, lease, OP, world.effect, recover=world.recover) == "at last"
    assert states(database) == [("ok", 3, "at last", None)]
    assert world.asked == 0


@pytest.mark.proves("I8", "F15")
@pytest.mark.parametrize("happened", [True, False])
def test_what_a_dead_claim_began_is_looked_for(opened: Opener, clock: Clock, happened: bool) -> None:
    a, b = opened("a"), opened("b")
    world = World("first", "second")
    old = grant(a)
    assert a.begin(old, OP, "kind").result() == Run(1)
    if happened:
        world.effect()
    clock.now += LEASE
    result = run_effect(b, grant(b), OP, world.effect, recover=world.recover)
    assert result == ("done 1 times" if happened else "first")
    assert (world.done, world.asked) == (1, 1)
    with pytest.raises(LeaseLost):
        a.succeed(old, OP, "of the dead").result()
    assert b.begin(grant(b, hex_of("k2")), OP, "kind").result() == Replay(result)


def test_without_a_way_to_look_it_is_run_again(opened: Opener, clock: Clock) -> None:
    a, b = opened("a"), opened("b")
    world = World("again")
    a.begin(grant(a), OP, "kind").result()
    clock.now += LEASE
    assert run_effect(b, grant(b), OP, world.effect) == "again"


def test_a_recovery_that_breaks_leaves_it_to_be_looked_for(ledger: Ledger) -> None:
    """Nobody knows more than before: the next one looks again."""
    world = World("done")
    lease = grant(ledger)
    ledger.begin(lease, OP, "kind").result()

    def breaks() -> str | None:
        raise OSError(errno.EIO, "the world cannot be asked")

    with pytest.raises(OSError, match="cannot be asked"):
        run_effect(ledger, lease, OP, world.effect, recover=breaks)
    assert isinstance(ledger.begin(lease, OP, "kind").result(), Recover)
    assert world.done == 0


@pytest.mark.proves("I9")
def test_a_result_is_kept_whole_or_refused(ledger: Ledger, database: Database) -> None:
    """Rule 12: it is never cut."""
    lease = grant(ledger)
    largest = "ä" * (MAX_RESULT // 2)
    assert run_effect(ledger, lease, OP, lambda: largest) == largest
    assert run_effect(ledger, lease, OP, lambda: "other") == largest
    other = hex_of("other effect")
    with pytest.raises(ResultTooLarge, match="16385"):
        run_effect(ledger, lease, other, lambda: largest + "x")
    [(state, result)] = database.rows(
        "SELECT state, result FROM ss_operation WHERE op_key = ?", bytes.fromhex(other)
    )
    assert (state, result) == ("failed", None)
    with pytest.raises(ResultTooLarge):
        ledger.succeed(lease, OP, largest + "x")
    with pytest.raises(ValueError, match="NUL"):
        run_effect(ledger, lease, other, lambda: "\0")


@pytest.mark.proves("I3")
def test_a_stale_lease_begins_and_ends_nothing(opened: Opener, clock: Clock, database: Database) -> None:
    a, b = opened("a"), opened("b")
    old = grant(a)
    a.begin(old, OP, "kind").result()
    clock.now += LEASE
    grant(b)
    world = World("never")
    before = database.everything()
    for op in (OP, hex_of("other effect")):
        with pytest.raises(LeaseLost):
            run_effect(a, old, op, world.effect, recover=world.recover)
    with pytest.raises(LeaseLost):
        a.give_up(old, OP, "error").result()
    assert world.done == world.asked == 0
    assert database.everything() == before


def test_the_same_end_may_be_said_twice_another_may_not(ledger: Ledger) -> None:
    """Rule 4: also after the claim's own end, as when both stood in one batch that is run again."""
    lease = grant(ledger)
    ledger.begin(lease, OP, "kind").result()
    ledger.succeed(lease, OP, "so").result()
    ledger.complete(lease, known()).result()
    ledger.succeed(lease, OP, "so").result()
    for answer in (ledger.succeed(lease, OP, "other"), ledger.give_up(lease, OP, "no")):
        with pytest.raises(LeaseLost):
            answer.result()
    assert ledger.begin(grant(ledger, refresh_before=math.inf), OP, "kind").result() == Replay("so")


def test_an_effect_that_another_job_began_is_not_ours_to_end(ledger: Ledger, database: Database) -> None:
    """The same key and the same fence, but not the same job."""
    first, second = grant(ledger), grant(ledger, hex_of("k2"))
    assert first.fence == second.fence
    ledger.begin(first, OP, "kind").result()
    assert ledger.begin(second, OP, "kind").result() == Recover(2, first.fence)
    with pytest.raises(LeaseLost):
        ledger.succeed(first, OP, "first").result()
    ledger.succeed(second, OP, "second").result()
    assert states(database) == [("ok", 2, "second", None)]


@postgres_only
@pytest.mark.proves("I8", "I9")
def test_a_result_that_is_just_being_recorded_is_not_overwritten(ledger: Ledger, database: Database) -> None:
    """By another job's claim, at the same moment: it waits, and replays."""
    first, second = grant(ledger), grant(ledger, hex_of("k2"))
    with closing(database.connect()) as other:
        other.execute("BEGIN")
        other.execute(
            "INSERT INTO ss_operation (op_key, job_id, kind, state, fence, attempt, result, updated_at)"
            " VALUES (%s, %s, 'kind', 'ok', 1, 1, 'just now', 0)",
            (bytes.fromhex(OP), first.job_id),
        )
        begun = ledger.begin(second, OP, "kind")
        time.sleep(0.3)
        assert not begun.done()
        other.execute("COMMIT")
    assert begun.result(10) == Replay("just now")
    assert states(database) == [("ok", 1, "just now", None)]


@pytest.mark.parametrize("name", ["failure-replayed", "started-replayed", "not-recovered", "result-trimmed"])
def test_the_mutants_are_noticed_here_too(
    opened: Opener, clock: Clock, database: Database, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutants.apply(name, monkeypatch.setattr)
    check = {
        "failure-replayed": lambda: test_an_exception_is_recorded_and_never_replayed(opened(), database),
        "started-replayed": lambda: test_what_a_dead_claim_began_is_looked_for(opened, clock, True),
        "not-recovered": lambda: test_what_a_dead_claim_began_is_looked_for(opened, clock, True),
        "result-trimmed": lambda: test_a_result_is_kept_whole_or_refused(opened(), database),
    }[name]
    with pytest.raises((AssertionError, LeaseLost, pytest.fail.Exception)):
        check()


# -- killed in the middle -----------------------------------------------------------------------

VICTIM = """
import os, signal, sys
from scrapy_streaming.storage.ledger import JobRequest, Ledger, run_effect
url, place, file, key, request, op = sys.argv[1:]
ledger = Ledger.open(url, store_id="s", worker_id="victim")
lease = ledger.claim(key, JobRequest("work", "artifact", "https://example.org/a.bin", request)).result().lease

def effect():
    if place == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    with open(file, "a") as stream:
        stream.write("did it\\n")
    if place == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return "by the victim"

run_effect(ledger, lease, op, effect)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.proves("I8", "I9", "F1")
@pytest.mark.long_on_postgres
@pytest.mark.parametrize("place", ["before", "after", "recorded"])
def test_killed_in_the_middle_it_is_done_once(url: str, tmp_path: Path, place: str) -> None:
    """The oracle is the world: the file that the effect appends to."""
    file = tmp_path / "world"
    file.touch()
    with process(VICTIM, url, place, file, KEY, REQUEST.request_hash, OP) as victim:
        _, error = victim.communicate(timeout=60)
    assert (error, victim.returncode) == ("", -signal.SIGKILL)
    asked = []

    def recover() -> str | None:
        asked.append(file.read_text())
        return "by the victim" if file.read_text() else None

    def effect() -> str:
        with file.open("a") as stream:
            stream.write("did it\n")
        return "by the heir"

    with Ledger.open(url, store_id="s", worker_id="heir") as ledger:
        assert ledger.end_worker_leases("victim").result() == 1
        lease = grant(ledger)
        result = run_effect(ledger, lease, OP, effect, recover=recover)
        assert run_effect(ledger, lease, OP, effect, recover=recover) == result
    assert file.read_text() == "did it\n"
    assert result == ("by the heir" if place == "before" else "by the victim")
    assert len(asked) == (place != "recorded")
