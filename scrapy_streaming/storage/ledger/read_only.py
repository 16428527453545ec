"""A ledger opened to read: no row, no file, no worker, no schema is made or changed.

What may live here: how such a ledger is opened and checked. What it is asked is in ``queries``.
"""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import ExitStack, closing
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import Column, Connection, inspect, select
from sqlalchemy.exc import DBAPIError

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.storage.ledger.database import Database, Reader, read
from scrapy_streaming.storage.ledger.prepared import Command, Session
from scrapy_streaming.storage.ledger.queries import Queries
from scrapy_streaming.storage.ledger.schema import SCHEMA_VERSION, meta

T = TypeVar("T")


class ReadOnlyLedger(Queries):
    """The verbs that read, as a context. Each blocks, and returns a future that is done.

    Each reads one state of the ledger, which may be another than that of the verb before. Entering the
    context raises ``LedgerError``: ``ledger-missing``, ``ledger-foreign``, ``ledger-older`` (``migrate``
    brings it forward), ``ledger-newer``, or what the database says.
    """

    def __init__(
        self, database: Database, store_id: str | None, *, ledger_id: str | None = None, epoch: int = 0
    ) -> None:
        """*store_id*, *ledger_id* and *epoch* are what the store says; ``None`` if it does not."""
        self.epoch = epoch
        self._database = database
        self._wanted = (store_id, ledger_id)
        self._opened = ExitStack()
        self._reader: Reader

    def __enter__(self) -> Self:
        try:
            self._reader = self._opened.enter_context(self._database.reader())
            read(self._reader, self._refuse_other)
        except BaseException as error:
            self._opened.close()
            raise self._translated(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def submit(self, command: Command[T], key: str = "", *, urgent: bool = False) -> Future[T]:
        """Run *command* now and return its answer."""
        del key, urgent
        answer: Future[T] = Future()
        try:
            answer.set_result(read(self._reader, lambda connection: _run(connection, command)))
        except Exception as error:  # noqa: BLE001 - raised again by the future
            known = self._translated(error)
            if known is not error:
                known.__cause__ = error
            answer.set_exception(known)
        return answer

    def wait_unlocked(self, seconds: float) -> None:
        """Raise ``LedgerError`` (``ledger-locked``) if a write transaction lasts longer than *seconds*."""
        self._reader.wait_unlocked(seconds)

    def _translated(self, error: BaseException) -> BaseException:
        foreign = (DBAPIError, OSError, UnicodeDecodeError, self._database.dialect.loaded_dbapi.Error)
        return self._database.translate(error) if isinstance(error, foreign) else error

    def _refuse_other(self, connection: Connection) -> None:
        """Raise ``LedgerError`` unless it is the store's ledger, in the schema of this release."""
        row = _meta_row(connection, meta.c.schema_version, meta.c.store_id, meta.c.ledger_id)
        if row is None:
            msg = "there is no ledger yet"
            raise LedgerError(msg, reason="ledger-missing")
        if row.schema_version != SCHEMA_VERSION:
            msg = f"the ledger has schema {row.schema_version}, this release reads {SCHEMA_VERSION}"
            newer = row.schema_version > SCHEMA_VERSION
            raise LedgerError(msg, reason="ledger-newer" if newer else "ledger-older")
        store_id, ledger_id = self._wanted
        if store_id not in (None, row.store_id):
            msg = f"the ledger belongs to store {row.store_id}, not to {store_id}"
            raise LedgerError(msg, reason="ledger-foreign")
        if ledger_id not in (None, row.ledger_id):
            msg = f"this is ledger {row.ledger_id}, the store's own is {ledger_id}"
            raise LedgerError(msg, reason="ledger-foreign")


def found_version(database: Database) -> int:
    """Return the version of the tables in a database, 0 if it has none; nothing is changed.

    Raises ``LedgerError`` if it cannot be read.
    """
    try:
        with database.reader() as reader:
            row = read(reader, lambda connection: _meta_row(connection, meta.c.schema_version))
    except (DBAPIError, OSError, UnicodeDecodeError, database.dialect.loaded_dbapi.Error) as error:
        raise database.translate(error) from error
    return 0 if row is None else int(row.schema_version)


def _meta_row(connection: Connection, *columns: Column[Any]) -> Any:
    """Return the one row that says which ledger it is, ``None`` if the database has no ledger.

    Raises ``LedgerError`` (``ledger-corrupt``) if the row is gone.
    """
    if not inspect(connection).has_table(meta.name):
        return None
    row = connection.execute(select(*columns)).one_or_none()
    if row is None:
        msg = "the ledger lost its version row"
        raise LedgerError(msg, reason="ledger-corrupt")
    return row


def _run(connection: Connection, command: Command[T]) -> T:
    with closing(Session(connection)) as session:
        return command(session)
