"""The ledger: jobs, the leases under which workers write about them, and what was completed.

What may live here: how a ledger is opened. This package alone uses SQL. A *verb* is one operation on the
ledger, a method of the class for its callers: ``jobs`` for workers, ``effects`` for recorded effects,
``queries`` and ``admin`` for maintenance and the command line. Below them are ``statements`` (their SQL),
``writer`` (the thread that runs them), ``read_only`` (which runs those that only read), ``schema`` (the
tables), and ``sqlite`` and ``postgres`` (what differs between the databases).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from sqlalchemy import Connection, make_url
from sqlalchemy.dialects.postgresql import Insert  # SQLite understands it too
from sqlalchemy.exc import ArgumentError

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.storage.job_request import JobRequest, Repeat
from scrapy_streaming.storage.ledger import admin
from scrapy_streaming.storage.ledger.admin import Admin
from scrapy_streaming.storage.ledger.commands import LedgerContext
from scrapy_streaming.storage.ledger.database import Clock, Database
from scrapy_streaming.storage.ledger.effects import Effects, run_effect
from scrapy_streaming.storage.ledger.jobs import Jobs
from scrapy_streaming.storage.ledger.postgres import PostgresDatabase
from scrapy_streaming.storage.ledger.prepared import Command
from scrapy_streaming.storage.ledger.queries import Queries
from scrapy_streaming.storage.ledger.read_only import ReadOnlyLedger, found_version
from scrapy_streaming.storage.ledger.records import (
    BlobRow,
    FailedJob,
    JobDetails,
    JobView,
    NameRow,
    Standing,
)
from scrapy_streaming.storage.ledger.schema import SCHEMA_VERSION, ddl, migrate
from scrapy_streaming.storage.ledger.schema import worker as worker_table
from scrapy_streaming.storage.ledger.sqlite import SqliteDatabase
from scrapy_streaming.storage.ledger.statements import Statements, WorkerIdentity
from scrapy_streaming.storage.ledger.writer import PATIENCE, Writer

T = TypeVar("T")

__all__ = [
    "SCHEMA_VERSION",
    "Admin",
    "BlobRow",
    "Effects",
    "FailedJob",
    "JobDetails",
    "JobRequest",
    "JobView",
    "Jobs",
    "Ledger",
    "NameRow",
    "Queries",
    "ReadOnlyLedger",
    "Repeat",
    "Standing",
    "database_of",
    "ddl",
    "recorded_identity",
    "run_effect",
    "schema_found",
]


def database_of(url: str, *, fsync: bool = True, clock: Clock | None = None) -> Database:
    """Return the database that an SQLAlchemy URL names; raise ``LedgerError`` if it cannot be used.

    Reasons: ``ledger-unreadable`` for one that is neither SQLite in a file nor PostgreSQL,
    ``driver-missing``.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # which may quote the password
        msg = "STREAMING_DATABASE_URL cannot be read; allowed are sqlite:///PATH and postgresql+psycopg://…"
        raise LedgerError(msg, reason="ledger-unreadable") from None
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        return SqliteDatabase(Path(parsed.database), fsync=fsync, clock=clock)
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        return PostgresDatabase(parsed.set(drivername="postgresql+psycopg"), fsync=fsync, clock=clock)
    msg = f"no ledger in {parsed.drivername}: allowed are sqlite:///PATH and postgresql+psycopg://…"
    raise LedgerError(msg, reason="ledger-unreadable")


def schema_found(url: str) -> int:
    """Return the schema's version in the database that *url* names, 0 if it has no ledger.

    Raises ``LedgerError`` if it cannot be read; nothing is created or changed.
    """
    return found_version(database_of(url))


def recorded_identity(url: str) -> tuple[str, str, int] | None:
    """Return the ids of the store and of the ledger in a database, and the epoch.

    ``None`` if there is no ledger in it. Raises ``LedgerError`` (``ledger-missing`` without a file).
    """
    return admin.recorded_identity(database_of(url))


class Ledger(Jobs, Effects, Admin):
    """A ledger open for writing: all verbs, and the thread that runs them."""

    def __init__(
        self,
        database: Database,
        worker: WorkerIdentity,
        opened: Callable[[Connection], None],
        *,
        create: bool,
        events: bool,
        patience: float,
    ) -> None:
        """Use ``Ledger.open``."""
        self.ledger_id = ""
        self.epoch = 0
        self._context = LedgerContext(worker, Statements(worker, database.dialect), events)
        self._database = database
        self._random = random.SystemRandom()
        self._writer = Writer(database, opened, create=create, patience=patience)

    @classmethod
    def open(  # noqa: PLR0913 - all but the URL by keyword, and Storage.open is the one caller that gives them
        cls,
        url: str,
        *,
        store_id: str,
        worker_id: str,
        lease_seconds: float = 60.0,
        max_attempts: int = 5,
        fsync: bool = True,
        events: bool = True,
        create: bool = True,
        ledger_id: str | None = None,
        epoch: int = 0,
        patience: float = PATIENCE,
        clock: Clock | None = None,
    ) -> Self:
        """Return the ledger in the database that *url* names. Blocks.

        A missing one is created (a file with mode 0600) if *create* is true and the store did not have
        one before (*ledger_id*). *worker_id* names this run, its leases and the back-offs that bind it.
        *epoch* is the store's: a ledger whose epoch is below it is an older copy. A lease lasts
        *lease_seconds* seconds unless renewed; a job whose worker died *max_attempts* times is dead.
        *events*: record a history. *patience*: seconds to wait for a database that is unreachable, locked
        or full. *clock* replaces the database's clock in tests.
        Raises ``LedgerError``: ``ledger-newer``, ``ledger-foreign``, ``ledger-missing``,
        ``ledger-corrupt``, ``ledger-unreadable``, ``ledger-unreachable``, ``driver-missing``; the
        database is then left as it was.
        """
        database = database_of(url, fsync=fsync, clock=clock)
        worker = WorkerIdentity(worker_id, lease_seconds, max_attempts, database.now)
        found = ledger_id  # what a later connection must find again

        def opened(connection: Connection) -> None:
            nonlocal found
            database.migrating(connection)
            found = migrate(connection, store_id=store_id, ledger_id=found, create=create)
            _register(connection, worker)

        may_make = create and ledger_id is None
        ledger = cls(database, worker, opened, create=may_make, events=events, patience=patience)
        ledger.ledger_id, ledger.epoch = str(found), epoch
        return ledger

    def submit(self, command: Command[T], key: str = "", *, urgent: bool = False) -> Future[T]:
        """Return the future answer of *command*; see ``Writer.submit``."""
        return self._writer.submit(command, key, urgent=urgent)

    def close(self) -> None:
        """Run what is queued, then close. Blocks; may be called twice."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _register(connection: Connection, worker: WorkerIdentity) -> None:
    """Record that this worker has started."""
    fresh = Insert(worker_table).values(id=worker.number, name=worker.name, started_at=worker.now)
    connection.execute(fresh.on_conflict_do_nothing(index_elements=[worker_table.c.id]))
