"""The paths and URLs of a store's files by the settings, and checks that those are regular files.

What may live here: decisions that need no open file.
"""

from __future__ import annotations

from pathlib import Path

from scrapy_streaming.exceptions import LedgerError, StoreError
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import filesystems
from scrapy_streaming.storage.planted import refuse_planted


def ledger_file(settings: StreamingSettings, directory: Path) -> Path | None:
    """Return the path of the ledger's file, ``None`` if the ledger is on a server."""
    url = settings.database_url
    if url is None:
        return (directory / "ledger.sqlite3").absolute()
    return Path(url.removeprefix("sqlite:///")).absolute() if url.startswith("sqlite:") else None


def ledger_url(settings: StreamingSettings, directory: Path) -> str:
    """Return the SQLAlchemy URL of the ledger; raise ``StoreError`` for SQLite on a network file system."""
    url = settings.database_url or f"sqlite:///{directory / 'ledger.sqlite3'}"
    path = ledger_file(settings, directory)
    if path is not None:
        kind = filesystems.filesystem_of(path.parent)
        if kind in filesystems.NETWORK_FILESYSTEMS:
            msg = (
                f"{path} is on {kind}, where SQLite's locks are not reliable: set STREAMING_DATABASE_URL "
                "to sqlite:///PATH on a local disk, or to a PostgreSQL database"
            )
            raise StoreError(msg, reason="store-unsafe")
    return url


def has_ledger(settings: StreamingSettings) -> bool:
    """Return whether the store's own folder contains a ledger, and so had a ``store.json``."""
    if settings.database_url is not None or settings.directory is None:
        return False
    return (settings.directory / "ledger.sqlite3").is_file()


def ledger_off(why: str) -> LedgerError:
    """Return the error for a use of the ledger while it is switched off, *why* in words."""
    return LedgerError(f"no ledger is opened: {why} (ledger-off)", reason="ledger-off")


def check_files(settings: StreamingSettings) -> None:
    """Raise ``StoreError`` if one of the store's files is a link, a pipe or the like; open nothing."""
    directory = settings.directory
    if directory is None:
        return
    refuse_planted(*(directory / name for name in ("store.json", "store.lock", "maintenance.lock")))
    ledger = None if settings.why_no_ledger is not None else ledger_file(settings, directory)
    if ledger is not None:
        from scrapy_streaming.storage.ledger.sqlite import files_of

        refuse_planted(*files_of(ledger))
