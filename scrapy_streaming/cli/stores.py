"""What verbs on the store share: how they open it, and how they report files that they refuse."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

from scrapy_streaming.cli.output import write_row
from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.ledger.sqlite import files_of
from scrapy_streaming.storage.locations import ledger_file
from scrapy_streaming.storage.store import Storage, Use
from scrapy_streaming.storage.workers import running_workers

#: The file name that means standard input or output.
STANDARD_STREAM: Final = "-"


def opened(settings: StreamingSettings) -> closing[Storage]:
    """Return the store, closed at the end of the block; it is not made if there is none."""
    return closing(Storage.open(settings, Use.MAINTAIN))


def opened_for_files(settings: StreamingSettings) -> closing[Storage]:
    """Return the store of a folder of files, which becomes a store if it is none yet.

    Raises ``StoreError``: ``store-missing`` without a folder, ``finalization-off`` where no blobs are kept.
    """
    if settings.store is not None and not settings.store.is_dir():
        msg = f"FILES_STORE={str(settings.store)!r} is no folder: there are no files to adopt"
        raise StoreError(msg, reason="store-missing")
    if not settings.finalization_enabled:
        msg = "STREAMING_FINALIZATION_ENABLED is off: files are adopted as blobs, and there are none"
        raise StoreError(msg, reason="finalization-off")
    return closing(Storage.open(settings))


def refuse_while_used(settings: StreamingSettings) -> None:
    """Raise ``StoreError`` (``store-busy``) while a crawl, or another verb, uses the store."""
    if settings.directory is None:
        return  # refused when it is opened
    workers = settings.directory / "workers"
    running = running_workers(workers)
    if running:
        msg = (
            f"worker {running[0]} uses this store: end it first; if it no longer runs, "
            f"remove {workers / running[0]}"
        )
        raise StoreError(msg, reason="store-busy")


def sqlite_file(settings: StreamingSettings) -> Path | None:
    """Return the ledger's SQLite file; ``None`` if the ledger is on a server."""
    return None if settings.directory is None else ledger_file(settings, settings.directory)


def ledger_paths(settings: StreamingSettings) -> tuple[Path, ...]:
    """Return the ledger's files, which may stand among the store's; none if it is on a server."""
    path = sqlite_file(settings)
    return () if path is None else tuple(Path(each) for each in files_of(path))


def refused_paths(*, as_json: bool) -> tuple[list[dict[str, str]], Callable[[str, str], None]]:
    """Return a list of refused files, and a callback for each that fills the list, or prints a row."""
    refused: list[dict[str, str]] = []

    def refuse(path: str, reason: str) -> None:
        if as_json:
            refused.append({"path": path, "reason": reason})
        else:
            write_row(reason, path)

    return refused, refuse
