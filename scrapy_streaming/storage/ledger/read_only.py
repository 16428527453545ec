"""A read-only ledger: no row, file or schema is created or changed, and no worker is registered.

What may live here: how such a ledger is opened and checked. ``queries`` has its verbs.
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
    """The verbs that read, as a context manager. Each blocks, and returns a future that is done.

    Each reads one state of the ledger, which may differ from that of the verb before. Entering the context
    raises ``LedgerError``: ``ledger-missing``, ``ledger-foreign``, ``ledger-older`` (the command ``migrate``
    updates it), ``ledger-newer``, ``ledger-corrupt``, or the database's own.
    """

    def __init__(
        self, database: Database, store_id: str | None, *, ledger_id: str | None = None, epoch: int = 0
    ) -> None:
        """Take the ids and the epoch in ``store.json``; ``None`` for an id that is not known."""
        self.epoch = epoch
        self._database = database
        self._wanted = (store_id, ledger_id)
        self._opened = ExitStack()
        self._reader: Reader

    def __enter__(self) -> Self:
        try:
            self._reader = self._opened.enter_context(self._database.reader())
            read(self._reader, self._refuse_other)
        except BaseException as error:  # raised again, the database's own as a LedgerError
            self._opened.close()
            known = self._translated(error)
            if known is error:
                raise
            raise known from error
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
        except Exception as error:  # noqa: BLE001 - raised again by the future, in the caller
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
            msg = f"this is ledger {row.ledger_id}, the store has ledger {ledger_id}"
            raise LedgerError(msg, reason="ledger-foreign")


def found_version(database: Database) -> int:
    """Return the schema version in a database, 0 if it has no ledger; change nothing.

    Raises ``LedgerError`` if it cannot be read.
    """
    try:
        with database.reader() as reader:
            row = read(reader, lambda connection: _meta_row(connection, meta.c.schema_version))
    except (DBAPIError, OSError, UnicodeDecodeError, database.dialect.loaded_dbapi.Error) as error:
        raise database.translate(error) from error
    return 0 if row is None else int(row.schema_version)


def _meta_row(connection: Connection, *columns: Column[Any]) -> Any:
    """Return the row of ``ss_meta``, ``None`` if the database has no ledger.

    Raises ``LedgerError`` (``ledger-corrupt``) if the row is missing.
    """
    if not inspect(connection).has_table(meta.name):
        return None
    row = connection.execute(select(*columns)).one_or_none()
    if row is None:
        msg = "the ledger's version row is missing"
        raise LedgerError(msg, reason="ledger-corrupt")
    return row


def _run(connection: Connection, command: Command[T]) -> T:
    with closing(Session(connection)) as session:
        return command(session)
