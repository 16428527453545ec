"""One thread, one connection: every command of a ledger runs here, many to a transaction.

Nothing here knows what a command does. A command is a callable that takes the session; its
answer is given only after the COMMIT, so an answer that was seen is durable (I6). While the
database is away, locked or full the commands wait, and nobody else does.
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
from scrapy_streaming.storage.ledger.prepared import Session
from scrapy_streaming.storage.ledger.records import damaged_row

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

T = TypeVar("T")
Command = Callable[[Session], T]
_Queued = tuple[Callable[[Session], Any], "Future[Any]", str]
_Outcome = tuple[Any, BaseException | None]
_WAKE: Final = object()

#: Commands in one transaction at most: it bounds the wait of the first one.
MAX_BATCH: Final = 256
#: Seconds that commands wait for a database that is away, locked or full, before they are told.
PATIENCE: Final = 300.0
#: The same once the ledger is being closed.
CLOSING_PATIENCE: Final = 2.0
#: Seconds between two tries, at first and at most.
PAUSE: Final = (0.05, 2.0)


class Writer:
    """The writer thread; commands are answered with futures.

    Commands that wait while a transaction runs share the next one (group commit). Each has a
    savepoint of its own: one that raises is undone alone, and its neighbours do not notice. A
    batch whose COMMIT was lost is run again: commands find what they did the first time.
    """

    def __init__(
        self,
        database: Database,
        opened: Callable[[Connection], None],
        *,
        create: bool,
        patience: float = PATIENCE,
    ) -> None:
        """Start the thread; return when it is connected, or raise why it cannot be.

        *opened* is called with each new connection, inside a transaction of its own.
        """
        self._database = database
        self._opened = opened
        self._patience = patience
        self._connection: Connection | None = None
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()  # of _Queued, _WAKE, and None at the end
        self._urgent: deque[_Queued] = deque()
        self._closing = threading.Lock()
        self._closed = False
        self._hurry = threading.Event()
        self._began: float | None = None  # the batch that is being answered, by the monotonic clock
        self._last_word: BaseException | None = None  # of a database that was not waited for any longer
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._main, args=(create, ready), name="ss-ledger-writer", daemon=True
        )
        self._thread.start()
        ready.result()

    def submit(self, command: Command[T], key: str = "", *, urgent: bool = False) -> Future[T]:
        """Return the future answer of *command*; raise ``ledger-closed`` after ``close``.

        *key*: the job that it writes about. In one transaction jobs are locked in the order of their
        keys: two writers that lock the same ones crosswise would wait until the database notices,
        a second each time. *urgent*: it goes before what is queued, in a transaction of its own.
        """
        answer: Future[T] = Future()
        with self._closing:
            if self._closed:
                msg = "the ledger is closed; open it again to use it"
                raise LedgerError(msg, reason="ledger-closed")
            if urgent:
                self._urgent.append((command, answer, key))
            self._queue.put(_WAKE if urgent else (command, answer, key))
        return answer

    def close(self) -> None:
        """Answer what is queued, close the connection and end the thread.

        A database that does not answer is waited for ``CLOSING_PATIENCE`` seconds, and what is
        queued is told so; a connection that is just being made may take longer.
        """
        with self._closing:
            if not self._closed:
                self._closed = True
                self._hurry.set()
                self._queue.put(None)
        hurried = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(CLOSING_PATIENCE / 8)
            began = self._began
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
                undo.callback(self._database.forget, connection)
                with self._database.transaction(connection, self._hurry.is_set):
                    self._opened(connection)
                undo.pop_all()
            self._connection = connection
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._database.forget(connection)

    def _next_batch(self) -> list[_Queued] | None:
        """Wait for a command and return it with all that are queued behind it; ``None`` at the end.

        It is empty if only urgent commands came.
        """
        batch: list[_Queued] = []
        entry = self._queue.get()
        while entry is not None:
            if entry is not _WAKE:
                batch.append(entry)
            if len(batch) == MAX_BATCH or self._queue.empty():
                return batch
            entry = self._queue.get()
        if not batch and not self._urgent:
            return None
        self._queue.put(None)  # closed behind these: found again after them
        return batch

    def _answer(self, batch: list[_Queued]) -> None:
        """Run *batch* as one transaction, then give each command its own answer."""
        wanted = [entry for entry in batch if entry[1].set_running_or_notify_cancel()]
        if not wanted:
            return
        wanted.sort(key=itemgetter(2))
        self._began = time.monotonic()
        outcomes = self._outcomes(wanted, self._began, again=False)
        self._began = None
        for (_, answer, key), (result, failure) in zip(wanted, outcomes, strict=True):
            if failure is None:
                answer.set_result(result)
            else:
                answer.set_exception(self._translated(failure, key))

    def _outcomes(self, batch: list[_Queued], began: float, *, again: bool) -> list[_Outcome]:
        """Return each command's outcome, once the database takes the transaction or patience ends.

        A batch that collides with another writer's is run a command at a time: those hold one row
        each, so they wait for one another and do not collide over and over.
        """
        if self._last_word is not None and self._hurry.is_set():
            return [(None, self._last_word)] * len(batch)  # it had its time, and nobody waits any more
        (pause, longest), told = PAUSE, False
        while True:
            try:
                outcomes = self._commit(batch, again=again)
            except BaseException as error:  # noqa: BLE001 - tried again, or raised again by the future of each command of the batch
                if len(batch) > 1 and self._database.collided(error):
                    each = (self._outcomes([entry], began, again=again) for entry in batch)
                    return [outcome for outcomes in each for outcome in outcomes]
                if not self._database.passing(error):
                    return [(None, error)] * len(batch)
                if self._out_of_patience(began):
                    self._last_word = error
                    return [(None, error)] * len(batch)
                if not told and time.monotonic() - began > 1:
                    told = True
                    logger.warning("claiming pauses until the ledger answers: %s", self._translated(error))
                again = True
                self._wait(pause)
                pause = min(pause * 2, longest)
            else:
                if told:
                    logger.info("the ledger answers again after %.0f s", time.monotonic() - began)
                return outcomes

    def _wait(self, seconds: float) -> None:
        if self._hurry.wait(seconds):
            time.sleep(PAUSE[0])  # set for good: without this the last tries would be thousands

    def _out_of_patience(self, began: float) -> bool:
        patience = min(self._patience, CLOSING_PATIENCE) if self._hurry.is_set() else self._patience
        return time.monotonic() - began >= patience

    def _commit(self, batch: list[_Queued], *, again: bool) -> list[_Outcome]:
        connection = self._connect(create=False)
        with ExitStack() as undo:
            undo.callback(self._give_up, connection)
            with (
                closing(Session(connection, again=again)) as session,
                self._database.transaction(connection, self._hurry.is_set),
            ):
                outcomes = [self._run(session, command) for command, _, _ in batch]
                failpoint("commit")
            undo.pop_all()
        failpoint("committed")
        return outcomes

    def _give_up(self, connection: Connection) -> None:
        """Leave nothing of a batch that failed in an open transaction."""
        if self._database.lost(connection):
            self._drop()
        else:
            _roll_back(connection)

    def _translated(self, error: BaseException, key: str = "") -> BaseException:
        """Return the package's error; one row that cannot be read is the fault of its job alone."""
        known = self._database.translate(error)
        if key and self._database.misread(error):
            known = damaged_row(key, known.args[0])
        if known is not error:
            known.__cause__ = error
        return known

    def _run(self, session: Session, command: Callable[[Session], Any]) -> _Outcome:
        """Return what *command* gave or raised; what it wrote is undone if it raised.

        Raises when the savepoint cannot be undone: the database has then ended the whole
        transaction (disk full, I/O error), and going on would write outside of one. Raises too
        what may pass: the whole transaction is then run again.
        """
        # spelled out: a nested transaction object for each command costs more than its statements
        session.plain("SAVEPOINT command")
        try:
            result = command(session)
            session.plain("RELEASE SAVEPOINT command")
        except BaseException as error:  # raised again at once, or by the command's own future
            if self._database.passing(error):
                raise
            try:
                session.undo()
                session.plain("RELEASE SAVEPOINT command")
            except self._database.dialect.loaded_dbapi.Error:
                raise error from None  # raised again: the first error says why, and the batch is told
            return None, error
        return result, None


def _roll_back(connection: Connection) -> None:
    """End what a COMMIT that failed leaves open: to SQLAlchemy that transaction is over.

    If this fails too, so does the next BEGIN, and its commands are told why.
    """
    with suppress(SQLAlchemyError, connection.dialect.loaded_dbapi.Error):
        connection.connection.rollback()
