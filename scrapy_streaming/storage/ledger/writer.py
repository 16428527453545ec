"""One thread, one connection: every command of a ledger runs here, many to a transaction.

Nothing here knows what a command does. A command is a callable that takes the connection; its
answer is given only after the COMMIT, so an answer that was seen is durable (I6).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from scrapy_streaming.exceptions import LedgerError

T = TypeVar("T")
Command = Callable[[Connection], T]
_Queued = tuple[Callable[[Connection], Any], "Future[Any]"]
_Outcome = tuple[Any, BaseException | None]

#: Commands in one transaction at most: it bounds the wait of the first one.
MAX_BATCH: Final = 256


class Writer:
    """The writer thread; commands are answered with futures.

    Commands that wait while a transaction runs share the next one (group commit). Each has a
    savepoint of its own: one that raises is undone alone, and its neighbours do not notice.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        translate: Callable[[BaseException], BaseException],
    ) -> None:
        """Start the thread; return when it is connected, or raise what *connect* raised.

        *translate* turns an error of the database into one of the package.
        """
        self._translate = translate
        self._queue: queue.SimpleQueue[_Queued | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        opened: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._main, args=(connect, opened), name="ss-ledger-writer", daemon=True
        )
        self._thread.start()
        opened.result()

    def submit(self, command: Command[T]) -> Future[T]:
        """Return the future answer of *command*; raise ``ledger-closed`` after ``close``."""
        answer: Future[T] = Future()
        with self._closing:
            if self._closed:
                msg = "the ledger is closed; open it again to use it"
                raise LedgerError(msg, reason="ledger-closed")
            self._queue.put((command, answer))
        return answer

    def close(self) -> None:
        """Answer what is queued, close the connection and end the thread."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _main(self, connect: Callable[[], Connection], opened: Future[None]) -> None:
        try:
            connection = connect()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that opens
            opened.set_exception(self._translated(error))
            return
        opened.set_result(None)
        try:
            while batch := self._next_batch():
                self._answer(connection, batch)
        finally:
            connection.close()

    def _next_batch(self) -> list[_Queued]:
        """Wait for a command and return it with all that are queued behind it; empty at the end."""
        batch: list[_Queued] = []
        entry = self._queue.get()
        while entry is not None:
            batch.append(entry)
            if len(batch) == MAX_BATCH or self._queue.empty():
                return batch
            entry = self._queue.get()
        if batch:
            self._queue.put(None)  # closed behind these: found again after them
        return batch

    def _answer(self, connection: Connection, batch: list[_Queued]) -> None:
        """Run *batch* as one transaction, then give each command its own answer."""
        wanted = [entry for entry in batch if entry[1].set_running_or_notify_cancel()]
        if not wanted:
            return
        try:
            with connection.begin():
                outcomes = [_run(connection, command) for command, _ in wanted]
        except BaseException as error:  # noqa: BLE001 - handed to every future of the batch
            outcomes = [(None, error)] * len(wanted)
            _roll_back(connection)
        for (_, answer), (result, failure) in zip(wanted, outcomes, strict=True):
            if failure is None:
                answer.set_result(result)
            else:
                answer.set_exception(self._translated(failure))

    def _translated(self, error: BaseException) -> BaseException:
        known = self._translate(error)
        if known is not error:
            known.__cause__ = error
        return known


def _roll_back(connection: Connection) -> None:
    """End what a COMMIT that failed leaves open: to SQLAlchemy that transaction is over.

    If this fails too, so does the next BEGIN, and its commands are told why.
    """
    with suppress(connection.dialect.loaded_dbapi.Error):
        connection.connection.rollback()


def _run(connection: Connection, command: Callable[[Connection], Any]) -> _Outcome:
    """Return what *command* gave or raised; what it wrote is undone if it raised.

    Raises when the savepoint cannot be undone: the database has then ended the whole transaction
    (disk full, I/O error), and going on would write outside of one.
    """
    # spelled out: a nested transaction object for each command costs more than its statements
    connection.exec_driver_sql("SAVEPOINT command")
    try:
        result = command(connection)
        connection.exec_driver_sql("RELEASE SAVEPOINT command")
    except BaseException as error:  # noqa: BLE001 - handed to the command's future
        try:
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT command")
            connection.exec_driver_sql("RELEASE SAVEPOINT command")
        except SQLAlchemyError:
            raise error from None
        return None, error
    return result, None
