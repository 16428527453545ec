"""What is particular to SQLite: the file, its pragmas, its clock, its error codes.

Nothing here knows what a job is.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

from sqlalchemy import URL, ColumnElement, Connection, Double, Engine, create_engine, event, literal_column
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from scrapy_streaming.exceptions import LedgerError, WriteFailed

#: A clock for tests: gives seconds since the epoch.
Clock = Callable[[], float]

#: Seconds that a writer waits for another process's transaction.
BUSY_SECONDS: Final = 30.0

_NOW: Final = "((julianday('now') - 2440587.5) * 86400.0)"
_CORRUPT: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})
_UNREADABLE: Final = frozenset(
    {
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_AUTH,
        sqlite3.SQLITE_NOLFS,
        sqlite3.SQLITE_IOERR,
    }
)


def now(clock: Clock | None = None) -> ColumnElement[float]:
    """Return the SQL expression for the database's time in seconds since the epoch (rule 7)."""
    return literal_column(_NOW if clock is None else "ss_now()", Double())


def connect(path: Path, *, fsync: bool, clock: Clock | None = None) -> Connection:
    """Return a connection to the ledger at *path*; an empty file is made if there is none.

    Each of its transactions is ``BEGIN IMMEDIATE``. With *fsync* off a killed process still
    loses nothing and a power cut may lose the last commits; the file stays sound either way.
    Raises ``LedgerError``, and leaves a file that is no ledger as it is.
    """
    try:
        _create_file(path, fsync=fsync)
        left_over = path.with_name(path.name + "-wal")
        unclean = left_over.exists() and left_over.stat().st_size > 0
        connection = _engine(path).connect()
    except (OSError, sqlite3.Error, DBAPIError) as error:
        raise translate(error, path) from error
    try:
        raw = raw_connection(connection)
        if clock is not None:
            raw.create_function("ss_now", 0, clock)
        _prepare(raw, path, fsync=fsync)
        if unclean:
            _check(raw, path)
    except sqlite3.Error as error:
        connection.close()
        raise translate(error, path) from error
    except LedgerError:
        connection.close()
        raise
    return connection


def raw_connection(connection: Connection) -> sqlite3.Connection:
    """Return the driver's own connection beneath *connection*."""
    return cast("sqlite3.Connection", connection.connection.dbapi_connection)


def translate(error: BaseException, path: Path) -> BaseException:
    """Return the package's error for one of SQLite or of the file system, any other as it is.

    Matched by ``sqlite_errorcode``, never by text: the text changes between releases.
    """
    if isinstance(error, OSError):
        return LedgerError(f"cannot open the ledger {path}: {error}", reason="ledger-unreadable")
    cause = error.orig if isinstance(error, DBAPIError) else error
    if not isinstance(cause, sqlite3.Error):
        return error
    code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in _CORRUPT:
        return _corrupt(path, str(cause))
    if code == sqlite3.SQLITE_FULL:
        return WriteFailed(f"no space for the ledger {path}: {cause}", reason="no-space")
    if code in _UNREADABLE:
        msg = f"cannot read or write the ledger {path}: {cause}; check its owner, mode and disk"
        return LedgerError(msg, reason="ledger-unreadable")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return LedgerError(f"another process kept the ledger {path} locked for {BUSY_SECONDS:.0f} s")
    return LedgerError(f"the ledger {path} refused a statement: {cause}")


def _corrupt(path: Path, what: str) -> LedgerError:
    msg = (
        f"{path} is not a sound ledger ({what}); nothing was changed. To recover, move the file "
        "away and run `scrapy streaming rebuild`"
    )
    return LedgerError(msg, reason="ledger-corrupt")


def _create_file(path: Path, *, fsync: bool) -> None:
    """Make an empty file of mode 0600 unless there is one; SQLite gives its others that mode.

    A file that is there is not opened: closing a descriptor of it would drop the locks that
    another connection of this process holds (sqlite.org/howtocorrupt.html §2.2).
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        if not stat.S_ISREG(path.lstat().st_mode):
            msg = f"the ledger {path} is not a plain file; remove it or name another"
            raise LedgerError(msg, reason="ledger-unreadable") from None
        return
    try:
        os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
    if fsync:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _engine(path: Path) -> Engine:
    """Return an engine whose transactions are ``BEGIN IMMEDIATE``.

    The driver's own transaction control is off: it would begin late and deferred, and a read
    that upgrades to a write gets BUSY at once, whatever the timeout
    (SQLAlchemy, "Enabling Non-Legacy SQLite Transactional Modes").
    """
    engine = create_engine(
        URL.create("sqlite+pysqlite", database=str(path.absolute())),
        connect_args={"timeout": BUSY_SECONDS, "isolation_level": None},
        poolclass=NullPool,
        hide_parameters=True,
    )
    event.listen(engine, "begin", _begin)
    return engine


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _prepare(raw: sqlite3.Connection, path: Path, *, fsync: bool) -> None:
    """Set the pragmas, and read back the one that a file system may refuse."""
    raw.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}")
    raw.execute("PRAGMA foreign_keys = ON")
    raw.execute(f"PRAGMA synchronous = {'FULL' if fsync else 'NORMAL'}")
    mode = _wal(raw)
    if mode != "wal":
        msg = (
            f"the ledger {path} cannot use a write-ahead log here (journal mode {mode}); put the "
            "store on a local disk, or use PostgreSQL"
        )
        raise LedgerError(msg, reason="ledger-unreadable")


def _wal(raw: sqlite3.Connection) -> str:
    """Turn the write-ahead log on and return the mode in force.

    The first change of mode wants the file for itself and does not always call the busy
    handler, so that processes starting together would refuse each other (I20).
    """
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return str(raw.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
        time.sleep(0.01)


def _check(raw: sqlite3.Connection, path: Path) -> None:
    """Raise ``ledger-corrupt`` unless the file is sound; asked after an unclean end only."""
    answer = str(raw.execute("PRAGMA quick_check(1)").fetchone()[0])
    if answer != "ok":
        raise _corrupt(path, answer)
