"""The port between the ledger and a database; ``sqlite`` and ``postgres`` implement it.

Nothing here, and nothing in the two, knows what a job is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, Protocol, TypeVar

from sqlalchemy import ColumnElement, Connection, Dialect

from scrapy_streaming.exceptions import LedgerError

#: A clock for tests, in the place of the database's: gives seconds since the epoch.
Clock = Callable[[], float]
#: How often a query is run at most, while a writer comes in the middle each time.
READ_TRIES: Final = 20

T = TypeVar("T")


class ChangedMeanwhile(LedgerError):
    """What was read may be mixed from two states of the database: read again."""

    reason = "ledger-locked"


class Reader(Protocol):
    """Reads a database and changes neither a row nor a file. For one thread."""

    def transaction(self) -> AbstractContextManager[Connection]:
        """Return a context that is one read-only transaction.

        Text that is not UTF-8 is read with lone surrogates in the place of its bytes. The end raises
        ``ChangedMeanwhile`` if what was read may not be used.
        """

    def wait_unlocked(self, seconds: float) -> None:
        """Raise ``LedgerError`` (``ledger-locked``) if a write transaction lasts longer than *seconds*."""


def read(reader: Reader, query: Callable[[Connection], T]) -> T:
    """Return what *query* gives in a transaction, run again if a writer came in the middle."""
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
        """Return a new connection; make the database's file only if *create* says so."""

    def transaction(
        self, connection: Connection, give_up: Callable[[], bool], /
    ) -> AbstractContextManager[None]:
        """Return a context that is one write transaction, committed at its end.

        The wait for other writers ends with a transient error once *give_up* returns true.
        """

    def migrating(self, connection: Connection) -> None:
        """Inside a transaction: keep other processes from migrating until it ends (I20)."""

    def translate(self, error: BaseException) -> BaseException:
        """Return the package's error for one of the database's, any other as it is."""

    def is_transient(self, error: BaseException) -> bool:
        """Return whether the same may succeed later: locked, full, unreachable, a deadlock."""

    def is_conflict(self, error: BaseException, /) -> bool:
        """Return whether two transactions waited for each other's locks: smaller ones would not."""

    def is_disconnected(self, connection: Connection, /) -> bool:
        """Return whether the connection cannot be used any more."""

    def discard_connection(self, connection: Connection) -> None:
        """Close a connection, also one that is broken."""

    def interrupt(self) -> None:
        """End another thread's wait for an answer with an error, if there is one."""

    def reader(self) -> AbstractContextManager[Reader]:
        """Return a context with what reads the database on connections of its own; it changes nothing."""

    def check(self, connection: Connection, /) -> list[str]:
        """Return what is unsound in the database's own files, in words."""

    def is_damaged_row(self, error: BaseException, /) -> bool:
        """Return whether a row holds text that is not UTF-8, or what its table forbids."""
