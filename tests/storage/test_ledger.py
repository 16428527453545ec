"""The ledger's promises, one by one, on both databases; rows are those of the design (I…, F…, rule …)."""

from __future__ import annotations

import hashlib
import math
import os
import random
import signal
import sqlite3
import stat
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ledger_kit import (
    ATTEMPTS,
    KEY,
    LEASE,
    REQUEST,
    TAGGED,
    URL,
    Clock,
    Database,
    Highest,
    Opener,
    at_once,
    digest_of,
    grant,
    hex_of,
    known,
    process,
    raw,
    sqlite_only,
    view,
)
from sqlalchemy import true

from scrapy_streaming.exceptions import IntegrityError, KeyConflict, LeaseLost, LedgerError, WriteFailed
from scrapy_streaming.protocol.jobs import (
    Completion,
    Dead,
    Done,
    Granted,
    Held,
    JobState,
    Lease,
    RecordedName,
    StoredRepresentation,
    Waiting,
)
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.ledger import (
    JobRequest,
    Jobs,
    Ledger,
    Repeat,
    jobs,
    sqlite,
    statements,
)

K2, K3, K4 = hex_of("k2"), hex_of("k3"), hex_of("k4")

# -- claim, complete, and what is replayed --------------------------------------------------


@pytest.mark.proves("I1", "I2")
def test_one_row_per_key_and_fences_grow_in_claim_order(
    ledger: Ledger, database: Database, clock: Clock
) -> None:
    """I1, I2."""
    fences, claims = [], set()
    for _ in range(ATTEMPTS):
        lease = grant(ledger)
        fences.append(lease.fence)
        claims.add(lease.claim_id)
        clock.now += LEASE
    assert fences == [1, 2, 3]
    assert len(claims) == ATTEMPTS
    assert database.rows("SELECT count(*) FROM ss_job") == [(1,)]


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


def test_a_name_that_a_response_made_comes_with_the_replay_and_the_next_claim(
    ledger: Ledger, clock: Clock
) -> None:
    """C7: and only of this very job; another one on the URL has a name of its own."""
    recorded = ledger.complete(grant(ledger), known(), path="named/a.pdf", by_response=True).result()
    assert (recorded.path, recorded.by_response) == ("named/a.pdf", True)
    assert ledger.claim(KEY, REQUEST).result() == Done(recorded)
    again = ledger.claim(KEY, REQUEST, refresh_before=math.inf).result()
    other = ledger.claim(K2, REQUEST).result()
    assert isinstance(again, Granted)
    assert isinstance(other, Granted)
    assert (again.previous, other.previous) == (recorded, None)
    ledger.release(again.lease).result()  # a claim that came to nothing leaves it as it was
    once_more = ledger.claim(KEY, REQUEST).result()
    assert isinstance(once_more, Granted)
    assert once_more.previous == recorded
    plain = ledger.complete(once_more.lease, known(), path="full/b.pdf").result()
    assert (plain.path, plain.by_response) == ("full/b.pdf", False)


def test_what_a_later_plain_get_needs_is_that_of_the_last_claim(ledger: Ledger, database: Database) -> None:
    """C4, E7: no more than is needed; of a request that is not plain, nothing."""

    def claim(repeat: Repeat | None) -> tuple[Lease, list[tuple[Any, ...]], tuple[Any, ...]]:
        lease = grant(ledger, request=replace(REQUEST, repeat=repeat))
        seen = view(ledger)
        return (
            lease,
            database.rows("SELECT plain, asked_url, asked_name FROM ss_job"),
            (seen.plain, seen.asked_url, seen.asked_name, seen.named_by_url),
        )

    named = "a/\udcff name"
    for repeat, stored, told in (
        (None, (None, None, None), (None, None, None, False)),
        (Repeat(plain=False), (False, None, None), (False, None, None, False)),
        (Repeat(plain=True, url=URL, name=""), (True, None, ""), (True, URL, None, True)),
        (
            Repeat(plain=True, url=URL.replace("//", "//me:secret@") + "#page=2", name=named),
            (True, URL + "#page=2", "/a/%FF%20name"),
            (True, URL + "#page=2", named, False),
        ),
        (Repeat(plain=True, url=URL), (True, None, None), (True, URL, None, False)),
    ):
        lease, rows, seen = claim(repeat)
        assert (rows, seen) == ([stored], told)
        ledger.begin_work(lease).result()
        assert database.rows("SELECT plain FROM ss_job") == [(stored[0],)]
        ledger.release(lease).result()
    lease, _, _ = claim(Repeat(plain=True, url=URL + "#page=2", name="a"))
    ledger.begin_work(lease, unlike=True).result()
    assert database.rows("SELECT begun, plain, asked_url, asked_name FROM ss_job") == [
        (True, False, None, None)
    ]


def test_completion_keeps_its_digest_when_the_representation_became_another(ledger: Ledger) -> None:
    """A replay never carries the validators of other bytes."""
    recorded = ledger.complete(grant(ledger), known("old")).result()
    ledger.complete(grant(ledger, K2), known("newer")).result()
    replayed = ledger.claim(KEY, REQUEST).result()
    assert isinstance(replayed, Done)
    assert replayed.completion.completion_id == recorded.completion_id
    assert (replayed.completion.known.digest, replayed.completion.known.size) == (digest_of("old"), 3)
    assert replayed.completion.known.validators == Validators()


def stamps(stored: StoredRepresentation | None) -> tuple[bytes | None, RecordedName | None]:
    assert stored is not None
    return stored.stamp, stored.name


def test_stamps_come_with_what_is_replayed_and_with_what_a_request_builds_on(ledger: Ledger) -> None:
    """R77: the blob's is everybody's, the name's is the job's own."""
    stored = replace(known(), stamp=b"blob", name=RecordedName("ignored", b"name"))
    recorded = ledger.complete(grant(ledger), stored, path="full/a").result()
    noted = (b"blob", RecordedName("full/a", b"name"))
    assert stamps(recorded.known) == noted
    done = ledger.claim(KEY, REQUEST).result()
    assert isinstance(done, Done)
    assert stamps(done.completion.known) == noted
    again = ledger.claim(KEY, REQUEST, refresh_before=math.inf).result()
    other = ledger.claim(K2, REQUEST).result()
    assert isinstance(again, Granted)
    assert isinstance(other, Granted)
    assert stamps(again.known) == noted
    assert stamps(other.known) == (b"blob", None)
    ledger.note_blob(known().digest, b"later").result()
    ledger.note_name(recorded, RecordedName("full/b", b"moved")).result()
    assert ledger.complete(again.lease, known(), path="full/c").result().known.stamp is None
    done = ledger.claim(KEY, REQUEST).result()
    assert isinstance(done, Done)
    assert stamps(done.completion.known) == (b"later", RecordedName("full/c"))
    ledger.set_blob_state(known().digest, "quarantined", ["present"]).result()
    ledger.note_blob(known().digest, b"too late").result()
    ledger.complete(other.lease, known()).result()
    done = ledger.claim(K2, REQUEST).result()
    assert isinstance(done, Done)
    assert stamps(done.completion.known) == (b"later", None)


def test_names_are_those_of_last_completions_whose_bytes_are_present(ledger: Ledger) -> None:
    """R77: what ``verify`` reads."""
    ledger.complete(grant(ledger), known("old"), path="full/old").result()
    ledger.complete(grant(ledger, refresh_before=math.inf), known("new"), path="full/new").result()
    ledger.complete(grant(ledger, K2), known("other"), path="full/other").result()
    ledger.complete(grant(ledger, K3), known("nameless")).result()
    ledger.complete(grant(ledger, K4), known("gone"), path="full/gone").result()
    ledger.set_blob_state(digest_of("gone"), "missing", ["present"]).result()
    rows = ledger.names().result()
    assert [(row.path, row.digest, row.size) for row in rows] == [
        ("full/new", digest_of("new"), 3),
        ("full/other", digest_of("other"), 5),
    ]
    assert ledger.names(rows[0].job_id, limit=1).result() == rows[1:]


def test_another_job_on_the_url_builds_on_what_is_known_until_it_is_missing(ledger: Ledger) -> None:
    recorded = ledger.complete(grant(ledger), known()).result()
    first = ledger.claim(K2, REQUEST).result()
    assert isinstance(first, Granted)
    assert first.known == recorded.known
    assert ledger.set_blob_state(known().digest, "missing", ["present"]).result() is True
    assert ledger.set_blob_state(digest_of("unheard of"), "missing", ["present"]).result() is False
    third = ledger.claim(K3, REQUEST).result()
    assert isinstance(third, Granted)
    assert third.known is None
    ledger.complete(first.lease, known()).result()
    fourth = ledger.claim(K4, REQUEST).result()
    assert isinstance(fourth, Granted)
    assert fourth.known is not None


@pytest.mark.proves("I5")
def test_done_with_missing_bytes_is_fetched_again(ledger: Ledger) -> None:
    """I5: Done never names a blob known to be gone."""
    ledger.complete(grant(ledger), known()).result()
    ledger.set_blob_state(known().digest, "missing", ["present"]).result()
    lease = grant(ledger)
    assert (lease.generation, lease.fence) == (2, 2)


def test_complete_by_the_same_claim_gives_the_first_answer_again(ledger: Ledger, database: Database) -> None:
    """Rule 4: the answer to a COMMIT may be lost."""
    lease = grant(ledger)
    first = ledger.complete(lease, known()).result()
    assert ledger.complete(lease, known()).result() == first
    assert ledger.complete(lease, known("other bytes")).result() == first
    assert database.rows("SELECT count(*) FROM ss_completion") == [(1,)]
    assert database.rows("SELECT digest FROM ss_blob") == [(bytes.fromhex(hex_of("bytes")),)]


@pytest.mark.proves("I4")
def test_complete_after_a_refresh_still_finds_its_own_generation(ledger: Ledger) -> None:
    """Rule 4, I4: each generation has its own completion."""
    lease = grant(ledger)
    first = ledger.complete(lease, known()).result()
    second = ledger.complete(grant(ledger, refresh_before=math.inf), known()).result()
    assert second.completion_id != first.completion_id
    assert ledger.complete(lease, known()).result().completion_id == first.completion_id


@pytest.mark.proves("I4")
def test_at_most_one_completion_per_generation(ledger: Ledger) -> None:
    """I4: the table itself refuses a second one, of whichever claim."""
    for _ in range(2):
        ledger.complete(grant(ledger, refresh_before=math.inf), known()).result()
    with pytest.raises(LedgerError, match=r"(?i)unique"):
        raw(ledger, lambda connection: connection.execute("UPDATE ss_completion SET generation = 1"))


def test_blob_size_that_disagrees_is_refused_and_nothing_is_recorded(ledger: Ledger) -> None:
    ledger.complete(grant(ledger), known()).result()
    lease = grant(ledger, K2)
    wrong = StoredRepresentation(known().digest, 999, Validators(), URL)
    with pytest.raises(IntegrityError) as caught:
        ledger.complete(lease, wrong).result()
    assert caught.value.reason == "length-mismatch"
    assert view(ledger, K2).state is JobState.LEASED
    with pytest.raises(ValueError, match="sha256"):
        ledger.complete(lease, StoredRepresentation("md5:0", 0, Validators(), URL))


# -- the guard ------------------------------------------------------------------------------

END: dict[str, Callable[[Ledger, Lease], Future[Any]]] = {
    "complete": lambda ledger, lease: ledger.complete(lease, known("stale")),
    "release": lambda ledger, lease: ledger.release(lease),
    "fail": lambda ledger, lease: ledger.fail(lease, "e", "stale", permanent=False),
    "fail-after": lambda ledger, lease: ledger.fail(lease, "e", "stale", permanent=False, retry_after=9),
    "fail-permanent": lambda ledger, lease: ledger.fail(lease, "e", "stale", permanent=True),
    "begin": lambda ledger, lease: ledger.begin(lease, OP, "kind"),
    "succeed": lambda ledger, lease: ledger.succeed(lease, OP, "stale"),
    "give-up": lambda ledger, lease: ledger.give_up(lease, OP, "stale"),
}
OP = hex_of("an effect")


@pytest.mark.proves("I3")
@pytest.mark.parametrize("verb", END)
@pytest.mark.parametrize("stale", ["fence", "claim_id", "both", "job"])
def test_nothing_changes_under_a_stale_lease(
    opened: Opener, database: Database, clock: Clock, verb: str, stale: str
) -> None:
    """I3: a stale fence alone and a stale claim_id alone are each enough to be refused."""
    a, b = opened("a"), opened("b")
    old = grant(a)
    a.begin(old, OP, "kind").result()
    clock.now += LEASE
    new = grant(b)
    lease = {
        "fence": Lease(new.job_id, KEY, old.fence, new.claim_id, new.until, 1),
        "claim_id": Lease(new.job_id, KEY, new.fence, old.claim_id, new.until, 1),
        "both": old,
        "job": Lease(new.job_id + 1, KEY, new.fence, new.claim_id, new.until, 1),
    }[stale]
    before = database.everything()
    with pytest.raises(LeaseLost):
        END[verb](a, lease).result()
    assert database.everything() == before
    assert isinstance(b.complete(new, known()).result(), Completion)


@pytest.mark.proves("I3")
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


@pytest.mark.proves("I3")
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


@pytest.mark.proves("I3")
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
    assert clock.now <= seen.not_before <= clock.now + jobs.BACKOFF_FIRST
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
        clock.now += jobs.BACKOFF_FIRST


@pytest.mark.proves("I19")
def test_a_failed_job_is_tried_again_when_asked_for(ledger: Ledger) -> None:
    """I19, rule 9: by refresh, with a new fence and its attempts counted anew."""
    ledger.fail(grant(ledger), "gone", "404", permanent=True).result()
    seen = view(ledger)
    assert (seen.state, seen.error_code, seen.error) == (JobState.FAILED, "gone", "404")
    assert seen.finished_at is not None
    assert grant(ledger).fence == 2
    assert (view(ledger).attempts, view(ledger).generation) == (1, 1)


def test_back_off_grows_and_stays_within_its_bounds() -> None:
    assert [jobs.backoff(n, Highest()) for n in (0, 1, 2, 3)] == [5.0, 5.0, 10.0, 20.0]
    assert jobs.backoff(10**6, Highest()) == statements.BACKOFF_MAX
    assert min(jobs.backoff(9, random.Random(seed)) for seed in range(100)) < 60


# -- terminal states ------------------------------------------------------------------------


@pytest.mark.proves("I13", "I19")
def test_a_job_that_kills_its_worker_is_claimed_max_attempts_times(ledger: Ledger, clock: Clock) -> None:
    """I13, I19: then it is dead, says so, and waits for requeue."""
    for _ in range(ATTEMPTS):
        grant(ledger)
        clock.now += LEASE
    dead = Dead(ATTEMPTS, jobs.NO_ERROR)
    assert [ledger.claim(KEY, REQUEST, refresh_before=math.inf).result() for _ in range(2)] == [dead, dead]
    fence = view(ledger).fence
    assert [ledger.requeue(KEY).result() for _ in range(2)] == [1, 0]
    assert grant(ledger).fence > fence + 1
    assert view(ledger).attempts == 1


@sqlite_only
@pytest.mark.proves("I13")
def test_a_job_whose_work_never_began_is_not_dead(
    opened: Opener, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease runs out between the claim that is refused and the look at why."""
    refused = Jobs._refused

    def late(*given: Any) -> Any:
        clock.now += LEASE
        return refused(*given)

    ledger, other = opened(max_attempts=1), opened("b", max_attempts=1)
    grant(ledger, work_started=False)
    monkeypatch.setattr(Jobs, "_refused", late)
    assert isinstance(other.claim(KEY, REQUEST).result(), Held)
    assert isinstance(other.claim(KEY, REQUEST).result(), Granted)


@pytest.mark.proves("I13")
def test_a_claim_counts_as_an_attempt_once_its_work_begins(ledger: Ledger, clock: Clock) -> None:
    """A crawl claims jobs long before it comes to them: what killed it was none of those."""
    for _ in range(ATTEMPTS + 2):
        lease = grant(ledger, work_started=False)
        clock.now += LEASE
        assert view(ledger).attempts == 1
    ledger.begin_work(lease).result()
    for attempt in range(2, ATTEMPTS + 1):
        lease = grant(ledger, work_started=False)
        assert view(ledger).attempts == attempt
        ledger.begin_work(lease).result()
        clock.now += LEASE
    assert isinstance(ledger.claim(KEY, REQUEST, work_started=False).result(), Dead)
    with pytest.raises(LeaseLost):
        ledger.begin_work(lease).result()


@pytest.mark.proves("I13")
def test_the_last_attempt_is_not_dead_while_its_lease_runs(opened: Opener, clock: Clock) -> None:
    """I13: and its worker is heard if nobody asked in between."""
    a = opened("a", max_attempts=1)
    lease = grant(a)
    assert opened("b", max_attempts=1).claim(KEY, REQUEST).result() == Held("a", lease.until)
    clock.now += LEASE
    assert isinstance(a.complete(lease, known()).result(), Completion)


@pytest.mark.proves("I3", "I19")
def test_a_dead_jobs_claim_can_write_nothing(ledger: Ledger, opened: Opener, clock: Clock) -> None:
    """I3, I19."""
    one = opened("one", max_attempts=1)
    lease = grant(one)
    clock.now += LEASE
    assert isinstance(one.claim(KEY, REQUEST).result(), Dead)
    with pytest.raises(LeaseLost):
        one.complete(lease, known()).result()


@pytest.mark.proves("I19", "I2")
def test_done_changes_only_by_refresh(ledger: Ledger, clock: Clock) -> None:
    """I19, I2."""
    ledger.complete(grant(ledger), known()).result()
    at = clock.now
    clock.now += 100
    assert isinstance(ledger.claim(KEY, REQUEST).result(), Done)
    assert isinstance(ledger.claim(KEY, REQUEST, refresh_before=at).result(), Done)
    assert [ledger.requeue(KEY).result(), ledger.requeue_all().result()] == [0, 0]
    lease = grant(ledger, refresh_before=at + 1)
    assert (lease.generation, lease.fence) == (2, 2)
    ledger.complete(lease, known("newer")).result()
    assert grant(ledger, refresh_before=math.inf).generation == 3


@pytest.mark.proves("I18")
def test_same_key_with_another_request_conflicts(ledger: Ledger) -> None:
    """I18, in every state, and nothing changes."""
    other = JobRequest("work", "artifact", URL, hex_of("POST"))
    lease = grant(ledger)
    for state in (JobState.LEASED, JobState.DONE):
        for before in (None, math.inf):
            with pytest.raises(KeyConflict):
                ledger.claim(KEY, other, refresh_before=before).result()
        assert view(ledger).state is state
        ledger.complete(lease, known()).result()


# -- leases and clocks ----------------------------------------------------------------------


def test_renewal_keeps_what_is_held_and_tells_what_is_lost(opened: Opener, clock: Clock) -> None:
    """Rule 8."""
    a, b = opened("a"), opened("b")
    kept, lost = grant(a), grant(a, K2)
    clock.now += LEASE
    grant(b, K2)
    assert a.renew().result() == {kept.claim_id}
    assert lost.claim_id not in a.renew().result()
    clock.now += LEASE - 1
    assert isinstance(b.claim(KEY, REQUEST).result(), Held)


def test_only_jobs_that_nobody_holds_are_free(opened: Opener, clock: Clock) -> None:
    a, b = opened("a"), opened("b")
    grant(a)
    a.complete(grant(a, K2), known()).result()
    unheard = hex_of("unheard of")
    assert b.free([KEY, K2, unheard]).result() == {K2, unheard}
    clock.now += LEASE
    assert b.free([KEY]).result() == {KEY}
    assert b.free([]).result() == frozenset()


def test_any_number_of_keys_may_be_asked_about(ledger: Ledger) -> None:
    keys = [hex_of(str(number)) for number in range(70_000)]
    grant(ledger, keys[-1])
    assert ledger.free(keys).result() == set(keys[:-1])
    ledger.fail(grant(ledger, keys[0]), "e", "e", permanent=True).result()
    assert ledger.requeue(*keys).result() == 1


def test_leases_of_a_worker_known_to_be_dead_end_now(opened: Opener, database: Database) -> None:
    a, b = opened("a"), opened("b")
    lease, done = grant(a), grant(a, K2)
    a.complete(done, known()).result()
    assert b.end_worker_leases("a").result() == 1
    assert b.end_worker_leases("nobody").result() == 0
    assert grant(b).fence == lease.fence + 1
    assert database.rows("SELECT name FROM ss_worker WHERE ended_at IS NOT NULL") == [("a",)]


@pytest.mark.proves("I14", "I7")
@pytest.mark.parametrize("jump", [1e9, -1e9])
def test_clock_jumps_cost_duplicate_work_only(
    opened: Opener, database: Database, clock: Clock, jump: float
) -> None:
    """I14, I7: whichever way it jumps the job can be had, and one of the two completes."""
    a, b = opened("a"), opened("b")
    first = grant(a)
    clock.now += jump
    second = grant(b)
    with pytest.raises(LeaseLost):
        a.complete(first, known()).result()
    b.complete(second, known()).result()
    assert database.rows("SELECT count(*) FROM ss_completion") == [(1,)]


@pytest.mark.proves("I14", "I7")
def test_no_back_off_outlives_a_clock_set_back(ledger: Ledger, clock: Clock) -> None:
    """I14, I7."""
    ledger.fail(grant(ledger), "busy", "503", permanent=False, retry_after=60).result()
    clock.now -= 1e6
    assert grant(ledger).fence == 2


@pytest.mark.proves("I14", "F16")
def test_workers_whose_clocks_differ_never_both_complete(opened: Opener, database: Database) -> None:
    """I14: clocks of databases do not differ; even if they did."""
    behind, ahead = Clock(), Clock()
    ahead.now += 3600
    a, b = opened("a", clock=behind), opened("b", clock=ahead)
    for number in range(20):
        key = hex_of(str(number))
        first, second = (a, b) if number % 2 else (b, a)
        leases = {ledger: ledger.claim(key, REQUEST).result() for ledger in (first, second)}
        granted = {ledger: got.lease for ledger, got in leases.items() if isinstance(got, Granted)}
        done = 0
        for ledger, lease in granted.items():
            try:
                done += ledger.complete(lease, known()).result() is not None
            except LeaseLost:
                continue
        assert done == 1
    assert database.rows("SELECT count(*) FROM ss_completion") == [(20,)]


def test_time_is_the_databases(opened: Opener) -> None:
    """Rule 7."""
    ledger = opened(clock=None)
    assert abs(grant(ledger).until - LEASE - time.time()) < 5
    before = view(ledger).updated_at
    time.sleep(0.01)
    ledger.renew().result()
    assert view(ledger).updated_at > before


@pytest.mark.proves("I7")
def test_a_claim_that_waited_for_a_transaction_goes_by_the_time_after_it(
    opened: Opener, database: Database
) -> None:
    """I7, rule 7: not by the time at which its own transaction began."""
    grant(opened("a", clock=None, lease_seconds=1.0))
    b = opened("b", clock=None)
    with closing(database.connect()) as other:
        other.execute("BEGIN" if database.postgres else "BEGIN IMMEDIATE")
        other.execute("UPDATE ss_job SET kept = kept")
        waiting = b.claim(KEY, REQUEST)
        time.sleep(1.2)
        other.execute("ROLLBACK")
        assert isinstance(waiting.result(30), Granted)


@pytest.mark.proves("I7")
def test_no_job_is_stranded(opened: Opener, clock: Clock) -> None:
    """I7: whatever its worker does last, a job can be had once lease and back-off are over."""
    a, b = opened("a"), opened("b")
    ends: list[Callable[[Lease], object]] = [
        lambda lease: None,
        lambda lease: a.release(lease).result(),
        lambda lease: a.fail(lease, "e", "e", permanent=False).result(),
        lambda lease: a.fail(lease, "e", "e", permanent=False, retry_after=1e9).result(),
        lambda lease: a.fail(lease, "e", "e", permanent=True).result(),
    ]
    for number, end in enumerate(ends):
        end(grant(a, hex_of(str(number))))
    clock.now += max(LEASE, statements.BACKOFF_MAX)
    for number in range(len(ends)):
        assert grant(b, hex_of(str(number))).fence == 2


@pytest.mark.proves("I2")
def test_a_takeover_is_told_from_a_claim_of_what_nobody_held(opened: Opener, clock: Clock) -> None:
    a, b = opened("a"), opened("b")
    first = a.claim(KEY, REQUEST).result()
    assert isinstance(first, Granted)
    assert not first.taken_over
    clock.now += LEASE
    second = b.claim(KEY, REQUEST).result()
    assert isinstance(second, Granted)
    assert second.taken_over
    b.release(second.lease).result()
    third = a.claim(KEY, REQUEST).result()
    assert isinstance(third, Granted)
    assert not third.taken_over


# -- the history ----------------------------------------------------------------------------


@pytest.mark.proves("I19")
def test_each_change_of_state_is_an_event(opened: Opener, database: Database, clock: Clock) -> None:
    """I19: the chain of a job's states, without a gap."""
    a, b = opened("a"), opened("b", max_attempts=2)
    first = grant(a)
    a.renew().result()
    clock.now += LEASE
    second = grant(b)
    clock.now += LEASE
    assert isinstance(b.claim(KEY, REQUEST).result(), Dead)
    b.requeue(KEY).result()
    a.complete(grant(a), known()).result()
    a.fail(grant(a, refresh_before=math.inf), "e", "e", permanent=True).result()
    told = database.rows("SELECT from_state, to_state, fence, claim_id, at FROM ss_event ORDER BY id")
    assert [row[:3] for row in told] == [
        (None, "leased", 1),
        ("leased", "leased", 2),
        ("leased", "dead", 2),
        ("dead", "ready", 3),
        ("ready", "leased", 4),
        ("leased", "done", 4),
        ("done", "leased", 5),
        ("leased", "failed", 5),
    ]
    claims = [row[3] and bytes(row[3]).hex() for row in told]
    assert claims[:4] == [first.claim_id, second.claim_id, second.claim_id, None]
    assert [row[4] - told[0][4] for row in told] == [0, LEASE, *[2 * LEASE] * 6]


def test_history_can_be_left_out(opened: Opener, database: Database) -> None:
    ledger = opened(events=False)
    ledger.fail(grant(ledger), "e", "e", permanent=True).result()
    ledger.requeue_all().result()
    ledger.complete(grant(ledger), known()).result()
    assert database.rows("SELECT * FROM ss_event") == []


# -- what is stored, and how ----------------------------------------------------------------


def test_credentials_never_enter(database: Database, ledger: Ledger) -> None:
    request = JobRequest("w", "a", "https://user:s3cret@example.org/p//x@y?q=@#@", hex_of("h"))
    assert request.url == "https://example.org/p//x@y?q=@#@"
    lease = grant(ledger, KEY, request)
    ledger.fail(lease, "e", "GET https://user:s3cret@h/ failed \udc80" + "x" * 9999, permanent=True).result()
    assert view(ledger).error[:23] == "GET https://…@h/ failed"
    assert len(view(ledger).error) == 2000
    lease = grant(ledger, KEY, request)
    ledger.begin(lease, OP, "kind").result()
    ledger.give_up(lease, OP, "GET https://user:s3cret@h/ failed").result()
    ledger.complete(lease, known(url="https://user:s3cret@cdn.example.org/f")).result()
    ledger.close()
    stored = repr(database.everything())
    assert "s3cret" not in stored
    assert "cdn.example.org/f" in stored


def test_a_nul_in_what_a_server_said_is_no_obstacle(ledger: Ledger) -> None:
    """PostgreSQL's text has no such character; a job must not be stranded by one."""
    ledger.fail(grant(ledger), "e", "said \0", permanent=False).result()
    assert view(ledger).error == "said \ufffd"
    other = JobRequest("w", "a", "https://h/\0", REQUEST.request_hash)
    said = StoredRepresentation(
        digest_of("x"), 1, Validators(None, "\0", "\0"), "https://h/\0f", "\0", ("\0",), "\0"
    )
    done = ledger.complete(grant(ledger, K2, other), said).result()
    assert done.known.digest == said.digest
    replayed = ledger.claim(K2, other).result()
    assert isinstance(replayed, Done)
    assert replayed.completion.known.media_type == "\ufffd"


def test_a_key_that_is_no_hash_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="hex"):
        ledger.claim("k1", REQUEST).result()
    assert grant(ledger).fence == 1


@sqlite_only
def test_files_are_for_the_owner_only(path: Path, ledger: Ledger) -> None:
    for name in ("", "-wal", "-shm", "-turn"):
        assert stat.S_IMODE(path.with_name(path.name + name).stat().st_mode) == 0o600


def pragma(name: str) -> Callable[[sqlite3.Connection], Any]:
    return lambda connection: connection.execute(f"PRAGMA {name}").fetchone()[0]


@sqlite_only
def test_pragmas_are_in_force(opened: Opener, tmp_path: Path) -> None:
    wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "wal_autocheckpoint": 0}
    for fsync, level in ((True, 2), (False, 1)):
        ledger = opened(url=f"sqlite:///{tmp_path}/{fsync}", fsync=fsync)
        got = {name: raw(ledger, pragma(name)) for name in wanted}
        assert got == wanted | {"synchronous": level}


@sqlite_only
def test_the_log_is_copied_back_when_it_is_long(opened: Opener, path: Path) -> None:
    """By whoever has the turn; a reader makes it wait, and nothing more."""
    ledger = opened(fsync=False)
    log = path.with_name(path.name + "-wal")
    with closing(sqlite3.connect(path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM ss_job").fetchall()
        raw(ledger, fill)
        grant(ledger)
        assert log.stat().st_size > sqlite.CHECKPOINT_PAGES * 4096
        reader.execute("ROLLBACK")
    grant(ledger, K2)
    assert log.stat().st_size < sqlite.CHECKPOINT_PAGES * 4096
    assert pragma("integrity_check")(sqlite3.connect(path)) == "ok"


def fill(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE filler (x)")
    connection.execute("INSERT INTO filler VALUES (zeroblob(?))", (sqlite.CHECKPOINT_PAGES * 4100,))


def test_sessions_have_the_limits_that_are_documented(ledger: Ledger, database: Database) -> None:
    if not database.postgres:
        assert raw(ledger, pragma("busy_timeout")) == sqlite.BUSY_STEP * 1000
        return

    def shown(connection: Any) -> list[str]:
        names = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")
        names += ("transaction_isolation", "synchronous_commit", "application_name")
        return [connection.execute(f"SHOW {name}").fetchone()[0] for name in names]

    assert raw(ledger, shown) == ["15s", "1min", "1min", "read committed", "off", "scrapy-streaming"]


@sqlite_only
def test_heartbeat_reads_the_partial_index(ledger: Ledger) -> None:
    plan: list[Any] = raw(
        ledger,
        lambda c: c.execute(
            "EXPLAIN QUERY PLAN UPDATE ss_job SET lease_until = 1 WHERE worker = 1 AND state = 'leased'"
        ).fetchall(),
    )
    assert "ss_job_by_worker" in str(plan)
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
    with pytest.raises(LedgerError, match=r"(?i)check"):
        raw(ledger, lambda connection: connection.execute(f"UPDATE ss_job SET {wrong}"))


def test_counts_jobs_and_blobs(ledger: Ledger) -> None:
    assert set(ledger.counts().result().values()) == {0}
    ledger.complete(grant(ledger), known()).result()
    ledger.complete(grant(ledger, K2), known("other")).result()
    grant(ledger, K3)
    ledger.set_blob_state(known("other").digest, "missing", ["present"]).result()
    got = ledger.counts().result()
    assert got == {"ready": 0, "leased": 1, "done": 2, "failed": 0, "dead": 0, "blobs": 1, "blob_bytes": 5}
    assert ledger.job(hex_of("unheard of")).result() is None


# -- opening --------------------------------------------------------------------------------


def refused(opened: Opener, **how: Any) -> LedgerError:
    with pytest.raises(LedgerError) as caught:
        opened(**how)
    return caught.value


@pytest.mark.proves("I16")
def test_the_ledger_of_another_store_is_refused(opened: Opener, database: Database) -> None:
    opened().close()
    before = database.everything()
    assert refused(opened, store_id="other").reason == "ledger-foreign"
    assert database.everything() == before


@pytest.mark.proves("I16", "F13")
def test_a_ledger_that_the_store_had_is_not_begun_anew(opened: Opener, database: Database) -> None:
    """F13: a ledger that is gone is missed."""
    assert refused(opened, ledger_id="0" * 32).reason == "ledger-missing"
    assert refused(opened, create=False).reason == "ledger-missing"
    if not database.postgres:
        assert not database.path.exists()
    first = opened()
    assert opened("b", ledger_id=first.ledger_id, create=False).ledger_id == first.ledger_id
    assert refused(opened, ledger_id="0" * 32).reason == "ledger-foreign"


def test_a_ledger_without_its_version_row_is_refused(opened: Opener, database: Database) -> None:
    opened().close()
    database.rows("DELETE FROM ss_meta")
    assert refused(opened).reason == "ledger-corrupt"


def full(opened: Opener, path: Path) -> bytes:
    ledger = opened()
    for number in range(50):
        grant(ledger, hex_of(str(number)))
    ledger.close()
    return path.read_bytes()


@sqlite_only
@pytest.mark.proves("F13")
@pytest.mark.parametrize("damage", ["garbage", "truncated", "short"])
def test_a_file_that_is_no_sound_ledger_is_refused_and_left_as_it_is(
    opened: Opener, path: Path, damage: str
) -> None:
    if damage == "garbage":
        path.write_bytes(os.urandom(9000))
    else:
        content = full(opened, path)
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content[:50])
    before = path.read_bytes()
    error = refused(opened)
    assert error.reason == "ledger-corrupt"
    assert str(path) in str(error)
    assert path.read_bytes() == before


@sqlite_only
@pytest.mark.proves("F13")
def test_after_an_unclean_end_the_file_is_checked(opened: Opener, path: Path) -> None:
    """F13: a page of zeros in the middle, and a log that nobody folded in."""
    ledger = opened()
    for number in range(50):
        grant(ledger, hex_of(str(number)))
    log = path.with_name(path.name + "-wal")
    left = log.read_bytes()
    ledger.close()
    content = bytearray(path.read_bytes())
    content[-4096:] = bytes(4096)
    path.write_bytes(content)
    log.write_bytes(left[:10])
    assert refused(opened).reason == "ledger-corrupt"


@sqlite_only
@pytest.mark.proves("F24")
def test_a_link_or_a_directory_is_no_ledger(opened: Opener, path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    assert refused(opened).reason == "ledger-unreadable"
    assert not (tmp_path / "elsewhere").exists()
    path.unlink()
    path.mkdir()
    assert refused(opened).reason == "ledger-unreadable"
    path.rmdir()
    turn = path.with_name(path.name + "-turn")
    turn.symlink_to(tmp_path / "elsewhere")
    assert refused(opened).reason == "ledger-unreadable"
    assert not (tmp_path / "elsewhere").exists()


@sqlite_only
def test_a_missing_directory_is_named(opened: Opener, tmp_path: Path) -> None:
    error = refused(opened, url=f"sqlite:///{tmp_path}/no/where")
    assert error.reason == "ledger-unreadable"
    assert "no/where" in str(error)


@sqlite_only
@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        (sqlite3.SQLITE_CORRUPT, LedgerError, "ledger-corrupt"),
        (sqlite3.SQLITE_IOERR_FSYNC, LedgerError, "ledger-unreadable"),
        (sqlite3.SQLITE_READONLY, LedgerError, "ledger-unreadable"),
        (sqlite3.SQLITE_FULL, WriteFailed, "no-space"),
        (sqlite3.SQLITE_BUSY, LedgerError, "ledger-locked"),
        (sqlite3.SQLITE_CONSTRAINT, LedgerError, "ledger-unusable"),
    ],
)
def test_errors_are_told_apart_by_code(path: Path, code: int, kind: type[Exception], reason: str) -> None:
    error = sqlite3.OperationalError("any text at all")
    error.sqlite_errorcode = code
    file = sqlite.SqliteDatabase(path, fsync=False)
    told = file.translate(error)
    assert isinstance(told, kind)
    assert getattr(told, "reason", None) == reason
    assert file.is_transient(error) is (code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY))


# -- several processes ------------------------------------------------------------------------

CLAIM = """
from scrapy_streaming.storage.ledger import JobRequest, Ledger
url, key, me = sys.argv[1:]
with Ledger.open(url, store_id="s", worker_id=me) as ledger:
    barrier()
    request = JobRequest("w", "a", "https://h/", key)
    keys = [f"{number:02x}" * 32 for number in range(25)]
    claims = [ledger.claim(key, request) for key in (keys if int(me[1:]) % 2 else reversed(keys))]
    print(sum(type(claim.result()).__name__ == "Granted" for claim in claims))
"""


@pytest.mark.proves("I1", "I2", "F14")
@pytest.mark.long_on_postgres
def test_processes_that_claim_at_once_get_each_job_once(url: str, database: Database) -> None:
    """I1, I2: in opposite orders, which on PostgreSQL locks rows in opposite orders too."""
    Ledger.open(url, store_id="s", worker_id="first").close()
    assert sum(map(int, at_once(6, CLAIM, url, KEY))) == 25
    assert database.rows("SELECT count(*), count(DISTINCT job_key), max(fence) FROM ss_job") == [(25, 25, 1)]
    assert database.rows("SELECT count(*) FROM ss_event") == [(25,)]


# -- what was acknowledged --------------------------------------------------------------------

CRASH = """
import hashlib, sys
from scrapy_streaming.protocol.jobs import StoredRepresentation
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.ledger import JobRequest, Ledger
ledger = Ledger.open(sys.argv[1], store_id="s", worker_id="w")
number = 0
while True:
    keys = [hashlib.sha256(str(number + n).encode()).hexdigest() for n in range(16)]
    number += 16
    grants = [ledger.claim(key, JobRequest("w", "a", "https://h/" + key, key)) for key in keys]
    waiting = []
    for key, grant in zip(keys, grants):
        known = StoredRepresentation("sha256:" + key, 1, Validators(), "https://h/")
        waiting.append(ledger.complete(grant.result().lease, known))
    for key, answer in zip(keys, waiting):
        print(key, answer.result().completion_id, flush=True)
"""


@pytest.mark.proves("I4", "I6", "F1")
def test_an_acknowledged_completion_survives_kill_9(url: str, database: Database) -> None:
    """I6, I4: short of a power cut, which needs another machine."""
    with process(CRASH, url) as victim:
        assert victim.stdout is not None
        assert victim.stderr is not None
        first = [victim.stdout.readline() for _ in range(200)]
        victim.send_signal(signal.SIGKILL)
        # not `communicate`: it would not see what `readline` has read ahead
        lines = (*first, *victim.stdout)
        error = victim.stderr.read()
    assert error == ""
    assert victim.returncode == -signal.SIGKILL
    said = dict(line.split() for line in lines if line.endswith("\n"))
    assert len(said) >= 200
    with Ledger.open(url, store_id="s", worker_id="v") as ledger:
        for key, completion_id in said.items():
            answer = ledger.claim(key, JobRequest("w", "a", "https://h/" + key, key)).result()
            assert isinstance(answer, Done)
            assert answer.completion.completion_id == completion_id
    assert database.rows("SELECT count(*) FROM ss_completion GROUP BY job_id HAVING count(*) > 1") == []


# -- found once -------------------------------------------------------------------------------


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
    for key, digest in zip((KEY, K2), digests, strict=True):
        request = JobRequest("work", key, f"{URL}/{key}", REQUEST.request_hash)
        granted = ledger.claim(key, request).result()
        assert isinstance(granted, Granted)
        ledger.complete(granted.lease, StoredRepresentation(digest, 1, TAGGED, request.url)).result()
    ledger.set_blob_state(digests[0], "missing", ["present"]).result()
    assert isinstance(
        ledger.claim(K2, JobRequest("work", K2, f"{URL}/{K2}", REQUEST.request_hash)).result(), Done
    )
    assert isinstance(
        ledger.claim(KEY, JobRequest("work", KEY, f"{URL}/{KEY}", REQUEST.request_hash)).result(), Granted
    )


# -- what a URL stands for --------------------------------------------------------------------


def test_what_selected_a_file_is_unknown_once_its_url_stands_for_other_bytes(ledger: Ledger) -> None:
    """R40: of two spiders in two languages the first is not told that nothing selects."""
    other = replace(REQUEST, work_id="other")
    done = ledger.complete(grant(ledger), known("english")).result()
    assert ledger.claim(KEY, REQUEST).result() == Done(done)
    ledger.complete(grant(ledger, K2, other), replace(known("german"), selecting="de")).result()
    again = ledger.claim(KEY, REQUEST).result()
    assert isinstance(again, Done)
    told = again.completion.known
    assert (told.digest, told.vary, told.selecting) == (digest_of("english"), ("accept",), "")
    assert told.validators == Validators()


def test_two_artifacts_of_one_url_share_no_validators(ledger: Ledger) -> None:
    """R40: a 304 to the one says nothing of the other's bytes; two works on one artifact do share."""
    ledger.complete(grant(ledger), known("english")).result()
    granted = ledger.claim(K2, replace(REQUEST, artifact_id="german")).result()
    assert (granted.lease.fence, granted.known) == (1, None)
    shared = ledger.claim(K3, replace(REQUEST, work_id="other")).result()
    assert shared.known.digest == digest_of("english")


def test_a_job_of_an_earlier_release_comes_to_its_own_validators(ledger: Ledger, database: Database) -> None:
    """There an artifact's were kept under its URL's name alone."""
    ledger.complete(grant(ledger), known("old")).result()
    earlier = hashlib.sha256(URL.encode()).digest()
    for table in ("ss_job", "ss_representation"):
        database.rows(f"UPDATE {table} SET url_key = ?", earlier)
    assert isinstance(ledger.claim(KEY, REQUEST).result(), Done)
    granted = ledger.claim(KEY, REQUEST, refresh_before=math.inf).result()
    assert granted.known is None
    ledger.complete(granted.lease, known("new")).result()
    assert ledger.claim(KEY, REQUEST, refresh_before=math.inf).result().known.digest == digest_of("new")
