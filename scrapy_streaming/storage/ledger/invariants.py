"""The invariants of a ledger, as queries for the rows that break them.

What may live here: those queries; nothing runs them here. ``docs/invariants.md`` has the invariants by
number.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import ColumnElement, Select, and_, exists, func, literal_column, not_, or_, select

from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.storage.ledger.schema import blob, completion, job, representation
from scrapy_streaming.storage.ledger.transitions import in_state

_of_generation = and_(completion.c.job_id == job.c.id, completion.c.generation == job.c.generation)
_leased, _done = in_state(JobState.LEASED), in_state(JobState.DONE)
_of_blob = blob.c.digest == job.c.digest
_many: ColumnElement[int] = literal_column("1")

#: Each violation in words, with the query that finds it; its first column identifies the row.
INVARIANTS: Final[tuple[tuple[str, Select[Any]], ...]] = (
    (
        "I1: jobs with one key",
        select(job.c.job_key).group_by(job.c.job_key).having(func.count() > _many),
    ),
    (
        "I2: jobs with one current claim",
        select(job.c.claim_id).where(_leased).group_by(job.c.claim_id).having(func.count() > _many),
    ),
    (
        "leased without a claim",
        select(job.c.job_key).where(_leased, or_(job.c.claim_id.is_(None), job.c.lease_until.is_(None))),
    ),
    (
        "I4: generations completed twice",
        select(completion.c.job_id)
        .group_by(completion.c.job_id, completion.c.generation)
        .having(func.count() > _many),
    ),
    (
        "I4: claims that completed twice",
        select(completion.c.claim_id).group_by(completion.c.claim_id).having(func.count() > _many),
    ),
    (
        "I4: done without a completion of these bytes",
        select(job.c.job_key).where(
            _done, not_(exists().where(_of_generation, completion.c.digest == job.c.digest))
        ),
    ),
    (
        "I5: done without a blob",
        select(job.c.job_key).where(
            _done, not_(exists().where(_of_blob, blob.c.size == job.c.size, blob.c.state != "deleting"))
        ),
    ),
    (
        "I5: completions without a blob",
        select(job.c.job_key)
        .join(completion, completion.c.job_id == job.c.id)
        .where(not_(exists().where(blob.c.digest == completion.c.digest))),
    ),
    (
        "representations without a blob",
        select(representation.c.digest).where(not_(exists().where(blob.c.digest == representation.c.digest))),
    ),
    (
        "completions of another size than their blob",
        select(job.c.job_key)
        .join(completion, completion.c.job_id == job.c.id)
        .join(blob, blob.c.digest == completion.c.digest)
        .where(completion.c.size != blob.c.size),
    ),
    (
        "representations of another size than their blob",
        select(representation.c.digest)
        .join(blob, blob.c.digest == representation.c.digest)
        .where(representation.c.size != blob.c.size),
    ),
    (
        "completions ahead of their job",
        select(job.c.job_key)
        .join(completion, completion.c.job_id == job.c.id)
        .where(or_(completion.c.generation > job.c.generation, completion.c.fence > job.c.fence)),
    ),
)
