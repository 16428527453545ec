"""The ledger's database in PostgreSQL: connections, clock, error codes.

What may live here: what is particular to PostgreSQL. Nothing here depends on what a job is.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Dialect,
    Double,
    Engine,
    create_engine,
    event,
    literal_column,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from scrapy_streaming.exceptions import LedgerError, WriteFailed
from scrapy_streaming.storage.ledger.database import Clock, Reader

#: Set for every session, in milliseconds: no wait for a lock, a statement or a client is unlimited.
LIMITS: Final = {
    "lock_timeout": 15_000,
    "statement_timeout": 60_000,
    "idle_in_transaction_session_timeout": 60_000,
}
#: The lock timeout of a reader, in milliseconds.
READ_LOCK_TIMEOUT: Final = 5_000
#: The advisory lock under which a database is migrated: "ss_ledger" in bytes.
MIGRATION_LOCK: Final = 0x73735F6C65646772
_CONNECT: Final = {
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # keepalives do nothing while what was sent is not yet acknowledged
    "application_name": "scrapy-streaming",
}
# by class or code (PostgreSQL, Appendix A): connection broken, out of resources, server shutting down or
# starting; serialization failure, deadlock, lock and statement timeouts
_TRANSIENT_CLASSES: Final = ("08", "53", "57P")
_CONFLICTS: Final = frozenset({"40001", "40P01"})
_TRANSIENT: Final = _CONFLICTS | {"55P03", "57014", "25P03"}
_FULL: Final = "53100"
_CORRUPT: Final = frozenset({"XX001", "XX002"})
_REFUSED_CLASSES: Final = ("28", "3D", "42501")


class PostgresDatabase:
    """One PostgreSQL database; each writer has one connection to it.

    READ COMMITTED: every guard is in the WHERE of its own UPDATE. Advisory locks last for one transaction:
    a connection pooler does not preserve those of a session.
    """

    def __init__(self, url: URL, *, fsync: bool, clock: Clock | None = None) -> None:
        self._url = url
        self._fsync = fsync
        self._clock = clock
        self._shown = url.set(query={}).render_as_string(hide_password=True)  # a query may hold one too
        self._raw: Any = None
        try:
            self._engine: Engine = create_engine(
                url,
                connect_args={**_CONNECT, **dict(url.query)},
                isolation_level="READ COMMITTED",
                poolclass=NullPool,
                hide_parameters=True,
            )
        except (ImportError, SQLAlchemyError) as error:
            msg = (
                f"STREAMING_DATABASE_URL={self._shown!r} needs a driver that is not installed ({error}): "
                "pip install 'scrapy-streaming[postgres]'"
            )
            raise LedgerError(msg, reason="driver-missing") from error
        self.dialect: Dialect = self._engine.dialect
        event.listen(self._engine, "connect", self._prepare)

    @property
    def now(self) -> ColumnElement[float]:
        """The SQL expression for the server's time; ``now()`` would be the transaction's start."""
        if self._clock is not None:
            return literal_column("CAST(current_setting('ss.now') AS DOUBLE PRECISION)", Double())
        return literal_column("CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)", Double())

    def connect(self, _create: bool, /) -> Connection:
        """Return a connection to a database that must exist.

        Raises ``LedgerError`` if the server cannot be reached or refuses the connection.
        """
        try:
            connection = self._engine.connect()
        except (OSError, DBAPIError) as error:
            raise self.translate(error) from error
        self._raw = connection.connection.dbapi_connection
        return connection

    def _prepare(self, raw: Any, _record: object) -> None:
        limits = dict(LIMITS) if self._fsync else {**LIMITS, "synchronous_commit": "off"}
        with raw.cursor() as cursor:
            for name, value in limits.items():
                cursor.execute(f"SET {name} = {value}")  # constants of this module
        raw.commit()

    @contextmanager
    def transaction(self, connection: Connection, _give_up: Callable[[], bool], /) -> Iterator[None]:
        """Run one transaction; the server's timeouts end any wait."""
        with connection.begin():
            if self._clock is not None:
                connection.exec_driver_sql(f"SET LOCAL ss.now = {self._clock()!r}")
            yield

    def migrating(self, connection: Connection) -> None:
        """Take the advisory lock until the transaction ends."""
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")

    def is_disconnected(self, connection: Connection, /) -> bool:
        """Return whether the connection is closed or broken."""
        if connection.closed or connection.invalidated:
            return True
        raw: Any = connection.connection.dbapi_connection
        return raw is None or bool(raw.closed)

    def discard_connection(self, connection: Connection) -> None:
        """Close the connection, also a broken one."""
        with suppress(SQLAlchemyError, OSError):
            connection.invalidate()
        with suppress(SQLAlchemyError, OSError):
            connection.close()

    def interrupt(self) -> None:
        """Shut the socket down, so that the thread that waits for the server's answer gets an error.

        A cancel request would not do: a server that does not answer does not accept one either.
        """
        with (
            suppress(OSError, self.dialect.loaded_dbapi.Error),
            socket.socket(fileno=os.dup(self._raw.fileno())) as end,
        ):
            end.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Return a context with a reader on its own connection; it needs the right to SELECT only."""
        with self._engine.connect() as connection:
            yield _PostgresReader(connection)

    def check(self, connection: Connection, /) -> list[str]:
        """Return nothing: the server checks its own files."""
        connection.exec_driver_sql("SELECT 1")
        return []

    def is_damaged_row(self, error: BaseException, /) -> bool:
        """Return whether a row breaks a rule of its table (class 23, integrity constraint violation)."""
        return (_state(error) or "").startswith("23")

    def is_transient(self, error: BaseException) -> bool:
        """Return whether the server is unreachable, busy or full, or wants the transaction repeated."""
        if isinstance(error, LedgerError):
            return error.reason in ("ledger-unreachable", "ledger-locked")
        state = _state(error)
        if state is None:
            return False
        # without a code there was no answer: the server was unreachable, or the connection broke
        return state == "" or state in _TRANSIENT or state.startswith(_TRANSIENT_CLASSES)

    def is_conflict(self, error: BaseException, /) -> bool:
        """Return whether it is a deadlock or a serialization failure."""
        return _state(error) in _CONFLICTS

    def translate(self, error: BaseException) -> BaseException:
        """Return the package's error for one of the server or the driver, any other as it is.

        Matched by SQLSTATE, never by text.
        """
        state = _state(error)
        if isinstance(error, OSError):
            state = ""
        if state is None:
            return error
        cause = str(error.orig if isinstance(error, DBAPIError) else error).strip().replace("\n", " ")
        text = f"the ledger {self._shown}: {cause}"
        if state == _FULL:
            return WriteFailed(f"no space for {text}", reason="no-space")
        if state in _CORRUPT:
            return LedgerError(text, reason="ledger-corrupt")
        if state in ("55P03", "57014"):
            return LedgerError(text, reason="ledger-locked")
        if state.startswith(_REFUSED_CLASSES) or state == "25006":
            return LedgerError(
                f"{text}; check user, password, database and rights", reason="ledger-unreadable"
            )
        if state == "":  # a refused connection has no code either
            text = f"{text}; is the server up, and are user, password and database right?"
            return LedgerError(text, reason="ledger-unreachable")
        if state.startswith(_TRANSIENT_CLASSES):
            return LedgerError(f"{text}; is the server up?", reason="ledger-unreachable")
        return LedgerError(text)


class _PostgresReader:
    """One connection whose transactions are READ ONLY, so that the server itself refuses to write."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Run one read-only transaction, which waits ``READ_LOCK_TIMEOUT`` at most for a lock."""
        with self._connection.begin():
            self._connection.exec_driver_sql("SET TRANSACTION READ ONLY")
            self._connection.exec_driver_sql(f"SET LOCAL lock_timeout = {READ_LOCK_TIMEOUT}")
            yield self._connection

    def wait_unlocked(self, _seconds: float) -> None:
        """Return at once: readers of PostgreSQL do not wait for writers."""


def _state(error: BaseException) -> str | None:
    """Return the SQLSTATE, ``""`` if the server sent none, ``None`` for an error of another kind."""
    cause: Any = error.orig if isinstance(error, DBAPIError) else error
    if not hasattr(cause, "sqlstate") or not hasattr(cause, "diag"):  # psycopg.Error, without importing it
        return None
    if type(cause).__name__ in ("ProgrammingError", "DataError", "NotSupportedError") and not cause.sqlstate:
        return "42000"  # refused by the driver itself: never transient
    return str(cause.sqlstate or "")
