"""The writer: one thread with one connection, which runs every command of a ledger, many per transaction.

What may live here: queueing, transactions and retries; nothing depends on what a command does. The future
of a command is done only after the COMMIT, so a result that was seen is durable (I6). While the database is
unreachable, locked or full, commands wait, and their callers do not.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, closing, suppress
from operator import itemgetter
from typing import Any, Final, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.storage.failpoints import failpoint
from scrapy_streaming.storage.ledger.database import Database
from scrapy_streaming.storage.ledger.prepared import Command, Session
from scrapy_streaming.storage.ledger.records import damaged_row

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

T = TypeVar("T")
_Queued = tuple[Callable[[Session], Any], "Future[Any]", str]
_Outcome = tuple[Any, BaseException | None]
_URGENT_WAITS: Final = object()

#: Commands in one transaction at most, which bounds the wait of the first one.
MAX_BATCH: Final = 256
#: Seconds that commands wait for a database that is unreachable, locked or full, before they fail.
PATIENCE: Final = 300.0
#: The same once the ledger is being closed.
CLOSING_PATIENCE: Final = 2.0
#: Seconds between two attempts: the first, and the longest.
PAUSE: Final = (0.05, 2.0)


class Writer:
    """The writer thread; each command has a future.

    Commands that arrive while a transaction runs share the next one (group commit). Each has its own
    savepoint: one that raises is rolled back alone. If the answer to a COMMIT does not arrive, the batch
    runs again, and commands find what they did the first time.
    """

    def __init__(
        self,
        database: Database,
        opened: Callable[[Connection], None],
        *,
        create: bool,
        patience: float = PATIENCE,
    ) -> None:
        """Start the thread; return when it is connected, or raise why it cannot connect.

        *opened* is called with each new connection, inside a transaction of its own.
        """
        self._database = database
        self._opened = opened
        self._patience = patience
        self._connection: Connection | None = None
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()  # of _Queued; None at the end
        self._urgent: deque[_Queued] = deque()
        self._closing = threading.Lock()
        self._closed = False
        self._closing_soon = threading.Event()
        self._batch_began: float | None = None  # when the current batch began, by the monotonic clock
        self._last_error: BaseException | None = None  # the error of the database when patience ended
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._main, args=(create, ready), name="ss-ledger-writer", daemon=True
        )
        self._thread.start()
        ready.result()

    def submit(self, command: Command[T], key: str = "", *, urgent: bool = False) -> Future[T]:
        """Queue *command* and return its future; raise ``LedgerError`` (``ledger-closed``) after ``close``.

        *key*: the job that it changes. In one transaction jobs are locked in the order of their keys: two
        writers that lock the same ones in different order would wait a second for the database to detect
        the deadlock. *urgent*: it runs before the queued commands, in a transaction of its own.
        """
        answer: Future[T] = Future()
        with self._closing:
            if self._closed:
                msg = "the ledger is closed; open it again to use it"
                raise LedgerError(msg, reason="ledger-closed")
            if urgent:
                self._urgent.append((command, answer, key))
            self._queue.put(_URGENT_WAITS if urgent else (command, answer, key))
        return answer

    def close(self) -> None:
        """Run what is queued, close the connection and end the thread.

        If the database does not answer for ``CLOSING_PATIENCE`` seconds, the queued commands fail; a
        connection that is just being made may take longer.
        """
        with self._closing:
            if not self._closed:
                self._closed = True
                self._closing_soon.set()
                self._queue.put(None)
        hurried = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(CLOSING_PATIENCE / 8)
            began = self._batch_began
            if began is not None and time.monotonic() - max(began, hurried) > CLOSING_PATIENCE * 1.25:
                self._database.interrupt()

    def _main(self, create: bool, ready: Future[None]) -> None:
        try:
            self._connect(create=create)
        except BaseException as error:  # noqa: BLE001 - raised again by ready.result(), in the thread that opens the ledger
            ready.set_exception(self._translated(error))
            return
        ready.set_result(None)
        try:
            while (batch := self._next_batch()) is not None:
                while self._urgent:
                    self._answer([self._urgent.popleft()])
                self._answer(batch)
        finally:
            self._drop()

    def _connect(self, *, create: bool) -> Connection:
        if self._connection is None:
            with ExitStack() as undo:
                connection = self._database.connect(create)
                undo.callback(self._database.discard_connection, connection)
                with self._database.transaction(connection, self._closing_soon.is_set):
                    self._opened(connection)
                undo.pop_all()
            self._connection = connection
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._database.discard_connection(connection)

    def _next_batch(self) -> list[_Queued] | None:
        """Wait for a command and return it with all that are queued after it; ``None`` at the end.

        It is empty if only urgent commands came.
        """
        batch: list[_Queued] = []
        entry = self._queue.get()
        while entry is not None:
            if entry is not _URGENT_WAITS:
                batch.append(entry)
            if len(batch) == MAX_BATCH or self._queue.empty():
                return batch
            entry = self._queue.get()
        if not batch and not self._urgent:
            return None
        self._queue.put(None)  # the end again, to be found after these
        return batch

    def _answer(self, batch: list[_Queued]) -> None:
        """Run *batch* as one transaction, then set the result of each future."""
        wanted = [entry for entry in batch if entry[1].set_running_or_notify_cancel()]
        if not wanted:
            return
        wanted.sort(key=itemgetter(2))
        self._batch_began = time.monotonic()
        outcomes = self._outcomes(wanted, self._batch_began, again=False)
        self._batch_began = None
        for (_, answer, key), (result, failure) in zip(wanted, outcomes, strict=True):
            if failure is None:
                answer.set_result(result)
            else:
                answer.set_exception(self._translated(failure, key))

    def _outcomes(self, batch: list[_Queued], began: float, *, again: bool) -> list[_Outcome]:
        """Return each command's outcome, once the database takes the transaction or patience ends.

        A batch that conflicts with another writer's is run one command at a time: each locks one row,
        so they wait for one another and do not conflict again.
        """
        if self._last_error is not None and self._closing_soon.is_set():
            return [(None, self._last_error)] * len(batch)  # the wait for the database is over
        pause, longest = PAUSE
        warned = False
        while True:
            try:
                outcomes = self._commit(batch, again=again)
            except BaseException as error:  # noqa: BLE001 - tried again, or raised again by the future of each command of the batch
                if len(batch) > 1 and self._database.is_conflict(error):
                    each = (self._outcomes([entry], began, again=again) for entry in batch)
                    return [outcome for outcomes in each for outcome in outcomes]
                if not self._database.is_transient(error):
                    return [(None, error)] * len(batch)
                if self._out_of_patience(began):
                    self._last_error = error
                    return [(None, error)] * len(batch)
                if not warned and time.monotonic() - began > 1:
                    warned = True
                    logger.warning("claiming pauses until the ledger answers: %s", self._translated(error))
                again = True
                self._wait(pause)
                pause = min(pause * 2, longest)
            else:
                if warned:
                    logger.info("the ledger answers again after %.0f s", time.monotonic() - began)
                return outcomes

    def _wait(self, seconds: float) -> None:
        if self._closing_soon.wait(seconds):
            time.sleep(PAUSE[0])  # the event stays set, so that wait() no longer pauses

    def _out_of_patience(self, began: float) -> bool:
        patience = min(self._patience, CLOSING_PATIENCE) if self._closing_soon.is_set() else self._patience
        return time.monotonic() - began >= patience

    def _commit(self, batch: list[_Queued], *, again: bool) -> list[_Outcome]:
        connection = self._connect(create=False)
        with ExitStack() as undo:
            undo.callback(self._end_failed, connection)
            with (
                closing(Session(connection, again=again)) as session,
                self._database.transaction(connection, self._closing_soon.is_set),
            ):
                outcomes = [self._run(session, command) for command, _, _ in batch]
                failpoint("commit")
            undo.pop_all()
        failpoint("committed")
        return outcomes

    def _end_failed(self, connection: Connection) -> None:
        """End the transaction of a batch that failed."""
        if self._database.is_disconnected(connection):
            self._drop()
        else:
            _roll_back(connection)

    def _translated(self, error: BaseException, key: str = "") -> BaseException:
        """Return the package's error; a damaged row becomes an error of its job alone."""
        known = self._database.translate(error)
        if key and self._database.is_damaged_row(error):
            known = damaged_row(key, known.args[0])
        if known is not error:
            known.__cause__ = error
        return known

    def _run(self, session: Session, command: Callable[[Session], Any]) -> _Outcome:
        """Return what *command* returned or raised; what it wrote is undone if it raised.

        Raises if the savepoint cannot be undone: the database has then ended the whole transaction (disk
        full, I/O error), and to continue would write outside of one. Also raises transient errors, after
        which the whole transaction runs again.
        """
        # as plain SQL: a nested transaction object for each command costs more than its statements
        session.plain("SAVEPOINT command")
        try:
            result = command(session)
            session.plain("RELEASE SAVEPOINT command")
        except BaseException as error:  # raised again at once, or by the command's own future
            if self._database.is_transient(error):
                raise
            try:
                session.undo()
                session.plain("RELEASE SAVEPOINT command")
            except self._database.dialect.loaded_dbapi.Error:
                raise error from None  # the first error says why, and the whole batch fails
            return None, error
        return result, None


def _roll_back(connection: Connection) -> None:
    """Roll back what a failed COMMIT leaves open: for SQLAlchemy that transaction has ended.

    If this fails too, so does the next BEGIN, and its commands get that error.
    """
    with suppress(SQLAlchemyError, connection.dialect.loaded_dbapi.Error):
        connection.connection.rollback()
