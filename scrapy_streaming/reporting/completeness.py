"""Whether all jobs are done: the verdict over the number of jobs in each state.

What may live here: the verdicts and their words.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from scrapy_streaming.protocol.jobs import JobState


class Completeness(Enum):
    """The verdicts; ``check`` has an exit code for each."""

    DONE = "done"
    UNFINISHED = "unfinished"
    FAILED = "failed"


def completeness_of(counts: Mapping[JobState, int]) -> tuple[Completeness, str]:
    """Return the verdict and its words.

    While some jobs may still be done the verdict is ``UNFINISHED``, also if others have failed.
    """
    total = sum(counts.values())
    open_jobs = counts[JobState.READY] + counts[JobState.LEASED]
    ended = counts[JobState.FAILED] + counts[JobState.DEAD]
    if open_jobs:
        return Completeness.UNFINISHED, f"{open_jobs} of {total} jobs may still come"
    if ended:
        why = "`scrapy streaming failures` says why"
        return Completeness.FAILED, f"{ended} of {total} jobs failed or are dead: {why}"
    return Completeness.DONE, f"all {total} jobs are done"
