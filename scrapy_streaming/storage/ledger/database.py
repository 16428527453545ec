"""The port between the ledger and a database; ``sqlite`` and ``postgres`` implement it.

What may live here: what the ledger needs of any database. Nothing here, or in the two, depends on what a
job is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, Protocol, TypeVar

from sqlalchemy import ColumnElement, Connection, Dialect

from scrapy_streaming.exceptions import LedgerError

#: A clock for tests in place of the database's; it returns seconds since the epoch.
Clock = Callable[[], float]
#: Attempts of a query that a writer interferes with each time.
READ_TRIES: Final = 20

T = TypeVar("T")


class ChangedMeanwhile(LedgerError):
    """What was read may be mixed from two states of the database: read again."""

    reason = "ledger-locked"


class Reader(Protocol):
    """Reads a database without changing a row or a file. For one thread."""

    def transaction(self) -> AbstractContextManager[Connection]:
        """Return a context that is one read-only transaction.

        Text that is not UTF-8 is read with lone surrogates for its bytes. The end of the context raises
        ``ChangedMeanwhile`` if what was read must not be used.
        """

    def wait_unlocked(self, seconds: float) -> None:
        """Raise ``LedgerError`` (``ledger-locked``) if a write transaction lasts longer than *seconds*."""


def read(reader: Reader, query: Callable[[Connection], T]) -> T:
    """Return the result of *query* in a transaction; run it again if a writer interfered.

    Raises ``ChangedMeanwhile`` after ``READ_TRIES`` attempts.
    """
    for _ in range(READ_TRIES - 1):
        try:
            with reader.transaction() as connection:
                return query(connection)
        except ChangedMeanwhile:
            continue
    with reader.transaction() as connection:
        return query(connection)


class Database(Protocol):
    """One database: how to reach it, its clock, and what its errors mean."""

    @property
    def now(self) -> ColumnElement[float]:
        """The SQL expression for the database's time in seconds since the epoch (ledger rule 7)."""

    @property
    def dialect(self) -> Dialect:
        """What statements are compiled for."""

    def connect(self, create: bool, /) -> Connection:
        """Return a new connection; create the database's file only if *create*. Raises ``LedgerError``."""

    def transaction(
        self, connection: Connection, give_up: Callable[[], bool], /
    ) -> AbstractContextManager[None]:
        """Return a context that is one write transaction, committed at its end.

        The wait for other writers ends with a transient error once *give_up* returns true.
        """

    def migrating(self, connection: Connection) -> None:
        """Exclude other processes from migrating until the current transaction ends (I20)."""

    def translate(self, error: BaseException) -> BaseException:
        """Return the package's error for one of the database's, any other as it is."""

    def is_transient(self, error: BaseException) -> bool:
        """Return whether a later attempt may succeed: locked, full, unreachable, a deadlock."""

    def is_conflict(self, error: BaseException, /) -> bool:
        """Return whether two transactions waited for each other's locks, which smaller ones would not."""

    def is_disconnected(self, connection: Connection, /) -> bool:
        """Return whether the connection is no longer usable."""

    def discard_connection(self, connection: Connection) -> None:
        """Close a connection, also one that is broken."""

    def interrupt(self) -> None:
        """End another thread's wait for an answer with an error, if there is one."""

    def reader(self) -> AbstractContextManager[Reader]:
        """Return a context with a reader of the database, on connections of its own."""

    def check(self, connection: Connection, /) -> list[str]:
        """Return what is unsound in the database's own files, in words."""

    def is_damaged_row(self, error: BaseException, /) -> bool:
        """Return whether a row has text that is not UTF-8, or breaks a constraint of its table."""
