"""P6: the ledger alone. CPU of claim + complete a job, latency of a claim, bytes a job, time to open."""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Row
from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.jobs import Granted, StoredRepresentation, job_key
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.ledger import JobRequest, Ledger, Repeat

IN_FLIGHT = 64
#: Jobs measured at each size, after as many that are not.
SAMPLE = 4096
VALIDATORS = Validators(
    EntityTag("5f3a-1234"), "Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT"
)


def run(*, quick: bool, pairs: int, only: str) -> list[Row]:
    """Fill one ledger to 10³ … 10⁶ jobs (quick: 10⁴) and measure at each size; the peer is its smallest."""
    del pairs
    sizes = [10**n for n in range(3, 5 if quick else 7)]
    if only and only not in "ledger":
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite3"
        jobs, rows, first = _jobs(), [], 0.0
        done = 0
        for size in sizes:
            done += _fill(path, jobs, size - SAMPLE - done)
            cpu, alone, together = _measure(path, jobs)
            done += SAMPLE + IN_FLIGHT * 4
            opened = _open_time(path)
            first = first or cpu
            row = Row(f"ledger, {size:,} jobs", "at its smallest", "≤ 0.3 ms CPU, ± 10 %")
            row.note = (
                f"{cpu:.3f} ms CPU a job, {cpu / first:.2f} x the smallest; claim p99 {together:.1f} ms at "
                f"{IN_FLIGHT} in flight, {alone:.1f} ms alone; open {opened:.3f} s; "
                f"{_bytes(path) / done:.0f} bytes a job"
            )
            print(row.name, row.note, flush=True)
            rows.append(row)
    return rows


def _jobs() -> Iterator[tuple[str, JobRequest, StoredRepresentation]]:
    number = 0
    while True:
        url = f"https://files.example.org/archive/2024/document-{number:07d}.pdf"
        digest = hashlib.sha256(url.encode()).hexdigest()
        request = JobRequest("documents", "", url, digest, Repeat(plain=True, url=url, name=""))
        known = StoredRepresentation(
            f"sha256:{digest}", 65536, VALIDATORS, url, "application/pdf", ("accept-encoding",)
        )
        yield job_key("documents", "", url), request, known
        number += 1


def _open(path: Path) -> Ledger:
    return Ledger.open(f"sqlite:///{path}", store_id="benchmark", worker_id="benchmark")


def _round(
    ledger: Ledger, jobs: Iterator[tuple[str, JobRequest, StoredRepresentation]], count: int
) -> list[float]:
    """Claim and complete *count* jobs at once; return the seconds that each claim took."""
    asked = []
    for key, request, known in (next(jobs) for _ in range(count)):
        started = time.perf_counter()
        future = ledger.claim(key, request)
        took: list[float] = []
        future.add_done_callback(lambda _, s=started, t=took: t.append(time.perf_counter() - s))
        asked.append((future, known, took))
    completed = []
    for future, known, _ in asked:
        claim = future.result()
        if not isinstance(claim, Granted):
            msg = f"not granted: {claim}"
            raise TypeError(msg)
        name = hashlib.sha1(known.final_url.encode(), usedforsecurity=False).hexdigest()
        completed.append(ledger.complete(claim.lease, known, path=f"full/{name}.pdf"))
    for completion in completed:
        completion.result()
    return [took[0] for _, _, took in asked]


def _fill(path: Path, jobs: Iterator[tuple[str, JobRequest, StoredRepresentation]], count: int) -> int:
    with _open(path) as ledger:
        for _ in range(0, count, IN_FLIGHT):
            _round(ledger, jobs, IN_FLIGHT)
    return max(0, -(-count // IN_FLIGHT) * IN_FLIGHT)


def _measure(
    path: Path, jobs: Iterator[tuple[str, JobRequest, StoredRepresentation]]
) -> tuple[float, float, float]:
    """Return ms CPU a job, and the p99 of a claim in ms: one at a time, and many at once."""
    with _open(path) as ledger:
        alone = [_round(ledger, jobs, 1)[0] for _ in range(IN_FLIGHT * 4)]
        took: list[float] = []
        before = time.process_time()
        for _ in range(SAMPLE // IN_FLIGHT):
            took += _round(ledger, jobs, IN_FLIGHT)
        cpu = (time.process_time() - before) / SAMPLE
    return cpu * 1000, _p99(alone), _p99(took)


def _p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98] * 1000


def _open_time(path: Path) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        ledger = _open(path)
        times.append(time.perf_counter() - started)
        ledger.close()
    return statistics.median(times)


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.iterdir())
