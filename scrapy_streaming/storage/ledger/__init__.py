"""The ledger: which jobs there are, who may write about them, and what is done.

The one place of the package that speaks SQL. Here are the verbs as callers see them; ``verbs`` has
what they do, ``statements`` their SQL, ``writer`` the thread they run in, ``schema`` the tables,
``sqlite`` what is particular to SQLite.
"""

from __future__ import annotations

import math
import random
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import Connection

from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Claim, Completion, Known, Lease
from scrapy_streaming.storage.ledger import sqlite, statements, verbs
from scrapy_streaming.storage.ledger.records import JobRequest, JobView
from scrapy_streaming.storage.ledger.schema import SCHEMA_VERSION, migrate
from scrapy_streaming.storage.ledger.writer import Writer

__all__ = ["SCHEMA_VERSION", "JobRequest", "JobView", "Ledger"]


class Ledger:
    """The verbs. Each returns at once with a future, answered once its transaction is committed.

    Futures are answered in the writer thread: their callbacks must be short. Beside what a verb
    names, a future may raise ``LedgerError``, and ``WriteFailed`` when the disk is full; nothing
    was changed then. Every verb raises ``LedgerError`` (``ledger-closed``) after ``close``.
    """

    def __init__(self, writer: Writer, asker: statements.Asker) -> None:
        """Use ``Ledger.open``."""
        self._writer = writer
        self._asker = asker
        self._claim = statements.claim_statement(asker)
        self._complete = statements.complete_statement(asker)
        self._random = random.Random()  # noqa: S311 - jitter, no secret

    @classmethod
    def open(  # noqa: PLR0913 - by keyword only, each a setting
        cls,
        path: Path,
        *,
        store_id: str,
        worker_id: str,
        lease_seconds: float,
        max_attempts: int,
        fsync: bool = True,
        clock: sqlite.Clock | None = None,
    ) -> Self:
        """Return the ledger at *path*, created with mode 0600 if there is none. Blocks.

        *worker_id* names this run: its leases and the back-offs that bind it. A lease lasts
        *lease_seconds* seconds unless renewed; a job whose worker went silent *max_attempts*
        times is dead. *clock* stands in for the database's in tests. Raises ``LedgerError``:
        ``ledger-newer``, ``ledger-foreign``, ``ledger-corrupt``, ``ledger-unreadable``; the file
        is then left as it was.
        """

        def connect() -> Connection:
            connection = sqlite.connect(path, fsync=fsync, clock=clock)
            try:
                with connection.begin():
                    migrate(connection, store_id=store_id)
            except BaseException:
                connection.close()
                raise
            return connection

        writer = Writer(connect, partial(sqlite.translate, path=path))
        return cls(writer, statements.Asker(worker_id, lease_seconds, max_attempts, sqlite.now(clock)))

    def claim(
        self,
        key: str,
        request: JobRequest,
        *,
        refresh_before: float | None = None,
        force: bool = False,
        kept: int = 0,
    ) -> Future[Claim]:
        """Ask for the job *key*, which is made if there is none.

        ``Granted`` if it was free: new, ready, failed, its lease over, done before
        *refresh_before* (seconds since the epoch) or at all with *force*, or done with bytes that
        are missing. *kept* is how many bytes of it an earlier claim left: more than last time
        count as progress, and attempts begin anew (rule 9). Otherwise ``Held``, ``Waiting``,
        ``Done`` or ``Dead``. The future raises ``KeyConflict`` if the key is taken by another
        request (I18).
        """
        before = math.inf if force else refresh_before
        return self._writer.submit(
            partial(
                verbs.claim,
                statement=self._claim,
                asker=self._asker,
                key=key,
                request=request,
                terms={"refresh_before": before, "kept": kept},
            )
        )

    def complete(self, lease: Lease, known: Known, *, resumed_from: int = 0) -> Future[Completion]:
        """Record that the job is done and its blob stored, in one transaction (rule 3).

        ``known.fetched_at`` is not looked at: the database's time counts; userinfo in
        ``known.final_url`` is not kept. *resumed_from* is the length in bytes of the part the
        download went on from. Asked again by the same claim, the first answer is given again
        (rule 4). The future raises ``LeaseLost``, or ``IntegrityError`` if the blob is recorded
        with another size. Raises ``ValueError`` if ``known.digest`` is none.
        """
        known = replace(known, digest=str(Digest.parse(known.digest)))
        return self._writer.submit(
            partial(
                verbs.complete,
                statement=self._complete,
                asker=self._asker,
                lease=lease,
                known=known,
                resumed_from=resumed_from,
            )
        )

    def release(self, lease: Lease) -> Future[None]:
        """Give the job back unharmed: the attempt does not count. May raise ``LeaseLost``."""
        return self._writer.submit(partial(verbs.release, asker=self._asker, lease=lease))

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
        """End the claim with an error; the future may raise ``LeaseLost`` (rule 9).

        *permanent*: the job is failed, until somebody asks for it again. Otherwise it is ready
        after a back-off, which binds this run only, or after the server's *retry_after*
        (seconds, an hour at most), which binds every run. *progress*: the claim gained bytes, so
        attempts are counted anew.
        """
        failure = verbs.Failure(error_code, error, permanent, retry_after, progress)
        return self._writer.submit(
            partial(verbs.fail, asker=self._asker, lease=lease, failure=failure, rng=self._random)
        )

    def renew(self) -> Future[frozenset[str]]:
        """Prolong every lease of this worker; gives the claim ids that are still its own (rule 8)."""
        return self._writer.submit(partial(verbs.renew, asker=self._asker))

    def forget_worker(self, worker_id: str) -> Future[int]:
        """End the leases of a worker known to be dead; gives how many.

        Safe even if it lives: it keeps what nobody takes, and is fenced out of what is taken.
        """
        return self._writer.submit(partial(verbs.forget_worker, asker=self._asker, worker_id=worker_id))

    def mark_missing(self, digest: str) -> Future[bool]:
        """Note that a blob's bytes are gone: nothing is built on it until it is stored again.

        Gives whether the blob was known. A job done with it is granted to whoever asks next.
        """
        return self._writer.submit(partial(verbs.mark_missing, digest=digest))

    def requeue(self, key: str) -> Future[bool]:
        """Make a failed or dead job ready, its attempts given back; gives whether it was one (I19)."""
        return self._writer.submit(partial(verbs.requeue, asker=self._asker, key=key))

    def job(self, key: str) -> Future[JobView | None]:
        """Look at one job."""
        return self._writer.submit(partial(verbs.view, key=key))

    def counts(self) -> Future[dict[str, int]]:
        """Count jobs by state, and ``blobs`` and ``blob_bytes`` that are present."""
        return self._writer.submit(verbs.counts)

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
