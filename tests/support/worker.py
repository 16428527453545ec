"""One worker process over a ledger and a store: its plan, its log, its work, and what is broken in it.

What may live here: what runs inside the process that ``support.workers`` starts, what each key's bytes
are, and the safeguards that a process is run without. ``python -m support.worker work PLAN`` is one worker,
``first-start PLAN`` opens the store as a crawl does; PLAN is the JSON text of a ``Plan``.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, and_, bindparam, or_

from scrapy_streaming.exceptions import LeaseLost, PartCorrupt, StreamingError, WriteFailed
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.jobs import Dead, Done, Granted, JobState, Lease, StoredRepresentation
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.runtime.lease_table import LeaseTable
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.blobs import blob_key
from scrapy_streaming.storage.blobs.local import LocalBlobStore
from scrapy_streaming.storage.complete_part import CompletePart, small_part
from scrapy_streaming.storage.ledger import JobRequest, Jobs, Ledger, schema, statements
from scrapy_streaming.storage.ledger.recording import lease_lost
from scrapy_streaming.storage.parts import PartStore
from scrapy_streaming.storage.store import Storage

STORE_ID = "0123456789abcdef"


# -- what each key's bytes are ----------------------------------------------------------------


def key_of(number: int) -> str:
    return hashlib.sha256(f"job {number}".encode()).hexdigest()


def request_of(number: int) -> JobRequest:
    return JobRequest("work", str(number), f"https://example.org/{number}", key_of(-1))


def body(number: int, version: int) -> bytes:
    """Return the bytes that a key stands for at *version*."""
    rng = random.Random(f"{number} of {version}")
    return f"{number} of {version}\n".encode() + rng.randbytes(rng.randrange(100, 5000))


def truth(versions: int) -> Callable[[str], set[str]]:
    """Return what gives, for a job's URL, the digests of all bytes that it ever stood for."""

    def digests(url: str) -> set[str]:
        number = int(url.rpartition("/")[2])
        return {str(Digest(hashlib.sha256(body(number, v)).hexdigest())) for v in range(1, versions + 1)}

    return digests


# -- mutants ---------------------------------------------------------------------------------


def without_guard() -> None:
    """Let every claim that a job ever had write about it while any claim holds it."""
    statements.guard = lambda: _any_claim(fence=False, claim=False)


def without_claim_id() -> None:
    """Guard by the fence alone."""
    statements.guard = lambda: _any_claim(fence=True, claim=False)


def _any_claim(*, fence: bool, claim: bool) -> Any:
    job, number, name = schema.job, bindparam("held_fence"), bindparam("held_claim")
    # both are named in any case: a statement refuses a value that it does not name
    fenced = schema.job.c.fence == number if fence else job.c.fence >= number
    claimed = job.c.claim_id == name if claim else or_(job.c.claim_id == name, job.c.claim_id != name)
    return and_(job.c.id == bindparam("held_job"), statements.in_state(JobState.LEASED), fenced, claimed)


def without_lookup_of_own_completion() -> None:
    """Take a completion whose answer was lost for one that never was."""

    def lost(_ledger: object, _session: object, lease: Lease) -> None:
        raise lease_lost(lease)

    Jobs._recorded = lost


MUTANTS = {
    "guard": without_guard,
    "claim-id": without_claim_id,
    "not-looked-for": without_lookup_of_own_completion,
}


def apply_mutant(name: str) -> None:
    """Take a safeguard out: one of those above, or of ``support.mutants``."""
    if name in MUTANTS:
        MUTANTS[name]()
    elif name:
        from support.mutants import apply

        apply(name)


class Unfenced:
    """An add-on for crawls: neither the ledger's guard nor their own clock keeps them from writing."""

    def update_settings(self, settings: object) -> None:
        without_guard()
        LeaseTable.is_valid = lambda self, lease: True
        LeaseTable.renew = lambda self, snapshot, asked_at, still: []


# -- one worker ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a worker process does; times in seconds.

    ``work``: how long a batch of claims takes at most; ``window``: among how many keys it chooses.
    ``skew``: its clock is so much ahead, from ``jump_at`` seconds of its life on by ``jump`` more.
    ``presumed_dead``: workers whose leases it ends. ``poison``: keys that end its process when claimed.
    ``freeze_before``: it stops itself, as SIGSTOP does, before its n-th batch is completed;
    ``freeze_inside``: in the transaction of its n-th completion. ``gate``: a file it waits for.
    """

    url: str
    folder: str
    name: str = "worker"
    keys: int = 100
    lease: float = 1.0
    max_attempts: int = 1000
    batch: int = 3
    window: int = 20
    work: float = 0.4
    skew: float = 0.0
    jump: float = 0.0
    jump_at: float = 0.0
    mutant: str = ""
    presumed_dead: tuple[str, ...] = ()
    poison: tuple[int, ...] = ()
    freeze_before: int = 0
    freeze_inside: int = 0
    gate: str = ""
    kill_in_migration: bool = False

    @property
    def root(self) -> Path:
        return Path(self.folder) / "store"

    @property
    def log(self) -> Path:
        return Path(self.folder) / "acknowledged"

    def clock(self) -> Callable[[], float] | None:
        if not (self.skew or self.jump):
            return None
        began = time.monotonic()

        def now() -> float:
            jumped = self.jump if time.monotonic() - began >= self.jump_at else 0.0
            return time.time() + self.skew + jumped

        return now


class Log:
    """Lines that outlive the process: one write each, appended by the kernel."""

    def __init__(self, plan: Plan) -> None:
        self._fd = os.open(plan.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._name = plan.name

    def write(self, what: str, **about: Any) -> None:
        line = json.dumps({"what": what, "worker": self._name, "at": time.time(), **about})
        os.write(self._fd, f"{line}\n".encode())


#: Held while a worker's leases are renewed.
BEAT = threading.Lock()


class Worker:
    """Works its keys until each is done or dead: claim some, make their bytes, publish, complete."""

    def __init__(self, plan: Plan, ledger: Ledger, log: Log) -> None:
        own = plan.root / ".streaming"
        self._plan, self._ledger, self._log = plan, ledger, log
        self._blobs = LocalBlobStore(plan.root, own / "quarantine", fsync=False)
        self._parts = PartStore(own / "parts", fsync=False, checkpoint_bytes=500)
        self._rng = random.Random()
        self._batches = 0

    def run(self) -> None:
        pending = list(range(self._plan.keys))
        while pending:
            # all work at the same few keys, so that a key that one worker gives up is soon claimed by another
            wanted = self._rng.sample(pending[: self._plan.window], min(self._plan.window, len(pending)))
            held, ended = self._claim(wanted)
            ended |= self._work(held)
            pending = [number for number in pending if number not in ended]
            if not held:
                time.sleep(0.05)  # others have what is left

    def _claim(self, numbers: list[int]) -> tuple[list[tuple[int, int, Lease]], set[int]]:
        """Claim a batch of keys at most; return the grants with their version, and the keys that are over."""
        version = int((Path(self._plan.folder) / "version").read_text())
        granted: list[tuple[int, int, Lease]] = []
        over: set[int] = set()
        while numbers and len(granted) < self._plan.batch:
            some, numbers = numbers[: self._plan.batch], numbers[self._plan.batch :]
            self._claim_some(some, version, granted, over)
        return granted, over

    def _claim_some(
        self, numbers: list[int], version: int, granted: list[tuple[int, int, Lease]], over: set[int]
    ) -> None:
        asked = [(number, self._ledger.claim(key_of(number), request_of(number))) for number in numbers]
        for number, answer in [(number, future.result()) for number, future in asked]:
            if isinstance(answer, Granted):
                lease = answer.lease
                granted.append((number, version, lease))
                self._log.write("granted", number=number, **_named(lease), version=version)
                if number in self._plan.poison:
                    os._exit(7)
            elif isinstance(answer, Done | Dead):
                over.add(number)

    def _work(self, granted: list[tuple[int, int, Lease]]) -> set[int]:
        """Make, publish and complete what is held; return the keys that are done."""
        if not granted:
            return set()
        pause = self._rng.uniform(0, self._plan.work) / len(granted)
        ready = []
        for number, version, lease in granted:
            try:
                ready.append((number, version, lease, self._publish(number, version, lease, pause)))
            except (PartCorrupt, WriteFailed) as error:  # the new owner removed the part
                self._give_back(number, lease, error)
        self._batches += 1
        if self._batches == self._plan.freeze_before:
            self._log.write("frozen")
            with BEAT:  # not inside a transaction: that would block all other workers
                os.kill(os.getpid(), signal.SIGSTOP)
        futures = [self._ledger.complete(lease, known, path=path) for _, _, lease, (known, path) in ready]
        return {
            number
            for (number, version, lease, _), future in zip(ready, futures, strict=True)
            if self._acknowledge(number, version, lease, future)
        }

    def _acknowledge(self, number: int, version: int, lease: Lease, future: Any) -> bool:
        try:
            completion = future.result()
        except LeaseLost:
            self._log.write("lost", number=number, **_named(lease))
            return False
        self._log.write(
            "done", number=number, **_named(lease), version=version, digest=completion.known.digest,
            completion=completion.completion_id, completed=completion.completed_at,
        )  # fmt: skip
        self._parts.discard(lease.job_key, lease.fence)
        return True

    def _give_back(self, number: int, lease: Lease, error: StreamingError) -> None:
        with suppress(LeaseLost):
            self._ledger.release(lease).result()
        self._log.write("gave back", number=number, **_named(lease), error=str(error))

    def _publish(
        self, number: int, version: int, lease: Lease, pause: float
    ) -> tuple[StoredRepresentation, str]:
        """Store the key's bytes as it was when claimed: half of the keys by way of a part on disk."""
        data, url = body(number, version), request_of(number).url
        validators = Validators(EntityTag(f"v{version}"), None, None)
        state = PartState(url, validators, total=len(data))
        if number % 2:
            time.sleep(pause)
            part = small_part(state, data)
        else:
            part = self._download(state, data, lease, pause)
        published = self._blobs.publish(part)
        digest = str(published.digest)
        return StoredRepresentation(digest, published.size, validators, url), blob_key(published.digest)

    def _download(self, state: PartState, data: bytes, lease: Lease, pause: float) -> CompletePart:
        found = [
            part
            for part in self._parts.find(lease.job_key)
            if part.state.validators == state.validators and not part.state.whole
        ]
        if found:
            writer = self._parts.reopen(found[0], lease.fence)
        else:
            writer = self._parts.create(lease.job_key, lease.fence, state)
        try:
            step = max(1, (len(data) - writer.length) // 4)
            for at in range(writer.length, len(data), step):
                time.sleep(pause / 4)
                writer.write(data[at : at + step])
        except BaseException:  # raised again: the part is closed first, as a crawl does
            writer.close()
            raise
        return writer.finish()


def _named(lease: Lease) -> dict[str, Any]:
    return {"generation": lease.generation, "fence": lease.fence, "claim": lease.claim_id}


def _freeze_inside(nth: int) -> None:
    """Have the process stop itself in the transaction of its *nth* completion, after its writes."""
    complete, count = Jobs._completed, 0

    def freezing(*args: Any) -> Any:
        nonlocal count
        result = complete(*args)
        count += 1
        if count == nth:
            os.kill(os.getpid(), signal.SIGSTOP)
        return result

    Jobs._completed = freezing


def _kill_in_migration() -> None:
    """Have the process die at some moment while it makes the tables."""
    execute, left = Connection.execute, random.randrange(14)
    create_all = schema.metadata.create_all

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return execute(*args, **kwargs)

    def watched(connection: Connection, *args: Any, **kwargs: Any) -> None:
        Connection.execute = dying
        create_all(connection, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)  # all made, nothing committed

    schema.metadata.create_all = watched


def _wait_for_gate(plan: Plan) -> None:
    while plan.gate and not Path(plan.gate).exists():
        time.sleep(0.001)


def work(plan: Plan) -> None:
    """Run one worker to its end."""
    apply_mutant(plan.mutant)
    if plan.freeze_inside:
        _freeze_inside(plan.freeze_inside)
    log = Log(plan)
    log.write("started", pid=os.getpid())
    _wait_for_gate(plan)
    ledger = Ledger.open(
        plan.url,
        store_id=STORE_ID,
        worker_id=plan.name,
        lease_seconds=plan.lease,
        max_attempts=plan.max_attempts,
        clock=plan.clock(),
    )
    over = threading.Event()

    def heartbeat() -> None:
        while not over.wait(plan.lease / 4):
            with BEAT, suppress(StreamingError):
                ledger.renew().result()

    beat = threading.Thread(target=heartbeat, daemon=True)
    with ledger:
        for name in plan.presumed_dead:
            ledger.end_worker_leases(name).result()
        beat.start()
        Worker(plan, ledger, log).run()
        over.set()
        beat.join()
    log.write("ended")


def first_start(plan: Plan) -> None:
    """Open the store as a crawl does, complete one job, and log which ledger it was."""
    if plan.kill_in_migration:
        _kill_in_migration()
    log = Log(plan)
    log.write("started", pid=os.getpid())
    settings = StreamingSettings.load(
        _Settings({"FILES_STORE": str(plan.root), "STREAMING_DATABASE_URL": plan.url}), {}
    )
    _wait_for_gate(plan)
    with closing(Storage.open(settings)) as storage:
        number = int(plan.name.rpartition("-")[2])
        answer = storage.ledger.claim(key_of(number), request_of(number)).result()
        assert isinstance(answer, Granted), answer
        part = small_part(PartState(request_of(number).url, Validators()), body(number, 1))
        published = storage.blobs.publish(part)
        known = StoredRepresentation(
            str(published.digest), published.size, Validators(), request_of(number).url
        )
        completion = storage.ledger.complete(answer.lease, known).result()
        log.write(
            "done", number=number, **_named(answer.lease), version=1, digest=completion.known.digest,
            completion=completion.completion_id, completed=completion.completed_at,
            ledger=storage.ledger.ledger_id, store=storage.store_id,
        )  # fmt: skip


class _Settings(dict[str, Any]):
    """As much of Scrapy's settings as ``StreamingSettings.load`` reads."""

    def getpriority(self, name: str) -> int | None:
        return None


def main(arguments: list[str]) -> None:
    mode, text = arguments
    plan = {
        name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()
    }
    {"work": work, "first-start": first_start}[mode](Plan(**plan))


if __name__ == "__main__":
    main(sys.argv[1:])
