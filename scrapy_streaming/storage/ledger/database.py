"""What the ledger needs of a database, and which one a URL names.

The two that there are, ``sqlite`` and ``postgres``, know nothing of jobs.
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

        Waiting for other writers ends, with an error that ``passing`` knows, when *give_up* says so.
        """

    def migrating(self, connection: Connection) -> None:
        """Inside a transaction: let nobody else migrate before it ends (I20)."""

    def translate(self, error: BaseException) -> BaseException:
        """Return the package's error for one of the database's, any other as it is."""

    def passing(self, error: BaseException) -> bool:
        """Whether the same may well succeed later: locked, full, unreachable, a deadlock."""

    def collided(self, error: BaseException, /) -> bool:
        """Whether two transactions each wanted what the other had: a smaller one would not."""

    def lost(self, connection: Connection, /) -> bool:
        """Whether the connection is of no use any more."""

    def forget(self, connection: Connection) -> None:
        """Let go of a connection that is lost."""

    def interrupt(self) -> None:
        """End the wait for an answer that another thread is in, if there is one: it gets an error."""

    def reader(self) -> AbstractContextManager[Reader]:
        """Return a context with what reads the database on connections of its own; it changes nothing."""

    def check(self, connection: Connection, /) -> list[str]:
        """Return what is unsound in the database's own files, in words."""

    def misread(self, error: BaseException, /) -> bool:
        """Whether a row holds what it cannot: text that is not UTF-8, or what its table forbids."""
