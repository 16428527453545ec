"""The verbs of ``scrapy streaming`` for arriving and leaving: what they do, and what they print.

As in ``console``: each takes the settings and its options, prints, and returns the exit code. Raises what
the store and the ledger raise.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from scrapy_streaming.console import line, out
from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import Storage, ledger_file, maintenance
from scrapy_streaming.storage.ledger.sqlite import files_of


@contextmanager
def _progress(what: str, things: str) -> Iterator[maintenance.Progress | None]:
    """Give what shows how far a long verb is, on a terminal."""
    if not sys.stderr.isatty():
        yield None
        return

    def show(number: int, size: int) -> None:
        sys.stderr.write(f"\r{what}: {number} {things}, {size >> 20} MiB ")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


# -- adopt ----------------------------------------------------------------------------------


def adopt(settings: StreamingSettings, given: Namespace) -> int:
    """Take over the files that another program stored; 1 if some could not be, each named."""
    refused: list[dict[str, str]] = []

    def say(path: str, reason: str) -> None:
        if given.json:
            refused.append({"path": path, "reason": reason})
        else:
            line(reason, path)

    with _made(settings) as store, _progress("adopt", "files") as progress:
        result = maintenance.adopt(store, refused=say, spared=_spared(settings), progress=progress)
    if given.json:
        out(json.dumps(dataclasses.asdict(result) | {"refused": refused}, indent=2))
    else:
        out(
            f"adopt: {result.files} files, {result.bytes} bytes: {result.adopted} taken over, "
            f"{result.known} were known, {result.refused} refused"
        )
    return int(result.refused > 0)


def _made(settings: StreamingSettings) -> closing[Storage]:
    """Return the store, made in a folder that is none yet; raise ``StoreError`` without a folder."""
    if settings.store is not None and not settings.store.is_dir():
        msg = f"FILES_STORE={str(settings.store)!r} is no folder: there is nothing to take over"
        raise StoreError(msg, reason="store-missing")
    if not settings.finalization_enabled:
        msg = "STREAMING_FINALIZATION_ENABLED is off: files are taken over as blobs, and there are none"
        raise StoreError(msg, reason="finalization-off")
    return closing(Storage.open(settings))


def _spared(settings: StreamingSettings) -> tuple[Path, ...]:
    """Return the ledger's files: they may stand among the store's."""
    path = None if settings.directory is None else ledger_file(settings, settings.directory)
    return () if path is None else tuple(Path(each) for each in files_of(path))


VERBS: Final[dict[str, Callable[[StreamingSettings, Namespace], int]]] = {"adopt": adopt}
