"""Worker processes over one ledger and one store, what befalls them, and a checker of what they leave.

``python -m support.workers chaos --help`` (with ``tests`` on PYTHONPATH) is the long form by hand: it kills
and stops workers at random and prints the figures. ``work`` is what one worker process runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Connection, and_, bindparam, create_engine, or_, select
from sqlalchemy.pool import NullPool

from scrapy_streaming.exceptions import LeaseLost, PartCorrupt, StreamingError, WriteFailed
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.jobs import Dead, Done, Granted, JobState, Lease, StoredRepresentation
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.runtime.lease_table import LeaseTable
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import Storage
from scrapy_streaming.storage.blobs import LocalBlobStore
from scrapy_streaming.storage.finished import FinishedPart, small_part
from scrapy_streaming.storage.ledger import JobRequest, Ledger, schema, statements, verbs
from scrapy_streaming.storage.parts import PartStore
from support.launch import Forked, launch

TESTS = Path(__file__).parent.parent
STORE_ID = "0123456789abcdef"
SHARD_NAME = re.compile("[0-9a-f]{64}")


# -- the world: what a key's bytes are -------------------------------------------------------


def key_of(number: int) -> str:
    return hashlib.sha256(f"job {number}".encode()).hexdigest()


def request_of(number: int) -> JobRequest:
    return JobRequest("work", str(number), f"https://example.org/{number}", key_of(-1))


def body(number: int, version: int) -> bytes:
    """Return the bytes that a key stands for while the world is at *version*."""
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
    """Let whoever once had a job write about it while anybody has it."""
    statements.guard = lambda: _whoever(fence=False, claim=False)


def without_claim_id() -> None:
    """Guard by the fence alone."""
    statements.guard = lambda: _whoever(fence=True, claim=False)


def _whoever(*, fence: bool, claim: bool) -> Any:
    job, number, name = schema.job, bindparam("held_fence"), bindparam("held_claim")
    # both are named in any case: a statement takes no value that it does not name
    fenced = schema.job.c.fence == number if fence else job.c.fence >= number
    claimed = job.c.claim_id == name if claim else or_(job.c.claim_id == name, job.c.claim_id != name)
    return and_(job.c.id == bindparam("held_job"), statements.in_state(JobState.LEASED), fenced, claimed)


def without_second_look() -> None:
    """Take a completion whose answer was lost for one that never was."""

    def lost(_session: object, _tools: object, lease: Lease) -> None:
        raise verbs.lost(lease)

    verbs._recorded = lost


MUTANTS = {
    "guard": without_guard,
    "claim-id": without_claim_id,
    "not-looked-for": without_second_look,
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
    ``forget``: workers it takes for dead. ``poison``: keys that end its process while it holds them.
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
    forget: tuple[str, ...] = ()
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
            # all work at the same few keys, so that what one of them lets go of is taken by another soon
            wanted = self._rng.sample(pending[: self._plan.window], min(self._plan.window, len(pending)))
            held, ended = self._claim(wanted)
            ended |= self._work(held)
            pending = [number for number in pending if number not in ended]
            if not held:
                time.sleep(0.05)  # others have what is left

    def _claim(self, numbers: list[int]) -> tuple[list[tuple[int, int, Lease]], set[int]]:
        """Claim at most a batch of keys; return what was granted, with the version seen, and what is over."""
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
        """Make, publish and complete what is held; return what came to an end."""
        if not granted:
            return set()
        pause = self._rng.uniform(0, self._plan.work) / len(granted)
        ready = []
        for number, version, lease in granted:
            try:
                ready.append((number, version, lease, self._publish(number, version, lease, pause)))
            except (PartCorrupt, WriteFailed) as error:  # the new owner took the part away
                self._give_back(number, lease, error)
        self._batches += 1
        if self._batches == self._plan.freeze_before:
            self._log.write("frozen")
            with BEAT:  # not inside a transaction: that would hold up all the others
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
        return StoredRepresentation(digest, published.size, validators, url), self._blobs.relative(
            published.digest
        )

    def _download(self, state: PartState, data: bytes, lease: Lease, pause: float) -> FinishedPart:
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
    complete, count = verbs.complete, 0

    def freezing(*args: Any) -> Any:
        nonlocal count
        result = complete(*args)
        count += 1
        if count == nth:
            os.kill(os.getpid(), signal.SIGSTOP)
        return result

    verbs.complete = freezing


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
        for name in plan.forget:
            ledger.forget_worker(name).result()
        beat.start()
        Worker(plan, ledger, log).run()
        over.set()
        beat.join()
    log.write("ended")


def first_start(plan: Plan) -> None:
    """Open the store as a crawl does, complete one job of one's own, and say which ledger it was."""
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
    """As much of Scrapy's settings as is asked for."""

    def getpriority(self, name: str) -> int | None:
        return None


# -- many workers ----------------------------------------------------------------------------


@dataclass
class Process:
    """A worker process: its plan, and what it wrote to its standard error."""

    plan: Plan
    popen: Forked
    stderr: Path
    stopped: bool = False
    killed: bool = False

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def kill(self) -> None:
        self.killed = True
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> None:
        self.stopped = True
        self.popen.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.stopped = False
        if self.alive:
            self.popen.send_signal(signal.SIGCONT)

    def wait(self, seconds: float) -> int:
        """Return its exit code; raise ``TimeoutError`` if it does not end."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired as error:
            msg = f"{self.plan.name} did not end in {seconds} s: {self.stderr.read_text()[-3000:]}"
            raise TimeoutError(msg) from error


@dataclass
class Workers:
    """Worker processes that share a ledger, a store and a log below *plan.folder*; a context."""

    plan: Plan
    all: list[Process] = field(default_factory=list)
    _lines: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0

    def __post_init__(self) -> None:
        for name in ("parts", "quarantine"):
            (self.plan.root / ".streaming" / name).mkdir(parents=True, exist_ok=True)
        self.set_version(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.all:
            if process.alive:
                process.kill()

    def set_version(self, version: int) -> None:
        """Let the world move on: who claims from now on gets other bytes."""
        self.version = version
        path = Path(self.plan.folder) / "version"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(str(version))
        temporary.rename(path)

    def start(self, count: int = 1, *, mode: str = "work", **changes: Any) -> list[Process]:
        """Start workers whose plan is the common one but for *changes*; return them."""
        return [self._start_one(mode, changes) for _ in range(count)]

    def _start_one(self, mode: str, changes: dict[str, Any]) -> Process:
        plan = replace(self.plan, name=f"worker-{len(self.all)}", **changes)
        stderr = Path(self.plan.folder) / f"{plan.name}.stderr"
        popen = launch(
            "support.workers", [mode, json.dumps(asdict(plan))],
            env={**os.environ, "PYTHONPATH": str(TESTS)}, cwd=Path(self.plan.folder), output=stderr,
        )  # fmt: skip
        process = Process(plan, popen, stderr)
        self.all.append(process)
        return process

    @property
    def running(self) -> list[Process]:
        return [process for process in self.all if process.alive and not process.stopped]

    def said(self, *what: str) -> list[dict[str, Any]]:
        """Return what the workers wrote to their log, all of it or the lines that say *what*."""
        if self.plan.log.exists():
            with self.plan.log.open("rb") as stream:
                stream.seek(self._offset)
                text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offset += len(whole)
            self._lines += [json.loads(line) for line in whole.splitlines()]
        return [line for line in self._lines if not what or line["what"] in what]

    def until(self, true: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something is true; raise ``TimeoutError`` if that takes too long."""
        deadline = time.monotonic() + seconds
        while not true():
            self.check_ends()
            if time.monotonic() > deadline:
                msg = f"not within {seconds} s; {self.figures()}; {self.tails()}"
                raise TimeoutError(msg)
            time.sleep(0.01)

    def done(self) -> int:
        return len({line["number"] for line in self.said("done")})

    def wait(self, seconds: float = 90) -> None:
        """Wait until all have ended by themselves; raise if one ended badly."""
        deadline = time.monotonic() + seconds
        for process in self.all:
            process.wait(max(0.1, deadline - time.monotonic()))
        self.check_ends()

    def check_ends(self) -> None:
        """Raise ``AssertionError`` if a worker ended that nobody killed, and not well."""
        for process in self.all:
            code = process.popen.poll()
            fine = code in (None, 0) or (process.killed and code == -signal.SIGKILL)
            assert fine or process.plan.poison or process.plan.kill_in_migration, (
                f"{process.plan.name} ended with {code}: {process.stderr.read_text()[-3000:]}"
            )

    def tails(self) -> str:
        return "\n".join(text for p in self.all if (text := p.stderr.read_text()[-500:]))

    def figures(self) -> str:
        count = Counter(line["what"] for line in self.said())
        return ", ".join(f"{number} {what}" for what, number in sorted(count.items()))

    def violations(self, **how: Any) -> list[str]:
        """Return what the ledger, the store and the log say that must not be; see ``violations``."""
        how = {"url": self.plan.url, "truth": truth(self.version), "log": self.said()} | how
        return violations(root=self.plan.root, **how)


@dataclass
class Chaos:
    """Kills and stops workers at random, and starts others for the killed, until all have ended."""

    workers: Workers
    count: int
    faults: int
    share_of_stops: float = 0.5
    kills: int = 0
    stops: int = 0
    rng: random.Random = field(default_factory=random.Random)
    _asleep: list[tuple[float, Process]] = field(default_factory=list)

    def run(self, seconds: float = 120) -> None:
        """Go on for at most *faults* kills and stops; raise ``TimeoutError`` if the rest takes too long.

        Called again after that, it goes on with those there are.
        """
        workers, deadline = self.workers, time.monotonic() + seconds
        if not workers.all:
            workers.start(self.count)
        while any(process.alive for process in workers.all):
            time.sleep(self.rng.uniform(0.02, 0.25))
            self._wake()
            workers.check_ends()
            if self.rng.random() < 0.3:
                workers.set_version(workers.version + 1)
            if self.kills + self.stops < self.faults:
                self._strike()
            if time.monotonic() > deadline:
                msg = f"not done after {seconds} s: {workers.figures()}; {workers.tails()}"
                raise TimeoutError(msg)
        workers.check_ends()

    def _wake(self) -> None:
        for wakes_at, process in list(self._asleep):
            if time.monotonic() >= wakes_at:
                process.go_on()
                self._asleep.remove((wakes_at, process))

    def _strike(self) -> None:
        """Hit one that has claimed something, so that no row of faults can keep the work from going on."""
        holding = {line["worker"] for line in self.workers.said("granted")}
        struck = [process for process in self.workers.running if process.plan.name in holding]
        if not struck:
            return
        victim = self.rng.choice(struck)
        if len(self._asleep) >= self.count - 1:
            return
        if self.rng.random() >= self.share_of_stops:
            victim.kill()
            self.kills += 1
            # the heir takes somebody for dead: the one that is, at times one that is alive, or nobody
            gone = self.rng.choice([(victim.plan.name,), (self.rng.choice(struck).plan.name,), ()])
            self.workers.start(forget=gone)
        else:
            victim.stop()
            self.stops += 1
            lease = victim.plan.lease
            self._asleep.append((time.monotonic() + self.rng.uniform(1.1, 2.5) * lease, victim))


def bound(count: int) -> str:
    """Return what 0 in *count* says of the rate (rule of three)."""
    return f"0 in {count}: below {3 / max(count, 1):.2g} with 95 % confidence"


# -- the checker -----------------------------------------------------------------------------


def violations(
    url: str,
    root: Path,
    *,
    truth: Callable[[str], Collection[str]] | None = None,
    log: Sequence[dict[str, Any]] = (),
    forgotten: tuple[float, float] | None = None,
    most_attempts: int | None = None,
) -> list[str]:
    """Return, in words, what is wrong in the ledger at *url*, the store at *root* and the *log*.

    *truth* gives the digests that a job's URL ever stood for. What was committed between the two
    times of *forgotten* may be gone: the ledger was put back meanwhile. *most_attempts*: claims that
    a job may have (I13).
    """
    found = _Found(url)
    return [
        *_histories(found, most_attempts),
        *_blobs(found, root),
        *_contents(found, truth),
        *_acknowledgements(found, log, forgotten),
    ]


class _Found:
    """All rows of a ledger."""

    def __init__(self, url: str) -> None:
        engine = create_engine(url, poolclass=NullPool)
        with engine.connect() as connection:
            self.jobs = connection.execute(select(schema.job)).all()
            self.blobs = {row.digest: row for row in connection.execute(select(schema.blob))}
            self.completions = connection.execute(select(schema.completion)).all()
            self.events = connection.execute(select(schema.event).order_by(schema.event.c.id)).all()
            self.metas = connection.execute(select(schema.meta)).all()
        engine.dispose()

    def claims(self) -> Counter[int]:
        """Return how often each job was claimed."""
        return Counter(row.job_id for row in self.events if row.to_state == JobState.LEASED)


def claims(url: str) -> Counter[int]:
    """Return how often each job was claimed, by its number in the ledger."""
    return _Found(url).claims()


def states(url: str) -> Counter[str]:
    """Return how many jobs are in each state."""
    return Counter(row.state for row in _Found(url).jobs)


@dataclass
class _History:
    """A job as its events tell it."""

    state: str | None = None
    fence: int = 0
    claim: str | None = None
    generation: int = 1
    completed: list[tuple[int, int, str | None]] = field(default_factory=list)

    def follow(self, event: Any) -> Iterator[str]:
        """Take the next event; give what it breaks."""
        said = f"event {event.id} of job {event.job_id}, {event.from_state} to {event.to_state}"
        if event.from_state != self.state:
            yield f"I19: {said}: the job was {self.state}"
        if event.to_state == JobState.LEASED or event.claim_id is None:  # a claim, or a requeue
            if event.fence <= self.fence:
                yield f"I2: {said}: fence {event.fence} after {self.fence}"
            if event.from_state == JobState.DONE:
                self.generation += 1
            self.fence, self.claim = event.fence, event.claim_id
        elif (event.fence, event.claim_id) != (self.fence, self.claim):
            yield f"I3: {said}: under the stale fence {event.fence}, the holder's was {self.fence}"
        if event.to_state == JobState.DONE:
            self.completed.append((self.generation, event.fence, event.claim_id))
        self.state = event.to_state


def _histories(found: _Found, most_attempts: int | None) -> Iterator[str]:
    """I1 to I4, I13, I19: each job's row and completions are what its events lead to."""
    yield from _more_than_once("I1: the key", (row.job_key for row in found.jobs))
    if len(found.metas) != 1:
        yield f"I20: {len(found.metas)} rows say which ledger this is"
    events, completions = defaultdict(list), defaultdict(list)
    for event in found.events:
        events[event.job_id].append(event)
    for row in found.completions:
        completions[row.job_id].append((row.generation, row.fence, row.claim_id))
    for job in found.jobs:
        history = _History()
        for event in events.pop(job.id, []):
            yield from history.follow(event)
        yield from _differences(job, history, sorted(completions.pop(job.id, [])))
    for number in [*events, *completions]:
        yield f"I1: events or completions of job {number}, which there is not"
    for number, count in found.claims().items():
        if most_attempts is not None and count > most_attempts:
            yield f"I13: job {number} was claimed {count} times"


def _differences(job: Any, history: _History, completions: list[tuple[int, int, str]]) -> Iterator[str]:
    yield from _more_than_once(f"I4: job {job.id} completed generation", (row[0] for row in completions))
    if completions != sorted(history.completed):
        yield f"I3: job {job.id} has completions {completions}, its events {history.completed}"
    row, told = (job.state, job.fence, job.generation), (history.state, history.fence, history.generation)
    if row != told:
        yield f"I3: job {job.id} is {row} in (state, fence, generation), by its events {told}"
    if job.state == JobState.LEASED and job.claim_id != history.claim:
        yield f"I2: job {job.id} is held by a claim that is not its last"


def _blobs(found: _Found, root: Path) -> Iterator[str]:
    """I5, I17: done means present, present means there, and a blob's name is its bytes' hash."""
    there = {}
    for path in (root / "blobs").rglob("*"):
        if SHARD_NAME.fullmatch(path.name):
            data = path.read_bytes()
            there[f"sha256:{path.name}"] = len(data)
            if hashlib.sha256(data).hexdigest() != path.name:
                yield f"I5: the blob {path.name} does not hold what its name says"
    for row in found.blobs.values():
        if row.state == "present" and there.get(row.digest) != row.size:
            yield f"I5: {row.digest} is recorded with {row.size} bytes, on disk {there.get(row.digest)}"
    for job in found.jobs:
        blob = found.blobs.get(job.digest)
        if job.state == JobState.DONE and (blob is None or (blob.state, blob.size) != ("present", job.size)):
            yield f"I5: job {job.id} is done with {job.digest}, which is no blob that is present"


def _contents(found: _Found, truth: Callable[[str], Collection[str]] | None) -> Iterator[str]:
    """What is done is done with bytes that the URL once stood for, those of its last completion."""
    urls = {job.id: job.url for job in found.jobs}
    last = {(row.job_id, row.generation): row for row in found.completions}
    if truth is not None:
        for row in found.completions:
            url = urls.get(row.job_id)
            if url is None or row.digest not in truth(url):
                yield f"I10: job {row.job_id} was completed with {row.digest}, which {url} never was"
    for job in found.jobs:
        completed = last.get((job.id, job.generation))
        if job.state == JobState.DONE and (completed is None or completed.digest != job.digest):
            yield f"I4: job {job.id} is done with {job.digest}, its completion says {completed}"


def _acknowledgements(
    found: _Found, log: Iterable[dict[str, Any]], forgotten: tuple[float, float] | None
) -> Iterator[str]:
    """I6: what was acknowledged is recorded; nobody was given another's completion for its own."""
    keys = {job.id: job.job_key for job in found.jobs}
    recorded = {row.claim_id: (keys.get(row.job_id), row.generation, row.digest) for row in found.completions}
    for line in log:
        if line["what"] == "lost" and line["claim"] in recorded:
            yield f"rule 4: {line} was told so of what it had completed"
        if line["what"] != "done":
            continue
        said = (key_of(line["number"]), line["generation"], line["digest"])
        expected = str(Digest(hashlib.sha256(body(line["number"], line["version"])).hexdigest()))
        if line["completion"] != line["claim"] or line["digest"] != expected:
            yield f"I9: {line} is not what this claim completed ({expected})"
        # its COMMIT came between the completion's own time and the answer
        may_be_gone = forgotten and forgotten[0] <= line["at"] and line["completed"] <= forgotten[1]
        if recorded.get(line["claim"]) != said and not (may_be_gone and line["claim"] not in recorded):
            yield f"I6: {line} was acknowledged, recorded is {recorded.get(line['claim'])}"


def _more_than_once(what: str, values: Iterable[Any]) -> Iterator[str]:
    for value, count in Counter(values).items():
        if count > 1:
            yield f"{what} {value} is there {count} times"


# -- by hand ---------------------------------------------------------------------------------


def chaos(arguments: argparse.Namespace) -> int:
    """Run F2 and print its figures; the exit code says whether there were violations."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = f"sqlite:///{folder / 'ledger.sqlite3'}"
        if arguments.database == "postgres":
            from support.postgres import postgres

            url = stack.enter_context(postgres(folder)).create()
        plan = Plan(url, str(folder), keys=arguments.jobs, mutant=arguments.mutant)
        workers = stack.enter_context(Workers(plan))
        run = Chaos(workers, arguments.workers, arguments.faults, rng=random.Random(arguments.seed))
        began = time.monotonic()
        run.run(arguments.seconds)
        wrong = workers.violations()
        print(report(run, wrong), f"; {time.monotonic() - began:.0f} s", sep="")
        print(*wrong[:20], sep="\n")
        return 1 if wrong else 0


def report(run: Chaos, wrong: list[str]) -> str:
    """Return the figures of a run."""
    granted = len(run.workers.said("granted"))
    found = f"{len(wrong)} violations" if wrong else f"0 violations ({bound(granted)} of a claim)"
    return f"{run.kills} kills, {run.stops} stops; {run.workers.figures()}; {found}"


def main(arguments: list[str]) -> int:
    if arguments[:1] in (["work"], ["first-start"]):
        plan = json.loads(arguments[1])
        plan = Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in plan.items()})
        {"work": work, "first-start": first_start}[arguments[0]](plan)
        return 0
    parser = argparse.ArgumentParser(prog="python -m support.workers")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("chaos", help="workers that are killed and stopped at random (F2)")
    command.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    command.add_argument("--workers", type=int, default=8)
    command.add_argument("--jobs", type=int, default=600)
    command.add_argument("--faults", type=int, default=200, help="kills and stops at most")
    command.add_argument("--seconds", type=float, default=600)
    command.add_argument("--seed", type=int)
    command.add_argument("--mutant", default="", help="guard, claim-id or one of support.mutants")
    command.set_defaults(run=chaos)
    found = parser.parse_args(arguments)
    return int(found.run(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
