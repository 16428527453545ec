"""What the parts of maintenance share: the store they work on, who else runs, the time, batches."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.storage.blobs import LocalBlobStore
from scrapy_streaming.storage.parts import PartStore

if TYPE_CHECKING:
    from scrapy_streaming.storage.ledger import Ledger

T = TypeVar("T")

#: Blobs that one round marks, moves and records: a mark must not grow old meanwhile.
BATCH: Final = 256

_WORKER = re.compile(r"[^.].*-[0-9]+-[0-9a-f]{16}", re.ASCII)

#: Called now and then with what was looked at so far: how many files, how many bytes.
Progress = Callable[[int, int], None]


class Store(Protocol):
    """What maintenance needs of an open ``Storage``."""

    @property
    def parts(self) -> PartStore:
        """The parts."""

    @property
    def blobs(self) -> LocalBlobStore:
        """The blobs and names."""

    @property
    def ledger(self) -> Ledger:
        """The ledger."""

    @property
    def worker_id(self) -> str:
        """Who we are: the name of our file in ``workers/``."""

    def refuse_unknown(self) -> None:
        """Raise ``LedgerError`` if blobs may be there that the ledger does not know."""


class MaintenanceRuns(StoreError):
    """Another process looks after this store just now."""

    reason = "maintenance-runs"


def own_directory(store: Store) -> Path:
    """Return where parts, quarantine and the workers' files are."""
    return store.parts.directory.parent


@contextmanager
def alone(store: Store) -> Iterator[float]:
    """Keep other maintenance out; gives the time by the store's own clock, seconds since the epoch.

    Raises ``MaintenanceRuns``. Where locks do nothing, two at once only disturb each other: what
    each does is safe beside crawls, and so beside the other.
    """
    path = own_directory(store) / "maintenance.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            msg = f"another verify, gc or rebuild of this store runs ({path} is locked)"
            raise MaintenanceRuns(msg) from error
        os.utime(fd)  # the filesystem's clock, which may be another machine's
        yield os.fstat(fd).st_ctime
    finally:
        os.close(fd)


def running_workers(folder: Path, mine: str | None = None) -> list[str]:
    """Return the workers, other than *mine*, whose files are in *folder* and that may be alive.

    Of this machine those whose lock is held; of another machine's nobody can tell.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    workers = (name for name in names if _WORKER.fullmatch(name) is not None)
    return [name for name in workers if name != mine and _runs(folder / name)]


def _runs(path: Path) -> bool:
    if path.name.rsplit("-", 2)[0] != socket.gethostname():
        return True
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False  # gone, or no worker's file
    try:
        return not lock(fd)
    finally:
        os.close(fd)


def lock(fd: int) -> bool:
    """Whether nobody else has the file locked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def batches(values: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """Give *values* in lists of *size* at most."""
    rest = iter(values)
    while some := list(islice(rest, size)):
        yield some


def entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Give what is in a directory with its ``lstat``; nothing if there is none."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for name in sorted(os.listdir(folder)):
            with suppress(FileNotFoundError):
                yield folder / name, os.lstat(folder / name)


def is_file(info: os.stat_result) -> bool:
    """Whether it is a regular file."""
    return stat.S_ISREG(info.st_mode)
