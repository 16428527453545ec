"""The ledger's database in SQLite: the file, pragmas, locks, clock, error codes.

What may live here: what is particular to SQLite. Nothing here depends on what a job is.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, cast

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Dialect,
    Double,
    Engine,
    RootTransaction,
    create_engine,
    event,
    literal_column,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from scrapy_streaming.exceptions import LedgerError, WriteFailed
from scrapy_streaming.storage import durable
from scrapy_streaming.storage.ledger.database import Clock, Reader
from scrapy_streaming.storage.ledger.sqlite_reader import GATE, SqliteReader
from scrapy_streaming.storage.planted import planted_kind

#: Seconds that a writer waits for another process's transaction before the attempt fails.
BUSY_SECONDS: Final = 30.0
#: Seconds of that which SQLite itself waits; they cannot be interrupted.
BUSY_STEP: Final = 1.0
#: Seconds between two attempts to get a lock that another process has: the first, and the longest.
TURN_POLL: Final = (0.001, 0.02)
#: A file up to this size is checked whenever it is opened (0.2 s), a larger one after an unclean end.
CHECKED_BYTES: Final = 32 << 20
#: Pages in the write-ahead log after which it is copied back into the file.
CHECKPOINT_PAGES: Final = 4000

_NOW: Final = "((julianday('now') - 2440587.5) * 86400.0)"
#: Arguments of the driver for a connection that begins no transaction by itself.
_PLAIN: Final = {"timeout": BUSY_SECONDS, "isolation_level": None}
_CORRUPT: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})
_LOCKED: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
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


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the ledger's file and those that SQLite and this module keep beside it."""
    return (path, *(path.with_name(path.name + end) for end in ("-journal", "-wal", "-shm", "-turn")))


class FileSwapped(LedgerError):
    """The ledger's file was replaced or removed since it was opened."""


class SqliteDatabase:
    """One SQLite file. Its transactions are ``BEGIN IMMEDIATE``, one process after the other.

    Processes take turns by a lock on a file beside the ledger, since SQLite's own waiting is a sleep that
    grows to 0.1 s, during which others may overtake. The process that has the turn also copies the
    write-ahead log back, because no other writes then: releases before 3.51.3 can corrupt the file if two
    do that, or one does while another commits (sqlite.org/wal.html, WAL-reset bug). Where such locks have
    no effect, SQLite's own still separate transactions.
    """

    def __init__(self, path: Path, *, fsync: bool, clock: Clock | None = None) -> None:
        self.path = path.absolute()
        self._fsync = fsync
        self._clock = clock
        self._opened: os.stat_result | None = None
        self._turns = -1
        self._in_gate = False
        # of no database: only to compile SQL
        self.dialect: Dialect = create_engine("sqlite+pysqlite://").dialect

    @property
    def now(self) -> ColumnElement[float]:
        """The SQL expression for SQLite's time in seconds since the epoch."""
        return literal_column(_NOW if self._clock is None else "ss_now()", Double())

    def connect(self, create: bool, /) -> Connection:
        """Return a connection; create an empty file if it is missing and *create* is true.

        With *fsync* off a killed process still loses nothing, and a power cut may lose the last commits; the
        file stays sound either way. Raises ``LedgerError``, also for a file that is not a database, which
        stays as it is.
        """
        try:
            self._find_file(create=create)
            GATE.add_writer(self.path)
            self._in_gate = True
            left_over = self.path.with_name(self.path.name + "-wal")
            unclean = left_over.exists() and left_over.stat().st_size > 0
            connection = _engine(self.path).connect()
        except (OSError, sqlite3.Error, DBAPIError, UnicodeDecodeError) as error:
            self._end()
            raise self.translate(error) from error
        try:
            raw = raw_connection(connection)
            if self._clock is not None:
                raw.create_function("ss_now", 0, self._clock)
            self._prepare(raw)
            small = self._file_size() <= CHECKED_BYTES
            if (unclean or small) and (wrong := _checked(raw, "quick_check", 1)):
                raise self._corrupt(wrong[0])
            self._opened = os.stat(self.path)
            raw.execute(f"PRAGMA busy_timeout = {BUSY_STEP * 1000:.0f}")
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            self.discard_connection(connection)
            raise self.translate(error) from error
        except LedgerError:
            self.discard_connection(connection)
            raise
        return connection

    @contextmanager
    def transaction(self, connection: Connection, give_up: Callable[[], bool], /) -> Iterator[None]:
        """Wait for the turn, then run one transaction; copy the log back when it is long."""
        self._take_turn(give_up)
        try:
            self._same_file()
            with _begun(connection, give_up):
                yield
            self._copy_back(connection)
        finally:
            fcntl.flock(self._turns, fcntl.LOCK_UN)

    def _take_turn(self, give_up: Callable[[], bool]) -> None:
        wait, longest = TURN_POLL
        ends = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                fcntl.flock(self._turns, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > ends or give_up():
                    raise self._locked() from None
                time.sleep(wait)
                wait = min(wait * 2, longest)
            else:
                return

    def _copy_back(self, connection: Connection) -> None:
        """Copy the log into the file when it is long; it waits for readers.

        The transaction is committed before, so an error here (a full disk) fails no command: the log
        stays, and the next transaction gets the same error.
        """
        log = self.path.with_name(self.path.name + "-wal")
        with suppress(OSError, sqlite3.Error):  # no log: nothing to copy
            if log.stat().st_size > CHECKPOINT_PAGES * 4096:
                raw_connection(connection).execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def migrating(self, connection: Connection) -> None:
        """Do nothing: the transaction itself excludes other writers."""

    def _same_file(self) -> None:
        """Raise ``FileSwapped`` unless the file is the opened one: writes would go to a removed file."""
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            now = None
        if now is None or self._opened is None or not os.path.samestat(now, self._opened):
            self._opened = None
            msg = f"the ledger {self.path} was removed or replaced while it was in use"
            raise FileSwapped(msg, reason="ledger-missing" if now is None else "ledger-unreadable")

    def is_disconnected(self, _connection: Connection, /) -> bool:
        """Return whether the connection's file is no longer the ledger."""
        return self._opened is None

    def discard_connection(self, connection: Connection) -> None:
        """Close the connection. SQLite does not touch the log of a file that was replaced."""
        connection.close()
        self._end()

    def _end(self) -> None:
        turns, self._turns = self._turns, -1
        if turns >= 0:
            os.close(turns)
        if self._in_gate:
            self._in_gate = False
            GATE.remove_writer(self.path)

    def interrupt(self) -> None:
        """Do nothing: every wait here checks itself whether to end."""

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Return a context with a reader that changes none of the ledger's files."""
        self._refuse_planted()
        yield SqliteReader(self.path)

    def check(self, connection: Connection, /) -> list[str]:
        """Return what SQLite finds damaged in tables and indexes, at most ten lines."""
        return _checked(raw_connection(connection), "integrity_check", 10)

    def is_damaged_row(self, error: BaseException, /) -> bool:
        """Return whether a text is not UTF-8, or a row breaks a rule of its table."""
        return _is_undecodable(error) or _code(error) == sqlite3.SQLITE_CONSTRAINT

    def is_transient(self, error: BaseException) -> bool:
        """Return whether the file is only locked or full, or was replaced."""
        if isinstance(error, FileSwapped):
            return error.reason != "ledger-missing"
        if isinstance(error, LedgerError):
            return error.reason == "ledger-locked"
        return _code(error) in _LOCKED | {sqlite3.SQLITE_FULL}

    def is_conflict(self, _error: BaseException, /) -> bool:
        """Return false: there is one transaction at a time."""
        return False

    def translate(self, error: BaseException) -> BaseException:
        """Return the package's error for one of SQLite or of the file system, any other as it is.

        Matched by ``sqlite_errorcode``, never by text: the text changes between releases.
        """
        path = self.path
        if isinstance(error, OSError):
            return LedgerError(f"cannot open the ledger {path}: {error}", reason="ledger-unreadable")
        cause = error.orig if isinstance(error, DBAPIError) else error
        if not isinstance(cause, sqlite3.Error | UnicodeDecodeError):
            return error
        code = _code(error)
        if code in _CORRUPT or _is_undecodable(cause):
            return self._corrupt(_printable(str(cause)))
        if code == sqlite3.SQLITE_FULL:
            return WriteFailed(f"no space for the ledger {path}: {cause}", reason="no-space")
        if code in _UNREADABLE:
            msg = f"cannot read or write the ledger {path}: {cause}; check its owner, mode and disk"
            return LedgerError(msg, reason="ledger-unreadable")
        if code in _LOCKED:
            return self._locked()
        return LedgerError(f"the ledger {path} refused a statement: {cause}")

    def _locked(self) -> LedgerError:
        msg = f"another process keeps the ledger {self.path} locked; is one stopped in the middle?"
        return LedgerError(msg, reason="ledger-locked")

    def _corrupt(self, what: str) -> LedgerError:
        msg = f"{self.path} is not a sound ledger ({what}); nothing was changed"
        return LedgerError(msg, reason="ledger-corrupt")

    def _find_file(self, *, create: bool) -> None:
        """Make an empty file of mode 0600 unless there is one; SQLite gives its others that mode.

        An existing file is not opened: closing a descriptor of it would drop the locks of other connections
        of this process (sqlite.org/howtocorrupt.html §2.2).
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._refuse_planted()
        if create:
            with suppress(FileExistsError):
                os.close(os.open(self.path, flags | os.O_EXCL, 0o600))
                if self._fsync:
                    durable.sync_folder(self.path.parent)
        if not os.path.lexists(self.path):
            msg = f"there is no ledger {self.path}"
            raise LedgerError(msg, reason="ledger-missing")
        self._turns = os.open(self.path.with_name(self.path.name + "-turn"), flags, 0o600)

    def _refuse_planted(self) -> None:
        """Raise if one of the ledger's files, or of those beside it, is not a plain file.

        SQLite opens them by name, and so would wait for the other end of a pipe, or write through a link.
        """
        for path in files_of(self.path):
            if kind := planted_kind(path):
                msg = f"{path} is {kind}, not a plain file: it was not opened; remove it or name another"
                raise LedgerError(msg, reason="ledger-unreadable")

    def _file_size(self) -> int:
        with suppress(FileNotFoundError):
            return self.path.stat().st_size
        return 0

    def _prepare(self, raw: sqlite3.Connection) -> None:
        """Set the pragmas, and check the one that a file system may refuse."""
        raw.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}")
        raw.execute("PRAGMA foreign_keys = ON")
        raw.execute(f"PRAGMA synchronous = {'FULL' if self._fsync else 'NORMAL'}")
        raw.execute("PRAGMA wal_autocheckpoint = 0")
        mode = _wal(raw)
        if mode != "wal":
            msg = (
                f"the ledger {self.path} cannot use a write-ahead log here (journal mode {mode}); put the "
                "store on a local disk, or use PostgreSQL (STREAMING_DATABASE_URL)"
            )
            raise LedgerError(msg, reason="ledger-unreadable")


def raw_connection(connection: Connection) -> sqlite3.Connection:
    """Return the driver's own connection beneath *connection*."""
    return cast("sqlite3.Connection", connection.connection.dbapi_connection)


def _code(error: BaseException) -> int | None:
    """Return SQLite's primary error code, ``None`` for an error of another kind."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    if not isinstance(cause, sqlite3.Error):
        return None
    return int(getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF


def _is_undecodable(error: BaseException) -> bool:
    """Return whether a text in a row is not UTF-8, which the driver reports without a code of SQLite.

    If an error message of SQLite quotes such a text, the driver raises a ``UnicodeDecodeError`` instead.
    """
    cause = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(cause, UnicodeDecodeError):
        return True
    return isinstance(cause, sqlite3.OperationalError) and not hasattr(cause, "sqlite_errorcode")


def _printable(text: str) -> str:
    """Return *text* with U+FFFD for characters that are not printable."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _engine(path: Path) -> Engine:
    """Return an engine whose transactions are ``BEGIN IMMEDIATE``.

    The driver's own transaction control is off: it would begin late and deferred, and a read
    that upgrades to a write gets BUSY at once, whatever the timeout
    (SQLAlchemy, "Enabling Non-Legacy SQLite Transactional Modes").
    """
    url = URL.create("sqlite+pysqlite", database=str(path))
    engine = create_engine(url, connect_args=_PLAIN, poolclass=NullPool, hide_parameters=True)
    event.listen(engine, "begin", _begin)
    return engine


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begun(connection: Connection, give_up: Callable[[], bool]) -> RootTransaction:
    """Begin a transaction, once no program that does not take turns has one."""
    ends = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return connection.begin()
        except DBAPIError as error:
            if _code(error) not in _LOCKED or time.monotonic() > ends or give_up():
                raise


def _wal(raw: sqlite3.Connection) -> str:
    """Turn the write-ahead log on and return the mode in force.

    The first change of mode needs exclusive use of the file and does not always call the busy handler, so
    processes that start together would fail (I20).
    """
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return str(raw.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
        time.sleep(0.01)


def _checked(raw: sqlite3.Connection, how: str, most: int) -> list[str]:
    """Return what the pragma *how* finds damaged in the file, at most *most* lines."""
    try:
        lines = [" ".join(str(row[0]).split()) for row in raw.execute(f"PRAGMA {how}({most})")]
    except sqlite3.DatabaseError as error:
        if _code(error) not in _CORRUPT:
            raise
        return [str(error)]
    return [] if lines == ["ok"] else lines
