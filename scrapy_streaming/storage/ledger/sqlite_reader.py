"""Reading a ledger in SQLite without changing any of its files: no byte, no time, no new file.

What may live here: read-only connections, and the choice of how to open one. By default SQLite creates a
write-ahead log and its index beside a file that no process has open, and writes to the index of one that is
in use. How to avoid that depends on which files are present.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, cast
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.storage.ledger.database import ChangedMeanwhile

#: Seconds that a reader waits while SQLite briefly excludes readers.
READ_SECONDS: Final = 5.0
#: For a ledger that its last writer closed: all data is in one file, and no process writes to it.
_CLOSED: Final = {"immutable": "1"}
#: For a ledger with a log: SQLite reads the log's index, or makes one in memory if no writer runs.
_LOGGED: Final = {"mode": "ro", "readonly_shm": "1"}
#: For a ledger that this process writes to: its connections share one index, which must stay writable.
_SHARED: Final = {"mode": "ro"}
#: The byte of the index that a writer locks (sqlite.org/walformat.html, "WAL Locks").
_WRITE_LOCK: Final = 120
_POLL_SECONDS: Final = 0.02

Files = tuple[tuple[int, ...] | None, ...]


class _Gate:
    """Separates readers and writers of this process, which SQLite would let share one read-only index.

    A writer waits until the readers of the same file that opened before it have ended.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._writers: Counter[Path] = Counter()
        self._readers: Counter[Path] = Counter()

    def add_writer(self, path: Path) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._readers[path])
            self._writers[path] += 1

    def remove_writer(self, path: Path) -> None:
        with self._changed:
            self._writers[path] -= 1

    @contextmanager
    def reading(self, path: Path) -> Iterator[bool]:
        """Yield whether this process also writes to the file."""
        with self._changed:
            shared = self._writers[path] > 0
            self._readers[path] += not shared
        try:
            yield shared
        finally:
            with self._changed:
                self._readers[path] -= not shared
                self._changed.notify_all()


GATE: Final = _Gate()


class SqliteReader:
    """Opens the file anew for each transaction, so that writers can truncate the log in between."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engines: dict[str, Engine] = {}

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Yield a connection on which each statement reads one state of the ledger.

        Raises ``LedgerError``: ``ledger-missing``; ``ledger-unreadable`` for a log without an index, which
        cannot be made without writing. Raises ``ChangedMeanwhile`` as ``Reader.transaction``.
        """
        with GATE.reading(self._path) as shared:
            before = self._files()
            how = _SHARED if shared else self._way(before)
            try:
                with self._engine(how).connect() as connection:
                    raw = cast("sqlite3.Connection", connection.connection.dbapi_connection)
                    raw.text_factory = lambda text: text.decode(errors="surrogateescape")
                    yield connection
            except Exception as error:
                if self._is_mixed(how, before) or _is_readonly(error):
                    raise self._changed() from error
                raise
            if self._is_mixed(how, before):
                raise self._changed()

    def wait_unlocked(self, seconds: float) -> None:
        """Raise ``LedgerError`` (``ledger-locked``) if a write transaction lasts longer than *seconds*."""
        ends = time.monotonic() + seconds
        while self._is_write_locked():
            if time.monotonic() > ends:
                msg = f"another process keeps the ledger {self._path} locked; is one stopped in the middle?"
                raise LedgerError(msg, reason="ledger-locked")
            time.sleep(_POLL_SECONDS)

    def _is_write_locked(self) -> bool:
        """Return whether another process has a write transaction open."""
        with GATE.reading(self._path) as shared:
            if shared or sys.platform != "linux":  # closing the index would drop this process's own locks
                return False
            try:
                fd = os.open(self._beside("-shm"), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                return False  # no index: no process has the ledger open
            try:
                wanted = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, _WRITE_LOCK, 1, 0)
                held: int = struct.unpack("hhqqi", fcntl.fcntl(fd, fcntl.F_GETLK, wanted))[0]
                return held != fcntl.F_UNLCK
            finally:
                os.close(fd)

    def _way(self, files: Files) -> dict[str, str]:
        database, log, index, journal = files
        if database is None:
            msg = f"there is no ledger {self._path}"
            raise LedgerError(msg, reason="ledger-missing")
        if log is not None and index is not None:
            return _LOGGED
        if (log is not None and _size(log)) or (journal is not None and _size(journal)):
            msg = (
                f"the ledger {self._path} was not closed, and reading it needs a file that is missing; "
                "`scrapy streaming migrate` or a crawl, which may write to it, repairs that"
            )
            raise LedgerError(msg, reason="ledger-unreadable")
        return _CLOSED

    def _is_mixed(self, how: dict[str, str], before: Files) -> bool:
        """Return whether a writer opened the file while it was read without locks."""
        return how is _CLOSED and self._files() != before

    def _changed(self) -> ChangedMeanwhile:
        msg = f"other processes changed the ledger {self._path} during each attempt to read it; try again"
        return ChangedMeanwhile(msg)

    def _files(self) -> Files:
        return tuple(_stat(path) for path in (self._path, *map(self._beside, ("-wal", "-shm", "-journal"))))

    def _beside(self, end: str) -> Path:
        return self._path.with_name(self._path.name + end)

    def _engine(self, how: dict[str, str]) -> Engine:
        [*_, key] = how
        if key not in self._engines:
            database = f"file:{quote(os.fsencode(self._path))}"
            url = URL.create("sqlite+pysqlite", database=database, query={**how, "uri": "true"})
            given = {"timeout": READ_SECONDS, "isolation_level": None}
            self._engines[key] = create_engine(
                url, connect_args=given, poolclass=NullPool, hide_parameters=True
            )
        return self._engines[key]


def _stat(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _size(found: tuple[int, ...]) -> int:
    return found[1]


def _is_readonly(error: BaseException) -> bool:
    """Return whether SQLite had to write in order to read, since the index was changing."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return getattr(cause, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_READONLY
