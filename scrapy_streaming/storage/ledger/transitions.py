"""The table of transitions (``protocol.jobs``) as SQL: conditions on states, and the columns that change.

What may live here: all that decides between which states a job changes.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import ColumnElement, case, literal_column, or_

from scrapy_streaming.protocol.jobs import TRANSITIONS, JobEvent, JobState, transition
from scrapy_streaming.storage.ledger.schema import job


def in_state(state: JobState) -> ColumnElement[bool]:
    """Return ``state = '…'`` with a literal: a bound value would not match the partial indexes."""
    return job.c.state == literal_column(f"'{state.value}'")


def origins(*events: JobEvent) -> dict[JobState, JobEvent]:
    """Return the states in which the table of transitions has one of *events*, each with it."""
    return {state: event for state, event in TRANSITIONS if event in events}


def may(event: JobEvent) -> ColumnElement[bool]:
    """Return the condition that *event* is possible in a job's state."""
    return or_(*(in_state(state) for state in origins(event)))


def changed(event: JobEvent) -> dict[str, Any]:
    """Return the columns that *event* sets on a job, by the table; raise ``ValueError`` if states differ.

    The table leaves to SQL: back-offs, leases and ages, on which a claim depends beside the state, and
    that an imported completion makes a job done (``carrying``).
    """
    [change] = {transition(state, event) for state in origins(event)}
    values: dict[str, Any] = {"state": change.to.value, "claim_id": None, "lease_until": None}
    for name in ("fence", "generation"):
        if step := getattr(change, name):
            values[name] = job.c[name] + step
    if change.attempts:
        values["attempts"] = case(
            (job.c.attempts + change.attempts < 0, 0), else_=job.c.attempts + change.attempts
        )
    return values


#: The events by which a claim takes a job. One that has ended is refreshed and claimed with one new fence.
TAKING: Final = (JobEvent.CLAIM, JobEvent.REFRESH)


def claim_step(name: str) -> Any:
    """Return what a claim adds to the counter *name* of the job that it takes."""
    steps = {state: getattr(transition(state, event), name) for state, event in origins(*TAKING).items()}
    if len(set(steps.values())) == 1:
        return next(iter(steps.values()))
    return case(*((in_state(state), step) for state, step in steps.items() if step), else_=0)
