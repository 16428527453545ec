"""Adopting files that other programs stored in this store, before a crawl asks for them.

What may live here: which files are adopted, and what the ledger records of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from scrapy_streaming.exceptions import NotAdopted
from scrapy_streaming.protocol.jobs import NotedFile
from scrapy_streaming.storage.blobs import Adopted
from scrapy_streaming.storage.maintenance.common import Progress, Store, alone, batches
from scrapy_streaming.storage.maintenance.inspection import THREADS

#: Called with each file that is not adopted: its name and the reason.
Refused = Callable[[str, str], object]


@dataclass
class Adoption:
    """What ``adopt`` did: ``files`` and ``bytes`` examined, files ``adopted`` now and ``refused``.

    ``known`` had been adopted before and were not read again.
    """

    files: int = 0
    bytes: int = 0
    adopted: int = 0
    known: int = 0
    refused: int = 0


def adopt(
    store: Store,
    *,
    refused: Refused,
    spared: Collection[Path] = (),
    progress: Progress | None = None,
) -> Adoption:
    """Make a blob of every file in the store, and record its digest by its name; return what was done.

    Each file is read once; one that was recorded before and has not changed is not read again, so that an
    interrupted run can be continued. No job is created: the crawl that needs a name finds its record.
    *spared* are files that do not belong to the store. *refused* is called with each file that is not
    adopted. Crawls may run. Raises ``MaintenanceRuns``, ``LedgerError``, ``WriteFailed``, ``OSError``.
    """
    result, stop = Adoption(), threading.Event()
    with alone(store), ThreadPoolExecutor(THREADS, "ss-adopt") as pool, ExitStack() as undo:
        undo.callback(stop.set)  # when interrupted, the threads stop in the middle of a large file

        def take(path: str) -> Adopted | NotAdopted:
            return _take(store, path, noted.get(path), stop)

        for some in batches(store.blobs.names(spared)):
            noted = store.ledger.noted_files(some).result()
            taken = dict(zip(some, pool.map(take, some), strict=True))
            _note(store, taken, noted)
            for path, one in taken.items():
                result.files += 1
                if isinstance(one, NotAdopted):
                    result.refused += 1
                    refused(path, one.reason)
                    continue
                result.bytes += one.size
                result.adopted += one.hashed
                result.known += not one.hashed
            if progress is not None:
                progress(result.files, result.bytes)
    return result


def _take(store: Store, path: str, noted: NotedFile | None, stop: threading.Event) -> Adopted | NotAdopted:
    """Return the file as a blob, or why it was not adopted."""
    try:
        return store.blobs.adopt(path, noted=noted, stop=stop, alone=True)
    except NotAdopted as refusal:
        return refusal
    except PermissionError:
        return NotAdopted(path, "unreadable")


def _note(store: Store, taken: dict[str, Adopted | NotAdopted], before: dict[str, NotedFile]) -> None:
    """Record what was adopted and not recorded before; what cannot be becomes a refusal in *taken*."""
    found = {
        path: (NotedFile(one.digest.hex, one.size, one.file_stamp), one.stamp)
        for path, one in taken.items()
        if isinstance(one, Adopted)
    }
    new = {path: file for path, file in found.items() if file[0] != before.get(path)}
    noted = store.ledger.note_files(new).result() if new else frozenset()
    taken.update({path: NotAdopted(path, "blob-going") for path in new.keys() - noted})
