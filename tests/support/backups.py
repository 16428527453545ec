"""An older copy of a ledger: taken while it is in use, and put back in its place.

What may live here: backup and restore of each kind of database, by the tools that users have.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from support.postgres import PostgresServer


class Backup:
    """An older copy of a ledger, and a way to put it back under those who use it."""

    def __init__(
        self, url: str, folder: Path, server: PostgresServer | None = None, *, swap: bool = True
    ) -> None:
        self._url, self._server, self._swap = url, server, swap
        self._path = Path(url.removeprefix("sqlite:///"))
        self._copy = folder / "older copy"

    def take(self) -> None:
        if self._server is not None:
            self._server.dump(self._url, self._copy)
            return
        with closing(sqlite3.connect(self._path)) as live, closing(sqlite3.connect(self._copy)) as copy:
            live.backup(copy)

    def put_back(self) -> None:
        if self._server is not None:
            self._restore(self._server)
        elif self._swap:
            self._swap_files()
        else:
            with (
                closing(sqlite3.connect(self._copy)) as copy,
                closing(sqlite3.connect(self._path, timeout=30)) as live,
            ):
                live.execute("PRAGMA wal_autocheckpoint = 0")  # SQLite's WAL-reset bug is not what is tested
                copy.backup(live)

    def _restore(self, server: PostgresServer) -> None:
        """Restore all of it or nothing, again until no worker's transaction crosses it."""
        for _ in range(20):
            try:
                return server.restore(self._url, self._copy)
            except RuntimeError as error:
                if "deadlock detected" not in str(error):
                    raise
        msg = "restored in vain twenty times"
        raise RuntimeError(msg)

    def _swap_files(self) -> None:
        """Replace the file, as a person does; its log first, which must never meet the other file."""
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        self._copy.rename(self._path)
