"""List the jobs, one a line.

Columns: key, state, attempts, size in bytes, URL. The state `ready` includes jobs whose
worker no longer runs.

Examples:
  scrapy streaming ls --state failed
  scrapy streaming ls --json | head
"""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Final

from scrapy_streaming.cli.output import ExitCode, write_json_line, write_row
from scrapy_streaming.cli.registry import Invocation, Verb, option
from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.ledger import JobView, Queries
from scrapy_streaming.storage.store import view_of
from scrapy_streaming.storage.workers import running_workers

STATES: Final = ("ready", "leased", "done", "failed", "dead")
#: Jobs read from the ledger at a time.
PAGE: Final = 1000


def list_jobs(invocation: Invocation) -> int:
    """Print a line for each job."""
    state = None if invocation.options.state is None else JobState(invocation.options.state)
    with view_of(invocation.settings) as store:
        jobs: Iterable[JobView] = _jobs(store.ledger, state)
        if state is JobState.READY:
            may_run = _may_run(invocation.settings)
            abandoned = (job for job in _jobs(store.ledger, JobState.LEASED) if not may_run(job))
            jobs = chain(jobs, abandoned)
        for job in jobs:
            if invocation.as_json:
                write_json_line(dataclasses.asdict(job))
            else:
                write_row(job.key, job.state, job.attempts, job.size, job.url)
    return ExitCode.FINE


def _jobs(ledger: Queries, state: JobState | None) -> Iterator[JobView]:
    after = 0
    while page := ledger.jobs(state, after=after, limit=PAGE).result():
        after = page[-1].id
        yield from page


def _may_run(settings: StreamingSettings) -> Callable[[JobView], bool]:
    """Return whether a leased job's worker may still run: on this machine its lock says so."""
    running: set[str] = set()
    if settings.directory is not None:
        running.update(running_workers(settings.directory / "workers"))
    host, now = socket.gethostname(), time.time()

    def may_run(job: JobView) -> bool:
        worker = job.worker_id or ""
        ended = worker.rsplit("-", 2)[0] == host and worker not in running
        return not ended and (job.lease_until or 0) > now

    return may_run


VERB = Verb(list_jobs, (option("--state", choices=STATES, help="only jobs in this state"),))
