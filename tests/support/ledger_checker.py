"""What must hold of a ledger, its store and its workers' log, whatever befell the workers.

What may live here: reading all rows of a ledger, and what is wrong with them, in words that begin with the
invariant broken (I1 …). Nothing here starts a process or writes anything.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, select
from sqlalchemy.pool import NullPool

from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.storage.ledger import schema
from support.worker import body, key_of

SHARD_NAME = re.compile("[0-9a-f]{64}")


def violations(
    url: str,
    root: Path,
    *,
    truth: Callable[[str], Collection[str]] | None = None,
    log: Sequence[dict[str, Any]] = (),
    forgotten: tuple[float, float] | None = None,
    most_attempts: int | None = None,
) -> list[str]:
    """Return, in words, what breaks an invariant in the ledger at *url*, the store at *root* and the *log*.

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
    """What a job's events say of it."""

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
        yield f"I1: events or completions of job {number}, of which there is no row"
    for number, count in found.claims().items():
        if most_attempts is not None and count > most_attempts:
            yield f"I13: job {number} was claimed {count} times"


def _differences(job: Any, history: _History, completions: list[tuple[int, int, str]]) -> Iterator[str]:
    yield from _more_than_once(f"I4: job {job.id} completed generation", (row[0] for row in completions))
    if completions != sorted(history.completed):
        yield f"I3: job {job.id} has completions {completions}, its events {history.completed}"
    row, from_events = (
        (job.state, job.fence, job.generation),
        (history.state, history.fence, history.generation),
    )
    if row != from_events:
        yield f"I3: job {job.id} is {row} in (state, fence, generation), by its events {from_events}"
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
    """I6: what was acknowledged is recorded; no claim was given another claim's completion."""
    keys = {job.id: job.job_key for job in found.jobs}
    recorded = {row.claim_id: (keys.get(row.job_id), row.generation, row.digest) for row in found.completions}
    for line in log:
        if line["what"] == "lost" and line["claim"] in recorded:
            yield f"rule 4: {line} was answered so although it had completed it"
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


def bound(count: int) -> str:
    """Return what 0 in *count* says of the rate (rule of three)."""
    return f"0 in {count}: below {3 / max(count, 1):.2g} with 95 % confidence"
