"""The ledger for code without a crawl: opened by its URL, for any number of workers.

What may live here: opening it, and its health. Imported only where a database is opened: it imports
SQLAlchemy.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Self

from scrapy_streaming.exceptions import LedgerError, StreamingError
from scrapy_streaming.integration.claims import Claims
from scrapy_streaming.protocol.jobs import Completion, Lease, StoredRepresentation
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.ledger import (
    SCHEMA_VERSION,
    Ledger,
    Queries,
    ReadOnlyLedger,
    database_of,
    recorded_identity,
    schema_found,
)
from scrapy_streaming.storage.locations import ledger_url

#: Seconds that ``check_database_health`` waits for a write transaction to end.
PATIENCE: Final = 5.0


class StreamingDatabase(Ledger):
    """The ledger, and one more view of it for each worker id.

    Each view has its own leases, renewed until the database is closed; then they end.
    """

    _url: str
    _settings: StreamingSettings
    _store_id: str
    _workers: dict[str, tuple[Ledger, Claims]]
    _own: Claims | None
    _lock: threading.Lock
    _open: ExitStack

    @classmethod
    def of(cls, url: str, settings: StreamingSettings, *, create: bool = True) -> Self:
        """Return the ledger in the database that *url* names, made if there is none and *create* says so.

        Raises ``LedgerError``, or ``StoreError`` for SQLite on a network filesystem.
        """
        folder = settings.directory or Path.cwd()
        url = ledger_url(replace(settings, database_url=url), folder)
        try:
            opened = cls._of_store(url, settings, create=create)
        except LedgerError as error:
            if error.reason != "ledger-foreign":
                raise
            opened = cls._of_store(url, settings, create=create)  # another process made it meanwhile
        return opened

    @classmethod
    def _of_store(cls, url: str, settings: StreamingSettings, *, create: bool) -> Self:
        found = _identity(url)
        store_id, ledger_id, epoch = found or (secrets.token_hex(16), None, 0)
        opened = cls.open(
            url,
            worker_id=f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}",
            ledger_id=ledger_id,
            epoch=epoch,
            create=create,
            **_terms(settings, store_id),
        )
        opened.prepare(url, settings, store_id)
        return opened

    def prepare(self, url: str, settings: StreamingSettings, store_id: str) -> None:
        """Store how views are opened; ``of`` calls it."""
        self._url, self._settings, self._store_id = url, settings, store_id
        self._workers, self._open, self._own = {}, ExitStack(), None
        self._lock = threading.Lock()

    def for_worker(self, worker_id: str) -> tuple[Ledger, Claims]:
        """Return the ledger as *worker_id* sees it, and its leases.

        The leases of an earlier process of the same name, which has ended, end at once.
        """
        with self._lock:
            if worker_id not in self._workers:
                self._workers[worker_id] = self._view(worker_id)
            return self._workers[worker_id]

    def _view(self, worker_id: str) -> tuple[Ledger, Claims]:
        ledger = Ledger.open(
            self._url,
            worker_id=worker_id,
            ledger_id=self.ledger_id,
            epoch=self.epoch,
            create=False,
            **_terms(self._settings, self._store_id),
        )
        self._open.callback(ledger.close)
        ledger.end_worker_leases(worker_id).result()
        return ledger, self._kept_alive(ledger)

    def own_claims(self) -> Claims:
        """Return the leases of this process, which has no name of its own."""
        with self._lock:
            if self._own is None:
                self._own = self._kept_alive(self)
            return self._own

    def _kept_alive(self, ledger: Ledger) -> Claims:
        claims = Claims(self._settings.lease_seconds, ledger.renew, waits=self._settings.held == "wait")
        self._open.callback(_release, ledger, claims)
        return self._open.enter_context(claims)

    def complete(self, lease: Lease, known: StoredRepresentation, **how: Any) -> Future[Completion]:
        """See ``Jobs.complete``; the lease is not renewed any more, as after ``release`` and ``fail``."""
        self._end(lease)
        return super().complete(lease, known, **how)

    def release(self, lease: Lease) -> Future[None]:
        """See ``Jobs.release``."""
        self._end(lease)
        return super().release(lease)

    def fail(self, lease: Lease, error_code: str, error: str, **how: Any) -> Future[None]:
        """See ``Jobs.fail``."""
        self._end(lease)
        return super().fail(lease, error_code, error, **how)

    def _end(self, lease: Lease) -> None:
        every = [claims for _, claims in self._workers.values()]
        for claims in every if self._own is None else [*every, self._own]:
            claims.end(lease)

    def close(self) -> None:
        """End the leases that are left, and close."""
        self._open.close()
        super().close()


def _release(ledger: Ledger, claims: Claims) -> None:
    """Release what was claimed and not ended."""
    for lease in claims.left():
        with suppress(StreamingError):  # lost meanwhile, or the database is away: it ends by itself
            ledger.release(lease).result()


def _identity(url: str) -> tuple[str, str | None, int] | None:
    """Return which ledger a database holds, ``None`` if it holds none yet."""
    try:
        return recorded_identity(url)
    except LedgerError as error:
        if error.reason != "ledger-missing":
            raise
        return None


def _terms(settings: StreamingSettings, store_id: str) -> dict[str, Any]:
    return {
        "store_id": store_id,
        "lease_seconds": settings.lease_seconds,
        "max_attempts": settings.max_attempts,
        "fsync": settings.fsync,
        "events": settings.history_days > 0,
    }


def health_of(url: str, settings: StreamingSettings) -> dict[str, Any]:
    """Return how the ledger stands, as ``check_database_health`` does; nothing is made or changed."""
    found: dict[str, Any] = {"status": "unhealthy", "schema_version": None, "tables": {}, "errors": []}
    try:
        url = ledger_url(replace(settings, database_url=url), settings.directory or Path.cwd())
        found["schema_version"] = version = schema_found(url) or None
        if version is not None and version < SCHEMA_VERSION:
            found["errors"].append(f"the ledger is of schema {version}: run `scrapy streaming migrate`")
            return {**found, "status": "degraded"}
        with ReadOnlyLedger(database_of(url), None) as ledger:
            ledger.wait_unlocked(PATIENCE)
            found["errors"] += ledger.check()
            found["tables"] = ledger.table_rows().result()
            found["errors"] += ledger.invariant_violations().result()
            degraded = {name: number for name, number in ledger.degraded_counts().result().items() if number}
            put_back = _put_back(ledger)
    except StreamingError as error:
        found["errors"].append(str(error))
        return found
    if found["errors"]:
        return found
    warnings = [f"{number} {name}" for name, number in degraded.items()] + put_back
    found["status"] = "degraded" if warnings else "healthy"
    found["errors"] = warnings
    return found


def _put_back(ledger: Queries) -> list[str]:
    try:
        ledger.refuse_older().result()
    except LedgerError as error:
        if error.reason != "ledger-put-back":
            raise
        return [str(error)]
    return []
