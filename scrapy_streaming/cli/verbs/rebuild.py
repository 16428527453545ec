"""Make a ledger from the files in the store.

For a ledger that is lost or damaged; the damaged one is kept. A sound ledger is
completed. Exit code 1 if the bytes of a blob are wrong.

Examples:
  scrapy streaming rebuild
"""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Final

from scrapy_streaming.cli.output import ExitCode, progress_of, write, write_json, write_row
from scrapy_streaming.cli.registry import Invocation, Verb
from scrapy_streaming.cli.stores import refuse_while_used, sqlite_file
from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import maintenance
from scrapy_streaming.storage.ledger import Ledger
from scrapy_streaming.storage.store import Storage, Use

#: Reasons for which a ledger's file cannot be opened, and another is made in its place.
UNUSABLE: Final = frozenset({"ledger-corrupt", "ledger-foreign", "ledger-row", "ledger-unusable"})


def rebuild(invocation: Invocation) -> int:
    """Record the blobs in a new ledger, or in the sound one that exists."""
    refuse_while_used(invocation.settings)
    store, damaged = _open_sound(invocation.settings)
    with closing(store), progress_of("rebuild") as progress:
        rows = store.ledger.table_rows().result()
        existed = bool(rows["ss_job"] or rows["ss_blob"])
        result = maintenance.rebuild(store, progress=progress)
    if invocation.as_json:
        extra = {"ledger": "completed" if existed else "new", "damaged_ledger": damaged and str(damaged)}
        write_json(dataclasses.asdict(result) | extra)
    else:
        for digest in result.bad:
            write_row("bad-bytes", digest)
        aside = f"; the old ledger is kept as {damaged}" if damaged else ""
        write(
            f"rebuild: {'completed the ledger' if existed else 'made a new ledger'}, {result.adopted} blobs "
            f"recorded, {result.known} were known, {len(result.bad)} bad{aside}"
        )
    return ExitCode.WRONG if result.bad else ExitCode.FINE


def _open_sound(settings: StreamingSettings) -> tuple[Storage, Path | None]:
    """Return the store with a sound ledger, and where a damaged one was moved."""
    path = sqlite_file(settings)
    try:
        store = Storage.open(settings, Use.REBUILD)
    except LedgerError as error:
        if error.reason not in UNUSABLE or path is None:
            _raise_with_remedy(error)
            raise
    else:
        if _is_sound(store.ledger):
            return store, None
        store.close()
        if path is None:
            msg = "the ledger in the server is not sound; name an empty database in STREAMING_DATABASE_URL"
            raise LedgerError(msg, reason="ledger-corrupt")
    moved = maintenance.move_aside(path)
    return Storage.open(settings, Use.REBUILD), moved


def _is_sound(ledger: Ledger) -> bool:
    """Whether a ledger can be read to its end, and no row of it is damaged."""
    try:
        return not ledger.check() and not ledger.invariant_violations().result()
    except LedgerError as error:
        if error.reason != "ledger-corrupt":
            raise
        return False


def _raise_with_remedy(error: LedgerError) -> None:
    """Raise the error again with a remedy, if the ledger on a server is another store's: it stays there."""
    if error.reason == "ledger-foreign":
        why = error.__cause__ or error
        msg = f"{why.args[0]}; name this store's own database, or an empty one, in STREAMING_DATABASE_URL"
        raise LedgerError(msg, reason=error.reason) from error


VERB = Verb(rebuild)
