"""Where the files of a store are that the settings name, and whether they are plain files.

What may live here: what can be decided before anything is opened.
"""

from __future__ import annotations

from pathlib import Path

from scrapy_streaming.exceptions import LedgerError, StoreError
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import filesystems
from scrapy_streaming.storage.planted import refuse_planted


def ledger_file(settings: StreamingSettings, directory: Path) -> Path | None:
    """Return the ledger's file, ``None`` if it is in a server."""
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
                f"{path} is on {kind}, where SQLite's locks cannot be trusted: set STREAMING_DATABASE_URL "
                "to sqlite:///PATH on a local disk, or to a PostgreSQL database"
            )
            raise StoreError(msg, reason="store-unsafe")
    return url


def has_ledger(settings: StreamingSettings) -> bool:
    """Return whether a ledger is in the store's own folder: then there was a ``store.json``, too."""
    if settings.database_url is not None or settings.directory is None:
        return False
    return (settings.directory / "ledger.sqlite3").is_file()


def ledger_off(why: str) -> LedgerError:
    """Return the error for a use that needs a ledger while there is none."""
    return LedgerError(f"no ledger is opened: {why} (ledger-off)", reason="ledger-off")


def check_files(settings: StreamingSettings) -> None:
    """Raise ``StoreError`` if a link, a pipe or the like is in the place of a store's file; open nothing."""
    directory = settings.directory
    if directory is None:
        return
    refuse_planted(*(directory / name for name in ("store.json", "store.lock", "maintenance.lock")))
    ledger = None if settings.why_no_ledger is not None else ledger_file(settings, directory)
    if ledger is not None:
        from scrapy_streaming.storage.ledger.sqlite import files_of

        refuse_planted(*files_of(ledger))
