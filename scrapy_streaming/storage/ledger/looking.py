"""Look at a ledger and change nothing: no row, no file, no worker, no schema.

What may live here: questions that people and programs ask beside crawls, each answered by one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy import ColumnElement, Connection, and_, func, inspect, or_, select
from sqlalchemy.exc import DBAPIError

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.storage.ledger.database import Database
from scrapy_streaming.storage.ledger.schema import SCHEMA_VERSION, job, meta

#: Rows that are fetched at once.
AT_ONCE: Final = 1000
#: The reason of a failed job for which an older release noted none.
UNNOTED: Final = "unknown"


@dataclass(frozen=True, slots=True)
class FailedJob:
    """A job that failed the last time it was tried: ``failed``, ``dead``, or ``ready`` for another try."""

    key: str
    url: str
    state: JobState
    reason: str


class LedgerLook:
    """A context on a ledger that is there. All calls block; each answer is of one moment.

    Raises ``LedgerError``: ``ledger-missing``, ``ledger-foreign``, ``ledger-older`` (``migrate`` brings
    it forward), ``ledger-newer``, or what the database says.
    """

    def __init__(self, database: Database, store_id: str | None) -> None:
        self._database = database
        self._store_id = store_id
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        try:
            reader: AbstractContextManager[Connection] = self._database.reader()
            self._connection = self._opened.enter_context(reader)
            self._check()
        except BaseException as error:
            self._opened.close()
            raise self._known(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()
        if error is not None and (known := self._known(error)) is not error:
            raise known from error

    def _known(self, error: BaseException) -> BaseException:
        """Return the package's error for one of the database's."""
        ours = (DBAPIError, OSError, UnicodeDecodeError, self._database.dialect.loaded_dbapi.Error)
        if isinstance(error, BrokenPipeError):  # of whoever reads what is printed
            return error
        return self._database.translate(error) if isinstance(error, ours) else error

    def _check(self) -> None:
        if not inspect(self._connection).has_table(meta.name):
            msg = "there is no ledger yet"
            raise LedgerError(msg, reason="ledger-missing")
        found = self._connection.execute(select(meta.c.schema_version, meta.c.store_id)).one_or_none()
        if found is None:
            msg = "the ledger lost its version row"
            raise LedgerError(msg, reason="ledger-corrupt")
        if found.schema_version != SCHEMA_VERSION:
            msg = f"the ledger has schema {found.schema_version}, this release looks at {SCHEMA_VERSION}"
            newer = found.schema_version > SCHEMA_VERSION
            raise LedgerError(msg, reason="ledger-newer" if newer else "ledger-older")
        if self._store_id not in (None, found.store_id):
            msg = f"the ledger belongs to store {found.store_id}, not to {self._store_id}"
            raise LedgerError(msg, reason="ledger-foreign")

    def counts(self, work_id: str | None = None) -> dict[JobState, int]:
        """Return how many jobs there are in each state, of one work id or of all."""
        wanted = select(job.c.state, func.count()).group_by(job.c.state)
        if work_id is not None:
            wanted = wanted.where(job.c.work_id == work_id)
        found = dict.fromkeys(JobState, 0)
        for state, number in self._connection.execute(wanted):
            found[JobState(state)] = number
        return found

    def failed(self) -> Iterator[FailedJob]:
        """Give the jobs that failed the last time they were tried, in the order of their ids."""
        columns: tuple[Any, ...] = (job.c.job_key, job.c.url, job.c.state, job.c.error_code)
        rows = self._connection.execution_options(yield_per=AT_ONCE).execute(
            select(*columns).where(_failed()).order_by(job.c.id)
        )
        for key, url, state, code in rows:
            yield FailedJob(key, url, JobState(state), code or UNNOTED)


def _failed() -> ColumnElement[bool]:
    ended = job.c.state.in_((JobState.FAILED.value, JobState.DEAD.value))
    return or_(ended, and_(job.c.state == JobState.READY.value, job.c.error_code.is_not(None)))
