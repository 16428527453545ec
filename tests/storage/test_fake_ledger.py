"""One contract at two depths: the ledger in memory answers what the ledger on SQLite answers.

What may live here: calls as plain values, which run on both ledgers, and the comparison of all that came
back. The unit tests of the runtime are worth what this comparison is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from ledger_kit import REQUEST, Highest, digest_of, hex_of, known
from units.fakes import FakeClock, FakeLedger

from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.protocol.jobs import Completion, Granted, Lease, NotedFile, RecordedName
from scrapy_streaming.storage.ledger import JobRequest, Ledger

LEASE, ATTEMPTS = 60.0, 3
WORKERS = ("a", "b")
KEYS = tuple(hex_of(name) for name in ("k1", "k2", "k3", "k4"))
#: Two artifacts of one URL, which share nothing; and two works that want the same URL, which share bytes.
REQUESTS = (
    REQUEST,
    replace(REQUEST, artifact_id="another"),
    JobRequest.plain("work", "https://example.org/b.bin"),
    JobRequest.plain("another work", "https://example.org/b.bin"),
)
#: What a job's record says in both.
VIEWED = (
    *("state", "generation", "fence", "attempts", "worker_id", "lease_until", "not_before", "digest"),
    *("error_code", "error", "updated_at", "finished_at"),
)


@dataclass
class Side:
    """One of the two: a ledger for each worker, and what was granted and completed in the order it was."""

    clock: FakeClock
    ledgers: dict[str, Any]
    leases: list[Lease] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    claim_ids: dict[str, str] = field(default_factory=dict)
    job_ids: dict[int, int] = field(default_factory=dict)

    def run(self, call: Call) -> Any:
        """Return what *call* gave or raised, its random ids replaced by their order."""
        try:
            answer = call(self)
        except StreamingError as error:
            return type(error).__name__, error.reason
        if isinstance(answer, Granted):
            self.leases.append(answer.lease)
        if isinstance(answer, Completion):
            self.completions.append(answer)
        return self.plain(answer)

    def plain(self, value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            named = {one.name: getattr(value, one.name) for one in fields(value)}
            for name in ("claim_id", "completion_id"):
                if name in named:
                    named[name] = self.claim_ids.setdefault(named[name], f"claim {len(self.claim_ids)}")
            if "job_id" in named:
                named["job_id"] = self.job_ids.setdefault(named["job_id"], len(self.job_ids))
            return type(value).__name__, {name: self.plain(one) for name, one in named.items()}
        if isinstance(value, frozenset):
            return sorted(self.claim_ids.get(one, one) for one in value)
        return value


@dataclass(frozen=True)
class Call:
    """A function below, and what it is given beside the side."""

    function: Callable[..., Any]
    given: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, side: Side) -> Any:
        return self.function(side, *self.given, **self.named)


def p(function: Callable[..., Any], *given: Any, **named: Any) -> Call:
    return Call(function, given, named)


# -- the calls ------------------------------------------------------------------------------


def claim(side: Side, worker: str, job: int, **how: Any) -> Any:
    return side.ledgers[worker].claim(KEYS[job], REQUESTS[job], **how).result(30)


def conflict(side: Side, worker: str, job: int) -> Any:
    other = replace(REQUESTS[job], request_hash=hex_of("POST"))
    return side.ledgers[worker].claim(KEYS[job], other).result(30)


def under(side: Side, worker: str, verb: str, lease: int, *given: Any, **how: Any) -> Any:
    """Call *verb* with the lease that was granted as number *lease*; do nothing if there is none."""
    if -len(side.leases) <= lease < len(side.leases):
        return getattr(side.ledgers[worker], verb)(side.leases[lease], *given, **how).result(30)
    return None


def of(side: Side, worker: str, verb: str, completion: int, *given: Any) -> Any:
    """Call *verb* with the completion that was given as number *completion*; do nothing if there is none."""
    if -len(side.completions) <= completion < len(side.completions):
        done = side.completions[completion]
        return getattr(side.ledgers[worker], verb)([done] if verb == "delivered" else done, *given).result(30)
    return None


def ask(side: Side, worker: str, verb: str, *given: Any) -> Any:
    return getattr(side.ledgers[worker], verb)(*given).result(30)


def wait(side: Side, seconds: float) -> Any:
    return side.clock.advance(seconds)


def job(side: Side, number: int) -> Any:
    seen = side.ledgers["a"].job(KEYS[number]).result(30)
    return None if seen is None else {name: getattr(seen, name) for name in VIEWED}


# -- the two sides --------------------------------------------------------------------------


def _fake() -> Side:
    clock = FakeClock()
    first = FakeLedger("a", clock=clock, lease_seconds=LEASE, max_attempts=ATTEMPTS)
    return Side(clock, {"a": first, "b": first.for_worker("b")})


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    clock, url = FakeClock(), f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
    ledgers = {}
    for worker in WORKERS:
        ledgers[worker] = Ledger.open(
            url, store_id="store", worker_id=worker, lease_seconds=LEASE,
            max_attempts=ATTEMPTS, fsync=False, clock=clock,
        )  # fmt: skip
        ledgers[worker]._random = Highest()
    yield _fake(), Side(clock, ledgers)
    for ledger in ledgers.values():
        ledger.close()


def _word(answer: Any) -> str:
    """Return the one word of an answer: its type, or the reason of its error."""
    if isinstance(answer, tuple):
        kind, what = answer
        return what if isinstance(what, str) else kind
    return str(answer)


def _compare(sides: tuple[Side, Side], calls: list[Call]) -> list[Any]:
    """Run *calls* on both sides; return the answers, which are the same."""
    fake, real = sides
    answers = []
    for number, call in enumerate(calls):
        answers.append(fake.run(call))
        assert answers[-1] == real.run(call), f"call {number}: {call}"
    return answers


# -- what is known to matter ----------------------------------------------------------------

NOTED = {"full/a": NotedFile(hex_of("bytes"), 5, b"1")}
SCENARIOS: dict[str, tuple[list[Call], str]] = {
    "a completion is replayed to every worker": (
        [
            p(claim, worker="a", job=0),
            p(under, worker="a", verb="complete", lease=0, known=known(), path="full/a.bin"),
            p(claim, worker="b", job=0),
            p(under, worker="a", verb="complete", lease=0, known=known("others")),
        ],
        "Granted Completion Done Completion",
    ),
    "a held job is taken over when its lease is over, and the old claim is fenced out": (
        [
            p(claim, worker="a", job=0),
            p(claim, worker="b", job=0),
            p(wait, seconds=LEASE),
            p(claim, worker="b", job=0),
            p(under, worker="a", verb="complete", lease=0, known=known()),
            p(under, worker="a", verb="fail", lease=0, error_code="x", error="y", permanent=True),
            p(under, worker="a", verb="release", lease=0),
            p(under, worker="a", verb="begin_work", lease=0),
        ],
        "Granted Held 1000060.0 Granted lease-lost lease-lost lease-lost lease-lost",
    ),
    "a renewal keeps what nobody took": (
        [
            p(claim, worker="a", job=0),
            p(claim, worker="a", job=1),
            p(wait, seconds=LEASE + 1),
            p(claim, worker="b", job=0),
            p(ask, worker="a", verb="renew"),
            p(claim, worker="b", job=1),
            p(ask, "b", "free", KEYS),
        ],
        f"Granted Granted 1000061.0 Granted ['claim 1'] Held {sorted(KEYS[2:])}",
    ),
    "silent workers use up the attempts of work that began": (
        [
            p(claim, worker="a", job=0),
            p(wait, seconds=LEASE),
            p(claim, worker="a", job=0),
            p(wait, seconds=LEASE),
            p(claim, worker="a", job=0, work_started=False),
            p(wait, seconds=LEASE),
            p(claim, worker="a", job=0, work_started=False),
            p(under, worker="a", verb="begin_work", lease=3),
            p(wait, seconds=LEASE),
            p(claim, worker="b", job=0),
            p(claim, worker="b", job=0),
            p(ask, "a", "requeue", KEYS[0]),
            p(claim, worker="b", job=0),
        ],
        "Granted 1000060.0 Granted 1000120.0 Granted 1000180.0 Granted None 1000240.0 Dead Dead 1 Granted",
    ),
    "a back-off binds the worker that failed, the server's binds all": (
        [
            p(claim, worker="a", job=0),
            p(under, worker="a", verb="fail", lease=0, error_code="x", error="y", permanent=False),
            p(claim, worker="a", job=0),
            p(claim, worker="b", job=0),
            p(
                under, worker="b", verb="fail", lease=1, error_code="x", error="y",
                permanent=False, retry_after=9e9,
            ),
            p(claim, worker="a", job=0),
            p(wait, seconds=3600),
            p(claim, worker="a", job=0),
            p(under, worker="a", verb="fail", lease=2, error_code="x", error="y", permanent=True),
            p(claim, worker="b", job=0),
        ],
        "Granted None Waiting Granted None Waiting 1003600.0 Granted None Granted",
    ),
    "bytes that are gone are fetched again": (
        [
            p(claim, worker="a", job=0),
            p(under, worker="a", verb="complete", lease=0, known=known()),
            p(ask, "a", "set_blob_state", digest_of("bytes"), "missing", ["present"]),
            p(ask, "a", "set_blob_state", digest_of("bytes"), "missing", ["present"]),
            p(claim, worker="b", job=0),
            p(under, worker="b", verb="complete", lease=1, known=replace(known(), size=1)),
            p(under, worker="b", verb="complete", lease=1, known=known()),
            p(claim, worker="a", job=0),
        ],
        "Granted Completion True False Granted length-mismatch Completion Done",
    ),
    "a blob that is being collected is not completed with until its deletion is abandoned": (
        [
            p(claim, worker="a", job=0),
            p(under, worker="a", verb="complete", lease=0, known=known()),
            p(ask, "a", "set_blob_state", digest_of("bytes"), "deleting", ["present"]),
            p(claim, worker="b", job=1),
            p(under, worker="b", verb="complete", lease=1, known=known()),
            p(wait, seconds=301),
            p(under, worker="b", verb="complete", lease=1, known=known()),
        ],
        "Granted Completion True Granted blob-going 1000301.0 Completion",
    ),
    "a refresh gives what the job was completed with before, and its name": (
        [
            p(claim, worker="a", job=0),
            p(
                under, worker="a", verb="complete", lease=0, known=replace(known(), stamp=b"1"),
                path="named/a.pdf", by_response=True,
            ),
            p(of, "a", "note_name", 0, RecordedName("named/b.pdf", b"2")),
            p(ask, "a", "note_blob", digest_of("bytes"), b"3"),
            p(of, "b", "delivered", 0),
            p(claim, worker="b", job=0, refresh_before=math.inf),
            p(under, worker="b", verb="complete", lease=1, known=known("others")),
            p(claim, worker="a", job=0, refresh_before=math.inf),
        ],
        "Granted Completion None None None Granted Completion Granted",
    ),
    "another request under the same key is a conflict, or a damaged record": (
        [
            p(claim, worker="a", job=0),
            p(claim, worker="a", job=2),
            p(conflict, worker="b", job=0),
            p(conflict, worker="b", job=2),
        ],
        "Granted Granted key-conflict ledger-row",
    ),
    "the leases of a dead worker end": (
        [
            p(claim, worker="a", job=0),
            p(claim, worker="a", job=1),
            p(under, worker="a", verb="release", lease=1),
            p(ask, "b", "end_worker_leases", "a"),
            p(claim, worker="b", job=0),
        ],
        "Granted Granted None 1 Granted",
    ),
    "files of other programs may be adopted, those of other artifacts not": (
        [
            p(ask, "a", "note_files", {"full/a": (NOTED["full/a"], b"2")}),
            p(ask, "a", "note_files", {"full/b": (NotedFile(hex_of("bytes"), 6, b"1"), b"2")}),
            p(ask, "b", "noted_files", ["full/a", "full/b"]),
            p(ask, "b", "adoptable", digest_of("bytes"), "full/a"),
            p(ask, "b", "adoptable", digest_of("unknown"), "full/a"),
            p(claim, worker="a", job=0),
            p(under, worker="a", verb="complete", lease=0, known=known("others"), path="full/c"),
            p(ask, "b", "adoptable", digest_of("others"), "full/c"),
            p(ask, "b", "adoptable", digest_of("others"), "full/d"),
            p(ask, "b", "set_blob_state", digest_of("others"), "quarantined", ["present"]),
            p(ask, "b", "adoptable", digest_of("others"), "full/d"),
        ],
        f"['full/a'] [] {NOTED} True True Granted Completion False True True False",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_ledger_in_memory_answers_as_the_real_one(sides: tuple[Side, Side], name: str) -> None:
    calls, words = SCENARIOS[name]
    after: list[Call] = [p(job, number=number) for number in range(len(KEYS))]
    answers = _compare(sides, [*calls, *after])
    assert " ".join(map(_word, answers[: len(calls)])) == words


# -- whatever is called ---------------------------------------------------------------------


def _any_call(rng: Random) -> Call:
    """Return a call that both sides understand, chosen without regard to what makes sense."""
    worker, number, lease = rng.choice(WORKERS), rng.randrange(4), -rng.choice([1, 1, 1, 2, 3, 9])
    name = rng.choice(["bytes", "others"])
    stored = replace(known(name), stamp=rng.choice([None, b"1", b"2"]))
    choices: list[Call] = [
        p(claim, worker=worker, job=number, refresh_before=rng.choice([None, None, 1_000_400.0, math.inf]),
          kept=rng.choice([0, 0, 1, 2]), work_started=rng.random() < 0.6),
        p(under, worker=worker, verb="complete", lease=lease, known=stored,
          path=rng.choice([None, "full/a", "full/b"]), by_response=rng.random() < 0.5),
        p(under, worker=worker, verb="fail", lease=lease, error_code="x", error=f"by {worker}",
          permanent=rng.random() < 0.3, retry_after=rng.choice([None, None, -1.0, 40.0]),
          progress=rng.random() < 0.3),
        p(under, worker=worker, verb="release", lease=lease),
        p(under, worker=worker, verb="begin_work", lease=lease, unlike=rng.random() < 0.3),
        p(of, worker, "note_name", -rng.choice([1, 2, 5]), RecordedName("full/c", b"9")),
        p(of, worker, "delivered", -rng.choice([1, 2, 5])),
        p(ask, worker, "renew"),
        p(ask, worker, "free", KEYS),
        p(ask, worker, "requeue", KEYS[number]),
        p(ask, worker, "end_worker_leases", rng.choice(WORKERS)),
        p(ask, worker, "note_blob", digest_of(name), b"4"),
        p(ask, worker, "set_blob_state", digest_of(name),
          rng.choice(["present", "missing", "deleting"]), [rng.choice(["present", "missing", "deleting"])]),
        p(ask, worker, "adoptable", digest_of(name), "full/a"),
        p(wait, seconds=rng.choice([1.0, 20.0, 61.0, 400.0, -100.0])),
        p(job, number=number),
    ]  # fmt: skip
    weights = [12, 5, 4, 2, 3, *[1] * 8, 1, 4, 2]
    return rng.choices(choices, weights)[0]


@pytest.mark.parametrize("seed", range(2))
def test_the_ledger_in_memory_answers_as_the_real_one_whatever_is_called(
    sides: tuple[Side, Side], seed: int
) -> None:
    rng = Random(seed)
    answers = _compare(sides, [_any_call(rng) for _ in range(600)])
    words = set(map(_word, answers))
    assert words >= {"Granted", "Held", "Waiting", "Done", "Completion", "lease-lost"}
