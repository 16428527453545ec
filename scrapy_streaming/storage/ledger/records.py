"""The values that the ledger returns, beyond those of ``protocol.jobs``.

What may live here: those values, and the texts of errors in rows, from which credentials are removed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.redaction import without_credentials

#: Characters of an error text that are stored; the log has all of it.
MAX_ERROR: Final = 2000


def safe_error(text: str) -> str:
    """Return an error text to be stored: without credentials, valid UTF-8, at most ``MAX_ERROR`` long."""
    return without_credentials(text)[:MAX_ERROR].encode("utf-8", "backslashreplace").decode("utf-8")


def damaged_row(key: str, what: object) -> LedgerError:
    """Return the error for a job whose record in the ledger is damaged (``ledger-row``)."""
    return LedgerError(f"the record of job {key} is damaged: {what}", reason="ledger-row")


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether the ledger has all that its store has.

    ``epoch`` is raised by each crawl, here and in the store. ``put_back_at`` is when the ledger was last
    found to be an older copy (seconds since 1970 by the database's clock), ``None`` if never. ``unread``:
    the store may have blobs that the ledger does not have, and they have not been read and recorded yet.
    """

    epoch: int
    put_back_at: float | None
    unread: bool


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as commands show it; times in seconds since the epoch, ``size`` in bytes.

    ``plain``: whether a plain GET of ``asked_url`` repeats the request of the last claim, ``None`` if that
    is not known. The file's name is ``asked_name``, or, if ``named_by_url``, the one that ``FilesPipeline``
    derives from ``asked_url``.
    """

    id: int
    key: str
    work_id: str
    artifact_id: str
    url: str
    state: JobState
    generation: int
    fence: int
    attempts: int
    worker_id: str | None
    lease_until: float | None
    not_before: float | None
    digest: str | None
    size: int | None
    error_code: str | None
    error: str | None
    created_at: float
    updated_at: float
    finished_at: float | None
    plain: bool | None
    asked_url: str | None
    asked_name: str | None
    named_by_url: bool

    def __post_init__(self) -> None:
        if self.error is not None:  # older releases stored what a library said as it was
            object.__setattr__(self, "error", safe_error(self.error))


@dataclass(frozen=True, slots=True)
class FailedJob:
    """A job whose last attempt failed: ``failed``, ``dead``, or ``ready`` for another attempt."""

    id: int
    key: str
    url: str
    state: JobState
    reason: str


@dataclass(frozen=True, slots=True)
class BlobRow:
    """What is recorded of a blob; ``state`` is present, deleting, quarantined or missing.

    Without ``has_file`` no blob was published: only names have the bytes.
    """

    digest: str
    size: int
    state: str
    stored_at: float
    verified_at: float | None
    has_file: bool


@dataclass(frozen=True, slots=True)
class NameRow:
    """The name that the bytes of a job's last completion were given; ``path`` below the store's root."""

    job_id: int
    path: str
    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """One recorded completion; ``claim_id`` is its id, ``path`` the name that was given to the blob."""

    generation: int
    fence: int
    claim_id: str
    digest: str
    size: int
    resumed_from: int
    path: str | None
    completed_at: float
    delivered_at: float | None


@dataclass(frozen=True, slots=True)
class OperationRow:
    """One recorded effect; ``result`` is a JSON text."""

    op_key: str
    kind: str
    state: str
    fence: int
    attempt: int
    result: str | None
    error: str | None
    updated_at: float


@dataclass(frozen=True, slots=True)
class EventRow:
    """One change of a job's state."""

    at: float
    fence: int
    from_state: str | None
    to_state: str
    claim_id: str | None
    worker_name: str | None


@dataclass(frozen=True, slots=True)
class JobDetails:
    """The records of a job in other tables, each in the order of time."""

    completions: tuple[CompletionRow, ...]
    operations: tuple[OperationRow, ...]
    history: tuple[EventRow, ...]
