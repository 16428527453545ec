"""The ledger: which jobs there are, who may write about them, and what is done.

The one place of the package that speaks SQL. Here are the verbs as callers see them; ``verbs`` has
what they do, ``effects`` and ``upkeep`` those that downloads do not need, ``statements`` their SQL,
``writer`` the thread they run in, ``schema`` the tables, ``sqlite`` and ``postgres`` what is
particular to each database.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from sqlalchemy import Connection, make_url
from sqlalchemy.exc import ArgumentError

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import (
    Claim,
    Completion,
    EffectStart,
    Lease,
    NotedFile,
    RecordedName,
    StoredRepresentation,
)
from scrapy_streaming.protocol.portable import Entered, Record
from scrapy_streaming.storage.job_request import JobRequest, Repeat
from scrapy_streaming.storage.ledger import arrivals, carrying, effects, upkeep, verbs
from scrapy_streaming.storage.ledger.commands import Command
from scrapy_streaming.storage.ledger.database import Clock, Database
from scrapy_streaming.storage.ledger.effects import run_effect
from scrapy_streaming.storage.ledger.postgres import PostgresDatabase
from scrapy_streaming.storage.ledger.prepared import Session
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
from scrapy_streaming.storage.ledger.sqlite import SqliteDatabase
from scrapy_streaming.storage.ledger.statements import Statements, WorkerIdentity
from scrapy_streaming.storage.ledger.writer import PATIENCE, Writer

T = TypeVar("T")

__all__ = [
    "SCHEMA_VERSION",
    "BlobRow",
    "FailedJob",
    "JobDetails",
    "JobRequest",
    "JobView",
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

    Raises ``LedgerError`` if it cannot be read; nothing is made or changed.
    """
    return found_version(database_of(url))


def recorded_identity(url: str) -> tuple[str, str, int] | None:
    """Return what the ledger in a database says of itself: its store's id, its own, its epoch.

    ``None`` if there is no ledger in it. Raises as ``schema_found``.
    """
    return upkeep.recorded_identity(database_of(url))


class Ledger(Queries):
    """The verbs. Each returns at once with a future, answered once its transaction is committed.

    Futures are answered in the writer thread: their callbacks must be short. While the database
    is away, locked or full they wait. Beside what a verb names, a future may raise ``LedgerError``,
    and ``WriteFailed`` when the disk stays full; nothing was changed then. Every verb raises
    ``LedgerError`` (``ledger-closed``) after ``close``.
    """

    def __init__(
        self,
        database: Database,
        asker: WorkerIdentity,
        opened: Callable[[Connection], None],
        *,
        create: bool,
        events: bool,
        patience: float,
    ) -> None:
        """Use ``Ledger.open``."""
        self.ledger_id = ""
        self.epoch = 0
        self._tools = verbs.LedgerContext(asker, Statements(asker, database.dialect), events)
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

        It is made (a file: with mode 0600) if there is none, *create* allows it and the store did
        not have one before, *ledger_id*. *worker_id* names this run: its leases and the back-offs
        that bind it. *epoch* is the one that the store has seen: a ledger below it is an older copy.
        A lease lasts *lease_seconds* seconds unless renewed; a job whose worker went
        silent *max_attempts* times is dead. *events*: keep a history. *patience*: seconds that a
        database which is away, locked or full is waited for. *clock* stands in for the database's
        in tests. Raises ``LedgerError``: ``ledger-newer``, ``ledger-foreign``, ``ledger-missing``,
        ``ledger-corrupt``, ``ledger-unreadable``, ``ledger-unreachable``, ``driver-missing``; the
        database is then left as it was.
        """
        database = database_of(url, fsync=fsync, clock=clock)
        asker = WorkerIdentity(worker_id, lease_seconds, max_attempts, database.now)
        found = ledger_id  # what a later connection must find again

        def opened(connection: Connection) -> None:
            nonlocal found
            database.migrating(connection)
            found = migrate(connection, store_id=store_id, ledger_id=found, create=create)
            verbs.register(connection, asker)

        may_make = create and ledger_id is None
        ledger = cls(database, asker, opened, create=may_make, events=events, patience=patience)
        ledger.ledger_id, ledger.epoch = str(found), epoch
        return ledger

    def submit(self, command: Command[T], key: str = "", *, urgent: bool = False) -> Future[T]:
        """Return the future answer of *command*; see ``Writer.submit``."""
        return self._writer.submit(command, key, urgent=urgent)

    def claim(
        self,
        key: str,
        request: JobRequest,
        *,
        refresh_before: float | None = None,
        kept: int = 0,
        begun: bool = True,
    ) -> Future[Claim]:
        """Ask for the job *key*, which is made if there is none.

        ``Granted`` if it was free: new, ready, failed, its lease over, done before
        *refresh_before* (seconds since the epoch; ``inf`` for whenever), in the future, or before an
        older copy of the ledger was put back, or done with bytes that are missing. *kept* is how many bytes
        of it an earlier claim left: more than last time count as progress, and attempts begin anew
        (ledger rule 9). Without *begun* the claim counts as an attempt only once ``begin_work`` says so: its
        worker may die long before. Otherwise ``Held``, ``Waiting``, ``Done`` or ``Dead``. The future
        raises ``KeyConflict`` if the key is taken by another request (I18).
        """
        terms = {"refresh_before": refresh_before, "kept": kept, "begun": begun, "epoch": self.epoch}
        claim_id = secrets.token_hex(16)  # made here: a batch that is run again finds its own claim
        return self._writer.submit(
            lambda session: verbs.claim(session, self._tools, key, request, claim_id, terms), key
        )

    def begin_work(self, lease: Lease, *, unlike: bool = False) -> Future[None]:
        """Note that the work on a claim begins; may raise ``LeaseLost``.

        *unlike*: its request is sent with what a plain GET would not have, whatever ``Repeat`` said.
        """
        return self._writer.submit(
            lambda session: verbs.begin_work(session, self._tools, lease, unlike=unlike), lease.job_key
        )

    def complete(
        self,
        lease: Lease,
        known: StoredRepresentation,
        *,
        resumed_from: int = 0,
        path: str | None = None,
        by_response: bool = False,
    ) -> Future[Completion]:
        """Record that the job is done and its blob stored, in one transaction (ledger rule 3).

        *path* is the name that was given to the blob, below the store's root, ``known.name.stamp``
        that of its file; *by_response*: the name depends on the response. ``known.stamp`` is the
        blob's: it is noted if there is one.
        ``known.fetched_at`` is not looked at: the database's time counts, or ``known.stored_at`` if that
        is earlier; userinfo in ``known.final_url`` is not kept. *resumed_from* is the length in bytes of
        the part the download went on from. Asked again by the same claim, the first answer is given again
        (ledger rule 4). The future raises ``LeaseLost``, or ``IntegrityError`` if the blob is recorded
        with another size. Raises ``ValueError`` if ``known.digest`` is none.
        """
        known = replace(known, digest=str(Digest.parse(known.digest)))
        stored = verbs.Stored(resumed_from, path, by_response)
        return self._writer.submit(
            lambda session: verbs.complete(session, self._tools, lease, known, stored),
            lease.job_key,
        )

    def note_blob(self, digest: str, stamp: bytes) -> Future[None]:
        """Note the stamp of a blob's file: its bytes are known to be right (R77)."""
        return self._writer.submit(partial(verbs.note_blob, tools=self._tools, digest=digest, stamp=stamp))

    def note_name(self, completion: Completion, name: RecordedName) -> Future[None]:
        """Note the name that a completion's bytes have now."""
        place = (completion.job_id, completion.generation)
        return self._writer.submit(partial(verbs.note_name, tools=self._tools, place=place, name=name))

    def release(self, lease: Lease) -> Future[None]:
        """Give the job back unharmed: the attempt does not count. May raise ``LeaseLost``."""
        return self._writer.submit(lambda session: verbs.release(session, self._tools, lease), lease.job_key)

    def fail(
        self,
        lease: Lease,
        error_code: str,
        error: str,
        *,
        permanent: bool,
        retry_after: float | None = None,
        progress: bool = False,
    ) -> Future[None]:
        """End the claim with an error; the future may raise ``LeaseLost`` (ledger rule 9).

        *permanent*: the job is failed, until somebody asks for it again. Otherwise it is ready
        after a back-off, which binds this run only, or after the server's *retry_after*
        (seconds, an hour at most), which binds every run. *progress*: the claim gained bytes, so
        attempts are counted anew.
        """
        failure = verbs.Failure(error_code, error, permanent, retry_after, progress)
        return self._writer.submit(
            lambda session: verbs.fail(session, self._tools, lease, failure, self._random), lease.job_key
        )

    def renew(self, begins: Callable[[], object] = lambda: None) -> Future[frozenset[str]]:
        """Prolong every lease of this worker; gives the claim ids that are still its own (ledger rule 8).

        It goes before whatever else waits. *begins* is called, in the writer's thread, when the
        database is about to count the new leases from.
        """

        def command(session: Session) -> frozenset[str]:
            begins()
            return verbs.renew(session, self._tools)

        return self._writer.submit(command, urgent=True)

    def free(self, keys: Collection[str]) -> Future[frozenset[str]]:
        """Look which of *keys* are worth claiming: no lease that still runs holds them."""
        return self._writer.submit(partial(verbs.free, asker=self._tools.asker, keys=frozenset(keys)))

    def forget_worker(self, worker_id: str) -> Future[int]:
        """End the leases of a worker known to be dead; gives how many.

        Safe even if it lives: it keeps what nobody takes, and is fenced out of what is taken.
        """
        return self._writer.submit(partial(verbs.forget_worker, asker=self._tools.asker, name=worker_id))

    def adoptable(self, digest: str, path: str) -> Future[bool]:
        """Look whether the file at a name, a blob by now, may be given for a job never done (C6, C11)."""
        return self._writer.submit(partial(arrivals.adoptable, digest=digest, path=path))

    def noted_files(self, paths: Collection[str]) -> Future[dict[str, NotedFile]]:
        """Give what ``note_files`` noted of the names (``upkeep.AT_ONCE`` at most), as far as it did."""
        return self._writer.submit(partial(arrivals.noted_files, paths=tuple(paths)))

    def note_files(self, found: Mapping[str, tuple[NotedFile, bytes]]) -> Future[frozenset[str]]:
        """Note what files hash to, by name, each with the stamp of its blob; gives the names that are noted.

        Their blobs are recorded as present: not one of another size, nor one that ``gc`` is removing.
        """
        asker = self._tools.asker
        return self._writer.submit(partial(arrivals.note_files, asker=asker, found=dict(found)))

    def delivered(self, completions: Collection[Completion]) -> Future[None]:
        """Note that the items of these completions were handed on."""
        places = frozenset((c.job_id, c.generation) for c in completions)
        return self._writer.submit(partial(verbs.delivered, asker=self._tools.asker, completions=places))

    def requeue(self, *keys: str) -> Future[int]:
        """Make failed and dead jobs ready, their attempts given back; gives how many there were (I19)."""
        return self._writer.submit(partial(verbs.requeue, tools=self._tools, keys=frozenset(keys)))

    def requeue_all(self) -> Future[int]:
        """Make every failed and every dead job ready; gives how many there were."""
        return self._writer.submit(partial(verbs.requeue, tools=self._tools, keys=None))

    def enter(self, record: Record) -> Future[Entered]:
        """Record a completion of another ledger, or of none, whose bytes are stored; gives what became of it.

        Nothing that is newer, or this one, is changed.
        """
        return self._writer.submit(partial(carrying.enter, tools=self._tools, record=record))

    # -- an older copy of the ledger ---------------------------------------------------------

    def raise_epoch(self, seen: int, *, unread: bool = False) -> Future[Standing]:
        """Raise the ledger's epoch above *seen*, the store's, and note it if the ledger was below.

        *unread*: note in any case that the store has to be read. What is recorded from now on is no
        part of a copy that was taken before.
        """
        self.epoch = max(self.epoch, seen)
        raised = self._writer.submit(
            partial(verbs.raise_epoch, asker=self._tools.asker, seen=self.epoch, unread=unread)
        )
        raised.add_done_callback(self._raised)
        return raised

    def _raised(self, done: Future[Standing]) -> None:
        if not done.cancelled() and done.exception() is None:
            self.epoch = max(self.epoch, done.result().epoch)

    def mark_read(self, before: Standing) -> Future[bool]:
        """Note that all blobs of the store are recorded; *before* is ``standing`` before they were read.

        Gives whether that counts: not if a copy was put back meanwhile.
        """
        return self._writer.submit(partial(verbs.mark_read, seen=self.epoch, before=before))

    # -- effects -----------------------------------------------------------------------------

    def begin(self, lease: Lease, op_key: str, kind: str) -> Future[EffectStart]:
        """Begin the effect *op_key* under a claim; see ``run_effect``.

        Gives ``Run``, ``Recover`` (it was begun before, and its end is not known) or ``Replay``.
        The future may raise ``LeaseLost``.
        """
        return self._writer.submit(
            partial(effects.begin, tools=self._tools, lease=lease, op_key=op_key, kind=kind), lease.job_key
        )

    def succeed(self, lease: Lease, op_key: str, result: str) -> Future[None]:
        """Record the result of an effect that this claim began; the future may raise ``LeaseLost``.

        Raises ``ResultTooLarge`` beyond 16 KiB.
        """
        outcome = (effects.checked_result(result), None)
        return self._writer.submit(
            partial(effects.end, tools=self._tools, lease=lease, op_key=op_key, outcome=outcome),
            lease.job_key,
        )

    def give_up(self, lease: Lease, op_key: str, error: str) -> Future[None]:
        """Record that an effect failed: whoever holds the job may run it again."""
        outcome = (None, error)
        return self._writer.submit(
            partial(effects.end, tools=self._tools, lease=lease, op_key=op_key, outcome=outcome),
            lease.job_key,
        )

    # -- for maintenance: AT_ONCE digests at most --------------------------------------------

    def mark_verified(self, digests: Collection[str]) -> Future[None]:
        """Note that the bytes of these blobs were just found to be right."""
        asker = self._tools.asker
        return self._writer.submit(partial(upkeep.mark_verified, asker=asker, digests=frozenset(digests)))

    def set_blob_state(self, digest: str, to: str, origins: Collection[str]) -> Future[bool]:
        """Change a blob's state if it is one of *origins*; gives whether it was.

        Nothing is built on a blob that is not ``present``; a job done with it is granted again.
        """
        return self._writer.submit(
            partial(upkeep.set_blob_state, digest=digest, to=to, origins=frozenset(origins))
        )

    def adopt_blobs(self, found: Mapping[str, int]) -> Future[frozenset[str]]:
        """Record files whose bytes are right as present, by digest with their sizes; gives which are.

        Not one that is recorded with another size, nor one that is being collected.
        """
        return self._writer.submit(partial(upkeep.adopt_blobs, asker=self._tools.asker, found=dict(found)))

    def orphans(self, found: Collection[str]) -> Future[frozenset[str]]:
        """Give those of the digests that nothing refers to and that are not recorded as present."""
        return self._writer.submit(partial(upkeep.orphans, found=frozenset(found)))

    def condemn_orphans(self, found: Mapping[str, int]) -> Future[frozenset[str]]:
        """Begin to delete those of the blobs (digest, size) that are ``orphans``; gives which.

        The future raises ``LedgerError`` (``ledger-put-back``) while ``standing`` says ``unread``.
        """
        return self._writer.submit(
            partial(upkeep.condemn_orphans, asker=self._tools.asker, seen=self.epoch, found=dict(found))
        )

    def superseded(
        self, age: float, *, after: str | None = None, limit: int = 1000
    ) -> Future[list[tuple[str, int]]]:
        """Give blobs (digest, size) that only old generations name, for *age* seconds at least."""
        asker = self._tools.asker
        return self._writer.submit(partial(upkeep.superseded, asker=asker, age=age, after=after, limit=limit))

    def condemn_superseded(self, digests: Collection[str], age: float) -> Future[frozenset[str]]:
        """Begin to delete those of *digests* that still are ``superseded``; gives which.

        The completions that name them are forgotten. The future raises as ``condemn_orphans``.
        """
        asker, seen = self._tools.asker, self.epoch
        return self._writer.submit(
            partial(upkeep.condemn_superseded, asker=asker, seen=seen, digests=frozenset(digests), age=age)
        )

    def bury(self, digests: Collection[str] | None) -> Future[frozenset[str]]:
        """End the deletion of those of *digests* that nobody stored again meanwhile; gives which.

        ``None``: of all, whoever began it.
        """
        wanted = None if digests is None else frozenset(digests)
        return self._writer.submit(partial(upkeep.bury, digests=wanted))

    def trim_events(self, age: float, limit: int = 5000) -> Future[int]:
        """Remove *limit* events at most that are older than *age* seconds; gives how many."""
        return self._writer.submit(partial(upkeep.trim_events, asker=self._tools.asker, age=age, limit=limit))

    def close(self) -> None:
        """Carry out what was asked for, then close. Blocks; may be called twice."""
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
