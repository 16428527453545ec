"""What the modules of maintenance share: the store as they need it, their lock, batches.

What may live here: what two of them need.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.storage.blobs import BlobStore
from scrapy_streaming.storage.parts import PartStore

if TYPE_CHECKING:
    from scrapy_streaming.storage.ledger import Ledger, Queries

T = TypeVar("T")

#: Items handled together; ``gc`` marks, moves and records so many blobs before a mark counts as abandoned.
BATCH: Final = 256

#: Called from time to time with the numbers of files and bytes examined so far.
Progress = Callable[[int, int], None]


class ReadableStore(Protocol):
    """What maintenance that only reads needs of a ``Storage`` or of a ``StoreView``."""

    @property
    def blobs(self) -> BlobStore:
        """The blobs and names."""

    @property
    def ledger(self) -> Queries:
        """The ledger's verbs that read."""

    def refuse_unknown(self) -> None:
        """Raise ``LedgerError`` if there may be blobs that the ledger does not have."""


class Store(Protocol):
    """What maintenance needs of an open ``Storage``."""

    @property
    def parts(self) -> PartStore:
        """The parts."""

    @property
    def blobs(self) -> BlobStore:
        """The blobs and names."""

    @property
    def ledger(self) -> Ledger:
        """The ledger."""

    @property
    def worker_id(self) -> str:
        """The id of this worker, which is the name of its file in ``workers/``."""

    def refuse_unknown(self) -> None:
        """Raise ``LedgerError`` if there may be blobs that the ledger does not have."""


class MaintenanceRuns(StoreError):
    """Another process runs maintenance on this store."""

    reason = "maintenance-runs"


def own_directory(store: Store) -> Path:
    """Return the folder of parts, quarantine and the workers' files."""
    return store.parts.directory.parent


@contextmanager
def alone(store: Store) -> Iterator[float]:
    """Exclude other maintenance; yield the time by the file system's clock, in seconds since the epoch.

    Raises ``MaintenanceRuns``, ``OSError``. Where locks have no effect, two runs at once are slower and still
    correct: every step is safe beside crawls, and so beside another run.
    """
    path = own_directory(store) / "maintenance.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            msg = f"other maintenance of this store is running, such as verify or gc ({path} is locked)"
            raise MaintenanceRuns(msg) from error
        os.utime(fd)  # by the file system's clock, which may be another machine's
        yield os.fstat(fd).st_ctime
    finally:
        os.close(fd)


def batches(values: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """Yield *values* in lists of at most *size*."""
    rest = iter(values)
    while some := list(islice(rest, size)):
        yield some
