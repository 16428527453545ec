"""Jobs as values: states, the one table of transitions, leases, claims and the two keys.

What may live here: what the ledger stores and answers, as values, and the rules about them.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, TypeAlias

from scrapy_streaming.protocol.validators import Validators

KEY_VERSION: Final = 1
#: Seconds that a recorded time may be ahead of the clock and still count as the present. A later time
#: was written by a clock that was wrong, and the age is not known (I14).
SKEW: Final = 60.0


def is_recent(at: float, since: float | None, now: float) -> bool:
    """Whether the time *at* is not before *since* (``None``: no limit) and not in the future (I14)."""
    return (since is None or at >= since) and at <= now + SKEW


class JobState(enum.StrEnum):
    """The state of a job. ``done``, ``failed`` and ``dead`` are terminal."""

    READY = "ready"
    LEASED = "leased"
    DONE = "done"
    FAILED = "failed"
    DEAD = "dead"

    @property
    def terminal(self) -> bool:
        """Whether only an explicit refresh or requeue leads out of this state (I19)."""
        return self in (JobState.DONE, JobState.FAILED, JobState.DEAD)


class OperationState(enum.StrEnum):
    """The state of one recorded effect. Only ``ok`` is ever replayed (ledger rule 12)."""

    STARTED = "started"
    OK = "ok"
    FAILED = "failed"


class JobEvent(enum.StrEnum):
    """What may happen to a job."""

    CLAIM = "claim"
    COMPLETE = "complete"
    RELEASE = "release"
    FAIL_TRANSIENT = "fail-transient"
    FAIL_PERMANENT = "fail-permanent"
    EXHAUST = "exhaust"
    REFRESH = "refresh"
    REQUEUE = "requeue"


@dataclass(frozen=True, slots=True)
class Change:
    """What one transition does to the row: its new state and what is added to its counters."""

    to: JobState
    fence: int = 0
    generation: int = 0
    attempts: int = 0
    guarded: bool = False


#: The whole state machine (docs/ledger.md, States). What is not in the table cannot happen; the ledger's
#: SQL is generated from it.
TRANSITIONS: Final[Mapping[tuple[JobState, JobEvent], Change]] = MappingProxyType(
    {
        (JobState.READY, JobEvent.CLAIM): Change(JobState.LEASED, fence=1, attempts=1),
        # an expired lease is taken over by the same claim
        (JobState.LEASED, JobEvent.CLAIM): Change(JobState.LEASED, fence=1, attempts=1),
        (JobState.LEASED, JobEvent.COMPLETE): Change(JobState.DONE, guarded=True),
        (JobState.LEASED, JobEvent.RELEASE): Change(JobState.READY, attempts=-1, guarded=True),
        (JobState.LEASED, JobEvent.FAIL_TRANSIENT): Change(JobState.READY, guarded=True),
        (JobState.LEASED, JobEvent.FAIL_PERMANENT): Change(JobState.FAILED, guarded=True),
        (JobState.LEASED, JobEvent.EXHAUST): Change(JobState.DEAD),
        (JobState.DONE, JobEvent.REFRESH): Change(JobState.READY, fence=1, generation=1),
        (JobState.FAILED, JobEvent.REFRESH): Change(JobState.READY, fence=1),
        (JobState.FAILED, JobEvent.REQUEUE): Change(JobState.READY, fence=1),
        (JobState.DEAD, JobEvent.REQUEUE): Change(JobState.READY, fence=1),
    }
)


def transition(state: JobState, event: JobEvent) -> Change:
    """Return what *event* does to a job in *state*; raise ``KeyError`` if it cannot happen."""
    return TRANSITIONS[(state, event)]


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write about one job: every guarded write names all three (ledger rule 1).

    ``claim_id`` is 32 hex digits, random for each claim; ``until`` is seconds since the epoch
    by the database's clock.
    """

    job_id: int
    job_key: str
    fence: int
    claim_id: str
    until: float
    generation: int


@dataclass(frozen=True, slots=True)
class RecordedName:
    """The name that a job's bytes were given: ``path`` below the store's root.

    ``stamp`` shows whether its file was touched since (R77); ``None`` for a name that is no file of
    its own, or of which nothing was noted.
    """

    path: str
    stamp: bytes | None = None


@dataclass(frozen=True, slots=True)
class NotedFile:
    """What the bytes of a file in the store hash to (hexadecimal), and the ``stamp`` that it had then.

    Noted ahead of a crawl by name; no job has asked for it yet.
    """

    hexadecimal: str
    size: int
    stamp: bytes


@dataclass(frozen=True, slots=True)
class StoredRepresentation:
    """A stored representation that a request may be conditional on (state **B**).

    ``size`` in bytes; ``digest`` is ``sha256:<hex>``; ``fetched_at`` in seconds since the epoch.
    ``proof`` is the word for what the bytes' rightness rests on, ``""`` if it was not recorded.
    ``stamp`` shows whether the blob's file was touched since its bytes were last known to be right
    (R77), ``name`` is the one that this job gave it; neither says anything of the bytes. ``stored_at``
    is when another program stored them, seconds since the epoch: their age counts from then.
    """

    digest: str
    size: int
    validators: Validators
    final_url: str
    media_type: str | None = None
    vary: tuple[str, ...] = ()
    selecting: str = ""
    fetched_at: float = 0.0
    proof: str = ""
    stamp: bytes | None = field(default=None, compare=False)
    name: RecordedName | None = field(default=None, compare=False)
    stored_at: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Completion:
    """What the ledger recorded when a job was done; replayed to every later claim.

    ``job_id`` and ``generation`` are its place in the ledger. ``path`` is the name that the blob was
    given, below the store's root; ``by_response``: without the response the name would be another.
    """

    completion_id: str
    known: StoredRepresentation
    completed_at: float
    job_id: int = 0
    generation: int = 0
    path: str | None = None
    by_response: bool = False


@dataclass(frozen=True, slots=True)
class Granted:
    """This worker has the job until the lease ends; ``known`` is what a request may build on.

    ``taken_over``: another claim's lease had expired; its worker may not know that yet.
    ``previous`` is the job's own last completion.
    """

    lease: Lease
    known: StoredRepresentation | None
    taken_over: bool = False
    previous: Completion | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """Another worker has the job until ``until`` (seconds since the epoch)."""

    worker_id: str
    until: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """The job may be tried again at ``not_before`` (seconds since the epoch): a back-off."""

    not_before: float
    error: str


@dataclass(frozen=True, slots=True)
class Done:
    """The job is done, and recently enough for the caller."""

    completion: Completion


@dataclass(frozen=True, slots=True)
class Dead:
    """The job has no attempts left; only ``requeue`` makes it ready again."""

    attempts: int
    error: str


@dataclass(frozen=True, slots=True)
class Run:
    """The effect may be run now; ``attempt`` counts from 1."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Recover:
    """The effect was begun before and its end was not recorded: find out whether it happened, then run it.

    ``fence`` is that of the claim that began it; it can write nothing any more.
    """

    attempt: int
    fence: int


@dataclass(frozen=True, slots=True)
class Replay:
    """The effect is recorded as done; ``result`` is the JSON text that was recorded."""

    result: str


EffectStart: TypeAlias = Run | Recover | Replay
Claim: TypeAlias = Granted | Held | Waiting | Done | Dead


def _digest_of(document: Mapping[str, object]) -> str:
    try:
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:  # NaN, infinities, circles
        msg = f"a key cannot be made of this: {error}"
        raise TypeError(msg) from error
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _require_text(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, str):
            msg = f"{name} must be str, got {type(value).__name__}"
            raise TypeError(msg)


def job_key(work_id: str, artifact_id: str, canonical_url: str) -> str:
    """Return the idempotency key of a job: 64 hex digits.

    Two requests with one key are one job. Raises ``TypeError`` if an argument is not ``str``.
    """
    _require_text(work_id=work_id, artifact_id=artifact_id, url=canonical_url)
    return _digest_of(
        {
            "v": KEY_VERSION,
            "kind": "JOB",
            "work_id": work_id,
            "artifact_id": artifact_id,
            "url": canonical_url,
            "role": "artifact",
        }
    )


def operation_key(kind: str, job_id: str, **context: object) -> str:
    """Return the idempotency key of one effect of a job: 64 hex digits.

    Raises ``TypeError`` if *kind* or *job_id* is not ``str``, if *context* holds something
    JSON has no form for, or one of the names that the key itself uses.
    """
    _require_text(kind=kind, job_id=job_id)
    reserved = context.keys() & {"v", "kind", "job_id"}
    if reserved:
        msg = f"context may not name {', '.join(sorted(reserved))}"
        raise TypeError(msg)
    return _digest_of({"v": KEY_VERSION, "kind": kind, "job_id": job_id, **context})


def request_hash(method: str, url: str, body: bytes = b"") -> str:
    """Return 64 hex digits that identify a request; two of them under one key are a conflict (I18)."""
    return hashlib.sha256(
        b"\n".join((method.encode(), url.encode(), hashlib.sha256(body).digest()))
    ).hexdigest()
